"""Sequential Monte Carlo along a path: annealed importance sampling with resampling."""

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
    """A sequential Monte Carlo sampler (Del Moral et al. 2006): a lower bound of log p(x) per datum, in nats.

    As :func:`~pyro_vae.evidence.ais`, with resampling. If the effective sample size of the particles of a
    datum is below ``threshold`` times their number, ŵ is multiplied by the mean weight of the particles, and
    the particles are resampled systematically, to equal weights. E ŵ = p(x), because the schedule, the
    threshold and the step sizes are fixed before the weighted run. The standard error is a jackknife over the
    initial particles from which the final particles descend (Chan and Lai 2013). It is infinite if there is
    only one such initial particle. The other arguments are those of :func:`~pyro_vae.evidence.ais`.

    :param annealing: ``num_chains`` is the number of particles.
    :param threshold: effective sample size below which particles are resampled, as a fraction of their
        number.
    :raises ValueError: in the cases of :func:`~pyro_vae.evidence.ais`, and for a threshold outside [0, 1].
    """
    num_particles, steps = annealing.num_chains, annealing.num_temperatures
    if not 0 <= threshold <= 1:
        raise ValueError(f"smc: expected a threshold between 0 and 1 but got {threshold}")

    def run(path: Path, betas: Tensor, transition: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _run_particles(path, betas, transition, num_particles, threshold, bar)

    estimates = run_chains(
        model,
        read_whole(data, seed=seed),
        run,
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
        **estimates,
        num_particles=num_particles,
        cost=steps * num_particles * annealing.transition.cost,
        joint=False,
    )


def _run_particles(
    path: Path, betas: Tensor, transition: Transition, num_particles: int, threshold: float, bar: tqdm
) -> dict[str, Tensor]:
    """Run particles from the base to the posterior. Returns the estimates per datum."""
    point = path.draw(num_particles)
    log_weights = torch.zeros_like(point.log_base, dtype=torch.double)
    # log_product: log of the product of the mean weights before each resampling
    log_product, rates = torch.zeros_like(log_weights[0]), []
    particles = torch.arange(num_particles, device=log_weights.device).unsqueeze(1)
    ancestors = particles.expand_as(log_weights)
    for k in range(1, len(betas)):
        log_weights = log_weights + (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k == len(betas) - 1:
            bar.update()
            break
        resampled = effective_sample_size(log_weights) < threshold * num_particles
        if resampled.any():
            indices = torch.where(resampled, _systematic_indices(log_weights), particles)
            log_product = torch.where(resampled, log_product + log_mean_exp(log_weights), log_product)
            log_weights = torch.where(resampled, 0.0, log_weights)
            ancestors = ancestors.gather(0, indices)
            point = Point(*(_gather_particles(part, indices) for part in point))
        point, rate = transition.move(path, point, betas[k].to(point.u))
        rates.append(rate.mean(0))
        bar.update()
    normalized = (log_weights - log_weights.logsumexp(0)).exp()
    by_ancestor = torch.zeros_like(normalized).scatter_add(0, ancestors, normalized)
    return {
        "log_evidence": log_product + log_mean_exp(log_weights),
        "log_evidence_se": log_mean_exp_se(by_ancestor.log()),
        "ess": effective_sample_size(log_weights),
        "acceptance": torch.stack(rates).mean(0).double() if rates else torch.ones_like(log_product),
    }


def _systematic_indices(log_weights: Tensor) -> Tensor:
    """Indices of the particles that systematic resampling selects, ``(particles, batch)``.

    It uses one uniform number per datum. The expected number of copies of a particle is proportional to its
    weight.
    """
    n = len(log_weights)
    cumulative = (log_weights - log_weights.logsumexp(0)).exp().nan_to_num(nan=1 / n).cumsum(0)
    strata = torch.arange(n, dtype=cumulative.dtype, device=cumulative.device).unsqueeze(1)
    positions = (strata + torch.rand_like(cumulative[:1])) / n
    cumulative = (cumulative / cumulative[-1]).mT.contiguous()
    return torch.searchsorted(cumulative, positions.mT.contiguous()).mT.clamp_max(n - 1)


def _gather_particles(part: Tensor, indices: Tensor) -> Tensor:
    """Select particles of a tensor ``(particles, batch, …)`` by ``indices``, ``(particles, batch)``."""
    return part.gather(0, indices.reshape(*indices.shape, *[1] * (part.dim() - 2)).expand_as(part))
