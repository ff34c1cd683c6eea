"""Run functions of tensors as graphs, or eagerly if the optional compiler cannot be imported."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def can_compile() -> bool:
    """Whether ``pyro_vae.compiler``, which depends on unstable parts of torch, can be imported."""
    try:
        importlib.import_module("pyro_vae.compiler")
    except Exception as error:
        logger.warning("everything runs as eager Pyro, since pyro_vae.compiler cannot be imported: %s", error)
        return False
    return True


def graphed(f: Callable[..., Sequence[Tensor]], *, kind: str) -> Any:
    """The function as a :class:`~pyro_vae.compiler.Graphed`, or if the compiler cannot be imported as an
    eager function with the same methods."""
    if not can_compile():
        return _Eager(f)
    from pyro_vae.compiler import Graphed

    return Graphed(f, kind=kind)


class _Eager:
    """A function that always runs eagerly."""

    def __init__(self, f: Callable[..., Sequence[Tensor]]) -> None:
        self.f = f

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.f(*tensors)

    def prepare(self, tensors: Sequence[Tensor], **_: Any) -> None:
        """Do nothing."""
