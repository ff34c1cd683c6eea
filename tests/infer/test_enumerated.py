"""The graph of a step of TraceEnum_ELBO equals a step of eager Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

import pyro_vae as pv
from tests.support.steps import D, K, train_and_compare


@pytest.fixture(autouse=True)
def _double_precision():
    """So that a graph differs from eager Pyro only by rounding."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def enum_elbo(**options):
    return lambda: TraceEnum_ELBO(max_plate_nesting=1, **options)


def concatenate(a, b):
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


class SemiSupervised(nn.Module):
    """The model M2 of Kingma et al. (2014): a label y that the guide enumerates, and a latent z given y."""

    def __init__(self, num_labels=3):
        super().__init__()
        self.num_labels = num_labels
        self.classifier, self.encoder = nn.Linear(D, num_labels), nn.Linear(D + num_labels, 2 * K)
        self.decoder = nn.Linear(K + num_labels, D)

    def model(self, x):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(self.num_labels)))
            z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(concatenate(z, y)), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            loc, log_scale = self.encoder(concatenate(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def semi_supervised(enumerate="parallel"):
    def make():
        pair = SemiSupervised()
        return pair.model, config_enumerate(pair.guide, enumerate)

    return make


def mixture():
    """A component that the model sums out, with a score-function gradient for a second discrete latent."""

    @config_enumerate
    def model(x):
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=dist.constraints.simplex)
        loc = pyro.param("loc", torch.arange(3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            flipped = pyro.sample("flipped", dist.Bernoulli(0.3), infer={"enumerate": None})
            mean = (loc[k] * (1 - 2 * flipped)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-1], D), 1.0).to_event(1), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("flipped", dist.Bernoulli(logits=logit.expand(len(x))))

    return model, guide


PAIRS = {
    "M2, labels in parallel": (semi_supervised(), {}),
    "M2, labels in sequence": (semi_supervised("sequential"), {}),
    "M2, vectorized particles": (semi_supervised(), {"num_particles": 3, "vectorize_particles": True}),
    "M2, particles in turn": (semi_supervised(), {"num_particles": 2}),
    "mixture": (mixture, {}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_traced_step_equals_eager_pyro(name):
    make, options = PAIRS[name]
    svi = train_and_compare(make, 15, loss=enum_elbo(**options))
    assert "traced, 15 steps" in svi.explain()


@pytest.mark.slow
def test_a_compiled_step_equals_eager_pyro():
    svi = train_and_compare(semi_supervised(), 4, loss=enum_elbo(), compile=True)
    assert "compiled by Inductor, 4 steps" in svi.explain()


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_impossible_values_do_not_make_the_loss_nan():
    """A label of probability 0 under which x is impossible: 0 · ∞ in a graph, left out by Pyro."""

    def make():
        loc = pyro.param("loc", torch.zeros(()))

        def model(x):
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Categorical(logits=torch.zeros(2)))
                density = torch.where(y == 0, -((x[:, 0] - loc) ** 2), -torch.inf)
                pyro.factor("x", density)
                pyro.sample("x0", dist.Normal(x[:, 0], 1.0), obs=x[:, 0])

        def guide(x):
            with pyro.plate("data", len(x)):
                impossible = torch.tensor([0.0, -torch.inf])
                pyro.sample("y", dist.Categorical(logits=impossible), infer={"enumerate": "parallel"})

        return model, guide

    train_and_compare(make, 5, loss=enum_elbo(), check=False)


def test_fit_by_graphs_equals_fit_by_eager_pyro():
    x = torch.randn(50, D)

    def run(compile):
        pyro.set_rng_seed(0)
        make = semi_supervised()
        model, guide = make()
        history = pv.fit(model, guide, x, loss=enum_elbo()(), num_epochs=3, batch_size=20, compile=compile)
        values = [p.detach().clone() for p in history.param_store["params"].values()]
        return [epoch.train.elbo for epoch in history.epochs], values

    (elbos, values), (expected_elbos, expected) = run("trace"), run(False)
    assert elbos == pytest.approx(expected_elbos, rel=1e-9)
    for ours, pyros in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-9, atol=1e-9)
