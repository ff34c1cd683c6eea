"""Normalizing flows and mixtures as conditionals, for guides that approximate non-Gaussian posteriors.

Like the other conditionals, they take a trunk and an ``event_shape``.

>>> import torch
>>> from pyro_vae import flows, nets
>>> encoder = flows.AffineAutoregressive(nets.MLP(784, (200,)), event_shape=5)
>>> encoder(torch.zeros(64, 28, 28)).rsample().shape
torch.Size([64, 5])
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from torch import Tensor, nn

from pyro_vae.conditionals import FromTrunk, scale_floor, vector_size
from pyro_vae.nets import Shape, as_shape


class Flow(FromTrunk):
    """y = μ + σ · f_K ∘ … ∘ f₁(ε), ε ~ N(0, I), with invertible transforms fₖ (Rezende & Mohamed 2015).

    μ, σ and a context vector are computed from the features of the trunk. The transforms depend on the
    context vector.

    :param trunk: see :mod:`pyro_vae.nets`.
    :param event_shape: d, the number of elements of y.
    :param num_transforms: K.
    :param context_dim: length of the context vector.
    :param hidden: widths of the hidden layers of each transform.
    :param min_scale: lower bound of σ.

    Sampling takes one pass through the transforms. ``log_prob`` of the last sample reuses that pass. If the
    transforms are autoregressive, ``log_prob`` of other values takes d passes.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        event_shape: Shape,
        num_transforms: int = 2,
        context_dim: int = 16,
        hidden: Sequence[int] = (32, 32),
        min_scale: float = 1e-3,
    ) -> None:
        d = vector_size(type(self).__name__, event_shape)
        super().__init__(trunk, event_shape=d, readouts={"loc": d, "log_scale": d, "context": context_dim})
        self.min_scale = scale_floor(min_scale)
        k = as_shape(num_transforms)[0]
        self.transforms = nn.ModuleList(self.transform(d, context_dim, list(hidden)) for _ in range(k))

    @staticmethod
    def transform(dim: int, context_dim: int, hidden: list[int]) -> nn.Module:
        """A conditional transform of Pyro, whose ``condition(context)`` returns fₖ."""
        raise NotImplementedError("subclasses of Flow implement transform()")

    def distribution(self, *, loc: Tensor, log_scale: Tensor, context: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        noise = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        flow: list[Any] = [transform.condition(context) for transform in self.transforms]  # type: ignore[operator]
        # without the cache, log_prob of a sample would invert the whole flow
        flow.append(T.AffineTransform(loc, self.min_scale + log_scale.exp(), event_dim=1, cache_size=1))
        return dist.TransformedDistribution(noise, flow)


class AffineAutoregressive(Flow):
    """Inverse autoregressive flow (Kingma et al. 2016), d ≥ 2.

    Each fₖ maps εⱼ by an affine function with coefficients that depend on ε₁…εⱼ₋₁.
    """

    @staticmethod
    def transform(dim: int, context_dim: int, hidden: list[int]) -> nn.Module:
        if dim < 2:
            raise ValueError(
                "AffineAutoregressive: in one dimension the flow is a Gaussian; "
                "expected an event_shape of 2 or more; use NeuralSpline in one dimension"
            )
        return T.conditional_affine_autoregressive(dim, context_dim, hidden)


class NeuralSpline(Flow):
    """Neural spline flow (Durkan et al. 2019).

    Each fₖ is a monotone rational spline on [−5, 5], autoregressive if d ≥ 2.
    """

    @staticmethod
    def transform(dim: int, context_dim: int, hidden: list[int]) -> nn.Module:
        if dim == 1:
            return T.conditional_spline(1, context_dim, hidden, bound=5.0)
        return T.conditional_spline_autoregressive(dim, context_dim, hidden, bound=5.0)


class NormalMixture(FromTrunk):
    """Σₖ πₖ N(μₖ, diag σₖ²) with pathwise gradients (Jankowiak & Karaletsos 2019).

    πₖ, μₖ and σₖ are computed from the features of the trunk.

    :param event_shape: d ≥ 2, the number of elements of one draw.
    :param num_components: K.
    :param min_scale: lower bound of σₖ.
    """

    def __init__(
        self, trunk: nn.Module, *, event_shape: Shape, num_components: int = 4, min_scale: float = 1e-3
    ) -> None:
        shape = as_shape(event_shape)
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(
                f"NormalMixture: expected an event_shape of one number, 2 or more, but got {tuple(shape)}"
            )
        k = as_shape(num_components)
        super().__init__(
            trunk, event_shape=shape, readouts={"locs": k + shape, "log_scales": k + shape, "logits": k}
        )
        self.min_scale = scale_floor(min_scale)
        with torch.no_grad():  # components that start equal get equal gradients and stay equal
            self.readout["locs"].layer.bias.normal_()  # type: ignore[union-attr, operator]

    def distribution(self, *, locs: Tensor, log_scales: Tensor, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return _Mixture(locs, self.min_scale + log_scales.exp(), logits)


class _Mixture(dist.MixtureOfDiagNormals):
    """``MixtureOfDiagNormals`` that supports ``sample_shape`` with batched parameters."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        if not sample_shape:
            return super().rsample()
        return self.expand(torch.Size(sample_shape) + self.batch_shape).rsample()


class Zuko(FromTrunk):
    """A flow of the library zuko, such as ``zuko.flows.NSF(features=2, context=32)``.

    :param event_shape: ``features`` of the flow.
    :param flow: a ``zuko.lazy.LazyDistribution``.
    :param context_dim: ``context`` of the flow.
    :raises ImportError: if zuko is not installed.

    SVI samples at every step, and a sample of an autoregressive flow of zuko takes ``features`` passes.
    Invert its transforms, so that a sample takes one pass:
    ``zuko.flows.Flow([t.inv for t in flow.transform.transforms], flow.base)``.
    """

    def __init__(self, trunk: nn.Module, *, event_shape: Shape, flow: nn.Module, context_dim: int) -> None:
        super().__init__(trunk, event_shape=event_shape, readouts={"context": as_shape(context_dim)})
        try:
            from pyro.contrib.zuko import ZukoToPyro
        except ImportError as error:
            raise ImportError(
                "Zuko: the library zuko is not installed; pip install 'pyro-vae[zuko]'"
            ) from error
        self.flow, self._to_pyro = flow, ZukoToPyro

    def distribution(self, *, context: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        return self._to_pyro(self.flow(context))
