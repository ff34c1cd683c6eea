"""What a graph takes for granted: everything that Python could have read while it was traced."""

import copy
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pair import Program

_SMALL = 100
_SIMPLE = (bool, int, float, complex, str, type(None))


class CannotTrace(Exception):
    """What keeps a step from being a graph, in words."""


class Guards:
    """What Python could have read while a pair was traced: the parameters and buffers of every module that ran, its training
    flag, hooks and plain attributes; Pyro's param store; what plain functions close over, and what hangs on that.

    :raises CannotTrace: for parameters that are neither a module's nor the store's.
    """

    def __init__(self, ran: Iterable[nn.Module], programs: tuple[Program, ...], params: list[Tensor]) -> None:
        self.plain: list[tuple[Any, Any, Any]] = []
        self.tensors: list[tuple[Any, Any, Tensor]] = []
        self.bound: list[tuple[Any, Any, Any]] = []
        self._seen: set[int] = set()
        self._own: set[int] = set()  # the dictionaries that hold parameters and buffers
        for module in ran:
            self._take(module)
        for program in programs:
            self._take(program)
        store = pyro.get_param_store()
        self.named = [(name, value) for name, value in store._params.items() if any(value is p for p in params)]
        self.addresses = [(p, p.data_ptr(), p.device, p.requires_grad) for p in params]
        owned = {id(value) for *_, value in self.tensors} | {id(value) for _, value in self.named}
        for p in params:
            if id(p) not in owned:
                raise CannotTrace(f"a parameter of shape {tuple(p.shape)} is made anew as the pair runs")

    def _take(self, value: Any, depth: int = 4) -> None:
        """What hangs on a value: a module, a function, an object."""
        if id(value) in self._seen or not depth:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            for hooks in (value._forward_hooks, value._forward_pre_hooks):
                self.plain.append((_Length(hooks), None, len(hooks)))
            for own in (value._parameters, value._buffers):
                self._own.add(id(own))
                self._take_names(own, own, depth)
        if isinstance(value, types.MethodType):
            self._take(value.__self__, depth)
            value = value.__func__
        if isinstance(value, types.FunctionType):
            function = inspect.unwrap(value)
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                self._take_names(_Cell(cell), {name: _Cell(cell).get(name)}, depth)
            known = function.__globals__
            self._take_names(known, {name: known[name] for name in function.__code__.co_names if name in known}, depth)
        elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
            names = vars(value)
            if isinstance(value, nn.Module):
                names = {key: part for key, part in names.items() if key not in _EVERY_MODULES}
            self._take_names(vars(value), names, depth)

    def _take_names(self, where: Any, names: Mapping[Any, Any], depth: int) -> None:
        for key, value in list(names.items()):
            if isinstance(value, Tensor):
                self.tensors.append((where, key, value))
            elif _is_plain(value):
                self.plain.append((where, key, copy.deepcopy(value)))
            else:
                self.bound.append((where, key, value))
                if isinstance(value, dict) and len(value) <= _SMALL:
                    self._take_names(value, value, depth - 1)
                elif isinstance(value, list | tuple) and len(value) <= _SMALL:
                    self._take_names(_Items(value), dict(enumerate(value)), depth - 1)
                else:
                    self._take(value, depth - 1)

    def keep_read_by(self, graph: torch.fx.GraphModule) -> None:
        """Forget the tensors that are nobody's parameter or buffer and that the graph does not read: what Python keeps for
        later, such as a flow's cache."""
        read = {id(getattr(graph, str(node.target))) for node in graph.graph.nodes if node.op == "get_attr"}
        self.tensors = [entry for entry in self.tensors if id(entry[0]) in self._own or id(entry[2]) in read]

    def buffers(self) -> Iterator[Tensor]:
        """Tensors that are no parameters, as they are now."""
        for where, key, value in self.tensors:
            if not isinstance(value, nn.Parameter):
                yield where.get(key)

    def hold(self) -> bool:
        """Whether everything is as it was."""
        for where, key, value in self.plain:
            now = where.get(key, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for where, key, value in (*self.tensors, *self.bound):
            if where.get(key) is not value:
                return False
        store = pyro.get_param_store()._params
        for name, value in self.named:
            if store.get(name) is not value:
                return False
        for p, address, device, trained in self.addresses:
            if p.data_ptr() != address or p.device != device or p.requires_grad != trained:
                return False
        return True


_MISSING = object()
_EVERY_MODULES = vars(nn.Module()).keys() - {"training", "_modules"}


def _is_plain(value: Any) -> bool:
    """Numbers, words, and small collections of them."""
    if isinstance(value, list | tuple | set | frozenset | dict):
        parts = [*value.values()] if isinstance(value, dict) else value
        return len(value) <= _SMALL and all(map(_is_plain, parts))
    return isinstance(value, _SIMPLE)


class _Items:
    """A list, read like a dictionary."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def get(self, index: int, default: Any = None) -> Any:
        return self.items[index] if index < len(self.items) else default


class _Length:
    """The length of a collection, read like a dictionary."""

    def __init__(self, collection: Any) -> None:
        self.collection = collection

    def get(self, *_: Any) -> int:
        return len(self.collection)


class _Cell:
    """A closure's cell, read like a dictionary of one name."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return default
