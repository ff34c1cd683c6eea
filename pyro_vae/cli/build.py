"""From the words of the command line to objects: data sets, likelihoods, guides and priors by name.

Only the command line speaks in names; everything below takes the objects themselves.
"""

import importlib.util
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import conditionals, flows, nets, priors
from pyro_vae.data.datasets import Data, load
from pyro_vae.pairs.traces import Program
from pyro_vae.vae import VAE

T = TypeVar("T")

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
    "flow": flows.AffineAutoregressive,
    "spline": flows.NeuralSpline,
    "mixture": flows.NormalMixture,
}
PRIORS: dict[str, Callable[[conditionals.Conditional, Tensor], conditionals.Conditional]] = {
    "standard-normal": lambda encoder, _: priors.StandardNormal(encoder.event_shape),
    "normal": lambda encoder, _: priors.Normal(encoder.event_shape),
    "mixture": lambda encoder, _: priors.GaussianMixture(encoder.event_shape),
    "vamp": priors.VampPrior,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PSEUDO_INPUTS = 100


@dataclass(frozen=True)
class Config:
    """What a run was told, defaults filled in: the contents of ``config.json``. A pair of one's own has no
    family names."""

    dataset: str
    pair: str | None
    likelihood: str | None
    guide: str | None
    prior: str | None
    latent_dim: int | None
    hidden: tuple | None
    binarize: str
    num_epochs: int
    batch_size: int
    learning_rate: float
    num_particles: int
    beta: float
    warm_up: int
    patience: int | None
    clip_norm: float | None
    seed: int
    dtype: str
    event_shape: tuple = ()
    num_levels: int | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any], source: str) -> "Config":
        """From JSON. Raises ``ValueError`` for keys that are missing or unknown, and values of another
        type."""
        hints = get_type_hints(cls)
        if unequal := record.keys() ^ hints.keys():
            raise ValueError(
                f"{source}: the keys {sorted(unequal)} are missing or unknown; expected those of a run's "
                "config.json"
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        for field in fields(cls):
            value = values[field.name]
            if not isinstance(value, hints[field.name]) or isinstance(value, bool):
                raise ValueError(
                    f"{source}: {field.name} is {reprlib.repr(value)}; expected {hints[field.name]}"
                )
            if not _is_plausible(field.name, value):
                raise ValueError(
                    f"{source}: {field.name} is {reprlib.repr(value)}, which no run of pyro-vae has"
                )
        return cls(**values)


def _is_plausible(name: str, value: Any) -> bool:
    """Whether a number, or each of a list of sizes, is one that the command line gives."""
    if isinstance(value, tuple):
        return len(value) <= 100 and all(type(size) is int and 0 < size < 2**31 for size in value)
    if isinstance(value, int):
        return (0 if name in ("seed", "warm_up") else 1) <= value < 2**32
    return not isinstance(value, float) or (math.isfinite(value) and value >= 0)


FAMILIES = ("likelihood", "guide", "prior", "latent_dim", "hidden")


class Pair(NamedTuple):
    """A model and a guide; ``vae`` is the VAE that they belong to, if any."""

    model: Program
    guide: Program
    vae: VAE | None = None


def build_data(config: Config, data_dir: Path | None) -> tuple[Data, Data]:
    """``(train, test)`` as the likelihood wants them: stochastically binarized for a Bernoulli, grey levels
    for a Categorical, grey values in [0, 1] for a density. A pair of one's own says by ``binarize`` what it
    wants."""
    train, test = load(config.dataset, binarize=config.binarize, data_dir=data_dir)  # type: ignore[arg-type]
    if config.likelihood == "categorical":
        train, test = train.levels(), test.levels()
    dtype = _named("dtype", config.dtype, DTYPES)
    if config.event_shape and config.event_shape != tuple(train.x.shape[1:]):
        raise ValueError(
            f"config.json: event_shape is {config.event_shape} but data of {config.dataset} have "
            f"{tuple(train.x.shape[1:])}; train again"
        )
    return train.to(dtype=dtype), test.to(dtype=dtype)


def part_of(words: str, train: Data, test: Data) -> Data:
    """``test``, ``train`` or some of their rows, such as ``test[:1000]``; stochastic binarization is done
    once.

    :raises ValueError: for other words, or no rows.
    """
    found = re.fullmatch(r"(train|test)(?:\[(\d*):(\d*)\])?", words.strip())
    if not found:
        raise ValueError(
            f"--data: expected test, train or some of their rows, such as test[:1000], but got {words!r}"
        )
    whole, (start, stop) = {"train": train, "test": test}[found[1]].fixed(), (found[2], found[3])
    rows = slice(int(start) if start else None, int(stop) if stop else None)
    if not len(whole.x[rows]):
        raise ValueError(f"--data: {words} has no rows; {found[1]} has {len(whole)}")
    parts = {
        name: part[rows]
        for name in ("x", "labels", "condition")
        if (part := getattr(whole, name)) is not None
    }
    return replace(whole, **parts)


def build_pair(config: Config, train: Data | None = None) -> Pair:
    """The pair that a run's configuration describes.

    :param train: data for the pseudo-inputs of a VampPrior to start from; not needed where weights are loaded
    after.
    """
    pair = _import_pair(config.pair) if config.pair else _vae(config, train)
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(dtype=_named("dtype", config.dtype, DTYPES))
    return pair


def _named(kind: str, name: str | None, table: Mapping[str, T]) -> T:
    if name is None or name not in table:
        raise ValueError(f"{kind}: there is no {name!r}; expected one of {', '.join(table)}")
    return table[name]


def _vae(config: Config, train: Data | None) -> Pair:
    """MLP trunks of tanh units on both sides, as in AEVB."""
    x_shape, hidden, latent_dim = config.event_shape, config.hidden, config.latent_dim
    if hidden is None or latent_dim is None:
        raise ValueError("config: expected hidden and latent_dim for a VAE but got neither")
    options: dict[str, Any] = {}
    reader: torch.nn.Module = nets.MLP(x_shape, hidden)
    if config.likelihood == "categorical":
        if config.num_levels is None:
            raise ValueError(
                f"--likelihood categorical: {config.dataset} has no grey levels; expected e.g. normal"
            )
        options["num_classes"] = config.num_levels
        reader = torch.nn.Sequential(nets.Standardize(0, config.num_levels - 1), reader)
    elif config.likelihood in ("normal", "laplace", "student-t"):
        options["min_scale"] = 0.02
        if config.num_levels:  # grey values: means through a sigmoid, as AEVB has them for Frey Face
            options["loc_constraint"] = constraints.unit_interval
    likelihood = _named("likelihood", config.likelihood, LIKELIHOODS)
    decoder = likelihood(nets.MLP(latent_dim, hidden[::-1]), event_shape=x_shape, **options)
    encoder = _named("guide", config.guide, GUIDES)(reader, event_shape=latent_dim)
    start = torch.zeros(PSEUDO_INPUTS, *x_shape) if train is None else train.x[:PSEUDO_INPUTS].float()
    vae = VAE(_named("prior", config.prior, PRIORS)(encoder, start), decoder, encoder)
    return Pair(vae.model, vae.guide, vae)


def _import_pair(factory: str) -> Pair:
    """What ``module:factory`` or ``path/to/file.py:factory`` makes: ``(model, guide)``, or anything with
    ``.model`` and ``.guide``."""
    module, _, name = factory.rpartition(":")
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise FileNotFoundError(
            f"--pair {factory}: there is no file {module}; expected path/to/file.py:factory"
        )
    with _on_path(str(Path(module).parent.resolve()) if is_file else os.getcwd()):
        try:
            made = getattr(_import_file(Path(module)) if is_file else importlib.import_module(module), name)()
        except Exception as error:  # whatever the user's code does
            raise ValueError(f"--pair {factory}: {type(error).__name__}: {error}") from error
    if isinstance(made, tuple) and len(made) == 2:
        return Pair(*made)
    if hasattr(made, "model") and hasattr(made, "guide"):
        return Pair(made.model, made.guide, made if isinstance(made, VAE) else None)
    raise ValueError(
        f"--pair {factory}: it made a {type(made).__name__}; expected (model, guide) or an object with both"
    )


def _import_file(path: Path) -> ModuleType:
    """The module of a file, whatever its name; one that was imported is not run again."""
    name = f"pyro_vae pair {path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """A folder on Python's path: the working folder for a module, as ``python -m`` has it, or that of a
    file."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
