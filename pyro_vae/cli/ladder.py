"""The ladder of bounds that ``pyro-vae evaluate`` climbs: estimators by name, each at rising cost."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vae import evidence
from pyro_vae.cli.build import Pair
from pyro_vae.evidence import Annealing, Evidence

ESTIMATORS = ("elbo", "importance", "prior", "ais", "smc", "bdmc")


@dataclass(frozen=True)
class Rung:
    """One estimate, its name, such as ``importance-100``, and the seconds that it took."""

    name: str
    estimator: str
    found: Evidence
    seconds: float

    def row(self) -> dict[str, Any]:
        one = self.found
        heavy = None if one.pareto_k is None else (one.pareto_k > 0.7).double().mean().item()
        return {
            "estimator": self.estimator,
            "method": one.method,
            "bound": one.bound,
            "log_evidence": one.mean,
            "mean_se": one.mean_se,
            "noise": one.noise,
            "margin": one.margin(),
            "ess": one.ess.median().item(),
            "num_particles": one.num_particles,
            "pareto_k_above_0.7": heavy,
            "cost": one.cost,
            "seconds": self.seconds,
        }


def climb(
    pair: Pair,
    arguments: tuple[Any, ...],
    names: Sequence[str],
    *,
    num_particles: int,
    num_temperatures: int,
    num_chains: int,
    seed: int,
    kept: Path,
) -> Iterator[Rung]:
    """The rungs of each estimator, by tens up to ``num_particles`` and ``num_temperatures``.

    :param kept: a folder for finished chunks, from which the same call goes on; what is finished is removed.
    """
    model, guide = pair.model, pair.guide
    steps, particles = _tens(num_temperatures, 100), Annealing(min(100, num_temperatures), num_chains=100)
    ways: dict[str, list[tuple[str, Callable[..., Any]]]] = {
        "elbo": [
            (
                "elbo",
                lambda **o: evidence.elbo(
                    model, guide, arguments, num_particles=min(100, num_particles), **o
                ),
            )
        ],
        "importance": [
            (
                f"importance-{k}",
                lambda k=k, **o: evidence.importance(model, guide, arguments, num_particles=k, **o),
            )
            for k in _tens(num_particles, 10)
        ],
        "prior": [
            (
                "prior",
                lambda **o: evidence.prior_monte_carlo(model, arguments, num_particles=num_particles, **o),
            )
        ],
        "ais": [
            (
                f"ais-{t}",
                lambda t=t, **o: evidence.ais(model, arguments, annealing=Annealing(t, num_chains), **o),
            )
            for t in steps
        ],
        "smc": [("smc", lambda **o: evidence.smc(model, arguments, annealing=particles, **o))],
    }
    for name in names:
        if name == "bdmc":
            start = time.perf_counter()
            both = evidence.bdmc(
                model, arguments, annealing=Annealing(num_temperatures, num_chains), seed=seed
            )
            for side, found in (("below", both.lower), ("above", both.upper)):
                yield Rung(
                    f"bdmc-{side}", f"bdmc {side}, simulated data", found, (time.perf_counter() - start) / 2
                )
            continue
        for rung, way in ways[name]:
            told = repr((rung, num_particles, num_chains, seed, *(tuple(part.shape) for part in arguments)))
            file = kept / f"{rung}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.safetensors"
            start = time.perf_counter()
            found = way(seed=seed, resume=file)
            yield Rung(rung, name, found, time.perf_counter() - start)
            file.unlink(missing_ok=True)
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()


def table(rungs: Sequence[Rung]) -> str:
    """One line for each rung."""
    head = f"{'':52}{'nats':>9}{'±':>7}{'noise':>8}{'ESS':>8}{'k > 0.7':>9}{'cost':>9}{'s':>7}"
    lines = [head]
    for rung in rungs:
        row, one = rung.row(), rung.found
        sign = {"lower": "≥", "upper": "≤", "none": "≈"}[one.bound]
        heavy = "" if row["pareto_k_above_0.7"] is None else f"{row['pareto_k_above_0.7']:.0%}"
        where = (
            f"{one.method} {sign}"
            if "simulated" not in rung.estimator
            else f"{one.method} (simulated) {sign}"
        )
        lines.append(
            f"{where:52}{one.mean:9.3f}{one.mean_se:7.3f}{one.noise:8.3f}{row['ess']:8.1f}{heavy:>9}{one.cost:9d}"
            f"{rung.seconds:7.1f}"
        )
    n = len(rungs[0].found.log_evidence)
    lines.append(
        f"{n} data; ±: standard error over data; noise: Monte Carlo error; cost: evaluations of the model "
        "for one datum.\n"
        f"A lower bound's mean exceeds the truth by more than {rungs[0].found.margin():.2g} nats with "
        "probability at most 1e-6."
    )
    return "\n".join(lines)


def _tens(most: int, first: int) -> list[int]:
    """first, 10 first, … up to ``most``, and that itself."""
    steps = [first * 10**i for i in range(12) if first * 10**i < most]
    return [*steps, most]
