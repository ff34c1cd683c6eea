"""Estimators and stochastic bounds of the log evidence log p(x), in nats per datum, for any pair."""

from pyro_vae.evidence.annealing import Annealing, ais, bdmc, reverse_ais
from pyro_vae.evidence.hmc import HMC, Transition
from pyro_vae.evidence.importance import elbo, importance, importance_upper, prior_monte_carlo
from pyro_vae.evidence.path import Path, Point
from pyro_vae.evidence.reciprocal import reciprocal_importance
from pyro_vae.evidence.result import Evidence, Sandwich
from pyro_vae.evidence.simulate import Simulated, simulate
from pyro_vae.evidence.smc import smc

__all__ = [
    "HMC",
    "Annealing",
    "Evidence",
    "Path",
    "Point",
    "Sandwich",
    "Simulated",
    "Transition",
    "ais",
    "bdmc",
    "elbo",
    "importance",
    "importance_upper",
    "prior_monte_carlo",
    "reciprocal_importance",
    "reverse_ais",
    "simulate",
    "smc",
]
