"""Exact inference for a one-dimensional latent with a ReLU decoder."""

import math
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.special import log_ndtr, ndtri

from pyro_vae.exact.model import ExactModel, positive


class ReluDecoder(ExactModel):
    """z ~ N(0, 1), x ~ N(V relu(w z + c) + b, σ² I) with a one-dimensional z.

    The breakpoints are −cₕ/wₕ, sorted as t₁ < t₂ < …. On a piece (tᵢ, tᵢ₊₁) the mean of x is affine in z:
    aᵢ z + bᵢ. The posterior is a mixture of truncated normals, one per piece. Piece (tᵢ, tᵢ₊₁) has evidence
    N(x; bᵢ, σ² I + aᵢ aᵢᵀ) [Φ((tᵢ₊₁ − mᵢ)/sᵢ) − Φ((tᵢ − mᵢ)/sᵢ)], with sᵢ⁻² = 1 + ‖aᵢ‖²/σ² and
    mᵢ = sᵢ² aᵢᵀ(x − bᵢ)/σ².

    :param hidden_weight: w, ``(H,)``.
    :param hidden_bias: c, ``(H,)``.
    :param weight: V, ``(D, H)``.
    :param bias: b, a number or ``(D,)``.
    :param noise_scale: σ, a number.
    :raises ValueError: if the shapes do not match or ``noise_scale`` is not positive.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor
    noise_scale: Tensor
    edges: Tensor

    def __init__(
        self,
        hidden_weight: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        *,
        noise_scale: float | Tensor,
        bias: float | Tensor = 0.0,
    ) -> None:
        if (
            hidden_weight.dim() != 1
            or hidden_bias.shape != hidden_weight.shape
            or weight.shape[1:] != hidden_weight.shape
        ):
            raise ValueError(
                "ReluDecoder: expected hidden_weight (H,), hidden_bias (H,) and weight (D, H) but got "
                f"{tuple(hidden_weight.shape)}, {tuple(hidden_bias.shape)} and {tuple(weight.shape)}"
            )
        super().__init__(1, weight.shape[0])
        self.register_buffer("hidden_weight", hidden_weight)
        self.register_buffer("hidden_bias", hidden_bias)
        self.register_buffer("weight", weight)
        self.register_constant("bias", bias, weight.shape[0], weight)
        self.register_constant("noise_scale", positive("noise_scale", noise_scale), None, weight)
        has_breakpoint = hidden_weight != 0
        # unique() removes the duplicates of breakpoints that several units share, and sorts
        w, c = hidden_weight[has_breakpoint].double(), hidden_bias[has_breakpoint].double()
        breakpoints = torch.unique(-c / w)
        infinity = breakpoints.new_tensor([math.inf])
        edges = torch.cat([-infinity, breakpoints, infinity])
        self.register_constant("edges", edges, len(edges), hidden_weight)

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(self.weight.new_zeros(1), 1.0).to_event(1)

    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        h = torch.relu(z * self.hidden_weight + self.hidden_bias)
        return dist.Normal(h @ self.weight.mT + self.bias, self.noise_scale).to_event(1)

    def _pieces(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log evidence, mean and scale of each piece: ``(batch, pieces)`` each."""
        middles = (self.edges[1:-2] + self.edges[2:-1]) / 2
        interior = torch.cat([self.edges[1:2] - 1, middles, self.edges[-2:-1] + 1])
        if len(self.edges) == 2:  # no breakpoints
            interior = self.edges.new_zeros(1)
        active = interior.unsqueeze(-1) * self.hidden_weight + self.hidden_bias > 0  # (pieces, H)
        slope = (active * self.hidden_weight) @ self.weight.mT / self.noise_scale  # (pieces, D)
        intercept = (active * self.hidden_bias) @ self.weight.mT + self.bias
        r = (self.checked(x).unsqueeze(-2) - intercept) / self.noise_scale  # (batch, pieces, D)
        variance = 1 / (1 + (slope**2).sum(-1))
        mean = variance * (r * slope).sum(-1)
        # log N(x; b, σ² I + a aᵀ) by the matrix determinant lemma
        d = x.shape[-1]
        log_normal = -0.5 * ((r**2).sum(-1) - mean**2 / variance - variance.log() + d * math.log(2 * math.pi))
        log_normal = log_normal - d * self.noise_scale.log()
        scale = variance.sqrt().expand_as(mean)
        log_mass = _log_mass((self.edges[:-1] - mean) / scale, (self.edges[1:] - mean) / scale)
        return log_normal + log_mass, mean, scale

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return _TruncatedNormals(*self._pieces(x), self.edges)

    def log_evidence(self, x: Tensor) -> Tensor:
        return self._pieces(x)[0].logsumexp(-1)


class _TruncatedNormals(dist.TorchDistribution):
    """Mixture of normals. Component i is truncated to (edges[i], edges[i + 1]). The event shape is
    ``(1,)``."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    def __init__(self, log_weights: Tensor, loc: Tensor, scale: Tensor, edges: Tensor) -> None:
        self.log_weights, self.loc, self.scale, self.edges = log_weights.log_softmax(-1), loc, scale, edges
        self.low, self.high = (edges[:-1] - loc) / scale, (edges[1:] - loc) / scale
        super().__init__(loc.shape[:-1], torch.Size((1,)), validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.squeeze(-1)
        piece = (torch.bucketize(z, self.edges) - 1).clamp(0, len(self.edges) - 2).unsqueeze(-1)
        log_weight, loc, scale, low, high = (
            part.expand(*z.shape, part.shape[-1]).gather(-1, piece).squeeze(-1)
            for part in (self.log_weights, self.loc, self.scale, self.low, self.high)
        )
        return log_weight + dist.Normal(loc, scale).log_prob(z) - _log_mass(low, high)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            piece = dist.Categorical(logits=self.log_weights).sample(sample_shape).unsqueeze(-1)
            loc, scale, low, high = (
                part.expand(*piece.shape[:-1], part.shape[-1]).gather(-1, piece).squeeze(-1)
                for part in (self.loc, self.scale, self.low, self.high)
            )
            # intervals above 0 are mirrored, since Φ is accurate in the lower tail only
            flip = torch.where(low > 0, -1.0, 1.0).to(loc)
            ends = torch.stack([low * flip, high * flip]).sort(0).values
            below, above = torch.special.ndtr(ends)
            u = torch.rand_like(loc)
            z = loc + scale * flip * ndtri(below + u * (above - below)).clamp(ends[0], ends[1])
            return z.unsqueeze(-1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        mass = _log_mass(self.low, self.high)
        density = [(dist.Normal(0.0, 1.0).log_prob(end) - mass).exp() for end in (self.low, self.high)]
        ends = [torch.where(end.isinf(), 0.0, end) for end in (self.low, self.high)]
        first = density[0] - density[1]
        variance = 1 + ends[0] * density[0] - ends[1] * density[1] - first**2
        return self.loc + self.scale * first, self.scale**2 * variance

    @property
    def mean(self) -> Tensor:
        return (self.log_weights.exp() * self._moments()[0]).sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        means, variances = self._moments()
        square = (self.log_weights.exp() * (variances + means**2)).sum(-1, keepdim=True)
        return square - self.mean**2


def _log_mass(low: Tensor, high: Tensor) -> Tensor:
    """log [Φ(high) − Φ(low)]. Intervals above 0 are mirrored, since log Φ is accurate in the lower tail
    only."""
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = log_ndtr(high), log_ndtr(low)
    return upper + torch.log1p(-(lower - upper).exp().clamp(max=1.0))
