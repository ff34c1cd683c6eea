"""Posteriors that are hard to approximate, as priors of models without data: p(z|x) = p(z) and log p(x) = 0.

x is ``torch.zeros(batch, 1)``; only its batch size matters.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.exact.model import ExactModel, positive


class _NoiseTransform(dist.TorchDistribution, ABC):
    """A distribution on ℝ^d whose samples are a function of standard normal noise."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, dim: int, parameter: Tensor, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.parameter = parameter
        super().__init__(batch_shape, torch.Size((dim,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "_NoiseTransform":
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        _NoiseTransform.__init__(new, self.event_shape[0], self.parameter, torch.Size(batch_shape))
        return new

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.parameter.dtype, device=self.parameter.device)
        return self._transform_noise(noise)

    @abstractmethod
    def _transform_noise(self, noise: Tensor) -> Tensor:
        """Map standard normal noise ``(*shape, d)`` to a sample of the same shape."""


class _FunnelDistribution(_NoiseTransform):
    """v ~ N(0, σ²), yᵢ ~ N(0, eᵛ)."""

    def _transform_noise(self, noise: Tensor) -> Tensor:
        v = self.parameter * noise[..., :1]
        return torch.cat([v, (v / 2).exp() * noise[..., 1:]], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        v, y = z[..., 0], z[..., 1:]
        log_p_y = dist.Normal(0.0, (v / 2).exp().unsqueeze(-1)).log_prob(y).sum(-1)
        return dist.Normal(0.0, self.parameter).log_prob(v) + log_p_y

    @property
    def mean(self) -> Tensor:
        return torch.zeros(self.shape(), dtype=self.parameter.dtype, device=self.parameter.device)

    @property
    def covariance_matrix(self) -> Tensor:
        variances = (self.parameter**2 / 2).exp().expand(self.event_shape[0]).clone()  # Var yᵢ = E eᵛ
        variances[0] = self.parameter**2
        return torch.diag(variances).expand(*self.batch_shape, -1, -1)


class _BananaDistribution(_NoiseTransform):
    """z₁ ~ N(0, s²), z₂ ~ N(b (z₁² − s²), 1). ``parameter`` has the elements s and b."""

    def _transform_noise(self, noise: Tensor) -> Tensor:
        s, b = self.parameter
        first = s * noise[..., 0]
        return torch.stack([first, b * (first**2 - s**2) + noise[..., 1]], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        (s, b), (first, second) = self.parameter, z.unbind(-1)
        return dist.Normal(0.0, s).log_prob(first) + dist.Normal(b * (first**2 - s**2), 1.0).log_prob(second)

    @property
    def mean(self) -> Tensor:
        return torch.zeros(self.shape(), dtype=self.parameter.dtype, device=self.parameter.device)

    @property
    def covariance_matrix(self) -> Tensor:
        s, b = self.parameter
        return torch.diag(torch.stack([s**2, 1 + 2 * b**2 * s**4])).expand(*self.batch_shape, -1, -1)


class _PriorOnlyModel(ExactModel):
    """A model without data: x is zero and p(z|x) = p(z)."""

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Delta(torch.zeros_like(z[..., :1])).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return self.prior().expand([len(self.checked(x))])

    def log_evidence(self, x: Tensor) -> Tensor:
        return self.checked(x).sum(-1) * 0.0

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        if (x != 0).any():
            raise ValueError(
                f"{type(self).__name__}: the model has no data; expected x = torch.zeros(batch, 1)"
            )


class Funnel(_PriorOnlyModel):
    """Neal's funnel: z = (v, y₁…yₙ), v ~ N(0, σ²), yᵢ ~ N(0, eᵛ) (Neal 2003).

    :param num_dims: n.
    :param scale: σ.
    """

    scale: Tensor

    def __init__(self, num_dims: int = 9, *, scale: float = 3.0) -> None:
        super().__init__(num_dims + 1, 1)
        self.register_constant("scale", positive("scale", scale))

    def prior(self) -> dist.TorchDistribution:
        return _FunnelDistribution(self.latent_shape[0], self.scale)

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The Gaussian q with independent elements and the smallest KL(q‖p(z|x)).

        All means are 0. The variance of v is s_v² = 1/(1/σ² + n/2), that of each yᵢ is exp(−s_v²/2).
        """
        n = self.latent_shape[0] - 1
        variance_v = 1 / (1 / self.scale**2 + n / 2)
        variances = torch.cat([variance_v.reshape(1), (-variance_v / 2).exp().expand(n)])
        return dist.Normal(variances.new_zeros(len(self.checked(x)), n + 1), variances.sqrt()).to_event(1)

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL(q‖p(z|x)) of :meth:`mean_field` in nats, ``(batch,)``: ½ log(1 + n σ²/2)."""
        gap = 0.5 * torch.log1p((self.latent_shape[0] - 1) * self.scale**2 / 2)
        return gap.expand(len(self.checked(x)))

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        return (
            (self.mean_field(x), self.mean_field_gap(x)) if family is dist.Normal else super().best(family, x)
        )


class Banana(_PriorOnlyModel):
    """z₁ ~ N(0, s²), z₂ ~ N(b (z₁² − s²), 1) (Haario et al. 1999).

    :param scale: s.
    :param curvature: b.
    """

    parameter: Tensor

    def __init__(self, *, scale: float = 2.0, curvature: float = 0.5) -> None:
        super().__init__(2, 1)
        positive("scale", scale)
        parameter = torch.tensor([float(scale), float(curvature)], dtype=torch.double)
        self.register_constant("parameter", parameter, 2, torch.empty(0))

    def prior(self) -> dist.TorchDistribution:
        return _BananaDistribution(2, self.parameter)

    def _mean_field_variance(self) -> Tensor:
        """u = [−s⁻² + √(s⁻⁴ + 16 b²)]/(8 b²), in a form that has no cancellation as b → 0."""
        s, b = self.parameter
        return 2 / (s**-2 + torch.sqrt(s**-4 + 16 * b**2))

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The Gaussian q with independent elements and the smallest KL(q‖p(z|x)).

        The means of z₁ and z₂ are 0 and b (u − s²), the variances are u and 1, where
        u = [−s⁻² + √(s⁻⁴ + 16 b²)]/(8 b²).
        """
        (s, b), u = self.parameter, self._mean_field_variance()
        loc = torch.stack([torch.zeros_like(u), b * (u - s**2)]).expand(len(self.checked(x)), 2)
        return dist.Normal(loc, torch.stack([u.sqrt(), torch.ones_like(u)])).to_event(1)

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL(q‖p(z|x)) of :meth:`mean_field` in nats, ``(batch,)``: ½[u/s² − log(u/s²) − 1 + 2 b² u²]."""
        (s, b), u = self.parameter, self._mean_field_variance()
        gap = 0.5 * (u / s**2 - (u / s**2).log() - 1 + 2 * b**2 * u**2)
        return gap.expand(len(self.checked(x)))

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        return (
            (self.mean_field(x), self.mean_field_gap(x)) if family is dist.Normal else super().best(family, x)
        )
