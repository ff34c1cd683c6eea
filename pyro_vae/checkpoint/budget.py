"""A bound on the memory that a stored description may ask for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OVERHEAD = 256  # elements that a tensor counts for beside its own: millions of tiny ones take time, too


@contextmanager
def bounded(stored: int, what: str) -> Iterator[None]:
    """Within the block, tensors may be made that together have some multiple of ``stored`` elements, and no more.

    :raises ValueError: before a tensor is made that goes beyond it.
    """
    with _Bounded(2**22 + 16 * stored, what):
        yield


class _Bounded(TorchDispatchMode):
    def __init__(self, most: int, what: str) -> None:
        super().__init__()
        self.left, self.what = most, what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._spend(max(map(_size, (*args, *(kwargs or {}).values())), default=0), keep=True)
        shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
        if len(shapes) > 1:
            with suppress(RuntimeError):  # they are not broadcast
                self._spend(math.prod(torch.broadcast_shapes(*shapes)), keep=True)
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, tuple | list) else (found,):
            if isinstance(made, Tensor):
                self._spend(made.numel() + _OVERHEAD)
        return found

    def _spend(self, size: int, *, keep: bool = False) -> None:
        if size > self.left:
            raise ValueError(f"{self.what} describes a pair that is far larger than the parameters that are stored with it")
        if not keep:
            self.left -= size


def _size(argument: Any) -> int:
    """Elements of a tensor of this shape, or of a range of this length."""
    if isinstance(argument, list | tuple) and argument and all(type(one) is int for one in argument):
        return abs(math.prod(argument))
    return argument if type(argument) is int else 0
