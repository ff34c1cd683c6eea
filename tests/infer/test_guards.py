"""The contract of a graph: guarded changes retrace it; other changes need ``retrace``, or are detected by
comparison."""

import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.infer.step import GraphStep
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import PAIRS, Annealed, adam, data, functions, num_builds, train_and_compare, vae

MODULE = sys.modules[__name__]
SCALE, DATA = 1.0, data()


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class Scaled(Annealed):
    """A guide whose scale is a product of an attribute, a tuple, a class attribute, and a global."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        Scaled.factor, MODULE.SCALE = 1.0, 1.0
        self.pair = (1.0, 2.0)
        self.handle = self.net.register_forward_hook(lambda *_: None)

    def scale(self):
        return self.attribute * self.pair[0] * self.factor * SCALE

    def forward(self, x):
        self.attribute = self.temperature  # a run may set an attribute to an equal value
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.scale()).to_event(1))


def replace_hook(guide, i):
    guide.handle.remove()
    guide.handle = guide.net.register_forward_hook(lambda _, __, out: out / i)


def scale_input(guide, i):
    guide.net.forward = lambda x: nn.functional.linear(x / i, guide.net.weight)


OF_GUIDE = {
    "attribute": lambda guide, i: setattr(guide, "temperature", 1 / i),
    "tuple": lambda guide, i: setattr(guide, "pair", (1 / i, 2.0)),
    "class attribute": lambda guide, i: setattr(Scaled, "factor", 1 / i),
    "global that a method reads": lambda guide, i: setattr(MODULE, "SCALE", 1 / i),
    "new forward pre-hook": lambda guide, i: guide.net.register_forward_pre_hook(lambda _, args: args[0] / i),
    "replaced forward hook": replace_hook,
    "replaced forward method": scale_input,
}


def scaled(model, read):
    def scaled_model(x):
        with poutine.scale(scale=read(x)):
            model(x)

    return scaled_model


def read_global(_):
    return SCALE


def read_default(_, *, scale=None):
    return 1.0 if scale is None else scale


def make_with_global():
    MODULE.SCALE = 1.0
    model, guide = functions()
    return scaled(model, lambda x: 2 * read_global(x)), guide


def make_with_global_tensor():
    MODULE.DATA = data()
    model, guide = functions()
    return scaled(model, lambda x: len(DATA) / len(x)), guide


def make_with_default():
    read_default.__kwdefaults__["scale"] = None
    model, guide = functions()
    return scaled(model, read_default), guide


def make_with_closure():
    scale = 1.0
    model, guide = functions()

    def set_scale(value):
        nonlocal scale
        scale = value

    scaled_model = scaled(model, lambda _: scale)
    scaled_model.set_scale = set_scale
    return scaled_model, guide


def make_with_partial():
    model, guide = functions()

    def scaled_model(x, *, scale):
        with poutine.scale(scale=scale):
            model(x)

    return partial(scaled_model, scale=1.0), guide


def make_with_handler():
    model, guide = functions()
    handler = poutine.scale_messenger.ScaleMessenger(scale=1.0)
    scaled_model = handler(model)
    scaled_model.handler = handler
    return scaled_model, guide


OF_FUNCTIONS = {
    "global": (make_with_global, lambda model, _, i: setattr(MODULE, "SCALE", 1 / i)),
    "global tensor": (make_with_global_tensor, lambda model, _, i: setattr(MODULE, "DATA", data(n=3 * i))),
    "default": (make_with_default, lambda model, _, i: read_default.__kwdefaults__.update(scale=1 / i)),
    "closure": (make_with_closure, lambda model, _, i: model.set_scale(1 / i)),
    "keyword of a partial": (make_with_partial, lambda model, _, i: model.keywords.update(scale=1 / i)),
    "attribute of a handler": (make_with_handler, lambda model, _, i: setattr(model.handler, "scale", 1 / i)),
}


def make_frozen():
    model, guide = vae()
    model.requires_grad_(False).train(False)
    return model, guide


def replace_parameter(model, _, i):
    layer = model.decoder.trunk.layers[0]
    layer.weight = nn.Parameter(layer.weight.detach() / i)


def replace_buffer(model, guide, i):
    (norm,) = (layer for layer in guide.modules() if isinstance(layer, nn.BatchNorm1d))
    norm.running_mean = norm.running_mean + i


def move_parameters(model, _, i):
    for p in model.parameters():
        p.data = p.data.clone() * 0.9


OF_MODULES = {
    "frozen and thawed parameters": (
        make_frozen, lambda model, _, i: model.requires_grad_(i == 4).train(i == 4),
    ),
    "replaced parameter": (vae, replace_parameter),
    "replaced buffer": (PAIRS["BatchNorm"], replace_buffer),
    "moved parameters": (vae, move_parameters),
    "training flag": (PAIRS["dropout"], lambda _, guide, i: guide.train(i != 4)),
    "cleared param store": (functions, lambda *_: pyro.clear_param_store()),
}  # fmt: skip
CASES = {
    name: (lambda: (vae()[0], Scaled()), lambda _, guide, i, change=change: change(guide, i))
    for name, change in OF_GUIDE.items()
}
CASES |= OF_FUNCTIONS | OF_MODULES


@pytest.mark.parametrize("case", CASES)
def test_a_guarded_change_retraces_the_graph(case):
    make, change = CASES[case]

    def change_twice(model, guide, i):
        if i in (4, 7):
            change(model, guide, i)

    svi = train_and_compare(make, change=change_twice)
    assert "traced, 10 steps" in svi.explain()
    assert num_builds(svi) == [3]


def test_parameters_that_are_missing_at_the_second_step_are_traced_at_the_third():
    def clear(_, __, i):
        if i == 1:
            pyro.clear_param_store()

    assert "traced, 8 steps" in train_and_compare(functions, 8, change=clear).explain()


@pytest.mark.parametrize("retraced", [False, True])
def test_an_unguarded_change_needs_retrace_or_is_detected_by_comparison(retraced, caplog):
    settings = [1.0]
    model, guide = functions()
    model = scaled(model, lambda _: settings[0])
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(5):
        svi.step(data())
    settings[0] = 1.01
    if retraced:
        svi.retrace()
        for _ in range(2):
            svi.step(data())
        pyro.set_rng_seed(3)
        expected = Trace_ELBO().loss(model, guide, data())
        pyro.set_rng_seed(3)
        assert svi.step(data()) == pytest.approx(expected, rel=1e-9)
        assert "traced, 3 steps" in svi.explain()
    else:
        for _ in range(6):  # until the tenth step of the graph
            svi.step(data())
        assert "differs from eager Pyro" in caplog.text
        assert "eager Pyro" in svi.explain()


def test_a_retraced_graph_is_compared_at_its_tenth_step(monkeypatch):
    compared_at = []
    monkeypatch.setattr(GraphStep, "compare", lambda self, _: compared_at.append(self.num_steps))
    model, guide = vae()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for i in range(40):
        if i == 15:
            model.requires_grad_(False).train(False)
        svi.step(data())
    assert compared_at == [9, 9]


FLOATS = {
    "branch": lambda beta: 1.0 if beta > 0.7 else 0.1,
    "dictionary key": lambda beta: {1.0: 0.3}.get(beta, 1.0),
    "type check": lambda beta: 0.3 if isinstance(beta, float) else 1.0,
    "rounding": lambda beta: round(beta, 1),
    "formatting": lambda beta: float(f"{beta:.1f}"),
    "tensor": lambda beta: torch.tensor(beta) * 2,
}


@pytest.mark.parametrize("use", FLOATS)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_float_argument_has_the_same_effect_as_in_eager_pyro(use):
    def make():
        model, guide = functions()
        return lambda x, beta: scaled(model, lambda _: FLOATS[use](beta))(x), lambda x, beta: guide(x)

    svi = train_and_compare(make, 12, step=lambda svi, i: svi.step(data(seed=i), [1.0, 0.5][i % 2]))
    assert "traced" in svi.explain()
    if use == "branch":
        assert svi.explain().count("traced") == 2


def test_a_float_that_changes_at_each_step_is_an_input_of_one_graph():
    def make():
        model, guide = functions()
        return lambda x, beta: scaled(model, lambda _: beta)(x), lambda x, beta: guide(x)

    svi = train_and_compare(make, 12, step=lambda svi, i: svi.step(data(seed=i), 1 / (i + 1)))
    assert num_builds(svi) == [1]
    assert "traced, 12 steps" in svi.explain()


class Counting(Annealed):
    """A guide that counts its runs in an attribute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        super().forward(x)


def test_a_pair_that_changes_an_attribute_when_it_runs_stays_eager():
    svi = CompiledSVI(functions()[0], Counting(), adam(), Trace_ELBO(), compile="trace")
    for _ in range(5):
        svi.step(data())
    assert "the pair changes 'count' as it runs" in svi.explain()
