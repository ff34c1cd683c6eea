"""What a pair writes as it runs, and the memory that it reads: a graph does the same as eager Pyro."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, adam, assert_equal_runs, data

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


def run(compile, batches, act=None, change=None, step=lambda svi, *batch: svi.step(*batch)):
    """Losses, state and SVI after a step on each batch. The loss is NaN for a step that raises.

    :param compile: an option of our SVI; ``None`` for Pyro's.
    """
    pyro.set_rng_seed(0)
    pair = Pair(act)
    losses = []
    with pyro.get_param_store().scope():
        args = pair.model, pair.guide, adam(), Trace_ELBO()
        svi = SVI(*args) if compile is None else CompiledSVI(*args, compile=compile)
        for i, batch in enumerate(batches):
            if change is not None:
                change(i, pair)
            try:
                losses.append(step(svi, *batch))
            except ValueError:
                losses.append(math.nan)
    return losses, {name: value.clone() for name, value in pair.state_dict().items()}, svi


def compare(compile, *args, **kwargs):
    """Assert that our SVI and Pyro's end in equal losses and states, in single precision."""
    ours = run(compile, *args, **kwargs)
    assert_equal_runs(ours, run(None, *args, **kwargs), tolerance=1e-6)
    return ours[2].explain()


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
    invalid = data().clone()
    invalid[0, 0], invalid[1] = torch.nan, 9.0

    def run_with_offset(compile):
        offset = torch.zeros(D)
        batches = [(x, offset) for x in (data(), data(), data(), invalid, data())]
        return *run(compile, batches, act), offset

    *ours, offset = run_with_offset(compile)
    *pyros, expected = run_with_offset(None)
    assert math.isnan(ours[0][3])
    assert_equal_runs(ours, pyros, tolerance=1e-6)
    assert torch.allclose(offset, expected)
    assert HOW[compile] in ours[2].explain()


def test_a_graph_that_writes_buffers_that_share_memory_is_compiled():
    def act(pair, x, _):
        pair.a.add_(0.01 * x.mean(0))
        pair.b.mul_(1.1)

    assert HOW[True] in compare(True, [(data(),)] * 5, act)


@both_kinds
def test_a_buffer_whose_dtype_changes_is_read_in_the_new_dtype(compile):
    def change(i, pair):
        if i == 3:
            pair.scale.data = 2 * pair.scale.double()

    compare(compile, [(data(),)] * 6, change=change)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[:1, :D].expand(9, D)], ids=["strided", "expanded"]
)
def test_arguments_that_are_not_contiguous_are_compiled(view):
    assert HOW[True] in compare(True, [(view(torch.randn(9, 2 * D)),)] * 5)


@both_kinds
def test_steps_under_autocast_run_as_a_graph(compile):
    def step(svi, x):
        with torch.autocast("cpu", torch.bfloat16):
            return svi.step(x)

    ours, pyros = (run(option, [(data(),)] * 5, step=step) for option in (compile, None))
    assert ours[0] == pytest.approx(pyros[0], rel=2**-8)
    how = ours[2].explain()
    assert ": traced" in how or ": compiled" in how  # the rounding of Inductor may differ by too much


@pytest.mark.parametrize("compile", [False, "trace"])
def test_a_fit_that_fails_leaves_no_gradients(compile):
    """The derivative of sqrt at 0 is infinite; times zero it is NaN."""

    def act(pair, x, _):
        argument = 9.0 - x.max().clamp_max(9.0) + 0 * pair.decoder.bias.pow(2).sum()
        pyro.factor("sqrt", argument.sqrt(), has_rsample=True)

    pair, x = Pair(act), data(64).clone()
    x[50, 0] = 10.0
    with pytest.raises(FloatingPointError, match="its gradient is not"):
        pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=8, compile=compile, progress=False)
    assert all(not p.grad.any() for p in pair.parameters())
