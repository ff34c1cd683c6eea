"""What a module was built from, as numbers and words, so that it can be built again without pickle."""

import importlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from pyro_vae.nets import Part

# whose classes are built again; a file names no others
_PLACES = (
    "pyro_vae.conditionals.", "pyro_vae.flows.", "pyro_vae.nets.", "pyro_vae.priors.", "pyro_vae.vae.", "torch.nn.modules.",
)  # fmt: skip
_FUNCTIONS = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, types.BuiltinFunctionType)}
_FUNCTIONS |= {f"torch.nn.functional.{name}": value for name, value in vars(functional).items() if callable(value)}
_CONSTRAINTS = {name: value for name, value in vars(constraints).items() if isinstance(value, constraints.Constraint)}


def describe(pair: Any) -> list[Any] | None:
    """The plan of a module: each module in it by class and arguments, parts before wholes. ``None`` for what is not made of
    pyro_vae's and torch's modules alone."""
    parts: list[Any] = []
    try:
        _describe(pair, parts, {})
        if not _is_alike(build(parts), pair):
            return None
    except (_Foreign, TypeError, ValueError):
        return None
    return parts


def build(plan: list[Any]) -> nn.Module:
    """The module of a plan, its weights not yet those that were trained. Raises ``ValueError`` for a plan that is none."""
    made: list[Any] = []
    state = torch.get_rng_state()  # the weights are about to be replaced: no noise is spent on them
    try:
        for name, args, kwargs in plan:
            module, _, kind = str(name).rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), kind, None) if _is_place(module) else None
            except ImportError:
                cls = None
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise ValueError(f"{name} is no module of pyro_vae or torch, so it is not built; pass the pair's factory")
            made.append(cls(*_read(args, made), **_read(kwargs, made)))
    finally:
        torch.set_rng_state(state)
    return made[-1]


def _is_place(module: str) -> bool:
    """Whether a plan may name classes of it. Torch's transformers cannot be described, and copy a layer any number of times."""
    return f"{module}.".startswith(_PLACES) and module != "torch.nn.modules.transformer"


class _Foreign(Exception):
    """Something that a plan cannot name."""


def _describe(module: Any, parts: list[Any], known: dict[int, int]) -> int:
    if id(module) not in known:
        cls = type(module)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if not isinstance(module, nn.Module) or not name.startswith(_PLACES):
            raise _Foreign
        args, kwargs = module.given if isinstance(module, Part) else _of_torch(module)
        part = [name, _write(tuple(args), parts, known), _write(dict(kwargs), parts, known)]
        parts.append(part)
        known[id(module)] = len(parts) - 1
    return known[id(module)]


def _of_torch(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one of torch's modules, which keep them as attributes of the same names."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return (tuple(module) if isinstance(module, nn.Sequential) else (list(module),)), {}
    kwargs = {}
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        if parameter.name in ("self", "device", "dtype") or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        value = getattr(module, parameter.name, parameter.default)
        if parameter.name == "bias":
            value = value is not None and value is not False
        kwargs[parameter.name] = value
    return (), kwargs


def _write(value: Any, parts: list[Any], known: dict[int, int]) -> Any:
    if isinstance(value, nn.Module):
        return {"part": _describe(value, parts, known)}
    if isinstance(value, tuple | list):
        items = [_write(item, parts, known) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {"dict": {key: _write(item, parts, known) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    for kind, table in (("function", _FUNCTIONS), ("constraint", _CONSTRAINTS)):
        for name, known_value in table.items():
            if known_value is value:
                return {kind: name}
    raise _Foreign


def _read(value: Any, made: list[Any]) -> Any:
    if isinstance(value, tuple | list):
        items = [_read(item, made) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _read(item, made) for key, item in content.items()}
    tables: dict[str, Any] = {"part": made, "function": _FUNCTIONS, "constraint": _CONSTRAINTS}
    return tables[kind][content]


def _is_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether they are the same but for their weights: what was changed after it was built is in no plan."""
    ours, theirs = dict(a.named_modules()), dict(b.named_modules())
    if {name: type(part) for name, part in ours.items()} != {name: type(part) for name, part in theirs.items()}:
        return False
    if {name: t.shape for name, t in a.state_dict().items()} != {name: t.shape for name, t in b.state_dict().items()}:
        return False
    trained = [{name: p.requires_grad for name, p in one.named_parameters()} for one in (a, b)]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in theirs.values())
    same = all(_settings(part) == _settings(theirs[name]) for name, part in ours.items())
    return same and not hooked and trained[0] == trained[1]


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and functions of a module."""
    kinds = (bool, int, float, str, tuple, types.FunctionType, types.BuiltinFunctionType)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("given", "training") and isinstance(value, kinds)
    }
