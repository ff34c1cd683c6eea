"""Build data sets, likelihoods, guides and priors from the names on the command line.

The other subpackages take objects, not names.
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
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import conditionals, flows, infer, nets, priors
from pyro_vae.cli.defaults import ALPHA
from pyro_vae.data.arrays import Ranges, loses_precision, row_blocks
from pyro_vae.data.datasets import SOURCES, Data, from_tables, load, locate
from pyro_vae.data.readers import KINDS, Table, read
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
    "poisson": conditionals.Poisson,
    "negative-binomial": conditionals.NegativeBinomial,
}
DENSITIES = ("normal", "laplace", "student-t")  # on all real numbers
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
OBJECTIVES: dict[str, Callable[[int, float], ELBO]] = {  # of the number of particles, and α
    "elbo": lambda k, _: Trace_ELBO(num_particles=k),
    "stl": lambda k, _: infer.STL(k),
    "iwae": lambda k, _: infer.IWAE(k),
    "dreg": lambda k, _: infer.IWAE(k, "dreg"),
    "renyi": lambda k, alpha: infer.Renyi(alpha, k),
    "vimco": lambda k, _: infer.VIMCO(k),
    "wake-sleep": lambda k, _: infer.WakeSleep(k),
    "rws": lambda k, _: infer.ReweightedWakeSleep(k),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PSEUDO_INPUTS = 100  # number of pseudo-inputs of a VampPrior
FILE_FIELDS = ("label", "condition", "key", "image_size", "holdout", "validation")  # options of files
LATER_FIELDS: dict[str, Any] = {  # of runs without these fields
    "objective": "elbo",
    "alpha": None,
    **dict.fromkeys((*FILE_FIELDS, "contents", "sha256", "validation_sha256", "condition_size")),
}
NOT_OPTIONS = (  # fields of a Config that are read from the data, and its argument
    "dataset", "event_shape", "num_levels", "contents", "sha256", "validation_sha256", "condition_size",
)  # fmt: skip
VAE_FIELDS = ("likelihood", "guide", "prior", "latent_dim", "hidden")  # ``None`` in a Config with --pair


@dataclass(frozen=True)
class Config:
    """The options of a run, with defaults filled in: the contents of ``config.json``. With ``--pair``, the
    fields in :data:`VAE_FIELDS` are ``None``."""

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
    objective: str = "elbo"
    alpha: float | None = None
    event_shape: tuple = ()
    num_levels: int | None = None
    label: str | None = None
    condition: str | None = None
    key: str | None = None
    image_size: int | None = None
    holdout: float | None = None
    validation: str | None = None
    contents: dict | None = None  # what was read from the file, see Table.record
    sha256: str | None = None
    validation_sha256: str | None = None
    condition_size: int | None = None

    @property
    def kind(self) -> str:
        """What the entries of the data are: one of :data:`~pyro_vae.data.readers.KINDS`."""
        if self.contents is not None:
            return self.contents["kind"]
        return "real" if self.dataset == "ring" else "grey"

    @classmethod
    def read(cls, record: Mapping[str, Any], source: str) -> "Config":
        """Validate a parsed ``config.json``. Raises ``ValueError`` for missing or unknown keys, and for
        values of the wrong type or outside of their range.

        :param source: the path of the file, for error texts.
        """
        hints, record = get_type_hints(cls), LATER_FIELDS | dict(record)
        if invalid := record.keys() ^ hints.keys():
            raise ValueError(
                f"{source}: the keys {sorted(invalid)} are missing or unknown; expected those of a run's "
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
            if not _is_in_range(field.name, value):
                raise ValueError(f"{source}: {field.name} is {reprlib.repr(value)}, which is out of range")
        if values["contents"] is not None and values["contents"].get("kind") not in KINDS:
            raise ValueError(f"{source}: contents has no kind; expected one of {', '.join(KINDS)}")
        # a received run must not name a file of which it does not know the contents
        for name, digest in (("dataset", "sha256"), ("validation", "validation_sha256")):
            if values[name] not in (None, *SOURCES) and not re.fullmatch(
                "[0-9a-f]{64}", values[digest] or ""
            ):
                raise ValueError(
                    f"{source}: {digest} is missing or invalid, so {name} is not read; train again"
                )
        return cls(**values)

    def bound_name(self) -> str:
        """The objective with its options, such as ``"iwae, K = 5"``."""
        order = "" if self.alpha is None else f", α = {self.alpha:g}"
        return f"{self.objective}{order}, K = {self.num_particles}"


def _is_in_range(name: str, value: Any) -> bool:
    """Whether a number, or each size of a tuple, is in the range that the command line accepts."""
    if isinstance(value, tuple):
        return len(value) <= 100 and all(type(size) is int and 0 < size < 2**31 for size in value)
    if isinstance(value, int):
        return (0 if name in ("seed", "warm_up") else 1) <= value < 2**32
    return not isinstance(value, float) or (math.isfinite(value) and (value >= 0 or name == "alpha"))


class Pair(NamedTuple):
    """A model and a guide, and the VAE that they belong to, if any."""

    model: Program
    guide: Program
    vae: VAE | None = None


class Tables(NamedTuple):
    """The contents of a file, and of the file with the held-out data, if any."""

    train: Table
    validation: Table | None

    def record(self) -> dict[str, Any]:
        """What was read, for ``config.json``."""
        return self.train.record() | {"kind": self.kind}

    @property
    def kind(self) -> str:
        """What the entries of both files are."""
        kinds = {table.kind for table in self if table is not None}
        if len(kinds) == 1:
            return kinds.pop()
        return {frozenset(("binary", "counts")): "counts", frozenset(("binary", "grey")): "grey"}.get(
            frozenset(kinds), "real"
        )


def read_tables(
    dataset: str, options: Mapping[str, Any], data_dir: Path | None, *sha256: str | None
) -> Tables:
    """Read a file, and the file of the option ``validation``, if any.

    :param options: the options of files, by the names in ``FILE_FIELDS``.
    :param sha256: the expected SHA-256 of both files, if known.
    """
    read_options: dict[str, Any] = {key: options[key] for key in ("label", "condition", "key", "image_size")}
    expected = sha256 or (None, None)
    tables = (
        None if name is None else read(locate(name, data_dir), **read_options, sha256=digest)
        for name, digest in zip((dataset, options["validation"]), expected, strict=True)
    )
    return Tables(*tables)  # type: ignore[arg-type]


def build_data(config: Config, data_dir: Path | None, tables: Tables | None = None) -> tuple[Data, Data]:
    """Load ``(train, test)``, binarized as in ``config.binarize``. For a categorical likelihood, pixels are
    integer grey levels; otherwise they are in [0, 1].

    :param tables: the contents of the files of ``config``, if they are read already.
    :raises ValueError: if the shape of the data is not that of the run, if a file was changed since it was
        trained on, or if the rows of a file are too close to each other for ``config.dtype``.
    """
    binarize: Any = config.binarize
    dtype = _look_up("dtype", config.dtype, DTYPES)
    if config.dataset in SOURCES:
        train, test = load(config.dataset, binarize=binarize, data_dir=data_dir)
    else:
        tables = tables or read_tables(
            config.dataset, vars(config), data_dir, config.sha256, config.validation_sha256
        )
        train, test = from_tables(*tables, binarize=binarize, holdout=config.holdout, seed=config.seed)
        ranges = Ranges()
        for part in (train, test):
            if loses_precision(part.x, dtype):
                ranges.update("the data", part.x)
        ranges.check(dtype, config.dataset)
    if config.likelihood == "categorical":
        train, test = train.levels(), test.levels()
    elif config.contents is not None:
        train, test = (replace(part, x=part.x.to(dtype)) for part in (train, test))
    if config.event_shape and config.event_shape != tuple(train.x.shape[1:]):
        raise ValueError(
            f"config.json: event_shape is {config.event_shape} but data of {config.dataset} have "
            f"{tuple(train.x.shape[1:])}; train again"
        )
    return train.to(dtype=dtype), test.to(dtype=dtype)


def select_rows(selection: str, train: Data, test: Data) -> tuple[Data, int]:
    """The data that ``selection`` names: ``test``, ``train`` or a slice such as ``test[:1000]``; and the
    number of its first row in the whole set. Pixels with stochastic binarization are drawn once, and are then
    fixed.

    :raises ValueError: for an invalid or empty selection.
    """
    match = re.fullmatch(r"(train|test)(?:\[(\d*):(\d*)\])?", selection.strip())
    if not match:
        raise ValueError(
            f"--data: expected test, train or some of their rows, such as test[:1000], but got {selection!r}"
        )
    name, start, stop = match.groups()
    whole = {"train": train, "test": test}[name].fixed()
    rows = slice(int(start) if start else None, int(stop) if stop else None)
    if not len(whole.x[rows]):
        raise ValueError(f"--data: {selection} has no rows; {name} has {len(whole)}")
    return whole.rows(rows), rows.start or 0


@contextmanager
def rows_numbered_from(first: int) -> Iterator[None]:
    """Add ``first`` to the numbers of rows in errors of the block, which are those of a selection."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        error.args = (re.sub(r"\brow (\d+)", lambda row: f"row {int(row[1]) + first}", str(error)),)
        raise


def build_pair(config: Config, train: Data | None = None) -> Pair:
    """The pair that a run's configuration describes.

    :param train: data to initialize the pseudo-inputs of a VampPrior. Not needed if parameters are loaded
        afterwards.
    """
    pair = _import_pair(config.pair) if config.pair else _vae(config, train)
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(dtype=_look_up("dtype", config.dtype, DTYPES))
    return pair


def build_loss(config: Config, pair: Pair | None = None) -> ELBO:
    """The objective of a run as a loss for ``fit``. Raises ``ValueError`` for an invalid one."""
    k, alpha = config.num_particles, ALPHA if config.alpha is None else config.alpha
    if config.objective == "elbo" and k > 1 and pair is not None and pair.vae:
        return Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    return _look_up("objective", config.objective, OBJECTIVES)(k, alpha)


def _look_up(kind: str, name: str | None, table: Mapping[str, T]) -> T:
    """The entry of ``table`` with this name. Raises ``ValueError`` for an unknown name."""
    if name is None or name not in table:
        raise ValueError(f"{kind}: got {name!r}; expected one of {', '.join(table)}")
    return table[name]


def _vae(config: Config, train: Data | None) -> Pair:
    """A VAE with MLPs of tanh units as encoder and decoder, as in AEVB."""
    x_shape, hidden, latent_dim = config.event_shape, config.hidden, config.latent_dim
    if hidden is None or latent_dim is None:
        raise ValueError("config: expected hidden and latent_dim for a VAE but got neither")
    c_shape = None if config.condition_size is None else (config.condition_size,)
    options: dict[str, Any] = {}
    trunk: torch.nn.Module = nets.MLP(x_shape if c_shape is None else (x_shape, c_shape), hidden)
    if config.likelihood == "categorical":
        if config.num_levels is None:
            raise ValueError(
                f"--likelihood categorical: {config.dataset} has no grey levels; expected another "
                "likelihood, such as normal"
            )
        options["num_classes"] = config.num_levels
        trunk = nets.Preprocess(nets.Standardize(0, config.num_levels - 1), trunk)
    elif config.likelihood in DENSITIES:
        options["min_scale"] = 0.02
        if config.kind in ("binary", "grey"):  # a sigmoid gives means in [0, 1], as in AEVB for Frey Face
            options["loc_constraint"] = constraints.unit_interval
        elif config.contents is not None:
            moments = _moments(config, train)
            options["standardize"] = nets.Standardize(*moments)
            trunk = nets.Preprocess(nets.Standardize(*moments), trunk)
    elif config.kind == "counts":
        trunk = nets.Preprocess(nets.Log1p(), trunk)
    likelihood = _look_up("likelihood", config.likelihood, LIKELIHOODS)
    z_shape = latent_dim if c_shape is None else ((latent_dim,), c_shape)
    decoder = likelihood(nets.MLP(z_shape, hidden[::-1]), event_shape=x_shape, **options)
    encoder = _look_up("guide", config.guide, GUIDES)(trunk, event_shape=latent_dim)
    if isinstance(decoder, conditionals.Poisson | conditionals.NegativeBinomial):
        _start_at_mean(decoder, _moments(config, train)[0])
    pseudo_inputs = torch.zeros(PSEUDO_INPUTS, *x_shape)
    if train is not None:
        rows = torch.arange(PSEUDO_INPUTS) % len(train)
        pseudo_inputs = train.x[rows].float()
        if train.mask is not None:
            if_missing = torch.as_tensor(nets.value_if_missing(trunk)).to(pseudo_inputs)
            pseudo_inputs = torch.where(train.mask[rows], pseudo_inputs, if_missing)
    vae = VAE(_look_up("prior", config.prior, PRIORS)(encoder, pseudo_inputs), decoder, encoder)
    return Pair(vae.model, vae.guide, vae)


def _moments(config: Config, train: Data | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column over the entries that are not missing, ``event_shape`` each.
    The standard deviation of a constant column is 1. Without data, they are 0 and 1."""
    if train is None:
        return torch.zeros(config.event_shape), torch.ones(config.event_shape)
    observed = len(train) if train.mask is None else train.mask.sum(0).clamp_min(1)

    def mean_of(f: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(config.event_shape, dtype=torch.double)
        for start, block in row_blocks(train.x):
            values = f(block.double())
            if train.mask is not None:
                values = values * train.mask[start : start + len(block)]
            total += values.sum(0)
        return total / observed

    mean = mean_of(lambda x: x)
    scale = mean_of(lambda x: (x - mean) ** 2).sqrt()
    scale = torch.where(scale > 1e-12 * mean.abs(), scale, 1.0)
    dtype = _look_up("dtype", config.dtype, DTYPES)
    return mean.to(dtype), scale.to(dtype)


@torch.no_grad()
def _start_at_mean(decoder: conditionals.Elementwise, mean: Tensor) -> None:
    """Initialize the read-out of a count likelihood so that its mean is about that of the data."""
    readout: Any = decoder.readout["log_rate" if "log_rate" in decoder.readout else "logits"]
    readout.layer.bias.add_((mean + 0.01).log().flatten())


def _import_pair(factory: str) -> Pair:
    """Import and call ``module:factory`` or ``path/to/file.py:factory``. The factory returns
    ``(model, guide)``, or an object with the attributes ``model`` and ``guide``."""
    module, _, name = factory.rpartition(":")
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise FileNotFoundError(
            f"--pair {factory}: {module} does not exist; expected path/to/file.py:factory"
        )
    with _on_path(str(Path(module).parent.resolve()) if is_file else os.getcwd()):
        try:
            imported = _import_file(Path(module)) if is_file else importlib.import_module(module)
            result = getattr(imported, name)()
        except Exception as error:  # any error of the user's code
            raise ValueError(f"--pair {factory}: {type(error).__name__}: {error}") from error
    if isinstance(result, tuple) and len(result) == 2:
        return Pair(*result)
    if hasattr(result, "model") and hasattr(result, "guide"):
        return Pair(result.model, result.guide, result if isinstance(result, VAE) else None)
    raise ValueError(
        f"--pair {factory}: the factory returned {type(result).__name__}; expected (model, guide) or an "
        "object with both"
    )


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module. The file name need not be an identifier. A second call returns the same
    module."""
    name = f"pyro_vae pair {path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    """Put a folder first in ``sys.path`` for the block."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
