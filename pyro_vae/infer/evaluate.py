"""The ELBO of any pair for each datum of a data set."""

from copy import copy
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_vae.data.batches import Batch, Batches, as_ordered_batches, check_same_data, fitting
from pyro_vae.infer.losses import check_loss, kind_of, reports_bound
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.signals import poll
from pyro_vae.pairs.check import check_observed, inspect_checked, refuse
from pyro_vae.pairs.elbo import CollectedTerms, ElboTerms, Reweighted, elbo_terms
from pyro_vae.pairs.enumeration import is_enumerated
from pyro_vae.pairs.log_weights import check_particles
from pyro_vae.pairs.preserve import check_same_pair, untouched
from pyro_vae.pairs.probe import probe_particles
from pyro_vae.pairs.problems import dividing_problems, outside_of_plates, rows_problem, subsample_problems
from pyro_vae.pairs.structure import Structure, row_dim
from pyro_vae.pairs.traces import Program, prior_of, run_pair
from pyro_vae.processes import Group
from pyro_vae.random_states import restored_random_states


def evaluate(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: ELBO | None = None,
    num_particles: int = 1,
    batch_size: int | None = 500,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
) -> ElboTerms:
    """ELBO(x) = E_q[log p(x, z) − log q(z|x)] for each datum, in nats: a lower bound of log p(x) in
    expectation.

    Modules run in evaluation mode. Parameters, buffers and random states are unchanged afterwards.

    :param data: as for :func:`~pyro_vae.infer.fit`; stochastically binarized data are binarized once.
    :param loss: ``None`` or one of Pyro's losses that are ELBOs. With ``TraceEnum_ELBO`` enumerated sites are
        summed out; that loss is one number for a batch, so all data of a batch get its mean per datum. With
        an objective of :mod:`pyro_vae.infer`, such as ``IWAE(50)``, the result also has its value
        for each datum, ``bound``.
    :param num_particles: draws of z for each datum; of an objective, evaluations over which its value is
        averaged.
    :param seed: seed of the draws. Two evaluations with the same seed use the same noise.
    :param batch_size: rows of a minibatch; ``None`` for all data at once, which a guide with parameters for
        each datum needs.
    :param num_data: the number of rows of a stream that has no length.
    :param check: ``False`` evaluates a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :return: :class:`~pyro_vae.pairs.ElboTerms`, tensors ``(n,)`` in the order of the data; its ``mean()`` has
        the standard error over data. For a model that subsamples, only the rows of the subsample have terms.
    :raises ValueError: for empty or non-finite data, an invalid pair, minibatches of a model without a data
        plate, a loss that is not an ELBO, a loader whose order is not that of the data set, or a datum whose
        ELBO is not finite.

    The parameters of plain functions are in the param store of their fit: evaluate these in ``with
    history.scope():``. :func:`~pyro_vae.infer.across_processes` divides the batches among processes.
    """
    check_particles("evaluate", num_particles)
    if not reports_bound(loss):
        raise ValueError(
            f"evaluate: {type(loss).__name__} estimates {kind_of(loss).bound}, which is not an ELBO; "
            "expected an ELBO object of Pyro, or an objective of pyro_vae.infer, such as IWAE(50)"
        )
    batches = as_ordered_batches(data, batch_size, num_data)
    return evaluate_batches(
        model, guide, batches, loss=loss, num_particles=num_particles, seed=seed, check=check
    )


def evaluate_batches(
    model: Program,
    guide: Program,
    batches: Batches,
    *,
    loss: ELBO | None,
    num_particles: int = 1,
    seed: int = 0,
    check: bool = True,
    verb: str = "evaluate",
    group: Group | None = None,
) -> ElboTerms:
    """:func:`evaluate` on minibatches, which the ranks of ``group`` compute in turn. Each minibatch has its
    own seed, so that the numbers do not depend on the number of ranks."""
    is_trained_here, group = group is not None, group or Group.dividing()
    collected, sizes, num_seen = CollectedTerms(), [], 0
    with untouched(training=False, seed=seed), torch.no_grad():
        pair: Structure | None = None
        for index, batch in enumerate(batches.epoch(shuffle=False)):
            poll()
            if pair is None:
                check_same_data(group, batch, batches.num_rows)
                pair = inspect_checked(model, guide, batch, verb=verb, check=check, whole=False)
                if not is_trained_here:  # fit keeps the ranks equal
                    check_same_pair(group, pair.modules)
                _check_enumeration(pair, loss, verb)
                check_minibatch(pair, batches.num_rows, verb=verb, check=check)
                if isinstance(loss, Objective):
                    check_loss(loss, pair, batches.num_rows, verb=verb)
                    loss = copy(loss)  # fit prepares its loss for other programs
                    loss.use(pair, check=check)
                if check and verb != "validation":  # fit has checked the minibatches of its training data
                    check_independent_rows(pair, batches.num_rows, verb=verb)
                batches.cast(pair.dtype)
            batch = fitting(batch.cast(pair.dtype), model, guide)
            first_row, num_seen = num_seen, num_seen + batch.num_rows
            if index % group.size != group.rank:
                continue
            with restored_random_states(seed, index):  # a loader draws its own random numbers
                if isinstance(loss, Objective) and not loss.linear:
                    terms = _objective_terms(pair, batch, loss, num_particles)
                elif isinstance(loss, TraceEnum_ELBO):
                    terms = _enumerated_terms(pair, batch, loss, batches.num_rows, num_particles)
                else:
                    check_draws = check and index > 0  # the first batch is checked above
                    terms = _sampled_terms(
                        pair,
                        batch,
                        batches.num_rows,
                        num_particles,
                        check=check_draws,
                        verb=verb,
                        rows=batches.rows,
                    )
            if check and not terms.elbo.isfinite().all():
                bad = int((~terms.elbo.isfinite()).nonzero()[0])
                raise ValueError(
                    f"{verb}: the ELBO of row {first_row + bad} is {float(terms.elbo[bad])}; expected "
                    "finite log-probabilities: check this row of the data, and the parameters of the pair"
                )
            collected.append(terms)
            sizes.append(len(terms.elbo))
    return collected.all if group.size == 1 else _gathered(group, collected.all, sizes)


def _gathered(group: Group, terms: ElboTerms, sizes: list[int]) -> ElboTerms:
    """The terms of all batches in order. Rank r passes those of batches r, r + size, …, of these sizes."""
    own = list(zip(*(part.cpu().split(sizes) for part in terms), strict=True))
    of_ranks = group.all_gather(own)
    num_batches = sum(map(len, of_ranks))
    in_order = [of_ranks[i % group.size][i // group.size] for i in range(num_batches)]
    return ElboTerms(*(torch.cat(part).to(terms.elbo.device) for part in zip(*in_order, strict=True)))


def _check_enumeration(pair: Structure, loss: ELBO | None, verb: str) -> None:
    """Raise ``ValueError`` if the model enumerates a site that the guide does not have, and the loss does not
    sum it out."""
    if not isinstance(loss, TraceEnum_ELBO):
        for name, site in pair.latents.items():
            if is_enumerated(site) and name not in pair.guide_latents:
                raise ValueError(
                    f"{verb}: the model sums {name!r} out and the guide has no such site, so a draw of it "
                    "gives no bound; expected loss=TraceEnum_ELBO(max_plate_nesting=…), or evidence.elbo, "
                    "which sums it out for each datum"
                )


def check_minibatch(pair: Structure, num_data: int, *, verb: str, check: bool = True) -> None:
    """Raise ``ValueError`` if the loss of a minibatch cannot be scaled to the data set, or the rows of the
    data are not in dimension 0."""
    if not pair.batch.tensors:
        return
    if check and (problem := rows_problem(pair)) is not None:
        refuse([problem], verb=verb)
    if not pair.plates and pair.num_rows < num_data:
        raise ValueError(
            f"pair: the model has no vectorized plate of the batch's {pair.num_rows} rows, so a minibatch "
            f"cannot be scaled to the {num_data} data; "
            'put the sites of each datum in pyro.plate("data", len(x)), or pass '
            "batch_size=None"
        )
    if pair.num_rows < num_data and (outside := outside_of_plates(pair)):
        raise ValueError(
            f"model: {outside[0]!r} lies in no plate of the batch's {pair.num_rows} rows, but its shape "
            f"follows them, so a minibatch cannot be scaled to the {num_data} data; put it within the data "
            "plate, with a batch dimension for the rows and the others declared by .to_event(k), or pass "
            "batch_size=None"
        )
    if pair.row_parameters and pair.num_rows < num_data:
        name = next(
            (name for name in pair.latents if row_dim(pair.latents[name], pair.plates) is not None), "z"
        )
        cause = (
            f" (the pair runs on this number of rows only: {pair.other_rows_error})"
            if pair.other_rows_error
            else ""
        )
        raise ValueError(
            f"guide: the parameter {pair.row_parameters[0]!r} (latent {name!r}) has an entry for each of the "
            f"{pair.num_rows} rows of a minibatch{cause}, so different minibatches would share it; for the "
            f"{num_data} data pass batch_size=None and an autoguide that has not run yet, or a guide that "
            "computes its parameters from the data"
        )


def check_independent_rows(pair: Structure, num_data: int, *, verb: str) -> None:
    """Raise ``ValueError`` if the ELBO terms of a row depend on the other rows of its minibatch."""
    if pair.num_rows < num_data and pair.other_rows is not None and not any(subsample_problems(pair)):
        refuse(dividing_problems(probe_particles(pair), num_data), verb=verb)


def _sampled_terms(
    pair: Structure,
    batch: Batch,
    num_data: int,
    num_particles: int,
    *,
    check: bool,
    verb: str,
    rows: Tensor | None,
) -> ElboTerms:
    """ELBO terms of a batch, averaged over draws of the latents."""
    draws = []
    for i in range(num_particles):
        traces = run_pair(pair.model, pair.guide, *batch.args, **batch.kwargs)
        if check and not i:
            check_observed(pair, traces[0], batch, verb, rows)
        draws.append(elbo_terms(*traces, pair.plates, num_data=num_data))
    return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*draws, strict=True)))


def _objective_terms(pair: Structure, batch: Batch, loss: Objective, num_particles: int) -> ElboTerms:
    """Terms by the objective, averaged over evaluations of it."""
    steps = [loss.step(pair.model, pair.guide, batch, differentiate=False) for _ in range(num_particles)]
    return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*(s.terms for s in steps), strict=True)))


def _enumerated_terms(
    pair: Structure, batch: Batch, loss: TraceEnum_ELBO, num_data: int, num_particles: int
) -> ElboTerms:
    """ELBO terms by the loss: one number for the batch, since its traces do not show the enumerated sums."""
    n = batch.num_rows
    guide = prior_of(pair.guide)  # without the sites that it observes, which are not part of q
    programs = [
        Reweighted(pair.plates, num_rows=n, num_data=num_data, strip=True)(program)
        for program in (pair.model, guide)
    ]
    total = sum(loss.loss(*programs, *batch.args, **batch.kwargs) for _ in range(num_particles))
    return ElboTerms.of_batch(-total / num_particles / num_data, n)
