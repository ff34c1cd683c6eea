"""A function of tensors as a graph of operations: how it is traced, and what is refused."""

import copy
import functools
import logging
import os
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.util import is_identically_zero
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.pair import untouched
from pyro_vae.products import compile_products, improve_products
from pyro_vae.simplify import GENERATED, looked_up, simplify

logger = logging.getLogger(__name__)

# Operations whose result depends on the values of tensors in its shape, or leaves the tensors.
_DYNAMIC = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "repeat_interleave.Tensor", "equal.default")
# Ways for the values of a tensor to become Python's.
_READS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "equal",
        "allclose",
        "is_nonzero",
        "__array__",
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__format__",
        "__repr__",
        "__dlpack__",
    ]
)


class CannotTrace(Exception):
    """What keeps a step from being a graph, in words."""


def trace_graph(f: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> fx.GraphModule:
    """The operations of ``f(*tensors)``, which is called twice at the same tensors with other noise. Tensors that it closes
    over are the graph's own, live: what is written to them is seen.

    :raises CannotTrace: where Python reads the value of a tensor, or the two calls are not the same operations.
    """
    graph, again = (_traced(f, tensors, seed) for seed in (0, 1))
    if graph.code != again.code:
        raise CannotTrace("it does other things each time it runs (a counter, the time): numbers that Python keeps")
    for node in graph.graph.nodes:
        _check_node(graph, again, node)
    improved = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    try:
        simplify(improved.graph)
        improve_products(improved.graph)
        with torch.no_grad():
            FakeTensorProp(improved, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*tensors)  # whether shapes fit
        improved.forward = looked_up(improved)
    except Exception as error:  # ours, not the pair's
        logger.warning("a graph is left as it is: %s", said(error))
        return graph
    return improved


def compiled(graph: fx.GraphModule, tensors: Sequence[Tensor], *, cuda_graphs: bool = False) -> Callable[..., list[Tensor]]:
    """A graph compiled by Inductor for tensors like these, its noise that of eager torch, straight from the graph: Dynamo would
    look at it, and guard it, once more. To be called without gradients. Raises what Inductor raises; the graph itself serves
    on."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    own = fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Inductor may change it, and then fail
    key = compile_products(own.graph)
    own.recompile()
    held = [tensor for named in (own.named_parameters, own.named_buffers) for _, tensor in named(remove_duplicate=False)]
    on_cpu = not cuda_graphs and all(tensor.device.type == "cpu" for tensor in tensors)
    options = {
        "fallback_random": True,
        "triton.cudagraphs": cuda_graphs,
        "cpp_wrapper": on_cpu,  # all of it in C++
        "epilogue_fusion": False,  # a product has room for its bias and activation alone
    }
    bare: list[Any] = []

    def inner(lowered: Any, inputs: Sequence[Tensor], **kwargs: Any) -> Any:
        output = compile_fx_inner(lowered, inputs, **kwargs)
        if on_cpu and _is_bare(inputs, [*held, *tensors]):
            bare.append(output)
        return output

    caches: Any = torch.compiler.config
    with torch.no_grad(), caches.patch(cache_key_tag=caches.cache_key_tag + key):
        given: Any = {"inner_compile": inner, "decompositions": _logarithms(), "config_patches": options}
        whole: Any = compile_fx(own, list(tensors), **given)
    if not bare:
        return whole
    (output,) = bare
    return lambda *given: output.current_callable([*held, *given])


def _is_bare(inputs: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Whether torch has nothing to do between what is ``given`` and the ``inputs`` of what Inductor compiles (of those that
    share memory and are written it makes others), nor for outputs that are views, nor for autocast: its wrappers take 2 % of
    a small network's step."""
    found: Any = torch._guards.TracingContext.get().fw_metadata
    around = found.num_mutated_inp_runtime_indices or found.num_outputs_aliased or found.num_intermediate_bases
    same = [part.shape for part in inputs] == [part.shape for part in given]
    return same and not around and not torch.is_autocast_enabled("cpu")


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler, which Inductor needs."""
    return shutil.which("g++") is not None


def _traced(f: Callable[..., Any], tensors: list[Tensor], seed: int) -> fx.GraphModule:
    try:
        with untouched(seed=seed), _without_validation(), _NoReads() as reads, _NoHiddenReads(reads):
            detached = [tensor.detach() for tensor in tensors]  # two arguments may be the same tensor
            return make_fx(f)(*detached)
    except CannotTrace:
        raise
    except Exception as error:
        raise CannotTrace(said(error)) from error


@contextmanager
def _without_validation() -> Iterator[None]:
    """Neither Pyro nor torch validates in the block, since that reads the values of tensors: the caller validates in the graph.
    Distributions that were made before, such as priors of a module, were told to validate, and are not asked to."""
    default, of_values = Distribution._validate_args, Distribution._validate_sample
    with pyro.validation_enabled(False):
        Distribution._validate_args = None  # type: ignore[assignment] # off, but not as of one that was told to be off
        Distribution._validate_sample = lambda *_: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            Distribution._validate_sample = of_values  # type: ignore[method-assign]
    Distribution._validate_args = default  # Pyro puts back its own setting, which may be another than torch's


class _NoReads(TorchFunctionMode):
    """Nothing reads a tensor's value: a graph would keep the number that it had."""

    pyros = False  # whether Pyro itself asks if an integer is zero

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.pyros = sys._getframe(1).f_code is is_identically_zero.__code__
        if name in _READS and not self.pyros:
            raise CannotTrace(f"Tensor.{name}() takes the value out of a tensor{_where()}")
        return func(*args, **(kwargs or {}))


class _NoHiddenReads(TorchDispatchMode):
    """Nor does torch in the place of Python, where a tensor is given for a number: an index, a size, a scale."""

    def __init__(self, reads: _NoReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.reads.pyros:
            raise CannotTrace(f"torch takes the value out of a tensor{_where()}")
        return func(*args, **(kwargs or {}))


def _check_node(graph: fx.GraphModule, again: fx.GraphModule, node: fx.Node) -> None:
    target = str(node.target)
    by_mask = target == "aten.index.Tensor" and any(
        isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
        for index in node.args[1]  # type: ignore[union-attr]
    )
    if by_mask or any(name in target for name in _DYNAMIC):
        raise CannotTrace(f"the result of {target} has a shape that depends on values")
    if any(isinstance(part, torch.Generator) for part in (*node.args, *node.kwargs.values())):
        raise CannotTrace(f"{target} draws from a generator of its own")
    if node.op == "get_attr":
        value, other = getattr(graph, target), getattr(again, target, None)
        same = value is other or (isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other))
        if isinstance(value, Tensor) and not same:
            raise CannotTrace(
                f"a tensor of shape {tuple(value.shape)} is made by Python as the pair runs, another each time, as by numpy; a "
                "graph would keep it: draw it by torch"
            )


def said(error: Exception) -> str:
    """The first sentence of an error, and the line outside of torch that it came from."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}{_where(traceback.extract_tb(error.__traceback__))}: {text[0].split('. ')[0]}"


def _where(stack: traceback.StackSummary | None = None) -> str:
    """The innermost line of the pair, of what runs inside the trace; if it has none (Pyro asks for a log-probability after the
    run), the innermost that is neither torch's, nor this file's, nor a graph's."""
    lines = list(stack or traceback.extract_stack())
    began = max((i for i, line in enumerate(lines) if (line.filename, line.name) == (__file__, _traced.__name__)), default=-1)
    inner = [line for line in reversed(lines[began + 1 :]) if line.filename not in (__file__, GENERATED)]
    own = [line for line in inner if not _of_library(line.filename)]
    others = [line for line in inner if f"{os.sep}torch{os.sep}" not in line.filename]
    for line in (*own, *others):
        text = f", {line.line}" if line.line else ""  # none of what is typed at a prompt
        return f" at {os.path.basename(line.filename)}:{line.lineno}{text}"
    return ""


@functools.cache
def _of_library(filename: str) -> bool:
    """Whether a file is Python's, torch's, Pyro's, numpy's or ours; another installed package may hold the pair."""
    path = Path(filename)
    if path.name.startswith("<"):  # typed at a prompt; or the code of a function that torch makes
        return path.name == "<string>" or path.name.startswith("<frozen")
    installed = any(part in ("site-packages", "dist-packages") for part in path.parts)
    libraries = [Path(str(module.__file__)).parent for module in (torch, pyro, np)] + [Path(__file__).parent]
    return any(path.is_relative_to(folder) for folder in libraries) or (
        not installed and path.is_relative_to(sysconfig.get_path("stdlib"))
    )


def _log1p(e: Tensor) -> Tensor:
    """log(1 + e) to two units in the last place, from one logarithm (1 + e rounds to u; the fraction is what that lost).
    torch's own takes ten times as long in single precision on a CPU."""
    u = 1 + e
    bounded = u.clamp(_SINGLE.tiny, _SINGLE.max)  # else NaN at e = −1 and ∞
    return u.log() - ((bounded - 1) - e) / bounded


def _logarithms() -> dict[Any, Callable[..., Any]]:
    """What Inductor takes operations apart by, its own but for those made of log(1 + e): in eager torch they are kernels that
    nothing here would gain on."""
    from torch._inductor.decomposition import decompositions

    found = {**get_decompositions(_MADE_OF_IT), _aten.log1p.default: _log1p}
    return {**decompositions, **{op: _in_single(f, decompositions.get(op)) for op, f in found.items()}}


def _in_single(f: Callable[..., Any], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    """For tensors in single precision on a CPU, and what serves for others."""

    def decomposed(a: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = f if a.dtype == torch.float and a.device.type == "cpu" else otherwise
        return NotImplemented if chosen is None else chosen(a, *args, **kwargs)

    return decomposed


_aten = torch.ops.aten
_SINGLE = torch.finfo(torch.float)
_MADE_OF_IT = (_aten.binary_cross_entropy_with_logits, _aten.log_sigmoid_forward, _aten.softplus, _aten.logaddexp)
