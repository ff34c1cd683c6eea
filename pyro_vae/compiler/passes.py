"""Passes that rewrite a graph into fewer and faster operations with the same results."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compiler import internals

_aten = torch.ops.aten
# for smaller matrix products MKL is faster than oneDNN, whose call takes longer
_MIN_MULTIPLICATIONS = 2_000_000
_MIN_COLUMNS = 64  # of the product


def improve(graph: fx.Graph) -> None:
    """Apply all passes to a graph in place, and eliminate dead code."""
    for run_pass in PASSES.values():
        run_pass(graph)
    graph.eliminate_dead_code(_is_impure)


def use_onednn(graph: fx.Graph) -> None:
    """Let oneDNN multiply large single-precision matrices."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        for target in (_aten.mm.default, _aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                _replace_product(graph, node)


PASSES: dict[str, Callable[[fx.Graph], None]] = {"onednn": use_onednn}


def _is_impure(node: fx.Node) -> bool:
    """Whether a node writes to a tensor or draws noise, so that it must not be eliminated. Batch
    normalization is tested by name, since its schema does not declare that it writes to its running
    statistics."""
    return node.is_impure() or "batch_norm" in str(node.target)


def _replace_product(graph: fx.Graph, node: Any) -> None:
    *bias, left, right = node.args
    a, b, *added = (part.meta["val"] for part in (left, right, *bias))
    supported = not node.kwargs and a.dtype == torch.float and a.device.type == "cpu"
    supported = supported and all(part.shape == b.shape[1:] for part in added)
    if not supported or b.shape[1] < _MIN_COLUMNS or a.numel() * b.shape[1] < _MIN_MULTIPLICATIONS:
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
