"""Output of the command line: progress, JSON, arrays and pictures. The module does not import torch."""

import contextlib
import io
import json
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from pyro_vae.files import LOCK, check_no_link, discard, is_listed, put, reserved, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor
    from typer import Context

    Pictures = Mapping[str, Callable[[], Axes | Figure | str]]  # a call draws a figure, or returns a page

PictureFormat = Literal["png", "svg", "pdf"]


def points(**sets: "Tensor") -> "Pictures":
    """A scatter plot of those ``sets`` that have the shape ``(n, 2)``; no picture if there are none."""
    from pyro_vae import plots

    drawable = {name: points for name, points in sets.items() if points.shape[1:] == (2,)}
    return {"points": lambda: plots.plot_points(drawable)} if drawable else {}


def reserve_folder(
    context: "Context", out: Path | None, default: Path, overwrite: bool, *, ignore: str | None = None
) -> Path:
    """Lock the output folder until the command ends, and return its path: ``out``, or the first unused one of
    ``default``, ``default-2``, …

    :param ignore: the name of a file or folder that the output folder may contain, from an interrupted call.
    :raises FileExistsError: if the folder contains files that must not be overwritten.
    """
    folder: Path = context.with_resource(
        reserved(check_no_link(out) if out else default, numbered=out is None)
    )
    listed = written(folder)
    entries = [entry for entry in folder.iterdir() if entry.name not in (LOCK, ignore)]
    if entries and not overwrite:
        raise FileExistsError(
            f"{folder} exists already; pass another folder as --out, or pass --overwrite to replace it"
        )
    if entries and not listed:
        raise FileExistsError(
            f"{folder} was not written by pyro-vae, so it is not overwritten; pass another folder as --out"
        )
    for entry in entries:
        if entry.name in listed and not is_listed(entry, listed):
            raise FileExistsError(
                f"{entry} was changed after pyro-vae wrote it, so it is not overwritten; move it away"
            )
    return folder


def write_results(
    folder: Path, arrays: "dict[str, Tensor]", pictures: "Pictures", format: PictureFormat = "png"
) -> list[Path]:
    """Write arrays and pictures to a folder. Returns the paths of the files."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array.cpu().numpy(), allow_pickle=False)
        files.append(folder / f"{name}.npy")
        put(files[-1], buffer.getvalue())
    return files + write_pictures(folder, pictures, format)


def write_pictures(folder: Path, pictures: "Pictures", format: PictureFormat = "png") -> list[Path]:
    """Draw pictures and write them to a folder, and delete the pictures of an earlier call. Returns the paths
    of the files. A picture that fails is skipped with a warning.

    :param format: png, svg or pdf. A page is an HTML file in any case.
    """
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    from pyro_vae import plots

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in pictures.items():
        before, file = set(plt.get_fignums()), folder / f"{name}.{format}"
        try:
            with plots.style():
                drawn = picture()
                if isinstance(drawn, str):
                    file, content = file.with_suffix(".html"), drawn.encode()
                else:
                    buffer = io.BytesIO()
                    figure = drawn if isinstance(drawn, Figure) else plots.figure_of(drawn)
                    figure.savefig(buffer, format=format)
                    content = buffer.getvalue()
        except Exception as error:
            cause = (str(error) or "no message").splitlines()[0]
            print_progress(
                f"warning: the picture {file} could not be drawn ({type(error).__name__}: {cause})"
            )
            continue
        finally:
            for number in set(plt.get_fignums()) - before:
                plt.close(number)
        files.append(file)
        put(file, content)
    for name in written(folder).keys() - {file.name for file in files}:
        if Path(name).suffix[1:] in get_args(PictureFormat):
            discard(folder / name)
    return files


def print_progress(line: str) -> None:
    """Print a line to stderr, above any progress bar. Errors of the stream are ignored."""
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def progress_lines() -> "Iterator[None]":
    """Print warnings, and the log of pyro_vae, as lines of progress within the block. Warnings of other
    libraries are ignored, unless ``python -W`` enables them."""
    log, svi_log = logging.getLogger("pyro_vae"), logging.getLogger("pyro_vae.infer.svi")
    handler, level = _ProgressHandler(), svi_log.level
    if os.environ.get("RANK", "0") == "0":  # only rank 0 prints
        log.addHandler(handler)
    svi_log.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|pyro|matplotlib|numpy)(\.|$)", append=True)
            warnings.showwarning = lambda message, *_, **__: print_progress(
                f"warning: {str(message).splitlines()[0]}"
            )
            yield
    finally:
        log.removeHandler(handler)
        svi_log.setLevel(level)


class _ProgressHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        print_progress(message if record.levelno < logging.WARNING else f"warning: {message}")


def current_command() -> str:
    """The command line of this process, quoted for a shell."""
    return shell_command(*sys.argv[1:])


def shell_command(*words: object) -> str:
    """A ``pyro-vae`` command, quoted for a shell."""
    return shlex.join(["pyro-vae", *map(str, words)])


@contextlib.contextmanager
def report_interruption(describe_saved: "Callable[[], str]", enabled: bool = True) -> "Iterator[None]":
    """If SIGINT or SIGTERM ends the block, print what was saved.

    :param enabled: false for ranks other than 0, which do not print.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if enabled and (isinstance(stop, KeyboardInterrupt) or stop.code == 143):
            with contextlib.suppress(Exception):
                print_progress(f"interrupted: {describe_saved()}")
        raise


def print_next(report: Path | None, *command: object) -> None:
    """Print the last lines of a command: the path of the report, and a command to run next, if any."""
    if report is not None:
        print_progress(f"report: {report}")
    if command:
        print_progress(f"next: {shell_command(*command)}")


def print_files(files: list[Path], as_json: bool) -> None:
    """Print paths to stdout."""
    names = list(map(str, files))
    print_result({"files": names}, "\n".join(names), as_json)


def print_result(result: Any, text: str, as_json: bool) -> None:
    """Print a result to stdout: ``text``, or ``result`` as JSON. A closed pipe is not an error."""
    from pyro_vae.cli.runs import to_json

    try:
        print(json.dumps(to_json(result)) if as_json else text, file=sys.__stdout__, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the flush at exit must not fail either


def exit_with_error(code: int, message: object) -> NoReturn:
    """Print the first line of a message to stderr and exit."""
    with contextlib.suppress(OSError):
        print(f"pyro-vae: {str(message).split(chr(10), 1)[0]}", file=sys.stderr, flush=True)
    sys.exit(code)
