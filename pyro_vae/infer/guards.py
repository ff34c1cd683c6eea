"""What a graph takes for granted: everything that Python could have read while it was traced."""

import dis
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.graphs import CannotTrace
from pyro_vae.pair import Program

_DEPTH = 6  # how far attributes of attributes are followed
_SMALL = 1000  # items of a list or dictionary, above which only its identity is looked at
SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)  # what can only be replaced, never changed
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch", "pyro", "pyro_vae", "numpy"}
_MISSING = object()


class Watch:
    """What a run of a pair showed: the modules that ran, the parameters that Pyro found by their names in its store, and what
    functions outside of libraries may have read by name: their module's variables, and all the names that they mention."""

    def __init__(self) -> None:
        self.ran: dict[nn.Module, None] = {}
        self.params: dict[str, Tensor] = {}
        self.read: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.names: set[str] = set()
        self.reason: str | None = None  # why there can be no graph of it


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch what runs in the block."""
    seen = Watch()
    outside = sys._getframe(2)  # of the block

    def enter(frame: types.FrameType, event: str, _: Any) -> None:
        known = frame.f_globals
        if event == "call" and not _in_library(known.get("__name__", "")) and not _imported(frame, outside):
            seen.read.setdefault(id(known), (known, set()))[1].update(_globals_of(frame.f_code))
            seen.names.update(frame.f_code.co_names)

    free = sys.setprofile if sys.getprofile() is None else sys.settrace if sys.gettrace() is None else None
    if free is None:
        seen.reason = "a profiler and a debugger are at work, so that what it reads is not seen"
        yield seen
        return
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: seen.ran.update({module: None}))
    before = _other_noise()
    free(enter)
    try:
        with poutine.trace(param_only=True) as capture:
            yield seen
    finally:
        free(None)
        hook.remove()
    if _other_noise() != before:
        seen.reason = "the pair draws from Python's or numpy's generator, which is not in the graph"
    seen.params = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}


def _imported(frame: types.FrameType | None, outside: types.FrameType) -> bool:
    """Whether a function runs as part of an import, once for the process: libraries load others when they are first used."""
    while frame is not None and frame is not outside:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


@functools.cache
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """The names of a function that are variables of its module, not attributes."""
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _other_noise() -> tuple[Any, str]:
    return random.getstate(), str(np.random.get_state())  # noqa: NPY002


class Guards:
    """What Python could have read while a pair was traced: the parameters and buffers of every module that ran, its training
    flag, hooks and attributes; Pyro's param store; variables of the modules that functions are defined in; what functions
    close over, classes hold, and what hangs on that.

    :param seen: what a run of the pair showed.
    :raises CannotTrace: for parameters that are neither a module's nor the store's, and for hooks on gradients.
    """

    def __init__(self, seen: Watch, programs: tuple[Program, ...], params: list[Tensor]) -> None:
        self.whole: list[tuple[Any, Any]] = []  # dictionaries of objects, lists and sets, and what they held
        self.empty: list[Any] = []  # those that held nothing
        self.plain: list[tuple[Any, Any, Any]] = []  # where, key, value: numbers and words, compared by value
        self.bound: list[tuple[Any, Any, Any]] = []  # objects, compared by identity
        self.tensors: list[tuple[Any, Any, Tensor]] = []  # likewise
        self._seen: set[int] = set()
        self._names = frozenset(seen.names)
        for module in seen.ran:
            self._take(module, _DEPTH)
        for program in programs:
            self._take(program, _DEPTH)
        for known, names in seen.read.values():
            self._take_names(known, {name: known[name] for name in names if name in known}, _DEPTH)
        for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
            self._take_all(getattr(nn.modules.module, f"_global_{name}"), _DEPTH)
        in_store = pyro.get_param_store()._params.items()
        self.bound += [(_Store(), name, value) for name, value in in_store if any(value is p for p in params)]
        self.addresses = [(p, p.data_ptr(), p.device) for p in params]
        self.layouts = [(value, layout(value)) for value in self.buffers()]
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
        if id(value) in self._seen or depth <= 0:
            return
        self._seen.add(id(value))
        if isinstance(value, functools.partial):  # such as what one of Pyro's handlers wraps
            self._take_names(_Attributes(value), {"func": value.func, "args": value.args}, depth)
            self._take_all(value.keywords, depth)
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
        own = [kind for kind in type(value).__mro__ if not _in_library(kind.__module__)]
        slots = [name for kind in own for name in getattr(kind, "__slots__", ())]
        self._take_names(_Attributes(value), {name: getattr(value, name) for name in slots if hasattr(value, name)}, depth)
        if hasattr(value, "__dict__"):
            self._take_all(vars(value), depth)
            for kind in own:
                self._take(kind, depth)

    def _take_all(self, held: Any, depth: int) -> None:
        """All of a dictionary, such as the attributes of an object, a list or a set: what is added later would be seen too."""
        if held:
            self.whole.append((held, held.copy()))
        else:
            self.empty.append(held)
        where = held if isinstance(held, dict) else _Items(held)
        for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            self._follow(where, key, value, depth)

    def _take_names(self, where: Any, names: Mapping[Any, Any], depth: int) -> None:
        """Some names of what is read like a dictionary."""
        for key, value in names.items():
            if not isinstance(value, Tensor):
                (self.plain if isinstance(value, SIMPLE) else self.bound).append((where, key, value))
            self._follow(where, key, value, depth)

    def _follow(self, where: Any, key: Any, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            self.tensors.append((where, key, value))
        elif isinstance(value, np.ndarray) and value.nbytes <= 100_000:
            self.plain.append((_Content(value.tobytes), None, value.tobytes()))
        elif isinstance(value, dict | list | deque | set) and len(value) <= _SMALL:
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._take_all(value, depth - 1)
        elif isinstance(value, tuple) and len(value) <= _SMALL:
            for i, part in enumerate(value):
                self._follow(_Items(value), i, part, depth - 1)
        elif not isinstance(value, SIMPLE):
            self._take(value, depth - 1)

    def undo(self, read: Collection[int]) -> None:
        """Put back what runs of the pair have changed by themselves, and guard it no more.

        :param read: the ``id`` of tensors that a graph holds.
        :raises CannotTrace: for what a graph cannot follow: a number that changes, a tensor that is kept for the next run.
        """
        named = [entry for entry in (*self.plain, *self.bound, *self.tensors) if not _holds(*entry)]
        self.plain, self.bound, self.tensors = (
            [entry for entry in entries if _holds(*entry)] for entries in (self.plain, self.bound, self.tensors)
        )
        written = [(key, value) for _, key, value in named]
        for held, before in [*self.whole, *((held, type(held)()) for held in self.empty)]:
            if _equal(held, before):
                continue
            if isinstance(held, dict):
                changed = {key for key in (*held, *before) if not _same(held.get(key, _MISSING), before.get(key, _MISSING))}
                written += [(key, before[key]) for key in changed & before.keys()]
                rest = _Rest(held, changed)
                self.plain.append((rest, None, {key: value for key, value in before.items() if key not in changed}))
            held.clear()
            held.extend(before) if isinstance(held, list | deque) else held.update(before)
            self.whole = [entry for entry in self.whole if entry[0] is not held]
            self.empty = [other for other in self.empty if other is not held]
        for where, key, value in named:
            _put(where, key, value)
        for name, value in written:
            if isinstance(value, bool | int | float | complex | str) or id(value) in read:
                raise CannotTrace(f"{name!r} is another after each run: the pair writes what it may read at the next")

    def buffers(self) -> Iterator[Tensor]:
        """Tensors that are no parameters, where they still are."""
        for where, key, value in self.tensors:
            if not isinstance(value, nn.Parameter) and where.get(key) is value:
                yield value

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return (
            not any(self.empty)
            and all(where.get(key) is value for where, key, value in self.tensors)
            and all(where.get(key) is value for where, key, value in self.bound)
            and all(_equal(held, before) for held, before in self.whole)
            and all(_holds(*entry) for entry in self.plain)
            and all(p.data_ptr() == address and p.device == device for p, address, device in self.addresses)
            and all(layout(value) == before for value, before in self.layouts)
            and all(p.requires_grad is trained and not p._backward_hooks for p, trained in self.trained.items())
        )


def layout(value: Tensor) -> tuple:
    """What a graph is made for, of a tensor that it reads."""
    return value.shape, value.stride() if value.layout is torch.strided else value.layout, value.dtype, value.device


def _equal(held: Any, before: Any) -> bool:
    try:
        return held == before
    except (RuntimeError, ValueError):  # another tensor or array in the place of one
        return False


def _same(now: Any, value: Any) -> bool:
    return now is value or (type(now) is type(value) and isinstance(value, (*SIMPLE, dict, bytes)) and _equal(now, value))


def _holds(where: Any, key: Any, value: Any) -> bool:
    return _same(where.get(key, _MISSING), value)


def _put(where: Any, key: Any, value: Any) -> None:
    """Write back what a name was."""
    if isinstance(where, dict):
        where[key] = value
    elif isinstance(where, _Cell):
        where.cell.cell_contents = value
    elif isinstance(where, _Attributes):
        with suppress(AttributeError):  # what a property computes is not written
            setattr(where.value, key, value)


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


class _Rest:
    """A dictionary without some of its keys, read like the one value of another."""

    def __init__(self, held: dict, without: set) -> None:
        self.held, self.without = held, without

    def get(self, *_: Any) -> dict:
        return {key: value for key, value in self.held.items() if key not in self.without}


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
