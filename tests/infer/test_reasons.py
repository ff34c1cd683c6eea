"""Pairs with unusual buffers, priors and validation run as graphs; ``explain`` gives the reason of other
steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import Distribution

from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support.steps import D, K, Regression, adam, data, functions, num_builds, train_and_compare


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding. Restores torch's validation too."""
    validate = Distribution._validate_args
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)
    Distribution._validate_args = validate


class Masked(nn.Module):
    """A guide with a buffer that masks its parameters, and a buffer that counts its runs."""

    def __init__(self, dtype):
        super().__init__()
        self.net = nn.Linear(D, 2 * K)
        self.register_buffer("mask", (torch.arange(2 * K * D).reshape(2 * K, D) % 3 > 0).to(dtype))
        self.register_buffer("num_runs", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        pyro.module("masked", self)
        self.num_runs += 1
        mask = self.mask.real if self.mask.is_complex() else self.mask
        mean, log_scale = nn.functional.linear(x, self.net.weight * mask, self.net.bias).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.half, torch.cfloat])
def test_buffers_of_every_dtype_are_read_and_written_by_a_graph(dtype):
    guides = []

    def make():
        guides.append(Masked(dtype))
        return functions()[0], guides[-1]

    svi = train_and_compare(make)
    assert [guide.num_runs for guide in guides] == [10, 10]
    assert ": traced, 10 steps" in svi.explain()
    assert num_builds(svi) == [1]


def test_a_trace_that_fails_is_not_tried_again(monkeypatch, caplog):
    def fail(*_, **__):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("pyro_vae.compiler.graphed.trace", fail)
    svi = train_and_compare(functions, 8)
    assert num_builds(svi) == [1]
    assert "eager Pyro: NotImplementedError" in svi.explain()
    assert "no such kernel, 8 steps" in svi.explain()
    assert len([record for record in caplog.records if record.name == "pyro_vae.infer.svi"]) == 1


def test_invalid_data_do_not_prevent_a_graph_for_later_data():
    svi = CompiledSVI(*functions(), adam(), Trace_ELBO(), compile="trace")
    svi.step(data())
    for _ in range(3):
        with pytest.raises(ValueError, match=r"Expected (value|parameter)"):
            svi.step(data() * float("nan"))
    for _ in range(3):
        svi.step(data())
    assert ": traced, 7 steps" in svi.explain()


def model_with_item(x):
    level = x.mean().item()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        mean = z.sum(-1, keepdim=True).expand_as(x) + level
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def model_with_read_in_pyro(x):
    """Pyro compares the bounds of an interval."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        uniform = dist.Uniform(x.amin(), x.amax() + 1.0, validate_args=True)
        pyro.sample("w", uniform.expand([D]).to_event(1).mask(False), obs=x)
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand_as(x), 1.0).to_event(1), obs=x)


def model_with_read_in_torch(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        mean = torch.stack([z.sum(-1) * float(k) for k in x.new_ones(D)], -1)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (model_with_item, "level = x.mean().item()"),
        (model_with_read_in_pyro, "uniform = dist.Uniform("),
        (model_with_read_in_torch, "mean = torch.stack("),
    ],
)
def test_the_reason_names_the_line_of_the_pair(model, line):
    svi = CompiledSVI(model, functions()[1], adam(), Trace_ELBO(), compile="trace", check=False)
    for _ in range(3):
        svi.step(data())
    assert "at test_reasons.py:" in svi.explain()
    assert line in svi.explain()


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("in_pyro", [False, True])
def test_tracing_leaves_the_validation_settings_of_torch_and_pyro_unchanged(in_torch, in_pyro):
    """Also if the pair cannot be traced. Pyro's setting sets torch's when it is restored."""
    validate_sample = Distribution._validate_sample
    with pyro.validation_enabled(in_pyro):
        Distribution.set_default_validate_args(in_torch)
        for model, how in ((functions()[0], ": traced, 4 steps"), (model_with_item, "Tensor.item()")):
            svi = CompiledSVI(model, functions()[1], adam(), Trace_ELBO(), compile="trace", check=False)
            for _ in range(4):
                svi.step(data())
            assert how in svi.explain()
            assert Distribution._validate_args is in_torch
            assert Distribution._validate_sample is validate_sample
            assert pyro.distributions.is_validation_enabled() is in_pyro


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("validate_args", [True, False])
def test_a_distribution_made_before_the_run_keeps_its_validate_args(validate_args, default):
    """In a graph as in Pyro: the observation raises only with ``validate_args=True``, whatever torch's
    default."""
    likelihood = dist.Exponential(torch.ones(()), validate_args=validate_args).expand([D]).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    Distribution.set_default_validate_args(default)
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), compile="trace", check=False)
    for _ in range(3):
        svi.step(data().abs())
    if validate_args:
        with pytest.raises(ValueError, match="support"):
            svi.step(-data().abs())
    else:
        svi.step(-data().abs())
    assert ": traced, 4 steps" in svi.explain()


class Bayesian(PyroModule):
    """A network whose priors are made with the module."""

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


class MaskedPrior(Regression):
    """A masked distribution that is an attribute."""

    def __init__(self):
        super().__init__()
        mask = torch.arange(D) % 2 > 0
        self.noise = dist.Exponential(torch.ones(())).expand([D]).mask(mask).to_event(1)

    def forward(self, x):
        pyro.sample("noise", self.noise)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Bayesian, MaskedPrior])
def test_priors_that_are_made_with_a_module_are_traced(kind):
    def make():
        model = kind()
        return model, AutoNormal(model)

    assert ": traced, 10 steps" in train_and_compare(make).explain()


def test_every_eager_step_has_a_reason_and_equals_a_step_of_pyro():
    def step(svi, i):
        if i == 3:
            with poutine.scale(scale=0.5):
                return svi.step(data(seed=i))
        svi.compile = "trace" if i < 4 else False
        return svi.step(data(seed=i))

    assert CompiledSVI(*functions(), adam(), Trace_ELBO()).explain() == "no step has run yet"
    lines = train_and_compare(functions, 5, step=step).explain().splitlines()
    assert [line.rsplit(", ", 1)[-1] for line in lines] == ["3 steps", "1 steps", "1 steps"]
    assert "the step runs in a Pyro handler" in lines[1]
    assert "compile=False" in lines[2]


def function_loss(model, guide, *args):
    return Trace_ELBO().differentiable_loss(model, guide, *args)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (
            function_loss,
            "eager Pyro: the loss is a function, and not an ELBO object, 3 steps",
        ),
        (RenyiELBO(num_particles=2), "the loss is RenyiELBO"),
    ],
)
def test_the_reason_names_a_loss_that_is_not_traced(loss, reason):
    svi = train_and_compare(functions, 3, loss=lambda: loss, check=False)
    assert reason in svi.explain()
