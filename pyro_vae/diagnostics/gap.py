"""Split of the gap between log p(x) and ELBO into the approximation gap of the variational family and the
amortization gap of a shared encoder."""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.conditionals import FromTrunk
from pyro_vae.data.batches import Batch, fitting
from pyro_vae.diagnostics.families import Family, ReadoutFamily, as_gaussian, is_same
from pyro_vae.diagnostics.tables import over_data, table
from pyro_vae.exact import ExactModel
from pyro_vae.exact.grid import log_evidence_of
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program

logger = logging.getLogger(__name__)
Shifts = Mapping[str, dict[str, Tensor]]


@dataclass(frozen=True)
class GapSplit:
    """gap = approximation + amortization, in nats, each ``(batch,)`` with its standard error.

    approximation = log p(x) − L[q*] and amortization = L[q*] − L[q], where L is the ELBO, and q* maximizes L
    within the guide's family, separately for each datum. The approximation is ``nan`` if log p(x) is not
    known.

    steps: number of optimization steps for q*, 0 if q* is in closed form. A part in closed form has standard
    error 0. If q* is optimized, both parts are estimates. If the optimization ends short of the optimum,
    the approximation gap is overestimated and the amortization gap underestimated.
    """

    approximation: Tensor
    approximation_se: Tensor
    amortization: Tensor
    amortization_se: Tensor
    steps: int

    def __str__(self) -> str:
        rows = {
            "gap: approximation": over_data(self.approximation),
            "gap: amortization": over_data(self.amortization),
        }
        how = f"optimized in {self.steps} steps" if self.steps else "in closed form"
        return table(f"{len(self.amortization)} data, means in nats per datum; q* {how}", rows)


def split_gap(
    model: Program,
    guide: Program,
    data: Any,
    *,
    log_evidence: Tensor | None = None,
    num_particles: int = 1000,
    tolerance: float = 1e-3,
    max_steps: int = 5000,
    seed: int = 0,
    check: bool = True,
) -> GapSplit:
    """Split log p(x) − ELBO into approximation and amortization gap, per datum (Cremer et al. 2018).

    Let q* be the guide whose ELBO is the highest if each datum has separate parameters. The approximation gap
    is log p(x) minus the ELBO of q*, and the amortization gap is the rest. If the guide calls one conditional
    of pyro_vae for each latent, these parameters are the outputs of its read-outs (the last layers,
    one for each parameter of the distribution). If the read-outs give location and scale, q* can be any
    diagonal Gaussian. For other guides, all parameters of the guide's distributions are separate. Whatever
    all data share does not change: a fixed, learned or isotropic scale, ``min_scale``, the networks of a
    flow, and the dependence of a latent on others.

    q* is in closed form if the model implements ``ExactModel.best`` for the guide's family: Gaussians for a
    Gaussian posterior, diagonal Gaussians for the funnel and the banana, a log-normal for Gamma–Poisson.
    Otherwise Adam optimizes q* for all data at once. It starts at the guide and uses reparameterized
    gradients of 32 draws. The learning rate is halved whenever 100 steps gain less than ``tolerance`` nats
    per datum. After eight halvings, the parameters are averaged over 500 more steps. For data where the guide
    itself has a larger ELBO than this average, q* is the guide.

    :param data: as for :func:`~pyro_vae.fit`.
    :param log_evidence: log p(x), ``(batch,)``; default ``model.log_evidence`` if the model has it.
    :param num_particles: draws for each ELBO that has no closed form, 2 or more.
    :param tolerance: in nats per datum; a smaller gain of 100 steps halves the learning rate.
    :param max_steps: largest number of steps, not counting the last 500. A warning is logged if the ELBO
        still improves then.
    :param seed: seed of the draws.
    :param check: ``False`` runs a pair even if :func:`~pyro_vae.check_pair` reports problems, unless the
        result is undefined.
    :raises ValueError: if the guide's family is not supported, or ``log_evidence`` has another shape.
    """
    batch = fitting(read_whole(data, seed=seed), model, guide)
    if num_particles < 2:
        raise ValueError(
            f"split_gap: expected num_particles ≥ 2, for standard errors, but got {num_particles}"
        )
    if log_evidence is None and hasattr(model, "log_evidence"):
        log_evidence = log_evidence_of(model, batch)
    if log_evidence is not None and log_evidence.shape != (batch.num_rows,):
        raise ValueError(
            f"split_gap: log_evidence has shape {tuple(log_evidence.shape)}; expected ({batch.num_rows},), "
            "one number per datum"
        )
    with untouched(training=False, seed=seed):
        pair = _PerDatumPair(model, guide, batch, check=check)
        if log_evidence is not None and (split := _closed_form(pair, log_evidence, num_particles)):
            return split
        best, steps = _optimize(pair, tolerance, max_steps)
        with torch.no_grad():
            terms_best, terms_guide = (pair.elbo(shifts, num_particles) for shifts in (best, pair.start))
    amortization = terms_best.mean(0) - terms_guide.mean(0)
    se_best, se_guide = (terms.std(0) / math.sqrt(num_particles) for terms in (terms_best, terms_guide))
    unknown = torch.full_like(amortization, math.nan)
    return GapSplit(
        approximation=unknown if log_evidence is None else log_evidence - terms_best.mean(0),
        approximation_se=se_best,
        amortization=amortization,
        amortization_se=torch.hypot(se_best, se_guide),
        steps=steps,
    )


class _PerDatumPair:
    """A pair whose guide has separate parameters for each datum: the parameters of ``guide`` plus shifts.
    ``start`` has shifts of zero, which give ``guide`` itself."""

    def __init__(self, model: Program, guide: Program, batch: Batch, *, check: bool = True) -> None:
        self.model, self.guide = model, guide
        self.latents, batch = inspect_latents(model, guide, batch, verb="split_gap", check=check)
        self.batch = batch
        with torch.no_grad():
            # this raises if the guide has no log q(z|x)
            self.draws = self.latents.draw(guide, batch, 2)
            calls: list[tuple[FromTrunk, Any]] = []
            hook = nn.modules.module.register_module_forward_hook(
                lambda module, _, q: calls.append((module, q)) if isinstance(module, FromTrunk) else None
            )
            try:
                trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            finally:
                hook.remove()
        self.fns = {name: trace.nodes[name]["fn"] for name in self.latents.sites}
        self.families = self._readout_families(calls) or {
            name: Family(name, self.fns[name], site.rows) for name, site in self.latents.sites.items()
        }
        self.conditional_output = calls[0][1] if calls else None
        self.start = {name: family.start for name, family in self.families.items()}

    def _readout_families(self, calls: list[tuple[FromTrunk, Any]]) -> dict[str, Family | ReadoutFamily]:
        """The families of the conditionals that the guide calls; ``{}`` if it does not call exactly one for
        each latent site."""
        (rows, *other_rows), n = {site.rows for site in self.latents.sites.values()}, self.batch.num_rows
        has_data_plate = all(len(q.batch_shape) == -rows and q.batch_shape[rows] == n for _, q in calls)
        is_one_per_site = len({conditional for conditional, _ in calls}) == len(calls) == len(self.fns)
        if other_rows or not has_data_plate or not is_one_per_site:
            return {}
        return {
            f"conditional {i}": ReadoutFamily(conditional, rows, n)
            for i, (conditional, _) in enumerate(calls)
        }

    def shifted_guide(self, shifts: Shifts) -> Program:
        """The guide with ``shifts`` added to the parameters of its distributions, separately for each
        datum."""

        def guide(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for name, family in self.families.items():
                    stack.enter_context(family.shifted(shifts[name]))
                return self.guide(*args, **kwargs)

        return guide

    def elbo(self, shifts: Shifts, num_particles: int) -> Tensor:
        """log p(x, z) − log q(z|x) at draws of the shifted guide: ``(particles, batch)``."""
        z, log_q = self.latents.draw(self.shifted_guide(shifts), self.batch, num_particles)
        return self.latents.log_joint(self.model, self.batch, z) - log_q

    @torch.no_grad()
    def kind(self) -> type | None:
        """The class of distributions that make up the guide's family. ``None`` if the family contains only
        some of them, if the guide has several sites, or if log q(z|x) has other terms, such as those of a
        mask or a factor."""
        family, *other_families = self.families.values()
        if other_families:
            return None
        (fn,) = self.fns.values()
        is_partial = isinstance(family, ReadoutFamily) and (
            family.kind is None or not is_same(fn, self.conditional_output)
        )
        if is_partial:
            return None
        z, log_q = self.draws
        log_prob = fn.log_prob(z.reshape(2, *fn.shape())).reshape(log_q.shape)
        return family.kind if torch.allclose(log_prob, log_q, rtol=1e-4, atol=1e-4) else None


@torch.no_grad()
def _closed_form(pair: _PerDatumPair, log_evidence: Tensor, num_particles: int) -> GapSplit | None:
    """The split with q* in closed form, or ``None``. If guide and posterior are Gaussian, the amortization
    gap is in closed form too."""
    kind, n = pair.kind(), pair.batch.num_rows
    if kind is None or not isinstance(pair.model, ExactModel):
        return None
    solution = pair.model.best(kind, *pair.batch.args, **pair.batch.kwargs)
    if solution is None:
        return None
    best, approximation = solution
    (family,) = pair.families.values()
    if not family.contains(best):
        return None
    zero = torch.zeros_like(approximation)
    (fn,) = pair.fns.values()
    q = as_gaussian(fn, n)
    p = as_gaussian(pair.model.posterior(*pair.batch.args, **pair.batch.kwargs), n)
    if q is not None and p is not None:
        return GapSplit(approximation, zero, kl_divergence(q, p).to(zero) - approximation, zero, steps=0)
    terms = pair.elbo(pair.start, num_particles)
    amortization = log_evidence - approximation - terms.mean(0)
    return GapSplit(approximation, zero, amortization, terms.std(0) / math.sqrt(num_particles), steps=0)


def _optimize(pair: _PerDatumPair, tolerance: float, max_steps: int) -> tuple[Shifts, int]:
    """The shifts of q* for each datum, and the number of optimization steps."""
    shifts = {
        name: {k: v.clone().requires_grad_() for k, v in tensors.items()}
        for name, tensors in pair.start.items()
    }
    optimizer = torch.optim.Adam(_leaves(shifts), lr=0.05)
    best_elbo, halvings, steps = -math.inf, 0, 0
    while halvings < 8 and steps < max_steps:
        elbo, _ = _run_steps(pair, shifts, optimizer, 100)
        steps += 100
        if elbo < best_elbo + tolerance:
            halvings += 1
            optimizer.param_groups[0]["lr"] /= 2
        best_elbo = max(best_elbo, elbo)
    if halvings < 8:
        logger.warning(
            "split_gap: the ELBO still improves after %d steps; pass a larger max_steps or tolerance", steps
        )
    _, means = _run_steps(pair, shifts, optimizer, 500)
    mean = iter(means)
    best = {name: {k: next(mean) for k in tensors} for name, tensors in shifts.items()}
    _restore_worse(pair, best)
    return best, steps + 500


@torch.no_grad()
def _restore_worse(pair: _PerDatumPair, shifts: Shifts) -> None:
    """Reset the shifts to zero, in place, for each datum where they give a lower ELBO than the guide. This
    happens if averaged parameters lie between the modes of a mixture."""
    elbo, start_elbo = (pair.elbo(s, 1000).mean(0) for s in (shifts, pair.start))
    for name, tensors in shifts.items():
        for key, value in tensors.items():
            is_worse = (elbo < start_elbo).reshape(-1, *[1] * (value.dim() - 1))
            tensors[key] = torch.where(is_worse, pair.start[name][key], value)


def _leaves(shifts: Shifts) -> list[Tensor]:
    return [leaf for tensors in shifts.values() for leaf in tensors.values()]


def _run_steps(
    pair: _PerDatumPair, shifts: Shifts, optimizer: torch.optim.Optimizer, num_steps: int
) -> tuple[float, list[Tensor]]:
    """Run ``num_steps`` optimization steps. Returns the ELBO and the shifts, averaged over the steps."""
    leaves = _leaves(shifts)
    means, mean_elbo = [torch.zeros_like(leaf) for leaf in leaves], 0.0
    for _ in range(num_steps):
        elbo = pair.elbo(shifts, 32).mean(0)
        for leaf, gradient in zip(leaves, torch.autograd.grad(-elbo.sum(), leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        mean_elbo += elbo.mean().item() / num_steps
        for mean, leaf in zip(means, leaves, strict=True):
            mean += leaf.detach() / num_steps
    return mean_elbo, means
