"""Numbers from log-weights against other ways to have them."""

import math

import pytest
import torch
from arviz_stats.base import array_stats

from pyro_vae.evidence import Evidence
from pyro_vae.evidence.importance import summary
from pyro_vae.numerics import effective_sample_size, log_mean_error, log_mean_exp, pareto_k


def weights(n, scale, seed=0):
    return scale * torch.randn(n, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [25, 100, 225, 226, 1000, 20_000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_pareto_k_is_that_of_arviz(n, scale):
    ours = pareto_k(weights(n, scale))
    theirs = [float(array_stats.psislw(-column.numpy())[1]) for column in weights(n, scale).unbind(1)]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.double), rtol=0, atol=1e-9)


def test_pareto_k_of_weights_without_a_tail():
    assert pareto_k(torch.full((100, 2), -700.0)).tolist() == [-math.inf] * 2
    assert pareto_k(torch.zeros(24, 2)).isnan().all()
    assert pareto_k(weights(50, 1.0).mT, dim=1).equal(pareto_k(weights(50, 1.0)))


def test_pareto_k_does_not_see_a_constant():
    torch.testing.assert_close(
        pareto_k(weights(500, 2.0)), pareto_k(weights(500, 2.0) - 1e4), rtol=0, atol=1e-6
    )


def test_effective_sample_size():
    w = weights(50, 1.0).exp()
    torch.testing.assert_close(effective_sample_size(w.log()), w.sum(0) ** 2 / (w**2).sum(0))
    assert effective_sample_size(torch.zeros(7, 1)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([0.0, -1e4])).item() == pytest.approx(1)
    assert effective_sample_size(torch.full((3,), -math.inf)).item() == 0


def test_the_error_of_a_log_mean_is_that_of_many():
    """The delta method against the spread over replicates."""
    w = 0.7 * torch.randn(400, 20_000, dtype=torch.double)
    found, stated = log_mean_exp(w), log_mean_error(w)
    assert found.std().item() == pytest.approx(
        stated.square().mean().sqrt().item(), rel=0.03
    )  # 3 SE of the spread: 1.5 %
    assert found.mean().item() == pytest.approx(0.7**2 / 2, abs=2e-3)


@pytest.mark.parametrize("num_particles", [100, 1000])
@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0, 10.0])
def test_the_printed_error_is_the_spread_over_seeds_or_said_to_be_unreliable(sd, num_particles):
    """Gaussian log-weights of 20 data, over 1000 seeds."""
    generator = torch.Generator().manual_seed(0)
    seeds = [
        sd * torch.randn(num_particles, 20, generator=generator, dtype=torch.double) for _ in range(1000)
    ]
    spread = torch.stack([log_mean_exp(w).mean() for w in seeds]).std().item()
    evidences = [
        Evidence("test", "lower", **summary(w), num_particles=num_particles, cost=1) for w in seeds[:100]
    ]
    found = [(evidence.noise, evidence.is_reliable, str(evidence)) for evidence in evidences]
    for noise, reliable, text in found:
        assert reliable != ("not reliable" in text)
        if reliable:
            assert spread / 1.5 < noise < 1.5 * spread
    if sd == 10:
        assert not any(reliable for _, reliable, _ in found)
    if sd == 0.5:
        assert all(reliable for _, reliable, _ in found)


@pytest.mark.parametrize("num_particles", [4, 100, 1000])
@pytest.mark.parametrize("sd", [0.5, 2.0, 10.0, 300.0])
def test_the_error_of_a_log_mean_is_the_spread_over_seeds(sd, num_particles):
    """1000 seeds; the delta method √(1/ESS − 1/K) is too small by a factor of 4 to 150 from a deviation of 10 on."""
    w = sd * torch.randn(num_particles, 1000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    spread, stated = log_mean_exp(w).std(), log_mean_error(w).square().mean().sqrt()
    assert 1 / 1.25 < stated / spread < 1.25


@pytest.mark.parametrize("sd", [0.5, 2.0, 10.0])
def test_the_error_beside_a_fixed_weight_is_the_spread_over_seeds(sd):
    w = sd * torch.randn(100, 1000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for fixed in (0.0, sd, 4 * sd):
        w[0] = fixed
        spread, stated = log_mean_exp(w).std(), log_mean_error(w, num_fixed=1).square().mean().sqrt()
        assert 1 / 1.3 < stated / spread < 1.3


def test_the_error_of_a_log_mean_is_its_definition():
    """Weights left out one at a time."""
    w = weights(7, 2.0)
    without = torch.stack([log_mean_exp(w[torch.arange(7) != i]) for i in range(7)])
    expected = (6 / 7 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(log_mean_error(w), expected)
    torch.testing.assert_close(log_mean_error(w + 1e5), expected, rtol=1e-6, atol=0)
    without = torch.stack([w[torch.arange(7) != i].logsumexp(0) for i in range(1, 7)])
    expected = (5 / 6 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(log_mean_error(w, num_fixed=1), expected)


def test_the_error_of_a_log_mean_at_the_edge():
    assert (log_mean_error(torch.zeros(9, 2).double()) < 1e-14).all()
    assert log_mean_error(torch.zeros(1, 2)).isnan().all()
    assert log_mean_error(torch.tensor([0.0, -math.inf, -math.inf])).item() == math.inf
    assert log_mean_error(torch.full((3,), -math.inf)).item() == math.inf
    assert log_mean_error(torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(2 / 3 * math.log(2))


def test_the_error_with_a_fixed_weight_is_that_of_the_others():
    """log (w* + Σ w_k) over seeds, w* the same: what varies is the rest."""
    generator = torch.Generator().manual_seed(0)
    fixed = torch.full((1, 1000), 3.0).double()
    drawn = 0.5 * torch.randn(99, 1000, generator=generator, dtype=torch.double)
    both = torch.cat([fixed, drawn])
    spread = log_mean_exp(both).std()
    assert log_mean_error(both, num_fixed=1).mean() == pytest.approx(spread.item(), rel=0.1)
    assert log_mean_error(both).mean() > 2 * spread  # as if w* had been drawn


def test_pareto_k_of_weights_that_vanish_is_known():
    generator = torch.Generator().manual_seed(0)
    w = 300 * torch.randn(1000, 200, generator=generator, dtype=torch.double)
    assert not pareto_k(w).isnan().any()
    assert (pareto_k(w) > 0.7).all()
    light = 0.3 * torch.randn(1000, 50, generator=generator, dtype=torch.double)
    light[50:] = -torch.inf  # a guide most of whose draws are impossible
    assert pareto_k(light).isfinite().all()
    assert (pareto_k(light) < 0.7).double().mean() > 0.9
    one = torch.full((100, 1), -torch.inf).double()
    one[0] = 0.0
    assert pareto_k(one).item() == torch.inf
