"""Many draws of a pair at once: an outermost plate of particles, and the latents of each datum end to end in one vector."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.pair import Program, SiteSums, data_plates, sampled, sum_sites, untouched


def _nothing(*_: Any, **__: Any) -> None:
    """A guide that draws nothing."""


class Site(NamedTuple):
    """A latent of each datum: its event shape, the dimension of its data plate, its distribution in the model, its dtype."""

    shape: torch.Size
    rows: int
    fn: Any
    dtype: torch.dtype


class Latents:
    """The latents of a model on some data, each datum's end to end in a vector z: ``(particles, batch, dim)``.

    :raises ValueError: for a site outside the data plate, which leaves no evidence per datum, or a latent in a plate within it.
    """

    def __init__(self, model: Program, batch: Batch) -> None:
        self.plates = data_plates(model, _nothing, batch)
        with untouched(training=False), torch.no_grad():
            sites = [site for _, site in sampled(poutine.trace(model).get_trace(*batch.args, **batch.kwargs))]
        self.nesting = max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=1)
        self.sites: dict[str, Site] = {}
        for site in sites:
            self._take(site)
        self.dim = sum(site.shape.numel() for site in self.sites.values())

    def _take(self, site: dict) -> None:
        name, frames = site["name"], site["cond_indep_stack"]
        rows = [frame.dim for frame in frames if frame.name in self.plates and frame.vectorized]
        if not rows:
            raise ValueError(
                f"model: {name!r} lies in no data plate, so there is no evidence per datum; expected it within "
                'pyro.plate("data", len(x)) over the rows of the data'
            )
        if site["is_observed"]:
            return
        if len(frames) > 1:
            raise ValueError(f"model: {name!r} lies in a plate within the data plate; expected a vector with .to_event(1)")
        self.sites[name] = Site(site["fn"].event_shape, rows[0], site["fn"], site["value"].dtype)

    def split(self, z: Tensor) -> Iterator[tuple[str, Site, Tensor]]:
        """Each site's part of z ``(*batch, dim)``, ``(*batch, *event)``."""
        parts = z.split([site.shape.numel() for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            yield name, site, part.reshape(*z.shape[:-1], *site.shape)

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """z ``(particles, batch, dim)`` as the sites take it under a plate of particles."""
        values = {}
        for name, site, part in self.split(z):
            batch = [len(z)] + [part.shape[1] if dim == site.rows else 1 for dim in range(-self.nesting, 0)]
            values[name] = part.reshape(*batch, *site.shape).to(site.dtype)
        return values

    def flat(self, trace: Trace, num_particles: int, num_rows: int) -> Tensor:
        """The vector of each datum in a trace of particles: ``(particles, batch, dim)``."""
        parts = []
        for name, site in self.sites.items():
            if name not in trace.nodes:
                raise ValueError(f"guide: it has no site {name!r}, which the model samples; expected pyro.sample({name!r}, …)")
            value = trace.nodes[name]["value"]
            value = value.reshape((1,) * (1 + self.nesting + len(site.shape) - value.dim()) + value.shape)
            rows = value.movedim((0, site.rows - len(site.shape)), (0, 1))
            parts.append(rows.reshape(rows.shape[0], rows.shape[1], -1).expand(num_particles, num_rows, site.shape.numel()))
        return torch.cat([part.to(parts[0].dtype) for part in parts], -1)

    def run(self, program: Program, batch: Batch, num_particles: int, values: Mapping[str, Tensor] | None = None) -> Trace:
        """A trace of ``num_particles`` runs at once, the named sites held at ``values``."""
        held = poutine.condition(program, data=dict(values)) if values else program
        with poutine.trace() as tracer, pyro.plate("_particles", num_particles, dim=-1 - self.nesting):
            held(*batch.args, **batch.kwargs)
        return tracer.trace

    def draw(self, guide: Program, batch: Batch, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws z of a guide ``(particles, batch, dim)``, and log q(z|x) of them ``(particles, batch)``."""
        trace = self.run(guide, batch, num_particles)
        sums = self._local(trace)
        z = self.flat(trace, num_particles, batch.num_rows)
        return z, (sums.latent + sums.observed).expand(num_particles, batch.num_rows)

    def distribution(self, guide: Program, batch: Batch) -> Any:
        """q(z|x) itself, of a guide of one site; ``None`` of several, which may depend on each other."""
        if len(self.sites) > 1:
            return None
        (name,) = self.sites
        return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs).nodes[name]["fn"]

    def log_prob(self, program: Program, batch: Batch, z: Tensor) -> Tensor:
        """log-probability of a program at z: log p(x, z) of a model, log q(z|x) of a guide. ``(particles, batch, dim)`` →
        ``(particles, batch)``."""
        return self._local(self.run(program, batch, len(z), self.values(z))).observed.expand(len(z), z.shape[1])

    def _local(self, trace: Trace) -> SiteSums:
        for name, site in sampled(trace):
            if not site["is_observed"] and name not in self.sites:
                raise ValueError(
                    f"guide: its site {name!r} is not in the model, so log q(z|x) is not known; expected no such site"
                )
        sums = sum_sites(trace, self.plates, particle_dim=-1 - self.nesting)
        if sums.shared_observed.any() or sums.shared_latent.any():
            raise ValueError(
                "guide: it has log-probabilities outside the data plate, so there is none per datum; expected its sites within "
                'pyro.plate("data", len(x))'
            )
        return sums
