"""Convert nested values to JSON and named tensors, or to bytes, and back."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor


def flatten(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Convert ``value`` to JSON types. Each tensor in it is replaced by a name, and added to ``tensors``
    under that name: the keys and indices that lead to the tensor, such as ``"optim.0.step"``.

    :param name: the start of all names.
    :raises ValueError: if ``value`` contains anything but numbers, strings, tensors, and lists, tuples and
        dicts of them.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        name = name or "tensor"
        while name in tensors:
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, _join(name, i)) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        plain = type(value) is not Counter and all(isinstance(key, str) and key[:1] != "$" for key in value)
        if plain:
            return {key: flatten(item, tensors, _join(name, key)) for key, item in value.items()}
        kind = "$counts" if isinstance(value, Counter) else "$items"
        return {
            kind: [
                [flatten(key, {}), flatten(item, tensors, _join(name, key))] for key, item in value.items()
            ]
        }
    raise ValueError(
        f"checkpoint: {name or 'the state'} is of type {type(value).__name__}, which is not stored; expected "
        "numbers, strings, tensors, and lists and dictionaries of them"
    )


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`. Raises ``ValueError`` or ``KeyError`` for input that
    :func:`flatten` cannot have returned."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if kind[:1] != "$":
        return {key: unflatten(item, tensors) for key, item in tree.items()}
    content = tree[kind]
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float":
        return float(content)
    if kind == "$tuple":
        return tuple(unflatten(item, tensors) for item in content)
    items = {unflatten(key, {}): unflatten(item, tensors) for key, item in content}
    return {"$items": dict, "$counts": Counter}[kind](items)


def pack(content: Any) -> bytes:
    """Serialize any content that :func:`flatten` accepts to bytes."""
    tensors: dict[str, Tensor] = {}
    tree = flatten(content, tensors)
    return to_bytes(tensors, {"content": json.dumps(tree)})


def unpack(packed: bytes) -> Any:
    """The inverse of :func:`pack`."""
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    return unflatten(json.loads(header["__metadata__"]["content"]), read_tensors(packed))


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
