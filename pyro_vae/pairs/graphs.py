"""Run functions of tensors as graphs where the optional compiler can be imported, and as they are where not."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def can_compile() -> bool:
    """Whether ``pyro_vae.compiler`` can be imported, which depends on unstable parts of torch."""
    try:
        importlib.import_module("pyro_vae.compiler")
    except Exception as error:
        logger.warning("everything runs as eager Pyro, since pyro_vae.compiler cannot be imported: %s", error)
        return False
    return True


def graphed(f: Callable[..., Sequence[Tensor]], *, kind: str) -> Any:
    """A :class:`~pyro_vae.compiler.Graphed` of the function."""
    if not can_compile():
        return _Eager(f)
    from pyro_vae.compiler import Graphed

    return Graphed(f, kind=kind)


class _Eager:
    """A function that is never a graph."""

    def __init__(self, f: Callable[..., Sequence[Tensor]]) -> None:
        self.f = f

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.f(*tensors)

    def prepare(self, tensors: Sequence[Tensor], **_: Any) -> None:
        """Do nothing."""
