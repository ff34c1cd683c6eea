"""The claims of the walkthrough, as laws: what each page measures, against what it says."""

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


def page(name):
    """What a script defines."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def test_prior_monte_carlo_is_unbiased_and_useless():
    this = page("walkthrough/01_prior_monte_carlo")
    train, test = this.digits()
    x, n = test[:20], 20_000
    model = exact.LinearGaussian.ppca(train, 2)
    log_w = this.log_weights(model, x, n) - model.log_evidence(x)
    share = this.expected_share(model, x)
    # E w = p(x), and of w²: the share is (E w)²/E w²
    w = log_w.exp()
    assert ((w.mean(0) - 1).abs() < 4.5 * ((1 / share - 1) / n).sqrt()).all()
    measured, influence = this.effective_sample_size(log_w) / n, 2 * w / w.mean(0) - w**2 / (w**2).mean(0)
    assert ((measured / share).log().abs() < 4.5 * influence.std(0) / n**0.5 + 0.02).all()
    torch.testing.assert_close(this.log_mean_exp(log_w), w.mean(0).log())
    model = exact.LinearGaussian.ppca(train, 20)
    log_w = this.log_weights(model, x, n) - model.log_evidence(x)
    assert (this.log_mean_exp(log_w) < -5).all()  # nats below the truth, every one
    assert this.effective_sample_size(log_w).median() < 3
    assert (n * this.expected_share(model, x) < 1e-3).all()


def test_the_identity_holds_everywhere_and_the_correction_has_either_sign():
    this = page("walkthrough/02_pointwise_identity")
    model, x = this.make_model(), this.X
    z = 3 * torch.randn(500, 1, 1, dtype=torch.double)
    identity = pointwise_identity(model, this.guide, x, z=z).log_evidence
    torch.testing.assert_close(identity, model.log_evidence(x).expand(500, 1), rtol=0, atol=1e-9)
    n = 20_000
    under_q, under_p = this.corrections(model, x, n)
    # the divergences by quadrature over z
    line = torch.linspace(-6, 6, 40_001, dtype=torch.double).reshape(-1, 1, 1)
    correction = pointwise_identity(model, this.guide, x, z=line).correction[:, 0]
    p = model.posterior(x).log_prob(line)[:, 0].exp()
    q = p * correction.exp()
    for values, density in ((under_q, q), (under_p, p)):
        mean = (density * correction).sum() * (12 / 40_000)
        assert (values.mean() - mean).abs() < 4.5 * values.std() / n**0.5
        assert 0.1 < (values > 0).double().mean() < 0.9
    assert under_q.mean() > 0 > under_p.mean()


def test_free_energy_is_equal_at_the_exact_posterior_only():
    this = page("walkthrough/03_free_energy")
    model, x = this.make_model(), this.X
    for shift, factor in ((0.0, 1.0), (0.7, 1.0), (0.0, 0.5), (0.0, 1.6)):
        energy = pv.free_energy(model, this.make_guide(model, shift, factor), x, num_particles=40_000)
        above = energy.free_energy + model.log_evidence(x)
        assert (above - this.divergence(model, shift, factor)).abs() < 4.5 * energy.free_energy_se
        assert (above > 10 * energy.free_energy_se) == ((shift, factor) != (0.0, 1.0))


@pytest.mark.slow
def test_a_restricted_family_trains_another_model():
    this = page("walkthrough/04_restricted_family")
    x = exact.LinearGaussian(this.WEIGHT, noise_scale=0.4).sample(500)
    sigmas = torch.linspace(0.1, 1.2, 2201, dtype=torch.double)
    evidence, bound = this.curves(x, sigmas)
    places = {
        "full covariance": sigmas[evidence.argmax()].item(),
        "mean-field": sigmas[bound.argmax()].item(),
    }
    assert places["mean-field"] > places["full covariance"] + 0.2
    for name, family in this.FAMILIES.items():
        assert this.train_sigma(x, family, 3000) == pytest.approx(places[name], abs=2e-3)


@pytest.mark.slow
def test_the_linear_vae_collapses_to_the_units_that_the_eigenvalues_allow():
    this = page("walkthrough/04_restricted_family")
    x = this.digits()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    vae = this.train_linear(x, 1.0, 3000)
    norms = this.column_norms(vae)
    assert (norms > this.ACTIVE).sum() == (eigenvalues > 1).sum() == 18
    assert norms[18:].max() < 1e-2
    # the maximum of the likelihood with noise 1, which the ELBO reaches
    kept = eigenvalues[:18]
    best = -0.5 * (64 * math.log(2 * math.pi) + (kept.log() + 1).sum() + eigenvalues[18:].sum()).item()
    loc = vae.model.decoder.readout["loc"].layer
    toy = exact.LinearGaussian(loc.weight.detach(), noise_scale=1.0, bias=loc.bias.detach())
    report = pv.compare(toy, vae.guide, x, num_particles=2, split=False)
    assert best - 1e-2 < report.elbo.mean().item() < report.log_evidence.mean().item() < best


@pytest.mark.slow
def test_a_heavier_kl_collapses_more_units():
    this = page("walkthrough/04_restricted_family")
    x = this.digits()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    norms = this.column_norms(this.train_linear(x, 2.5, 1500))
    assert (norms > this.ACTIVE).sum() == (eigenvalues > 2.5).sum() == 10
    # ‖wⱼ‖² = λⱼ − βσ², but for the first three, which take their time to turn apart
    assert (norms[3:10] - (eigenvalues[3:10] - 2.5)).abs().max() < 0.15


@pytest.mark.slow
def test_each_part_learned_in_turn_raises_the_bound():
    this = page("walkthrough/05_in_turn")
    x, vae = this.digits(), this.make_vae()
    best = exact.LinearGaussian.ppca(x, this.UNITS).log_evidence(x).mean().item()
    records = this.climb(vae, x, ["guide", "model"] * 3, epochs_each=60, every=60)
    for (_, elbo, evidence, _), (_, higher, later, part) in pairwise(records):
        assert higher > elbo
        assert (later == evidence) == (part == "guide")  # a frozen model is not touched
        assert higher < later < best
    frozen = this.climb(vae, x, ["model"], epochs_each=10)
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert len(frozen) == 2


def test_one_draw_is_unbiased_and_its_variance_known():
    this = page("walkthrough/06_single_sample")
    model, shift, n = this.make_model(), 0.2, 50_000
    x, guide = model.sample(200), this.make_guide(model, shift)
    values = this.single_draws(model, guide, x[:1], n)
    report = pv.compare(model, guide, x, num_particles=2, split=False)
    assert (values.mean() - report.elbo[0]).abs() < 4.5 * values.std() / n**0.5
    variance = this.variance(model, shift)
    assert abs(values.var() - variance) < 4.5 * ((values - values.mean()) ** 2).std() / n**0.5
    between = report.elbo.var(correction=0).item()
    for batch, draws in ((10, 1), (10, 20), (100, 1)):
        expected = ((between + variance / draws) / batch) ** 0.5
        # of a standard deviation from 2000 nearly normal means; those of 10 data are skewed
        assert this.minibatch_errors(model, guide, x, batch, draws, 2000) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_both_gradients_are_unbiased_and_one_is_quiet(k):
    this = page("walkthrough/07_gradients")
    model, x = this.make_model(k)
    (elbo, truth), n, spread = this.exact_elbo(model, x), 20_000, []
    for family, baseline in (
        (pyro.distributions.Normal, 0.0),
        (this.ScoreFunctionNormal, 0.0),
        (this.ScoreFunctionNormal, elbo),
    ):
        gradients = this.single_gradients(model, x, n, family, baseline)
        assert gradients.shape == (n, 2 * k)
        assert ((gradients.mean(0) - truth).abs() < 4.5 * gradients.std(0) / n**0.5).all()
        spread.append(gradients.var(0).mean())
    assert spread[1] > 2 * spread[2] > 2 * spread[0]
    assert spread[0] < 2  # whatever k


def test_analytic_terms_are_pyros_losses_with_one_mean():
    this = page("walkthrough/08_analytic_terms")
    model, x = this.make_model()
    n = 50_000
    for factor in (0.4, 1.0, 2.0):
        q = this.make_q(model, x, factor)
        elbo = (model.log_evidence(x) - (factor**2 - 1 - 2 * math.log(factor))).item()  # two dimensions
        values, gradients = this.single_draws(model, x, factor, n)
        for name, value in values.items():
            assert (value.mean() - elbo).abs() < 4.5 * value.std() / n**0.5 + 1e-12
            assert (
                gradients[name].mean().abs() < 4.5 * gradients[name].std() / n**0.5
            )  # the means are the best
        assert gradients["analytic KL"].std() < 0.8 * gradients["plain"].std()
        assert (values["plain"].std() < 1e-12) == (factor == 1.0)

        def guide(x, q=q):
            with pyro.plate("data", len(x)):
                pyro.sample("z", q)

        for name, loss in (("plain", Trace_ELBO()), ("analytic KL", TraceMeanField_ELBO())):
            pyro.set_rng_seed(1)
            pyros = -loss.loss(model, guide, x)
            pyro.set_rng_seed(1)
            assert this.estimators(model, x, q)[name].item() == pytest.approx(pyros, abs=1e-10)


@pytest.mark.slow
def test_a_wider_encoder_pays_less_for_amortization():
    this = page("walkthrough/09_amortization")
    train, test = pv.load("digits", binarize="threshold")
    model, x = this.train_model(train, 20), test.fixed().x[:8]
    before = [parameter.clone() for parameter in model.parameters()]
    evidence = exact.Grid(model, tolerance=1e-4).log_evidence(x).to(x)
    narrow, wide = (
        pv.split_gap(model, this.train_guide(model, train, width, 20), x, log_evidence=evidence)
        for width in (2, 100)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert narrow.amortization.mean() > wide.amortization.mean() > 0
    # the family does not know the encoder
    error = torch.hypot(narrow.approximation_se, wide.approximation_se)
    assert ((narrow.approximation - wide.approximation).abs() < 4.5 * error + 5e-3).all()
    assert (narrow.approximation > -4.5 * narrow.approximation_se).all()


@pytest.mark.slow
def test_svi_of_the_linear_vae_reaches_maximum_likelihood():
    this = page("linear_vae")
    x = this.digits()
    best = exact.LinearGaussian.ppca(x, 5).log_evidence(x).mean().item()
    vae = this.make_vae(64, 5)
    this.train(vae, x, 3000, TraceMeanField_ELBO())
    report = pv.compare(this.as_exact(vae), vae.guide, x, num_particles=2, split=False)
    assert 0 < best - report.elbo.mean().item() < 1e-2
    assert this.active_units(vae, x) == 5
