"""Models that are jointly Gaussian: one formula for Normal–Normal, factor analysis, PPCA and Bayesian linear regression."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, diagonal_gap, positive


class LinearGaussian(ExactModel):
    """z ~ N(m₀, diag s₀²), x ~ N(W z + b, diag σ²): factor analysis; PPCA where σ is one number.

    With Λ = diag s₀⁻² + Wᵀ diag σ⁻² W the posterior is N(μ, Λ⁻¹), μ = m₀ + Λ⁻¹ Wᵀ diag σ⁻² r, r = x − W m₀ − b.

    :param weight: W, ``(D, k)``.
    :param noise_scale: σ, a number or ``(D,)``.
    :param bias: b, a number or ``(D,)``.
    :param prior_loc: m₀, a number or ``(k,)``.
    :param prior_scale: s₀, a number or ``(k,)``.
    :raises ValueError: for a weight that is no matrix, or scales that are not positive.

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

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ self.weight.mT + self.bias, self.noise_scale).to_event(1)

    @property
    def precision(self) -> Tensor:
        """Λ, the posterior's precision, the same for every datum: ``(k, k)``."""
        scaled = self.weight / self.noise_scale.unsqueeze(-1)
        return torch.diag(self.prior_scale**-2) + scaled.mT @ scaled

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self._mean(x), precision_matrix=self.precision)

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The best guide of independent Gaussians, in closed form: N(μ, diag 1/Λⱼⱼ)."""
        return dist.Normal(self._mean(x), self.precision.diagonal() ** -0.5).to_event(1)

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL of that guide, ½[Σ log Λⱼⱼ − log |Λ|] in nats, the same for every datum: ``(batch,)``."""
        return diagonal_gap(self.precision).expand(len(self.checked(x)))

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        return (
            (self.mean_field(x), self.mean_field_gap(x)) if family is dist.Normal else super().best(family, x)
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        # log N(r; 0, diag σ² + W diag s₀² Wᵀ) by the matrix determinant lemma, and its square as that of the best z: a k × k
        # problem, not D × D, without the difference of large numbers that Woodbury's formula is
        shift = self._mean(x) - self.prior_loc
        residual = (x - self.weight @ self.prior_loc - self.bias - shift @ self.weight.mT) / self.noise_scale
        log_det = (
            2 * self.noise_scale.log().sum() + 2 * self.prior_scale.log().sum() + torch.logdet(self.precision)
        )
        square = (residual**2).sum(-1) + ((shift / self.prior_scale) ** 2).sum(-1)
        return -0.5 * (len(self.bias) * math.log(2 * math.pi) + log_det + square)

    def _mean(self, x: Tensor) -> Tensor:
        r = self.checked(x) - self.weight @ self.prior_loc - self.bias
        pulled = (r / self.noise_scale**2) @ self.weight
        return self.prior_loc + torch.linalg.solve(self.precision, pulled.mT).mT

    @staticmethod
    def ppca(x: Tensor, latent_dim: int) -> "LinearGaussian":
        """Maximum likelihood of probabilistic PCA in closed form (Tipping & Bishop 1999).

        With λ₁ ≥ λ₂ ≥ … and U the eigenvalues and vectors of the sample covariance (1/N): σ² = mean of λⱼ for j > k,
        W = U_k (L_k − σ² I)^½. The mean log-likelihood is −½[D log 2π + Σ_{j≤k} log λⱼ + (D−k) log σ² + D].

        :param x: ``(N, D)``.
        :raises ValueError: where ``latent_dim`` is not below D, or the data lie in so few dimensions that σ² is 0.
        """
        if x.dim() != 2 or not 0 < latent_dim < x.shape[1]:
            raise ValueError(
                f"ppca: expected x of shape (N, D) and 0 < latent_dim < D but got {tuple(x.shape)}, {latent_dim}"
            )
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))
        noise = values[:-latent_dim].mean()
        if not noise > 1e-12 * values[-1]:
            raise ValueError(
                f"ppca: the data lie in {latent_dim} dimensions or fewer, so the noise is 0; take a smaller latent_dim"
            )
        kept = values[-latent_dim:].flip(0)
        weight = vectors[:, -latent_dim:].flip(1) * (kept - noise).sqrt()
        return LinearGaussian(weight, noise_scale=noise.sqrt(), bias=mean)


class NormalNormal(LinearGaussian):
    """z ~ N(m₀, s₀²), x₁…xₙ ~ N(z, σ²) independently: 1/v = 1/s₀² + n/σ², E[z|x] = v (m₀/s₀² + Σᵢ xᵢ/σ²)."""

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
    """w ~ N(0, α⁻¹ I), y ~ N(X w, β⁻¹ I): one datum is a whole vector y of responses, its latent the weights w.

    :param design: X, ``(N, k)``.
    :param prior_precision: α.
    :param noise_precision: β.
    """

    def __init__(self, design: Tensor, *, prior_precision: float = 1.0, noise_precision: float = 1.0) -> None:
        scales = (
            positive(f"{name}_precision", p) ** -0.5
            for name, p in (("prior", prior_precision), ("noise", noise_precision))
        )
        prior_scale, noise_scale = scales
        super().__init__(design, noise_scale=noise_scale, prior_scale=prior_scale)
