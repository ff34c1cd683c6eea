"""Statistics of samples and log-weights: log-mean, standard error, ESS, Pareto k̂, covariance."""

import math

import torch
from torch import Tensor

_ROUNDING = 1e-9  # weights of a tail count as equal if their range is below this × the largest weight
_MIN_TAIL = 5  # smallest tail that a Pareto distribution is fitted to


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Log of the mean weight, log (1/K) Σ exp(log w), in nats: ``(K, *batch)`` → ``(*batch)``. −∞ where all
    weights are 0."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Effective sample size (Σ w)² / Σ w² (Kish 1965): ``(K, *batch)`` → ``(*batch)``.

    It is between 1 and K, or 0 if all weights are 0.
    """
    size = (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()
    return size.nan_to_num(nan=0.0)


def log_mean_exp_se(log_weights: Tensor, *, num_fixed: int = 0) -> Tensor:
    """Jackknife standard error of :func:`log_mean_exp` in nats: ``(K, *batch)`` → ``(*batch)``.

    SE² = (n−1)/n Σᵢ (θᵢ − θ̄)², where θᵢ is the log-mean without the i-th of the n random weights. The
    expectation of SE² is at least the variance of the log-mean (Efron and Stein 1981), even if one weight
    dominates. In that case the SE of a single datum is unreliable, see :func:`is_reliable`. The usual
    approximation by the delta method, √(1/ESS − 1/K), is close to this SE for many similar weights, but it
    never exceeds 1, however large the true error is.

    :param num_fixed: number of leading weights that are not random, so n = K − ``num_fixed``.
    :returns: ``nan`` for n < 2; ``inf`` if at most one weight is positive and none is fixed.
    """
    n = len(log_weights) - num_fixed
    if n < 2:
        return torch.full_like(log_weights[0], math.nan)
    log_share = (log_weights - log_weights.logsumexp(0)).nan_to_num(nan=-math.inf)
    largest = log_share.argmax(0, keepdim=True)
    # log (1 − share); for the largest share, the log of the sum of the others, since 1 − share loses digits
    others = log_share.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True)
    log_rest = torch.log1p(-log_share.exp().scatter(0, largest, 0.0)).scatter(0, largest, others)[num_fixed:]
    variance = (log_rest - log_rest.mean(0)).square().sum(0) * ((n - 1) / n)
    return variance.sqrt().nan_to_num(nan=math.inf, posinf=math.inf)


def is_reliable(standard_error: Tensor, ess: Tensor, pareto_k: Tensor | None) -> bool:
    """Whether the standard error of a mean over data is reliable.

    It is reliable if it is finite and at most a fifth of its variance comes from data with Pareto k̂ > 0.7 or
    an effective sample size below 10. All arguments: ``(batch,)``.
    """
    unreliable = ess < 10
    if pareto_k is not None:
        unreliable = unreliable | (pareto_k > 0.7)
    variance = standard_error.double().square()
    return bool(variance.sum().isfinite()) and not bool(variance[unreliable].sum() > 0.2 * variance.sum())


def covariance(draws: Tensor) -> Tensor:
    """Sample covariance for each datum: ``(K, batch, dim)`` → ``(batch, dim, dim)``."""
    centred = draws - draws.mean(0)
    return torch.einsum("kbi,kbj->bij", centred, centred) / (len(draws) - 1)


def pareto_k(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Shape k̂ of a generalized Pareto distribution fitted to the largest weights: ``(K, *batch)`` →
    ``(*batch)``.

    Weights whose tail has shape k have finite moments of order below 1/k. Their mean is reliable for k̂ <
    0.5, usable up to 0.7 and unreliable above (Vehtari et al. 2024). The fit uses the tail: the 3√K largest
    weights, or the K/5 largest for K ≤ 225. It is the method of Zhang and Stephens (2009) with the prior on k
    of Pareto-smoothed importance sampling.

    :returns: ``nan`` for K < 25; −∞ if all weights of the tail are equal, as under the exact guide; ∞ if
        fewer than 5 weights of the tail are positive after division by the largest, since the others
        underflow.
    """
    ratios = log_weights.double().movedim(dim, -1)
    n = ratios.shape[-1]
    num_tail = math.floor(3 * math.sqrt(n)) if n > 225 else n // 5
    if num_tail < _MIN_TAIL:
        return torch.full(ratios.shape[:-1], math.nan, dtype=torch.double, device=ratios.device)
    largest = ratios.topk(num_tail + 1, -1).values
    weights = (largest - largest[..., :1]).exp().flip(-1)  # ascending; the first is the cutoff
    tail = weights[..., 1:] - weights[..., :1]
    is_constant = tail[..., -1] < _ROUNDING
    tail = torch.where(
        is_constant.unsqueeze(-1),
        torch.linspace(0.1, 1, num_tail, dtype=tail.dtype, device=tail.device),
        tail,
    )
    k = torch.where(is_constant, -math.inf, _fit_pareto(tail))
    for index in (k.isnan() & ~ratios.isnan().any(-1)).nonzero():
        positive = tail[tuple(index)]
        positive = positive[positive > 1e-290]  # the fit divides by them
        k[tuple(index)] = _fit_pareto(positive) if len(positive) >= _MIN_TAIL else math.inf
    return k


def _fit_pareto(tail: Tensor) -> Tensor:
    """The shape k of a generalized Pareto distribution with scale σ, fitted to excesses over a threshold.

    The posterior mean of b = −k/σ is computed on a grid of b, with k profiled out. The result is k at this b,
    shrunk towards ½ by a prior that weighs as much as ten observations.

    :param tail: the excesses in ascending order, ``(*batch, n)``.
    """
    n = tail.shape[-1]
    num_points = 30 + int(math.sqrt(n))
    grid = torch.arange(1, num_points + 1, dtype=tail.dtype, device=tail.device) - 0.5
    quartile = tail[..., int(n / 4 + 0.5) - 1 : int(n / 4 + 0.5)]
    b = (1 - (num_points / grid).sqrt()) / (3 * quartile) + 1 / tail[..., -1:]
    k = torch.stack([torch.log1p(-value.unsqueeze(-1) * tail).mean(-1) for value in b.unbind(-1)], -1)
    profile = n * ((-b / k).log() - k - 1)
    weights = (profile - profile.logsumexp(-1, keepdim=True)).exp()
    weights = torch.where(weights >= 10 * torch.finfo(tail.dtype).eps, weights, 0.0)
    mean = (b * weights / weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return (n * torch.log1p(-mean * tail).mean(-1) + 10 * 0.5) / (n + 10)
