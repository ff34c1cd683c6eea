"""Sigmoid belief net with exact inference by enumeration."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.exact.model import ExactModel


class SigmoidBeliefNet(ExactModel):
    """zⱼ ~ Bernoulli(sigmoid(aⱼ)), xᵢ ~ Bernoulli(sigmoid((W z + b)ᵢ)). Inference sums over all 2^k states z.

    :param weight: W, ``(D, k)``, k ≤ 12.
    :param bias: b, a number or ``(D,)``.
    :param prior_logits: a, a number or ``(k,)``.
    :raises ValueError: if ``weight`` is not a matrix with 1 ≤ k ≤ 12 columns.

    ``states`` is the table of all z, ``(2^k, k)``. ``posterior(x)`` is a Categorical over its rows, and
    ``index(z)`` is the row number of z.
    """

    weight: Tensor
    bias: Tensor
    prior_logits: Tensor
    states: Tensor

    def __init__(
        self, weight: Tensor, *, bias: float | Tensor = 0.0, prior_logits: float | Tensor = 0.0
    ) -> None:
        if weight.dim() != 2 or not 1 <= weight.shape[1] <= 12:
            raise ValueError(
                f"SigmoidBeliefNet: expected a weight (D, k) with 1 ≤ k ≤ 12 but got {tuple(weight.shape)}"
            )
        d, k = weight.shape
        super().__init__(k, d)
        self.register_buffer("weight", weight)
        self.register_constant("bias", bias, d, weight)
        self.register_constant("prior_logits", prior_logits, k, weight)
        self.register_buffer("states", torch.cartesian_prod(*[torch.arange(2)] * k).reshape(-1, k).to(weight))

    def prior(self) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.prior_logits).to_event(1)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=z @ self.weight.mT + self.bias).to_event(1)

    def index(self, z: Tensor) -> Tensor:
        """Row of each z in ``states``: ``(*batch, k)`` → ``(*batch,)``."""
        powers = 2 ** torch.arange(z.shape[-1] - 1, -1, -1, device=z.device)
        return (z.long() * powers).sum(-1)

    def _log_joint_of_states(self, x: Tensor) -> Tensor:
        """log p(x, z) for every state: ``(batch, 2^k)``."""
        return self.log_joint(self.checked(x).unsqueeze(-2), self.states)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=self._log_joint_of_states(x))

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._log_joint_of_states(x).logsumexp(-1)
