"""The gap between evidence and ELBO, split: how much the family costs, and how much sharing one encoder."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.batches import Batch, as_arguments
from pyro_vae.conditionals import Conditional
from pyro_vae.diagnostics.families import Family, Readouts, as_gaussian
from pyro_vae.exact import ExactModel
from pyro_vae.pair import Program, untouched
from pyro_vae.particles import Latents

Parameters = Mapping[str, dict[str, Tensor]]

# What models say of the best of a family that is no Gaussian's: the names of their methods.
_KNOWN = {dist.Normal: "mean_field", dist.LogNormal: "log_normal"}


class GapSplit(NamedTuple):
    """gap = approximation + amortization, in nats, each ``(batch,)`` with its standard error.

    approximation = log p(x) − L[q*], with q* the best of the guide's family for that datum; amortization = L[q*] − L[q].
    Where the evidence is not known the approximation is ``nan``. ``steps`` is how many the search for q* took; 0 where q* is in
    closed form, and then an error of 0 says that a part is too. After a search both are estimates, and a q* that is short of
    its optimum moves amortization into approximation.
    """

    approximation: Tensor
    approximation_error: Tensor
    amortization: Tensor
    amortization_error: Tensor
    steps: int


def split_gap(
    model: Program,
    guide: Program,
    *args: Any,
    log_evidence: Tensor | None = None,
    num_particles: int = 1000,
    tolerance: float = 1e-3,
    max_steps: int = 5000,
    seed: int = 0,
    **kwargs: Any,
) -> GapSplit:
    """Split the gap of a guide per datum (Cremer et al. 2018).

    q* is the guide's own family with parameters of its own for each datum: any Gaussian, diagonal or full, where a guide draws
    from one. Where several latents depend on each other, each goes on depending on the others as the guide says, and its
    parameters are shifted for each datum. What all data share in a flow stays as it is.

    q* is in closed form where the model knows it: a Gaussian posterior, and the models that say ``mean_field(x)`` or
    ``log_normal(x)``. Otherwise it is searched, from the guide, by Adam on reparameterized gradients of 32 draws, all data at
    once. The step size is halved whenever a hundred steps have not gained ``tolerance`` nats per datum; when that has happened
    eight times, q* is the mean of five hundred steps more, or the guide itself where that is better.

    :param args: the arguments of model and guide, ``(batch, *event)``.
    :param log_evidence: log p(x) per datum; by default ``model.log_evidence`` where the model knows it.
    :param num_particles: draws for each ELBO that has no closed form.
    :raises ValueError: for a guide whose family is not known by its parameters.
    """
    batch = as_arguments(args, kwargs)
    if log_evidence is None and hasattr(model, "log_evidence"):
        log_evidence = model.log_evidence(*args, **kwargs)
    with untouched(training=False, seed=seed):
        pair = _Pair(model, guide, batch)
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
        approximation_error=errors[0],
        amortization=amortization,
        amortization_error=torch.hypot(*errors),
        steps=steps,
    )


class _Freed(Messenger):
    """A handler that gives a guide's sites members of their families."""

    def __init__(self, families: Mapping[str, Family | Readouts], parameters: Parameters) -> None:
        super().__init__()
        self.families, self.parameters = families, parameters

    def _pyro_sample(self, msg: dict) -> None:
        name = msg["name"]
        if name in self.families and not msg["is_observed"]:
            msg["fn"] = self.families[name].member(msg["fn"], self.parameters[name])


class _Pair:
    """A pair whose guide's families are free: its ELBO at any parameters of theirs. ``start`` are those of the guide."""

    def __init__(self, model: Program, guide: Program, batch: Batch) -> None:
        self.model, self.guide, self.batch = model, guide, batch
        self.latents = Latents(model, batch)
        with torch.no_grad():
            z, _ = self.latents.draw(guide, batch, 2)  # a guide that has no log q(z|x) says so
            trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            fns = {name: trace.nodes[name]["fn"] for name in self.latents.sites}
            readouts = self._readouts(fns, z[0])
        self.families = readouts or {name: Family(fns[name], site.rows) for name, site in self.latents.sites.items()}
        self.start = {name: family.start for name, family in self.families.items()}

    def _readouts(self, fns: dict[str, Any], z: Tensor) -> dict[str, Family | Readouts]:
        """The family of the guide's encoder, where it has one of ours and draws from it what the encoder says of its data."""
        encoder = getattr(self.guide, "encoder", None)
        if not isinstance(encoder, Conditional) or len(fns) > 1 or self.batch.kwargs:
            return {}
        ((name, fn),) = fns.items()
        with suppress(Exception):  # an attribute of that name need not be what the guide draws from
            family = Readouts(encoder, self.batch.args)
            own, read = (q.log_prob(z.reshape(q.shape())) for q in (fn, family.member(fn, family.start)))
            if torch.allclose(own, read, rtol=1e-3, atol=1e-3):
                return {name: family}
        return {}

    def elbo(self, parameters: Parameters, num_particles: int) -> Tensor:
        """log p(x, z) − log q(z) at draws of the families: ``(particles, batch)``."""
        z, log_q = self.latents.draw(_Freed(self.families, parameters)(self.guide), self.batch, num_particles)
        return self.latents.log_prob(self.model, self.batch, z) - log_q


@torch.no_grad()
def _closed_form(pair: _Pair, log_evidence: Tensor, num_particles: int) -> GapSplit | None:
    """The split where the best of the family is known in closed form; between Gaussians all of it is."""
    known = _best(pair)
    if known is None:
        return None
    gap_of_best, posterior = known
    q = as_gaussian(pair.latents.distribution(pair.guide, pair.batch), posterior.batch_shape)
    p = as_gaussian(posterior, posterior.batch_shape)
    zero = torch.zeros_like(gap_of_best)
    if q is not None and p is not None:
        return GapSplit(gap_of_best, zero, kl_divergence(q, p) - gap_of_best, zero, steps=0)
    own = pair.elbo(pair.start, num_particles)
    amortization = log_evidence - gap_of_best - own.mean(0)
    return GapSplit(gap_of_best, zero, amortization, own.std(0) / math.sqrt(num_particles), steps=0)


def _best(pair: _Pair) -> tuple[Tensor, Any] | None:
    """KL(q*‖p) per datum of the best of the guide's family, and p, where a model knows them."""
    family, *others = pair.families.values()
    if others or family.kind is None or not isinstance(pair.model, ExactModel):
        return None
    (x,) = pair.batch.args
    posterior = pair.model.posterior(x)
    p, name = as_gaussian(posterior, posterior.batch_shape), _KNOWN.get(family.kind, "")
    if p is not None and family.kind is dist.MultivariateNormal:
        q, gap = p, torch.zeros_like(p.loc[:, 0])
    elif p is not None and family.kind is dist.Normal:
        precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
        q = dist.Normal(p.loc, precision**-0.5).to_event(1)
        gap = 0.5 * (precision.log().sum(-1) + p.covariance_matrix.logdet())
    elif hasattr(pair.model, name):
        q, gap = getattr(pair.model, name)(x), getattr(pair.model, f"{name}_gap")(x)
    else:
        return None
    return (gap, posterior) if family.holds(q) else None


def _search(pair: _Pair, tolerance: float, max_steps: int) -> tuple[Parameters, int]:
    """The best parameters of the families for each datum, and the steps it took."""
    parameters = {name: {k: v.clone().requires_grad_() for k, v in own.items()} for name, own in pair.start.items()}
    optimizer = torch.optim.Adam([leaf for own in parameters.values() for leaf in own.values()], lr=0.05)
    reached, halvings, steps = -math.inf, 0, 0
    while halvings < 8 and steps < max_steps:
        value, _ = _block(pair, parameters, optimizer, 100)
        steps += 100
        if value < reached + tolerance:
            halvings += 1
            optimizer.param_groups[0]["lr"] /= 2
        reached = max(reached, value)
    _, means = _block(pair, parameters, optimizer, 500)
    named = iter(means)
    best = {name: {k: next(named) for k in own} for name, own in parameters.items()}
    _keep_better(pair, best)
    return best, steps + 500


@torch.no_grad()
def _keep_better(pair: _Pair, best: Parameters) -> None:
    """A datum whose search ended below its start, as between the modes of a mixture, goes back to it."""
    ended, began = (pair.elbo(parameters, 1000).mean(0) for parameters in (best, pair.start))
    for name, own in best.items():
        for key, value in own.items():
            worse = (ended < began).reshape(-1, *[1] * (value.dim() - 1))
            own[key] = torch.where(worse, pair.start[name][key], value)


def _block(pair: _Pair, parameters: Parameters, optimizer: torch.optim.Optimizer, steps: int) -> tuple[float, list[Tensor]]:
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
