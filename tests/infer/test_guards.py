"""What Python changes after a step was traced is seen: the pair trains on as by Pyro."""

import functools
import os
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.infer.guards import watching
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.steps import PAIRS, Annealed, adam, changes, data, functions, vae


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


def test_a_change_that_no_guard_sees_is_found_by_looking_again(caplog, monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.svi._CHECK_EVERY", 10)
    monkeypatch.setenv("SCALE", "1.0")  # out of sight
    model, guide = functions()

    def scaled(x):
        with poutine.scale(scale=float(os.environ["SCALE"])):
            model(x)

    svi = CompiledSVI(scaled, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(5):
        svi.step(data())
    monkeypatch.setenv("SCALE", "1.001")
    for _ in range(10):
        svi.step(data())
    assert "not that of eager Pyro" in caplog.text


@pytest.mark.parametrize("kind", ["list", "dict of an object", "object"])
def test_what_hangs_on_a_closure_is_seen(kind):
    def make():
        box = [1.0] if kind == "list" else SimpleNamespace(scale=1.0, scales={"x": 1.0})
        read = {"list": lambda: box[0], "dict of an object": lambda: box.scales["x"], "object": lambda: box.scale}[kind]
        model, guide = functions()

        def scaled(x):
            with poutine.scale(scale=read()):
                model(x)

        scaled.box = box
        return scaled, guide

    def change(model, _, i):
        if kind == "list":
            model.box[0] = 1 / i
        elif kind == "object":
            model.box.scale = 1 / i
        else:
            model.box.scales["x"] = 1 / i

    changes(make, change)


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


SETTINGS = SimpleNamespace(scale=1.0)
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


class Slots:
    __slots__ = ("scale",)


SLOTS = Slots()


def by_slots(_):
    return SLOTS.scale


def by_object(_):
    return SETTINGS.scale


def by_default(_, *, number=None):
    return 1.0 if number is None else number


def set_global(_, value):
    globals()["NUMBER"] = value


def set_default(_, value):
    by_default.__kwdefaults__["number"] = value


WAYS = {
    "a global": (by_global, set_global),
    "a global of a function that is called": (by_other_function, set_global),
    "a class attribute": (by_class, lambda model, value: setattr(ByMethod, "factor", value)),
    "a class attribute that an instance hides": (by_class, lambda model, value: setattr(model, "factor", value)),
    "an object's attribute": (by_object, lambda model, value: setattr(SETTINGS, "scale", value)),
    "an object's slot": (by_slots, lambda model, value: setattr(SLOTS, "scale", value)),
    "a default argument": (by_default, set_default),
    "a method that is replaced": (by_class, lambda model, value: setattr(model, "scale", lambda: value)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_a_number(way):
    read, change = WAYS[way]

    def reset():
        set_global(None, 1.0)
        set_default(None, 1.0)
        ByMethod.factor = SETTINGS.scale = SLOTS.scale = 1.0

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


def test_a_variable_that_has_the_name_of_an_attribute_is_no_matter():
    """``self.factor`` is not the module's ``factor``."""
    _, guide = functions()
    svi = CompiledSVI(ByMethod(by_class), guide, adam(), Trace_ELBO(), compile="trace")
    try:
        for i in range(6):
            globals()["factor"] = i
            svi.step(data())
    finally:
        del globals()["factor"]
    assert svi._builds == 1


def test_what_an_import_runs_is_not_what_a_pair_reads(tmp_path, monkeypatch):
    """Libraries load others when they are first used, such as mpmath, whose globals change for reasons of its own."""
    (tmp_path / "loaded_late.py").write_text("A, B = 1, 2\ndef a(): return A\ndef b(): return B\na()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with watching() as seen:
        late = __import__("loaded_late")
        late.b()
    (names,) = [names for known, names in seen.read.values() if known is vars(late)]
    assert names == {"B"}


SCALE = 1.0


def scaled(z):
    return z * SCALE


def test_what_eval_runs_is_watched():
    module = sys.modules[__name__]

    def evaluated():
        module.SCALE = 1.0
        model, guide = functions()

        def model_of_text(x):
            with poutine.scale(scale=eval("scaled(1.0)", {"scaled": scaled})):
                model(x)

        return model_of_text, guide

    changes(evaluated, lambda _, __, i: setattr(module, "SCALE", 1.0 + i))
