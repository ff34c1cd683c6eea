"""Training any model/guide pair by SVI: the loop, and what it returns."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
)
from pyro.optim import Adam, PyroLRScheduler, PyroOptim
from tqdm import tqdm

from pyro_vae.batches import Batch, Batches, InMemory, as_batches
from pyro_vae.checkpoint import Checkpoints
from pyro_vae.data import Data
from pyro_vae.graphs import has_compiler
from pyro_vae.infer.check import LESS, check_first_batch
from pyro_vae.infer.evaluate import evaluate_batches
from pyro_vae.infer.group import Group
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.infer.snapshot import configuration
from pyro_vae.infer.state import Best, Epoch, Keeper, Position, Weights
from pyro_vae.infer.svi import Compile
from pyro_vae.pair import MeanElbo, Program, check_plates, data_plates, enough_memory, run_pair, untouched

logger = logging.getLogger(__name__)
Beta = float | Callable[[float], float]
_TRACE_FROM, _INDUCTOR_FROM = 300, 5000  # steps of a fit, where a graph and where Inductor are worth their seconds
_TRACED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


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
    epochs: int = 10,
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
) -> History:
    """Train a pair by SVI.

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
    :param clip_norm: the longest that the gradient of all parameters together may be; a longer one is scaled down to it.
    :param autocast: ``torch.bfloat16`` runs what torch's autocast holds to be safe, matrix products above all, in that
        precision; parameters, optimizer and densities stay as they are, and so does the validation ELBO.
    :param checkpoint: a folder for checkpoints, by default none. At the end of each epoch, and after every ``every`` steps,
        it gets one of all that the fit is made of: weights, optimizer, schedule, random states, position in the data and
        history. SIGINT and SIGTERM wait for the end of the step that runs, and one is written before they take effect.
    :param resume: ``"last"``: go on from the newest sound checkpoint in that folder, or begin where there is none; ``"best"``:
        from that of the highest validation ELBO; or a checkpoint's path. The fit must be given as it was, for as many epochs
        or more; it ends with the parameters that it would have had uninterrupted, to the last bit.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :raises ValueError: before the first step, for bad data or a pair that cannot be trained (see ``check_pair``).
    :raises FloatingPointError: for a loss or a gradient that is not finite, before the optimizer moves.
    :raises FileExistsError: for a ``checkpoint`` folder that holds a fit's already, without ``resume``.
    :raises pyro_vae.checkpoint.MismatchError: where ``resume`` finds the checkpoint of another fit.
    """
    records: list[Epoch] = []
    state: dict = {"params": {}, "constraints": {}}
    for record in train(
        model, guide, data, loss=loss, optim=optim, epochs=epochs, batch_size=batch_size, validation=validation,
        beta=beta, patience=patience, compile=compile, clip_norm=clip_norm, autocast=autocast,
        checkpoint=checkpoint, every=every, resume=resume,
        progress=progress, param_store=state,
    ):  # fmt: skip
        records.append(record)
    return History(tuple(records), state)


def train(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    optim: PyroOptim | None = None,
    epochs: int = 10,
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
    param_store: dict | None = None,
) -> Iterator[Epoch]:
    """:func:`fit` one epoch at a time, for a loop of one's own: ``for epoch in train(model, guide, data): ...``.

    A fit that goes on yields the epochs behind it first, as they were; the parameters are those after the last of them.

    :param param_store: the state that the fit's param store starts from and leaves behind, empty by default.
    """
    loss, optim = loss or Trace_ELBO(), optim or Adam({"lr": 1e-3})
    if isinstance(checkpoint, Path | str):
        checkpoint = Checkpoints(Path(checkpoint))
    _check_options(loss, epochs, validation, patience, clip_norm, autocast, checkpoint, every, resume)
    batches, group = as_batches(data, batch_size), Group()
    state = param_store if param_store is not None else {"params": {}, "constraints": {}}
    store = pyro.get_param_store()
    with store.scope(state.copy()):
        first, modules = check_first_batch(model, guide, batches)
        plates = data_plates(model, guide, first)
        check_plates(plates, first, batches.num_rows)
        if beta != 1.0:
            _check_annealing(model, guide, first)
    held_out = _held_out(validation, batch_size)
    step = MinibatchSVI(model, guide, loss, optim, plates, batches, annealed=beta != 1.0, clip_norm=clip_norm, group=group)
    at, best = Position(planned=epochs), Best(Weights(model, guide, modules))
    settings = {"beta": beta, "patience": patience, "clip_norm": clip_norm, "autocast": autocast and str(autocast)}
    kept = checkpoint is not None or resume is not None
    config = configuration(batches, held_out, loss, optim, group, settings) if kept else {}
    keeper = Keeper(checkpoint, every, at, best, step, batches, config)
    with store.scope(state):
        keeper.begin(resume, model, guide, first, held_out)
    if at.epoch > epochs + 1:
        raise ValueError(f"resume: the fit has {at.epoch - 1} epochs behind it but is to have {epochs}; expected no fewer")
    yield from at.history
    quiet = not progress if progress is not None else None if group.rank == 0 else True
    precision = nullcontext() if autocast is None else torch.autocast(first.leaves()[0].device.type, autocast)
    pays, pays_last = (_pays(compile, at.planned * n) for n in (batches.num_batches, 1))
    with tqdm(total=epochs * batches.num_batches, unit="step", disable=quiet) as bar:
        bar.update(at.steps)
        while at.epoch <= epochs and not best.waited(patience):
            with store.scope(state), keeper.safe(), enough_memory(LESS):
                step.begin_epoch(quiet=isinstance(batches, InMemory) and not callable(beta))
                for batch in at.rest(batches):
                    elapsed = at.epoch - 1 + at.batch / batches.num_batches
                    at.beta = beta(elapsed) if callable(beta) else float(beta)
                    batch = Batch(batch.args[: len(first.args)], batch.kwargs)
                    is_usual = at.batch < batches.num_batches - 1 or batch.num_rows >= first.num_rows // group.size
                    step.compile = pays if is_usual else pays_last
                    with precision:
                        at.terms.append(step.on(batch, at.beta, group.weight(batches, at.batch), at))
                    keeper.stepped()
                    bar.update()
                reached = None
                if held_out is not None:
                    group.agree(best.weights.buffers().values())
                    reached = group.terms(evaluate_batches(model, guide, held_out, loss=loss, seed=group.rank)).mean()
                record = at.close(reached, group)
                _step_schedule(optim, record)
                if reached is not None:
                    best.see(reached.elbo, patience)
                keeper.save()
            bar.set_postfix(epoch=record.epoch, train=f"{record.train.elbo:.2f}", **_shown(reached))
            if record.epoch == epochs:
                logger.info("fit ran as\n%s", step.explain())
            yield record
    if patience is not None:
        with store.scope(state):
            best.restore()


def _check_options(
    loss: ELBO,
    epochs: int,
    validation: Any,
    patience: int | None,
    clip_norm: float | None,
    autocast: torch.dtype | None,
    checkpoint: Checkpoints | None,
    every: int | None,
    resume: Any,
) -> None:
    if epochs < 1 or (patience is not None and (patience < 1 or validation is None)):
        raise ValueError(f"fit: expected epochs ≥ 1, and patience ≥ 1 with validation data, but got {epochs}, {patience}")
    if isinstance(loss, _TRACED):
        raise ValueError(
            f"fit: {type(loss).__name__} compiles the first minibatch's β and N/B in; expected a loss that is not "
            f"compiled, such as {type(loss).__name__.removeprefix('Jit')}"
        )
    if autocast not in (None, torch.bfloat16):  # float16 needs its gradients scaled
        raise ValueError(f"fit: autocast is {autocast}; expected torch.bfloat16, or None")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"fit: clip_norm is {clip_norm}; expected a positive number, or None")
    if every is not None and (every < 1 or checkpoint is None):
        raise ValueError(f"fit: every is {every}; expected a number of steps ≥ 1, with checkpoint=FOLDER")
    if checkpoint is not None and resume is None:
        checkpoint.check_free()


def _pays(compile: Compile, num_steps: int) -> Compile:
    """How so many steps on batches of one size are to run."""
    if compile != "auto":
        return compile
    if num_steps < _TRACE_FROM:
        return False
    return True if num_steps >= _INDUCTOR_FROM and has_compiler() else "trace"


def _check_annealing(model: Program, guide: Program, batch: Batch) -> None:
    with untouched():
        model_trace, _ = run_pair(model, guide, *batch.args, **batch.kwargs)
    for name, site in model_trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and site["infer"].get("enumerate"):
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
