"""Guards: the Python state that a graph depends on.

If this state changes, the graph is invalid. The guards watch parameters, buffers, training flags, hooks and
attributes of modules, and the closures, defaults and globals of functions. Plain values (numbers, strings)
are compared by value, other objects by identity. The contents of an object that is not a module, such as the
items of a list, are not watched.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compiler.trace import CannotTrace

PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_MISSING = object()
_LIBRARIES = ("torch", "pyro", "pyro_vae", "numpy", "builtins")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"training"}  # every module has these


class Guards:
    """The Python state at the time when a graph is traced.

    :param roots: the programs, the modules that ran, and further objects whose attributes are guarded, such
        as a loss.
    :param params: the parameters whose gradients the graph returns.
    :raises CannotTrace: for a hook on the gradient of a parameter.
    """

    def __init__(self, roots: Iterable[Any], params: Iterable[Tensor]) -> None:
        # (function that reads a value now, name of the value, value when the graph was traced)
        self.values: list[tuple[Callable[[], Any], str, Any]] = []
        self.sizes: list[tuple[Mapping, int]] = []  # mappings and their number of entries
        self._visited: set[int] = set()
        for root in roots:
            self._visit(root)
        for name in _HOOKS:
            self._add_entries(getattr(nn.modules.module, f"_global{name}"))
        guarded = (value for _, _, value in self.values if isinstance(value, Tensor))
        self.tensors = [(value, _metadata(value)) for value in dict.fromkeys((*params, *guarded))]
        for value, _ in self.tensors:
            if _has_gradient_hooks(value):
                raise CannotTrace(f"a tensor of shape {tuple(value.shape)} has a hook on its gradient")

    def changed(self) -> str:
        """The name of the first guarded value that has changed, or ``""``."""
        for read, name, value in self.values:
            if _is_changed(read(), value):
                return name
        for mapping, size in self.sizes:
            if len(mapping) != size:
                return "an attribute or hook"
        for value, metadata in self.tensors:
            if _metadata(value) != metadata or _has_gradient_hooks(value):
                return f"a tensor of shape {tuple(value.shape)}"
        return ""

    def drop_replaced(self, captured: Iterable[Tensor]) -> None:
        """Drop the guards of objects that the run replaced while it was traced, such as a cache.

        :param captured: the tensors that the graph reads.
        :raises CannotTrace: if the run changed a plain value, or replaced a tensor that the graph reads.
        """
        ids = {id(value) for value in captured}
        unchanged = []
        for read, name, value in self.values:
            if not _is_changed(read(), value):
                unchanged.append((read, name, value))
            elif isinstance(value, PLAIN) or id(value) in ids:
                raise CannotTrace(_changes_as_it_runs(repr(name)))
        self.values = unchanged
        if name := self.changed():
            raise CannotTrace(_changes_as_it_runs(name))

    def buffers(self) -> list[Tensor]:
        """The guarded tensors that are not parameters."""
        return [value for value, _ in self.tensors if not isinstance(value, nn.Parameter)]

    def _visit(self, value: Any) -> None:
        """Guard the state of a module, a function or another object."""
        if id(value) in self._visited:
            return
        self._visited.add(id(value))
        if isinstance(value, nn.Module):
            for module in value.modules():
                self._add_module(module)
        elif isinstance(value, partial):  # such as a program in one of Pyro's handlers
            for part in (value.func, *value.args):
                self._visit(part)
            self._add_entries(value.keywords)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__)
            self._visit(value.__func__)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            self._add_entries(vars(value))  # such as a handler, a loss, or the object of a method
            self._visit(type(value))

    def _add_module(self, module: nn.Module) -> None:
        self._visited.add(id(module))
        attributes = vars(module)
        for name in ("_parameters", "_buffers", "_modules", *_HOOKS):
            self._add_entries(attributes[name])
        self.sizes.append((attributes, len(attributes)))
        for name in attributes:
            if name not in _MODULE_ATTRIBUTES:
                self._add_entry(attributes, name)
        self._visit(type(module))

    def _add_class(self, kind: type) -> None:
        """Guard the plain attributes and the methods of a class, except those of libraries."""
        for base in kind.__mro__:
            if not _is_library(base.__module__):
                for name, value in vars(base).items():
                    if isinstance(value, (*PLAIN, types.FunctionType)):
                        self._add_entry(vars(base), name)

    def _add_function(self, f: types.FunctionType) -> None:
        if _is_library(f.__module__):
            return
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            self._add(partial(_contents, cell), name)
        for name in _global_names(f.__code__):
            if name in f.__globals__:
                self._add_entry(f.__globals__, name)
        self._add_entries(f.__kwdefaults__ or {})
        for name in ("__defaults__", "__code__"):
            self._add(partial(getattr, f, name), name)

    def _add_entries(self, mapping: Mapping) -> None:
        """Guard all entries of a mapping, and their number."""
        self.sizes.append((mapping, len(mapping)))
        for key in mapping:
            self._add_entry(mapping, key)

    def _add_entry(self, mapping: Mapping, key: Any) -> None:
        self._add(partial(mapping.get, key, _MISSING), str(key))

    def _add(self, read: Callable[[], Any], name: str) -> None:
        value = read()
        self.values.append((read, name, value))
        if isinstance(value, nn.Module | partial | types.MethodType | types.FunctionType):
            self._visit(value)


def _changes_as_it_runs(name: str) -> str:
    return f"the pair changes {name} as it runs, which a graph would not do, since it runs no Python code"


def _metadata(value: Tensor) -> tuple:
    """Shape, strides, address, dtype, device and ``requires_grad``."""
    strided = value.layout is torch.strided
    stride, address = (value.stride(), value.data_ptr()) if strided else (None, None)
    return value.shape, stride, address, value.dtype, value.device, value.requires_grad


def _is_changed(now: Any, before: Any) -> bool:
    return now is not before and not (
        type(now) is type(before) and isinstance(before, PLAIN) and now == before
    )


def _has_gradient_hooks(value: Tensor) -> bool:
    return bool(value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None))


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _global_names(code: types.CodeType) -> Iterator[str]:
    """The names of globals that a function, and the functions defined in it, may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _contents(cell: types.CellType) -> Any:
    """The value of a closure's variable."""
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING
