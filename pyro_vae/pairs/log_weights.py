"""Log-weights log p(x, z) − log q(z|x) of any pair, in chunks of bounded memory. The ELBO,
importance-weighted bounds, effective sample size and Pareto k̂ are functions of log-weights."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.batches import Batch, check_count, rows_per_chunk, slices
from pyro_vae.numerics import effective_sample_size, log_mean_exp, log_mean_exp_se, pareto_k
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.enumeration import PARTICLES, sum_out, values_of
from pyro_vae.pairs.graphs import graphed
from pyro_vae.pairs.latents import Latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.probe import log_weight, run_particles
from pyro_vae.pairs.structure import Particles, Structure
from pyro_vae.pairs.traces import Program, proposal, run_pair, sampled

logger = logging.getLogger(__name__)
MAX_BYTES = 2**24  # memory of the tensors that one run allocates; fits in the cache of a CPU
_MIN_PARTICLES_PER_RUN = 64  # amortizes the encoder, which runs once for all particles of a run


def log_weights(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1,
    max_bytes: int = MAX_BYTES,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
) -> Tensor:
    """log p(x, z) − log q(z|x) per datum at z ~ q(z|x), in nats: ``(num_particles, batch)``.

    For every guide, the mean of exp(log-weight) over particles is an unbiased estimate of p(x). The mean of
    the log-weights is an unbiased estimate of the ELBO.

    Accepts any pair with a data plate: several latents, plates within a datum, masks (masked entries do not
    contribute to p), autoguides. Sites with ``infer={"enumerate": "parallel"}`` are summed out. For a site y
    of the model the sum is exact, log Σ_y p(x, y, z). For a site y of the guide, z is drawn once per value of
    y, and the sum is log Σ_y p(x, y, z_y) / q(z_y|x, y). Scales, such as those of subsampling and annealing,
    are removed. Observed sites of the guide (``obs=``, ``pyro.factor``) are not part of q. Auxiliary sites
    from which no latent is computed are not part of q either.

    :param data: the arguments of model and guide, ``(batch, *event)``, in any form that :func:`~pyro_vae.fit`
        accepts: a tensor or array, a tuple for positional arguments, a dict for keyword arguments,
        ``pv.Data``, a ``Dataset``, a ``DataLoader`` that keeps the order of its data set, or a stream, whose
        batches are collected in memory.
    :param num_particles: draws per datum.
    :param max_bytes: memory of the tensors that one run allocates; it sets the size of chunks of particles
        and data.
    :param num_data: the number of rows of a stream that has no length.
    :param seed: seed of the draws.
    :param check: ``False`` runs a pair that :func:`~pyro_vae.check_pair` rejects.
    :raises ValueError: for an invalid pair; a latent outside the data plate, which has no weight per datum
        (see :func:`joint_log_weights`); a latent that only model or guide samples; a model that subsamples;
        or a datum whose log-probability is not finite.
    """
    check_particles("log_weights", num_particles)
    batch = read_whole(data, seed=seed, num_data=num_data)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(model, guide, batch, verb="log_weights", check=check, max_bytes=max_bytes)
        return torch.cat([weigher.of(rows, num_particles) for rows in weigher.chunks(num_particles)], 1)


@dataclass(frozen=True)
class JointLogWeights:
    """Log-weights of all data together, from :func:`joint_log_weights`, in nats.

    :param log_weights: log p(x₁…x_N, z) − log q(z|x), ``(num_particles,)``.
    :param draws: the draws z by latent site, ``(num_particles, *shape)``, with a dimension for each plate of
        the site. Two kinds of sites are left out: those that are summed out, and those that the guide draws
        once for each value of an enumerated site.
    """

    log_weights: Tensor
    draws: dict[str, Tensor]

    @property
    def log_evidence(self) -> float:
        """log (1/K) Σ exp(log w) in nats: a lower bound of log p(x₁…x_N) in expectation."""
        return log_mean_exp(self.log_weights.double()).item()

    @property
    def log_evidence_se(self) -> float:
        """Standard error of ``log_evidence`` by the jackknife, see
        :func:`~pyro_vae.numerics.log_mean_exp_se`."""
        return log_mean_exp_se(self.log_weights.double()).item()

    @property
    def ess(self) -> float:
        """Effective sample size of the weights, between 1 and the number of particles."""
        return effective_sample_size(self.log_weights.double()).item()

    @property
    def pareto_k(self) -> float:
        """k̂ of the tail of the weights, see :func:`~pyro_vae.numerics.pareto_k`."""
        return pareto_k(self.log_weights).item()

    def __str__(self) -> str:
        rows = {
            "log evidence of all data": f"{self.log_evidence:.3f} ± {self.log_evidence_se:.2g} nats",
            "mean log-weight (ELBO)": f"{self.log_weights.double().mean():.3f} nats",
            "effective sample size": f"{self.ess:.1f} of {len(self.log_weights)}",
            "Pareto k": f"{self.pareto_k:.2f}",
        }
        return "\n".join(f"{name:24}  {value}" for name, value in rows.items())


def joint_log_weights(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1,
    max_bytes: int = MAX_BYTES,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
) -> JointLogWeights:
    """log p(x₁…x_N, z) − log q(z|x) of all data together, in nats, and the draws z: :class:`JointLogWeights`.

    Use it for pairs with global latents, such as the coefficients of a regression. The log-mean-exp of the
    log-weights estimates the log evidence of the whole data set. The arguments are those of
    :func:`log_weights`. The result stores all draws. If the draws of local latents take too much memory, use
    ``evidence.importance(…, joint=True)``, which does not store draws.
    """
    check_particles("joint_log_weights", num_particles)
    batch = read_whole(data, seed=seed, num_data=num_data)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(
            model, guide, batch, verb="joint_log_weights", check=check, max_bytes=max_bytes, joint=True
        )
        (rows,) = weigher.chunks(num_particles)
        log_w, draws = weigher.with_draws(rows, num_particles)
    return JointLogWeights(log_w[:, 0], draws)


def weigh(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    verb: str,
    check: bool = True,
    max_bytes: int = MAX_BYTES,
    joint: bool = False,
) -> "Weigher":
    """Validate a pair and return its :class:`Weigher`. Raises ``ValueError`` for an invalid pair."""
    pair = inspect_checked(model, guide, batch, verb=verb, check=check, per_datum=not joint, joint=joint)
    if not pair.has_density:
        logger.warning(
            "%s: the guide has points (Delta), which have no density; the log-weights are log p(x, z) at the "
            "points and give no bound",
            verb,
        )
    return Weigher(pair, max_bytes=max_bytes)


class Weigher:
    """Computes the log-weights of a pair by chunks of the data, in evaluation mode and without gradients.

    :param pair: a structure from :func:`.probe_particles`. If it is joint, all data are one datum with one
        log-weight.
    :param max_bytes: memory of the tensors that one run allocates.
    """

    def __init__(self, pair: Structure, *, max_bytes: int = MAX_BYTES) -> None:
        if pair.particles is None:
            raise ValueError("pair: its particles are missing; expected a structure from probe_particles")
        self.pair, self.batch, self.max_bytes = pair, pair.batch, max_bytes
        self.particles: Particles = pair.particles
        self.plates, self.nesting = pair.plates, pair.nesting
        self.vectorized = self.particles.vectorized
        self.latents: Latents | None = None  # set if draws are returned
        self.sites: list[str] = []  # names of the sites whose draws are returned
        self.graphs: dict[Any, Any] = {}  # by the shapes of the tensors in a chunk of the data

    def chunks(self, num_particles: int) -> list[slice]:
        """Slices that divide the rows of the data into chunks. Also sets the number of particles per run, so
        call it before :meth:`of`."""
        rows, self.particles_per_run = self._chunk_sizes(num_particles)
        chunks = slices(self.batch.num_rows, rows)
        self.chunk_counts = Counter(chunk.stop - chunk.start for chunk in chunks)
        return chunks

    def of(self, rows: slice, num_particles: int) -> Tensor:
        """The log-weights of a chunk of the data, ``(num_particles, rows)``.

        :raises ValueError: if a log-weight is NaN or ∞, or if all log-weights of a datum are −∞.
        """
        return self._compute(rows, num_particles)[0]

    def with_draws(self, rows: slice, num_particles: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-weights of a joint pair, and the draws by site, ``(num_particles, *shape)``."""
        self.latents = Latents(self.pair)
        log_w, *draws = self._compute(rows, num_particles)
        return log_w, dict(zip(self.sites, draws, strict=True))

    def _compute(self, rows: slice, num_particles: int) -> tuple[Tensor, ...]:
        """The log-weights of a chunk of the data, and the draws by site if they are returned."""
        part = self.batch.rows(rows)
        # the first run is eager, so that Pyro validates each datum
        runs = [self.weigh(part, num_particles % self.particles_per_run or self.particles_per_run)]
        num_calls = (num_particles - 1) // self.particles_per_run
        if num_calls:
            run = self._graphed(part, calls=num_calls * self.chunk_counts[rows.stop - rows.start])
            runs += [tuple(run(*part.leaves())) for _ in range(num_calls)]
        log_w, *draws = map(torch.cat, zip(*runs, strict=True))
        self._check_finite(log_w, rows)
        return log_w, *draws

    def _graphed(self, part: Batch, calls: int) -> Callable[..., Sequence[Tensor]]:
        """The log-weights of ``particles_per_run`` particles as a function of the tensors of a chunk. It is a
        compiled graph if that saves time for ``calls`` calls."""

        def eager(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.weigh(part.with_leaves(tensors), self.particles_per_run)

        key = tuple(tensor.shape for tensor in part.leaves())
        if key not in self.graphs:
            self.graphs[key] = graphed(eager, kind="log-weights")
            self.graphs[key].prepare(part.leaves(), calls=calls)
        return self.graphs[key]

    def _check_finite(self, log_w: Tensor, rows: slice) -> None:
        invalid = (log_w.isnan() | (log_w == torch.inf)).any(0) | (log_w == -torch.inf).all(0)
        if invalid.any():
            index = int(invalid.nonzero()[0])
            datum = "all data" if self.pair.joint else f"row {rows.start + index}"
            values = log_w[:, index]
            raise ValueError(
                f"log-weights: got {float(values[~values.isfinite()][0])} for {datum}"
                f"{self._nonfinite_site(rows)}; expected finite log-probabilities: check these data and the "
                "parameters of the pair"
            )

    def _nonfinite_site(self, rows: slice) -> str:
        """The end of an error message: the first site whose log-probability is not finite, ``""`` if there is
        none."""
        batch = self.batch.rows(rows)
        with untouched(seed=0):
            traces = run_pair(self.pair.model, self.pair.guide, *batch.args, **batch.kwargs)
        for side, trace in zip(("model", "guide"), traces, strict=True):
            for name, site in sampled(trace):
                if not site["fn"].log_prob(site["value"]).isfinite().all():
                    return f": the log-probability of {name!r} in the {side} is not finite"
        return ""

    def weigh(self, batch: Batch, num_particles: int) -> tuple[Tensor, ...]:
        """Log-weights of a batch, ``(num_particles, rows)``, and the draws by site if they are returned.

        If particles cannot run in one plate, they run one after another.
        """
        if self.vectorized:
            return self._run(batch, num_particles)
        return tuple(map(torch.cat, zip(*(self._run(batch) for _ in range(num_particles)), strict=True)))

    def at(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        """Log-weights at given latents, in the shapes of their sites: ``(rows,)``.

        :raises ValueError: if sites are summed out, or the guide has no density at given values.
        """
        if self.pair.enumerates or self.pair.points or self.pair.has_auxiliary:
            raise ValueError(
                "guide: its density at given latents is not known, since the pair has sites that are summed "
                "out, points (Delta), or auxiliary sites, as autoguides do; expected pyro.sample of a "
                "distribution for each latent"
            )
        return log_weight(run_particles(self.pair, batch, None, values), self.plates).expand(batch.num_rows)

    def _run(self, batch: Batch, num_particles: int | None = None) -> tuple[Tensor, ...]:
        """Log-weights and draws of one run, in a plate of ``num_particles`` particles if given."""
        p, q = run_particles(self.pair, batch, num_particles)
        if self.pair.enumerates:
            log_w = sum_out([(q, proposal, -1), (p, sampled, 1)], self.plates | {PARTICLES})
        else:
            log_w = log_weight(
                (p, q), self.plates, particle_dim=None if num_particles is None else -1 - self.nesting
            )
        if self.pair.joint:
            log_w = log_w.unsqueeze(-1)
        shape = num_particles or 1, 1 if self.pair.joint else batch.num_rows
        if self.latents is None:
            return (log_w.expand(shape),)
        max_plates, values, draws = self.nesting + (num_particles is not None), values_of(q), {}
        for name, site in self.latents.sites.items():
            # leave out draws with more dimensions, from enumerated sites of the guide or without a plate
            if name in values and values[name].dim() <= max_plates + len(site.event):
                draws[name] = self.latents.part(name, values[name], shape[0], 1)[:, 0]
        self.sites = list(draws)
        return log_w.expand(shape), *draws.values()

    def _chunk_sizes(self, num_particles: int) -> tuple[int, int]:
        """Rows per chunk of the data, and particles per run."""
        rows = self.batch.num_rows
        size = max(1, self.max_bytes // self.particles.bytes)  # rows × particles of one run
        min_particles = min(num_particles, _MIN_PARTICLES_PER_RUN) if self.vectorized else 1
        # the second limit is for the log-weights of all particles of a chunk and their copies
        max_rows = min(size // min_particles, 4 * self.max_bytes // (32 * num_particles))
        if self.particles.rows_independent:
            rows = min(rows, rows_per_chunk(rows, max(1, max_rows)))
        return rows, min(num_particles, max(1, size // rows)) if self.vectorized else 1


def check_particles(verb: str, num_particles: int) -> None:
    """Raise ``ValueError`` if a number of particles is not a positive integer."""
    check_count(verb, num_particles, expected="a whole number of particles or chains, 1 or more,")
