"""Unusual pairs that are right train without an alarm, and what is wrong with others is said."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.support.plain import decoder, encoder, guide, model


def amortized_global(x):
    pyro.module("encoder", encoder)
    pyro.sample("c", dist.Normal(encoder(x.mean(0)), 0.1).to_event(1))


def global_model(x):
    c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(decoder(c), 1.0).to_event(1), obs=x)


def subsampling(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x[rows])


def subsampling_guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("z", dist.Normal(encoder(x[rows]), 1.0).to_event(1))


def improper(x):
    w = pyro.sample("w", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0).expand([len(x), 3]).to_event(1), obs=x)


def improper_guide(x):
    pyro.sample("w", dist.Normal(pyro.param("w_loc", torch.zeros(())), 1.0))


def frozen_features(x):
    with torch.no_grad():
        h = features(x)
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(h), 1.0).to_event(1))


features = nn.Linear(3, 3)


@pytest.mark.parametrize(
    "programs",
    [
        (global_model, amortized_global),
        (subsampling, subsampling_guide),
        (improper, improper_guide),
        (model, frozen_features),
    ],
    ids=["amortized global latent", "own subsample", "improper prior", "features under no_grad"],
)
def test_no_false_alarm(programs):
    if programs[0] is global_model:

        def registered(x):
            pyro.module("decoder", decoder)
            global_model(x)

        programs = (registered, programs[1])
    x = torch.randn(20, 3)
    assert pv.check_pair(*programs, x).problems == ()
    assert math.isfinite(pv.fit(*programs, x, num_epochs=1).epochs[0].train.elbo)


def test_a_truncated_guide_trains_and_check_pair_says_that_it_is_truncated():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def truncated(x):
        low = pyro.param("low", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(low.expand(len(x)), 2.0))

    x = torch.rand(50)
    assert pv.fit(counts, truncated, x, num_epochs=1).epochs
    (problem,) = pv.check_pair(counts, truncated, x).problems
    assert "cannot reach the whole posterior" in problem


def test_supports_that_depend_on_the_row():
    def binomial(x, n):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Binomial(n, p), obs=x)

    n = torch.arange(1.0, 21.0)
    x = (n / 2).floor()
    for batch_size in (1, 6, None):
        assert pv.fit(binomial, lambda x, n: None, (x, n), batch_size=batch_size, num_epochs=1).epochs
    with pytest.raises(ValueError, match="row 0"):
        pv.fit(binomial, lambda x, n: None, (x + 2, n), batch_size=None, num_epochs=1)


def test_masked_entries_may_hold_anything():
    def masked(x, seen):
        p = pyro.param("p", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Bernoulli(p.expand(len(x), 3), validate_args=False).mask(seen).to_event(1), obs=x
            )

    x, seen = torch.ones(9, 3), torch.rand(9, 3) > 0.5
    x[~seen] = -1.0
    with pyro.validation_enabled(False):
        assert pv.check_pair(masked, lambda x, seen: None, (x, seen)).problems == ()


def test_a_list_of_rows_is_not_a_list_of_arguments():
    with pytest.raises(ValueError, match=r"torch\.stack"):
        pv.fit(model, guide, [torch.ones(3) for _ in range(10)])
