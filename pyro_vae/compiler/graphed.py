"""A function that runs eagerly at first, then as a graph, then compiled."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vae.compiler.internals import has_compiler
from pyro_vae.compiler.trace import CannotTrace, Graph, describe, trace
from pyro_vae.pairs.preserve import untouched

logger = logging.getLogger(__name__)
Function = Callable[..., Sequence[Tensor]]


class Thresholds(NamedTuple):
    """The numbers of calls above which tracing (about a second) and compilation by Inductor (seconds to a
    minute) save time."""

    trace: int
    compile: int


THRESHOLDS = {
    "step of SVI": Thresholds(100, 5000),
    "fit": Thresholds(300, 5000),  # the number of steps is known before the first step
    "log-weights": Thresholds(100, 300),
    "gradient of HMC": Thresholds(20, 5000),
}


class Graphed:
    """A function of tensors, for tensors of one signature: their shapes, dtypes and devices.

    :param kind: a key of :data:`THRESHOLDS`.
    :param eager: the function that a graph is compared with, by default ``f``. It may return fewer outputs
        than ``f``, which are compared with the first outputs of the graph.
    :param writes: tensors that a call may write to, such as running averages. They are compared too.
    """

    def __init__(
        self, f: Function, *, kind: str, eager: Function | None = None, writes: Sequence[Tensor] = ()
    ) -> None:
        self.f, self.eager, self.kind, self.writes = f, eager or f, kind, writes
        self.run: Function = f
        self.graph: Graph | None = None
        self.how = "eager"
        self.calls = 0

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.run(*tensors)

    @property
    def captured(self) -> Sequence[Tensor]:
        """The tensors that the graph closes over."""
        return () if self.graph is None else self.graph.captured

    def prepare(self, tensors: Sequence[Tensor], *, calls: int = 1) -> None:
        """Trace or compile the function if that saves time in ``calls`` further calls on tensors of this
        signature. If it fails, the function runs as before, and the reason is logged."""
        limits = THRESHOLDS[self.kind]
        before, self.calls = self.calls, self.calls + calls
        try:
            if before < limits.trace <= self.calls:
                self.trace(tensors)
            if self.graph is not None and before < limits.compile <= self.calls and has_compiler():
                self.compile(tensors)
        except Exception as error:  # if the function itself fails, the next call raises its error
            reason = str(error) if isinstance(error, CannotTrace) else describe(error)
            logger.info("%s: stays %s: %s", self.kind, self.how, reason)

    def trace(self, tensors: Sequence[Tensor]) -> Graph:
        """Trace the function; calls then run the graph. Raises :class:`CannotTrace` if it cannot be
        traced."""
        graph = trace(self.f, tensors)
        self.compare(tensors, graph)
        self.graph, self.run, self.how = graph, graph, "traced"
        return graph

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compile the graph by Inductor, on a GPU as a CUDA graph; calls then run the compiled graph.

        :raises CannotTrace: if it cannot be compiled.
        """
        graph = self.graph or self.trace(tensors)
        try:
            compiled = graph.compiled(tensors)
        except Exception as error:
            raise CannotTrace(f"Inductor: {describe(error)}") from error
        self.compare(tensors, compiled)
        self.run, self.how = compiled, "compiled by Inductor"

    def compare(self, tensors: Sequence[Tensor], run: Function | None = None) -> None:
        """Compare a graph, by default the current one, with the eager function at the same noise.

        :raises CannotTrace: if an output or a written tensor differs by more than rounding.
        """
        results = []
        for function in (run or self.run, self.eager):
            with untouched(), restored([*self.writes, *tensors]):
                outputs = function(*tensors)
                results.append([value.detach().clone() for value in (*self.writes, *outputs)])
        actual, expected = results
        index = first_difference(actual, expected, num_written=len(self.writes))
        if index is not None:
            what = "an output" if index >= len(self.writes) else "a written tensor"
            shape, difference = tuple(expected[index].shape), _max_abs(actual[index] - expected[index])
            raise CannotTrace(
                f"{what} of shape {shape} differs from eager Pyro at the same noise by up to "
                f"{difference:.2g}: the pair reads or writes Python state that is not in the graph, such as "
                "an attribute or noise that is not torch's"
            )


@contextmanager
def restored(values: Sequence[Tensor]) -> Iterator[None]:
    """Restore these tensors and the random states after the block."""
    state = pyro.util.get_rng_state()
    before = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                # copy_() raises for an expanded tensor, even an unchanged one
                if not torch.equal(value, old):
                    value.data.copy_(old)


def first_difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], *, num_written: int = 0
) -> int | None:
    """The index of the first tensor that differs by more than rounding, or ``None``.

    Two tensors differ if the largest difference of their entries exceeds the relative tolerance of their
    dtype times a scale. For a scalar, the scale is its magnitude. For other tensors, it is the largest
    magnitude of their entries plus a twentieth of the largest magnitude in all outputs that are not scalars,
    since a small gradient can be the rounding error of large terms.

    :param num_written: the number of tensors at the start of the sequences that are not outputs but tensors
        that a call writes to.
    """
    scales = [
        _max_abs(value) if value.is_floating_point() or value.is_complex() else 0.0 for value in expected
    ]
    outputs = zip(scales[num_written:], expected[num_written:], strict=True)
    largest = max((scale for scale, value in outputs if value.dim() and math.isfinite(scale)), default=0.0)
    for i, (a, b, scale) in enumerate(zip(actual, expected, scales, strict=False)):
        if not (b.is_floating_point() or b.is_complex()):
            differs = not torch.equal(a, b)
        elif not math.isfinite(scale):
            differs = bool(a.isfinite().all())
        else:
            tolerance = max(_relative_tolerance(a), _relative_tolerance(b))
            allowed = tolerance * (scale + (largest / 20 if b.dim() else 0.0)) + 1e-12
            differs = not _max_abs(a - b) <= allowed  # true for NaN
        if differs:
            return i
    return None


def _relative_tolerance(value: Tensor) -> float:
    """The relative rounding error if the same operations run in another order."""
    tolerances = {torch.double: 1e-8, torch.cdouble: 1e-8, torch.float: 2e-4, torch.cfloat: 2e-4}
    return tolerances.get(value.dtype, 2e-2)


def _max_abs(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0
