"""The linear-Gaussian state space model, by the Kalman filter and the joint precision."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, diagonal_gap


class LinearGaussianStateSpace(ExactModel):
    """z₁ ~ N(0, P₀), z_t ~ N(A z_{t−1}, Q), y_t ~ N(C z_t, R), t = 1…T.

    One datum is a whole series: y ``(T, d_y)``; its latent is the states end to end, z ``(T · d_z,)``, so that any guide over
    vectors serves. log p(y) = Σ_t log N(y_t; C m_{t|t−1}, C P_{t|t−1} Cᵀ + R) (Kalman 1960).

    :param transition: A, ``(d_z, d_z)``; :param transition_covariance: Q.
    :param observation: C, ``(d_y, d_z)``; :param observation_covariance: R.
    :param initial_covariance: P₀.
    :param num_steps: T.
    """

    transition: Tensor
    transition_covariance: Tensor
    observation: Tensor
    observation_covariance: Tensor
    initial_covariance: Tensor

    def __init__(
        self,
        transition: Tensor,
        transition_covariance: Tensor,
        observation: Tensor,
        observation_covariance: Tensor,
        initial_covariance: Tensor,
        *,
        num_steps: int,
    ) -> None:
        d_y, d_z = observation.shape
        shapes = {
            "transition": (transition, (d_z, d_z)),
            "transition_covariance": (transition_covariance, (d_z, d_z)),
            "observation": (observation, (d_y, d_z)),
            "observation_covariance": (observation_covariance, (d_y, d_y)),
            "initial_covariance": (initial_covariance, (d_z, d_z)),
        }
        super().__init__(num_steps * d_z, (num_steps, d_y))
        for name, (value, shape) in shapes.items():
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape} but got {tuple(value.shape)}")
            self.register_buffer(name, value)
        self.num_steps = num_steps

    def _prior_precision(self) -> Tensor:
        """Block tridiagonal: Q⁻¹ + Aᵀ Q⁻¹ A on the diagonal (P₀⁻¹ first, no AᵀQ⁻¹A last), −Q⁻¹A below it."""
        steps, (d, _) = self.num_steps, self.transition.shape
        noise = torch.linalg.inv(self.transition_covariance)
        carried = self.transition.mT @ noise @ self.transition
        precision = noise.new_zeros(steps, d, steps, d)
        for t in range(steps):
            precision[t, :, t] += torch.linalg.inv(self.initial_covariance) if t == 0 else noise
            if t + 1 < steps:
                precision[t, :, t] += carried
                precision[t + 1, :, t] = -noise @ self.transition
                precision[t, :, t + 1] = -(noise @ self.transition).mT
        return precision.reshape(steps * d, steps * d)

    @property
    def precision(self) -> Tensor:
        """J, the posterior's precision over all states, the same for every series: ``(T·d_z, T·d_z)``."""
        seen = self.observation.mT @ torch.linalg.inv(self.observation_covariance) @ self.observation
        return self._prior_precision() + torch.block_diag(*[seen] * self.num_steps)

    def prior(self) -> dist.TorchDistribution:
        precision = self._prior_precision()
        return dist.MultivariateNormal(precision.new_zeros(len(precision)), precision_matrix=precision)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        states = z.unflatten(-1, (self.num_steps, -1))
        noise = torch.linalg.cholesky(self.observation_covariance)
        return dist.MultivariateNormal(states @ self.observation.mT, scale_tril=noise).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self._mean(x), precision_matrix=self.precision)

    def _mean(self, x: Tensor) -> Tensor:
        pulled = torch.linalg.solve(self.observation_covariance, self.observation).mT
        natural = (self.checked(x) @ pulled.mT).flatten(-2)
        return torch.linalg.solve(self.precision, natural.mT).mT

    def _blocks(self) -> Tensor:
        """Jₜₜ, the diagonal blocks of the precision: ``(T, d_z, d_z)``."""
        steps, d = self.num_steps, len(self.transition)
        return self.precision.reshape(steps, d, steps, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The best guide that is independent over time, N(μₜ, Jₜₜ⁻¹), in closed form; as one Gaussian over all states."""
        return dist.MultivariateNormal(self._mean(x), precision_matrix=torch.block_diag(*self._blocks()))

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL of that guide, ½[Σ log |Jₜₜ| − log |J|] in nats: ``(batch,)``."""
        gap = 0.5 * (torch.logdet(self._blocks()).sum() - torch.logdet(self.precision))
        return gap.expand(len(self.checked(x)))

    def best(self, family: type, x: Tensor) -> tuple[dist.TorchDistribution, Tensor] | None:
        if family is not dist.Normal:
            return super().best(family, x)
        precision = self.precision
        q = dist.Normal(self._mean(x), precision.diagonal() ** -0.5).to_event(1)
        return q, diagonal_gap(precision).expand(len(x))

    def log_evidence(self, x: Tensor) -> Tensor:
        x = self.checked(x)
        mean = x.new_zeros(len(x), len(self.transition))
        covariance, total = self.initial_covariance, x.new_zeros(len(x))
        for y in x.unbind(1):
            innovation = self.observation @ covariance @ self.observation.mT + self.observation_covariance
            expected = mean @ self.observation.mT
            total = total + dist.MultivariateNormal(expected, innovation).log_prob(y)
            gain = torch.linalg.solve(innovation, self.observation @ covariance).mT
            mean = mean + (y - expected) @ gain.mT
            kept = torch.eye(len(covariance)).to(gain) - gain @ self.observation
            # Joseph's form stays symmetric and positive
            covariance = kept @ covariance @ kept.mT + gain @ self.observation_covariance @ gain.mT
            mean = mean @ self.transition.mT
            covariance = self.transition @ covariance @ self.transition.mT + self.transition_covariance
        return total
