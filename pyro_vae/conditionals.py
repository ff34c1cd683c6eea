"""Conditional distributions: modules whose ``forward(*given)`` returns a Pyro distribution.

A decoder p(x|z), an encoder q(z|x) and a prior p(z) or p(z|c) are all conditionals; see
:mod:`pyro_vae.priors` for p(z). Each class here takes a trunk (see :mod:`pyro_vae.nets`) and an
``event_shape``. For each parameter of its distribution it has a read-out: a linear layer on the trunk's
features. Positive parameters are exp or softplus of a read-out, mostly plus a small constant: without it the
parameter could approach 0, where the density is unbounded.

>>> import torch
>>> from pyro_vae import conditionals, nets
>>> encoder = conditionals.Normal(nets.MLP(784, (500,)), event_shape=20)
>>> q = encoder(torch.zeros(64, 28, 28))
>>> q.batch_shape, q.event_shape
(torch.Size([64]), torch.Size([20]))
"""

import math
from collections.abc import Mapping
from numbers import Number
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.nn.functional import softplus

from pyro_vae.nets import Part, Readout, Shape, Standardize, as_shape, num_inputs, out_shape

Scale = Literal["network", "log_variance", "learned", "isotropic"] | float | Tensor

_SCALE_READOUTS = {"network": ("log_scale",), "log_variance": ("log_variance",)}


class Conditional(Part):
    """Base class of priors, decoders and encoders: p(y | given) for events y of shape ``event_shape``.

    ``forward(*given)`` returns a Pyro distribution with that ``event_shape``. Each input has shape ``(*batch,
    *its event)``. The distribution has batch shape ``batch``, or ``()`` if it does not depend on the inputs.
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)

    # not an abstract base class (ABC): its metaclass conflicts with that of PyroModule[Normal]
    def forward(self, *given: Tensor) -> dist.TorchDistribution:
        """The distribution p(y | given)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}"


class FromTrunk(Conditional):
    """A conditional with a read-out, a linear layer on a trunk's features, for each parameter.

    :param trunk: a module of :mod:`pyro_vae.nets`, ``nn.Linear``, ``nn.Sequential``, or any module with an
        attribute ``out_shape``.
    :param event_shape: the shape of one y.
    :param readouts: maps the name of each parameter to the shape of its read-out.

    ``forward(*given)`` passes its inputs to the trunk, and raises ``ValueError`` if there are none.
    """

    def __init__(self, trunk: nn.Module, *, event_shape: Shape, readouts: Mapping[str, Shape]) -> None:
        super().__init__(event_shape)
        self.trunk = trunk
        features = out_shape(trunk)
        self.readout = nn.ModuleDict(
            {
                name: Readout(features, shape, image=len(self.event_shape) > 1)
                for name, shape in readouts.items()
            }
        )

    @property
    def num_inputs(self) -> int | None:
        """Number of inputs of the trunk; ``None`` for any number."""
        return num_inputs(self.trunk)

    def forward(self, *given: Tensor) -> dist.TorchDistribution:
        if not given:
            raise ValueError(
                f"{type(self).__name__}: it is conditional but got no inputs; expected the inputs of its "
                "trunk. "
                "If it is a prior p(z|c), pass the condition: model(x, c), guide(x, c), vae.sample(n, c)"
            )
        features = self.trunk(*given)
        return self.distribution(**{name: readout(features) for name, readout in self.readout.items()})

    def distribution(self, **parameters: Tensor) -> dist.TorchDistribution:
        """The distribution, with event shape ``event_shape``, for the values of the read-outs."""
        raise NotImplementedError(f"{type(self).__name__} does not define distribution()")


class Elementwise(FromTrunk):
    """A distribution with independent elements: every read-out has shape ``event_shape``."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self, trunk: nn.Module, *, event_shape: Shape) -> None:
        super().__init__(trunk, event_shape=event_shape, readouts=dict.fromkeys(self.names, event_shape))

    def distribution(self, **parameters: Tensor) -> dist.TorchDistribution:
        return self.element(**parameters).to_event(len(self.event_shape))

    def element(self, **parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of one element."""
        raise NotImplementedError(f"{type(self).__name__} does not define element()")


class Bernoulli(Elementwise):
    """y ∈ {0, 1}, with logits from the network. For binarized images, not for grey values."""

    names = ("logits",)

    def element(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Bernoulli(logits=logits)


class ContinuousBernoulli(Elementwise):
    """y ∈ [0, 1] with density C(λ) λ^y (1−λ)^{1−y}, for grey values (Loaiza-Ganem & Cunningham 2019)."""

    names = ("logits",)

    def element(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.ContinuousBernoulli(logits=logits)


class Poisson(Elementwise):
    """Counts, with log-rate from the network."""

    names = ("log_rate",)

    def element(self, *, log_rate: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Poisson(log_rate.exp())


class NegativeBinomial(Elementwise):
    """Over-dispersed counts with mean total_count · exp(logits): total_count is 1e-3 + softplus of a
    read-out, logits are a read-out."""

    names = ("total_count", "logits")

    def element(self, *, total_count: Tensor, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.NegativeBinomial(1e-3 + softplus(total_count), logits=logits)


class Beta(Elementwise):
    """y ∈ (0, 1): both concentrations are 1e-3 + softplus of a read-out. As q(z|x) it has implicit
    reparameterization gradients."""

    names = ("concentration1", "concentration0")

    def element(self, *, concentration1: Tensor, concentration0: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Beta(1e-3 + softplus(concentration1), 1e-3 + softplus(concentration0))


class Gamma(Elementwise):
    """y > 0: concentration and rate are 1e-3 + softplus of a read-out. As q(z|x) it has implicit
    reparameterization gradients."""

    names = ("concentration", "rate")

    def element(self, *, concentration: Tensor, rate: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Gamma(1e-3 + softplus(concentration), 1e-3 + softplus(rate))


class LocationScale(Elementwise):
    """Base class of Normal, Laplace, LogNormal and StudentT: location from the network, scale σ by ``scale``.

    :param scale: ``"network"``: σ = min_scale + exp(s) with s linear in the features; ``"log_variance"``: σ =
        min_scale + exp(v/2) with v linear in the features, as in Kingma & Welling (2013); ``"learned"``: σ =
        min_scale + exp(s) with a learned s of shape ``event_shape`` that all data share; ``"isotropic"``: the
        same with a learned scalar s, as in probabilistic PCA; a number or tensor: a fixed σ.
    :param min_scale: lower bound of σ unless σ is fixed, so that log p(y) ≤ −log min_scale + const for each
        element. Without this bound the density diverges as σ → 0 if the location equals y, which happens for
        a pixel with the same value in all images. Pass 0 for parameters that were trained without the bound,
        see "Parameters trained elsewhere" in the documentation.
    :param loc_constraint: constraint on the location. ``constraints.unit_interval`` applies a sigmoid, as
        Kingma & Welling (2013) do for Frey Face.
    :param standardize: for columns of y with different units, (y − m)/s. Location and scale, with ``scale``,
        ``min_scale`` and ``loc_constraint``, are then those of the standardized y, so that the network
        computes numbers near 1. The distribution is that of y: its location is m + s·loc, its scale s·scale,
        and log p(y) includes −log s.
    :raises ValueError: if ``scale`` or ``min_scale`` is invalid.
    """

    names: ClassVar[tuple[str, ...]] = ("loc",)
    fixed_scale: Tensor | None
    log_scale: nn.Parameter

    def __init__(
        self,
        trunk: nn.Module,
        *,
        event_shape: Shape,
        scale: Scale = "network",
        min_scale: float = 1e-3,
        loc_constraint: constraints.Constraint = constraints.real,
        standardize: Standardize | None = None,
    ) -> None:
        scale_readouts = _SCALE_READOUTS.get(scale, ()) if isinstance(scale, str) else ()
        readouts = dict.fromkeys(self.names + scale_readouts, event_shape)
        FromTrunk.__init__(self, trunk, event_shape=event_shape, readouts=readouts)
        self.min_scale = scale_floor(min_scale)
        self.register_buffer("fixed_scale", None)
        self.loc_transform = transform_to(loc_constraint)
        self.standardize = standardize
        invalid = (
            'scale: expected "network", "log_variance", "learned", "isotropic" or a positive number, but got '
            f"{scale!r}"
        )
        if not isinstance(scale, str | Number | Tensor):
            raise ValueError(invalid)
        if not isinstance(scale, str):
            fixed = torch.as_tensor(scale, dtype=torch.get_default_dtype())
            if not (fixed > 0).all() or fixed.shape not in (torch.Size(), self.event_shape):
                raise ValueError(
                    "scale: expected a fixed scale that is a positive number or a positive tensor of shape "
                    f"{tuple(self.event_shape)}, but got {scale}"
                )
            self.register_buffer("fixed_scale", fixed.expand(self.event_shape).clone())
        elif not scale_readouts:
            if scale not in ("learned", "isotropic"):
                raise ValueError(invalid)
            self.log_scale = nn.Parameter(torch.zeros(self.event_shape if scale == "learned" else ()))

    def distribution(self, **parameters: Tensor) -> dist.TorchDistribution:
        loc = self.loc_transform(parameters.pop("loc"))
        if isinstance(self.fixed_scale, Tensor):
            scale = self.fixed_scale
        else:
            if "log_variance" in parameters:
                log_scale = 0.5 * parameters.pop("log_variance")
            else:
                log_scale = parameters.pop("log_scale") if "log_scale" in parameters else self.log_scale
            scale = self.min_scale + log_scale.exp()
        if self.standardize is not None:
            unit = self.standardize.scale
            loc, scale = self.standardize.mean + unit * loc, unit * scale
        return self.element(loc=loc, scale=scale, **parameters).to_event(len(self.event_shape))


class Normal(LocationScale):
    """N(μ, σ²) with independent elements (Kingma & Welling 2013); ``scale`` is σ."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Normal(loc, scale)


class Laplace(LocationScale):
    """Laplace(μ, b) with independent elements; ``scale`` is b."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Laplace(loc, scale)


class LogNormal(LocationScale):
    """y > 0 with log y ~ N(μ, σ²), independent elements; location and scale are those of log y."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.LogNormal(loc, scale)


class StudentT(LocationScale):
    """Student's t, robust to outliers; df = 1 + softplus of a read-out, so that the mean exists."""

    names = ("loc", "df")

    def element(self, *, loc: Tensor, scale: Tensor, df: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.StudentT(1 + softplus(df), loc, scale)


class MultivariateNormal(FromTrunk):
    """N(μ, L Lᵀ) with full covariance; the diagonal of L is min_scale + exp of a read-out.

    ``event_shape`` has a single dimension d; the read-outs have d + d(d+1)/2 elements in total.
    """

    def __init__(self, trunk: nn.Module, *, event_shape: Shape, min_scale: float = 1e-3) -> None:
        d = vector_size("MultivariateNormal", event_shape)
        readouts = {"loc": d, "log_diagonal": d} | ({"lower": d * (d - 1) // 2} if d > 1 else {})
        super().__init__(trunk, event_shape=event_shape, readouts=readouts)
        self.min_scale = scale_floor(min_scale)

    def distribution(  # type: ignore[override]
        self, *, loc: Tensor, log_diagonal: Tensor, lower: Tensor | None = None
    ) -> dist.TorchDistribution:
        scale_tril = torch.diag_embed(self.min_scale + log_diagonal.exp())
        if lower is not None:
            d = loc.shape[-1]
            row, column = torch.tril_indices(d, d, offset=-1, device=loc.device)
            # the same as scale_tril[..., row, column] = lower, but not in place
            flat = scale_tril.flatten(-2)
            scale_tril = flat.index_add(-1, row * d + column, lower).unflatten(-1, (d, d))
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class LowRankMultivariateNormal(FromTrunk):
    """N(μ, W Wᵀ + D) with W of shape ``(d, rank)`` and diagonal √D = min_scale + exp of a read-out."""

    def __init__(
        self, trunk: nn.Module, *, event_shape: Shape, rank: int = 2, min_scale: float = 1e-3
    ) -> None:
        d = vector_size("LowRankMultivariateNormal", event_shape)
        super().__init__(
            trunk, event_shape=event_shape, readouts={"loc": d, "factor": (d, rank), "log_diagonal": d}
        )
        self.min_scale = scale_floor(min_scale)

    def distribution(self, *, loc: Tensor, factor: Tensor, log_diagonal: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.LowRankMultivariateNormal(loc, factor, (self.min_scale + log_diagonal.exp()) ** 2)


class Categorical(FromTrunk):
    """y ∈ {0, …, num_classes−1} for each element, such as 256 grey levels.

    The ``mean`` of the distribution is Σ k·p(k).
    """

    def __init__(self, trunk: nn.Module, *, event_shape: Shape, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"Categorical: num_classes must be 2 or more but got {num_classes}")
        super().__init__(
            trunk, event_shape=event_shape, readouts={"logits": (num_classes, *as_shape(event_shape))}
        )
        self.num_classes = num_classes

    def distribution(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        class_dim = -1 - len(self.event_shape)  # left of the event dimensions, as channels of a convolution
        return _OrderedCategorical(logits=logits.movedim(class_dim, -1)).to_event(len(self.event_shape))


class _OrderedCategorical(dist.Categorical):
    """A categorical distribution over the numbers 0, 1, …, which has a mean."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * torch.arange(self.probs.shape[-1], device=self.probs.device)).sum(-1)


def masked(distribution: dist.TorchDistribution, mask: Tensor) -> dist.TorchDistribution:
    """Mask the entries of an event: ``log_prob`` is the sum over the entries where ``mask`` is true.

    :param distribution: a distribution with independent elements.
    :param mask: bool, ``(*batch, *event)``, true where observed.
    :raises ValueError: if the elements are not independent, as under a full covariance.
    """
    dims = distribution.event_dim
    if not isinstance(distribution, dist.Independent) or distribution.reinterpreted_batch_ndims != dims:
        raise ValueError(
            f"mask: the entries of {type(distribution).__name__} are not independent and cannot be masked "
            "separately; use an elementwise conditional such as Normal or Bernoulli"
        )
    return distribution.base_dist.mask(mask).to_event(dims)


def vector_size(name: str, event_shape: Shape) -> int:
    """The size d of a one-dimensional ``event_shape``.

    :raises ValueError: if ``event_shape`` has another number of dimensions. The message starts with ``name``.
    """
    shape = as_shape(event_shape)
    if len(shape) != 1:
        raise ValueError(
            f"{name}: expected an event_shape with one dimension, such as 20, but got {tuple(shape)}"
        )
    return shape[0]


def scale_floor(min_scale: float) -> float:
    """Validate and return ``min_scale``. Raises ``ValueError`` if it is negative or not finite."""
    if not 0 <= min_scale < math.inf:
        raise ValueError(f"min_scale: expected a finite number ≥ 0 but got {min_scale}")
    return min_scale
