"""check_pair says what is wrong with a pair, and says nothing of one that is right."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, pyro_method
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide_of(make):
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(loc))

    return guide


guide = guide_of(lambda loc: dist.Normal(loc, 1.0).to_event(1))


def test_right_pairs():
    assert pv.check_pair(model, guide, torch.randn(7)).problems == ()
    vae = pv.VAE(
        priors.GaussianMixture(2),
        conditionals.Bernoulli(nets.MLP(2), event_shape=(3, 3)),
        conditionals.MultivariateNormal(nets.MLP(9), event_shape=2),
    )
    report = pv.check_pair(
        vae.model, vae.guide, {"x": torch.ones(7, 3, 3), "mask": torch.rand(7, 3, 3) > 0.5}
    )
    assert report.problems == ()
    assert [(s.name, s.programs, s.plates) for s in report.sites] == [
        ("z", ("model", "guide"), ("data",)),
        ("x", ("model",), ("data",)),
    ]
    assert "GaussianMixture" not in str(report)
    assert report.data_plates == {"data"}
    assert pv.check_pair(model, AutoNormal(model), torch.randn(7)).problems == ()


def test_enumerated_and_rejection_sampled_sites_are_right():
    @config_enumerate
    def mixture(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    assert pv.check_pair(mixture, lambda x: None, torch.randn(7)).problems == ()
    # a Gamma is drawn by rejection, so replacing one datum moves the noise of the others: that is no coupling
    encoder = conditionals.Gamma(nets.MLP(3, (8,)), event_shape=2)

    def gamma_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)

    def gamma_guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x))

    assert pv.check_pair(gamma_model, gamma_guide, torch.rand(9, 3)).problems == ()


net = nn.Linear(1, 2)


def unregistered(x):
    pyro.param("loc", torch.zeros(2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)), 1.0).to_event(1))


def frozen(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def undeclared_event(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.unsqueeze(-1))


def undeclared_event_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0))


def silent(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def positive_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def infinite_guide(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), scale).to_event(1))


def infinite_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.factor("x_penalty", x.log())
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(
    ("pair", "x", "message"),
    [
        ((model, lambda x: pyro.param("loc", torch.zeros(()))), torch.randn(7), "guide: it has no site 'z'"),
        ((silent, guide), torch.randn(7), "observes nothing"),
        ((model, guide_of(lambda loc: dist.Normal(loc[0], 1.0))), torch.randn(7), "event_shape ()"),
        (
            (undeclared_event, undeclared_event_guide),
            torch.randn(7),
            r"lies in no plate; declare it as part of the event",
        ),
        ((positive_model, guide), torch.randn(7), "outside the model's support"),
        (
            (model, guide_of(lambda loc: dist.LogNormal(loc, 1.0).to_event(1))),
            torch.randn(7),
            "cannot reach the whole",
        ),
        ((model, guide), torch.tensor([0.0, torch.inf]), "row 1 of 2"),
        ((model, guide), torch.zeros(0), "no data"),
        ((model, frozen), torch.randn(7), "nothing to train"),
        ((model, unregistered), torch.randn(7), "a Linear runs but is not registered"),
        (
            (infinite_model, infinite_guide),
            torch.tensor([1.0, 0.0, 2.0]),
            "log-probability of 'x_penalty' is -inf at row 1",
        ),
    ],
)
def test_what_is_wrong(pair, x, message):
    report = pv.check_pair(*pair, x)
    assert any(message in problem for problem in report.problems), str(report)


def test_what_others_left_in_the_param_store_does_not_hide_that_there_is_nothing_to_train():
    x = torch.randn(7)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        pyro.param("left", torch.zeros(3))
        assert any("nothing to train" in problem for problem in pv.check_pair(model, frozen, x).problems)
        with pytest.raises(ValueError, match="nothing to train"):
            pv.SVI(model, frozen, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
        guide(x)  # its own parameters are there before the first step
        assert math.isfinite(pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x))


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoMultivariateNormal, AutoNormalMessenger], ids=lambda make: make.__name__
)
def test_autoguides_have_something_to_train_at_the_first_step_and_later(make):
    autoguide, x = make(model), torch.randn(7)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        for _ in range(2):
            assert math.isfinite(
                pv.SVI(model, autoguide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
            )
            assert pv.check_pair(model, autoguide, x).problems == ()


def normal_of(name, net, site, **options):
    """A site of a network that a function registers under a name."""
    pyro.module(name, net)
    pyro.sample(site, dist.Normal(net(torch.ones(1))[0], 1.0), **options)


def test_networks_of_functions_that_share_a_name_are_named():
    nets = [nn.Linear(1, 1), nn.Linear(1, 1)]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            normal_of("net", nets[0], "x", obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            normal_of("net", nets[1], "z")

    (problem,) = pv.check_pair(model, guide, torch.randn(7)).problems
    assert (
        "model and guide register different networks under one name in Pyro's param store, 'net'" in problem
    )
    nets[1] = nets[0]
    assert pv.check_pair(model, guide, torch.randn(7)).problems == ()


def test_a_network_of_an_earlier_pair_in_the_param_store_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide_with(net):
        def guide(x):
            with pyro.plate("data", len(x)):
                normal_of("net", net, "z")

        return guide

    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        guide_with(nn.Linear(1, 1))(torch.randn(7))
        (problem,) = pv.check_pair(model, guide_with(nn.Linear(1, 1)), torch.randn(7)).problems
        assert "holds a network of an earlier pair as 'net', so the network of the guide" in problem
        assert "pyro.clear_param_store()" in problem


def test_the_data_row_outside_the_support():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.sum(-1).exp()), obs=x)

    (problem,) = pv.check_pair(counts, guide, torch.tensor([1.0, 2.0, -3.0, 0.0])).problems
    assert "row 2 (1 in all)" in problem


class Normalized(PyroModule):
    """A guide that reads its data through batch normalization."""

    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


def rows_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)


def test_batch_normalization_couples_data_and_layer_normalization_does_not():
    x = torch.randn(9, 3)
    coupled = Normalized(nn.BatchNorm1d(4))
    before = coupled.net[1].running_mean.clone()
    (problem,) = pv.check_pair(rows_model, coupled, x).problems
    assert "when row 4 is replaced" in problem
    assert torch.equal(coupled.net[1].running_mean, before)
    assert pv.check_pair(rows_model, Normalized(nn.LayerNorm(4)), x).problems == ()
    assert pv.check_pair(rows_model, Normalized(nn.Dropout()), x).problems == ()
    assert pv.check_pair(rows_model, coupled.eval(), x).problems == ()


def test_nothing_is_moved():
    state = torch.get_rng_state()
    x = torch.randn(7, generator=torch.manual_seed(0))
    torch.set_rng_state(state)
    pv.check_pair(model, guide, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == 0


def test_a_pair_that_fails_is_one_problem():
    def broken(x):
        raise KeyError("w")

    (problem,) = pv.check_pair(model, broken, torch.randn(7)).problems
    assert "KeyError: 'w'" in problem


class _Outside(PyroModule):
    """Networks that run in plain methods: nothing registers them."""

    def __init__(self, encoder):
        super().__init__()
        self.decoder = torch.nn.Linear(2, 3)
        self.encoder = encoder

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


class _Inside(_Outside):
    model = pyro_method(_Outside.model)
    guide = pyro_method(_Outside.guide)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        (torch.nn.Linear(3, 2), "encoder"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), "encoder.0"),
    ],
)
def test_a_network_that_runs_outside_forward_is_named_with_the_remedy(encoder, name):
    both = _Outside(encoder)
    with pytest.raises(ValueError, match=rf"the network '{name}' of _Outside, a Linear, .*@pyro_method"):
        pv.fit(both.model, both.guide, torch.randn(8, 3), num_epochs=1)
    right = _Inside(encoder)
    pv.fit(right.model, right.guide, torch.randn(8, 3), num_epochs=1)
