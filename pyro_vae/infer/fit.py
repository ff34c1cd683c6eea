"""Training any model/guide pair by SVI: the loop, and what it returns."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import Adam, PyroLRScheduler, PyroOptim
from torch import Tensor
from tqdm import tqdm

from pyro_vae.checkpoint import Checkpoints
from pyro_vae.data.batches import Batches, InMemory, as_batches, check_count, fitting
from pyro_vae.data.datasets import Data
from pyro_vae.infer.distributed import Group
from pyro_vae.infer.evaluate import check_minibatch, check_rows, evaluate_batches
from pyro_vae.infer.losses import check_loss, scale_problem
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.infer.resume import Best, Epoch, Keeper, Position, Weights
from pyro_vae.infer.snapshot import configuration
from pyro_vae.infer.svi import Compile
from pyro_vae.pairs.check import refuse
from pyro_vae.pairs.graphs import can_compile
from pyro_vae.pairs.problems import Problem, data_problems, pair_problems, training_problems
from pyro_vae.pairs.structure import (
    LESS_MEMORY,
    Structure,
    fails_on,
    inspect,
    moved_parameters,
    remember_trained,
    trained_parameters,
)
from pyro_vae.pairs.threads import training
from pyro_vae.pairs.traces import MeanElbo, Program, enough_memory

logger = logging.getLogger(__name__)
P = ParamSpec("P")
Beta = float | Callable[[float], float]


@dataclass(frozen=True)
class History:
    """What ``fit`` returns: its epochs, and the parameters it trained.

    Modules are trained in place. Plain functions keep their parameters in Pyro's param store, and a fit has a store of its
    own: ``with history.scope():`` puts it in force.
    """

    epochs: tuple[Epoch, ...]
    param_store: Any

    def scope(self) -> AbstractContextManager:
        """Pyro's param store as this fit left it, for the ``with`` block."""
        return pyro.get_param_store().scope(self.param_store)

    @property
    def best(self) -> Epoch:
        """The epoch of the highest validation ELBO, or training ELBO where there was no validation."""
        return max(self.epochs, key=lambda epoch: (epoch.validation or epoch.train).elbo)

    def __str__(self) -> str:
        last = self.epochs[-1]
        return f"{len(self.epochs)} epochs; train: {last.train}; validation: {last.validation}"


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    optim: PyroOptim | None = None,
    num_epochs: int = 10,
    batch_size: int | None = 100,
    validation: Any = None,
    beta: Beta = 1.0,
    patience: int | None = None,
    compile: Compile = "auto",
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: Path | str | Checkpoints | None = None,
    every: int | None = None,
    resume: Path | str | None = None,
    progress: bool | None = None,
    check: bool = True,
    param_store: dict | None = None,
) -> History:
    """Train a pair by SVI: maximize ELBO(data) = N · E_q[log p(x, z) − log q(z|x)], in nats.

    The loss stands for all N data, so gradients grow with N; reports are per datum. An optimizer that divides by the size of
    the gradient, such as Adam, takes the same steps for every N, but for its ``eps``: one that was chosen for a loss per datum
    is to be multiplied by N here, one for the sum over a minibatch of B by N/B.

    One thread of a process trains at a time, since Pyro's param store and torch's random state belong to the process.

    :param model: any Pyro program.
    :param guide: one with the same arguments and latent sites.
    :param data: ``Tensor`` or ``ndarray`` ``(n, *event)``, a tuple of them for ``model(x, c)``, a dict for keyword
        arguments, a :class:`~pyro_vae.data.Data`, a torch ``Dataset`` or a ``DataLoader``. A model that takes fewer
        arguments than a batch has is given the first ones, so labelled data sets train unsupervised pairs.
    :param loss: one of Pyro's ELBO objects, by default ``Trace_ELBO()``.
    :param optim: one of Pyro's optimizers, by default Adam at 1e-3; a scheduler steps once an epoch.
    :param batch_size: ``None`` takes all data at once. A minibatch of B stands for all N data: sites in the data plate are
        scaled by N/B where the model does not subsample itself, so latents that all data share are weighted right. Several
        processes (a process group of torch) share its rows out, and train as one would: tensors, arrays or ``Data`` only.
        A guide with parameters for each datum, such as an autoguide of a local latent, needs ``None``.
    :param validation: data whose ELBO is evaluated after each epoch.
    :param beta: weight of the latent terms, log p(z) − log q(z|x), a number or a function of the epochs elapsed (a
        fraction within an epoch). It changes what is optimized, never what is reported.
    :param patience: stop after so many epochs without a better validation ELBO, and return to the best parameters.
    :param compile: how the steps run, see :class:`~pyro_vae.SVI`; ``"auto"`` goes by their number: eager Pyro below 300, a
        graph below 5000, then Inductor where there is a C++ compiler.
    :param clip_norm: the largest norm of the gradient of all parameters together, of the loss per datum: a gradient g of the
        loss is multiplied by min(1, N·clip_norm/‖g‖). One value serves data sets of every size.
    :param autocast: ``torch.bfloat16`` runs what torch's autocast holds to be safe, matrix products above all, in that
        precision; parameters, optimizer and densities stay as they are, and so does the validation ELBO.
    :param checkpoint: a folder for checkpoints, by default none. At the end of each epoch, and after every ``every`` steps,
        it gets one of all that the fit is made of: weights, optimizer, schedule, random states, position in the data and
        history. SIGINT and SIGTERM wait for the end of the step that runs, and one is written before they take effect.
    :param resume: ``"last"``: go on from the newest sound checkpoint in that folder, or begin where there is none; ``"best"``:
        from that of the highest validation ELBO; or a checkpoint's path. The fit must be given as it was, for as many epochs
        or more; it ends with the parameters that it would have had uninterrupted, to the last bit.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :param check: ``False`` trains a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :param param_store: ``history.param_store`` of an earlier fit to continue it; by default parameters of plain functions
        start anew.
    :raises ValueError: before the first step, for bad data or a pair that cannot be trained (see ``check_pair``).
    :raises FloatingPointError: for a loss or a gradient that is not finite, before the optimizer moves.
    :raises FileExistsError: for a ``checkpoint`` folder that holds a fit's already, without ``resume``, or that holds
        something of others under the name of a checkpoint.
    :raises RuntimeError: where another thread of this process trains.
    :raises BlockingIOError: for a ``checkpoint`` folder that another fit is writing to.
    :raises pyro_vae.checkpoint.MismatchError: where ``resume`` finds the checkpoint of another fit.
    """
    records: list[Epoch] = []
    state = _empty_store() if param_store is None else param_store
    for record in train(
        model, guide, data, loss=loss, optim=optim, num_epochs=num_epochs, batch_size=batch_size, validation=validation,
        beta=beta, patience=patience, compile=compile, clip_norm=clip_norm, autocast=autocast,
        checkpoint=checkpoint, every=every, resume=resume,
        progress=progress, check=check, param_store=state,
    ):  # fmt: skip
        records.append(record)
    return History(tuple(records), state)


def _alone(train: Callable[P, Iterator[Epoch]]) -> Callable[P, Iterator[Epoch]]:
    """While the fit runs, no other thread trains, and no other fit writes to its folder of checkpoints."""

    @wraps(train)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Iterator[Epoch]:
        folder = kwargs.get("checkpoint")
        checkpoints = Checkpoints(Path(folder)) if isinstance(folder, Path | str) else folder
        kwargs["checkpoint"] = checkpoints
        held = checkpoints is not None and not Group().rank  # the first process writes for all
        with training(), checkpoints.reserved() if held else nullcontext():  # type: ignore[attr-defined]
            yield from train(*args, **kwargs)

    return wrapped


@_alone
def train(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    optim: PyroOptim | None = None,
    num_epochs: int = 10,
    batch_size: int | None = 100,
    validation: Any = None,
    beta: Beta = 1.0,
    patience: int | None = None,
    compile: Compile = "auto",
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: Path | str | Checkpoints | None = None,
    every: int | None = None,
    resume: Path | str | None = None,
    progress: bool | None = None,
    check: bool = True,
    param_store: dict | None = None,
) -> Iterator[Epoch]:
    """:func:`fit` one epoch at a time, for a loop of one's own: ``for epoch in train(model, guide, data): ...``.

    A fit that goes on yields the epochs behind it first, as they were; the parameters are those after the last of them.

    :param param_store: the state that the fit's param store starts from and leaves behind, empty by default.
    """
    loss, optim = loss or Trace_ELBO(), optim or Adam({"lr": 1e-3})
    if isinstance(checkpoint, Path | str):  # it is none: see _alone
        checkpoint = Checkpoints(Path(checkpoint))
    _check_options(num_epochs, validation, beta, patience, clip_norm, autocast, checkpoint, every, resume)
    num_epochs = int(num_epochs)
    batches, group = as_batches(data, batch_size), Group()
    state = _empty_store() if param_store is None else param_store
    store = pyro.get_param_store()
    held_out = _held_out(validation, batch_size)
    with store.scope(state.copy()):
        pair = inspect_for_training(model, guide, batches, loss, annealed=beta != 1.0, check=check)
        _check_held_out(pair, batches, held_out)
    _warn_of_new_start(model, guide, state)
    first, modules = pair.batch, list(pair.ran)
    batches.cast(pair.dtype)
    step = MinibatchSVI(model, guide, loss, optim, pair, batches, annealed=beta != 1.0, clip_norm=clip_norm, group=group)
    at, best = Position(planned=num_epochs), Best(Weights(model, guide, modules))
    settings = {"beta": beta, "patience": patience, "clip_norm": clip_norm, "autocast": autocast and str(autocast)}
    if clip_norm is not None:
        settings["clip_norm"] = f"{clip_norm} per datum"  # earlier versions meant the gradient of all data
    kept = checkpoint is not None or resume is not None
    config = configuration(batches, held_out, loss, optim, group, settings) if kept else {}
    keeper = Keeper(checkpoint, every, at, best, step, batches, config)
    with store.scope(state):
        keeper.begin(resume, model, guide, first, held_out)
    if at.epoch > num_epochs + 1:
        raise ValueError(f"resume: the fit has {at.epoch - 1} epochs behind it but is to have {num_epochs}; expected no fewer")
    yield from at.history
    quiet = not progress if progress is not None else None if group.rank == 0 else True
    precision = nullcontext() if autocast is None else torch.autocast(first.leaves()[0].device.type, autocast)
    pays, pays_last = (_pays(compile, at.planned * n) for n in (batches.num_batches, 1))
    with tqdm(total=num_epochs * batches.num_batches, unit="step", disable=quiet) as bar:
        bar.update(at.steps)
        while at.epoch <= num_epochs and not best.waited(patience):
            with store.scope(state), keeper.safe(), enough_memory(LESS_MEMORY):
                for batch in at.rest(batches):
                    elapsed = at.epoch - 1 + at.batch / batches.num_batches
                    at.beta = _check_beta(beta(elapsed), f"beta({elapsed:g})") if callable(beta) else float(beta)
                    batch = batch.like(first)
                    is_usual = at.batch < batches.num_batches - 1 or batch.num_rows >= first.num_rows // group.size
                    step.compile = pays if is_usual else pays_last
                    with precision:
                        at.terms.append(step.on(batch, at.beta, group.weight(batches, at.batch), at))
                    keeper.stepped()
                    bar.update()
                reached = None
                if held_out is not None:
                    group.agree(best.weights.buffers().values())
                    reached = group.terms(
                        evaluate_batches(model, guide, held_out, loss=loss, seed=group.rank, check=check, verb="validation")
                    ).mean()
                record = at.close(reached, group)
                _step_schedule(optim, record)
                if reached is not None:
                    best.see(reached.elbo, patience)
                keeper.save()
            bar.set_postfix(epoch=record.epoch, train=f"{record.train.elbo:.2f}", **_shown(reached))
            if record.epoch == num_epochs:
                logger.info("fit ran as\n%s", step.explain())
            yield record
    if patience is not None:
        with store.scope(state):
            best.restore()
    remember_trained(pair, state["params"])


def _empty_store() -> dict:
    return {"params": {}, "constraints": {}}


def inspect_for_training(
    model: Program, guide: Program, batches: Batches, loss: ELBO, *, annealed: bool, check: bool
) -> Structure:
    """Inspect a pair on the first minibatch. Raises ``ValueError`` for what is wrong with it, or with its loss."""
    size, n = next(iter(batches.epoch(shuffle=False))), batches.num_rows
    last = n % size.num_rows if size.tensors else 0
    pair = inspect(model, guide, size, training=True)
    problems = [*pair_problems(pair), *training_problems(pair)]
    if isinstance(batches, InMemory) and not batches.drawn and pair.batch.tensors:
        whole = fitting(batches.whole.cast(pair.dtype), model, guide)
        problems += [Problem(text) for text in data_problems(pair.traces[0], pair.batch, pair.plates, whole, pair.trusted[0])]
    refuse(dict.fromkeys(problems), verb="fit", check=check)
    check_minibatch(pair, n, verb="fit", check=check)
    if last and (error := fails_on(pair, last)):
        raise ValueError(
            f"pair: the last minibatch has {last} rows, and the pair fails on so few: {error}; pass a batch_size that leaves "
            f"another remainder of {n} data, or leave rows out"
        )
    check_loss(loss, pair, n, check=check)
    if (problem := scale_problem(loss, pair, n)) is not None:
        refuse([problem], verb="fit", check=check)
    if annealed:
        _check_annealing(pair)
    if check and pair.num_rows < n and pair.other is not None:
        with moved_parameters(model, guide, pair.batch):
            try:
                moved = inspect(model, guide, pair.batch)
            except ValueError:  # it does not run with these parameters, which nobody chose
                return pair
            check_rows(moved, n, verb="fit")
    return pair


def _check_held_out(pair: Structure, batches: Batches, held_out: Batches | None) -> None:
    """Raise ``ValueError`` for parameters of each datum of the training data with other data to validate on."""
    if held_out is None or not pair.row_parameters:
        return
    same = held_out is not None and isinstance(batches, InMemory) and isinstance(held_out, InMemory)
    if same:
        ours, theirs = batches.whole.leaves(), held_out.whole.leaves()  # type: ignore[attr-defined]
        same = len(ours) == len(theirs) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
        )
    if not same:
        raise ValueError(
            f"validation: the parameter {pair.row_parameters[0]!r} has an entry for each of the training data, so other data "
            "have none; expected validation=None, the training data themselves, or a guide that computes its parameters from "
            "the data"
        )


def _warn_of_new_start(model: Program, guide: Program, state: dict) -> None:
    names = {*trained_parameters(model), *trained_parameters(guide)} - state["params"].keys()
    if names and not any(isinstance(program, torch.nn.Module) for program in (model, guide)):
        logger.warning(
            "fit: %d parameters of these functions, such as %r, were trained by an earlier fit and start anew; to continue it "
            "pass param_store=history.param_store", len(names), min(names),
        )  # fmt: skip


def _check_options(
    num_epochs: int,
    validation: Any,
    beta: Beta,
    patience: int | None,
    clip_norm: float | None,
    autocast: torch.dtype | None,
    checkpoint: Checkpoints | None,
    every: int | None,
    resume: Any,
) -> None:
    for name, value in (("num_epochs", num_epochs), ("patience", patience), ("every", every)):
        if not (value is None and name != "num_epochs"):
            check_count(f"fit: {name}", value)
    if patience is not None and validation is None:
        raise ValueError(f"fit: patience is {patience} without validation data; expected both, or patience=None")
    if not callable(beta):
        _check_beta(beta, "beta")
    if autocast not in (None, torch.bfloat16):  # float16 needs its gradients scaled
        raise ValueError(f"fit: autocast is {autocast}; expected torch.bfloat16, or None")
    if clip_norm is not None and not (_is_number(clip_norm) and clip_norm > 0):
        raise ValueError(f"fit: clip_norm is {clip_norm!r}; expected a positive number, or None")
    if every is not None and checkpoint is None:
        raise ValueError(f"fit: every is {every} without a folder of checkpoints; expected checkpoint=FOLDER")
    if checkpoint is not None and resume is None:
        checkpoint.check_free()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_beta(value: Any, name: str) -> float:
    """β as a Python number. Raises ``ValueError`` for anything but a finite one."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"fit: {name} is {value!r}; expected a finite number, or a function that returns one")
    return float(value)


def _pays(compile: Compile, num_steps: int) -> Compile:
    """How so many steps on batches of one size are to run."""
    if compile != "auto" or not can_compile():
        return compile
    from pyro_vae.compiler import THRESHOLDS, has_compiler

    limits = THRESHOLDS["fit"]
    return False if num_steps < limits.trace else True if num_steps >= limits.compile and has_compiler() else "trace"


def _check_annealing(pair: Structure) -> None:
    for name, site in pair.latents.items():
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"beta: {name!r} is summed out together with what is observed, so its term cannot be weighted alone; expected "
                "beta=1 with sites that the model enumerates"
            )


def _step_schedule(optim: PyroOptim, record: Epoch) -> None:
    """One step of a learning-rate schedule; one that watches a plateau is shown the loss."""
    if isinstance(optim, PyroLRScheduler):
        watched = record.validation or record.train
        plateau = optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
        optim.step(-watched.elbo) if plateau else optim.step()


def _held_out(validation: Any, batch_size: int | None) -> Batches | None:
    if validation is None:
        return None
    fixed = validation.fixed() if isinstance(validation, Data) else validation
    return as_batches(fixed, None if batch_size is None else max(batch_size, 500))


def _shown(mean: MeanElbo | None) -> dict[str, str]:
    return {} if mean is None else {"held_out": f"{mean.elbo:.2f}"}
