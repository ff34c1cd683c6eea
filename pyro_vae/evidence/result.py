"""Results of the estimators: log p̂(x) per datum, the kind of bound, and its Monte Carlo error."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.html import notebook, paragraph, table
from pyro_vae.numerics import is_reliable

Bound = Literal["lower", "upper", "none"]


@dataclass(frozen=True)
class Evidence:
    """An estimate of log p(x) per datum, in nats. Tensors have the shape ``(batch,)``.

    :param method: description of the estimator.
    :param bound: ``"lower"`` if E ŵ = p(x), so that E log ŵ ≤ log p(x); ``"upper"`` if E 1/ŵ = 1/p(x),
        so that E log ŵ ≥ log p(x); ``"none"`` if neither is guaranteed.
    :param log_evidence: log ŵ, where ŵ is the average of the weights.
    :param log_evidence_se: Monte Carlo standard error of ``log_evidence``: by the jackknife, see
        :func:`~pyro_vae.numerics.log_mean_exp_se`; for the ELBO, the standard error of the mean of its draws.
    :param ess: effective sample size of the ``num_particles`` weights.
    :param num_particles: number of weights per datum.
    :param cost: evaluations of the model per datum.
    :param pareto_k: Pareto shape k̂ of the tail of the weights, NaN if there are too few weights; ``None``
        for estimators that do not report it.
    :param acceptance: mean acceptance rate of the moves; ``None`` for estimators without moves.
    :param joint: whether all data are one datum, so that the estimate is of log p(x₁…x_N).
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
        """Mean of ``log_evidence`` over data, in nats per datum."""
        return self.log_evidence.double().mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of ``mean`` in nats: the standard deviation over data, divided by √N. It includes
        the Monte Carlo error. NaN for a single datum."""
        return _mean_se(self.log_evidence)

    @property
    def noise(self) -> float:
        """Monte Carlo standard error of ``mean`` in nats, √(Σᵢ SEᵢ²)/N: its spread over seeds on the same
        data.

        If ``is_reliable`` is false, a few weights dominate and this error is not accurate.
        """
        return (self.log_evidence_se.double().square().sum().sqrt() / len(self.log_evidence_se)).item()

    @property
    def is_reliable(self) -> bool:
        """Whether ``noise`` is accurate, see :func:`~pyro_vae.numerics.is_reliable`."""
        return is_reliable(self.log_evidence_se, self.ess, self.pareto_k)

    def margin(self, probability: float = 1e-6) -> float:
        """b = −log(``probability``)/N in nats per datum, infinite if ``bound`` is ``"none"``.

        By Markov's inequality for N independent data, the mean of a lower bound exceeds the true mean of
        log p(x) by more than b with at most this probability. Likewise, the mean of an upper bound is
        below the true mean by more than b with at most this probability.

        :raises ValueError: for a probability outside (0, 1).
        """
        if not 0 < probability < 1:
            raise ValueError(f"margin: expected a probability between 0 and 1 but got {probability}")
        return math.inf if self.bound == "none" else -math.log(probability) / len(self.log_evidence)

    def rows(self) -> dict[str, str]:
        """The lines of a table of the estimate: name and text."""
        n, sign = len(self.log_evidence), _sign(self.bound)
        unit, truth = f"{_plus_minus(self.mean_se)}nats per datum, {n} data", "the true mean"
        if self.joint:
            unit, truth = "nats, all data together", "the true value"
        rows = {f"log p({'x₁…x_N' if self.joint else 'x'}) {sign}": f"{self.mean:.3f} {unit}"}
        rows["method"] = self.method
        if self.bound != "none":
            side = "above" if self.bound == "lower" else "below"
            rows[f"{self.bound} bound"] = (
                f"it is {side} {truth} by more than {self.margin():.2g} nats with probability at most 1e-6"
            )
        ess = self.ess.double()
        error = f"{self.noise:.2g}"
        if not math.isfinite(self.noise):
            error = "unknown (only one independent weight)"
        elif not self.is_reliable:
            error += " (not reliable: a few weights dominate)"
        rows["Monte Carlo error"] = error
        spread = "" if self.joint else f" (median; minimum {ess.min():.1f})"
        rows["effective sample size"] = f"{ess.median():.1f} of {self.num_particles}{spread}"
        if self.pareto_k is not None and not self.pareto_k.isnan().all():
            k = self.pareto_k[~self.pareto_k.isnan()]
            unknown = f", unknown for {len(self.pareto_k) - len(k)}" if len(k) < len(self.pareto_k) else ""
            share = f" (median), above 0.7 for {(k > 0.7).double().mean():.0%} of the data{unknown}"
            rows["Pareto k"] = f"{k.median():.2f}{'' if self.joint else share}"
        if self.acceptance is not None:
            rows["accepted"] = f"{self.acceptance.double().mean():.0%} of the moves"
        return rows

    def __str__(self) -> str:
        (first, mean), (_, method), *others = self.rows().items()
        rows = dict(others)
        lines = [f"{first} {mean}; {method}"]
        if self.bound != "none":
            lines.append(f"{self.bound} bound: {rows.pop(f'{self.bound} bound')}")
        error, size = (rows.pop(key) for key in ("Monte Carlo error", "effective sample size"))
        lines.append(f"Monte Carlo error {error}; effective sample size {size}")
        return "\n".join(lines + [f"{key} {text}" for key, text in rows.items()])

    def _repr_html_(self) -> str:
        return notebook(table(self.rows().items()))


def _mean_se(values: Tensor) -> float:
    n = len(values)
    return (values.double().std() / math.sqrt(n)).item() if n > 1 else math.nan


def _sign(bound: Bound) -> str:
    return {"lower": "≥", "upper": "≤", "none": "≈"}[bound]


@dataclass(frozen=True)
class Sandwich:
    """A lower and an upper bound of log p(x) for data simulated from the model, from :func:`bdmc`.

    In expectation, the gap is at least the error of either bound on these data. It also estimates the error
    of the lower bound on other data from the model.

    :param lower: the lower bound.
    :param upper: the upper bound.
    """

    lower: Evidence
    upper: Evidence

    @property
    def gap(self) -> Tensor:
        """upper − lower in nats, ``(batch,)``. Its expectation is positive; single values may be negative."""
        return self.upper.log_evidence - self.lower.log_evidence

    @property
    def gap_se(self) -> Tensor:
        """Monte Carlo standard error of the gap, √(SE² of lower + SE² of upper) in nats, ``(batch,)``."""
        return torch.hypot(self.lower.log_evidence_se, self.upper.log_evidence_se)

    @property
    def mean(self) -> float:
        """Mean gap over data, in nats per datum."""
        return self.gap.double().mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of ``mean`` in nats: the standard deviation over data, divided by √N. It includes
        the Monte Carlo error. NaN for a single datum."""
        return _mean_se(self.gap)

    def __str__(self) -> str:
        n = len(self.gap)
        mean = f"gap {self.mean:.3f} {_plus_minus(self.mean_se)}nats per datum"
        gap = f"{mean}, on {n} data simulated from the model"
        return f"{gap}\n{self.lower}\n{self.upper}"

    def _repr_html_(self) -> str:
        gap, *_ = str(self).splitlines()
        parts = (table(bound.rows().items()) for bound in (self.lower, self.upper))
        return notebook(paragraph(gap), *parts)


def _plus_minus(error: float) -> str:
    return "" if math.isnan(error) else f"± {error:.3f} "
