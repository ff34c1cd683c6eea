"""Functions of log-weights and evidence accept every form of data that ``fit`` accepts."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import pyro_vae as pv
from pyro_vae import evidence
from pyro_vae.evidence import Annealing
from tests.support.oracles import seeded

N = 12
X, SHIFT = seeded(N), seeded(N, seed=1)
ANNEALING = Annealing(3, num_chains=2)


def model(x, shift):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def guide(x, shift):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - shift) / 2, 0.9))


VERBS = {
    "log_weights": lambda data: pv.log_weights(model, guide, data, num_particles=5),
    "joint_log_weights": lambda data: pv.joint_log_weights(model, guide, data, num_particles=5).log_weights,
    "importance": lambda data: evidence.importance(model, guide, data, num_particles=5).log_evidence,
    "elbo": lambda data: evidence.elbo(model, guide, data, num_particles=5).log_evidence,
    "prior_monte_carlo": lambda data: evidence.prior_monte_carlo(model, data, num_particles=5).log_evidence,
    "importance_upper": lambda data: (
        evidence.importance_upper(model, guide, evidence.simulate(model, data), num_particles=5).log_evidence
    ),
    "ais": lambda data: evidence.ais(model, data, annealing=ANNEALING).log_evidence,
    "reverse_ais": lambda data: (
        evidence.reverse_ais(model, evidence.simulate(model, data), annealing=ANNEALING).log_evidence
    ),
    "smc": lambda data: evidence.smc(model, data, annealing=Annealing(3, num_chains=5)).log_evidence,
    "bdmc": lambda data: evidence.bdmc(model, data, annealing=ANNEALING).gap,
    "reciprocal_importance": lambda data: (
        evidence.reciprocal_importance(model, data, num_samples=20, annealing=ANNEALING).log_evidence
    ),
    "simulate": lambda data: evidence.simulate(model, data).latents["z"],
}
# these run chains, which takes longer
CHAINS = ("ais", "bdmc", "smc", "reverse_ais", "reciprocal_importance")
every_verb = pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow) if verb in CHAINS else verb for verb in VERBS]
)


def test_all_public_functions_are_tested():
    public = {name for name in evidence.__all__ if inspect.isfunction(getattr(evidence, name))}
    assert public | {"log_weights", "joint_log_weights"} == set(VERBS)


@every_verb
def test_result_does_not_depend_on_the_form_of_the_data(verb):
    rows = TensorDataset(X, SHIFT)
    expected = VERBS[verb]((X, SHIFT))
    for data in (
        (X.numpy(), SHIFT.numpy()),
        {"x": X, "shift": SHIFT},
        {"shift": SHIFT, "x": X, "unused": SHIFT},
        pv.Data(X, labels=torch.arange(N), condition=SHIFT),
        rows,
        DataLoader(rows, batch_size=5),
        DataLoader(rows, batch_size=5, shuffle=True),  # shuffling is ignored
    ):
        torch.testing.assert_close(VERBS[verb](data), expected, rtol=0, atol=0)


def test_tensor_is_passed_as_the_only_argument():
    unary_model, unary_guide = (lambda x, f=f: f(x, torch.zeros_like(x)) for f in (model, guide))
    expected = pv.log_weights(unary_model, unary_guide, X)
    for data in (X.numpy(), (X,), {"x": X}, pv.Data(X), DataLoader(X, 5)):
        torch.testing.assert_close(pv.log_weights(unary_model, unary_guide, data), expected, rtol=0, atol=0)


@every_verb
def test_loader_with_a_custom_sampler_raises(verb):
    loader = DataLoader(TensorDataset(X, SHIFT), 5, sampler=SubsetRandomSampler(range(N)))
    with pytest.raises(ValueError, match=r"data: the loader or stream has an order of its own"):
        VERBS[verb](loader)


class Noisy(Dataset):
    """A data set whose rows are random at each access."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index] + torch.randn((), dtype=X.dtype), SHIFT[index]


@every_verb
def test_random_data_sets_are_read_at_the_given_seed(verb):
    torch.manual_seed(1)
    first = VERBS[verb](DataLoader(Noisy(), 5))
    state = torch.get_rng_state()
    second = VERBS[verb](DataLoader(Noisy(), 5))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_simulated_data_have_the_form_of_the_given_data():
    by_position = evidence.simulate(model, (X, SHIFT))
    by_name = evidence.simulate(model, {"x": X, "shift": SHIFT})
    assert isinstance(by_position.data, tuple)
    assert by_name.data.keys() == {"x", "shift"}
    for part, named, given in zip(by_position.data, by_name.data.values(), (X, SHIFT), strict=True):
        assert torch.equal(part, named)
        assert part.shape == given.shape
    assert torch.equal(by_position.data[1], SHIFT)
    assert not torch.equal(by_position.data[0], X)


def test_data_in_an_invalid_form_raise():
    with pytest.raises(TypeError):
        evidence.importance(model, guide, X, SHIFT)
    with pytest.raises(ValueError, match="expected tensors or arrays of shape"):
        evidence.simulate(model, ())
    with pytest.raises(ValueError, match="got argument 0: a Simulated; pass its field data"):
        evidence.importance(model, guide, evidence.simulate(model, (X, SHIFT)))
    for data in ("x.csv", {"x": "x.csv"}):
        with pytest.raises(ValueError, match=r"a str; pv\.load reads files"):
            evidence.importance(model, guide, data)
    with pytest.raises(
        ValueError, match=r"importance_upper: expected simulated data with their latents.*got tuple"
    ):
        evidence.importance_upper(model, guide, (X, SHIFT))


def test_standard_error_of_the_gap_combines_both_bounds():
    result = evidence.bdmc(model, (X, SHIFT), annealing=ANNEALING)
    square = result.lower.log_evidence_se**2 + result.upper.log_evidence_se**2
    torch.testing.assert_close(result.gap_se, square.sqrt())
    assert result.mean_se == pytest.approx(result.gap.std().item() / N**0.5)
    assert f"gap {result.mean:.3f} ± {result.mean_se:.3f}" in str(result)
