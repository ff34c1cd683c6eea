"""Objectives beyond the ELBO: values and gradients by other formulas, in every combination, or refused."""

import copy
import itertools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, exact, flows, nets, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError, read_checkpoint
from pyro_vae.data.batches import Batch
from pyro_vae.infer import IWAE, STL, VIMCO, Renyi, ReweightedWakeSleep, WakeSleep
from pyro_vae.infer.svi import SVI as CompiledSVI
from tests.support import objective_pairs as pairs
from tests.support.fits import assert_same, run, run_until_step
from tests.support.objective_pairs import CONTINUOUS, DISCRETE, recorded_draws, reference
from tests.support.oracles import seeded
from tests.support.steps import train_and_compare, vae

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


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", CONTINUOUS)
def test_value_and_gradient_equal_the_formulas_at_the_same_draws(kind, name):
    check_step(OBJECTIVES[name](), kind())


@pytest.mark.parametrize("name", FOR_DISCRETE)
@pytest.mark.parametrize("kind", DISCRETE)
def test_with_discrete_latents_value_and_gradient_equal_the_formulas_at_the_same_draws(kind, name):
    check_step(OBJECTIVES[name](), kind())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_one_row(name):
    check_step(OBJECTIVES[name](), pairs.FactorAnalysis(), n=1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_scale_of_all_sites_is_a_factor_of_the_objective(name):
    check_step(OBJECTIVES[name](), pairs.Hierarchical(), handler=poutine.scale(scale=2.5), scale=2.5)


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


def record_steps(objective, pair):
    """Record the parameters, the batch and the draws of each step of an objective."""
    records, step = [], objective.step

    def recording(model, guide, batch, **options):
        before = copy.deepcopy(pair.state_dict())
        done = step(model, guide, batch, **options)
        arguments = tuple(part.clone() for part in batch.args)
        records.append((before, arguments, recorded_draws(done.traces, pair), pair.seen[-1]))
        return done

    objective.step = recording
    return records


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


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [pairs.InnerPlate, pairs.MaskedData, pairs.Enumerated])
def test_in_minibatches_the_objective_of_each_datum_is_multiplied_by_the_number_of_data_over_rows(kind, name):
    fit_and_compare(kind, name)


@pytest.mark.parametrize("name", ["VIMCO", "half wake, half sleep", "wake-sleep"])
def test_minibatches_with_discrete_latents(name):
    fit_and_compare(pairs.Discrete, name)


@pytest.mark.parametrize("name", ["IWAE", "DReG", "STL, 3 particles", "VIMCO", "half wake, half sleep"])
def test_minibatches_of_particles_that_cannot_be_vectorized(name):
    fit_and_compare(pairs.HierarchicalNotVectorized, name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_data_at_once_with_a_latent_that_all_share(name):
    history, means = fit_and_compare(pairs.Shared, name, batch_size=None)
    assert [epoch.train.objective for epoch in history.epochs] == pytest.approx(means)


@pytest.mark.parametrize("name", OBJECTIVES)
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


class ScaledByPair(pairs.FactorAnalysis):
    """The pair itself scales its minibatches by N/B."""

    def model(self, x):
        with poutine.scale(scale=7 / len(x)):
            super().model(x)

    def guide(self, x):
        with poutine.scale(scale=7 / len(x)):
            super().guide(x)


@pytest.mark.parametrize("name", ["IWAE", "DReG", "STL", "VIMCO", "wake-sleep"])
def test_a_pair_that_scales_its_minibatches_itself(name):
    fit_and_compare(ScaledByPair, name)


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
    assert_within_standard_errors(estimates, expected, ["weight", "bias", "log_noise"])  # not with respect to θ


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
    """z with 2 bits, x with 3 bits, each row with parameters of its own, so that a gradient per row is
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
    net = exact.SigmoidBeliefNet(parameters["weight"].detach(), bias=-0.3, prior_logits=parameters["prior_logits"].detach())
    posterior = net.posterior(DATUM.double().unsqueeze(0)).probs[0]
    torch.testing.assert_close(posterior, log_p.softmax(0).detach(), rtol=1e-12, atol=1e-12)
