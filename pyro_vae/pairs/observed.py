"""Which arguments of a model are its observations, and how to replace them by simulated values."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.data.batches import Batch
from pyro_vae.pairs.enumeration import Held
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program, masks_of, sampled


def observed_arguments(model: Program, batch: Batch) -> dict[str, Any]:
    """The argument that each observed site of the model observes, as the position or name of the argument.

    The model runs once.

    :raises ValueError: if an observed value is not an argument of the model, or equals several of them.
    """
    observed = {
        name: site
        for name, site in sampled(poutine.trace(model).get_trace(*batch.args, **batch.kwargs))
        if site["is_observed"] and site["fn"].event_dim + len(site["fn"].batch_shape)
    }
    given = _arguments(batch)
    return {name: _observed_argument(name, site, given) for name, site in observed.items()}


def with_observations(batch: Batch, keys: Mapping[str, Any], values: Mapping[str, Tensor]) -> Batch:
    """The batch with simulated observations.

    :param keys: the result of :func:`observed_arguments`.
    :param values: simulated values by site.
    """
    arguments = _arguments(batch)
    for name, key in keys.items():
        arguments[key] = values[name].reshape(arguments[key].shape).to(arguments[key].dtype)
    args = tuple(arguments[i] for i in range(len(batch.args)))
    return Batch(args, {name: arguments[name] for name in batch.kwargs})


def simulate_once(model: Program, batch: Batch, keys: Mapping[str, Any]) -> tuple[Batch, dict[str, Tensor]]:
    """Draw (x, z) ~ p(x, z): the batch with simulated observations, and the latents by site."""
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*batch.args, **batch.kwargs)
    drawn = {name: site["value"] for name, site in sampled(trace)}
    latents = {name: value for name, value in drawn.items() if name not in keys}
    return with_observations(batch, keys, drawn), latents


def check_generative(model: Program, batch: Batch, keys: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the log-probability of a simulated value changes when the model runs on the
    simulated data.

    The distribution of that site then depends on an observed argument. When the value was drawn, the argument
    still had its value from before the simulation.
    """
    with untouched(training=False, seed=0), torch.no_grad():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*batch.args, **batch.kwargs)
        drawn = {name: site["value"] for name, site in sampled(trace)}
        latents = {name: value for name, value in drawn.items() if name not in keys}
        simulated = with_observations(batch, keys, drawn)
        rerun = poutine.trace(Held(latents)(model)).get_trace(*simulated.args, **simulated.kwargs)
    for each in (trace, rerun):
        each.compute_log_prob()
    for name in keys:
        before, after = (each.nodes[name]["unscaled_log_prob"] for each in (trace, rerun))
        if before.shape != after.shape or not torch.allclose(
            before, after, rtol=1e-4, atol=1e-4, equal_nan=True
        ):
            raise ValueError(
                f"simulate: the distribution of {name!r} depends on an observed argument, so {name!r} was "
                "drawn given the original data; expected p(x|z) to depend only on latents and conditions"
            )


def _arguments(batch: Batch) -> dict[Any, Any]:
    return dict(enumerate(batch.args)) | batch.kwargs


def _is_equal(a: Tensor, b: Tensor, site: dict) -> bool:
    """Whether two values of a site are equal where it is not masked."""
    equal = (a == b) | (a.isnan() & b.isnan())
    for mask in masks_of(site):
        equal = equal | ~mask
    return bool(equal.all())


def _observed_argument(name: str, site: dict, given: dict[Any, Any]) -> Any:
    """The key of the argument that a site observes: the argument shares memory with the observed value. If
    there is no such argument, it is the one whose entries equal that value."""
    value = site["value"]
    candidates = {
        key: part
        for key, part in given.items()
        if isinstance(part, Tensor) and part.numel() == value.numel() and key != "mask"
    }
    # not a transposed argument, whose memory is the same
    candidates = {
        key: part for key, part in candidates.items() if _is_equal(part.reshape(value.shape), value, site)
    }
    keys = [key for key, part in candidates.items() if part.data_ptr() == value.data_ptr()] or list(
        candidates
    )
    if len(keys) != 1:
        problem = f"equals several of its arguments, {keys}" if keys else "is not one of its arguments"
        raise ValueError(
            f"simulate: the value that the model observes at {name!r}, of shape {tuple(value.shape)}, "
            f"{problem}; expected an argument, obs=x, unchanged or reshaped"
        )
    return keys[0]
