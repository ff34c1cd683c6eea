"""Training any model/guide pair by SVI: the loop, and what it returns."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam, PyroLRScheduler, PyroOptim
from tqdm import tqdm

from pyro_vae.batches import Batch, as_batches, fitting
from pyro_vae.data import Data
from pyro_vae.infer.check import check_first_batch
from pyro_vae.infer.evaluate import evaluate
from pyro_vae.pair import ElboTerms, MeanElbo, Program, Reweighted, data_plates, elbo_terms

Beta = float | Callable[[float], float]


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
    progress: bool | None = None,
) -> History:
    """Train a pair by SVI.

    :param model: any Pyro program; :param guide: one with the same arguments and latent sites.
    :param data: ``Tensor`` or ``ndarray`` ``(n, *event)``, a tuple of them for ``model(x, c)``, a dict for keyword
        arguments, a :class:`~pyro_vae.data.Data`, a torch ``Dataset`` or a ``DataLoader``. A model that takes fewer
        arguments than a batch has is given the first ones, so labelled data sets train unsupervised pairs.
    :param loss: one of Pyro's ELBO objects, by default ``Trace_ELBO()``.
    :param optim: one of Pyro's optimizers, by default Adam at 1e-3; a scheduler steps once an epoch.
    :param batch_size: ``None`` takes all data at once. A minibatch of B stands for all N data: sites in the data plate are
        scaled by N/B where the model does not subsample itself, so latents that all data share are weighted right.
    :param validation: data whose ELBO is evaluated after each epoch.
    :param beta: weight of the latent terms, log p(z) − log q(z|x), a number or a function of the epochs elapsed (a
        fraction within an epoch). It changes what is optimized, never what is reported.
    :param patience: stop after so many epochs without a better validation ELBO, and return to the best parameters.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :raises ValueError: before the first step, for bad data or a pair that cannot be trained (see ``check_pair``).
    :raises FloatingPointError: for a loss that is not finite, before the optimizer moves.
    """
    records: list[Epoch] = []
    state: dict = {"params": {}, "constraints": {}}
    for record in train(
        model, guide, data, loss=loss, optim=optim, epochs=epochs, batch_size=batch_size, validation=validation,
        beta=beta, patience=patience, progress=progress, param_store=state,
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
    progress: bool | None = None,
    param_store: dict | None = None,
) -> Iterator[Epoch]:
    """:func:`fit` one epoch at a time, for a loop of one's own: ``for epoch in train(model, guide, data): ...``.

    :param param_store: the state that the fit's param store starts from and leaves behind, empty by default.
    """
    loss, optim = loss or Trace_ELBO(), optim or Adam({"lr": 1e-3})
    if epochs < 1 or (patience is not None and (patience < 1 or validation is None)):
        raise ValueError(f"fit: expected epochs ≥ 1, and patience ≥ 1 with validation data, but got {epochs}, {patience}")
    batches = as_batches(data, batch_size)
    state = param_store if param_store is not None else {"params": {}, "constraints": {}}
    store = pyro.get_param_store()
    with store.scope(state.copy()):
        first = check_first_batch(model, guide, batches)
        plates = data_plates(model, first)
    if not plates and first.num_rows < batches.num_rows:
        raise ValueError(
            f"fit: the model has no plate of the batch's {first.num_rows} rows, so a minibatch cannot be scaled to the "
            f'{batches.num_rows} data; put what each datum has in `with pyro.plate("data", len(x))`, or pass batch_size=None'
        )
    if isinstance(validation, Data):
        validation = validation.fixed()
    step = _Step(model, guide, loss, optim, plates, batches.num_rows)
    best, best_values, since_best = -math.inf, {}, 0
    with tqdm(total=epochs * batches.num_batches, unit="step", disable=None if progress is None else not progress) as bar:
        for epoch in range(1, epochs + 1):
            start, parts, weight = time.perf_counter(), [], 1.0
            with store.scope(state):
                for i, batch in enumerate(batches.epoch(shuffle=True)):
                    weight = beta(epoch - 1 + i / batches.num_batches) if callable(beta) else float(beta)
                    parts.append(step(fitting(model, batch), weight, f"epoch {epoch}, batch {i}"))
                    bar.update()
                if isinstance(optim, PyroLRScheduler):
                    optim.step()
                held_out = None
                if validation is not None:
                    held_out = evaluate(model, guide, validation, loss=loss).mean()
            terms = ElboTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))
            record = Epoch(epoch, weight, terms.mean(), held_out, time.perf_counter() - start)
            bar.set_postfix(epoch=epoch, train=f"{record.train.elbo:.2f}", **_held_out(held_out))
            yield record
            if patience is None or held_out is None:
                continue
            if held_out.elbo > best:
                best, best_values, since_best = held_out.elbo, _values(model, guide, state), 0
            else:
                since_best += 1
            if since_best >= patience or epoch == epochs:
                with torch.no_grad():
                    for tensor, value in best_values.values():
                        tensor.copy_(value)
                return


class _Step:
    """One SVI step on a minibatch that stands for all data, and the ELBO terms it saw."""

    def __init__(
        self, model: Program, guide: Program, loss: ELBO, optim: PyroOptim, plates: frozenset[str], num_data: int
    ) -> None:
        self.loss, self.plates, self.num_data, self.where = loss, plates, num_data, ""
        self.handlers = [Reweighted(plates, num_rows=num_data, num_data=num_data) for _ in (model, guide)]
        programs = [handler(program) for handler, program in zip(self.handlers, (model, guide), strict=True)]
        self.svi = SVI(*programs, optim, loss=loss.loss, loss_and_grads=self.loss_and_grads)

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        try:
            value = self.loss.loss_and_grads(*args, **kwargs)
        except ValueError as error:
            # the first batch went well, so it is a distribution that is handed NaN: Pyro's own validation says which
            cause = str(error).split(":\n", 1)[0].split("\n", 1)[0]
            raise FloatingPointError(f"fit: {self.where}: {cause}. Lower the learning rate, or check the data") from error
        if not math.isfinite(sum(value) if isinstance(value, tuple) else value):
            raise FloatingPointError(
                f"fit: the loss is {value} at {self.where}; no parameter was moved by it. Lower the learning rate, raise "
                "min_scale, or check the data"
            )
        return value

    def __call__(self, batch: Batch, beta: float, where: str) -> ElboTerms:
        self.where = where
        for handler in self.handlers:
            handler.num_rows, handler.beta = batch.num_rows, beta
            handler.traces.clear()
        value = self.svi.step(*batch.args, **batch.kwargs)
        return self._terms(batch, beta, value)

    @torch.no_grad()
    def _terms(self, batch: Batch, beta: float, value: Any) -> ElboTerms:
        particles = self.loss.num_particles
        runs = 1 if self.loss.vectorize_particles else particles
        models, guides = (handler.traces[-runs:] for handler in self.handlers)
        if isinstance(self.loss, TraceEnum_ELBO) or len(models) != len(guides) or not models:
            # the loss alone knows: enumerated sites are summed out in it
            elbo = -value / self.num_data if beta == 1 and isinstance(value, float) else math.nan
            unknown = torch.full((batch.num_rows,), torch.nan)
            return ElboTerms(torch.full((batch.num_rows,), elbo), unknown, unknown)
        drawn = [
            elbo_terms(*pair, self.plates, num_data=self.num_data, num_particles=particles // runs)
            for pair in zip(models, guides, strict=True)
        ]
        return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*drawn, strict=True)))


def _held_out(mean: MeanElbo | None) -> dict[str, str]:
    return {} if mean is None else {"held_out": f"{mean.elbo:.2f}"}


def _values(model: Program, guide: Program, state: dict) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter and buffer of the pair, with a copy of its value."""
    tensors = dict(state["params"])
    for program in (model, guide):
        if isinstance(program, torch.nn.Module):
            tensors |= {(id(program), name): buffer for name, buffer in program.named_buffers()}
    return {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()}
