"""The folder that a training run leaves: ``config.json``, ``env.json``, ``metrics.jsonl``, ``weights.safetensors`` and
``plots/``. Everything is plain text, safetensors or PNG; a run is rebuilt from it alone."""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure

from pyro_vae import __version__, plots
from pyro_vae.batches import Batch
from pyro_vae.build import Pair, build_pair
from pyro_vae.checkpoint import load_weights, save_weights, write_whole
from pyro_vae.data import Data
from pyro_vae.infer import Epoch
from pyro_vae.pair import MeanElbo
from pyro_vae.priors import StandardNormal

SCHEMA = 1
_OURS = ("config.json", "env.json", "metrics.jsonl", "weights.safetensors", "plots")


class VersionError(ValueError):
    """A run folder written by a version of pyro_vae that this one does not read."""


class Run(NamedTuple):
    """A run folder and its configuration: what ``pyro-vae train`` was told, defaults filled in."""

    path: Path
    config: dict[str, Any]

    def record(self, epoch: Epoch) -> None:
        """Append one epoch to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(as_json(epoch)) + "\n")

    def history(self) -> list[Epoch]:
        """The epochs of ``metrics.jsonl``."""
        return [_as_epoch(json.loads(line)) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def save(self, pair: Pair, param_store: dict[str, Any]) -> None:
        """Write the weights; see :func:`~pyro_vae.checkpoint.save_weights`."""
        save_weights(self.path / "weights.safetensors", pair.model, pair.guide, param_store)

    @contextmanager
    def loaded(self) -> Iterator[Pair]:
        """The trained pair, its param store in force for the block. Modules are in evaluation mode."""
        pair = build_pair(self.config)
        blank = torch.zeros(2, *self.config["event_shape"], device=self.config["device"])
        batch = Batch((blank.to(getattr(torch, self.config["dtype"])),), {})
        state = load_weights(self.path / "weights.safetensors", pair.model, pair.guide, batch)
        for program in (pair.model, pair.guide):
            if isinstance(program, torch.nn.Module):
                program.eval()
        with pyro.get_param_store().scope(state):
            yield pair


def create(path: Path, config: dict[str, Any], *, overwrite: bool) -> Run:
    """A new run folder. An earlier run at ``path`` is replaced only where ``overwrite`` is set, and only its own files.

    :raises FileExistsError: where ``path`` holds something already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{path} exists already; name another folder by --out, or replace it by --overwrite")
        if not (path / "config.json").is_file():
            raise FileExistsError(f"{path} is no run folder, so it is not overwritten; name another by --out")
        for name in _OURS:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", {"schema": SCHEMA} | config), ("env.json", environment())):
        write_whole(path / name, (json.dumps(content, indent=2) + "\n").encode())
    return Run(path, config)


def open_run(path: Path) -> Run:
    """A run folder that is there.

    :raises FileNotFoundError: where there is no run at ``path``.
    :raises ValueError: where its ``config.json`` is none; ``VersionError`` where it is of a newer pyro_vae.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no run at {path}: it has no config.json; name a folder that `pyro-vae train` made")
    try:
        config = json.loads(file.read_text())
        schema = config.pop("schema")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no configuration of a run ({error!r})") from error
    if schema != SCHEMA:
        raise VersionError(f"{file} has schema {schema} but this pyro_vae reads {SCHEMA}; install the version that wrote it")
    return Run(path, config)


def fresh(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … where it is taken."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def environment() -> dict[str, Any]:
    """What the run ran on: versions, threads, device; nothing that names the machine or its user."""
    packages = ("torch", "pyro-ppl", "numpy", "torchvision", "safetensors")
    return {
        "pyro_vae": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in packages},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": ["pyro-vae", *sys.argv[1:]],
    }


def pictures(run: Run, pair: Pair, test: Data) -> Iterator[tuple[str, Figure]]:
    """Every picture that the run's data and pair allow, by name. Of a user's own programs only the curve is known."""
    yield "curve", plots.figure_of(plots.plot_history(run.history()))
    vae, image = pair.vae, test.x.dim() > 2
    if vae is None:
        return
    torch.manual_seed(run.config["seed"])
    if image:
        yield "reconstructions", plots.plot_reconstructions(test.x[:30], vae.reconstruct(test.x[:30]))
        yield "samples", plots.plot_samples(vae)
    elif test.x.shape[1:] == (2,):
        yield "samples", plots.figure_of(plots.plot_points({"data": test.x, "samples": vae.sample(len(test))}))
    if vae.model.prior.event_shape == (2,):
        yield "latent", plots.figure_of(plots.plot_latent(vae, test.x, test.labels))
        if image and isinstance(vae.model.prior, StandardNormal):
            yield "manifold", plots.plot_manifold(vae)


def as_json(result: Any) -> Any:
    """A result as JSON has it: no NaN, no infinity."""
    if hasattr(result, "_asdict"):
        return {key: as_json(value) for key, value in result._asdict().items()}
    if isinstance(result, Mapping):
        return {key: as_json(value) for key, value in result.items()}
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _as_epoch(record: dict[str, Any]) -> Epoch:
    def mean(part: dict[str, float | None] | None) -> MeanElbo | None:
        return None if part is None else MeanElbo(**{k: math.nan if v is None else v for k, v in part.items()})

    return Epoch(**record | {"train": mean(record["train"]), "validation": mean(record["validation"])})
