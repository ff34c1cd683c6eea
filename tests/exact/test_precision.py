"""Exact models with Python numbers as parameters, against scipy in double precision."""

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_vae as pv
from pyro_vae import exact
from tests.support.oracles import seeded


def beta_bernoulli(convert):
    model = convert(exact.BetaBernoulli(7, concentration1=2.3, concentration0=0.7))
    x = torch.bernoulli(torch.full((5, 7), 0.4)).double()
    s = x.sum(-1).numpy()
    binomial = stats.binom(7, 0.5).logpmf(s) + 7 * np.log(2)
    return model, x, stats.betabinom(7, 2.3, 0.7).logpmf(s) - binomial, (2.3 + s) / (3.0 + 7)


def gamma_poisson(convert):
    model = convert(exact.GammaPoisson(1, concentration=2.3, rate=0.7))
    x = torch.arange(5.0).double().unsqueeze(-1)
    n = x[:, 0].numpy()
    return model, x, stats.nbinom(2.3, 0.7 / 1.7).logpmf(n), (2.3 + n) / 1.7


def normal_normal(convert):
    model = convert(exact.NormalNormal(3, noise_scale=0.1, prior_loc=0.3, prior_scale=0.7))
    x = 10 * seeded(5, 3)
    covariance = 0.01 * np.eye(3) + 0.49
    v = 1 / (1 / 0.49 + 3 / 0.01)
    mean = v * (0.3 / 0.49 + x.sum(-1).numpy() / 0.01)
    return model, x, stats.multivariate_normal(np.full(3, 0.3), covariance).logpdf(x.numpy()), mean


def linear_gaussian(convert):
    w = seeded(4, 2)
    model = exact.LinearGaussian(w, noise_scale=0.1, bias=0.3, prior_scale=1.7)
    x = 30 * seeded(5, 4)
    covariance = 0.01 * np.eye(4) + 1.7**2 * (w @ w.mT).numpy()
    return model, x, stats.multivariate_normal(np.full(4, 0.3), covariance).logpdf(x.numpy()), None


def regression(convert):
    design = seeded(6, 2)
    model = exact.BayesianLinearRegression(design, prior_precision=0.3, noise_precision=7.1)
    x = 5 * seeded(5, 6)
    covariance = np.eye(6) / 7.1 + (design @ design.mT).numpy() / 0.3
    return model, x, stats.multivariate_normal(np.zeros(6), covariance).logpdf(x.numpy()), None


MODELS = [beta_bernoulli, gamma_poisson, normal_normal, linear_gaussian, regression]


@pytest.mark.parametrize(
    "convert", [lambda model: model, lambda model: model.double()], ids=["by the data", "by .double()"]
)
@pytest.mark.parametrize("make", MODELS)
def test_python_numbers_keep_double_precision(make, convert):
    model, x, log_evidence, mean = make(convert)
    expected = torch.from_numpy(log_evidence)
    torch.testing.assert_close(model.log_evidence(x), expected, rtol=1e-10, atol=1e-10)
    if mean is not None:
        torch.testing.assert_close(
            model.posterior(x).mean[:, 0], torch.from_numpy(mean), rtol=1e-10, atol=1e-10
        )
    # log p(x) = log p(x, z) − log p(z|x) at any z
    z = model.posterior(x).sample()
    actual = model.log_joint(x, z) - model.posterior(x).log_prob(z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", MODELS[:3])
def test_single_precision_data_stay_in_single_precision(make):
    model, x, log_evidence, _ = make(lambda model: model)
    actual = model.log_evidence(x.float())
    assert actual.dtype == torch.float
    torch.testing.assert_close(actual.double(), torch.from_numpy(log_evidence), rtol=1e-4, atol=1e-3)
    assert model.sample(2).dtype == torch.float


def test_loaded_constants_are_not_replaced_by_those_of_the_constructor():
    model = exact.GammaPoisson(1, concentration=2.3, rate=0.7)
    other = exact.GammaPoisson(1, concentration=1.1, rate=0.2)
    model.load_state_dict(other.state_dict())
    assert model.double().rate.item() == pytest.approx(0.2, rel=1e-6)


def test_log_weights_of_the_exact_guide_equal_log_evidence():
    import pyro

    model, x, log_evidence, _ = normal_normal(lambda model: model)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    w = pv.log_weights(model, guide, x, num_particles=3)
    torch.testing.assert_close(w, torch.from_numpy(log_evidence).expand(3, 5), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "prior_scale", "noise_scale"),
    [
        (lambda w: exact.LinearGaussian(w, noise_scale=0.1, prior_scale=0.3), 0.3, 0.1),
        (
            lambda w: exact.BayesianLinearRegression(w, prior_precision=0.3, noise_precision=7.1),
            0.3**-0.5,
            7.1**-0.5,
        ),
    ],
    ids=["LinearGaussian", "BayesianLinearRegression"],
)
def test_posterior_moments_match_conditioning_of_the_joint_gaussian(model, prior_scale, noise_scale):
    """E[z|x] = C K⁻¹ x and Var[z|x] = s² I − C K⁻¹ Cᵀ with C = s² Wᵀ and K = s² W Wᵀ + σ² I.

    This also holds after ``.double()`` of a model in single precision.
    """
    w = seeded(4, 2).float()
    x, w64 = 30 * seeded(5, 4), w.double().numpy()
    cross = prior_scale**2 * w64.T
    gain = np.linalg.solve(w64 @ cross + noise_scale**2 * np.eye(4), cross.T).T
    covariance = prior_scale**2 * np.eye(2) - gain @ cross.T
    for instance in (model(w), model(w).double()):
        posterior = instance.posterior(x)
        torch.testing.assert_close(
            posterior.mean, torch.from_numpy(x.numpy() @ gain.T), rtol=1e-10, atol=1e-10
        )
        expected = torch.from_numpy(covariance).expand(5, 2, 2)
        torch.testing.assert_close(posterior.covariance_matrix, expected, rtol=1e-10, atol=1e-10)


def test_computed_constants_are_accurate_in_double_precision():
    """Normalized weights of mixtures and breakpoints of ReLU units."""
    w = seeded(4, 2)
    args = torch.tensor([1.0, 1.0, 1.0]), torch.eye(3)[:, :2], torch.eye(2)
    for model in (exact.MixturePrior(*args, weight=w.float(), noise_scale=0.1), exact.FiniteMixture(*args)):
        torch.testing.assert_close(
            model.double().weights, torch.full((3,), 1 / 3, dtype=torch.double), rtol=1e-15, atol=0
        )
    relu = exact.ReluDecoder(
        torch.tensor([3.0]), torch.tensor([1.0]), torch.ones(2, 1), noise_scale=0.1
    ).double()
    assert relu.edges[1].item() == pytest.approx(-1 / 3, rel=1e-15)
