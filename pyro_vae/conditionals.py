"""Distributions given something: modules whose ``forward(*given)`` returns a Pyro distribution.

One vocabulary for all parts: a decoder p(x|z), an encoder q(z|x) and a prior p(z) or p(z|c) are conditionals
alike; those of
:mod:`pyro_vae.priors` are given nothing. Each class here is built from a trunk (see :mod:`pyro_vae.nets`) and
an ``event_shape``; it knows which parameters its distribution needs and adds its own linear read-out for
each, so nobody computes ``2 * latent_dim`` by hand. Positive parameters are exp or softplus of a read-out
plus a floor, which each class states: without a floor a density may grow without bound.

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

from pyro_vae.nets import Part, Readout, Shape, as_shape, num_inputs, out_shape

Scale = Literal["network", "log_variance", "learned", "isotropic"] | float | Tensor

_SCALE_READOUTS = {"network": ("log_scale",), "log_variance": ("log_variance",)}


class Conditional(Part):
    """p(y | given) over events y of ``event_shape``: the base class of priors, decoders and encoders.

    ``forward(*given)`` → a Pyro distribution of that ``event_shape``, its event dimensions declared. Each
    given has shape ``(*batch, *its event)``, and the distribution has ``batch_shape`` ``batch``, or ``()``
    where it depends on none of them.
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__()
        self.event_shape = as_shape(event_shape)

    # no ABC: its metaclass conflicts with that of PyroModule[Normal]
    def forward(self, *given: Tensor) -> dist.TorchDistribution:
        """The distribution."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def extra_repr(self) -> str:
        return f"event_shape={tuple(self.event_shape)}"


class FromTrunk(Conditional):
    """p(y | given): reads the named parameters of a distribution from a trunk's features.

    :param trunk: any module that says its ``out_shape`` (ours do; ``nn.Linear`` and ``nn.Sequential`` are
        understood).
    :param event_shape: the shape of one y.
    :param readouts: shape of each parameter that the network gives.

    ``forward(*given)`` passes what is given to the trunk, and raises ``ValueError`` where that is nothing.
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
        """How many tensors its trunk takes, ``None`` for any number."""
        return num_inputs(self.trunk)

    def forward(self, *given: Tensor) -> dist.TorchDistribution:
        if not given:
            raise ValueError(
                f"{type(self).__name__}: it is conditional but is given nothing; expected the inputs of its "
                "trunk. A VAE whose prior is p(z|c) needs the condition: model(x, c), guide(x, c), "
                "vae.sample(n, c)"
            )
        features = self.trunk(*given)
        return self.distribution(**{name: readout(features) for name, readout in self.readout.items()})

    def distribution(self, **parameters: Tensor) -> dist.TorchDistribution:
        """The distribution with these read-outs, event dimensions declared."""
        raise NotImplementedError(f"{type(self).__name__} does not define distribution()")


class Elementwise(FromTrunk):
    """Independent elements: every read-out has the ``event_shape``."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self, trunk: nn.Module, *, event_shape: Shape) -> None:
        super().__init__(trunk, event_shape=event_shape, readouts=dict.fromkeys(self.names, event_shape))

    def distribution(self, **parameters: Tensor) -> dist.TorchDistribution:
        return self.element(**parameters).to_event(len(self.event_shape))

    def element(self, **parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of one element."""
        raise NotImplementedError(f"{type(self).__name__} does not define element()")


class Bernoulli(Elementwise):
    """y ∈ {0, 1}: logits from the network. For binarized images; grey values want another conditional."""

    names = ("logits",)

    def element(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Bernoulli(logits=logits)


class ContinuousBernoulli(Elementwise):
    """y ∈ [0, 1] with density C(λ) λ^y (1−λ)^{1−y}: grey values (Loaiza-Ganem & Cunningham 2019)."""

    names = ("logits",)

    def element(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.ContinuousBernoulli(logits=logits)


class Poisson(Elementwise):
    """Counts: log rate from the network."""

    names = ("log_rate",)

    def element(self, *, log_rate: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Poisson(log_rate.exp())


class NegativeBinomial(Elementwise):
    """Over-dispersed counts: total_count = 1e-3 + softplus and success logits from the network;
    mean = total_count · exp(logits)."""

    names = ("total_count", "logits")

    def element(self, *, total_count: Tensor, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.NegativeBinomial(1e-3 + softplus(total_count), logits=logits)


class Beta(Elementwise):
    """y ∈ (0, 1): both concentrations are 1e-3 + softplus of a read-out. Implicit reparameterization as
    q(z|x)."""

    names = ("concentration1", "concentration0")

    def element(self, *, concentration1: Tensor, concentration0: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Beta(1e-3 + softplus(concentration1), 1e-3 + softplus(concentration0))


class Gamma(Elementwise):
    """y > 0: concentration and rate are 1e-3 + softplus of a read-out. Implicit reparameterization as
    q(z|x)."""

    names = ("concentration", "rate")

    def element(self, *, concentration: Tensor, rate: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Gamma(1e-3 + softplus(concentration), 1e-3 + softplus(rate))


class LocationScale(Elementwise):
    """Location from the network, scale from one of four places: Normal, Laplace, LogNormal and StudentT.

    :param scale: ``"network"``: σ = min_scale + exp(s), s linear in the features; ``"log_variance"``: σ =
        min_scale + exp(v/2), v linear in the features, as in AEVB and in most other code; ``"learned"``: σ =
        min_scale + exp(s) with one learned vector s, the same for every datum; ``"isotropic"``: with one
        learned number, as in probabilistic PCA; a number or tensor: σ itself, fixed.
    :param min_scale: the floor under a trained scale. A datum that the mean meets exactly has unbounded
        density as σ → 0 (a pixel that is always black is enough); with it log p(y) ≤ −log min_scale + const
        per element. 0 removes it, as parameters trained elsewhere need: see "Parameters trained elsewhere" in
        the README.
    :param loc_constraint: where the location lives: ``constraints.unit_interval`` puts the means through a
        sigmoid, as AEVB does for Frey Face.
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
    ) -> None:
        extra = _SCALE_READOUTS.get(scale, ()) if isinstance(scale, str) else ()
        FromTrunk.__init__(
            self, trunk, event_shape=event_shape, readouts=dict.fromkeys(self.names + extra, event_shape)
        )
        self.min_scale = scale_floor(min_scale)
        self.register_buffer("fixed_scale", None)
        self.loc_transform = transform_to(loc_constraint)
        expected = '"network", "log_variance", "learned", "isotropic" or a positive number'
        unknown = f"scale: expected {expected} but got {scale!r}"
        if not isinstance(scale, str | Number | Tensor):
            raise ValueError(unknown)
        if not isinstance(scale, str):
            fixed = torch.as_tensor(scale, dtype=torch.get_default_dtype())
            if not (fixed > 0).all() or fixed.shape not in (torch.Size(), self.event_shape):
                raise ValueError(
                    "scale: a fixed scale must be positive, one number or of shape "
                    f"{tuple(self.event_shape)}, but got {scale}"
                )
            self.register_buffer("fixed_scale", fixed.expand(self.event_shape).clone())
        elif not extra:
            if scale not in ("learned", "isotropic"):
                raise ValueError(unknown)
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
        return self.element(loc=loc, scale=scale, **parameters).to_event(len(self.event_shape))


class Normal(LocationScale):
    """N(μ, σ²), independent elements: AEVB's Gaussian encoder and decoder; ``scale`` is σ."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Normal(loc, scale)


class Laplace(LocationScale):
    """Laplace(μ, b), independent elements; ``scale`` is b."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.Laplace(loc, scale)


class LogNormal(LocationScale):
    """exp of N(μ, σ²): y > 0; location and scale are those of log y."""

    def element(self, *, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.LogNormal(loc, scale)


class StudentT(LocationScale):
    """Student's t with df = 1 + softplus of a read-out, so that the mean exists; heavy tails for outliers."""

    names = ("loc", "df")

    def element(self, *, loc: Tensor, scale: Tensor, df: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return dist.StudentT(1 + softplus(df), loc, scale)


class MultivariateNormal(FromTrunk):
    """N(μ, L Lᵀ): full covariance through its Cholesky factor, diag L = min_scale + exp of a read-out.

    ``event_shape`` is one number d; the network gives d + d(d+1)/2 numbers.
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
            # matrix[row, column] = lower as one scatter along the flattened matrix: out of place, any batch
            # shape
            flat = scale_tril.flatten(-2)
            scale_tril = flat.index_add(-1, row * d + column, lower).unflatten(-1, (d, d))
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class LowRankMultivariateNormal(FromTrunk):
    """N(μ, W Wᵀ + D): factor W of ``rank`` columns, diagonal √D = min_scale + exp of a read-out."""

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
    """y ∈ {0, …, num_classes−1} for each element: grey levels, for example 256 of them.

    The distribution's ``mean`` is Σ k·p(k), which a picture of grey levels wants.
    """

    def __init__(self, trunk: nn.Module, *, event_shape: Shape, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"Categorical: num_classes must be 2 or more but got {num_classes}")
        super().__init__(
            trunk, event_shape=event_shape, readouts={"logits": (num_classes, *as_shape(event_shape))}
        )
        self.num_classes = num_classes

    def distribution(self, *, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        classes = -1 - len(self.event_shape)  # in front of the event, where a convolution puts its channels
        return _OrderedCategorical(logits=logits.movedim(classes, -1)).to_event(len(self.event_shape))


class _OrderedCategorical(dist.Categorical):
    """A categorical whose classes are numbers, so that it has a mean."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * torch.arange(self.probs.shape[-1], device=self.probs.device)).sum(-1)


def masked(distribution: dist.TorchDistribution, mask: Tensor) -> dist.TorchDistribution:
    """``distribution`` of an event of which only the entries where ``mask`` is true are observed.

    log p(y_observed) for independent elements: the others leave the sum.

    :param mask: bool, ``(*batch, *event)``.
    :raises ValueError: where the elements of the event are not independent (a full covariance).
    """
    dims = distribution.event_dim
    if not isinstance(distribution, dist.Independent) or distribution.reinterpreted_batch_ndims != dims:
        raise ValueError(
            f"mask: the entries of {type(distribution).__name__} are not independent, so they cannot be "
            "masked one by one; use an elementwise conditional such as Normal or Bernoulli"
        )
    return distribution.base_dist.mask(mask).to_event(dims)


def vector_size(name: str, event_shape: Shape) -> int:
    """d of an ``event_shape`` of one dimension. Raises ``ValueError`` for another; ``name`` says who asks."""
    shape = as_shape(event_shape)
    if len(shape) != 1:
        raise ValueError(
            f"{name}: expected an event_shape of one dimension, such as 20, but got {tuple(shape)}"
        )
    return shape[0]


def scale_floor(min_scale: float) -> float:
    """``min_scale`` itself, the floor under a trained scale. Raises ``ValueError`` where it is negative or
    not finite."""
    if not 0 <= min_scale < math.inf:
        raise ValueError(f"min_scale: expected 0 or a positive floor under the scale but got {min_scale}")
    return min_scale
