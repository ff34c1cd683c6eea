"""What Pyro's validation would ask of a run, as tensors of a graph."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints


def conditions(traces: Sequence[tuple[Trace, Trace]], *, default: bool) -> Iterator[Tensor]:
    """Whether parameters and values of a run are where they may be, but for what makes the loss NaN anyhow.

    :param default: whether torch validates distributions that were not told to, see ``set_default_validate_args``.
    """
    for model_trace, guide_trace in traces:
        for trace in (model_trace, guide_trace):
            for site in trace.nodes.values():
                if site["type"] != "sample" or not _is_validated(site["fn"], default):
                    continue
                yield from _of_parameters(site["fn"])
                if trace is model_trace:  # a guide draws from its own support
                    try:
                        support = _of_each(site["fn"].support)
                    except (NotImplementedError, AttributeError):
                        continue
                    if not _is_real(support):
                        yield _satisfied(support, site["value"])


def _is_validated(fn: Any, default: bool) -> bool:
    """Whether torch validates what a distribution is given; what is only reshaped or masked is validated by its base."""
    while "base_dist" in vars(fn) and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    told = vars(fn).get("_validate_args")
    return default if told is None else told


def _of_parameters(fn: Any) -> Iterator[Tensor]:
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        value, each = vars(fn).get(name), _of_each(constraint)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint) and not _is_real(each):
            yield _satisfied(each, value)
    if "base_dist" in vars(fn):
        yield from _of_parameters(fn.base_dist)


def _of_each(constraint: Any) -> Any:
    """That of a single number, vector or matrix: all of them are to satisfy it."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _is_real(constraint: Any) -> bool:
    return isinstance(constraint, type(constraints.real))


def _satisfied(constraint: Any, value: Tensor) -> Tensor:
    """Whether all values satisfy it; of matrices, without Python's asking first whether they are symmetric."""
    if not isinstance(constraint, type(constraints.symmetric)):
        return constraint.check(value).all()
    satisfied = torch.isclose(value, value.mT, atol=1e-6).all()
    if isinstance(constraint, type(constraints.positive_definite)):
        satisfied = satisfied & (torch.linalg.cholesky_ex(value).info == 0).all()
    elif isinstance(constraint, type(constraints.positive_semidefinite)):
        satisfied = satisfied & (torch.linalg.eigvalsh(value) >= 0).all()
    return satisfied
