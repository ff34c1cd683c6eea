"""Calibration and latent usage of guides with known errors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import diagnostics, exact
from pyro_vae.diagnostics import calibration, diagnose, latent_usage, two_sample_test
from pyro_vae.diagnostics.report import _reason
from pyro_vae.numerics import pareto_k
from pyro_vae.pairs.log_weights import log_weights
from tests.support.oracles import seeded

MODEL = exact.LinearGaussian(torch.tensor([[1.0, 0.8], [0.5, 1.0], [0.2, 0.9]]).double(), noise_scale=0.5)
with torch.random.fork_rng():
    torch.manual_seed(0)
    X = MODEL.sample(40)


def guide_of(distribution):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution(x))

    return guide


EXACT, MEAN_FIELD = guide_of(MODEL.posterior), guide_of(MODEL.mean_field)
PRIOR = guide_of(lambda x: dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1))
WIDE = guide_of(
    lambda x: dist.MultivariateNormal(
        MODEL.posterior(x).mean, covariance_matrix=1.6 * torch.linalg.inv(MODEL.precision)
    )
)
BIASED = guide_of(
    lambda x: dist.MultivariateNormal(MODEL.posterior(x).mean + 0.15, precision_matrix=MODEL.precision)
)


def test_exact_posterior_is_calibrated():
    result = calibration(MODEL, EXACT, X, num_simulations=2000)
    assert result.rejected() == ()
    assert [result.shape(name) for name in result.statistics] == ["flat"] * 4
    assert ((result.coverage.mean(0) - torch.tensor([0.5, 0.9, 0.95])).abs() < 4 * result.coverage_se).all()
    assert result.ranks.shape == (2000, 4)
    assert (result.ranks.min(), result.ranks.max()) == (0, 99)


@pytest.mark.parametrize(
    ("guide", "shape", "statistic"),
    [
        (MEAN_FIELD, "U", "z[0]"),
        (WIDE, "hump", "z[0]"),
        (BIASED, "slope", "z[1]"),
        (PRIOR, "slope", "log p(x|z)"),
    ],
    ids=["mean-field", "wide", "biased", "prior"],
)
def test_miscalibrated_guide_is_rejected_with_the_shape_of_its_error(guide, shape, statistic):
    result = calibration(MODEL, guide, X)
    assert statistic in result.rejected()
    assert result.shape(statistic) == shape


def test_prior_as_guide_fails_only_in_statistics_that_depend_on_the_data():
    result = calibration(MODEL, PRIOR, X)
    assert set(result.rejected()) == {"log p(x|z)", "distance"}


def test_coverage_of_mean_field_guide_is_its_closed_form():
    """If the mean is exact and the standard deviation is s times the exact one, the central interval of level
    c covers 2Φ(s Φ⁻¹((1+c)/2)) − 1."""
    result = calibration(MODEL, MEAN_FIELD, X, num_simulations=2000, num_draws=999)
    s = (MODEL.precision.diagonal() * torch.linalg.inv(MODEL.precision).diagonal()) ** -0.5
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    levels = torch.tensor([0.5, 0.9, 0.95]).double()
    expected = 2 * normal.cdf(s.unsqueeze(1) * normal.icdf((1 + levels) / 2)) - 1
    assert ((result.coverage - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt()).all()


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_pareto_k_of_mean_field_gaussian_is_the_correlation(rho):
    """The mean-field guide of a Gaussian with precision [[1, ρ], [ρ, 1]] has k = |ρ|."""
    precision = torch.tensor([[1.0, rho], [rho, 1.0]]).double()
    z = seeded(1_000_000, 2, seed=1)
    log_p = dist.MultivariateNormal(torch.zeros(2).double(), precision_matrix=precision).log_prob(z)
    log_q = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    k = pareto_k((log_p - log_q).unsqueeze(1)).item()
    # the tail has 3000 draws, so the standard error is about 0.02
    assert k == pytest.approx(rho, abs=0.06)


def test_pareto_k_is_per_datum():
    """The guide is far too narrow for the first datum and exact for the others."""

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = torch.where(torch.arange(len(x)) == 0, 0.05, 1.0).double()
            tril = torch.linalg.cholesky(torch.linalg.inv(MODEL.precision))
            pyro.sample(
                "z", dist.MultivariateNormal(MODEL.posterior(x).mean, scale_tril=scale[:, None, None] * tril)
            )

    k = pareto_k(log_weights(MODEL, guide, X, num_particles=2000))
    assert k[0] > 0.7
    assert (k[1:] == -math.inf).all()


def linear_vae():
    """Probabilistic PCA, whose posterior has independent dimensions: model, data, eigenvalues λ, σ²."""
    data = seeded(500, 6) * torch.tensor([3.0, 2.0, 1.3, 0.6, 0.5, 0.4]).double()
    data = data - data.mean(0)
    model = exact.LinearGaussian.ppca(data, 3)
    values = torch.linalg.eigvalsh(data.mT @ data / len(data)).flip(0)
    return model, data, values[:3], model.noise_scale[0] ** 2


def test_latent_usage_of_linear_vae_is_its_closed_form():
    model, data, values, noise = linear_vae()
    result = latent_usage(model, guide_of(model.mean_field), data)
    # the variance over data divides by N − 1, the covariance of linear_vae by N
    torch.testing.assert_close(result.activity, 1 - noise / values, rtol=0.02, atol=0)
    assert result.active.all()
    assert not result.collapsed().any()
    # at the optimum the mean KL of a dimension is ½ log(λ/σ²), and the aggregate posterior is the prior
    torch.testing.assert_close(result.kl.mean(0), 0.5 * (values / noise).log(), rtol=1e-6, atol=1e-9)
    assert result.mean_kl == pytest.approx(result.mutual_information + result.marginal_kl)
    assert result.mutual_information == pytest.approx(0.5 * (values / noise).log().sum().item(), rel=0.1)
    assert abs(result.marginal_kl) < 0.25
    assert result.mutual_information < math.log(500)


def test_latent_usage_of_several_sites_is_that_of_each():
    """A guide with q(a|x) = N(2x, 1), q(v|x) = N(0, I), so that KL(q(a, v|x)‖p(a, v)) is 2x²."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(2 * x, 1.0))
            pyro.sample("v", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    x = seeded(400)
    result = latent_usage(model, guide, x)
    assert result.names == ("a", "v[0]", "v[1]")
    assert result.active.tolist() == [True, False, False]
    assert "1 of 3 latent dimensions active (not v[0], v[1])" in str(result)
    assert result.activity[0].item() == pytest.approx(4 * x.var().item(), rel=0.05)
    standard_error = 2 * (x.square().mean() / len(x)).sqrt().item()
    assert result.mean_kl == pytest.approx(2 * x.square().mean().item(), abs=4 * standard_error)
    assert result.mean_kl == pytest.approx(result.mutual_information + result.marginal_kl)
    assert result.kl.isnan().all()


def test_prior_as_guide_has_collapsed_dimensions():
    result = latent_usage(MODEL, PRIOR, X)
    assert result.collapsed().all()
    assert not result.active.any()
    assert result.mutual_information == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="independent dimensions"):
        latent_usage(MODEL, EXACT, X).collapsed()


def test_diagnosis_prints_all_sections():
    result = diagnose(MODEL, MEAN_FIELD, X, num_simulations=200)
    for text in (
        "EVIDENCE",
        "Pareto k: good",
        "worst data: ",
        "2 of 2 latent dimensions active",
        "not calibrated: z[0]",
    ):
        assert text in str(result)
    assert result.worst(5).tolist() == result.pareto_k.argsort(descending=True)[:5].tolist()
    assert result.importance.mean >= result.elbo.mean
    result.calibration.plot()


def test_diagnosis_notes_the_reason_for_a_missing_calibration():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MODEL.prior())
            pyro.sample("x", MODEL.decoder(z), obs=x + 1)

    result = diagnose(model, EXACT, X, num_particles=50)
    assert result.calibration is None
    reason = "the value that the model observes at 'x'"
    assert f"calibration: not computed: {reason}" in str(result)


def test_part_that_is_not_computed_has_a_plain_line():
    (note,) = diagnose(MODEL, EXACT, X[:1], num_particles=50, num_simulations=0).notes
    assert note == "latent dimensions: not computed: expected two data or more but got 1"


@pytest.mark.parametrize("error", [RuntimeError("simulate: a cause; a remedy\nmore"), ValueError("a cause")])
def test_reason_is_a_plain_line(error):
    assert _reason(error) == "a cause"
    assert _reason(KeyError())


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_two_sample_accuracy_is_that_of_the_bayes_classifier(distance):
    a, b = seeded(1500, 2), seeded(1500, 2, seed=1) + distance / 2**0.5
    best = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(distance / 2)).item()
    result = two_sample_test(a, b)
    assert result.accuracy == pytest.approx(best, abs=4 * result.accuracy_se)
    with pytest.raises(ValueError, match="two sets of draws of equal shape"):
        two_sample_test(a, b[:20])


def test_to_arviz_has_the_draws_and_log_weights():
    tree = diagnostics.to_arviz(MODEL, MEAN_FIELD, X, num_draws=50)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_0")
    assert tree["posterior"]["z"].shape == (1, 50, 40, 2)
    torch.testing.assert_close(
        torch.tensor(tree["sample_stats"]["log_weight"].values[0]),
        log_weights(MODEL, MEAN_FIELD, X, num_particles=50),
    )
    draws = diagnostics.posterior_draws(MODEL, MEAN_FIELD, X, num_draws=50)["z"]
    assert torch.equal(draws, torch.tensor(tree["posterior"]["z"].values[0]))


def test_invalid_numbers_raise():
    with pytest.raises(ValueError, match="expected num_draws \\+ 1 to be a multiple of 20"):
        calibration(MODEL, EXACT, X, num_draws=100)
    with pytest.raises(ValueError, match="two data or more"):
        latent_usage(MODEL, EXACT, X[:1])
