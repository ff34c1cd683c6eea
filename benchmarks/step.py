"""One step of SVI on AEVB's network (784–500–20–500–784), by Pyro, by pyro_vae, and by hand: time as a ratio to Pyro's own.

    python -m benchmarks.step

Every way takes its turn in rounds of one process, so that a slow minute is slow for all; a ratio is the median over rounds of
paired times, with its quartiles. "Matrix products" are those of the step alone, forward and backward: the floor.
"""

import argparse
import statistics
import time

import pyro
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.optim import Adam
from torch.nn.functional import binary_cross_entropy_with_logits, linear

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.infer.svi import SVI as CompiledSVI

PIXELS, HIDDEN, LATENT = 784, 500, 20


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(LATENT),
        decoder=conditionals.Bernoulli(nets.MLP(LATENT, (HIDDEN,)), event_shape=PIXELS),
        encoder=conditionals.Normal(nets.MLP(PIXELS, (HIDDEN,)), event_shape=LATENT),
    )


def by_svi(svi_class, loss=Trace_ELBO, **options):
    vae = make_vae()
    svi = svi_class(vae.model, vae.guide, Adam({"lr": 1e-3}), loss(), **options)
    return svi.step


class ByHand(torch.nn.Module):
    """The same negative ELBO in plain PyTorch."""

    def __init__(self):
        super().__init__()
        sizes = {"h": (HIDDEN, PIXELS), "mean": (LATENT, HIDDEN), "log_scale": (LATENT, HIDDEN), "g": (HIDDEN, LATENT)}
        for name, (rows, columns) in (sizes | {"logits": (PIXELS, HIDDEN)}).items():
            setattr(self, name, torch.nn.Linear(columns, rows))

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


def products():
    """The matrix products of a step."""
    a = {shape: torch.randn(shape) for shape in ((HIDDEN, PIXELS), (2 * LATENT, HIDDEN), (HIDDEN, LATENT), (PIXELS, HIDDEN))}

    def step(x):
        h = linear(x, a[HIDDEN, PIXELS])
        s = linear(h, a[2 * LATENT, HIDDEN])
        g = linear(s[:, :LATENT], a[HIDDEN, LATENT])
        logits = linear(g, a[PIXELS, HIDDEN])
        for outer, inner, weight in (
            (logits, g, a[PIXELS, HIDDEN]), (g, s[:, :LATENT], a[HIDDEN, LATENT]), (s, h, a[2 * LATENT, HIDDEN]),
        ):  # fmt: skip
            outer.mT @ inner
            outer @ weight
        h.mT @ x

    return step


WAYS = {
    "pyro.infer.SVI": lambda: by_svi(pyro.infer.SVI),
    "pyro JitTrace_ELBO": lambda: by_svi(pyro.infer.SVI, lambda: JitTrace_ELBO(ignore_jit_warnings=True)),
    "pv.SVI, eager": lambda: by_svi(CompiledSVI, compile=False),
    "pv.SVI, traced": lambda: by_svi(CompiledSVI, compile="trace"),
    "pv.SVI, Inductor": lambda: by_svi(CompiledSVI, compile=True),
    "by hand, eager, fused Adam": lambda: by_hand(compiled=False),
    "by hand, torch.compile": lambda: by_hand(compiled=True),
    "matrix products": products,
}


def measure(batch_size, rounds, steps):
    """Seconds of a step, by way and round."""
    x = torch.bernoulli(torch.rand(batch_size, PIXELS))
    stores = {name: {"params": {}, "constraints": {}} for name in WAYS}
    ways = {name: make() for name, make in WAYS.items()}
    times = {name: [] for name in WAYS}
    store = pyro.get_param_store()
    for round_ in range(-1, rounds):  # the first warms up
        for name, step in ways.items():
            with store.scope(stores[name]):
                for _ in range(5 if round_ < 0 else 1):
                    step(x)
                start = time.perf_counter()
                for _ in range(steps):
                    step(x)
                if round_ >= 0:
                    times[name].append((time.perf_counter() - start) / steps)
    return times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    sizes = (20, 100, 256, 1024)
    pyro.set_rng_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; time / time of pyro.infer.SVI (quartiles)")
    table = {name: [] for name in WAYS}
    for size in sizes:
        times = measure(size, args.rounds, steps=max(4, 1000 // size))
        for name, own in times.items():
            ratios = [a / b for a, b in zip(own, times["pyro.infer.SVI"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1000 * statistics.median(own)
            table[name].append(f"{middle:.2f} ({low:.2f}–{high:.2f}) {milliseconds:6.2f} ms")
    print(f"{'batch':28}" + "".join(f"{size:>28}" for size in sizes))
    for name, cells in table.items():
        print(f"{name:28}" + "".join(f"{cell:>28}" for cell in cells))
