"""Log-weights log p(x, z) − log q(z|x) of any pair: what ELBO, importance-weighted bounds, effective sample size and Pareto k̂
stand on. They are made in chunks, so that memory is bounded whatever the number of particles."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.batches import Batch, as_arguments, slices
from pyro_vae.graphs import CannotTrace, compiled, has_compiler, trace_graph
from pyro_vae.pair import Program, data_plates, run_pair, sampled, sum_sites, untouched
from pyro_vae.particles import PARTICLES, check_in_data_plate, check_whole, is_enumerated, max_nesting, sum_out, unwrapped

logger = logging.getLogger(__name__)
MAX_BYTES = 2**24  # of the tensors that one run of a pair makes: what stays in a processor's cache is fastest
_PARTICLES_AT_ONCE = 64  # enough that an encoder, which runs once for all of them, costs little
_GRAPH_FROM = 100  # chunks of one shape, from which on a graph of them is worth its half second
_INDUCTOR_FROM = 300  # likewise, from which on Inductor is worth its seconds


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    **kwargs: Any,
) -> Tensor:
    """log p(x, z) − log q(z|x) per datum at z ~ q(z|x), in nats: ``(num_particles, batch)``.

    The mean of exp over particles is an unbiased estimate of p(x), whatever the guide; the mean itself is one of the ELBO.

    Any pair with a data plate: several latents, plates within a datum, masks (what is masked has no part in p), autoguides.
    Sites with ``infer={"enumerate": "parallel"}`` are summed out: those of the model exactly, log Σ_y p(x, y, z), those of the
    guide by a draw for each value, log Σ_y p(x, y, z_y) / q(z_y|x, y). Scales are stripped: of subsampling, of annealing.

    :param args: the arguments of model and guide, ``(batch, *event)``.
    :param max_bytes: of the tensors that one run makes; particles and data are taken in chunks of that size.
    :param seed: of the draws.
    :raises ValueError: for a latent outside the data plate, whose weight is no datum's (see :func:`joint_log_weights`); a
        latent on one side only; a model that draws a subsample of its own.
    """
    check_particles("log_weights", num_particles)
    batch = as_arguments(args, kwargs)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = Weigher(model, guide, batch, max_bytes=max_bytes)
        return torch.cat([weigher.of(rows, num_particles) for rows in weigher.chunks(num_particles)], 1)


def prior_of(model: Program) -> Program:
    """A guide that draws the latents as the model does."""
    return poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


def joint_log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    **kwargs: Any,
) -> Tensor:
    """log p(x₁…x_N, z) − log q(z|x) of all data together, in nats: ``(num_particles,)``.

    For pairs with latents that all data share, such as the weights of a regression; log-mean-exp of it estimates the evidence
    of the whole data set. Arguments as for :func:`log_weights`.
    """
    check_particles("joint_log_weights", num_particles)
    batch = as_arguments(args, kwargs)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = Weigher(model, guide, batch, max_bytes=max_bytes, joint=True)
        (rows,) = weigher.chunks(num_particles)
        return weigher.of(rows, num_particles)


class Weigher:
    """The log-weights of a pair, chunk by chunk. Modules are expected in evaluation mode, gradients off.

    :param joint: one weight for all data together, in place of one for each datum.
    """

    def __init__(
        self, model: Program, guide: Program, batch: Batch, *, max_bytes: int = MAX_BYTES, joint: bool = False
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise ValueError(f"{name}: expected a Pyro program, called with the data, but got {program!r}")
        self.model, self.guide, self.batch, self.max_bytes, self.joint = model, guide, batch, max_bytes, joint
        self.plates: frozenset[str] = frozenset() if joint else data_plates(model, guide, batch)
        self.has_density = True  # of the guide: none is a point
        with untouched():
            traces = run_pair(model, guide, *batch.args, **batch.kwargs)
        self._check(*traces)
        sites = [site for trace in traces for _, site in sampled(trace)]
        self.nesting, self.enumerates = max_nesting(sites), any(map(is_enumerated, sites))
        # a guide that is a handler of its model runs as it is: one draw at a time, all data at once
        self.handler = isinstance(poutine.unwrap(guide), GuideMessenger)
        self.vectorized = not self.handler and self._vectorizes(batch.first(2) if self.divides(2) else batch)
        self.graphs = _Graphs(self)

    def _check(self, model_trace: Trace, guide_trace: Trace) -> None:
        latents = {name: site for name, site in sampled(model_trace) if not site["is_observed"]}
        for name, site in sampled(guide_trace):
            if not site["is_observed"] and name not in latents and not site["infer"].get("is_auxiliary"):
                raise ValueError(
                    f"guide: its site {name!r} is not in the model, so log q(z|x) is not known; expected no such site"
                )
        for name, site in latents.items():
            if name not in guide_trace.nodes and not is_enumerated(site):
                raise ValueError(f"guide: it has no site {name!r}, which the model samples; expected pyro.sample({name!r}, …)")
        self.auxiliary = auxiliary = any(site["infer"].get("is_auxiliary") for _, site in sampled(guide_trace))
        for name, site in sampled(guide_trace):
            if name in latents:
                self._check_site(site, latents[name])
                is_point = isinstance(unwrapped(site["fn"]), dist.Delta) and not isinstance(
                    unwrapped(latents[name]["fn"]), dist.Delta
                )
                self.has_density &= auxiliary or not is_point
        for side, trace in (("model", model_trace), ("guide", guide_trace)):
            for _, site in sampled(trace):
                if not self.joint:
                    check_whole(side, site, self.plates)
                    check_in_data_plate(side, site, self.plates)
                for frame in site["cond_indep_stack"]:
                    if frame.name in self.plates and frame.size != self.batch.num_rows:
                        raise ValueError(
                            f"{side}: plate {frame.name!r} draws {frame.size} of the {self.batch.num_rows} rows by itself, "
                            "others at each run, so no datum has a weight; expected a plate over the rows that are given"
                        )

    def _check_site(self, q: dict, p: dict) -> None:
        """Raise ``ValueError`` where guide and model put a latent in different places."""
        shapes = [tuple(site["fn"].event_shape) for site in (q, p)]
        dims = [[frame.dim for frame in site["cond_indep_stack"] if frame.vectorized] for site in (q, p)]
        if shapes[0] != shapes[1] or sorted(dims[0]) != sorted(dims[1]):
            raise ValueError(
                f"guide: {q['name']!r} has event shape {shapes[0]} in plates at {dims[0]}, but {shapes[1]} at {dims[1]} in the "
                "model; expected the same on both sides (pyro.plate(…, dim=…), .to_event)"
            )

    def chunks(self, num_particles: int) -> list[slice]:
        """The rows of the data that are to be taken at a time."""
        rows, self.at_once = self._sizes(num_particles)
        chunks = slices(self.batch.num_rows, rows)
        self.alike = Counter(chunk.stop - chunk.start for chunk in chunks)
        return chunks

    def of(self, rows: slice, num_particles: int) -> Tensor:
        """All log-weights of one chunk of the data: ``(num_particles, rows)``, the joint ones ``(num_particles,)``."""
        part = self.batch.rows(rows)
        # Pyro's own validation sees each datum once
        drawn = [self.weigh(part, num_particles % self.at_once or self.at_once)]
        rest = (num_particles - 1) // self.at_once
        weigh = self.graphs.of(part, self.at_once, rest * self.alike[rows.stop - rows.start]) if rest else self.weigh
        return torch.cat(drawn + [weigh(part, self.at_once) for _ in range(rest)])

    def weigh(self, batch: Batch, num_particles: int) -> Tensor:
        """Log-weights of some data, by eager Pyro: ``(num_particles, rows)``, the joint ones ``(num_particles,)``."""
        if self.vectorized:
            return self._once(batch, num_particles)
        return torch.cat([self._once(batch) for _ in range(num_particles)])

    def at(self, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        """Log-weights at given latents, that come as the sites take them: ``(rows,)``.

        :raises ValueError: where sites are summed out, or the guide does not tell its density at other values than its draws.
        """
        if self.enumerates or not self.has_density or self.auxiliary:
            raise ValueError(
                "guide: its density at given latents is not known, since it (or the model) has sites that are summed out, "
                "points, or auxiliary variables, as autoguides have; expected pyro.sample of a distribution for each latent"
            )
        return self._once(batch, None, values)[0]

    def _once(self, batch: Batch, num_particles: int | None = None, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """One run of the pair, in a plate of particles if they are given, its latents held at ``values`` if they are."""
        model, guide = self.model, self.guide
        if values is not None:
            model, guide = (poutine.condition(program, data=dict(values)) for program in (model, guide))
        if self.enumerates:  # the model's dimensions lie to the left of the guide's
            guide = EnumMessenger(first_available_dim=-2 - self.nesting)(guide)
            model = EnumMessenger()(model)
        if num_particles is not None:
            particles = pyro.plate(PARTICLES, num_particles, dim=-1 - self.nesting)
            model, guide = particles(model), particles(guide)
        p, q = run_pair(model, guide, *batch.args, **batch.kwargs)
        shape = (num_particles or 1,) if self.joint else (num_particles or 1, batch.num_rows)
        if self.enumerates:
            return sum_out([(q, -1), (p, 1)], self.plates | {PARTICLES}).expand(shape)
        dim = None if num_particles is None else -1 - self.nesting
        log_p, log_q = (sum_sites(trace, self.plates, particle_dim=dim) for trace in (p, q))
        if self.joint:
            total = log_p.shared_observed + log_p.shared_latent - log_q.shared_observed - log_q.shared_latent
        else:
            total = log_p.observed + log_p.latent - log_q.observed - log_q.latent
        return total.expand(shape)

    def _sizes(self, num_particles: int) -> tuple[int, int]:
        """Rows and particles of a chunk."""
        n = self.batch.num_rows
        probe = self.batch.first(8) if self.divides(8) else self.batch
        at_once = max(1, self.max_bytes // self._bytes(probe))  # rows × particles
        few = min(num_particles, _PARTICLES_AT_ONCE) if self.vectorized else 1
        rows = n
        kept = 4 * self.max_bytes // (32 * num_particles)  # rows whose weights, and copies of them, are few bytes
        if min(at_once // few, kept) < n:
            wanted = max(1, min(at_once // few, kept, n // 2))
            rows = wanted if self.divides(wanted) else n
        return rows, min(num_particles, max(1, at_once // rows)) if self.vectorized else 1

    def _bytes(self, batch: Batch) -> int:
        """Of the tensors that a run makes for one particle of one datum."""
        if not self.vectorized:
            return max(1, counted_bytes(lambda: self.weigh(batch, 1)) // batch.num_rows)
        few, many = (counted_bytes(partial(self.weigh, batch, num_particles)) for num_particles in (2, 4))
        return max(1, (many - few) // (2 * batch.num_rows))

    def _latents(self, batch: Batch) -> dict[str, dict]:
        """The latent sites of a run, those that would be summed out too."""
        traces = run_pair(self.model, self.guide, *batch.args, **batch.kwargs)
        return {name: site for trace in traces for name, site in sampled(trace) if not site["is_observed"]}

    def _padded(self, site: dict) -> Tensor:
        """A value with a dimension for each plate, so that those of particles lie to the left."""
        missing = self.nesting + site["fn"].event_dim - site["value"].dim()
        return site["value"].reshape((1,) * missing + site["value"].shape)

    def divides(self, n: int) -> bool:
        """Whether the pair says the same of n data alone as among others. A guide with parameters for each datum does not."""
        if self.joint or self.handler or 2 * n > self.batch.num_rows:
            return False
        try:
            with untouched(seed=0), pyro.validation_enabled(False):
                both, second = self.batch.first(2 * n), self.batch.rows(slice(n, 2 * n))
                sites = self._latents(both)
                values = {name: site["value"] for name, site in sites.items()}
                rows = {name: check_in_data_plate("pair", site, self.plates) for name, site in sites.items()}
                own = {name: value.narrow(rows[name] - sites[name]["fn"].event_dim, n, n) for name, value in values.items()}
                among, alone = self._once(both, None, values), self._once(second, None, own)
        except Exception:  # a pair for so many rows and no others
            return False
        return _agree(among[:, n:], alone)

    def _vectorizes(self, batch: Batch) -> bool:
        """Whether the pair runs in a plate of particles, and says the same there as in runs of its own."""
        try:
            with untouched(seed=0), pyro.validation_enabled(False):
                draws = [self._latents(batch) for _ in range(3)]  # not as many as there are data
                apart = [self._once(batch, None, {name: site["value"] for name, site in draw.items()}) for draw in draws]
                values = {name: torch.stack([self._padded(draw[name]) for draw in draws]) for name in draws[0]}
                together = self._once(batch, 3, values)
        except Exception:  # a network that knows no dimension to the left of the data's
            return False
        return _agree(together, torch.cat(apart))


class _Graphs:
    """Log-weights by graphs of tensor operations, for chunks of one shape that come again and again: a graph is held against
    eager Pyro at the same noise, and what cannot be one goes on as eager Pyro."""

    def __init__(self, weigher: Weigher) -> None:
        self.weigher = weigher
        self.ways: dict[Any, Callable[[Batch, int], Tensor]] = {}

    def of(self, batch: Batch, num_particles: int, times: int) -> Callable[[Batch, int], Tensor]:
        """How data like these are weighed best, if that is done so many times."""
        key = num_particles, *(tensor.shape for tensor in batch.leaves())
        if key not in self.ways:
            self.ways[key] = self._best(batch, num_particles, times)
        return self.ways[key]

    def _best(self, batch: Batch, num_particles: int, times: int) -> Callable[[Batch, int], Tensor]:
        if times < _GRAPH_FROM:
            return self.weigher.weigh
        tensors = batch.leaves()

        def eager(*given: Tensor) -> tuple[Tensor]:
            return (self.weigher.weigh(batch.with_leaves(given), num_particles),)

        try:
            graph = trace_graph(eager, tensors)
            by_inductor = times >= _INDUCTOR_FROM and has_compiler()
            way = self._held(compiled(graph, tensors) if by_inductor else graph, eager, tensors)
        except Exception as reason:  # what serves goes on to serve
            logger.info("log-weights run as eager Pyro: %s", reason)
            return self.weigher.weigh
        return lambda batch, _: way(*batch.leaves())[0]

    def _held(self, way: Callable[..., Any], eager: Callable[..., Any], tensors: list[Tensor]) -> Callable[..., Any]:
        """``way``, where it says what eager Pyro says at the same noise."""
        found = []
        for each in (way, eager):
            with untouched(seed=1):
                found.append(each(*tensors)[0])
        if not _agree(*found):
            raise CannotTrace("a graph of the log-weights differs from eager Pyro, as with noise that is not torch's")
        return way


class _Counted(TorchDispatchMode):
    """Counts the bytes of the tensors that are made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before:
                self.bytes += leaf.untyped_storage().nbytes()
        return made


def counted_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a run makes, which leaves no mark."""
    with untouched(), _Counted() as counted:
        run()
    return counted.bytes


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.double else 1e-4
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_particles(verb: str, num_particles: int) -> None:
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"{verb}: expected a whole number of particles or chains, 1 or more, but got {num_particles!r}")
