"""Train any model/guide pair by SVI: the training loop and its result."""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import Adam, PyroLRScheduler, PyroOptim
from torch import Tensor

from pyro_vae.checkpoint import Checkpoints
from pyro_vae.data.batches import (
    Batch,
    Batches,
    InMemory,
    Streamed,
    as_batches,
    as_counted_batches,
    check_count,
    fitting,
)
from pyro_vae.data.datasets import Data
from pyro_vae.html import note, notebook, paragraph
from pyro_vae.infer.aggressive import AggressiveInference
from pyro_vae.infer.early_stopping import EarlyStopping, PairState
from pyro_vae.infer.evaluate import check_independent_rows, check_minibatch, evaluate_batches
from pyro_vae.infer.losses import check_loss, kind_of, name_of, scale_problem
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.resume import CheckpointManager, Epoch, Position
from pyro_vae.infer.snapshot import configuration
from pyro_vae.infer.svi import Compile
from pyro_vae.infer.tracking import Tracker, log_epoch
from pyro_vae.pairs.check import refuse
from pyro_vae.pairs.elbo import MeanElbo
from pyro_vae.pairs.graphs import can_compile
from pyro_vae.pairs.probe import moved_parameters
from pyro_vae.pairs.problems import Problem, data_problems, pair_problems, training_problems
from pyro_vae.pairs.structure import (
    LESS_MEMORY,
    Structure,
    fails_on,
    inspect,
    remember_trained,
    trained_parameters,
)
from pyro_vae.pairs.threads import training
from pyro_vae.pairs.traces import Program, enough_memory
from pyro_vae.processes import Group
from pyro_vae.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
Beta = float | Callable[[float], float]


class WithParamStore:
    """A result of training with its param store."""

    param_store: Any

    def scope(self) -> AbstractContextManager:
        """Make this param store Pyro's current one in the ``with`` block."""
        return pyro.get_param_store().scope(self.param_store)


@dataclass(frozen=True)
class History(WithParamStore):
    """The result of :func:`fit`: its epochs, its param store, and what it maximized.

    - objective: the loss, such as ``"IWAE(num_particles=5, estimator='iwae')"``
    - bound: what its value estimates, such as ``"the ELBO"``
    - kept: the epoch whose parameters the pair has: the last one, or with ``patience`` the best one

    Modules are trained in place. Parameters of plain functions are in Pyro's param store, and each fit has a
    separate store: ``with history.scope():`` makes it Pyro's current one.
    """

    epochs: tuple[Epoch, ...]
    param_store: Any
    objective: str
    bound: str
    kept: Epoch

    @property
    def best(self) -> Epoch:
        """The epoch with the highest objective on the validation data, or on the training data without
        these."""
        return _best(self.epochs)

    def __str__(self) -> str:
        last = self.epochs[-1]
        parts = {"train": last.train, "validation": last.validation}
        means = [f"{name}: {mean}" for name, mean in parts.items() if mean is not None]
        if self.kept.epoch != last.epoch:
            means.append(f"parameters of epoch {self.kept.epoch}, validation: {self.kept.validation}")
        return "\n".join([f"{len(self.epochs)} epochs of {self.objective}, {self.bound}", *means])

    def plot(self) -> "Axes":
        """Plot the curves, see :func:`~pyro_vae.plots.plot_history`."""
        from pyro_vae.plots import plot_history  # matplotlib is imported when it is needed

        return plot_history(self.epochs, objective=self.objective)

    def _repr_html_(self) -> str:
        from pyro_vae.plots import embedded

        best = self.best
        return notebook(
            paragraph(f"{len(self.epochs)} epochs of {self.objective}: {self.bound}"),
            embedded(self.plot(), "ELBO of each epoch"),
            note(f"Means of the best epoch, {best.epoch}, in nats per datum, ± their standard error"),
            best.to_html(self.objective),
        )


def _best(epochs: Sequence[Epoch]) -> Epoch:
    return max(epochs, key=lambda epoch: (epoch.validation or epoch.train).objective)


@contextmanager
def _exclusive(checkpoints: Checkpoints | None, group: Group) -> Iterator[None]:
    """Prevent other threads from training, and other fits from saving to the same folder, in the block."""
    saves = checkpoints is not None and not group.rank  # rank 0 saves for all ranks
    with training(), checkpoints.reserved() if saves else nullcontext():  # type: ignore[union-attr]
        yield


def train(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    optim: PyroOptim | None = None,
    num_epochs: int = 10,
    batch_size: int | None = 100,
    num_data: int | None = None,
    steps_per_epoch: int | None = None,
    validation: Any = None,
    beta: Beta = 1.0,
    patience: int | None = None,
    compile: Compile = "auto",
    clip_norm: float | None = None,
    inference_steps: int = 1,
    autocast: torch.dtype | None = None,
    checkpoint: Path | str | Checkpoints | None = None,
    every: int | None = None,
    resume: Path | str | None = None,
    progress: bool | None = None,
    tracker: Tracker | None = None,
    check: bool = True,
    param_store: dict | None = None,
) -> Generator[Epoch, None, History]:
    """:func:`fit` as a generator of epochs: ``for epoch in train(model, guide, data): ...``.

    The options are those of :func:`fit`. A resumed fit yields the finished epochs first, with the parameters
    of the checkpoint. The dictionary ``param_store`` is updated after each epoch. The return value of the
    generator is the :class:`History`.
    """
    loss, optim, group = loss or Trace_ELBO(), optim or Adam({"lr": 1e-3}), Group()
    checkpoints = Checkpoints(Path(checkpoint)) if isinstance(checkpoint, Path | str) else checkpoint
    with _exclusive(checkpoints, group):
        _check_options(
            num_epochs,
            validation,
            beta,
            patience,
            clip_norm,
            inference_steps,
            autocast,
            checkpoints,
            every,
            resume,
            tracker,
        )
        batches = as_batches(data, batch_size, num_data=num_data, steps_per_epoch=steps_per_epoch)
        held_out = _held_out_batches(validation, batch_size, batches.num_rows)
        if group.size > 1:
            batches.share(group)
        store, state = pyro.get_param_store(), empty_store() if param_store is None else param_store
        with store.scope(state.copy()):
            pair = inspect_for_training(
                model, guide, batches, loss, annealed=beta != 1.0, check=check, num_processes=group.size
            )
        _check_held_out(pair, batches, held_out)
        warn_of_new_parameters(model, guide, state)
        batches.cast(pair.dtype)
        svi = MinibatchSVI(
            model, guide, loss, optim, pair, batches, annealed=beta != 1.0, clip_norm=clip_norm, group=group
        )
        at, stopping = (
            Position(int(num_epochs)),
            EarlyStopping(PairState(model, guide, list(pair.modules)), patience),
        )
        settings = {
            "beta": beta,
            "patience": patience,
            "clip_norm": clip_norm,
            "inference_steps": int(inference_steps),
            "autocast": autocast and str(autocast),
        }
        with store.scope(state.copy()):
            aggressive = AggressiveInference(int(inference_steps), pair)
            if isinstance(loss, Objective):
                loss.prepare(svi.model, svi.guide, pair.batch, check=check)
        has_checkpoints = checkpoints is not None or resume is not None
        config = configuration(batches, held_out, loss, optim, settings) if has_checkpoints else {}
        manager = CheckpointManager(checkpoints, every, at, stopping, svi, batches, config)
        with store.scope(state):
            manager.start(resume, pair.batch)
        _check_resumed(at, num_epochs)
        yield from at.history
        compile_usual, compile_last = (
            choose_compile(compile, at.planned_epochs * n) for n in (batches.num_batches, 1)
        )
        precision = (
            nullcontext()
            if autocast is None
            else torch.autocast(pair.batch.leaves()[0].device.type, autocast)
        )
        num_steps = num_epochs * batches.num_batches
        with progress_bar(num_steps, progress, rank=group.rank, unit="step") as bar:
            bar.update(at.num_steps)
            while at.epoch <= num_epochs and not stopping.should_stop():
                with store.scope(state), manager.save_before_signals(), enough_memory(LESS_MEMORY):
                    for batch in at.remaining_batches(batches):
                        at.beta = _beta_at(beta, at.epoch - 1 + at.batch_index / batches.num_batches)
                        batch = batch.like(pair.batch)
                        is_last = at.batch_index >= batches.num_batches - 1
                        is_short = is_last and batch.num_rows < pair.num_rows // group.size
                        svi.compile = compile_last if is_short else compile_usual
                        svi.not_updated = aggressive.not_updated(at.history, at.num_steps)
                        with precision:
                            at.terms.append(svi.minibatch_step(batch, at.beta, at))
                        manager.after_step()
                        bar.update()
                    # each rank's rows change its buffers, such as running means
                    group.broadcast_(stopping.state.buffers().values())
                    held_out_elbo = _validation_elbo(stopping.state, held_out, loss, group, check=check)
                    record = at.end_epoch(held_out_elbo, group, aggressive.measure(at.history, group))
                    step_scheduler(optim, -(record.validation or record.train).objective)
                    stopping.update(held_out_elbo)
                    if tracker is not None and not group.rank:
                        log_epoch(tracker, record, at.num_steps)
                    manager.save()
                bar.set_postfix(_postfix(record))
                yield record
            logger.info("fit ran as\n%s", svi.explain())
        if patience is not None:
            with store.scope(state):
                stopping.restore_best()
        remember_trained(pair, state["params"])
        kept = at.history[-1] if patience is None else _best(at.history)
        return History(tuple(at.history), state, name_of(loss), kind_of(loss).bound, kept)


def _with_options_of(train: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Decorate f to be called as ``f(train(...))``. The options of ``train`` are visible in ``help`` and to
    type checkers."""

    def decorate(f: Callable[[T], R]) -> Callable[P, R]:
        @wraps(f)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            return f(train(*args, **kwargs))

        returns = signature(f).return_annotation
        wrapper.__signature__ = signature(train).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return wrapper

    return decorate


@_with_options_of(train)
def fit(epochs: Generator[Epoch, None, History]) -> History:
    """Train a pair by SVI: maximize ELBO(data) = N · E_q[log p(x, z) − log q(z|x)], in nats.

    The loss is that of all N data, so gradients are proportional to N; reports are per datum. The steps of
    Adam do not depend on the scale of the gradient, except for ``eps``: multiply an ``eps`` that was chosen
    for a loss per datum by N, and one for the sum over a minibatch of B rows by N/B.

    Only one thread of a process may train at a time: Pyro's param store and torch's random state are shared
    by all threads.

    :param model: any Pyro program.
    :param guide: a Pyro program with the same arguments and latent sites.
    :param data: ``Tensor`` or ``ndarray`` ``(n, *event)``, a tuple of them for ``model(x, c)``, a dict for
        keyword arguments, a :class:`~pyro_vae.data.Data`, a torch ``Dataset`` or a ``DataLoader``. If a batch
        has more arguments than the model takes, the model gets the first ones, so an unsupervised pair can be
        trained on a labelled data set. Memory-mapped arrays (``np.load(path, mmap_mode="r")``) are not
        copied: a thread reads the rows of the next minibatch while a step runs, and each row is validated
        before the step that uses it. A *stream* is an ``IterableDataset``, a loader of one, or an iterable of
        batches that can be read again: an object whose ``__iter__`` starts anew, or a generator function. Its
        order is not changed. :class:`~pyro_vae.data.FileStream` reads Parquet and HDF5 files.
    :param loss: one of Pyro's ELBO objects, by default ``Trace_ELBO()``, or an
        :class:`~pyro_vae.infer.Objective`, such as ``infer.IWAE(5)``.
    :param optim: one of Pyro's optimizers, by default Adam with learning rate 1e-3. A scheduler steps once an
        epoch.
    :param num_epochs: passes over the data.
    :param batch_size: rows of a minibatch; ``None`` for all data at once. Sites in the data plate are scaled
        by N/B, unless the model subsamples. The loss of a minibatch is then an unbiased estimate also for
        latents that all data share. A pair must not multiply ``pyro.factor`` by N/B itself: unlike
        ``poutine.scale`` this cannot be recognized. A guide with parameters for each datum, such as an
        autoguide of a local latent, needs ``None``.

        With a process group of torch, ``batch_size`` is that of all ranks together, and each rank computes
        some of the rows of each minibatch. All ranks pass all data, and rank 0 draws the order. There are two
        exceptions: a loader with a ``DistributedSampler``, and a stream, of which each rank must read other
        rows. The batch size of these is that of one rank. The parts of a stream may differ in length.
    :param num_data: the number N of rows of a stream that has no length and no attribute ``num_data``.
    :param steps_per_epoch: the number of steps in an epoch of a stream; by default an epoch is one pass over
        it. The next epoch continues where the last one ended, and a stream that ends is read again. For an
        endless stream ``num_data`` is the N of the loss.
    :param validation: data whose ELBO is evaluated after each epoch. A stream without a length is read once
        to count its rows; it may not have more rows than the training data.
    :param beta: weight of the latent terms, log p(z) − log q(z|x): a number, or a function of the number of
        epochs elapsed, which is a fraction within an epoch. It changes the objective; reported ELBOs do not
        contain it.
    :param patience: early stopping: stop after this many epochs without a higher objective on the validation
        data, and restore the parameters of the best epoch.
    :param compile: how steps run, see :class:`~pyro_vae.SVI`. ``"auto"`` chooses by the number of steps:
        eager Pyro below 300, a graph below 5000, then Inductor if there is a C++ compiler.
    :param clip_norm: the largest norm of the gradient of the loss per datum, over all parameters together: a
        gradient g of the loss is multiplied by min(1, N·clip_norm/‖g‖).
    :param inference_steps: aggressive training of the guide, against posterior collapse (He et al. 2019): the
        guide is updated at each step, and the model only at every ``inference_steps``-th, until the mutual
        information I_q(x; z), measured on the first minibatch after each epoch, has had no new maximum for
        five epochs. Then both are updated at each step.
    :param autocast: ``torch.bfloat16`` runs training steps under ``torch.autocast``, which computes matrix
        products in that precision. Parameters, optimizer and densities keep their precision, and the
        validation ELBO is not affected.
    :param checkpoint: a folder for checkpoints, by default none. A checkpoint is saved at the end of each
        epoch and after every ``every`` steps: parameters, optimizer, scheduler, random states, position in
        the data and history. At SIGINT or SIGTERM the current step is finished and a checkpoint is saved
        before the signal takes effect.
    :param resume: ``"last"``: resume from the newest undamaged checkpoint in that folder, or start if there
        is none; ``"best"``: from that of the highest validation objective; or a path. All other
        arguments must be the same, except that ``num_epochs`` may be larger. The parameters are those of an
        uninterrupted fit, bit for bit. A loader or stream with the methods ``state_dict`` and
        ``load_state_dict``, as the ``StatefulDataLoader`` of torchdata, continues at its position; a stream
        without them is read from its start, so the interrupted epoch begins anew.
    :param progress: show a bar on stderr; by default only if that is a terminal, or in a notebook.
    :param tracker: an experiment tracker, see :class:`~pyro_vae.infer.Tracker`, such as
        :class:`~pyro_vae.infer.TensorBoard`. It gets the metrics of each epoch. A resumed fit continues with
        the next epoch. If the tracker fails, a warning is logged and training goes on.
    :param check: ``False`` trains a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :param param_store: ``history.param_store`` of an earlier fit to continue it; by default parameters of
        plain functions start anew.
    :raises ValueError: before the first step, for bad data or a pair that cannot be trained (see
        ``check_pair``).
    :raises FloatingPointError: for a loss or a gradient that is not finite, before parameters are updated.
    :raises FileExistsError: if the ``checkpoint`` folder has checkpoints already and ``resume`` is ``None``,
        or has other files with the name of a checkpoint.
    :raises RuntimeError: if another thread of this process trains.
    :raises BlockingIOError: if another fit saves to the ``checkpoint`` folder.
    :raises pyro_vae.checkpoint.MismatchError: if the checkpoint is of another configuration or version.
    """
    while True:
        try:
            next(epochs)
        except StopIteration as end:
            return end.value


def empty_store() -> dict:
    return {"params": {}, "constraints": {}}


def inspect_for_training(
    model: Program,
    guide: Program,
    batches: Batches,
    loss: ELBO,
    *,
    annealed: bool,
    check: bool,
    num_processes: int = 1,
    verb: str = "fit",
) -> Structure:
    """Inspect a pair on the first minibatch. Raises ``ValueError`` for an invalid pair, or an invalid
    loss."""
    first, n = next(iter(batches.epoch(shuffle=False))), batches.num_rows
    endless = isinstance(batches, Streamed) and batches.steps_per_epoch is not None
    last = n % first.num_rows if first.tensors and not endless else 0
    pair = inspect(model, guide, first, training=True)
    problems = [*pair_problems(pair), *training_problems(pair)]
    is_here = isinstance(batches, InMemory) and not batches.drawn and not batches.on_disk
    if isinstance(batches, InMemory) and is_here and pair.batch.tensors:
        whole = fitting(batches.whole.cast(pair.dtype), model, guide)
        problems += [
            Problem(text)
            for text in data_problems(pair.traces[0], pair.batch, pair.plates, whole, pair.unvalidated[0])
        ]
    refuse(dict.fromkeys(problems), verb=verb, check=check)
    check_minibatch(pair, n, verb=verb, check=check)
    if last and (error := fails_on(pair, last)):
        raise ValueError(
            f"pair: it fails on the {last} rows of the last minibatch: {error}; pass a batch_size that "
            f"leaves another remainder of the {n} data, or remove rows"
        )
    check_loss(loss, pair, n, annealed=annealed, check=check, num_processes=num_processes, verb=verb)
    if (problem := scale_problem(loss, pair, n)) is not None:
        refuse([problem], verb=verb, check=check)
    if annealed:
        _check_annealing(pair)
    if check and pair.num_rows < n and pair.other_rows is not None:
        _check_rows(model, guide, pair.batch, n, verb=verb)
    return pair


def _check_rows(model: Program, guide: Program, batch: Batch, num_data: int, *, verb: str) -> None:
    """Raise ``ValueError`` if the ELBO terms of a row depend on the other rows of its minibatch."""
    with moved_parameters(model, guide, batch):
        try:
            moved = inspect(model, guide, batch)
        except ValueError as error:
            logger.info(
                "%s: whether rows depend on each other is tested without noise on the parameters, since the "
                "pair fails with noise: %s",
                verb,
                error,
            )
        else:
            check_independent_rows(moved, num_data, verb=verb)
            return
    check_independent_rows(inspect(model, guide, batch), num_data, verb=verb)


def _check_held_out(pair: Structure, batches: Batches, held_out: Batches | None) -> None:
    """Raise ``ValueError`` if the guide has parameters for each training datum, and validation uses other
    data."""
    if held_out is None or not pair.row_parameters:
        return
    is_same = False
    if isinstance(batches, InMemory) and isinstance(held_out, InMemory):
        leaves, held_out_leaves = batches.whole.leaves(), held_out.whole.leaves()
        is_same = len(leaves) == len(held_out_leaves) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(leaves, held_out_leaves, strict=True)
        )
    if not is_same:
        raise ValueError(
            f"validation: the parameter {pair.row_parameters[0]!r} has an entry for each of the training "
            "data, so other data have no parameters; expected validation=None, the training data, or a "
            "guide that computes its parameters from the data"
        )


def warn_of_new_parameters(model: Program, guide: Program, state: dict) -> None:
    """Log a warning if an earlier fit trained parameters of these functions that are not in ``state``."""
    names = {*trained_parameters(model), *trained_parameters(guide)} - state["params"].keys()
    if names and not any(isinstance(program, torch.nn.Module) for program in (model, guide)):
        logger.warning(
            "fit: %d parameters of these functions, such as %r, were trained by an earlier fit and start "
            "anew; to continue that fit pass param_store=history.param_store",
            len(names),
            min(names),
        )


def _check_options(
    num_epochs: int,
    validation: Any,
    beta: Beta,
    patience: int | None,
    clip_norm: float | None,
    inference_steps: int,
    autocast: torch.dtype | None,
    checkpoint: Checkpoints | None,
    every: int | None,
    resume: Any,
    tracker: Any,
) -> None:
    if tracker is not None and not isinstance(tracker, Tracker):
        raise ValueError(
            f"fit: tracker is a {type(tracker).__name__}; expected an object with the methods log, figure "
            "and close, such as infer.TensorBoard(folder)"
        )
    counts = {
        "num_epochs": num_epochs,
        "patience": patience,
        "every": every,
        "inference_steps": inference_steps,
    }
    for name, value in counts.items():
        if value is not None or name in ("num_epochs", "inference_steps"):
            check_count(f"fit: {name}", value)
    if patience is not None and validation is None:
        raise ValueError(
            f"fit: patience is {patience} without validation data; expected both, or patience=None"
        )
    if not callable(beta):
        _check_beta(beta, "beta")
    if autocast not in (None, torch.bfloat16):  # float16 needs gradient scaling
        raise ValueError(f"fit: autocast is {autocast}; expected torch.bfloat16, or None")
    if clip_norm is not None and not (_is_number(clip_norm) and clip_norm > 0):
        raise ValueError(f"fit: clip_norm is {clip_norm!r}; expected a positive number, or None")
    if every is not None and checkpoint is None:
        raise ValueError(
            f"fit: every={every} needs a checkpoint folder; expected checkpoint=FOLDER too, or every=None"
        )
    if checkpoint is not None and resume is None:
        checkpoint.check_free()


def _check_resumed(position: Position, num_epochs: int) -> None:
    if len(position.history) > num_epochs:
        raise ValueError(
            f"resume: the checkpoint was saved after {len(position.history)} epochs but num_epochs is "
            f"{num_epochs}; expected at least {len(position.history)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _beta_at(beta: Beta, elapsed: float) -> float:
    """β after this many epochs."""
    return _check_beta(beta(elapsed), f"beta({elapsed:g})") if callable(beta) else float(beta)


def _check_beta(value: Any, name: str) -> float:
    """β as a Python number. Raises ``ValueError`` unless it is a finite number."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(
            f"fit: {name} is {value!r}; expected a finite number, or a function that returns one"
        )
    return float(value)


def choose_compile(compile: Compile, num_steps: int) -> Compile:
    """The ``compile`` of :class:`SVI` for this many steps on batches of one size."""
    if compile != "auto" or not can_compile():
        return compile
    from pyro_vae.compiler import THRESHOLDS, has_compiler

    limits = THRESHOLDS["fit"]
    if num_steps < limits.trace:
        return False
    return True if num_steps >= limits.compile and has_compiler() else "trace"


def _check_annealing(pair: Structure) -> None:
    """Raise ``ValueError`` for enumerated latents."""
    for name, site in pair.latents.items():
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"beta: {name!r} is summed out, so its term has no separate weight; expected beta=1 for "
                "enumerated sites"
            )


def step_scheduler(optim: PyroOptim, loss: float) -> None:
    """Step the learning-rate scheduler at the end of an epoch. ``ReduceLROnPlateau`` gets the loss per
    datum."""
    if isinstance(optim, PyroLRScheduler):
        is_plateau = optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
        optim.step(loss) if is_plateau else optim.step()


def _held_out_batches(validation: Any, batch_size: int | None, num_data: int) -> Batches | None:
    if validation is None:
        return None
    fixed = validation.fixed() if isinstance(validation, Data) else validation
    size = None if batch_size is None else max(batch_size, 500)
    return as_counted_batches(fixed, size, limit=num_data)


def _validation_elbo(
    state: PairState, held_out: Batches | None, loss: ELBO, group: Group, *, check: bool
) -> MeanElbo | None:
    """The ELBO of the validation data, which the ranks divide."""
    if held_out is None:
        return None
    return evaluate_batches(
        state.model, state.guide, held_out, loss=loss, check=check, verb="validation", group=group
    ).mean()


def _postfix(record: Epoch) -> dict[str, Any]:
    shown = {"epoch": record.epoch, "train": f"{record.train.objective:.2f}"}
    return shown if record.validation is None else shown | {"held_out": f"{record.validation.objective:.2f}"}
