"""Tests of the claims of the scripts in ``examples/walkthrough``."""

import math
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae.diagnostics import pointwise_identity

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_script(name):
    """The global names of an example script."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def test_prior_monte_carlo_is_unbiased_with_a_vanishing_effective_sample_size():
    script = load_script("walkthrough/01_prior_monte_carlo")
    train, test = script.digits()
    x, n = test[:20], 20_000
    model = exact.LinearGaussian.ppca(train, 2)
    log_w = script.log_weights(model, x, n) - model.log_evidence(x)
    share = script.expected_share(model, x)
    # E w = 1, and the expected share is (E w)² / E w²
    w = log_w.exp()
    assert ((w.mean(0) - 1).abs() < 4.5 * ((1 / share - 1) / n).sqrt()).all()
    measured, influence = script.effective_sample_size(log_w) / n, 2 * w / w.mean(0) - w**2 / (w**2).mean(0)
    assert ((measured / share).log().abs() < 4.5 * influence.std(0) / n**0.5 + 0.02).all()
    torch.testing.assert_close(script.log_mean_exp(log_w), w.mean(0).log())
    model = exact.LinearGaussian.ppca(train, 20)
    log_w = script.log_weights(model, x, n) - model.log_evidence(x)
    assert (script.log_mean_exp(log_w) < -5).all()  # nats below the true value
    assert script.effective_sample_size(log_w).median() < 3
    assert (n * script.expected_share(model, x) < 1e-3).all()


def test_pointwise_identity_is_exact_with_corrections_of_both_signs():
    script = load_script("walkthrough/02_pointwise_identity")
    model, x = script.make_model(), script.X
    z = 3 * torch.randn(500, 1, 1, dtype=torch.double)
    identity = pointwise_identity(model, script.guide, x, z=z).log_evidence
    torch.testing.assert_close(identity, model.log_evidence(x).expand(500, 1), rtol=0, atol=1e-9)
    n = 20_000
    under_q, under_p = script.corrections(model, x, n)
    # KL(q‖p) and −KL(p‖q) by quadrature over z
    grid = torch.linspace(-6, 6, 40_001, dtype=torch.double).reshape(-1, 1, 1)
    correction = pointwise_identity(model, script.guide, x, z=grid).correction[:, 0]
    p = model.posterior(x).log_prob(grid)[:, 0].exp()
    q = p * correction.exp()
    for values, density in ((under_q, q), (under_p, p)):
        mean = (density * correction).sum() * (12 / 40_000)
        assert (values.mean() - mean).abs() < 4.5 * values.std() / n**0.5
        assert 0.1 < (values > 0).double().mean() < 0.9
    assert under_q.mean() > 0 > under_p.mean()


def test_free_energy_minus_negative_log_evidence_is_the_kl():
    script = load_script("walkthrough/03_free_energy")
    model, x = script.make_model(), script.X
    for shift, factor in ((0.0, 1.0), (0.7, 1.0), (0.0, 0.5), (0.0, 1.6)):
        energy = pv.free_energy(model, script.make_guide(model, shift, factor), x, num_particles=40_000)
        gap = energy.free_energy + model.log_evidence(x)
        assert (gap - script.divergence(model, shift, factor)).abs() < 4.5 * energy.free_energy_se
        assert (gap > 10 * energy.free_energy_se) == ((shift, factor) != (0.0, 1.0))


@pytest.mark.slow
def test_mean_field_guide_biases_the_noise_scale():
    script = load_script("walkthrough/04_restricted_family")
    x = exact.LinearGaussian(script.WEIGHT, noise_scale=0.4).sample(500)
    sigmas = torch.linspace(0.1, 1.2, 2201, dtype=torch.double)
    evidence, bound = script.curves(x, sigmas)
    maxima = {
        "full covariance": sigmas[evidence.argmax()].item(),
        "mean-field": sigmas[bound.argmax()].item(),
    }
    assert maxima["mean-field"] > maxima["full covariance"] + 0.2
    for name, family in script.FAMILIES.items():
        assert script.train_sigma(x, family, 3000) == pytest.approx(maxima[name], abs=2e-3)


@pytest.mark.slow
def test_active_units_of_the_linear_vae_are_the_eigenvalues_above_beta_times_the_noise():
    script = load_script("walkthrough/04_restricted_family")
    x = script.digits()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    norms = script.column_norms(script.train_linear(x, 2.5, 1500))
    assert (norms > script.ACTIVE).sum() == (eigenvalues > 2.5).sum() == 10
    # ‖wⱼ‖² = λⱼ − βσ²; the first three columns, with similar eigenvalues, converge slowly
    assert (norms[3:10] - (eigenvalues[3:10] - 2.5)).abs().max() < 0.15


@pytest.mark.slow
def test_training_model_and_guide_in_turn_increases_the_elbo():
    script = load_script("walkthrough/05_in_turn")
    x, vae = script.digits(), script.make_vae()
    maximum = exact.LinearGaussian.ppca(x, script.UNITS).log_evidence(x).mean().item()
    records = script.climb(vae, x, ["guide", "model"] * 3, epochs_each=60, every=60)
    for (_, elbo, evidence, _), (_, higher, later, part) in pairwise(records):
        assert higher > elbo
        assert (later == evidence) == (part == "guide")  # a frozen model is unchanged
        assert higher < later < maximum
    frozen = script.climb(vae, x, ["model"], epochs_each=10)
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert len(frozen) == 2


def test_single_draw_elbo_is_unbiased_with_the_closed_form_variance():
    script = load_script("walkthrough/06_single_sample")
    model, shift, n = script.make_model(), 0.2, 50_000
    x, guide = model.sample(200), script.make_guide(model, shift)
    values = script.single_draws(model, guide, x[:1], n)
    report = pv.compare(model, guide, x, num_particles=2, split=False)
    assert (values.mean() - report.elbo[0]).abs() < 4.5 * values.std() / n**0.5
    variance = script.variance(model, shift)
    assert abs(values.var() - variance) < 4.5 * ((values - values.mean()) ** 2).std() / n**0.5
    between = report.elbo.var(correction=0).item()
    for batch, draws in ((10, 1), (10, 20), (100, 1)):
        expected = ((between + variance / draws) / batch) ** 0.5
        # 2000 means of minibatches; those of 10 data are skewed
        assert script.minibatch_errors(model, guide, x, batch, draws, 2000) == pytest.approx(
            expected, rel=0.1
        )


@pytest.mark.parametrize("k", [1, 5, 20])
def test_gradients_are_unbiased_and_reparameterized_ones_have_the_smallest_variance(k):
    script = load_script("walkthrough/07_gradients")
    model, x = script.make_model(k)
    (elbo, exact_gradient), n, variances = script.exact_elbo(model, x), 20_000, []
    for family, baseline in (
        (pyro.distributions.Normal, 0.0),
        (script.ScoreFunctionNormal, 0.0),
        (script.ScoreFunctionNormal, elbo),
    ):
        gradients = script.single_gradients(model, x, n, family, baseline)
        assert gradients.shape == (n, 2 * k)
        assert ((gradients.mean(0) - exact_gradient).abs() < 4.5 * gradients.std(0) / n**0.5).all()
        variances.append(gradients.var(0).mean())
    assert variances[1] > 2 * variances[2] > 2 * variances[0]
    assert variances[0] < 2  # for each k


def test_analytic_terms_equal_the_losses_of_pyro_and_are_unbiased():
    script = load_script("walkthrough/08_analytic_terms")
    model, x = script.make_model()
    n = 50_000
    for factor in (0.4, 1.0, 2.0):
        q = script.make_q(model, x, factor)
        elbo = (model.log_evidence(x) - (factor**2 - 1 - 2 * math.log(factor))).item()  # two dimensions
        values, gradients = script.single_draws(model, x, factor, n)
        for name, value in values.items():
            assert (value.mean() - elbo).abs() < 4.5 * value.std() / n**0.5 + 1e-12
            # the means of q are optimal, so the expected gradient is 0
            assert gradients[name].mean().abs() < 4.5 * gradients[name].std() / n**0.5
        assert gradients["analytic KL"].std() < 0.8 * gradients["plain"].std()
        assert (values["plain"].std() < 1e-12) == (factor == 1.0)

        def guide(x, q=q):
            with pyro.plate("data", len(x)):
                pyro.sample("z", q)

        for name, loss in (("plain", Trace_ELBO()), ("analytic KL", TraceMeanField_ELBO())):
            pyro.set_rng_seed(1)
            expected = -loss.loss(model, guide, x)
            pyro.set_rng_seed(1)
            assert script.estimators(model, x, q)[name].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.slow
def test_amortization_gap_decreases_with_encoder_width():
    script = load_script("walkthrough/09_amortization")
    train, test = pv.load("digits", binarize="threshold")
    model, x = script.train_model(train, 20), test.fixed().x[:8]
    before = [parameter.clone() for parameter in model.parameters()]
    evidence = exact.Grid(model, tolerance=1e-4).log_evidence(x).to(x)
    narrow, wide = (
        pv.split_gap(model, script.train_guide(model, train, width, 20), x, log_evidence=evidence)
        for width in (2, 100)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert narrow.amortization.mean() > wide.amortization.mean() > 0
    # the approximation gap does not depend on the encoder
    error = torch.hypot(narrow.approximation_se, wide.approximation_se)
    assert ((narrow.approximation - wide.approximation).abs() < 4.5 * error + 5e-3).all()
    assert (narrow.approximation > -4.5 * narrow.approximation_se).all()


@pytest.mark.slow
def test_svi_of_the_linear_vae_attains_the_maximum_likelihood():
    script = load_script("linear_vae")
    x = script.digits()
    maximum = exact.LinearGaussian.ppca(x, 5).log_evidence(x).mean().item()
    vae = script.make_vae(64, 5)
    script.train(vae, x, 3000, TraceMeanField_ELBO())
    report = pv.compare(script.as_exact(vae), vae.guide, x, num_particles=2, split=False)
    assert 0 < maximum - report.elbo.mean().item() < 1e-2
    assert script.active_units(vae, x) == 5
