"""Parts of a checkpoint besides the parameters: random states, the state of the optimizer, the configuration
of a fit."""

import hashlib
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.data.batches import Batches, InMemory, bytes_of
from pyro_vae.infer.distributed import Group
from pyro_vae.infer.svi import OneOptimizer


def random_state(batches: Batches | None = None) -> dict[str, Any]:
    """The states of the global generators of torch (CPU and GPUs), Python and numpy, and of the generators of
    the batches."""
    return pyro.util.get_rng_state() | {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "own": [generator.get_state() for generator in batches.generators()] if batches is not None else [],
    }


def set_random_state(state: dict[str, Any], batches: Batches | None = None) -> None:
    pyro.util.set_rng_state(state)
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if batches is not None:
        for generator, own in zip(batches.generators(), state["own"], strict=True):
            generator.set_state(own)


def random_state_to_tensors(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A random state in the form that a checkpoint can store: the words of Python's and numpy's generators as
    tensors."""
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
    """The states of the torch optimizers (and schedulers) of one of Pyro's optimizers, by the names of the
    parameters."""
    if isinstance(optim, OneOptimizer):
        return {"": optim.optimizer.state_dict()}
    found = {}
    for name, p in pyro.get_param_store().named_parameters():
        one = optim.optim_objs.get(p)
        if one is not None:
            is_scheduler = hasattr(one, "optimizer")
            found[name] = (
                {"scheduler": one.state_dict(), "optimizer": one.optimizer.state_dict()}
                if is_scheduler
                else one.state_dict()
            )
    return found


def set_optim_state(optim: Any, state: dict[str, Any]) -> None:
    """Restore the state of one of Pyro's optimizers. Its torch optimizers are made here; Pyro makes them at
    the first step."""
    if isinstance(optim, OneOptimizer):
        optim.optimizer.load_state_dict(state[""])
        return
    for name, p in pyro.get_param_store().named_parameters():
        if name in state:
            one, saved = optim._get_optim(p), state[name]
            optim.optim_objs[p], optim.grad_clip[p] = one, optim._get_grad_clip(p)
            if hasattr(one, "optimizer"):
                one.load_state_dict(saved["scheduler"])
                one.optimizer.load_state_dict(saved["optimizer"])
                one.optimizer._opt_called = (
                    True  # else torch warns that the scheduler steps before the optimizer
                )
            else:
                one.load_state_dict(saved)


def configuration(
    batches: Batches, held_out: Batches | None, loss: ELBO, optim: Any, group: Group, settings: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same when a fit is resumed. Functions cannot be compared: each is recorded as "a
    function"."""
    options = {
        key: getattr(loss, key)
        for key in ("num_particles", "vectorize_particles", "alpha")
        if hasattr(loss, key)
    }
    whole = batches.whole.leaves() if isinstance(batches, InMemory) else []
    return {
        "num_processes": group.size,
        "num_data": batches.num_rows,
        "batch_size": batches.batch_size if isinstance(batches, InMemory) else None,
        "drawn": isinstance(batches, InMemory) and batches.drawn,
        "num_batches": batches.num_batches,
        "data": [_checksum(tensor) for tensor in whole],
        "loss": {"name": type(loss).__name__} | options,
        "optim": _optimizer_settings(optim),
        "validation": [_checksum(tensor) for tensor in held_out.whole.leaves()]
        if isinstance(held_out, InMemory)
        else [],
    } | {name: "a function" if callable(value) else value for name, value in settings.items()}


def versions() -> dict[str, str]:
    """Versions of the packages that compute the steps of a fit."""
    return {"torch": str(torch.__version__), "pyro-ppl": pyro.__version__}


def _optimizer_settings(optim: Any) -> dict[str, Any]:
    """The classes of an optimizer and its scheduler, and their options that are plain values."""
    kinds = [
        type(optim),
        *(getattr(optim, f"pt_{part}_constructor", None) for part in ("optim", "scheduler")),
    ]
    given = vars(optim).get("kwargs", {}), getattr(optim, "pt_optim_args", {})
    plain = {name: value for each in given if isinstance(each, dict) for name, value in each.items()}
    return {"name": [kind.__name__ for kind in kinds if kind is not None]} | {
        name: repr(value)
        for name, value in plain.items()
        if isinstance(value, bool | int | float | str | tuple | list)
    }


def _checksum(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bytes_of(tensor)).hexdigest()}"
