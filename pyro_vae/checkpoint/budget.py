"""A limit on the memory that is allocated while a stored pair is rebuilt, for files of unknown origin."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OVERHEAD = 256  # added to the number of elements of each tensor, so that many small tensors are limited too


@contextmanager
def bounded(stored: int, what: str) -> Iterator[None]:
    """Limit the tensors that the block allocates to 2²² + 16·``stored`` elements in total.

    :param stored: size of the stored tensors.
    :param what: the subject of the error text, such as a path.
    :raises ValueError: if a tensor would exceed the limit; it is raised before the tensor is allocated.
    """
    with _Bounded(2**22 + 16 * stored, what):
        yield


class _Bounded(TorchDispatchMode):
    def __init__(self, limit: int, what: str) -> None:
        super().__init__()
        self.remaining, self.what = limit, what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._check(max(map(_num_elements, (*args, *(kwargs or {}).values())), default=0))
        shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
        if len(shapes) > 1:
            with suppress(RuntimeError):  # func does not broadcast these arguments
                self._check(math.prod(torch.broadcast_shapes(*shapes)))
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                size = tensor.numel() + _OVERHEAD
                self._check(size)
                self.remaining -= size
        return output

    def _check(self, size: int) -> None:
        if size > self.remaining:
            raise ValueError(
                f"{self.what} describes a pair that is far larger than the parameters that are stored with it"
            )


def _num_elements(argument: Any) -> int:
    """How many elements the output of a torch function may have, by one of its arguments: the product of the
    sizes for a shape, the value itself for an integer, such as the end of ``arange``, and 0 for others."""
    if isinstance(argument, list | tuple) and argument and all(type(size) is int for size in argument):
        return abs(math.prod(argument))
    return argument if type(argument) is int else 0
