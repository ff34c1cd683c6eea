"""Random states, optimizer states and the configuration of a fit, for checkpoints."""

import hashlib
from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO

from pyro_vae.data.batches import Batches, InMemory, bytes_of
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.svi import OneOptimizer


def random_state(batches: Batches | None = None) -> dict[str, Any]:
    """The states of the global generators of torch (CPU and GPUs), Python and numpy, and of the generators of
    the batches."""
    return pyro.util.get_rng_state() | {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "own": [generator.get_state() for generator in batches.generators()] if batches is not None else [],
    }


def set_random_state(state: dict[str, Any], batches: Batches | None = None) -> None:
    """Restore the states that :func:`random_state` returned."""
    pyro.util.set_rng_state(state)
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if batches is not None:
        for generator, saved in zip(batches.generators(), state["own"], strict=True):
            generator.set_state(saved)


def random_state_to_tensors(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Convert a random state to values that a checkpoint can store: the states of Python's and numpy's
    generators become tensors."""
    if state is None:
        return None
    (version, words, gauss), (kind, keys, *rest) = state["random"], state["numpy"]
    return state | {
        "random": [version, torch.tensor(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.copy()), *rest],
    }


def random_state_from_tensors(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """The inverse of :func:`random_state_to_tensors`."""
    if state is None:
        return None
    (version, words, gauss), (kind, keys, *rest) = state["random"], state["numpy"]
    return state | {"random": (version, tuple(words.tolist()), gauss), "numpy": (kind, keys.numpy(), *rest)}


def optim_state(optim: Any) -> dict[str, Any]:
    """The states of the torch optimizers and schedulers in a Pyro optimizer, by name of the parameter.
    :class:`OneOptimizer` has one state for all parameters, with the name ``""``."""
    if isinstance(optim, OneOptimizer):
        return {"": optim.optimizer.state_dict()}
    states = {}
    for name, p in pyro.get_param_store().named_parameters():
        for_parameter = optim.optim_objs.get(p)
        if for_parameter is None:
            continue
        states[name] = for_parameter.state_dict()
        if _is_scheduler(for_parameter):
            states[name] = {"scheduler": states[name], "optimizer": for_parameter.optimizer.state_dict()}
    return states


def set_optim_state(optim: Any, state: dict[str, Any]) -> None:
    """Restore the states that :func:`optim_state` returned. The torch optimizers are created now, since Pyro
    creates them only at the first step."""
    if isinstance(optim, OneOptimizer):
        optim.optimizer.load_state_dict(state[""])
        return
    for name, p in pyro.get_param_store().named_parameters():
        if name in state:
            for_parameter, saved = optim._get_optim(p), state[name]
            optim.optim_objs[p], optim.grad_clip[p] = for_parameter, optim._get_grad_clip(p)
            if _is_scheduler(for_parameter):
                for_parameter.load_state_dict(saved["scheduler"])
                for_parameter.optimizer.load_state_dict(saved["optimizer"])
                # otherwise torch warns that the scheduler steps before the optimizer
                for_parameter.optimizer._opt_called = True
            else:
                for_parameter.load_state_dict(saved)


def _is_scheduler(optim: Any) -> bool:
    return hasattr(optim, "optimizer")


def configuration(
    batches: Batches, held_out: Batches | None, loss: ELBO, optim: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings that must be the same when a fit is resumed. Functions cannot be compared, so each
    is recorded as ``"a function"``."""
    names = "num_particles", "vectorize_particles", "alpha"
    options = loss.options() if isinstance(loss, Objective) else _attributes(loss, names)
    return {
        "num_data": batches.num_rows,
        "batch_size": batches.batch_size if isinstance(batches, InMemory) else None,
        "drawn": isinstance(batches, InMemory) and batches.drawn,
        "num_batches": batches.num_batches,
        "data": _checksums(batches),
        "loss": {"name": type(loss).__name__} | options,
        "optim": _optimizer_settings(optim),
        "validation": _checksums(held_out),
    } | {name: "a function" if callable(value) else value for name, value in settings.items()}


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def versions() -> dict[str, str]:
    """Versions of the packages that compute the steps of a fit."""
    return {"torch": str(torch.__version__), "pyro-ppl": pyro.__version__}


def _optimizer_settings(optim: Any) -> dict[str, Any]:
    """The class names of an optimizer and its scheduler, and the options that are numbers, strings, tuples or
    lists."""
    kinds = [
        type(optim),
        *(getattr(optim, f"pt_{part}_constructor", None) for part in ("optim", "scheduler")),
    ]
    arguments = vars(optim).get("kwargs", {}), getattr(optim, "pt_optim_args", {})
    options = {name: value for part in arguments if isinstance(part, dict) for name, value in part.items()}
    return {"name": [kind.__name__ for kind in kinds if kind is not None]} | {
        name: repr(value)
        for name, value in options.items()
        if isinstance(value, bool | int | float | str | tuple | list)
    }


def _checksums(batches: Batches | None) -> list[str]:
    """The dtype, shape and SHA-256 of each tensor of the data. Loaders have none."""
    if not isinstance(batches, InMemory):
        return []
    digests: dict[int, Any] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    dtypes: dict[int, torch.dtype] = {}
    for block in batches.blocks():
        for i, tensor in enumerate(block.leaves()):
            if i not in digests:
                digests[i], shapes[i], dtypes[i] = hashlib.sha256(), tuple(tensor.shape), tensor.dtype
            elif tensor.dim():
                shapes[i] = (shapes[i][0] + len(tensor), *shapes[i][1:])
            else:  # it has no rows, and each block has it
                continue
            digests[i].update(bytes_of(tensor))
    return [f"{dtypes[i]} {shapes[i]} {digests[i].hexdigest()}" for i in digests]
