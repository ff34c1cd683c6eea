"""The annealing path from a base to the posterior: log-densities and gradients in unconstrained space."""

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
from pyro_vae.pairs.structure import Particles, Structure
from pyro_vae.pairs.traces import Program, prior_of

# by type, functions that replace the tensor bounds of a constraint by floats, which broadcast with any
# number of rows
_WITH_SCALAR_BOUNDS: dict[type, Callable[[Any], Any]] = {
    type(constraints.interval(0.0, 1.0)): lambda c: constraints.interval(
        _scalar(c.lower_bound), _scalar(c.upper_bound)
    ),
    type(constraints.greater_than(0.0)): lambda c: constraints.greater_than(_scalar(c.lower_bound)),
    type(constraints.greater_than_eq(0.0)): lambda c: constraints.greater_than_eq(_scalar(c.lower_bound)),
}


def _scalar(bound: Any) -> float:
    return float(torch.as_tensor(bound).reshape(-1)[0])


class Point(NamedTuple):
    """The state of the chains: positions u in unconstrained space, ``(chains, batch, dim)``, log-densities of
    base and joint at u, ``(chains, batch)``, and their gradients, of the shape of u."""

    u: Tensor
    log_base: Tensor
    log_joint: Tensor
    base_gradient: Tensor
    joint_gradient: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log joint − log base, ``(chains, batch)``. NaN, as outside of the support, is replaced by −∞."""
        return (self.log_joint - self.log_base).nan_to_num(nan=-torch.inf)

    def log_density(self, beta: Tensor) -> Tensor:
        """log f_β = (1 − β) log base + β log joint, ``(chains, batch)``. NaN is replaced by −∞."""
        return (self.log_base + beta * (self.log_joint - self.log_base)).nan_to_num(nan=-torch.inf)

    def gradient(self, beta: Tensor) -> Tensor:
        """The gradient of log f_β, of the shape of u."""
        return self.base_gradient + beta * (self.joint_gradient - self.base_gradient)


class Path:
    """The densities f_β(u) = base(u)^{1−β} p(x, u)^β, from the base at β = 0 to the posterior at β = 1.

    u is the concatenation of all latents, each mapped to unconstrained space by the inverse of
    ``biject_to(support)``. The densities are densities of u: they include the log-Jacobian of these maps.
    Discrete sites with a finite support are summed out.

    :param start: a guide as the base; ``None`` for the prior.
    :param verb: name of the public function, for error messages.
    :param check: ``False`` runs a pair that :func:`~pyro_vae.check_pair` rejects.
    :param joint: treat all data as one datum.
    :raises ValueError: for a support without a bijection from unconstrained space, for latents outside the
        data plate unless ``joint``, or for a model that does not run in a plate of particles.
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
        self.particles = _vectorized(self.pair)
        self.latents = Latents(self.pair)
        if not self.latents.sites:
            raise ValueError("model: it has no continuous latent for chains; expected at least one")
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
        self.rows: slice | Tensor = slice(0, self.batch.num_rows)
        # compiled functions by the shapes of u and the data; all chunks of the data share this dict
        self.graphs: dict[Any, Any] = {}

    def on(self, rows: slice | Tensor) -> "Path":
        """The same path for only the given ``rows`` of the data, a slice or indices."""
        part = copy(self)
        part.rows, part.batch = rows, self.batch.rows(rows)
        return part

    def draw(self, num_chains: int) -> Point:
        """The state of ``num_chains`` chains at independent draws from the base."""
        if self.start is None:
            drawn = values_of(self.latents.run(self.model, self.batch, num_chains))
            z = self.latents.flat(drawn, num_chains, self.latents.num_rows(self.batch))
        else:
            z, _ = self.latents.draw(self.start, self.batch, num_chains)
        return self.at(self.unconstrained(z))

    def at(self, u: Tensor) -> Point:
        """Evaluate log-densities and gradients at u, by a compiled graph if there are enough such calls."""

        def evaluate(u: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            return self._evaluate(u, self.batch.with_leaves(parts))

        tensors = [u, *self.batch.leaves()]
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self.graphs:
            self.graphs[key] = graphed(evaluate, kind="gradient of HMC")
        self.graphs[key].prepare(tensors)
        return Point(u, *self.graphs[key](*tensors))

    def constrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map u to z, ``(chains, batch, dim)``, and log det dz/du, ``(chains, batch)``."""
        z, log_scale = [], torch.zeros(u.shape[:-1], dtype=u.dtype, device=u.device)
        parts = u.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            part = part.reshape(*u.shape[:-1], *shape)
            value = self.transforms[name](part)
            jacobian = self.transforms[name].log_abs_det_jacobian(part, value)
            log_scale = log_scale + jacobian.reshape(*u.shape[:-1], -1).sum(-1)
            z.append(value.reshape(*u.shape[:-1], -1))
        return torch.cat(z, -1), log_scale

    def unconstrained(self, z: Tensor) -> Tensor:
        """Map z to u, ``(chains, batch, dim)``."""
        parts = (
            self.transforms[name].inv(part).reshape(*z.shape[:-1], -1)
            for name, _, part in self.latents.split(z)
        )
        return torch.cat(list(parts), -1)

    def _evaluate(self, u: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        # validation would raise for values outside of the support; without it, their log-density is −∞ or
        # NaN, and the move to them is rejected
        with torch.enable_grad(), pyro.validation_enabled(False):
            u = u.detach().requires_grad_()
            z, log_scale = self.constrained(u)
            log_prior, log_joint = self.latents.log_prior_and_joint(self.model, batch, z)
            log_base = log_prior if self.start is None else self.latents.log_q(self.start, batch, z)
            jacobian = log_scale + 0.0 * u.sum(-1)  # 0·u gives a constant density a gradient
            densities = log_base + jacobian, log_joint + jacobian
            gradients = [torch.autograd.grad(density.sum(), u, retain_graph=True)[0] for density in densities]
        return *(density.detach() for density in densities), *gradients


def _vectorized(pair: Structure) -> Particles:
    """How the pair runs in a plate of particles. Raises ``ValueError`` if it does not."""
    particles = pair.particles
    if particles is None or not particles.vectorized:
        raise ValueError(
            "model: it does not run in a plate of particles "
            f"({particles.reason if particles else 'not tested'}), so chains cannot run in parallel; "
            "expected code that counts dimensions from the right: z[..., 0], dim=-1, "
            "reshape(*z.shape[:-1], …), z.unsqueeze(-1) to broadcast a scalar latent with a vector"
        )
    return particles


def _transform(name: str, site: Site, other: Any) -> Any:
    """The bijection from unconstrained space to the support of a site.

    :param other: the distribution of the site in another run, which must have the same support.
    """
    try:
        support = site.fn.support
    except NotImplementedError:
        raise ValueError(
            f"model: {type(site.fn).__name__} of {name!r} does not define its support, so chains cannot run "
            "in unconstrained space; expected a distribution with a support"
        ) from None
    for end in ("lower_bound", "upper_bound"):
        bounds = [torch.as_tensor(getattr(each, end, 0.0)) for each in (support, other.support)]
        value = bounds[0].reshape(-1)[0]
        if not all((bound == value).all() for bound in bounds):
            raise ValueError(
                f"model: the support of {name!r} depends on the datum or on other latents; expected a fixed "
                "support: sample a latent on (0, 1) and scale it"
            )
        if isinstance(getattr(support, end, None), Tensor) and type(support) in _WITH_SCALAR_BOUNDS:
            support = _WITH_SCALAR_BOUNDS[type(support)](support)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support.is_discrete:
        raise ValueError(
            f"model: {name!r} is discrete and cannot be summed out ({support}); expected a finite support"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"model: {name!r} has the support {support}, for which biject_to has no bijection"
        ) from None
