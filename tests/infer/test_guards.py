"""What Python changes after a step was traced is seen: the pair trains on as by Pyro."""

import copy
import cProfile
import functools
import itertools
import math
import os
import random
import sys
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
from tests.steps import PAIRS, Annealed, D, K, adam, changes, data, functions, vae


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
    monkeypatch.setenv("SCALE", "3.0")
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
    svi = CompiledSVI(lambda x, beta: model(x), lambda x, beta: guide(x), adam(), Trace_ELBO(), compile="auto")
    for i in range(70):
        svi.step(data(), 1 / (i + 1))
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


def same(make, step, num_steps=12, optim=adam, loss=Trace_ELBO):
    """Steps of our own and of Pyro's SVI end at the same losses, parameters and random state; how ours ran."""

    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = make()
            svi = svi_class(model, guide, optim(), loss(), **options)
            losses = [step(svi, i) for i in range(num_steps)]
            return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, svi

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


@pytest.mark.parametrize("make", [with_counter, with_memory, with_average, with_index])
def test_what_a_pair_writes_for_its_next_run(make):
    same(make, plainly)


def test_the_same_tensor_twice():
    """At one step two arguments are one tensor, later they are two."""

    def make():
        model, guide = functions()
        return (lambda noisy, x: model(x)), (lambda noisy, x: guide(noisy))

    def step(svi, i):
        x = data(seed=i)
        return svi.step(x, x) if i < 5 else svi.step(x + 1, x)

    assert "traced, 12" in same(make, step)


@pytest.mark.parametrize("optim", [adam, lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.1})], ids=["Adam", "clipped"])
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


def test_copies_make_graphs_of_their_own():
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(3):
        svi.step(data())
    twin = copy.deepcopy(svi)
    assert "nothing has run" in twin.explain()
    assert "traced, 3" in svi.explain()


def test_a_profiler_and_a_debugger_go_on():
    svi = CompiledSVI(*functions(), adam(), Trace_ELBO(), compile="trace")
    before = sys.getprofile(), sys.gettrace()
    sys.setprofile(lambda *_: None)
    sys.settrace(lambda *_: None)
    try:
        for _ in range(3):
            svi.step(data())
    finally:
        sys.setprofile(before[0])
        sys.settrace(before[1])
    assert "a profiler and a debugger" in svi.explain()


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
