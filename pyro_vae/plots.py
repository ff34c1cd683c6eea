"""Pictures: results in, Axes or Figure out. Nothing is shown, nothing is written."""

from collections.abc import Callable, Mapping, Sequence
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
from pyro_vae.vae import VAE


def figure_of(ax: Axes) -> Figure:
    """The figure that ``ax`` is drawn in, to save it."""
    return cast(Figure, ax.figure)


def plot_history(epochs: Sequence[Epoch], ax: Axes | None = None) -> Axes:
    """ELBO in nats per datum over epochs, training and held out; the training ELBO is that of the moving
    parameters."""
    ax = ax or plt.subplots(figsize=(6, 4), layout="constrained")[1]
    numbers = [record.epoch for record in epochs]
    marker = "o" if len(epochs) < 10 else None
    ax.plot(numbers, [record.train.elbo for record in epochs], label="train", color="C0", marker=marker)
    held_out = np.array([record.validation.elbo for record in epochs if record.validation is not None])
    if len(held_out):
        best = f"held out, best {np.nanmax(held_out):.2f}" if np.isfinite(held_out).any() else "held out"
        ax.plot(numbers, held_out, label=best, color="C1", marker=marker)
        # the first epochs lie far below; show the rest
        low = np.nanquantile(held_out, 0.1) if np.isfinite(held_out).any() else np.nan
        if len(epochs) >= 10 and np.isfinite(low):
            ax.set_ylim(bottom=low - 0.1 * abs(low))
    ax.set(xlabel="epoch", ylabel="ELBO (nats per datum)", title="Evidence lower bound")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_ladder(rungs: Mapping[str, Sequence[Evidence]], ax: Axes | None = None) -> Axes:
    """Estimates of log p(x) over their cost, evaluations of the model for one datum: of each estimator the
    rungs by rising cost, with their Monte Carlo errors. Means over the same data differ by bias and noise
    alone."""
    ax = ax or plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]
    for name, found in rungs.items():
        noise = [one.noise if np.isfinite(one.noise) else 0.0 for one in found]
        ax.errorbar(
            [one.cost for one in found], [one.mean for one in found], noise, marker="o", capsize=3, label=name
        )
    ax.set_xscale("log")
    means = sorted(one.mean for found in rungs.values() for one in found if np.isfinite(one.mean))
    while len(means) > 2 and means[-1] - means[0] > 8 * (means[-1] - means[1]):
        del means[0]  # it lies so far below that it would leave no room for the others
    if means and means[-1] > means[0]:
        height = means[-1] - means[0]
        ax.set_ylim(means[0] - 0.2 * height, means[-1] + 0.1 * height)
        for i, (name, found) in enumerate(rungs.items()):
            for one in found:
                if one.mean < means[0]:
                    note, at = f"{name}: {one.mean:.1f} ↓", (one.cost, means[0] - 0.18 * height)
                    ax.annotate(note, at, color=f"C{i}", ha="center", va="bottom")
    ax.set(
        xlabel="evaluations of the model for one datum",
        ylabel="log p(x) (nats per datum)",
        title="Lower bounds of the evidence",
    )
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_pareto_k(k: Tensor, ax: Axes | None = None) -> Axes:
    """Pareto k̂ of each datum, over the thresholds .5 and .7."""
    ax = ax or plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
    finite = k[k.isfinite()].numpy()
    ax.hist(finite, bins=40, color="C0")
    for threshold, colour in ((0.5, "C2"), (0.7, "C3")):
        ax.axvline(threshold, color=colour, linestyle="--", label=f"{threshold}")
    ax.set(
        xlabel="Pareto k of a datum's weights",
        ylabel="data",
        title="The guide as a proposal: good below .5, bad above .7",
    )
    ax.legend(frameon=False)
    return ax


def plot_diagnosis(found: Diagnosis, x: Tensor) -> dict[str, Callable[[], Figure]]:
    """Every picture of a diagnosis, by name, each drawn when it is called: Pareto k̂, the worst data where
    they are images ``x``, the calibration."""
    pictures: dict[str, Callable[[], Figure]] = {}
    if found.pareto_k.isfinite().any():
        pictures["pareto-k"] = lambda: figure_of(plot_pareto_k(found.pareto_k))
        if x.dim() in (3, 4):
            title = "The data whose posterior the guide misses most, the worst first"
            pictures["worst"] = lambda: plot_images(x[found.worst(20)], title=title)
    if found.calibration is not None:
        pictures["calibration"] = found.calibration.plot
    return pictures


def plot_images(images: Tensor, *, columns: int = 10, title: str | None = None) -> Figure:
    """A grid of images ``(n, height, width)`` or ``(n, channels, height, width)``, row by row, on one grey
    scale; an image of NaN leaves its place empty."""
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
    # what is empty is white; NaN is drawn so in grey images alone
    ax.imshow(sheet if sheet.ndim == 2 else np.nan_to_num(sheet, nan=1.0), cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()
    if title:
        fig.suptitle(title)
    return fig


def _tiled(images: Tensor, columns: int, *, gap: int = 0) -> np.ndarray:
    """Images ``(n, height, width)`` or ``(n, channels, height, width)`` as one, row by row, with NaN in the
    gaps."""
    images = images.unsqueeze(1) if images.dim() == 3 else images
    empty = images.new_full((-len(images) % columns, *images.shape[1:]), torch.nan)
    images = torch.nn.functional.pad(torch.cat([images, empty]), (0, gap, 0, gap), value=torch.nan)
    # (row, column, channel, height, width) → (row · height, column · width, channel)
    tiles = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    sheet = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[4])
    sheet = sheet[: len(sheet) - gap, : sheet.shape[1] - gap]
    return sheet.squeeze(-1).numpy()


def plot_reconstructions(x: Tensor, reconstructions: Tensor, *, columns: int = 10) -> Figure:
    """Originals ``(n, height, width)`` or ``(n, channels, height, width)``, each row above its
    reconstructions."""
    columns = min(columns, len(x))
    empty = reconstructions.new_full((-len(x) % columns, *x.shape[1:]), torch.nan)
    originals, others = (torch.cat([part.to(empty), empty]).split(columns) for part in (x, reconstructions))
    rows = [row for pair in zip(originals, others, strict=True) for row in pair]
    return plot_images(
        torch.cat(rows), columns=columns, title="Originals, each row above its reconstructions"
    )


@torch.no_grad()
def plot_samples(vae: VAE, n: int = 100) -> Figure:
    """E[x|z] at n draws of z from the prior: images ``(height, width)`` or ``(channels, height, width)``."""
    images = vae.decode(vae.model.prior().sample((n,))).mean
    return plot_images(images, title="E[x|z] at draws of z from the prior")


def plot_points(sets: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Named sets of points in the plane, ``(n, 2)`` each."""
    ax = ax or plt.subplots(figsize=(5.5, 5), layout="constrained")[1]
    for name, points in sets.items():
        first, second = points.detach().cpu().numpy().T
        ax.scatter(first, second, s=6, alpha=0.5, label=name)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.legend(frameon=False)
    return ax


@torch.no_grad()
def plot_manifold(vae: VAE, *, steps: int = 20) -> Figure:
    """The manifold of a 2-D latent: a grid of quantiles through the inverse Gaussian CDF, decoded (AEVB,
    figure 4)."""
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
def plot_latent(vae: VAE, x: Tensor, labels: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Means of q(z|x) of a 2-D latent, coloured by label; draws of it, one for each datum, where its mean is
    not known in closed form, as that of a flow."""
    ax = ax or plt.subplots(figsize=(6, 5.5), layout="constrained")[1]
    what, points = _means(vae.encode(x))
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
    ax.set(xlabel="$z_1$", ylabel="$z_2$", title=f"{what} of q(z|x), held-out data", aspect="equal")
    return ax


def _means(distribution: TorchDistribution) -> tuple[str, Tensor]:
    """``"Means"`` and the means, or ``"Draws"`` and one draw for each datum where a distribution has no mean
    to give."""
    try:
        return "Means", distribution.mean
    except NotImplementedError:
        return "Draws", distribution.sample()
