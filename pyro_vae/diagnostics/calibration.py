"""Calibration of an amortized guide on data simulated from its model, without a refit."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.data.batches import Batch, slices
from pyro_vae.diagnostics.compare import LEVELS
from pyro_vae.evidence import simulate
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program
from pyro_vae.plots import BLUE, style

_BINS = 20
_CHUNK_ROWS = 50  # data that are processed at once


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true latents z* among L = ``num_draws`` draws of the guide. They are uniform if
    q(z|x) = p(z|x).

    ranks: ``(num_simulations, statistics)``, the number of draws with a smaller statistic than z*, in 0…L.
    statistics: names of the ranked statistics of z: each latent dimension; ``"log p(x|z)"``, which depends on
    x, so that a guide equal to the prior fails (Modrák et al. 2023); ``"distance"``, the distance from a
    reference point that depends on x (TARP, Lemos et al. 2023). Its rank/L estimates the
    probability under q(z|x) of the ball around the reference point with z* on its surface.
    coverage: fraction of the true latents in the guide's central 50, 90 and 95 % intervals, ``(dim, 3)``.
    """

    ranks: Tensor
    statistics: tuple[str, ...]
    num_draws: int
    coverage: Tensor

    @property
    def p_values(self) -> Tensor:
        """p-value of a χ² test of uniform ranks in 20 bins, ``(statistics,)``."""
        n, size = len(self.ranks), (self.num_draws + 1) // _BINS
        counts = torch.stack(
            [torch.bincount(column // size, minlength=_BINS) for column in self.ranks.unbind(1)]
        ).double()
        square = ((counts - n / _BINS) ** 2 / (n / _BINS)).sum(1)
        return torch.special.gammaincc(torch.tensor((_BINS - 1) / 2).double(), square / 2)

    @property
    def coverage_se(self) -> Tensor:
        """Binomial standard errors of the coverage of a calibrated guide, ``(3,)``."""
        level = torch.tensor(LEVELS).double()
        return (level * (1 - level) / len(self.ranks)).sqrt()

    def rejected(self, level: float = 0.01) -> tuple[str, ...]:
        """Statistics with non-uniform ranks, at a family-wise error rate of ``level`` (Bonferroni)."""
        is_rejected = self.p_values < level / len(self.statistics)
        return tuple(name for name, bad in zip(self.statistics, is_rejected.tolist(), strict=True) if bad)

    def shape(self, statistic: str) -> str:
        """Shape of the rank histogram of a statistic: ``"U"`` if the guide is too narrow, ``"hump"`` if it is
        too wide, ``"slope"`` if it is biased, else ``"flat"``."""
        u = (self.ranks[:, self.statistics.index(statistic)].double() + 0.5) / (self.num_draws + 1)
        n = len(u)
        slope = (u.mean() - 0.5) / math.sqrt(1 / 12 / n)
        width = (((u - 0.5) ** 2).mean() - 1 / 12) / math.sqrt(1 / 180 / n)
        if max(abs(slope), abs(width)) < 3:
            return "flat"
        if abs(slope) > abs(width):
            return "slope"
        return "U" if width > 0 else "hump"

    def __str__(self) -> str:
        lines = [f"{len(self.ranks)} simulations, {self.num_draws} draws of the guide each"]
        lines += [
            f"{name:16} p = {p:.2g}, {self.shape(name)}"
            for name, p in zip(self.statistics, self.p_values.tolist(), strict=True)
        ]
        means = ", ".join(
            f"{level:.0%}: {c:.1%} ± {e:.1%}"
            for level, c, e in zip(
                LEVELS, self.coverage.mean(0).tolist(), self.coverage_se.tolist(), strict=True
            )
        )
        lines.append(f"coverage of central intervals, mean over dimensions: {means}")
        bad = self.rejected()
        lines.append(
            f"not calibrated: {', '.join(bad)}" if bad else "calibration is not rejected at the 1 % level"
        )
        return "\n".join(lines)

    @style()
    def plot(self) -> Figure:
        """Histograms of the ranks, each with the 99 % band of the counts of a calibrated guide."""
        columns = min(2, len(self.statistics))
        rows = -(-len(self.statistics) // columns)
        fig, axes = plt.subplots(rows, columns, figsize=(2.75 * columns, 2.2 * rows), squeeze=False)
        n = len(self.ranks)
        expected, spread = n / _BINS, 2.58 * math.sqrt(n / _BINS * (1 - 1 / _BINS))
        for ax, name, ranks in zip(axes.flat, self.statistics, self.ranks.unbind(1), strict=False):
            ax.axhspan(expected - spread, expected + spread, color="0.85")
            ax.hist(ranks.cpu().numpy(), bins=np.linspace(-0.5, self.num_draws + 0.5, _BINS + 1), color=BLUE)
            ax.set(title=name, xlabel="rank", ylabel="simulations")
        for ax in list(axes.flat)[len(self.statistics) :]:
            ax.set_axis_off()
        return fig


def calibration(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    seed: int = 0,
    check: bool = True,
) -> Calibration:
    """Simulation-based calibration (Talts et al. 2018), interval coverage and TARP, of an amortized guide.

    Draws (x, z*) from the model and ranks z* among draws z ~ q(z|x). The guide is not refitted. A guide equal
    to the prior passes in every latent dimension, but fails in ``log p(x|z)``.

    :param data: as for :func:`~pyro_vae.fit`. The simulated data have its shapes and conditions, see
        :func:`~pyro_vae.evidence.simulate`. Rows are repeated until there are ``num_simulations``.
    :param num_simulations: number of simulated data, at least 100.
    :param num_draws: L, the number of draws for each simulated datum; L + 1 must be a multiple of 20.
    :raises ValueError: if ``num_draws`` or ``num_simulations`` is invalid.
    """
    if (num_draws + 1) % _BINS or num_simulations < 5 * _BINS:
        raise ValueError(
            f"calibration: expected num_draws + 1 to be a multiple of {_BINS}, such as num_draws=99, and "
            f"num_simulations ≥ {5 * _BINS}, but got {num_draws} and {num_simulations}"
        )
    whole = read_whole(data, seed=seed).map(lambda part: part[torch.arange(num_simulations) % len(part)])
    simulated = simulate(model, whole, seed=seed, check=check)
    with untouched(training=False, seed=seed + 1), torch.no_grad():
        latents, given = inspect_latents(model, guide, simulated.batch, verb="calibration", check=check)
        true = latents.flat(simulated.latents, 1, num_simulations)[0]
        names = latents.names
        reference = _reference_points(given, true)
        ranks = []
        for rows in slices(num_simulations, _CHUNK_ROWS):
            batch, z_true = given.rows(rows), true[rows]
            z, _ = latents.draw(guide, batch, num_draws)
            candidates = torch.cat([z_true.unsqueeze(0), z])  # the true latents first
            log_prior, log_joint = latents.log_prior_and_joint(model, batch, candidates)
            distance = ((candidates - reference[rows]) / true.std(0).clamp_min(1e-12)).norm(dim=-1)
            log_likelihood = log_joint - log_prior
            statistics = torch.cat([candidates, log_likelihood.unsqueeze(-1), distance.unsqueeze(-1)], -1)
            ranks.append(_rank_of_first(statistics))
    all_ranks = torch.cat(ranks)
    return Calibration(
        all_ranks,
        (*names, "log p(x|z)", "distance"),
        num_draws,
        _coverage(all_ranks[:, : len(names)], num_draws),
    )


def _coverage(ranks: Tensor, num_draws: int) -> Tensor:
    """Fraction of ranks in the central intervals, ``(dim, 3)``. A rank r counts as a uniform distribution
    from r/(L + 1) to (r + 1)/(L + 1)."""
    left, right = ranks.double() / (num_draws + 1), (ranks.double() + 1) / (num_draws + 1)
    inside = [
        (right.clamp_max((1 + level) / 2) - left.clamp_min((1 - level) / 2)).clamp_min(0).mean(0)
        * (num_draws + 1)
        for level in LEVELS
    ]
    return torch.stack(inside, -1)


def _rank_of_first(values: Tensor) -> Tensor:
    """Rank of ``values[0]`` among ``values[1:]``, ties broken at random: ``(1 + L, rows, statistics)`` →
    ``(rows, statistics)``."""
    below, tied = (values[1:] < values[:1]).sum(0), (values[1:] == values[:1]).sum(0)
    return below + (torch.rand(tied.shape, device=tied.device) * (tied + 1)).long()


def _reference_points(batch: Batch, true: Tensor) -> Tensor:
    """Reference points, ``(rows, dim)``: for each datum a random linear map of x, shifted and scaled to the
    mean and standard deviation of the true latents."""
    x = torch.cat([part.reshape(len(part), -1).to(true) for part in batch.tensors.values()], -1)
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    weight = torch.randn(x.shape[1], true.shape[1], dtype=x.dtype, device=x.device) / math.sqrt(x.shape[1])
    return true.mean(0) + x @ weight * true.std(0)
