"""Many draws of a pair at once: an outermost plate of particles, and the latents of each datum end to end in one vector."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.pair import Program, data_plates, sampled, sum_sites, sum_to, untouched

PARTICLES = "_particles"  # the name of their plate


def _nothing(*_: Any, **__: Any) -> None:
    """A guide that draws nothing."""


class Site(NamedTuple):
    """A latent of each datum: its event shape, the sizes of the plates within the datum (1 where there is none) with that of
    the data at ``rows``, its distribution in the model, its dtype."""

    event: torch.Size
    plates: tuple[int, ...]
    rows: int
    fn: Any
    dtype: torch.dtype

    @property
    def inner(self) -> tuple[int, ...]:
        """Sizes of the plates within the datum."""
        return self.plates[: self.rows] + self.plates[len(self.plates) + self.rows + 1 :]

    @property
    def shape(self) -> torch.Size:
        """Of the values of one datum."""
        return torch.Size([size for size in self.inner if size > 1]) + self.event


class Latents:
    """The latents of a model on some data, each datum's end to end in a vector z: ``(particles, batch, dim)``. Sites that the
    model enumerates in parallel are none of them: they are summed out.

    :raises ValueError: for a site outside the data plate, which leaves no evidence per datum.
    """

    def __init__(self, model: Program, batch: Batch) -> None:
        self.plates = data_plates(model, _nothing, batch)
        with untouched(training=False), torch.no_grad():
            sites = [site for _, site in sampled(poutine.trace(model).get_trace(*batch.args, **batch.kwargs))]
        self.nesting = max_nesting(sites)
        self.enumerates = any(map(is_enumerated, sites))
        self.sites: dict[str, Site] = {}
        for site in sites:
            self._take(site)
        self.dim = sum(site.shape.numel() for site in self.sites.values())

    def _take(self, site: dict) -> None:
        name, frames = site["name"], [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        rows = check_in_data_plate("model", site, self.plates)
        check_whole("model", site, self.plates)
        if site["is_observed"] or is_enumerated(site):
            return
        if len(frames) < len(site["cond_indep_stack"]):
            raise ValueError(f"model: {name!r} lies in a sequential plate; expected a vectorized one, pyro.plate(…, dim=-2)")
        sizes = [1] * self.nesting
        for frame in frames:
            sizes[frame.dim] = frame.size
        self.sites[name] = Site(site["fn"].event_shape, tuple(sizes), rows, site["fn"], site["value"].dtype)

    def split(self, z: Tensor) -> Iterator[tuple[str, Site, Tensor]]:
        """Each site's part of z ``(*batch, dim)``, ``(*batch, *shape)``."""
        parts = z.split([site.shape.numel() for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            yield name, site, part.reshape(*z.shape[:-1], *site.shape)

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """z ``(particles, batch, dim)`` as the sites take it under a plate of particles."""
        values = {}
        for name, site, part in self.split(z):
            rows = part.reshape(*z.shape[:2], *site.inner, *site.event)  # (particles, batch, plates within, event)
            values[name] = rows.movedim(1, 1 + self.nesting + site.rows).to(site.dtype)
        return values

    def flat(self, values: Mapping[str, Tensor], num_particles: int, num_rows: int) -> Tensor:
        """The vector of each datum, from values as sites have them, with particles or without: ``(particles, batch, dim)``."""
        parts = []
        for name, site in self.sites.items():
            if name not in values:
                raise ValueError(f"guide: it has no site {name!r}, which the model samples; expected pyro.sample({name!r}, …)")
            value = values[name]
            value = value.reshape((1,) * (1 + self.nesting + len(site.event) - value.dim()) + value.shape)
            rows = value.movedim(1 + self.nesting + site.rows, 1)
            rows = rows.expand(num_particles, num_rows, *site.inner, *site.event)
            parts.append(rows.reshape(num_particles, num_rows, site.shape.numel()))
        return torch.cat([part.to(parts[0].dtype) for part in parts], -1)

    def run(self, program: Program, batch: Batch, num_particles: int, values: Mapping[str, Tensor] | None = None) -> Trace:
        """A trace of ``num_particles`` runs at once: of draws, or with the named sites held at ``values``, and what is
        enumerated at each of its own."""
        held = program if values is None else Held(values)(program)
        if self.enumerates and values is not None:
            held = EnumMessenger(first_available_dim=-2 - self.nesting)(held)
        with poutine.trace() as tracer, pyro.plate(PARTICLES, num_particles, dim=-1 - self.nesting):
            held(*batch.args, **batch.kwargs)
        return tracer.trace

    def draw(self, guide: Program, batch: Batch, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws z of a guide ``(particles, batch, dim)``, and log q(z|x) of them ``(particles, batch)``."""
        trace = self.run(guide, batch, num_particles)
        z = self.flat(values_of(trace), num_particles, batch.num_rows)
        log_q = self.log_prob(guide, batch, z) if self.enumerates else self._local(trace)
        return z, log_q.expand(num_particles, batch.num_rows)

    def distribution(self, guide: Program, batch: Batch) -> Any:
        """q(z|x) itself, of a guide of one site; ``None`` of several, which may depend on each other."""
        if len(self.sites) > 1:
            return None
        (name,) = self.sites
        return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs).nodes[name]["fn"]

    def log_prob(self, program: Program, batch: Batch, z: Tensor) -> Tensor:
        """log-probability of a program at z: log p(x, z) of a model, log q(z|x) of a guide. ``(particles, batch, dim)`` →
        ``(particles, batch)``."""
        return self._local(self.run(program, batch, len(z), self.values(z))).expand(len(z), z.shape[1])

    def log_prior_and_joint(self, model: Program, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x, z), ``(particles, batch)`` each, in one run of the model."""
        trace = self.run(model, batch, len(z), self.values(z))
        if self.enumerates:
            prior = trace.copy()
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and site["is_observed"]:
                    prior.remove_node(name)
            parts = [sum_out([(each, 1)], self.plates | {PARTICLES}) for each in (prior, trace)]
        else:
            sums = sum_sites(trace, self.plates, particle_dim=-1 - self.nesting)
            parts = [sums.latent, sums.latent + sums.observed]
        log_prior, log_joint = (part.expand(len(z), z.shape[1]) for part in parts)
        return log_prior, log_joint

    def _local(self, trace: Trace) -> Tensor:
        """log-probability of all sites, ``(particles, batch)`` or what broadcasts to it."""
        for name, site in sampled(trace):
            if not site["is_observed"] and name not in self.sites and not is_enumerated(site):
                raise ValueError(
                    f"guide: its site {name!r} is not in the model, so log q(z|x) is not known; expected no such site"
                )
            check_in_data_plate("guide", site, self.plates)
        if self.enumerates:
            return sum_out([(trace, 1)], self.plates | {PARTICLES})
        sums = sum_sites(trace, self.plates, particle_dim=-1 - self.nesting)
        return sums.latent + sums.observed


class Held(Messenger):
    """A handler under which the named sites have these values, and go on to count as latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def unwrapped(distribution: Any) -> Any:
    """What lies under ``to_event`` and ``expand``."""
    while isinstance(distribution, torch.distributions.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


def values_of(trace: Trace) -> dict[str, Tensor]:
    """The values of a trace's latent sites."""
    return {name: site["value"] for name, site in sampled(trace) if not site["is_observed"]}


def max_nesting(sites: Sequence[dict]) -> int:
    """The number of dimensions that plates take."""
    return max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=1)


def is_enumerated(site: dict) -> bool:
    """Whether a site is one to sum out."""
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def check_in_data_plate(side: str, site: dict, plates: frozenset[str]) -> int:
    """The dimension of a site's data plate. Raises ``ValueError`` where there is none, but for a site of log-probability 0."""
    for frame in site["cond_indep_stack"]:
        if frame.name in plates and frame.vectorized:
            return frame.dim
    if site["is_observed"] and not site["fn"].log_prob(site["value"]).any():
        return -1
    raise ValueError(
        f"{side}: {site['name']!r} lies in no data plate, so there is no evidence per datum; expected it within "
        'pyro.plate("data", len(x)) over the rows of the data (joint_log_weights takes latents that all data share)'
    )


def check_whole(side: str, site: dict, plates: frozenset[str]) -> None:
    """Raise ``ValueError`` for a plate within a datum that subsamples."""
    for frame in site["cond_indep_stack"]:
        if frame.name not in plates and frame.full_size != frame.size:
            raise ValueError(
                f"{side}: {site['name']!r} lies in plate {frame.name!r} that draws {frame.size} of its {frame.full_size} rows, "
                "and no weight of them estimates the evidence of all; expected all of its rows"
            )


def sum_out(traces: Sequence[tuple[Trace, int]], plates: frozenset[str]) -> Tensor:
    """log Σ over the enumerated sites of Π f, by variable elimination: f are the probabilities of the sites of each trace, to
    the power of its sign. Of a trace of sign −1 what is enumerated counts as 1: a mean of p/q over q is a sum of p.

    Scales are stripped, masks kept.

    :param traces: the first is that of the guide, run under ``EnumMessenger(first_available_dim)``, the next under
        ``EnumMessenger()``, so that they do not share dimensions.
    :param plates: those that are kept, of particles and of data: ``(particles, batch)``, whatever their order.
    """
    factors: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    symbols: dict[str, str] = {}
    kept: dict[str, Any] = {}
    for trace, sign in traces:
        trace.symbolize_dims(symbols)
        for _, site in sampled(trace):
            if sign < 0 and is_enumerated(site):
                continue
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            for frame in frames:
                if frame.name in plates:
                    kept[frame.name] = frame
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            masked = scale_and_mask(log_prob, mask=site["mask"])
            dim = site["infer"].get("_enumerate_dim")
            if dim is not None and site["mask"] is not None:  # what is masked sums to 1, as it would integrate
                size = site["value"].shape[dim - site["fn"].event_dim]
                masked = torch.where(torch.as_tensor(site["mask"], device=masked.device), log_prob, -math.log(size))
            term = packed.pack(sign * masked, site["infer"]["_dim_to_symbol"])
            factors.setdefault(frozenset(symbols[frame.name] for frame in frames), []).append(term)
    of_plates = set(symbols.values())
    summed = {dim for terms in factors.values() for term in terms for dim in term._pyro_dims} - of_plates  # type: ignore[attr-defined]
    dims = {symbols[name]: frame.dim for name, frame in kept.items()}
    sizes = {symbols[name]: frame.size for name, frame in kept.items()}
    total = contract_to_tensor(factors, summed, target_ordinal=frozenset(dims), ring=LogRing(dim_to_size=sizes))
    order = sorted(kept.values(), key=lambda frame: frame.name != PARTICLES)
    return sum_to(packed.unpack(total, dims), [frame.dim for frame in order])
