"""The run folder: ``config.json``, ``env.json``, ``metrics.jsonl``, ``weights/``, ``checkpoints/``,
``plots/`` and ``report.html``. All files are plain text, safetensors or PNG, and suffice to load the run."""

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
from pyro.optim import Adam
from torch import Tensor

from pyro_vae import __version__, checkpoint, infer, plots
from pyro_vae.cli.build import NOT_OPTIONS, Config, Pair, build_loss, build_pair
from pyro_vae.data.batches import Batch, as_batch
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
from pyro_vae.html import GENERATOR
from pyro_vae.infer import Epoch
from pyro_vae.infer.losses import kind_of, name_of
from pyro_vae.pairs.elbo import MeanElbo
from pyro_vae.priors import StandardNormal

SCHEMA = 2
RESULT_FOLDERS = ("plots", "evaluation", "diagnosis", "samples", "reconstructions")  # also plots-2, …
_ATOMIC_FILES = "config.json", "env.json", "report.html"
_RESULT_FOLDER = re.compile(rf"({'|'.join(RESULT_FOLDERS)})(-\d+)?")
_KEYS = {  # keys of the files of a run, which show that a run wrote them
    "config.json": {"schema", "dataset", "pair"},
    "env.json": {"pyro_vae", "command"},
    "metrics.jsonl": {"epoch", "train"},
}


class Run(NamedTuple):
    """A run folder and its configuration."""

    path: Path
    config: Config

    def record(self, epochs: Iterable[Epoch], *, append: bool) -> None:
        """Append epochs to ``metrics.jsonl``, or replace its content by them."""
        file = check_no_link(self.path / "metrics.jsonl")
        content = "".join(json.dumps(to_json(epoch)) + "\n" for epoch in epochs).encode()
        if append:
            with file.open("ab", buffering=0) as stream:
                stream.write(content)
        else:
            write_whole(file, content)

    def history(self) -> list[Epoch]:
        """The epochs in ``metrics.jsonl``. The epoch of the saved parameters is appended if it is missing
        because of a crash.

        :raises ValueError: if a line is not an epoch, or if there are no epochs.
        """
        file, epochs = self.path / "metrics.jsonl", []
        saved = self._read_saved_epoch()
        is_missing = saved is not None and not os.path.lexists(file)
        lines = [] if is_missing else _read_text(file).splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                epochs.append(_as_epoch(parse_json(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                cause = str(error)[:100]
                raise ValueError(
                    f"{file}, line {number} is not an epoch of a run ({cause}); delete that line"
                ) from error
        if saved is not None and saved.epoch == len(epochs) + 1 and (epochs or is_missing):
            epochs.append(saved)
        if not epochs:
            raise ValueError(f"{file} has no epochs; train again")
        return epochs

    def saved_epoch(self) -> Epoch:
        """The epoch of the saved parameters: the last, or with early stopping the best."""
        return self._read_saved_epoch() or select_epoch(self.history(), self.config)

    def _read_saved_epoch(self) -> Epoch | None:
        """The epoch in the manifest of the saved parameters, if any."""
        try:
            record = checkpoint.read_about(self.subpath("weights")).get("epoch")
        except FileNotFoundError:
            return None
        try:
            return None if record is None else _as_epoch(to_json(Epoch.of(record)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.path / 'weights'}: the epoch in the manifest is invalid ({str(error)[:100]})"
            ) from error

    def subpath(self, name: str) -> Path:
        """A folder of the run. Raises ``ValueError`` if it is a symbolic link."""
        return check_no_link(self.path / name)

    def source(self, data: str | None = None) -> dict[str, str | None]:
        """What a result is of: the name of the file of the saved parameters, which depends on its content,
        and the selection of ``data``. It is stored with the result, so that a report can tell whether the
        parameters have changed since."""
        return {"weights": checkpoint.tensor_file(self.subpath("weights")), "data": data}

    def unfinished(self) -> str | None:
        """A warning if the training is not finished, else ``None``."""
        try:
            saved, trained = self.saved_epoch().epoch, len(self.history())
        except (FileNotFoundError, ValueError):
            return None  # loading the run reports the error
        if trained >= self.config.num_epochs or self.config.patience is not None:
            return None
        return (
            f"{self.path} is not finished: the parameters are those of epoch {saved} of "
            f"{self.config.num_epochs}"
        )

    def objective(self) -> str:
        """What the training maximized, as text. Raises ``ValueError`` for an invalid objective."""
        loss = build_loss(self.config)
        return f"{name_of(loss)}: {kind_of(loss).bound}"

    def summary(self) -> str:
        """The duration of the training and the held-out ELBO, as text."""
        saved, epochs = self.saved_epoch(), self.history()
        seconds = sum(epoch.seconds for epoch in epochs)
        note = "" if saved == epochs[-1] else f", parameters of epoch {saved.epoch}"
        return f"{len(epochs)} epochs in {seconds:.0f} s{note}; held out: {saved.validation}"

    def save(self, pair: Pair, rows: Batch, epoch: Epoch) -> None:
        """Save the parameters, including those in Pyro's param store, with their epoch. See
        :func:`~pyro_vae.checkpoint.save`.

        :param rows: two rows of each argument, on which the pair is run to collect its parameters.
        """
        programs = pair.vae or (pair.model, pair.guide)
        about = {"epoch": tuple(epoch)}
        checkpoint.save_pair(self.subpath("weights"), programs, rows, about=about)

    @contextmanager
    def loaded(self, rows: Batch | None = None) -> Iterator[Pair]:
        """Load the trained pair on the CPU, in evaluation mode. Within the block, Pyro's param store has the
        parameters of the pair.

        :param rows: two rows of each argument, on which the pair is run to collect its parameters. The
            default for a VAE is zeros.
        :raises FileNotFoundError: if no parameters are saved.
        """
        weights = self.subpath("weights")
        if not os.path.lexists(weights) and last_step(self.path) is not None:
            pair_option = () if self.config.pair is None else ("--pair", self.config.pair)
            raise FileNotFoundError(
                f"{self.path} has no saved parameters: the first epoch was interrupted, or the parameters "
                f"were deleted; resume with: {resume_command(self.path, pair_option)}"
            )
        with nullcontext() if self.config.pair else checkpoint.within(weights):
            pair = build_pair(self.config)
        if rows is None and pair.vae is None:
            raise ValueError(
                f"{self.path}: the run was trained with a model and a guide of your own, so samples and "
                "reconstructions are not defined; expected a run whose --pair returns a pyro_vae.VAE"
            )
        for program in (pair.model, pair.guide):
            if isinstance(program, torch.nn.Module):
                program.eval()
        if rows is None:
            dtype, size = getattr(torch, self.config.dtype), self.config.condition_size
            x = torch.zeros(2, *self.config.event_shape, dtype=dtype)
            rows = Batch((x,) if size is None else (x, torch.zeros(2, size, dtype=dtype)), {})
        with pyro.get_param_store().scope():
            checkpoint.load(weights, lambda: pair, rows)
            yield pair


class _RunCheckpoints(checkpoint.Checkpoints):
    """The checkpoints of a run. The run folder is created when the first checkpoint is saved, so that a run
    that fails before replaces no files. With the checkpoint at the end of an epoch, the parameters of the
    pair are saved too, and the epoch is recorded in ``metrics.jsonl``. With early stopping, parameters are
    saved only if the epoch is the best so far.

    :param rows: two rows of each argument, on which the pair is run to collect its parameters.
    """

    def __init__(
        self, path: Path, pair: Pair, rows: Batch, create_run: Callable[[], Run], resumes: bool
    ) -> None:
        super().__init__(path / "checkpoints")
        self.pair, self.rows, self.create_run, self.resumes = pair, rows, create_run, resumes
        self.run: Run | None = None
        self.has_recorded = False

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Take no lock: the run folder is locked already."""
        check_no_link(self.folder)
        if self.resumes:
            self.check_ours()
        yield

    def check_free(self) -> None:
        """Do nothing: the function :func:`check_free` of this module has checked the run folder already."""

    def save(self, steps: int, content: Any, *, score: float) -> None:
        self.run = self.run or self.create_run()
        super().save(steps, content, score=score)
        if not content["batch"]:
            epochs = [Epoch.of(record) for record in content["history"]]
            if self.run.config.patience is None or not content["best"]["epochs_since"]:
                self.run.save(self.pair, self.rows, epochs[-1])
            # after the parameters are saved, so that a crash leaves no recorded epoch without parameters
            self.run.record(epochs[-1:] if self.has_recorded else epochs, append=self.has_recorded)
            self.has_recorded = True


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
    print_progress: Callable[[str], None],
) -> Run:
    """Train a pair. After each epoch, save a checkpoint and the parameters, and record the epoch.

    :param resume: the checkpoint to resume from if there is a run at ``path``; see
        :func:`~pyro_vae.infer.fit`.
    """
    for program in (pair.model, pair.guide):
        if isinstance(program, torch.nn.Module):
            program.to(device)
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    resumes = resume is not None and is_run(path)
    test = test.to(device)
    checkpoints = _RunCheckpoints(
        path,
        pair,
        first_rows(test),
        lambda: create(path, config, device, overwrite=overwrite, resumes=resumes),
        resumes,
    )
    for epoch in infer.train(
        pair.model,
        pair.guide,
        train_data.to(device),
        validation=test,
        loss=build_loss(config, pair),
        optim=Adam({"lr": config.learning_rate}),
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        patience=config.patience,
        param_store=store,
        clip_norm=config.clip_norm,
        checkpoint=checkpoints,
        every=every,
        resume=resume,
        beta=(lambda t: config.beta * min(1.0, t / config.warm_up)) if config.warm_up else config.beta,
    ):
        if epoch.epoch == 1 or epoch.epoch % max(1, config.num_epochs // 20) == 0:
            print_progress(_epoch_line(epoch, config.num_particles))
    if infer.Group().rank:  # only rank 0 writes
        return Run(path, config)
    run = checkpoints.run or checkpoints.create_run()
    with pyro.get_param_store().scope(store):  # early stopping has restored the best parameters
        run.save(pair, checkpoints.rows, select_epoch(run.history(), config))
    return run


def last_step(path: Path) -> int | None:
    """The step of the newest checkpoint of the run at ``path``; ``None`` if there are no checkpoints."""
    checkpoints = checkpoint.Checkpoints(path / "checkpoints").paths()
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else None


def train_command(config: Config) -> str:
    """The shell command that trains with the options of ``config``."""
    options = {key: value for key, value in asdict(config).items() if key not in NOT_OPTIONS}
    words = ["pyro-vae", "train", config.dataset]
    for key, value in options.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
    return shlex.join(words)


def resume_command(path: Path, options: Iterable[object] = ()) -> str:
    """The shell command that resumes the run at ``path``.

    :param options: further options, which must be repeated since a run does not record them.
    """
    return shlex.join(["pyro-vae", "train", "--out", str(path), "--resume", "last", *map(str, options)])


def select_epoch(epochs: list[Epoch], config: Config) -> Epoch:
    """The epoch whose parameters are saved: the last, or with early stopping the best."""
    if config.patience is None:
        return epochs[-1]
    return max(epochs, key=lambda epoch: epoch.validation.objective if epoch.validation else -math.inf)


def resumed_config(path: Path, config: Config, given: Collection[str]) -> Config:
    """The configuration with which the run at ``path`` resumes.

    :param given: the fields of ``config`` that the command line sets. The others are read from the run.
    :raises MismatchError: if a field in ``given`` differs from the run. Only ``num_epochs`` may differ.
    """
    recorded = open_run(path, config.pair if "pair" in given else None).config
    for name in given:
        got, expected = getattr(config, name), getattr(recorded, name)
        if got != expected and name != "num_epochs":
            raise checkpoint.MismatchError(
                f"--{name.replace('_', '-')} is {got} but the run at {path} has {expected}; leave it "
                "out, or train in another folder"
            )
    return replace(recorded, num_epochs=config.num_epochs) if "num_epochs" in given else recorded


def _epoch_line(epoch: Epoch, num_particles: int) -> str:
    """A line of progress. For an objective other than the ELBO it has the bound and the ESS of its K
    weights."""

    def text(m: MeanElbo) -> str:
        if m.bound is None:
            return f"ELBO {m.elbo:8.2f} = {m.reconstruction:8.2f} - KL {m.kl:6.2f}"
        return f"bound {m.bound:8.2f}, ELBO {m.elbo:8.2f}, ESS {m.ess:.1f} of {num_particles}"

    parts = {"train": epoch.train, "held out": epoch.validation}
    means = (f"{name} {text(mean)}" for name, mean in parts.items() if mean is not None)
    return f"epoch {epoch.epoch:4d}   {'   '.join(means)}"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` if ``path`` contains files that must not be replaced."""
    if not path.is_dir():
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already and is not a folder; pass another as --out")
        return
    entries = [
        entry for entry in path.iterdir() if entry.name != LOCK and meant_for(entry.name) not in _ATOMIC_FILES
    ]
    if entries and not overwrite:
        raise FileExistsError(
            f"{path} exists already; pass another folder as --out, --overwrite to replace it, or "
            "--resume last to train it further"
        )
    if entries and not _is_from_run(path / "config.json"):
        raise FileExistsError(
            f"{path} is not a run that pyro-vae wrote, so it is not overwritten; pass another folder as --out"
        )
    for entry in entries:
        if entry.name in (*_ATOMIC_FILES, "metrics.jsonl", "weights", "checkpoints") and not _is_from_run(
            entry
        ):
            raise FileExistsError(
                f"{entry} was not written by pyro-vae, so it is not overwritten; move it away"
            )


def create(path: Path, config: Config, device: str, *, overwrite: bool, resumes: bool) -> Run:
    """Create a run folder. With ``overwrite``, the files of an earlier run at ``path`` are deleted, and no
    others.

    :param resumes: keep the files of the run at ``path``.
    :raises FileExistsError: in the cases of :func:`check_free`.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not resumes:
        check_free(path, overwrite=overwrite)
        checkpoint.remove(path / "weights")
        checkpoint.Checkpoints(path / "checkpoints").remove_all()
        for entry in path.iterdir():
            if _RESULT_FOLDER.fullmatch(entry.name):
                remove_listed(entry)
            elif (meant_for(entry.name) or entry.name) in (*_ATOMIC_FILES, "metrics.jsonl") and is_file(
                entry
            ):
                entry.unlink()
    for name, content in (
        ("config.json", {"schema": SCHEMA} | asdict(config)),
        ("env.json", environment(device)),
    ):
        write_whole(path / name, (json.dumps(content, indent=2) + "\n").encode())
    return Run(path, config)


def check_no_links(path: Path) -> None:
    """Raise ``ValueError`` if a folder in a run, or its ``metrics.jsonl``, is a symbolic link."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.name in ("weights", "checkpoints", "metrics.jsonl") or _RESULT_FOLDER.fullmatch(entry.name):
            check_no_link(entry)


def _is_from_run(entry: Path) -> bool:
    """Whether the content of a file or folder shows that a run wrote it."""
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
        content = parse_json(text.splitlines()[0] if entry.name == "metrics.jsonl" else text)
    except (OSError, ValueError, IndexError):
        return False
    return isinstance(content, dict) and content.keys() >= _KEYS[entry.name]


def is_run(path: Path) -> bool:
    """Whether there is a run at ``path``."""
    return os.path.lexists(path / "config.json")


def open_run(path: Path, pair: str | None = None) -> Run:
    """Open an existing run folder.

    :param pair: the ``--pair`` that the run was trained with, if any. The caller must pass it again,
        since the code that it names is executed.
    :raises ValueError: ``MismatchError`` if ``pair`` differs from the run, and in the cases of
        :func:`read_run`.
    """
    run = read_run(path)
    if run.config.pair != pair:
        recorded = reprlib.repr(run.config.pair)
        raise checkpoint.MismatchError(
            f"{path} was trained with --pair {recorded}, whose code would be executed; pass the same --pair "
            "if you trust it"
            if run.config.pair
            else f"{path} was trained without --pair; leave --pair {pair!r} out"
        )
    return run


def read_run(path: Path) -> Run:
    """Read the configuration of a run folder. Nothing of the run is executed.

    :raises FileNotFoundError: if there is no run at ``path``.
    :raises ValueError: if its ``config.json`` is invalid; ``MismatchError`` if another version of pyro_vae
        wrote it.
    """
    file = path / "config.json"
    if not is_run(path):
        raise FileNotFoundError(
            f"there is no run at {path}: it has no config.json; expected a folder that `pyro-vae train` wrote"
        )
    try:
        record = parse_json(_read_text(file))
        schema = record.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is not a configuration of a run ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    if schema != SCHEMA:
        raise checkpoint.MismatchError(
            f"{file} has schema {reprlib.repr(schema)} but this version of pyro_vae reads schema "
            f"{SCHEMA}; install the version that wrote the run"
        )
    return Run(path, Config.read(record, str(file)))


def _read_text(file: Path) -> str:
    """Read a text file of a run. Raises ``FileNotFoundError`` or ``ValueError``."""
    try:
        return read_bytes(file).decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist; the run is incomplete, train again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error


def next_free(path: Path) -> Path:
    """The first of ``path``, ``path-2``, ``path-3``, … that does not exist."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


def replaceable_or_new(folder: Path) -> Path:
    """``folder`` if pyro-vae wrote all files in it, else the next free ``folder-2``, …"""
    listed = written(folder)
    is_replaceable = not folder.exists() or all(
        entry.name.startswith(".") or is_listed(entry, listed) for entry in folder.iterdir()
    )
    return folder if is_replaceable else next_free(folder)


def environment(device: str) -> dict[str, Any]:
    """The contents of ``env.json``: versions, threads, device. It does not identify the machine or the
    user."""
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


def pictures(
    run: Run, pair: Pair, test: Data, dims: tuple[int, int] | None = None
) -> dict[str, Callable[[], Any]]:
    """Functions that draw the pictures of a run, by name. Without a VAE, there are only those of the
    training: its curve, and the effective sample size of an objective with several weights.

    :param dims: the dimensions of z to draw, see :func:`~pyro_vae.plots.plot_latent`.
    :raises ValueError: if ``metrics.jsonl`` is invalid.
    """
    history, k = run.history(), run.config.num_particles
    drawings: dict[str, Callable[[], Any]] = {
        "curve": lambda: plots.plot_history(history, objective=run.config.bound_name())
    }
    if history[-1].train.ess is not None and k > 1:
        drawings["ess"] = lambda: plots.plot_ess(history, k)
    vae, is_image, given = pair.vae, test.x.dim() > 2, test.arguments(slice(None))[1:]
    if vae is None:
        return drawings
    if is_image:
        first = test.head(30)
        drawings["reconstructions"] = lambda: plots.plot_reconstructions(
            first.x, vae.reconstruct(*first.arguments(slice(None)), mask=first.mask)
        )
        drawings["samples"] = lambda: plots.plot_samples(vae, given=draw_conditions(test, 100))
    elif test.x.shape[1:] == (2,):
        drawings["samples"] = lambda: plots.plot_points(
            {"data": test.x, "samples": vae.sample(len(test), *given)}
        )
    latent_shape = vae.model.prior.event_shape
    if len(latent_shape) == 1 and latent_shape[0] > 1:
        shown: dict[str, Any] = {"label_names": test.label_names, "dims": dims, "mask": test.mask}
        drawings["latent"] = lambda: plots.plot_latent(vae, test.x, test.labels, given=given, **shown)
        if is_image and not given:
            drawings["latent_map"] = lambda: plots.latent_map(
                vae, test.x, test.labels, title=f"Latent map of {run.path.name}", **shown
            )
    if is_image and not given and latent_shape == (2,) and isinstance(vae.model.prior, StandardNormal):
        drawings["manifold"] = lambda: plots.plot_manifold(vae)

    def seeded(draw: Callable[[], Any]) -> Callable[[], Any]:
        def draw_with_seed() -> Any:
            torch.manual_seed(run.config.seed)
            return draw()

        return draw_with_seed

    return {name: seeded(draw) for name, draw in drawings.items()}


def first_rows(data: Data) -> Batch:
    """Two rows of each argument of the model, by name if entries are missing."""
    return as_batch(data[:2])


def draw_conditions(data: Data, n: int) -> tuple[Tensor, ...]:
    """The conditions of n rows drawn at random, ``(n, k)``; none if the data have no conditions."""
    if data.condition is None:
        return ()
    return (data.condition[torch.randint(len(data), (n,))],)


def to_json(result: Any) -> Any:
    """Convert a result to JSON types. NaN and infinity become ``None``."""
    if hasattr(result, "_asdict"):
        return {key: to_json(value) for key, value in result._asdict().items()}
    if isinstance(result, Mapping):
        return {key: to_json(value) for key, value in result.items()}
    if isinstance(result, tuple):
        return [to_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _as_epoch(record: dict[str, Any]) -> Epoch:
    """Convert a parsed line of ``metrics.jsonl``. Raises ``ValueError``, ``TypeError``, ``KeyError`` or
    ``AttributeError`` for an invalid record."""

    def number(value: Any) -> float:
        if type(value) not in (int, float) or abs(value) > sys.float_info.max:
            raise ValueError(f"{reprlib.repr(value)} is not a number")
        return value

    def mean(part: dict[str, float | None] | None) -> MeanElbo | None:
        if part is None:
            return None
        # null is NaN, or a part that only an objective other than the ELBO has
        of_objective: tuple[str, ...] = ("bound", "bound_se", "ess")
        if part.get("bound") is not None:
            if missing := [key for key in of_objective if key not in part]:
                raise ValueError(f"there is a bound without {missing[0]}")
            of_objective = ()
        values: dict[str, Any] = {
            key: number(value) if value is not None else None if key in of_objective else math.nan
            for key, value in part.items()
        }
        return MeanElbo(**values)

    train = mean(record["train"])
    if type(record["epoch"]) is not int or not 0 < record["epoch"] < 2**32 or train is None:
        raise ValueError("the number of the epoch is invalid, or there is no training ELBO")
    numbers: dict[str, Any] = {
        key: number(value) if value is not None else None if key == "mutual_information" else math.nan
        for key, value in record.items()
        if key not in ("train", "validation", "epoch")
    }
    return Epoch(epoch=record["epoch"], train=train, validation=mean(record["validation"]), **numbers)
