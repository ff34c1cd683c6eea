"""Plots of results. The functions return Axes or Figures. They do not show or save them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.diagnostics import Diagnosis
from pyro_vae.evidence import Evidence
from pyro_vae.infer import Epoch
from pyro_vae.pairs.elbo import MeanElbo
from pyro_vae.vae import VAE


def figure_of(ax: Axes) -> Figure:
    """The figure of ``ax``."""
    return cast(Figure, ax.figure)


def plot_history(epochs: Sequence[Epoch], ax: Axes | None = None, *, objective: str = "bound") -> Axes:
    """Plot the ELBO on training and held-out data, in nats per datum, against the epoch, and the bound of an
    objective other than the ELBO. Training values are means over the steps of an epoch, and the parameters
    change during the epoch.

    :param objective: the name of that bound in the legend.
    """
    ax = ax or plt.subplots(figsize=(6, 4), layout="constrained")[1]
    has_bound = epochs[0].train.bound is not None
    marker = "o" if len(epochs) < 10 else None
    for part, colour, means in _by_part(epochs):
        numbers, values = [epoch.epoch for epoch in epochs], np.array([mean.objective for mean in means])
        elbos = np.array([mean.elbo for mean in means])
        label = f"{part}, {objective}" if has_bound else part
        if part == "held out" and np.isfinite(values).any():
            label += f", best {np.nanmax(values):.2f}"
        ax.plot(numbers, values, label=label, color=colour, marker=marker)
        if has_bound:
            ax.plot(numbers, elbos, label=f"{part}, ELBO", color=colour, marker=marker, linestyle="--")
        if part == "held out" and len(epochs) >= 10 and np.isfinite(elbos).any():
            # cut off the first epochs, whose ELBO is far lower
            low = np.nanquantile(elbos, 0.1)
            ax.set_ylim(bottom=low - 0.1 * abs(low))
    ylabel, title = "ELBO (nats per datum)", "Evidence lower bound"
    if has_bound:
        ylabel, title = "nats per datum", "Objective and evidence lower bound"
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.legend(frameon=False, loc="lower right")
    _finish_epochs(ax)
    return ax


def plot_ess(epochs: Sequence[Epoch], num_particles: int, ax: Axes | None = None) -> Axes:
    """Effective sample size of the K weights of an objective over epochs, the mean over data. Near 1, one
    draw of the guide outweighs the others; at K, all weights are equal.

    :param num_particles: K, more than 1.
    """
    ax = ax or plt.subplots(figsize=(6, 2.8), layout="constrained")[1]
    marker = "o" if len(epochs) < 10 else None
    for part, colour, means in _by_part(epochs):
        sizes = [np.nan if mean.ess is None else mean.ess for mean in means]
        ax.plot([epoch.epoch for epoch in epochs], sizes, label=part, color=colour, marker=marker)
    title = f"Effective sample size of the {num_particles} weights, mean over data"
    ax.set(xlabel="epoch", ylabel="ESS", title=title, ylim=(1, num_particles))
    ax.legend(frameon=False, loc="upper right")
    _finish_epochs(ax)
    return ax


def _by_part(epochs: Sequence[Epoch]) -> Iterator[tuple[str, str, list[MeanElbo]]]:
    """Name, colour and means of the training data, and of the held-out data if there are any."""
    yield "train", "C0", [epoch.train for epoch in epochs]
    held_out = [epoch.validation for epoch in epochs if epoch.validation is not None]
    if len(held_out) == len(epochs):
        yield "held out", "C1", held_out


def _finish_epochs(ax: Axes) -> None:
    """Whole numbers on the axis of epochs, and a grid."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)


def plot_ladder(rungs: Mapping[str, Sequence[Evidence]], ax: Axes | None = None) -> Axes:
    """Plot estimates of log p(x), in nats per datum, against their cost: the number of model evaluations per
    datum.

    ``rungs`` maps the name of each estimator to its estimates in order of increasing cost. All estimates are
    for the same data. Error bars are Monte Carlo standard errors.
    """
    ax = ax or plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]
    for name, estimates in rungs.items():
        costs, values = [e.cost for e in estimates], [e.mean for e in estimates]
        noise = [e.noise if np.isfinite(e.noise) else 0.0 for e in estimates]
        ax.errorbar(costs, values, noise, marker="o", capsize=3, label=name)
    ax.set_xscale("log")
    means = sorted(e.mean for estimates in rungs.values() for e in estimates if np.isfinite(e.mean))
    # exclude outliers far below the other estimates from the limits; an annotation shows them
    while len(means) > 2 and means[-1] - means[0] > 8 * (means[-1] - means[1]):
        del means[0]
    if means and means[-1] > means[0]:
        height = means[-1] - means[0]
        ax.set_ylim(means[0] - 0.2 * height, means[-1] + 0.1 * height)
        for i, (name, estimates) in enumerate(rungs.items()):
            for estimate in estimates:
                if estimate.mean < means[0]:
                    position = (estimate.cost, means[0] - 0.18 * height)
                    text = f"{name}: {estimate.mean:.1f} ↓"
                    ax.annotate(text, position, color=f"C{i}", ha="center", va="bottom")
    ax.set(
        xlabel="model evaluations per datum",
        ylabel="log p(x) (nats per datum)",
        title="Lower bounds of log p(x)",
    )
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="best")
    return ax


def plot_pareto_k(k: Tensor, ax: Axes | None = None) -> Axes:
    """Histogram of Pareto k̂ over data, with the thresholds 0.5 and 0.7."""
    ax = ax or plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
    finite = k[k.isfinite()].cpu().numpy()
    ax.hist(finite, bins=40, color="C0")
    for threshold, colour in ((0.5, "C2"), (0.7, "C3")):
        ax.axvline(threshold, color=colour, linestyle="--", label=f"{threshold}")
    ax.set(
        xlabel="Pareto k per datum",
        ylabel="data",
        title="The guide as a proposal: good below 0.5, bad above 0.7",
    )
    ax.legend(frameon=False)
    return ax


def plot_diagnosis(found: Diagnosis, x: Tensor) -> dict[str, Callable[[], Figure]]:
    """A dict of functions, each of which draws one plot of a diagnosis: Pareto k̂, the data with the largest
    k̂ (if ``x`` are images), and the calibration. A plot without data is left out."""
    plots: dict[str, Callable[[], Figure]] = {}
    if found.pareto_k.isfinite().any():
        plots["pareto-k"] = lambda: figure_of(plot_pareto_k(found.pareto_k))
        if x.dim() in (3, 4):
            title = "The data with the largest Pareto k, in decreasing order"
            plots["worst"] = lambda: plot_images(x[found.worst(20)], title=title)
    if found.calibration is not None:
        plots["calibration"] = found.calibration.plot
    return plots


def plot_images(images: Tensor, *, columns: int = 10, title: str | None = None) -> Figure:
    """A grid of images ``(n, height, width)`` or ``(n, channels, height, width)``, row by row, with a common
    range of values. The cell of an image that is all NaN stays empty.

    :raises ValueError: if ``images`` has another shape or number of channels, or there are none.
    """
    if (
        images.dim() not in (3, 4)
        or not len(images)
        or (images.dim() == 4 and images.shape[1] not in (1, 3, 4))
    ):
        raise ValueError(
            "plot_images: expected (n, height, width), or (n, channels, height, width) with 1, 3 or 4 "
            f"channels, but got {tuple(images.shape)}"
        )
    sheet = _tiled(images.detach().cpu().double(), columns, gap=max(1, images.shape[-1] // 16))
    low, high = np.nanmin(sheet), np.nanmax(sheet)
    sheet = (sheet - low) / max(high - low, 1e-12)
    rows = -(-len(images) // columns)
    fig, ax = plt.subplots(figsize=(columns * 0.8, rows * 0.8 + 0.4), layout="constrained")
    # empty cells are white: imshow leaves NaN transparent in grey images, but not in RGB images
    ax.imshow(sheet if sheet.ndim == 2 else np.nan_to_num(sheet, nan=1.0), cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()
    if title:
        fig.suptitle(title)
    return fig


def _tiled(images: Tensor, columns: int, *, gap: int = 0) -> np.ndarray:
    """Arrange images ``(n, height, width)`` or ``(n, channels, height, width)`` in one array, row by row,
    with NaN in the gaps."""
    images = images.unsqueeze(1) if images.dim() == 3 else images
    empty = images.new_full((-len(images) % columns, *images.shape[1:]), torch.nan)
    images = torch.nn.functional.pad(torch.cat([images, empty]), (0, gap, 0, gap), value=torch.nan)
    # (row, column, channel, height, width) → (row · height, column · width, channel)
    tiles = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    sheet = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[4])
    sheet = sheet[: len(sheet) - gap, : sheet.shape[1] - gap]
    return sheet.squeeze(-1).cpu().numpy()


def plot_reconstructions(x: Tensor, reconstructions: Tensor, *, columns: int = 10) -> Figure:
    """Plot images ``(n, height, width)`` or ``(n, channels, height, width)``, each row of originals above the
    row of their reconstructions."""
    columns = min(columns, len(x))
    empty = reconstructions.new_full((-len(x) % columns, *x.shape[1:]), torch.nan)
    padded = (torch.cat([images.to(empty), empty]) for images in (x, reconstructions))
    rows = [row for pair in zip(*(images.split(columns) for images in padded), strict=True) for row in pair]
    return plot_images(
        torch.cat(rows), columns=columns, title="Originals, each row above its reconstructions"
    )


@torch.no_grad()
def plot_samples(vae: VAE, n: int = 100, *, given: tuple[Tensor, ...] = ()) -> Figure:
    """Plot E[x|z] at n draws of z from the prior, for images ``(height, width)`` or
    ``(channels, height, width)``.

    :param given: the conditions of a conditional VAE, each with n rows.
    """
    images = vae.decode(vae.model.prior(*given).expand((n,)).sample(), *given).mean
    return plot_images(images, title="E[x|z] at draws of z from the prior")


def plot_points(sets: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Scatter plot of named sets of points, ``(n, 2)`` each."""
    ax = ax or plt.subplots(figsize=(5.5, 5), layout="constrained")[1]
    for name, points in sets.items():
        first, second = points.detach().cpu().numpy().T
        ax.scatter(first, second, s=6, alpha=0.5, label=name)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.legend(frameon=False)
    return ax


@torch.no_grad()
def plot_manifold(vae: VAE, *, steps: int = 20) -> Figure:
    """Plot E[x|z] on a grid of Gaussian quantiles of a 2-D latent (Kingma & Welling 2013, figure 4)."""
    q = (torch.arange(steps) + 0.5) / steps
    z = torch.distributions.Normal(0.0, 1.0).icdf(q)
    parameter = next(vae.parameters())
    grid = torch.stack(torch.meshgrid(-z, z, indexing="ij")[::-1], -1).reshape(-1, 2).to(parameter)
    sheet = _tiled(vae.decode(grid).mean.cpu(), steps)
    fig, ax = plt.subplots(figsize=(7, 7 * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    ax.imshow(sheet, cmap="gray", extent=(0, 1, 0, 1), aspect="auto")
    ax.set(xlabel="quantile of $z_1$", ylabel="quantile of $z_2$", title="E[x|z] over the latent plane")
    return fig


@torch.no_grad()
def plot_latent(
    vae: VAE,
    x: Tensor,
    labels: Tensor | None = None,
    ax: Axes | None = None,
    *,
    given: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
) -> Axes:
    """Plot the means of q(z|x) of a 2-D latent, coloured by label. If q(z|x) does not implement its mean,
    such as a flow, plot one draw for each datum instead.

    :param given: the conditions of a conditional VAE.
    :param mask: false at missing entries of x.
    """
    ax = ax or plt.subplots(figsize=(6, 5.5), layout="constrained")[1]
    kind, points = _means_or_draws(vae.encode(x, *given, mask=mask))
    z = points.cpu().numpy()
    if labels is None:
        ax.scatter(z[:, 0], z[:, 1], s=6, alpha=0.7)
    else:
        for label in labels.unique():
            rows = (labels == label).cpu().numpy()
            ax.scatter(
                z[rows, 0], z[rows, 1], s=6, alpha=0.7, label=str(int(label)), color=f"C{int(label) % 10}"
            )
        ax.legend(title="label", markerscale=2, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=f"{kind} of q(z|x), held-out data", aspect="equal")
    return ax


def _means_or_draws(distribution: TorchDistribution) -> tuple[str, Tensor]:
    """``"Means"`` and the means, or ``"Draws"`` and draws if the distribution does not implement its mean."""
    try:
        return "Means", distribution.mean
    except NotImplementedError:
        return "Draws", distribution.sample()
