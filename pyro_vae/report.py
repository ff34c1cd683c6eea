"""What the command line leaves: lines, JSON, arrays and pictures. Torch is not waited for."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def points(**sets: "Tensor") -> "dict[str, Figure]":
    from pyro_vae import plots

    drawable = {name: points for name, points in sets.items() if points.shape[1:] == (2,)}
    return {"points": plots.figure_of(plots.plot_points(drawable))} if drawable else {}


def free(folder: Path, overwrite: bool) -> Path:
    """``folder`` itself, once it is sure that nothing is lost by writing to it."""
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; name another folder by --out, or replace it by --overwrite")
    return folder


def leave(folder: Path, arrays: "dict[str, Tensor]", figures: "dict[str, Figure]", as_json: bool) -> None:
    """Write arrays and pictures into a folder, and say where."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.cpu().numpy())
    draw(folder, figures)
    files = [str(folder / f"{name}.npy") for name in arrays] + [str(folder / f"{name}.png") for name in figures]
    show({"files": files}, "\n".join(files), as_json)


def draw(folder: Path, figures: "dict[str, Figure]") -> None:
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
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
