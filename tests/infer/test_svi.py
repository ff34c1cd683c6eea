"""SVI with a traced step equals Pyro's SVI for each kind of pair, and runs as eager Pyro if a graph would be
wrong."""

import os
import shutil

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import nn

from pyro_vae import flows
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import (
    PAIRS,
    Annealed,
    D,
    K,
    adam,
    assert_equal_runs,
    data,
    functions,
    subsampled,
    train,
    vae,
)


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("name", PAIRS)
def test_training_of_each_kind_of_pair_equals_that_by_pyro(name):
    ours, pyros = train(PAIRS[name], CompiledSVI, compile="trace"), train(PAIRS[name], SVI)
    assert_equal_runs(ours, pyros)
    assert ": traced, 30 steps" in ours[2].explain()


@pytest.mark.parametrize(
    "loss", [TraceMeanField_ELBO, lambda: Trace_ELBO(num_particles=3)], ids=["mean field", "particles"]
)
def test_other_traced_losses_equal_those_of_pyro(loss):
    ours, pyros = train(vae, CompiledSVI, loss=loss, compile="trace"), train(vae, SVI, loss=loss)
    assert_equal_runs(ours, pyros)
    assert "traced" in ours[2].explain()


def test_vectorized_particles_equal_those_of_pyro():
    def loss():
        return Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)

    ours, pyros = train(vae, CompiledSVI, loss=loss, compile="trace"), train(vae, SVI, loss=loss)
    assert_equal_runs(ours, pyros)
    assert "traced" in ours[2].explain()


def test_two_hundred_steps_in_single_precision_equal_those_of_pyro():
    torch.set_default_dtype(torch.float)
    ours, pyros = train(vae, CompiledSVI, steps=200, compile="trace"), train(vae, SVI, steps=200)
    assert_equal_runs(ours, pyros, tolerance=1e-5)


OPTIMIZERS = {
    "AdamW": lambda *_: pyro.optim.AdamW({"lr": 0.01, "weight_decay": 0.1}),
    "options by parameter": lambda *_: pyro.optim.Adam(
        lambda name: {"lr": 0.001 if "log_scale" in name else 0.01}
    ),
    "clipped": lambda *_: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1}),
    "ClippedAdam": lambda *_: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}),
    "amsgrad": lambda *_: pyro.optim.Adam({"lr": 0.01, "amsgrad": True}),
    "SGD": lambda *_: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_each_optimizer_equals_that_by_pyro(name):
    ours, pyros = (
        train(vae, CompiledSVI, optim=OPTIMIZERS[name], compile="trace"),
        train(vae, SVI, optim=OPTIMIZERS[name]),
    )
    assert_equal_runs(ours, pyros)
    assert "traced" in ours[2].explain()


def test_a_learning_rate_schedule_has_the_same_effect_as_in_pyro():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            schedule = pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
            )
            svi = svi_class(*vae(), schedule, Trace_ELBO(), **options)
            losses = []
            for i in range(12):
                losses.append(svi.step(data(seed=i)))
                schedule.step()
            return losses, schedule.get_state()

    (ours, state), (pyros, expected) = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-9)
    assert state.keys() == expected.keys()  # the optimizer's state is stored as by Pyro
    for name, part in expected.items():
        for key, value in part["optimizer"]["state"][0].items():
            torch.testing.assert_close(state[name]["optimizer"]["state"][0][key], value, rtol=1e-9, atol=1e-9)


def test_a_torch_optimizer_has_to_contain_all_parameters_of_the_pair():
    def adam_over_pair(model, guide):
        return torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.01)

    assert_equal_runs(train(vae, CompiledSVI, optim=adam_over_pair, compile="trace"), train(vae, SVI))
    with pytest.raises(ValueError, match="does not have"):
        train(vae, CompiledSVI, optim=lambda model, _: torch.optim.Adam(model.parameters(), lr=0.01))


def assert_runs_as_eager_pyro(make, caplog, reason, loss=Trace_ELBO, steps=8):
    """Assert that training equals that by Pyro, and that the reason is logged once."""
    np.random.seed(0)  # noqa: NPY002
    ours = train(make, CompiledSVI, steps, loss=loss, compile="trace")
    np.random.seed(0)  # noqa: NPY002
    pyros = train(make, SVI, steps, loss=loss)
    assert_equal_runs(ours, pyros)
    lines = [record.message for record in caplog.records if record.name == "pyro_vae.infer.svi"]
    assert len(lines) == 1
    assert reason in lines[0]
    assert reason in ours[2].explain()


def numpy_noise():
    """A guide that draws its noise by numpy."""
    model, _ = vae()
    net = nn.Linear(D, K)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            noise = torch.from_numpy(np.random.randn(len(x), K))  # noqa: NPY002
            pyro.sample("z", dist.Delta(net(x) + noise, event_dim=1))

    return model, guide


def numpy_number():
    model, guide = functions()

    def scaled(x):
        with poutine.scale(scale=1 + np.random.rand()):  # noqa: NPY002
            return model(x)

    return scaled, guide


def splines():
    return vae(flows.NeuralSpline)


def branching():
    model, guide = functions()
    return model, lambda x: guide(x) if x.mean() > -10 else guide(-x)


@pytest.mark.parametrize(
    ("make", "reason", "loss"),
    [
        (numpy_noise, "numpy's generator", Trace_ELBO),
        (numpy_number, "numpy's generator", Trace_ELBO),
        (splines, "depends on values", Trace_ELBO),
        (branching, "reads the value of a tensor", Trace_ELBO),
        (subsampled, "TraceGraph_ELBO", TraceGraph_ELBO),
    ],
    ids=["numpy noise", "a number of numpy", "boolean masks", "a branch on data", "TraceGraph"],
)
def test_pairs_and_losses_that_cannot_be_traced_run_as_eager_pyro(make, reason, loss, caplog):
    assert_runs_as_eager_pyro(make, caplog, reason, loss)


def test_each_shape_of_the_data_has_its_graph():
    model, guide = vae()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for n in (12, 12, 5, 5, 12, 12):
        svi.step(data(n))
    assert svi.explain().count("traced") == 2
    assert "[12, 6]: traced, 4 steps" in svi.explain()


def test_after_too_many_retraces_steps_run_as_eager_pyro(caplog, monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.svi._MAX_BUILDS", 3)
    guide = Annealed()
    svi = CompiledSVI(vae()[0], guide, adam(), Trace_ELBO(), compile="trace")
    for i in range(12):
        guide.temperature = 1 / (i + 1)
        svi.step(data())
    assert "graphs were traced" in svi.explain()
    assert len([record for record in caplog.records if "runs as eager Pyro" in record.message]) == 1


def test_noise_is_fresh_reproducible_and_independent():
    def pair():
        def model(x):
            with pyro.plate("data", len(x)):
                a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
                # the gradients for the two locations are the draws themselves
                pyro.sample("x", dist.Delta(x, log_density=-(a**2 + b**2) / 2), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                for name in "ab":
                    pyro.sample(name, dist.Normal(pyro.param(name + "_loc", torch.zeros(len(x))), 1.0))

        return model, guide

    draws = []
    model, guide = pair()
    sgd = pyro.optim.SGD({"lr": 1.0})
    x = torch.zeros(5000)
    svi = CompiledSVI(model, guide, sgd, Trace_ELBO(), compile="trace")

    def gradients():
        for name in "ab":
            pyro.param(name + "_loc").data.zero_()
        svi.step(x)
        return [-pyro.param(name + "_loc").detach().clone() for name in "ab"]

    svi.step(x)
    draws = [gradients() for _ in range(2)]
    assert "traced" in svi.explain()
    flat = [part for pair_of in draws for part in pair_of]
    correlations = torch.corrcoef(torch.stack(flat)) - torch.eye(4)
    assert correlations.abs().max() < 4.5 / 5000**0.5  # independent between calls and between sites
    pyro.set_rng_seed(3)
    first = gradients()
    pyro.set_rng_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_training_by_inductor_equals_that_by_pyro():
    ours, pyros = (
        train(PAIRS["dropout"], CompiledSVI, steps=40, compile=True),
        train(PAIRS["dropout"], SVI, steps=40),
    )
    assert_equal_runs(ours, pyros)
    assert "compiled by Inductor, 40 steps" in ours[2].explain()
    assert torch.distributions.Distribution._validate_args  # Dynamo would disable validation


def test_rounding_at_an_optimum_does_not_count_as_a_difference_but_another_prior_does(monkeypatch):
    """At an optimum the gradient consists of rounding errors."""
    monkeypatch.setattr("pyro_vae.infer.svi._COMPARE_EVERY", 100)
    monkeypatch.setenv("SCALE", "1.0")  # no guard detects its changes
    torch.manual_seed(0)
    x = torch.randn(1000, D, dtype=torch.float)
    y = (torch.rand(1000) < torch.sigmoid(x.sum(-1))).float()

    def model(x, y):
        scale = float(os.environ["SCALE"])
        w = pyro.sample("w", dist.Normal(torch.zeros(D, dtype=torch.float), scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    with pyro.get_param_store().scope():
        svi = CompiledSVI(
            model, AutoDelta(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile="trace"
        )
        for _ in range(3000):
            svi.step(x, y)
        assert ": traced, 3000 steps" in svi.explain()
        monkeypatch.setenv("SCALE", "1.1")
        for _ in range(100):
            svi.step(x, y)
        assert "differs from eager Pyro" in svi.explain()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compile", ["trace", True])
def test_training_on_a_gpu_equals_that_by_pyro(compile):
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = (part.cuda() for part in vae())
            svi = svi_class(model, guide, adam(), Trace_ELBO(), **options)
            return [svi.step(data(seed=i).cuda()) for i in range(30)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile=compile), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-8)
    assert ("traced" if compile == "trace" else "compiled by Inductor") in svi.explain()


def test_without_a_compiler_the_traced_graph_is_used(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("pyro_vae.compiler.internals.compile_graph", fail)
    ours, pyros = train(vae, CompiledSVI, compile=True), train(vae, SVI)
    assert_equal_runs(ours, pyros)
    assert "traced (Inductor: RuntimeError" in ours[2].explain()
    assert "no compiler here" in caplog.text


def test_a_function_as_loss_and_compile_false_run_as_eager_pyro():
    def loss(model, guide, *args):
        return Trace_ELBO().differentiable_loss(model, guide, *args)

    assert_equal_runs(train(vae, CompiledSVI, loss=lambda: loss), train(vae, SVI, loss=lambda: loss))
    ours = train(vae, CompiledSVI, compile=False)
    assert_equal_runs(ours, train(vae, SVI))
    assert "compile=False" in ours[2].explain()
    with pytest.raises(ValueError, match="compile: expected"):
        CompiledSVI(*vae(), adam(), Trace_ELBO(), compile="fast")


def test_tracing_leaves_random_states_buffers_and_gradients_unchanged():
    """They are the same as after steps of Pyro."""
    ours, pyros = (
        train(PAIRS["BatchNorm"], CompiledSVI, steps=2, compile="trace"),
        train(PAIRS["BatchNorm"], SVI, steps=2),
    )
    assert_equal_runs(ours, pyros, tolerance=1e-12)
    train(vae, CompiledSVI, steps=3, compile="trace")
    state = torch.get_rng_state()
    train(vae, SVI, steps=3)
    assert torch.equal(state, torch.get_rng_state())
