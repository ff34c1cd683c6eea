"""Statistics of log-weights against definitions, ArviZ and replicates."""

import math

import pytest
import torch
from arviz_stats.base import array_stats

from pyro_vae.evidence import Evidence
from pyro_vae.evidence.importance import summary
from pyro_vae.numerics import effective_sample_size, log_mean_exp, log_mean_exp_se, pareto_k


def log_weights(n, scale, seed=0):
    return scale * torch.randn(n, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [25, 100, 225, 226, 1000, 20_000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_pareto_k_matches_arviz(n, scale):
    w = log_weights(n, scale)
    expected = [float(array_stats.psislw(-column.numpy())[1]) for column in w.unbind(1)]
    torch.testing.assert_close(pareto_k(w), torch.tensor(expected, dtype=torch.double), rtol=0, atol=1e-9)


def test_pareto_k_of_constant_and_of_few_weights():
    assert pareto_k(torch.full((100, 2), -700.0)).tolist() == [-math.inf] * 2
    assert pareto_k(torch.zeros(24, 2)).isnan().all()
    assert pareto_k(log_weights(50, 1.0).mT, dim=1).equal(pareto_k(log_weights(50, 1.0)))


def test_pareto_k_is_invariant_to_scaling_the_weights():
    torch.testing.assert_close(
        pareto_k(log_weights(500, 2.0)), pareto_k(log_weights(500, 2.0) - 1e4), rtol=0, atol=1e-6
    )


def test_effective_sample_size_matches_its_definition():
    w = log_weights(50, 1.0).exp()
    torch.testing.assert_close(effective_sample_size(w.log()), w.sum(0) ** 2 / (w**2).sum(0))
    assert effective_sample_size(torch.zeros(7, 1)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -1e4])).item() == pytest.approx(1)
    assert effective_sample_size(torch.full((3,), -math.inf)).item() == 0


def test_standard_error_matches_the_deviation_over_replicates():
    w = 0.7 * torch.randn(400, 20_000, dtype=torch.double)
    log_mean, error = log_mean_exp(w), log_mean_exp_se(w)
    # three standard errors of the deviation are 1.5 %
    assert log_mean.std().item() == pytest.approx(error.square().mean().sqrt().item(), rel=0.03)
    assert log_mean.mean().item() == pytest.approx(0.7**2 / 2, abs=2e-3)


@pytest.mark.parametrize("num_particles", [100, 1000])
@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0, 10.0])
def test_evidence_error_matches_the_deviation_over_seeds_or_is_marked_unreliable(sd, num_particles):
    """Gaussian log-weights of 20 data and 1000 seeds."""
    generator = torch.Generator().manual_seed(0)
    seeds = [
        sd * torch.randn(num_particles, 20, generator=generator, dtype=torch.double) for _ in range(1000)
    ]
    deviation = torch.stack([log_mean_exp(w).mean() for w in seeds]).std().item()
    evidences = [
        Evidence("test", "lower", **summary(w), num_particles=num_particles, cost=1) for w in seeds[:100]
    ]
    printed = [(evidence.noise, evidence.is_reliable, str(evidence)) for evidence in evidences]
    for noise, reliable, text in printed:
        assert reliable != ("not reliable" in text)
        if reliable:
            assert deviation / 1.5 < noise < 1.5 * deviation
    if sd == 10:
        assert not any(reliable for _, reliable, _ in printed)
    if sd == 0.5:
        assert all(reliable for _, reliable, _ in printed)


@pytest.mark.parametrize("num_particles", [4, 100, 1000])
@pytest.mark.parametrize("sd", [0.5, 2.0, 10.0, 300.0])
def test_standard_error_matches_the_deviation_over_seeds(sd, num_particles):
    """1000 seeds. The delta method √(1/ESS − 1/K) is too small by a factor of 4 to 150 for sd ≥ 10."""
    w = sd * torch.randn(num_particles, 1000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    deviation, error = log_mean_exp(w).std(), log_mean_exp_se(w).square().mean().sqrt()
    assert 1 / 1.25 < error / deviation < 1.25


@pytest.mark.parametrize("sd", [0.5, 2.0, 10.0])
def test_standard_error_with_a_fixed_weight_matches_the_deviation_over_seeds(sd):
    w = sd * torch.randn(100, 1000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for fixed in (0.0, sd, 4 * sd):
        w[0] = fixed
        deviation, error = log_mean_exp(w).std(), log_mean_exp_se(w, num_fixed=1).square().mean().sqrt()
        assert 1 / 1.3 < error / deviation < 1.3


def test_standard_error_matches_the_jackknife_definition():
    w = log_weights(7, 2.0)
    without = torch.stack([log_mean_exp(w[torch.arange(7) != i]) for i in range(7)])
    expected = (6 / 7 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(log_mean_exp_se(w), expected)
    torch.testing.assert_close(log_mean_exp_se(w + 1e5), expected, rtol=1e-6, atol=0)
    without = torch.stack([w[torch.arange(7) != i].logsumexp(0) for i in range(1, 7)])
    expected = (5 / 6 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(log_mean_exp_se(w, num_fixed=1), expected)


def test_standard_error_of_degenerate_weights():
    assert (log_mean_exp_se(torch.zeros(9, 2).double()) < 1e-14).all()
    assert log_mean_exp_se(torch.zeros(1, 2)).isnan().all()
    assert log_mean_exp_se(torch.tensor([0.0, -math.inf, -math.inf])).item() == math.inf
    assert log_mean_exp_se(torch.full((3,), -math.inf)).item() == math.inf
    assert log_mean_exp_se(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(2 / 3 * math.log(2))


def test_num_fixed_excludes_the_fixed_weight():
    """log (w* + Σ w_k) over seeds, with w* fixed."""
    generator = torch.Generator().manual_seed(0)
    fixed = torch.full((1, 1000), 3.0).double()
    random = 0.5 * torch.randn(99, 1000, generator=generator, dtype=torch.double)
    both = torch.cat([fixed, random])
    deviation = log_mean_exp(both).std()
    assert log_mean_exp_se(both, num_fixed=1).mean() == pytest.approx(deviation.item(), rel=0.1)
    assert log_mean_exp_se(both).mean() > 2 * deviation  # treats w* as random


def test_pareto_k_ignores_vanishing_weights():
    generator = torch.Generator().manual_seed(0)
    w = 300 * torch.randn(1000, 200, generator=generator, dtype=torch.double)
    assert not pareto_k(w).isnan().any()
    assert (pareto_k(w) > 0.7).all()
    sparse = 0.3 * torch.randn(1000, 50, generator=generator, dtype=torch.double)
    sparse[50:] = -torch.inf  # most samples of the guide are impossible under the model
    assert pareto_k(sparse).isfinite().all()
    assert (pareto_k(sparse) < 0.7).double().mean() > 0.9
    single = torch.full((100, 1), -torch.inf).double()
    single[0] = 0.0
    assert pareto_k(single).item() == torch.inf
