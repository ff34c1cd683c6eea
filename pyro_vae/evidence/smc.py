"""Sequential Monte Carlo along a path: annealed importance sampling whose chains are resampled on the way."""

from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.evidence.annealing import MAX_BYTES, Annealing, run_chains
from pyro_vae.evidence.hmc import Transition
from pyro_vae.evidence.path import Path, Point
from pyro_vae.evidence.result import Evidence
from pyro_vae.numerics import effective_sample_size, log_mean_exp, log_mean_exp_se
from pyro_vae.pairs.preserve import read_whole
from pyro_vae.pairs.traces import Program

ANNEALING = Annealing(num_temperatures=100, num_chains=100)


def smc(
    model: Program,
    data: Any,
    *,
    start: Program | None = None,
    annealing: Annealing = ANNEALING,
    threshold: float = 0.5,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    progress: bool | None = None,
    resume: FilePath | str | None = None,
) -> Evidence:
    """A sequential Monte Carlo sampler (Del Moral et al. 2006): a lower bound of log p(x) per datum, for any
    model.

    As :func:`~pyro_vae.evidence.ais`, but the chains are particles: whenever the effective sample size of a
    datum's particles falls below ``threshold`` of their number they are resampled (systematically), and their
    mean weight is multiplied into ŵ. E ŵ = p(x), since schedule, rule and step sizes are fixed before the
    weighted run. The standard error is a jackknife over the particles' ancestors (Chan and Lai 2013); it is
    infinite where all particles have one ancestor. Arguments as for :func:`~pyro_vae.evidence.ais`.

    :param annealing: its ``num_chains`` is the number of particles.
    :param threshold: effective sample size, as a share of the particles, below which they are resampled.
    """
    num_particles, steps = annealing.num_chains, annealing.num_temperatures
    if not 0 <= threshold <= 1:
        raise ValueError(f"smc: expected a threshold between 0 and 1 but got {threshold}")

    def walk(path: Path, betas: Tensor, move: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _walk(path, betas, move, num_particles, threshold, bar)

    found = run_chains(
        model,
        read_whole(data, seed=seed),
        walk,
        annealing,
        start=start,
        max_bytes=max_bytes,
        seed=seed,
        check=check,
        progress=progress,
        resume=resume,
        name=f"SMC, threshold {threshold:g}",
    )
    origin = "the prior" if start is None else "the guide"
    return Evidence(
        f"SMC, {steps} temperatures, {num_particles} particles from {origin}",
        "lower",
        **found,
        num_particles=num_particles,
        cost=steps * num_particles * annealing.transition.cost,
        joint=False,
    )


def _walk(
    path: Path, betas: Tensor, transition: Transition, num_particles: int, threshold: float, bar: tqdm
) -> dict[str, Tensor]:
    point = path.draw(num_particles)
    weights = torch.zeros_like(point.log_base, dtype=torch.double)
    total, rates = torch.zeros_like(weights[0]), []
    ancestor = torch.arange(num_particles, device=weights.device).unsqueeze(1).expand_as(weights)
    for k in range(1, len(betas)):
        weights = weights + (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k == len(betas) - 1:
            bar.update()
            break
        few = effective_sample_size(weights) < threshold * num_particles
        if few.any():
            chosen = torch.where(
                few, _systematic(weights), torch.arange(num_particles, device=few.device).unsqueeze(1)
            )
            total = torch.where(few, total + log_mean_exp(weights), total)
            weights = torch.where(few, 0.0, weights)
            ancestor = ancestor.gather(0, chosen)
            point = Point(*(_taken(part, chosen) for part in point))
        point, rate = transition.move(path, point, betas[k].to(point.u))
        rates.append(rate.mean(0))
        bar.update()
    normalized = (weights - weights.logsumexp(0)).exp()
    by_ancestor = torch.zeros_like(normalized).scatter_add(0, ancestor, normalized)
    return {
        "log_evidence": total + log_mean_exp(weights),
        "log_evidence_se": log_mean_exp_se(by_ancestor.log()),
        "ess": effective_sample_size(weights),
        "acceptance": torch.stack(rates).mean(0).double() if rates else torch.ones_like(total),
    }


def _systematic(weights: Tensor) -> Tensor:
    """Places of the survivors of log-weights ``(particles, batch)``, one uniform number for each datum: their
    expected number is the particles' share."""
    n = len(weights)
    shares = (weights - weights.logsumexp(0)).exp().nan_to_num(nan=1 / n).cumsum(0)
    at = (
        torch.arange(n, dtype=shares.dtype, device=shares.device).unsqueeze(1) + torch.rand_like(shares[:1])
    ) / n
    return torch.searchsorted((shares / shares[-1]).mT.contiguous(), at.mT.contiguous()).mT.clamp_max(n - 1)


def _taken(part: Tensor, chosen: Tensor) -> Tensor:
    return part.gather(0, chosen.reshape(*chosen.shape, *[1] * (part.dim() - 2)).expand_as(part))
