"""Trace a function into a graph of its tensor operations."""

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

# operations that read the value of a tensor, or whose result has a shape that depends on values
_DYNAMIC = (
    "nonzero", "masked_select", "_local_scalar_dense", "unique", "repeat_interleave.Tensor", "equal.default",
)  # fmt: skip
# functions that read the value of a tensor into Python
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
_READS |= {"__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"}
_READS |= {"__contains__", "__format__", "__repr__", "__dlpack__", "to_dlpack"}


class CannotTrace(Exception):
    """A function cannot run as a graph. The message is the reason."""


class Graph:
    """The tensor operations of a function: ``graph(*tensors)`` returns its outputs.

    ``captured`` are the tensors that the function closes over, such as parameters and buffers. The graph
    reads their current values, and writes to them in place.
    """

    def __init__(self, module: fx.GraphModule, captured: Sequence[Tensor]) -> None:
        self.captured, self.module = list(captured), module
        module.recompile()
        self.run = runnable(module.graph)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.run(*self.captured, *tensors)

    def compiled(self, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The graph compiled by Inductor for tensors of this signature. Errors of Inductor are raised."""
        on_gpu = any(tensor.is_cuda for tensor in self.captured)
        run = internals.compile_graph(self.module, [*self.captured, *tensors], cuda_graphs=on_gpu)

        def call(*tensors: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                return run(*self.captured, *tensors)

        return call


def trace(f: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> Graph:
    """Trace ``f(*tensors)`` into a graph. The function is called twice, on the same tensors with different
    noise.

    :raises CannotTrace: if Python reads the value of a tensor, or the operations of the two calls differ.
    """
    module, other = (_record(f, tensors, seed) for seed in (0, 1))
    if module.code != other.code:
        raise CannotTrace(
            "its operations differ from call to call: it depends on a counter, the time, or noise that is "
            "not torch's"
        )
    for node in module.graph.nodes:
        _check_node(module, other, node)
    captured = _lift_captured(module)
    improve(module.graph)
    return Graph(module, captured)


def runnable(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a Python function. Operations are global variables of this function: looking them up as
    attributes would take a large part of the time of a step of a small network."""
    lines: list[str] = []
    variables: dict[str, Any] = {}
    last_use = {part: node for node in graph.nodes for part in node.all_input_nodes}

    def code(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(code, value))}]"
        name = f"constant{len(variables)}"
        variables[name] = value
        return name

    for node in graph.nodes:
        if node.op == "call_function":
            variables[f"run_{node.name}"] = internals.direct_call(node.target)
            args = [*map(code, node.args), *(f"{key}={code(value)}" for key, value in node.kwargs.items())]
            lines.append(f"{node.name} = run_{node.name}({', '.join(args)})")
            inputs = (part for part in node.all_input_nodes if last_use[part] is node)
            unused = [part.name for part in inputs if part.op == "call_function"]
            lines += [f"del {', '.join(unused)}"] if unused else []
        elif node.op == "output":
            lines.append(f"return {code(node.args[0])}")
    parameters = ", ".join(node.name for node in graph.nodes if node.op == "placeholder")
    exec(f"def graph({parameters}):\n    " + "\n    ".join(lines), variables)
    return variables["graph"]


def describe(error: Exception) -> str:
    """The first sentence of an error, and the line of the pair that raised it."""
    text = str(error).strip().splitlines() or [""]
    location = _location(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}{location}: {text[0].split('. ')[0]}"


def _record(f: Callable[..., Any], tensors: Sequence[Tensor], seed: int) -> fx.GraphModule:
    try:
        with (
            untouched(seed=seed), internals.without_validation(), _ForbidReads() as reads,
            _ForbidReadsInTorch(reads),
        ):  # fmt: skip
            state = _other_random_states()
            # detach() makes different inputs of a tensor that occurs twice
            module = internals.make_fx(f)(*(tensor.detach() for tensor in tensors))
            if _other_random_states() != state:
                raise CannotTrace(
                    "the pair draws noise from Python's or numpy's generator; draw it with torch"
                )
            return module
    except CannotTrace:
        raise
    except Exception as error:
        raise CannotTrace(describe(error)) from error


def _other_random_states() -> tuple[Any, str]:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002


class _ForbidReads(TorchFunctionMode):
    """Raise if Python reads the value of a tensor, since this value would be a constant of the graph."""

    by_pyro = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        caller = sys._getframe(1)
        while caller.f_back is not None and caller.f_code.co_filename.startswith(_TORCH):  # other modes
            caller = caller.f_back
        if name == "__bool__" and caller.f_code is internals.positive_check_code:
            return True
        self.by_pyro = caller.f_code is internals.zero_check_code
        if name in _READS and not self.by_pyro:
            location = _location(traceback.extract_stack())
            raise CannotTrace(f"Tensor.{name}() reads the value of a tensor{location}")
        return func(*args, **(kwargs or {}))


class _ForbidReadsInTorch(internals.TorchDispatchMode):
    """Raise if torch reads the value of a tensor that is passed in place of a number, such as an index or a
    size."""

    def __init__(self, reads: _ForbidReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.reads.by_pyro:
            raise CannotTrace(f"torch reads the value of a tensor{_location(traceback.extract_stack())}")
        return func(*args, **(kwargs or {}))


def _check_node(module: fx.GraphModule, other: fx.GraphModule, node: fx.Node) -> None:
    """Raise if a node has a dynamic shape or a generator, or a captured tensor differs between the two
    calls."""
    target = str(node.target)
    has_mask = target == "aten.index.Tensor" and any(
        isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
        for index in node.args[1]  # type: ignore[union-attr]
    )
    if has_mask or any(name in target for name in _DYNAMIC):
        raise CannotTrace(f"the result of {target} has a shape that depends on values")
    if any(isinstance(part, torch.Generator) for part in (*node.args, *node.kwargs.values())):
        raise CannotTrace(f"{target} draws noise from a generator that is not torch's default")
    if node.op == "get_attr":
        value, again = getattr(module, target), getattr(other, target)
        if value is not again and not torch.equal(value, again):
            raise CannotTrace(
                f"Python makes a tensor of shape {tuple(value.shape)} that differs from call to call, such "
                "as noise of numpy; draw it with torch"
            )


def _lift_captured(module: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph closes over its first inputs, and return these tensors."""
    graph, lifted = module.graph, dict[int, tuple[fx.Node, Tensor]]()
    first = next(node for node in graph.nodes if node.op != "get_attr")
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if id(value) not in lifted:
            with graph.inserting_before(first):
                placeholder = graph.placeholder(f"captured_{len(lifted)}")
            placeholder.meta = dict(node.meta)
            lifted[id(value)] = placeholder, value
        node.replace_all_uses_with(lifted[id(value)][0])
        graph.erase_node(node)
    return [value for _, value in lifted.values()]


_TORCH, _PYRO, _NUMPY = (str(Path(str(module.__file__)).parent) for module in (torch, pyro, np))
_PACKAGE = str(Path(__file__).parent.parent)
_STDLIB = sysconfig.get_path("stdlib")


def _location(frames: traceback.StackSummary) -> str:
    """The innermost line of the traced function outside of libraries. If there is none, as in a pair of this
    package, the innermost line outside of torch and Pyro."""
    own = [i for i, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "_record"]
    inside = [frame for frame in frames[own[-1] if own else 0 :] if frame.filename != __file__]
    for skip in (_is_library, lambda filename: filename.startswith((_TORCH, _PYRO))):
        for frame in reversed(inside):
            if not skip(frame.filename):
                line = f", {frame.line}" if frame.line else ""
                return f" at {Path(frame.filename).name}:{frame.lineno}{line}"
    return ""


def _is_library(filename: str) -> bool:
    if filename.startswith(("<frozen", "<string>", "<eval_with_key>")):
        return True
    # site-packages is in the folder of the standard library, but a package there may contain the pair
    in_stdlib = filename.startswith(_STDLIB) and "-packages" not in filename
    return in_stdlib or filename.startswith((_TORCH, _PYRO, _NUMPY, _PACKAGE))
