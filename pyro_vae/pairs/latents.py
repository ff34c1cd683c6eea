"""The latents of a datum as one vector, and log-probabilities at many such vectors at once. If latents are
shared by all data, the whole data set may be treated as one datum (``joint=True``)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data.batches import Batch
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.enumeration import PARTICLES, Held, Sites, is_enumerated, sum_out, values_of
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.structure import Structure, first_line, row_dim
from pyro_vae.pairs.traces import Program, prior_of, proposal, sampled, sum_sites

_CHUNK = 50  # draws of which densities given all rows are evaluated at once


def inspect_latents(
    model: Program, guide: Program | None, batch: Batch, *, verb: str, check: bool = True
) -> tuple["Latents", Batch]:
    """Check a pair, and return its latents and its batch. Without a guide, latents are drawn from the
    prior."""
    pair = inspect_checked(model, guide or prior_of(model), batch, verb=verb, check=check, per_datum=True)
    part_of_q = {name for name, _ in proposal(pair.traces[1])}
    for name, site in pair.guide_latents.items():
        if site["infer"].get("is_auxiliary") and name not in part_of_q:
            raise ValueError(
                f"guide: its site {name!r} is not in the model, so log q(z|x) without this site is not "
                f"known, and {verb} needs it; expected a guide without auxiliary sites. For this guide use "
                "log_weights, evaluate or importance, which need log q(z|x, u) only"
            )
    return Latents(pair), pair.batch


def mutual_information(pair: Structure, *, seed: int = 0) -> float:
    """I_q(x; z) of data and latents in nats, at most log N: the mean of log q(z|x) − log q(z) over the N rows
    of the pair's batch at one draw of z each, with q(z) the mean of q(z|x) over these rows (Hoffman & Johnson
    2016).

    :raises NotImplementedError: if the density of the guide at given latents is not known.
    """
    with untouched(training=False, seed=seed), torch.no_grad():
        latents = Latents(pair)
        z, log_q = latents.draw(pair.guide, pair.batch, 1)
        log_marginal = latents.log_aggregate(pair.guide, pair.batch, z[0])
        return (log_q[0].double() - log_marginal).mean().item()


class Site(NamedTuple):
    """A latent site.

    event: its event shape. plates: the size of each batch dimension, 1 if there is no plate. rows: the batch
    dimension of the data plate. dims: the other batch dimensions, whose elements belong to one datum. fn: the
    distribution of the site in the model. If all data are one datum, ``rows`` is a dimension of size 1 to the
    left of all plates.
    """

    event: torch.Size
    plates: tuple[int, ...]
    rows: int
    dims: tuple[int, ...]
    fn: Any
    dtype: torch.dtype

    @property
    def inner(self) -> tuple[int, ...]:
        """Sizes of the batch dimensions other than ``rows``."""
        return self.plates[: self.rows] + self.plates[len(self.plates) + self.rows + 1 :]

    @property
    def shape(self) -> torch.Size:
        """The shape of the value for one datum."""
        return torch.Size([self.plates[dim] for dim in self.dims]) + self.event


class Latents:
    """The latents of a pair as one vector z for each datum, ``(particles, batch, dim)``, and
    log-probabilities at given z. Sites that the model enumerates in parallel are summed out and are not part
    of z.

    For a joint structure all data are one datum: z contains all latents, the batch size is 1, and
    log-probabilities are sums over all data.

    :param pair: a structure from :func:`~pyro_vae.pairs.check.inspect_checked` with ``per_datum`` or
        ``joint``.
    :raises ValueError: if a latent lies in a sequential plate or in no data plate, unless ``pair`` is joint.
    """

    def __init__(self, pair: Structure) -> None:
        self.pair, self.plates, self.nesting, self.joint = pair, pair.plates, pair.nesting, pair.joint
        self.enumerates = any(map(is_enumerated, pair.latents.values()))
        self.sites: dict[str, Site] = {}
        for name, site in pair.latents.items():
            if not is_enumerated(site):
                self.sites[name] = self._site(name, site)
        self.dim = sum(site.shape.numel() for site in self.sites.values())

    def _site(self, name: str, site: dict) -> Site:
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        if len(frames) < len(site["cond_indep_stack"]) and not self.joint:
            raise ValueError(
                f"model: {name!r} lies in a sequential plate; expected a vectorized one, pyro.plate(…, "
                "dim=-2)"
            )
        rows, sizes = (
            -1 - self.nesting if self.joint else row_dim(site, self.plates),
            [1] * (self.nesting + self.joint),
        )
        if rows is None:
            raise ValueError(
                f"model: {name!r} lies in no data plate; expected it within pyro.plate over the rows of the "
                "data"
            )
        event, value = site["fn"].event_shape, site["value"]
        batch_shape = value.shape[max(0, value.dim() - len(event) - self.nesting) : value.dim() - len(event)]
        sizes[len(sizes) - len(batch_shape) :] = batch_shape  # also of dimensions that no plate declares
        for frame in frames:
            sizes[frame.dim] = self.pair.num_rows if frame.dim == rows else frame.size
        declared = {frame.dim for frame in frames}
        dims = [dim for dim in range(-self.nesting, 0) if dim != rows and (dim in declared or sizes[dim] > 1)]
        return Site(event, tuple(sizes), rows, tuple(dims), site["fn"], value.dtype)

    def num_rows(self, batch: Batch) -> int:
        """The number of data in a batch, 1 for a joint structure."""
        return 1 if self.joint else batch.num_rows

    def split(self, z: Tensor) -> Iterator[tuple[str, Site, Tensor]]:
        """Split z ``(*batch, dim)`` into the values of the sites, ``(*batch, *shape)`` each."""
        parts = z.split([site.shape.numel() for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            yield name, site, part.reshape(*z.shape[:-1], *site.shape)

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the sites in a plate of particles, from z ``(particles, batch, dim)``."""
        values = {}
        for name, site, part in self.split(z):
            # (particles, batch, other plates, event)
            rows = part.reshape(*z.shape[:2], *site.inner, *site.event)
            value = rows[:, 0] if self.joint else rows.movedim(1, 1 + self.nesting + site.rows)
            values[name] = value.to(site.dtype)
        return values

    def flat(self, values: Mapping[str, Tensor], num_particles: int, num_rows: int) -> Tensor:
        """z ``(particles, batch, dim)`` from values of the sites, with or without a particle dimension."""
        if not self.sites:
            raise ValueError(
                "model: it has no latent per datum, apart from those that are summed out; expected one"
            )
        for name in self.sites:
            if name not in values:
                raise ValueError(
                    f"guide: it has no site {name!r}, which the model samples; expected "
                    f"pyro.sample({name!r}, …)"
                )
        parts = (self.part(name, values[name], num_particles, num_rows) for name in self.sites)
        return torch.cat([part.reshape(num_particles, num_rows, -1) for part in parts], -1)

    def part(self, name: str, value: Tensor, num_particles: int, num_rows: int) -> Tensor:
        """The value of a site as ``(particles, batch, *shape)``, with or without a particle dimension."""
        site = self.sites[name]
        value = value.reshape((1,) * (1 + self.nesting + len(site.event) - value.dim()) + value.shape)
        rows = value.unsqueeze(1) if self.joint else value.movedim(1 + self.nesting + site.rows, 1)
        rows = rows.expand(num_particles, num_rows, *site.inner, *site.event)
        return rows.reshape(num_particles, num_rows, *site.shape)

    def run(
        self, program: Program, batch: Batch, num_particles: int, values: Mapping[str, Tensor] | None = None
    ) -> Trace:
        """A trace of ``num_particles`` runs at once. If ``values`` are given, these sites are fixed at them,
        and enumerated sites take all their possible values."""
        held = program if values is None else Held(values)(program)
        if self.enumerates and values is not None:
            held = EnumMessenger(first_available_dim=-2 - self.nesting)(held)
        with poutine.trace() as tracer, pyro.plate(PARTICLES, num_particles, dim=-1 - self.nesting):
            try:
                held(*batch.args, **batch.kwargs)
            except RuntimeError as error:  # an error of torch about shapes, such as in batch normalization
                raise ValueError(
                    f"pair: it does not run in a plate of particles: {first_line(error)}; expected code that "
                    "counts dimensions from the right: z[..., 0], dim=-1, reshape(*z.shape[:-1], …)"
                ) from error
        return tracer.trace

    def draw(self, guide: Program, batch: Batch, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws z of a guide, ``(particles, batch, dim)``, and log q(z|x) at these draws,
        ``(particles, batch)``."""
        trace = self.run(guide, batch, num_particles)
        shape = num_particles, self.num_rows(batch)
        z = self.flat(values_of(trace), *shape)
        # the run sampled one value of each site that the guide enumerates; log_q sums over all values
        if any(is_enumerated(site) for _, site in sampled(trace)):
            return z, self.log_q(guide, batch, z).expand(shape)
        latent, observed = self._sums(trace, proposal)
        return z, (latent + observed).expand(shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the dimensions of z: that of the site, or ``"z[0]", "z[1]", …`` if it has several."""
        sizes = {name: site.shape.numel() for name, site in self.sites.items()}
        return tuple(
            name if size == 1 else f"{name}[{i}]" for name, size in sizes.items() for i in range(size)
        )

    def by_site(self, z: Tensor) -> dict[str, Tensor]:
        """Split draws z ``(particles, batch, dim)`` by site, ``(particles, batch, *shape)`` each."""
        return {name: part.to(site.dtype) for name, site, part in self.split(z)}

    def distribution(self, guide: Program, batch: Batch) -> Any:
        """The distribution q(z|x) of a guide with one site; ``None`` for several sites, which may depend on
        each other."""
        if len(self.sites) > 1:
            return None
        (name,) = self.sites
        return poutine.trace(guide).get_trace(*batch.args, **batch.kwargs).nodes[name]["fn"]

    def log_joint(self, model: Program, batch: Batch, z: Tensor) -> Tensor:
        """log p(x, z). z: ``(particles, batch, dim)`` → ``(particles, batch)``."""
        return self._total(self.run(model, batch, len(z), self.values(z)), sampled).expand(len(z), z.shape[1])

    def log_q(self, guide: Program, batch: Batch, z: Tensor) -> Tensor:
        """log q(z|x). z: ``(particles, batch, dim)`` → ``(particles, batch)``. Raises ``NotImplementedError``
        if the density of the guide is known only at its draws, as for an autoguide."""
        if self.pair.guide is guide and self.pair.has_auxiliary:
            raise NotImplementedError(
                "guide: it has auxiliary sites, so its density at given latents is not known"
            )
        try:
            return self._total(self.run(guide, batch, len(z), self.values(z)), proposal).expand(
                len(z), z.shape[1]
            )
        except KeyError as error:  # from a transform that has no inverse except for its own draws
            raise NotImplementedError(
                f"guide: its density at given latents is not known: {first_line(error)}; a planar flow, for "
                "example, has no inverse"
            ) from error

    def log_prior_and_joint(self, model: Program, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x, z), ``(particles, batch)`` each, in one run of the model."""
        trace = self.run(model, batch, len(z), self.values(z))
        if self.enumerates:
            prior = trace.copy()
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and site["is_observed"]:
                    prior.remove_node(name)
            parts = [self._sum_out(each, sampled) for each in (prior, trace)]
        else:
            latent, observed = self._sums(trace, sampled)
            parts = [latent, latent + observed]
        log_prior, log_joint = (part.expand(len(z), z.shape[1]) for part in parts)
        return log_prior, log_joint

    def log_aggregate(self, guide: Program, batch: Batch, z: Tensor) -> Tensor:
        """log q(z) of the aggregate posterior q(z) = 1/N Σ_n q(z|x_n) over the rows of a batch, in nats.
        z: ``(n, dim)`` → ``(n,)``, in double precision. It takes n · N densities."""
        num_rows = self.num_rows(batch)
        parts = [
            self.log_q(guide, batch, part.unsqueeze(1).expand(-1, num_rows, -1)) for part in z.split(_CHUNK)
        ]
        return torch.cat(parts).double().logsumexp(1) - math.log(num_rows)

    def _total(self, trace: Trace, sites: Sites) -> Tensor:
        """Log-probability of all sites, ``(particles, batch)`` or a shape that broadcasts to it."""
        if self.enumerates:
            return self._sum_out(trace, sites)
        latent, observed = self._sums(trace, sites)
        return latent + observed

    def _sum_out(self, trace: Trace, sites: Sites) -> Tensor:
        total = sum_out([(trace, sites, 1)], self.plates | {PARTICLES})
        return total.unsqueeze(-1) if self.joint else total

    def _sums(self, trace: Trace, sites: Sites) -> tuple[Tensor, Tensor]:
        """Log-probabilities of latent and of observed sites, ``(particles, batch)`` or a shape that
        broadcasts to it."""
        sums = sum_sites(sites(trace), self.plates, particle_dim=-1 - self.nesting)
        if not self.joint:
            return sums.latent, sums.observed
        latent, observed = (
            part.unsqueeze(-1) if part.dim() else part for part in (sums.shared_latent, sums.shared_observed)
        )
        return latent, observed
