"""Importance sampling: p̂(x) is the mean of p(x, z) / q(z|x) over draws from a proposal."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.chunks import fingerprint, in_chunks, progress_bar
from pyro_vae.evidence.result import Bound, Evidence
from pyro_vae.evidence.simulate import Simulated, check_simulated
from pyro_vae.numerics import effective_sample_size, log_mean_exp, log_mean_exp_se, pareto_k
from pyro_vae.pairs.log_weights import MAX_BYTES, Weigher, check_particles, weigh
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program, prior_of


def importance(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """log (1/K) Σ p(x, z_k) / q(z_k|x), z_k ~ q(z|x): the importance-weighted bound IWAE_K (Burda et al.
    2016), per datum.

    A lower bound for any pair and any K, the tighter the larger K: its bias tends to −χ²(p‖q)/(2K) where that
    is finite, which Pareto k̂ below .5 says. K = 1 is the ELBO. Takes the pairs that
    :func:`~pyro_vae.log_weights` takes.

    :param data: the arguments of model and guide, ``(batch, *event)``, as :func:`~pyro_vae.log_weights` takes
        them.
    :param num_particles: K.
    :param max_bytes: of the tensors that one run makes; memory does not grow with K.
    :param seed: of the draws.
    :param check: ``False`` runs a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :param joint: all data together as one datum, for models with latents that all data share: log p(x₁…x_N),
        ``(1,)``.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :param resume: a file that keeps finished chunks of the data, from which an interrupted run goes on.
    :raises ValueError: as ``log_weights``; for a file of another run.
    """
    return _weighed(
        "importance",
        summary,
        model,
        guide,
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
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
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """The mean of log p(x, z) − log q(z|x) over draws z ~ q(z|x): a lower bound, E_q[log ŵ₁]. Arguments as
    for
    :func:`importance`; more draws make it less noisy, not tighter."""
    found = _weighed(
        "elbo",
        _mean_log,
        model,
        guide,
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
        seed=seed,
        check=check,
        joint=joint,
        progress=progress,
        resume=resume,
    )
    plural = "" if num_particles == 1 else "s"
    return Evidence(
        **vars(found) | {"method": f"ELBO, {num_particles} draw{plural} from the guide", "pareto_k": None}
    )


def prior_monte_carlo(
    model: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: Path | str | None = None,
) -> Evidence:
    """log (1/K) Σ p(x|z_k), z_k ~ p(z): importance sampling from the prior, a lower bound.

    Hopeless once KL(p(z|x)‖p(z)) exceeds log K: the effective sample size, then near 1, says so. Arguments as
    for
    :func:`importance`.
    """
    found = importance(
        model,
        prior_of(model),
        data,
        num_particles=num_particles,
        max_bytes=max_bytes,
        seed=seed,
        check=check,
        joint=joint,
        progress=progress,
        resume=resume,
    )
    return Evidence(**vars(found) | {"method": f"prior Monte Carlo, {num_particles} draws"})


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
    """log (1/K) [w(z*) + Σ_{k<K} w(z_k)], z* the latents that made x, z_k ~ q(z|x): an upper bound of log
    p(x) in expectation, E 1/ŵ = 1/p(x), on simulated data alone.

    :param simulated: from :func:`~pyro_vae.evidence.simulate`.
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
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Evidence(
        f"importance sampling, {num_particles} draws, the first from the posterior",
        "upper",
        **found,
        num_particles=num_particles,
        cost=num_particles,
        joint=False,
    )


def _weighed(
    name: str,
    summarize: Callable[[Tensor], dict[str, Tensor]],
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int,
    max_bytes: int,
    seed: int,
    check: bool,
    joint: bool,
    progress: bool | None,
    resume: Path | str | None,
) -> Evidence:
    """What the log-weights of each datum, ``(K, rows)``, say in sum."""
    check_particles(name, num_particles)
    batch = read_whole(data, seed=seed)
    with untouched(training=False, seed=seed), torch.no_grad():
        weigher = weigh(model, guide, batch, verb=name, check=check, max_bytes=max_bytes, joint=joint)
        batch = weigher.batch
        chunks = weigher.chunks(num_particles)
        settings = {"name": name, "particles": num_particles, "seed": seed, "chunks": len(chunks)}
        mark = "" if resume is None else fingerprint(batch, _probe(weigher, chunks[0]), **settings)
        with progress_bar(batch.num_rows, progress, f"{name}, {num_particles}") as bar:

            def of(rows: slice) -> dict[str, Tensor]:
                found = summarize(weigher.of(rows, num_particles))
                bar.update(rows.stop - rows.start)
                return found

            found = in_chunks(of, chunks, seed=seed, bar=bar, resume=resume, fingerprint=mark)
    plural = "" if num_particles == 1 else "s"
    bound: Bound = (
        "lower" if weigher.pair.has_density else "none"
    )  # a point has no density beside the model's
    return Evidence(
        f"importance sampling, {num_particles} draw{plural} from the guide",
        bound,
        **found,
        num_particles=num_particles,
        cost=num_particles,
        joint=joint,
    )


def _mean_log(weights: Tensor) -> dict[str, Tensor]:
    weights = weights.double()
    error = (
        weights.std(0) / len(weights) ** 0.5 if len(weights) > 1 else torch.full_like(weights[0], math.nan)
    )
    return summary(weights) | {"log_evidence": weights.mean(0), "log_evidence_se": error}


def summary(weights: Tensor, *, num_fixed: int = 0) -> dict[str, Tensor]:
    """What is kept of log-weights ``(K, rows)``, the first ``num_fixed`` of which do not vary over seeds."""
    weights = weights.double()
    return {
        "log_evidence": log_mean_exp(weights),
        "log_evidence_se": log_mean_exp_se(weights, num_fixed=num_fixed),
        "ess": effective_sample_size(weights),
        "pareto_k": pareto_k(weights),
    }


def _probe(weigher: Weigher, rows: slice) -> list[Tensor]:
    with untouched(seed=0):
        return [weigher.of(rows, 1)]
