"""What a step is given and what it reads: what cannot be a graph runs as eager Pyro."""

import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, adam, data, functions, vae


@pytest.fixture(autouse=True)
def _in_double():
    """So that only rounding tells the two apart."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def test_parameters_that_one_kind_of_arguments_uses_alone():
    """Pyro lets a parameter without a gradient drift on by its momentum; so do we."""

    def make():
        model, guide = functions()
        net = nn.Linear(D, 2 * K)

        def own(x):
            pyro.module("net", net)
            if len(x) > 6:
                return guide(x)
            with pyro.plate("data", len(x)):
                loc, log_scale = net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return model, own

    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            svi = svi_class(*make(), adam(), Trace_ELBO(), **options)
            return [svi.step(data(n, seed=i)) for i, n in enumerate((12, 5, 12, 5, 12, 12, 5, 5, 12, 5))]

    np.testing.assert_allclose(run(CompiledSVI, compile="trace"), run(SVI), rtol=1e-9)


def test_arguments_of_any_structure():
    """Tensors in dictionaries and tuples; objects that may change unseen run as eager Pyro."""

    def run(svi_class, wrap, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = functions()
            pair = [
                lambda batch, program=program: program(batch["x"][0] if isinstance(batch, dict) else batch.x)
                for program in (model, guide)
            ]
            svi = svi_class(*pair, adam(), Trace_ELBO(), **options)
            return [svi.step(wrap(data(seed=i))) for i in range(8)], svi

    for wrap, how in ((lambda x: {"x": (x, 1)}, "traced, 8"), (lambda x: SimpleNamespace(x=x), "may change unseen")):
        ours, svi = run(CompiledSVI, wrap, compile="trace")
        np.testing.assert_allclose(ours, run(SVI, wrap)[0], rtol=1e-9)
        assert how in svi.explain()


def test_arguments_that_are_new_each_time_end_in_eager_pyro(caplog):
    model, guide = functions()
    svi = CompiledSVI(lambda x, step: model(x), lambda x, step: guide(x), adam(), Trace_ELBO(), compile="auto")
    for i in range(70):
        svi.step(data(), i)
    assert len(svi._signatures) == 64
    assert "pass numbers as tensors" in caplog.text


def test_data_outside_the_support_are_an_error_as_by_pyro():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        made = pv.VAE(
            priors.StandardNormal(K),
            conditionals.Bernoulli(nets.MLP(K, (8,)), event_shape=D),
            conditionals.Normal(nets.MLP(D, (8,)), event_shape=K),
        )
        with pyro.get_param_store().scope():
            svi = svi_class(made.model, made.guide, adam(), Trace_ELBO(), **options)
            x = (data() > 0).double()
            losses = [svi.step(x) for _ in range(4)]
            with pytest.raises(ValueError, match="support"):
                svi.step(x + 0.5)
            state = torch.get_rng_state()
            return [*losses, svi.step(x)], state, svi

    ours, pyros = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours[0], pyros[0], rtol=1e-9)
    assert torch.equal(ours[1], pyros[1])
    assert "traced" in ours[2].explain()


def read_by(read):
    """A guide whose location is moved by a number that Python takes out of the data."""

    def make():
        model, _ = functions()
        net = nn.Linear(D, K)
        shift = torch.tensor(0.5)

        def guide(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(net(x) + read(x, shift), 1.0).to_event(1))

        return model, guide

    return make


COUNT, OWN = itertools.count(), torch.Generator()
READS = {
    "numpy": lambda x, _: torch.from_numpy(x.numpy().mean(0)).sum(),
    "an array": lambda x, _: float(np.asarray(x).std()),
    "a list": lambda x, _: x.tolist()[0][0],
    "a number": lambda x, shift: shift.item(),
    "a float": lambda x, shift: float(shift),
    "a branch": lambda x, shift: 1.0 if shift > 0 else 2.0,
    "a count": lambda x, _: float(next(COUNT)),
    "the time": lambda x, _: time.perf_counter() % 1.0,
    "Python's noise": lambda x, _: random.random(),
    "a generator of its own": lambda x, _: torch.randn(K, generator=OWN),
}  # fmt: skip


@pytest.mark.parametrize("way", READS)
def test_what_python_reads_out_of_tensors_is_refused(way, caplog):
    model, guide = read_by(READS[way])()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(4):
        svi.step(data())
    assert "eager Pyro: " in svi.explain()
    assert len([record for record in caplog.records if record.name == "pyro_vae.infer.svi"]) == 1


@pytest.mark.parametrize("kind", ["parameter", "layer", "every layer"])
def test_hooks_on_gradients_run(kind):
    def halved(_, __, made):
        return 0.5 * made if isinstance(made, torch.Tensor) else None

    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = vae()
            svi = svi_class(model, guide, adam(), Trace_ELBO(), **options)
            losses = [svi.step(data(seed=i)) for i in range(4)]
            layer = model.decoder.trunk.layers[0]
            if kind == "parameter":
                handle = layer.weight.register_hook(lambda grad: 0.1 * grad)
            elif kind == "layer":
                handle = layer.register_full_backward_hook(lambda _, grads, __: tuple(0.1 * grad for grad in grads))
            else:
                handle = nn.modules.module.register_module_forward_hook(halved)
            losses += [svi.step(data(seed=i)) for i in range(4)]
            handle.remove()
            return losses + [svi.step(data(seed=i)) for i in range(4)]

    np.testing.assert_allclose(run(CompiledSVI, compile="trace"), run(SVI), rtol=1e-9)


def scaled_by(read):
    """A model under a scale that Python finds from an argument."""

    def make():
        model, guide = functions()

        def scaled(x, beta):
            with poutine.scale(scale=read(beta)):
                model(x)

        return scaled, lambda x, beta: guide(x)

    return make


FLOATS = {
    "looked up": lambda beta: {1.0: 0.3}.get(beta, 1.0),
    "by its type": lambda beta: 0.3 if isinstance(beta, float) else 1.0,
    "rounded": lambda beta: round(beta, 1),
    "printed": lambda beta: float(f"{beta:.1f}"),
    "in a tensor": lambda beta: torch.tensor(beta) * 2,
}


@pytest.mark.parametrize("way", FLOATS)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_whatever_python_does_with_a_float_is_done(way):
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            svi = svi_class(*scaled_by(FLOATS[way])(), adam(), Trace_ELBO(), **options)
            return [svi.step(data(seed=i), [1.0, 0.5][i % 2]) for i in range(12)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-9)
    assert "traced" in svi.explain()


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand()], ids=["random", "numpy"])  # noqa: NPY002
def test_noise_of_python_that_decides_a_branch_is_refused(draw):
    _, guide = functions()
    model = scaled_by(lambda _: 0.1 if draw() < 0.01 else 1.0)()[0]
    with pyro.get_param_store().scope():
        svi = CompiledSVI(lambda x: model(x, 1.0), guide, adam(), Trace_ELBO(), compile="trace")
        for _ in range(4):
            svi.step(data())
    assert "draws noise from Python's or numpy's generator" in svi.explain()


@pytest.mark.slow
def test_many_shapes_have_graphs():
    """What changes is the data, so no graph is one too many."""
    model, guide = functions()
    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for n in range(2, 20):
            for _ in range(2):
                svi.step(data(n))
    assert svi.explain().count("traced") == 18
