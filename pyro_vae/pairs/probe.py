"""Compute the log-weights of a run, and test whether they are the same in a plate of particles and on fewer
rows."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.parameter import is_lazy

from pyro_vae.data.batches import Batch
from pyro_vae.pairs.enumeration import PARTICLES, Held
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.structure import (
    Particles,
    Structure,
    Traces,
    counted_bytes,
    first_line,
    latent_sites,
    row_dim,
    run_once,
)
from pyro_vae.pairs.traces import Program, proposal, run_pair, sampled, sum_sites

logger = logging.getLogger(__name__)
_MAX_MIXTURES = 4
_PROBE_SEED = 2**31 - 1  # users are unlikely to pass it; the same seed would repeat draws


def log_weight(traces: Traces, plates: frozenset[str], *, particle_dim: int | None = None) -> Tensor:
    """log p(x, z) − log q(z|x) of a run without enumeration, in nats: ``(batch,)``, or ``()`` without data
    plates; with particles ``(particles, …)``. Terms outside of the data plates are added to every row."""
    likelihood, prior, posterior = log_prob_terms(traces, plates, particle_dim)
    return likelihood + prior - posterior


def log_prob_terms(
    traces: Traces, plates: frozenset[str], particle_dim: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x|z), log p(z) and log q(z|x), each of a shape that broadcasts to that of the log-weight."""

    def whole(local: Tensor, shared: Tensor) -> Tensor:
        return local + (shared.unsqueeze(-1) if plates and shared.dim() else shared)

    p = sum_sites(sampled(traces[0]), plates, particle_dim=particle_dim)
    q = sum_sites(proposal(traces[1]), plates, particle_dim=particle_dim)
    return (
        whole(p.observed, p.shared_observed),
        whole(p.latent, p.shared_latent),
        whole(q.latent, q.shared_latent),
    )


def probe_particles(pair: Structure) -> Structure:
    """The structure with its ``particles``, which say whether the pair can be vectorized and its rows
    divided.

    The pair is run at fixed latents: the latents of two runs, and mixtures in which each row has the latents
    of one of the two runs. The log-probabilities in a plate of particles, and on fewer rows, are compared
    with those of the two runs. This takes two runs of the pair, and more if the pair cannot be vectorized or
    its rows depend on each other.
    """
    if pair.is_handler:
        made = counted_bytes(lambda: run_pair(pair.model, pair.guide, *pair.batch.args, **pair.batch.kwargs))
        bytes = max(1, made // pair.num_rows)
        return replace(pair, particles=Particles(False, None, False, bytes, "the guide handles its model"))
    second, at, batch = pair.other_traces, None, pair.batch
    if second is not None and pair.other_rows is not None and pair.plates:
        at = pair.other_rows.to(pair.batch.leaves()[0].device)
        batch = pair.batch.map(lambda part: part[at.to(part.device)])
    else:  # the pair runs on these rows only, or has no data plate
        second = _another_run(pair)
    before, other = _stacked(pair, pair.traces), _stacked(pair, second)
    if at is not None:
        before = before.expand(3, pair.num_rows)[:, at]
    draws = _draws(pair, second, at)
    vectorized, reason = False, ""
    try:
        dims = {name: pair.nesting + site["fn"].event_dim for name, site in latent_sites(second).items()}
        values = {
            name: torch.stack([_padded(draw[name], dim) for draw in draws]) for name, dim in dims.items()
        }
        with untouched(seed=_PROBE_SEED):
            traces = run_particles(pair, batch, len(draws), values)
            terms = list(_stacked(pair, traces, particle_dim=-1 - pair.nesting).unbind(1))
        vectorized = all(_agree(a, b) for a, b in zip(terms[1], other, strict=True))
        reason = (
            "" if vectorized else "its log-weights in a plate of particles differ from those of single runs"
        )
    except Exception as error:  # such as a network that takes no batch dimension to the left of the data
        reason = f"{type(error).__name__}: {first_line(error)}"
    independent, coupled = None, False
    with suppress(Exception):  # if the pair cannot be run at given latents, its rows cannot be tested
        if not vectorized:
            terms = [_held(pair, batch, draw) for draw in draws]
        independent = _same(terms[0], before) if at is not None else None
        coupled = _is_coupled(pair, terms)
        if independent is False and not _same(terms[0], _held(pair, batch, draws[0], seed=_PROBE_SEED - 1)):
            independent = None  # the pair draws noise outside of its sites
        # rows that depend on each other may have been left out: test all rows
        if not coupled and independent is not True and at is not None:
            draws = _draws(pair, _another_run(pair), None)
            coupled = _is_coupled(pair, [_held(pair, pair.batch, draw) for draw in draws])
    num_particles = 4 if vectorized else None
    made = counted_bytes(lambda: run_particles(pair, batch, num_particles))
    num_rows = batch.num_rows if batch.tensors else 1
    bytes = max(1, made // (num_rows * (num_particles or 1)))
    return replace(pair, particles=Particles(vectorized, independent, coupled, bytes, reason))


def _another_run(pair: Structure) -> Traces:
    """Another run on the batch, with other draws."""
    run = run_once(pair.model, pair.guide, pair.batch, False, seed=_PROBE_SEED - 2)
    if run.error:
        raise ValueError(f"pair: its first run succeeded and its second failed: {run.error}") from run.cause
    return run.traces


def _draws(pair: Structure, second: Traces, at: Tensor | None) -> list[dict[str, Tensor]]:
    """The latents at which the pair is tested: ``[one, two, others, *mixtures]``.

    one: the latents of the first run, at the rows of the second run. two: the latents of the second run.
    others: the same, but latents that are equal in both runs are shifted by a row. mixtures: some rows have
    the latents of ``others`` and the rest those of ``one``. If there are up to 16 rows,
    there is for any two rows a mixture in which they have latents of different lists.
    """
    first, sites = latent_sites(pair.traces), latent_sites(second)
    two = {name: site["value"] for name, site in sites.items()}
    one = {name: _take_rows(first[name], at, pair) if name in first else two[name] for name in sites}
    others = {
        # a point is the same in each run, so a row gets the point of its neighbour
        name: _rolled(two[name], site, pair) if torch.equal(two[name], one[name]) else two[name]
        for name, site in sites.items()
    }
    n = pair.num_rows if at is None else len(at)
    mixtures = [
        {name: _mixed(others[name], one[name], rows, site, pair) for name, site in sites.items()}
        for rows in _mixed_rows(n)
    ]
    return [one, two, others, *mixtures]


def _stacked(pair: Structure, traces: Traces, *, particle_dim: int | None = None) -> Tensor:
    """log p(x|z), log p(z) and log q(z|x): ``(3, …)``."""
    return torch.stack(torch.broadcast_tensors(*log_prob_terms(traces, pair.plates, particle_dim)))


def _held(pair: Structure, batch: Batch, values: Mapping[str, Tensor], *, seed: int = _PROBE_SEED) -> Tensor:
    """log p(x|z), log p(z) and log q(z|x) of a single run at given latents: ``(3, …)``. log q is NaN if the
    guide cannot compute its density at these latents."""
    with untouched(seed=seed):
        try:
            return _stacked(pair, run_particles(pair, batch, None, values))
        except Exception as error:
            logger.info(
                "the guide cannot be run at given latents, so its rows are not tested: %s", first_line(error)
            )
    with untouched(seed=seed):
        trace = poutine.trace(Held(values)(pair.model)).get_trace(*batch.args, **batch.kwargs)
        terms = _stacked(pair, (trace, Trace()))
        terms[2] = torch.nan
        return terms


def _is_coupled(pair: Structure, terms: list[Tensor]) -> bool:
    """Whether the log-probability of a row differs between a mixture and the run that the row's latents are
    from."""
    one, _, others, *mixtures = terms
    if not pair.plates or pair.shared or not one.shape[1:]:
        return False
    masks = _mixed_rows(one.shape[1])
    return any(
        not _same(mixture, torch.where(rows.to(one.device), others, one))
        for mixture, rows in zip(mixtures, masks, strict=True)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether the terms ``(3, rows)`` of two runs are equal up to the rounding of networks on batches of
    different sizes. log q is compared where both are finite: a Delta has no density at other values than its
    own."""
    a, b = torch.broadcast_tensors(a, b)
    finite = a[2].isfinite() & b[2].isfinite()
    tolerance = 1e-6 if a.dtype == torch.double else 2e-3
    return (
        _agree(a[0], b[0], tolerance)
        and _agree(a[1], b[1], tolerance)
        and _agree(a[2][finite], b[2][finite], tolerance)
    )


@contextmanager
def moved_parameters(model: Program, guide: Program, batch: Batch) -> Iterator[None]:
    """Run the block in evaluation mode with small noise added to all parameters. Entries that start equal,
    such as those of a table of zeros, then give different log-probabilities. Positive parameters stay
    positive. The parameters are restored afterwards."""
    noise = torch.Generator().manual_seed(_PROBE_SEED)
    with untouched(training=False) as ran, torch.no_grad():
        run_pair(model, guide, *batch.args, **batch.kwargs)  # creates the parameters
        found = [p for _, p in pyro.get_param_store().named_parameters()]
        found += [p for module in ran for p in module.parameters()]
        saved = {id(p): (p, p.clone()) for p in found if not is_lazy(p) and p.is_floating_point()}
        try:
            for p, before in saved.values():
                with suppress(RuntimeError):  # an expanded tensor cannot be written
                    size = before.abs() + bool((before <= 0).any())
                    p.add_(0.01 * size * torch.randn(p.shape, generator=noise, dtype=torch.double).to(p))
            yield
        finally:
            for p, before in saved.values():
                if not torch.equal(p, before):
                    p.copy_(before)


def particle_programs(
    pair: Structure, num_particles: int | None, values: Mapping[str, Tensor] | None = None
) -> tuple[Program, Program]:
    """Model and guide in a plate of particles, or for a single run if ``num_particles`` is ``None``.

    :param num_particles: ``None`` for a single run without this plate.
    :param values: latents that are held fixed; there is then no enumeration. Without ``values``, latents are
        drawn, and enumerated sites are enumerated.
    """
    model, guide = pair.model, pair.guide
    if values is not None:
        model, guide = (Held(values)(program) for program in (model, guide))
    elif pair.enumerates:  # enumeration dimensions of the model are to the left of those of the guide
        guide = EnumMessenger(first_available_dim=-2 - pair.nesting)(guide)
        model = EnumMessenger()(model)
    if num_particles is not None:
        plate = pyro.plate(PARTICLES, num_particles, dim=-1 - pair.nesting)
        model, guide = plate(model), plate(guide)
    return model, guide


def run_particles(
    pair: Structure, batch: Batch, num_particles: int | None, values: Mapping[str, Tensor] | None = None
) -> Traces:
    """Traces of a run of :func:`particle_programs`."""
    return run_pair(*particle_programs(pair, num_particles, values), *batch.args, **batch.kwargs)


def _agree(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Whether log-weights are equal up to rounding."""
    if tolerance is None:
        tolerance = 1e-9 if a.dtype == torch.double else 1e-4
    a, b = torch.broadcast_tensors(a, b)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _take_rows(site: dict, at: Tensor | None, pair: Structure) -> Tensor:
    """The value of a site at the rows ``at``."""
    value, dim = site["value"], row_dim(site, pair.plates)
    if at is None or dim is None:
        return value
    dim -= site["fn"].event_dim
    return value.index_select(dim, at) if value.dim() >= -dim and value.shape[dim] == pair.num_rows else value


def _mixed_rows(n: int) -> list[Tensor]:
    """For each mixture, a mask of the rows that have other latents. Mixture d has the rows whose number has
    the binary digit 1 at position d. If row numbers have more than four binary digits, the rows are
    random."""
    digits = max(1, math.ceil(math.log2(max(n, 2))))
    if digits > _MAX_MIXTURES:
        return list(torch.rand(_MAX_MIXTURES, n, generator=torch.Generator().manual_seed(0)) < 0.5)
    return [torch.arange(n) // 2**digit % 2 == 1 for digit in range(digits)]


def _row_dim_of_value(value: Tensor, site: dict, pair: Structure) -> int | None:
    """The dimension of the rows in the value of a site, ``None`` if it has none."""
    dim = row_dim(site, pair.plates)
    dim = None if dim is None else dim - site["fn"].event_dim
    return None if dim is None or value.dim() < -dim else dim


def _rolled(value: Tensor, site: dict, pair: Structure) -> Tensor:
    dim = _row_dim_of_value(value, site, pair)
    return value if dim is None else value.roll(1, dim)


def _mixed(others: Tensor, one: Tensor, rows: Tensor, site: dict, pair: Structure) -> Tensor:
    """``one``, with the marked ``rows`` from ``others``. A site outside of the data plates is unchanged."""
    dim = _row_dim_of_value(one, site, pair)
    if dim is None or one.shape != others.shape or one.shape[dim] != len(rows):
        return one
    return torch.where(rows.to(one.device).reshape(-1, *(1,) * (-1 - dim)), others, one)


def _padded(value: Tensor, dim: int) -> Tensor:
    """A value with a dimension for each plate, so that the particle dimension is to the left of them."""
    return value.reshape((1,) * (dim - value.dim()) + value.shape)
