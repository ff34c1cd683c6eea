"""Record the tensor operations of a function."""

import random
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyro_vae.compiler import internals
from pyro_vae.compiler.passes import improve
from pyro_vae.pairs.preserve import untouched

# Operations whose result has a shape that depends on the values of tensors, or that read a value.
_DYNAMIC = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "repeat_interleave.Tensor", "equal.default")
# Functions that read the value of a tensor into Python.
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
_READS |= {"__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"}
_READS |= {"__contains__", "__format__", "__repr__", "__dlpack__", "to_dlpack"}


class CannotTrace(Exception):
    """Why a function cannot run as a graph."""


class Graph:
    """The operations of a function: ``graph(*tensors)`` returns its outputs. Tensors that the function closes over, such as
    parameters and buffers, are ``held``: the graph reads and writes them where they are."""

    def __init__(self, module: fx.GraphModule, held: Sequence[Tensor]) -> None:
        self.held, self.module = list(held), module
        module.recompile()
        self.run = runnable(module.graph)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.run(*self.held, *tensors)

    def compiled(self, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The same, compiled by Inductor for tensors like these. Raises what Inductor raises."""
        given = [*self.held, *tensors]
        run = internals.compile_graph(self.module, given, cuda_graphs=any(part.is_cuda for part in self.held))

        def call(*tensors: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                return run(*self.held, *tensors)

        return call


def trace(f: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> Graph:
    """The graph of ``f(*tensors)``, which is called twice, at the same tensors and with other noise.

    :raises CannotTrace: where Python reads the value of a tensor, or the two calls differ in their operations.
    """
    graph, other = (_record(f, tensors, seed) for seed in (0, 1))
    if graph.code != other.code:
        raise CannotTrace("it runs other operations each time: it reads a counter, the time, or noise that is not torch's")
    for node in graph.graph.nodes:
        _check_node(graph, other, node)
    held = _lift(graph)
    return Graph(improve(graph, [*held, *tensors]), held)


def runnable(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a Python function whose operations are local names: in the step of a small network their lookup counts."""
    lines: list[str] = []
    known: dict[str, Any] = {}
    last_use = {part: node for node in graph.nodes for part in node.all_input_nodes}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        name = f"constant{len(known)}"
        known[name] = value
        return name

    for node in graph.nodes:
        if node.op == "call_function":
            known[f"run_{node.name}"] = internals.function_of(node.target)
            given = [*map(text, node.args), *(f"{key}={text(value)}" for key, value in node.kwargs.items())]
            lines.append(f"{node.name} = run_{node.name}({', '.join(given)})")
            freed = [part.name for part in node.all_input_nodes if last_use[part] is node and part.op == "call_function"]
            lines += [f"del {', '.join(freed)}"] if freed else []
        elif node.op == "output":
            lines.append(f"return {text(node.args[0])}")
    inputs = ", ".join(node.name for node in graph.nodes if node.op == "placeholder")
    exec(f"def graph({inputs}):\n    " + "\n    ".join(lines), known)
    return known["graph"]


def describe(error: Exception) -> str:
    """The first sentence of an error, and the line of the pair that it came from."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}{_line(traceback.extract_tb(error.__traceback__))}: {text[0].split('. ')[0]}"


def _record(f: Callable[..., Any], tensors: Sequence[Tensor], seed: int) -> fx.GraphModule:
    try:
        with untouched(seed=seed), internals.without_validation(), _NoReads() as reads, _NoHiddenReads(reads):
            noise = _other_noise()
            graph = internals.make_fx(f)(*(tensor.detach() for tensor in tensors))  # one tensor may be passed twice
            if _other_noise() != noise:
                raise CannotTrace("the pair draws noise from Python's or numpy's generator; draw it by torch")
            return graph
    except CannotTrace:
        raise
    except Exception as error:
        raise CannotTrace(describe(error)) from error


def _other_noise() -> tuple[Any, str]:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002


class _NoReads(TorchFunctionMode):
    """Refuse to read the value of a tensor: a graph would keep the number that it had."""

    by_pyro = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.by_pyro = sys._getframe(1).f_code is internals.asks_if_zero
        if name in _READS and not self.by_pyro:
            raise CannotTrace(f"Tensor.{name}() reads the value of a tensor{_line(traceback.extract_stack())}")
        return func(*args, **(kwargs or {}))


class _NoHiddenReads(internals.TorchDispatchMode):
    """Refuse reads by torch itself, where a tensor is given for a number: an index, a size, a scale."""

    def __init__(self, reads: _NoReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.reads.by_pyro:
            raise CannotTrace(f"torch reads the value of a tensor{_line(traceback.extract_stack())}")
        return func(*args, **(kwargs or {}))


def _check_node(graph: fx.GraphModule, other: fx.GraphModule, node: fx.Node) -> None:
    target = str(node.target)
    by_mask = target == "aten.index.Tensor" and any(
        isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
        for index in node.args[1]  # type: ignore[union-attr]
    )
    if by_mask or any(name in target for name in _DYNAMIC):
        raise CannotTrace(f"the result of {target} has a shape that depends on values")
    if any(isinstance(part, torch.Generator) for part in (*node.args, *node.kwargs.values())):
        raise CannotTrace(f"{target} draws from another generator than torch's default")
    if node.op == "get_attr":
        value, again = getattr(graph, target), getattr(other, target)
        if value is not again and not torch.equal(value, again):
            raise CannotTrace(
                f"Python makes a tensor of shape {tuple(value.shape)} that differs at each run, as numpy's noise does; draw it "
                "by torch"
            )


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph closes over into its first inputs; returns them."""
    graph, lifted = module.graph, dict[int, tuple[fx.Node, Tensor]]()
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if id(value) not in lifted:
            with graph.inserting_before(first):
                lifted[id(value)] = graph.placeholder(f"held_{len(lifted)}"), value
                lifted[id(value)][0].meta = dict(node.meta)
        node.replace_all_uses_with(lifted[id(value)][0])
        graph.erase_node(node)
    module.recompile()
    return [value for _, value in lifted.values()]


_FOLDERS = [str(Path(str(module.__file__)).parent) for module in (torch, pyro, np)]
_FOLDERS += [str(Path(__file__).parent.parent), sysconfig.get_path("stdlib")]


def _line(frames: traceback.StackSummary) -> str:
    """The innermost line outside of libraries; if there is none, outside of torch."""
    for skip in (_is_library, lambda name: name.startswith(_FOLDERS[0])):
        for frame in reversed(frames):
            if not skip(frame.filename):
                return f" at {Path(frame.filename).name}:{frame.lineno}" + (f", {frame.line}" if frame.line else "")
    return ""


def _is_library(filename: str) -> bool:
    if filename.startswith(("<frozen", "<string>", "<eval_with_key>")):
        return True
    of_python = filename.startswith(_FOLDERS[-1]) and "-packages" not in filename  # installed packages may define a pair
    return of_python or filename.startswith(tuple(_FOLDERS[:-1]))
