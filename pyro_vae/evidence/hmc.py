"""Markov transitions along a path: Hamiltonian Monte Carlo, vectorized over data and chains."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_vae.evidence.path import Path, Point

_FIRST_FACTOR = 8  # the pilot run makes this many times more moves at its first temperature
# `limited` reduces these fields to these values, in this order; smaller values give inaccurate step sizes
_PILOT_REDUCTIONS = (("pilot_temperatures", 12), ("num_pilot", 4))


class Transition(ABC):
    """A Markov transition that leaves the density f_β of a :class:`~pyro_vae.evidence.Path` invariant."""

    @property
    def cost(self) -> int:
        """Evaluations of the model per move."""
        return 1

    def tuned(self, path: Path, betas: Tensor) -> "Transition":  # noqa: ARG002
        """A copy with settings that a pilot run on the data of ``path`` has tuned.

        The settings must not change afterwards: adaptation during the weighted run biases the weights.
        """
        return self

    def limited(self, num_moves: int) -> "Transition":  # noqa: ARG002
        """A copy with a shorter pilot run: at most ``num_moves`` moves in total over chains, or more if that
        is too few for accurate step sizes."""
        return self

    @abstractmethod
    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:
        """The chains after one move, and the acceptance probabilities, ``(chains, batch)``."""


@dataclass(frozen=True)
class HMC(Transition):
    """Metropolis-corrected leapfrog trajectories of ``num_leapfrog`` steps (Neal 2011), with unit mass in
    unconstrained space.

    A pilot run tunes the step size for each temperature and datum to ``target_acceptance`` by stochastic
    approximation. The step sizes stay fixed in the weighted run.

    :param num_leapfrog: leapfrog steps per move.
    :param target_acceptance: the mean acceptance probability to tune for.
    :param num_pilot: chains of the pilot run.
    :param pilot_moves: moves at each temperature of the pilot run.
    :param pilot_temperatures: maximal number of temperatures of the pilot run. If the weighted run makes
        fewer moves than the pilot run, :meth:`limited` reduces the pilot run.
    :param grid: temperatures of the pilot run, ``(T,)``; set by :meth:`tuned`.
    :param log_steps: logarithms of the step sizes at the temperatures ``grid``, ``(T, batch)``; set by
        :meth:`tuned`.
    :raises ValueError: for an argument out of range.
    """

    num_leapfrog: int = 10
    target_acceptance: float = 0.65
    num_pilot: int = 8
    pilot_moves: int = 4
    pilot_temperatures: int = 25
    grid: Tensor | None = None
    log_steps: Tensor | None = None

    def __post_init__(self) -> None:
        if (
            self.num_leapfrog < 1
            or not 0 < self.target_acceptance < 1
            or min(self.num_pilot, self.pilot_moves, self.pilot_temperatures) < 1
        ):
            raise ValueError(
                "HMC: expected num_leapfrog ≥ 1, 0 < target_acceptance < 1, num_pilot ≥ 1, pilot_moves ≥ 1 "
                f"and pilot_temperatures ≥ 1 but got {self}"
            )

    @property
    def cost(self) -> int:
        return self.num_leapfrog

    def limited(self, num_moves: int) -> "HMC":
        pilot = self
        for name, maximum in _PILOT_REDUCTIONS:
            moves_per_chain = pilot.pilot_moves * (pilot.pilot_temperatures + _FIRST_FACTOR - 1)
            if pilot.num_pilot * moves_per_chain <= num_moves:
                break
            pilot = replace(pilot, **{name: min(getattr(pilot, name), maximum)})
        return pilot

    def tuned(self, path: Path, betas: Tensor) -> "HMC":
        num_temperatures = min(self.pilot_temperatures, len(betas))
        index = torch.linspace(0, len(betas) - 1, num_temperatures).round().long().unique()
        point = path.draw(self.num_pilot)
        log_step = torch.full_like(point.log_base[0], -1.0)
        means = []
        for i, beta in enumerate(betas[index]):
            num_moves, history = self.pilot_moves * (_FIRST_FACTOR if i == 0 else 1), []
            for t in range(num_moves):
                point, rate = self.leap(path, point, beta, log_step.exp())
                gain = 1.0 if i == 0 and t < num_moves // 2 else 0.3  # larger while the step size is far off
                log_step = log_step + gain * (rate.mean(0) - self.target_acceptance)
                history.append(log_step)
            means.append(torch.stack(history[num_moves // 2 :]).mean(0))
        log_steps = torch.stack(means)
        smoothed = torch.stack([log_steps[max(0, i - 2) : i + 3].mean(0) for i in range(len(log_steps))])
        return replace(self, grid=betas[index], log_steps=smoothed)

    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:
        if self.grid is None or self.log_steps is None:
            raise ValueError("HMC: the step sizes are not tuned; call HMC(…).tuned(path, betas) first")
        right = (
            int(torch.searchsorted(self.grid, beta).clamp(1, max(1, len(self.grid) - 1)))
            if len(self.grid) > 1
            else 0
        )
        left = max(0, right - 1)
        width = self.grid[right] - self.grid[left]
        fraction = ((beta - self.grid[left]) / width).clamp(0, 1) if width > 0 else torch.zeros_like(beta)
        log_step = self.log_steps[left] + fraction * (self.log_steps[right] - self.log_steps[left])
        return self.leap(path, point, beta, log_step.exp())

    def leap(self, path: Path, point: Point, beta: Tensor, step: Tensor) -> tuple[Point, Tensor]:
        """Run one trajectory, and accept or reject its end. Returns the chains and the acceptance
        probabilities.

        :param step: step sizes, ``(batch,)``. They are multiplied by random factors between 0.8 and 1.2,
            which avoids periodic trajectories.
        """
        step = (step * (0.8 + 0.4 * torch.rand_like(step))).unsqueeze(-1)
        momentum = torch.randn_like(point.u)
        log_start = point.log_density(beta) - 0.5 * momentum.square().sum(-1)
        end = point
        momentum = momentum + 0.5 * step * end.gradient(beta)
        for i in range(self.num_leapfrog):
            end = path.at(end.u + step * momentum)
            momentum = momentum + (0.5 if i == self.num_leapfrog - 1 else 1.0) * step * end.gradient(beta)
        log_end = end.log_density(beta) - 0.5 * momentum.square().sum(-1)
        rate = (log_end - log_start).nan_to_num(nan=-torch.inf).clamp_max(0).exp()
        accepted = torch.rand_like(rate) < rate
        selected = (
            torch.where(accepted.reshape(*rate.shape, *[1] * (new.dim() - 2)), new, old)
            for new, old in zip(end, point, strict=True)
        )
        return Point(*selected), rate
