"""The distributions that guides draw from, taken apart: their family with parameters of its own for each datum, and the
closed forms between Gaussians."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae.conditionals import Conditional

# Families that are known by the names of their parameters; those of a guide's distribution are read from its attributes.
_PARAMETERS: dict[type, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.LogNormal: ("loc", "scale"),
    dist.Laplace: ("loc", "scale"),
    dist.StudentT: ("df", "loc", "scale"),
    dist.Gamma: ("concentration", "rate"),
    dist.Beta: ("concentration1", "concentration0"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.LowRankMultivariateNormal: ("loc", "cov_factor", "cov_diag"),
}


class UnknownFamily(ValueError):
    """A guide whose distributions cannot be given parameters of their own for each datum."""


class Readouts:
    """The family of a conditional with read-outs of its own for each datum: whatever the trunk could have said.

    What all data share, the networks of a flow say, stays as it is. ``start`` are the trunk's own, as new leaves.
    """

    def __init__(self, conditional: Conditional, given: tuple[Tensor, ...]) -> None:
        self.at = lambda parameters: conditional.distribution(**parameters)
        with torch.no_grad():
            features = conditional.trunk(*given)
            readouts = {name: readout(features) for name, readout in conditional.readout.items()}
        self.start = {name: value.clone().requires_grad_() for name, value in readouts.items()}


class Family:
    """The family of a distribution, with free parameters: ``at(parameters)`` is one of its members.

    :param batch_dims: its batch dimensions in full, of which one is that of the data.

    ``start`` are the distribution's own parameters, unconstrained, ``(batch, …)``, as new leaves with gradients.

    :raises UnknownFamily: for a distribution whose family is not known.
    """

    def __init__(self, distribution: Any, batch_dims: list[int]) -> None:
        base = unwrapped(distribution)
        if type(base) not in _PARAMETERS:
            raise UnknownFamily(
                f"guide: the family of {type(base).__name__} is not known by its parameters; expected one of "
                f"{', '.join(kind.__name__ for kind in _PARAMETERS)}"
            )
        self.kind, self.event_shape = type(base), distribution.event_shape
        self.transforms, self.start = {}, {}
        for name in _PARAMETERS[self.kind]:
            value = getattr(base, name).detach()
            matrix = name in ("scale_tril", "cov_factor")
            event = value.shape[-2:] if matrix else self.event_shape
            value = value.expand(*batch_dims, *event).reshape(math.prod(batch_dims), *event)
            self.transforms[name] = transform_to(self.kind.arg_constraints[name])
            self.start[name] = self.transforms[name].inv(value).clone().requires_grad_()

    def at(self, parameters: dict[str, Tensor]) -> Any:
        """The member with these unconstrained parameters."""
        member = self.kind(**{name: self.transforms[name](value) for name, value in parameters.items()})
        return member.to_event(len(self.event_shape) - member.event_dim)


def unwrapped(distribution: Any) -> Any:
    """What lies under ``to_event`` and ``expand``."""
    while isinstance(distribution, torch.distributions.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


def as_gaussian(distribution: Any, batch_shape: torch.Size) -> torch.distributions.MultivariateNormal | None:
    """A Gaussian over vectors as a full one; ``None`` for what is none."""
    base, event = unwrapped(distribution), distribution.event_shape
    if len(event) != 1:
        return None
    if type(base) is dist.Normal:
        loc, scale = (part.expand(*batch_shape, *event) for part in (base.loc, base.scale))
        return torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    if type(base) is dist.MultivariateNormal:
        return torch.distributions.MultivariateNormal(base.loc.expand(*batch_shape, *event), scale_tril=base.scale_tril)
    if type(base) is dist.LowRankMultivariateNormal:
        return torch.distributions.MultivariateNormal(base.loc.expand(*batch_shape, *event), base.covariance_matrix)
    return None


def wasserstein(a: torch.distributions.MultivariateNormal, b: torch.distributions.MultivariateNormal) -> Tensor:
    """W₂ between Gaussians, W₂² = ‖Δμ‖² + tr(A + B − 2 (A^½ B A^½)^½): ``(batch,)``."""
    tril = a.scale_tril
    # the eigenvalues of A^½ B A^½ are those of Lᵀ B L
    cross = torch.linalg.eigvalsh(tril.mT @ b.covariance_matrix @ tril).clamp_min(0).sqrt().sum(-1)
    traces = sum(g.covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for g in (a, b))
    return (((a.loc - b.loc) ** 2).sum(-1) + traces - 2 * cross).clamp_min(0).sqrt()
