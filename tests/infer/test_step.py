"""The graph of a step: what it takes in other shapes, what it asks, and what is no difference from eager Pyro."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, adam, assert_equal_runs, data, functions, trained, vae


@pytest.fixture(autouse=True)
def _in_double():
    """So that only rounding tells the two apart."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class Heads(nn.Module):
    """A pair whose decoder's features have two read-outs."""

    def __init__(self):
        super().__init__()
        self.encoder, self.trunk = nn.Linear(D, 2 * K), nn.Linear(K, 8)
        self.mean, self.log_scale = nn.Linear(8, D), nn.Linear(8, D)

    def says(self, h):
        return self.mean(h), self.log_scale(h).exp()

    def model(self, x):
        pyro.module("heads", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(*self.says(torch.tanh(self.trunk(z)))).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("heads", self)
        with pyro.plate("data", len(x)):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


class Flattened(Heads):
    def says(self, h):
        return self.mean(h).flatten().reshape(len(h), D), self.log_scale(h).exp()


class OneBias(Heads):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def says(self, h):
        return nn.functional.linear(h, self.mean.weight, self.bias), self.log_scale(h).exp()


class Turned(Heads):
    def says(self, h):
        turned = self.mean.weight.detach().t_()
        return super().says(h)[0] + h @ turned, self.log_scale(h).exp()


class Standardized(Heads):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(K, 8), nn.BatchNorm1d(8))


@pytest.mark.parametrize("kind", [Heads, Flattened, OneBias, Turned])
def test_read_outs_in_other_shapes(kind):
    def make():
        heads = kind()
        return heads.model, heads.guide

    ours, pyros = trained(make, CompiledSVI, compile="trace"), trained(make, SVI)
    assert_equal_runs(ours, pyros)
    assert ": traced, 30 steps" in ours[2].explain()


def test_a_gradient_that_is_nothing_but_rounding():
    """A bias before batch normalization has none, in exact arithmetic."""
    torch.set_default_dtype(torch.float)
    heads = Standardized()
    with pyro.get_param_store().scope():
        svi = CompiledSVI(heads.model, heads.guide, adam(), Trace_ELBO(), compile="trace")
        for i in range(10):
            svi.step(data(seed=i).float())
    assert ": traced, 10 steps" in svi.explain()


@pytest.mark.parametrize("wrong", [[[1.0, 0.5], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]], ids=["asymmetric", "indefinite"])
def test_a_graph_asks_of_matrices_what_pyro_asks(wrong):
    def model(x, covariance):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(x), 2), covariance))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, covariance):
        at = pyro.param("at", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(at.expand(len(x), 2), torch.eye(2)))

    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for _ in range(3):
            svi.step(data()[:, :2], torch.eye(2))
        before = pyro.param("at").detach().clone()
        with pytest.raises(ValueError, match="PositiveDefinite"):
            svi.step(data()[:, :2], torch.tensor(wrong))
        assert torch.equal(pyro.param("at").detach(), before)
        assert ": traced, 4 steps" in svi.explain()


def test_a_graph_that_fails_where_pyro_does_not_is_left(caplog):
    def fails(*_):
        raise RuntimeError("no such kernel")

    with pyro.get_param_store().scope():
        model, guide = vae()
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for _ in range(3):
            svi.step(data())
        assert ": traced, 3 steps" in svi.explain()
        pyro.set_rng_seed(5)
        expected = Trace_ELBO().loss(model, guide, data())
        (signature,) = svi._signatures.values()
        signature.step.graphed.run = fails
        pyro.set_rng_seed(5)
        assert svi.step(data()) == pytest.approx(expected, rel=1e-9)
        assert "no such kernel" in svi.explain()
        assert "no such kernel" in caplog.text


def test_views_changed_in_place_leave_arguments_as_they_are():
    heads = Heads()

    def model(x):
        heads.model(x.detach().unsqueeze_(0).squeeze(0))

    def guide(x):
        heads.guide(x * 1.0)

    x = data()
    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
        for _ in range(5):
            svi.step(x)
            assert x.shape == data().shape
    assert "traced, 5 steps" in svi.explain()


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_parameters_that_are_laid_out_otherwise_than_adams_state():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            heads = Heads()
            svi = svi_class(heads.model, heads.guide, adam(), Trace_ELBO(), **options)
            losses = []
            for i in range(10):
                if i == 4:
                    heads.encoder.weight.data = heads.encoder.weight.data.t().contiguous().t()
                losses.append(svi.step(data(seed=i)))
            return losses

    np.testing.assert_allclose(run(CompiledSVI, compile="trace"), run(SVI), rtol=1e-9)


def test_a_torch_optimizer_moves_what_else_has_a_gradient():
    def run(compile):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = vae()
            other = nn.Parameter(torch.ones(3))
            optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters(), other], lr=0.05)
            svi = CompiledSVI(model, guide, optimizer, Trace_ELBO(), compile=compile)
            for i in range(8):
                other.grad = None
                other.square().sum().backward()
                svi.step(data(seed=i))
            return other.detach()

    torch.testing.assert_close(run("trace"), run(False), rtol=1e-9, atol=1e-9)


def test_parameters_that_are_made_just_before_a_graph():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model, guide = functions()
            svi = svi_class(model, guide, adam(), Trace_ELBO(), **options)
            losses = []
            for i in range(8):
                if i == 1:
                    pyro.clear_param_store()
                losses.append(svi.step(data(seed=i)))
            return losses

    np.testing.assert_allclose(run(CompiledSVI, compile="trace"), run(SVI), rtol=1e-9)


def test_a_pair_without_arguments_whose_network_keeps_statistics():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        heads, x = Standardized(), data()
        with pyro.get_param_store().scope():
            svi = svi_class(lambda: heads.model(x), lambda: heads.guide(x), adam(), Trace_ELBO(), **options)
            return [svi.step() for _ in range(5)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile="trace"), run(SVI)
    np.testing.assert_allclose(ours, pyros, rtol=1e-9)
    assert "traced, 5 steps" in svi.explain()


def test_gradients_of_networks_outside_the_store_are_as_after_one_step():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        net, other = nn.Linear(D, K), nn.Linear(D, K)
        model, _ = vae()

        def guide(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(net(x) + other(x), 1.0).to_event(1))

        with pyro.get_param_store().scope():
            svi = svi_class(model, guide, adam(), Trace_ELBO(), **options)
            for i in range(3):
                svi.step(data(seed=i))
        return other.weight.grad

    torch.testing.assert_close(run(CompiledSVI, compile="trace", check=False), run(SVI), rtol=1e-9, atol=1e-9)


def test_single_precision_does_not_hide_a_difference_behind_a_large_loss():
    torch.set_default_dtype(torch.float)
    settings = {"scale": 1.0}
    heads = Heads()

    def model(x):
        pyro.factor("constant", torch.tensor(1e6))
        with poutine.scale(scale=settings["scale"]):
            heads.model(x)

    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, heads.guide, adam(), Trace_ELBO(), compile="trace", check=False)
        for i in range(15):
            if i == 5:
                settings["scale"] = 0.5
            svi.step(data(seed=i).float())
    assert "differs from eager Pyro" in svi.explain()
