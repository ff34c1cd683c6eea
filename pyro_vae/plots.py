"""Plots of results, in one :func:`style`. A ``plot_*`` draws on one Axes, ``ax`` or that of a new figure, and
returns it. It does not show or save the figure; ``figure_of(ax).savefig("curve.pdf")`` saves it.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.html import data_url, page, picture

if TYPE_CHECKING:  # the results and pairs below this layer draw themselves with this module
    from pyro_vae.diagnostics.report import Diagnosis
    from pyro_vae.evidence.result import Evidence
    from pyro_vae.infer.resume import Epoch
    from pyro_vae.pairs.elbo import MeanElbo
    from pyro_vae.vae import VAE

# ten colours that stay distinct with colour-blindness (Petroff 2021, arXiv:2107.02270)
COLOURS: tuple[str, ...] = tuple(plt.style.library["petroff10"]["axes.prop_cycle"].by_key()["color"])
BLUE, RED, GREY = COLOURS[0], COLOURS[2], COLOURS[3]
STYLE: Any = {  # settings of matplotlib
    "axes.prop_cycle": plt.style.library["petroff10"]["axes.prop_cycle"],
    "figure.figsize": (5.5, 3.6),  # scaled to a column of 3.3 inches, the font is 6.6 points high
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.titlesize": 11,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.8,
    "pdf.fonttype": 42,  # text that can be selected and edited
}


@contextmanager
def style() -> Iterator[None]:
    """The style of the plots of this package, for figures that are made in the ``with`` block: fonts that are
    legible at column width, and colours that stay distinct with colour-blindness.

    >>> with style():
    ...     ax = plot_points({"data": torch.randn(100, 2)})
    >>> plt.close(figure_of(ax))
    """
    with plt.rc_context(STYLE):
        yield


def figure_of(ax: Axes) -> Figure:
    """The figure of ``ax``."""
    return cast(Figure, ax.figure)


def embedded(drawn: Axes | Figure, name: str, caption: str = "") -> Markup:
    """A figure, or that of Axes, as a part of a page, see ``pyro_vae.html``. The figure is closed."""
    figure, buffer = drawn if isinstance(drawn, Figure) else figure_of(drawn), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return picture(data_url(buffer.getvalue()), name, caption)


def _new_axes(width: float = 5.5, height: float = 3.6) -> Axes:
    """The Axes of a new figure, whose size is in inches."""
    return plt.subplots(figsize=(width, height))[1]


@style()
def plot_history(epochs: "Sequence[Epoch]", ax: Axes | None = None, *, objective: str = "bound") -> Axes:
    """Plot the ELBO on training and held-out data, in nats per datum, against the epoch, and the bound of an
    objective other than the ELBO. A ring marks the epoch with the highest held-out objective, whose
    parameters early stopping restores. Training values are means over the steps of an epoch, and the
    parameters change during the epoch. If the first tenth of the epochs would take more than half of the
    height, the curves begin below the axis, and the label of the axis says so.

    :param objective: the name of that bound in the legend.
    """
    has_bound = epochs[0].train.bound is not None
    ax = ax or _new_axes(height=4.4 if has_bound else 4.0)
    marker = "o" if len(epochs) < 10 else None
    curves = []
    for part, colour, means in _by_part(epochs):
        numbers, values = [epoch.epoch for epoch in epochs], np.array([mean.objective for mean in means])
        elbos = np.array([mean.elbo for mean in means])
        label = f"{part}, {objective}" if has_bound else part
        if part == "held out":
            label += _mark_best(ax, numbers, values, colour)
        ax.plot(numbers, values, label=label, color=colour, marker=marker)
        curves += [values, elbos]
        if has_bound:
            ax.plot(numbers, elbos, label=f"{part}, ELBO", color=colour, marker=marker, linestyle="--")
    ylabel, title = "ELBO (nats per datum)", "Evidence lower bound"
    if has_bound:
        ylabel, title = "nats per datum", "Objective and evidence lower bound"
    _finish_curves(ax, curves, ylabel, title)
    return ax


def _mark_best(ax: Axes, numbers: Sequence[int], values: np.ndarray, colour: str) -> str:
    """A ring around the highest value. Returns text for the legend, empty if there is no finite value."""
    if not np.isfinite(values).any():
        return ""
    best = int(np.nanargmax(values))
    ring: dict[str, Any] = {"marker": "o", "s": 70, "facecolors": "none", "linewidths": 1.8, "zorder": 3}
    ax.scatter(numbers[best], values[best], edgecolors=colour, **ring)
    return f", best {values[best]:.2f} in epoch {numbers[best]}"


def _finish_curves(ax: Axes, curves: Sequence[np.ndarray], ylabel: str, title: str) -> None:
    """Labels, a legend below the axes, and limits that contain all values, except for those of the first
    tenth of the epochs if these would take more than half of the height."""
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=3.8)  # below the label of the axis
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    finite = [curve[np.isfinite(curve)] for curve in curves if np.isfinite(curve).any()]
    if not finite:
        return
    lowest, highest = min(curve.min() for curve in finite), max(curve.max() for curve in finite)
    late = min(np.quantile(curve, 0.1) if len(curve) >= 10 else curve.min() for curve in finite)
    low = max(lowest, late - (highest - late))
    if low > lowest:
        num_below = max(int((curve < low).sum()) for curve in finite)
        ax.set_xlabel(f"epoch ({num_below} of them below the axis)")
    if low < highest:
        ax.set_ylim(low - 0.05 * (highest - low), highest + 0.05 * (highest - low))


@style()
def plot_runs(runs: "Mapping[str, Sequence[Epoch]]", ax: Axes | None = None) -> Axes:
    """Plot the held-out ELBO of several runs, in nats per datum, against the epoch. A ring marks the best
    epoch of each. For a run without held-out data, plot the training ELBO.

    :param runs: the epochs of each run, by its name.
    """
    ax = ax or _new_axes(height=3.6 + 0.2 * len(runs))
    curves = []
    for i, (name, epochs) in enumerate(runs.items()):
        numbers = [epoch.epoch for epoch in epochs]
        elbos = np.array([(epoch.validation or epoch.train).elbo for epoch in epochs])
        part = "" if epochs[0].validation else " (training data)"
        marker = "o" if len(epochs) < 10 else None
        colour = COLOURS[i % len(COLOURS)]
        best = _mark_best(ax, numbers, elbos, colour)
        ax.plot(numbers, elbos, label=f"{name}{part}{best}", color=colour, marker=marker)
        curves.append(elbos)
    _finish_curves(ax, curves, "ELBO (nats per datum)", "ELBO of held-out data")
    return ax


@style()
def plot_ess(epochs: "Sequence[Epoch]", num_particles: int, ax: Axes | None = None) -> Axes:
    """Effective sample size of the K weights of an objective over epochs, the mean over data. Near 1, one
    draw of the guide outweighs the others; at K, all weights are equal.

    :param num_particles: K, more than 1.
    """
    ax = ax or _new_axes(height=2.8)
    marker = "o" if len(epochs) < 10 else None
    for part, colour, means in _by_part(epochs):
        sizes = [np.nan if mean.ess is None else mean.ess for mean in means]
        ax.plot([epoch.epoch for epoch in epochs], sizes, label=part, color=colour, marker=marker)
    title = f"Effective sample size of the {num_particles} weights, mean over data"
    ax.set(xlabel="epoch", ylabel="ESS (draws)", title=title, ylim=(1, num_particles))
    ax.legend(loc="upper right")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def _by_part(epochs: "Sequence[Epoch]") -> "Iterator[tuple[str, str, list[MeanElbo]]]":
    """Name, colour and means of the training data, and of the held-out data if there are any."""
    yield "train", BLUE, [epoch.train for epoch in epochs]
    held_out = [epoch.validation for epoch in epochs if epoch.validation is not None]
    if len(held_out) == len(epochs):
        yield "held out", RED, held_out


@style()
def plot_ladder(rungs: "Mapping[str, Sequence[Evidence]]", ax: Axes | None = None) -> Axes:
    """Plot estimates of log p(x), in nats per datum, against their cost: the number of model evaluations per
    datum.

    ``rungs`` maps the name of each estimator to its estimates in order of increasing cost. All estimates are
    for the same data. Error bars are Monte Carlo standard errors.
    """
    ax = ax or _new_axes(height=4)
    for i, (name, estimates) in enumerate(rungs.items()):
        costs, values = [e.cost for e in estimates], [e.mean for e in estimates]
        noise = [e.noise if np.isfinite(e.noise) else 0.0 for e in estimates]
        marker = "os^Dv<>"[i % 7]
        colour = COLOURS[i % len(COLOURS)]
        ax.errorbar(costs, values, noise, marker=marker, capsize=3, label=name, color=colour)
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
                    ax.annotate(text, position, color=COLOURS[i % len(COLOURS)], ha="center", va="bottom")
    ax.set(
        xlabel="model evaluations per datum",
        ylabel="log p(x) (nats per datum)",
        title="Estimates of log p(x)",
    )
    ax.legend(loc="best")
    return ax


@style()
def plot_pareto_k(k: Tensor, ax: Axes | None = None) -> Axes:
    """Histogram of Pareto k̂ over data, with the thresholds 0.5 and 0.7."""
    ax = ax or _new_axes(height=3.2)
    finite = k[k.isfinite()].cpu().numpy()
    ax.hist(finite, bins=40, color=BLUE)
    for threshold, line, text in ((0.5, ":", "good below 0.5"), (0.7, "--", "bad above 0.7")):
        ax.axvline(threshold, color=RED, linestyle=line, label=text)
    ax.set(xlabel="Pareto k of a datum", ylabel="number of data", title="The guide as a proposal")
    ax.legend()
    return ax


def plot_diagnosis(found: "Diagnosis", x: Tensor) -> dict[str, Callable[[], Figure]]:
    """A dict of functions, each of which draws one plot of a diagnosis: Pareto k̂, the data with the largest
    k̂ (if ``x`` are images), and the calibration. A plot without data is left out."""
    plots: dict[str, Callable[[], Figure]] = {}
    if found.pareto_k.isfinite().any():
        plots["pareto-k"] = lambda: figure_of(plot_pareto_k(found.pareto_k))
        if x.dim() in (3, 4):
            title = "The data with the largest Pareto k, in decreasing order"
            plots["worst"] = lambda: figure_of(plot_images(x[found.worst(20)], title=title))
    if found.calibration is not None:
        plots["calibration"] = found.calibration.plot
    return plots


@style()
def plot_images(
    images: Tensor, ax: Axes | None = None, *, columns: int = 10, title: str | None = None
) -> Axes:
    """A grid of images ``(n, height, width)`` or ``(n, channels, height, width)``, row by row, with a common
    range of values. The cell of an image that is all NaN stays empty.

    :raises ValueError: if ``images`` has another shape or number of channels, or there are none.
    """
    _check_images(images, "plot_images")
    sheet = _tiled(images.detach().cpu().double(), columns, gap=max(1, images.shape[-1] // 16))
    low, high = np.nanmin(sheet), np.nanmax(sheet)
    sheet = (sheet - low) / max(high - low, 1e-12)
    rows = -(-len(images) // columns)
    height, width = images.shape[-2:]
    ax = ax or _new_axes(5.5, 5.5 * rows * height / (columns * width) + 0.4)
    # empty cells are white: imshow leaves NaN transparent in grey images, but not in RGB images
    ax.imshow(sheet if sheet.ndim == 2 else np.nan_to_num(sheet, nan=1.0), cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax


def _check_images(images: Tensor, verb: str) -> None:
    """Raise ``ValueError`` for another shape or number of channels, or if there are none."""
    if (
        images.dim() not in (3, 4)
        or not len(images)
        or (images.dim() == 4 and images.shape[1] not in (1, 3, 4))
    ):
        raise ValueError(
            f"{verb}: expected (n, height, width), or (n, channels, height, width) with 1, 3 or 4 "
            f"channels, but got {tuple(images.shape)}"
        )


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


def plot_reconstructions(
    x: Tensor, reconstructions: Tensor, ax: Axes | None = None, *, columns: int = 10
) -> Axes:
    """Plot images ``(n, height, width)`` or ``(n, channels, height, width)``, each row of originals above the
    row of their reconstructions."""
    columns = min(columns, len(x))
    empty = reconstructions.new_full((-len(x) % columns, *x.shape[1:]), torch.nan)
    padded = (torch.cat([images.to(empty), empty]) for images in (x, reconstructions))
    rows = [row for pair in zip(*(images.split(columns) for images in padded), strict=True) for row in pair]
    title = "Originals, each row above its reconstructions"
    return plot_images(torch.cat(rows), ax, columns=columns, title=title)


@torch.no_grad()
def plot_samples(vae: "VAE", n: int = 100, ax: Axes | None = None, *, given: tuple[Tensor, ...] = ()) -> Axes:
    """Plot E[x|z] at n draws of z from the prior, for images ``(height, width)`` or
    ``(channels, height, width)``.

    :param given: the conditions of a conditional VAE, each with n rows.
    """
    images = vae.decode(vae.model.prior(*given).expand((n,)).sample(), *given).mean
    return plot_images(images, ax, title="E[x|z] at draws of z from the prior")


@style()
def plot_points(sets: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Scatter plot of named sets of points, ``(n, 2)`` each."""
    ax = ax or _new_axes(5, 4.6)
    for colour, (name, points) in zip((BLUE, RED, *COLOURS[3:]), sets.items(), strict=False):
        first, second = points.detach().cpu().numpy().T
        ax.scatter(first, second, s=6, alpha=0.5, label=name, color=colour)
    ax.set(xlabel="x[0]", ylabel="x[1]", aspect="equal")
    ax.legend(markerscale=2)
    return ax


@torch.no_grad()
@style()
def plot_manifold(vae: "VAE", ax: Axes | None = None, *, steps: int = 20) -> Axes:
    """Plot E[x|z] on a grid of Gaussian quantiles of a 2-D latent (Kingma & Welling 2013, figure 4)."""
    q = (torch.arange(steps) + 0.5) / steps
    z = torch.distributions.Normal(0.0, 1.0).icdf(q)
    parameter = next(vae.parameters())
    grid = torch.stack(torch.meshgrid(-z, z, indexing="ij")[::-1], -1).reshape(-1, 2).to(parameter)
    sheet = _tiled(vae.decode(grid).mean.cpu(), steps)
    ax = ax or _new_axes(5.5, 5.5 * sheet.shape[0] / sheet.shape[1])
    ax.imshow(sheet, cmap="gray", extent=(0, 1, 0, 1), aspect="auto")
    ax.grid(visible=False)
    ax.set(xlabel="quantile of z[0]", ylabel="quantile of z[1]", title="E[x|z] over the latent plane")
    return ax


@torch.no_grad()
@style()
def plot_latent(
    vae: "VAE",
    x: Tensor,
    labels: Tensor | None = None,
    ax: Axes | None = None,
    *,
    label_names: Sequence[str] | None = None,
    dims: tuple[int, int] | None = None,
    given: tuple[Tensor, ...] = (),
    mask: Tensor | None = None,
) -> Axes:
    """Plot two dimensions of the means of q(z|x), coloured by label. If q(z|x) does not implement its mean,
    such as a flow, plot one draw for each datum instead.

    :param label_names: the names of the labels 0, 1, …, as in ``Data.label_names``.
    :param dims: the dimensions of z, counted from 0. The default are the two in which the points vary most.
    :param given: the conditions of a conditional VAE.
    :param mask: false at missing entries of x.
    :raises ValueError: if z does not have these dimensions.
    """
    kind, points = means_or_draws(vae.encode(x, *given, mask=mask))
    plane = _two_dims(dims, points)
    z = points[:, plane].cpu().numpy()
    ax = ax or _new_axes(5.5, 4.8)
    for label, (rows, colour) in _by_label(labels, label_names, len(x)).items():
        name = label if len(label) <= 24 else f"{label[:23]}…"  # a longer legend leaves no room for the axes
        ax.scatter(z[rows, 0], z[rows, 1], s=14, alpha=0.85, label=name, color=colour, linewidths=0)
    if labels is not None and len(ax.collections) <= _MAX_LABELS:
        ax.legend(title="label", markerscale=2, bbox_to_anchor=(1, 1), loc="upper left")
    xlabel, ylabel = (f"z[{dim}]" for dim in plane)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=f"{kind} of q(z|x), held-out data")
    ax.set_aspect("equal", adjustable="datalim")
    return ax


def _by_label(
    labels: Tensor | None, names: Sequence[str] | None, n: int
) -> dict[str, tuple[np.ndarray, str]]:
    """The rows, bool ``(n,)``, and the colour of each label."""
    if labels is None:
        return {"data": (np.ones(n, dtype=bool), BLUE)}
    array = labels.cpu().numpy()
    return {
        names[label] if names else str(label): (array == label, COLOURS[i % len(COLOURS)])
        for i, label in enumerate(np.unique(array).tolist())
    }


def _two_dims(dims: tuple[int, int] | None, points: Tensor) -> list[int]:
    """``dims`` as a list, or if it is ``None`` the two dimensions of the points ``(n, dim)`` that vary most.
    Raises ``ValueError`` unless the points have two such dimensions."""
    if points.dim() != 2 or points.shape[1] < 2:
        raise ValueError(
            f"dims: expected z of two or more dimensions but got event_shape {tuple(points.shape[1:])}"
        )
    if dims is None:
        return points.var(0, correction=0).topk(2).indices.sort().values.tolist()
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= dim < points.shape[1] for dim in dims):
        raise ValueError(
            f"dims: expected two different dimensions of z, from 0 to {points.shape[1] - 1}, but got {dims}"
        )
    return list(dims)


_MAX_SHEET = 2 * 10**6  # bytes of the images of a latent map, before they are compressed
_MAX_POINTS = 20_000
_MAX_LABELS = 20  # in a legend
_MAP_BODY = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<style>
  .map { display: flex; flex-wrap: wrap; gap: 2rem; margin: 1.5rem 0 }
  #plane { position: relative; flex: 1 1 20rem; max-width: 36rem; aspect-ratio: 1; cursor: crosshair;
    touch-action: none; outline-offset: 4px; border: 1px solid rgba(128, 128, 128, .4) }
  #points { position: absolute; width: 100%; height: 100% }
  #cell { position: absolute; box-sizing: border-box; outline: 2px solid currentColor;
    pointer-events: none;
    box-shadow: 0 0 0 4px var(--paper), inset 0 0 0 2px var(--paper) }
  .map aside { flex: 0 1 14rem; display: flex; flex-wrap: wrap; gap: 0 1rem; align-content: start }
  .map aside p { margin: .6rem 0; flex: 1 1 9rem }
  #image { width: min(14rem, 40vw); height: auto; align-self: start; image-rendering: pixelated;
    border: 1px solid rgba(128, 128, 128, .4) }
  @media (max-width: 45rem) { .map aside { flex-basis: 100% } }
  #where { white-space: pre; font-variant-numeric: tabular-nums }
  .key span { display: inline-block; margin: 0 1rem .2rem 0; white-space: nowrap }
  .key i { display: inline-block; width: .7em; height: .7em; margin-right: .4em; border-radius: 50% }
</style>
<p>{{ about }}</p>
<div class="map">
  <div id="plane" tabindex="0" role="application" aria-label="the latent plane; arrow keys move the cell">
    <canvas id="points"></canvas><div id="cell"></div>
  </div>
  <aside>
    <canvas id="image" width="{{ map.width }}" height="{{ map.height }}"></canvas>
    <p id="where" aria-live="polite"></p>
    {% if key %}
    <p class="key">
    {% for name, colour in key %}
      <span><i style="background: {{ colour }}"></i>{{ name }}</span>
    {% endfor %}
    </p>
    {% endif %}
  </aside>
</div>
<img id="sheet" src="{{ sheet }}" alt="" hidden>
<script type="application/json" id="map">{{ map | tojson }}</script>
<script>{{ script }}</script>
"""
)


@torch.no_grad()
def latent_map(
    vae: "VAE",
    x: Tensor,
    labels: Tensor | None = None,
    *,
    label_names: Sequence[str] | None = None,
    dims: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    title: str = "Latent map",
) -> str:
    """A page, as HTML, with the plane of two latent dimensions: the means of q(z|x) as points coloured by
    label, and the image E[x|z] under the pointer. It is one file of less than 5 MB that loads nothing.

    The images come from the decoder at the centres of the cells of a square grid over the points. The other
    dimensions of z are at their mean over the points. At most 20,000 data are shown, the first.

    :param x: images, ``(n, height, width)`` or ``(n, channels, height, width)``.
    :param label_names: the names of the labels 0, 1, …, as in ``Data.label_names``.
    :param dims: the dimensions of z, counted from 0. The default are the two in which the points vary most.
    :param mask: false at missing entries of x.
    :raises ValueError: if x are not images, z does not have these dimensions, E[x|z] is not finite, or an
        image is so large that a grid of four of them exceeds the size of a page.

    >>> import pyro_vae as pv
    >>> from pyro_vae import conditionals, nets, priors
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=conditionals.Bernoulli(nets.MLP(2, (50,)), event_shape=(8, 8)),
    ...     encoder=conditionals.Normal(nets.MLP(64, (50,)), event_shape=2),
    ... )
    >>> _, test = pv.load("digits")
    >>> page = latent_map(vae, test.x, test.labels)
    >>> len(page) < 5e6  # write it to a file, such as map.html, and open that in a browser
    True
    """
    _check_images(x, "latent_map")
    x, mask = x[:_MAX_POINTS], None if mask is None else mask[:_MAX_POINTS]
    kind, points = means_or_draws(vae.encode(x, mask=mask))
    plane = _two_dims(dims, points)
    z = points[:, plane]
    low, high = z.amin(0), z.amax(0)
    size = 1.06 * (high - low).max().clamp_min(1e-3)
    low = (low + high - size) / 2
    pixels = x[0].numel()
    steps = min(40, int((_MAX_SHEET / pixels) ** 0.5))
    if steps < 2:
        raise ValueError(
            f"latent_map: x has {pixels} values in each image; expected at most {_MAX_SHEET // 4}"
        )
    centres = low + (torch.arange(steps, device=z.device).unsqueeze(1) + 0.5) * (size / steps)
    # row by row from the upper left
    cells = torch.stack(torch.meshgrid(centres[:, 1].flip(0), centres[:, 0], indexing="ij")[::-1], -1)
    grid = points.mean(0).repeat(steps**2, 1)
    grid[:, plane] = cells.reshape(-1, 2)
    images = torch.cat([vae.decode(rows).mean for rows in grid.split(1000)]).double()
    if not (images.isfinite().all() and z.isfinite().all()):
        raise ValueError("latent_map: q(z|x) or E[x|z] is not finite; train again with a lower learning rate")
    darkest, brightest = min(0.0, images.min().item()), max(1.0, images.max().item())
    sheet = _tiled((images - darkest) / (brightest - darkest), steps)
    key = _by_label(None if labels is None else labels[: len(x)], label_names, len(x))
    index = np.zeros(len(x), dtype=int)
    for i, (rows, _) in enumerate(key.values()):
        index[rows] = i
    others = points.shape[1] - 2
    about = (
        f"{kind} of q(z|x) of {len(x)} data, with z[{plane[0]}] horizontal and z[{plane[1]}] vertical. "
        "The image is E[x|z] at the centre of the marked cell: move the pointer, or press the arrow keys."
    )
    if others > 0:
        about += f" The other {others} dimensions of z are at their mean over these data."
    if (darkest, brightest) != (0.0, 1.0):
        about += f" Grey levels are from {darkest:.3g} (black) to {brightest:.3g} (white)."
    body = _MAP_BODY.render(
        about=about,
        key=[(name, colour) for name, (_, colour) in key.items()] if 1 < len(key) <= _MAX_LABELS else (),
        map={
            "dims": plane,
            "low": low.tolist(),
            "size": size.item(),
            "steps": steps,
            "width": x.shape[-1],
            "height": x.shape[-2],
            "colours": [colour for _, colour in key.values()],
            "points": [
                [round(a, 3), round(b, 3), i] for (a, b), i in zip(z.tolist(), index.tolist(), strict=True)
            ],
        },
        sheet=data_url(_as_png(sheet)),
        script=Markup(resources.files("pyro_vae").joinpath("latent_map.js").read_text(encoding="utf-8")),
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return page(title, Markup(body), policy=policy)


def _as_png(image: np.ndarray) -> bytes:
    """An image in [0, 1], ``(height, width)`` or ``(height, width, channels)``, as a PNG file of bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def means_or_draws(distribution: TorchDistribution) -> tuple[str, Tensor]:
    """``"Means"`` and the means, or ``"Draws"`` and draws if the distribution does not implement its mean."""
    try:
        return "Means", distribution.mean
    except NotImplementedError:
        return "Draws", distribution.sample()
