"""Importance sampling estimators: p̂(x) is the mean of p(x, z) / q(z|x) over draws z from a proposal q."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.chunks import fingerprint, in_chunks, progress_bar
from pyro_vae.evidence.result import Bound, Evidence
from pyro_vae.evidence.simulate import Simulated, check_simulated
from pyro_vae.numerics import effective_sample_size, log_mean_exp, log_mean_exp_se, pareto_k
from pyro_vae.pairs.log_weights import MAX_BYTES, Weigher, check_particles, weigh
from pyro_vae.pairs.preserve import check_same_pair, read_whole, untouched
from pyro_vae.pairs.traces import Program, prior_of
from pyro_vae.processes import Group


def importance(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    max_bytes: int = MAX_BYTES,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """log (1/K) Σ p(x, z_k) / q(z_k|x), z_k ~ q(z|x): the IWAE bound (Burda et al. 2016) per datum, in nats.

    A lower bound of log p(x) in expectation for every pair and every K. For K = 1 it is the ELBO, and it
    tightens as K grows. If χ²(p‖q) from the posterior p to q is finite, the bias is about −χ²(p‖q)/(2K) for
    large K. A Pareto k̂ below 0.5 indicates a finite χ². All pairs that :func:`~pyro_vae.log_weights`
    accepts are accepted.

    :param data: the arguments of model and guide, ``(batch, *event)``, in any form that
        :func:`~pyro_vae.log_weights` accepts.
    :param num_particles: K.
    :param max_bytes: memory of the tensors that one run of the pair allocates. A large K is divided among
        several runs, so memory does not grow with K.
    :param num_data: the number of rows of a stream that has no length. Its batches are collected in memory.
    :param seed: seed of the draws.
    :param check: ``False`` runs a pair that :func:`~pyro_vae.check_pair` rejects.
    :param joint: treat all data as one datum, for models with global latents. The result is log p(x₁…x_N),
        ``(1,)``.
    :param progress: show a progress bar on stderr; by default only if stderr is a terminal.
    :param resume: a file that stores finished chunks of the data; an interrupted run resumes from it.
    :raises ValueError: in the cases of :func:`~pyro_vae.log_weights`, and for a ``resume`` file of another
        run.
    """
    return _estimate(
        "importance",
        summary,
        model,
        guide,
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
        num_data=num_data,
        seed=seed,
        check=check,
        joint=joint,
        progress=progress,
        resume=resume,
    )


def elbo(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 100,
    max_bytes: int = MAX_BYTES,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """The ELBO: the mean of log p(x, z) − log q(z|x) over draws z ~ q(z|x), per datum, in nats.

    A lower bound of log p(x) in expectation. More draws reduce its noise but do not tighten it. The other
    arguments are those of :func:`importance`.
    """
    result = _estimate(
        "elbo",
        _elbo_estimates,
        model,
        guide,
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
        num_data=num_data,
        seed=seed,
        check=check,
        joint=joint,
        progress=progress,
        resume=resume,
    )
    plural = "" if num_particles == 1 else "s"
    return replace(result, method=f"ELBO, {num_particles} draw{plural} from the guide", pareto_k=None)


def prior_monte_carlo(
    model: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    max_bytes: int = MAX_BYTES,
    num_data: int | None = None,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """log (1/K) Σ p(x|z_k), z_k ~ p(z): importance sampling from the prior, a lower bound per datum, in nats.

    The bound is loose if KL(p(z|x)‖p(z)) exceeds log K; the effective sample size is then close to 1.
    The other arguments are those of :func:`importance`.
    """
    result = importance(
        model,
        prior_of(model),
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
        num_data=num_data,
        seed=seed,
        check=check,
        joint=joint,
        progress=progress,
        resume=resume,
    )
    return replace(result, method=f"prior Monte Carlo, {num_particles} draws")


def importance_upper(
    model: Program,
    guide: Program,
    simulated: Simulated,
    *,
    num_particles: int = 1000,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
) -> Evidence:
    """log (1/K) [w(z*) + Σ_{k<K} w(z_k)], z_k ~ q(z|x): an upper bound of log p(x) per datum, in nats.

    Here w(z) = p(x, z) / q(z|x), and z* are the latents of the simulated data, an exact draw from the
    posterior. The bound holds in expectation, since the mean weight ŵ has E 1/ŵ = 1/p(x). The other arguments
    are those of :func:`importance`.

    :param simulated: the result of :func:`~pyro_vae.evidence.simulate`.
    :raises ValueError: in the cases of :func:`~pyro_vae.log_weights`, and for a guide whose density cannot
        be evaluated at given latents.
    """
    check_particles("importance_upper", num_particles)
    check_simulated("importance_upper", simulated)
    batch = simulated.batch
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(model, guide, batch, verb="importance_upper", check=check, max_bytes=max_bytes)
        batch = weigher.batch
        exact = weigher.at(batch, simulated.latents).unsqueeze(0)
        parts = []
        for rows in weigher.chunks(max(1, num_particles - 1)):
            drawn = [weigher.of(rows, num_particles - 1)] if num_particles > 1 else []
            parts.append(summary(torch.cat([exact[:, rows], *drawn]), num_fixed=1))
    estimates = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Evidence(
        f"importance sampling, {num_particles} draws, the first from the posterior",
        "upper",
        **estimates,
        num_particles=num_particles,
        cost=num_particles,
        joint=False,
    )


def _estimate(
    name: str,
    summarize: Callable[[Tensor], dict[str, Tensor]],
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int,
    max_bytes: int,
    num_data: int | None,
    seed: int,
    check: bool,
    joint: bool,
    progress: bool | None,
    resume: Path | str | None,
) -> Evidence:
    """Apply ``summarize`` to the log-weights ``(K, rows)`` of each chunk of the data."""
    check_particles(name, num_particles)
    batch = read_whole(data, seed=seed, num_data=num_data)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(model, guide, batch, verb=name, check=check, max_bytes=max_bytes, joint=joint)
        check_same_pair(Group.dividing(), weigher.pair.modules)
        batch = weigher.batch
        chunks = weigher.chunks(num_particles)
        settings = {"name": name, "particles": num_particles, "seed": seed, "chunks": len(chunks)}
        digest = "" if resume is None else fingerprint(batch, _probe(weigher, chunks[0]), **settings)
        with progress_bar(batch.num_rows, progress, f"{name}, {num_particles}") as bar:

            def compute(rows: slice) -> dict[str, Tensor]:
                estimates = summarize(weigher.of(rows, num_particles))
                bar.update(rows.stop - rows.start)
                return estimates

            estimates = in_chunks(compute, chunks, seed=seed, bar=bar, resume=resume, fingerprint=digest)
    plural = "" if num_particles == 1 else "s"
    bound: Bound = "lower" if weigher.pair.has_density else "none"  # a Delta guide has no density
    return Evidence(
        f"importance sampling, {num_particles} draw{plural} from the guide",
        bound,
        **estimates,
        num_particles=num_particles,
        cost=num_particles,
        joint=joint,
    )


def _elbo_estimates(log_weights: Tensor) -> dict[str, Tensor]:
    """As :func:`summary`, but the estimate is the mean of the log-weights ``(K, rows)``."""
    log_weights = log_weights.double()
    error = torch.full_like(log_weights[0], math.nan)
    if len(log_weights) > 1:
        error = log_weights.std(0) / len(log_weights) ** 0.5
    return summary(log_weights) | {"log_evidence": log_weights.mean(0), "log_evidence_se": error}


def summary(log_weights: Tensor, *, num_fixed: int = 0) -> dict[str, Tensor]:
    """The fields of :class:`Evidence`, each ``(rows,)``, estimated from log-weights ``(K, rows)``.

    :param num_fixed: number of leading log-weights that do not depend on the seed.
    """
    log_weights = log_weights.double()
    return {
        "log_evidence": log_mean_exp(log_weights),
        "log_evidence_se": log_mean_exp_se(log_weights, num_fixed=num_fixed),
        "ess": effective_sample_size(log_weights),
        "pareto_k": pareto_k(log_weights),
    }


def _probe(weigher: Weigher, rows: slice) -> list[Tensor]:
    """Log-weights at a fixed seed, which identify the pair in a fingerprint."""
    with untouched(seed=0):
        return [weigher.of(rows, 1)]
