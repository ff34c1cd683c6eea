"""Run a pair without side effects: parameters, buffers, flags and random states are restored."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy

from pyro_vae.data.batches import Batch, as_whole, check_same_data, checksums
from pyro_vae.pairs.threads import exclusive
from pyro_vae.pairs.traces import Program, run_pair
from pyro_vae.processes import Group
from pyro_vae.random_states import restored_random_states


@contextmanager
def untouched(*, training: bool | None = None, seed: int | None = None) -> Iterator[Mapping[nn.Module, bool]]:
    """A context that restores the state that its block changes: random states, Pyro's param store, training
    flags, buffers and ``requires_grad`` of every module that runs, and torch's default for validation of
    distributions. The autocast cache is cleared, since it may have casts of parameters that have changed.
    Yields a mapping from each module that ran to whether gradients were enabled.

    :param training: run the modules in training or in evaluation mode; ``None`` keeps their own mode.
    :param seed: seed of the random state within the block, see ``stream_seed``; ``None`` continues the
        random state of the caller.
    :raises RuntimeError: if another thread trains. Other threads that run a pair wait until the block ends.
    """
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ValueError(f"seed: expected a whole number from 0 to 2³² − 1 but got {seed!r}")
    with exclusive(), _restored(training, seed) as ran:
        yield ran


@contextmanager
def _restored(training: bool | None, seed: int | None) -> Iterator[Mapping[nn.Module, bool]]:
    ran: dict[nn.Module, bool] = {}
    flags: dict[nn.Module, bool] = {}
    trained: dict[
        nn.Parameter, bool
    ] = {}  # Pyro's param store sets requires_grad of what it registers (pyro#3438)
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module not in ran:
            flags[module] = module.training
            for name, buffer in module._buffers.items():
                kept = None if buffer is None or is_lazy(buffer) else buffer.clone()
                buffers.append((module, name, buffer, kept))
            for parameter in module.parameters():
                trained.setdefault(parameter, parameter.requires_grad)
        if training is not None:  # each time, since the end of a nested block restores the module's own mode
            module.training = training
        ran[module] = ran.get(module, False) or torch.is_grad_enabled()

    store = pyro.get_param_store()
    # a global hook, for this block only, also sees the networks that plain functions close over
    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    validate = Distribution._validate_args
    references = {
        p: p.__dict__["unconstrained"] for p in store._params.values() if "unconstrained" in p.__dict__
    }
    torch.clear_autocast_cache()
    try:
        with restored_random_states(seed), store.scope(store.get_state()), _TransformModules(enter):
            yield ran
    finally:
        hook.remove()
        torch.clear_autocast_cache()
        Distribution._validate_args = validate
        for (
            parameter,
            reference,
        ) in references.items():  # get_state removes the references, but a step in progress needs them
            parameter.unconstrained = reference
        for parameter, was_trained in trained.items():
            parameter.requires_grad_(was_trained)
        for module, was_training in flags.items():
            module.training = was_training
        with torch.no_grad():
            for module, name, buffer, kept in buffers:
                module._buffers[name] = buffer  # the module may have replaced the tensor
                # copy only if the buffer has changed: copy_() raises for an expanded tensor
                if buffer is not None and kept is not None and not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def read_whole(data: Any, *, seed: int, num_data: int | None = None) -> Batch:
    """All data as one batch, see :func:`~pyro_vae.data.batches.as_whole`. A loader draws its random numbers
    with ``seed``, and the caller's random states are unchanged."""
    with untouched(seed=seed):
        batch = as_whole(data, num_data)
    check_same_data(Group.dividing(), batch)
    return batch


def check_same_pair(group: Group, modules: Iterable[nn.Module]) -> None:
    """Raise ``ValueError`` unless all ranks have the same parameters and buffers.

    :param modules: those that the pair ran.
    """
    if group.size == 1:
        return
    tensors = [p for _, p in sorted(pyro.get_param_store().named_parameters(), key=lambda item: item[0])]
    tensors += [part for module in modules for part in (*module.parameters(), *module.buffers())]
    error = "model and guide: the processes have different parameters or buffers; expected the same values"
    group.check_equal(checksums({id(part): part for part in tensors}.values()), error)


class _TransformModules(Messenger):
    """Calls ``enter`` for the transforms of distributions that are modules, since transforms run without
    forward hooks. In nested blocks the ``enter`` of an outer block is called first, as forward hooks are."""

    _nested: ClassVar[list[Callable[[nn.Module, Any], None]]] = []

    def __init__(self, enter: Callable[[nn.Module, Any], None]) -> None:
        super().__init__()
        self.enter = enter

    def __enter__(self) -> "_TransformModules":
        self._nested.append(self.enter)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._nested.remove(self.enter)
        return super().__exit__(*error)

    def _pyro_sample(self, msg: dict) -> None:
        if self.enter is not self._nested[-1]:
            return
        distribution = msg["fn"]
        while distribution is not None:
            for transform in getattr(distribution, "transforms", ()):
                for module in transform.modules() if isinstance(transform, nn.Module) else ():
                    for enter in self._nested:
                        enter(module, None)
            distribution = getattr(distribution, "base_dist", None)


class KeepFrozen(Messenger):
    """A handler that keeps frozen parameters of modules frozen and without gradients, so that no optimizer
    changes them.

    Pyro's param store sets ``requires_grad`` of all parameters that it registers, so frozen parameters of a
    PyroModule would be trained (pyro#3438). A parameter that is frozen later would still be changed by the
    momentum of the optimizer.
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
    """A context that yields a mapping from each module that runs in it to whether gradients were enabled."""
    ran: dict[nn.Module, bool] = {}

    def enter(module: nn.Module, _: Any) -> None:
        ran[module] = ran.get(module, False) or torch.is_grad_enabled()

    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        yield ran
    finally:
        hook.remove()


def make_parameters(model: Program, guide: Program, batch: Batch) -> list[nn.Module]:
    """Run a pair once so that it creates all its parameters, and restore all other state. Returns the modules
    that ran."""
    store = pyro.get_param_store()
    with untouched(training=False) as ran, torch.no_grad():
        run_pair(model, guide, *batch.args, **batch.kwargs)
        made = store.get_state()
    store.set_state(made)
    return list(ran)


def closed_over(model: Program, guide: Program, ran: Collection[nn.Module]) -> list[nn.Module]:
    """The modules that plain functions close over: those that ran, and their submodules, except the
    submodules of model and guide. They are in the order in which they ran."""
    owned = {
        part for program in (model, guide) if isinstance(program, nn.Module) for part in program.modules()
    }
    return [
        part
        for part in dict.fromkeys(part for module in ran for part in module.modules())
        if part not in owned
    ]
