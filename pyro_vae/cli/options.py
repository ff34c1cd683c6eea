"""Parsing and validation of options beyond what typer does, and error texts that name options."""

import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from pyro_vae.cli.defaults import DEFAULTS, LIKELIHOOD_OF, LINEAR_OBJECTIVES, OBJECTIVES
from pyro_vae.files import is_path

if TYPE_CHECKING:
    from pyro_vae.cli.build import Config, Pair


def one_of(literal: Any) -> dict[str, Any]:
    """Keyword arguments of an ``Option`` whose value is one of the strings of a ``Literal``. An error
    suggests the closest string."""
    expected = get_args(literal)

    def parse(word: str) -> str:
        if word not in expected:
            raise typer.BadParameter(
                f"expected one of {', '.join(expected)}, but got {word!r}{suggestion(word, expected)}"
            )
        return word

    return {"parser": parse, "metavar": f"[{'|'.join(expected)}]"}


def data_source(literal: Any, about: str) -> dict[str, Any]:
    """Keyword arguments of the ``Argument`` DATASET, the name of a data set or the path of a file. Its help
    is ``about`` and the list of the names."""
    names = get_args(literal)

    def parse(word: str) -> str:
        if word in names:
            return word
        if not is_path(word):
            raise typer.BadParameter(
                f"expected one of {', '.join(names)}, or the path of a file, but got "
                f"{word!r}{suggestion(word, names)}"
            )
        return str(Path(word))

    text = (
        f"{about}: one of {', '.join(names)}; or the path of a file (.npy, .npz, .csv, .tsv, .parquet, "
        ".h5ad, .safetensors) or of a folder of images."
    )
    return {"parser": parse, "metavar": "DATASET|PATH", "help": text}


def comma_separated(option: str, given: str, expected: Collection[str]) -> list[str]:
    """Split a comma-separated text. Raises ``BadParameter`` for a word that is not in ``expected``."""
    words = given.split(",")
    for word in words:
        if word not in expected:
            raise typer.BadParameter(
                f"{option}: expected some of {','.join(expected)}, but got {word!r}"
                f"{suggestion(word, expected)}"
            )
    return words


def suggestion(word: str, expected: Collection[str]) -> str:
    """``"; did you mean 'full'?"``, or an empty string if no expected word is similar."""
    matches = get_close_matches(word, expected, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def default_text(key: str) -> str:
    """The defaults by data set, for ``--help``: ``[default: 200 for digits, ring; 15 for mnist]``."""
    names_by_value: dict[str, list[str]] = {}
    for dataset, values in DEFAULTS.items():
        value = values[key]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        names_by_value.setdefault(text, []).append(dataset)
    if len(names_by_value) == 1:
        return f"[default: {next(iter(names_by_value))}]"
    parts = (f"{value} for {', '.join(names)}" for value, names in names_by_value.items())
    of_file = (
        "; by its data for a file" if key in ("likelihood", "latent_dim", "hidden", "num_epochs") else ""
    )
    return f"[default: {'; '.join(parts)}{of_file}]"


def objective_help() -> str:
    """The objectives, one in each line, for ``--help``."""
    lines = [f"{name:10} {text}" for name, (text, _) in OBJECTIVES.items()]
    title = "What is maximized; docs/objectives.md compares them.  [default: elbo]"
    return "\n".join([title, "", "\b", *lines])


def num_particles_text() -> str:
    """The default numbers of particles by objective, for ``--help``."""
    names_by_number: dict[int, list[str]] = {}
    for name, (_, number) in OBJECTIVES.items():
        names_by_number.setdefault(number, []).append(name)
    parts = (f"{number} for {', '.join(names)}" for number, names in names_by_number.items())
    return f"[default: {'; '.join(parts)}]"


def parse_widths(hidden: str | None) -> tuple[int, ...] | None:
    """Parse ``--hidden``, such as ``"500,500"``."""
    if hidden is None:
        return None
    words = hidden.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--hidden: expected widths such as 500 or 500,500 but got {hidden!r}")
    return tuple(map(int, words))


def parse_dims(dims: str | None) -> tuple[int, int] | None:
    """Parse ``--dims``, such as ``"0,1"``."""
    if dims is None:
        return None
    words = dims.split(",")
    if len(set(words)) != 2 or len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise typer.BadParameter(
            f"--dims: expected two different dimensions of z, counted from 0, such as 0,1, but got {dims!r}"
        )
    return int(words[0]), int(words[1])


def check_dims(dims: tuple[int, int], event_shape: tuple[int, ...]) -> None:
    """Raise ``BadParameter`` unless z has these dimensions."""
    if len(event_shape) != 1 or max(dims) >= event_shape[0]:
        raise typer.BadParameter(
            f"--dims {dims[0]},{dims[1]}: z has the shape {tuple(event_shape)}; expected two different "
            "dimensions of a vector, counted from 0"
        )


OF_MODELS = "guide", "num_epochs", "num_data", "seed", "threads"  # options of `compare MODEL`


def check_runs(
    context: typer.Context, names: Sequence[str], models: Collection[str], excluded: Collection[str]
) -> None:
    """Raise ``BadParameter`` unless ``names`` are different run folders, two or more, and no option in
    ``excluded`` is given.

    :param models: the names of models, for error texts.
    """
    from pyro_vae.cli.runs import is_run

    others = [name for name in names if not is_run(Path(name))]
    if len(others) == len(names) == 1:
        raise typer.BadParameter(
            f"MODEL: expected one of {', '.join(models)}, or two or more run folders, but got "
            f"{others[0]!r}{suggestion(others[0], models)}"
        )
    if others:
        what = "the name of a model" if others[0] in models else "not a run folder"
        raise typer.BadParameter(
            f"{others[0]!r} is {what}; expected one MODEL, or two or more folders that `pyro-vae train` wrote"
        )
    if len({Path(name).resolve() for name in names}) < max(2, len(names)):
        raise typer.BadParameter(
            f"expected two or more different run folders to compare but got {', '.join(names)}"
        )
    for name in excluded:
        if is_given(context, name):
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is for the comparison of guides on a MODEL; leave it out"
            )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_finite(name: str, value: float) -> float:
    """Return ``value``. Raises ``BadParameter`` if it is infinite or NaN."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{name}: expected a finite number but got {value}")
    return value


def check_device(name: str) -> None:
    """Raise ``BadParameter`` if torch cannot allocate a tensor on the device."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0][:200]
        raise typer.BadParameter(f"--device {name}: {cause}; expected cpu, or an available device") from None


def check_pair_option(pair: str, families: dict[str, Any]) -> None:
    """Raise ``BadParameter`` if ``--pair`` is malformed, or passed together with options of a VAE."""
    module, _, factory = pair.rpartition(":")
    is_module = all(part.isidentifier() for part in module.split("."))
    if not factory.isidentifier() or not (module.endswith(".py") or is_module):
        raise typer.BadParameter(
            "--pair: expected module:factory or path/to/file.py:factory, such as my_pair.py:make, but got "
            f"{pair!r}"
        )
    if named := [f"--{key.replace('_', '-')}" for key, value in families.items() if value is not None]:
        raise typer.BadParameter(
            f"--pair defines both model and guide; leave out {', '.join(named)}, which would have no effect"
        )


def resumed_config(context: typer.Context, out: Path | None, overwrite: bool, config: "Config") -> "Config":
    """The configuration of the run to resume, or ``config`` if there is no run at ``out`` yet."""
    from pyro_vae.cli import runs

    if out is None or overwrite:
        raise typer.BadParameter(
            "--resume continues the run at --out RUN; expected --out RUN, without --overwrite"
        )
    if not runs.is_run(out):
        return config
    given = {name for name in context.params if is_given(context, name)}
    return runs.resumed_config(out, config, given & vars(config).keys())


def check_objective(config: "Config") -> None:
    """Raise ``BadParameter`` for options that the objective does not have."""
    name = config.objective
    if config.alpha is not None and name != "renyi":
        raise typer.BadParameter(
            f"--alpha {config.alpha:g}: only --objective renyi has an order, not {name}; leave --alpha out, "
            "or pass --objective renyi"
        )
    if name in ("vimco", "rws") and config.num_particles < 2:
        raise typer.BadParameter(
            f"--num-particles {config.num_particles}: --objective {name} compares the weights of several "
            "draws; expected 2 or more, or --objective elbo"
        )
    if name not in LINEAR_OBJECTIVES and (config.beta != 1.0 or config.warm_up):
        given = f"--warm-up {config.warm_up}" if config.warm_up else f"--beta {config.beta:g}"
        raise typer.BadParameter(
            f"{given}: --objective {name} is not linear in log-probabilities, so β would be a power of "
            f"probabilities in its weights; expected --beta 1 and --warm-up 0, or --objective "
            f"{' or '.join(LINEAR_OBJECTIVES)}"
        )


_SUPPORTS = {  # kinds of data that a likelihood allows; one that is not listed allows all
    "bernoulli": ("binary",),
    "continuous-bernoulli": ("binary", "grey"),
    "poisson": ("binary", "counts"),
    "negative-binomial": ("binary", "counts"),
}


def check_likelihood(config: "Config") -> None:
    """Raise ``ValueError`` if the data are outside of the support of the likelihood."""
    if config.likelihood is None:  # a pair from --pair
        return
    from pyro_vae.cli.build import DENSITIES
    from pyro_vae.data.readers import KINDS

    name, dataset, kind = f"--likelihood {config.likelihood}", config.dataset, config.kind
    what = "points in the plane" if dataset == "ring" else f"{kind} ({KINDS[kind]})"  # type: ignore[index]
    if config.likelihood == "bernoulli" and kind == "grey":
        if config.binarize == "none":
            raise ValueError(
                f"{name} requires pixels that are 0 or 1, but with --binarize none {dataset} has grey "
                "values; expected --binarize stochastic or threshold, or --likelihood continuous-bernoulli"
            )
    elif config.likelihood == "categorical" and (config.contents or kind != "grey") and not config.num_levels:
        expected = " or ".join(DENSITIES) if kind == "real" else LIKELIHOOD_OF[kind]
        raise ValueError(
            f"{name} requires images of bytes, but the data of {dataset} are {what}; expected --likelihood "
            f"{expected}"
        )
    elif config.likelihood == "categorical" and config.binarize != "none":
        raise ValueError(
            f"{name} requires grey levels, which --binarize {config.binarize} removes; leave --binarize out, "
            "or pass --likelihood bernoulli"
        )
    elif kind not in _SUPPORTS.get(config.likelihood, (kind,)):
        expected = " or ".join(DENSITIES) if kind == "real" else LIKELIHOOD_OF[kind]
        raise ValueError(
            f"{name} requires data that are {' or '.join(_SUPPORTS[config.likelihood])}, but the data of "
            f"{dataset} are {what}; expected --likelihood {expected}"
        )
    if kind in ("real", "counts") and config.binarize != "none":
        raise ValueError(
            f"--binarize {config.binarize}: the data of {dataset} are {what}, not grey values; leave "
            "--binarize out"
        )


def likelihood_text(config: "Config", *, chosen: bool) -> str:
    """A line about the likelihood of a file's data, and why it was chosen."""
    from pyro_vae.cli.build import DENSITIES

    reason = f": the data are {config.kind}" if chosen else ""
    units = ""
    if config.likelihood in DENSITIES and config.kind in ("real", "counts"):
        units = "; columns are standardized inside the networks, and nats are those of the original units"
    return f"--likelihood {config.likelihood}{reason}{units}"


def check_file_options(dataset: str, given: dict[str, Any], prior: str | None = None) -> None:
    """Raise ``BadParameter`` for options of files without a file, and for those that exclude each other."""
    named = [f"--{key.replace('_', '-')}" for key, value in given.items() if value is not None]
    if dataset in DEFAULTS and named:
        raise typer.BadParameter(f"{named[0]} is for files, and {dataset} is a data set; leave it out")
    if given.get("holdout") is not None and given.get("validation") is not None:
        raise typer.BadParameter("--holdout and --validation exclude each other; expected one of them")
    if prior == "vamp" and given["condition"] is not None:
        raise typer.BadParameter(
            "--prior vamp: the pseudo-inputs have no condition; leave --condition out, or pass another "
            "--prior"
        )


def with_option_names(message: str, names: Collection[str]) -> str:
    """Replace Python arguments in an error text by options: ``batch_size=20`` by ``--batch-size 20``.

    :param names: the arguments to replace.
    """

    def option(match: re.Match[str]) -> str:
        name, assigned, value = match["name"], match["assigned"], match["quoted"] or match["plain"] or ""
        if "_" not in name and not assigned:  # it may be an ordinary English word
            return match[0]
        spelled = f"--{name.replace('_', '-')}"
        return f"{spelled} {value}" if value else spelled

    known = "|".join(sorted(map(re.escape, set(names)), key=len, reverse=True))
    value = r'(?P<assigned>=(?:"(?P<quoted>[^"]*)"|(?P<plain>[\w+-]+(?:\.\d+)?)?))?'
    pattern = rf"(?<![\w./-])(?<!\.json: )(?P<name>{known})(?![\w(/]){value}"
    # an objective has an option here, and a class in Python
    message = message.replace('estimator="iwae"', "--objective iwae")
    message = message.replace("VIMCO, or TraceEnum_ELBO", "--objective vimco, rws or wake-sleep")
    message = message.replace(", or TraceEnum_ELBO", "")
    message = re.sub(r"\b(expected|or) (VIMCO|Trace_ELBO)\b", _as_objective, message)
    message = message.replace("batch_size=None", "a --batch-size of all data")
    # remove advice about min_scale, for which the command line has no option
    message = message.replace(", raise min_scale", "").replace("raise min_scale, or ", "")
    message = re.sub(pattern, option, message)
    return re.sub(r"(?<=[Ll])ower the learning rate", "ower --learning-rate", message)


def _as_objective(match: re.Match[str]) -> str:
    return f"{match[1]} --objective {'vimco' if match[2] == 'VIMCO' else 'elbo'}"


# steps whose largest matrix product has at most this many multiply-adds run in one thread by default
SMALL_PRODUCT = 2_000_000


def largest_product(pair: "Pair", rows: int) -> int | None:
    """Multiply-adds of the largest matrix product of a step on ``rows`` rows. ``None`` if the model or the
    guide is not a module, if no layer has a weight, or if a weight has more than two dimensions."""
    import torch

    programs = [program for program in (pair.model, pair.guide) if isinstance(program, torch.nn.Module)]
    if len(programs) < 2:
        return None
    layers = [layer for program in programs for layer in program.modules()]
    weights = [
        weight for layer in layers if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
    ]
    shapes = [weight.shape for weight in weights]
    if not shapes or any(len(shape) > 2 for shape in shapes):  # a convolution uses each weight many times
        return None
    return rows * max(shape.numel() for shape in shapes)


@contextmanager
def threads(given: int | None, largest: int | None = None) -> Iterator[None]:
    """Set the number of torch's threads for the block to ``given``. If that is ``None``, set it to one if the
    matrix products are small and no environment variable sets the number.

    :param largest: multiply-adds of the largest matrix product; ``None`` if unknown.
    """
    import torch

    is_small = (
        largest is not None
        and largest <= SMALL_PRODUCT
        and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    )
    number, before = given or (1 if is_small else None), torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
