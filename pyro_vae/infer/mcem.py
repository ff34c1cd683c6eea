"""Monte Carlo EM: train a model without a guide, by posterior draws of HMC."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.optim import Adam, PyroOptim
from torch import Tensor
from tqdm import tqdm

from pyro_vae.data.batches import Batch, InMemory, as_whole, check_count
from pyro_vae.evidence import HMC, Path
from pyro_vae.evidence.chunks import progress_bar
from pyro_vae.infer.fit import (
    WithParamStore,
    empty_store,
    inspect_for_training,
    step_scheduler,
    warn_of_new_parameters,
)
from pyro_vae.infer.minibatch import nonfinite_parameters
from pyro_vae.infer.svi import check_optimizer
from pyro_vae.pairs.preserve import KeepFrozen, make_parameters, untouched
from pyro_vae.pairs.structure import LESS_MEMORY, Structure, first_line, remember_trained
from pyro_vae.pairs.threads import training
from pyro_vae.pairs.traces import Program, enough_memory, prior_of, sampled, subsampling_scale
from pyro_vae.processes import Group
from pyro_vae.random_states import restored_random_states

_GAIN = 0.3  # of the adaptation of step sizes
_FIRST_GAIN = 1.0  # in the first half of the warm-up, where step sizes are far off


@dataclass(frozen=True)
class EMHistory(WithParamStore):
    """The result of :func:`mcem`: its steps, the last state of its chains, and its param store.

    Modules are trained in place. Parameters of plain functions are in Pyro's param store, and each call has a
    separate store: ``with history.scope():`` makes it Pyro's current one.

    - log_joint: the mean of log p(x, z) over data and chains at the draws of each E-step, in nats per datum,
      ``(num_steps,)``
    - acceptance: the mean acceptance rate of each E-step, ``(num_steps,)``
    - step_size: the leapfrog step size of each datum, ``(n,)``
    - latents: the last draws of p(z|x), ``(num_chains, n, *shape)`` for each site
    - param_store: the state of Pyro's param store

    If all data share latents, they are one datum: n is 1.
    """

    log_joint: Tensor
    acceptance: Tensor
    step_size: Tensor
    latents: dict[str, Tensor]
    param_store: Any

    def __str__(self) -> str:
        return (
            f"{len(self.log_joint)} steps of Monte Carlo EM; log p(x, z) {self.log_joint[-1]:.2f} nats per "
            f"datum; accepted {self.acceptance.mean():.0%} of the moves"
        )


def mcem(
    model: Program,
    data: Any,
    *,
    optim: PyroOptim | None = None,
    num_epochs: int = 100,
    batch_size: int | None = None,
    num_chains: int = 1,
    num_leapfrog: int = 10,
    target_acceptance: float = 0.9,
    num_updates: int = 5,
    num_warm_up: int = 50,
    seed: int | None = None,
    progress: bool | None = None,
    check: bool = True,
    param_store: dict | None = None,
    start: EMHistory | None = None,
) -> EMHistory:
    """Train a model by Monte Carlo EM (Wei & Tanner 1990), without a guide: maximize log p(data), in nats.

    It follows Fisher's identity, ∇θ log p(x) = E[∇θ log p(x, z)], z ~ p(z|x). Each step has two parts:

    - E-step: one move of HMC for each datum and chain, z ~ p(z|x) at the current parameters. The chains
      persist: a move starts at the last draw of its datum.
    - M-step: ``num_updates`` updates of the parameters, by the gradient of (N/B) Σᵢ mean over chains of
      log p(xᵢ, zᵢ) at these draws.

    With the default numbers of leapfrog steps and updates, and the default acceptance rate, this is the
    baseline of Kingma & Welling (2013). As in :func:`~pyro_vae.fit`, gradients are proportional to the number
    N of data. Draws of persistent chains are draws of p(z|x) only as far as the chains follow the
    parameters: the slower the updates, the closer they are.

    :param model: any Pyro program with continuous latents. Discrete latents with a finite support are summed
        out. Modules run in their own mode, in which log p(x, z) must not depend on it: no dropout, and no
        batch normalization in training mode.
    :param data: as for :func:`~pyro_vae.fit`; stochastically binarized data are binarized once.
    :param optim: one of Pyro's optimizers, by default Adam with learning rate 1e-3. A scheduler steps once an
        epoch.
    :param num_epochs: passes over the data.
    :param batch_size: rows of a minibatch, for each of which a step is taken; ``None`` for all data at once,
        which a model needs whose data share latents.
    :param num_chains: chains for each datum.
    :param num_leapfrog: leapfrog steps of a move.
    :param target_acceptance: the mean acceptance rate, to which the step size of each datum is adapted at
        every move.
    :param num_updates: updates of the parameters in each step.
    :param num_warm_up: moves of the chains before the first step, from draws of the prior.
    :param seed: seed of all draws; the caller's random states are then unchanged. ``None`` continues them, as
        ``fit`` does.
    :param progress: show a bar on stderr; by default only if that is a terminal.
    :param check: ``False`` trains a model that is judged wrong, see :func:`~pyro_vae.check_pair`.
    :param param_store: ``history.param_store`` of an earlier call or fit, to continue with its parameters; by
        default parameters of plain functions start anew.
    :param start: the result of an earlier call on these data, whose chains and step sizes are continued
        without a warm-up.
    :raises ValueError: before the first step, for bad data, a model that cannot be trained, discrete latents
        that cannot be summed out, latents that all data share in minibatches, scaled sites, log-probabilities
        that depend on the training mode, or several processes.
    :raises FloatingPointError: for a log-probability or a gradient that is not finite, before parameters are
        updated.
    :raises RuntimeError: if another thread of this process trains.
    """
    optim = optim or Adam({"lr": 1e-3})
    for name, value in {
        "num_epochs": num_epochs,
        "num_chains": num_chains,
        "num_updates": num_updates,
        "num_warm_up": num_warm_up,
    }.items():
        check_count(f"mcem: {name}", value)
    if batch_size is not None:
        check_count("batch_size", batch_size, expected="1 or more, or None for all data at once,")
    check_optimizer(optim)
    hmc = HMC(num_leapfrog=num_leapfrog, target_acceptance=target_acceptance)
    if Group().size > 1:
        raise ValueError(
            f"mcem: this is one of {Group().size} processes, but its chains are those of one process; run it "
            "in a single process"
        )
    store, state = pyro.get_param_store(), empty_store() if param_store is None else param_store
    program = config_enumerate(model, default="parallel")
    # without a seed the draws continue the random states of the caller
    seeded = nullcontext() if seed is None else restored_random_states(seed)
    with training(), seeded, enough_memory(LESS_MEMORY):
        whole = as_whole(data)
        batches = InMemory(whole, whole.num_rows if batch_size is None else batch_size)
        with store.scope(state.copy()):
            pair = inspect_for_training(
                program, prior_of(program), batches, Trace_ELBO(), annealed=False, check=check, verb="mcem"
            )
        _check_model(pair, batches.num_rows)
        warn_of_new_parameters(model, model, state)
        with store.scope(state), KeepFrozen():
            make_parameters(program, pair.guide, pair.batch)
            with untouched(training=False):
                path = Path(program, None, batches.whole, verb="mcem", check=check, joint=bool(pair.shared))
            em = _EM(path, hmc, optim, num_chains, num_updates)
            em.check_modes()
            if start is not None:
                em.continue_from(start)
            n = path.latents.num_rows(path.batch)
            size = min(batches.batch_size, n)
            num_steps = num_epochs * -(-n // size)
            with progress_bar(num_steps + (num_warm_up if start is None else 0), progress, "MCEM") as bar:
                if start is None:
                    em.warm_up(_parts(n, size), num_warm_up, bar)
                for _ in range(num_epochs):
                    order = _parts(n, size)
                    for rows in order:
                        em.step(rows)
                        bar.update()
                    step_scheduler(optim, -sum(em.log_joint[-len(order) :]) / len(order))
        remember_trained(replace(pair, model=model, guide=model), state["params"])
    return em.history(state)


class _EM:
    """The chains of Monte Carlo EM, and their steps.

    :param path: the posterior of all data.
    """

    def __init__(self, path: Path, hmc: HMC, optim: PyroOptim, num_chains: int, num_updates: int) -> None:
        self.path, self.hmc, self.num_updates = path, hmc, num_updates
        self.svi = pyro.infer.SVI(path.model, prior_of(path.model), optim, self._loss, self._loss_and_grads)
        with torch.no_grad():
            point = path.draw(num_chains)
        self.u = point.u.clone()  # positions of the chains, (num_chains, n, dim)
        self.log_step = torch.full_like(point.log_base[0], -1.0)
        self.beta = torch.ones_like(self.log_step[:1].squeeze())  # the posterior, at the end of the path
        self.log_joint: list[float] = []
        self.acceptance: list[float] = []

    def warm_up(self, parts: Sequence[slice | Tensor], num_moves: int, bar: tqdm) -> None:
        for t in range(num_moves):
            for rows in parts:
                self._move(rows, _FIRST_GAIN if 2 * t < num_moves else _GAIN)
            bar.update()

    def step(self, rows: slice | Tensor) -> None:
        """An E-step and an M-step on some rows of the data."""
        rate = self._move(rows, _GAIN)
        part = self.path.on(rows)
        with torch.no_grad():
            z, _ = part.constrained(self.u[:, rows])
        losses = [self.svi.step(part.batch, z) for _ in range(self.num_updates)]
        self.log_joint.append(-losses[0] / self.path.batch.num_rows)
        self.acceptance.append(rate)

    def check_modes(self) -> None:
        """Raise ``ValueError`` if log p(x, z) is different in training and in evaluation mode."""
        z, _ = self.path.constrained(self.u)
        found = []
        for mode in (None, False):
            with untouched(training=mode, seed=0), torch.no_grad():
                found.append(self.path.latents.log_joint(self.path.model, self.path.batch, z))
        if not torch.allclose(found[0], found[1], rtol=1e-4, equal_nan=True):
            raise ValueError(
                "mcem: log p(x, z) differs between training and evaluation mode, as with dropout and batch "
                "normalization, so the posterior is not defined; expected a model without these, or its "
                "modules in evaluation mode (.eval())"
            )

    def continue_from(self, start: EMHistory) -> None:
        n, expected = len(self.log_step), {name: site.shape for name, site in self.path.latents.sites.items()}
        found = {name: value.shape[2:] for name, value in start.latents.items()}
        shape = (len(self.u), n)
        if found != expected or {(*v.shape[:2],) for v in start.latents.values()} != {shape}:
            got = {name: tuple(value.shape) for name, value in start.latents.items()}
            wanted = {name: (*shape, *event) for name, event in expected.items()}
            raise ValueError(
                f"start: its latents have the shapes {got}; expected {wanted}: the result of a call with the "
                "same model, data and num_chains"
            )
        parts = [start.latents[name].reshape(*shape, -1) for name in self.path.latents.sites]
        self.u = self.path.unconstrained(torch.cat(parts, -1).to(self.u))
        self.log_step = start.step_size.to(self.log_step).log()

    def history(self, state: Any) -> EMHistory:
        z, _ = self.path.constrained(self.u)
        return EMHistory(
            torch.tensor(self.log_joint, dtype=torch.double),
            torch.tensor(self.acceptance, dtype=torch.double),
            self.log_step.exp(),
            self.path.latents.by_site(z),
            state,
        )

    @torch.no_grad()
    def _move(self, rows: slice | Tensor, gain: float) -> float:
        """Move the chains of some rows, and adapt their step sizes. Returns the mean acceptance rate."""
        part, log_step = self.path.on(rows), self.log_step[rows]
        point, rate = self.hmc.leap(part, part.at(self.u[:, rows]), self.beta, log_step.exp())
        self.u[:, rows] = point.u
        self.log_step[rows] = log_step + gain * (rate.mean(0) - self.hmc.target_acceptance)
        return rate.mean().item()

    def _loss(self, model: Program, _: Program, batch: Batch, z: Tensor) -> Tensor:
        """−(N/B) Σ over rows of the mean of log p(x, z) over chains."""
        latents = self.path.latents
        log_joint = latents.log_joint(model, batch, z)
        return -(len(self.log_step) / z.shape[1]) * log_joint.mean(0).sum()

    def _loss_and_grads(self, model: Program, guide: Program, batch: Batch, z: Tensor) -> float:
        bad, value = "", math.nan
        try:
            loss = self._loss(model, guide, batch, z)
            loss.backward()
            value = loss.item()
        except ValueError as error:  # of a distribution, about its parameters
            bad = first_line(error)
        params = [p for _, p in pyro.get_param_store().named_parameters() if p.grad is not None]
        if names := nonfinite_parameters(params, [p.grad for p in params if p.grad is not None]):
            bad = f"the gradient of {names} is not finite"
        if bad or not math.isfinite(value):
            pyro.infer.util.zero_grads(params)
            raise FloatingPointError(
                f"mcem: {bad or f'log p(x, z) is {-value}'} at step {len(self.log_joint) + 1}; parameters "
                "are unchanged. Lower the learning rate, raise min_scale, or check the data"
            )
        return value


def _check_model(pair: Structure, num_data: int) -> None:
    """Raise ``ValueError`` for a model for which Monte Carlo EM is not defined."""
    if pair.shared and pair.num_rows < num_data:
        raise ValueError(
            f"mcem: {pair.shared[0]!r} is shared by all data, so a minibatch does not have its posterior; "
            "pass batch_size=None"
        )
    for name, site in sampled(pair.traces[0]):
        scale = torch.as_tensor(site["scale"]) / subsampling_scale(site)
        if not torch.allclose(scale, torch.ones_like(scale)):
            raise ValueError(
                f"mcem: {name!r} is scaled (poutine.scale), so the draws would not be those of p(z|x); "
                "expected no scale: minibatches are scaled by N/B without it"
            )


def _parts(n: int, size: int) -> Sequence[slice | Tensor]:
    """The rows of the minibatches of an epoch, in random order."""
    return [slice(None)] if size == n else torch.randperm(n).split(size)
