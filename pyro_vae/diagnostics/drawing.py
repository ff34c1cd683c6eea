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
from pyro_vae.exact.grid import posterior_of
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program
from pyro_vae.plots import BLUE, COLOURS, GREY, RED, style

_MASSES = (0.95, 0.5)
_COLOURS = (BLUE, RED, *(colour for colour in COLOURS if colour not in (BLUE, RED, GREY)))  # of guides


@style()
def draw_posteriors(exact_model: Any, guides: Mapping[str, Program], batch: Batch) -> Figure:
    """One panel for each datum, with p(z|x) and every q(z|x)."""
    n = batch.num_rows
    fig, axes = plt.subplots(1, n, figsize=(3.2 * n, 3.4), squeeze=False)
    _draw_row(list(axes[0]), exact_model, guides, batch)
    return fig


@style()
def draw_ranking(
    exact_model: Any, guides: Mapping[str, Program], batch: Batch, gaps: Mapping[str, Any]
) -> Figure:
    """The panels of :func:`draw_posteriors`, and a bar chart of the mean gap of each guide."""
    n = batch.num_rows + 1
    fig, axes = plt.subplots(1, n, figsize=(3.2 * n, 3.4), squeeze=False)
    _draw_row(list(axes[0][:-1]), exact_model, guides, batch)
    ax = axes[0][-1]
    for i, (gap, split) in enumerate(gaps.values()):
        if split is None:
            ax.barh(i, float(gap.mean()), color="0.6", label="gap" if i == 0 else None)
            continue
        approximation = max(float(split.approximation.mean()), 0.0)
        ax.barh(i, approximation, color=GREY, label="approximation" if i == 0 else None)
        ax.barh(
            i,
            float(split.amortization.mean()),
            left=approximation,
            color=BLUE,
            label="amortization" if i == 0 else None,
        )
    ax.set_yticks(range(len(gaps)), list(gaps))
    ax.invert_yaxis()
    ax.set(xlabel="gap (nats per datum)", title="log p(x) − ELBO")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return fig


@torch.no_grad()
def _draw_row(axes: list[Axes], exact_model: Any, guides: Mapping[str, Program], batch: Batch) -> None:
    n, posterior = 4000, posterior_of(exact_model, batch)
    with untouched(training=False, seed=0):
        latents, batch = inspect_latents(exact_model, None, batch, verb="plot")
        z = posterior.sample((n,)).reshape(n, batch.num_rows, -1)
        draws = {name: latents.draw(guide, batch, n)[0] for name, guide in guides.items()}
        if latents.dim > 2:
            return _draw_scatter(axes, z, draws)
        grid, shape = _grid([z, *draws.values()], 200 if latents.dim == 1 else 70)
        densities = {"exact": posterior.log_prob(grid.reshape(*grid.shape[:2], *posterior.event_shape))}
        try:
            densities |= {name: latents.log_q(guide, batch, grid) for name, guide in guides.items()}
        except (KeyError, NotImplementedError):  # a transform without an inverse, such as a planar flow
            return _draw_scatter(axes, z, draws)
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
        ax.set(xlabel="$z_1$" if latents.dim == 2 else "$z$", title=f"datum {i}")
        if latents.dim == 2:
            ax.set_ylabel("$z_2$")
    _legend(axes)


def _draw_scatter(axes: list[Axes], exact: Tensor, guides: Mapping[str, Tensor]) -> None:
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
        ax.set(xlabel="$z_1$", ylabel="$z_2$", title=f"datum {i}")
    _legend(axes)


def _legend(axes: list[Axes]) -> None:
    """A shared legend below the row."""
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].get_figure().legend(handles, labels, loc="outside lower center", ncols=len(labels))  # type: ignore[union-attr]


def _grid(draws: list[Tensor], steps: int) -> tuple[Tensor, tuple[int, ...]]:
    """Grid over the range of the draws of each datum, ``(points, batch, d)``, and the number of points along
    each dimension."""
    ends = [[z.double().quantile(q, 0) for z in draws] for q in (0.001, 0.999)]
    low, high = torch.stack(ends[0]).amin(0), torch.stack(ends[1]).amax(0)
    dim = low.shape[-1]
    unit = torch.stack(
        torch.meshgrid(*[torch.linspace(0, 1, steps, dtype=low.dtype)] * dim, indexing="ij"), -1
    )
    points = low + unit.reshape(-1, 1, dim) * (high - low)
    return points.to(draws[0].dtype), (steps,) * dim


def _levels(density: np.ndarray) -> list[float]:
    """Densities whose superlevel sets have the masses ``_MASSES``, in increasing order."""
    ordered = np.sort(density.ravel())[::-1]
    cumulative = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[np.searchsorted(cumulative, mass)]) for mass in _MASSES]
    return levels if levels[0] < levels[1] else [levels[1] * (1 - 1e-6), levels[1]]
