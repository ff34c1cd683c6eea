"""What ``fit`` costs beside the loop that Pyro users write: seconds of one epoch of each, as a ratio, interleaved.

    python benchmarks/fit.py

``fit`` reports the ELBO, its reconstruction term and its KL for each step, which plain SVI does not; the ratio is the price.
"""

import statistics
import time

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(20),
        decoder=conditionals.Bernoulli(nets.MLP(20, (500,)), event_shape=(28, 28)),
        encoder=conditionals.Normal(nets.MLP(784, (500,)), event_shape=20),
    )


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


if __name__ == "__main__":
    pyro.set_rng_seed(0)
    x = torch.bernoulli(torch.rand(5000, 28, 28))
    data, vae = pv.Data(x), make_vae()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO())

    def by_svi(batch_size):
        for batch in data.batches(batch_size):
            svi.step(batch)

    def by_fit(batch_size):
        pv.fit(vae.model, vae.guide, data, optim=Adam({"lr": 1e-3}), epochs=1, batch_size=batch_size, progress=False)

    for batch_size in (20, 100, 500):
        by_svi(batch_size)
        ratios = [seconds(lambda: by_fit(batch_size)) / seconds(lambda: by_svi(batch_size)) for _ in range(7)]  # noqa: B023
        print(
            f"batch {batch_size:4}: fit / SVI.step = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
