"""Is a guide calibrated? Data are simulated from the model, and the guide is asked for them: nothing is
fitted again."""

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

_BINS = 20
_ROWS = 50  # data at a time


@dataclass(frozen=True)
class Calibration:
    """Ranks of the latents that made the data among the guide's draws: uniform where q(z|x) is the posterior.

    ranks: ``(num_simulations, statistics)``, how many of the ``num_draws`` draws lie below, in 0…L.
    statistics: every latent dimension; ``"log p(x|z)"``, which depends on the data and so tells the posterior
    from the prior (Modrák et al. 2023); ``"distance"``, TARP's: the distance from a reference point that
    depends on x (Lemos et al. 2023), whose rank/L is the expected coverage. p_values: of uniformity, by χ²
    over 20 bins, for each statistic. coverage: the share of the true latents in the guide's central 50, 90
    and 95 % intervals, ``(dim, 3)``.
    """

    ranks: Tensor
    statistics: tuple[str, ...]
    num_draws: int
    coverage: Tensor

    @property
    def p_values(self) -> Tensor:
        n, size = len(self.ranks), (self.num_draws + 1) // _BINS
        counts = torch.stack(
            [torch.bincount(column // size, minlength=_BINS) for column in self.ranks.unbind(1)]
        ).double()
        square = ((counts - n / _BINS) ** 2 / (n / _BINS)).sum(1)
        return torch.special.gammaincc(torch.tensor((_BINS - 1) / 2).double(), square / 2)

    @property
    def coverage_se(self) -> Tensor:
        """Standard errors of a calibrated guide's coverage, by the binomial, ``(3,)``."""
        level = torch.tensor(LEVELS).double()
        return (level * (1 - level) / len(self.ranks)).sqrt()

    def rejected(self, level: float = 0.01) -> tuple[str, ...]:
        """The statistics that a calibrated guide would show with probability below ``level`` in all
        (Bonferroni)."""
        found = self.p_values < level / len(self.statistics)
        return tuple(name for name, bad in zip(self.statistics, found.tolist(), strict=True) if bad)

    def shape(self, statistic: str) -> str:
        """What the histogram of a statistic looks like: ``"U"``, the guide is too narrow; ``"hump"``, too
        wide; ``"slope"``, biased; ``"flat"``."""
        share = (self.ranks[:, self.statistics.index(statistic)].double() + 0.5) / (self.num_draws + 1)
        n = len(share)
        slope = (share.mean() - 0.5) / math.sqrt(1 / 12 / n)
        width = (((share - 0.5) ** 2).mean() - 1 / 12) / math.sqrt(1 / 180 / n)
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
            f"not calibrated: {', '.join(bad)}" if bad else "no sign against calibration at the 1 % level"
        )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Histograms of the ranks, each with the band of 99 % in which a calibrated guide's bars lie."""
        columns = min(4, len(self.statistics))
        rows = -(-len(self.statistics) // columns)
        fig, axes = plt.subplots(
            rows, columns, figsize=(2.8 * columns, 2.2 * rows), squeeze=False, layout="constrained"
        )
        n = len(self.ranks)
        expected, spread = n / _BINS, 2.58 * math.sqrt(n / _BINS * (1 - 1 / _BINS))
        for ax, name, ranks in zip(axes.flat, self.statistics, self.ranks.unbind(1), strict=False):
            ax.axhspan(expected - spread, expected + spread, color="0.85")
            ax.hist(ranks.numpy(), bins=np.linspace(-0.5, self.num_draws + 0.5, _BINS + 1), color="C0")
            ax.set(title=name, xlabel="rank", yticks=[])
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

    (x, z*) are drawn from the model, and z* ranked among draws z ~ q(z|x). No refit: the guide is asked for
    data that it has not seen. q = prior passes in every latent dimension, but not in ``log p(x|z)``.

    :param data: as for :func:`~pyro_vae.fit`, of the shape to simulate, see
        :func:`~pyro_vae.evidence.simulate`. Their rows are repeated to ``num_simulations``.
    :param num_draws: L, with L + 1 a multiple of 20.
    :raises ValueError: for another L, or fewer than 100 simulations.
    """
    if (num_draws + 1) % _BINS or num_simulations < 5 * _BINS:
        raise ValueError(
            f"calibration: expected num_draws + 1 to be a multiple of {_BINS}, such as 99, and {5 * _BINS} "
            f"simulations or more, but got {num_draws} and {num_simulations}"
        )
    whole = read_whole(data, seed=seed).map(lambda part: part[torch.arange(num_simulations) % len(part)])
    simulated = simulate(model, whole, seed=seed, check=check)
    with untouched(training=False, seed=seed + 1), torch.no_grad():
        latents, given = inspect_latents(model, guide, simulated.batch, verb="calibration", check=check)
        true = latents.flat(simulated.latents, 1, num_simulations)[0]
        names = []
        for name, site in latents.sites.items():
            size = site.shape.numel()
            names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
        reference = _reference(given, true)
        ranks = []
        for rows in slices(num_simulations, _ROWS):
            batch, z_true = given.rows(rows), true[rows]
            z, _ = latents.draw(guide, batch, num_draws)
            both = torch.cat([z_true.unsqueeze(0), z])
            log_prior, log_joint = latents.log_prior_and_joint(model, batch, both)
            distance = ((both - reference[rows]) / true.std(0).clamp_min(1e-12)).norm(dim=-1)
            statistics = torch.cat([both, (log_joint - log_prior).unsqueeze(-1), distance.unsqueeze(-1)], -1)
            ranks.append(_ranks(statistics))
    found = torch.cat(ranks)
    return Calibration(
        found, (*names, "log p(x|z)", "distance"), num_draws, _coverage(found[:, : len(names)], num_draws)
    )


def _coverage(ranks: Tensor, num_draws: int) -> Tensor:
    """The share of ranks in the central intervals, each rank spread over its cell: ``(dim, 3)``."""
    left, right = ranks.double() / (num_draws + 1), (ranks.double() + 1) / (num_draws + 1)
    inside = [
        (right.clamp_max((1 + level) / 2) - left.clamp_min((1 - level) / 2)).clamp_min(0).mean(0)
        * (num_draws + 1)
        for level in LEVELS
    ]
    return torch.stack(inside, -1)


def _ranks(values: Tensor) -> Tensor:
    """Of the first among the others, ties at random: ``(1 + L, rows, statistics)`` → ``(rows,
    statistics)``."""
    below, tied = (values[1:] < values[:1]).sum(0), (values[1:] == values[:1]).sum(0)
    return below + (torch.rand(tied.shape, device=tied.device) * (tied + 1)).long()


def _reference(batch: Batch, true: Tensor) -> Tensor:
    """A point for each datum, a random linear map of the data at the scale of the latents."""
    x = torch.cat([part.reshape(len(part), -1).to(true) for part in batch.tensors.values()], -1)
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    mapped = (
        x @ torch.randn(x.shape[1], true.shape[1], dtype=x.dtype, device=x.device) / math.sqrt(x.shape[1])
    )
    return true.mean(0) + mapped * true.std(0)
