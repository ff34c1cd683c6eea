"""Linear-Gaussian state space model: the Kalman filter and the joint precision of the states."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel, diagonal_gap


class LinearGaussianStateSpace(ExactModel):
    """z₁ ~ N(0, P₀), z_t ~ N(A z_{t−1}, Q), y_t ~ N(C z_t, R), t = 1…T.

    A datum is a series y, ``(T, d_y)``. Its latent is the vector z of all states, ``(T · d_z,)``.
    log p(y) = Σ_t log N(y_t; C m_{t|t−1}, C P_{t|t−1} Cᵀ + R) (Kalman 1960).

    :param transition: A, ``(d_z, d_z)``.
    :param transition_covariance: Q, ``(d_z, d_z)``.
    :param observation: C, ``(d_y, d_z)``.
    :param observation_covariance: R, ``(d_y, d_y)``.
    :param initial_covariance: P₀, ``(d_z, d_z)``.
    :param num_steps: T.
    :raises ValueError: if a shape does not match.
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
        """Precision of z, block tridiagonal: ``(T·d_z, T·d_z)``.

        The diagonal blocks are Q⁻¹ + AᵀQ⁻¹A, but the first has P₀⁻¹ in place of Q⁻¹, and the last has no term
        AᵀQ⁻¹A. The blocks below the diagonal are −Q⁻¹A.
        """
        steps, (d, _) = self.num_steps, self.transition.shape
        noise_precision = torch.linalg.inv(self.transition_covariance)
        coupling = noise_precision @ self.transition
        precision = noise_precision.new_zeros(steps, d, steps, d)
        for t in range(steps):
            precision[t, :, t] += torch.linalg.inv(self.initial_covariance) if t == 0 else noise_precision
            if t + 1 < steps:
                precision[t, :, t] += self.transition.mT @ coupling
                precision[t + 1, :, t] = -coupling
                precision[t, :, t + 1] = -coupling.mT
        return precision.reshape(steps * d, steps * d)

    @property
    def precision(self) -> Tensor:
        """J, the precision of the posterior over all states, ``(T·d_z, T·d_z)``. It does not depend on y."""
        per_step = self.observation.mT @ torch.linalg.inv(self.observation_covariance) @ self.observation
        return self._prior_precision() + torch.block_diag(*[per_step] * self.num_steps)

    def prior(self) -> dist.TorchDistribution:
        precision = self._prior_precision()
        return dist.MultivariateNormal(precision.new_zeros(len(precision)), precision_matrix=precision)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        states = z.unflatten(-1, (self.num_steps, -1))
        scale_tril = torch.linalg.cholesky(self.observation_covariance)
        return dist.MultivariateNormal(states @ self.observation.mT, scale_tril=scale_tril).to_event(1)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(self._mean(x), precision_matrix=self.precision)

    def _mean(self, x: Tensor) -> Tensor:
        projection = torch.linalg.solve(self.observation_covariance, self.observation)
        natural = (self.checked(x) @ projection).flatten(-2)
        return torch.linalg.solve(self.precision, natural.mT).mT

    def _blocks(self) -> Tensor:
        """J_tt, the diagonal blocks of the precision: ``(T, d_z, d_z)``."""
        steps, d = self.num_steps, len(self.transition)
        return self.precision.reshape(steps, d, steps, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def mean_field(self, x: Tensor) -> dist.TorchDistribution:
        """The Gaussian q with independent z_t and the smallest KL(q‖p(z|x)): z_t ~ N(μ_t, J_tt⁻¹)."""
        return dist.MultivariateNormal(self._mean(x), precision_matrix=torch.block_diag(*self._blocks()))

    def mean_field_gap(self, x: Tensor) -> Tensor:
        """KL(q‖p(z|x)) of :meth:`mean_field` in nats, ``(batch,)``: ½[Σ_t log det J_tt − log det J]."""
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
            # Joseph form of the update, which keeps the covariance symmetric and positive definite
            correction = torch.eye(len(covariance)).to(gain) - gain @ self.observation
            covariance = (
                correction @ covariance @ correction.mT + gain @ self.observation_covariance @ gain.mT
            )
            mean = mean @ self.transition.mT
            covariance = self.transition @ covariance @ self.transition.mT + self.transition_covariance
        return total
