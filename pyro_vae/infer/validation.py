"""The checks of parameters and values of distributions that Pyro makes if validation is enabled. They are
written as tensor operations, so that a compiled graph can contain them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints


def validity(traces: Sequence[tuple[Trace, Trace]], *, default: bool) -> Iterator[Tensor]:
    """For each constraint in the traces of a run, yield a scalar tensor: whether the constraint is satisfied.
    Constraints to real numbers are omitted: only NaN violates them, and NaN makes the loss NaN.

    :param default: whether to validate distributions that were constructed without ``validate_args``, see
        ``Distribution.set_default_validate_args``.
    """
    for model_trace, guide_trace in traces:
        for trace in (model_trace, guide_trace):
            for site in trace.nodes.values():
                if site["type"] != "sample" or not _is_validated(site["fn"], default):
                    continue
                yield from _parameter_validity(site["fn"])
                # values of the guide's sites are draws from the site's distribution, so they are in its
                # support
                if trace is model_trace:
                    try:
                        support = _base_constraint(site["fn"].support)
                    except (NotImplementedError, AttributeError):
                        continue
                    if not _is_real(support):
                        yield _all_satisfy(support, site["value"])


def _is_validated(fn: Any, default: bool) -> bool:
    """Whether torch validates a distribution. A reshaped, expanded or masked distribution is validated if its
    base distribution is."""
    while "base_dist" in vars(fn) and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    validate_args = vars(fn).get("_validate_args")
    return default if validate_args is None else validate_args


def _parameter_validity(fn: Any) -> Iterator[Tensor]:
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        value, base = vars(fn).get(name), _base_constraint(constraint)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint) and not _is_real(base):
            yield _all_satisfy(base, value)
    if "base_dist" in vars(fn):
        yield from _parameter_validity(fn.base_dist)


def _base_constraint(constraint: Any) -> Any:
    """The constraint that ``constraints.independent`` wraps, or the constraint itself."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _is_real(constraint: Any) -> bool:
    return isinstance(constraint, type(constraints.real))


def _all_satisfy(constraint: Any, value: Tensor) -> Tensor:
    """Whether all values satisfy a constraint, as a scalar tensor. Symmetric and positive definite matrices
    are not checked by torch's ``check``, since it branches in Python on the value of a tensor."""
    if not isinstance(constraint, type(constraints.symmetric)):
        return constraint.check(value).all()
    satisfied = torch.isclose(value, value.mT, atol=1e-6).all()
    if isinstance(constraint, type(constraints.positive_definite)):
        satisfied = satisfied & (torch.linalg.cholesky_ex(value).info == 0).all()
    elif isinstance(constraint, type(constraints.positive_semidefinite)):
        satisfied = satisfied & (torch.linalg.eigvalsh(value) >= 0).all()
    return satisfied
