"""Hamiltonian Monte Carlo along a path, all data and chains at once."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.evidence.path import Path, Point

_FIRST = 8  # times as many moves at the first temperature, where no step size is known
# what is cut from a pilot, in turn, until it is small enough; with less than that, step sizes are off
_SMALLER_PILOTS = (("pilot_temperatures", 12), ("num_pilot", 4))


class Transition(ABC):
    """A Markov move that leaves f_β as it is."""

    @property
    def cost(self) -> int:
        """Evaluations of the model in a move."""
        return 1

    def tuned(self, path: Path, betas: Tensor) -> "Transition":  # noqa: ARG002
        """The same, its settings found by a pilot run on these data and then frozen: what adapts inside a
        weighted run makes its weights biased."""
        return self

    def limited(self, num_moves: int) -> "Transition":  # noqa: ARG002
        """The same, with a pilot run of at most ``num_moves`` moves of a chain, if step sizes can be found in
        that many, so that it costs no more than the weighted run."""
        return self

    @abstractmethod
    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:
        """Chains one move on, and the probability with which each was accepted, ``(chains, batch)``."""


@dataclass(frozen=True)
class HMC(Transition):
    """Metropolis-corrected leapfrog trajectories of ``num_leapfrog`` steps (Neal 2011), with unit mass in
    unconstrained space.

    The step size is found for each temperature and datum by a pilot run that aims at ``target_acceptance``,
    by a stochastic approximation, and is frozen before the weighted run.

    num_pilot: chains of the pilot; pilot_moves: moves at each of its temperatures; pilot_temperatures: their
    maximal number. A weighted run that takes fewer moves than this pilot gets a smaller one.
    """

    num_leapfrog: int = 10
    target_acceptance: float = 0.65
    num_pilot: int = 8
    pilot_moves: int = 4
    pilot_temperatures: int = 25
    grid: Tensor | None = None  # the pilot's β, (T,)
    log_steps: Tensor | None = None  # log ε there, (T, batch)

    def __post_init__(self) -> None:
        if (
            self.num_leapfrog < 1
            or not 0 < self.target_acceptance < 1
            or min(self.num_pilot, self.pilot_moves) < 1
        ):
            raise ValueError(
                f"HMC: expected num_leapfrog ≥ 1, 0 < target_acceptance < 1 and a pilot, but got {self}"
            )

    @property
    def cost(self) -> int:
        return self.num_leapfrog

    def limited(self, num_moves: int) -> "HMC":
        pilot = self
        for name, most in _SMALLER_PILOTS:
            if pilot.num_pilot * pilot.pilot_moves * (pilot.pilot_temperatures + _FIRST - 1) <= num_moves:
                break
            pilot = replace(pilot, **{name: min(getattr(pilot, name), most)})
        return pilot

    def tuned(self, path: Path, betas: Tensor) -> "HMC":
        index = (
            torch.linspace(0, len(betas) - 1, min(self.pilot_temperatures, len(betas)))
            .round()
            .long()
            .unique()
        )
        point = path.draw(self.num_pilot)
        log_step = torch.full_like(point.log_base[0], -1.0)
        steps = []
        for i, beta in enumerate(betas[index]):
            moves, found = self.pilot_moves * (_FIRST if i == 0 else 1), []
            for t in range(moves):
                point, rate = self.leap(path, point, beta, log_step.exp())
                # far off at first, then within the noise of the rate
                log_step = log_step + (1.0 if i == 0 and t < moves // 2 else 0.3) * (
                    rate.mean(0) - self.target_acceptance
                )
                found.append(log_step)
            steps.append(torch.stack(found[moves // 2 :]).mean(0))
        smooth = torch.stack(steps)
        smooth = torch.stack([smooth[max(0, i - 2) : i + 3].mean(0) for i in range(len(smooth))])
        return replace(self, grid=betas[index], log_steps=smooth)

    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:
        if self.grid is None or self.log_steps is None:
            raise ValueError("HMC: it has no step sizes yet; expected HMC(…).tuned(path, betas)")
        right = (
            int(torch.searchsorted(self.grid, beta).clamp(1, max(1, len(self.grid) - 1)))
            if len(self.grid) > 1
            else 0
        )
        left = max(0, right - 1)
        width = self.grid[right] - self.grid[left]
        share = ((beta - self.grid[left]) / width).clamp(0, 1) if width > 0 else torch.zeros_like(beta)
        return self.leap(
            path,
            point,
            beta,
            (self.log_steps[left] + share * (self.log_steps[right] - self.log_steps[left])).exp(),
        )

    def leap(self, path: Path, point: Point, beta: Tensor, step: Tensor) -> tuple[Point, Tensor]:
        """One trajectory. step: ``(batch,)``, jittered by up to a fifth, so that no trajectory is a period
        for long."""
        step = (step * (0.8 + 0.4 * torch.rand_like(step))).unsqueeze(-1)
        momentum = torch.randn_like(point.u)
        energy = point.log_density(beta) - 0.5 * momentum.square().sum(-1)
        end = point
        p = momentum + 0.5 * step * end.gradient(beta)
        for i in range(self.num_leapfrog):
            end = path.at(end.u + step * p)
            p = p + (0.5 if i == self.num_leapfrog - 1 else 1.0) * step * end.gradient(beta)
        change = (end.log_density(beta) - 0.5 * p.square().sum(-1) - energy).nan_to_num(nan=-torch.inf)
        rate = change.clamp_max(0).exp()
        accepted = torch.rand_like(rate) < rate
        chosen = (
            torch.where(accepted.reshape(*rate.shape, *[1] * (new.dim() - 2)), new, old)
            for new, old in zip(end, point, strict=True)
        )
        return Point(*chosen), rate
