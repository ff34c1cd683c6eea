"""Bayesian networks: ``to_pyro_module_`` and ``PyroSample`` on the modules of a pair."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, flows, nets, priors

N = 12


@pytest.mark.parametrize(
    "cls",
    [
        conditionals.Normal,
        conditionals.Categorical,
        flows.NeuralSpline,
        priors.VampPrior,
        nets.MLP,
        nets.ConvDecoder,
    ],
)
def test_pyro_module_subclasses_the_classes_of_the_library(cls):
    assert issubclass(PyroModule[cls], cls)
    assert issubclass(PyroModule[cls], PyroModule)


def test_conditional_as_a_pyro_module_is_the_same_distribution():
    plain = conditionals.Normal(nets.MLP(3, (4,)), event_shape=2)
    bayesian = PyroModule[conditionals.Normal](PyroModule[nets.MLP](3, (4,)), event_shape=2)
    bayesian.load_state_dict(plain.state_dict())
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(plain(x).log_prob(y), bayesian(x).log_prob(y))


def make_bayesian(module: nn.Module) -> None:
    """Put a standard normal prior on every parameter, in place."""
    to_pyro_module_(module)
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())
            setattr(part, name, PyroSample(prior))


TRUNKS = {
    "MLP": lambda: nets.MLP(2, (4,)),
    "ConvDecoder": lambda: nets.ConvDecoder(2, (4, 4), (2, 2)),
}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_parameters_of_a_bayesian_decoder_are_sampled_outside_of_the_data_plate(trunk):
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(TRUNKS[trunk](), event_shape=(4, 4)),
        conditionals.Normal(nets.MLP(16, (4,)), event_shape=2),
    )
    names = {f"decoder.{name}" for name, _ in vae.model.decoder.named_parameters()}
    make_bayesian(vae.model.decoder)
    trace = poutine.trace(vae.model).get_trace(torch.zeros(5, 4, 4))
    plates = {
        name: {frame.name for frame in site["cond_indep_stack"]}
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not name.endswith("data")
    }
    assert plates == {name: set() for name in names} | {"z": {"data"}, "x": {"data"}}


def test_parameters_of_a_bayesian_conditional_vae_are_sampled_outside_of_the_data_plate():
    cvae = pv.VAE(
        conditionals.Normal(nets.MLP(3, (4,)), event_shape=2),
        conditionals.Normal(nets.MLP(((2,), (3,)), (4,)), event_shape=5),
        conditionals.Normal(nets.MLP(((5,), (3,)), (4,)), event_shape=2),
    )
    make_bayesian(cvae.model)
    trace = poutine.trace(cvae.model).get_trace(torch.zeros(6, 5), torch.zeros(6, 3))
    local = {name for name in trace.stochastic_nodes if trace.nodes[name]["cond_indep_stack"]}
    assert local == {"z"}


def bayesian_pair():
    """A pair with a Delta guide, whose loss is deterministic."""
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (4,)), event_shape=3, scale=0.5),
        conditionals.Normal(nets.MLP(3, (4,)), event_shape=2),
    ).double()
    make_bayesian(vae.model.decoder)
    parameter_guide = AutoDelta(poutine.block(vae.model, hide=["z", "x"]))

    class PointGuide(PyroModule):
        def __init__(self):
            super().__init__()
            self.parameter_guide, self.encoder = parameter_guide, vae.guide.encoder

        def forward(self, x):
            self.parameter_guide(x)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Delta(self.encoder(x).mean, event_dim=1))

    return vae.model, PointGuide()


def parameter_changes(train):
    """The change of each parameter of the guide by ``train(model, guide, x)``."""
    torch.manual_seed(0)
    model, guide = bayesian_pair()
    x = torch.randn(N, 3, dtype=torch.double)
    guide(x)  # initializes the autoguide
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    # an empty param store: plain Pyro would reuse parameters of the same name
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        train(model, guide, x)
    return {name: p.detach() - before[name] for name, p in guide.named_parameters()}


def test_minibatch_gradients_of_a_bayesian_decoder_sum_to_the_gradient_of_plain_pyro():
    """A small SGD step is proportional to the gradient, so an epoch of three minibatches changes the
    parameters as three steps on all data."""

    def sgd():
        return pyro.optim.SGD({"lr": 1e-9})

    ours = parameter_changes(
        lambda model, guide, x: pv.fit(model, guide, x, optim=sgd(), num_epochs=1, batch_size=N // 3)
    )
    plain = parameter_changes(lambda model, guide, x: SVI(model, guide, sgd(), Trace_ELBO()).step(x))
    assert any("decoder" in name for name in ours)
    for name, change in plain.items():
        if "encoder.readout.log_scale" not in name:  # the Delta guide does not use it
            assert change.abs().max() > 0, name
        torch.testing.assert_close(ours[name] / 3, change, rtol=1e-5, atol=1e-14)


def test_joint_log_weights_of_a_bayesian_decoder_under_its_exact_posterior_are_the_log_evidence():
    """x = z + b + noise with b ~ N(0, 1) a PyroSample: p(x₁…x_N), p(b|x) and p(z|x, b) are Gaussian."""
    vae = pv.VAE(
        priors.StandardNormal(1),
        conditionals.Normal(nets.MLP(1, ()), event_shape=1, scale=0.5),
        conditionals.Normal(nets.MLP(1, ()), event_shape=1),
    ).double()
    layer = vae.model.decoder.readout["loc"].layer
    nn.init.ones_(layer.weight)
    to_pyro_module_(vae.model.decoder)
    vae.model.decoder.readout["loc"].layer.bias = PyroSample(
        dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    )
    x = torch.randn(N, 1, dtype=torch.double) + 1

    def guide(x):
        precision = torch.tensor(1 + len(x) / 1.25, dtype=torch.double)
        posterior = dist.Normal((x.sum(0) / 1.25) / precision, precision**-0.5).to_event(1)
        b = pyro.sample("decoder.readout.loc.layer.bias", posterior)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x - b) / 1.25, 0.2**0.5).to_event(1))

    covariance = 1.25 * torch.eye(N, dtype=torch.double) + 1
    exact = dist.MultivariateNormal(torch.zeros(N, dtype=torch.double), covariance).log_prob(x[:, 0])
    log_weights = pv.joint_log_weights(vae.model, guide, x, num_particles=5).log_weights
    torch.testing.assert_close(log_weights, exact.expand(5), rtol=0, atol=1e-10)


def test_check_pair_accepts_a_bayesian_decoder():
    model, guide = bayesian_pair()
    assert not pv.check_pair(model, guide, torch.randn(N, 3, dtype=torch.double)).problems
