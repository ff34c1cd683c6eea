"""Plots of posteriors: the exact posterior as filled contours, guides as lines."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.data.batches import Batch
from pyro_vae.diagnostics.tables import over_data
from pyro_vae.exact.grid import posterior_of
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program
from pyro_vae.plots import BLUE, COLOURS, GREY, RED, figure_of, style

_MASSES = (0.95, 0.5)
_COLOURS = (BLUE, RED, *(colour for colour in COLOURS if colour not in (BLUE, RED, GREY)))  # of guides


@style()
def draw_posteriors(exact_model: Any, guides: Mapping[str, Program], batch: Batch) -> Figure:
    """One panel for each datum, with p(z|x) and every q(z|x). Contours enclose 50 and 95 % of the mass."""
    n = batch.num_rows
    fig, axes = plt.subplots(1, n, figsize=(3.2 * n, 3.7), squeeze=False)
    _draw_row(list(axes[0]), exact_model, guides, batch)
    return fig


@style()
def draw_ranking(
    exact_model: Any, guides: Mapping[str, Program], batch: Batch, gaps: Mapping[str, Any]
) -> Figure:
    """The panels of :func:`draw_posteriors`, and a bar chart of the mean gap of each guide with its
    standard error over data."""
    n = batch.num_rows + 1
    fig, axes = plt.subplots(1, n, figsize=(3.2 * n, 3.7), squeeze=False)
    _draw_row(list(axes[0][:-1]), exact_model, guides, batch)
    ax = axes[0][-1]
    for i, (gap, split) in enumerate(gaps.values()):
        mean, error = over_data(gap)
        if split is None:
            ax.barh(i, mean, color="0.6", label="gap")
        else:
            approximation = split.approximation.mean().item()
            ax.barh(i, approximation, color=GREY, label="approximation")
            ax.barh(i, mean - approximation, left=approximation, color=BLUE, label="amortization")
        ax.errorbar(mean, i, xerr=error, color="black", capsize=3)
    ax.set_yticks(range(len(gaps)), list(gaps))
    ax.invert_yaxis()
    ax.set(xlabel="nats per datum,\n± standard error", title="mean gap KL(q‖p)")
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one for each label
    ax.legend(
        list(handles.values()),
        list(handles),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=5,
        ncols=2,
    )
    return fig


@torch.no_grad()
def _draw_row(axes: list[Axes], exact_model: Any, guides: Mapping[str, Program], batch: Batch) -> None:
    n, posterior = 4000, posterior_of(exact_model, batch)
    with untouched(training=False, seed=0):
        latents, batch = inspect_latents(exact_model, None, batch, verb="plot")
        exact = posterior.sample((5 * n,))
        z = exact.reshape(5 * n, batch.num_rows, -1)
        draws = {name: latents.draw(guide, batch, n)[0] for name, guide in guides.items()}
        if latents.dim > 2:
            return _draw_scatter(axes, z, draws, latents.names)
        log_p = posterior.log_prob(exact)
        grid, shape = _grid(z, log_p, list(draws.values()), 200 if latents.dim == 1 else 100)
        densities = {"exact": posterior.log_prob(grid.reshape(*grid.shape[:2], *posterior.event_shape))}
        try:
            densities |= {name: latents.log_q(guide, batch, grid) for name, guide in guides.items()}
        except (KeyError, NotImplementedError):  # a transform without an inverse, such as a planar flow
            return _draw_scatter(axes, z, draws, latents.names)
    for i, ax in enumerate(axes):
        at = grid[:, i].double().cpu().numpy()
        for j, (name, log_density) in enumerate(densities.items()):
            density = log_density[:, i].double().exp().cpu().numpy()
            colour = "0.75" if j == 0 else _COLOURS[(j - 1) % len(_COLOURS)]
            if latents.dim == 1:
                draw = ax.fill_between if j == 0 else ax.plot
                draw(at[:, 0], density, color=colour, label=name)
                continue
            levels = _levels(density)
            field = density.reshape(shape)
            first, second = (at[:, k].reshape(shape) for k in (0, 1))
            if j == 0:
                ax.contourf(first, second, field, levels=[*levels, np.inf], colors=["0.85", "0.65"])
            else:
                ax.contour(first, second, field, levels=levels, colors=colour, linewidths=1.2)
            ax.plot([], [], color=colour, label=name)
        ylabel = latents.names[1] if latents.dim == 2 else "density"
        ax.set(xlabel=latents.names[0], ylabel=ylabel, title=f"datum {i}")
    _legend(axes, "contours of 50 % and 95 % of the mass" if latents.dim == 2 else None)


def _draw_scatter(
    axes: list[Axes], exact: Tensor, guides: Mapping[str, Tensor], names: tuple[str, ...]
) -> None:
    """Scatter plot of the first two dimensions of the draws. If there is only one dimension, plot the
    empirical CDF."""
    for i, ax in enumerate(axes):
        for j, (name, draws) in enumerate([("exact", exact), *guides.items()]):
            at = draws[:800, i].double().cpu().numpy()
            first, second = (
                (at[:, 0], at[:, 1]) if at.shape[1] > 1 else (np.sort(at[:, 0]), np.linspace(0, 1, len(at)))
            )
            colour = _COLOURS[(j - 1) % len(_COLOURS)] if j else "0.7"
            ax.scatter(first, second, s=4, alpha=0.4 if j else 1.0, color=colour, label=name)
        ylabel = names[1] if len(names) > 1 else "empirical CDF"
        ax.set(xlabel=names[0], ylabel=ylabel, title=f"datum {i}")
    _legend(axes)


def _legend(axes: list[Axes], title: str | None = None) -> None:
    """A shared legend below the row."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure_of(axes[0]).legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title)


def _grid(exact: Tensor, log_p: Tensor, guides: list[Tensor], steps: int) -> tuple[Tensor, tuple[int, ...]]:
    """Grid for each datum, ``(points, batch, d)``, and the number of points along each dimension. It covers
    the region of highest density p(z|x) with a mass of 0.999, and 0.998 of each dimension of each guide."""
    is_inside = (log_p >= log_p.kthvalue(len(log_p) // 1000 + 1, 0).values).unsqueeze(-1)
    lows = [exact.where(is_inside, torch.inf).amin(0), *(z.double().quantile(0.001, 0) for z in guides)]
    highs = [exact.where(is_inside, -torch.inf).amax(0), *(z.double().quantile(0.999, 0) for z in guides)]
    low, high = torch.stack(lows).double().amin(0), torch.stack(highs).double().amax(0)
    dim = low.shape[-1]
    unit = torch.stack(
        torch.meshgrid(*[torch.linspace(0, 1, steps, dtype=low.dtype)] * dim, indexing="ij"), -1
    )
    points = low + unit.reshape(-1, 1, dim) * (high - low)
    return points.to(exact.dtype), (steps,) * dim


def _levels(density: np.ndarray) -> list[float]:
    """Densities whose superlevel sets have the masses ``_MASSES``, in increasing order."""
    ordered = np.sort(density.ravel())[::-1]
    cumulative = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[np.searchsorted(cumulative, mass)]) for mass in _MASSES]
    return levels if levels[0] < levels[1] else [levels[1] * (1 - 1e-6), levels[1]]
