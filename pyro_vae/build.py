"""From the words of the command line to objects: data sets, likelihoods, guides and priors by name.

Only the command line speaks in names; everything below takes the objects themselves.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import conditionals, nets, priors
from pyro_vae.data import Data, load
from pyro_vae.pair import Program
from pyro_vae.vae import VAE

LIKELIHOODS: dict[str, Callable[..., conditionals.Conditional]] = {
    "bernoulli": conditionals.Bernoulli,
    "continuous-bernoulli": conditionals.ContinuousBernoulli,
    "normal": conditionals.Normal,
    "laplace": conditionals.Laplace,
    "student-t": conditionals.StudentT,
    "categorical": conditionals.Categorical,
}
GUIDES: dict[str, Callable[..., conditionals.Conditional]] = {
    "normal": conditionals.Normal,
    "full": conditionals.MultivariateNormal,
    "low-rank": conditionals.LowRankMultivariateNormal,
    "laplace": conditionals.Laplace,
    "student-t": conditionals.StudentT,
}
PRIORS = ("standard-normal", "normal", "mixture", "vamp")
# What a data set is trained with where the command line does not say.
_MNIST = {"likelihood": "bernoulli", "latent_dim": 20, "hidden": "500", "num_epochs": 15, "learning_rate": 1e-3, "warm_up": 0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": _MNIST
    | {"likelihood": "continuous-bernoulli", "latent_dim": 2, "hidden": "200", "num_epochs": 200, "learning_rate": 3e-3},
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "frey-faces": _MNIST | {"likelihood": "normal", "latent_dim": 2, "hidden": "200", "num_epochs": 200},
    "ring": _MNIST
    | {"likelihood": "normal", "latent_dim": 2, "hidden": "100,100", "num_epochs": 200, "learning_rate": 3e-3, "warm_up": 50},
}
PSEUDO_INPUTS = 100


class Pair(NamedTuple):
    """A model and a guide; ``vae`` is the VAE that they belong to, if any."""

    model: Program
    guide: Program
    vae: VAE | None = None


def build_data(config: Mapping[str, Any], data_dir: Path | None) -> tuple[Data, Data]:
    """``(train, test)`` as the likelihood wants them: stochastically binarized for a Bernoulli, grey levels for a
    Categorical, grey values in [0, 1] for a density. A pair of one's own says by ``binarize`` what it wants."""
    train, test = load(config["dataset"], binarize=config["binarize"], data_dir=data_dir)
    if config["pair"] is None and config["likelihood"] == "categorical":
        train, test = train.levels(), test.levels()
    where = config["device"], getattr(torch, config["dtype"])
    return train.to(*where), test.to(*where)


def build_pair(config: Mapping[str, Any], train: Data | None = None) -> Pair:
    """The pair that a run's configuration describes.

    :param train: data for the pseudo-inputs of a VampPrior to start from; not needed where weights are loaded after.
    """
    pair = _import_pair(config["pair"]) if config["pair"] else _vae(config, train)
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(device=config["device"], dtype=getattr(torch, config["dtype"]))
    return pair


def _vae(config: Mapping[str, Any], train: Data | None) -> Pair:
    """MLP trunks of tanh units on both sides, as in AEVB."""
    x_shape, levels, likelihood = tuple(config["event_shape"]), config["num_levels"], config["likelihood"]
    hidden, latent_dim = tuple(config["hidden"]), config["latent_dim"]
    options: dict[str, Any] = {}
    reader: torch.nn.Module = nets.MLP(x_shape, hidden)
    if likelihood == "categorical":
        if levels is None:
            raise ValueError(f"--likelihood categorical: {config['dataset']} has no grey levels; expected e.g. normal")
        options["num_classes"] = levels
        reader = torch.nn.Sequential(nets.Standardize(0, levels - 1), reader)
    elif likelihood in ("normal", "laplace", "student-t"):
        options["min_scale"] = 0.02
        if levels:  # grey values: means through a sigmoid, as AEVB has them for Frey Face
            options["loc_constraint"] = constraints.unit_interval
    decoder = LIKELIHOODS[likelihood](nets.MLP(latent_dim, hidden[::-1]), event_shape=x_shape, **options)
    encoder = GUIDES[config["guide"]](reader, event_shape=latent_dim)
    start = torch.zeros(PSEUDO_INPUTS, *x_shape) if train is None else train.x[:PSEUDO_INPUTS].cpu().float()
    vae = VAE(_prior(config["prior"], encoder, latent_dim, start), decoder, encoder)
    return Pair(vae.model, vae.guide, vae)


def _prior(name: str, encoder: conditionals.Conditional, latent_dim: int, pseudo_inputs: Tensor) -> priors.Prior:
    if name == "vamp":
        return priors.VampPrior(encoder, pseudo_inputs)
    if name == "mixture":
        return priors.GaussianMixture(latent_dim)
    return priors.Normal(latent_dim) if name == "normal" else priors.StandardNormal(latent_dim)


def _import_pair(factory: str) -> Pair:
    """What ``module:factory`` makes: ``(model, guide)``, or anything with ``.model`` and ``.guide``."""
    module, _, name = factory.partition(":")
    if not name:
        raise ValueError(f"--pair: expected module:factory, such as my_pair:make, but got {factory!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--pair: cannot take {name!r} from module {module!r}: {error}") from error
    finally:
        sys.path.remove(here)
    made = make()
    if isinstance(made, tuple) and len(made) == 2:
        return Pair(*made)
    if hasattr(made, "model") and hasattr(made, "guide"):
        return Pair(made.model, made.guide, made if isinstance(made, VAE) else None)
    raise ValueError(f"--pair: {factory} made a {type(made).__name__}; expected (model, guide) or an object with both")
