"""Check a pair of a model and a guide. All functions that take a pair make the same checks."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data.batches import Batch, as_whole
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.probe import probe_particles
from pyro_vae.pairs.problems import (
    Problem,
    coupled_latents_problems,
    coupling_problems,
    data_problems,
    family,
    joint_problems,
    log_prob_problems,
    lost_parameters,
    pair_problems,
    per_datum_problems,
    plates_of,
    reach_problems,
    rows_problem,
    training_problems,
)
from pyro_vae.pairs.structure import Structure, inspect
from pyro_vae.pairs.traces import Program, sampled

logger = logging.getLogger(__name__)


class SiteReport(NamedTuple):
    """One random variable of a pair. ``plates``: names of its plates, outermost first. ``programs``: the
    programs that have it, ``"model"``, ``"guide"`` or both."""

    name: str
    observed: bool
    programs: tuple[str, ...]
    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    distribution: str


@dataclass(frozen=True)
class PairReport:
    """The result of :func:`check_pair`: the sites of the pair, its data plates, and its problems."""

    sites: tuple[SiteReport, ...]
    data_plates: frozenset[str]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        header = ("site", "", "in", "plates", "event_shape", "distribution")
        rows = [header] + [
            (
                s.name,
                "observed" if s.observed else "latent",
                ", ".join(s.programs),
                ", ".join(s.plates) or "-",
                str(s.event_shape),
                s.distribution,
            )
            for s in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        verdict = [f"- {problem}" for problem in self.problems] or ["Nothing is wrong with this pair."]
        return "\n".join([*table, "", *verdict])


def check_pair(model: Program, guide: Program, data: Any) -> PairReport:
    """Run a pair on all data at once and report its problems. All state is restored afterwards.

    It reports sites that only model or guide has; event shapes and plates that differ between model and
    guide; batch dimensions that no plate declares; data that are not finite or outside of the likelihood's
    support; draws of the guide outside of the model's support, and draws of the model outside of the guide's;
    log-probabilities that are not finite; networks that are not registered in Pyro's param store; rows along
    another dimension than the first; and rows that are not independent given the latents that they share, as
    under batch normalization in training mode. Problems of data and of log-probabilities name the row.

    :param data: as for :func:`~pyro_vae.fit`; a part of the data, such as 100 rows, is enough. Invalid data
        are reported as a problem.
    :return: :class:`PairReport`; ``print(check_pair(...))`` is a table of the sites and the list of problems.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
    >>> print(check_pair(model, guide, torch.ones(5)))
    site            in            plates  event_shape  distribution
    z     latent    model, guide  data    ()           Normal
    x     observed  model         data    ()           Normal
    <BLANKLINE>
    - guide: 'z' is in plates () but in the model in ('data',); expected the same plates on both sides
    """
    try:
        pair = inspect(model, guide, as_whole(data), training=True)
    except ValueError as error:
        return PairReport((), frozenset(), (str(error),))
    with untouched():
        problems = [*pair_problems(pair), *_trainable_problems(pair), *reach_problems(pair)]
    if (transposed := rows_problem(pair)) is not None:
        problems.append(transposed)
    if not problems and pair.batch.tensors:
        problems += [*log_prob_problems(pair), *coupling_problems(pair)]
    return PairReport(tuple(_sites(*pair.traces)), pair.plates, tuple(problem.text for problem in problems))


def _trainable_problems(pair: Structure) -> Iterable[Problem]:
    """The problems of training. If all parameters are frozen there are none, since such a pair is meant to be
    evaluated only."""
    parameters = [p for module in pair.modules for p in module.parameters(recurse=False)]
    return () if parameters and not any(p.requires_grad for p in parameters) else training_problems(pair)


def inspect_checked(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    verb: str,
    check: bool = True,
    per_datum: bool = False,
    joint: bool = False,
    whole: bool = True,
) -> Structure:
    """:func:`inspect` a pair for a function that evaluates it. Raises ``ValueError`` if the pair has
    problems.

    :param verb: name of the function, for the error.
    :param check: ``False`` allows problems that are ``judged``, see :class:`.Problem`. For other problems
        results would be undefined, so they always raise.
    :param per_datum: the function needs log-weights per datum.
    :param joint: the function needs log-weights of all data together. In the structure that is returned all
        data are one datum.
    :param whole: the batch is all data. It is an error if different rows become equal in the dtype of the
        parameters.
    """
    pair = inspect(model, guide, batch)
    if whole:
        batch.check_cast(pair.dtype)
    problems: list[Problem] = [*pair_problems(pair), *lost_parameters(pair)]
    if not problems or not check:  # these functions may raise for a pair with other problems
        with suppress(RuntimeError, ValueError) if problems else nullcontext():
            problems += [
                *(per_datum_problems(pair) if per_datum else ()),
                *(joint_problems(pair) if joint else ()),
            ]
    refuse(problems, verb=verb, check=check)
    for side, name, site in pair.sites:
        if isinstance(site["scale"], Tensor) and site["scale"].numel() > 1 and not (site["scale"] == 1).all():
            logger.warning(
                "%s: the weights of %r in the %s (poutine.scale) affect training only and are ignored here",
                verb,
                name,
                side,
            )
    if not per_datum and not joint:
        return pair
    pair = probe_particles(pair)
    refuse(coupled_latents_problems(pair) if per_datum else (), verb=verb, check=check)
    return pair.as_one_datum() if joint else pair


def refuse(problems: Iterable[Problem], *, verb: str, check: bool = True) -> None:
    """Raise ``ValueError`` if there are problems. With ``check=False``, ignore those that are ``judged``, see
    :class:`.Problem`."""
    found = [problem for problem in problems if check or not problem.judged]
    if not found:
        return
    remedy = (
        f" (pass check=False to run {verb} all the same)" if all(problem.judged for problem in found) else ""
    )
    raise ValueError("; ".join(problem.text for problem in found) + remedy)


def check_observed(
    pair: Structure, model_trace: Trace, batch: Batch, where: str, rows: Tensor | None = None
) -> None:
    """Raise ``ValueError`` if an observed row of another run of the pair is outside of the likelihood's
    support. ``rows`` has the numbers of the rows of the batch in the data."""
    for problem in data_problems(model_trace, batch, pair.plates, None, pair.unvalidated[0], rows):
        raise ValueError(f"{where}: {problem}")


def _sites(model_trace: Trace, guide_trace: Trace) -> Iterator[SiteReport]:
    model, guide = dict(sampled(model_trace)), dict(sampled(guide_trace))
    for name in model | guide:
        programs = tuple(side for side, sites in (("model", model), ("guide", guide)) if name in sites)
        site = model[name] if name in model else guide[name]
        fn = site["fn"]
        yield SiteReport(
            name, site["is_observed"], programs, plates_of(site), tuple(fn.event_shape), family(fn)
        )
