"""Data reach every verb in one argument, in any form that fit takes, and every result prints as a table."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import pyro_vae as pv
from pyro_vae import diagnostics, exact
from tests.support.oracles import guide_of, seeded

TOY = exact.LinearGaussian(torch.tensor([[1.0, 0.8], [0.5, 1.0], [0.2, 0.9]]).double(), noise_scale=0.5)
GUIDE = guide_of(TOY.mean_field)
GRID = exact.Grid(TOY, tolerance=1e-3)
N = 8
X, Z = seeded(N, 3), seeded(4, N, 2, seed=1)
SMALL = {"num_particles": 20, "split": False}

VERBS = {
    "calibration": lambda data: diagnostics.calibration(TOY, GUIDE, data, num_simulations=100).ranks,
    "check_pair": lambda data: str(pv.check_pair(TOY, GUIDE, data)),
    "compare": lambda data: diagnostics.compare(TOY, GUIDE, data, **SMALL).coverage,
    "compare with a grid": lambda data: diagnostics.compare(GRID, GUIDE, data, **SMALL).log_evidence,
    "compare_guides": lambda data: str(
        diagnostics.compare_guides(TOY, {"mean-field": GUIDE}, data, num_particles=20)
    ),
    "diagnose": lambda data: str(
        diagnostics.diagnose(TOY, GUIDE, data, num_particles=20, num_simulations=100)
    ),
    "free_energy": lambda data: diagnostics.free_energy(TOY, GUIDE, data, num_particles=20).free_energy,
    "Grid.log_evidence": GRID.log_evidence,
    "Grid.posterior": lambda data: GRID.posterior(data).mean,
    "Grid.solve": lambda data: GRID.solve(data).error,
    "latent_usage": lambda data: diagnostics.latent_usage(TOY, GUIDE, data).kl,
    "pointwise_identity": lambda data: diagnostics.pointwise_identity(TOY, GUIDE, data, z=Z).correction,
    "posterior_draws": lambda data: diagnostics.posterior_draws(TOY, GUIDE, data, num_draws=20)["z"],
    "split_gap": lambda data: diagnostics.split_gap(TOY, GUIDE, data).amortization,
    "to_arviz": lambda data: torch.tensor(
        diagnostics.to_arviz(TOY, GUIDE, data, num_draws=20)["sample_stats"]["log_weight"].values
    ),
}
FORMS = {
    "array": X.numpy(),
    "tuple": (X,),
    "dict": {"x": X},
    "Data": pv.Data(X),
    "Dataset": TensorDataset(X),
    "DataLoader": DataLoader(TensorDataset(X), batch_size=3),
    "DataLoader that shuffles": DataLoader(TensorDataset(X), batch_size=3, shuffle=True),
    "labels that nothing takes": TensorDataset(X, torch.arange(N)),
}
verbs = pytest.mark.parametrize("verb", VERBS)


@verbs
def test_a_verb_gives_the_same_numbers_for_every_form_of_the_data(verb):
    expected = VERBS[verb](X)
    for form, data in FORMS.items():
        found = VERBS[verb](data)
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected), form


@verbs
def test_a_loader_with_an_order_of_its_own_is_refused(verb):
    loader = DataLoader(TensorDataset(X), batch_size=3, sampler=SubsetRandomSampler(range(N)))
    if verb == "check_pair":
        assert "an order of its own" in VERBS[verb](loader)
        return
    with pytest.raises(ValueError, match="an order of its own"):
        VERBS[verb](loader)


def test_data_that_are_wrong_are_a_problem_of_the_pair():
    for data in (X[:0], np.full((3, 3), np.nan), [1.0, 2.0], ()):
        (problem,) = pv.check_pair(TOY, GUIDE, data).problems
        assert "data" in problem


def conditioned(x, c):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def conditioned_guide(x, c):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + c) / 2 + 0.3, 0.5**0.5))


@pytest.mark.parametrize("form", ["tuple", "dict", "DataLoader"])
def test_a_pair_of_two_arguments_against_its_posterior(form):
    """z ~ N(c, 1), x ~ N(z, 1): p(x|c) = N(c, 2); a guide shifted by δ costs δ²/(2 · ½) = δ² nats."""
    x, c = seeded(5), seeded(5, seed=1)
    forms = {
        "tuple": (x, c),
        "dict": {"c": c, "x": x},
        "DataLoader": DataLoader(TensorDataset(x, c), batch_size=2),
    }
    grid, data = exact.Grid(conditioned), forms[form]
    found = diagnostics.compare(grid, conditioned_guide, data, num_particles=2000)
    torch.testing.assert_close(found.log_evidence, dist.Normal(c, 2**0.5).log_prob(x), rtol=0, atol=1e-6)
    assert ((found.gap - 0.09).abs() < 4.5 * found.gap_se + 1e-6).all()
    identity = diagnostics.pointwise_identity(grid, conditioned_guide, data, z=seeded(3, 5, seed=2))
    torch.testing.assert_close(identity.log_evidence, found.log_evidence.expand(3, 5), rtol=0, atol=1e-6)
    assert found.plot(2).axes[0].get_title() == "datum 0"


RESULTS = {
    "Calibration": (lambda: diagnostics.calibration(TOY, GUIDE, X, num_simulations=100), "100 simulations"),
    "Comparison": (
        lambda: diagnostics.compare(TOY, GUIDE, X, num_particles=20),
        r"8 data, [\s\S]*gap KL\(q\|\|p\) ",
    ),
    "Comparison of one": (
        lambda: diagnostics.compare(TOY, GUIDE, X[:1], num_particles=20),
        r"1 data, .*\nELBO +-?\d+\.\d+\n",
    ),
    "Diagnosis": (
        lambda: diagnostics.diagnose(TOY, GUIDE, X, num_particles=20, num_simulations=0),
        "EVIDENCE",
    ),
    "FreeEnergy": (
        lambda: diagnostics.free_energy(TOY, GUIDE, X),
        r"8 data, .*\nexpected energy +\d+\.\d+ ± \d+\.\d+\n",
    ),
    "GapSplit": (
        lambda: diagnostics.split_gap(TOY, GUIDE, X),
        r"8 data, .*in closed form\ngap: approximation +\d",
    ),
    "GuideComparison": (
        lambda: diagnostics.compare_guides(TOY, {"mean-field": GUIDE}, X, num_particles=20),
        r" +mean-field\nELBO +-",
    ),
    "LatentUsage": (lambda: diagnostics.latent_usage(TOY, GUIDE, X), "2 of 2 latent dimensions active"),
    "PointwiseIdentity": (
        lambda: diagnostics.pointwise_identity(TOY, GUIDE, X, z=Z),
        r"4 z for each of 8 data, in nats\n +smallest +mean",
    ),
    "TwoSample": (
        lambda: diagnostics.two_sample_test(seeded(60, 1), seeded(60, 1)),
        r"accuracy 0\.\d+ ± 0\.\d+",
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_prints_as_a_table(name):
    result, pattern = RESULTS[name][0](), RESULTS[name][1]
    text = str(result)
    assert re.search(pattern, text), text
    assert "tensor(" not in text
