"""The gap between evidence and ELBO, split: how much the family costs, and how much sharing one encoder."""

import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.batches import Batch, as_arguments
from pyro_vae.conditionals import Conditional
from pyro_vae.diagnostics.families import Family, Readouts, UnknownFamily
from pyro_vae.pair import Program, untouched
from pyro_vae.particles import Latents

Parameters = dict[str, dict[str, Tensor]]


class GapSplit(NamedTuple):
    """gap = approximation + amortization, in nats, each ``(batch,)`` with its standard error.

    approximation = log p(x) − L[q*], with q* the best of the guide's family for that datum; amortization = L[q*] − L[q].
    Where the evidence is not known the approximation is ``nan``. Both are estimates: a q* that is short of its optimum moves
    amortization into approximation; ``steps`` is how many the search took.
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

    q* is the guide's own family with parameters of its own for each datum, started at the guide and optimized by Adam on
    reparameterized gradients of 32 draws, all data at once. The step size is halved whenever a hundred steps have not gained
    ``tolerance`` nats per datum; when that has happened eight times, q* is the mean of five hundred steps more, or
    the guide itself where that is better. Several latents are taken as independent given x, each in its own family.

    :param args: the arguments of model and guide, ``(batch, *event)``.
    :param log_evidence: log p(x) per datum; by default ``model.log_evidence`` where the model knows it.
    :param num_particles: draws for each of the two ELBOs.
    :raises ValueError: for a guide whose family is not known by its parameters.
    """
    batch = as_arguments(args, kwargs)
    if log_evidence is None and hasattr(model, "log_evidence"):
        log_evidence = model.log_evidence(*args, **kwargs)
    with untouched(training=False, seed=seed):
        search = _Search(model, guide, batch)
        steps = search.run(tolerance, max_steps)
        with torch.no_grad():
            best, own = search.elbo(search.best, num_particles), search.elbo(search.start, num_particles)
    amortization = best.mean(0) - own.mean(0)
    errors = [draws.std(0) / math.sqrt(num_particles) for draws in (best, own)]
    unknown = torch.full_like(amortization, math.nan)
    return GapSplit(
        approximation=unknown if log_evidence is None else log_evidence - best.mean(0),
        approximation_error=errors[0],
        amortization=amortization,
        amortization_error=torch.hypot(*errors),
        steps=steps,
    )


class _Search:
    """Parameters of a guide's families for each datum, on their way to the best ones."""

    def __init__(self, model: Program, guide: Program, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.latents = Latents(model, batch)
        with torch.no_grad():
            trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            z, log_q = self.latents.draw(guide, batch, 8)
        self.families = self._families(guide, trace, z, log_q)
        self.start = {name: family.start for name, family in self.families.items()}
        self.best = self.start

    def _families(self, guide: Program, trace: Trace, z: Tensor, log_q: Tensor) -> dict[str, Family | Readouts]:
        """By the read-outs of the guide's encoder where it is ours, else by the parameters of its distributions; whatever
        gives the guide's own log q at its own draws."""
        encoder = getattr(guide, "encoder", None)
        if isinstance(encoder, Conditional) and len(self.latents.sites) == 1 and not self.batch.kwargs:
            with suppress(Exception):  # an attribute of that name need not be what the guide draws from
                by_readouts: dict[str, Family | Readouts] = dict.fromkeys(
                    self.latents.sites, Readouts(encoder, self.batch.args)
                )
                if self._agrees(by_readouts, z, log_q):
                    return by_readouts
        by_parameters: dict[str, Family | Readouts] = {}
        for name, site in self.latents.sites.items():
            dims = [self.batch.num_rows if dim == site.rows else 1 for dim in range(-self.latents.nesting, 0)]
            by_parameters[name] = Family(trace.nodes[name]["fn"], dims)
        if not self._agrees(by_parameters, z, log_q):
            raise UnknownFamily(
                "guide: its family is not that of its sites one by one: they depend on each other, or are masked; expected "
                "sites that are independent given x"
            )
        return by_parameters

    @torch.no_grad()
    def _agrees(self, families: dict[str, Family | Readouts], z: Tensor, log_q: Tensor) -> bool:
        total = torch.zeros(())
        for name, _, part in self.latents.split(z):
            total = total + families[name].at(families[name].start).log_prob(part)
        return torch.allclose(total, log_q.to(total), rtol=1e-3, atol=1e-3)

    def elbo(self, parameters: Parameters, num_particles: int) -> Tensor:
        """log p(x, z) − log q(z) at draws of the families: ``(particles, batch)``."""
        parts, log_q = [], torch.zeros(())
        for name, family in self.families.items():
            q = family.at(parameters[name])
            z = q.rsample((num_particles,))
            log_q = log_q + q.log_prob(z)
            parts.append(z.reshape(*z.shape[:2], -1))
        return self.latents.log_prob(self.model, self.batch, torch.cat(parts, -1)) - log_q

    def run(self, tolerance: float, max_steps: int) -> int:
        """Move to the best parameters; the steps it took."""
        parameters = {
            name: {k: v.detach().clone().requires_grad_() for k, v in own.items()} for name, own in self.start.items()
        }
        optimizer = torch.optim.Adam([leaf for own in parameters.values() for leaf in own.values()], lr=0.05)
        reached, halvings, steps = -math.inf, 0, 0
        while halvings < 8 and steps < max_steps:
            value, _ = self._block(parameters, optimizer, 100)
            steps += 100
            if value < reached + tolerance:
                halvings += 1
                optimizer.param_groups[0]["lr"] /= 2
            reached = max(reached, value)
        _, means = self._block(parameters, optimizer, 500)
        named = iter(means)
        self.best = {name: {k: next(named) for k in own} for name, own in parameters.items()}
        self._keep_better()
        return steps + 500

    @torch.no_grad()
    def _keep_better(self) -> None:
        """A datum whose search ended below its start, as between the modes of a mixture, goes back to it."""
        ended, began = (self.elbo(parameters, 1000).mean(0) for parameters in (self.best, self.start))
        for name, own in self.best.items():
            for key, value in own.items():
                worse = (ended < began).reshape(-1, *[1] * (value.dim() - 1))
                own[key] = torch.where(worse, self.start[name][key], value)

    def _block(self, parameters: Parameters, optimizer: torch.optim.Optimizer, steps: int) -> tuple[float, list[Tensor]]:
        """So many steps: the mean ELBO along them, and the mean parameters."""
        leaves = [leaf for own in parameters.values() for leaf in own.values()]
        means, value = [torch.zeros_like(leaf) for leaf in leaves], 0.0
        for _ in range(steps):
            elbo = self.elbo(parameters, 32).mean(0)
            for leaf, gradient in zip(leaves, torch.autograd.grad(-elbo.sum(), leaves), strict=True):
                leaf.grad = gradient
            optimizer.step()
            value += elbo.mean().item() / steps
            for mean, leaf in zip(means, leaves, strict=True):
                mean += leaf.detach() / steps
        return value, means
