"""What the words of the command line must be, beyond what typer asks of them; and errors in those words."""

import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from pyro_vae.cli.defaults import DEFAULTS

if TYPE_CHECKING:
    from pyro_vae.cli.build import Config, Pair


def one_of(literal: Any) -> dict[str, Any]:
    """Arguments of an ``Option`` whose value is one of the words of a ``Literal``; an error names the
    nearest."""
    expected = get_args(literal)

    def parse(word: str) -> str:
        if word not in expected:
            raise typer.BadParameter(
                f"expected one of {', '.join(expected)}, but got {word!r}{nearest(word, expected)}"
            )
        return word

    return {"parser": parse, "metavar": f"[{'|'.join(expected)}]"}


def argument(literal: Any, about: str) -> dict[str, Any]:
    """The same of an ``Argument``, whose words are listed in its help."""
    return one_of(literal) | {
        "metavar": "DATASET",
        "help": f"{about}: one of {', '.join(get_args(literal))}.",
    }


def some_of(option: str, given: str, expected: Collection[str]) -> list[str]:
    """The words of a list with commas between them."""
    found = given.split(",")
    for word in found:
        if word not in expected:
            raise typer.BadParameter(
                f"{option}: expected some of {','.join(expected)}, but got {word!r}{nearest(word, expected)}"
            )
    return found


def nearest(word: str, expected: Collection[str]) -> str:
    """``"; did you mean 'full'?"``, or nothing where none is near."""
    found = get_close_matches(word, expected, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def default(key: str) -> str:
    """What a data set is trained with, for ``--help``: ``[default: 200 for digits, ring; 15 for mnist]``."""
    by_value: dict[str, list[str]] = {}
    for dataset, values in DEFAULTS.items():
        value = values[key]
        by_value.setdefault(",".join(map(str, value)) if isinstance(value, tuple) else f"{value}", []).append(
            dataset
        )
    if len(by_value) == 1:
        return f"[default: {next(iter(by_value))}]"
    return f"[default: {'; '.join(f'{value} for ' + ', '.join(names) for value, names in by_value.items())}]"


def widths(hidden: str | None) -> tuple[int, ...] | None:
    if hidden is None:
        return None
    words = hidden.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"--hidden: expected widths such as 500 or 500,500 but got {hidden!r}")
    return tuple(map(int, words))


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{name}: expected a finite number but got {value}")
    return value


def check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0][:200]
        raise typer.BadParameter(
            f"--device {name}: {cause}; expected cpu, or a device that is here"
        ) from None


def check_pair_words(pair: str, families: dict[str, Any]) -> None:
    module, _, factory = pair.rpartition(":")
    is_module = all(part.isidentifier() for part in module.split("."))
    if not factory.isidentifier() or not (module.endswith(".py") or is_module):
        raise typer.BadParameter(
            "--pair: expected module:factory or path/to/file.py:factory, such as my_pair.py:make, but got "
            f"{pair!r}"
        )
    if named := [f"--{key.replace('_', '-')}" for key, value in families.items() if value is not None]:
        raise typer.BadParameter(
            f"--pair brings model and guide whole; {', '.join(named)} would have no effect, leave them out"
        )


def to_go_on(context: typer.Context, out: Path | None, overwrite: bool, config: "Config") -> "Config":
    """The configuration of the run that is to go on; ``config`` itself where it is to begin."""
    from pyro_vae.cli import runs

    if out is None or overwrite:
        raise typer.BadParameter(
            "--resume continues the run at --out RUN and replaces nothing; expected --out alone"
        )
    if not runs.is_run(out):
        return config
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return runs.continued(out, config, given & vars(config).keys())


_DENSITIES = "normal", "laplace", "student-t"


def check_likelihood(config: "Config") -> None:
    """Raise ``ValueError`` where a likelihood is not one of the data: points of the plane, or grey values in
    [0, 1]."""
    if config.likelihood is None:  # a pair of one's own
        return
    name = f"--likelihood {config.likelihood}"
    if config.dataset == "ring":
        if config.likelihood not in _DENSITIES:
            raise ValueError(
                f"{name}: ring has points in the plane; expected --likelihood {' or '.join(_DENSITIES)}"
            )
        if config.binarize != "none":
            raise ValueError(
                f"--binarize {config.binarize}: ring has points in the plane, not grey values; leave it out"
            )
    elif config.likelihood == "bernoulli" and config.binarize == "none":
        raise ValueError(
            f"{name} is of pixels that are 0 or 1, and --binarize none leaves {config.dataset} grey; "
            "expected --binarize stochastic or threshold, or --likelihood continuous-bernoulli"
        )
    elif config.likelihood == "categorical" and config.binarize != "none":
        raise ValueError(
            f"{name} is of grey levels, and --binarize {config.binarize} leaves none; leave it out, or give "
            "--likelihood bernoulli"
        )


def as_options(message: str, names: Collection[str]) -> str:
    """An error that speaks of Python's arguments, in the command line's options: ``batch_size=20`` is
    ``--batch-size 20``.

    :param names: the arguments of the commands.
    """

    def option(found: re.Match[str]) -> str:
        name, assigned, value = found["name"], found["assigned"], found["quoted"] or found["plain"] or ""
        if "_" not in name and not assigned:  # an ordinary word
            return found[0]
        spelled = f"--{name.replace('_', '-')}"
        return f"{spelled} {value}" if value else spelled

    known = "|".join(sorted(map(re.escape, set(names)), key=len, reverse=True))
    value = r'(?P<assigned>=(?:"(?P<quoted>[^"]*)"|(?P<plain>[\w+-]+(?:\.\d+)?)?))?'
    pattern = rf"(?<![\w./-])(?<!\.json: )(?P<name>{known})(?![\w(/]){value}"
    message = message.replace(", raise min_scale", "").replace("raise min_scale, or ", "")  # no option has it
    return re.sub(
        r"(?<=[Ll])ower the learning rate", "ower --learning-rate", re.sub(pattern, option, message)
    )


# Multiply-adds of the largest product of a step, up to which one thread is the default. {MEASURED}
SMALL = 2_000_000


def largest_product(pair: "Pair", rows: int) -> int | None:
    """Multiply-adds of the largest product of a step on so many rows; ``None`` where the layers are not known
    to be linear."""
    import torch

    programs = [program for program in (pair.model, pair.guide) if isinstance(program, torch.nn.Module)]
    if len(programs) < 2:
        return None
    layers = [layer for program in programs for layer in program.modules()]
    weights = [
        weight for layer in layers if isinstance(weight := getattr(layer, "weight", None), torch.Tensor)
    ]
    shapes = [weight.shape for weight in weights]
    if not shapes or any(len(shape) > 2 for shape in shapes):  # a convolution uses a weight many times
        return None
    return rows * max(shape.numel() for shape in shapes)


@contextmanager
def threads(given: int | None, largest: int | None = None) -> Iterator[None]:
    """Torch's threads for the block: those ``given``; one where products are small; else as they are.

    :param largest: multiply-adds of the largest product; ``None`` where it is not known.
    """
    import torch

    small = (
        largest is not None
        and largest <= SMALL
        and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    )
    number, before = given or (1 if small else None), torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
