"""The distributions that guides draw from, taken apart: their family with parameters of its own for each
datum, and the closed forms between Gaussians."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.transforms import identity_transform

from pyro_vae.conditionals import FromTrunk, LogNormal, MultivariateNormal, Normal
from pyro_vae.nets import as_shape
from pyro_vae.pairs.traces import unwrapped

# Families that are known by the names of their parameters; those of a guide's distribution are read from its
# attributes.
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
    """The family of a guide's distribution at a site, its parameters free for each datum: moved from what the
    guide says, in unconstrained space, by shifts of their own. A site that depends on other latents goes on
    depending on them.

    :param name: the site.
    :param distribution: what the guide draws it from.
    :param rows: the dimension of the data plate.
    :raises UnknownFamily: for a distribution whose family is not known.
    """

    def __init__(self, name: str, distribution: Any, rows: int) -> None:
        self.name, self.kind = name, _kind(distribution)
        self.start = {}
        for name, value in self._parameters(distribution).items():
            event = value.shape[len(distribution.batch_shape) :]
            shape = (distribution.batch_shape[rows], *[1] * (-rows - 1), *event)
            self.start[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)

    def moved(self, shifts: dict[str, Tensor]) -> AbstractContextManager:
        """Inside, a guide draws from the members with these shifts."""
        return _Moved(self, shifts)

    def member(self, distribution: Any, shifts: dict[str, Tensor]) -> Any:
        """``distribution`` with its parameters shifted."""
        parameters = {
            name: _transform(self.kind, name)(value + shifts[name])
            for name, value in self._parameters(distribution).items()
        }
        moved = self.kind(**parameters)
        return moved.to_event(len(distribution.event_shape) - moved.event_dim)

    def holds(self, _: Any) -> bool:
        """Whether a distribution of its kind is one of its members: all are."""
        return True

    def _parameters(self, distribution: Any) -> dict[str, Tensor]:
        """Unconstrained: ``(*batch, *event)``, or ``(*batch, d, …)`` for a matrix."""
        if _kind(distribution) is not self.kind:
            raise UnknownFamily(
                f"guide: its family is {self.kind.__name__} at one time, {_kind(distribution).__name__} at "
                "another"
            )
        base, parameters = unwrapped(distribution), {}
        for name in _PARAMETERS[self.kind]:
            value = getattr(base, name)
            event = value.shape[-2:] if name in ("scale_tril", "cov_factor") else distribution.event_shape
            parameters[name] = _transform(self.kind, name).inv(
                value.expand(*distribution.batch_shape, *event)
            )
        return parameters


class _Moved(Messenger):
    def __init__(self, family: Family, shifts: dict[str, Tensor]) -> None:
        super().__init__()
        self.family, self.shifts = family, shifts

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.family.name and not msg["is_observed"]:
            msg["fn"] = self.family.member(msg["fn"], self.shifts)


class Freed:
    """The family of a conditional, its read-outs free for each datum: moved from what its trunk says by
    shifts of their own.

    What all data share, a learned scale or the networks of a flow, stays as it is. ``kind`` is the
    distribution's where the read-outs reach every member of its family, down to the floor under the scale,
    else ``None``.
    """

    def __init__(self, conditional: FromTrunk, rows: int, num_rows: int) -> None:
        self.conditional, self.kind = conditional, _reached(conditional)
        parameter = next(conditional.parameters())
        self.start = {}
        for name, readout in conditional.readout.items():
            shape = (num_rows, *[1] * (-rows - 1), *as_shape(readout.shape))  # type: ignore[arg-type]
            self.start[name] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)

    @contextmanager
    def moved(self, shifts: dict[str, Tensor]) -> Iterator[None]:
        """Inside, a guide draws from what the conditional says with its read-outs shifted."""
        hooks = [
            readout.register_forward_hook(lambda _, __, value, name=name: value + shifts[name])
            for name, readout in self.conditional.readout.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def holds(self, distribution: Any) -> bool:
        """Whether a Gaussian, or a log-normal, is one of the members: where no scale is below the floor."""
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


def _reached(conditional: FromTrunk) -> type | None:
    """The kind of distribution of which a conditional's read-outs reach every member."""
    if type(conditional) is MultivariateNormal:
        return dist.MultivariateNormal
    if type(conditional) in (Normal, LogNormal):
        free = (
            not {"log_scale", "log_variance"}.isdisjoint(conditional.readout)
            and conditional.loc_transform == identity_transform
        )
        return getattr(dist, type(conditional).__name__) if free else None
    return None


def is_same(a: Any, b: Any) -> bool:
    """Whether two distributions of a known family have their parameters in the same memory: one is the other,
    expanded."""
    a, b = unwrapped(a), unwrapped(b)
    return type(a) is type(b) and all(
        getattr(a, name).data_ptr() == getattr(b, name).data_ptr() for name in _PARAMETERS[type(a)]
    )


def as_gaussian(distribution: Any, num_rows: int) -> torch.distributions.MultivariateNormal | None:
    """A Gaussian over vectors as a full one of ``batch_shape (num_rows,)`` in double precision; ``None`` for
    what is none."""
    base, event = unwrapped(distribution), distribution.event_shape
    if (
        type(base) not in (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
        or len(event) != 1
    ):
        return None

    def rows(parameter: Tensor, dims: int) -> Tensor:
        shape = parameter.shape[-dims:] if dims == 2 else event
        each = parameter.expand(*distribution.batch_shape, *shape).reshape(-1, *shape)
        return each.expand(num_rows, *shape).double()

    loc = rows(base.loc, 1)
    if type(base) is dist.Normal:
        return torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(rows(base.scale, 1)))
    if type(base) is dist.MultivariateNormal:
        return torch.distributions.MultivariateNormal(loc, scale_tril=rows(base.scale_tril, 2))
    return torch.distributions.MultivariateNormal(loc, rows(base.covariance_matrix, 2))


def wasserstein(
    a: torch.distributions.MultivariateNormal, b: torch.distributions.MultivariateNormal
) -> Tensor:
    """W₂ between Gaussians, W₂² = ‖Δμ‖² + tr(A + B − 2 (A^½ B A^½)^½): ``(batch,)``."""
    tril = a.scale_tril
    # the eigenvalues of A^½ B A^½ are those of Lᵀ B L
    cross = torch.linalg.eigvalsh(tril.mT @ b.covariance_matrix @ tril).clamp_min(0).sqrt().sum(-1)
    traces = sum(g.covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for g in (a, b))
    return (((a.loc - b.loc) ** 2).sum(-1) + traces - 2 * cross).clamp_min(0).sqrt()
