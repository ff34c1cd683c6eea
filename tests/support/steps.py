"""Pairs of each kind, and their training by ``pyro_vae.SVI`` and by ``pyro.infer.SVI``."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, flows, nets, priors
from pyro_vae.infer.svi import SVI as CompiledSVI

D, K = 6, 2


def vae(encoder=conditionals.Normal, **options):
    trunk = options.pop("trunk", nets.MLP(D, (8,)))
    made = pv.VAE(
        priors.StandardNormal(K),
        conditionals.Normal(nets.MLP(K, (8,)), event_shape=D, scale="learned"),
        encoder(trunk, event_shape=K, **options),
    )
    return made.model, made.guide


def functions():
    """Plain functions that register networks by pyro.module and a constrained parameter by pyro.param."""
    decoder, encoder = nn.Linear(K, D), nn.Linear(D, 2 * K)

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


class Regression(PyroModule):
    """A PyroModule with a constrained PyroParam and a global latent."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(D), 1.0).to_event(1))
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        weight = self.weight
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ weight, self.scale), obs=x.sum(-1))


def regression(autoguide):
    def make():
        model = Regression()
        return model, autoguide(model)

    return make


def subsampled():
    """A plate that subsamples, and a site with a score-function gradient."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1).expand(len(rows), D), 1.0).to_event(1), obs=x[rows])

    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x)))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("k", dist.Bernoulli(logits=logits[rows]))

    return model, guide


def with_layer(layer):
    def make():
        trunk = nn.Sequential(nn.Linear(D, 8, bias=False), layer(), nn.Linear(8, 8))
        return vae(trunk=trunk)

    return make


PAIRS = {
    "VAE": vae,
    "full covariance": lambda: vae(conditionals.MultivariateNormal),
    "flow": lambda: vae(flows.AffineAutoregressive),
    "dropout": with_layer(lambda: nn.Dropout(0.3)),
    "BatchNorm": with_layer(lambda: nn.BatchNorm1d(8)),
    "plain functions": functions,
    "PyroModule, AutoNormal": regression(AutoNormal),
    "PyroModule, AutoDiagonalNormal": regression(AutoDiagonalNormal),
    "PyroModule, AutoIAFNormal": regression(lambda model: AutoIAFNormal(model, hidden_dim=[8])),
    "subsampling, score function": subsampled,
}


def data(n=12, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def adam(*_):
    return pyro.optim.Adam({"lr": 0.01})


def train(make, svi_class, steps=30, loss=Trace_ELBO, optim=adam, step=None, change=None, **options):
    """Train a pair from a fixed seed. Returns the losses, the parameters and buffers, and the SVI.

    :param step: ``step(svi, i)`` takes a step and returns its loss.
    :param change: ``change(model, guide, i)`` is called before each step.
    """
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        model, guide = make()
        svi = svi_class(model, guide, optim(model, guide), loss(), **options)
        losses = []
        for i in range(steps):
            if change is not None:
                change(model, guide, i)
            losses.append(svi.step(data(seed=i)) if step is None else step(svi, i))
        programs = (getattr(part, "__self__", part) for part in (model, guide))
        modules = [part for part in programs if isinstance(part, nn.Module)]
        buffers = {f"{i}.{k}": v.clone() for i, m in enumerate(modules) for k, v in m.named_buffers()}
        named = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
        return losses, named | buffers, svi


def assert_equal_runs(ours, pyros, tolerance=1e-9):
    """Assert that two results of :func:`train` are equal."""
    np.testing.assert_allclose(ours[0], pyros[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == pyros[1].keys()
    for name, value in pyros[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


def train_and_compare(make, steps=10, *, compile="trace", check=True, tolerance=1e-9, **options):
    """Train a pair by ``pyro_vae.SVI`` and by ``pyro.infer.SVI``, and assert equal losses, parameters and
    buffers. Returns the former SVI."""
    ours = train(make, CompiledSVI, steps, compile=compile, check=check, **options)
    assert_equal_runs(ours, train(make, SVI, steps, **options), tolerance)
    return ours[2]


def num_builds(svi):
    """The number of graphs that were traced for each signature."""
    return [signature.num_builds for signature in svi._signatures.values()]


class Annealed(nn.Module):
    """A guide whose scale is an attribute."""

    def __init__(self):
        super().__init__()
        self.net, self.temperature = nn.Linear(D, K), 1.0

    def forward(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.temperature).to_event(1))
