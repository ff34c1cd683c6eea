"""What a pair writes as it runs, and the memory of what it reads: the graph does as eager Pyro does, where a step fails too."""

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


class Pair(nn.Module):
    """Two linear layers; what ``act`` does is done as the model runs."""

    def __init__(self, act=None):
        super().__init__()
        self.act = act
        self.encoder, self.decoder = nn.Linear(D, 2 * K), nn.Linear(K, D)
        base = torch.ones(D + 2)
        for name, value in {"count": torch.zeros(()), "scale": torch.ones(D), "a": base[:D], "b": base[2:]}.items():
            self.register_buffer(name, value)

    def model(self, x, offset=0.0):
        pyro.module("pair", self)
        if self.act is not None:
            self.act(self, x, offset)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) * self.scale + offset, 1.0).to_event(1), obs=x + self.a - self.b)

    def guide(self, x, offset=0.0):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def stepped(make_svi, steps, act=None, between=None):
    """Losses, numbers and SVI after steps on these arguments; NaN stands for the loss of a step that raised."""
    pyro.set_rng_seed(0)
    pair = Pair(act)
    losses = []
    with pyro.get_param_store().scope():
        svi = make_svi(pair.model, pair.guide, adam(), Trace_ELBO())
        for i, arguments in enumerate(steps):
            if between is not None:
                between(i, pair)
            try:
                losses.append(svi.step(*arguments))
            except ValueError:
                losses.append(math.nan)
    return losses, {name: value.clone() for name, value in pair.state_dict().items()}, svi


def by_graph(compile):
    return lambda *args: CompiledSVI(*args, compile=compile)


def counts_large_ones(pair, x, _):
    pair.count.add_((x > 5).sum())


def shrinks_a_weight(pair, _, __):
    with torch.no_grad():
        pair.decoder.weight.mul_(0.9)


def writes_its_argument(_, __, offset):
    offset.data.sub_(0.1)


@pytest.mark.parametrize("act", [counts_large_ones, shrinks_a_weight, writes_its_argument], ids=lambda act: act.__name__)
@pytest.mark.parametrize("compile", ["trace", True])
def test_what_a_failed_step_wrote_is_put_back(act, compile):
    """Eager Pyro's guide fails on NaN before the model has written anything."""

    def run(make_svi):
        bad = data().clone()
        bad[0, 0], bad[1] = torch.nan, 9.0
        offset = torch.zeros(D)
        return *stepped(make_svi, [(x, offset) for x in (data(), data(), data(), bad, data())], act), offset

    *ours, offset = run(by_graph(compile))
    *pyros, expected = run(SVI)
    assert math.isnan(ours[0][3])
    assert_equal_runs(ours, pyros, tolerance=1e-6)
    assert torch.allclose(offset, expected)
    assert HOW[compile] in ours[2].explain()


def test_written_buffers_that_share_memory_are_compiled():
    def both(pair, x, _):
        pair.a.add_(0.01 * x.mean(0))
        pair.b.mul_(1.1)

    ours, pyros = (stepped(svi, [(data(),)] * 5, both) for svi in (by_graph(True), SVI))
    assert_equal_runs(ours, pyros, tolerance=1e-6)
    assert HOW[True] in ours[2].explain()


@pytest.mark.parametrize("compile", ["trace", True])
def test_a_buffer_of_another_dtype_is_seen(compile):
    def change(i, pair):
        if i == 3:
            pair.scale.data = 2 * pair.scale.double()

    ours, pyros = (stepped(svi, [(data(),)] * 6, between=change) for svi in (by_graph(compile), SVI))
    assert_equal_runs(ours, pyros, tolerance=1e-6)


@pytest.mark.parametrize("cut", [lambda x: x[:, ::2], lambda x: x[:1, :D].expand(9, D)], ids=["columns", "expanded"])
def test_arguments_with_gaps_in_memory_are_compiled(cut):
    x = cut(torch.randn(9, 2 * D))
    ours, pyros = (stepped(svi, [(x,)] * 5) for svi in (by_graph(True), SVI))
    assert_equal_runs(ours, pyros, tolerance=1e-6)
    assert HOW[True] in ours[2].explain()


@pytest.mark.parametrize("compile", ["trace", True])
def test_steps_under_autocast_are_of_a_graph(compile):
    def under(make_svi):
        def make(*args):
            svi = make_svi(*args)
            step = svi.step
            svi.step = lambda x: torch.autocast("cpu", torch.bfloat16)(step)(x)
            return svi

        return make

    ours, pyros = (stepped(under(svi), [(data(),)] * 5) for svi in (by_graph(compile), SVI))
    assert ours[0] == pytest.approx(pyros[0], rel=2**-8)
    assert ": traced" in ours[2].explain() or ": compiled" in ours[2].explain()


@pytest.mark.parametrize("compile", [False, "trace"])
def test_no_gradient_stays_where_a_fit_fails(compile):
    """The root of zero has an infinite slope, which times zero is NaN."""

    def kink(pair, x, _):
        pyro.factor("kink", ((9.0 - x.max().clamp_max(9.0)) + 0 * pair.decoder.bias.pow(2).sum()).sqrt(), has_rsample=True)

    pyro.set_rng_seed(0)
    pair, x = Pair(kink), data(64).clone()
    x[50, 0] = 10.0
    with pytest.raises(FloatingPointError, match="its gradient is not"):
        pv.fit(pair.model, pair.guide, x, num_epochs=1, batch_size=8, compile=compile, progress=False)
    assert all(not p.grad.any() for p in pair.parameters())
