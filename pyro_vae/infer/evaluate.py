"""The ELBO of a data set under any pair, per datum."""

from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO

from pyro_vae.batches import Batch, Batches, as_batches, fitting
from pyro_vae.data import Data
from pyro_vae.pair import (
    ElboTerms,
    Program,
    Reweighted,
    check_plates,
    data_plates,
    elbo_terms,
    run_pair,
    untouched,
)
from pyro_vae.signals import poll


def evaluate(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    num_particles: int = 1,
    batch_size: int | None = 500,
    seed: int = 0,
) -> ElboTerms:
    """ELBO(x) = E_q[log p(x, z) − log q(z|x)] for each datum, in nats: a lower bound of log p(x) in expectation.

    Modules run in evaluation mode, and afterwards nothing has moved: no parameter, no buffer, no random state.

    :param data: as for :func:`~pyro_vae.infer.fit`; stochastically binarized data are binarized once.
    :param loss: only its kind matters: with ``TraceEnum_ELBO`` enumerated sites are summed out. That loss gives one number
        for a batch, which each of its data then carries.
    :param num_particles: draws of z for each datum.
    :param seed: seed of the draws, the same at each call, so that two evaluations differ by the pair alone.
    :param batch_size: data at a time, ``None`` for all of them (a guide with parameters for each datum needs that).
    :return: :class:`~pyro_vae.pair.ElboTerms`, tensors ``(n,)`` in the order of the data; its ``mean()`` has the standard
        error over data. A model that draws a subsample of its own has terms for those rows alone.
    :raises ValueError: for empty or non-finite data, or where the model has no data plate to tell minibatches by.

    Plain functions keep their parameters in Pyro's param store: evaluate within ``with history.scope():``.
    """
    batches = as_batches(data.fixed() if isinstance(data, Data) else data, batch_size)
    return evaluate_batches(model, guide, batches, loss=loss, num_particles=num_particles, seed=seed)


def evaluate_batches(
    model: Program, guide: Program, batches: Batches, *, loss: ELBO | None, num_particles: int = 1, seed: int = 0
) -> ElboTerms:
    """:func:`evaluate` on minibatches."""
    parts: list[ElboTerms] = []
    with untouched(training=False, seed=seed), torch.no_grad():
        plates: frozenset[str] | None = None
        for batch in (fitting(model, batch) for batch in batches.epoch(shuffle=False)):
            poll()
            if plates is None:
                plates = data_plates(model, guide, batch)
                check_plates(plates, batch, batches.num_rows)
            if isinstance(loss, TraceEnum_ELBO):
                parts.append(_enumerated(model, guide, batch, loss, plates, batches.num_rows))
                continue
            draws = [
                elbo_terms(*run_pair(model, guide, *batch.args, **batch.kwargs), plates, num_data=batches.num_rows)
                for _ in range(num_particles)
            ]
            parts.append(ElboTerms(*(torch.stack(part).mean(0) for part in zip(*draws, strict=True))))
    empty = torch.zeros(0)  # where other processes have all rows
    return ElboTerms(*(torch.cat(part) for part in zip(*parts, strict=True))) if parts else ElboTerms(empty, empty, empty)


def _enumerated(
    model: Program, guide: Program, batch: Batch, loss: TraceEnum_ELBO, plates: frozenset[str], num_data: int
) -> ElboTerms:
    """The loss alone knows the sites that it sums out: one ELBO for the batch, standing for all data."""
    programs = (Reweighted(plates, num_rows=batch.num_rows, num_data=num_data)(program) for program in (model, guide))
    mean = -loss.loss(*programs, *batch.args, **batch.kwargs) / num_data
    return ElboTerms.of_batch(mean, batch.num_rows)
