"""split_gap: the cost of the family and of the encoder, where both are known."""

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
    "name", ["factor analysis", "BayesianLinearRegression", "Funnel", "Banana", "LinearGaussianStateSpace"]
)
def test_the_search_reaches_the_closed_form(name):
    """A diagonal Gaussian far from its best, optimized per datum, ends within 1e-3 nats of the formula."""
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
        # the same noise at the optimum in closed form is a control variate: only the difference is estimated
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


def test_between_gaussians_the_split_is_in_closed_form():
    """The family's cost is that of the formula, and the shift is amortization: ½ δᵀΛδ."""
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
def test_the_closed_forms_that_models_know(name):
    """The best of the family has no amortization gap, and the search agrees."""
    model = MODELS[name]
    x = model.sample(4)
    kind, best = (
        (dist.LogNormal, model.log_normal) if name == "GammaPoisson" else (dist.Normal, model.mean_field)
    )
    if name == "LinearGaussianStateSpace":  # what it calls mean field is independent over time only

        def best(x):
            return dist.Normal(model._mean(x), model.precision.diagonal() ** -0.5).to_event(1)

    def shifted(x):
        q = best(x).base_dist
        return kind(q.loc + 0.2, q.scale * 0.7).to_event(1)

    exactly = pv.split_gap(model, guide_of(best), x, num_particles=10_000)
    assert exactly.steps == 0
    assert (exactly.amortization.abs() < 4.5 * exactly.amortization_se + 1e-9).all()
    known = pv.split_gap(model, guide_of(shifted), x, num_particles=10_000)
    pair = _PerDatumPair(model, guide_of(shifted), Batch((x,), {}))
    searched, _ = _optimize(pair, 1e-3, 5000)
    with torch.no_grad():
        draws = pair.elbo(searched, 10_000)
    error = draws.std(0) / 100
    assert ((model.log_evidence(x) - draws.mean(0) - known.approximation).abs() < 4.5 * error + 1e-3).all()
    torch.testing.assert_close(known.approximation, exactly.approximation)
    assert (known.amortization > 4 * known.amortization_se).all()


def encoder(kind, **options):
    return pv.Guide(kind(nets.MLP(6, (8,)), event_shape=3, **options)).double()


def test_a_family_that_is_held_back_is_searched():
    """A fixed scale, or a floor above the best one, is part of the family: KL(q‖p) at S fixed is its cost."""
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


def test_without_a_known_evidence_only_the_amortization_is_told():
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
def test_every_family_that_is_known_by_its_parameters_improves(q):
    x = FA.sample(4)
    split = pv.split_gap(FA, guide_of(q), x)
    assert (split.amortization > 4 * split.amortization_se).all()
    if "MultivariateNormal" in type(q(x)).__name__ and "Low" not in type(q(x)).__name__:
        assert (split.approximation.abs() < 4.5 * split.approximation_se + 2e-3).all()


class Wider(torch.nn.Module):
    """A guide with an encoder of ours, read another way: it draws from shifted data."""

    def __init__(self):
        super().__init__()
        self.encoder = conditionals.Normal(nets.MLP(6, (8,)), event_shape=3).double()

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(0.2 * x - 1))


def test_the_split_is_of_what_the_guide_draws_from():
    report = pv.compare(FA, Wider(), FA.sample(5), num_particles=4000)
    split = report.split
    error = torch.hypot(split.approximation_se, torch.hypot(split.amortization_se, report.gap_se))
    assert ((split.approximation + split.amortization - report.gap).abs() < 4.5 * error + 1e-9).all()


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def chain_guide(loc=0.0, scale=1.0):
    """The exact posterior of the chain, what it says of b shifted, and of a | b stretched."""

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Normal(x * 1.09 / 2.09 + loc, (1.09 / 2.09) ** 0.5))
            pyro.sample("a", dist.Normal(b / 1.09, scale * (0.09 / 1.09) ** 0.5))

    return guide


def test_sites_that_depend_on_each_other_go_on_doing_so():
    """With them the family holds the exact posterior: all of the gap is amortization, the sum of the two
    divergences."""
    x = seeded(3)
    report = pv.compare(exact.Grid(chain), chain_guide(), x, num_particles=500)
    assert report.gap.abs().max() < 1e-5
    assert (report.split.approximation.abs() < 4.5 * report.split.approximation_se + 1e-3).all()
    loc, scale = 0.4, 1.7
    split = pv.split_gap(exact.Grid(chain), chain_guide(loc, scale), x, num_particles=20_000)
    expected = loc**2 / 2 * 2.09 / 1.09 + (scale**2 - 1) / 2 - torch.tensor(scale).log()
    assert ((split.amortization - expected).abs() < 4.5 * split.amortization_se + 1e-3).all()
    assert (split.approximation.abs() < 4.5 * split.approximation_se + 1e-3).all()


def test_a_location_that_is_held_back_is_searched():
    """A mean that must be positive, where the best is negative: the closed form would be another family's."""
    x = FA.sample(4)
    held = pv.split_gap(
        FA, encoder(conditionals.Normal, loc_constraint=constraints.positive), x, max_steps=1000
    )
    assert held.steps > 0
    assert (held.approximation > FA.mean_field_gap(x) + 4.5 * held.approximation_se)[
        (FA.mean_field(x).mean < -0.1).any(-1)
    ].all()


def test_what_the_guide_adds_to_its_encoder_stays():
    """The scale is the guide's own, not the encoder's: only locations are free, whatever its value."""
    x, network = FA.sample(4), conditionals.Normal(nets.MLP(6, (8,)), event_shape=3, scale=0.5).double()

    def splits(factor):
        guide = guide_of(lambda x: dist.Normal(network(x).base_dist.loc, 0.5 * factor).to_event(1))
        return pv.split_gap(FA, guide, x, max_steps=1000)

    one, close = splits(1.0), splits(1.01)
    assert one.steps > 0
    error = torch.hypot(one.approximation_se, close.approximation_se)
    assert ((one.approximation - close.approximation).abs() < 4.5 * error + 0.02).all()


def test_arguments_by_keyword_and_more_of_them():
    x, guide = FA.sample(4), encoder(conditionals.Normal, scale=0.5)
    for model in (FA, lambda x: FA(x)):
        by_position, by_name = (pv.split_gap(model, guide, data, max_steps=100) for data in (x, {"x": x}))
        torch.testing.assert_close(by_position.amortization, by_name.amortization)
    diagonal_gap = pv.split_gap(FA, encoder(conditionals.Normal), {"x": x})
    assert diagonal_gap.steps == 0

    class Conditioned(exact.LinearGaussian):
        """A user's own: the bias comes with the datum."""

        def forward(self, x, c):
            return super().forward(x - c)

        def posterior(self, x, c):
            return super().posterior(x - c)

        def log_evidence(self, x, c):
            return super().log_evidence(x - c)

        best = exact.ExactModel.best

    model = Conditioned(FA.weight, noise_scale=FA.noise_scale)

    def guide_of_two(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x[:, :3], 0.5 * torch.eye(3, dtype=torch.double)))

    split = pv.split_gap(model, guide_of_two, (x, 0.1 * x))
    assert split.steps == 0
    assert split.approximation.abs().max() == 0
    assert (split.amortization > 0).all()


def test_a_data_plate_further_left():
    class Rows(exact.LinearGaussian):
        def forward(self, x):
            with pyro.plate("data", len(x), dim=-2):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", self.decoder(z), obs=x.unsqueeze(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, None, :3], 0.5).to_event(1))

    x, model = FA.sample(4), Rows(FA.weight, noise_scale=FA.noise_scale, bias=FA.bias)
    split = pv.split_gap(model, guide, x)
    torch.testing.assert_close(split.approximation, FA.mean_field_gap(x), rtol=0, atol=1e-9)
    searched = pv.split_gap(lambda x: model(x), guide, x, log_evidence=FA.log_evidence(x))
    assert searched.steps > 0
    assert (
        (searched.approximation - split.approximation).abs() < 4.5 * searched.approximation_se + 1e-3
    ).all()


def test_a_mask_or_a_factor_in_the_guide_has_no_closed_form():
    x = FA.sample(4)

    def halved(x):
        with poutine.mask(mask=False):
            diagonal()(x)

    report = pv.compare(FA, halved, x, num_particles=500, split=False, check=False)
    assert (report.gap_se > 0).all()  # drawn
    assert pv.split_gap(FA, halved, x, max_steps=100, check=False).steps > 0


def test_a_search_that_ends_below_its_start_goes_back():
    """Between two far modes: the guide sits in the heavier one, and a step size of 0.05 cannot leave it; one
    that starts right keeps what it has."""
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
    worse = {name: {k: v + 1.0 for k, v in own.items()} for name, own in pair.start.items()}
    kept = {name: dict(own) for name, own in worse.items()}
    _restore_worse(pair, kept)
    assert all(torch.equal(kept[name][k], v) for name, own in pair.start.items() for k, v in own.items())
    off = _PerDatumPair(prior, guide_of(lambda x: dist.Normal(x - 2, 1.0).to_event(1)), Batch((x,), {}))
    moved = {"z": {"loc": torch.full((3, 1), -1.0).double(), "scale": torch.full((3, 1), -2.3).double()}}
    kept = {name: dict(own) for name, own in moved.items()}
    _restore_worse(off, kept)
    assert all(torch.equal(kept["z"][k], v) for k, v in moved["z"].items())


def test_a_search_cut_short_says_so(caplog):
    pv.split_gap(lambda x: FA(x), diagonal(2.0), FA.sample(2), max_steps=100, num_particles=100)
    assert "the ELBO still improves after 100 steps" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, "num_particles ≥ 2"),
        ({"log_evidence": torch.zeros(5)}, r"expected \(3,\), one number per datum"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pv.split_gap(FA, diagonal(), FA.sample(3), **options)


def test_a_flow_is_split_by_its_readouts():
    model = oracles.make_models()["factor analysis"].float()
    x = model.sample(4)
    guide = pv.Guide(flows.AffineAutoregressive(nets.MLP(6, (8,)), event_shape=3))
    report = pv.compare(model, guide, x, num_particles=4000)
    split = report.split
    error = torch.hypot(split.approximation_se, torch.hypot(split.amortization_se, report.gap_se))
    assert (split.amortization > 4 * split.amortization_se).all()
    assert ((split.approximation + split.amortization - report.gap).abs() < 4.5 * error + 1e-9).all()
