"""The path from a base to the posterior, for Markov chains: densities and their gradients in unconstrained
space."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.data.batches import Batch
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.enumeration import values_of
from pyro_vae.pairs.graphs import graphed
from pyro_vae.pairs.latents import Latents, Site
from pyro_vae.pairs.traces import Program, prior_of

_BOUNDED: dict[type, Callable[[Any], Any]] = {  # with numbers for bounds, which go with any number of data
    type(constraints.interval(0.0, 1.0)): lambda c: constraints.interval(
        float(_one(c.lower_bound)), float(_one(c.upper_bound))
    ),
    type(constraints.greater_than(0.0)): lambda c: constraints.greater_than(float(_one(c.lower_bound))),
    type(constraints.greater_than_eq(0.0)): lambda c: constraints.greater_than_eq(float(_one(c.lower_bound))),
}


def _one(bound: Any) -> Tensor:
    return torch.as_tensor(bound).reshape(-1)[0]


class Point(NamedTuple):
    """Where chains are: u ``(chains, batch, dim)``, unconstrained; log-densities there of base and joint,
    ``(chains, batch)``; their gradients, of the shape of u."""

    u: Tensor
    log_base: Tensor
    log_joint: Tensor
    base_gradient: Tensor
    joint_gradient: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log joint − log base; −∞ where chains cannot be."""
        return (self.log_joint - self.log_base).nan_to_num(nan=-torch.inf)

    def log_density(self, beta: Tensor) -> Tensor:
        """log f_β = (1 − β) log base + β log joint."""
        return (self.log_base + beta * (self.log_joint - self.log_base)).nan_to_num(nan=-torch.inf)

    def gradient(self, beta: Tensor) -> Tensor:
        return self.base_gradient + beta * (self.joint_gradient - self.base_gradient)


class Path:
    """f_β(u) = base(u)^{1−β} p(x, u)^β: from p(z), or from a guide q(z|x), at β = 0 to the posterior at 1.

    u is z in unconstrained space, end to end, its densities with the Jacobian of ``biject_to`` of each site's
    support. Sites with a finite support are summed out.

    :param start: ``None`` for the prior, or a guide.
    :param joint: all data together are one datum.
    :raises ValueError: for latents that have no unconstrained space, or no data plate.
    """

    def __init__(
        self,
        model: Program,
        start: Program | None,
        batch: Batch,
        *,
        verb: str,
        check: bool = True,
        joint: bool = False,
    ) -> None:
        self.model: Program = config_enumerate(model, default="parallel")
        self.start: Program | None = start and config_enumerate(start, default="parallel")
        guide = self.start or prior_of(self.model)
        self.pair = inspect_checked(
            self.model, guide, batch, verb=verb, check=check, per_datum=not joint, joint=joint
        )
        self.batch = self.pair.batch
        self.latents = Latents(self.pair)
        if not self.latents.sites:
            raise ValueError("model: it has no continuous latent to run chains in; expected one or more")
        trace = self.latents.run(self.model, self.batch, 1)
        self.transforms = {
            name: _transform(name, site, trace.nodes[name]["fn"]) for name, site in self.latents.sites.items()
        }
        self.shapes = {
            name: torch.Size(site.shape[: len(site.shape) - len(site.event)])
            + self.transforms[name].inverse_shape(site.event)
            for name, site in self.latents.sites.items()
        }
        self.dim = sum(shape.numel() for shape in self.shapes.values())
        self.rows = slice(0, self.batch.num_rows)
        self.graphs: dict[Any, Any] = {}  # by the shapes of u and the data: shared by the chunks of the data

    def on(self, rows: slice) -> "Path":
        """The same for some of the data, whose ``rows`` it keeps."""
        part = copy(self)
        part.rows, part.batch = rows, self.batch.rows(rows)
        return part

    def draw(self, num_chains: int) -> Point:
        """Chains at draws from the base."""
        if self.start is None:
            drawn = values_of(self.latents.run(self.model, self.batch, num_chains))
            z = self.latents.flat(drawn, num_chains, self.latents.num_rows(self.batch))
        else:
            z, _ = self.latents.draw(self.start, self.batch, num_chains)
        return self.at(self.unconstrained(z))

    def at(self, u: Tensor) -> Point:
        """Densities and gradients at u. By a graph once that pays."""

        def evaluate(u: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            return self._evaluate(u, self.batch.with_leaves(parts))

        tensors = [u, *self.batch.leaves()]
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self.graphs:
            self.graphs[key] = graphed(evaluate, kind="gradient of HMC")
        self.graphs[key].prepare(tensors)
        return Point(u, *self.graphs[key](*tensors))

    def constrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z, ``(chains, batch, dim)``, and log |dz/du|, ``(chains, batch)``."""
        z, log_scale = [], torch.zeros(u.shape[:-1], dtype=u.dtype, device=u.device)
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            own = part.reshape(*u.shape[:-1], *shape)
            value = self.transforms[name](own)
            jacobian = self.transforms[name].log_abs_det_jacobian(own, value)
            log_scale = log_scale + jacobian.reshape(*u.shape[:-1], -1).sum(-1)
            z.append(value.reshape(*u.shape[:-1], -1))
        return torch.cat(z, -1), log_scale

    def unconstrained(self, z: Tensor) -> Tensor:
        """u of z, ``(chains, batch, dim)``."""
        parts = (
            self.transforms[name].inv(part).reshape(*z.shape[:-1], -1)
            for name, _, part in self.latents.split(z)
        )
        return torch.cat(list(parts), -1)

    def _evaluate(self, u: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        with (
            torch.enable_grad(),
            pyro.validation_enabled(False),
        ):  # a trajectory may leave all bounds; it is rejected then
            u = u.detach().requires_grad_()
            z, log_scale = self.constrained(u)
            log_prior, log_joint = self.latents.log_prior_and_joint(self.model, batch, z)
            log_base = log_prior if self.start is None else self.latents.log_q(self.start, batch, z)
            flat = log_scale + 0.0 * u.sum(-1)  # a density may be constant
            densities = log_base + flat, log_joint + flat
            gradients = [torch.autograd.grad(density.sum(), u, retain_graph=True)[0] for density in densities]
        return *(density.detach() for density in densities), *gradients


def _transform(name: str, site: Site, again: Any) -> Any:
    """The bijection from unconstrained space to the support of a site.

    :param again: the distribution of the site in another run.
    """
    try:
        support = site.fn.support
    except NotImplementedError:
        raise ValueError(
            f"model: {type(site.fn).__name__} of {name!r} tells no support, so there is no unconstrained "
            "space for chains; expected a distribution with one"
        ) from None
    for end in ("lower_bound", "upper_bound"):
        bound, other = (torch.as_tensor(getattr(each, end, 0.0)) for each in (support, again.support))
        one = bound.reshape(-1)[0]
        if not (bound == one).all() or not (other == one).all():
            raise ValueError(
                f"model: the support of {name!r} is another for each datum or value of other latents; "
                "expected a fixed one: sample it on (0, 1) and scale it"
            )
        if isinstance(getattr(support, end, None), Tensor) and type(support) in _BOUNDED:
            support = _BOUNDED[type(support)](support)
    if isinstance(
        support, constraints.MixtureSameFamilyConstraint
    ):  # a mixture lives where its components do
        support = support.base_constraint
    if support.is_discrete:
        raise ValueError(
            f"model: {name!r} is discrete and cannot be summed out ({support}); expected a finite support"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"model: {name!r} has the support {support}, which has no unconstrained space"
        ) from None
