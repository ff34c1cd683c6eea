"""Comparison of a guide with an exact posterior, per datum."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.data.batches import Batch, fitting, slices
from pyro_vae.diagnostics.drawing import draw_posteriors, draw_ranking
from pyro_vae.diagnostics.families import UnknownFamily, as_gaussian, wasserstein
from pyro_vae.diagnostics.gap import GapSplit, split_gap
from pyro_vae.diagnostics.tables import over_data, table
from pyro_vae.exact.grid import log_evidence_of, posterior_of
from pyro_vae.html import note, notebook, plus_minus
from pyro_vae.html import table as html_table
from pyro_vae.numerics import covariance
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program
from pyro_vae.plots import embedded

LEVELS = (0.5, 0.9, 0.95)
_MAX_DRAWS = 2**21  # particles × data that are in memory at once


@dataclass(frozen=True)
class Comparison:
    """Divergences and errors of a guide q against the exact posterior p, per datum, ``(batch,)``, in nats.

    The standard errors ``*_se`` are 0 for quantities in closed form.

    elbo: E_q[log p(x, z) − log q(z|x)], a lower bound of log_evidence = log p(x). gap: KL(q‖p) = log p(x) −
    ELBO. forward_kl: KL(p‖q), large if q misses a mode; ``nan`` if the density of q cannot be
    evaluated at draws of p. mean_error: ‖E_q z − E_p z‖. covariance_error: Frobenius norm of the difference
    of covariances. w2: W₂(q, p), ``nan`` unless q and p are Gaussian. coverage: ``(batch, 3)``, probability
    under p of the guide's central 50, 90 and 95 % intervals, averaged over latent dimensions. split: the gap
    as a sum of approximation and amortization gap, or ``None``; its amortization is this gap minus the
    approximation, while :func:`split_gap` estimates it from draws of its own.
    """

    elbo: Tensor
    elbo_se: Tensor
    log_evidence: Tensor
    gap: Tensor
    gap_se: Tensor
    forward_kl: Tensor
    forward_kl_se: Tensor
    mean_error: Tensor
    covariance_error: Tensor
    w2: Tensor
    coverage: Tensor
    split: GapSplit | None
    _pair: tuple[Any, Program, Batch] = field(repr=False)

    def rows(self) -> dict[str, tuple[float, float]]:
        """Means over data with their standard errors, which include the Monte Carlo error."""
        parts = {
            "ELBO": self.elbo,
            "log evidence": self.log_evidence,
            "gap KL(q||p)": self.gap,
            "KL(p||q)": self.forward_kl,
            "error of the mean": self.mean_error,
            "error of the covariance": self.covariance_error,
            "W2": self.w2,
        }
        parts |= {f"coverage of {level:.0%}": self.coverage[:, i] for i, level in enumerate(LEVELS)}
        if self.split is not None:
            parts["gap: approximation"] = self.split.approximation
            parts["gap: amortization"] = self.split.amortization
        return {name: over_data(value) for name, value in parts.items()}

    def __str__(self) -> str:
        return table(f"{len(self.elbo)} data, means in nats per datum", self.rows())

    def _repr_html_(self) -> str:
        return notebook(
            note(f"Means over {len(self.elbo)} data in nats per datum, ± their standard error over data"),
            html_table(
                [
                    (name, plus_minus(mean, error, 4))
                    for name, (mean, error) in self.rows().items()
                    if not math.isnan(mean)
                ],
                ("", "mean"),
            ),
            embedded(self.plot(), "exact posterior and guide"),
        )

    def plot(self, num_data: int = 4) -> Figure:
        """Contours of the exact posterior and the guide, which enclose 50 and 95 % of the mass, for the first
        ``num_data`` data; a scatter plot of the first two latent dimensions if there are more than two."""
        exact_model, guide, batch = self._pair
        return draw_posteriors(exact_model, {"guide": guide}, batch.first(num_data))


@dataclass(frozen=True)
class GuideComparison:
    """Comparisons of several guides of one model on the same data, by name, sorted by mean gap, smallest
    first."""

    comparisons: Mapping[str, Comparison]

    def rows(self) -> dict[str, list[tuple[float, float]]]:
        """Mean over data and its standard error of each quantity, for each guide; ``nan`` if it is not
        known."""
        columns = [comparison.rows() for comparison in self.comparisons.values()]
        names = dict.fromkeys(
            key for column in columns for key, (mean, _) in column.items() if not math.isnan(mean)
        )
        return {key: [column.get(key, (math.nan, math.nan)) for column in columns] for key in names}

    def __str__(self) -> str:
        widths = [max(len(name), 17) for name in self.comparisons]
        lines = [[f"{name:>{width}}" for name, width in zip(self.comparisons, widths, strict=True)]]
        for cells in self.rows().values():
            texts = (
                f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}") for mean, error in cells
            )
            lines.append([f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)])
        return "\n".join(
            f"{key:24}" + "  ".join(line) for key, line in zip(["", *self.rows()], lines, strict=True)
        )

    def _repr_html_(self) -> str:
        rows = [
            (key, *("–" if math.isnan(mean) else plus_minus(mean, error, 4) for mean, error in cells))
            for key, cells in self.rows().items()
        ]
        return notebook(
            note("Means over data in nats per datum, ± their standard error over data"),
            html_table(rows, ("", *self.comparisons)),
            embedded(self.plot(), "exact posterior, guides and gaps"),
        )

    def plot(self, num_data: int = 3) -> Figure:
        """Contours of the guides over the exact posterior, which enclose 50 and 95 % of the mass, and a bar
        chart of the mean gaps of all data with the standard errors of the table. A bar is split into
        approximation and amortization gap if these are known."""
        exact_model, _, batch = next(iter(self.comparisons.values()))._pair
        guides = {name: comparison._pair[1] for name, comparison in self.comparisons.items()}
        gaps = {name: (comparison.gap, comparison.split) for name, comparison in self.comparisons.items()}
        return draw_ranking(exact_model, guides, batch.first(num_data), gaps)


def compare(
    exact_model: Any,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 10_000,
    split: bool = True,
    seed: int = 0,
    check: bool = True,
) -> Comparison:
    """Compare a guide with the exact posterior of its model. The parameters of both programs are
    unchanged.

    If guide and posterior are Gaussian, divergences and moments are in closed form. Otherwise they are
    estimated from ``num_particles`` draws of q and of p.

    :param exact_model: a model of :mod:`pyro_vae.exact`, or any Pyro model with methods ``posterior(x)`` and
        ``log_evidence(x)`` that take the arguments of the model.
    :param data: as for :func:`~pyro_vae.fit`.
    :param split: also split the gap (see :func:`split_gap`), if the guide's family is supported.
    :raises ValueError: if the model has no exact posterior, a latent is discrete, or the guide lacks a
        latent.
    """
    if not hasattr(exact_model, "posterior") or not hasattr(exact_model, "log_evidence"):
        raise ValueError(
            f"compare: {type(exact_model).__name__} has no posterior(x) and log_evidence(x); expected a "
            "model of pyro_vae.exact, or pyro_vae.exact.Grid(model) for one or two latent dimensions"
        )
    if num_particles < 2:
        raise ValueError(f"compare: expected num_particles ≥ 2, for standard errors, but got {num_particles}")
    batch = fitting(read_whole(data, seed=seed), exact_model, guide)
    # the draws for all data may not fit in memory
    chunks = slices(batch.num_rows, max(1, _MAX_DRAWS // num_particles))
    parts = [
        _compare_rows(exact_model, guide, batch.rows(part), num_particles, split, seed, check)
        for part in chunks
    ]
    splits = [part.pop("split") for part in parts]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Comparison(**columns, split=_concatenate(splits), _pair=(exact_model, guide, batch))


def _concatenate(splits: list[GapSplit | None]) -> GapSplit | None:
    """Concatenate the results of :func:`split_gap` for consecutive chunks of the data. ``None`` if no chunk
    has one."""
    known = [split for split in splits if split is not None]
    if not known:
        return None
    names = [part.name for part in fields(GapSplit) if part.name != "steps"]
    joined = {name: torch.cat([getattr(split, name) for split in known]) for name in names}
    return GapSplit(**joined, steps=max(split.steps for split in known))


def _compare_rows(
    exact_model: Any, guide: Program, batch: Batch, num_particles: int, split: bool, seed: int, check: bool
) -> dict[str, Any]:
    """The fields of a :class:`Comparison` for a chunk of the data."""
    given = batch
    log_evidence, posterior = log_evidence_of(exact_model, batch), posterior_of(exact_model, batch)
    if getattr(posterior.support, "is_discrete", False):
        raise ValueError("compare: the posterior is discrete; expected continuous latents")
    with untouched(training=False, seed=seed), torch.no_grad():
        latents, batch = inspect_latents(exact_model, guide, batch, verb="compare", check=check)
        z_q, log_q = latents.draw(guide, batch, num_particles)
        log_p = latents.log_joint(exact_model, batch, z_q) - log_evidence
        draws = posterior.sample((num_particles,))
        z_p = draws.reshape(num_particles, batch.num_rows, -1)
        try:
            forward = posterior.log_prob(draws) - latents.log_q(guide, batch, z_p)
        except (KeyError, NotImplementedError):  # a transform without an inverse, such as a planar flow
            forward = torch.full_like(log_p, math.nan)
        gaussians = _gaussians(latents.distribution(guide, batch), posterior, z_q[:2], log_q[:2])
    gap, gap_se = _mean_and_se(log_q - log_p)
    forward_kl, forward_kl_se = _mean_and_se(forward)
    moments = [(z.mean(0), covariance(z)) for z in (z_q, z_p)]
    w2 = torch.full_like(log_evidence, math.nan)
    if gaussians is not None:
        q, p = gaussians
        gap, forward_kl = (torch.distributions.kl_divergence(a, b) for a, b in ((q, p), (p, q)))
        gap_se = forward_kl_se = torch.zeros_like(gap)
        moments = [(g.loc, g.covariance_matrix) for g in (q, p)]
        w2 = wasserstein(q, p)
    gap, forward_kl, w2 = (part.to(log_evidence) for part in (gap, forward_kl, w2))
    parts = _split(exact_model, guide, given, log_evidence, num_particles, seed) if split else None
    if parts is not None:  # one estimate of the gap, so that its parts add up to it
        parts = replace(
            parts,
            amortization=gap - parts.approximation,
            amortization_se=torch.hypot(gap_se.to(gap), parts.approximation_se),
        )
    return {
        "elbo": log_evidence - gap,
        "elbo_se": gap_se,
        "log_evidence": log_evidence,
        "gap": gap,
        "gap_se": gap_se,
        "forward_kl": forward_kl,
        "forward_kl_se": forward_kl_se,
        "mean_error": (moments[0][0] - moments[1][0]).norm(dim=-1),
        "covariance_error": (moments[0][1] - moments[1][1]).flatten(1).norm(dim=-1),
        "w2": w2,
        "coverage": torch.stack([_coverage(z_q, z_p, level) for level in LEVELS], -1),
        "split": parts,
    }


def compare_guides(
    exact_model: Any,
    guides: Mapping[str, Program],
    data: Any,
    *,
    num_particles: int = 10_000,
    split: bool = True,
    seed: int = 0,
    check: bool = True,
) -> GuideComparison:
    """Compare several guides of one model on the same data, ranked by mean gap; see :func:`compare`.

    :param guides: guides by name, such as ``{"mean-field": g1, "full covariance": g2}``. The other arguments
        are those of :func:`compare`.
    :raises ValueError: if ``guides`` is empty, and in the cases of :func:`compare`.
    """
    if not guides:
        raise ValueError("compare_guides: got no guides; expected a dict of name to guide")
    batch = read_whole(data, seed=seed)
    comparisons = {
        name: compare(
            exact_model, guide, batch, num_particles=num_particles, split=split, seed=seed, check=check
        )
        for name, guide in guides.items()
    }
    return GuideComparison(dict(sorted(comparisons.items(), key=lambda item: item[1].gap.mean().item())))


def _mean_and_se(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and its standard error."""
    return terms.mean(0), terms.std(0) / math.sqrt(len(terms))


def _coverage(z_q: Tensor, z_p: Tensor, level: float) -> Tensor:
    """Fraction of draws of p in the central interval of q, averaged over dimensions: ``(batch,)``."""
    ordered, n = z_q.sort(0).values, len(z_q)
    low, high = (ordered[round(q * (n - 1))] for q in ((1 - level) / 2, (1 + level) / 2))
    return ((z_p >= low) & (z_p <= high)).to(z_q.dtype).mean((0, 2))


def _gaussians(distribution: Any, posterior: Any, z: Tensor, log_q: Tensor) -> tuple[Any, Any] | None:
    """Guide and posterior as :class:`MultivariateNormal`, or ``None`` if either is not Gaussian.

    A guide with a mask or a factor is not Gaussian: its ``log_q`` differs from the Gaussian log-density of z.
    """
    n = z.shape[1]
    q = None if distribution is None else as_gaussian(distribution, n)
    p = as_gaussian(posterior, n)
    if (
        q is None
        or p is None
        or not torch.allclose(q.log_prob(z.double()), log_q.double(), rtol=1e-4, atol=1e-4)
    ):
        return None
    return q, p


def _split(
    model: Any, guide: Program, batch: Batch, log_evidence: Tensor, num_particles: int, seed: int
) -> GapSplit | None:
    try:
        return split_gap(
            model, guide, batch, log_evidence=log_evidence, num_particles=num_particles, seed=seed
        )
    except UnknownFamily:
        return None
