"""Python state that a graph depends on.

Guarded are the parameters, buffers, training flags, hooks and attributes of modules, and what functions close over, have as
defaults or read as globals: plain values (numbers, strings) by their value, anything else by its identity. What such an object
holds (the items of a list, the attributes of an object that is not a module) is not guarded.
"""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compiler.trace import CannotTrace

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_MISSING = object()
_LIBRARIES = ("torch", "pyro", "pyro_vae", "numpy", "builtins")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_MODULES = vars(nn.Module()).keys() - {"training"}  # the attributes that every module has


class Guards:
    """The state at the time a graph was traced.

    :param roots: the programs, the modules that ran, and further objects whose attributes are guarded, such as a loss.
    :param params: the parameters whose gradients the graph yields.
    :raises CannotTrace: for a hook on the gradient of a parameter.
    """

    def __init__(self, roots: Iterable[Any], params: Iterable[Tensor]) -> None:
        self.values: list[tuple[Any, Any, Any]] = []  # a mapping, a key and the value that it had there
        self.sizes: list[tuple[Mapping, int]] = []  # mappings and their number of entries
        self._seen: set[int] = set()
        for root in roots:
            self._add(root)
        for name in _HOOKS:
            self._add_all(getattr(nn.modules.module, f"_global{name}"))
        tensors = dict.fromkeys((*params, *(value for _, _, value in self.values if isinstance(value, Tensor))))
        self.tensors = [(value, layout(value)) for value in tensors]
        for value, _ in self.tensors:
            if _has_hooks(value):
                raise CannotTrace(f"a tensor of shape {tuple(value.shape)} has a hook on its gradient")

    def changed(self) -> str:
        """The name of what has changed since, or ``""``."""
        for entry in self.values:
            if _is_changed(*entry):
                return str(entry[1])
        for where, size in self.sizes:
            if len(where) != size:
                return "an attribute or hook"
        for value, before in self.tensors:
            if layout(value) != before or _has_hooks(value):
                return f"a tensor of shape {tuple(value.shape)}"
        return ""

    def restrict(self, held: Iterable[Tensor]) -> None:
        """Drop the guards of objects that the run that was traced has itself replaced, such as a cache.

        :param held: the tensors that the graph reads.
        :raises CannotTrace: where the run has changed a plain value, or replaced a tensor that the graph reads.
        """
        ids = {id(value) for value in held}
        kept = []
        for entry in self.values:
            if not _is_changed(*entry):
                kept.append(entry)
            elif isinstance(entry[2], PLAIN) or id(entry[2]) in ids:
                raise CannotTrace(f"the pair changes {str(entry[1])!r} as it runs, and a graph runs no Python")
        self.values = kept
        if name := self.changed():
            raise CannotTrace(f"the pair changes {name} as it runs, and a graph runs no Python")

    def buffers(self) -> list[Tensor]:
        """The guarded tensors that are not parameters."""
        return [value for value, _ in self.tensors if not isinstance(value, nn.Parameter)]

    def _add(self, value: Any) -> None:
        """Guard what a module, a function or another object depends on."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._add_module(module)
        elif isinstance(value, functools.partial):  # such as a program under one of Pyro's handlers
            for part in (value.func, *value.args):
                self._add(part)
            self._add_all(value.keywords)
        elif isinstance(value, types.MethodType):
            self._add(value.__self__)
            self._add(value.__func__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            self._add_all(vars(value))  # a handler, a loss, an object whose method is a program
            self._add(type(value))

    def _add_module(self, module: nn.Module) -> None:
        self._seen.add(id(module))
        held = vars(module)
        for name in ("_parameters", "_buffers", "_modules", *_HOOKS):
            self._add_all(held[name])
        self.sizes.append((held, len(held)))
        for name, value in held.items():
            if name not in _OF_MODULES:
                self._add_value(held, name, value)
        self._add(type(module))

    def _add_class(self, kind: type) -> None:
        """The attributes and methods of a class that is not of a library."""
        for each in kind.__mro__:
            if not _is_library(each.__module__):
                for name, value in vars(each).items():
                    if isinstance(value, (*PLAIN, types.FunctionType)):
                        self._add_value(vars(each), name, value)

    def _add_function(self, f: types.FunctionType) -> None:
        if _is_library(f.__module__):
            return
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            self._add_value(_Cell(cell), name, _Cell(cell).get(name, _MISSING))
        for name in _names(f.__code__):
            if name in f.__globals__:
                self._add_value(f.__globals__, name, f.__globals__[name])
        self._add_all(f.__kwdefaults__ or {})
        for name in ("__defaults__", "__code__"):
            self._add_value(_Attributes(f), name, getattr(f, name))

    def _add_all(self, where: Mapping) -> None:
        """Guard all entries of a mapping, and their number."""
        self.sizes.append((where, len(where)))
        for key, value in where.items():
            self._add_value(where, key, value)

    def _add_value(self, where: Any, key: Any, value: Any) -> None:
        self.values.append((where, key, value))
        if isinstance(value, nn.Module | functools.partial | types.MethodType | types.FunctionType):
            self._add(value)


def layout(value: Tensor) -> tuple:
    """Shape, strides, address, dtype, device and whether it is trained."""
    strided = value.layout is torch.strided
    return (
        value.shape, value.stride() if strided else None, value.data_ptr() if strided else None,
        value.dtype, value.device, value.requires_grad,
    )  # fmt: skip


def _is_changed(where: Any, key: Any, value: Any) -> bool:
    now = where.get(key, _MISSING)
    return now is not value and not (type(now) is type(value) and isinstance(value, PLAIN) and now == value)


def _has_hooks(value: Tensor) -> bool:
    return bool(value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None))


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that a function, and the functions inside it, may read as globals."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


class _Cell:
    """A closure's cell, with the ``get`` of a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # not assigned yet
            return default


class _Attributes:
    """The attributes of an object that has no ``__dict__`` of them, with the ``get`` of a mapping."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.value, name, default)
