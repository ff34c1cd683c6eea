"""The matrix products of a graph: fewer of them, by the faster of torch's two libraries, or by kernels of their own."""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from pyro_vae.simplify import VIEWS, Node, turns_in_place

_aten = torch.ops.aten
_LARGE = 2_000_000  # multiplications of a matrix product, above which oneDNN pays for its longer call
_LARGE_ACTIVATED = 500_000  # likewise, where it does the activation as well
_NARROW = 64  # columns, below which it does not, and above which joined matrices are slow to lay out
_ACTIVATIONS = {_aten.tanh.default: "tanh", _aten.relu.default: "relu", _aten.sigmoid.default: "sigmoid"}


def improve_products(graph: fx.Graph) -> None:
    """Join products, and put oneDNN's in the place of large ones: the same numbers but for rounding.

    :param graph: of a function and its gradients; its nodes have their tensors as ``meta["val"]``.
    """
    if turns_in_place(graph):
        return
    readers: dict[Node, list[Node]] = {}
    for layer in graph.find_nodes(op="call_function", target=_aten.addmm.default):
        if _is_narrow(layer):
            readers.setdefault(layer.args[1], []).append(layer)
    for features, layers in readers.items():
        if 1 < len(layers) == len({_weight(layer).target for layer in layers}):
            _join(graph, features, layers)
    graph.eliminate_dead_code()
    _replace_products(graph, large_only=True)


def compile_products(graph: fx.Graph) -> str:
    """Let Inductor write all products of a graph as kernels of ``product.cpp``, which are faster than those of either library:
    they choose their tiles at once, where oneDNN plans a product anew at each call, and MKL is slow at narrow ones.

    :param graph: as :func:`improve_products` left it.
    :returns: what tells these kernels from others in Inductor's caches.
    """
    if not turns_in_place(graph):
        _replace_products(graph, large_only=False)
    _lower_products()
    return hashlib.sha256(_source().encode()).hexdigest()


def _is_narrow(layer: Node) -> bool:
    """Whether it is a linear layer of its own weight and bias, and of few outputs."""
    bias, _, right = layer.args
    own = right.target is _aten.t.default and right.args[0].op == bias.op == "get_attr" and bias.meta["val"].dim() == 1
    value = layer.meta["val"]
    own = own and bias.meta["val"].shape == value.shape[1:]
    return own and not layer.kwargs and value.shape[1] < _NARROW and value.device.type == "cpu"


def _weight(layer: Node) -> Node:
    return layer.args[2].args[0]


def _join(graph: fx.Graph, features: Node, layers: Sequence[Node]) -> None:
    """Layers that read the same features h, as the mean and the scale of a guide do, as one: with weights A, B and the
    gradients a, b of what they say, h·[A B]ᵀ, hᵀ·[a b] and [a b]·[A B] in the place of two products each."""
    weights = [_weight(layer) for layer in layers]
    ends = itertools.accumulate((len(weight.meta["val"]) for weight in weights), initial=0)
    spans = list(itertools.pairwise(ends))
    with graph.inserting_before(layers[0]):
        weight = _call(graph, _aten.cat.default, [_again(graph, weight) for weight in weights])
        bias = _call(graph, _aten.cat.default, [_again(graph, layer.args[0]) for layer in layers])
        said = _call(graph, _aten.addmm.default, bias, features, _call(graph, _aten.t.default, weight))
        for layer, span in zip(layers, spans, strict=True):
            part = _call(graph, _aten.slice.Tensor, said, 1, *span)
            if any(user.target in VIEWS for user in layer.users):  # which some of them cannot be of columns
                part = _contiguous(graph, part)
            layer.replace_all_uses_with(part)
    found = {back.args[1].target: (outer, back) for outer, back in _backward(features)}
    if any(weight.target not in found for weight in weights):
        return
    outers, backs = zip(*(found[weight.target] for weight in weights), strict=True)
    deltas = [back.args[0] for back in backs]
    latest = max(deltas)
    if any(user < latest for outer in outers for user in outer.users):
        return
    with graph.inserting_before(latest.next):
        delta = _call(graph, _aten.cat.default, deltas, 1)
        gradient = _call(graph, _aten.mm.default, _call(graph, _aten.t.default, delta), features)
        for outer, span in zip(outers, spans, strict=True):
            outer.replace_all_uses_with(_call(graph, _aten.slice.Tensor, gradient, 0, *span))
        total = _sum_of(backs)
        if total is not None:
            total.replace_all_uses_with(_call(graph, _aten.mm.default, delta, weight))


def _backward(features: Node) -> Iterator[tuple[Node, Node]]:
    """The products aᵀ·h and a·A, for all layers that read these features h."""
    for outer in features.users:
        if outer.target is _aten.mm.default and outer.args[1] is features and outer.args[0].target is _aten.t.default:
            delta = outer.args[0].args[0]
            for back in delta.users:
                if back.target is _aten.mm.default and back.args[0] is delta and back.args[1].op == "get_attr":
                    yield outer, back


def _sum_of(parts: Sequence[Node]) -> Node:
    """What adds all of these up and nothing else, where nothing else is asked of them; else ``None``."""
    for start in parts:
        node, others = start, set(parts) - {start}
        while others and len(node.users) == 1:
            (user,) = node.users
            other: Node = next((arg for arg in user.args if arg is not node), None)
            if user.target is not _aten.add.Tensor or user.kwargs or other not in others or len(other.users) > 1:
                break
            others.remove(other)
            node = user
        if not others:
            return node
    return None


def _again(graph: fx.Graph, tensor: Node) -> Node:
    """A tensor of the graph's own, where it may not have been fetched yet."""
    node: Node = graph.get_attr(tensor.target)
    node.meta["val"] = tensor.meta["val"]
    return node


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    node: Node = graph.call_function(target, args, kwargs)
    with FakeTensorMode():  # each node's own tensor is of another mode
        node.meta["val"] = target(*fx.map_arg(args, _like), **kwargs)
    return node


def _like(node: Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


# torch multiplies single-precision matrices by MKL, which on CPUs that are not Intel's runs at half the speed of oneDNN. The
# operation is one of our own, since Inductor takes torch's only for weights that are constant.
_library = torch.library.Library("pyro_vae", "DEF")
_library.define(
    "product(Tensor a, Tensor b, bool transposed, Tensor? bias, str activation) -> Tensor",
    tags=torch.Tag.needs_contiguous_strides,  # oneDNN takes a thousand times as long for columns cut out of a matrix
)


def _product(a: Tensor, b: Tensor, transposed: bool, bias: Tensor | None, activation: str) -> Tensor:
    """activation(a·b + bias), or a·bᵀ, of contiguous tensors."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b if transposed else b.t(), bias, activation, [], "")


def _product_shape(a: Tensor, b: Tensor, transposed: bool, _: Tensor | None, __: str) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0 if transposed else 1])


_library.impl("product", _product, "CPU")
torch.library.register_fake("pyro_vae::product", _product_shape, lib=_library)


@functools.cache
def _lower_products() -> None:
    """Tell Inductor how to write the operation."""
    from torch._inductor import ir, lowering
    from torch._inductor.codegen.cpp_template import CppTemplate

    class Product(CppTemplate):
        def __init__(self, parts: Sequence[Any], transposed: bool, activation: str) -> None:
            a, b, *_ = parts
            shape = [a.get_size()[0], b.get_size()[0 if transposed else 1]]
            super().__init__("product", parts, ir.FixedLayout(a.get_device(), a.get_dtype(), shape), num_threads=0)
            self.kind = f"{str(transposed).lower()}, pyro_vae::{activation}"

        def render(self, **kwargs: Any) -> str:
            kernel: Any = kwargs["kernel"]
            out: Any = kwargs.get("template_buffer_node") or self.output_node
            names = {part.get_name(): name for part, name in zip(self.input_nodes, ("A", "B", "bias"), strict=False)}
            inputs = {names[part.get_name()]: part for part in self.input_nodes}  # one may be two of them
            signature = kernel.def_kernel(inputs=inputs, outputs={"C": out})
            given = [f"&{kernel.index(part, [0] * len(part.get_size()))}" for part in self.input_nodes]
            a, b, bias = given if len(given) == 3 else (*given, "nullptr")
            m, n, k = map(int, (*out.get_size(), self.input_nodes[0].get_size()[1]))
            call = f"pyro_vae::product<{self.kind}>({a}, {b}, {bias}, C, {m}, {n}, {k});"
            profile = kernel.maybe_codegen_profile()
            return f'{self.header().getvalue()}\n{_source()}\nextern "C" {signature} {{ {profile} {call} }}\n'

    def lowered(a: Any, b: Any, transposed: bool, bias: Any, activation: str) -> Any:
        given = (a, b) if bias is None else (a, b, bias)
        parts = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(part)) for part in given]
        return Product(parts, transposed, activation).generate().output_node()

    lowering.register_lowering(torch.ops.pyro_vae.product.default, type_promotion_kind=None)(lowered)


@functools.cache
def _source() -> str:
    return (Path(__file__).parent / "product.cpp").read_text(encoding="utf-8")


def _replace_products(graph: fx.Graph, *, large_only: bool) -> None:
    """Put the operation in the place of torch's, where the CPU has the kernels for it."""
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        for product in (_aten.mm.default, _aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=product):
                _replace_product(graph, node, large_only=large_only)
        graph.eliminate_dead_code()


def _replace_product(graph: fx.Graph, node: Node, *, large_only: bool) -> None:
    *bias, a, b = node.args
    left, right, *added = (part.meta["val"] for part in (a, b, *bias))
    user: Node = next(iter(node.users), node)
    activation = _ACTIVATIONS.get(user.target, "none") if len(node.users) == 1 else "none"
    own = all(part.shape == right.shape[1:] for part in added)
    plain = not node.kwargs and left.dtype == torch.float and left.device.type == "cpu" and own
    size = left.numel() * right.shape[1]
    small = right.shape[1] < _NARROW or size < (_LARGE if activation == "none" else _LARGE_ACTIVATED)
    if not plain or not size or (large_only and small):
        return
    transposed = right.t().is_contiguous()
    with graph.inserting_before(node):
        if transposed:
            b = b.args[0] if b.target is _aten.t.default else _call(graph, _aten.t.default, b)
        a, b, *bias = (_contiguous(graph, part) for part in (a, b, *bias))
        args = a, b, transposed, bias[0] if bias else None, activation
        product = graph.call_function(torch.ops.pyro_vae.product.default, args)
    replaced = node if activation == "none" else user
    product.meta = replaced.meta
    replaced.replace_all_uses_with(product)
    for each in dict.fromkeys((replaced, node)):
        graph.erase_node(each)


def _contiguous(graph: fx.Graph, part: Node) -> Node:
    """The tensor itself, or a copy: Inductor makes it part of what made the tensor, the product would do so by itself."""
    if part.meta["val"].is_contiguous():
        return part
    return _call(graph, _aten.clone.default, part, memory_format=torch.contiguous_format)
