"""All diagnostics take the same forms of data as ``fit``, and their results print as tables."""

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

MODEL = exact.LinearGaussian(torch.tensor([[1.0, 0.8], [0.5, 1.0], [0.2, 0.9]]).double(), noise_scale=0.5)
GUIDE = guide_of(MODEL.mean_field)
GRID = exact.Grid(MODEL, tolerance=1e-3)
N = 8
X, Z = seeded(N, 3), seeded(4, N, 2, seed=1)
SMALL = {"num_particles": 20, "split": False}

FUNCTIONS = {
    "calibration": lambda data: diagnostics.calibration(MODEL, GUIDE, data, num_simulations=100).ranks,
    "check_pair": lambda data: str(pv.check_pair(MODEL, GUIDE, data)),
    "compare": lambda data: diagnostics.compare(MODEL, GUIDE, data, **SMALL).coverage,
    "compare with a grid": lambda data: diagnostics.compare(GRID, GUIDE, data, **SMALL).log_evidence,
    "compare_guides": lambda data: str(
        diagnostics.compare_guides(MODEL, {"mean-field": GUIDE}, data, num_particles=20)
    ),
    "diagnose": lambda data: str(
        diagnostics.diagnose(MODEL, GUIDE, data, num_particles=20, num_simulations=100)
    ),
    "free_energy": lambda data: diagnostics.free_energy(MODEL, GUIDE, data, num_particles=20).free_energy,
    "Grid.log_evidence": GRID.log_evidence,
    "Grid.posterior": lambda data: GRID.posterior(data).mean,
    "Grid.solve": lambda data: GRID.solve(data).error,
    "latent_usage": lambda data: diagnostics.latent_usage(MODEL, GUIDE, data).kl,
    "pointwise_identity": lambda data: diagnostics.pointwise_identity(MODEL, GUIDE, data, z=Z).correction,
    "posterior_draws": lambda data: diagnostics.posterior_draws(MODEL, GUIDE, data, num_draws=20)["z"],
    "split_gap": lambda data: diagnostics.split_gap(MODEL, GUIDE, data).amortization,
    "to_arviz": lambda data: torch.tensor(
        diagnostics.to_arviz(MODEL, GUIDE, data, num_draws=20)["sample_stats"]["log_weight"].values
    ),
}
FORMS = {
    "array": X.numpy(),
    "tuple": (X,),
    "dict": {"x": X},
    "Data": pv.Data(X),
    "Dataset": TensorDataset(X),
    "DataLoader": DataLoader(TensorDataset(X), batch_size=3),
    "shuffled DataLoader": DataLoader(TensorDataset(X), batch_size=3, shuffle=True),
    "Dataset with unused labels": TensorDataset(X, torch.arange(N)),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@every_function
def test_functions_give_equal_results_for_all_forms_of_the_data(function):
    expected = FUNCTIONS[function](X)
    for form, data in FORMS.items():
        result = FUNCTIONS[function](data)
        assert result == expected if isinstance(expected, str) else torch.equal(result, expected), form


@every_function
def test_loader_with_a_custom_sampler_raises(function):
    loader = DataLoader(TensorDataset(X), batch_size=3, sampler=SubsetRandomSampler(range(N)))
    if function == "check_pair":
        assert "an order of its own" in FUNCTIONS[function](loader)
        return
    with pytest.raises(ValueError, match="an order of its own"):
        FUNCTIONS[function](loader)


def test_check_pair_reports_invalid_data():
    for data in (X[:0], np.full((3, 3), np.nan), [1.0, 2.0], ()):
        (problem,) = pv.check_pair(MODEL, GUIDE, data).problems
        assert "data" in problem


def conditional_model(x, c):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def conditional_guide(x, c):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + c) / 2 + 0.3, 0.5**0.5))


@pytest.mark.parametrize("form", ["tuple", "dict", "DataLoader"])
def test_compare_of_a_pair_with_a_condition_is_its_closed_form(form):
    """z ~ N(c, 1), x ~ N(z, 1): p(x|c) = N(c, 2); a guide shifted by δ has a gap of δ²/(2 · ½) = δ² nats."""
    x, c = seeded(5), seeded(5, seed=1)
    forms = {
        "tuple": (x, c),
        "dict": {"c": c, "x": x},
        "DataLoader": DataLoader(TensorDataset(x, c), batch_size=2),
    }
    grid, data = exact.Grid(conditional_model), forms[form]
    result = diagnostics.compare(grid, conditional_guide, data, num_particles=2000)
    torch.testing.assert_close(result.log_evidence, dist.Normal(c, 2**0.5).log_prob(x), rtol=0, atol=1e-6)
    assert ((result.gap - 0.09).abs() < 4.5 * result.gap_se + 1e-6).all()
    identity = diagnostics.pointwise_identity(grid, conditional_guide, data, z=seeded(3, 5, seed=2))
    torch.testing.assert_close(identity.log_evidence, result.log_evidence.expand(3, 5), rtol=0, atol=1e-6)
    assert result.plot(2).axes[0].get_title() == "datum 0"


RESULTS = {
    "Calibration": (lambda: diagnostics.calibration(MODEL, GUIDE, X, num_simulations=100), "100 simulations"),
    "Comparison": (
        lambda: diagnostics.compare(MODEL, GUIDE, X, num_particles=20),
        r"8 data, [\s\S]*gap KL\(q\|\|p\) ",
    ),
    "Comparison of a single datum": (
        lambda: diagnostics.compare(MODEL, GUIDE, X[:1], num_particles=20),
        r"1 data, .*\nELBO +-?\d+\.\d+\n",
    ),
    "Diagnosis": (
        lambda: diagnostics.diagnose(MODEL, GUIDE, X, num_particles=20, num_simulations=0),
        "EVIDENCE",
    ),
    "FreeEnergy": (
        lambda: diagnostics.free_energy(MODEL, GUIDE, X),
        r"8 data, .*\nexpected energy +\d+\.\d+ ± \d+\.\d+\n",
    ),
    "GapSplit": (
        lambda: diagnostics.split_gap(MODEL, GUIDE, X),
        r"8 data, .*in closed form\ngap: approximation +\d",
    ),
    "GuideComparison": (
        lambda: diagnostics.compare_guides(MODEL, {"mean-field": GUIDE}, X, num_particles=20),
        r" +mean-field\nELBO +-",
    ),
    "LatentUsage": (lambda: diagnostics.latent_usage(MODEL, GUIDE, X), "2 of 2 latent dimensions active"),
    "PointwiseIdentity": (
        lambda: diagnostics.pointwise_identity(MODEL, GUIDE, X, z=Z),
        r"4 z for each of 8 data, in nats\n +smallest +mean",
    ),
    "TwoSample": (
        lambda: diagnostics.two_sample_test(seeded(60, 1), seeded(60, 1)),
        r"accuracy 0\.\d+ ± 0\.\d+",
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_print_as_tables(name):
    result, pattern = RESULTS[name][0](), RESULTS[name][1]
    text = str(result)
    assert re.search(pattern, text), text
    assert "tensor(" not in text
