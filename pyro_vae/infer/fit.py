"""Training any model/guide pair by SVI: the loop, and what it returns."""

import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.optim import Adam, PyroLRScheduler, PyroOptim
from tqdm import tqdm

from pyro_vae.batches import Batch, Batches, InMemory, as_batches
from pyro_vae.data import Data
from pyro_vae.graphs import has_compiler
from pyro_vae.infer.check import check_first_batch, check_observed
from pyro_vae.infer.evaluate import evaluate
from pyro_vae.infer.svi import SVI, Compile
from pyro_vae.infer.traced import Traces
from pyro_vae.pair import (
    ElboTerms,
    MeanElbo,
    Program,
    Reweighted,
    check_plates,
    data_plates,
    elbo_terms,
    run_pair,
    untouched,
)

logger = logging.getLogger(__name__)
Beta = float | Callable[[float], float]
_TRACE_FROM, _INDUCTOR_FROM = 300, 5000  # steps of a fit, where a graph and where Inductor are worth their seconds
_TRACED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class Epoch(NamedTuple):
    """One epoch of training. ``train`` is averaged over the epoch's minibatches while the parameters move, ``validation``
    is evaluated at its end; both are the ELBO itself, whatever β and the loss. ``beta`` is that of the last step."""

    epoch: int
    beta: float
    train: MeanElbo
    validation: MeanElbo | None
    seconds: float


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
        scaled by N/B where the model does not subsample itself, so latents that all data share are weighted right.
        A guide with parameters for each datum, such as an autoguide of a local latent, needs ``None``.
    :param validation: data whose ELBO is evaluated after each epoch.
    :param beta: weight of the latent terms, log p(z) − log q(z|x), a number or a function of the epochs elapsed (a
        fraction within an epoch). It changes what is optimized, never what is reported.
    :param patience: stop after so many epochs without a better validation ELBO, and return to the best parameters.
    :param compile: how the steps run, see :class:`~pyro_vae.SVI`; ``"auto"`` goes by their number: eager Pyro below 300, a
        graph below 5000, then Inductor where there is a C++ compiler.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :raises ValueError: before the first step, for bad data or a pair that cannot be trained (see ``check_pair``).
    :raises FloatingPointError: for a loss that is not finite, before the optimizer moves.
    """
    records: list[Epoch] = []
    state: dict = {"params": {}, "constraints": {}}
    for record in train(
        model, guide, data, loss=loss, optim=optim, epochs=epochs, batch_size=batch_size, validation=validation,
        beta=beta, patience=patience, compile=compile, progress=progress, param_store=state,
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
    progress: bool | None = None,
    param_store: dict | None = None,
) -> Iterator[Epoch]:
    """:func:`fit` one epoch at a time, for a loop of one's own: ``for epoch in train(model, guide, data): ...``.

    :param param_store: the state that the fit's param store starts from and leaves behind, empty by default.
    """
    loss, optim = loss or Trace_ELBO(), optim or Adam({"lr": 1e-3})
    if epochs < 1 or (patience is not None and (patience < 1 or validation is None)):
        raise ValueError(f"fit: expected epochs ≥ 1, and patience ≥ 1 with validation data, but got {epochs}, {patience}")
    if isinstance(loss, _TRACED):
        raise ValueError(
            f"fit: {type(loss).__name__} compiles the first minibatch's β and N/B in; expected a loss that is not "
            f"compiled, such as {type(loss).__name__.removeprefix('Jit')}"
        )
    batches = as_batches(data, batch_size)
    state = param_store if param_store is not None else {"params": {}, "constraints": {}}
    store = pyro.get_param_store()
    with store.scope(state.copy()):
        first, modules = check_first_batch(model, guide, batches)
        plates = data_plates(model, guide, first)
        check_plates(plates, first, batches.num_rows)
        if beta != 1.0:
            _check_annealing(model, guide, first)
    if isinstance(validation, Data):
        validation = validation.fixed()
    step = _Step(model, guide, loss, optim, plates, batches, annealed=beta != 1.0)
    best = _Best(state, modules)
    with tqdm(total=epochs * batches.num_batches, unit="step", disable=None if progress is None else not progress) as bar:
        for epoch in range(1, epochs + 1):
            start, parts, weight = time.perf_counter(), [], 1.0
            step.begin_epoch(quiet=isinstance(batches, InMemory) and not callable(beta))
            with store.scope(state):
                for i, batch in enumerate(batches.epoch(shuffle=True)):
                    weight = beta(epoch - 1 + i / batches.num_batches) if callable(beta) else float(beta)
                    batch = Batch(batch.args[: len(first.args)], batch.kwargs)
                    step.compile = _pays(compile, epochs * (batches.num_batches if batch.num_rows == first.num_rows else 1))
                    parts.append(step.on(batch, weight, f"epoch {epoch}, batch {i}"))
                    bar.update()
                held_out = None
                if validation is not None:
                    size = None if batch_size is None else max(batch_size, 500)
                    held_out = evaluate(model, guide, validation, loss=loss, batch_size=size).mean()
            terms = ElboTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))
            record = Epoch(epoch, weight, terms.mean(), held_out, time.perf_counter() - start)
            _step_schedule(optim, record)
            bar.set_postfix(epoch=epoch, train=f"{record.train.elbo:.2f}", **_held_out(held_out))
            if epoch == epochs:
                logger.info("fit ran as\n%s", step.explain())
            yield record
            if patience is not None and held_out is not None:
                best.see(held_out.elbo)
                if best.epochs_since >= patience or epoch == epochs:
                    best.restore()
                    return


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


class _Best:
    """The parameters and buffers of a pair as they were at the highest validation ELBO."""

    def __init__(self, state: dict, modules: Collection[torch.nn.Module]) -> None:
        self.state, self.modules = state, modules
        self.elbo, self.epochs_since = -math.inf, 0
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(self, elbo: float) -> None:
        self.epochs_since += 1
        if elbo > self.elbo:
            buffers = [buffer for module in self.modules for buffer in module.buffers(recurse=False)]
            tensors = [*self.state["params"].values(), *buffers]
            self.elbo, self.epochs_since = elbo, 0
            self.kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.kept:
            tensor.copy_(value)


class _Step(SVI):
    """One SVI step on a minibatch that stands for all data, and the ELBO terms it saw."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        optim: PyroOptim,
        plates: frozenset[str],
        batches: Batches,
        annealed: bool,
    ) -> None:
        self.plates, self.num_data = plates, batches.num_rows
        self.loaded = not isinstance(batches, InMemory)  # data in memory were checked before the first step
        self.batch, self.where = Batch((), {}), ""
        self.beta = torch.ones(()) if annealed else None  # a tensor, whose value a graph reads anew at each step
        beta = 1.0 if self.beta is None else self.beta
        self.handlers = [Reweighted(plates, num_rows=0, num_data=self.num_data, beta=beta) for _ in (model, guide)]
        self.programs = [handler(program) for handler, program in zip(self.handlers, (model, guide), strict=True)]
        super().__init__(*self.programs, optim, loss)
        self.loss_and_grads = self._checked

    def begin_epoch(self, *, quiet: bool) -> None:
        """:param quiet: whether no code of the user's runs between steps, so that one look at the guards does for the epoch."""
        self._quiet = object() if quiet else None

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's own, between the checks that must come before the optimizer moves."""
        try:
            value = self.elbo.loss_and_grads(*args, **kwargs)
        except ValueError as error:
            self._check_data()
            cause = str(error).split(":\n", 1)[0].split("\n", 1)[0]
            if not re.search(r"\b(nan|inf)\b", str(error)):
                raise ValueError(f"fit: {self.where}: {cause}") from error
            # the pair went well on the first batch, so it is a distribution that is handed NaN: Pyro's validation says which
            raise FloatingPointError(f"fit: {self.where}: {cause}. Lower the learning rate, or check the data") from error
        if self.loaded:
            self._check_data()
        # a tail-adaptive loss has no value, by its own account
        unbounded = isinstance(self.elbo, TraceTailAdaptive_ELBO)
        if not unbounded and not math.isfinite(sum(value) if isinstance(value, tuple) else value):
            raise FloatingPointError(
                f"fit: the loss is {value} at {self.where}; no parameter was moved by it. Lower the learning rate, raise "
                "min_scale, or check the data"
            )
        self.terms = self._terms(value)  # now, since a guide's distributions hold parameters that are about to move
        return value

    def _check_data(self) -> None:
        if self.handlers[0].traces:
            check_observed(self.handlers[0].traces[-1], self.batch, f"fit: {self.where}")

    def on(self, batch: Batch, beta: float, where: str) -> ElboTerms:
        """The step, its loss annealed by β; the terms are not."""
        self.batch, self.where = batch, where
        if self.beta is not None:
            self.beta.fill_(beta)
        for handler in self.handlers:
            handler.num_rows = batch.num_rows
            handler.traces.clear()
        self.step(*batch.args, **batch.kwargs)
        return self.terms if self.reported is None else ElboTerms(*self.reported)

    def report(self, traces: Traces) -> ElboTerms:
        particles = self.elbo.num_particles // len(traces)
        drawn = [elbo_terms(*pair, self.plates, num_data=self.num_data, num_particles=particles) for pair in traces]
        return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*drawn, strict=True)))

    @torch.no_grad()
    def _terms(self, value: Any) -> ElboTerms:
        """Those of a step of eager Pyro, whose loss was that value."""
        runs = 1 if self.elbo.vectorize_particles else self.elbo.num_particles
        models, guides = (list(handler.traces)[-runs:] for handler in self.handlers)
        seen = len(models) == len(guides) > 0  # a guide that is a handler of its model runs it unseen
        if isinstance(self.elbo, TraceEnum_ELBO) or not seen:
            # the loss alone knows, and an annealed one must be asked again
            if self.beta is not None or not isinstance(value, float):
                if self.beta is not None:
                    self.beta.fill_(1.0)
                value = self.elbo.loss(*self.programs, *self.batch.args, **self.batch.kwargs)
            return ElboTerms.of_batch(-value / self.num_data, self.batch.num_rows)
        return self.report(list(zip(models, guides, strict=True)))


def _held_out(mean: MeanElbo | None) -> dict[str, str]:
    return {} if mean is None else {"held_out": f"{mean.elbo:.2f}"}
