"""AEVB's network on 784 binary pixels (500 tanh units in encoder and decoder, 20 latents), as a pair and in
plain PyTorch."""

import pyro
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, linear

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors

PIXELS, HIDDEN, LATENT = 784, 500, 20


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(LATENT),
        decoder=conditionals.Bernoulli(nets.MLP(LATENT, (HIDDEN,)), event_shape=PIXELS),
        encoder=conditionals.Normal(nets.MLP(PIXELS, (HIDDEN,)), event_shape=LATENT),
    )


def by_svi(svi_class, loss, **options):
    """The step of an SVI object for AEVB's pair."""
    vae = make_vae()
    return svi_class(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss, **options).step


class ByHand(torch.nn.Module):
    """The negative ELBO in plain PyTorch."""

    def __init__(self):
        super().__init__()
        sizes = {
            "h": (HIDDEN, PIXELS),
            "mean": (LATENT, HIDDEN),
            "log_scale": (LATENT, HIDDEN),
            "g": (HIDDEN, LATENT),
        }
        for name, (num_outputs, num_inputs) in (sizes | {"logits": (PIXELS, HIDDEN)}).items():
            setattr(self, name, torch.nn.Linear(num_inputs, num_outputs))

    def forward(self, x):
        h = torch.tanh(self.h(x))
        mean, log_scale = self.mean(h), self.log_scale(h)
        noise = torch.randn_like(mean)
        z = mean + log_scale.exp() * noise
        logits = self.logits(torch.tanh(self.g(z)))
        log_ratio = (0.5 * (noise**2 - z**2) + log_scale).sum()
        return binary_cross_entropy_with_logits(logits, x, reduction="sum") - log_ratio


def by_hand(*, compiled):
    net = ByHand()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(net) if compiled else net

    def step(x):
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def products(num_particles=1):
    """The matrix products of a step, forward and backward, by torch: one encoding and a decoding for each
    particle."""
    encoder, heads = torch.randn(HIDDEN, PIXELS), torch.randn(2 * LATENT, HIDDEN)
    decoder, output = torch.randn(HIDDEN, LATENT), torch.randn(PIXELS, HIDDEN)

    def step(x):
        h = linear(x, encoder)
        s = linear(h, heads)
        z = s[:, :LATENT].repeat(num_particles, 1)
        g = linear(z, decoder)
        logits = linear(g, output)
        # products do not depend on values, so outputs stand for their gradients
        for outputs, inputs, weight in ((logits, g, output), (g, z, decoder), (s, h, heads)):
            outputs.mT @ inputs
            outputs @ weight
        h.mT @ x

    return step
