"""The folder that a training run leaves: ``config.json``, ``env.json``, ``metrics.jsonl``, ``weights/``,
``checkpoints/``, ``plots/`` and ``report.html``. Everything is plain text, safetensors or PNG; a run is
rebuilt from it alone."""

import json
import math
import os
import platform
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from pyro_vae.cli.build import Config, Pair, build_pair
from pyro_vae.data.datasets import Data
from pyro_vae.files import (
    LOCK,
    check_no_link,
    is_file,
    is_folder,
    is_listed,
    meant_for,
    parse_json,
    read_bytes,
    remove_listed,
    write_whole,
    written,
)
from pyro_vae.infer import Epoch
from pyro_vae.pairs.traces import MeanElbo
from pyro_vae.priors import StandardNormal

SCHEMA = 2
SHOWN = (
    "plots",
    "evaluation",
    "diagnosis",
    "samples",
    "reconstructions",
)  # folders with pictures: plots, plots-2, …
_WRITTEN = "config.json", "env.json", "report.html"  # whole, or not at all
_SHOWN = re.compile(rf"({'|'.join(SHOWN)})(-\d+)?")
_KEYS = {
    "config.json": {"schema", "dataset", "pair"},
    "env.json": {"pyro_vae", "command"},
    "metrics.jsonl": {"epoch", "train"},
}
GENERATOR = '<meta name="generator" content="pyro-vae">'  # by which a report is known


class Run(NamedTuple):
    """A run folder and its configuration."""

    path: Path
    config: Config

    def record(self, epochs: Iterable[Epoch], *, anew: bool) -> None:
        """Write epochs to ``metrics.jsonl``, or append them to it."""
        file, text = (
            check_no_link(self.path / "metrics.jsonl"),
            "".join(json.dumps(as_json(e)) + "\n" for e in epochs),
        )
        if anew:
            write_whole(file, text.encode())
        else:
            with file.open("ab", buffering=0) as whole:
                whole.write(text.encode())

    def history(self) -> list[Epoch]:
        """The epochs of ``metrics.jsonl``, and that of the weights where a crash came between the two. Raises
        ``ValueError`` where a line of it is none."""
        file, epochs = self.path / "metrics.jsonl", []
        of_weights = self._epoch_of_weights()
        no_record = of_weights is not None and not os.path.lexists(file)
        lines = [] if no_record else _text(file).splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                epochs.append(_as_epoch(parse_json(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                cause = str(error)[:100]
                raise ValueError(
                    f"{file}, line {number} is no epoch of a run ({cause}); delete that line"
                ) from error
        if of_weights is not None and of_weights.epoch == len(epochs) + 1 and (epochs or no_record):
            epochs.append(of_weights)
        if not epochs:
            raise ValueError(f"{file} holds no epoch; train again")
        return epochs

    def kept(self) -> Epoch:
        """The epoch whose weights the run holds: the last, or with early stopping the best."""
        return self._epoch_of_weights() or best_of(self.history(), self.config)

    def _epoch_of_weights(self) -> Epoch | None:
        """The epoch that is stored with the weights, in one with them; ``None`` where there is none."""
        try:
            record = checkpoint.read_about(self.part("weights")).get("epoch")
        except FileNotFoundError:
            return None
        try:
            return None if record is None else _as_epoch(as_json(Epoch.of(record)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.path / 'weights'}: its manifest holds no epoch ({str(error)[:100]})"
            ) from error

    def part(self, name: str) -> Path:
        """A folder of the run. Raises ``ValueError`` where it is a symbolic link."""
        return check_no_link(self.path / name)

    def unfinished(self) -> str | None:
        """How far training is, where it did not come to its end; else ``None``."""
        try:
            kept, behind = self.kept().epoch, len(self.history())
        except (FileNotFoundError, ValueError):
            return None  # whoever reads them says what is wrong
        if behind >= self.config.num_epochs or self.config.patience is not None:
            return None
        return (
            f"{self.path} is not finished: these are the weights of epoch {kept} of {self.config.num_epochs}"
        )

    def summary(self) -> str:
        """How long it trained, and how good it became."""
        kept, epochs = self.kept(), self.history()
        seconds = sum(epoch.seconds for epoch in epochs)
        which = "" if kept == epochs[-1] else f", epoch {kept.epoch} kept"
        return f"{len(epochs)} epochs in {seconds:.0f} s{which}; held out: {kept.validation}"

    def save(self, pair: Pair, rows: Tensor, epoch: Epoch) -> None:
        """Write the weights, those in Pyro's param store too, and the epoch that they are of; see
        :func:`~pyro_vae.checkpoint.save`."""
        programs = pair.vae or (pair.model, pair.guide)
        checkpoint.save_pair(self.part("weights"), programs, (rows,), {}, about={"epoch": tuple(epoch)})

    @contextmanager
    def loaded(self, rows: Tensor | None = None) -> Iterator[Pair]:
        """The trained pair, its param store in force for the block. Modules are in evaluation mode, on the
        CPU.

        :param rows: some data, by which a pair shows what it consists of; a VAE does as well with zeros.
        """
        weights = self.part("weights")
        if not os.path.lexists(weights) and last_step(self.path) is not None:
            own = () if self.config.pair is None else ("--pair", self.config.pair)
            raise FileNotFoundError(
                f"{self.path} has no weights: its first epoch was interrupted, or they were removed; go on "
                f"by: {go_on(self.path, own)}"
            )
        with nullcontext() if self.config.pair else checkpoint.within(weights):
            pair = build_pair(self.config)
        if rows is None and pair.vae is None:
            raise ValueError(
                f"{self.path}: its pair is two programs of your own, which do not say how to sample or "
                "reconstruct; expected a factory that returns a pyro_vae.VAE"
            )
        for program in (pair.model, pair.guide):
            if isinstance(program, torch.nn.Module):
                program.eval()
        if rows is None:
            rows = torch.zeros(2, *self.config.event_shape, dtype=getattr(torch, self.config.dtype))
        with pyro.get_param_store().scope():
            checkpoint.load(weights, lambda: pair, rows)
            yield pair


class _Kept(checkpoint.Checkpoints):
    """The checkpoints of a run, which is made with the first of them: a start that fails replaces nothing.
    With that of an epoch's end go the epoch's record and the weights; with early stopping those of the best
    epoch alone.

    :param rows: some data, by which a pair shows what it consists of.
    """

    def __init__(self, path: Path, pair: Pair, rows: Tensor, make: Callable[[], Run], goes_on: bool) -> None:
        super().__init__(path / "checkpoints")
        self.pair, self.rows, self.make, self.goes_on = pair, rows, make, goes_on
        self.run: Run | None = None
        self.recorded = False

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """The run's folder is held already, and this one made with the first checkpoint."""
        check_no_link(self.folder)
        if self.goes_on:
            self.check_ours()
        yield

    def check_free(self) -> None:
        """What is at the run's path has been looked at: see :func:`check_free`."""

    def save(self, steps: int, content: Any, *, score: float) -> None:
        self.run = self.run or self.make()
        super().save(steps, content, score=score)
        if not content["batch"]:
            epochs = [Epoch.of(record) for record in content["history"]]
            if self.run.config.patience is None or not content["best"]["epochs_since"]:
                self.run.save(
                    self.pair, self.rows, epochs[-1]
                )  # before the record: what is recorded is there
            self.run.record(epochs[-1:] if self.recorded else epochs, anew=not self.recorded)
            self.recorded = True


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
    kept = _Kept(
        path,
        pair,
        test.x[:2],
        lambda: create(path, config, device, overwrite=overwrite, goes_on=goes_on),
        goes_on,
    )
    for epoch in infer.train(
        pair.model,
        pair.guide,
        train_data.to(device),
        validation=test,
        loss=loss,
        optim=Adam({"lr": config.learning_rate}),
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        patience=config.patience,
        param_store=store,
        clip_norm=config.clip_norm,
        checkpoint=kept,
        every=every,
        resume=resume,
        beta=(lambda t: config.beta * min(1.0, t / config.warm_up)) if config.warm_up else config.beta,
    ):
        if epoch.epoch == 1 or epoch.epoch % max(1, config.num_epochs // 20) == 0:
            say(_line(epoch))
    if infer.Group().rank:  # the first process writes for all
        return Run(path, config)
    run = kept.run or kept.make()
    with pyro.get_param_store().scope(store):
        run.save(pair, kept.rows, best_of(run.history(), config))  # early stopping went back to the best
    return run


def last_step(path: Path) -> int | None:
    """The steps behind the newest checkpoint of the run at ``path``; ``None`` where there is none."""
    checkpoints = checkpoint.Checkpoints(path / "checkpoints").paths()
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else None


def go_on(path: Path, options: Iterable[object] = ()) -> str:
    """The command that goes on with the run at ``path``.

    :param options: those of its command that a run does not record.
    """
    return shlex.join(["pyro-vae", "train", "--out", str(path), "--resume", "last", *map(str, options)])


def best_of(epochs: list[Epoch], config: Config) -> Epoch:
    """The epoch whose weights are kept: the last, or with early stopping the best."""
    if config.patience is None:
        return epochs[-1]
    return max(epochs, key=lambda epoch: epoch.validation.elbo if epoch.validation else -math.inf)


def continued(path: Path, config: Config, given: Collection[str]) -> Config:
    """The configuration of the run at ``path``, to be gone on with.

    :param given: the fields of ``config`` that the user gave; those that nobody gave are the run's.
    :raises MismatchError: for a field that is not the run's; only ``num_epochs`` may change.
    """
    was = open_run(path, config.pair if "pair" in given else None).config
    for name in given:
        got, expected = getattr(config, name), getattr(was, name)
        if got != expected and name != "num_epochs":
            raise checkpoint.MismatchError(
                f"--{name.replace('_', '-')} is {got} but the run at {path} was begun with {expected}; leave "
                "it out, or train in another folder"
            )
    return replace(was, num_epochs=config.num_epochs if "num_epochs" in given else was.num_epochs)


def _line(epoch: Epoch) -> str:
    parts = {"train": epoch.train, "held out": epoch.validation}
    means = (
        f"{name} ELBO {m.elbo:8.2f} = {m.reconstruction:8.2f} - KL {m.kl:6.2f}"
        for name, m in parts.items()
        if m is not None
    )
    return f"epoch {epoch.epoch:4d}   {'   '.join(means)}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` holds something that is not to be replaced."""
    if not path.is_dir():
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already and is not a folder; name another by --out")
        return
    entries = [
        entry for entry in path.iterdir() if entry.name != LOCK and meant_for(entry.name) not in _WRITTEN
    ]
    if entries and not overwrite:
        raise FileExistsError(
            f"{path} exists already; name another folder by --out, or replace it by --overwrite"
        )
    if entries and not _is_ours(path / "config.json"):
        raise FileExistsError(
            f"{path} holds no run that pyro-vae wrote, so nothing in it is overwritten; name another by --out"
        )
    for entry in entries:
        if entry.name in (*_WRITTEN, "metrics.jsonl", "weights", "checkpoints") and not _is_ours(entry):
            raise FileExistsError(
                f"{entry} was not written by pyro-vae, so it is not overwritten; move it away"
            )


def create(path: Path, config: Config, device: str, *, overwrite: bool, goes_on: bool) -> Run:
    """A new run folder. An earlier run at ``path`` is replaced only where ``overwrite`` is set, and only its
    own files.

    :param goes_on: keep what the run at ``path`` left.
    :raises FileExistsError: where ``path`` holds something already.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not goes_on:
        check_free(path, overwrite=overwrite)
        checkpoint.remove(path / "weights")
        checkpoint.Checkpoints(path / "checkpoints").remove_all()
        for entry in path.iterdir():
            if _SHOWN.fullmatch(entry.name):
                remove_listed(entry)
            elif (meant_for(entry.name) or entry.name) in (*_WRITTEN, "metrics.jsonl") and is_file(entry):
                entry.unlink()
    for name, content in (
        ("config.json", {"schema": SCHEMA} | asdict(config)),
        ("env.json", environment(device)),
    ):
        write_whole(path / name, (json.dumps(content, indent=2) + "\n").encode())
    return Run(path, config)


def check_parts(path: Path) -> None:
    """Raise ``ValueError`` where a folder of a run is a link, which would lead out of it."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.name in ("weights", "checkpoints", "metrics.jsonl") or _SHOWN.fullmatch(entry.name):
            check_no_link(entry)


def _is_ours(entry: Path) -> bool:
    """Whether a run left it, by what it holds."""
    if entry.name == "weights":
        return checkpoint.is_ours(entry)
    if entry.name == "checkpoints":
        if is_folder(entry):
            checkpoint.Checkpoints(entry).check_ours()
        return is_folder(entry)
    try:
        text = read_bytes(entry)
        if entry.name == "report.html":
            return GENERATOR.encode() in text
        found = parse_json(text.splitlines()[0] if entry.name == "metrics.jsonl" else text)
    except (OSError, ValueError, IndexError):
        return False
    return isinstance(found, dict) and found.keys() >= _KEYS[entry.name]


def is_run(path: Path) -> bool:
    """Whether there is a run at ``path``."""
    return os.path.lexists(path / "config.json")


def open_run(path: Path, pair: str | None = None) -> Run:
    """A run folder that is there.

    :param pair: the ``--pair`` that the run was trained with, where it was: its code runs only when it is
        named again.
    :raises FileNotFoundError: where there is no run at ``path``.
    :raises ValueError: where its ``config.json`` is none; ``MismatchError`` where it is of another version of
        pyro_vae, or where ``pair`` is not the run's.
    """
    file = path / "config.json"
    if not is_run(path):
        raise FileNotFoundError(
            f"there is no run at {path}: it has no config.json; name a folder that `pyro-vae train` made"
        )
    try:
        record = parse_json(_text(file))
        schema = record.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is no configuration of a run ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    if schema != SCHEMA:
        raise checkpoint.MismatchError(
            f"{file} has schema {reprlib.repr(schema)} but this pyro_vae reads {SCHEMA}; install the version "
            "that wrote it"
        )
    run = Run(path, Config.read(record, str(file)))
    if run.config.pair != pair:
        recorded = reprlib.repr(run.config.pair)
        raise checkpoint.MismatchError(
            f"{path} was trained with --pair {recorded}, whose code runs only when it is named; if you trust "
            "it, pass that"
            if run.config.pair
            else f"{path} was trained without --pair; leave --pair {pair!r} out"
        )
    return run


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}; the run is not whole, train again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text ({error})") from error


def fresh(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3`` … where it is taken."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


def with_room(folder: Path) -> Path:
    """``folder`` if all in it is pyro-vae's, to be replaced; else one beside it."""
    listed = written(folder)
    ours = not folder.exists() or all(
        e.name.startswith(".") or is_listed(e, listed) for e in folder.iterdir()
    )
    return folder if ours else fresh(folder)


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


def pictures(run: Run, pair: Pair, test: Data) -> dict[str, Callable[[], Figure]]:
    """Every picture that the run's data and pair allow, by name, each drawn when it is called. Of a user's
    own programs only the curve is known. Raises ``ValueError`` for a record of epochs that is damaged."""
    history = run.history()
    found: dict[str, Callable[[], Figure]] = {"curve": lambda: plots.figure_of(plots.plot_history(history))}
    vae, image = pair.vae, test.x.dim() > 2
    if vae is None:
        return found
    if image:
        found["reconstructions"] = lambda: plots.plot_reconstructions(
            test.x[:30], vae.reconstruct(test.x[:30])
        )
        found["samples"] = lambda: plots.plot_samples(vae)
    elif test.x.shape[1:] == (2,):
        found["samples"] = lambda: plots.figure_of(
            plots.plot_points({"data": test.x, "samples": vae.sample(len(test))})
        )
    if vae.model.prior.event_shape == (2,):
        found["latent"] = lambda: plots.figure_of(plots.plot_latent(vae, test.x, test.labels))
        if image and isinstance(vae.model.prior, StandardNormal):
            found["manifold"] = lambda: plots.plot_manifold(vae)

    def seeded(picture: Callable[[], Figure]) -> Callable[[], Figure]:
        def drawn() -> Figure:
            torch.manual_seed(run.config.seed)
            return picture()

        return drawn

    return {name: seeded(picture) for name, picture in found.items()}


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
    """From JSON. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for what is none."""

    def number(value: Any) -> float:
        if value is None:
            return math.nan
        if type(value) not in (int, float) or abs(value) > sys.float_info.max:
            raise ValueError(f"{reprlib.repr(value)} is no number")
        return value

    def mean(part: dict[str, float | None] | None) -> MeanElbo | None:
        return None if part is None else MeanElbo(**{k: number(v) for k, v in part.items()})

    train = mean(record["train"])
    if type(record["epoch"]) is not int or not 0 < record["epoch"] < 2**32 or train is None:
        raise ValueError("its epoch is none, or it has no means of training")
    plain = {
        key: number(value) for key, value in record.items() if key not in ("train", "validation", "epoch")
    }
    return Epoch(epoch=record["epoch"], train=train, validation=mean(record["validation"]), **plain)
