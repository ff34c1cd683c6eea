"""A step of objectives with K particles on AEVB's network, and of a semi-supervised VAE with enumerated
labels."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import RenyiELBO, TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from benchmarks.aevb import HIDDEN, LATENT, PIXELS, by_svi, make_vae, products
from benchmarks.timing import measure
from pyro_vae.infer import IWAE, VIMCO, ReweightedWakeSleep

PRODUCTS = "matrix products alone, torch"
RENYI = "Pyro's `RenyiELBO(alpha=0)`, vectorized"
IWAE_STEP = "`IWAE(K)`"
LABELS = "`pyro.infer.SVI`"
NUM_LABELS = 10


def steps(shapes, rounds):
    """The times of each method, by number of particles and batch size."""
    columns = {}
    for k, size in shapes:
        x = torch.bernoulli(torch.rand(size, PIXELS))
        renyi = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        makers = {
            PRODUCTS: lambda k=k, x=x: _on(products(k), x),
            RENYI: lambda loss=renyi, x=x: _on(by_svi(pyro.infer.SVI, loss), x),
            IWAE_STEP: _compiled(IWAE(k), x),
            '`IWAE(K, estimator="dreg")`': _compiled(IWAE(k, estimator="dreg"), x),
            "`ReweightedWakeSleep(K)`": _compiled(ReweightedWakeSleep(k), x),
            "`VIMCO(K)`, score function": lambda k=k, x=x: _on(_vimco(k), x),
        }
        columns[f"K = {k}, batch {size}"] = measure(
            makers, rounds=rounds, num_calls=max(2, 4000 // (k * size))
        )
    return columns


def labels(rounds, size=100):
    """The times of a step of M2 (Kingma et al. 2014) by Pyro and by pyro_vae."""
    x = torch.bernoulli(torch.rand(size, PIXELS))

    def step(svi_class, **options):
        pair = SemiSupervised()
        adam, loss = pyro.optim.Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1)
        return _on(svi_class(pair.model, pair.guide, adam, loss, **options).step, x)

    makers = {
        LABELS: lambda: step(pyro.infer.SVI),
        '`pv.SVI(compile="trace")`': lambda: step(pv.SVI, compile="trace"),
        "`pv.SVI(compile=True)`": lambda: step(pv.SVI, compile=True),
    }
    return {f"batch {size}": measure(makers, rounds=rounds, num_calls=4)}


class SemiSupervised(nn.Module):
    """A label y, one of ten, that the guide sums out, and a latent z given y."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, NUM_LABELS))
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS + NUM_LABELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT + NUM_LABELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS)
        )

    def model(self, x):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(NUM_LABELS)))
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            logits = self.decoder(_concatenate(z, y))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            q = dist.OneHotCategorical(logits=self.classifier(x))
            y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            loc, log_scale = self.encoder(_concatenate(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def _concatenate(a, b):
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def _vimco(k):
    """VIMCO on AEVB's pair, with the score function in the place of reparameterization."""
    vae = make_vae()

    def guide(x):
        pyro.module("encoder", vae.guide)
        with pyro.plate("data", len(x)):
            q = vae.encode(x)
            pyro.sample("z", NonreparameterizedNormal(q.mean, q.stddev).to_event(1))

    return pv.SVI(vae.model, guide, pyro.optim.Adam({"lr": 1e-3}), VIMCO(k), compile=True).step


def _compiled(loss, x):
    return lambda: _on(by_svi(pv.SVI, loss, compile=True), x)


def _on(step, x):
    return lambda: step(x)
