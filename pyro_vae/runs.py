"""The folder that a training run leaves: ``config.json``, ``env.json``, ``metrics.jsonl``, ``weights/``, ``checkpoints/``,
``plots/`` and ``report.html``. Everything is plain text, safetensors or PNG; a run is rebuilt from it alone."""

import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
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

from pyro_vae import __version__, checkpoint, infer, plots
from pyro_vae.build import Config, Pair, build_pair
from pyro_vae.data import Data
from pyro_vae.files import meant_for, write_whole
from pyro_vae.infer import Epoch
from pyro_vae.pair import MeanElbo
from pyro_vae.priors import StandardNormal

SCHEMA = 2
SHOWN = "plots", "evaluation", "diagnosis", "samples", "reconstructions"  # folders with pictures: plots, plots-2, …
_WRITTEN = "config.json", "env.json", "report.html"  # whole, or not at all
_OURS = re.compile(rf"metrics\.jsonl|weights|checkpoints|({'|'.join(SHOWN)})(-\d+)?")


class Run(NamedTuple):
    """A run folder and its configuration."""

    path: Path
    config: Config

    def record(self, epochs: Iterable[Epoch], *, anew: bool) -> None:
        """Write epochs to ``metrics.jsonl``, or append them to it."""
        with (self.path / "metrics.jsonl").open("w" if anew else "a") as file:
            file.writelines(json.dumps(as_json(epoch)) + "\n" for epoch in epochs)

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

    def summary(self) -> str:
        """How long it trained, and how good it became."""
        kept, epochs = self.kept(), self.history()
        seconds = sum(epoch.seconds for epoch in epochs)
        which = "" if kept == epochs[-1] else f", epoch {kept.epoch} kept"
        return f"{len(epochs)} epochs in {seconds:.0f} s{which}; held out: {kept.validation}"

    def save(self, pair: Pair, rows: Tensor) -> None:
        """Write the weights, those in Pyro's param store too; see :func:`~pyro_vae.checkpoint.save`."""
        checkpoint.save(self.path / "weights", pair.vae or (pair.model, pair.guide), rows)

    @contextmanager
    def loaded(self, rows: Tensor | None = None) -> Iterator[Pair]:
        """The trained pair, its param store in force for the block. Modules are in evaluation mode, on the CPU.

        :param rows: some data, by which a pair shows what it consists of; a VAE does as well with zeros.
        """
        pair = build_pair(self.config)
        if rows is None and pair.vae is None:
            raise ValueError(
                f"{self.path}: its pair is two programs of your own, which do not say how to sample or reconstruct; expected a "
                "factory that returns a pyro_vae.VAE"
            )
        for program in (pair.model, pair.guide):
            if isinstance(program, torch.nn.Module):
                program.eval()
        if rows is None:
            rows = torch.zeros(2, *self.config.event_shape, dtype=getattr(torch, self.config.dtype))
        with pyro.get_param_store().scope():
            checkpoint.load(self.path / "weights", lambda: pair, rows)
            yield pair


class _Kept(checkpoint.Checkpoints):
    """The checkpoints of a run, which is made with the first of them: a start that fails replaces nothing. With that of an
    epoch's end go the epoch's record and the weights; with early stopping those of the best epoch alone.

    :param rows: some data, by which a pair shows what it consists of.
    """

    def __init__(self, path: Path, pair: Pair, rows: Tensor, make: Callable[[], Run]) -> None:
        super().__init__(path / "checkpoints")
        self.pair, self.rows, self.make = pair, rows, make
        self.run: Run | None = None
        self.recorded = False

    def check_free(self) -> None:
        """What is at the run's path has been looked at: see :func:`check_free`."""

    def save(self, steps: int, content: Any, *, score: float) -> None:
        self.run = self.run or self.make()
        super().save(steps, content, score=score)
        if not content["batch"]:
            records = content["history"][-1:] if self.recorded else content["history"]
            self.run.record(map(Epoch.of, records), anew=not self.recorded)
            self.recorded = True
            if self.run.config.patience is None or not content["best"]["epochs_since"]:
                self.run.save(self.pair, self.rows)


def train(
    path: Path,
    config: Config,
    pair: Pair,
    train_data: Data,
    test: Data,
    *,
    device: str,
    overwrite: bool,
    every: int | None,
    resume: str | None,
    say: Callable[[str], None],
) -> Run:
    """Train a pair, with a checkpoint, its record and its weights after each epoch.

    :param resume: go on with the run that is at ``path``, if any: see :func:`~pyro_vae.infer.fit`.
    """
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(device)
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1} if pair.vae else {}
    loss = Trace_ELBO(num_particles=config.num_particles, **(many if config.num_particles > 1 else {}))
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    goes_on = resume is not None and is_run(path)
    test = test.to(device)
    kept = _Kept(path, pair, test.x[:2], lambda: create(path, config, device, overwrite=overwrite, goes_on=goes_on))
    for epoch in infer.train(
        pair.model, pair.guide, train_data.to(device), validation=test, loss=loss,
        optim=Adam({"lr": config.learning_rate}), epochs=config.num_epochs, batch_size=config.batch_size,
        patience=config.patience, param_store=store, clip_norm=config.clip_norm, checkpoint=kept, every=every, resume=resume,
        beta=(lambda t: config.beta * min(1.0, t / config.warm_up)) if config.warm_up else config.beta,
    ):  # fmt: skip
        if epoch.epoch == 1 or epoch.epoch % max(1, config.num_epochs // 20) == 0:
            say(_line(epoch))
    if infer.Group().rank:  # the first process writes for all
        return Run(path, config)
    run = kept.run or kept.make()
    with pyro.get_param_store().scope(store):
        run.save(pair, kept.rows)  # early stopping went back to the best
    return run


def continued(path: Path, config: Config, given: Collection[str]) -> Config:
    """The configuration of the run at ``path``, to be gone on with.

    :param given: the fields of ``config`` that the user gave; those that nobody gave are the run's.
    :raises MismatchError: for a field that is not the run's; only ``num_epochs`` may change.
    """
    was = open_run(path).config
    for name in given:
        got, expected = getattr(config, name), getattr(was, name)
        if got != expected and name != "num_epochs":
            raise checkpoint.MismatchError(
                f"--{name.replace('_', '-')} is {got} but the run at {path} was begun with {expected}; leave it out, or train "
                "in another folder"
            )
    return replace(was, num_epochs=config.num_epochs if "num_epochs" in given else was.num_epochs)


def _line(epoch: Epoch) -> str:
    parts = {"train": epoch.train, "held out": epoch.validation}
    means = (
        f"{name} ELBO {m.elbo:8.2f} = {m.reconstruction:8.2f} - KL {m.kl:6.2f}" for name, m in parts.items() if m is not None
    )
    return f"epoch {epoch.epoch:4d}   {'   '.join(means)}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` holds something that is not to be replaced."""
    if not path.exists() or (path.is_dir() and all(meant_for(entry.name) in _WRITTEN for entry in path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already; name another folder by --out, or replace it by --overwrite")
    if not path.is_dir() or not any(_is_ours(entry.name) for entry in path.iterdir()):
        raise FileExistsError(f"{path} holds nothing that pyro-vae wrote, so it is not overwritten; name another by --out")


def create(path: Path, config: Config, device: str, *, overwrite: bool, goes_on: bool) -> Run:
    """A new run folder. An earlier run at ``path`` is replaced only where ``overwrite`` is set, and only its own files.

    :param goes_on: keep what the run at ``path`` left.
    :raises FileExistsError: where ``path`` holds something already.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not goes_on:
        check_free(path, overwrite=overwrite)
        for entry in path.iterdir():
            if _is_ours(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name, content in (("config.json", {"schema": SCHEMA} | asdict(config)), ("env.json", environment(device))):
        write_whole(path / name, (json.dumps(content, indent=2) + "\n").encode())
    return Run(path, config)


def _is_ours(name: str) -> bool:
    """Whether it is the name of something that a run leaves, were it by a crash."""
    return name in _WRITTEN or meant_for(name) in _WRITTEN or _OURS.fullmatch(name) is not None


def is_run(path: Path) -> bool:
    """Whether there is a run at ``path``."""
    return (path / "config.json").is_file()


def open_run(path: Path) -> Run:
    """A run folder that is there.

    :raises FileNotFoundError: where there is no run at ``path``.
    :raises ValueError: where its ``config.json`` is none; ``MismatchError`` where it is of another version of pyro_vae.
    """
    file = path / "config.json"
    if not is_run(path):
        raise FileNotFoundError(f"there is no run at {path}: it has no config.json; name a folder that `pyro-vae train` made")
    try:
        record = json.loads(_text(file))
        schema = record.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of a run ({error!r})") from error
    if schema != SCHEMA:
        raise checkpoint.MismatchError(
            f"{file} has schema {schema!r} but this pyro_vae reads {SCHEMA}; install the version that wrote it"
        )
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
