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
    """Number of calls from which on tracing (about a second) and Inductor (seconds to a minute) pay."""

    trace: int
    compile: int


THRESHOLDS = {
    "step of SVI": Thresholds(100, 5000),
    "fit": Thresholds(300, 5000),  # the number of steps is known before the first
    "log-weights": Thresholds(100, 300),
    "gradient of HMC": Thresholds(20, 5000),
}


class Graphed:
    """A function of tensors, for tensors of one signature.

    :param kind: of :data:`THRESHOLDS`.
    :param eager: the function that a graph is compared with, by default ``f``; it may return fewer outputs, the first ones.
    :param writes: the tensors that a call may write, such as running averages: they are compared too.
    """

    def __init__(self, f: Function, *, kind: str, eager: Function | None = None, writes: Sequence[Tensor] = ()) -> None:
        self.f, self.eager, self.kind, self.writes = f, eager or f, kind, writes
        self.run: Function = f
        self.graph: Graph | None = None
        self.how = "eager"
        self.calls = 0

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.run(*tensors)

    @property
    def held(self) -> Sequence[Tensor]:
        """The tensors that the graph closes over."""
        return () if self.graph is None else self.graph.held

    def prepare(self, tensors: Sequence[Tensor], *, calls: int = 1) -> None:
        """Trace or compile the function for tensors like these if that many further calls pay for it. If it fails, the function
        runs as before, and a line is logged."""
        limits = THRESHOLDS[self.kind]
        before, self.calls = self.calls, self.calls + calls
        try:
            if before < limits.trace <= self.calls:
                self.trace(tensors)
            if self.graph is not None and before < limits.compile <= self.calls and has_compiler():
                self.compile(tensors)
        except Exception as error:  # if the function itself fails on these tensors, the call raises
            reason = str(error) if isinstance(error, CannotTrace) else describe(error)
            logger.info("%s: %s, since %s", self.kind, self.how, reason)

    def trace(self, tensors: Sequence[Tensor]) -> None:
        """Run as a graph from now on. Raises :class:`CannotTrace`."""
        self._adopt(trace(self.f, tensors), tensors, "traced")

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Run compiled by Inductor from now on; on a GPU as a CUDA graph. Raises :class:`CannotTrace`."""
        if self.graph is None:
            self.trace(tensors)
        try:
            run = self.graph.compiled(tensors)  # type: ignore[union-attr] # trace() has made it
        except Exception as error:
            raise CannotTrace(f"Inductor: {describe(error)}") from error
        self._adopt(run, tensors, "compiled by Inductor")

    def _adopt(self, run: Function, tensors: Sequence[Tensor], how: str) -> None:
        self.compare(tensors, run)
        self.run, self.how = run, how
        if isinstance(run, Graph):
            self.graph = run

    def compare(self, tensors: Sequence[Tensor], run: Function | None = None) -> None:
        """Compare a graph with the eager function at the same noise.

        :raises CannotTrace: where an output, or a tensor that is written, differs by more than rounding.
        """
        results = []
        for each in (run or self.run, self.eager):
            with untouched(), restored([*self.writes, *tensors]):
                outputs = each(*tensors)
                results.append([value.detach().clone() for value in (*self.writes, *outputs)])
        if (i := first_difference(*results, num_written=len(self.writes))) is not None:
            output = results[1][i]
            what = "an output" if i >= len(self.writes) else "a tensor that is written,"
            raise CannotTrace(
                f"{what} of shape {tuple(output.shape)} differs from eager Pyro at the same noise by up to "
                f"{_largest(results[0][i] - output):.2g}: the pair reads or writes something in Python (an attribute, noise "
                "that is not torch's) that is not in the graph"
            )


@contextmanager
def restored(values: Sequence[Tensor]) -> Iterator[None]:
    """Restore these tensors, and random states, after the block."""
    state = pyro.util.get_rng_state()
    before = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        with torch.no_grad():
            for value, was in zip(values, before, strict=True):
                if not torch.equal(value, was):  # an expanded tensor, which was not written, cannot be written
                    value.data.copy_(was)


def first_difference(ours: Sequence[Tensor], eager: Sequence[Tensor], *, num_written: int = 0) -> int | None:
    """The first tensor that differs by more than rounding. The tolerance is relative to its largest entry plus a twentieth of
    the largest entry of all outputs but single numbers: a small gradient can be the rounding error of large terms.

    :param num_written: the number of tensors that are no outputs, the first ones.
    """
    scales = [_largest(value) if value.is_floating_point() or value.is_complex() else 0.0 for value in eager]
    outputs = [scale for scale, value in zip(scales[num_written:], eager[num_written:], strict=True) if value.dim()]
    largest = max(filter(math.isfinite, outputs), default=0.0)
    for i, (a, b, scale) in enumerate(zip(ours, eager, scales, strict=False)):
        if not (b.is_floating_point() or b.is_complex()):
            differs = not torch.equal(a, b)
        elif not math.isfinite(scale):
            differs = bool(a.isfinite().all())
        else:
            tolerance = max(_tolerance(a), _tolerance(b))
            differs = not _largest(a - b) <= tolerance * (scale + (largest / 20 if b.dim() else 0.0)) + 1e-12
        if differs:
            return i
    return None


def _tolerance(value: Tensor) -> float:
    """The relative difference that another order of operations may make."""
    return {torch.double: 1e-8, torch.cdouble: 1e-8, torch.float: 2e-4, torch.cfloat: 2e-4}.get(value.dtype, 2e-2)


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0
