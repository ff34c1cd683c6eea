"""Importance sampling: the bounds hold, and their bias and errors agree with theory."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import evidence, exact
from pyro_vae.numerics import log_mean_exp
from pyro_vae.pairs.log_weights import log_weights
from tests.support.oracles import seeded

TOY = exact.LinearGaussian(seeded(6, 2), noise_scale=0.8)


class Gaussian(torch.nn.Module):
    """A guide with the posterior mean and the given precision."""

    def __init__(self, toy, precision):
        super().__init__()
        self.toy, self.precision = toy, precision

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.MultivariateNormal(self.toy.posterior(x).mean, precision_matrix=self.precision)
            )


def chi_square(toy, precision):
    """χ²(p‖q) of Gaussians with the same mean."""
    log_dets = torch.logdet(torch.stack([toy.precision, precision, 2 * toy.precision - precision]))
    return math.expm1(log_dets[0] - 0.5 * log_dets[1] - 0.5 * log_dets[2])


@pytest.mark.parametrize("k", [2, 10, 50])
def test_lower_bounds_do_not_exceed_log_evidence(k):
    toy = exact.LinearGaussian(0.3 * seeded(100, k), noise_scale=1.0)
    x = toy.sample(50)
    truth, guide = toy.log_evidence(x), Gaussian(toy, 0.8 * toy.precision)
    for result in (
        evidence.prior_monte_carlo(toy, x, num_particles=500),
        evidence.importance(toy, guide, x, num_particles=500),
        evidence.importance(toy, guide, x, num_particles=1),
    ):
        excess = result.log_evidence - truth
        assert result.bound == "lower"
        assert excess.mean() < 3 * excess.std() / 50**0.5
        assert result.mean - truth.mean().item() < result.margin()


@pytest.mark.parametrize("num_particles", [16, 64])
def test_bias_is_minus_chi_square_over_two_k(num_particles):
    guide = Gaussian(TOY, TOY.precision * torch.tensor([[1.3, 1.0], [1.0, 1.2]]).double())
    x = TOY.sample(1).expand(40_000, -1)
    w = log_weights(TOY, guide, x, num_particles=num_particles, max_bytes=2**27) - TOY.log_evidence(x[:1])
    controlled = log_mean_exp(w) - (w.exp().mean(0) - 1)  # a control variate with mean 0
    chi2 = chi_square(TOY, guide.precision)
    error = controlled.std().item() / 200
    difference = abs(controlled.mean().item() + chi2 / (2 * num_particles))
    assert difference < 4 * error + 5 * chi2 / num_particles**2  # the next term is of order 1/K²


def test_lower_bound_satisfies_markovs_inequality():
    guide = Gaussian(TOY, 1.5 * TOY.precision)
    x = TOY.sample(1).expand(10_000, -1)
    excess = evidence.importance(TOY, guide, x, num_particles=3).log_evidence - TOY.log_evidence(x[:1])
    for b in (0.1, 0.5, 1.0, 2.0):
        frequency, bound = (excess > b).double().mean().item(), math.exp(-b)
        assert frequency <= bound + 4 * (bound / 10_000) ** 0.5
    assert (excess > 0.1).any()


def test_inverse_of_the_upper_bound_is_unbiased():
    guide = Gaussian(TOY, 0.7 * TOY.precision)
    data = evidence.simulate(TOY, TOY.sample(5000))
    upper = evidence.importance_upper(TOY, guide, data, num_particles=5)
    lower = evidence.importance(TOY, guide, data.data, num_particles=5)
    truth = TOY.log_evidence(*data.data)
    inverse = (truth - upper.log_evidence).exp()  # E 1/ŵ = 1/p
    assert abs(inverse.mean() - 1) < 4 * inverse.std() / 5000**0.5
    for gap in (upper.log_evidence - truth, truth - lower.log_evidence):
        assert gap.mean() > -4 * gap.std() / 5000**0.5
    assert upper.bound == "upper"
    assert upper.mean > lower.mean


def test_simulated_latents_are_independent_of_draws_at_the_same_seed():
    data = evidence.simulate(TOY, TOY.sample(6000))
    result = evidence.prior_monte_carlo(TOY, data.data, num_particles=3, max_bytes=2**40)
    weight = (result.log_evidence - TOY.log_evidence(*data.data)).exp()
    assert abs(weight.mean() - 1) < 5 * weight.std() / 6000**0.5


def test_delta_guide_gives_no_bound():
    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    result = evidence.importance(TOY, point, TOY.sample(5), num_particles=4)
    assert result.bound == "none"
    assert result.margin() == math.inf
    with pytest.raises(ValueError, match="its density at given latents is not known"):
        evidence.importance_upper(TOY, point, evidence.simulate(TOY, TOY.sample(5)))


def test_prior_monte_carlo_is_importance_sampling_from_the_prior():
    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", TOY.prior())

    x = TOY.sample(8)
    result, expected = evidence.prior_monte_carlo(TOY, x), evidence.importance(TOY, prior, x)
    torch.testing.assert_close(result.log_evidence, expected.log_evidence)
    assert result.ess.median() < 200


def test_simulate_draws_from_the_joint_distribution_and_invalid_models_raise():
    data = evidence.simulate(TOY, TOY.sample(20_000), seed=4)
    (x,), z = data.data, data.latents["z"]
    residual = x - z @ TOY.weight.mT
    torch.testing.assert_close(residual.std(0), torch.full((6,), 0.8).double(), rtol=0.02, atol=0)
    assert (torch.cov(z.mT) - torch.eye(2)).abs().max() < 5 * (2 / 20_000) ** 0.5
    with pytest.raises(
        ValueError, match=r"simulate: the value that the model observes at 'x'.*is not one of its arguments"
    ):
        evidence.simulate(lambda x: TOY(x + 1), x)

    def chain(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(5 * a, 0.1), obs=b)

    with pytest.raises(ValueError, match="the distribution of 'b' depends on an observed argument"):
        evidence.simulate(chain, (seeded(9), seeded(9, seed=1)))
    zeros = torch.zeros(5).double()
    with pytest.raises(ValueError, match=r"equals several of its arguments, \[0, 1\]"):
        evidence.simulate(lambda a, b: chain(a + 0, b), (zeros, zeros.clone()))


def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch):
    guide, x, file = Gaussian(TOY, 0.7 * TOY.precision), TOY.sample(40), tmp_path / "a" / "run.safetensors"
    options = {"num_particles": 50, "max_bytes": 50_000}
    expected = evidence.importance(TOY, guide, x, **options)
    from pyro_vae.pairs.log_weights import Weigher

    calls, of = [], Weigher.of

    def interrupted(self, rows, num_particles):
        calls.append(rows)
        if num_particles == 50 and len(calls) == 4:
            raise KeyboardInterrupt
        return of(self, rows, num_particles)

    monkeypatch.setattr(Weigher, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evidence.importance(TOY, guide, x, resume=file, **options)
    first = len(calls)
    result = evidence.importance(TOY, guide, x, resume=file, **options)
    assert torch.equal(result.log_evidence, expected.log_evidence)
    assert torch.equal(result.pareto_k, expected.pareto_k)
    # the fingerprint runs on the first chunk again; no other finished chunk is computed again
    resumed = {rows.start for rows in calls[first:]} - {0}
    assert resumed.isdisjoint(rows.start for rows in calls[1 : first - 1])
    with pytest.raises(ValueError, match="belongs to another run"):
        evidence.importance(TOY, Gaussian(TOY, TOY.precision), x, resume=file, **options)
    with pytest.raises(ValueError, match="belongs to another run"):
        evidence.importance(TOY, guide, x + 1, resume=file, **options)
    with pytest.raises(ValueError, match=rf"{file.name} belongs to another run.*max_bytes"):  # other chunks
        evidence.importance(TOY, guide, x, resume=file, **options | {"max_bytes": 100_000})
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        evidence.importance(TOY, guide, x, resume=file, **options)


def test_printed_result_states_the_bound_and_its_margin():
    x = TOY.sample(50)
    result = evidence.importance(TOY, Gaussian(TOY, TOY.precision), x, num_particles=100)
    assert result.margin(1e-6) == pytest.approx(math.log(1e6) / 50)
    assert result.noise == pytest.approx(0, abs=1e-6)
    for text in (
        "log p(x) ≥",
        "50 data",
        "lower bound: it is above the true mean by more than 0.28 nats",
        "100.0 of 100",
    ):
        assert text in str(result)
    with pytest.raises(ValueError, match="probability between 0 and 1"):
        result.margin(0.0)


def test_noise_of_the_upper_bound_is_the_standard_deviation_over_seeds():
    """The weight of the simulated latents does not depend on the seed and does not contribute."""
    guide = Gaussian(TOY, 3.0 * TOY.precision)
    data = evidence.simulate(TOY, TOY.sample(60))
    seeds = [evidence.importance_upper(TOY, guide, data, num_particles=40, seed=seed) for seed in range(30)]
    expected = torch.stack([result.log_evidence for result in seeds]).var(0).sum().sqrt().item() / 60
    noise = sum(result.noise for result in seeds) / 30
    assert 1 / 1.25 < noise / expected < 1.25


def test_standard_error_of_the_elbo_is_that_of_a_mean():
    x = TOY.sample(5)
    result = evidence.elbo(TOY, Gaussian(TOY, 2 * TOY.precision), x, num_particles=50)
    w = log_weights(TOY, Gaussian(TOY, 2 * TOY.precision), x, num_particles=50)
    torch.testing.assert_close(result.log_evidence_se, w.std(0) / 50**0.5)


def test_noise_of_a_single_draw_is_printed_as_unknown():
    x = TOY.sample(3)
    result = evidence.importance(TOY, Gaussian(TOY, TOY.precision / 2), x, num_particles=1)
    assert not result.is_reliable
    assert "Monte Carlo error unknown" in str(result)


def test_no_standard_error_is_printed_for_one_datum():
    found = evidence.importance(TOY, Gaussian(TOY, TOY.precision / 2), TOY.sample(1), num_particles=50)
    assert math.isnan(found.mean_se)
    assert "nan" not in str(found)
    assert "nan" not in str(evidence.bdmc(TOY, TOY.sample(1), annealing=evidence.Annealing(10, num_chains=4)))
