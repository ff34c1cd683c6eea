"""Passes over a graph: fewer and faster operations with the same results."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiler import internals

logger = logging.getLogger(__name__)
_aten = torch.ops.aten
_LARGE = 2_000_000  # multiplications of a matrix product, from which on oneDNN is faster despite its call overhead
_NARROW = 64  # columns, below which it is not


def improve(module: fx.GraphModule, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """A graph after all passes; the graph itself where it writes to a tensor, or where a pass fails.

    :param tensors: its inputs.
    """
    if any(_writes(node) for node in module.graph.nodes):
        return module
    try:
        improved, memory = module, _shared_memory(module, tensors)
        for run_pass in PASSES.values():
            improved = run_pass(fx.GraphModule(improved, _copy(improved.graph)))
            if _shared_memory(improved, tensors) != memory:  # an output aliases an input now
                return module
        return improved
    except Exception as error:  # of a private function of torch
        logger.debug("a graph is left without passes: %s", error)
        return module


def _shared_memory(module: fx.GraphModule, tensors: Sequence[Tensor]) -> list[int]:
    """For each input and output of a graph the index of the first of them that shares its storage. Checks the shapes too."""
    mode = internals.FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        outputs = internals.FakeTensorProp(module, mode).propagate(*tensors)
    places = [internals.memory_of(part) for part in (*map(mode.from_tensor, tensors), *outputs)]
    return [places.index(place) for place in places]


def use_onednn(module: fx.GraphModule) -> fx.GraphModule:
    """Multiply large matrices of single precision by oneDNN."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        for target in (_aten.mm.default, _aten.addmm.default):
            for node in module.graph.find_nodes(op="call_function", target=target):
                _replace_product(module.graph, node)
        module.graph.eliminate_dead_code()
    return module


PASSES: dict[str, Callable[[fx.GraphModule], fx.GraphModule]] = {"onednn": use_onednn}


def _replace_product(graph: fx.Graph, node: Any) -> None:
    *bias, left, right = node.args
    a, b, *added = (part.meta["val"] for part in (left, right, *bias))
    plain = not node.kwargs and a.dtype == torch.float and a.device.type == "cpu"
    plain = plain and all(part.shape == b.shape[1:] for part in added)
    if not plain or b.shape[1] < _NARROW or a.numel() * b.shape[1] < _LARGE:
        return
    with graph.inserting_before(node):
        weight = graph.call_function(_aten.t.default, (right,))
        parts = [_contiguous(graph, part, value) for part, value in ((left, a), (weight, b.t()))]
        product = graph.call_function(internals.onednn_linear, (*parts, bias[0] if bias else None))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)


def _contiguous(graph: fx.Graph, part: Any, value: Tensor) -> Any:
    if value.is_contiguous():
        return part
    return graph.call_function(_aten.clone.default, (part,), {"memory_format": torch.contiguous_format})


def _writes(node: fx.Node) -> bool:
    """Whether an operation writes to one of its arguments; random operations write to a tensor that was just made."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return False
    first: Any = node.args[0] if node.args else None
    if getattr(first, "target", None) is _aten.empty.memory_format and len(first.users) == 1:
        return False
    silent = "batch_norm" in str(node.target)  # its schema does not list the running statistics
    return silent or node.target._schema.is_mutable


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}), None)
    return copied
