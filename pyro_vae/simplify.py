"""A graph that says the same in fewer operations: without a compiler each of them costs a call, however small its tensors."""

import ast
import builtins
import functools
from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx

GENERATED = "<graph>"  # the file, in a traceback, of code that is in none
Node = Any  # fx.Node, whose arguments have types of their own that say nothing here
_aten = torch.ops.aten
_SHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.unsqueeze.default)
VIEWS = (*_SHAPES, _aten.t.default, _aten.detach.default, _aten.alias.default)
_ONES = (_aten.ones_like.default, _aten.ones.default, _aten.new_ones.default)
_ZEROS = (_aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default)
_ARITHMETIC = (_aten.mul.Tensor, _aten.div.Tensor, _aten.add.Tensor, _aten.sub.Tensor)
_NEUTRAL = {_aten.mul.Tensor: 1.0, _aten.div.Tensor: 1.0, _aten.sub.Tensor: 0.0, _aten.pow.Tensor_Scalar: 1.0}  # −0 + 0 is 0


def simplify(graph: fx.Graph) -> None:
    """Drop what changes nothing (x·1, x − 0, a view that is as its tensor) and what is there already, and do now what follows
    from numbers alone: the gradient of a loss begins as a tensor of ones, which goes through many operations before it meets
    another. What the caller gets, and what is written to, is left as it is.

    :param graph: its nodes have their tensors as ``meta["val"]``.
    """
    if turns_in_place(graph):
        return
    written, returned = _marked(graph)  # whose values change or are to be new; the views of them are what they are
    numbers: dict[Node, float] = {}
    seen: dict[tuple, Node] = {}
    node: Node
    for node in graph.nodes:
        same: Node = None
        if node.target in VIEWS:
            same = _viewed(node)
            if node.args[0] in numbers:
                numbers[node] = numbers[node.args[0]]
        elif node.op == "call_function":
            if node in returned or written.intersection((node, *node.all_input_nodes)):
                continue
            _put_numbers(node, numbers)
            same = _unchanged(node)
        if same is None and (node.target in VIEWS or node.op == "get_attr" or _is_pointwise(node)):
            same = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not None:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def looked_up(graph: fx.GraphModule) -> Callable[..., Any]:
    """Its ``forward``, the operations and the tensors that it holds looked up now and not at each call, which in the step of a
    small network counts."""
    code = graph.recompile()
    names = _Names({**code.globals, "self": graph})
    tree = ast.fix_missing_locations(names.visit(ast.parse(code.src)))
    (forward,) = (part for part in compile(tree, GENERATED, "exec").co_consts if isinstance(part, CodeType))
    return MethodType(FunctionType(forward, {"__builtins__": builtins, **code.globals, **names.found}), graph)


class _Names(ast.NodeTransformer):
    """Each ``self._param_constant0`` and ``torch.ops.aten.mul.Tensor`` as one name, dots and all, which no other can be."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known
        self.found: dict[str, Any] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        name = ast.unparse(node)
        first, *others = name.split(".")
        if first not in self.known:
            return node
        value = functools.reduce(getattr, others, self.known[first])
        self.found[name] = value._op if isinstance(value, torch._ops.OpOverload) else value
        return ast.Name(name, node.ctx)


def turns_in_place(graph: fx.Graph) -> bool:
    """Whether what a node is, as by ``t_()``, is another thing at each line."""
    return any(torch.Tag.inplace_view in _tags(node) for node in graph.nodes)


def _marked(graph: fx.Graph) -> tuple[set[Node], set[Node]]:
    """The nodes whose memory is written to, and those whose memory the caller is given. Where memory is written that was there
    before the graph, as a parameter's, any node may show it: all of them."""
    together: dict[Node, set[Node]] = {}  # nodes that may share memory
    written: set[Node] = set()
    returned: set[Node] = set()
    node: Node
    for node in graph.nodes:
        if node.op == "output":
            returned = set().union(*(together[value] for value in node.all_input_nodes))
        elif node.op == "call_function":
            written.update(_written(node))
        group = {node}.union(*(together[other] for other in _shared(node)))
        together.update(dict.fromkeys(group, group))
    written = set().union(*(together[node] for node in written))
    if any(node.op != "call_function" for node in written):
        written = set(graph.nodes)
    return written, returned


def _shared(node: Node) -> Sequence[Node]:
    """The arguments whose memory the results of a node may be in."""
    if node.op != "call_function":
        return ()
    aliased = [part for part, alias in _aliases(node) if alias is not None]
    own = node.target in (*_ONES, *_ZEROS) or torch.Tag.core in _tags(node) or torch.Tag.pointwise in _tags(node)
    return aliased if aliased or own else node.all_input_nodes  # such as unsafe_chunk's, which does not say so


def _written(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    silent = node.target is not getitem and not hasattr(node.target, "_schema")  # a graph within the graph
    if silent or "batch_norm" in str(node.target):  # whose running statistics go unsaid
        return node.all_input_nodes
    return [part for part, alias in _aliases(node) if alias is not None and alias.is_write]


def _aliases(node: Node) -> Iterator[tuple[Node, Any]]:
    """The nodes among the arguments, and what the operation says of their memory."""
    schema: Any = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, fx.Node):
                yield part, argument.alias_info


def _viewed(view: Node) -> Node:
    """The tensor that a view shows as it is."""
    source = view.args[0]
    if view.target is _aten.t.default:
        return source.args[0] if source.target is _aten.t.default else None
    return source if _layout(view) == _layout(source) else None


def _unchanged(node: Node) -> Node:
    """The tensor that an operation copies."""
    source: Any = None
    if node.target is _aten.clone.default:
        source = node.args[0]
    elif node.target is _aten.cat.default and len(node.args[0]) == 1:
        source = node.args[0][0]
    elif node.target in _NEUTRAL and not node.kwargs:
        left, right = node.args
        if right == _NEUTRAL[node.target]:
            source = left
        elif node.target is _aten.mul.Tensor and left == _NEUTRAL[node.target]:
            source = right
    same = isinstance(source, fx.Node) and _layout(source) == _layout(node)
    return source if same and not node.meta["val"].is_complex() else None  # which may be conjugate in name alone


def _put_numbers(node: Node, numbers: dict[Node, float]) -> None:
    """Note the number that a tensor is everywhere, and put those of its arguments in their places."""
    given, value = node.all_input_nodes, node.meta.get("val")
    if not isinstance(value, torch.Tensor):  # several results, or none
        return
    if node.target in (*_ONES, *_ZEROS):
        if value.is_floating_point():
            numbers[node] = float(node.target in _ONES)
    elif _is_pointwise(node) and given and all(part in numbers for part in given):
        if value.is_floating_point():
            args = fx.map_arg(node.args, lambda part: torch.tensor(numbers[part], dtype=part.meta["val"].dtype))
            numbers[node] = node.target(*args, **node.kwargs).item()
    elif node.target in _ARITHMETIC and len(given) == 2:
        for i, (part, other) in enumerate(zip(node.args, node.args[::-1], strict=True)):
            own = other.meta["val"]
            if part in numbers and own.shape == value.shape and own.dtype == part.meta["val"].dtype:
                node.update_arg(i, numbers[part])


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in _tags(node) and torch.Tag.nondeterministic_seeded not in _tags(node)


def _tags(node: Node) -> Sequence[torch.Tag]:
    return getattr(node.target, "tags", ())


def _layout(node: Node) -> tuple:
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype
