"""The graph of a step equals a step of eager Pyro: gradients, validation, optimizers, param store."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, adam, data, functions, train, train_and_compare, vae


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class Heads(nn.Module):
    """A pair whose decoder has two output layers on a shared trunk."""

    def __init__(self, trunk=None):
        super().__init__()
        self.encoder, self.trunk = nn.Linear(D, 2 * K), trunk or nn.Linear(K, 8)
        self.mean, self.log_scale = nn.Linear(8, D), nn.Linear(8, D)
        self.bias = nn.Parameter(torch.zeros(1))

    def location(self, h):
        return self.mean(h)

    def model(self, x):
        pyro.module("heads", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), K), 1.0).to_event(1))
            h = torch.tanh(self.trunk(z))
            pyro.sample("x", dist.Normal(self.location(h), self.log_scale(h).exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("heads", self)
        with pyro.plate("data", len(x)):
            mean, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


class SharedBias(Heads):
    """The gradient of the bias is a sum over output units."""

    def location(self, h):
        return nn.functional.linear(h, self.mean.weight, self.bias)


class TransposedInPlace(Heads):
    def location(self, h):
        transposed = self.mean.weight.detach().t_()
        return self.mean(h) + h @ transposed


def normalized():
    return Heads(nn.Sequential(nn.Linear(K, 8), nn.BatchNorm1d(8)))


def programs(make):
    def made():
        heads = make()
        return heads.model, heads.guide

    return made


@pytest.mark.parametrize("kind", [SharedBias, TransposedInPlace])
def test_gradients_of_broadcast_and_transposed_parameters(kind):
    assert ": traced, 10 steps" in train_and_compare(programs(kind)).explain()


def test_rounding_of_a_zero_gradient_does_not_count_as_a_difference():
    """The gradient of a bias before batch normalization is exactly zero."""
    torch.set_default_dtype(torch.float)
    heads = normalized()
    svi = CompiledSVI(heads.model, heads.guide, adam(), Trace_ELBO(), compile="trace")
    for i in range(10):
        svi.step(data(seed=i).float())
    assert ": traced, 10 steps" in svi.explain()


def test_a_difference_is_detected_at_a_large_loss_in_single_precision():
    torch.set_default_dtype(torch.float)
    settings = {"scale": 1.0}
    heads = Heads()

    def model(x):
        pyro.factor("constant", torch.tensor(1e6))
        with poutine.scale(scale=settings["scale"]):
            heads.model(x)

    svi = CompiledSVI(model, heads.guide, adam(), Trace_ELBO(), compile="trace", check=False)
    for i in range(15):
        if i == 5:
            settings["scale"] = 0.5
        svi.step(data(seed=i).float())
    assert "differs from eager Pyro" in svi.explain()


INVALID = {"asymmetric": [[1.0, 0.5], [0.0, 1.0]], "indefinite": [[1.0, 2.0], [2.0, 1.0]]}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_covariance_raises_before_a_parameter_changes(kind):
    def model(x, covariance):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(len(x), 2), covariance))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, covariance):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc.expand(len(x), 2), torch.eye(2)))

    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(3):
        svi.step(data()[:, :2], torch.eye(2))
    before = pyro.param("loc").detach().clone()
    with pytest.raises(ValueError, match="PositiveDefinite"):
        svi.step(data()[:, :2], torch.tensor(INVALID[kind]))
    assert torch.equal(pyro.param("loc").detach(), before)
    assert ": traced, 4 steps" in svi.explain()


def test_a_graph_that_raises_is_replaced_by_eager_pyro(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such kernel")

    model, guide = vae()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    for _ in range(3):
        svi.step(data())
    assert ": traced, 3 steps" in svi.explain()
    pyro.set_rng_seed(5)
    expected = Trace_ELBO().loss(model, guide, data())
    monkeypatch.setattr("pyro_vae.compiler.trace.Graph.__call__", fail)
    pyro.set_rng_seed(5)
    assert svi.step(data()) == pytest.approx(expected, rel=1e-9)
    assert "no such kernel" in svi.explain()
    assert "no such kernel" in caplog.text


def test_in_place_operations_on_views_leave_the_arguments_unchanged():
    heads, x = Heads(), data()
    svi = CompiledSVI(
        lambda x: heads.model(x.detach().unsqueeze_(0).squeeze(0)),
        lambda x: heads.guide(x * 1.0),
        adam(),
        Trace_ELBO(),
        compile="trace",
    )
    for _ in range(5):
        svi.step(x)
        assert torch.equal(x, data())
    assert "traced, 5 steps" in svi.explain()


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_a_parameter_whose_strides_differ_from_its_adam_state():
    def transpose_memory(model, _, i):
        if i == 4:
            weight = model.__self__.encoder.weight
            weight.data = weight.data.t().contiguous().t()

    train_and_compare(programs(Heads), change=transpose_memory)


def test_a_torch_optimizer_also_updates_other_parameters_that_have_a_gradient():
    others = []

    def optimizer(model, guide):
        others.append(nn.Parameter(torch.ones(3)))
        return torch.optim.Adam([*model.parameters(), *guide.parameters(), others[-1]], lr=0.05)

    def step(svi, i):
        others[-1].grad = None
        others[-1].square().sum().backward()
        return svi.step(data(seed=i))

    for compile in ("trace", False):
        train(vae, CompiledSVI, 8, optim=optimizer, step=step, compile=compile)
    torch.testing.assert_close(*others, rtol=1e-9, atol=1e-9)


def test_a_pair_without_arguments_whose_network_has_running_statistics():
    def make():
        heads, x = normalized(), data()
        return lambda: heads.model(x), lambda: heads.guide(x)

    assert "traced, 5 steps" in train_and_compare(make, 5, step=lambda svi, _: svi.step()).explain()


def make_with_second_network(second):
    """A guide whose location includes ``second(network, x)``. ``make.networks`` lists the networks."""

    def make():
        net, other = nn.Linear(D, K), nn.Linear(D, K)
        make.networks.append(other)

        def guide(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(net(x) + second(other, x), 1.0).to_event(1))

        return functions()[0], guide

    make.networks = []
    return make


def test_a_network_outside_the_param_store_prevents_a_graph_and_its_gradients_equal_those_of_pyro():
    make = make_with_second_network(lambda network, x: network(x))
    svi = train_and_compare(make, 3, check=False)
    torch.testing.assert_close(*(network.weight.grad for network in make.networks), rtol=1e-9, atol=1e-9)
    assert "is not in Pyro's param store" in svi.explain()


def test_a_registered_network_without_gradients_is_traced():
    """Such as a target network. Pyro does not update it."""

    def target(network, x):
        pyro.module("target", network)
        with torch.no_grad():
            return network(x)

    assert ": traced, 10 steps" in train_and_compare(make_with_second_network(target)).explain()


def test_a_parameter_that_only_some_signatures_use_is_updated_by_its_momentum():
    """As by Pyro, which updates every parameter that has a gradient, even a zero gradient."""

    def make():
        model, guide = functions()
        net = nn.Linear(D, 2 * K)

        def guide_by_size(x):
            pyro.module("net", net)
            if len(x) > 6:
                return guide(x)
            with pyro.plate("data", len(x)):
                loc, log_scale = net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return model, guide_by_size

    rows = (12, 5, 12, 5, 12, 12, 5, 5, 12, 5)
    train_and_compare(make, step=lambda svi, i: svi.step(data(rows[i], seed=i)))
