"""What a graph takes for granted: everything that Python could have read while it was traced."""

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.infer.graphs import CannotTrace
from pyro_vae.pair import Program

_DEPTH = 4  # how far attributes of attributes are followed
_SMALL = 100  # items of a list or dictionary, above which only its identity is looked at
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch", "pyro", "pyro_vae", "numpy"}
_MISSING = object()


@contextmanager
def names_read() -> Iterator[dict[int, tuple[dict[str, Any], set[str]]]]:
    """What the functions that run in the block may read by name, outside of libraries: their module's variables, by the
    module, and the names that their code mentions."""
    read: dict[int, tuple[dict[str, Any], set[str]]] = {}

    def enter(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call":
            known = frame.f_globals
            if not _in_library(known.get("__name__", "")):
                read.setdefault(id(known), (known, set()))[1].update(frame.f_code.co_names)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        yield read
    finally:
        sys.setprofile(before)


class Guards:
    """What Python could have read while a pair was traced: the parameters and buffers of every module that ran, its training
    flag, hooks and attributes; Pyro's param store; variables of the modules that functions are defined in; what functions
    close over, classes hold, and what hangs on that.

    :param ran: the ``nn.Module`` that ran.
    :param read: what :func:`names_read` says of a run.
    :raises CannotTrace: for parameters that are neither a module's nor the store's, and for hooks on gradients.
    """

    def __init__(
        self,
        ran: Iterable[nn.Module],
        programs: tuple[Program, ...],
        params: list[Tensor],
        read: Mapping[int, tuple[dict[str, Any], set[str]]],
    ) -> None:
        self.whole: list[tuple[dict, dict]] = []  # dictionaries of objects, and what they held
        self.empty: list[dict] = []  # those that held nothing
        self.plain: list[tuple[Any, Any, Any]] = []  # where, key, value: numbers and words, compared by value
        self.bound: list[tuple[Any, Any, Any]] = []  # objects, compared by identity
        self.tensors: list[tuple[Any, Any, Tensor]] = []  # likewise
        self._seen: set[int] = set()
        self._names = frozenset().union(*(names for _, names in read.values()))
        for module in ran:
            self._take(module, _DEPTH)
        for program in programs:
            self._take(program, _DEPTH)
        for known, names in read.values():
            self._take_names(known, {name: known[name] for name in names if name in known}, _DEPTH)
        for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
            self._take_dict(getattr(nn.modules.module, f"_global_{name}"), _DEPTH)
        in_store = pyro.get_param_store()._params.items()
        self.bound += [(_Store(), name, value) for name, value in in_store if any(value is p for p in params)]
        self.addresses = [(p, p.data_ptr(), p.device) for p in params]
        # which of them are trained may change for others too: one that is thawed
        self.trained = {p: p.requires_grad for p in (*params, *(value for *_, value in self.tensors if value.is_leaf))}
        owned = {id(value) for *_, value in (*self.tensors, *self.bound)}
        for p in params:
            if id(p) not in owned:
                raise CannotTrace(f"a parameter of shape {tuple(p.shape)} is made anew as the pair runs")
        for p in self.trained:
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                raise CannotTrace(f"a parameter of shape {tuple(p.shape)} has a hook on its gradient")

    def _take(self, value: Any, depth: int) -> None:
        """What hangs on a value: a module, a function, an object."""
        if id(value) in self._seen or not depth:
            return
        self._seen.add(id(value))
        if isinstance(value, functools.partial):  # such as what one of Pyro's handlers wraps
            self._take_names(_Attributes(value), {"func": value.func, "args": value.args}, depth)
            self._take_dict(value.keywords, depth)
        elif isinstance(value, types.MethodType):
            self._take(value.__self__, depth)
            self._take(value.__func__, depth)
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self._take_names(_Cell(cell), {name: _Cell(cell).get(name)}, depth)
            held = ("__code__", "__defaults__", "__kwdefaults__")
            self._take_names(_Attributes(value), {name: getattr(value, name) for name in held}, depth)
        elif isinstance(value, type | types.ModuleType):
            if not _in_library(value.__name__ if isinstance(value, types.ModuleType) else value.__module__):
                self._take_names(vars(value), {name: part for name, part in vars(value).items() if name in self._names}, depth)
            return
        if hasattr(value, "__dict__"):
            self._take_dict(vars(value), depth)
            for kind in type(value).__mro__:
                self._take(kind, depth)

    def _take_dict(self, held: dict, depth: int) -> None:
        """All of a dictionary, such as the attributes of an object: what is added to it later would be seen too."""
        if held:
            self.whole.append((held, dict(held)))
        else:
            self.empty.append(held)
        for key, value in list(held.items()):
            self._follow(held, key, value, depth)

    def _take_names(self, where: Any, names: Mapping[Any, Any], depth: int) -> None:
        """Some names of what is read like a dictionary."""
        for key, value in names.items():
            if not isinstance(value, Tensor):
                (self.plain if isinstance(value, _SIMPLE) else self.bound).append((where, key, value))
            self._follow(where, key, value, depth)

    def _follow(self, where: Any, key: Any, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            self.tensors.append((where, key, value))
        elif isinstance(value, np.ndarray) and value.nbytes <= _SMALL * 100:
            self.plain.append((_Content(value.tobytes), None, value.tobytes()))
        elif isinstance(value, dict) and len(value) <= _SMALL:
            self._take_dict(value, depth - 1) if depth else None
        elif isinstance(value, list | tuple | set | frozenset) and len(value) <= _SMALL:
            self.plain.append((_Content(value.__len__), None, len(value)))
            if isinstance(value, set):
                self.plain.append((_Content(value.copy), None, value.copy()))
            elif isinstance(value, list | tuple) and depth:
                self._take_names(_Items(value), dict(enumerate(value)), depth - 1)
        elif not isinstance(value, _SIMPLE):
            self._take(value, depth - 1)

    def forget_written(self) -> None:
        """Forget what a run of the pair has changed by itself, such as the last draw that it keeps for later."""
        for held, before in self.whole:
            if not _equal(held, before):
                self.bound += [(held, key, value) for key, value in before.items() if not isinstance(value, Tensor)]
        self.whole = [entry for entry in self.whole if _equal(*entry)]
        self.empty = [held for held in self.empty if not held]
        self.plain = [entry for entry in self.plain if _same(entry[0].get(entry[1], _MISSING), entry[2])]
        self.tensors, self.bound = (
            [(where, key, value) for where, key, value in entries if where.get(key, _MISSING) is value]
            for entries in (self.tensors, self.bound)
        )

    def buffers(self) -> Iterator[Tensor]:
        """Tensors that are no parameters, as they are now."""
        for where, key, value in self.tensors:
            if not isinstance(value, nn.Parameter):
                yield where.get(key)

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return (
            not any(self.empty)
            and all(where.get(key) is value for where, key, value in self.tensors)
            and all(where.get(key) is value for where, key, value in self.bound)
            and all(_equal(held, before) for held, before in self.whole)
            and all(_same(where.get(key, _MISSING), value) for where, key, value in self.plain)
            and all(p.data_ptr() == address and p.device == device for p, address, device in self.addresses)
            and all(p.requires_grad is trained and not p._backward_hooks for p, trained in self.trained.items())
        )


def _equal(held: dict, before: dict) -> bool:
    try:
        return held == before
    except (RuntimeError, ValueError):  # another tensor or array in the place of one
        return False


def _same(now: Any, value: Any) -> bool:
    return now is value or (type(now) is type(value) and now == value)


def _in_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES


class _Store:
    """Pyro's param store, whichever is in force, its unconstrained values read like a dictionary."""

    def get(self, name: str, default: Any = None) -> Any:
        return pyro.get_param_store()._params.get(name, default)


class _Items:
    """A list, read like a dictionary."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def get(self, index: int, default: Any = None) -> Any:
        return self.items[index] if index < len(self.items) else default


class _Content:
    """What a call says of a collection now, read like the one value of a dictionary."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask

    def get(self, *_: Any) -> Any:
        return self.ask()


class _Attributes:
    """The attributes of an object that keeps none in a dictionary, read like one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.value, name, default)


class _Cell:
    """A closure's cell, read like a dictionary of one name."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _: str, default: Any = None) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return default
