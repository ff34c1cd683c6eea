"""The contract of a graph: changes that a guard sees are followed; others are found by comparison, and by ``retrace``."""

import functools
import os
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.infer.step import GraphStep
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import PAIRS, Annealed, D, K, adam, changes, data, functions, vae


@pytest.fixture(autouse=True)
def _in_double():
    """So that only rounding tells the two apart."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


BETA = 1.0


def annealed_by_a_global():
    model, guide = functions()

    def annealed(x):
        with poutine.scale(scale=BETA):
            model(x)

    return annealed, guide


def test_an_attribute_that_changes_is_seen():
    changes(lambda: (vae()[0], Annealed()), lambda _, guide, i: setattr(guide, "temperature", 1 / i))


def test_a_global_that_changes_is_seen(monkeypatch):
    module = __import__(__name__, fromlist=["BETA"])
    monkeypatch.setattr(module, "BETA", 1.0)
    values = {6: 0.5, 11: 1.0}  # and back, so that both runs begin alike
    changes(annealed_by_a_global, lambda _, __, i: setattr(module, "BETA", values[i]))


def test_train_and_eval_are_told_apart():
    changes(PAIRS["dropout"], lambda _, guide, i: guide.train(i != 6))


def test_frozen_parameters_stay():
    def freeze(model, guide, i):
        model.requires_grad_(i != 6).train(i != 6)

    changes(vae, freeze)


def test_replaced_parameters_are_the_ones_that_train():
    def replace(model, guide, i):
        layer = model.decoder.trunk.layers[0]
        layer.weight = nn.Parameter(layer.weight.detach() * 0.5)

    changes(vae, replace)


def test_parameters_whose_memory_moves():
    def move(model, guide, i):
        for p in model.parameters():
            p.data = p.data.clone() * 0.9

    changes(vae, move)


def by_environment():
    model, guide = functions()

    def scaled(x):
        with poutine.scale(scale=float(os.environ["SCALE"])):
            model(x)

    return scaled, guide


def by_list_that_is_closed_over():
    model, guide = functions()
    settings = [1.0]

    def scaled(x):
        with poutine.scale(scale=settings[0]):
            model(x)

    scaled.change = lambda value: settings.__setitem__(0, value)
    return scaled, guide


def by_object_that_is_closed_over():
    model, guide = functions()
    settings = SimpleNamespace(scale=1.0)

    def scaled(x):
        with poutine.scale(scale=settings.scale):
            model(x)

    scaled.change = lambda value: setattr(settings, "scale", value)
    return scaled, guide


@pytest.mark.parametrize("make", [by_environment, by_list_that_is_closed_over, by_object_that_is_closed_over])
@pytest.mark.parametrize("retraced", [False, True])
def test_deeper_state_is_found_by_comparison_and_by_retrace(make, retraced, caplog, monkeypatch):
    monkeypatch.setenv("SCALE", "1.0")
    with pyro.get_param_store().scope():
        model, guide = make()
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for _ in range(5):
            svi.step(data())
        monkeypatch.setenv("SCALE", "1.01")
        getattr(model, "change", lambda _: None)(1.01)
        if retraced:
            svi.retrace()
            svi.step(data())
            svi.step(data())
            pyro.set_rng_seed(3)
            expected = Trace_ELBO().loss(model, guide, data())
            pyro.set_rng_seed(3)
            assert svi.step(data()) == pytest.approx(expected, rel=1e-9)
            assert "traced, 3 steps" in svi.explain()
        else:
            for _ in range(6):  # the tenth step of the graph among them
                svi.step(data())
            assert "differs from eager Pyro" in caplog.text
            assert "eager Pyro" in svi.explain()


def test_numbers_that_are_arguments_are_inputs_of_one_graph():
    """As an annealing factor is, which is another at each step."""

    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = functions()

            def annealed(x, beta):
                with poutine.scale(scale=beta):
                    model(x)

            svi = svi_class(annealed, lambda x, beta: guide(x), adam(), Trace_ELBO(), **options)
            return [svi.step(data(seed=i), 1 / (i + 1)) for i in range(12)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-9)
    assert [each.num_builds for each in svi._signatures.values()] == [1]
    assert "traced, 12 steps" in svi.explain()


def test_numbers_that_python_branches_on_have_a_graph_for_each_value():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = functions()

            def annealed(x, beta):
                with poutine.scale(scale=1.0 if beta > 0.5 else 0.1):
                    model(x)

            svi = svi_class(annealed, lambda x, beta: guide(x), adam(), Trace_ELBO(), **options)
            return [svi.step(data(seed=i), [0.2, 0.8][i % 2]) for i in range(12)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-9)
    assert svi.explain().count("traced") == 2


class Counting(nn.Module):
    """A guide that counts its runs in an attribute."""

    def __init__(self):
        super().__init__()
        self.net, self.count = nn.Linear(D, K), 0

    def forward(self, x):
        pyro.module("net", self.net)
        self.count += 1
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


def test_a_pair_that_writes_python_state_runs_eagerly_and_is_told_so():
    with pyro.get_param_store().scope():
        svi = CompiledSVI(functions()[0], Counting(), adam(), Trace_ELBO(), compile="trace")
        for _ in range(5):
            svi.step(data())
    assert "the pair changes 'count' as it runs" in svi.explain()


def test_a_cleared_param_store():
    """Plain functions begin anew, and train what is in the store."""
    changes(functions, lambda *_: pyro.clear_param_store())
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for i in range(8):
        if i == 4:
            pyro.clear_param_store()
        svi.step(data())
    before = pyro.param("scale").detach().clone()
    svi.step(data())
    assert not torch.equal(pyro.param("scale"), before)


def test_handlers_around_a_step_are_obeyed():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            svi = svi_class(*vae(), adam(), Trace_ELBO(), **options)
            losses = [svi.step(data()) for _ in range(5)]
            with poutine.scale(scale=0.1):
                losses.append(svi.step(data()))
            return [*losses, svi.step(data())]

    np.testing.assert_allclose(run(CompiledSVI, compile="trace"), run(SVI), rtol=1e-9)


def test_hooks_of_modules_are_seen():
    changes(vae, lambda model, _, i: model.decoder.register_forward_pre_hook(lambda _, given: (given[0] / i,)))


NUMBER = 1.0


def twice_number():
    return 2 * NUMBER


class ByMethod(nn.Module):
    """A model that reads a global, a class's attribute, or what another function reads, by its methods."""

    factor = 1.0

    def __init__(self, read):
        super().__init__()
        self.model, _ = functions()
        self.read = read

    def scale(self):
        return self.read(self)

    def forward(self, x):
        with poutine.scale(scale=self.scale()):
            self.model(x)


def by_global(_):
    return NUMBER


def by_other_function(_):
    return twice_number()


def by_class(self):
    return self.factor


def by_default(_, *, number=None):
    return 1.0 if number is None else number


def set_global(_, value):
    globals()["NUMBER"] = value


def set_default(_, value):
    by_default.__kwdefaults__["number"] = value


WAYS = {
    "a global": (by_global, set_global),
    "a global of a function that is called": (by_other_function, set_global),
    "a class attribute that an instance hides": (by_class, lambda model, value: setattr(model, "factor", value)),
    "a default argument": (by_default, set_default),
    "a method that is replaced": (by_class, lambda model, value: setattr(model, "scale", lambda: value)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_number(way):
    read, change = WAYS[way]

    def reset():
        set_global(None, 1.0)
        set_default(None, 1.0)

    def make():
        reset()
        _, guide = functions()
        return ByMethod(read), guide

    try:
        changes(make, lambda model, _, i: change(model, 1 / i))
    finally:
        reset()


def test_partials_and_handlers():
    """What one of Pyro's handlers, or a partial, was given may change."""

    def by_handler():
        model, guide = functions()
        handler = poutine.scale_messenger.ScaleMessenger(scale=1.0)
        wrapped = handler(model)
        wrapped.handler = handler
        return wrapped, guide

    changes(by_handler, lambda model, _, i: setattr(model.handler, "scale", 1 / i))

    def by_partial():
        model, guide = functions()

        def scaled(x, *, scale):
            with poutine.scale(scale=scale):
                model(x)

        return functools.partial(scaled, scale=1.0), guide

    changes(by_partial, lambda model, _, i: model.keywords.update(scale=1 / i))


def test_a_layer_whose_forward_is_replaced():
    def replace(model, *_):
        layer = model.decoder.trunk.layers[0]
        layer.forward = lambda x: nn.Linear.forward(layer, 0.5 * x)

    changes(vae, replace)


def test_thawed_parameters_train():
    def make():
        model, guide = vae()
        model.requires_grad_(False).train(False)
        return model, guide

    changes(make, lambda model, _, i: model.requires_grad_(i == 6).train(i == 6))


class Limits(NamedTuple):
    low: float
    high: float


class Bounded(Annealed):
    """A guide whose temperature is in a tuple, and in an attribute of its class, which a method reads."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.limits = Limits(0.0, 1.0)
        self.handle = self.net.register_forward_hook(lambda *_: None)

    def scale(self):
        return self.limits.high * self.factor * NUMBER

    def forward(self, x):
        self.temperature = 1.0
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.scale()).to_event(1))


def replace_hook(guide, i):
    guide.handle.remove()
    guide.handle = guide.net.register_forward_hook(lambda _, __, out: out / i)


MORE_WAYS = {
    "a tuple": lambda guide, i: setattr(guide, "limits", Limits(0.0, 1 / i)),
    "a class attribute": lambda guide, i: setattr(Bounded, "factor", 1 / i),
    "a global that a method reads": lambda guide, i: set_global(None, 1 / i),
    "a hook in the place of another": replace_hook,
}


@pytest.mark.parametrize("way", MORE_WAYS)
def test_attributes_of_any_kind_are_seen(way):
    def make():
        Bounded.factor = 1.0
        set_global(None, 1.0)
        return vae()[0], Bounded()

    try:
        changes(make, lambda _, guide, i: MORE_WAYS[way](guide, i))
    finally:
        Bounded.factor = 1.0
        set_global(None, 1.0)


DATA = data()


def test_a_global_tensor_of_which_only_the_size_is_read_is_seen(monkeypatch):
    module = __import__(__name__, fromlist=["DATA"])

    def make():
        module.DATA = data()
        model, guide = functions()

        def scaled(x):
            with poutine.scale(scale=len(DATA) / len(x)):
                model(x)

        return scaled, guide

    changes(make, lambda _, __, i: setattr(module, "DATA", data(n=3 * i)))


def test_a_rebuilt_graph_is_compared_at_its_own_tenth_step(monkeypatch):
    compared = []
    monkeypatch.setattr(GraphStep, "compare", lambda self, _: compared.append(self.num_steps))
    model, guide = vae()
    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for i in range(40):
            if i == 15:
                model.requires_grad_(False).train(False)
            svi.step(data())
    assert compared == [9, 9]
