"""Finite Gaussian mixtures, and Gaussian-mixture priors with a linear-Gaussian likelihood."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, positive


class FiniteMixture(ExactModel):
    """z ~ Categorical(π), x ~ N(μ_z, Σ_z): p(z = k|x) ∝ πₖ N(x; μₖ, Σₖ), log p(x) = log Σₖ πₖ N(x; μₖ, Σₖ).

    :param weights: π, ``(K,)``; normalized by the constructor.
    :param locs: μ, ``(K, D)``.
    :param scale_trils: Cholesky factors of Σ, ``(K, D, D)``, or ``(D, D)`` if all components share it.
    :raises ValueError: if the shapes do not match or a weight is not positive.
    """

    weights: Tensor
    locs: Tensor
    scale_trils: Tensor

    def __init__(self, weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        if locs.dim() != 2 or weights.shape != locs.shape[:1]:
            raise ValueError(
                "FiniteMixture: expected weights (K,) and locs (K, D) but got "
                f"{tuple(weights.shape)} and {tuple(locs.shape)}"
            )
        super().__init__((), locs.shape[1])
        positive_weights = positive("weights", weights).double()
        self.register_constant("weights", positive_weights / positive_weights.sum(), len(weights), weights)
        self.register_buffer("locs", locs)
        self.register_buffer("scale_trils", scale_trils.expand(*locs.shape, locs.shape[1]).clone())

    def prior(self) -> dist.TorchDistribution:
        return dist.Categorical(self.weights)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self.locs[z.long()], scale_tril=self.scale_trils[z.long()])

    def _log_joint_of_components(self, x: Tensor) -> Tensor:
        """log πₖ + log N(x; μₖ, Σₖ): ``(batch, K)``."""
        components = dist.MultivariateNormal(self.locs, scale_tril=self.scale_trils)
        return self.weights.log() + components.log_prob(self.checked(x).unsqueeze(-2))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=self._log_joint_of_components(x))

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._log_joint_of_components(x).logsumexp(-1)


class MixturePrior(ExactModel):
    """z ~ Σₖ πₖ N(mₖ, Sₖ), x ~ N(W z + b, diag σ²). The posterior is a Gaussian mixture.

    The weights of the posterior are ∝ πₖ N(x; W mₖ + b, W Sₖ Wᵀ + diag σ²).

    :param weights: π, ``(K,)``; normalized by the constructor.
    :param locs: m, ``(K, k)``.
    :param scale_trils: Cholesky factors of S, ``(K, k, k)``, or ``(k, k)`` if all components share it.
    :param weight: W, ``(D, k)``.
    :param noise_scale: σ, a number or ``(D,)``.
    :param bias: b, a number or ``(D,)``.
    :raises ValueError: if the shapes do not match, or a weight or scale is not positive.
    """

    weights: Tensor
    locs: Tensor
    scale_trils: Tensor
    weight: Tensor
    noise_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        weights: Tensor,
        locs: Tensor,
        scale_trils: Tensor,
        *,
        weight: Tensor,
        noise_scale: float | Tensor,
        bias: float | Tensor = 0.0,
    ) -> None:
        if locs.dim() != 2 or weights.shape != locs.shape[:1] or weight.shape[1:] != locs.shape[1:]:
            raise ValueError(
                "MixturePrior: expected weights (K,), locs (K, k) and weight (D, k) but got "
                f"{tuple(weights.shape)}, {tuple(locs.shape)} and {tuple(weight.shape)}"
            )
        super().__init__(locs.shape[1], weight.shape[0])
        positive_weights = positive("weights", weights).double()
        self.register_constant("weights", positive_weights / positive_weights.sum(), len(weights), weights)
        self.register_buffer("locs", locs)
        self.register_buffer("scale_trils", scale_trils.expand(*locs.shape, locs.shape[1]).clone())
        self.register_buffer("weight", weight)
        self.register_constant("noise_scale", positive("noise_scale", noise_scale), weight.shape[0], weight)
        self.register_constant("bias", bias, weight.shape[0], weight)

    def prior(self) -> dist.TorchDistribution:
        components = dist.MultivariateNormal(self.locs, scale_tril=self.scale_trils)
        return dist.MixtureSameFamily(dist.Categorical(self.weights), components)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z @ self.weight.mT + self.bias, self.noise_scale).to_event(1)

    def _log_joint_of_components(self, x: Tensor) -> Tensor:
        """log πₖ + log N(x; W mₖ + b, W Sₖ Wᵀ + diag σ²): ``(batch, K)``."""
        factor = self.weight @ self.scale_trils
        covariance = factor @ factor.mT + torch.diag(self.noise_scale**2)
        marginals = dist.MultivariateNormal(self.locs @ self.weight.mT + self.bias, covariance)
        return self.weights.log() + marginals.log_prob(self.checked(x).unsqueeze(-2))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        projection = self.weight.mT / self.noise_scale**2
        prior_precision = torch.cholesky_inverse(self.scale_trils)
        precision = prior_precision + projection @ self.weight
        projected = (self.checked(x) - self.bias) @ projection.mT
        natural = (prior_precision @ self.locs.unsqueeze(-1)).squeeze(-1) + projected.unsqueeze(-2)
        mean = torch.linalg.solve(precision, natural.unsqueeze(-1)).squeeze(-1)
        components = dist.MultivariateNormal(mean, precision_matrix=precision)
        return dist.MixtureSameFamily(dist.Categorical(logits=self._log_joint_of_components(x)), components)

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._log_joint_of_components(x).logsumexp(-1)
