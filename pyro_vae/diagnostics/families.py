"""Variational families with separate parameters for each datum, and closed forms for Gaussians."""

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

# the supported families, with the attributes that hold their parameters
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
    """A guide with a distribution whose family is not supported."""


class Family:
    """The variational family of a guide's distribution at a site. A member has the unconstrained parameters
    of that distribution plus shifts, separate for each datum. A member depends on other
    latents as the guide's distribution does.

    ``start``: shifts of zero, which give the guide itself.

    :param name: name of the site.
    :param distribution: the guide's distribution at the site.
    :param rows: dimension of the data plate, counted from the right, such as -1.
    :raises UnknownFamily: if the family of the distribution is not supported.
    """

    def __init__(self, name: str, distribution: Any, rows: int) -> None:
        self.name, self.kind = name, _kind(distribution)
        self.start = {}
        for name, value in self._parameters(distribution).items():
            event = value.shape[len(distribution.batch_shape) :]
            shape = (distribution.batch_shape[rows], *[1] * (-rows - 1), *event)
            self.start[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)

    def shifted(self, shifts: dict[str, Tensor]) -> AbstractContextManager:
        """Context manager in which the guide draws from the shifted distribution."""
        return _ShiftMessenger(self, shifts)

    def member(self, distribution: Any, shifts: dict[str, Tensor]) -> Any:
        """``distribution`` with its unconstrained parameters shifted."""
        parameters = {
            name: _transform(self.kind, name)(value + shifts[name])
            for name, value in self._parameters(distribution).items()
        }
        shifted = self.kind(**parameters)
        return shifted.to_event(len(distribution.event_shape) - shifted.event_dim)

    def contains(self, _: Any) -> bool:
        """Always true: shifts of the parameters reach every distribution of this class."""
        return True

    def _parameters(self, distribution: Any) -> dict[str, Tensor]:
        """Unconstrained parameters by name: vectors ``(*batch, *event)`` and matrices ``(*batch, d, …)``."""
        if _kind(distribution) is not self.kind:
            raise UnknownFamily(
                f"guide: expected the same family in every run, but got {self.kind.__name__} and "
                f"{_kind(distribution).__name__}"
            )
        base, parameters = unwrapped(distribution), {}
        for name in _PARAMETERS[self.kind]:
            value = getattr(base, name)
            event = value.shape[-2:] if name in ("scale_tril", "cov_factor") else distribution.event_shape
            parameters[name] = _transform(self.kind, name).inv(
                value.expand(*distribution.batch_shape, *event)
            )
        return parameters


class _ShiftMessenger(Messenger):
    """Replaces the distribution at the site of ``family`` by the member of the family with these shifts."""

    def __init__(self, family: Family, shifts: dict[str, Tensor]) -> None:
        super().__init__()
        self.family, self.shifts = family, shifts

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.family.name and not msg["is_observed"]:
            msg["fn"] = self.family.member(msg["fn"], self.shifts)


class ReadoutFamily:
    """The variational family of a conditional. A member adds shifts, separate for each datum, to the outputs
    of the read-outs, which are the last layers of the conditional: one for each parameter of its
    distribution.

    Parameters that all data share, such as a learned scale or the networks of a flow, are unchanged.

    ``start``: shifts of zero, which give the guide itself. ``kind``: the class of the distribution, if shifts
    can reach every distribution of that class with a scale above ``min_scale``; else ``None``.
    """

    def __init__(self, conditional: FromTrunk, rows: int, num_rows: int) -> None:
        self.conditional, self.kind = conditional, _reachable_kind(conditional)
        parameter = next(conditional.parameters())
        self.start = {}
        for name, readout in conditional.readout.items():
            shape = (num_rows, *[1] * (-rows - 1), *as_shape(readout.shape))  # type: ignore[arg-type]
            self.start[name] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)

    @contextmanager
    def shifted(self, shifts: dict[str, Tensor]) -> Iterator[None]:
        """Context manager in which the read-outs of the conditional are shifted."""
        hooks = [
            readout.register_forward_hook(lambda _, __, value, name=name: value + shifts[name])
            for name, readout in self.conditional.readout.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def contains(self, distribution: Any) -> bool:
        """Whether the family contains a Gaussian or log-normal distribution. It does if every scale is above
        ``min_scale``."""
        base = unwrapped(distribution)
        scale = base.scale_tril.diagonal(dim1=-2, dim2=-1) if hasattr(base, "scale_tril") else base.scale
        return bool((scale > self.conditional.min_scale).all())


def _kind(distribution: Any) -> type:
    """The class of a distribution, without wrappers such as ``Independent``."""
    kind = type(unwrapped(distribution))
    if kind not in _PARAMETERS:
        raise UnknownFamily(
            f"guide: the family of {kind.__name__} is not supported; expected one of "
            f"{', '.join(supported.__name__ for supported in _PARAMETERS)}"
        )
    return kind


def _transform(kind: Any, name: str) -> Any:
    return transform_to(kind.arg_constraints[name])


def _reachable_kind(conditional: FromTrunk) -> type | None:
    """The class of a conditional's distribution, if shifts of the read-outs can reach every distribution of
    that class; else ``None``."""
    if type(conditional) is MultivariateNormal:
        return dist.MultivariateNormal
    if type(conditional) in (Normal, LogNormal):
        has_all_parameters = (
            not {"log_scale", "log_variance"}.isdisjoint(conditional.readout)
            and conditional.loc_transform == identity_transform
        )
        return getattr(dist, type(conditional).__name__) if has_all_parameters else None
    return None


def is_same(a: Any, b: Any) -> bool:
    """Whether two distributions of a supported family share the memory of their parameters, as a
    distribution and its expansion do."""
    a, b = unwrapped(a), unwrapped(b)
    return type(a) is type(b) and all(
        getattr(a, name).data_ptr() == getattr(b, name).data_ptr() for name in _PARAMETERS[type(a)]
    )


def as_gaussian(distribution: Any, num_rows: int) -> torch.distributions.MultivariateNormal | None:
    """A Gaussian over vectors as a ``MultivariateNormal`` in float64 with batch shape ``(num_rows,)``, or
    ``None`` if the distribution is not Gaussian."""
    base, event = unwrapped(distribution), distribution.event_shape
    if (
        type(base) not in (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)
        or len(event) != 1
    ):
        return None

    def rows(parameter: Tensor, dims: int) -> Tensor:
        shape = parameter.shape[-dims:] if dims == 2 else event
        flat = parameter.expand(*distribution.batch_shape, *shape).reshape(-1, *shape)
        return flat.expand(num_rows, *shape).double()

    loc = rows(base.loc, 1)
    if type(base) is dist.Normal:
        return torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(rows(base.scale, 1)))
    if type(base) is dist.MultivariateNormal:
        return torch.distributions.MultivariateNormal(loc, scale_tril=rows(base.scale_tril, 2))
    return torch.distributions.MultivariateNormal(loc, rows(base.covariance_matrix, 2))


def wasserstein(
    a: torch.distributions.MultivariateNormal, b: torch.distributions.MultivariateNormal
) -> Tensor:
    """2-Wasserstein distance of Gaussians, W₂² = ‖Δμ‖² + tr(A + B − 2 (A^½ B A^½)^½), ``(batch,)``."""
    tril = a.scale_tril
    # A^½ B A^½ has the eigenvalues of Lᵀ B L, where A = L Lᵀ
    cross = torch.linalg.eigvalsh(tril.mT @ b.covariance_matrix @ tril).clamp_min(0).sqrt().sum(-1)
    traces = sum(g.covariance_matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for g in (a, b))
    return (((a.loc - b.loc) ** 2).sum(-1) + traces - 2 * cross).clamp_min(0).sqrt()
