"""What the words of the command line must be, beyond what typer asks of them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pyro_vae.build import Config


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
        raise typer.BadParameter(f"--device {name}: {cause}; expected cpu, or a device that is here") from None


def check_pair_words(pair: str, families: dict[str, Any]) -> None:
    module, _, factory = pair.rpartition(":")
    is_module = all(part.isidentifier() for part in module.split("."))
    if not factory.isidentifier() or not (module.endswith(".py") or is_module):
        raise typer.BadParameter(
            f"--pair: expected module:factory or path/to/file.py:factory, such as my_pair.py:make, but got {pair!r}"
        )
    if named := [f"--{key.replace('_', '-')}" for key, value in families.items() if value is not None]:
        raise typer.BadParameter(
            f"--pair brings model and guide whole; {', '.join(named)} would have no effect, leave them out"
        )


def to_go_on(context: typer.Context, out: Path | None, overwrite: bool, config: "Config") -> "Config":
    """The configuration of the run that is to go on; ``config`` itself where it is to begin."""
    from pyro_vae import runs

    if out is None or overwrite:
        raise typer.BadParameter("--resume goes on with the run at --out RUN, and replaces nothing; expected --out alone")
    if not runs.is_run(out):
        return config
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return runs.continued(out, config, given & vars(config).keys())
