"""Pyro models whose posterior and evidence are known: methods ``posterior(x)`` and ``log_evidence(x)``.

The formulas are in the docstrings of the classes. :class:`Grid` computes posterior and evidence by quadrature
for any Pyro model with one or two latent dimensions per datum.
"""

from pyro_vae.exact.belief_net import SigmoidBeliefNet
from pyro_vae.exact.conjugate import BetaBernoulli, GammaPoisson
from pyro_vae.exact.gaussian import BayesianLinearRegression, LinearGaussian, NormalNormal
from pyro_vae.exact.grid import Grid
from pyro_vae.exact.mixture import FiniteMixture, MixturePrior
from pyro_vae.exact.model import ExactModel
from pyro_vae.exact.relu import ReluDecoder
from pyro_vae.exact.shapes import Banana, Funnel
from pyro_vae.exact.state_space import LinearGaussianStateSpace

__all__ = [
    "Banana",
    "BayesianLinearRegression",
    "BetaBernoulli",
    "ExactModel",
    "FiniteMixture",
    "Funnel",
    "GammaPoisson",
    "Grid",
    "LinearGaussian",
    "LinearGaussianStateSpace",
    "MixturePrior",
    "NormalNormal",
    "ReluDecoder",
    "SigmoidBeliefNet",
]
