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
