"""The folder that a training run leaves: ``config.json``, ``env.json``, ``metrics.jsonl``, ``weights.safetensors`` and
``plots/``. Everything is plain text, safetensors or PNG; a run is rebuilt from it alone."""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pyro_vae import __version__, infer, plots
from pyro_vae.batches import Batch
from pyro_vae.build import Config, Pair, build_pair
from pyro_vae.checkpoint import load_weights, save_weights
from pyro_vae.data import Data
from pyro_vae.files import write_whole
from pyro_vae.infer import Epoch
from pyro_vae.pair import MeanElbo
from pyro_vae.priors import StandardNormal

SCHEMA = 1
_OURS = re.compile(
    r"(config|env)\.json|metrics\.jsonl|weights\.safetensors|(plots|samples|reconstructions|evaluation|diagnosis)(-\d+)?"
)


class VersionError(ValueError):
    """A run folder written by a version of pyro_vae that this one does not read."""


class Run(NamedTuple):
    """A run folder and its configuration."""

    path: Path
    config: Config

    def record(self, epoch: Epoch) -> None:
        """Append one epoch to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(as_json(epoch)) + "\n")

    def history(self) -> list[Epoch]:
        """The epochs of ``metrics.jsonl``. Raises ``ValueError`` where a line of it is none."""
        file, epochs = self.path / "metrics.jsonl", []
        for number, line in enumerate(_text(file).splitlines(), start=1):
            try:
                epochs.append(_as_epoch(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{file}, line {number} is no epoch of a run ({error}); delete that line") from error
        if not epochs:
            raise ValueError(f"{file} holds no epoch; train again")
        return epochs

    def kept(self) -> Epoch:
        """The epoch whose weights the run holds: the last, or with early stopping the best."""
        epochs = self.history()
        if self.config.patience is None:
            return epochs[-1]
        return max(epochs, key=lambda epoch: epoch.validation.elbo if epoch.validation else -math.inf)

    def save(self, pair: Pair, param_store: dict[str, Any]) -> None:
        """Write the weights; see :func:`~pyro_vae.checkpoint.save_weights`."""
        save_weights(self.path / "weights.safetensors", pair.model, pair.guide, param_store)

    @contextmanager
    def loaded(self, rows: Tensor | None = None) -> Iterator[Pair]:
        """The trained pair, its param store in force for the block. Modules are in evaluation mode, on the CPU.

        :param rows: some data, which plain functions and lazy modules need to make their parameters; a VAE does not.
        """
        pair = build_pair(self.config)
        if rows is None and pair.vae is None:
            raise ValueError(
                f"{self.path}: its pair is two programs of your own, which do not say how to sample or reconstruct; expected a "
                "factory that returns a pyro_vae.VAE"
            )
        batch = None if rows is None or pair.vae else Batch((rows,), {})
        state = load_weights(self.path / "weights.safetensors", pair.model, pair.guide, batch)
        for program in (pair.model, pair.guide):
            if isinstance(program, torch.nn.Module):
                program.eval()
        with pyro.get_param_store().scope(state):
            yield pair


def train(
    path: Path,
    config: Config,
    pair: Pair,
    train_data: Data,
    test: Data,
    *,
    device: str,
    overwrite: bool,
    say: Callable[[str], None],
) -> Run:
    """Train a pair, and keep its weights after each epoch. The folder is made once the first epoch has gone well, so that a
    start that fails replaces nothing."""
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(device)
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1} if pair.vae else {}
    loss = Trace_ELBO(num_particles=config.num_particles, **(many if config.num_particles > 1 else {}))
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    run = None
    for epoch in infer.train(
        pair.model, pair.guide, train_data.to(device), validation=test.to(device), loss=loss,
        optim=Adam({"lr": config.learning_rate}), epochs=config.num_epochs, batch_size=config.batch_size,
        patience=config.patience, param_store=store,
        beta=(lambda t: config.beta * min(1.0, t / config.warm_up)) if config.warm_up else config.beta,
    ):  # fmt: skip
        run = run or create(path, config, device, overwrite=overwrite)
        run.record(epoch)
        run.save(pair, store)
        if epoch.epoch == 1 or epoch.epoch % max(1, config.num_epochs // 20) == 0:
            say(_line(epoch))
    run = run or create(path, config, device, overwrite=overwrite)
    run.save(pair, store)  # early stopping went back to the best
    return run


def _line(epoch: Epoch) -> str:
    parts = {"train": epoch.train, "held out": epoch.validation}
    means = (
        f"{name} ELBO {m.elbo:8.2f} = {m.reconstruction:8.2f} - KL {m.kl:6.2f}" for name, m in parts.items() if m is not None
    )
    return f"epoch {epoch.epoch:4d}   {'   '.join(means)}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` holds something that is not to be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already; name another folder by --out, or replace it by --overwrite")
    if not path.is_dir() or not any(_OURS.fullmatch(entry.name) for entry in path.iterdir()):
        raise FileExistsError(f"{path} holds nothing that pyro-vae wrote, so it is not overwritten; name another by --out")


def create(path: Path, config: Config, device: str, *, overwrite: bool) -> Run:
    """A new run folder. An earlier run at ``path`` is replaced only where ``overwrite`` is set, and only its own files.

    :raises FileExistsError: where ``path`` holds something already.
    """
    check_free(path, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    for entry in path.iterdir():
        if _OURS.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name, content in (("config.json", {"schema": SCHEMA} | asdict(config)), ("env.json", environment(device))):
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
        record = json.loads(_text(file))
        schema = record.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a run ({error!r})") from error
    if schema != SCHEMA:
        raise VersionError(f"{file} has schema {schema!r} but this pyro_vae reads {SCHEMA}; install the version that wrote it")
    return Run(path, Config.read(record, str(file)))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}; the run is not whole, train again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text ({error})") from error


def fresh(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … where it is taken."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def environment(device: str) -> dict[str, Any]:
    """What the run ran on: versions, threads, device; nothing that names the machine or its user."""
    packages = ("torch", "pyro-ppl", "numpy", "torchvision", "safetensors")
    return {
        "pyro_vae": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: metadata.version(name) for name in packages},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "command": ["pyro-vae", *sys.argv[1:]],
    }


def pictures(run: Run, pair: Pair, test: Data) -> Iterator[tuple[str, Figure]]:
    """Every picture that the run's data and pair allow, by name. Of a user's own programs only the curve is known."""
    yield "curve", plots.figure_of(plots.plot_history(run.history()))
    vae, image = pair.vae, test.x.dim() > 2
    if vae is None:
        return
    torch.manual_seed(run.config.seed)
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
    if isinstance(result, tuple):
        return [as_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _as_epoch(record: dict[str, Any]) -> Epoch:
    def mean(part: dict[str, float | None] | None) -> MeanElbo | None:
        return None if part is None else MeanElbo(**{k: math.nan if v is None else v for k, v in part.items()})

    return Epoch(**record | {"train": mean(record["train"]), "validation": mean(record["validation"])})
