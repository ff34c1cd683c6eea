"""What the command line leaves: lines, JSON, arrays and pictures. Torch is not waited for."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pyro_vae.files import LOCK, check_no_link, is_listed, put, reserved, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from typer import Context


def points(**sets: "Tensor") -> "dict[str, Figure]":
    from pyro_vae import plots

    drawable = {name: points for name, points in sets.items() if points.shape[1:] == (2,)}
    return {"points": plots.figure_of(plots.plot_points(drawable))} if drawable else {}


def free(context: "Context", out: Path | None, default: Path, overwrite: bool, *, apart: str | None = None) -> Path:
    """The folder to write, held until the command ends: ``out``, or ``default``, ``default-2``, …

    :param apart: the name of what may be there, left by an interrupted call.
    :raises FileExistsError: where something in it would be lost.
    """
    folder: Path = context.with_resource(reserved(check_no_link(out) if out else default, numbered=out is None))
    listed = written(folder)
    here = [entry for entry in folder.iterdir() if entry.name not in (LOCK, apart)]
    if here and not overwrite:
        raise FileExistsError(f"{folder} exists already; name another folder by --out, or replace it by --overwrite")
    if here and not listed:
        raise FileExistsError(f"{folder} holds nothing that pyro-vae wrote, so it is not overwritten; name another by --out")
    for entry in here:
        if entry.name in listed and not is_listed(entry, listed):
            raise FileExistsError(f"{entry} was changed after pyro-vae wrote it, so it is not overwritten; move it away")
    return folder


def leave(folder: Path, arrays: "dict[str, Tensor]", figures: "dict[str, Figure]", as_json: bool) -> None:
    """Write arrays and pictures into a folder, and say where."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array.cpu().numpy(), allow_pickle=False)
        put(folder / f"{name}.npy", buffer.getvalue())
    draw(folder, figures)
    files = [str(folder / f"{name}.npy") for name in arrays] + [str(folder / f"{name}.png") for name in figures]
    show({"files": files}, "\n".join(files), as_json)


def draw(folder: Path, figures: "dict[str, Figure]") -> None:
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        put(folder / f"{name}.png", buffer.getvalue())
        plt.close(figure)


def say(line: str) -> None:
    """A line of progress; what cannot be said stops nothing."""
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)


def show(result: Any, text: str, as_json: bool) -> None:
    from pyro_vae.runs import as_json as plain

    try:
        print(json.dumps(plain(result)) if as_json else text, file=sys.__stdout__, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def fail(code: int, message: object) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"pyro-vae: {str(message).split(chr(10), 1)[0]}", file=sys.stderr, flush=True)
    sys.exit(code)
