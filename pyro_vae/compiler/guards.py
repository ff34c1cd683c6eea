"""What a graph takes for granted: the Python state that decided which operations it has.

Guarded are the parameters, buffers, training flags, hooks and plain attributes (numbers, strings) of modules, and the plain
values and tensors that functions close over, have as defaults or read as globals. State that hangs on other objects is not.
"""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compiler.trace import CannotTrace

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_MISSING = object()
_LIBRARIES = ("torch", "pyro", "numpy")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Guards:
    """The state that was there when a graph was traced.

    :param roots: the programs, the modules that ran, objects whose plain attributes decide, such as a loss.
    :param params: the parameters that the graph reads and whose gradients it yields.
    :raises CannotTrace: for a hook on the gradient of a parameter.
    """

    def __init__(self, roots: Iterable[Any], params: Iterable[Tensor]) -> None:
        self.values: list[tuple[Mapping, Any, Any]] = []  # where, key, value: plain values, equal; others, identical
        self.sizes: list[tuple[Mapping, int]] = []  # what could be added: attributes, hooks
        self.tensors: list[tuple[Tensor, tuple]] = []
        self._seen: set[int] = set()
        for root in roots:
            self._add(root)
        for name in _HOOKS:
            self._count(getattr(nn.modules.module, f"_global{name}"))
        for value in dict.fromkeys((*params, *(value for _, _, value in self.values if isinstance(value, Tensor)))):
            if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
                raise CannotTrace(f"a tensor of shape {tuple(value.shape)} has a hook on its gradient")
            self.tensors.append((value, layout(value)))

    def changed(self) -> str:
        """The name of what has changed since, or ``""``."""
        for where, key, value in self.values:
            now = where.get(key, _MISSING)
            if now is not value and not (type(now) is type(value) and isinstance(value, PLAIN) and now == value):
                return str(key)
        for where, size in self.sizes:
            if len(where) != size:
                return "an attribute or hook"
        for value, before in self.tensors:
            if layout(value) != before or value._backward_hooks:
                return f"a tensor of shape {tuple(value.shape)}"
        return ""

    def keep(self, held: Iterable[Tensor]) -> None:
        """Guard no tensors but those that the graph holds.

        :raises CannotTrace: where the run that was traced has changed what is guarded.
        """
        ids = {id(value) for value in held}
        self.values = [entry for entry in self.values if not isinstance(entry[2], Tensor) or id(entry[2]) in ids]
        self.tensors = [(value, before) for value, before in self.tensors if id(value) in ids]
        if name := self.changed():
            raise CannotTrace(f"the pair changes {name!r} as it runs, and a graph runs no Python")

    def buffers(self) -> list[Tensor]:
        """Tensors that are no parameters."""
        return [value for value, _ in self.tensors if not isinstance(value, nn.Parameter)]

    def _add(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, functools.partial):  # such as a program under one of Pyro's handlers
            for part in (value.func, *value.args):
                self._add(part)
            self._record(value.keywords)
        elif isinstance(value, types.MethodType):
            self._add(value.__self__)
            self._add(value.__func__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif hasattr(value, "__dict__") and not isinstance(value, type | types.ModuleType):
            self._record(vars(value))  # a handler, a loss, an object whose method is a program

    def _add_module(self, root: nn.Module) -> None:
        for module in root.modules():
            self._seen.add(id(module))
            held = vars(module)
            self._record(held)
            for name in ("_parameters", "_buffers", "_modules"):
                self.values += [(held[name], key, value) for key, value in held[name].items()]
                self._count(held[name])
            for name in _HOOKS:
                self._count(held[name])
            self._add(type(module).forward)

    def _add_function(self, f: types.FunctionType) -> None:
        if (f.__module__ or "").partition(".")[0] in _LIBRARIES:
            return
        cells = {name: _Cell(cell) for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)}
        for name, cell in cells.items():
            self._follow(cell, name, cell.get(name, _MISSING))
        for name in _names(f.__code__):
            if name in f.__globals__:
                self._follow(f.__globals__, name, f.__globals__[name])
        self._record(f.__kwdefaults__ or {})
        self._follow(_Attributes(f), "__defaults__", f.__defaults__)
        self._follow(_Attributes(f), "__code__", f.__code__)

    def _follow(self, where: Any, key: Any, value: Any) -> None:
        """Guard what a function reads by name: a value or tensor itself, and what modules and functions among them read."""
        self.values.append((where, key, value))
        if isinstance(value, nn.Module | functools.partial | types.MethodType | types.FunctionType):
            self._add(value)

    def _record(self, held: MutableMapping[str, Any]) -> None:
        """Guard the plain values, tensors and functions among attributes, and that there are no more of them."""
        self._count(held)
        for key, value in held.items():
            if isinstance(value, (*PLAIN, Tensor, types.FunctionType, types.MethodType)):
                self._follow(held, key, value)

    def _count(self, held: Mapping) -> None:
        self.sizes.append((held, len(held)))


def layout(value: Tensor) -> tuple:
    """What a graph is made for, of a tensor that it reads: also where it lies, and whether it is trained."""
    strided = value.layout is torch.strided
    return (
        value.shape, value.stride() if strided else None, value.data_ptr() if strided else None,
        value.dtype, value.device, value.requires_grad,
    )  # fmt: skip


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function, and the functions inside it, may read as globals."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


class _Cell:
    """A closure's cell, read like a dictionary of one name."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not assigned yet
            return default


class _Attributes:
    """The attributes of an object that has them in no dictionary, read like one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.value, name, default)
