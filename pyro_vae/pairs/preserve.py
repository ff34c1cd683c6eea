"""Run a pair and leave nothing behind: parameters, buffers, flags and random states are restored."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy

from pyro_vae.data.batches import Batch, as_whole
from pyro_vae.pairs.threads import exclusive
from pyro_vae.pairs.traces import Program, run_pair


@contextmanager
def untouched(*, training: bool | None = None, seed: int | None = None) -> Iterator[Mapping[nn.Module, bool]]:
    """Run a pair and restore what it changed: random states, Pyro's param store, training flags, buffers and
    ``requires_grad`` of every module that ran, and torch's default validation of distributions. The cache of autocast is
    cleared, since it does not see that parameters move. Yields the modules that ran, and whether gradients were on.

    :param training: run the modules in training mode or in evaluation mode; ``None`` leaves them as they are.
    :param seed: seed of the noise inside; ``None`` starts from the caller's random state.
    :raises RuntimeError: where another thread trains; other threads that run a pair are waited for.
    """
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f"seed: expected a whole number from 0 to 2³² − 1 but got {seed!r}")
    with exclusive(), _restored(training, seed) as ran:
        yield ran


@contextmanager
def _restored(training: bool | None, seed: int | None) -> Iterator[Mapping[nn.Module, bool]]:
    ran: dict[nn.Module, bool] = {}
    flags: dict[nn.Module, bool] = {}
    trained: dict[nn.Parameter, bool] = {}  # Pyro's param store sets requires_grad of what it registers (pyro#3438)
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module not in ran:
            flags[module] = module.training
            for name, buffer in module._buffers.items():
                kept = None if buffer is None or is_lazy(buffer) else buffer.clone()
                buffers.append((module, name, buffer, kept))
            for parameter in module.parameters():
                trained.setdefault(parameter, parameter.requires_grad)
            if training is not None:
                module.training = training
        ran[module] = ran.get(module, False) or torch.is_grad_enabled()

    store = pyro.get_param_store()
    # a global hook, for this block only: it is what reaches the networks that a plain function closes over
    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    state = pyro.util.get_rng_state()
    validate = Distribution._validate_args
    references = {p: p.__dict__["unconstrained"] for p in store._params.values() if "unconstrained" in p.__dict__}
    torch.clear_autocast_cache()
    try:
        with torch.random.fork_rng(), store.scope(store.get_state()):
            if seed is not None:
                pyro.set_rng_seed(seed)
            yield ran
    finally:
        hook.remove()
        torch.clear_autocast_cache()
        pyro.util.set_rng_state(state)
        Distribution._validate_args = validate
        for parameter, reference in references.items():  # get_state removes them, and a step in progress needs them
            parameter.unconstrained = reference
        for parameter, was_trained in trained.items():
            parameter.requires_grad_(was_trained)
        for module, was_training in flags.items():
            module.training = was_training
        with torch.no_grad():
            for module, name, buffer, kept in buffers:
                module._buffers[name] = buffer  # the module may have put another tensor there
                # a buffer that was not written may not bear it: one that is an expanded number
                if buffer is not None and kept is not None and not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def read_whole(data: Any, *, seed: int) -> Batch:
    """:func:`~pyro_vae.data.batches.as_whole` of the data of a verb. What a loader draws is drawn at ``seed``, and the caller's
    random states are unchanged."""
    with untouched(seed=seed):
        return as_whole(data)


class KeepFrozen(Messenger):
    """A handler under which frozen parameters of modules stay frozen and have no gradient, so that no optimizer moves them.

    Pyro's param store sets ``requires_grad`` of what it registers, so those of a PyroModule would be trained (pyro#3438); and
    one that is frozen later would drift on by its momentum.
    """

    def _pyro_param(self, msg: dict) -> None:
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(given, nn.Parameter) and not given.requires_grad:
            msg["infer"] = {**(msg["infer"] or {}), "_frozen": given}

    def _pyro_post_param(self, msg: dict) -> None:
        if msg["infer"] and "_frozen" in msg["infer"]:
            msg["infer"].pop("_frozen").requires_grad_(False)
        reference = getattr(msg["value"], "unconstrained", None)
        parameter = None if reference is None else reference()
        if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
            parameter.grad = None


@contextmanager
def modules_that_run() -> Iterator[Mapping[nn.Module, bool]]:
    """The modules that run in the block, and whether gradients were on."""
    ran: dict[nn.Module, bool] = {}

    def enter(module: nn.Module, _: Any) -> None:
        ran[module] = ran.get(module, False) or torch.is_grad_enabled()

    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        yield ran
    finally:
        hook.remove()


def make_parameters(model: Program, guide: Program, batch: Batch) -> list[nn.Module]:
    """Run a pair for the parameters that exist only once it has run, and leave them, and nothing else, behind. Returns the
    modules that ran."""
    store = pyro.get_param_store()
    with untouched(training=False) as ran, torch.no_grad():
        run_pair(model, guide, *batch.args, **batch.kwargs)
        made = store.get_state()
    store.set_state(made)
    return list(ran)


def closed_over(model: Program, guide: Program, ran: Collection[nn.Module]) -> list[nn.Module]:
    """Of the modules that ran, with what is in them, those that are no part of model or guide as modules: functions close over
    them. In the order in which they ran."""
    owned = {part for program in (model, guide) if isinstance(program, nn.Module) for part in program.modules()}
    return [part for part in dict.fromkeys(part for module in ran for part in module.modules()) if part not in owned]
