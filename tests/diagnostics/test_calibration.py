"""Calibration and the use of latent dimensions, where the truth is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import diagnostics, exact
from pyro_vae.diagnostics import calibration, diagnose, latent_usage, two_sample_test
from pyro_vae.numerics import pareto_k
from pyro_vae.pairs.log_weights import log_weights
from tests.support.oracles import seeded

TOY = exact.LinearGaussian(torch.tensor([[1.0, 0.8], [0.5, 1.0], [0.2, 0.9]]).double(), noise_scale=0.5)
with torch.random.fork_rng():
    torch.manual_seed(0)
    X = TOY.sample(40)


def guide_of(distribution):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution(x))

    return guide


EXACT, MEAN_FIELD = guide_of(TOY.posterior), guide_of(TOY.mean_field)
PRIOR = guide_of(lambda x: dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1))
WIDE = guide_of(
    lambda x: dist.MultivariateNormal(
        TOY.posterior(x).mean, covariance_matrix=1.6 * torch.linalg.inv(TOY.precision)
    )
)
BIASED = guide_of(
    lambda x: dist.MultivariateNormal(TOY.posterior(x).mean + 0.15, precision_matrix=TOY.precision)
)


def test_the_posterior_is_calibrated():
    found = calibration(TOY, EXACT, X, num_simulations=2000)
    assert found.rejected() == ()
    assert [found.shape(name) for name in found.statistics] == ["flat"] * 4
    assert ((found.coverage.mean(0) - torch.tensor([0.5, 0.9, 0.95])).abs() < 4 * found.coverage_se).all()
    assert found.ranks.shape == (2000, 4)
    assert (found.ranks.min(), found.ranks.max()) == (0, 99)


@pytest.mark.parametrize(
    ("guide", "shape", "bad"),
    [
        (MEAN_FIELD, "U", "z[0]"),
        (WIDE, "hump", "z[0]"),
        (BIASED, "slope", "z[1]"),
        (PRIOR, "slope", "log p(x|z)"),
    ],
    ids=["mean-field", "wide", "biased", "prior"],
)
def test_what_is_not_calibrated_shows(guide, shape, bad):
    found = calibration(TOY, guide, X)
    assert bad in found.rejected()
    assert found.shape(bad) == shape


def test_the_prior_passes_but_where_the_data_speak():
    found = calibration(TOY, PRIOR, X)
    assert set(found.rejected()) == {"log p(x|z)", "distance"}


def test_coverage_of_independent_gaussians_is_the_closed_form():
    """The right mean and a standard deviation too small by s: the central interval of level c covers 2Φ(s
    Φ⁻¹((1+c)/2)) − 1."""
    found = calibration(TOY, MEAN_FIELD, X, num_simulations=2000, num_draws=999)
    narrow = (TOY.precision.diagonal() * torch.linalg.inv(TOY.precision).diagonal()) ** -0.5
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    levels = torch.tensor([0.5, 0.9, 0.95]).double()
    expected = 2 * normal.cdf(narrow.unsqueeze(1) * normal.icdf((1 + levels) / 2)) - 1
    assert ((found.coverage - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt()).all()


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_pareto_k_of_gaussians(rho):
    """The best independent guide of a Gaussian of correlation ρ in its precision has k = |ρ|."""
    precision = torch.tensor([[1.0, rho], [rho, 1.0]]).double()
    z = seeded(1_000_000, 2, seed=1)
    weights = dist.MultivariateNormal(torch.zeros(2).double(), precision_matrix=precision).log_prob(z)
    found = pareto_k((weights - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)).unsqueeze(1))
    assert found.item() == pytest.approx(
        rho, abs=0.06
    )  # 3000 draws in the tail: a standard error of about .02


def test_pareto_k_of_a_pair_is_per_datum():
    """One datum's guide is too narrow by far, the other's exact."""

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = torch.where(torch.arange(len(x)) == 0, 0.05, 1.0).double()
            tril = torch.linalg.cholesky(torch.linalg.inv(TOY.precision))
            pyro.sample(
                "z", dist.MultivariateNormal(TOY.posterior(x).mean, scale_tril=scale[:, None, None] * tril)
            )

    k = pareto_k(log_weights(TOY, guide, X, num_particles=2000))
    assert k[0] > 0.7
    assert (k[1:] == -math.inf).all()


def linear_vae():
    """Probabilistic PCA, whose posterior is of independent dimensions: eigenvalues λ, noise σ²."""
    data = seeded(500, 6) * torch.tensor([3.0, 2.0, 1.3, 0.6, 0.5, 0.4]).double()
    data = data - data.mean(0)
    toy = exact.LinearGaussian.ppca(data, 3)
    values = torch.linalg.eigvalsh(data.mT @ data / len(data)).flip(0)
    return toy, data, values[:3], toy.noise_scale[0] ** 2


def test_the_use_of_a_linear_vae_is_known():
    toy, data, values, noise = linear_vae()
    found = latent_usage(toy, guide_of(toy.mean_field), data)
    torch.testing.assert_close(found.activity, 1 - noise / values, rtol=0.02, atol=0)  # of N data, by N − 1
    assert found.active.all()
    assert not found.collapsed().any()
    # mean KL of each dimension at the optimum: ½ log(λ/σ²); the aggregate posterior is the prior
    torch.testing.assert_close(found.kl.mean(0), 0.5 * (values / noise).log(), rtol=1e-6, atol=1e-9)
    assert found.mean_kl == pytest.approx(found.mutual_information + found.marginal_kl)
    assert found.mutual_information == pytest.approx(0.5 * (values / noise).log().sum().item(), rel=0.1)
    assert abs(found.marginal_kl) < 0.25
    assert found.mutual_information < math.log(500)


def test_collapsed_dimensions_are_counted():
    found = latent_usage(TOY, PRIOR, X)
    assert found.collapsed().all()
    assert not found.active.any()
    assert found.mutual_information == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="independent dimensions"):
        latent_usage(TOY, EXACT, X).collapsed()


def test_a_diagnosis_is_one_page():
    found = diagnose(TOY, MEAN_FIELD, X, num_simulations=200)
    for words in (
        "EVIDENCE",
        "Pareto k: good",
        "worst data: ",
        "2 of 2 latent dimensions active",
        "not calibrated: z[0]",
    ):
        assert words in str(found)
    assert found.worst(5).tolist() == found.pareto_k.argsort(descending=True)[:5].tolist()
    assert found.importance.mean >= found.elbo.mean
    found.calibration.plot()


def test_a_diagnosis_says_what_it_leaves_out():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", TOY.prior())
            pyro.sample("x", TOY.decoder(z), obs=x + 1)

    found = diagnose(model, EXACT, X, num_particles=50)
    assert found.calibration is None
    assert "calibration: not computed: ValueError: simulate: what the model observes at 'x'" in str(found)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_two_samples_are_told_apart_as_well_as_they_can_be(distance):
    a, b = seeded(1500, 2), seeded(1500, 2, seed=1) + distance / 2**0.5
    best = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(distance / 2)).item()
    found = two_sample_test(a, b)
    assert found.accuracy == pytest.approx(best, abs=4 * found.accuracy_se)
    with pytest.raises(ValueError, match="two sets of draws of equal shape"):
        two_sample_test(a, b[:20])


def test_draws_as_arviz_has_them():
    tree = diagnostics.to_arviz(TOY, MEAN_FIELD, X, num_draws=50)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_0")
    assert tree["posterior"]["z"].shape == (1, 50, 40, 2)
    torch.testing.assert_close(
        torch.tensor(tree["sample_stats"]["log_weight"].values[0]),
        log_weights(TOY, MEAN_FIELD, X, num_particles=50),
    )
    draws = diagnostics.posterior_draws(TOY, MEAN_FIELD, X, num_draws=50)["z"]
    assert torch.equal(draws, torch.tensor(tree["posterior"]["z"].values[0]))


def test_bad_numbers_say_so():
    with pytest.raises(ValueError, match="expected num_draws \\+ 1 to be a multiple of 20"):
        calibration(TOY, EXACT, X, num_draws=100)
    with pytest.raises(ValueError, match="two data or more"):
        latent_usage(TOY, EXACT, X[:1])
