"""What can be a graph is one, whatever buffers and priors a pair has; what cannot is said once, with the true reason."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import Distribution

from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, Regression, adam, assert_equal_runs, data, functions, trained


@pytest.fixture(autouse=True)
def _in_double():
    """So that only rounding tells the two apart."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class Masked(nn.Module):
    """A guide whose weights are masked by a buffer, and which may count its runs in another."""

    def __init__(self, dtype, *, counts=False):
        super().__init__()
        self.net = nn.Linear(D, 2 * K)
        self.register_buffer("mask", (torch.arange(2 * K * D).reshape(2 * K, D) % 3 > 0).to(dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long) if counts else None)

    def forward(self, x):
        pyro.module("masked", self)
        if self.seen is not None:
            self.seen += 1
        mean, log_scale = nn.functional.linear(x, self.net.weight * self.mask, self.net.bias).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.half, torch.cfloat])
def test_buffers_of_every_dtype_are_no_hindrance(dtype):

    def make():
        return functions()[0], Masked(dtype) if dtype is not torch.cfloat else ComplexPhase()

    ours, pyros = trained(make, CompiledSVI, steps=10, compile="trace"), trained(make, SVI, steps=10)
    assert_equal_runs(ours, pyros)
    assert ": traced, 10 steps" in ours[2].explain()
    assert [each.num_builds for each in ours[2]._signatures.values()] == [1]


class ComplexPhase(Masked):
    """One whose mask is the real part of complex numbers."""

    def __init__(self):
        super().__init__(torch.double)
        self.mask = torch.complex(self.mask, self.mask)

    def forward(self, x):
        pyro.module("masked", self)
        mean, log_scale = nn.functional.linear(x, self.net.weight * self.mask.real, self.net.bias).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


def test_a_counter_of_whole_numbers_is_in_the_graph():
    def make():
        return functions()[0], Masked(torch.bool, counts=True)

    ours, pyros = trained(make, CompiledSVI, steps=10, compile="trace"), trained(make, SVI, steps=10)
    assert_equal_runs(ours, pyros)
    assert ours[1]["0.seen"] == 10
    assert ": traced, 10 steps" in ours[2].explain()


def test_a_build_that_fails_is_tried_once(monkeypatch, caplog):
    def fails(*_, **__):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("pyro_vae.compiler.graphed.trace", fails)
    ours, pyros = trained(functions, CompiledSVI, steps=8, compile="trace"), trained(functions, SVI, steps=8)
    assert_equal_runs(ours, pyros)
    assert [each.num_builds for each in ours[2]._signatures.values()] == [1]
    assert "eager Pyro: NotImplementedError" in ours[2].explain()
    assert "no such kernel, 8 steps" in ours[2].explain()
    assert len([record for record in caplog.records if record.name == "pyro_vae.infer.svi"]) == 1


def test_data_on_which_the_pair_fails_are_no_reason_against_its_graph():
    """Eager Pyro says what is wrong with them, and the next ones are traced."""
    model, guide = functions()
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace")
    with pyro.get_param_store().scope():
        svi.step(data())
        for _ in range(3):
            with pytest.raises(ValueError, match=r"Expected (value|parameter)"):
                svi.step(data() * float("nan"))
        for _ in range(3):
            svi.step(data())
    assert ": traced, 7 steps" in svi.explain()


@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("pyros", [False, True])
def test_validation_stays_as_the_user_set_it(torchs, pyros):
    """torch has one switch and Pyro another, which sets torch's where it is put back."""
    before = Distribution._validate_args
    try:
        with pyro.validation_enabled(pyros):
            Distribution.set_default_validate_args(torchs)
            ours = trained(functions, CompiledSVI, steps=4, compile="trace")
            assert Distribution._validate_args is torchs
            assert pyro.distributions.is_validation_enabled() is pyros
        assert ": traced, 4 steps" in ours[2].explain()
    finally:
        Distribution.set_default_validate_args(before)


def test_validation_stays_where_a_graph_cannot_be_made():
    before = Distribution._validate_args
    validate_sample = Distribution._validate_sample
    try:
        Distribution.set_default_validate_args(False)
        _, guide = functions()
        svi = CompiledSVI(reads, guide, adam(), Trace_ELBO(), compile="trace")
        with pyro.get_param_store().scope():
            for _ in range(3):
                svi.step(data())
        assert "Tensor.item()" in svi.explain()
        assert Distribution._validate_args is False
        assert Distribution._validate_sample is validate_sample
    finally:
        Distribution.set_default_validate_args(before)


class Bayesian(PyroModule):
    """A regression whose weights have priors that were made with the module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 1))
        to_pyro_module_(self.net)
        for module in self.net.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                prior = dist.Normal(torch.tensor(0.0), 1.0).expand(value.shape).to_event(value.dim())
                setattr(module, name, PyroSample(prior))

    def forward(self, x):
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=x.sum(-1))


class Dependent(PyroModule):
    """Priors that depend on one another, one of them positive."""

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.Gamma(torch.tensor(2.0), 1.0).expand([D]).to_event(1))
        self.weight = PyroSample(lambda self: dist.Normal(torch.zeros(D), self.rate).to_event(1))

    def forward(self, x):
        mean = x @ self.weight
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))


class MadeOnce(Regression):
    """A distribution that is an attribute, reshaped and masked."""

    def __init__(self):
        super().__init__()
        self.noise = dist.Exponential(torch.ones(())).expand([D]).mask(torch.arange(D) % 2 > 0).to_event(1)

    def forward(self, x):
        pyro.sample("noise", self.noise)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Bayesian, Dependent, MadeOnce])
def test_priors_made_with_the_module_are_traced(kind):
    def make():
        model = kind()
        return model, AutoNormal(model)

    ours, pyros = trained(make, CompiledSVI, steps=10, compile="trace"), trained(make, SVI, steps=10)
    assert_equal_runs(ours, pyros)
    assert ": traced, 10 steps" in ours[2].explain()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_distribution_made_before_is_validated_as_it_was_told(own, default):
    """By a graph as by Pyro: data outside of its support are an error where it was told to validate, whatever torch's default
    is, and a number where it was not."""
    before = Distribution._validate_args
    likelihood = dist.Exponential(torch.ones(()), validate_args=own).expand([D]).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(0.5)), 1.0))

    try:
        Distribution.set_default_validate_args(default)
        with pyro.get_param_store().scope():
            svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace", check=False)
            for _ in range(3):
                svi.step(data().abs())
            if own:
                with pytest.raises(ValueError, match="support"):
                    svi.step(-data().abs())
            else:
                svi.step(-data().abs())
            assert ": traced, 4 steps" in svi.explain()
    finally:
        Distribution.set_default_validate_args(before)


def test_a_registered_network_without_gradient_is_traced():
    """A target network, say: it takes part, and Pyro moves it by nothing."""

    def make():
        model, _ = functions()
        net, target = nn.Linear(D, K), nn.Linear(D, K)

        def guide(x):
            pyro.module("net", net)
            pyro.module("target", target)
            with torch.no_grad():
                shift = target(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(net(x) + shift, 1.0).to_event(1))

        return model, guide

    ours, pyros = trained(make, CompiledSVI, steps=10, compile="trace"), trained(make, SVI, steps=10)
    assert_equal_runs(ours, pyros)
    assert ": traced, 10 steps" in ours[2].explain()


def test_a_network_that_is_not_registered_is_told_so():
    model, _ = functions()
    net, other = nn.Linear(D, K), nn.Linear(D, K)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x) + other(x), 1.0).to_event(1))

    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace", check=False)
        for _ in range(3):
            svi.step(data())
    assert "is not in Pyro's param store" in svi.explain()


def as_function(model, guide, *args):
    return Trace_ELBO().differentiable_loss(model, guide, *args)


def test_a_loss_that_is_a_function_is_the_reason():
    def run(svi_class, **options):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            svi = svi_class(*functions(), adam(), as_function, **options)
            return [float(svi.step(data(seed=i))) for i in range(5)], svi

    (ours, svi), (pyros, _) = run(CompiledSVI, compile="trace"), run(SVI)
    assert ours == pytest.approx(pyros, rel=1e-12)
    assert svi.explain() == "eager Pyro: the loss is a function; Trace_ELBO and TraceMeanField_ELBO are traced, 5 steps"


def test_every_step_of_eager_pyro_has_its_reason():
    with pyro.get_param_store().scope():
        svi = CompiledSVI(*functions(), adam(), Trace_ELBO(), compile="trace")
        assert svi.explain() == "no step has run yet"
        for _ in range(3):
            svi.step(data())
        with poutine.scale(scale=0.5):
            svi.step(data())
        svi.compile = False
        svi.step(data())
        lines = svi.explain().splitlines()
        assert [line.rsplit(", ", 1)[-1] for line in lines] == ["3 steps", "1 steps", "1 steps"]
        assert "a handler is around the step" in lines[1]
        assert "compile=False" in lines[2]
        other = CompiledSVI(*functions(), adam(), RenyiELBO(num_particles=2), compile="trace", check=False)
        for _ in range(3):
            other.step(data())
        assert "the loss is RenyiELBO" in other.explain()


def reads(x):
    level = x.mean().item()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand_as(x) + level, 1.0).to_event(1), obs=x)


def by_pyro(x):
    """Pyro's own code reads: an interval's ends are compared."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        wide = dist.Uniform(x.amin(), x.amax() + 1.0, validate_args=True)  # here
        pyro.sample("w", wide.expand([D]).to_event(1).mask(False), obs=x)
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand_as(x), 1.0).to_event(1), obs=x)


def by_ufunc(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        mean = torch.stack([z.sum(-1) * float(k) for k in x.new_ones(D)], -1)  # here
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "line"),
    [(reads, "level = x.mean().item()"), (by_pyro, "wide = dist.Uniform("), (by_ufunc, "mean = torch.stack(")],
)
def test_the_line_of_a_reason_is_the_pairs(model, line):
    _, guide = functions()
    with pyro.get_param_store().scope():
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace", check=False)
        for _ in range(3):
            svi.step(data())
    assert "at test_reasons.py:" in svi.explain()
    assert line in svi.explain()
