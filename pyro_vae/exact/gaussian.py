"""Jointly Gaussian models: Normal–Normal, factor analysis, PPCA and Bayesian linear regression."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, diagonal_gap, positive


class LinearGaussian(ExactModel):
    """z ~ N(m₀, diag s₀²), x ~ N(W z + b, diag σ²): factor analysis, or PPCA if σ is a scalar.

    The posterior is N(μ, Λ⁻¹), Λ = diag s₀⁻² + Wᵀ diag σ⁻² W, μ = m₀ + Λ⁻¹ Wᵀ diag σ⁻² (x − W m₀ − b).

    :param weight: W, ``(D, k)``.
    :param noise_scale: σ, a number or ``(D,)``.
    :param bias: b, a number or ``(D,)``.
    :param prior_loc: m₀, a number or ``(k,)``.
    :param prior_scale: s₀, a number or ``(k,)``.
    :raises ValueError: if ``weight`` is not a matrix or a scale is not positive.

    >>> toy = LinearGaussian(torch.eye(3)[:, :2], noise_scale=0.5)
    >>> toy.posterior(torch.zeros(4, 3)).batch_shape, toy.log_evidence(torch.zeros(4, 3)).shape
    (torch.Size([4]), torch.Size([4]))
    """

    weight: Tensor
    bias: Tensor
    noise_scale: Tensor
    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        *,
        noise_scale: float | Tensor,
        bias: float | Tensor = 0.0,
        prior_loc: float | Tensor = 0.0,
        prior_scale: float | Tensor = 1.0,
    ) -> None:
        if weight.dim() != 2:
            raise ValueError(
                f"LinearGaussian: expected a weight of shape (D, k) but got {tuple(weight.shape)}"
            )
        d, k = weight.shape
        super().__init__(k, d)
        constants = {
            "bias": (bias, d),
            "noise_scale": (positive("noise_scale", noise_scale), d),
            "prior_loc": (prior_loc, k),
            "prior_scale": (positive("prior_scale", prior_scale), k),
        }
        self.register_buffer("weight", weight)
        for name, (value, size) in constants.items():
            self.register_constant(name, value, size, weight)

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ self.weight.mT + self.bias, self.noise_scale).to_event(1)

    @property
    def precision(self) -> Tensor:
        """Λ, the precision of the posterior, ``(k, k)``. It does not depend on x."""
        scaled = self.weight / self.noise_scale.unsqueeze(-1)
        return torch.diag(self.prior_scale**-2) + scaled.mT @ scaled

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self._mean(x), precision_matrix=self.precision)

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The Gaussian q with independent elements and the smallest KL(q‖p(z|x)): N(μ, diag 1/Λⱼⱼ)."""
        return dist.Normal(self._mean(x), self.precision.diagonal() ** -0.5).to_event(1)

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL(q‖p(z|x)) of :meth:`mean_field` in nats, ``(batch,)``: ½[Σ log Λⱼⱼ − log det Λ], equal for all
        data."""
        return diagonal_gap(self.precision).expand(len(self.checked(x)))

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        return (
            (self.mean_field(x), self.mean_field_gap(x)) if family is dist.Normal else super().best(family, x)
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        # log N(r; 0, diag σ² + W diag s₀² Wᵀ) from k × k matrices: the determinant by the matrix determinant
        # lemma, the quadratic form as a minimum over z. Woodbury's formula would lose digits by cancellation.
        shift = self._mean(x) - self.prior_loc
        residual = (x - self.weight @ self.prior_loc - self.bias - shift @ self.weight.mT) / self.noise_scale
        log_det = (
            2 * self.noise_scale.log().sum() + 2 * self.prior_scale.log().sum() + torch.logdet(self.precision)
        )
        quadratic = (residual**2).sum(-1) + ((shift / self.prior_scale) ** 2).sum(-1)
        return -0.5 * (len(self.bias) * math.log(2 * math.pi) + log_det + quadratic)

    def _mean(self, x: Tensor) -> Tensor:
        residual = self.checked(x) - self.weight @ self.prior_loc - self.bias
        projected = (residual / self.noise_scale**2) @ self.weight
        return self.prior_loc + torch.linalg.solve(self.precision, projected.mT).mT

    @staticmethod
    def ppca(x: Tensor, latent_dim: int) -> "LinearGaussian":
        """Maximum likelihood of probabilistic PCA in closed form (Tipping & Bishop 1999).

        λ₁ ≥ λ₂ ≥ … are the eigenvalues and U the eigenvectors of the sample covariance (divisor N). σ² is the
        mean of the λⱼ with j > k, and W = U_k (L_k − σ² I)^½. The mean log-likelihood is
        −½[D log 2π + Σ_{j≤k} log λⱼ + (D−k) log σ² + D].

        :param x: ``(N, D)``.
        :param latent_dim: k.
        :raises ValueError: if ``latent_dim`` is not between 1 and D − 1, or if the rank of the covariance is
            ``latent_dim`` or less, since σ² is then 0.
        """
        if x.dim() != 2 or not 0 < latent_dim < x.shape[1]:
            raise ValueError(
                f"ppca: expected x of shape (N, D) and 0 < latent_dim < D but got {tuple(x.shape)} and "
                f"{latent_dim}"
            )
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
        noise = values[:-latent_dim].mean()
        if not noise > 1e-12 * values[-1]:
            raise ValueError(
                f"ppca: the covariance of x has rank {latent_dim} or less, so the noise is 0; "
                "use a smaller latent_dim"
            )
        leading = values[-latent_dim:].flip(0)
        weight = vectors[:, -latent_dim:].flip(1) * (leading - noise).sqrt()
        return LinearGaussian(weight, noise_scale=noise.sqrt(), bias=mean)


class NormalNormal(LinearGaussian):
    """z ~ N(m₀, s₀²), x₁…xₙ ~ N(z, σ²): p(z|x) = N(v (m₀/s₀² + Σᵢ xᵢ/σ²), v) with 1/v = 1/s₀² + n/σ²."""

    def __init__(
        self,
        num_observations: int = 1,
        *,
        noise_scale: float | Tensor = 1.0,
        prior_loc: float | Tensor = 0.0,
        prior_scale: float | Tensor = 1.0,
    ) -> None:
        dtype = noise_scale.dtype if isinstance(noise_scale, Tensor) else torch.get_default_dtype()
        weight = torch.ones(num_observations, 1, dtype=dtype)
        super().__init__(weight, noise_scale=noise_scale, prior_loc=prior_loc, prior_scale=prior_scale)


class BayesianLinearRegression(LinearGaussian):
    """w ~ N(0, α⁻¹ I), y ~ N(X w, β⁻¹ I). A datum is a vector y of N responses; its latent is w.

    :param design: X, ``(N, k)``.
    :param prior_precision: α.
    :param noise_precision: β.
    """

    def __init__(self, design: Tensor, *, prior_precision: float = 1.0, noise_precision: float = 1.0) -> None:
        prior_scale = positive("prior_precision", prior_precision) ** -0.5
        noise_scale = positive("noise_precision", noise_precision) ** -0.5
        super().__init__(design, noise_scale=noise_scale, prior_scale=prior_scale)
