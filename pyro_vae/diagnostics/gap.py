"""The gap between evidence and ELBO, split: how much the family costs, and how much sharing one encoder."""

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
from pyro_vae.diagnostics.families import Family, Freed, as_gaussian, is_same
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

    approximation = log p(x) − L[q*], with q* the best of the guide's family for that datum; amortization =
    L[q*] − L[q]. Where the evidence is not known the approximation is ``nan``. ``steps`` is how many the
    search for q* took; 0 where q* is in closed form, and then an error of 0 says that a part is too. After a
    search both are estimates, and a q* that is short of its optimum moves amortization into approximation.
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
        how = f"searched in {self.steps} steps" if self.steps else "in closed form"
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
    """Split the gap of a guide per datum (Cremer et al. 2018).

    q* is the guide with parameters of its own for each datum: what the encoder's network says for a datum is
    shifted freely, so that it may be any diagonal Gaussian where the encoder gives location and scale. What
    all data share stays as it is and counts as the family: a fixed, learned or isotropic scale, the floor
    under it, the networks of a flow, and how one latent depends on another. Where the guide does not call one
    conditional of ours for each of its latents, the parameters of their distributions are shifted, all of
    them.

    q* is in closed form where an exact model knows it (``ExactModel.best``): Gaussians for a Gaussian
    posterior, diagonal ones for the funnel and the banana, a log-normal for Gamma–Poisson. Otherwise it is
    searched, from the guide, by Adam on reparameterized gradients of 32 draws, all data at once. The step
    size is halved whenever a hundred steps have not gained ``tolerance`` nats per datum; when that has
    happened eight times, q* is the mean of five hundred steps more, or the guide itself where that is better.

    :param data: as for :func:`~pyro_vae.fit`.
    :param log_evidence: log p(x) per datum; by default ``model.log_evidence`` where the model knows it.
    :param num_particles: draws for each ELBO that has no closed form, 2 or more.
    :param tolerance: nats per datum that a hundred steps must gain.
    :param max_steps: of the search, before the last five hundred; a warning is logged where they did not
        suffice.
    :param seed: of the draws.
    :param check: ``False`` runs a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :raises ValueError: for a guide whose family is not known by its parameters, or ``log_evidence`` of
    another length.
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
            "one number a datum"
        )
    with untouched(training=False, seed=seed):
        pair = _Pair(model, guide, batch, check=check)
        if log_evidence is not None and (known := _closed_form(pair, log_evidence, num_particles)):
            return known
        best, steps = _search(pair, tolerance, max_steps)
        with torch.no_grad():
            at_best, own = pair.elbo(best, num_particles), pair.elbo(pair.start, num_particles)
    amortization = at_best.mean(0) - own.mean(0)
    errors = [draws.std(0) / math.sqrt(num_particles) for draws in (at_best, own)]
    unknown = torch.full_like(amortization, math.nan)
    return GapSplit(
        approximation=unknown if log_evidence is None else log_evidence - at_best.mean(0),
        approximation_se=errors[0],
        amortization=amortization,
        amortization_se=torch.hypot(*errors),
        steps=steps,
    )


class _Pair:
    """A pair whose guide's families are free: its ELBO at any shifts of their parameters. ``start`` is the
    guide itself."""

    def __init__(self, model: Program, guide: Program, batch: Batch, *, check: bool = True) -> None:
        self.model, self.guide = model, guide
        self.latents, batch = inspect_latents(model, guide, batch, verb="split_gap", check=check)
        self.batch = batch
        with torch.no_grad():
            self.drawn = self.latents.draw(guide, batch, 2)  # a guide that has no log q(z|x) says so
            calls: list[tuple[FromTrunk, Any]] = []
            note = nn.modules.module.register_module_forward_hook(
                lambda module, _, q: calls.append((module, q)) if isinstance(module, FromTrunk) else None
            )
            try:
                trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            finally:
                note.remove()
        self.fns = {name: trace.nodes[name]["fn"] for name in self.latents.sites}
        self.families = self._by_readouts(calls) or {
            name: Family(name, self.fns[name], site.rows) for name, site in self.latents.sites.items()
        }
        self.said = calls[0][1] if calls else None
        self.start = {name: family.start for name, family in self.families.items()}

    def _by_readouts(self, calls: list[tuple[FromTrunk, Any]]) -> dict[str, Family | Freed]:
        """The families of the conditionals that the guide calls, where it calls one for each of its sites."""
        (rows, *others), n = {site.rows for site in self.latents.sites.values()}, self.batch.num_rows
        aligned = all(len(q.batch_shape) == -rows and q.batch_shape[rows] == n for _, q in calls)
        if others or not aligned or not len({c for c, _ in calls}) == len(calls) == len(self.fns):
            return {}
        return {f"conditional {i}": Freed(conditional, rows, n) for i, (conditional, _) in enumerate(calls)}

    def freed(self, shifts: Shifts) -> Program:
        """The guide with its families at these shifts."""

        def guide(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for name, family in self.families.items():
                    stack.enter_context(family.moved(shifts[name]))
                return self.guide(*args, **kwargs)

        return guide

    def elbo(self, shifts: Shifts, num_particles: int) -> Tensor:
        """log p(x, z) − log q(z) at draws of the families: ``(particles, batch)``."""
        z, log_q = self.latents.draw(self.freed(shifts), self.batch, num_particles)
        return self.latents.log_joint(self.model, self.batch, z) - log_q

    @torch.no_grad()
    def kind(self) -> type | None:
        """The family of distributions that the guide draws from, if it has one site, nothing else in log q,
        and all of the family to choose from."""
        family, *others = self.families.values()
        if others:
            return None
        ((_, fn),) = self.fns.items()
        if isinstance(family, Freed) and (family.kind is None or not is_same(fn, self.said)):
            return None
        z, log_q = self.drawn  # a mask or a factor would show
        alone = fn.log_prob(z.reshape(2, *fn.shape()))
        return (
            family.kind if torch.allclose(alone.reshape(log_q.shape), log_q, rtol=1e-4, atol=1e-4) else None
        )


@torch.no_grad()
def _closed_form(pair: _Pair, log_evidence: Tensor, num_particles: int) -> GapSplit | None:
    """The split where the best of the family is known in closed form; between Gaussians all of it is."""
    kind, n = pair.kind(), pair.batch.num_rows
    if kind is None or not isinstance(pair.model, ExactModel):
        return None
    known = pair.model.best(kind, *pair.batch.args, **pair.batch.kwargs)
    if known is None:
        return None
    best, gap_of_best = known
    (family,) = pair.families.values()
    if not family.holds(best):
        return None
    zero = torch.zeros_like(gap_of_best)
    (fn,) = pair.fns.values()
    q = as_gaussian(fn, n)
    p = as_gaussian(pair.model.posterior(*pair.batch.args, **pair.batch.kwargs), n)
    if q is not None and p is not None:
        return GapSplit(gap_of_best, zero, kl_divergence(q, p).to(zero) - gap_of_best, zero, steps=0)
    own = pair.elbo(pair.start, num_particles)
    amortization = log_evidence - gap_of_best - own.mean(0)
    return GapSplit(gap_of_best, zero, amortization, own.std(0) / math.sqrt(num_particles), steps=0)


def _search(pair: _Pair, tolerance: float, max_steps: int) -> tuple[Shifts, int]:
    """The best parameters of the families for each datum, and the steps it took."""
    parameters = {
        name: {k: v.clone().requires_grad_() for k, v in own.items()} for name, own in pair.start.items()
    }
    optimizer = torch.optim.Adam([leaf for own in parameters.values() for leaf in own.values()], lr=0.05)
    reached, halvings, steps = -math.inf, 0, 0
    while halvings < 8 and steps < max_steps:
        value, _ = _block(pair, parameters, optimizer, 100)
        steps += 100
        if value < reached + tolerance:
            halvings += 1
            optimizer.param_groups[0]["lr"] /= 2
        reached = max(reached, value)
    if halvings < 8:
        logger.warning(
            "split_gap: the search still gains after %d steps; expected a larger max_steps or tolerance",
            steps,
        )
    _, means = _block(pair, parameters, optimizer, 500)
    named = iter(means)
    best = {name: {k: next(named) for k in own} for name, own in parameters.items()}
    _keep_better(pair, best)
    return best, steps + 500


@torch.no_grad()
def _keep_better(pair: _Pair, best: Shifts) -> None:
    """A datum whose search ended below its start, as between the modes of a mixture, goes back to it."""
    ended, began = (pair.elbo(parameters, 1000).mean(0) for parameters in (best, pair.start))
    for name, own in best.items():
        for key, value in own.items():
            worse = (ended < began).reshape(-1, *[1] * (value.dim() - 1))
            own[key] = torch.where(worse, pair.start[name][key], value)


def _block(
    pair: _Pair, parameters: Shifts, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[float, list[Tensor]]:
    """So many steps: the mean ELBO along them, and the mean parameters."""
    leaves = [leaf for own in parameters.values() for leaf in own.values()]
    means, value = [torch.zeros_like(leaf) for leaf in leaves], 0.0
    for _ in range(steps):
        elbo = pair.elbo(parameters, 32).mean(0)
        for leaf, gradient in zip(leaves, torch.autograd.grad(-elbo.sum(), leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        value += elbo.mean().item() / steps
        for mean, leaf in zip(means, leaves, strict=True):
            mean += leaf.detach() / steps
    return value, means
