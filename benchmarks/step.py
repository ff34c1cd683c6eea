"""A step of SVI on AEVB's network, by Pyro, by pyro_vae, and in plain PyTorch. "Matrix products alone" is a
lower bound: the products of the step, forward and backward."""

import pyro
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO

import pyro_vae as pv
from benchmarks.aevb import PIXELS, by_hand, by_svi, products
from benchmarks.timing import measure

BASE = "`pyro.infer.SVI`"

METHODS = {
    BASE: lambda: by_svi(pyro.infer.SVI, Trace_ELBO()),
    "Pyro's `JitTrace_ELBO`": lambda: by_svi(pyro.infer.SVI, JitTrace_ELBO(ignore_jit_warnings=True)),
    "`pv.SVI(compile=False)`": lambda: by_svi(pv.SVI, Trace_ELBO(), compile=False),
    '`pv.SVI(compile="trace")`, no compiler': lambda: by_svi(pv.SVI, Trace_ELBO(), compile="trace"),
    "`pv.SVI(compile=True)`": lambda: by_svi(pv.SVI, Trace_ELBO(), compile=True),
    "by hand, fused Adam": lambda: by_hand(compiled=False),
    "by hand, `torch.compile`, fused Adam": lambda: by_hand(compiled=True),
    "matrix products alone, torch": products,
}


def steps(sizes, rounds):
    """The times of each method, by batch size."""
    columns = {}
    for size in sizes:
        x = torch.bernoulli(torch.rand(size, PIXELS))
        makers = {name: lambda make=make: _on(make(), x) for name, make in METHODS.items()}  # noqa: B023
        columns[f"batch {size}"] = measure(makers, rounds=rounds, num_calls=max(4, 2000 // size))
    return columns


def _on(step, x):
    return lambda: step(x)
