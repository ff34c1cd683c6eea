"""Adaptive quadrature for any Pyro model with one or two latent dimensions per datum.

The integration box is divided into cells, and a Clenshaw–Curtis rule is applied to each cell. The error of a
cell is estimated by the difference between this rule and the rule on every second node. The cells with the
largest errors are bisected until the total error is below the tolerance, so the points concentrate around the
modes of the posterior.
"""

import logging
import math
from collections.abc import Iterator
from copy import copy, deepcopy
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn.utils.rnn import pad_sequence

from pyro_vae.data.batches import Batch, as_whole, check_count
from pyro_vae.pairs.enumeration import values_of
from pyro_vae.pairs.latents import Site, inspect_latents
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program

logger = logging.getLogger(__name__)
_NODES = 13  # nodes of a cell along each axis; a number of the form 4 k + 1
# by the number of latent dimensions: cells along each axis before the first refinement
_INITIAL_CELLS = {1: 128, 2: 8}
_MAX_POINTS = {1: 2**17, 2: 2**21}  # by the number of latent dimensions: maximum points per datum


class Solution(NamedTuple):
    """Result of the quadrature for each datum.

    log_evidence: log p(x) in nats, ``(batch,)``.
    error: estimated error of ``log_evidence`` in nats, ``(batch,)``: the sum of the errors of the cells plus
        the mass at the edges of the box. A mode that is narrower than the spacing of the points may be
        missed; the error does not include it.
    points: in unconstrained space, ``(batch, G, d)``. Points with a mass below about 1e-30 are left out.
    weights: posterior mass of each point, ``(batch, G)``; they sum to 1.
    spacing: side lengths of the volume element of each point, ``(batch, G, d)``.
    """

    log_evidence: Tensor
    error: Tensor
    points: Tensor
    weights: Tensor
    spacing: Tensor


class Grid:
    """Posterior and evidence of a Pyro model by quadrature. ``grid(x)`` runs the model.

    :param model: a Pyro program. All its latents must be continuous and lie in the data plate. In total they
        must have one or two dimensions per datum: a vector or two scalars. Modules run in evaluation mode.
    :param tolerance: target of the estimated error of log p(x) for each datum, in nats. Cells are bisected
        until two successive error estimates are below it. A warning is logged if this would take too many
        points.
    :param max_points: number of points at which the model is evaluated at once. :meth:`log_evidence` solves a
        few data at a time, so that they have at most four times as many points together. A posterior keeps
        the points of all data: its memory grows with their number, and with the points of the datum that
        has most of them. If the posteriors are narrow ridges, that is up to 60 MB for each datum.
    :raises ValueError: if a latent is discrete or shared by the data, the latents have no or more than two
        dimensions, or the tails of the posterior are too heavy.

    Methods take the data that :func:`~pyro_vae.fit` takes. If ``model`` is a module, it is copied and
    evaluated in double precision. If it is a function, it is evaluated in the dtype of its tensors; use
    float64 for full accuracy. Mass that is closer to the upper end of an interval than the floating-point
    resolution is lost, such as the mass of Beta(0.1, 0.1) near 1.

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

    def __init__(self, model: Program, *, tolerance: float = 1e-7, max_points: int = 2**19) -> None:
        if not tolerance >= 0:
            raise ValueError(f"Grid: expected a tolerance in nats, 0 or more, but got {tolerance!r}")
        self.model, self.tolerance = model, tolerance
        self.max_points = check_count("max_points", max_points)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def log_evidence(self, data: Any) -> Tensor:
        """log p(x) in nats, ``(batch,)``."""
        parts = self._solve_parts(_Joint(self.model, as_whole(data)))
        return torch.cat([part.log_evidence for part in parts])

    def posterior(self, data: Any) -> "GridPosterior":
        """p(z|x), with ``batch_shape`` ``(batch,)``. Two scalar latents form one vector in the order of
        sampling."""
        joint = _Joint(self.model, as_whole(data))
        return GridPosterior(joint, self._solve(joint))

    def solve(self, data: Any) -> Solution:
        """The evidence, an estimate of its error, and the points of the quadrature."""
        return self._solve(_Joint(self.model, as_whole(data)))

    def _solve(self, joint: "_Joint") -> Solution:
        columns = list(zip(*self._solve_parts(joint), strict=True))
        per_datum = [torch.cat(column) for column in columns[:2]]
        # data with fewer points than others are padded with points of weight 0
        of_points = [pad_sequence([row for part in column for row in part], True) for column in columns[2:]]
        return Solution(*per_datum, *of_points)

    def _solve_parts(self, joint: "_Joint") -> Iterator[Solution]:
        """Solutions of consecutive rows. Rows that need too many points together are halved."""
        chunk = max(1, self.max_points // (4 * (_INITIAL_CELLS[joint.dim] * _NODES) ** joint.dim))
        pending = [joint.rows(i, i + chunk) for i in range(0, joint.num_rows, chunk)][::-1]
        while pending:
            rows = pending.pop()
            solution = self._solve_rows(rows)
            if solution is None:
                middle = rows.num_rows // 2
                pending += [rows.rows(middle, rows.num_rows), rows.rows(0, middle)]
            else:
                yield solution

    @torch.no_grad()
    def _solve_rows(self, joint: "_Joint") -> Solution | None:
        """The solution, or ``None`` if several rows need more than ``4 * max_points`` points together."""
        draws = joint.prior_draws(1000).clamp(-700.0, 700.0)  # draws that underflow are infinite
        centre, scale = draws.mean(0), draws.std(0).clamp_min(1e-6)
        half_width = torch.full_like(scale, 10.0)  # of the box, in standard deviations of the prior
        while (half_width <= 160).all():
            refined = self._refine(_Box(joint, centre, half_width * scale, self.max_points))
            if refined is None:
                return None
            solution, edge_mass = refined
            # the mass beyond an edge may be much larger than the mass at its nodes
            truncated = edge_mass > 1e-6 * self.tolerance
            if not truncated.any():
                if (solution.error > self.tolerance).any():
                    logger.warning(
                        "Grid: the estimated error of log p(x) is still %.1e nats with %d points",
                        solution.error.max(),
                        (solution.weights > 0).sum(1).max(),
                    )
                return _with_mass(solution._replace(error=solution.error + edge_mass.sum(1)))
            half_width = torch.where(truncated, 2 * half_width, half_width)
        raise ValueError(
            "Grid: the posterior has mass beyond 160 prior standard deviations; expected a posterior with "
            "exponential tails in the unconstrained space of its latents"
        )

    def _refine(self, box: "_Box") -> tuple[Solution, Tensor] | None:
        """The quadrature over a box, and the mass at its edges along each axis, ``(batch, d)``; ``None`` as
        in :meth:`_solve_rows`."""
        cells, max_cells = box.initial_cells(), _MAX_POINTS[box.dim] // _NODES**box.dim
        while True:
            log_evidence = cells.log_mass.logsumexp((1, 2))
            log_error = torch.maximum(cells.log_error.logsumexp(-1), cells.log_parent_error.squeeze(-1))
            error = (log_error - log_evidence.unsqueeze(-1)).exp()
            split = _cells_to_split(error, self.tolerance)
            split &= (cells.has_mass.sum(1) + split.sum(1) <= max_cells).unsqueeze(-1)
            if not split.any():
                break
            parts = [cells.select(~split & cells.has_mass), *box.bisect(cells.select(split))]
            cells = _Cells(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))
            if box.joint.num_rows > 1 and cells.log_mass.numel() > 4 * self.max_points:
                return None
        points, spacing = box.nodes(cells.low, cells.width)
        weights = (cells.log_mass - log_evidence[:, None, None]).exp().flatten(1)
        outermost = (points - box.centre).abs() + spacing / 2 >= box.scale
        edge_mass = (weights.unsqueeze(-1) * outermost).sum(1)
        return Solution(log_evidence, error.sum(1), points, weights, spacing), edge_mass


def posterior_of(exact_model: Any, batch: Batch) -> Any:
    """p(z|x) of an exact model. The method of a :class:`Grid` is called with the data, that of other models
    with the arguments of the model."""
    if isinstance(exact_model, Grid):
        return exact_model.posterior(batch)
    return exact_model.posterior(*batch.args, **batch.kwargs)


def log_evidence_of(exact_model: Any, batch: Batch) -> Tensor:
    """log p(x) of an exact model in nats, ``(batch,)``. The arguments are those of :func:`posterior_of`."""
    if isinstance(exact_model, Grid):
        return exact_model.log_evidence(batch)
    return exact_model.log_evidence(*batch.args, **batch.kwargs)


class _Cells(NamedTuple):
    """C cells of the box [−1, 1]^d for each datum.

    low, width: lower corner and side lengths, ``(batch, C, d)``.
    log_mass: log of weight × integrand at each node, ``(batch, C, nodes)``; −∞ for cells that are padding.
    log_error: log of the estimated error along each axis, ``(batch, C, d)``.
    log_parent_error: log of half the estimated error of the cell whose bisection gave this cell,
        ``(batch, C, 1)``.
    """

    low: Tensor
    width: Tensor
    log_mass: Tensor
    log_error: Tensor
    log_parent_error: Tensor

    @property
    def has_mass(self) -> Tensor:
        """Mask of the cells whose mass is not 0, ``(batch, C)``. Padding has no mass."""
        return (self.log_mass > -math.inf).any(-1)

    def masked(self, mask: Tensor) -> "_Cells":
        """These cells, with those outside the mask turned into padding."""
        logs = (part.masked_fill(~mask.unsqueeze(-1), -math.inf) for part in self[2:])
        return _Cells(self.low, self.width, *logs)

    def select(self, mask: Tensor) -> "_Cells":
        """The cells in the mask, padded to the same number for each datum."""
        first = _selected(mask)
        parts = (part.gather(1, first.unsqueeze(-1).expand(-1, -1, part.shape[-1])) for part in self)
        return _Cells(*parts).masked(mask.gather(1, first))


class _Box:
    """Product Clenshaw–Curtis rules on the cells of the box centre ± scale in unconstrained space.

    centre, scale: ``(batch, d)``.
    """

    def __init__(self, joint: "_Joint", centre: Tensor, scale: Tensor, max_points: int) -> None:
        self.joint, self.dim, self.max_points = joint, joint.dim, max_points
        self.centre, self.scale = centre.unsqueeze(1), scale.unsqueeze(1)
        self.unit_nodes, self.unit_weights = (part.to(centre) for part in _clenshaw_curtis(_NODES - 1))
        coarse_weights = torch.zeros_like(self.unit_weights)
        coarse_weights[::2] = _clenshaw_curtis(_NODES // 2)[1].to(centre)
        # (fine rule − coarse rule) / fine rule, at each node
        self.relative_difference = 1 - coarse_weights / self.unit_weights

    def nodes(self, low: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes of cells and their weights along each axis: ``(batch, C · nodes, d)`` each."""
        unit_nodes, unit_weights = (
            torch.cartesian_prod(*[part] * self.dim).view(-1, self.dim)
            for part in (self.unit_nodes, self.unit_weights)
        )
        nodes = (low.unsqueeze(2) + width.unsqueeze(2) * unit_nodes).flatten(1, 2)
        weights = (width.unsqueeze(2) * unit_weights).flatten(1, 2)
        return self.centre + self.scale * nodes, self.scale * weights

    def evaluate(self, low: Tensor, width: Tensor) -> _Cells:
        """Evaluate the model at the nodes of cells."""
        points, spacing = self.nodes(low, width)
        size = max(1, self.max_points // self.joint.num_rows)
        log_f = torch.cat([self.joint.log_integrand(part) for part in points.split(size, 1)], 1)
        log_mass = (log_f + spacing.log().sum(-1)).unflatten(1, (low.shape[1], -1))
        top = log_mass.amax(-1, keepdim=True).clamp_min(torch.finfo(log_mass.dtype).min)
        bottom = log_mass.masked_fill(log_mass == -math.inf, math.inf).amin(-1, keepdim=True)
        mass = (log_mass - top).exp().unflatten(2, (_NODES,) * self.dim)
        along = [mass.movedim(2 + axis, 2).reshape(*low.shape[:2], _NODES, -1) for axis in range(self.dim)]
        errors = [(self.relative_difference @ part).sum(-1).abs() for part in along]
        log_error = torch.stack([error.log() for error in errors], -1)
        # add a bound on how far a Gaussian peak between the nodes exceeds the largest value at a node
        log_error = log_error + top + (top - bottom).clamp_min(0) / _NODES
        return _Cells(low, width, log_mass, log_error, log_mass.logsumexp(-1, keepdim=True))

    def initial_cells(self) -> _Cells:
        count = _INITIAL_CELLS[self.dim]
        corners = torch.linspace(-1, 1, count + 1, dtype=self.scale.dtype, device=self.scale.device)[:-1]
        low = torch.cartesian_prod(*[corners] * self.dim).view(1, -1, self.dim).repeat(len(self.scale), 1, 1)
        return self.evaluate(low, torch.full_like(low, 2 / count))

    def bisect(self, cells: _Cells) -> list[_Cells]:
        """The lower and upper halves of cells. Each cell is divided along the axis with the largest error."""
        axis = torch.nn.functional.one_hot(cells.log_error.argmax(-1), self.dim)
        width = cells.width * (1 - axis / 2)
        log_parent_error = cells.log_error.logsumexp(-1, keepdim=True) - math.log(2)
        halves = [self.evaluate(low, width) for low in (cells.low, cells.low + axis * width)]
        return [half._replace(log_parent_error=log_parent_error).masked(cells.has_mass) for half in halves]


def _clenshaw_curtis(n: int) -> tuple[Tensor, Tensor]:
    """n + 1 nodes and weights on [0, 1], n even (Clenshaw & Curtis 1960).

    Every second node is a node of the rule for n / 2.
    """
    angle = math.pi / n * torch.arange(n + 1, dtype=torch.double)
    k = torch.arange(1, n // 2 + 1, dtype=torch.double)
    factors = torch.where(k < n / 2, 2.0, 1.0) / (4 * k**2 - 1)
    weights = (1 - ((2 * k * angle.unsqueeze(-1)).cos() * factors).sum(-1)) / n
    weights[[0, -1]] /= 2
    return (1 - angle.cos()) / 2, weights


def _cells_to_split(error: Tensor, tolerance: float) -> Tensor:
    """Mask of the cells with the largest errors, ``(batch, C)``.

    As many cells are selected as are needed for the errors of the other cells to sum to at most half the
    tolerance. No cell is selected for a datum whose total error is within the tolerance.
    """
    ascending = error.sort(1)
    totals = ascending.values.cumsum(1)
    selected = (totals > tolerance / 2) & (totals[:, -1:] > tolerance)
    return torch.zeros_like(selected).scatter(1, ascending.indices, selected)


def _selected(mask: Tensor) -> Tensor:
    """Indices of the elements in a mask ``(batch, n)``, padded to the same number for each datum."""
    return mask.byte().sort(dim=1, descending=True, stable=True).indices[:, : int(mask.sum(1).max())]


def _with_mass(solution: Solution) -> Solution:
    """The points without those of negligible mass, which are most of them if the posterior is narrow."""
    # a heavy tail that the latent's transform stretches may have its moments where the mass is tiny
    kept = _selected(solution.weights > 1e-30)
    of_points = kept.unsqueeze(-1).expand(-1, -1, solution.points.shape[2])
    return solution._replace(
        points=solution.points.gather(1, of_points),
        weights=solution.weights.gather(1, kept),
        spacing=solution.spacing.gather(1, of_points),
    )


class _Joint:
    """log p(x, z) of a batch as a function of z, a vector of all latents with one or two elements."""

    def __init__(self, model: Program, batch: Batch) -> None:
        if isinstance(model, torch.nn.Module):  # single precision cannot reach the default tolerance
            model = deepcopy(model).double()
            batch = batch.map(lambda part: part.double() if part.is_floating_point() else part)
        with untouched(training=False, seed=0), torch.no_grad():
            self.latents, batch = inspect_latents(model, None, batch, verb="Grid")
        self.model, self.batch, self.num_rows = model, batch, batch.num_rows
        self.dim = self.latents.dim
        self.transforms = {name: _transform(name, site) for name, site in self.latents.sites.items()}
        if self.dim not in (1, 2):
            raise ValueError(
                f"Grid: the model has {self.dim} latent dimensions per datum "
                f"({', '.join(self.transforms) or 'no latents'}); expected one or two. "
                "For a larger latent use evidence.importance"
            )

    def rows(self, start: int, stop: int) -> "_Joint":
        """Restrict to data ``start`` to ``stop``."""
        part = copy(self)
        part.batch = self.batch.map(lambda tensor: tensor[start:stop])
        part.num_rows = part.batch.num_rows
        return part

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(x, z) in nats. z: ``(G, batch, dim)`` → ``(G, batch)``."""
        with untouched(training=False, seed=0), torch.no_grad():
            return self.latents.log_joint(self.model, self.batch, z).double()

    def log_integrand(self, u: Tensor) -> Tensor:
        """log p(x, z(u)) + log det dz/du in unconstrained space. u: ``(batch, G, dim)`` → ``(batch, G)``."""
        u = u.movedim(1, 0)
        log_jacobian, z = torch.zeros((), dtype=u.dtype, device=u.device), []
        for name, _, part in self.latents.split(u):
            value = self.transforms[name](part)
            log_det = self.transforms[name].log_abs_det_jacobian(part, value)
            log_jacobian = log_jacobian + log_det.reshape(*u.shape[:-1], -1).sum(-1)
            z.append(value.reshape(*u.shape[:-1], -1))
        return (self.log_prob(torch.cat(z, -1)) + log_jacobian).nan_to_num(nan=-math.inf).movedim(0, 1)

    def prior_draws(self, n: int) -> Tensor:
        """Draws from the prior in unconstrained space: ``(n, batch, dim)``."""
        with untouched(training=False, seed=0), torch.no_grad():
            values = values_of(self.latents.run(self.model, self.batch, n))
        z = self.latents.flat(values, n, self.num_rows).double()
        parts = (
            self.transforms[name].inv(part).reshape(*z.shape[:-1], -1)
            for name, _, part in self.latents.split(z)
        )
        return torch.cat(list(parts), -1)

    def constrain(self, u: Tensor) -> Tensor:
        """Map points u of unconstrained space to the support of the latents: ``(*batch, dim)`` →
        ``(*batch, dim)``."""
        parts = (
            self.transforms[name](part).reshape(*u.shape[:-1], -1) for name, _, part in self.latents.split(u)
        )
        return torch.cat(list(parts), -1)


def _transform(name: str, site: Site) -> Any:
    """The transform from unconstrained space to the support of a latent."""
    support = site.fn.support
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support.is_discrete:
        raise ValueError(
            f"Grid: {name!r} is discrete ({support}); expected continuous latents; "
            "sum over its values in the model"
        )
    transform = biject_to(support)
    if transform.inverse_shape(site.shape) != site.shape:
        raise ValueError(
            f"Grid: {name!r} has support {support}, which has fewer dimensions than its event; expected a "
            "latent without constraints between its elements, such as logits"
        )
    return transform


class GridPosterior(dist.TorchDistribution):
    """p(z|x) of a :class:`Grid`.

    ``log_prob`` is log p(x, z) − log p(x), evaluated by the model. Moments are sums over the points. A sample
    is uniform within the volume element of a random point.
    """

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
        index = torch.multinomial(self.solution.weights, n, replacement=True).unsqueeze(-1)
        points, spacing = (
            part.gather(1, index.expand(-1, -1, self.joint.dim))
            for part in (self.solution.points, self.solution.spacing)
        )
        u = points + (torch.rand_like(points) - 0.5) * spacing
        z = self.joint.constrain(u.movedim(1, 0))
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
        return self.joint.constrain(self.solution.points)
