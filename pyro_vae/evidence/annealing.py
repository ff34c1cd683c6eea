"""Annealed importance sampling, forward and reverse, and bidirectional Monte Carlo: bounds of log p(x)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.data.batches import Batch, check_count, rows_per_chunk, slices
from pyro_vae.evidence.chunks import fingerprint, in_chunks, progress_bar
from pyro_vae.evidence.hmc import HMC, Transition
from pyro_vae.evidence.importance import summary
from pyro_vae.evidence.path import Path
from pyro_vae.evidence.result import Bound, Evidence, Sandwich
from pyro_vae.evidence.simulate import Simulated, check_simulated, simulate
from pyro_vae.numerics import log_mean_exp
from pyro_vae.pairs.preserve import check_same_pair, read_whole, untouched
from pyro_vae.pairs.structure import counted_bytes
from pyro_vae.pairs.traces import Program
from pyro_vae.processes import Group

Schedule = Literal["uniform", "sigmoid", "fitted"] | Tensor
Walk = Callable[[Path, Tensor, Transition, tqdm], dict[str, Tensor]]
MAX_BYTES = 2**28  # memory of the tensors that one run of the model allocates


@dataclass(frozen=True)
class Annealing:
    """Options of annealed Markov chains.

    The chains target f_β = base^{1−β} p(x, z)^β for β = β₀, …, β_K in turn, where β₀ = 0 ≤ … ≤ β_K = 1. The
    base is the prior or a guide. These options are used by :func:`ais`, :func:`reverse_ais`, :func:`bdmc`,
    :func:`~pyro_vae.evidence.smc` and :func:`~pyro_vae.evidence.reciprocal_importance`.

    :param num_temperatures: K. A larger K tightens the bounds. If ``schedule`` is a tensor, it sets K.
    :param num_chains: chains per datum, whose weights are averaged; for ``smc`` the number of particles.
    :param schedule: ``"fitted"`` (a pilot run finds β with equal KL divergence between neighbours),
        ``"sigmoid"`` (finer at both ends), ``"uniform"``, or a tensor β₀ = 0 ≤ … ≤ β_K = 1 of shape
        ``(K + 1,)``.
    :param transition: a Markov transition that leaves f_β invariant, by default :class:`HMC`.
    :raises ValueError: for a count below 1, an invalid schedule, or a transition that is not a
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
                    "schedule: expected β from 0 to 1, nondecreasing, of shape (K + 1,), but got a tensor of "
                    f"shape {tuple(betas.shape)}"
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
        """β₀ = 0 ≤ … ≤ β_K = 1 in double precision, ``(K + 1,)``.

        ``"sigmoid"`` is the logistic function on [−4, 4], rescaled to [0, 1]. For ``"fitted"``, this is
        the sigmoid schedule. The pilot run that tunes the step sizes uses it, before β is fitted.
        """
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
    """Annealed importance sampling (Neal 2001): a lower bound of log p(x) per datum, in nats, for any model.

    Chains start at draws from the base, which is the prior or a guide, and target f_β = base^{1−β} p(x, z)^β.
    For each k = 1, …, K, (β_k − β_{k−1}) log [p(x, z) / base(z)] is added to the log-weight of a chain. If
    k < K, the chain then makes a transition that leaves f_β at β_k invariant. The mean weight ŵ of the
    chains has E ŵ = p(x), since transitions are Metropolis-corrected, and since a pilot run with independent
    random numbers has fixed the schedule and the step sizes before the weighted run.

    :param data: the arguments of the model, ``(batch, *event)``, in any form that
        :func:`~pyro_vae.log_weights` accepts.
    :param start: a guide as the base; ``None`` for the prior.
    :param annealing: temperatures, chains, schedule and transition.
    :param max_bytes: memory of the tensors that one run of the model allocates. The data are divided into
        chunks accordingly.
    :param check: ``False`` runs a pair that :func:`~pyro_vae.check_pair` rejects.
    :param joint: treat all data as one datum, for models with global latents. The result is log p(x₁…x_N),
        ``(1,)``.
    :param progress: show a progress bar on stderr; by default only if stderr is a terminal.
    :param resume: a file that stores finished chunks of the data; an interrupted run resumes from it.
    :raises ValueError: for latents outside the data plate unless ``joint``, discrete latents that cannot be
        summed out, or a ``resume`` file of another run.
    """

    def forward(path: Path, betas: Tensor, transition: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _forward(path, betas, transition, annealing.num_chains, bar)

    estimates = run_chains(
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
    return _evidence("AIS", "lower", estimates, annealing, start, joint=joint)


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
    """Reverse AIS (Grosse et al. 2015): an upper bound of log p(x) per datum, in nats, for simulated data.

    The latents z* of simulated data are exact draws from the posterior. Chains start at z* and run from the
    posterior to the base. The harmonic mean ŵ of the weights w of the chains, log ŵ = −log mean exp(−log w),
    has E 1/ŵ = 1/p(x). The other arguments are those of :func:`ais`.

    :param simulated: the result of :func:`~pyro_vae.evidence.simulate`.
    """

    def backward(path: Path, betas: Tensor, transition: Transition, bar: tqdm) -> dict[str, Tensor]:
        return _backward(path, exact_draws[path.rows], betas, transition, annealing.num_chains, bar)

    check_simulated("reverse_ais", simulated)
    batch = simulated.batch
    with untouched(training=False), torch.no_grad():
        path = Path(model, start, batch, verb="reverse_ais", check=check)
        batch = path.batch
        exact_draws = path.unconstrained(simulated.flat(path.latents, batch.num_rows).unsqueeze(0))[0]
    estimates = run_chains(
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
    return _evidence("reverse AIS", "upper", estimates, annealing, start)


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
    """Bidirectional Monte Carlo (Grosse et al. 2015): AIS and reverse AIS on data simulated from the model.

    AIS gives a lower bound of log p(x), and reverse AIS an upper bound. In expectation, the gap between the
    two bounds is at least the error of either bound. The other arguments are those of :func:`ais`.

    :param data: data with the shapes and conditions to simulate, see :func:`~pyro_vae.evidence.simulate`; or
        pairs (x, z*) as ``evidence.Simulated(x, {"z": z})``. The bounds hold only if these pairs are exact
        draws from the model.
    :raises ValueError: for latents whose names or shapes differ from those of the model.
    """
    simulated = data if isinstance(data, Simulated) else simulate(model, data, seed=seed, check=check)
    lower = ais(
        model,
        simulated.data,
        start=start,
        annealing=annealing,
        max_bytes=max_bytes,
        seed=(seed + 1) % 2**32,
        check=check,
        progress=progress,
    )
    upper = reverse_ais(
        model,
        simulated,
        start=start,
        annealing=annealing,
        max_bytes=max_bytes,
        seed=(seed + 2) % 2**32,
        check=check,
        progress=progress,
    )
    return Sandwich(lower, upper)


def _fit_schedule(path: Path, transition: Transition, num_temperatures: int, num_moves: int) -> Tensor:
    """A schedule with equal KL divergence between neighbours, ``(num_temperatures + 1,)``.

    The divergence between β and β + dβ is ½ dβ² Var_β[log joint − log base]. A pilot run of about
    ``num_moves`` moves estimates the mean of this variance over data.
    """
    num_chains = 8 if num_moves >= 8 * 50 else 4
    coarse = Annealing(min(num_temperatures, 50, max(10, num_moves // num_chains)), schedule="sigmoid").betas
    point, variances = path.draw(num_chains), []
    for beta in coarse:
        point, _ = transition.move(path, point, beta.to(point.u))
        variances.append(point.log_ratio.var(0).mean())
    speed = torch.stack(variances).double().cpu().sqrt().nan_to_num(nan=0.0, posinf=0.0)
    smoothed = torch.stack([speed[max(0, i - 2) : i + 3].mean() for i in range(len(speed))])
    speed = smoothed + 1e-3 * speed.max() + 1e-12
    length = torch.cat([torch.zeros(1).double(), (0.5 * (speed[1:] + speed[:-1]) * coarse.diff()).cumsum(0)])
    targets = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.double) * length[-1]
    right = torch.searchsorted(length, targets).clamp(1, len(length) - 1)
    fraction = (targets - length[right - 1]) / (length[right] - length[right - 1])
    betas = coarse[right - 1] + fraction * (coarse[right] - coarse[right - 1])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _forward(
    path: Path, betas: Tensor, transition: Transition, num_chains: int, bar: tqdm
) -> dict[str, Tensor]:
    """Run chains from the base to the posterior. Returns the estimates per datum."""
    point = path.draw(num_chains)
    log_weights, rates = torch.zeros_like(point.log_base, dtype=torch.double), []
    for k in range(1, len(betas)):
        log_weights += (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k < len(betas) - 1:
            point, rate = transition.move(path, point, betas[k].to(point.u))
            rates.append(rate.mean(0))
        bar.update()
    return _chain_estimates(log_weights, rates)


def _backward(
    path: Path, exact_draws: Tensor, betas: Tensor, transition: Transition, num_chains: int, bar: tqdm
) -> dict[str, Tensor]:
    """Run chains from the posterior draws ``exact_draws``, ``(batch, dim)``, to the base. Returns the
    estimates per datum."""
    point = path.at(exact_draws.expand(num_chains, *exact_draws.shape).clone())
    log_weights, rates = torch.zeros_like(point.log_base, dtype=torch.double), []
    for k in range(len(betas) - 1, 0, -1):
        log_weights += (betas[k] - betas[k - 1]) * point.log_ratio.double()
        if k > 1:
            point, rate = transition.move(path, point, betas[k - 1].to(point.u))
            rates.append(rate.mean(0))
        bar.update()
    estimates = _chain_estimates(-log_weights, rates)
    return estimates | {"log_evidence": -log_mean_exp(-log_weights)}


def _chain_estimates(log_weights: Tensor, rates: list[Tensor]) -> dict[str, Tensor]:
    """:func:`summary` of the log-weights of chains, ``(chains, batch)``, and the mean acceptance rate."""
    rate = torch.stack(rates).mean(0).double() if rates else torch.ones_like(log_weights[0])
    return summary(log_weights) | {"acceptance": rate}


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
    """Run chains on each chunk of the data: pilot runs set step sizes and schedule, then ``walk`` computes
    the weights. The estimates are concatenated over data."""
    coarse, num_chains = annealing.betas, annealing.num_chains
    # moves of the weighted run; all pilot runs together make at most as many
    num_moves = num_chains * annealing.num_temperatures
    with untouched(training=False, seed=seed), torch.no_grad():
        path = Path(model, start, batch, verb=name, check=check, joint=joint)
        check_same_pair(Group.dividing(), path.pair.modules)
        batch = path.batch
        chunks = _chunks(path, num_chains, max_bytes)
        digest = ""
        if resume is not None:
            probe = path.on(chunks[0]).draw(1)
            digest = fingerprint(
                batch,
                [probe.log_base, probe.log_joint, coarse],
                name=name,
                annealing=repr(annealing),
                seed=seed,
                n=len(chunks),
            )
        with progress_bar(len(chunks) * annealing.num_temperatures, progress, name) as bar:

            def compute(chunk: slice) -> dict[str, Tensor]:
                part = path.on(chunk)
                transition = annealing.transition.limited(4 * num_moves // 5).tuned(part, coarse)
                betas = coarse
                if isinstance(annealing.schedule, str) and annealing.schedule == "fitted":
                    betas = _fit_schedule(part, transition, annealing.num_temperatures, num_moves // 5)
                return walk(part, betas, transition, bar)

            return in_chunks(compute, chunks, seed=seed, bar=bar, resume=resume, fingerprint=digest)


def _chunks(path: Path, num_chains: int, max_bytes: int) -> list[slice]:
    """Divide the data into slices on each of which one run of the model allocates at most ``max_bytes``."""
    n, particles = path.batch.num_rows, path.particles
    probe = path.on(slice(0, 8)) if particles.rows_independent else path
    num_bytes = [counted_bytes(partial(probe.draw, k)) for k in (2, 4)]
    per_two_chains = max(1, num_bytes[1] - num_bytes[0])
    size = max(1, max_bytes * 2 * probe.batch.num_rows // per_two_chains // num_chains)
    return slices(n, rows_per_chunk(n, size) if particles.rows_independent else n)


def _evidence(
    name: str,
    bound: Bound,
    estimates: dict[str, Tensor],
    annealing: Annealing,
    start: Program | None,
    *,
    joint: bool = False,
) -> Evidence:
    origin = "the prior" if start is None else "the guide"
    steps, num_chains = annealing.num_temperatures, annealing.num_chains
    estimates = {key: value for key, value in estimates.items() if key != "pareto_k"}
    return Evidence(
        f"{name}, {steps} temperatures, {num_chains} chains from {origin}",
        bound,
        **estimates,
        num_particles=num_chains,
        cost=steps * num_chains * annealing.transition.cost,
        joint=joint,
    )
