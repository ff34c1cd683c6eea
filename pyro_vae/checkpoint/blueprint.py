"""Serialize the constructor calls of a module, so that the module can be rebuilt without pickle.

A *plan* is a list of entries ``[class name, args, kwargs]``. The last entry describes the module itself. The
earlier entries describe the modules among the arguments of its constructor, and those among the arguments of
these modules. In ``args`` and ``kwargs``, ``{"part": index}`` stands for the module of the entry ``index``.
"""

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

# a plan may name only classes of modules that start with these prefixes
_ALLOWED_MODULES = (
    "pyro_vae.conditionals.", "pyro_vae.flows.", "pyro_vae.nets.", "pyro_vae.priors.", "pyro_vae.vae.",
    "torch.nn.modules.",
)  # fmt: skip
_FUNCTIONS = {
    f"torch.{name}": value
    for name, value in vars(torch).items()
    if isinstance(value, types.BuiltinFunctionType)
}
_FUNCTIONS |= {
    f"torch.nn.functional.{name}": value for name, value in vars(functional).items() if callable(value)
}
_CONSTRAINTS = {
    name: value for name, value in vars(constraints).items() if isinstance(value, constraints.Constraint)
}


def describe(pair: Any) -> list[Any] | None:
    """The plan of a module. ``None`` if the module contains modules of other packages than pyro_vae and
    torch, or was changed after its construction."""
    plan: list[Any] = []
    try:
        _append(pair, plan, {})
        if not _is_equivalent(build(plan), pair):
            return None
    except (_NotSerializable, TypeError, ValueError):
        return None
    return plan


def build(plan: list[Any]) -> nn.Module:
    """Build the module of a plan, with newly initialized parameters. The global random state is unchanged.

    :raises ValueError: if the plan names a class that is not a module of pyro_vae or torch.
    """
    built: list[Any] = []
    state = torch.get_rng_state()
    try:
        for name, args, kwargs in plan:
            module, _, class_name = str(name).rpartition(".")
            try:
                cls = (
                    getattr(importlib.import_module(module), class_name, None)
                    if _is_allowed(module)
                    else None
                )
            except ImportError:
                cls = None
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise ValueError(
                    f"{name} is not a module of pyro_vae or torch, so it is not built; pass a factory that "
                    "builds the pair"
                )
            built.append(cls(*_decode(args, built), **_decode(kwargs, built)))
    finally:
        torch.set_rng_state(state)
    return built[-1]


def _is_allowed(module: str) -> bool:
    """Whether a plan may name classes of ``module``. Torch's transformers are excluded: their constructor
    arguments cannot be read from attributes, and one argument makes them copy a layer any number of times."""
    return f"{module}.".startswith(_ALLOWED_MODULES) and module != "torch.nn.modules.transformer"


class _NotSerializable(Exception):
    """A value that has no representation in a plan."""


def _append(module: Any, plan: list[Any], indices: dict[int, int]) -> int:
    """Append a module, after the modules in its arguments, to the plan. Return the index of its entry.

    :param indices: maps the ``id`` of each appended module to the index of its entry. It is updated in place.
    """
    if id(module) not in indices:
        cls = type(module)
        name = f"{cls.__module__}.{cls.__qualname__}"
        if not isinstance(module, nn.Module) or not name.startswith(_ALLOWED_MODULES):
            raise _NotSerializable
        args, kwargs = module.given if isinstance(module, Part) else _torch_arguments(module)
        entry = [name, _encode(tuple(args), plan, indices), _encode(dict(kwargs), plan, indices)]
        plan.append(entry)
        indices[id(module)] = len(plan) - 1
    return indices[id(module)]


def _torch_arguments(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The constructor arguments of a torch module, read from its attributes of the same names."""
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


def _encode(value: Any, plan: list[Any], indices: dict[int, int]) -> Any:
    if isinstance(value, nn.Module):
        return {"part": _append(value, plan, indices)}
    if isinstance(value, tuple | list):
        items = [_encode(item, plan, indices) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        return {"dict": {key: _encode(item, plan, indices) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    for kind, table in (("function", _FUNCTIONS), ("constraint", _CONSTRAINTS)):
        for name, candidate in table.items():
            if candidate is value:
                return {kind: name}
    raise _NotSerializable


def _decode(value: Any, built: list[Any]) -> Any:
    if isinstance(value, tuple | list):
        items = [_decode(item, built) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode(item, built) for key, item in content.items()}
    tables: dict[str, Any] = {"part": built, "function": _FUNCTIONS, "constraint": _CONSTRAINTS}
    return tables[kind][content]


def _is_equivalent(rebuilt: nn.Module, original: nn.Module) -> bool:
    """Whether two modules differ only in the values of their parameters and buffers.

    They differ in more if, after its construction, attributes of the original were changed, parameters frozen
    or hooks added: a plan does not record such changes.
    """
    modules, expected_modules = dict(rebuilt.named_modules()), dict(original.named_modules())
    if {name: type(m) for name, m in modules.items()} != {
        name: type(m) for name, m in expected_modules.items()
    }:
        return False
    shapes, expected_shapes = (
        {name: tensor.shape for name, tensor in module.state_dict().items()} for module in (rebuilt, original)
    )
    if shapes != expected_shapes:
        return False
    trainable, expected_trainable = (
        {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for module in (rebuilt, original)
    )
    has_hooks = any(m._forward_hooks or m._forward_pre_hooks for m in expected_modules.values())
    same = all(_settings(module) == _settings(expected_modules[name]) for name, module in modules.items())
    return same and not has_hooks and trainable == expected_trainable


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, strings, tuples or functions."""
    kinds = (bool, int, float, str, tuple, types.FunctionType, types.BuiltinFunctionType)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("given", "training") and isinstance(value, kinds)
    }
