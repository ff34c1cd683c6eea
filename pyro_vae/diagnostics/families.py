"""The distributions that guides draw from, taken apart: their family with parameters of its own for each datum, and the
closed forms between Gaussians."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import identity_transform

from pyro_vae.conditionals import Conditional, LogNormal, MultivariateNormal, Normal

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


class Family:
    """The family of a guide's distribution at a site, its parameters free for each datum: moved from what the guide says, in
    unconstrained space, by shifts of their own. A site that depends on other latents goes on depending on them.

    :param rows: the dimension of the data plate.
    :raises UnknownFamily: for a distribution whose family is not known.
    """

    def __init__(self, distribution: Any, rows: int) -> None:
        self.kind = _kind(distribution)
        self.start = {}
        for name, value in self._parameters(distribution).items():
            event = value.shape[len(distribution.batch_shape) :]
            shape = (distribution.batch_shape[rows], *[1] * (-rows - 1), *event)
            self.start[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)

    def member(self, distribution: Any, shifts: dict[str, Tensor]) -> Any:
        """``distribution`` with its parameters shifted."""
        parameters = {
            name: _transform(self.kind, name)(value + shifts[name]) for name, value in self._parameters(distribution).items()
        }
        moved = self.kind(**parameters)
        return moved.to_event(len(distribution.event_shape) - moved.event_dim)

    def _parameters(self, distribution: Any) -> dict[str, Tensor]:
        """Unconstrained: ``(*batch, *event)``, or ``(*batch, d, …)`` for a matrix."""
        if _kind(distribution) is not self.kind:
            raise UnknownFamily(
                f"guide: its family is {self.kind.__name__} at one time, {_kind(distribution).__name__} at another"
            )
        base, parameters = unwrapped(distribution), {}
        for name in _PARAMETERS[self.kind]:
            value = getattr(base, name)
            event = value.shape[-2:] if name in ("scale_tril", "cov_factor") else distribution.event_shape
            parameters[name] = _transform(self.kind, name).inv(value.expand(*distribution.batch_shape, *event))
        return parameters

    def holds(self, _: Any) -> bool:
        """Whether a distribution of this kind is one of its members: all are."""
        return True


class Readouts:
    """The family of a conditional with read-outs of its own for each datum: whatever the trunk could have said.

    What all data share, a learned scale or the networks of a flow, stays as it is. ``kind`` is the distribution's where the
    read-outs leave none of its parameters fixed, else ``None``.
    """

    def __init__(self, conditional: Conditional, given: tuple[Tensor, ...]) -> None:
        self.conditional, self.kind = conditional, _freed(conditional)
        with torch.no_grad():
            features = conditional.trunk(*given)
            self.start = {name: readout(features).clone() for name, readout in conditional.readout.items()}

    def member(self, distribution: Any, readouts: dict[str, Tensor]) -> Any:
        """The conditional's distribution with these read-outs, in the place of the guide's."""
        return self.conditional.distribution(**readouts).expand(distribution.batch_shape)

    def holds(self, distribution: Any) -> bool:
        """Whether a distribution of this kind is one of its members: where no scale is below the floor."""
        base = unwrapped(distribution)
        scale = base.scale_tril.diagonal(dim1=-2, dim2=-1) if hasattr(base, "scale_tril") else base.scale
        return bool((scale > self.conditional.min_scale).all())


def _kind(distribution: Any) -> type:
    kind = type(unwrapped(distribution))
    if kind not in _PARAMETERS:
        raise UnknownFamily(
            f"guide: the family of {kind.__name__} is not known by its parameters; expected one of "
            f"{', '.join(known.__name__ for known in _PARAMETERS)}"
        )
    return kind


def _transform(kind: Any, name: str) -> Any:
    return transform_to(kind.arg_constraints[name])


def _freed(conditional: Conditional) -> type | None:
    """The kind of distribution of which a conditional's read-outs reach every member."""
    if type(conditional) is MultivariateNormal:
        return dist.MultivariateNormal
    if type(conditional) in (Normal, LogNormal):
        free = "log_scale" in conditional.readout and conditional.loc_transform == identity_transform
        return getattr(dist, type(conditional).__name__) if free else None
    return None


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
