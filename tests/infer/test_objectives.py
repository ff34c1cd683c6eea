"""Objectives beyond the ELBO: values and gradients by other formulas, in every combination, or refused."""

import copy
import gc
import itertools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, exact, flows, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError, read_checkpoint
from pyro_vae.data.batches import Batch
from pyro_vae.infer import IWAE, STL, VIMCO, Renyi, ReweightedWakeSleep, WakeSleep
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.faults.processes import run_group
from tests.support import objective_pairs as pairs
from tests.support.fits import assert_same, run, run_until_step
from tests.support.objective_pairs import CONTINUOUS, DISCRETE, record_steps, recorded_draws, reference
from tests.support.objective_ranks import CASES_OF_RANKS, train_rank
from tests.support.oracles import seeded
from tests.support.steps import functions, train_and_compare, vae

OBJECTIVES = {
    "IWAE": lambda: IWAE(3),
    "IWAE, K = 1": lambda: IWAE(1),
    "DReG": lambda: IWAE(3, "dreg"),
    "DReG, K = 1": lambda: IWAE(1, "dreg"),
    "STL in IWAE": lambda: IWAE(3, "stl"),
    "STL": lambda: STL(),
    "STL, 3 particles": lambda: STL(3),
    "Rényi, α = ½": lambda: Renyi(0.5, 3),
    "Rényi, α = −1": lambda: Renyi(-1.0, 3),
    "Rényi, α = 2": lambda: Renyi(2.0, 3),
    "Rényi, α = 1": lambda: Renyi(1.0, 3),
    "VIMCO": lambda: VIMCO(3),
    "VIMCO, K = 2": lambda: VIMCO(2),
    "wake-sleep": lambda: WakeSleep(),
    "wake-sleep, 2 particles": lambda: WakeSleep(2),
    "wake-wake": lambda: ReweightedWakeSleep(3),
    "half wake, half sleep": lambda: ReweightedWakeSleep(3, wake_phi=0.5, sleep_phi=0.5),
    "reweighted, sleep": lambda: ReweightedWakeSleep(1, wake_phi=0.0, sleep_phi=1.0),
}
NONLINEAR = [name for name in OBJECTIVES if name not in ("STL", "STL, 3 particles")]
FOR_DISCRETE = [name for name in OBJECTIVES if "VIMCO" in name or "wake" in name or "sleep" in name]


# other options of an objective, for which a few pairs suffice
VARIANTS = {
    "IWAE, K = 1",
    "Rényi, α = −1",
    "Rényi, α = 2",
    "Rényi, α = 1",
    "VIMCO, K = 2",
    "wake-sleep, 2 particles",
}
FEW = {pairs.FactorAnalysis, pairs.Shared, pairs.NotVectorized, pairs.Enumerated}
THETA = "weight", "bias", "log_noise"  # the parameters of the model of a factor analysis


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def assert_equal_gradients(actual, expected, tolerance=1e-9):
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def gradients(loss, pair):
    """The gradient of −loss with respect to each parameter of a pair."""
    found = torch.autograd.grad(-loss, list(pair.parameters()), allow_unused=True)
    named = zip(pair.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}


def replicated_gradients(objective, pair, arguments, times=1500, calls=30):
    """The gradient of Σ over data of an objective, its mean over draws and the standard error of each
    entry."""
    batch = Batch(tuple(part.repeat(times, *[1] * (part.dim() - 1)) for part in arguments), {})
    found = []
    for _ in range(calls):
        step = objective.step(pair.model, pair.guide, batch)
        found.append({name: g / times for name, g in gradients(step.surrogate, pair).items()})
    stacked = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    return {name: (g.mean(0), g.std(0) / calls**0.5) for name, g in stacked.items()}


def assert_within_standard_errors(estimates, expected, names=None):
    for name in names or expected:
        mean, se = estimates[name]
        assert ((mean - expected[name]).abs() <= 4 * se + 1e-12).all(), (name, mean, expected[name], se)


def check_step(objective, pair, n=5, *, handler=lambda program: program, tolerance=1e-9, **weights):
    """Compare value, gradient and terms of a step with the formulas at the same draws."""
    args, kwargs = pair.arguments(n)
    batch = Batch(args, kwargs)
    step = objective.step(handler(pair.model), handler(pair.guide), batch)
    asleep = pair.seen[-1] if objective.simulates else None
    z, arguments = recorded_draws(step.traces, pair), (*args, *kwargs.values())
    value, expected = reference(objective, pair, arguments, z, asleep, **weights)
    assert step.loss.item() == pytest.approx(-value, rel=tolerance, abs=tolerance)
    assert_equal_gradients(gradients(step.surrogate, pair), expected, tolerance)
    assert objective._pair.particles.vectorized == pair.vectorized
    if step.terms is not None:
        values = step.terms.elbo if objective.is_elbo else step.terms.bound
        scale = weights.get("scale", 1.0)
        assert (scale * values).sum().item() == pytest.approx(value, rel=tolerance, abs=tolerance)
        assert all(part.shape == (n,) for part in step.terms)
        k = objective.num_particles
        assert objective.is_elbo or ((step.terms.ess > 0.99) & (step.terms.ess < k + 1e-6)).all()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in CONTINUOUS for name in OBJECTIVES if kind in FEW or name not in VARIANTS],
)
def test_value_and_gradient_equal_the_formulas_at_the_same_draws(kind, name):
    check_step(OBJECTIVES[name](), kind())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not OBJECTIVES[name]().simulates])
def test_a_plate_of_entries_to_the_left_of_the_data_plate(name):
    check_step(OBJECTIVES[name](), pairs.OuterPlate())


@pytest.mark.parametrize("name", FOR_DISCRETE)
@pytest.mark.parametrize("kind", DISCRETE)
def test_with_discrete_latents_value_and_gradient_equal_the_formulas_at_the_same_draws(kind, name):
    check_step(OBJECTIVES[name](), kind())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_one_row(name):
    check_step(OBJECTIVES[name](), pairs.FactorAnalysis(), n=1)


@pytest.mark.parametrize("name", ["DReG", "STL, 3 particles"])
def test_a_step_keeps_no_tensors(name):
    pair, objective, counts = pairs.Hierarchical(), OBJECTIVES[name](), []
    (x,), _ = pair.arguments()
    objective.loss_and_grads(pair.model, pair.guide, x)
    for num_steps in (1, 5):
        for _ in range(num_steps):
            objective.loss_and_grads(pair.model, pair.guide, x)
        pair.seen.clear()
        gc.collect()
        counts.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert counts[0] == counts[1]


def of_prior(x):
    """A guide without parameters."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(pairs.K), 1.0).to_event(1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_guide_without_parameters_trains_the_model(name):
    pair, objective = pairs.FactorAnalysis(), OBJECTIVES[name]()
    (x,), _ = pair.arguments()
    step = objective.step(pair.model, of_prior, Batch((x,), {}))
    z = step.traces[0][1].nodes["z"]["value"]
    with torch.no_grad():
        for each in (pair.a, pair.c, pair.log_t):
            each.zero_()
    pair.seen.append(((x,), {"z": z}))
    _, expected = reference(objective, pair, (x,), {"z": z}, pair.seen[-1])
    found = gradients(step.surrogate, pair)
    for site in THETA:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-9, atol=1e-9, msg=site)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_scale_of_all_sites_is_a_factor_of_the_objective(name):
    check_step(OBJECTIVES[name](), pairs.Hierarchical(), handler=poutine.scale(scale=2.5), scale=2.5)


@pytest.mark.parametrize("kind", [pairs.Hierarchical, pairs.NotVectorized])
@pytest.mark.parametrize("name", ["STL", "STL, 3 particles"])
def test_stl_has_the_weights_of_data_and_of_sites(kind, name):
    """As in Trace_ELBO, by ``poutine.scale``: of each datum, and of latents."""
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    handler = poutine.scale(scale=weights)
    check_step(OBJECTIVES[name](), kind(), handler=handler, scale=weights, inside=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_single_precision_the_gradient_is_right_to_rounding(name):
    torch.set_default_dtype(torch.float)
    pair = pairs.Hierarchical().float()
    args, _ = pair.arguments()
    pair.arguments = lambda n: ((args[0].float(),), {})
    check_step(OBJECTIVES[name](), pair, tolerance=1e-4)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_interface_of_an_elbo_class_agrees_with_the_step(name, validate):
    with pyro.validation_enabled(validate):
        objective, pair = OBJECTIVES[name](), pairs.Hierarchical()
        args, _ = pair.arguments()
        objective.prepare(pair.model, pair.guide, Batch(args, {}))
        pyro.set_rng_seed(1)
        step = objective.step(pair.model, pair.guide, Batch(args, {}))
        expected = gradients(step.surrogate, pair)
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(pair.model, pair.guide, *args)
        assert_equal_gradients(gradients(loss, pair), expected)
        pyro.set_rng_seed(1)
        value = objective.loss_and_grads(pair.model, pair.guide, *args)
        assert_equal_gradients({name: -p.grad for name, p in pair.named_parameters()}, expected)
        pyro.set_rng_seed(1)
        assert objective.loss(pair.model, pair.guide, *args) == pytest.approx(value, rel=1e-12)
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert value == pytest.approx(step.loss.item(), rel=1e-12)


# ---- minibatches, β, several processes


def fit_and_compare(kind, name, n=7, batch_size=3, beta=1.0, clip=None, **options):
    """Train by gradient descent, and compare each update with the formulas at the same draws."""
    objective, pair, rate = OBJECTIVES[name](), kind(), 1e-3
    data, _ = pair.arguments(n)
    records = record_steps(objective, pair)
    history = pv.fit(
        pair.model, pair.guide, data, loss=objective, optim=pyro.optim.SGD({"lr": rate}), num_epochs=2,
        batch_size=batch_size, beta=beta, clip_norm=clip, **options,
    )  # fmt: skip
    after = [record[0] for record in records[1:]] + [pair.state_dict()]
    assert len(records) == 2 * math.ceil(n / (batch_size or n))
    other, means = kind(), []
    for (before, arguments, z, asleep), now in zip(records, after, strict=True):
        other.load_state_dict(before)
        scale = n / len(arguments[0])
        linear = {"scale": scale, "beta": beta, "inside": name.startswith("STL,") or name == "STL"}
        value, expected = reference(objective, other, arguments, z, asleep, **linear)
        means.append(value / n)
        if clip is not None:
            norm = torch.cat([g.flatten() for g in expected.values()]).norm()
            factor = min(1.0, n * clip / norm.item())
            assert factor < 1
            expected = {site: factor * g for site, g in expected.items()}
        for site, g in expected.items():
            torch.testing.assert_close(now[site] - before[site], rate * g, rtol=1e-7, atol=1e-12, msg=site)
    return history, means


@pytest.mark.parametrize(
    ("kind", "name"),
    [(pairs.Enumerated, name) for name in OBJECTIVES]
    + [(pairs.InnerPlate, name) for name in OBJECTIVES if name not in VARIANTS],
)
def test_in_minibatches_the_objective_of_each_datum_is_multiplied_by_the_number_of_data_over_rows(kind, name):
    fit_and_compare(kind, name)


@pytest.mark.parametrize("name", ["VIMCO", "half wake, half sleep", "wake-sleep"])
def test_minibatches_with_discrete_latents(name):
    fit_and_compare(pairs.Discrete, name)


@pytest.mark.parametrize("name", ["DReG", "STL, 3 particles", "VIMCO", "half wake, half sleep"])
@pytest.mark.parametrize("kind", [pairs.HierarchicalNotVectorized, pairs.MaskedData, pairs.TwoViews])
def test_minibatches_of_other_pairs(kind, name):
    fit_and_compare(kind, name)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in VARIANTS])
def test_all_data_at_once_with_a_latent_that_all_share(name):
    history, means = fit_and_compare(pairs.Shared, name, batch_size=None)
    assert [epoch.train.objective for epoch in history.epochs] == pytest.approx(means)


@pytest.mark.parametrize(
    "name", ["DReG", "STL", "Rényi, α = 1", "VIMCO", "wake-sleep", "half wake, half sleep"]
)
def test_the_reported_bound_is_the_mean_objective_per_datum(name):
    history, means = fit_and_compare(pairs.Hierarchical, name, n=6)
    objective = OBJECTIVES[name]()
    for i, epoch in enumerate(history.epochs):
        assert epoch.train.objective == pytest.approx(np.mean(means[2 * i : 2 * i + 2]))
        assert (epoch.train.bound is None) == objective.is_elbo


@pytest.mark.parametrize("kind", [pairs.Shared, pairs.Hierarchical, pairs.SharedNotVectorized])
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("name", ["STL", "STL, 3 particles"])
def test_stl_in_minibatches_with_shared_latents_and_beta(name, beta, kind):
    """As for the ELBO, terms of the data are multiplied by N/B, and terms of latents by β."""
    fit_and_compare(kind, name, beta=beta)


@pytest.mark.parametrize("name", ["DReG", "VIMCO", "half wake, half sleep", "STL"])
def test_clipped_gradients(name):
    fit_and_compare(pairs.FactorAnalysis, name, clip=0.1)


class DeclaredSize(pairs.FactorAnalysis):
    """The data plate declares the number of data, and the rows are a subsample."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", 7, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", 7, subsample=x):
            self.saw((x,), z=pyro.sample("z", dist.Normal(*self.q(x)).to_event(1)))


class WithoutSize(pairs.FactorAnalysis):
    """The data plate has no size, but the batch shape of its sites."""

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), pairs.K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data"):
            self.saw((x,), z=pyro.sample("z", dist.Normal(*self.q(x)).to_event(1)))


class ScaledByPair(pairs.FactorAnalysis):
    """The pair itself scales its minibatches by N/B."""

    def model(self, x):
        with poutine.scale(scale=7 / len(x)):
            super().model(x)

    def guide(self, x):
        with poutine.scale(scale=7 / len(x)):
            super().guide(x)


@pytest.mark.parametrize("kind", [ScaledByPair, DeclaredSize, WithoutSize])
@pytest.mark.parametrize("name", ["DReG", "STL", "VIMCO", "wake-sleep"])
def test_a_pair_that_scales_its_minibatches_itself_or_whose_plate_has_no_size(name, kind):
    fit_and_compare(kind, name)


@pytest.mark.parametrize("name", NONLINEAR)
def test_beta_is_refused_where_the_objective_is_not_linear(name):
    with pytest.raises(ValueError, match="is not linear in log-probabilities, so β would be a power"):
        fit_and_compare(pairs.FactorAnalysis, name, beta=0.5)


@pytest.mark.parametrize("name", NONLINEAR)
def test_minibatches_with_a_shared_latent_are_refused_where_the_objective_is_not_linear(name):
    with pytest.raises(ValueError, match="'v' is shared by all data, so no factor"):
        fit_and_compare(pairs.Shared, name)


def test_minibatches_with_a_shared_latent_and_enumeration_are_refused():
    with pytest.raises(ValueError, match="'v' is shared by all data and other sites are summed out"):
        fit_and_compare(pairs.EnumeratedShared, "STL")
    fit_and_compare(pairs.EnumeratedShared, "STL", batch_size=None)


def test_beta_with_enumeration_is_refused():
    with pytest.raises(ValueError, match="'c' is summed out, so its term has no separate weight"):
        fit_and_compare(pairs.Enumerated, "STL", beta=0.5)


# ---- expectations: quadrature, enumeration, closed forms


def gauss_hermite(n, dim=1):
    """Nodes ``(n**dim, dim)`` and log-weights of a standard normal distribution."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    grid = torch.cartesian_prod(*[torch.tensor(nodes)] * dim).reshape(-1, dim)
    log_weights = torch.tensor(np.log(weights / weights.sum()))
    return grid, torch.cartesian_prod(*[log_weights] * dim).reshape(-1, dim).sum(-1)


def expected_gradient(pair, arguments, log_w, log_prob, k, alpha=0.0):
    """∇E[L_K], the derivative of a sum over all K-tuples of the states of z.

    :param log_w, log_prob: log-weight of each state and its probability under the guide, ``(states, rows)``.
    """
    a = 1 - alpha
    total = a * log_w
    joint = log_prob
    for _ in range(k - 1):
        total = torch.logaddexp(total.unsqueeze(1), a * log_w.unsqueeze(0)).flatten(0, 1)
        joint = (joint.unsqueeze(1) + log_prob.unsqueeze(0)).flatten(0, 1)
    value = (joint.exp() * (total - math.log(k)) / a).sum()
    found = torch.autograd.grad(value, list(pair.parameters()), allow_unused=True)
    named = zip(pair.named_parameters(), found, strict=True)
    return value.item(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}


def by_quadrature(pair, arguments, k, n=40, alpha=0.0):
    """Value and gradient of E[L_K] for a pair with a scalar latent."""
    nodes, log_prob = gauss_hermite(n)
    z = pair.latents(arguments, {"z": nodes.expand(n, len(arguments[0]))})
    p, q = pair.pieces(arguments, z).log_p_and_q(joint=False)
    return expected_gradient(pair, arguments, p - q, log_prob.unsqueeze(-1).expand_as(q), k, alpha)


UNBIASED = {
    "IWAE, K = 2": (lambda: IWAE(2), 2, 0.0),
    "IWAE, K = 3": (lambda: IWAE(3), 3, 0.0),
    "DReG, K = 2": (lambda: IWAE(2, "dreg"), 2, 0.0),
    "DReG, K = 3": (lambda: IWAE(3, "dreg"), 3, 0.0),
    "VIMCO, K = 2": (lambda: VIMCO(2), 2, 0.0),
    "Rényi, α = ½": (lambda: Renyi(0.5, 2), 2, 0.5),
    "Rényi, α = 2": (lambda: Renyi(2.0, 2), 2, 2.0),
    "IWAE, K = 1": (lambda: IWAE(1), 1, 0.0),
    "STL": (lambda: STL(), 1, 0.0),
    "STL, 3 particles": (lambda: STL(3), 1, 0.0),
    "STL in IWAE, K = 1": (lambda: IWAE(1, "stl"), 1, 0.0),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_gradient_equals_that_of_the_expected_bound_by_quadrature(name):
    make, k, alpha = UNBIASED[name]
    pair, objective = pairs.Positive(), make()
    arguments, _ = pair.arguments(2)
    value, expected = by_quadrature(pair, arguments, k, alpha=alpha)
    assert_within_standard_errors(replicated_gradients(objective, pair, arguments), expected)
    terms = pv.evaluate(pair.model, pair.guide, arguments[0].repeat(5000, 1), loss=objective)
    values = (terms.elbo if objective.is_elbo else terms.bound).reshape(5000, 2).sum(1)
    assert abs(values.mean().item() - value) < 4 * values.std().item() / 5000**0.5


def test_stl_in_iwae_is_biased():
    pair = pairs.Positive()
    arguments, _ = pair.arguments(2)
    _, expected = by_quadrature(pair, arguments, 3)
    estimates = replicated_gradients(IWAE(3, "stl"), pair, arguments)
    mean, se = estimates["log_t"]
    assert (mean - expected["log_t"]).abs()[0] > 20 * se[0]
    assert_within_standard_errors(
        estimates, expected, ["weight", "bias", "log_noise"]
    )  # not with respect to θ


def test_vimco_with_discrete_and_reparameterized_latents_is_unbiased():
    """Sums over both states of k and quadrature over z, for all pairs of particles."""
    pair = pairs.Discrete()
    arguments, _ = pair.arguments(2)
    nodes, log_prob = gauss_hermite(14, 2)
    noise = nodes.unsqueeze(1).expand(-1, 2, 2)
    z = pair.latents(arguments, {"z": noise, "k": None})["z"]
    states = {"z": torch.cat([z, z]), "k": torch.cat([torch.zeros(z.shape[:2]), torch.ones(z.shape[:2])])}
    p, q = pair.pieces(arguments, states).log_p_and_q(joint=False)
    log_prob = log_prob.repeat(2).unsqueeze(-1) + pair.score(arguments, states)
    _, expected = expected_gradient(pair, arguments, p - q, log_prob, 2)
    assert_within_standard_errors(replicated_gradients(VIMCO(2), pair, arguments, calls=60), expected)


class BeliefNet(pairs.FactorAnalysis):
    """z with 2 bits, x with 3 bits, each row with separate parameters, so that a gradient per row is
    known."""

    def __init__(self, rows, datum):
        super().__init__()
        self.rows, self.datum = rows, datum
        self.prior_logits = nn.Parameter(0.7 * seeded(2, seed=11).expand(rows, 2).clone())
        self.logits = nn.Parameter(0.6 * seeded(2, seed=12).expand(rows, 2).clone())
        self.weight = nn.Parameter(seeded(3, 2, seed=13).expand(rows, 3, 2).clone())

    def decoded(self, z):
        return (self.weight @ z.unsqueeze(-1)).squeeze(-1) - 0.3

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior_logits).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoded(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))


STATES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
DATUM = torch.tensor([1.0, 0.0, 1.0])


def bernoulli(x, logits):
    return (x * logits - nn.functional.softplus(logits)).sum(-1)


def gradients_of_all_tuples(make, k, monkeypatch):
    """For each K-tuple of the states of z its probability, and the gradients of an objective."""
    torch.set_default_dtype(torch.double)
    tuples = torch.tensor(list(itertools.product(range(4), repeat=k)))
    rows = len(tuples)
    pair, objective = BeliefNet(rows, DATUM), make(k)
    x = DATUM.double().expand(rows, 3).clone()
    objective.prepare(pair.model, pair.guide, Batch((x,), {}))
    assert objective._pair.particles.vectorized
    draws = STATES.double()[tuples].transpose(0, 1)  # (K, rows, 2)
    monkeypatch.setattr(torch, "bernoulli", lambda probs: draws.reshape(probs.shape))
    step = objective.step(pair.model, pair.guide, Batch((x,), {}))
    found = {name: g for name, g in gradients(step.surrogate, pair).items() if g.any()}
    return bernoulli(draws, pair.logits).sum(0).exp().detach(), found, step, tuples


def one_row():
    """Prior, guide and decoder of :class:`BeliefNet` of one row, by hand: log p(x, z) and log q(z) of each
    state of z, and the parameters."""
    states = STATES.double()
    prior, logits, weight = 0.7 * seeded(2, seed=11), 0.6 * seeded(2, seed=12), seeded(3, 2, seed=13)
    parameters = {"prior_logits": prior, "logits": logits, "weight": weight}
    for p in parameters.values():
        p.requires_grad_()
    log_p = bernoulli(states, prior) + bernoulli(DATUM.double(), states @ weight.mT - 0.3)
    return log_p, bernoulli(states, logits), parameters


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_vimco_gradient_of_all_tuples_is_that_of_the_expected_bound(k, monkeypatch):
    probability, found, step, tuples = gradients_of_all_tuples(VIMCO, k, monkeypatch)
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    log_p, log_q, parameters = one_row()
    bound = (log_p - log_q)[tuples].logsumexp(1) - math.log(k)
    expected = (log_q[tuples].sum(1).exp() * bound).sum()
    torch.testing.assert_close(step.terms.bound, bound.detach(), rtol=1e-12, atol=1e-12)
    for name, g in zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True):
        mean = torch.einsum("r,r...->...", probability, found[name])
        torch.testing.assert_close(mean, g, rtol=1e-12, atol=1e-12)


def test_the_bias_of_wake_phi_falls_as_one_over_the_number_of_particles(monkeypatch):
    """Its limit is the gradient of −KL(p(z|x)‖q(z|x))."""
    log_p, log_q, parameters = one_row()
    exact_gradient = torch.autograd.grad((log_p.softmax(0).detach() * log_q).sum(), parameters["logits"])[0]
    biases = []
    for k in (2, 4, 6):
        with monkeypatch.context() as patch:
            probability, found, _, _ = gradients_of_all_tuples(ReweightedWakeSleep, k, patch)
        biases.append(k * (torch.einsum("r,r...->...", probability, found["logits"]) - exact_gradient))
    assert all((bias.abs() > 1e-3).any() for bias in biases)
    assert ((biases[1] - biases[2]).abs() < (biases[0] - biases[1]).abs()).all()
    torch.testing.assert_close(biases[1], biases[2], rtol=0.3, atol=0.0)


def test_the_exact_belief_net_has_the_posterior_of_the_enumeration():
    log_p, _, parameters = one_row()
    net = exact.SigmoidBeliefNet(
        parameters["weight"].detach(), bias=-0.3, prior_logits=parameters["prior_logits"].detach()
    )
    posterior = net.posterior(DATUM.double().unsqueeze(0)).probs[0]
    torch.testing.assert_close(posterior, log_p.softmax(0).detach(), rtol=1e-12, atol=1e-12)


# ---- factor analysis in closed form


def as_exact(pair):
    """The exact model of a factor analysis."""
    return exact.LinearGaussian(
        pair.weight.detach(), noise_scale=pair.log_noise.exp().detach(), bias=pair.bias.detach()
    )


def at_posterior(pair):
    """Set the guide N(A x + c, L Lᵀ) to the exact posterior."""
    model = as_exact(pair)
    zero = torch.zeros(1, pairs.D)
    offset = model.posterior(zero).mean
    slope = model.posterior(torch.eye(pairs.D)).mean - offset
    tril = torch.linalg.cholesky(model.precision.inverse())
    with torch.no_grad():
        pair.a.copy_(slope.mT)
        pair.c.copy_(offset[0])
        pair.log_t.copy_(tril.diagonal().log())
        pair.lower.copy_(tril.tril(-1))
    return model


def closed_form_elbo(pair, x):
    """log p(x) − KL(q(z|x)‖p(z|x))."""
    model = as_exact(pair)
    q = dist.MultivariateNormal(pair.q(x)[0], scale_tril=torch.diag(pair.log_t.exp()))
    return model.log_evidence(x) - torch.distributions.kl_divergence(q, model.posterior(x))


ELBOS = ["IWAE, K = 1", "STL", "STL, 3 particles", "Rényi, α = 1", "wake-sleep", "wake-sleep, 2 particles"]


@pytest.mark.parametrize("name", ELBOS)
def test_where_the_value_is_the_elbo_it_has_the_closed_form_of_factor_analysis(name):
    pair, (x,) = pairs.FactorAnalysis(), pairs.FactorAnalysis().arguments(3)[0]
    terms = pv.evaluate(pair.model, pair.guide, x.repeat(4000, 1), loss=OBJECTIVES[name]())
    values = (terms.bound if terms.bound.isfinite().all() else terms.elbo).reshape(4000, 3)
    errors = (values.mean(0) - closed_form_elbo(pair, x)).abs()
    assert (errors < 4 * values.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("name", ["IWAE, K = 1", "STL", "DReG, K = 1", "Rényi, α = 1"])
def test_the_mean_gradient_of_the_elbo_has_the_closed_form_of_factor_analysis(name):
    pair = pairs.FactorAnalysis()
    (x,), _ = pair.arguments(3)
    weight, noise = pair.weight, pair.log_noise.exp()
    precision = torch.eye(pairs.K) + weight.mT @ weight / noise**2
    mean = torch.linalg.solve(precision, ((x - pair.bias) @ weight / noise**2).mT).mT
    posterior = dist.MultivariateNormal(mean, precision_matrix=precision)
    q = dist.MultivariateNormal(pair.q(x)[0], scale_tril=torch.diag(pair.log_t.exp()))
    elbo = marginal(pair).log_prob(x) - torch.distributions.kl_divergence(q, posterior)
    estimates = replicated_gradients(OBJECTIVES[name](), pair, (x,))
    assert_within_standard_errors(estimates, gradients(-elbo.sum(), pair))


def marginal(pair):
    """p(x), a function of the parameters."""
    noise = pair.log_noise.exp() ** 2 * torch.eye(pairs.D)
    return dist.MultivariateNormal(pair.bias, pair.weight @ pair.weight.mT + noise)


@pytest.mark.parametrize("name", ["IWAE", "DReG", "STL in IWAE", "STL", "Rényi, α = 2", "VIMCO", "wake-wake"])
def test_at_the_exact_posterior_the_mean_gradient_is_that_of_the_log_evidence(name):
    pair = pairs.FullCovariance()
    (x,), _ = pair.arguments(3)
    at_posterior(pair)
    expected = gradients(-marginal(pair).log_prob(x).sum(), pair)
    assert_within_standard_errors(replicated_gradients(OBJECTIVES[name](), pair, (x,)), expected)


def test_at_the_exact_posterior_every_bound_is_the_log_evidence():
    pair = pairs.FullCovariance()
    (x,), _ = pair.arguments(4)
    evidence = at_posterior(pair).log_evidence(x)
    for make in OBJECTIVES.values():
        terms = pv.evaluate(pair.model, pair.guide, x, loss=make())
        values = terms.elbo if make().is_elbo else terms.bound
        torch.testing.assert_close(values, evidence, rtol=1e-9, atol=1e-9)
        assert make().is_elbo or terms.mean().ess == pytest.approx(make().num_particles)


@pytest.mark.parametrize("name", ["STL", "STL, 3 particles", "DReG", "STL in IWAE", "DReG, K = 1"])
def test_at_the_exact_posterior_the_gradient_of_the_guide_has_no_variance(name):
    """Unlike that of the IWAE estimator."""
    pair = pairs.FullCovariance()
    (x,), _ = pair.arguments(4)
    at_posterior(pair)
    for make, is_zero in ((OBJECTIVES[name], True), (OBJECTIVES["IWAE"], False)):
        found = gradients(make().step(pair.model, pair.guide, Batch((x,), {})).surrogate, pair)
        size = max(found[name].abs().max().item() for name in ("a", "c", "log_t", "lower"))
        assert (size < 1e-9) == is_zero


@pytest.mark.parametrize("name", ["IWAE, K = 1", "STL", "DReG, K = 1"])
def test_the_covariance_of_the_gradient_at_the_mean_field_optimum(name):
    """Of the gradient with respect to the mean of q, with Λ the precision of the posterior and D its
    diagonal: Λ D⁻¹ Λ for the ELBO, and (Λ − D) D⁻¹ (Λ − D) for STL."""
    n = 20_000
    pair, x = pairs.FactorAnalysis(), pairs.FactorAnalysis().arguments(1)[0][0].expand(n, pairs.D).clone()
    model = as_exact(pair)
    best = model.mean_field(x).base_dist
    locs = nn.Parameter(best.loc.clone())

    def guide(x):
        pyro.module("locs", nn.ParameterList([locs]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(locs[: len(x)], best.scale[: len(x)]).to_event(1))

    step = OBJECTIVES[name]().step(pair.model, guide, Batch((x,), {}))
    (g,) = torch.autograd.grad(-step.surrogate, locs)
    precision, variance = model.precision, torch.diag(1 / model.precision.diagonal())
    # with respect to the mean, log q is a constant along z = mean + scale · ε
    left = precision if name == "IWAE, K = 1" else precision - torch.diag(precision.diagonal())
    products = torch.einsum("ni,nj->nij", g, g)
    errors = (products.mean(0) - left @ variance @ left).abs()
    assert (errors < 4 * products.std(0) / n**0.5 + 1e-12).all()
    assert (g.mean(0).abs() < 4 * g.std(0) / n**0.5).all()


def test_the_bound_rises_with_the_number_of_particles_and_stays_below_the_log_evidence():
    pair = pairs.FactorAnalysis()
    x = pair.arguments(1)[0][0]
    evidence = as_exact(pair).log_evidence(x).item()
    means = []
    for k in (1, 2, 4, 16, 64):
        bound = pv.evaluate(pair.model, pair.guide, x.expand(4000, -1).clone(), loss=IWAE(k), seed=k).bound
        means.append((bound.mean().item(), bound.std().item() / 4000**0.5))
    for (low, low_se), (high, high_se) in itertools.pairwise(means):
        assert high - low > 4 * math.hypot(low_se, high_se)
    assert all(mean < evidence + 4 * se for mean, se in means)


def values_at_one_seed(objective, pair, x, seed=3):
    objective.prepare(pair.model, pair.guide, Batch((x,), {}))
    pyro.set_rng_seed(seed)
    return objective.step(pair.model, pair.guide, Batch((x,), {}), differentiate=False)


def test_renyi_bounds_fall_with_alpha_and_contain_iwae_and_the_elbo():
    pair = pairs.FactorAnalysis()
    (x,), _ = pair.arguments(4)
    values = [values_at_one_seed(Renyi(alpha, 5), pair, x).terms.bound for alpha in (-2, -1, 0, 0.5, 1, 2, 5)]
    for higher, lower in itertools.pairwise(values):
        assert (higher > lower).all()
    torch.testing.assert_close(values[2], values_at_one_seed(IWAE(5), pair, x).terms.bound, rtol=0, atol=0)
    elbo = values_at_one_seed(STL(5), pair, x)
    assert values[4].sum().item() == pytest.approx(-elbo.loss.item(), rel=1e-12)
    for alpha in (1 - 1e-6, 1 + 1e-6):
        near = values_at_one_seed(Renyi(alpha, 5), pair, x).terms.bound
        torch.testing.assert_close(near, values[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_gradient_of_renyi_is_that_of_iwae_and_of_the_elbo(alpha):
    pair = pairs.Hierarchical()
    (x,), _ = pair.arguments(4)
    found = []
    for objective in (
        Renyi(alpha, 4),
        IWAE(4) if alpha == 0 else Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1),
    ):
        if alpha == 0 or isinstance(objective, Renyi):
            objective.prepare(pair.model, pair.guide, Batch((x,), {}))
        pyro.set_rng_seed(5)
        found.append(gradients(objective.differentiable_loss(pair.model, pair.guide, x), pair))
    assert_equal_gradients(*found)


@pytest.mark.parametrize("name", ["IWAE", "IWAE, K = 1", "Rényi, α = ½", "Rényi, α = −1", "Rényi, α = 1"])
@pytest.mark.parametrize("kind", [pairs.Hierarchical, pairs.Positive, pairs.Shared])
def test_the_gradient_equals_finite_differences_at_one_seed(kind, name):
    pair, objective = kind(), OBJECTIVES[name]()
    (x,), _ = pair.arguments(4)
    objective.prepare(pair.model, pair.guide, Batch((x,), {}))

    def loss(differentiate=False):
        pyro.set_rng_seed(2)
        return objective.step(pair.model, pair.guide, Batch((x,), {}), differentiate=differentiate)

    found, h = gradients(loss(True).surrogate, pair), 1e-5
    direction = {name: seeded(p.numel(), seed=7).reshape(p.shape) for name, p in pair.named_parameters()}
    values = []
    for sign in (1, -2, 1):  # the last one restores the parameters
        with torch.no_grad():
            for name, p in pair.named_parameters():
                p.add_(sign * h * direction[name])
        values.append(-loss().loss.item())
    slope = sum((found[name] * direction[name]).sum().item() for name in found)
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["wake-wake", "half wake, half sleep", "VIMCO", "DReG", "STL in IWAE"])
def test_the_gradient_of_the_model_is_that_of_iwae_at_equal_draws(name):
    pair = pairs.FactorAnalysis()
    (x,), _ = pair.arguments(4)
    found = []
    for objective in (OBJECTIVES[name](), IWAE(3)):
        objective.prepare(pair.model, pair.guide, Batch((x,), {}))
        pyro.set_rng_seed(5)
        found.append(gradients(objective.step(pair.model, pair.guide, Batch((x,), {})).surrogate, pair))
    for site in THETA:
        torch.testing.assert_close(found[0][site], found[1][site], rtol=1e-12, atol=1e-12)


# ---- the sleep phase


def at_sleep_optimum(pair, variance):
    """Set the guide to the posterior mean, and variances ``variance``."""
    model = as_exact(pair)
    offset = model.posterior(torch.zeros(1, pairs.D)).mean
    with torch.no_grad():
        pair.a.copy_((model.posterior(torch.eye(pairs.D)).mean - offset).mT)
        pair.c.copy_(offset[0])
        pair.log_t.copy_(variance(model.precision).log() / 2)
    return model.precision


@pytest.mark.parametrize(
    "make",
    [WakeSleep, lambda: ReweightedWakeSleep(1, wake_phi=0.0, sleep_phi=1.0)],
    ids=["wake", "reweighted"],
)
@pytest.mark.parametrize("at_optimum", [True, False])
def test_sleep_ends_at_the_diagonal_of_the_posterior_covariance(make, at_optimum):
    """At other variances v the gradient with respect to log √v is (Λ⁻¹)ⱼⱼ/vⱼ − 1, such as at 1/Λⱼⱼ."""
    pair = pairs.FactorAnalysis(seed=1)
    (x,), _ = pair.arguments(2)
    with torch.no_grad():
        pair.weight.mul_(3)  # so that the latents are correlated under the posterior
    precision = at_sleep_optimum(pair, lambda p: p.inverse().diagonal() if at_optimum else 1 / p.diagonal())
    slope = 0.0 if at_optimum else precision.inverse().diagonal() * precision.diagonal() - 1
    expected = {
        "a": torch.zeros_like(pair.a),
        "c": torch.zeros_like(pair.c),
        "log_t": len(x) * slope * torch.ones(pairs.K),
    }
    estimates = replicated_gradients(make(), pair, (x,))
    assert_within_standard_errors(estimates, expected)
    if not at_optimum:
        assert (estimates["log_t"][0] > 20 * estimates["log_t"][1]).all()


def test_sleep_of_one_latent_ends_at_the_posterior_mean_and_variance():
    """z ~ N(0, 1), x ~ N(w z, s²): a = w/(w² + s²) = .5190 and s²/(w² + s²) = .2215 at w = 1.5, s = .8."""
    a, log_t = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(1.5 * z, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, log_t.exp()))

    objective, x, path = WakeSleep(), seeded(2000), []
    optim = torch.optim.Adam([a, log_t], lr=0.03)
    for i in range(260):
        optim.zero_grad()
        objective.loss_and_grads(model, guide, x)
        optim.step()
        if i >= 100:
            path.append([a.item(), log_t.exp().square().item()])
    blocks = torch.tensor(path).reshape(8, 20, 2).mean(1)
    error, se = (blocks.mean(0) - torch.tensor([0.5190, 0.2215])).abs(), blocks.std(0) / 8**0.5
    assert (error < 4 * se + 5e-5).all()
    assert (se < 3e-3).all()


# ---- refused


def two_programs(model_site=None, guide_site=None, **options):
    """A pair of plain functions whose latent, and the guide of it, are replaced."""
    a = nn.Parameter(torch.tensor(0.3))
    encoder = options.get("encoder") or (lambda x: dist.Normal(a * x[:, 0], 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = (model_site or (lambda x: pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))))(x)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x)

    def guide(x):
        pyro.param("a", a)
        with pyro.plate("data", len(x)):
            (guide_site or (lambda x: pyro.sample("z", encoder(x))))(x)

    return model, guide


def discrete(**infer):
    return (
        lambda x: pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x)))),
        lambda x: pyro.sample(
            "z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)) * x[:, 0]), infer=infer
        ),
    )


def observing_guide(x):
    z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 1])


def factor_in_guide(x):
    z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
    pyro.factor("f", -(z**2), has_rsample=True)


def planar_flow():
    flow = dist.transforms.Planar(1)

    def site(x):
        pyro.module("flow", flow)
        base = dist.Normal(x[:, :1], 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            site(x)

    return model, guide


def without_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(2), obs=x)

    return model, lambda x: pyro.sample(
        "z", dist.Normal(pyro.param("a", torch.tensor(0.3)) * x[:, 0], 1.0).to_event(1)
    )


def random_walk():
    """The latent of a row depends on that of the row before."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            loc = z.cumsum(-1).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, torch.ones(3)).to_event(1), obs=x)

    return model, two_programs()[1]


def scaled(inner):
    def site(x):
        with poutine.scale(scale=inner):
            return pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return two_programs(site)


def autoguide(kind):
    model, _ = two_programs()
    return model, kind(model)


def subsampled_entries():
    """A plate within a datum that subsamples."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("entries", 3, subsample_size=2, dim=-1) as entries:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, entries])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)) * x[:, :1], 1.0))

    return model, guide


def observes_a_function():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x.tanh())

    return model, two_programs()[1]


def autoregressive():
    """The mean of an entry depends on the entry before."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            loc = z.unsqueeze(-1) + torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
            pyro.sample("x", dist.Normal(loc, torch.ones(3)).to_event(1), obs=x)

    return model, two_programs()[1]


def transposed():
    """The model observes x.mT: simulated values in the order of x would be others."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.plate("entries", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    return model, two_programs()[1]


NOT_REPARAMETERIZED = "draws of 'z' have no gradient, since Bernoulli is not reparameterized"
FROM_AUXILIARY = "'z' is computed from auxiliary sites, as in autoguides"
NO_INVERSE = "the density of 'z' at a given value is not known"
REFUSED = {
    "discrete": (
        lambda: two_programs(*discrete()),
        NOT_REPARAMETERIZED,
        ["IWAE", "DReG", "STL", "Rényi, α = ½"],
    ),
    "enumerated guide": (
        lambda: two_programs(*discrete(enumerate="parallel")),
        "'z' is summed out, so its density cancels",
        [*FOR_DISCRETE, "IWAE", "STL"],
    ),
    "observing guide": (lambda: two_programs(None, observing_guide), "it observes 'y'", list(OBJECTIVES)),
    "factor in guide": (lambda: two_programs(None, factor_in_guide), "it observes 'f'", list(OBJECTIVES)),
    "AutoNormal": (
        lambda: autoguide(AutoNormal),
        FROM_AUXILIARY,
        ["DReG", "STL in IWAE", "STL", "wake-sleep", "half wake, half sleep"],
    ),
    "AutoDiagonalNormal": (lambda: autoguide(AutoDiagonalNormal), "in no data plate", NONLINEAR),
    "AutoDelta": (lambda: autoguide(AutoDelta), "'z' is a point", list(OBJECTIVES)),
    "planar flow": (
        planar_flow,
        NO_INVERSE,
        ["DReG", "STL in IWAE", "STL", "wake-sleep", "wake-wake", "half wake, half sleep"],
    ),
    "no plate": (without_plate, "'z' and 'x' lie in no data plate", NONLINEAR),
    "rows that depend on each other": (
        random_walk,
        "when the latents of another row are replaced",
        NONLINEAR,
    ),
    "different scales": (lambda: scaled(0.5), "'z' is scaled by 0.5 and 'x' by 1", NONLINEAR),
    "a tensor of scales": (lambda: scaled(torch.arange(1.0, 6.0)), "'z' has a tensor of scales", NONLINEAR),
    "subsampling within a datum": (subsampled_entries, "which subsamples 2 of its 3 rows", NONLINEAR),
    "observes a function of the data": (
        observes_a_function,
        "sleep phase: the value that the model observes at 'x'.*is not one of its arguments",
        ["wake-sleep", "half wake, half sleep", "reweighted, sleep"],
    ),
    "observes a transposed argument": (
        transposed,
        "sleep phase: the value that the model observes at 'x'.*is not one of its arguments",
        ["wake-sleep", "half wake, half sleep", "reweighted, sleep"],
    ),
    "a likelihood given the data": (
        autoregressive,
        "sleep phase: the distribution of 'x' depends on an observed argument",
        ["wake-sleep", "half wake, half sleep", "reweighted, sleep"],
    ),
}


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in REFUSED for name in REFUSED[case][2] if name not in VARIANTS]
)
def test_a_pair_for_which_the_objective_is_not_defined_is_refused(case, name):
    make, message, _ = REFUSED[case]
    model, guide = make()
    x = seeded(5, 3)
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name]().loss_and_grads(model, guide, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VIMCO(1), "VIMCO: num_particles is 1; expected 2 or more"),
        (lambda: ReweightedWakeSleep(1), "ReweightedWakeSleep: num_particles is 1; expected 2 or more"),
        (lambda: ReweightedWakeSleep(wake_phi=0.0), "wake_phi and sleep_phi are 0"),
        (lambda: ReweightedWakeSleep(wake_phi=-1.0), "wake_phi is -1.0; expected 0 or a positive number"),
        (lambda: ReweightedWakeSleep(sleep_phi=math.nan), "sleep_phi is nan"),
        (lambda: ReweightedWakeSleep(sleep_phi=math.inf), "sleep_phi is inf"),
        (lambda: ReweightedWakeSleep(sleep_phi="1"), "sleep_phi is '1'"),
        (lambda: IWAE(0), "IWAE: num_particles"),
        (lambda: IWAE(2.5), "IWAE: num_particles"),
        (lambda: IWAE(True), "IWAE: num_particles"),
        (lambda: STL(-1), "STL: num_particles"),
        (lambda: WakeSleep(0), "WakeSleep: num_particles"),
        (lambda: IWAE(5, "DREG"), "IWAE: estimator is 'DREG'; expected"),
        (lambda: Renyi(math.inf), "Renyi: alpha is inf; expected a finite number"),
        (lambda: Renyi(math.nan), "Renyi: alpha is nan"),
        (lambda: Renyi("0"), "Renyi: alpha is '0'"),
    ],
)
def test_invalid_options_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_random_walk_is_allowed_without_the_check():
    model, guide = random_walk()
    with pytest.raises(ValueError, match="check=False"):
        CompiledSVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), IWAE(3)).step(seeded(5, 3))
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), IWAE(3), check=False)
    assert math.isfinite(svi.step(seeded(5, 3)))


# ---- SVI: traced steps, optimizers, networks


def objective_step(svi, i):
    return svi.step(seeded(6, pairs.D, seed=i))


def a_pair(kind):
    def make():
        pair = kind(seed=1)
        return pair.model, pair.guide

    return make


TRACED = ["DReG", "STL", "VIMCO", "half wake, half sleep"]
CASES = [  # the others are slow
    *[(pairs.FactorAnalysis, name, name in TRACED) for name in OBJECTIVES],
    *[
        (kind, name, False)
        for kind in (pairs.Hierarchical, pairs.HierarchicalNotVectorized, pairs.Shared)
        for name in TRACED
    ],
    *[(pairs.Discrete, name, False) for name in ("VIMCO", "half wake, half sleep")],
]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if is_fast else pytest.mark.slow, id=f"{kind.__name__}-{name}")
        for kind, name, is_fast in CASES
    ],
)
def test_a_traced_step_equals_the_eager_step_of_pyro(kind, name):
    svi = train_and_compare(a_pair(kind), 11, loss=OBJECTIVES[name], step=objective_step)
    assert ": traced, 11 steps" in svi.explain()


@pytest.mark.slow
def test_a_changed_option_of_an_objective_is_traced_again():
    def change(objectives):
        def at(model, guide, i):
            if i == 5:
                objectives[-1].alpha = 2.0

        return at

    made = []
    train_and_compare(
        a_pair(pairs.FactorAnalysis),
        8,
        loss=lambda: made.append(Renyi(0.5, 3)) or made[-1],
        step=objective_step,
        change=change(made),
    )


NETWORKS = {
    "dropout in the encoder": lambda: with_layers(nn.Dropout(0.5), nn.Identity()),
    "dropout in the decoder": lambda: with_layers(nn.Identity(), nn.Dropout(0.5)),
    "batch norm in the encoder": lambda: with_layers(nn.BatchNorm1d(8), nn.Identity()),
    "batch norm in the decoder": lambda: with_layers(nn.Identity(), nn.BatchNorm1d(8)),
    "layer norm in both": lambda: with_layers(nn.LayerNorm(8), nn.LayerNorm(8)),
    "flow": lambda: vae(flows.AffineAutoregressive),
    "full covariance": lambda: vae(conditionals.MultivariateNormal),
    "plain functions": functions,
    "Gamma": lambda: of_family(lambda x: dist.Gamma(x.exp(), 1.5).to_event(1)),
    "Dirichlet": lambda: of_family(lambda x: dist.Dirichlet(x.exp())),
    "relaxed Bernoulli": lambda: of_family(
        lambda x: dist.RelaxedBernoulli(torch.tensor(0.5), logits=x).to_event(1)
    ),
    "log-normal": lambda: of_family(lambda x: dist.LogNormal(x, 0.5).to_event(1)),
    "matrices": lambda: of_family(lambda x: dist.Normal(x.reshape(*x.shape[:-1], 2, 2), 0.5).to_event(2), 4),
}


def of_family(conditional, size=2):
    """A pair whose latent has a prior and a guide of one family: ``conditional`` of logits."""
    decoder, encoder = nn.Linear(size, 6), nn.Linear(6, size)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", conditional(torch.zeros(size)))
            mean = decoder(z.flatten(-2) if size == 4 else z)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", conditional(encoder(x)))

    return model, guide


def with_layers(of_encoder, of_decoder):
    made = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nn.Sequential(nn.Linear(2, 8), of_decoder, nn.Linear(8, 8)), event_shape=6),
        conditionals.Normal(nn.Sequential(nn.Linear(6, 8), of_encoder, nn.Linear(8, 8)), event_shape=2),
    )
    return made.model, made.guide


@pytest.mark.parametrize("name", NETWORKS)
def test_at_equal_draws_the_gradients_of_iwae_stl_in_iwae_and_wake_wake_add_up(name):
    """∇φ L_K = Σ w̃ ∂ log w/∂z · ∂z/∂φ − Σ w̃ ∇φ log q(z|x), and the gradients of the model are equal."""
    model, guide = NETWORKS[name]()
    x, found, losses = seeded(7, 6), [], []
    for objective in (IWAE(3), IWAE(3, "stl"), ReweightedWakeSleep(3)):
        objective.prepare(model, guide, Batch((x,), {}))
        pyro.set_rng_seed(4)
        losses.append(objective.loss_and_grads(model, guide, x))
        named = dict(pyro.get_param_store().named_parameters())
        found.append({site: p.grad.clone() for site, p in named.items() if p.grad is not None})
        for p in named.values():
            p.grad = None
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] == pytest.approx(losses[2], rel=1e-9)
    iwae, stl, wake = found
    assert iwae.keys() == stl.keys() == wake.keys()
    with poutine.trace(param_only=True) as of_model:
        model(x)
    for site, g in iwae.items():
        expected = stl[site] if site in of_model.trace.nodes else stl[site] - wake[site]
        torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-9, msg=site)
        if site in of_model.trace.nodes:
            torch.testing.assert_close(g, wake[site], rtol=1e-9, atol=1e-9, msg=site)
    assert any(site not in of_model.trace.nodes and g.any() for site, g in iwae.items())


def plain_programs(pair):
    """The programs of a factor analysis as plain functions whose parameters are in the param store."""

    def param(name, start, **options):
        return pyro.param(name, lambda: start.detach().clone(), **options)

    def model(x):
        scale = param("noise", pair.log_noise.exp(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(pairs.K), 1.0).to_event(1))
            loc = z @ param("weight", pair.weight).mT + param("bias", pair.bias)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x):
        scale = param("t", pair.log_t.exp(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            loc = x @ param("a", pair.a).mT + param("c", pair.c)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


@pytest.mark.parametrize("svi_class", [SVI, CompiledSVI])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parameters_of_plain_functions_are_trained_as_those_of_modules(name, svi_class):
    """From the first step on, by Pyro's SVI and that of the library."""
    results = []
    for is_plain in (False, True):
        with pyro.get_param_store().scope():
            pair = pairs.FactorAnalysis()
            model, guide = plain_programs(pair) if is_plain else (pair.model, pair.guide)
            svi = svi_class(model, guide, pyro.optim.SGD({"lr": 1e-3}), OBJECTIVES[name]())
            losses = []
            for i in range(3):
                pyro.set_rng_seed(i)
                losses.append(svi.step(seeded(4, pairs.D, seed=i)))
            params = dict(pyro.get_param_store().named_parameters())
            if is_plain:
                params = {"log_noise": params["noise"], "log_t": params["t"]} | params
            results.append((losses, {key.removeprefix("pair$$$"): p.detach() for key, p in params.items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    for site, p in results[0][1].items():
        torch.testing.assert_close(p, results[1][1][site], rtol=1e-9, atol=1e-9, msg=site)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_copies_of_an_objective_have_its_options_and_its_value(name):
    objective, pair = OBJECTIVES[name](), pairs.FactorAnalysis()
    (x,), _ = pair.arguments()
    value = values_at_one_seed(objective, pair, x).loss
    for made in (copy.copy(objective), copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert made.options() == objective.options()
        assert repr(made) == repr(objective)
        assert made.num_particles == objective.num_particles
        assert torch.equal(values_at_one_seed(made, pair, x).loss, value)
    assert eval(repr(objective)).options() == objective.options()


@pytest.mark.parametrize("name", ["IWAE", "half wake, half sleep", "STL"])
def test_an_objective_may_be_used_for_one_pair_after_another_and_for_batches_of_other_sizes(name):
    objective = OBJECTIVES[name]()
    for kind, n in ((pairs.FactorAnalysis, 5), (pairs.HierarchicalNotVectorized, 3), (pairs.InnerPlate, 4)):
        pair = kind()
        for rows in (n, 1, n + 3):
            check_step(objective, pair, rows)


def test_evaluate_leaves_the_objective_of_a_fit_as_it_is_and_averages_its_evaluations():
    pair, objective = pairs.FactorAnalysis(), IWAE(4)
    (x,), _ = pair.arguments(9)
    one = pv.evaluate(pair.model, pair.guide, x, loss=objective, batch_size=4)
    assert objective._pair is None
    many = pv.evaluate(pair.model, pair.guide, x, loss=objective, num_particles=300)
    assert all(part.shape == (9,) for part in (*one, *many))
    assert ((many.bound > many.elbo) & (many.bound < as_exact(pair).log_evidence(x) + 0.1)).all()
    torch.testing.assert_close(many.elbo, closed_form_elbo(pair, x), rtol=0, atol=0.3)
    torch.testing.assert_close(many.elbo, many.reconstruction - many.kl, rtol=1e-9, atol=1e-9)


# ---- checkpoints


def not_vectorized():
    pair = pairs.HierarchicalNotVectorized().float()
    return pair.model, pair.guide, list(pair.parameters())


QUICK = {"DReG, not vectorized", "half wake, half sleep, early stopping"}  # in the default run
RESUMED = {
    "DReG, not vectorized": {
        "pair": not_vectorized,
        "x": lambda: seeded(50, pairs.D).float(),
        "loss": lambda: IWAE(3, "dreg"),
        "validation": seeded(20, pairs.D, seed=1).float(),
    },
    "wake-sleep": {"loss": WakeSleep},
    "half wake, half sleep, early stopping": {
        "loss": lambda: ReweightedWakeSleep(3, wake_phi=0.5, sleep_phi=0.5),
        "patience": 1,
    },
    "VIMCO, clipped": {"loss": lambda: VIMCO(3), "clip_norm": 5.0},
    "STL, annealed": {"loss": STL, "beta": lambda t: min(1.0, t / 3)},
}


@pytest.mark.parametrize(
    ("name", "compile"),
    [pytest.param(name, False, marks=[] if name in QUICK else pytest.mark.slow) for name in RESUMED]
    + [pytest.param(name, "trace", marks=pytest.mark.slow) for name in RESUMED],
)
def test_a_resumed_fit_equals_the_uninterrupted_fit_bitwise(tmp_path, monkeypatch, name, compile):
    torch.set_default_dtype(torch.float)
    options = {"num_epochs": 2, "compile": compile} | RESUMED[name]
    whole = run(**options)
    for steps in (5,) if name in QUICK and not compile else (1, 5):
        folder = tmp_path / str(steps)
        run_until_step(monkeypatch, steps, checkpoint=folder, **options)
        assert_same(run(checkpoint=folder, resume="last", seed=77, **options), whole)


def test_a_checkpoint_has_the_options_of_the_objective(tmp_path):
    torch.set_default_dtype(torch.float)
    options = {"num_epochs": 1, "validation": None, "checkpoint": tmp_path}
    run(loss=lambda: IWAE(3, "dreg"), **options)
    content = read_checkpoint(Checkpoints(tmp_path).paths()[-1])
    assert content["config"]["loss"] == {"name": "IWAE", "num_particles": 3, "estimator": "dreg"}
    for other in (lambda: IWAE(3), lambda: IWAE(4, "dreg"), lambda: VIMCO(3), Trace_ELBO):
        with pytest.raises(MismatchError, match="loss is"):
            run(loss=other, resume="last", **options)


# ---- several processes


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_rows(tmp_path):
    """Each update is N/B times the sum of the gradients of the rows of both, at the draws of both. Draws and
    weights of one process do not depend on those of the other."""
    assert run_group(2, train_rank, tmp_path)
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    for text in texts:
        *trained, refused = text.splitlines()
        assert trained == [f"{name}: 6 steps" for name in CASES_OF_RANKS]
        assert "'v' is shared by all data, so no factor" in refused
