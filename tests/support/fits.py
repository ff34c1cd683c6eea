"""Small fits, uninterrupted and interrupted, and their comparison."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.checkpoint import Checkpoints


def data(n=107):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3))


def vae():
    made = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
        conditionals.Normal(
            nn.Sequential(nets.MLP(4, (9,)), nn.BatchNorm1d(9), nn.Dropout(0.1)), event_shape=2
        ),
    )
    return made.model, made.guide, [*made.parameters(), *made.buffers()]


def functions():
    """Plain functions: parameters in the param store, and a batch norm in a closure."""
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def model(x):
        scale = pyro.param("scale", torch.ones(4), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x).squeeze(-1), pyro.param("width", torch.tensor(0.5))))

    return model, guide, [*network.parameters(), *network.buffers()]


class Stop(Exception):
    pass


def run_until_step(monkeypatch, steps, **options):
    """Run a fit that saves a checkpoint after each step, and stop it after ``steps`` steps."""
    save = Checkpoints.save

    def save_and_stop(self, num_steps, content, *, score):
        save(self, num_steps, content, score=score)
        if num_steps >= steps:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Stop):
            run(every=1, **options)


def run(pair=vae, x=data, loss=Trace_ELBO, optim=lambda: pyro.optim.Adam({"lr": 0.01}), seed=1, **options):
    """Fit a pair. Returns the parameters and buffers, and the epochs with ``seconds`` set to 0."""
    torch.manual_seed(0)
    model, guide, tensors = pair()
    x = x() if callable(x) else x
    pyro.set_rng_seed(seed)
    options = {"validation": data(33), "num_epochs": 5, "batch_size": 20} | options
    if pair is functions:
        options["validation"] = None  # its batch norm cannot be scaled to another number of rows
    history = pv.fit(model, guide, x, loss=loss(), optim=optim(), **options)
    tensors = [*tensors, *history.param_store["params"].values()]
    return [t.detach().clone() for t in tensors], [epoch._replace(seconds=0.0) for epoch in history.epochs]


def assert_same(a, b):
    """Assert that two results of :func:`run` are bitwise equal."""
    assert len(a[0]) == len(b[0])
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert str(a[1]) == str(b[1])  # as strings, since NaN != NaN
