"""Annealed importance sampling, forward and backward: bounds of log p(x) by chains that walk from a base to
the posterior."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.data.batches import Batch, check_count, slices
from pyro_vae.evidence.chunks import fingerprint, in_chunks, progress_bar
from pyro_vae.evidence.hmc import HMC, Transition
from pyro_vae.evidence.importance import summary
from pyro_vae.evidence.path import Path
from pyro_vae.evidence.result import Bound, Evidence, Sandwich
from pyro_vae.evidence.simulate import Simulated, check_simulated, simulate
from pyro_vae.numerics import log_mean_exp
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.structure import counted_bytes
from pyro_vae.pairs.traces import Program

Schedule = Literal["uniform", "sigmoid", "fitted"] | Tensor
Walk = Callable[[Path, Tensor, Transition, tqdm], dict[str, Tensor]]
MAX_BYTES = 2**28  # of the tensors that one evaluation makes


@dataclass(frozen=True)
class Annealing:
    """How chains walk along f_β = base^{1−β} p(x, z)^β from β₀ = 0 to β_K = 1: options of :func:`ais`,
    :func:`reverse_ais`,
    :func:`bdmc`, :func:`~pyro_vae.evidence.smc` and :func:`~pyro_vae.evidence.reciprocal_importance`.

    :param num_temperatures: K; bounds tighten with it. A schedule that is a tensor has its own.
    :param num_chains: chains for each datum, averaged over; the particles of ``smc``.
    :param schedule: ``"fitted"`` (a pilot run makes neighbours equally far from each other), ``"sigmoid"``
        (finer at both ends, as is common), ``"uniform"``, or β₀ = 0 ≤ … ≤ β_K = 1, ``(K + 1,)``.
    :param transition: a Markov move, :class:`HMC` by default.
    :raises ValueError: for a number below 1, another schedule, or a transition that is no
        :class:`Transition`.

    >>> Annealing(num_temperatures=4, schedule="uniform").betas
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """

    num_temperatures: int = 1000
    num_chains: int = 16
    schedule: Schedule = "fitted"
    transition: Transition = field(default_factory=HMC)

    def __post_init__(self) -> None:
        if isinstance(self.schedule, Tensor):
            betas = self.schedule.double()
            if (
                betas.dim() != 1
                or len(betas) < 2
                or betas[0] != 0
                or betas[-1] != 1
                or not (betas.diff() >= 0).all()
            ):
                raise ValueError(
                    "schedule: expected β from 0 to 1, rising, of shape (K + 1,), but got a tensor of shape "
                    f"{tuple(betas.shape)}"
                )
            object.__setattr__(self, "num_temperatures", len(betas) - 1)
        elif not isinstance(self.schedule, str) or self.schedule not in ("uniform", "sigmoid", "fitted"):
            raise ValueError(
                'schedule: expected "uniform", "sigmoid", "fitted" or a tensor of β from 0 to 1 '
                f"but got {self.schedule!r}"
            )
        check_count("num_temperatures", self.num_temperatures)
        check_count("num_chains", self.num_chains)
        if not isinstance(self.transition, Transition):
            raise ValueError(
                f"transition: expected a Transition, such as evidence.HMC(), but got {self.transition!r}"
            )

    @property
    def betas(self) -> Tensor:
        """β₀ = 0 < … < β_K = 1, ``(K + 1,)`` in double precision. ``"fitted"`` starts from the sigmoid of
        radius 4."""
        if isinstance(self.schedule, Tensor):
            return self.schedule.double()
        t = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.double)
        if self.schedule == "uniform":
            return t
        s = torch.sigmoid(4 * (2 * t - 1))
        betas = (s - s[0]) / (s[-1] - s[0])
        betas[0], betas[-1] = 0.0, 1.0
        return betas


ANNEALING = Annealing()


def ais(
    model: Program,
    data: Any,
    *,
    start: Program | None = None,
    annealing: Annealing = ANNEALING,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
    progress: bool | None = None,
    resume: FilePath | str | None = None,
) -> Evidence:
    """Annealed importance sampling (Neal 2001): a lower bound of log p(x) per datum, for any model.

    Chains start at the prior, or at a guide, and walk along f_β = base^{1−β} p(x, z)^β; each of K
    temperatures adds (β_k − β_{k−1}) log [p(x, z) / base(z)] to a chain's log-weight, then moves the chain. E
    ŵ = p(x) holds since schedule and step sizes are fixed before the weighted run, which has fresh random
    numbers, and moves are Metropolis-corrected.

    :param data: the arguments of the model, ``(batch, *event)``, as :func:`~pyro_vae.log_weights` takes them.
    :param start: a guide to start from; ``None`` for the prior.
    :param annealing: temperatures, chains, schedule and moves.
    :param max_bytes: of the tensors that one evaluation makes; data are taken in chunks of that size.
    :param check: ``False`` runs a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :param joint: all data together as one datum, for models with latents that all data share: log p(x₁…x_N),
        ``(1,)``.
    :param progress: a bar on stderr; by default only where that is a terminal.
    :param resume: a file that keeps finished chunks of the data, from which an interrupted run goes on.
    :raises ValueError: for latents in no data plate unless ``joint``, discrete latents that cannot be summed
    out.
    """

    def forward(path: Path, betas: Tensor, move: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _forward(path, betas, move, annealing.num_chains, bar)

    found = run_chains(
        model,
        read_whole(data, seed=seed),
        forward,
        annealing,
        start=start,
        max_bytes=max_bytes,
        seed=seed,
        check=check,
        progress=progress,
        resume=resume,
        name="AIS",
        joint=joint,
    )
    return _evidence("AIS", "lower", found, annealing, start, joint=joint)


def reverse_ais(
    model: Program,
    simulated: Simulated,
    *,
    start: Program | None = None,
    annealing: Annealing = ANNEALING,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    progress: bool | None = None,
    resume: FilePath | str | None = None,
) -> Evidence:
    """:func:`ais` backwards from the latents that made the data: an upper bound of log p(x), on simulated
    data alone.

    E 1/ŵ = 1/p(x), log ŵ = −log mean exp(−log ŵ_chain) (Grosse et al. 2015). Arguments as for :func:`ais`.

    :param simulated: from :func:`~pyro_vae.evidence.simulate`.
    """

    def backward(path: Path, betas: Tensor, move: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _backward(path, exact[path.rows], betas, move, annealing.num_chains, bar)

    check_simulated("reverse_ais", simulated)
    batch = simulated.batch
    with untouched(training=False), torch.no_grad():
        whole = Path(model, start, batch, verb="reverse_ais", check=check)
        batch = whole.batch
        exact = whole.unconstrained(simulated.flat(whole.latents, batch.num_rows).unsqueeze(0))[0]
    found = run_chains(
        model,
        batch,
        backward,
        annealing,
        start=start,
        max_bytes=max_bytes,
        seed=seed,
        check=check,
        progress=progress,
        resume=resume,
        name="reverse AIS",
    )
    return _evidence("reverse AIS", "upper", found, annealing, start)


def bdmc(
    model: Program,
    data: Any,
    *,
    start: Program | None = None,
    annealing: Annealing = ANNEALING,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    check: bool = True,
    progress: bool | None = None,
) -> Sandwich:
    """Bidirectional Monte Carlo (Grosse et al. 2015): log p(x) of data simulated from the model between AIS
    below and reverse AIS above. The gap is an upper bound, in expectation, of the error of either.

    Arguments as for :func:`ais`.

    :param data: of the shape and number to simulate, see :func:`~pyro_vae.evidence.simulate`; or pairs (x,
        z*) that are there, ``evidence.Simulated(x, {"z": z})``. Bounds hold for exact draws of the model
        alone.
    :raises ValueError: for latents of other names or shapes than the model's.
    """
    simulated = data if isinstance(data, Simulated) else simulate(model, data, seed=seed, check=check)
    lower = ais(
        model,
        simulated.data,
        start=start,
        annealing=annealing,
        max_bytes=max_bytes,
        seed=seed + 1,
        check=check,
        progress=progress,
    )
    upper = reverse_ais(
        model,
        simulated,
        start=start,
        annealing=annealing,
        max_bytes=max_bytes,
        seed=seed + 2,
        check=check,
        progress=progress,
    )
    return Sandwich(lower, upper)


def _fitted(path: Path, move: Transition, num_temperatures: int, num_moves: int) -> Tensor:
    """β whose neighbours are equally far: the KL between them is ½ dβ² Var_β[log joint − log base], whose
    mean over data is taken from a pilot run of about ``num_moves`` moves of a chain."""
    num_chains = 8 if num_moves >= 8 * 50 else 4
    coarse = Annealing(min(num_temperatures, 50, max(10, num_moves // num_chains)), schedule="sigmoid").betas
    point, spread = path.draw(num_chains), []
    for beta in coarse:
        point, _ = move.move(path, point, beta.to(point.u))
        spread.append(point.log_ratio.var(0).mean())
    speed = torch.stack(spread).double().cpu().sqrt().nan_to_num(nan=0.0, posinf=0.0)
    speed = (
        torch.stack([speed[max(0, i - 2) : i + 3].mean() for i in range(len(speed))])
        + 1e-3 * speed.max()
        + 1e-12
    )
    length = torch.cat([torch.zeros(1).double(), (0.5 * (speed[1:] + speed[:-1]) * coarse.diff()).cumsum(0)])
    wanted = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.double) * length[-1]
    right = torch.searchsorted(length, wanted).clamp(1, len(length) - 1)
    share = (wanted - length[right - 1]) / (length[right] - length[right - 1])
    betas = coarse[right - 1] + share * (coarse[right] - coarse[right - 1])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _forward(
    path: Path, betas: Tensor, transition: Transition, num_chains: int, bar: tqdm
) -> dict[str, Tensor]:
    point = path.draw(num_chains)
    weights, rates = torch.zeros_like(point.log_base, dtype=torch.double), []
    for k in range(1, len(betas)):
        weights += (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k < len(betas) - 1:
            point, rate = transition.move(path, point, betas[k].to(point.u))
            rates.append(rate.mean(0))
        bar.update()
    return _kept(weights, rates)


def _backward(
    path: Path, exact: Tensor, betas: Tensor, transition: Transition, num_chains: int, bar: tqdm
) -> dict[str, Tensor]:
    point = path.at(exact.expand(num_chains, *exact.shape).clone())
    weights, rates = torch.zeros_like(point.log_base, dtype=torch.double), []
    for k in range(len(betas) - 1, 0, -1):
        weights += (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k > 1:
            point, rate = transition.move(path, point, betas[k - 1].to(point.u))
            rates.append(rate.mean(0))
        bar.update()
    found = _kept(-weights, rates)
    return found | {"log_evidence": -log_mean_exp(-weights)}


def _kept(weights: Tensor, rates: list[Tensor]) -> dict[str, Tensor]:
    """What is kept of the log-weights of chains, ``(chains, batch)``."""
    rate = torch.stack(rates).mean(0).double() if rates else torch.ones_like(weights[0])
    return summary(weights) | {"acceptance": rate}


def run_chains(
    model: Program,
    batch: Batch,
    walk: Walk,
    annealing: Annealing,
    *,
    start: Program | None,
    max_bytes: int,
    seed: int,
    check: bool,
    progress: bool | None,
    resume: FilePath | str | None,
    name: str,
    joint: bool = False,
) -> dict[str, Tensor]:
    """Chains over all data, chunk by chunk: a pilot run finds schedule and settings, then a weighted run."""
    coarse, num_chains = annealing.betas, annealing.num_chains
    with untouched(training=False, seed=seed), torch.no_grad():
        whole = Path(model, start, batch, verb=name, check=check, joint=joint)
        batch = whole.batch
        chunks = _chunks(whole, num_chains, max_bytes)
        mark = ""
        if resume is not None:
            probe = whole.on(chunks[0]).draw(1)
            mark = fingerprint(
                batch,
                [probe.log_base, probe.log_joint, coarse],
                name=name,
                annealing=repr(annealing),
                seed=seed,
                n=len(chunks),
            )
        with progress_bar(len(chunks) * annealing.num_temperatures, progress, name) as bar:

            def of(chunk: slice) -> dict[str, Tensor]:
                path = whole.on(chunk)
                planned = (
                    num_chains * annealing.num_temperatures
                )  # moves of the weighted run, which the pilot runs share
                move, betas = annealing.transition.limited(4 * planned // 5).tuned(path, coarse), coarse
                if isinstance(annealing.schedule, str) and annealing.schedule == "fitted":
                    betas = _fitted(path, move, annealing.num_temperatures, planned // 5)
                return walk(path, betas, move, bar)

            return in_chunks(of, chunks, seed=seed, bar=bar, resume=resume, fingerprint=mark)


def _chunks(path: Path, num_chains: int, max_bytes: int) -> list[slice]:
    n, particles = path.batch.num_rows, path.pair.particles
    if particles is None or not particles.vectorized:
        raise ValueError(
            "model: it does not run in a plate of particles "
            f"({particles.reason if particles else 'not tried'}), so chains cannot run side by side; "
            "expected code that counts dimensions from the right: z[..., 0], dim=-1, reshape(*z.shape[:-1], "
            "…), z.unsqueeze(-1) for a number beside a vector"
        )
    probe = path.on(slice(0, 8)) if particles.rows_independent else path
    made = [counted_bytes(partial(probe.draw, k)) for k in (2, 4)]
    at_once = max(1, max_bytes * 2 * probe.batch.num_rows // max(1, made[1] - made[0]) // num_chains)
    return slices(n, at_once if at_once < n and particles.rows_independent else n)


def _evidence(
    name: str,
    bound: Bound,
    found: dict[str, Tensor],
    annealing: Annealing,
    start: Program | None,
    *,
    joint: bool = False,
) -> Evidence:
    origin = "the prior" if start is None else "the guide"
    steps, num_chains = annealing.num_temperatures, annealing.num_chains
    found = {key: value for key, value in found.items() if key != "pareto_k"}
    return Evidence(
        f"{name}, {steps} temperatures, {num_chains} chains from {origin}",
        bound,
        **found,
        num_particles=num_chains,
        cost=steps * num_chains * annealing.transition.cost,
        joint=joint,
    )
