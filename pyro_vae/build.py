"""From the words of the command line to objects: data sets, likelihoods, guides and priors by name.

Only the command line speaks in names; everything below takes the objects themselves.
"""

import importlib
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributions import constraints

from pyro_vae import conditionals, nets, priors
from pyro_vae.data import Data, load
from pyro_vae.vae import VAE

LIKELIHOODS = {
    "bernoulli": conditionals.Bernoulli,
    "continuous-bernoulli": conditionals.ContinuousBernoulli,
    "normal": conditionals.Normal,
    "laplace": conditionals.Laplace,
    "student-t": conditionals.StudentT,
    "beta": conditionals.Beta,
    "categorical": conditionals.Categorical,
}
GUIDES = {
    "normal": conditionals.Normal,
    "full": conditionals.MultivariateNormal,
    "low-rank": conditionals.LowRankMultivariateNormal,
    "laplace": conditionals.Laplace,
    "student-t": conditionals.StudentT,
}
PRIORS = ("standard-normal", "normal", "mixture", "vamp")
DATASETS = ("digits", "mnist", "fashion-mnist", "frey-faces", "ring")


class Defaults(NamedTuple):
    """What a data set is trained with where the command line does not say."""

    likelihood: str
    latent_dim: int
    hidden: int
    num_epochs: int
    learning_rate: float


DEFAULTS = {
    "digits": Defaults("bernoulli", 2, 200, 200, 3e-3),
    "mnist": Defaults("bernoulli", 20, 500, 15, 1e-3),
    "fashion-mnist": Defaults("bernoulli", 20, 500, 15, 1e-3),
    "frey-faces": Defaults("normal", 2, 200, 200, 1e-3),
    "ring": Defaults("normal", 2, 200, 200, 1e-3),
}


def build_data(dataset: str, likelihood: str, data_dir: str | None, limit: int | None = None) -> tuple[Data, Data]:
    """``(train, test)`` as the likelihood wants them: stochastically binarized for a Bernoulli, grey levels for a
    Categorical, grey values in [0, 1] for a density."""
    train, test = load(dataset, binarize="stochastic" if likelihood == "bernoulli" else "none", data_dir=data_dir)  # type: ignore[arg-type]
    if likelihood == "categorical":
        train, test = train.levels(), test.levels()
    if likelihood == "beta":  # the open interval
        raise ValueError("likelihood: beta has density only inside (0, 1), and images hold 0 and 1; use continuous-bernoulli")
    return (train.head(limit), test.head(limit)) if limit else (train, test)


def build_vae(train: Data, *, likelihood: str, guide: str, prior: str, latent_dim: int, hidden: tuple[int, ...]) -> VAE:
    """The VAE that ``pyro-vae train`` trains: MLP trunks of tanh units on both sides."""
    x_shape = tuple(train.x.shape[1:])
    options: dict[str, Any] = {}
    read: nn.Module = nets.MLP(x_shape, hidden)
    if likelihood == "categorical":
        levels = train.num_levels or 256
        options["num_classes"] = levels
        read = nn.Sequential(nets.Standardize(0, levels - 1), read)
    if likelihood in ("normal", "laplace", "student-t"):
        options["min_scale"] = 0.02
        if train.num_levels:  # grey values: means through a sigmoid, as AEVB has them for Frey Face
            options["loc_constraint"] = constraints.unit_interval
    decoder = LIKELIHOODS[likelihood](nets.MLP(latent_dim, hidden[::-1]), event_shape=x_shape, **options)
    encoder = GUIDES[guide](read, event_shape=latent_dim)
    return VAE(build_prior(prior, encoder, train, latent_dim), decoder, encoder)


def build_prior(prior: str, encoder: conditionals.Conditional, train: Data, latent_dim: int) -> priors.Prior:
    if prior == "vamp":
        return priors.VampPrior(encoder, train.x[:100].to(torch.get_default_dtype()))
    if prior == "mixture":
        return priors.GaussianMixture(latent_dim)
    return priors.Normal(latent_dim) if prior == "normal" else priors.StandardNormal(latent_dim)


def build_pair(factory: str) -> Any:
    """The user's own pair from ``module:factory``: what the factory returns, a ``(model, guide)`` or anything with
    ``.model`` and ``.guide``."""
    module, _, name = factory.partition(":")
    if not name:
        raise ValueError(f"--pair: expected module:factory, such as my_pair:make, but got {factory!r}")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--pair: cannot take {name!r} from module {module!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if isinstance(made, tuple) and len(made) == 2:
        return made
    if hasattr(made, "model") and hasattr(made, "guide"):
        return made
    raise ValueError(f"--pair: {factory} returned {type(made).__name__}; expected (model, guide) or an object with both")
