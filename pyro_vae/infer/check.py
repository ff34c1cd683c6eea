"""What is wrong with a pair, said before it trains."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro.poutine.trace_struct import Trace
from torch import nn

from pyro_vae.batches import Batch, Batches, InMemory, as_arguments, fitting
from pyro_vae.infer.problems import (
    coupling_problems,
    data_problems,
    family,
    first_problems,
    log_prob_problems,
    plates_of,
    reach_problems,
)
from pyro_vae.pair import Program, data_plates, enough_memory, run_pair, sampled, untouched

LESS = "lower the batch size (--batch-size), or the number of particles"


class SiteReport(NamedTuple):
    """One random variable of a pair. ``plates`` from the outside in; ``programs`` are those that have the site."""

    name: str
    observed: bool
    programs: tuple[str, ...]
    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    distribution: str


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pair` found: the sites of the pair, its data plates, and what is wrong with it, if anything."""

    sites: tuple[SiteReport, ...]
    data_plates: frozenset[str]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        header = ("site", "", "in", "plates", "event_shape", "distribution")
        rows = [header] + [
            (s.name, "observed" if s.observed else "latent", ", ".join(s.programs), ", ".join(s.plates) or "-",
             str(s.event_shape), s.distribution)
            for s in self.sites
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        verdict = [f"- {problem}" for problem in self.problems] or ["Nothing is wrong with this pair."]
        return "\n".join([*table, "", *verdict])


def check_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> PairReport:
    """Run a pair on a batch and say what is wrong with it; nothing is moved by it.

    Looked at: sites missing on one side; event shapes and plates that differ between model and guide; batch dimensions that
    no plate declares; data that are not finite, or outside the likelihood's support, with the row; draws of the guide
    outside the model's support and of the model outside the guide's; log-probabilities that are not finite, with the row;
    nothing to train, or networks that run but are not registered; and data that are not independent given the latents that
    they share: terms of one datum that move when another is replaced, as under batch normalization.

    :param args: the arguments of model and guide, tensors or arrays ``(batch, *event)``.
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
        batch = fitting(model, as_arguments(args, kwargs))
        with untouched() as ran:
            traces = _run(model, guide, batch)
            problems = [*first_problems(traces, batch, ran), *reach_problems(*traces)]
    except ValueError as error:
        return PairReport((), frozenset(), (str(error),))
    plates: frozenset[str] = frozenset()
    if not problems:
        plates = data_plates(model, guide, batch)
        problems = [*log_prob_problems(traces, batch, plates), *coupling_problems(model, guide, batch, plates)]
    return PairReport(tuple(_sites(*traces)), plates, tuple(problems))


def check_first_batch(model: Program, guide: Program, batches: Batches) -> tuple[Batch, Collection[nn.Module]]:
    """The part of :func:`check_pair` that costs one run of the pair, on the first batch. Raises ``ValueError``.

    Data in memory are held against the likelihood's support all at once. Returns the batch, and the modules that ran.
    """
    with untouched() as ran:
        batch = fitting(model, next(iter(batches.epoch(shuffle=False))))
        traces = _run(model, guide, batch)
        whole = fitting(model, batches.whole) if isinstance(batches, InMemory) and not batches.drawn else None
        problems = list(first_problems(traces, batch, ran, whole))
    if problems:
        raise ValueError("; ".join(problems))
    return batch, list(ran)


def check_observed(model_trace: Trace, batch: Batch, where: str) -> None:
    """Raise ``ValueError`` where an observed row lies outside its likelihood's support."""
    for problem in data_problems(model_trace, batch):
        raise ValueError(f"{where}: {problem}")


def _run(model: Program, guide: Program, batch: Batch) -> tuple[Trace, Trace]:
    try:
        with enough_memory(LESS):
            return run_pair(model, guide, *batch.args, **batch.kwargs)
    except MemoryError:
        raise
    except Exception as error:
        cause = str(error).split("\n", 1)[0]  # Pyro appends the shapes of the whole trace
        shapes = {name: tuple(part.shape) for name, part in batch.tensors.items()}
        raise ValueError(f"pair: it fails on a batch of shape {shapes}: {type(error).__name__}: {cause}") from error


def _sites(model_trace: Trace, guide_trace: Trace) -> Iterator[SiteReport]:
    model, guide = dict(sampled(model_trace)), dict(sampled(guide_trace))
    for name in model | guide:
        programs = tuple(side for side, sites in (("model", model), ("guide", guide)) if name in sites)
        site = model[name] if name in model else guide[name]
        fn = site["fn"]
        yield SiteReport(name, site["is_observed"], programs, plates_of(site), tuple(fn.event_shape), family(fn))
