"""The trained parameters and buffers of any pair in one safetensors file; nothing is pickled."""

from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pyro_vae.batches import Batch
from pyro_vae.files import write_whole
from pyro_vae.pair import Program, run_pair, untouched


def save_weights(path: Path, model: Program, guide: Program, param_store: dict[str, Any]) -> None:
    """Write the pair's weights to ``path``, whole or not at all.

    :param param_store: the state of the fit's param store (``History.param_store``), where plain functions keep theirs.
    :raises OSError: with its ``errno``; an earlier file at ``path`` is then left as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(model, guide, param_store).items()}
    write_whole(path, to_bytes(tensors))


def load_weights(path: Path, model: Program, guide: Program, batch: Batch | None) -> dict[str, Any]:
    """Copy the weights at ``path`` into the pair, and return the state of its param store.

    :param batch: the arguments of one run, which makes the parameters that exist only once the pair has run; ``None`` where
        modules own them all.
    :raises ValueError: where the file is no safetensors file, or its weights are not this pair's.
    :raises FileNotFoundError: where there is none.
    """
    try:
        stored = read_tensors(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}; the run is not whole, train again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or it is cut short ({error}); train again") from error
    store = pyro.get_param_store()
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    if batch is not None:
        with untouched(training=False), torch.no_grad(), store.scope(state):
            run_pair(model, guide, *batch.args, **batch.kwargs)
            state = store.get_state()
    own = _tensors(model, guide, state)
    shapes, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (stored, own))
    if shapes != expected:
        differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        name = differing[0]
        raise ValueError(
            f"{path} holds the weights of another pair: {len(differing)} differ, the first {name!r} is "
            f"{shapes.get(name, 'missing')} in the file but {expected.get(name, 'missing')} in the pair; build the pair as "
            "it was trained"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return state


def _tensors(model: Program, guide: Program, param_store: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter and buffer of the modules, and what the param store holds beyond them."""
    tensors: dict[str, Tensor] = {}
    for side, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            tensors |= {f"{side}.{name}": tensor for name, tensor in program.state_dict(keep_vars=True).items()}
    own = {id(tensor) for tensor in tensors.values()}
    return tensors | {f"store.{name}": t for name, t in param_store["params"].items() if id(t) not in own}
