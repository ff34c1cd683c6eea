"""split_gap of guides with known approximation and amortization gaps."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, exact, flows, nets
from pyro_vae.data.batches import Batch
from pyro_vae.diagnostics.families import as_gaussian
from pyro_vae.diagnostics.gap import _optimize, _PerDatumPair, _restore_worse
from tests.support import oracles
from tests.support.oracles import guide_of, seeded

MODELS = oracles.make_models()
FA = MODELS["factor analysis"]
diagonal = partial(oracles.diagonal, FA)


@pytest.mark.parametrize(
    "name",
    [
        "factor analysis",
        "Funnel",
        pytest.param("BayesianLinearRegression", marks=pytest.mark.slow),
        pytest.param("Banana", marks=pytest.mark.slow),
        pytest.param("LinearGaussianStateSpace", marks=pytest.mark.slow),
    ],
)
def test_optimized_family_reaches_the_closed_form(name):
    """A diagonal Gaussian optimized per datum is within 1e-3 nats of the closed form."""
    model = MODELS[name]
    x = model.sample(3)

    def q(x):
        return dist.Normal(torch.full((len(x), *model.latent_shape), 0.3, dtype=torch.double), 0.5).to_event(
            1
        )

    pair = _PerDatumPair(model, guide_of(q), Batch((x,), {}))
    best, _ = _optimize(pair, 1e-3, 5000)
    best = poutine.trace(pair.shifted_guide(best)).get_trace(x).nodes["z"]["fn"]
    if name in ("Funnel", "Banana"):
        formula = model.mean_field_gap(x)
        z = best.base_dist.loc + best.base_dist.scale * seeded(200_000, 1, *model.latent_shape)
        # the closed-form optimum at the same noise is a control variate
        optimum = model.mean_field(x).base_dist
        z_optimum = optimum.loc + optimum.scale * seeded(200_000, 1, *model.latent_shape)
        terms = best.log_prob(z) - model.prior().log_prob(z)
        at_optimum = optimum.log_prob(z_optimum).sum(-1) - model.prior().log_prob(z_optimum)
        gap = formula + (terms - at_optimum).mean(0)
    else:
        gap = torch.distributions.kl_divergence(as_gaussian(best, 3), as_gaussian(model.posterior(x), 3))
        diagonal = model.precision.diagonal()
        formula = 0.5 * (diagonal.log().sum() - torch.logdet(model.precision))
    assert (gap - formula).abs().max() < 1e-3


SHIFT = 0.3


def test_split_between_gaussians_is_in_closed_form():
    """A mean shifted by δ from the mean-field optimum has an amortization gap of ½ δᵀΛδ."""
    x = FA.sample(8)
    split = pv.split_gap(FA, diagonal(SHIFT), x)
    torch.testing.assert_close(split.approximation, FA.mean_field_gap(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        split.amortization, (0.5 * SHIFT**2 * FA.precision.sum()).expand(8), rtol=0, atol=1e-9
    )
    assert split.steps == 0
    full = pv.split_gap(
        FA, guide_of(lambda x: dist.MultivariateNormal(x[:, :3], 0.5 * torch.eye(3).double())), x
    )
    assert full.approximation.abs().max() == full.amortization_se.max() == 0


@pytest.mark.parametrize("name", ["Funnel", "Banana", "GammaPoisson", "LinearGaussianStateSpace"])
@pytest.mark.slow
def test_closed_form_of_exact_models_equals_the_optimized_split(name):
    """The optimum of the family has no amortization gap, and the optimization reaches the same ELBO."""
    model = MODELS[name]
    x = model.sample(4)
    kind, best = (
        (dist.LogNormal, model.log_normal) if name == "GammaPoisson" else (dist.Normal, model.mean_field)
    )
    if name == "LinearGaussianStateSpace":  # its mean_field is independent over time only

        def best(x):
            return dist.Normal(model._mean(x), model.precision.diagonal() ** -0.5).to_event(1)

    def shifted(x):
        q = best(x).base_dist
        return kind(q.loc + 0.2, q.scale * 0.7).to_event(1)

    optimal = pv.split_gap(model, guide_of(best), x, num_particles=10_000)
    assert optimal.steps == 0
    assert (optimal.amortization.abs() < 4.5 * optimal.amortization_se + 1e-9).all()
    suboptimal = pv.split_gap(model, guide_of(shifted), x, num_particles=10_000)
    pair = _PerDatumPair(model, guide_of(shifted), Batch((x,), {}))
    optimized, _ = _optimize(pair, 1e-3, 5000)
    with torch.no_grad():
        draws = pair.elbo(optimized, 10_000)
    error = draws.std(0) / 100
    assert (
        (model.log_evidence(x) - draws.mean(0) - suboptimal.approximation).abs() < 4.5 * error + 1e-3
    ).all()
    torch.testing.assert_close(suboptimal.approximation, optimal.approximation)
    assert (suboptimal.amortization > 4 * suboptimal.amortization_se).all()


def encoder(kind, **options):
    return pv.Guide(kind(nets.MLP(6, (8,)), event_shape=3, **options)).double()


@pytest.mark.slow
def test_family_with_restricted_scale_is_optimized():
    """A fixed scale, or a ``min_scale`` above the optimal scale, belongs to the family. With a fixed
    covariance S the approximation gap is KL(q‖p) at the optimal mean."""
    x = FA.sample(4)
    scale = torch.tensor([0.5, 0.9, 0.7], dtype=torch.double)
    s = torch.diag(scale**2)
    cost = 0.5 * (torch.trace(FA.precision @ s) - torch.logdet(FA.precision @ s) - 3)
    split = pv.split_gap(FA, encoder(conditionals.Normal, scale=scale), x, num_particles=20_000)
    assert split.steps > 0
    assert ((split.approximation - cost).abs() < 4.5 * split.approximation_se + 1e-3).all()
    assert pv.split_gap(FA, encoder(conditionals.Normal), x).steps == 0
    assert pv.split_gap(FA, encoder(conditionals.MultivariateNormal), x).steps == 0
    floored = pv.split_gap(FA, encoder(conditionals.Normal, min_scale=2.0), x, max_steps=500)
    assert floored.steps > 0
    assert (floored.approximation > FA.mean_field_gap(x) + 0.1).all()


def test_approximation_is_nan_without_log_evidence():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", FA.prior())
            pyro.sample("x", FA.decoder(z), obs=x)

    split = pv.split_gap(model, diagonal(0.3), FA.sample(4))
    assert split.approximation.isnan().all()
    assert (split.amortization > 0).all()


@pytest.mark.parametrize(
    "q",
    [
        lambda x: dist.Laplace(x[:, :3] * 0.1, 0.7).to_event(1),
        lambda x: dist.StudentT(5.0, x[:, :3] * 0.1, 0.7).to_event(1),
        lambda x: dist.MultivariateNormal(x[:, :3] * 0.1, scale_tril=0.7 * torch.eye(3, dtype=torch.double)),
        lambda x: dist.LowRankMultivariateNormal(
            x[:, :3] * 0.1,
            0.1 * torch.ones(3, 1, dtype=torch.double),
            0.5 * torch.ones(3, dtype=torch.double),
        ),
    ],
    ids=["Laplace", "StudentT", "MultivariateNormal", "LowRank"],
)
@pytest.mark.slow
def test_optimization_of_every_supported_family_reduces_the_gap(q):
    x = FA.sample(4)
    split = pv.split_gap(FA, guide_of(q), x)
    assert (split.amortization > 4 * split.amortization_se).all()
    if "MultivariateNormal" in type(q(x)).__name__ and "Low" not in type(q(x)).__name__:
        assert (split.approximation.abs() < 4.5 * split.approximation_se + 2e-3).all()


class ShiftedInputGuide(torch.nn.Module):
    """A guide whose encoder reads transformed data."""

    def __init__(self):
        super().__init__()
        self.encoder = conditionals.Normal(nets.MLP(6, (8,)), event_shape=3).double()

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(0.2 * x - 1))


def test_split_of_a_guide_that_transforms_the_input_of_its_encoder():
    report = pv.compare(FA, ShiftedInputGuide(), FA.sample(5), num_particles=4000)
    split = report.split
    error = torch.hypot(split.approximation_se, torch.hypot(split.amortization_se, report.gap_se))
    assert ((split.approximation + split.amortization - report.gap).abs() < 4.5 * error + 1e-9).all()


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def chain_guide(loc=0.0, scale=1.0):
    """The exact posterior of the chain, with the mean of b shifted and the scale of a | b multiplied."""

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x * 1.09 / 2.09 + loc, (1.09 / 2.09) ** 0.5))
            pyro.sample("a", dist.Normal(b / 1.09, scale * (0.09 / 1.09) ** 0.5))

    return guide


@pytest.mark.slow
def test_split_keeps_the_dependence_between_sites():
    """The family contains the exact posterior, so the gap is amortization: the sum of the divergences of
    the two sites."""
    x = seeded(3)
    report = pv.compare(exact.Grid(chain), chain_guide(), x, num_particles=500)
    assert report.gap.abs().max() < 1e-5
    assert (report.split.approximation.abs() < 4.5 * report.split.approximation_se + 1e-3).all()
    loc, scale = 0.4, 1.7
    split = pv.split_gap(exact.Grid(chain), chain_guide(loc, scale), x, num_particles=20_000)
    expected = loc**2 / 2 * 2.09 / 1.09 + (scale**2 - 1) / 2 - torch.tensor(scale).log()
    assert ((split.amortization - expected).abs() < 4.5 * split.amortization_se + 1e-3).all()
    assert (split.approximation.abs() < 4.5 * split.approximation_se + 1e-3).all()


def test_family_with_restricted_location_is_optimized():
    """The location is positive but the optimum is negative, so the closed form does not apply."""
    x = FA.sample(4)
    restricted = pv.split_gap(
        FA, encoder(conditionals.Normal, loc_constraint=constraints.positive), x, max_steps=1000
    )
    assert restricted.steps > 0
    assert (restricted.approximation > FA.mean_field_gap(x) + 4.5 * restricted.approximation_se)[
        (FA.mean_field(x).mean < -0.1).any(-1)
    ].all()


@pytest.mark.slow
def test_scale_of_the_guide_outside_of_its_encoder_is_unchanged():
    """The guide sets its scale itself, so the split optimizes the location only."""
    x, network = FA.sample(4), conditionals.Normal(nets.MLP(6, (8,)), event_shape=3, scale=0.5).double()

    def splits(factor):
        guide = guide_of(lambda x: dist.Normal(network(x).base_dist.loc, 0.5 * factor).to_event(1))
        return pv.split_gap(FA, guide, x, max_steps=1000)

    unscaled, scaled = splits(1.0), splits(1.01)
    assert unscaled.steps > 0
    error = torch.hypot(unscaled.approximation_se, scaled.approximation_se)
    assert ((unscaled.approximation - scaled.approximation).abs() < 4.5 * error + 0.02).all()


def test_split_of_pairs_with_keyword_and_several_arguments():
    x, guide = FA.sample(4), encoder(conditionals.Normal, scale=0.5)
    for model in (FA, lambda x: FA(x)):
        by_position, by_name = (pv.split_gap(model, guide, data, max_steps=100) for data in (x, {"x": x}))
        torch.testing.assert_close(by_position.amortization, by_name.amortization)
    diagonal_gap = pv.split_gap(FA, encoder(conditionals.Normal), {"x": x})
    assert diagonal_gap.steps == 0

    class ConditionalLinearGaussian(exact.LinearGaussian):
        """A user-defined model with a bias for each datum."""

        def forward(self, x, c):
            return super().forward(x - c)

        def posterior(self, x, c):
            return super().posterior(x - c)

        def log_evidence(self, x, c):
            return super().log_evidence(x - c)

        best = exact.ExactModel.best

    model = ConditionalLinearGaussian(FA.weight, noise_scale=FA.noise_scale)

    def guide_of_two(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x[:, :3], 0.5 * torch.eye(3, dtype=torch.double)))

    split = pv.split_gap(model, guide_of_two, (x, 0.1 * x))
    assert split.steps == 0
    assert split.approximation.abs().max() == 0
    assert (split.amortization > 0).all()


def test_split_with_a_data_plate_at_dim_minus_2():
    class DataPlateAtMinus2(exact.LinearGaussian):
        def forward(self, x):
            with pyro.plate("data", len(x), dim=-2):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", self.decoder(z), obs=x.unsqueeze(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, None, :3], 0.5).to_event(1))

    x, model = FA.sample(4), DataPlateAtMinus2(FA.weight, noise_scale=FA.noise_scale, bias=FA.bias)
    split = pv.split_gap(model, guide, x)
    torch.testing.assert_close(split.approximation, FA.mean_field_gap(x), rtol=0, atol=1e-9)
    optimized = pv.split_gap(lambda x: model(x), guide, x, log_evidence=FA.log_evidence(x))
    assert optimized.steps > 0
    assert (
        (optimized.approximation - split.approximation).abs() < 4.5 * optimized.approximation_se + 1e-3
    ).all()


def test_guide_with_a_mask_has_no_closed_form():
    x = FA.sample(4)

    def masked_guide(x):
        with poutine.mask(mask=False):
            diagonal()(x)

    report = pv.compare(FA, masked_guide, x, num_particles=500, split=False, check=False)
    assert (report.gap_se > 0).all()
    assert pv.split_gap(FA, masked_guide, x, max_steps=100, check=False).steps > 0


def test_data_whose_elbo_decreased_are_reset():
    """Shifts away from the mode of the posterior are reset to zero; shifts toward it are unchanged."""
    prior = exact.MixturePrior(
        torch.tensor([0.9, 0.1]).double(),
        torch.tensor([[-3.0], [3.0]]).double(),
        0.1 * torch.eye(1).double(),
        weight=torch.eye(1).double(),
        noise_scale=5.0,
    )
    x = torch.zeros(3, 1, dtype=torch.double)
    at_mode = guide_of(lambda x: dist.Normal(x - 3, 0.1).to_event(1))
    pair = _PerDatumPair(prior, at_mode, Batch((x,), {}))
    worse = {name: {k: v + 1.0 for k, v in tensors.items()} for name, tensors in pair.start.items()}
    shifts = {name: dict(tensors) for name, tensors in worse.items()}
    _restore_worse(pair, shifts)
    assert all(
        torch.equal(shifts[name][k], v) for name, tensors in pair.start.items() for k, v in tensors.items()
    )
    far_pair = _PerDatumPair(prior, guide_of(lambda x: dist.Normal(x - 2, 1.0).to_event(1)), Batch((x,), {}))
    moved = {"z": {"loc": torch.full((3, 1), -1.0).double(), "scale": torch.full((3, 1), -2.3).double()}}
    shifts = {name: dict(tensors) for name, tensors in moved.items()}
    _restore_worse(far_pair, shifts)
    assert all(torch.equal(shifts["z"][k], v) for k, v in moved["z"].items())


def test_optimization_that_still_improves_logs_a_warning(caplog):
    pv.split_gap(lambda x: FA(x), diagonal(2.0), FA.sample(2), max_steps=100, num_particles=100)
    assert "the ELBO still improves after 100 steps" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, "num_particles ≥ 2"),
        ({"log_evidence": torch.zeros(5)}, r"expected \(3,\), one number per datum"),
    ],
)
def test_invalid_input_raises(options, message):
    with pytest.raises(ValueError, match=message):
        pv.split_gap(FA, diagonal(), FA.sample(3), **options)


@pytest.mark.slow
def test_split_of_a_flow_optimizes_its_readouts():
    model = oracles.make_models()["factor analysis"].float()
    x = model.sample(4)
    guide = pv.Guide(flows.AffineAutoregressive(nets.MLP(6, (8,)), event_shape=3))
    report = pv.compare(model, guide, x, num_particles=4000)
    split = report.split
    error = torch.hypot(split.approximation_se, torch.hypot(split.amortization_se, report.gap_se))
    assert (split.amortization > 4 * split.amortization_se).all()
    assert ((split.approximation + split.amortization - report.gap).abs() < 4.5 * error + 1e-9).all()
