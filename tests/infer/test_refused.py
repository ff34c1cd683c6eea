"""Arguments that cannot be inputs of a graph, and pairs that read values in Python, run as eager Pyro."""

import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, adam, data, functions, train_and_compare, vae


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.mark.parametrize(
    ("wrap", "unwrap", "how"),
    [
        (lambda x: {"x": (x, 1)}, lambda batch: batch["x"][0], "traced, 8 steps"),
        (lambda x: SimpleNamespace(x=x), lambda batch: batch.x, "whose changes a graph cannot detect"),
    ],
    ids=["dictionary", "object"],
)
def test_tensors_in_containers_are_inputs_of_a_graph_and_other_objects_prevent_it(wrap, unwrap, how):
    def make():
        model, guide = functions()
        return lambda batch: model(unwrap(batch)), lambda batch: guide(unwrap(batch))

    assert how in train_and_compare(make, 8, step=lambda svi, i: svi.step(wrap(data(seed=i)))).explain()


def test_after_64_signatures_further_steps_are_eager(caplog):
    model, guide = functions()
    svi = CompiledSVI(lambda x, i: model(x), lambda x, i: guide(x), adam(), Trace_ELBO(), compile="auto")
    for i in range(70):
        svi.step(data(), i)
    lines = svi.explain().splitlines()
    assert len(lines) == 65
    assert lines[-1].endswith("6 steps")
    assert "pass numbers as tensors" in caplog.text


def test_data_outside_the_support_raise_as_in_pyro():
    """The steps before and after the error equal those of Pyro at the same noise."""

    def make():
        made = pv.VAE(
            priors.StandardNormal(K),
            conditionals.Bernoulli(nets.MLP(K, (8,)), event_shape=D),
            conditionals.Normal(nets.MLP(D, (8,)), event_shape=K),
        )
        return made.model, made.guide

    def step(svi, i):
        x = (data() > 0).double()
        if i == 4:
            with pytest.raises(ValueError, match="support"):
                svi.step(x + 0.5)
        return svi.step(x)

    assert "traced" in train_and_compare(make, 6, step=step).explain()


COUNTER, GENERATOR = itertools.count(), torch.Generator()
READS = {
    "numpy()": lambda x, _: torch.from_numpy(x.numpy().mean(0)).sum(),
    "np.asarray()": lambda x, _: float(np.asarray(x).std()),
    "tolist()": lambda x, _: x.tolist()[0][0],
    "item()": lambda x, shift: shift.item(),
    "float()": lambda x, shift: float(shift),
    "bool()": lambda x, shift: 1.0 if shift > 0 else 2.0,
    "counter": lambda x, _: float(next(COUNTER)),
    "time": lambda x, _: time.perf_counter() % 1.0,
    "random": lambda x, _: random.random(),
    "random in a rare branch": lambda x, _: 1.0 if random.random() < 0.01 else 0.1,
    "torch.Generator": lambda x, _: torch.randn(K, generator=GENERATOR),
}


@pytest.mark.parametrize("way", READS)
def test_a_pair_that_reads_a_value_in_python_runs_eagerly_and_the_reason_is_logged_once(way, caplog):
    model, _ = functions()
    net, shift = nn.Linear(D, K), torch.tensor(0.5)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x) + READS[way](x, shift), 1.0).to_event(1))

    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(4):
        svi.step(data())
    assert "eager Pyro: " in svi.explain()
    assert len([record for record in caplog.records if record.name == "pyro_vae.infer.svi"]) == 1


def hook_on_parameter(layer):
    return layer.weight.register_hook(lambda grad: 0.1 * grad)


def hook_on_layer(layer):
    return layer.register_full_backward_hook(lambda _, grads, __: tuple(0.1 * grad for grad in grads))


def hook_on_all_modules(_):
    def halve(_, __, output):
        return 0.5 * output if isinstance(output, torch.Tensor) else None

    return nn.modules.module.register_module_forward_hook(halve)


@pytest.mark.parametrize("register", [hook_on_parameter, hook_on_layer, hook_on_all_modules])
def test_adding_and_removing_hooks_has_the_same_effect_as_in_eager_pyro(register):
    handles = []

    def change(model, _, i):
        if i == 4:
            handles.append(register(model.decoder.trunk.layers[0]))
        if i == 8:
            handles.pop().remove()

    train_and_compare(vae, 12, change=change)
