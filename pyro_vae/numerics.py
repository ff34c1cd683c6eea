"""Numbers from draws and log-weights: mean, error, effective sample size, shape of the tail, covariance."""

import math

import torch
from torch import Tensor

_ROUNDING = 1e-9  # of weights whose largest is 1, below which a tail is no tail
_MIN_TAIL = 5  # draws in a tail that a Pareto distribution is fitted to


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """log (1/K) Σ exp(log w): ``(K, *batch)`` → ``(*batch)``."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """(Σ w)² / Σ w² (Kish 1965), between 1 and K: ``(K, *batch)`` → ``(*batch)``. 0 where all weights are 0."""
    size = (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()
    return size.nan_to_num(nan=0.0)


def log_mean_error(log_weights: Tensor, *, num_fixed: int = 0) -> Tensor:
    """Standard error of log ŵ, ŵ the mean of the weights, by the jackknife: SE² = (n−1)/n Σᵢ (θᵢ − θ̄)² in nats, θᵢ the log
    mean without the i-th of the n weights that vary, ``(K, *batch)`` → ``(*batch)``.

    On average SE² is not below the variance over seeds (Efron and Stein 1981). That holds where one weight outweighs the rest
    too, but the SE of one datum then rests on few weights: see :func:`is_reliable`. The delta method √(1/ESS − 1/K) is the same
    for many even weights, and never above 1.

    :param num_fixed: the first so many weights are the same for every seed.
    :returns: ``nan`` for n < 2; infinite where one weight is all there is.
    """
    n = len(log_weights) - num_fixed
    if n < 2:
        return torch.full_like(log_weights[0], math.nan)
    log_share = (log_weights - log_weights.logsumexp(0)).nan_to_num(nan=-math.inf)
    largest = log_share.argmax(0, keepdim=True)
    # log (1 − share); that of the largest is the sum of the others, where the difference would lose its digits
    without = torch.log1p(-log_share.exp().scatter(0, largest, 0.0))
    without = without.scatter(0, largest, log_share.scatter(0, largest, -math.inf).logsumexp(0, keepdim=True))
    without = without[num_fixed:]
    square = (without - without.mean(0)).square().sum(0) * ((n - 1) / n)
    return square.sqrt().nan_to_num(nan=math.inf, posinf=math.inf)


def is_reliable(standard_error: Tensor, ess: Tensor, pareto_k: Tensor | None) -> bool:
    """Whether the standard error of a mean over data is to be trusted: it is known, and less than a fifth of its variance
    comes from data with Pareto k̂ above .7 or an effective sample size below 10, where it rests on few weights. All
    ``(batch,)``."""
    bad = ess < 10
    if pareto_k is not None:
        bad = bad | (pareto_k > 0.7)
    variance = standard_error.double().square()
    return bool(variance.sum().isfinite()) and not bool(variance[bad].sum() > 0.2 * variance.sum())


def covariance(draws: Tensor) -> Tensor:
    """Of draws ``(K, batch, dim)``, for each datum: ``(batch, dim, dim)``."""
    centred = draws - draws.mean(0)
    return torch.einsum("kbi,kbj->bij", centred, centred) / (len(draws) - 1)


def pareto_k(log_weights: Tensor, dim: int = 0) -> Tensor:
    """k̂, the shape of a generalized Pareto distribution fitted to the largest weights: ``(K, *batch)`` → ``(*batch)``.

    Weights have finite moments up to 1/k. Below .5 their mean is as good as it looks, up to .7 it is usable, above it is not
    to be trusted (Vehtari et al. 2024). The tail is the 3√K largest weights, K/5 of 225 or fewer; the fit is that of Zhang and
    Stephens (2009) with PSIS's prior. ``nan`` below 25 weights, −∞ where the tail is constant, as under the exact guide.
    Weights that are 0, or vanish beside the largest, are no part of the tail; ∞ where fewer than 5 are left.
    """
    ratios = log_weights.double().movedim(dim, -1)
    n = ratios.shape[-1]
    num_tail = math.floor(3 * math.sqrt(n)) if n > 225 else n // 5
    if num_tail < _MIN_TAIL:
        return torch.full(ratios.shape[:-1], math.nan, dtype=torch.double, device=ratios.device)
    largest = ratios.topk(num_tail + 1, -1).values
    weights = (largest - largest[..., :1]).exp().flip(-1)  # ascending, the first at the cutoff
    tail = weights[..., 1:] - weights[..., :1]
    constant = tail[..., -1] < _ROUNDING
    tail = torch.where(
        constant.unsqueeze(-1), torch.linspace(0.1, 1, num_tail, dtype=tail.dtype, device=tail.device), tail
    )
    k = torch.where(constant, -math.inf, _fit_pareto(tail))
    for place in (k.isnan() & ~ratios.isnan().any(-1)).nonzero():
        positive = tail[tuple(place)]
        positive = positive[positive > 1e-290]  # the fit divides by them
        k[tuple(place)] = _fit_pareto(positive) if len(positive) >= _MIN_TAIL else math.inf
    return k


def _fit_pareto(tail: Tensor) -> Tensor:
    """The posterior mean of k: that of b = −k/σ over a grid, its likelihood profiled, drawn towards ½ by ten draws' worth."""
    n = tail.shape[-1]
    num_points = 30 + int(math.sqrt(n))
    grid = torch.arange(1, num_points + 1, dtype=tail.dtype, device=tail.device) - 0.5
    quartile = tail[..., int(n / 4 + 0.5) - 1 : int(n / 4 + 0.5)]
    b = (1 - (num_points / grid).sqrt()) / (3 * quartile) + 1 / tail[..., -1:]
    k = torch.stack([torch.log1p(-each.unsqueeze(-1) * tail).mean(-1) for each in b.unbind(-1)], -1)
    profile = n * ((-b / k).log() - k - 1)
    weights = (profile - profile.logsumexp(-1, keepdim=True)).exp()
    weights = torch.where(weights >= 10 * torch.finfo(tail.dtype).eps, weights, 0.0)
    mean = (b * weights / weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return (n * torch.log1p(-mean * tail).mean(-1) + 10 * 0.5) / (n + 10)
