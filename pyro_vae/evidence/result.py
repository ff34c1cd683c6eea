"""What an estimate of the evidence is: log p̂(x) per datum, what it bounds, and with what right."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.numerics import is_reliable

Bound = Literal["lower", "upper", "none"]


@dataclass(frozen=True)
class Evidence:
    """An estimate of log p(x) in nats, per datum: tensors ``(batch,)``.

    log_evidence: log ŵ, where ŵ is an average of weights. log_evidence_se: its Monte Carlo error by the
    jackknife, see
    :func:`~pyro_vae.numerics.log_mean_exp_se`. bound: ``"lower"`` where E ŵ = p(x), so that E log ŵ ≤ log
    p(x); ``"upper"`` where E 1/ŵ = 1/p(x); ``"none"`` where neither is certain. ess: effective number of the
    ``num_particles`` weights. pareto_k: k̂ of their tail, where there are enough of them. acceptance: mean
    rate of the accepted moves, where there were moves. cost: evaluations of the model for one datum. joint:
    all data are one datum, so this is log p(x₁…x_N).
    """

    method: str
    bound: Bound
    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    num_particles: int
    cost: int
    pareto_k: Tensor | None = None
    acceptance: Tensor | None = None
    joint: bool = False

    @property
    def mean(self) -> float:
        """Mean over data, in nats per datum."""
        return self.log_evidence.double().mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of the mean: the spread over data, Monte Carlo error in it; ``nan`` for one
        datum."""
        return _mean_se(self.log_evidence)

    @property
    def noise(self) -> float:
        """Monte Carlo error of the mean, as it would vary over seeds on the same data: √(Σᵢ SEᵢ²)/N in nats.
        Where ``is_reliable`` is false, a few weights decide on it."""
        return (self.log_evidence_se.double().square().sum().sqrt() / len(self.log_evidence_se)).item()

    @property
    def is_reliable(self) -> bool:
        """Whether ``noise`` is to be trusted, see :func:`~pyro_vae.numerics.is_reliable`."""
        return is_reliable(self.log_evidence_se, self.ess, self.pareto_k)

    def margin(self, probability: float = 1e-6) -> float:
        """b, in nats per datum: a lower bound's mean exceeds the truth by more than b with at most this
        ``probability``, an upper bound's falls short of it. By Markov's inequality for N independent data,
        e^{−bN}; infinite for no bound."""
        if not 0 < probability < 1:
            raise ValueError(f"margin: expected a probability between 0 and 1 but got {probability}")
        return math.inf if self.bound == "none" else -math.log(probability) / len(self.log_evidence)

    def __str__(self) -> str:
        n, sign = len(self.log_evidence), _sign(self.bound)
        what, truth = f"± {self.mean_se:.3f} nats per datum, {n} data", "the mean truth"
        if self.joint:
            what, truth = "nats, all data together", "the truth"
        lines = [f"log p({'x₁…x_N' if self.joint else 'x'}) {sign} {self.mean:.3f} {what}; {self.method}"]
        if self.bound != "none":
            side = "above" if self.bound == "lower" else "below"
            lines.append(
                f"{self.bound} bound: {side} {truth} by more than {self.margin():.2g} nats with probability "
                "at most 1e-6"
            )
        ess = self.ess.double()
        error = f"{self.noise:.2g}"
        if not math.isfinite(self.noise):
            error = "unknown (one weight is all there is)"
        elif not self.is_reliable:
            error += " (not reliable: few weights outweigh the rest)"
        spread = "" if self.joint else f" (median; least {ess.min():.1f})"
        lines.append(
            f"Monte Carlo error {error}; effective sample size {ess.median():.1f} of "
            f"{self.num_particles}{spread}"
        )
        if self.pareto_k is not None and not self.pareto_k.isnan().all():
            k = self.pareto_k[~self.pareto_k.isnan()]
            unknown = f", unknown for {len(self.pareto_k) - len(k)}" if len(k) < len(self.pareto_k) else ""
            share = f" (median), above 0.7 for {(k > 0.7).double().mean():.0%} of the data{unknown}"
            lines.append(f"Pareto k {k.median():.2f}{'' if self.joint else share}")
        if self.acceptance is not None:
            lines.append(f"accepted {self.acceptance.double().mean():.0%} of the moves")
        return "\n".join(lines)


def _mean_se(values: Tensor) -> float:
    n = len(values)
    return (values.double().std() / math.sqrt(n)).item() if n > 1 else math.nan


def _sign(bound: Bound) -> str:
    return {"lower": "≥", "upper": "≤", "none": "≈"}[bound]


@dataclass(frozen=True)
class Sandwich:
    """log p(x) of data simulated from the model, between two bounds.

    The gap bounds the error of either on these data, and estimates how far ``lower`` is from the truth on
    others like them.
    """

    lower: Evidence
    upper: Evidence

    @property
    def gap(self) -> Tensor:
        """upper − lower in nats, ``(batch,)``: positive in expectation, with noise."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def gap_se(self) -> Tensor:
        """Monte Carlo error of the gap, √(SE² of lower + SE² of upper) in nats, ``(batch,)``."""
        return torch.hypot(self.lower.log_evidence_se, self.upper.log_evidence_se)

    @property
    def mean(self) -> float:
        """Mean gap over data, in nats per datum."""
        return self.gap.double().mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of the mean: the spread over data, Monte Carlo error in it; ``nan`` for one
        datum."""
        return _mean_se(self.gap)

    def __str__(self) -> str:
        n = len(self.gap)
        lines = (
            f"gap {self.mean:.3f} ± {self.mean_se:.3f} nats per datum, on {n} data simulated from the model"
        )
        return f"{lines}\n{self.lower}\n{self.upper}"
