"""One step of SVI on AEVB's network, by Pyro, by pyro_vae, and by hand. "Matrix products" are those of the step alone,
forward and backward: by torch, and as the compiled graph has them: the floor."""

import pyro
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO

import pyro_vae as pv
from benchmarks.aevb import HIDDEN, LATENT, PIXELS, by_hand, by_svi, products
from benchmarks.timing import measure
from pyro_vae.graphs import compiled, trace_graph

BASE = "`pyro.infer.SVI`"


def products_in_graph():
    """The products as the compiled graph has them."""
    tensors = [torch.randn(shape) for shape in ((HIDDEN, PIXELS), (2 * LATENT, HIDDEN), (HIDDEN, LATENT), (PIXELS, HIDDEN))]
    graphs = {}

    def all_products(x):
        a, b, c, d = tensors
        h = x @ a.mT
        s = h @ b.mT
        g = s[:, :LATENT] @ c.mT
        logits = g @ d.mT
        made = []
        for outer, inner, weight in ((logits, g, d), (g, s[:, :LATENT], c), (s, h, b)):
            made += [outer.mT @ inner, outer @ weight]
        return *made, h.mT @ x

    def step(x):
        if len(x) not in graphs:
            graphs[len(x)] = compiled(trace_graph(all_products, [x]), [x])
        with torch.no_grad():
            graphs[len(x)](x)

    return step


WAYS = {
    BASE: lambda: by_svi(pyro.infer.SVI, Trace_ELBO()),
    "Pyro's `JitTrace_ELBO`": lambda: by_svi(pyro.infer.SVI, JitTrace_ELBO(ignore_jit_warnings=True)),
    "`pv.SVI(compile=False)`": lambda: by_svi(pv.SVI, Trace_ELBO(), compile=False),
    '`pv.SVI(compile="trace")`, no compiler': lambda: by_svi(pv.SVI, Trace_ELBO(), compile="trace"),
    "`pv.SVI(compile=True)`": lambda: by_svi(pv.SVI, Trace_ELBO(), compile=True),
    "by hand, fused Adam": lambda: by_hand(compiled=False),
    "by hand, `torch.compile`, fused Adam": lambda: by_hand(compiled=True),
    "matrix products alone, torch": products,
    "matrix products alone, as in the graph": products_in_graph,
}


def steps(sizes, rounds):
    """For each batch size the times of every way."""
    columns = {}
    for size in sizes:
        x = torch.bernoulli(torch.rand(size, PIXELS))
        makers = {name: lambda make=make: _on(make(), x) for name, make in WAYS.items()}  # noqa: B023
        columns[f"batch {size}"] = measure(makers, rounds=rounds, num_calls=max(4, 2000 // size))
    return columns


def _on(step, x):
    return lambda: step(x)
