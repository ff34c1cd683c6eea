"""Importance sampling, and the gradient of an HMC step, for AEVB's network."""

import pyro
import torch
from pyro.infer.importance import vectorized_importance_weights

from benchmarks.aevb import LATENT, PIXELS, make_vae
from benchmarks.timing import measure
from pyro_vae.compiler.trace import trace
from pyro_vae.data.batches import Batch
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.traces import sum_sites

IMPORTANCE, HMC = "Pyro's `vectorized_importance_weights`", "eager torch"


def importance(num_rows, num_particles, rounds):
    """Times of log-weights: one per particle and datum by pyro_vae, one per particle for all data by Pyro."""
    x = torch.bernoulli(torch.rand(num_rows, PIXELS))
    vae = make_vae()
    latents, batch = inspect_latents(vae.model, vae.guide, Batch((x,), {}), verb="benchmark")

    @torch.no_grad()
    def by_pyro():
        return vectorized_importance_weights(
            vae.model, vae.guide, x, num_samples=num_particles, max_plate_nesting=1, normalized=False
        )

    @torch.no_grad()
    def per_datum():
        z, log_q = latents.draw(vae.guide, batch, num_particles)
        return latents.log_joint(vae.model, batch, z) - log_q

    @torch.no_grad()
    def by_hand():
        q, total = vae.encode(x), []
        for z in q.sample((num_particles,)):
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
            total.append(vae.decode(z).log_prob(x) + prior - q.log_prob(z))
        return torch.stack(total)

    methods = {
        IMPORTANCE: by_pyro,
        "all particles at once, a log-weight per datum": per_datum,
        "by hand, one particle at a time": by_hand,
    }
    return measure(_makers(methods), rounds=rounds, num_calls=3)


def hmc(num_rows, num_chains, rounds):
    """Times of the gradient of log p(x, z) with respect to z for all chains and data, as in a leapfrog step
    of HMC."""
    x = torch.bernoulli(torch.rand(num_rows, PIXELS))
    vae = make_vae().requires_grad_(False).eval()
    latents, batch = inspect_latents(vae.model, vae.guide, Batch((x,), {}), verb="benchmark")
    z = torch.randn(num_chains, num_rows, LATENT)

    def gradient(z):
        z = z.detach().requires_grad_()
        trace = latents.run(vae.model, batch, len(z), latents.values(z))
        log_prob = sum_sites(trace, latents.plates, particle_dim=-1 - latents.nesting).observed
        return log_prob.detach(), torch.autograd.grad(log_prob.sum(), z)[0]

    with pyro.validation_enabled(False):
        graph = trace(gradient, [z])
    by_inductor = graph.compiled([z])

    def run(f):
        def call():
            with torch.no_grad():
                return f(z)

        return call

    methods = {HMC: lambda: gradient(z), "graph": run(graph), "graph, Inductor": run(by_inductor)}
    return measure(_makers(methods), rounds=rounds, num_calls=20)


def _makers(methods):
    return {name: lambda method=method: method for name, method in methods.items()}
