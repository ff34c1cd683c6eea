"""Exact posteriors of any Pyro model with one or two latent dimensions for each datum, by quadrature.

The trapezoid rule on the whole line converges faster than any power of the spacing for smooth integrands (Trefethen &
Weideman 2014), so a grid over the box that holds all the mass, refined until it agrees with itself, is exact to rounding.
"""

import logging
import math
from copy import copy, deepcopy
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.batches import Batch, as_arguments
from pyro_vae.latents import Site, inspect_latents
from pyro_vae.pair import Program, untouched
from pyro_vae.particles import values_of

logger = logging.getLogger(__name__)
_NEGLIGIBLE = 45.0  # nats below the highest point: e^-45 is below the rounding of the sum
_LEVELS = {1: (513, 2**17 + 1), 2: (65, 2**11 + 1)}  # points along an axis at first and at most


class Solution(NamedTuple):
    """The quadrature of some data, per datum. ``error``: an estimate of the error of ``log_evidence`` in nats, the change at
    the last halving of the spacing plus the mass in the box's outermost cells. It knows nothing of a mode so narrow that no
    point of the first grid was near it.

    points: ``(batch, G, d)`` in unconstrained space; weights: ``(batch, G)``, summing to 1.
    """

    log_evidence: Tensor
    error: Tensor
    points: Tensor
    weights: Tensor
    spacing: Tensor


class Grid:
    """A Pyro model with its posterior and evidence by quadrature: ``Grid(model)`` is that model, ``grid(x)`` runs it.

    :param model: any Pyro program whose latents lie in the data plate and have one or two continuous dimensions for each datum
        between them: a vector of two, or two numbers. Its networks run in evaluation mode.
    :param tolerance: nats; the spacing is halved until log p(x) of every datum changes by less, twice in a row.
    :param max_points: model evaluations at a time, which bounds the memory.

    A module is evaluated in double precision; a plain function in that of its own tensors, so give it double ones where the
    digits matter. Mass that lies closer to the upper end of an interval than its numbers can tell, as that of a Beta(0.1, 0.1)
    next to 1, is lost. Arguments are those of the model. Raises ``ValueError`` for a model that has no such posterior.

    >>> import pyro
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> grid = Grid(model)
    >>> x = torch.tensor([0.0, 1.0], dtype=torch.double)
    >>> bool((grid.log_evidence(x) - dist.Normal(0.0, 2**0.5).log_prob(x)).abs().max() < 1e-6)
    True
    >>> grid.posterior(x).mean.round(decimals=6).tolist()
    [0.0, 0.5]
    """

    def __init__(self, model: Program, *, tolerance: float = 1e-7, max_points: int = 2**21) -> None:
        self.model, self.tolerance, self.max_points = model, tolerance, max_points

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def log_evidence(self, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x) in nats, ``(batch,)``."""
        return self.solve(*args, **kwargs).log_evidence

    def posterior(self, *args: Any, **kwargs: Any) -> "GridPosterior":
        """p(z|x), of ``batch_shape (batch,)``; two numbers z₁, z₂ come as one vector, in the order the model draws them."""
        joint = _Joint(self.model, as_arguments(args, kwargs))
        return GridPosterior(joint, self._solve(joint))

    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        """The evidence with an estimate of its error, and the grid that it came from."""
        return self._solve(_Joint(self.model, as_arguments(args, kwargs)))

    @torch.no_grad()
    def _solve(self, joint: "_Joint") -> Solution:
        chunk = max(1, self.max_points // (16 * _LEVELS[joint.dim][0] ** joint.dim))
        parts = [self._solve_rows(joint.rows(i, i + chunk)) for i in range(0, joint.num_rows, chunk)]
        largest = max(part.points.shape[1] for part in parts)
        padded = [_padded(part, largest) for part in parts]
        return Solution(*(torch.cat(column) for column in zip(*padded, strict=True)))

    def _solve_rows(self, joint: "_Joint") -> Solution:
        first, most = _LEVELS[joint.dim]
        n, widenings = first, 0
        low, high = self._box(joint, n)
        levels = [self._level(joint, low, high, n)]
        while True:
            changes = [(a.log_evidence - b.log_evidence).abs() for a, b in pairwise(levels)]
            agree = len(changes) == 2 and all((change < self.tolerance).all() for change in changes)
            if agree and (levels[-1].error > self.tolerance).any() and widenings < 6:
                # the box cut mass off: widen it, and begin again
                middle, half = (low + high) / 2, high - low
                low, high, widenings = middle - half, middle + half, widenings + 1
                n, levels = first, [self._level(joint, low, high, first)]
                continue
            if agree or 2 * n - 1 > most:
                if not (changes[-1] < self.tolerance).all():
                    logger.warning("Grid: at %d points an axis log p(x) still changes by %.1e nats", n, changes[-1].max())
                # the middle one of three that agree is as good as the finest, and smaller
                return levels[-2]._replace(log_evidence=levels[-1].log_evidence, error=changes[-1] + levels[-1].error)
            n = 2 * n - 1
            levels = [*levels[-2:], self._level(joint, low, high, n)]

    def _level(self, joint: "_Joint", low: Tensor, high: Tensor, n: int) -> Solution:
        """The trapezoid rule on one grid; its ``error`` is the mass in the outermost cells."""
        points, log_f, spacing = self._evaluate(joint, low, high, n)
        log_mass = log_f + spacing.log().sum(-1, keepdim=True)
        log_evidence = log_mass.logsumexp(-1)
        weights = (log_mass - log_evidence.unsqueeze(-1)).exp()
        edge = ((points == low.unsqueeze(1)) | (points == high.unsqueeze(1))).any(-1)
        return Solution(log_evidence, (weights * edge).sum(-1), points, weights, spacing)

    def _box(self, joint: "_Joint", n: int) -> tuple[Tensor, Tensor]:
        """The box that holds all but a negligible part of each datum's mass: ``(batch, d)`` corners."""
        draws = joint.prior_draws(1000).clamp(-700.0, 700.0)  # a draw that underflowed lies at infinity
        centre, scale = draws.mean(0), draws.std(0).clamp_min(1e-6)
        for reach in (10.0, 20.0, 40.0, 80.0, 160.0):
            low, high = centre - reach * scale, centre + reach * scale
            outer_low, outer_high = low, high
            # before anything is cut off, the grid must see every mode: neighbours of the highest point within some nats of it
            fine = n
            points, log_f, spacing = self._evaluate(joint, low, high, fine)
            while 2 * fine - 1 <= _LEVELS[joint.dim][1] // joint.dim and not _resolved(log_f, fine, joint.dim):
                fine = 2 * fine - 1
                points, log_f, spacing = self._evaluate(joint, low, high, fine)
            for step in range(40):
                if step:
                    points, log_f, spacing = self._evaluate(joint, low, high, n)
                kept = log_f > log_f.max(-1, keepdim=True).values - _NEGLIGIBLE
                inside = torch.where(kept.unsqueeze(-1), points, math.nan)
                new_low = torch.maximum(inside.nan_to_num(math.inf).amin(1) - spacing, outer_low)
                new_high = torch.minimum(inside.nan_to_num(-math.inf).amax(1) + spacing, outer_high)
                settled = ((new_high - new_low) > 0.7 * (high - low)).all()
                low, high = new_low, new_high
                if settled:
                    break
            if (low > outer_low).all() and (high < outer_high).all():
                return low, high
        raise ValueError(
            "Grid: the posterior reaches further than 160 prior standard deviations, so no box holds it; expected a posterior "
            "with exponential tails (in the unconstrained space of its latents)"
        )

    def _evaluate(self, joint: "_Joint", low: Tensor, high: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Points ``(batch, G, d)``, log integrand ``(batch, G)`` and spacing ``(batch, d)`` of a grid of n points an axis."""
        steps = torch.linspace(0, 1, n, dtype=low.dtype, device=low.device)
        unit = torch.stack(torch.meshgrid(*[steps] * joint.dim, indexing="ij"), -1).reshape(-1, joint.dim)
        points = low.unsqueeze(1) + unit * (high - low).unsqueeze(1)
        size = max(1, self.max_points // joint.num_rows)
        log_f = torch.cat([joint.unconstrained(part) for part in points.split(size, 1)], 1)
        return points, log_f, (high - low) / (n - 1)


def _resolved(log_f: Tensor, n: int, dim: int) -> bool:
    """Whether the highest point of every datum has a neighbour along each axis less than 5 nats below it."""
    field = log_f.reshape(len(log_f), *[n] * dim)
    top = log_f.max(-1)
    for axis in range(1, dim + 1):
        beside = torch.maximum(field.roll(1, axis), field.roll(-1, axis)).reshape(len(log_f), -1)
        if (top.values - beside.gather(1, top.indices.unsqueeze(1)).squeeze(1) > 5).any():
            return False
    return True


def _padded(part: Solution, size: int) -> Solution:
    """Data that needed fewer points carry points of no weight."""
    batch, have, dim = part.points.shape
    points = torch.cat([part.points, part.points[:, :1].expand(batch, size - have, dim)], 1)
    return part._replace(points=points, weights=torch.nn.functional.pad(part.weights, (0, size - have)))


class _Joint:
    """log p(x, z) of some data as a function of z, the latents end to end in a vector of one or two numbers."""

    def __init__(self, model: Program, batch: Batch) -> None:
        if isinstance(model, torch.nn.Module):  # single precision would be heard in the seventh digit
            model = deepcopy(model).double()
            batch = batch.map(lambda part: part.double() if part.is_floating_point() else part)
        with untouched(training=False, seed=0), torch.no_grad():
            self.latents, batch = inspect_latents(model, None, batch, verb="Grid")
        self.model, self.batch, self.num_rows = model, batch, batch.num_rows
        self.dim = self.latents.dim
        self.transforms = {name: _transform(name, site) for name, site in self.latents.sites.items()}
        if self.dim not in (1, 2):
            raise ValueError(
                f"Grid: the model has {self.dim} latent dimensions a datum ({', '.join(self.transforms) or '-'}), and "
                "a grid is for one or two; expected a smaller latent, or an importance-weighted bound"
            )

    def rows(self, start: int, stop: int) -> "_Joint":
        """The same for some of the data."""
        part = copy(self)
        part.batch = self.batch.map(lambda tensor: tensor[start:stop])
        part.num_rows = part.batch.num_rows
        return part

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(x, z) in nats. z: ``(G, batch, dim)`` → ``(G, batch)``."""
        with untouched(training=False, seed=0), torch.no_grad():
            return self.latents.log_joint(self.model, self.batch, z).double()

    def unconstrained(self, u: Tensor) -> Tensor:
        """log of the integrand over unconstrained space. u: ``(batch, G, dim)`` → ``(batch, G)``."""
        u = u.movedim(1, 0)
        log_scale, z = torch.zeros((), dtype=u.dtype, device=u.device), []
        for name, _, part in self.latents.split(u):
            value = self.transforms[name](part)
            jacobian = self.transforms[name].log_abs_det_jacobian(part, value)
            log_scale = log_scale + jacobian.reshape(*u.shape[:-1], -1).sum(-1)
            z.append(value.reshape(*u.shape[:-1], -1))
        return (self.log_prob(torch.cat(z, -1)) + log_scale).nan_to_num(nan=-math.inf).movedim(0, 1)

    def prior_draws(self, n: int) -> Tensor:
        """Draws of z from the prior, unconstrained: ``(n, batch, dim)``."""
        with untouched(training=False, seed=0), torch.no_grad():
            z = self.latents.flat(values_of(self.latents.run(self.model, self.batch, n)), n, self.num_rows).double()
        parts = (self.transforms[name].inv(part).reshape(*z.shape[:-1], -1) for name, _, part in self.latents.split(z))
        return torch.cat(list(parts), -1)

    def constrained(self, u: Tensor) -> Tensor:
        """``(*batch, dim)`` from unconstrained space to that of the latents."""
        parts = (self.transforms[name](part).reshape(*u.shape[:-1], -1) for name, _, part in self.latents.split(u))
        return torch.cat(list(parts), -1)


def _transform(name: str, site: Site) -> Any:
    """From unconstrained space to the support of a latent."""
    support = site.fn.support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):  # a mixture lives where its components do
        support = support.base_constraint
    if support.is_discrete:
        raise ValueError(f"Grid: {name!r} is discrete ({support}); expected continuous latents: sum it out in the model")
    transform = biject_to(support)
    if transform.inverse_shape(site.shape) != site.shape:
        raise ValueError(f"Grid: {name!r} has support {support} of fewer dimensions than its event; expected e.g. a logit")
    return transform


class GridPosterior(dist.TorchDistribution):
    """p(z|x) of a :class:`Grid`: its density is log p(x, z) − log p(x), by the model itself; its moments are sums over the
    grid; its draws are uniform within the grid's cells, whose size is that of the last refinement."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    def __init__(self, joint: _Joint, solution: Solution) -> None:
        self.joint, self.solution = joint, solution
        shapes = [site.shape for site in joint.latents.sites.values()]
        event = shapes[0] if len(shapes) == 1 else torch.Size((joint.dim,))
        super().__init__(torch.Size((joint.num_rows,)), event, validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """z: ``(*sample, batch, *event)`` → ``(*sample, batch)``."""
        shape = torch.broadcast_shapes(z.shape, self.shape())
        flat = z.expand(shape).reshape(-1, *self.batch_shape, self.joint.dim)
        with torch.no_grad():
            log_joint = self.joint.log_prob(flat)
        return (log_joint - self.solution.log_evidence).reshape(shape[: len(shape) - len(self.event_shape)])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        n = torch.Size(sample_shape).numel()
        cell = torch.multinomial(self.solution.weights, n, replacement=True).unsqueeze(-1)
        at = self.solution.points.gather(1, cell.expand(-1, -1, self.joint.dim))
        at = at + (torch.rand_like(at) - 0.5) * self.solution.spacing.unsqueeze(1)
        z = self.joint.constrained(at.movedim(1, 0))
        return z.reshape(*sample_shape, *self.shape())

    def _moment(self, values: Tensor) -> Tensor:
        return (self.solution.weights.reshape(*self.solution.weights.shape, *[1] * (values.dim() - 2)) * values).sum(1)

    @property
    def mean(self) -> Tensor:
        return self._moment(self._values).reshape(self.shape())

    @property
    def covariance_matrix(self) -> Tensor:
        """``(batch, d, d)``."""
        centred = self._values - self._moment(self._values).unsqueeze(1)
        return self._moment(centred.unsqueeze(-1) * centred.unsqueeze(-2))

    @property
    def variance(self) -> Tensor:
        return self.covariance_matrix.diagonal(dim1=-2, dim2=-1).reshape(self.shape())

    @property
    def _values(self) -> Tensor:
        return self.joint.constrained(self.solution.points)
