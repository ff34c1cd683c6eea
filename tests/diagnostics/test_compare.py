"""compare, free_energy and pointwise_identity of guides with a known gap."""

import math
import sys
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae.diagnostics import pointwise_identity
from pyro_vae.diagnostics.families import wasserstein
from tests.support import oracles
from tests.support.oracles import guide_of, seeded

MODELS = oracles.make_models()
FA = MODELS["factor analysis"]
diagonal = partial(oracles.diagonal, FA)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    "name", ["factor analysis", "BayesianLinearRegression", "LinearGaussianStateSpace", "NormalNormal"]
)
def test_exact_posterior_as_guide_has_no_gap(name):
    model = MODELS[name]
    x = model.sample(6)
    report = pv.compare(model, guide_of(model.posterior), x, split=False)
    for part in (report.gap, report.forward_kl, report.mean_error, report.covariance_error):
        assert part.abs().max() < 1e-10
    assert report.w2.max() < 1e-6  # W2 is the square root of a rounding error
    torch.testing.assert_close(report.elbo, report.log_evidence, rtol=0, atol=1e-10)
    nominal = torch.tensor([0.5, 0.9, 0.95], dtype=torch.double)
    error = (nominal * (1 - nominal) / 10_000).sqrt() * 2**0.5  # of the draws of p and the quantiles of q
    assert ((report.coverage.mean(0) - nominal).abs() < 4 * error).all()


@pytest.mark.parametrize("name", ["MixturePrior", "BetaBernoulli", "GammaPoisson", "Funnel", "Banana"])
def test_exact_posterior_as_guide_has_constant_log_weights(name):
    """Each term of the Monte Carlo sums is 0."""
    model = MODELS[name]
    report = pv.compare(model, guide_of(model.posterior), model.sample(6), split=False)
    assert report.gap.abs().max() < 1e-10
    assert report.forward_kl.abs().max() < 1e-10
    assert report.gap_se.max() < 1e-10


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_gap_of_shifted_and_scaled_guide_is_its_closed_form(shift, factor):
    """KL(q‖p) = ½[tr ΛS − log |ΛS| − k + δᵀΛδ]."""
    x = FA.sample(6)
    report = pv.compare(FA, diagonal(shift, factor), x, split=False)
    precision, k = FA.precision, 3
    s = torch.diag(factor**2 / precision.diagonal())
    delta = torch.full((k,), shift, dtype=torch.double)
    expected = 0.5 * (
        torch.trace(precision @ s) - torch.logdet(precision @ s) - k + delta @ precision @ delta
    )
    torch.testing.assert_close(report.gap, expected.expand(6), rtol=0, atol=1e-9)
    if factor == 1 and not shift:
        torch.testing.assert_close(report.gap, FA.mean_field_gap(x), rtol=0, atol=1e-9)


def test_monte_carlo_estimates_equal_the_closed_form(monkeypatch):
    x = FA.sample(6)
    analytic = pv.compare(FA, diagonal(0.2, 0.8), x, split=False)
    monkeypatch.setattr(sys.modules["pyro_vae.diagnostics.compare"], "_gaussians", lambda *_: None)
    drawn = pv.compare(FA, diagonal(0.2, 0.8), x, split=False)
    for part in ("elbo", "gap", "forward_kl"):
        difference = (getattr(drawn, part) - getattr(analytic, part)).abs()
        assert (difference < 4.5 * getattr(drawn, f"{part}_se")).all()
    assert (drawn.mean_error - analytic.mean_error).abs().max() < 0.03


def test_gap_of_log_normal_guide_of_gamma_poisson_is_its_closed_form():
    model = MODELS["GammaPoisson"]
    x = model.sample(6)
    report = pv.compare(model, guide_of(model.log_normal), x, num_particles=100_000)
    assert ((report.gap - model.log_normal_gap(x)).abs() < 4.5 * report.gap_se).all()
    assert (report.gap_se < 1e-3).all()
    split = report.split
    torch.testing.assert_close(split.approximation + split.amortization, report.gap)
    own = pv.split_gap(model, guide_of(model.log_normal), x)  # of other draws
    error = torch.hypot(own.amortization_se, split.amortization_se)
    assert ((own.amortization - split.amortization).abs() < 4.5 * error + 1e-3).all()
    assert (split.amortization.abs() < 4.5 * split.amortization_se + 1e-3).all()


def test_unsupported_family_is_compared_without_a_split():
    # the inverse of Pyro's autoregressive flows has the default dtype
    model = oracles.make_models()["factor analysis"].float()
    x = model.sample(4)
    for transform, has_inverse in (
        (dist.transforms.affine_autoregressive(3), True),
        (dist.transforms.planar(3), False),
    ):
        flow = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [transform])
        guide = guide_of(lambda x, flow=flow: flow.expand([len(x)]))
        report = pv.compare(model, guide, x, num_particles=500)
        assert report.split is None
        assert (report.gap > 0).all()
        assert report.forward_kl.isfinite().all() == has_inverse
        assert report.plot(2).axes
        with pytest.raises(ValueError, match="family of TransformedDistribution"):
            pv.split_gap(model, guide, x)


def test_chunks_of_data_give_the_same_gap(monkeypatch):
    x = FA.sample(7)
    whole = pv.compare(FA, diagonal(0.2), x, num_particles=100)
    monkeypatch.setattr(sys.modules["pyro_vae.diagnostics.compare"], "_MAX_DRAWS", 300)
    parts = pv.compare(FA, diagonal(0.2), x, num_particles=100)
    torch.testing.assert_close(whole.gap, parts.gap)
    assert parts.split.amortization.shape == (7,)


def two_site_model(x):
    with pyro.plate("data", len(x)):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample(
            "obs",
            dist.Normal(mu.unsqueeze(-1), tau.unsqueeze(-1) ** -0.5).expand([*mu.shape, 6]).to_event(1),
            obs=x,
        )


def two_site_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("mu", dist.Normal(0.8 * x.mean(-1), 0.4))
        pyro.sample("tau", dist.Gamma(x.new_tensor(4.0), 1.5))


def two_mode_model(weight):
    """The prior has a mode of this weight and scale 0.2 at (−6, 0), and one of scale 1 at 0."""

    def model(x):
        with pyro.plate("data", len(x)):
            mixing = dist.Categorical(probs=x.new_tensor([1 - weight, weight]))
            loc, scale = x.new_tensor([[0.0, 0.0], [-6.0, 0.0]]), x.new_tensor([[1.0], [0.2]]).expand(2, 2)
            z = pyro.sample("z", dist.MixtureSameFamily(mixing, dist.Normal(loc, scale).to_event(1)))
            pyro.sample("x", dist.Normal(0 * z[..., :1], 1.0).to_event(1), obs=x)

    return model


def one_mode_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))


@pytest.mark.slow
def test_function_pair_is_compared_with_a_grid():
    x = 0.5 * seeded(4, 6)
    report = pv.compare(exact.Grid(two_site_model), two_site_guide, x, num_particles=5000)
    assert (report.gap > 4 * report.gap_se).all()
    split = report.split
    assert split.approximation.mean() < report.gap.mean()
    torch.testing.assert_close(split.approximation + split.amortization, report.gap)
    ax = report.plot(2).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("mu", "tau")
    # evaluate estimates the same ELBO from other draws
    elbo = pv.evaluate(two_site_model, two_site_guide, x, num_particles=3000).elbo
    assert (elbo - report.elbo).abs().max() < 0.2


def test_compare_guides_ranks_by_gap_and_plots(tmp_path):
    x = FA.sample(8)
    ranking = pv.compare_guides(
        FA, {"narrow": diagonal(0, 0.3), "exact": guide_of(FA.posterior), "best": diagonal()}, x
    )
    assert list(ranking.comparisons) == ["exact", "best", "narrow"]
    mean, error = ranking.rows()["gap: approximation"][1]
    assert f"{mean:.4f} ± {error:.4f}" in str(ranking)
    figure = ranking.plot()
    assert len(figure.axes) == 4
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[-1].patches]
    assert ends[1::2] == pytest.approx([mean for mean, _ in ranking.rows()["gap KL(q||p)"]])


def test_panels_contain_a_rare_mode_of_the_posterior_and_state_the_masses():
    model = two_mode_model(0.05)
    x = seeded(2, 1)
    figure = pv.compare(exact.Grid(model), one_mode_guide, x, split=False, num_particles=100).plot()
    for ax in figure.axes:
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
        assert ax.get_xlim()[0] < -6 - 2.4 * 0.2  # the circle with 95 % of the mass of this mode
        assert ax.get_xlim()[1] > 2.4
    assert "50 % and 95 %" in figure.legends[0].get_title().get_text()


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("NormalNormal", ("z", "density")),
        ("MixturePrior", ("z[0]", "z[1]")),
        ("factor analysis", ("z[0]", "z[1]")),
    ],
)
def test_plot_in_one_two_and_three_dimensions(name, labels):
    model = MODELS[name]
    figure = pv.compare(
        model, guide_of(model.posterior), model.sample(5), split=False, num_particles=500
    ).plot(3)
    assert [ax.get_title() for ax in figure.axes] == ["datum 0", "datum 1", "datum 2"]
    assert all(ax.collections or ax.lines for ax in figure.axes)
    assert {(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes} == {labels}


def test_pointwise_identity_is_exact_at_any_z_and_the_correction_changes_sign():
    x, guide = FA.sample(5), diagonal(0.2, 0.8)
    z = 2 * seeded(50, 5, 3)
    identity = pointwise_identity(FA, guide, x, z=z)
    torch.testing.assert_close(identity.log_evidence, FA.log_evidence(x).expand(50, 5), rtol=0, atol=1e-8)
    torch.testing.assert_close(identity.log_weight + identity.correction, identity.log_evidence)
    best = FA.mean_field(x).base_dist
    draws = best.loc + 0.2 + 0.8 * best.scale * seeded(20_000, 5, 3)
    correction = pointwise_identity(FA, guide, x, z=draws).correction
    assert ((correction > 0).any(0) & (correction < 0).any(0)).all()
    error = correction.std(0) / 20_000**0.5
    kl = pv.compare(FA, guide, x, split=False).gap
    assert ((correction.mean(0) - kl).abs() < 4.5 * error).all()


def test_free_energy_is_divergence_minus_log_evidence():
    x, guide = FA.sample(5), diagonal(0.2, 0.8)
    energy = pv.free_energy(FA, guide, x, num_particles=20_000)
    kl = pv.compare(FA, guide, x, split=False).gap
    assert ((energy.free_energy - (kl - FA.log_evidence(x))).abs() < 4.5 * energy.free_energy_se).all()
    s = 0.8 * FA.mean_field(x).base_dist.scale.expand(5, 3)
    torch.testing.assert_close(energy.entropy, (s.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1))
    torch.testing.assert_close(energy.bits_per_dimension, energy.free_energy / (6 * math.log(2)))
    energy = pv.free_energy(FA, guide_of(FA.posterior), x)
    assert ((energy.free_energy + FA.log_evidence(x)).abs() < 4.5 * energy.free_energy_se + 1e-9).all()
    # an entropy without closed form is estimated from the same draws
    mixture = MODELS["MixturePrior"]
    y = mixture.sample(4)
    drawn = pv.free_energy(mixture, guide_of(mixture.posterior), y)
    torch.testing.assert_close(drawn.free_energy, -mixture.log_evidence(y), rtol=0, atol=1e-8)


def test_wasserstein_is_its_closed_form():
    a, b = (
        torch.distributions.MultivariateNormal(seeded(4, 3, seed=i), oracles.covariance(3, i))
        for i in range(2)
    )
    a_half, b_cov = (torch.linalg.eigh(g.covariance_matrix[0]) for g in (a, b))
    root = a_half.eigenvectors @ torch.diag(a_half.eigenvalues.sqrt()) @ a_half.eigenvectors.mT
    cross = torch.linalg.eigvalsh(root @ b.covariance_matrix[0] @ root).sqrt().sum()
    square = (a.loc - b.loc).square().sum(-1) + a_half.eigenvalues.sum() + b_cov.eigenvalues.sum() - 2 * cross
    torch.testing.assert_close(wasserstein(a, b) ** 2, square)
    univariate = [
        torch.distributions.MultivariateNormal(torch.tensor([m]), torch.tensor([[s**2]]))
        for m, s in ((1.0, 2.0), (4.0, 0.5))
    ]
    assert wasserstein(*univariate).item() == pytest.approx(math.sqrt(9 + 2.25), rel=1e-6)


def test_compare_is_deterministic_and_leaves_the_random_state_unchanged():
    x = FA.sample(3)
    state = torch.get_rng_state()
    first, second = (pv.compare(FA, diagonal(), x, num_particles=100) for _ in range(2))
    assert torch.equal(first.coverage, second.coverage)
    assert torch.equal(first.split.amortization, second.split.amortization)
    assert torch.equal(torch.get_rng_state(), state)


def auxiliary_guide(x):
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(u.unsqueeze(-1).double().expand(*u.shape, 3), 0.5).to_event(1))


def test_compare_takes_numpy_arrays():
    x = FA.sample(3)
    torch.set_default_dtype(torch.double)
    try:
        assert torch.equal(
            pv.compare(FA, diagonal(), x.numpy(), split=False).gap,
            pv.compare(FA, diagonal(), x, split=False).gap,
        )
    finally:
        torch.set_default_dtype(torch.float)


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.compare(two_site_model, two_site_guide, torch.zeros(3, 6)), "has no posterior"),
        (lambda: pv.compare(MODELS["FiniteMixture"], discrete_guide, torch.zeros(3, 2).double()), "discrete"),
        (lambda: pv.compare(FA, lambda x: None, FA.sample(3)), "no site 'z'"),
        (lambda: pv.split_gap(FA, lambda x: None, FA.sample(3)), "no site 'z'"),
        (lambda: pv.compare_guides(FA, {}, FA.sample(3)), "got no guides"),
        (lambda: pv.compare(FA, auxiliary_guide, FA.sample(3)), "'u' is not in the model"),
        (lambda: pv.free_energy(FA, auxiliary_guide, FA.sample(3)), "'u' is not in the model"),
        (lambda: pv.compare(FA, diagonal(), FA.sample(3), num_particles=1), "≥ 2"),
        (lambda: pv.compare(FA, diagonal(), torch.zeros(3, 5)), r"expected x of shape \(batch, 6\)"),
    ],
)
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
