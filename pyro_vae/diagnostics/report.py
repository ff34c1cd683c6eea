"""Summary of the diagnostics of a pair that need no exact posterior."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from pyro_vae.diagnostics.calibration import Calibration, calibration
from pyro_vae.diagnostics.usage import LatentUsage, latent_usage
from pyro_vae.evidence import Evidence, elbo, importance
from pyro_vae.html import notebook, plus_minus, table
from pyro_vae.pairs.preserve import read_whole
from pyro_vae.pairs.traces import Program
from pyro_vae.plots import embedded, plot_pareto_k

_NUMBERS = "elbo", "elbo_se", "importance", "importance_se", "pareto_k_median"  # of to_dict; may be NaN
_JOINT_NOTES = (
    "latent dimensions: not computed: their use is measured across data, but joint=True treats all data as "
    "one datum",
    "calibration: not computed: with joint=True it needs a guide that is amortized over data sets",
)


@dataclass(frozen=True)
class Diagnosis:
    """Result of :func:`diagnose`. ``usage`` and ``calibration`` are ``None`` if they are not computed;
    ``notes`` gives the reasons. ``first_row`` is added to the numbers of rows where they are printed, and
    in :meth:`to_dict`, if the data are a slice of a larger set."""

    elbo: Evidence
    importance: Evidence
    usage: LatentUsage | None
    calibration: Calibration | None
    notes: tuple[str, ...]
    first_row: int = 0

    @property
    def pareto_k(self) -> Tensor:
        """k̂ of the importance weights of each datum, ``(batch,)``: below 0.5 the guide is a good proposal,
        above 0.7 an unreliable one."""
        k = self.importance.pareto_k
        return torch.full_like(self.importance.log_evidence, torch.nan) if k is None else k

    def worst(self, n: int = 10) -> Tensor:
        """Indices of the ``n`` data with the largest k̂, in decreasing order."""
        return self.pareto_k.nan_to_num(nan=-torch.inf).argsort(descending=True)[:n]

    def __str__(self) -> str:
        k, gap = self.pareto_k, self.importance.log_evidence - self.elbo.log_evidence
        edges = (-torch.inf, 0.5, 0.7, torch.inf)
        good, usable, bad = (
            ((k >= a) & (k < b)).double().mean().item() for a, b in itertools.pairwise(edges)
        )
        data = "nats, all data together" if self.importance.joint else f"nats per datum, {len(k)} data"
        lines = [
            "EVIDENCE",
            f"ELBO {self.elbo.mean:.2f}, IWAE-{self.importance.num_particles} {self.importance.mean:.2f} "
            f"{data}: KL(q||p) is {gap.double().mean():.2f} or more",
            "GUIDE AS A PROPOSAL",
        ]
        if self.importance.joint:
            lines.append(
                f"Pareto k: {k.item():.2f} (good below 0.5, usable below 0.7); "
                f"effective sample size {self.importance.ess.item():.1f} of {self.importance.num_particles}"
            )
        else:
            lines += [
                f"Pareto k: good (below 0.5) {good:.0%}, usable (below 0.7) {usable:.0%}, bad {bad:.0%}; "
                f"median {k.nanmedian():.2f}",
                "worst data: "
                + ", ".join(f"{i + self.first_row} ({k[i]:.2f})" for i in self.worst(8).tolist()),
            ]
        if self.usage is not None:
            lines += ["LATENT DIMENSIONS", str(self.usage)]
        if self.calibration is not None:
            lines += ["CALIBRATION ON SIMULATED DATA", str(self.calibration)]
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the diagnosis, as JSON types: means over data in nats, and shares of the data.
        ``None`` if not computed."""
        k, usage, calibrated = self.pareto_k.double(), self.usage, self.calibration
        return {
            "num_data": len(k),
            "num_particles": self.importance.num_particles,
            "elbo": self.elbo.mean,
            "elbo_se": self.elbo.mean_se,
            "importance": self.importance.mean,
            "importance_se": self.importance.mean_se,
            "pareto_k_median": k.nanmedian().item(),
            "pareto_k_above_0.5": (k > 0.5).double().mean().item(),
            "pareto_k_above_0.7": (k > 0.7).double().mean().item(),
            "worst": (self.worst(8) + self.first_row).tolist(),
            "num_active": None if usage is None else int(usage.active.sum()),
            "latent_dim": None if usage is None else len(usage.activity),
            "kl": None if usage is None else usage.mean_kl,
            "mutual_information": None if usage is None else usage.mutual_information,
            "not_calibrated": None if calibrated is None else list(calibrated.rejected()),
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        pictures = []
        if self.pareto_k.isfinite().any():
            pictures.append(embedded(plot_pareto_k(self.pareto_k), "Pareto k"))
        if self.calibration is not None:
            pictures.append(embedded(self.calibration.plot(), "calibration"))
        return notebook(summary_table(self.to_dict()), *pictures)


def summary_table(record: Mapping[str, Any]) -> Markup:
    """The result of :meth:`Diagnosis.to_dict` as a table for a page, see ``pyro_vae.html``. In a record
    from JSON, NaN is ``None``.

    :raises KeyError: if an entry is missing; ``TypeError`` or ``ValueError`` if one is invalid.
    """
    record = {key: math.nan if value is None and key in _NUMBERS else value for key, value in record.items()}
    gap = record["importance"] - record["elbo"]
    rows = [
        ("ELBO", f"{plus_minus(record['elbo'], record['elbo_se'])} nats per datum"),
        (
            f"IWAE-{record['num_particles']}",
            f"{plus_minus(record['importance'], record['importance_se'])} nats per datum: a tighter "
            "lower bound of log p(x)",
        ),
        ("KL(q‖p)", f"{gap:.2f} nats per datum, or more"),
        (
            "Pareto k",
            f"{record['pareto_k_median']:.2f} (median of {record['num_data']} data); above 0.5 for "
            f"{record['pareto_k_above_0.5']:.0%}, above 0.7 (bad) for {record['pareto_k_above_0.7']:.0%}",
        ),
        ("data with the largest Pareto k", ", ".join(map(str, record["worst"]))),
    ]
    if record["num_active"] is not None:
        rows.append(
            (
                "latent dimensions",
                f"{record['num_active']} of {record['latent_dim']} are active; KL(q(z|x)‖p(z)) is "
                f"{record['kl']:.2f} nats, of which the mutual information of x and z is "
                f"{record['mutual_information']:.2f}",
            )
        )
    if record["not_calibrated"] is not None:
        bad = ", ".join(record["not_calibrated"])
        rows.append(
            (
                "calibration",
                f"not calibrated on simulated data: {bad}"
                if bad
                else "not rejected at the 1 % level on simulated data",
            )
        )
    return table([*rows, *(("note", note) for note in record["notes"])])


def diagnose(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    num_simulations: int = 1000,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
) -> Diagnosis:
    """Diagnose a pair: ELBO and importance-weighted bound, Pareto k̂ per datum, use of the latent dimensions,
    calibration on data simulated from the model. ``print`` the result for a summary.

    :param data: as for :func:`~pyro_vae.fit`.
    :param num_particles: number of draws for each datum.
    :param num_simulations: number of data to simulate for the calibration; 0 skips the calibration.
    :param num_data: the number of rows of a stream that has no length.
    :param joint: treat all data as one datum, for models with global latents. ``usage`` and ``calibration``
        are then ``None``.
    :raises ValueError: if the pair is invalid, or a latent is outside of the data plate and ``joint`` is
        false.
    """
    batch = read_whole(data, seed=seed, num_data=num_data)
    notes: list[str] = []
    lower = elbo(model, guide, batch, num_particles=num_particles, joint=joint, seed=seed, check=check)
    weighted = importance(
        model, guide, batch, num_particles=num_particles, joint=joint, seed=seed, check=check
    )
    if weighted.bound == "none":
        notes.append(
            "the guide has Delta distributions, which have no density, so ELBO, KL and Pareto k are not "
            "meaningful"
        )
    if joint:
        return Diagnosis(lower, weighted, None, None, (*notes, *_JOINT_NOTES))
    usage: LatentUsage | None = None
    calibrated: Calibration | None = None
    try:
        usage = latent_usage(model, guide, batch, seed=seed, check=check)
    except Exception as error:  # an unsupported pair; the other diagnostics are still computed
        notes.append(f"latent dimensions: not computed: {_reason(error)}")
    if num_simulations:
        try:
            calibrated = calibration(
                model, guide, batch, num_simulations=num_simulations, seed=seed, check=check
            )
        except Exception as error:
            notes.append(f"calibration: not computed: {_reason(error)}")
    return Diagnosis(lower, weighted, usage, calibrated, tuple(notes))


def _reason(error: Exception) -> str:
    """The cause in an error text: its first line, without the verb in front and the remedy at the end."""
    line = next(iter(str(error).splitlines()), "") or "an error without a message"
    return re.sub(r"^\w+: ", "", line).split("; ")[0]
