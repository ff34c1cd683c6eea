"""Graphs equal eager Pyro for pairs that write tensors, and for all memory layouts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyro_vae as pv
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, data, train, train_and_compare

HOW = {"trace": ": traced, 5 steps", True: ": compiled by Inductor, 5 steps"}
both_kinds = pytest.mark.parametrize("compile", ["trace", True])


class Pair(nn.Module):
    """Two linear layers, and buffers of which two share memory. The model calls ``act(pair, x, offset)``."""

    def __init__(self, act=None):
        super().__init__()
        self.act = act
        self.encoder, self.decoder = nn.Linear(D, 2 * K), nn.Linear(K, D)
        base = torch.ones(D + 2)
        buffers = {"count": torch.zeros(()), "scale": torch.ones(D), "a": base[:D], "b": base[2:]}
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def model(self, x, offset=0.0):
        pyro.module("pair", self)
        if self.act is not None:
            self.act(self, x, offset)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            mean = self.decoder(z) * self.scale + offset
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x + self.a - self.b)

    def guide(self, x, offset=0.0):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make_pair(act=None):
    def make():
        pair = Pair(act)
        return pair.model, pair.guide

    return make


def write_buffer(pair, x, _):
    pair.count.add_((x > 5).sum())


def write_parameter(pair, _, __):
    with torch.no_grad():
        pair.decoder.weight.mul_(0.9)


def write_argument(_, __, offset):
    offset.data.sub_(0.1)


@pytest.mark.parametrize("act", [write_buffer, write_parameter, write_argument])
@both_kinds
def test_the_writes_of_a_failed_step_are_restored(act, compile):
    """As in eager Pyro, whose guide raises for NaN before the model writes."""
    invalid, offsets = data().clone(), []
    invalid[0, 0], invalid[1] = torch.nan, 9.0

    def make():
        offsets.append(torch.zeros(D))
        return make_pair(act)()

    def step(svi, i):
        if i == 3:
            with pytest.raises(ValueError, match="Expected"):
                svi.step(invalid, offsets[-1])
        return svi.step(data(), offsets[-1])

    svi = train_and_compare(make, 4, step=step, compile=compile, tolerance=1e-6)
    torch.testing.assert_close(*offsets)
    assert HOW[compile] in svi.explain()


def test_a_graph_that_writes_buffers_that_share_memory_is_compiled():
    def act(pair, x, _):
        pair.a.add_(0.01 * x.mean(0))
        pair.b.mul_(1.1)

    assert HOW[True] in train_and_compare(make_pair(act), 5, compile=True, tolerance=1e-6).explain()


@both_kinds
def test_a_buffer_whose_dtype_changes_is_read_in_the_new_dtype(compile):
    def change(model, _, i):
        if i == 3:
            pair = model.__self__
            pair.scale.data = 2 * pair.scale.double()

    train_and_compare(make_pair(), 6, change=change, compile=compile, tolerance=1e-6)


VIEWS = {"strided": lambda x: x[:, ::2], "expanded": lambda x: x[:1, :D].expand(9, D)}


@pytest.mark.parametrize("kind", VIEWS)
def test_arguments_that_are_not_contiguous_are_compiled(kind):
    x = VIEWS[kind](torch.randn(9, 2 * D))
    svi = train_and_compare(make_pair(), 5, step=lambda svi, _: svi.step(x), compile=True, tolerance=1e-6)
    assert HOW[True] in svi.explain()


@both_kinds
def test_steps_under_autocast_run_as_a_graph(compile):
    def step(svi, _):
        with torch.autocast("cpu", torch.bfloat16):
            return svi.step(data())

    ours = train(make_pair(), CompiledSVI, 5, step=step, compile=compile)
    assert ours[0] == pytest.approx(train(make_pair(), SVI, 5, step=step)[0], rel=2**-8)
    how = ours[2].explain()
    assert ": traced" in how or ": compiled" in how  # the rounding of Inductor may differ by too much


@pytest.mark.parametrize("compile", [False, "trace"])
def test_gradients_are_zero_after_a_failed_step(compile):
    """The derivative of sqrt at 0 is infinite; times zero it is NaN."""

    def act(pair, x, _):
        argument = 9.0 - x.max().clamp_max(9.0) + 0 * pair.decoder.bias.pow(2).sum()
        pyro.factor("sqrt", argument.sqrt(), has_rsample=True)

    pair, x = Pair(act), data(64).clone()
    x[50, 0] = 10.0
    with pytest.raises(FloatingPointError, match="its gradient is not"):
        pv.fit(
            pair.model,
            pair.guide,
            x,
            num_epochs=1,
            batch_size=8,
            compile=compile,
            check=False,
            progress=False,
        )
    assert all(not p.grad.any() for p in pair.parameters())
