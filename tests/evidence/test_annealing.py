"""Annealed importance sampling, SMC, BDMC and reciprocal importance sampling: unbiasedness, and gaps in
closed form."""

import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_vae import evidence, exact
from pyro_vae.evidence import HMC, Annealing, Simulated, Transition
from tests.support.oracles import seeded

TOY = exact.LinearGaussian(seeded(4, 2), noise_scale=0.9)
PLAIN = exact.LinearGaussian(torch.tensor([[1.0], [0.5]]).double(), noise_scale=1.0)


class IndependentDraws(Transition):
    """Independent draws from f_β of a linear Gaussian model, N(Λ⁻¹ β Wᵀ x/σ², Λ⁻¹), Λ = I + β Wᵀ W/σ²."""

    def __init__(self, toy):
        self.toy = toy

    def move(self, path, point, beta):
        scaled = self.toy.weight / self.toy.noise_scale.unsqueeze(-1)
        precision = torch.eye(path.dim).double() + beta * scaled.mT @ scaled
        linear = beta * (path.batch.args[0] / self.toy.noise_scale) @ scaled
        mean = torch.linalg.solve(precision, linear.mT).mT
        u = dist.MultivariateNormal(mean, precision_matrix=precision).sample((len(point.u),))
        return path.at(u), torch.ones_like(point.log_base)


def expected_log_likelihood(toy, x, mean, covariance):
    scaled = toy.weight / toy.noise_scale.unsqueeze(-1)
    square = (((x - mean @ toy.weight.mT) / toy.noise_scale) ** 2).sum(-1) + torch.einsum(
        "di,ij,dj->", scaled, covariance, scaled
    )
    return -0.5 * square


def test_expected_gap_with_independent_draws_is_j_over_k():
    """The expected gap of one chain under a uniform schedule is [E_post ℓ − E_prior ℓ]/K, for each datum."""
    data = evidence.simulate(TOY, TOY.sample(4000))
    (x,), k = data.data, 8
    annealing = Annealing(k, num_chains=1, schedule="uniform", transition=IndependentDraws(TOY))
    lower = evidence.ais(TOY, x, annealing=annealing, seed=1)
    upper = evidence.reverse_ais(TOY, data, annealing=annealing, seed=2)
    posterior = TOY.posterior(x)
    j = expected_log_likelihood(TOY, x, posterior.mean, torch.linalg.inv(TOY.precision))
    j = j - expected_log_likelihood(TOY, x, torch.zeros(1, 2).double(), torch.eye(2).double())
    excess = upper.log_evidence - lower.log_evidence - j / k
    assert abs(excess.mean()) < 4 * excess.std() / 4000**0.5
    truth = TOY.log_evidence(x)
    for weight in ((lower.log_evidence - truth).exp(), (truth - upper.log_evidence).exp()):
        assert abs(weight.mean() - 1) < 4 * weight.std() / 4000**0.5
    assert (j / k).mean() > 0.3  # the gap is well above the noise


@dataclass(frozen=True)
class AdaptiveHMC(HMC):
    """HMC that adapts its step sizes to the acceptance rate during the weighted run, as some codes do."""

    def tuned(self, path, betas):
        return self

    def move(self, path, point, beta):
        step = self.__dict__.setdefault("step", torch.full_like(point.log_base[0], 1.5))
        moved, rate = self.leap(path, point, beta, step)
        self.__dict__["step"] = torch.where(rate[0] > 0.9, step * 3, step / 3).clamp(max=4.0)
        return moved, rate


def weights_of_short_runs(transition, n=10_000):
    """p̂(x) / p(x) of n independent runs on the same datum."""
    x = torch.tensor([[2.5, 2.0]]).double().expand(n, -1)
    result = evidence.ais(
        PLAIN,
        x,
        annealing=Annealing(num_temperatures=20, num_chains=1, schedule="uniform", transition=transition),
        max_bytes=2**40,
        seed=5,
    )
    return (result.log_evidence - PLAIN.log_evidence(x[:1])).exp()


def standard_errors_from_one(weights):
    """|mean − 1| in standard errors of the mean."""
    return abs(weights.mean().item() - 1) / (weights.std().item() / len(weights) ** 0.5)


def test_short_runs_with_fixed_step_sizes_are_unbiased():
    weights = weights_of_short_runs(HMC(num_leapfrog=2))
    assert standard_errors_from_one(weights) < 4
    for b in (0.1, 0.5, 1.0, 2.0):
        frequency, bound = (weights.log() > b).double().mean().item(), math.exp(-b)
        assert frequency <= bound + 4 * (bound / len(weights)) ** 0.5


def test_short_runs_with_adaptive_step_sizes_are_biased():
    assert standard_errors_from_one(weights_of_short_runs(AdaptiveHMC(num_leapfrog=2))) > 8


@pytest.mark.parametrize(
    ("annealing", "use_guide"),
    [
        (Annealing(60, num_chains=4), False),
        (Annealing(60, num_chains=4, schedule="sigmoid"), False),
        (Annealing(10, num_chains=4), True),
        (Annealing(num_chains=4, schedule=torch.tensor([0.0, 0.1, 0.4, 1.0])), False),
    ],
    ids=["fitted", "sigmoid", "guide", "tensor"],
)
def test_ais_is_unbiased_for_every_schedule_and_base(annealing, use_guide):
    guide = None
    if use_guide:

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(TOY.posterior(x).mean, 0.7).to_event(1))

    x = TOY.sample(1).expand(400, -1)
    result = evidence.ais(TOY, x, start=guide, annealing=annealing)
    excess = result.log_evidence - TOY.log_evidence(x[:1])
    assert standard_errors_from_one(excess.exp()) < 4
    assert excess.mean() < 4 * excess.std() / 20
    assert result.bound == "lower"
    if annealing.num_temperatures > 3:
        assert 0.5 < result.acceptance.mean() < 0.8  # the target is 0.65


@pytest.mark.slow
def test_ais_with_many_temperatures_is_close_to_log_evidence():
    """`python -m benchmarks.evidence toys` runs the same model with more temperatures."""
    toy = exact.LinearGaussian(0.3 * seeded(100, 10), noise_scale=1.0)
    x = toy.sample(40)
    result = evidence.ais(toy, x, annealing=Annealing(num_temperatures=200, num_chains=16))
    assert abs((result.log_evidence - toy.log_evidence(x)).mean()) < 0.25


def test_smc_is_unbiased_and_its_standard_error_is_accurate():
    x = TOY.sample(1).expand(400, -1)
    result = evidence.smc(TOY, x, annealing=Annealing(num_temperatures=8, num_chains=20), threshold=0.7)
    excess = result.log_evidence - TOY.log_evidence(x[:1])
    assert standard_errors_from_one(excess.exp()) < 4
    assert result.log_evidence_se.square().mean().sqrt().item() == pytest.approx(
        excess.std().item(), rel=0.25
    )


def test_bdmc_bounds_log_evidence_from_both_sides():
    result = evidence.bdmc(TOY, TOY.sample(60), annealing=Annealing(num_temperatures=30, num_chains=4))
    truth = TOY.log_evidence(*evidence.simulate(TOY, TOY.sample(60)).data)
    assert result.lower.mean < result.upper.mean
    assert (result.lower.log_evidence - truth).mean() < 0.1
    assert (result.upper.log_evidence - truth).mean() > -0.1
    assert "data simulated from the model" in str(result)


@pytest.mark.slow
def test_bdmc_on_given_pairs_equals_bdmc_on_simulated_data():
    """Latents of other names or shapes than the model's raise."""
    data = evidence.simulate(TOY, TOY.sample(30))
    (x,), z = data.data, data.latents["z"]
    annealing = Annealing(4, num_chains=2)
    expected = evidence.bdmc(TOY, TOY.sample(30), annealing=annealing)
    for given in (x, (x,), {"x": x}):
        result = evidence.bdmc(TOY, Simulated(given, {"z": z}), annealing=annealing)
        torch.testing.assert_close(result.gap, expected.gap, rtol=0, atol=0)
    for latents, message in (
        ({"u": z}, r"no latent 'z', which the model samples; got \['u'\]"),
        ({"z": z[:1]}, r"'z' of shape \(30, 2\) but got \(1, 2\)"),
        ({"z": z[:20]}, r"'z' of shape \(30, 2\) but got \(20, 2\)"),
        ({"z": z[:, :1]}, r"'z' of shape \(30, 2\) but got \(30, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evidence.reverse_ais(TOY, Simulated(x, latents), annealing=annealing)
    with pytest.raises(
        ValueError, match=r"reverse_ais: expected simulated data with their latents.*but got Tensor"
    ):
        evidence.reverse_ais(TOY, x, annealing=annealing)


class CountingHMC(HMC):
    """HMC that counts the moves of all chains."""

    moves = 0

    def leap(self, path, point, beta, step):
        CountingHMC.moves += len(point.u)
        return super().leap(path, point, beta, step)


@pytest.mark.slow
def test_pilot_run_costs_no_more_than_the_weighted_run():
    """At 100 temperatures and 4 chains. Acceptance and bias agree with those of a full pilot run."""
    x = TOY.sample(50)  # one chunk
    truth, results = TOY.log_evidence(x), {}
    for name, transition in (("limited", CountingHMC()), ("full", CountingHMC())):
        CountingHMC.moves = 0
        if name == "full":
            object.__setattr__(transition, "limited", lambda num_moves, t=transition: t)
        results[name] = evidence.ais(
            TOY, x, annealing=Annealing(num_temperatures=100, num_chains=4, transition=transition)
        )
        if name == "limited":
            assert CountingHMC.moves < 2.05 * 99 * 4
        assert 0.55 < results[name].acceptance.mean() < 0.8
    errors = [truth - estimate.log_evidence for estimate in results.values()]
    assert abs(errors[0].mean() - errors[1].mean()) < 4 * ((errors[0].var() + errors[1].var()) / 50).sqrt()


@pytest.mark.slow
def test_ais_is_close_to_log_evidence_for_constrained_and_enumerated_latents():
    """A Gamma–Poisson model, and a mixture whose label is summed out."""
    poisson = exact.GammaPoisson(4, concentration=2.5, rate=0.8)
    x = poisson.sample(60)
    result = evidence.ais(poisson, x, annealing=Annealing(num_temperatures=40))
    assert abs((result.log_evidence - poisson.log_evidence(x)).mean()) < 0.05
    weights, locs = torch.tensor([0.3, 0.7]).double(), torch.tensor([-2.0, 1.0]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(locs[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-4, 4, 60).double()
    truth = torch.logsumexp(dist.Normal(locs, 1.25**0.5).log_prob(x.unsqueeze(1)) + weights.log(), 1)
    for program in (model, config_enumerate(model)):
        result = evidence.ais(program, x, annealing=Annealing(num_temperatures=40))
        assert abs((result.log_evidence - truth).mean()) < 0.05
    sandwich = evidence.bdmc(model, x, annealing=Annealing(num_temperatures=20))
    assert -0.1 < sandwich.gap.mean() < 0.3


def test_reciprocal_importance_is_close_to_log_evidence():
    x = TOY.sample(40)
    truth = TOY.log_evidence(x)
    by_exact_draws = evidence.reciprocal_importance(TOY, x)
    by_hmc = evidence.reciprocal_importance(lambda x: TOY(x), x)
    assert (by_exact_draws.bound, by_hmc.bound) == ("upper", "none")
    for result in (by_exact_draws, by_hmc):
        assert (result.log_evidence - truth).abs().max() < 0.1
    wide = exact.LinearGaussian(seeded(8, 5), noise_scale=1.0)
    with pytest.raises(ValueError, match="the model has 5 latent dimensions per datum; expected at most 4"):
        evidence.reciprocal_importance(wide, wide.sample(3))


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch):
    x, file = TOY.sample(24), tmp_path / "ais.safetensors"
    options = {"annealing": Annealing(15, num_chains=2), "max_bytes": 20_000}
    expected = evidence.ais(TOY, x, **options)
    move, moves = HMC.move, []

    def interrupted(self, *args):
        moves.append(args)
        if len(moves) == 40:
            raise KeyboardInterrupt
        return move(self, *args)

    monkeypatch.setattr(HMC, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evidence.ais(TOY, x, resume=file, **options)
    result = evidence.ais(TOY, x, resume=file, **options)
    assert torch.equal(result.log_evidence, expected.log_evidence)
    with pytest.raises(ValueError, match="belongs to another run"):
        evidence.ais(TOY, x, resume=file, **options | {"annealing": Annealing(16, num_chains=2)})
    with pytest.raises(ValueError, match=rf"{file.name} belongs to another run.*max_bytes"):  # other chunks
        evidence.ais(TOY, x, resume=file, **options | {"max_bytes": 40_000})


@pytest.mark.parametrize("schedule", ["uniform", "sigmoid"])
def test_schedules_increase_from_0_to_1(schedule):
    betas = Annealing(50, schedule=schedule).betas
    assert betas.shape == (51,)
    assert (betas[0], betas[-1]) == (0, 1)
    assert (betas.diff() > 0).all()


def test_model_that_counts_dimensions_from_the_left_raises():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.softmax(z, 1)[..., 0], 0.1), obs=x)

    with pytest.raises(ValueError, match="counts dimensions from the right"):
        evidence.ais(model, torch.linspace(0, 1, 4).double())


def test_bounded_latents_have_the_exact_evidence_and_bounds_that_depend_on_data_raise():

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.tensor(-1.0).double(), 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-1, 2, 30).double()
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = ((normal.cdf((2 - x) / 0.5) - normal.cdf((-1 - x) / 0.5)) / 3).log()
    result = evidence.ais(model, x, annealing=Annealing(num_temperatures=40))
    assert abs((result.log_evidence - truth).mean()) < 0.05

    def varying(x, top):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match="the support of 'z' depends on the datum"):
        evidence.ais(varying, (x, x + 2))


@pytest.mark.slow
def test_proposals_outside_the_support_are_rejected():
    """A Dirichlet with a small concentration: single precision rounds draws to the corners of the simplex."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.full((5,), 0.1)))
            pyro.sample("x", dist.Categorical(z), obs=x)

    result = evidence.ais(
        model, torch.tensor([0, 1, 2, 4]), annealing=Annealing(num_temperatures=60, num_chains=64)
    )
    assert ((result.log_evidence - math.log(1 / 5)).abs() < 5 * result.log_evidence_se + 0.05).all()


def test_tensor_schedule_sets_the_number_of_temperatures():
    betas = torch.tensor([0.0, 0.1, 0.1, 1.0])
    annealing = Annealing(schedule=betas)
    assert annealing.num_temperatures == 3
    assert torch.equal(annealing.betas, betas.double())
    result = evidence.ais(TOY, TOY.sample(2), annealing=Annealing(num_chains=2, schedule=betas))
    assert result.cost == 3 * 2 * HMC().cost
    assert "3 temperatures, 2 chains" in result.method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "cosine"},
            """schedule: expected "uniform", "sigmoid", "fitted" or a tensor .* but got 'cosine'""",
        ),
        ({"schedule": np.linspace(0, 1, 4)}, "schedule: expected .* or a tensor"),
        ({"schedule": torch.tensor([0.1, 1.0])}, "schedule: expected β from 0 to 1"),
        ({"schedule": torch.tensor([0.0, 0.9, 0.5, 1.0])}, "schedule: expected β from 0 to 1"),
        ({"schedule": torch.tensor([0.0, math.nan, 1.0])}, "schedule: expected β from 0 to 1"),
        ({"num_temperatures": 0}, "num_temperatures: expected a whole number, 1 or more, but got 0"),
        ({"num_temperatures": True}, "num_temperatures: expected a whole number, 1 or more, but got True"),
        ({"num_chains": 0}, "num_chains: expected a whole number, 1 or more, but got 0"),
        ({"num_chains": 2.5}, "num_chains: expected a whole number, 1 or more, but got 2.5"),
        ({"transition": None}, "transition: expected a Transition, such as .*, but got None"),
    ],
)
def test_invalid_annealing_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Annealing(**options)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="seed: expected a whole number"):
        evidence.ais(TOY, TOY.sample(3), seed=-1)
    with pytest.raises(ValueError, match="HMC: expected num_leapfrog ≥ 1"):
        HMC(num_leapfrog=0)

    def counts(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(1.0))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="'k'"):
        evidence.ais(counts, torch.zeros(3))


@pytest.mark.parametrize(
    "options",
    [
        {"num_leapfrog": 0},
        {"target_acceptance": 1.0},
        {"num_pilot": 0},
        {"pilot_moves": 0},
        {"pilot_temperatures": 0},
    ],
)
def test_hmc_options_out_of_range_raise(options):
    with pytest.raises(ValueError, match="HMC: expected"):
        evidence.HMC(**options)


def test_reciprocal_importance_without_moves_between_draws_raises():
    with pytest.raises(ValueError, match="thinning ≥ 1"):
        evidence.reciprocal_importance(TOY, TOY.sample(2), thinning=0)
