"""Conjugate models with a one-dimensional latent."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, positive


class BetaBernoulli(ExactModel):
    """z ~ Beta(a, b), x₁…xₙ ~ Bernoulli(z): p(z|x) = Beta(a + s, b + n − s), s = Σ xᵢ;
    log p(x) = ln B(a + s, b + n − s) − ln B(a, b). z: ``(1,)``, x: ``(n,)``."""

    concentration1: Tensor
    concentration0: Tensor

    def __init__(
        self, num_observations: int = 1, *, concentration1: float = 1.0, concentration0: float = 1.0
    ) -> None:
        super().__init__(1, num_observations)
        self.register_constant("concentration1", positive("concentration1", concentration1), 1)
        self.register_constant("concentration0", positive("concentration0", concentration0), 1)

    def prior(self) -> dist.TorchDistribution:
        return dist.Beta(self.concentration1, self.concentration0).to_event(1)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(z.expand(*z.shape[:-1], *self.event_shape)).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        successes = self.checked(x).sum(-1, keepdim=True)
        failures = x.shape[-1] - successes
        return dist.Beta(self.concentration1 + successes, self.concentration0 + failures).to_event(1)

    def log_evidence(self, x: Tensor) -> Tensor:
        posterior, prior = (_log_beta(beta.base_dist) for beta in (self.posterior(x), self.prior()))
        return (posterior - prior).sum(-1)


class GammaPoisson(ExactModel):
    """z ~ Gamma(a, b), x₁…xₙ ~ Poisson(z): p(z|x) = Gamma(A, B), A = a + Σ xᵢ, B = b + n;
    log p(x) = a ln b − ln Γ(a) + ln Γ(A) − A ln B − Σ ln xᵢ!. z: ``(1,)``, x: ``(n,)``."""

    concentration: Tensor
    rate: Tensor

    def __init__(self, num_observations: int = 1, *, concentration: float = 1.0, rate: float = 1.0) -> None:
        super().__init__(1, num_observations)
        self.register_constant("concentration", positive("concentration", concentration), 1)
        self.register_constant("rate", positive("rate", rate), 1)

    def prior(self) -> dist.TorchDistribution:
        return dist.Gamma(self.concentration, self.rate).to_event(1)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Poisson(z.expand(*z.shape[:-1], *self.event_shape)).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        counts = self.checked(x).sum(-1, keepdim=True)
        return dist.Gamma(self.concentration + counts, self.rate + x.shape[-1]).to_event(1)

    def log_evidence(self, x: Tensor) -> Tensor:
        posterior, prior = (
            torch.lgamma(gamma.concentration) - gamma.concentration * gamma.rate.log()
            for gamma in (self.posterior(x).base_dist, self.prior().base_dist)
        )
        return (posterior - prior).sum(-1) - torch.lgamma(x + 1).sum(-1)

    def log_normal(self, x: Tensor) -> dist.TorchDistribution:
        """The log-normal guide with the smallest KL(q‖p(z|x)): s² = 1/A, m = ln(A/B) − 1/(2A)."""
        posterior = self.posterior(x).base_dist
        a, b = posterior.concentration, posterior.rate
        return dist.LogNormal((a / b).log() - 0.5 / a, a**-0.5).to_event(1)

    def log_normal_gap(self, x: Tensor) -> Tensor:
        """KL(q‖p(z|x)) of the guide q of :meth:`log_normal` in nats, ``(batch,)``.

        It is ln Γ(A) − [(A − ½) ln A − A + ½ ln 2π], the remainder of Stirling's formula.
        """
        a = self.posterior(x).base_dist.concentration
        return (torch.lgamma(a) - ((a - 0.5) * a.log() - a + 0.5 * math.log(2 * math.pi))).sum(-1)

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        return (
            (self.log_normal(x), self.log_normal_gap(x))
            if family is dist.LogNormal
            else super().best(family, x)
        )


def _log_beta(beta: dist.TorchDistribution) -> Tensor:
    """ln B(a, b)."""
    a, b = beta.concentration1, beta.concentration0
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
