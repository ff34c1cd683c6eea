"""Exact posteriors of any Pyro model with one or two latent dimensions for each datum, by quadrature.

A box that holds all the mass is divided into cells, each with a Clenshaw–Curtis rule. The difference to the rule of half the
nodes estimates the error of a cell, and the cells with the largest errors are halved until the sum is below the tolerance, so
that points concentrate around each mode of the posterior.
"""

import logging
import math
from copy import copy, deepcopy
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.data.batches import Batch, as_arguments
from pyro_vae.pairs.enumeration import values_of
from pyro_vae.pairs.latents import Site, inspect_latents
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program

logger = logging.getLogger(__name__)
_NODES = 13  # points of a cell along an axis: 4 k + 1
_CELLS = {1: 128, 2: 8}  # cells along an axis at first
_MOST = {1: 2**17, 2: 2**21}  # points of a datum at most


class Solution(NamedTuple):
    """The quadrature of some data, per datum. ``error``: an estimate of the error of ``log_evidence`` in nats, the sum of the
    errors of all cells plus the mass at the edges of the box. It does not include a mode so narrow that no point of the cells
    around it was near it.

    points: ``(batch, G, d)`` in unconstrained space; weights: ``(batch, G)``, summing to 1; spacing: ``(batch, G, d)``, the
    sides of the small box around each point.
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
    :param tolerance: nats; cells are halved until the error of log p(x) of every datum is estimated as less, twice in a row. If
        that takes too many points, a warning gives the error that is left.
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
        chunk = max(1, self.max_points // (4 * (_CELLS[joint.dim] * _NODES) ** joint.dim))
        parts = [self._solve_rows(joint.rows(i, i + chunk)) for i in range(0, joint.num_rows, chunk)]
        largest = max(part.points.shape[1] for part in parts)
        padded = [_padded(part, largest) for part in parts]
        return Solution(*(torch.cat(column) for column in zip(*padded, strict=True)))

    def _solve_rows(self, joint: "_Joint") -> Solution:
        draws = joint.prior_draws(1000).clamp(-700.0, 700.0)  # a draw that underflowed lies at infinity
        centre, scale = draws.mean(0), draws.std(0).clamp_min(1e-6)
        reach = torch.full_like(scale, 10.0)
        while (reach <= 160).all():
            solution, edge = self._refined(_Box(joint, centre, reach * scale, self.max_points))
            cut = (
                edge > 1e-6 * self.tolerance
            )  # the mass beyond the edge may be much more than that at its nodes
            if not cut.any():
                if (solution.error > self.tolerance).any():
                    logger.warning(
                        "Grid: with %d points the error of log p(x) is still %.1e nats",
                        solution.points.shape[1],
                        solution.error.max(),
                    )
                return solution._replace(error=solution.error + edge.sum(1))
            reach = torch.where(cut, 2 * reach, reach)
        raise ValueError(
            "Grid: the posterior reaches further than 160 prior standard deviations, so no box holds it; expected a posterior "
            "with exponential tails (in the unconstrained space of its latents)"
        )

    def _refined(self, box: "_Box") -> tuple[Solution, Tensor]:
        """The quadrature over a box, and the mass at its edges along each axis, ``(batch, d)``."""
        cells, most = box.first_cells(), _MOST[box.dim] // _NODES**box.dim
        while True:
            log_evidence = cells.log_mass.logsumexp((1, 2))
            log_error = torch.maximum(cells.log_error.logsumexp(-1), cells.log_before.squeeze(-1))
            error = (log_error - log_evidence.unsqueeze(-1)).exp()
            split = _largest(error, self.tolerance)
            split &= (cells.used.sum(1) + split.sum(1) <= most).unsqueeze(-1)
            if not split.any():
                break
            parts = [cells.select(~split & cells.used), *box.halves(cells.select(split))]
            cells = _Cells(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))
        points, spacing = box.nodes(cells.low, cells.width)
        weights = (cells.log_mass - log_evidence[:, None, None]).exp().flatten(1)
        outermost = (points - box.centre).abs() + spacing / 2 >= box.scale
        edge = (weights.unsqueeze(-1) * outermost).sum(1)
        return Solution(log_evidence, error.sum(1), points, weights, spacing), edge


class _Cells(NamedTuple):
    """Cells of the box [−1, 1]^d of each datum, C of them.

    low, width: the corner and the sides, ``(batch, C, d)``.
    log_mass: log of weight times integrand at each node, ``(batch, C, nodes)``; −∞ for cells that are padding.
    log_error: log of the estimated error along each axis, ``(batch, C, d)``.
    log_before: log of the estimated error one refinement earlier, ``(batch, C, 1)``.
    """

    low: Tensor
    width: Tensor
    log_mass: Tensor
    log_error: Tensor
    log_before: Tensor

    @property
    def used(self) -> Tensor:
        """Where a cell has mass: ``(batch, C)``."""
        return (self.log_mass > -math.inf).any(-1)

    def only(self, mask: Tensor) -> "_Cells":
        """The same cells, those outside the mask as padding."""
        return _Cells(
            self.low, self.width, *(part.masked_fill(~mask.unsqueeze(-1), -math.inf) for part in self[2:])
        )

    def select(self, mask: Tensor) -> "_Cells":
        """The cells in the mask, padded to the largest number of them in a datum."""
        first = mask.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(mask.sum(1).max())]
        parts = (part.gather(1, first.unsqueeze(-1).expand(-1, -1, part.shape[-1])) for part in self)
        return _Cells(*parts).only(mask.gather(1, first))


class _Box:
    """A product Clenshaw–Curtis rule on each cell of a box in unconstrained space, centre ± scale, both ``(batch, d)``."""

    def __init__(self, joint: "_Joint", centre: Tensor, scale: Tensor, max_points: int) -> None:
        self.joint, self.dim, self.max_points = joint, joint.dim, max_points
        self.centre, self.scale = centre.unsqueeze(1), scale.unsqueeze(1)
        self.steps, self.shares = (part.to(centre) for part in _clenshaw_curtis(_NODES - 1))
        coarse = torch.zeros_like(self.shares)
        coarse[::2] = _clenshaw_curtis(_NODES // 2)[1].to(centre)
        self.difference = (
            1 - coarse / self.shares
        )  # times the weights of the rule: the rule minus the one of half the nodes

    def nodes(self, low: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """The points of cells and the lengths that they are weighted by: ``(batch, C · nodes, d)`` each."""
        steps, shares = (
            torch.cartesian_prod(*[part] * self.dim).view(-1, self.dim) for part in (self.steps, self.shares)
        )
        at, length = (
            (low.unsqueeze(2) + width.unsqueeze(2) * steps).flatten(1, 2),
            (width.unsqueeze(2) * shares).flatten(1, 2),
        )
        return self.centre + self.scale * at, self.scale * length

    def cells(self, low: Tensor, width: Tensor) -> _Cells:
        """Evaluate the model at the nodes of cells."""
        points, spacing = self.nodes(low, width)
        size = max(1, self.max_points // self.joint.num_rows)
        log_f = torch.cat([self.joint.unconstrained(part) for part in points.split(size, 1)], 1)
        log_mass = (log_f + spacing.log().sum(-1)).unflatten(1, (low.shape[1], -1))
        top = log_mass.amax(-1, keepdim=True).clamp_min(torch.finfo(log_mass.dtype).min)
        bottom = log_mass.masked_fill(log_mass == -math.inf, math.inf).amin(-1, keepdim=True)
        mass = (log_mass - top).exp().unflatten(2, (_NODES,) * self.dim)
        along = [mass.movedim(2 + axis, 2).reshape(*low.shape[:2], _NODES, -1) for axis in range(self.dim)]
        log_error = torch.stack([(self.difference @ part).sum(-1).abs().log() for part in along], -1)
        # a peak between the nodes of a cell is higher than they are: if it is Gaussian, by less than this
        log_error = log_error + top + (top - bottom).clamp_min(0) / _NODES
        return _Cells(low, width, log_mass, log_error, log_mass.logsumexp(-1, keepdim=True))

    def first_cells(self) -> _Cells:
        count = _CELLS[self.dim]
        corners = torch.linspace(-1, 1, count + 1, dtype=self.scale.dtype, device=self.scale.device)[:-1]
        low = torch.cartesian_prod(*[corners] * self.dim).view(1, -1, self.dim).repeat(len(self.scale), 1, 1)
        return self.cells(low, torch.full_like(low, 2 / count))

    def halves(self, cells: _Cells) -> list[_Cells]:
        """The two halves of each cell along its axis of larger error."""
        axis = torch.nn.functional.one_hot(cells.log_error.argmax(-1), self.dim)
        width, before = (
            cells.width * (1 - axis / 2),
            cells.log_error.logsumexp(-1, keepdim=True) - math.log(2),
        )
        both = [self.cells(low, width) for low in (cells.low, cells.low + axis * width)]
        return [half._replace(log_before=before).only(cells.used) for half in both]


def _clenshaw_curtis(n: int) -> tuple[Tensor, Tensor]:
    """n + 1 nodes and weights on [0, 1], n even; every second node is one of the rule for n / 2 (Clenshaw & Curtis 1960)."""
    angle = math.pi / n * torch.arange(n + 1, dtype=torch.double)
    k = torch.arange(1, n // 2 + 1, dtype=torch.double)
    factors = torch.where(k < n / 2, 2.0, 1.0) / (4 * k**2 - 1)
    weights = (1 - ((2 * k * angle.unsqueeze(-1)).cos() * factors).sum(-1)) / n
    weights[[0, -1]] /= 2
    return (1 - angle.cos()) / 2, weights


def _largest(error: Tensor, tolerance: float) -> Tensor:
    """The largest errors, without which the others sum to at most half the tolerance; none if all sum to the tolerance."""
    rising = error.sort(1)
    sums = rising.values.cumsum(1)
    large = (sums > tolerance / 2) & (sums[:, -1:] > tolerance)
    return torch.zeros_like(large).scatter(1, rising.indices, large)


def _padded(part: Solution, size: int) -> Solution:
    """Data that needed fewer points carry points of no weight."""
    batch, have, dim = part.points.shape
    points = torch.cat([part.points, part.points[:, :1].expand(batch, size - have, dim)], 1)
    spacing = torch.nn.functional.pad(part.spacing, (0, 0, 0, size - have))
    return part._replace(
        points=points, weights=torch.nn.functional.pad(part.weights, (0, size - have)), spacing=spacing
    )


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
            z = self.latents.flat(
                values_of(self.latents.run(self.model, self.batch, n)), n, self.num_rows
            ).double()
        parts = (
            self.transforms[name].inv(part).reshape(*z.shape[:-1], -1)
            for name, _, part in self.latents.split(z)
        )
        return torch.cat(list(parts), -1)

    def constrained(self, u: Tensor) -> Tensor:
        """``(*batch, dim)`` from unconstrained space to that of the latents."""
        parts = (
            self.transforms[name](part).reshape(*u.shape[:-1], -1) for name, _, part in self.latents.split(u)
        )
        return torch.cat(list(parts), -1)


def _transform(name: str, site: Site) -> Any:
    """From unconstrained space to the support of a latent."""
    support = site.fn.support
    if isinstance(
        support, constraints.MixtureSameFamilyConstraint
    ):  # a mixture lives where its components do
        support = support.base_constraint
    if support.is_discrete:
        raise ValueError(
            f"Grid: {name!r} is discrete ({support}); expected continuous latents: sum it out in the model"
        )
    transform = biject_to(support)
    if transform.inverse_shape(site.shape) != site.shape:
        raise ValueError(
            f"Grid: {name!r} has support {support} of fewer dimensions than its event; expected e.g. a logit"
        )
    return transform


class GridPosterior(dist.TorchDistribution):
    """p(z|x) of a :class:`Grid`: its density is log p(x, z) − log p(x), by the model itself; its moments are sums over the
    grid; its draws are uniform within the small box around a point, whose size is that of the last refinement."""

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
        at, length = (
            part.gather(1, cell.expand(-1, -1, self.joint.dim))
            for part in (self.solution.points, self.solution.spacing)
        )
        at = at + (torch.rand_like(at) - 0.5) * length
        z = self.joint.constrained(at.movedim(1, 0))
        return z.reshape(*sample_shape, *self.shape())

    def _moment(self, values: Tensor) -> Tensor:
        return (
            self.solution.weights.reshape(*self.solution.weights.shape, *[1] * (values.dim() - 2)) * values
        ).sum(1)

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
