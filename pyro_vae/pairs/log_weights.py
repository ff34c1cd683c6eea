"""Log-weights log p(x, z) − log q(z|x) of any pair: what ELBO, importance-weighted bounds, effective sample
size and Pareto k̂ stand on. They are made in chunks, so that memory is bounded whatever the number of
particles."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.batches import Batch, check_count, slices
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
MAX_BYTES = 2**24  # of the tensors that one run of a pair makes: what stays in a processor's cache is fastest
_PARTICLES_AT_ONCE = 64  # enough that an encoder, which runs once for all of them, costs little


def log_weights(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
) -> Tensor:
    """log p(x, z) − log q(z|x) per datum at z ~ q(z|x), in nats: ``(num_particles, batch)``.

    The mean of exp over particles is an unbiased estimate of p(x), whatever the guide; the mean itself is one
    of the ELBO.

    Any pair with a data plate: several latents, plates within a datum, masks (masked entries have no part in
    p), autoguides. Sites with ``infer={"enumerate": "parallel"}`` are summed out: those of the model exactly,
    log Σ_y p(x, y, z), those of the guide by a draw for each value, log Σ_y p(x, y, z_y) / q(z_y|x, y).
    Scales are removed: of subsampling, of annealing. What a guide observes (``obs=``, ``pyro.factor``) is no
    part of q, nor are auxiliary sites that latents are not points of.

    :param data: the arguments of model and guide, ``(batch, *event)``, in whatever form :func:`~pyro_vae.fit`
        takes them: a tensor or array, a tuple for positional arguments, a dict for keyword arguments,
        ``pv.Data``, a ``Dataset``, or a ``DataLoader`` that keeps the order of its data set.
    :param max_bytes: of the tensors that one run makes; particles and data are taken in chunks of that size.
    :param seed: of the draws.
    :param check: ``False`` runs a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :raises ValueError: for a pair that is wrong; a latent outside the data plate, which has no weight per
        datum (see
        :func:`joint_log_weights`); a latent on one side only; a model that draws a subsample itself; a datum
        whose log-probability is not finite.
    """
    check_particles("log_weights", num_particles)
    batch = read_whole(data, seed=seed)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(model, guide, batch, verb="log_weights", check=check, max_bytes=max_bytes)
        return torch.cat([weigher.of(rows, num_particles) for rows in weigher.chunks(num_particles)], 1)


@dataclass(frozen=True)
class JointLogWeights:
    """Log-weights of all data together, from :func:`joint_log_weights`, in nats.

    log_weights: log p(x₁…x_N, z) − log q(z|x), ``(num_particles,)``. draws: the z of each latent site at
    which they were taken, ``(num_particles, *shape)``, with a dimension for each plate of the site. Sites
    that are summed out have none, nor have those that a guide draws once for each value of what it sums out.
    """

    log_weights: Tensor
    draws: dict[str, Tensor]

    @property
    def log_evidence(self) -> float:
        """log (1/K) Σ exp(log w): a lower bound of log p(x₁…x_N) in expectation."""
        return log_mean_exp(self.log_weights.double()).item()

    @property
    def log_evidence_se(self) -> float:
        """Its Monte Carlo error by the jackknife, see :func:`~pyro_vae.numerics.log_mean_exp_se`."""
        return log_mean_exp_se(self.log_weights.double()).item()

    @property
    def ess(self) -> float:
        """Effective sample size of the weights, between 1 and their number."""
        return effective_sample_size(self.log_weights.double()).item()

    @property
    def pareto_k(self) -> float:
        """k̂ of their tail, see :func:`~pyro_vae.numerics.pareto_k`."""
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
    seed: int = 0,
    check: bool = True,
) -> JointLogWeights:
    """log p(x₁…x_N, z) − log q(z|x) of all data together, in nats, and the draws z: :class:`JointLogWeights`.

    For pairs with latents that all data share, such as the weights of a regression; the log-mean-exp
    estimates the evidence of the whole data set. Arguments as for :func:`log_weights`. All draws are kept;
    where latents of each datum make them too large, ``evidence.importance(…, joint=True)`` keeps none.
    """
    check_particles("joint_log_weights", num_particles)
    batch = read_whole(data, seed=seed)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(
            model, guide, batch, verb="joint_log_weights", check=check, max_bytes=max_bytes, joint=True
        )
        (rows,) = weigher.chunks(num_particles)
        weights, draws = weigher.with_draws(rows, num_particles)
    return JointLogWeights(weights[:, 0], draws)


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
    """The log-weights of a pair, after a look at what it is made of. Raises ``ValueError`` for what is wrong
    with it."""
    pair = inspect_checked(model, guide, batch, verb=verb, check=check, per_datum=not joint, joint=joint)
    if not pair.has_density:
        logger.warning(
            "%s: the guide has points (Delta), which have no density, so the weights bound nothing: each is "
            "log p(x, z) at "
            "the point", verb,
        )  # fmt: skip
    return Weigher(pair, max_bytes=max_bytes)


class Weigher:
    """The log-weights of a pair, chunk by chunk. Modules are expected in evaluation mode, gradients off.

    :param pair: inspected with ``particles``. Where it is joint, all data together are one datum: its rows
    are 1.
    """

    def __init__(self, pair: Structure, *, max_bytes: int = MAX_BYTES) -> None:
        if pair.particles is None:
            raise ValueError("pair: expected a structure with its particles, of probe_particles")
        self.pair, self.batch, self.max_bytes = pair, pair.batch, max_bytes
        self.particles: Particles = pair.particles
        self.plates, self.nesting = pair.plates, pair.nesting
        self.vectorized, self.divides = self.particles.vectorized, self.particles.rows_independent
        self.latents: Latents | None = None  # whose draws are kept
        self.sites: list[str] = []  # those that have draws
        self.graphs: dict[Any, Any] = {}  # of chunks of one shape that come again and again

    def chunks(self, num_particles: int) -> list[slice]:
        """The rows of the data that are to be taken at a time."""
        rows, self.at_once = self._sizes(num_particles)
        chunks = slices(self.batch.num_rows, rows)
        self.alike = Counter(chunk.stop - chunk.start for chunk in chunks)
        return chunks

    def of(self, rows: slice, num_particles: int) -> Tensor:
        """All log-weights of one chunk of the data: ``(num_particles, rows)``. Raises ``ValueError`` for a
        datum all of whose weights are 0, or one of whose weights is NaN or infinite."""
        return self._of(rows, num_particles)[0]

    def with_draws(self, rows: slice, num_particles: int) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`of` all data of a joint pair, and the draws of each site, ``(num_particles, *shape)``."""
        self.latents = Latents(self.pair)
        weights, *draws = self._of(rows, num_particles)
        return weights, dict(zip(self.sites, draws, strict=True))

    def _of(self, rows: slice, num_particles: int) -> tuple[Tensor, ...]:
        part = self.batch.rows(rows)
        # Pyro's own validation sees each datum once
        drawn = [self.weigh(part, num_particles % self.at_once or self.at_once)]
        rest = (num_particles - 1) // self.at_once
        if rest:
            run = self._graphed(part, calls=rest * self.alike[rows.stop - rows.start])
            drawn += [tuple(run(*part.leaves())) for _ in range(rest)]
        found = tuple(map(torch.cat, zip(*drawn, strict=True)))
        self._check_finite(found[0], rows)
        return found

    def _graphed(self, part: Batch, calls: int) -> Callable[..., Sequence[Tensor]]:
        """The log-weights of ``at_once`` particles as a function of the tensors of a chunk; a graph if
        ``calls`` calls pay for one."""

        def eager(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.weigh(part.with_leaves(tensors), self.at_once)

        key = tuple(tensor.shape for tensor in part.leaves())
        if key not in self.graphs:
            self.graphs[key] = graphed(eager, kind="log-weights")
            self.graphs[key].prepare(part.leaves(), calls=calls)
        return self.graphs[key]

    def _check_finite(self, weights: Tensor, rows: slice) -> None:
        bad = (weights.isnan() | (weights == torch.inf)).any(0) | (weights == -torch.inf).all(0)
        if bad.any():
            at = int(bad.nonzero()[0])
            what, value = "of all data" if self.pair.joint else f"of row {rows.start + at}", weights[:, at]
            raise ValueError(
                f"log-weights: those {what} are {float(value[~value.isfinite()][0])}{self._where(rows)}; "
                "expected finite log-probabilities: check this row of the data, and the parameters of the "
                "pair"
            )

    def _where(self, rows: slice) -> str:
        """The site whose log-probability is not finite, in a run on these rows."""
        batch = self.batch.rows(rows)
        with untouched(seed=0):
            traces = run_pair(self.pair.model, self.pair.guide, *batch.args, **batch.kwargs)
        for side, trace in zip(("model", "guide"), traces, strict=True):
            for name, site in sampled(trace):
                if not site["fn"].log_prob(site["value"]).isfinite().all():
                    return f": the log-probability of {name!r} in the {side} is not finite"
        return ""

    def weigh(self, batch: Batch, num_particles: int) -> tuple[Tensor, ...]:
        """Log-weights of some data, by eager Pyro: ``(num_particles, rows)``, and draws where they are
        kept."""
        if self.vectorized:
            return self._once(batch, num_particles)
        return tuple(map(torch.cat, zip(*(self._once(batch) for _ in range(num_particles)), strict=True)))

    def at(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        """Log-weights at given latents, that come as the sites take them: ``(rows,)``.

        :raises ValueError: where sites are summed out, or the guide does not tell its density at other values
        than its draws.
        """
        if self.pair.enumerates or self.pair.points or self.pair.has_auxiliary:
            raise ValueError(
                "guide: its density at given latents is not known, since it (or the model) has sites that "
                "are summed out, points, or auxiliary variables, as autoguides have; expected pyro.sample of "
                "a distribution for each latent"
            )
        return log_weight(run_particles(self.pair, batch, None, values), self.plates).expand(batch.num_rows)

    def _once(self, batch: Batch, num_particles: int | None = None) -> tuple[Tensor, ...]:
        """One run of the pair, in a plate of particles if their number is given."""
        p, q = run_particles(self.pair, batch, num_particles)
        if self.pair.enumerates:
            weights = sum_out([(q, proposal, -1), (p, sampled, 1)], self.plates | {PARTICLES})
        else:
            weights = log_weight(
                (p, q), self.plates, particle_dim=None if num_particles is None else -1 - self.nesting
            )
        if self.pair.joint:
            weights = weights.unsqueeze(-1)
        shape = num_particles or 1, 1 if self.pair.joint else batch.num_rows
        if self.latents is None:
            return (weights.expand(shape),)
        most, values, draws = self.nesting + (num_particles is not None), values_of(q), {}
        for name, site in self.latents.sites.items():
            # further dimensions are of what the guide sums out, or declared by no plate
            if name in values and values[name].dim() <= most + len(site.event):
                draws[name] = self.latents.part(name, values[name], shape[0], 1)[:, 0]
        self.sites = list(draws)
        return weights.expand(shape), *draws.values()

    def _sizes(self, num_particles: int) -> tuple[int, int]:
        """Rows and particles of a chunk."""
        n = self.batch.num_rows
        at_once = max(1, self.max_bytes // self.particles.bytes)  # rows × particles
        few = min(num_particles, _PARTICLES_AT_ONCE) if self.vectorized else 1
        rows = n
        kept = (
            4 * self.max_bytes // (32 * num_particles)
        )  # rows whose weights, and copies of them, are few bytes
        if min(at_once // few, kept) < n:
            wanted = max(1, min(at_once // few, kept, n // 2))
            rows = wanted if self.divides else n
        return rows, min(num_particles, max(1, at_once // rows)) if self.vectorized else 1


def check_particles(verb: str, num_particles: int) -> None:
    check_count(verb, num_particles, expected="a whole number of particles or chains, 1 or more,")
