"""Priors p(z): conditionals that ignore their inputs.

In a conditional VAE these priors are independent of the conditions. For a prior p(z|c) use a conditional with
a trunk, such as :class:`pyro_vae.conditionals.Normal`.

>>> from pyro_vae import priors
>>> priors.StandardNormal(20)().event_shape
torch.Size([20])
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vae.conditionals import Conditional, scale_floor
from pyro_vae.nets import Shape, as_shape


class StandardNormal(Conditional):
    """N(0, I), the prior of Kingma & Welling (2013)."""

    zero: Tensor

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape)
        # a buffer, so that .to(device) and .double() determine the device and dtype of the prior
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *_: Tensor) -> dist.TorchDistribution:
        mean, scale = torch.zeros_like(self.zero), torch.ones_like(self.zero)
        return dist.Normal(mean, scale).expand(self.event_shape).to_event(len(self.event_shape))


class Normal(Conditional):
    """N(m, diag s²) with learned m and s = min_scale + exp(log_scale), initialized to m = 0, s ≈ 1."""

    def __init__(self, event_shape: Shape, *, min_scale: float = 1e-3) -> None:
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))
        self.min_scale = scale_floor(min_scale)

    def forward(self, *_: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.min_scale + self.log_scale.exp()).to_event(len(self.event_shape))


class GaussianMixture(Conditional):
    """Σₖ πₖ N(mₖ, diag sₖ²) with learned π = softmax(logits), m, and s = min_scale + exp(log_scale).

    :param num_components: K. The means mₖ are initialized to draws from N(0, I), so that components differ.
    """

    def __init__(self, event_shape: Shape, num_components: int = 10, *, min_scale: float = 1e-3) -> None:
        super().__init__(event_shape)
        components = as_shape(num_components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components + self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(components + self.event_shape))
        self.min_scale = scale_floor(min_scale)

    def forward(self, *_: Tensor) -> dist.TorchDistribution:
        scale = self.min_scale + self.log_scale.exp()
        components = dist.Normal(self.loc, scale).to_event(len(self.event_shape))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


class VampPrior(Conditional):
    """Mixture of posteriors 1/K Σₖ q(z|uₖ) with learned pseudo-inputs uₖ (Tomczak & Welling 2018).

    :param encoder: the encoder q(z|x) of the guide; prior and guide share its parameters.
    :param pseudo_inputs: initial u₁…u_K, ``(K, *x_event)``: training data, or noise.
    :param constraint: support of the pseudo-inputs, such as ``constraints.unit_interval`` for images.
    :raises ValueError: if ``pseudo_inputs`` has no rows or no event dimension.
    """

    def __init__(
        self,
        encoder: Conditional,
        pseudo_inputs: Tensor,
        *,
        constraint: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__(encoder.event_shape)
        if pseudo_inputs.dim() < 2 or not len(pseudo_inputs):
            raise ValueError(
                f"VampPrior: pseudo_inputs has shape {tuple(pseudo_inputs.shape)}; expected (K, *x_event) "
                "with K ≥ 1, for example train.x[:500]"
            )
        self.encoder = encoder
        self.transform = transform_to(constraint)
        start = pseudo_inputs.detach().to(torch.get_default_dtype())
        if constraint is constraints.unit_interval:  # 0 and 1 correspond to ∓∞ in unconstrained space
            start = start.clamp(0.05, 0.95)
        self.pseudo_inputs = nn.Parameter(self.transform.inv(start).clone())

    def forward(self, *_: Tensor) -> dist.TorchDistribution:
        components = self.encoder(self.transform(self.pseudo_inputs))
        weights = dist.Categorical(logits=self.pseudo_inputs.new_zeros(len(self.pseudo_inputs)))
        return dist.MixtureSameFamily(weights, components)
