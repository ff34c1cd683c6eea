"""What the command line leaves: lines, JSON, arrays and pictures. Torch is not waited for."""

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pyro_vae.files import LOCK, check_no_link, is_listed, put, reserved, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from matplotlib.figure import Figure
    from torch import Tensor
    from typer import Context

    Pictures = Mapping[str, Callable[[], Figure]]  # each is drawn when it is called


def points(**sets: "Tensor") -> "Pictures":
    """A picture of those sets that lie in the plane."""
    from pyro_vae import plots

    drawable = {name: points for name, points in sets.items() if points.shape[1:] == (2,)}
    return {"points": lambda: plots.figure_of(plots.plot_points(drawable))} if drawable else {}


def free(
    context: "Context", out: Path | None, default: Path, overwrite: bool, *, apart: str | None = None
) -> Path:
    """The folder to write, held until the command ends: ``out``, or ``default``, ``default-2``, …

    :param apart: the name of what may be there, left by an interrupted call.
    :raises FileExistsError: where something in it would be lost.
    """
    folder: Path = context.with_resource(
        reserved(check_no_link(out) if out else default, numbered=out is None)
    )
    listed = written(folder)
    here = [entry for entry in folder.iterdir() if entry.name not in (LOCK, apart)]
    if here and not overwrite:
        raise FileExistsError(
            f"{folder} exists already; name another folder by --out, or replace it by --overwrite"
        )
    if here and not listed:
        raise FileExistsError(
            f"{folder} holds nothing that pyro-vae wrote, so it is not overwritten; name another by --out"
        )
    for entry in here:
        if entry.name in listed and not is_listed(entry, listed):
            raise FileExistsError(
                f"{entry} was changed after pyro-vae wrote it, so it is not overwritten; move it away"
            )
    return folder


def leave(folder: Path, arrays: "dict[str, Tensor]", pictures: "Pictures") -> list[Path]:
    """Write arrays and pictures into a folder, and return the files."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array.cpu().numpy(), allow_pickle=False)
        files.append(folder / f"{name}.npy")
        put(files[-1], buffer.getvalue())
    return files + draw(folder, pictures)


def draw(folder: Path, pictures: "Pictures") -> list[Path]:
    """Draw pictures into a folder, and return the files. One that cannot be drawn is a warning, and the
    others are drawn."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        before, buffer = set(plt.get_fignums()), io.BytesIO()
        try:
            picture().savefig(buffer, format="png", dpi=150)
        except Exception as error:
            cause = (str(error) or "no message").splitlines()[0]
            say(
                f"warning: the picture {folder / name}.png could not be drawn ({type(error).__name__}: "
                f"{cause})"
            )
            continue
        finally:
            for number in set(plt.get_fignums()) - before:
                plt.close(number)
        files.append(folder / f"{name}.png")
        put(files[-1], buffer.getvalue())
    return files


def say(line: str) -> None:
    """A line of progress; what cannot be said stops nothing."""
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def shown() -> "Iterator[None]":
    """Warnings, and the log of pyro_vae, as lines of progress for the block: they do not cut through a bar.
    What other libraries warn of is their own affair, unless ``python -W`` asks for it."""
    log, compiling = logging.getLogger("pyro_vae"), logging.getLogger("pyro_vae.infer.svi")
    handler, level = _Lines(), compiling.level
    if os.environ.get("RANK", "0") == "0":  # of the processes of a job, the first speaks
        log.addHandler(handler)
    compiling.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|pyro|matplotlib|numpy)(\.|$)", append=True)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {str(message).splitlines()[0]}")
            yield
    finally:
        log.removeHandler(handler)
        compiling.setLevel(level)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage() if record.levelno < logging.WARNING else f"warning: {record.getMessage()}")


def again() -> str:
    """The command as it was given."""
    return command(*sys.argv[1:])


def command(*words: object) -> str:
    """A command to copy into a shell."""
    return shlex.join(["pyro-vae", *map(str, words)])


@contextlib.contextmanager
def interrupted(kept: "Callable[[], str]", speaks: bool = True) -> "Iterator[None]":
    """Say what was kept where SIGINT or SIGTERM ends the block.

    :param speaks: whether this is the process of a job that speaks.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if speaks and (isinstance(stop, KeyboardInterrupt) or stop.code == 143):
            with contextlib.suppress(Exception):
                say(f"interrupted: {kept()}")
        raise


def done(page: Path | None, *then: object) -> None:
    """The last lines of a command: the path of the report, and the next useful command."""
    if page is not None:
        say(f"report: {page}")
    say(f"next: {command(*then)}")


def show_files(files: list[Path], as_json: bool) -> None:
    names = list(map(str, files))
    show({"files": names}, "\n".join(names), as_json)


def show(result: Any, text: str, as_json: bool) -> None:
    from pyro_vae.cli.runs import as_json as plain

    try:
        print(json.dumps(plain(result)) if as_json else text, file=sys.__stdout__, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def fail(code: int, message: object) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"pyro-vae: {str(message).split(chr(10), 1)[0]}", file=sys.stderr, flush=True)
    sys.exit(code)
