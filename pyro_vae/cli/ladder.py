"""The estimators that ``pyro-vae evaluate`` runs, by name, each at increasing cost."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_vae import evidence
from pyro_vae.cli.build import Config, Pair, build_loss
from pyro_vae.data.batches import as_whole
from pyro_vae.evidence import Annealing, Evidence
from pyro_vae.infer import Objective
from pyro_vae.numerics import effective_sample_size
from pyro_vae.pairs import log_weights
from pyro_vae.processes import Group

ESTIMATORS = ("elbo", "importance", "prior", "ais", "smc", "bdmc")


@dataclass(frozen=True)
class Rung:
    """A line of the table of estimates: an estimate of log p(x), its name, such as ``importance-100``, and
    its run time in seconds."""

    name: str
    estimator: str
    estimate: Evidence
    seconds: float

    def row(self) -> dict[str, Any]:
        """The entry of ``evaluation.json``, in nats per datum."""
        estimate = self.estimate
        k = estimate.pareto_k
        return {
            "estimator": self.estimator,
            "method": estimate.method,
            "bound": estimate.bound,
            "log_evidence": estimate.mean,
            "mean_se": estimate.mean_se,
            "noise": estimate.noise,
            "margin": estimate.margin(),
            "ess": estimate.ess.median().item(),
            "num_particles": estimate.num_particles,
            "num_data": len(estimate.log_evidence),
            "pareto_k_above_0.7": None if k is None else (k > 0.7).double().mean().item(),
            "cost": estimate.cost,
            "seconds": self.seconds,
        }


def compute(
    pair: Pair,
    config: Config,
    data: Any,
    names: Sequence[str],
    *,
    num_particles: int,
    num_temperatures: int,
    num_chains: int,
    seed: int,
    resume_folder: Path,
) -> Iterator[Rung]:
    """Run estimators by name. ``importance`` and ``ais`` run several times: their number of particles or
    temperatures grows by factors of ten up to ``num_particles`` or ``num_temperatures``. The ELBO is followed
    by the bound that the run maximized, if it is another.

    :param data: as for :func:`~pyro_vae.fit`.
    :param resume_folder: folder that stores finished chunks of an estimate. After an interruption, the same
        call resumes from them. They are deleted when the estimate is finished.
    """
    model, guide, is_first = pair.model, pair.guide, Group.dividing().rank == 0
    smc_annealing = Annealing(min(100, num_temperatures), num_chains=100)
    estimators: dict[str, list[tuple[str, Callable[..., Any]]]] = {
        "elbo": [
            (
                "elbo",
                lambda **o: evidence.elbo(model, guide, data, num_particles=min(100, num_particles), **o),
            )
        ],
        "importance": [
            (
                f"importance-{k}",
                lambda k=k, **o: evidence.importance(model, guide, data, num_particles=k, **o),
            )
            for k in _powers_of_ten(10, num_particles)
        ],
        "prior": [
            (
                "prior",
                lambda **o: evidence.prior_monte_carlo(model, data, num_particles=num_particles, **o),
            )
        ],
        "ais": [
            (
                f"ais-{t}",
                lambda t=t, **o: evidence.ais(model, data, annealing=Annealing(t, num_chains), **o),
            )
            for t in _powers_of_ten(100, num_temperatures)
        ],
        "smc": [("smc", lambda **o: evidence.smc(model, data, annealing=smc_annealing, **o))],
    }
    for name in names:
        if name == "bdmc":
            start = time.perf_counter()
            sandwich = evidence.bdmc(
                model, data, annealing=Annealing(num_temperatures, num_chains), seed=seed
            )
            for side, estimate in (("below", sandwich.lower), ("above", sandwich.upper)):
                seconds = (time.perf_counter() - start) / 2
                yield Rung(f"bdmc-{side}", f"bdmc {side}, simulated data", estimate, seconds)
            continue
        for rung, estimator in estimators[name]:
            shapes = [tuple(part.shape) for part in as_whole(data).leaves()]
            key = repr((rung, num_particles, num_chains, seed, *shapes)).encode()
            file = resume_folder / f"{rung}-{hashlib.sha256(key).hexdigest()[:12]}.safetensors"
            start = time.perf_counter()
            estimate = estimator(seed=seed, resume=file)
            yield Rung(rung, name, estimate, time.perf_counter() - start)
            if is_first:
                file.unlink(missing_ok=True)
        if name == "elbo" and isinstance(loss := build_loss(config), Objective) and not loss.is_elbo:
            start = time.perf_counter()
            estimate = _objective_bound(pair, config, loss, data, num_particles, seed)
            yield Rung("objective", config.bound_name(), estimate, time.perf_counter() - start)
    if is_first and resume_folder.is_dir() and not any(resume_folder.iterdir()):
        resume_folder.rmdir()


def _objective_bound(
    pair: Pair,
    config: Config,
    objective: Objective,
    data: Any,
    num_particles: int,
    seed: int,
) -> Evidence:
    """The bound of an objective per datum, averaged over evaluations of its K draws: 100 draws in all, or
    ``num_particles`` if these are fewer, and at least two evaluations."""
    k = objective.num_particles
    num_evaluations = max(2, min(100, num_particles) // k)
    log_w = log_weights(pair.model, pair.guide, data, num_particles=num_evaluations * k, seed=seed).double()
    groups = log_w.unflatten(0, (num_evaluations, k))
    values = torch.stack([objective.value(group) for group in groups])
    return Evidence(
        f"{config.bound_name()}, mean of {num_evaluations} evaluations",
        # below α = 0 the Rényi bound of few draws may lie on either side
        "none" if (config.alpha or 0.0) < 0 else "lower",
        values.mean(0),
        values.std(0) / num_evaluations**0.5,
        torch.stack([effective_sample_size(group) for group in groups]).mean(0),
        num_particles=k,
        cost=num_evaluations * k,
    )


def table(rungs: Sequence[Rung], data: str) -> str:
    """A text table with one line for each estimate on the rows ``data``, such as ``test[:100]``."""
    lines = [f"{'':52}{'nats':>9}{'±':>7}{'noise':>8}{'ESS':>8}{'k > 0.7':>9}{'cost':>9}{'s':>7}"]
    for rung in rungs:
        row, estimate = rung.row(), rung.estimate
        sign = {"lower": "≥", "upper": "≤", "none": "≈"}[estimate.bound]
        fraction = "" if row["pareto_k_above_0.7"] is None else f"{row['pareto_k_above_0.7']:.0%}"
        simulated = " (simulated)" if "simulated" in rung.estimator else ""
        lines.append(
            f"{f'{estimate.method}{simulated} {sign}':52}{estimate.mean:9.3f}{estimate.mean_se:7.3f}"
            f"{estimate.noise:8.3f}{row['ess']:8.1f}{fraction:>9}{estimate.cost:9d}{rung.seconds:7.1f}"
        )
    first = rungs[0].estimate
    lines.append(
        f"{len(first.log_evidence)} data, {data}; ±: standard error over data; noise: Monte Carlo error; "
        "cost: evaluations of the model per datum.\n"
        f"The mean of a lower bound exceeds the true value by more than {first.margin():.2g} nats with "
        "probability at most 1e-6."
    )
    return "\n".join(lines)


def _powers_of_ten(first: int, last: int) -> list[int]:
    """``first``, ``10 * first``, … below ``last``, and then ``last``."""
    return [*(first * 10**i for i in range(12) if first * 10**i < last), last]
