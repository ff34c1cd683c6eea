"""A graph leaves behind what a step of Pyro leaves, and its making leaves nothing."""

import copy
import cProfile
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import PAIRS, D, K, adam, data, functions


@pytest.fixture(autouse=True)
def _in_double():
    """So that only rounding tells the two apart."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def same(make, step, num_steps=12, optim=adam, loss=Trace_ELBO):
    """Steps of our own and of Pyro's SVI end at the same losses, parameters and random state; how ours
    ran."""

    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = make()
            svi = svi_class(model, guide, optim(), loss(), **options)
            losses = [step(svi, i) for i in range(num_steps)]
            return (
                losses,
                {name: value.detach().clone() for name, value in pyro.get_param_store().items()},
                svi,
            )

    ours, pyros = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours[0], pyros[0], rtol=1e-9)
    for name, value in pyros[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-9, atol=1e-9, msg=name)
    return ours[2].explain()


def plainly(svi, i):
    return svi.step(data(seed=i))


def with_counter():
    model, guide = functions()
    counter = {"n": 0}

    def annealed(x):
        counter["n"] += 1
        with poutine.scale(scale=min(1.0, counter["n"] / 10)):
            model(x)

    return annealed, guide


def with_memory():
    """A guide that reads the mean of its last batch."""
    model, _ = functions()
    net, memory = nn.Linear(D, K), {"mean": torch.zeros(D)}

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x + memory["mean"]), 1.0).to_event(1))
        memory["mean"] = x.mean(0)

    return model, guide


def with_average():
    """A guide that keeps a running mean, in place, in a tensor that is no module's."""
    model, _ = functions()
    net, mean = nn.Linear(D, K), torch.zeros(D)

    def guide(x):
        mean.mul_(0.9).add_(0.1 * x.mean(0))
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x - mean), 1.0).to_event(1))

    return model, guide


def with_index():
    """A model that reads a row of a table by a tensor's value."""
    model, guide = functions()
    table, at = torch.rand(20), torch.tensor(0)

    def indexed(x):
        with poutine.scale(scale=table[at]):
            model(x)
        at.add_(1)

    return indexed, guide


@pytest.mark.parametrize("make", [with_average, with_index])
def test_what_a_pair_writes_for_its_next_run(make):
    same(make, plainly)


@pytest.mark.parametrize("make", [with_counter, with_memory])
def test_a_pair_that_keeps_python_state_for_its_next_run_runs_eagerly(make, caplog):
    with pyro.get_param_store().scope():
        svi = CompiledSVI(*make(), adam(), Trace_ELBO(), compile="trace")
        # to the comparison at the 100th step of a graph
        losses = [svi.step(data(seed=i)) for i in range(105)]
    assert np.isfinite(losses).all()
    assert "eager Pyro: " in svi.explain()
    assert len([record for record in caplog.records if record.name == "pyro_vae.infer.svi"]) == 1


def test_the_same_tensor_twice():
    """At one step two arguments are one tensor, later they are two."""

    def make():
        model, guide = functions()
        return (lambda noisy, x: model(x)), (lambda noisy, x: guide(noisy))

    def step(svi, i):
        x = data(seed=i)
        return svi.step(x, x) if i < 5 else svi.step(x + 1, x)

    assert "traced, 12" in same(make, step)


@pytest.mark.parametrize(
    "optim", [adam, lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1})], ids=["Adam", "clipped"]
)
def test_gradients_of_any_layout(optim):
    """One number for all elements, and one tensor for two parameters."""

    def make():
        model, guide = functions()

        def summed(x):
            p, a, b = (pyro.param(name, torch.arange(50.0)) for name in ("p", "a", "b"))
            pyro.factor("f", -1e-3 * p.sum() - 1e-3 * ((a + b) ** 2).sum())
            model(x)

        return summed, guide

    assert "traced, 12" in same(make, plainly, optim=optim)


def test_gradients_that_are_there_already():
    """Pyro adds to them; so do we."""

    def step(svi, i):
        if i % 4 == 3:
            (pyro.param("scale").sum() ** 2).backward()
        return svi.step(data(seed=i))

    assert "traced, 12" in same(functions, step)


def test_validation_goes_on():
    """A latent outside of the prior's support."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Exponential(1.0)), 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def fails_at(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            svi = svi_class(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
            for i in range(100):
                try:
                    svi.step(torch.zeros(4))
                except ValueError as error:
                    return i, str(error)
        return None

    ours = fails_at(CompiledSVI, compile="trace")
    assert ours is not None
    assert ours == fails_at(SVI)


@pytest.mark.filterwarnings("ignore:Encountered")
def test_a_loss_that_is_not_finite_moves_buffers_once():
    def make():
        model, guide = PAIRS["BatchNorm"]()
        return (lambda x, weight: [pyro.factor("f", weight), model(x)][1]), (lambda x, weight: guide(x))

    def step(svi, i):
        svi.step(data(seed=i), torch.tensor(-math.inf if i == 6 else 0.0))
        return sum(b.sum().item() for b in svi.guide.__closure__[0].cell_contents.buffers())

    same(make, step, num_steps=7)


def test_bad_data_at_the_wrong_moment():
    """Those that a graph was to be built on; the next are good."""
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    svi.step(data())
    with pytest.raises(ValueError, match="constraint Real"):
        svi.step(data() * math.nan)
    for _ in range(3):
        svi.step(data())
    assert "traced, 5" in svi.explain()


def test_copies_make_graphs_of_their_own():
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(3):
        svi.step(data())
    twin = copy.deepcopy(svi)
    assert "no step has run" in twin.explain()
    assert "traced, 3" in svi.explain()


def test_a_profiler_goes_on():
    profile = cProfile.Profile()
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    profile.enable()
    for _ in range(3):
        svi.step(data())
    running = sys.getprofile() is not None
    profile.disable()
    assert running
    assert "traced, 3" in svi.explain()
