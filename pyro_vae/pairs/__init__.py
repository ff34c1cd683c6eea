"""Inspect any pair of a Pyro model and guide, report its problems, and compute its log-weights."""

from pyro_vae.pairs.check import PairReport, SiteReport, check_pair
from pyro_vae.pairs.elbo import ElboTerms, MeanElbo, elbo_terms
from pyro_vae.pairs.log_weights import JointLogWeights, joint_log_weights, log_weights
from pyro_vae.pairs.structure import Structure, inspect
from pyro_vae.pairs.traces import run_pair

__all__ = [
    "ElboTerms",
    "JointLogWeights",
    "MeanElbo",
    "PairReport",
    "SiteReport",
    "Structure",
    "check_pair",
    "elbo_terms",
    "inspect",
    "joint_log_weights",
    "log_weights",
    "run_pair",
]
