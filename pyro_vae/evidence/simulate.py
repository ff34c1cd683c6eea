"""Data simulated from a model, with the latents that made them: what an upper bound of the evidence stands on."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.batches import Batch, as_arguments
from pyro_vae.pair import Program, sampled, untouched


@dataclass(frozen=True)
class Simulated:
    """(x, z*) ~ p(x, z): z* is an exact draw of the posterior p(z|x).

    args, kwargs: what model and guide are called with, the observed parts replaced by simulated ones. latents: z* by name, as
    the sites take them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    latents: dict[str, Tensor]

    @property
    def batch(self) -> Batch:
        return Batch(self.args, self.kwargs)


def simulate(model: Program, *args: Any, seed: int = 0, **kwargs: Any) -> Simulated:
    """Draw data like these from the model.

    :param args: data of the shape and number to draw. What the model observes is replaced; conditions and masks are kept.
    :raises ValueError: where what the model observes is none of its arguments.
    """
    batch = as_arguments(args, kwargs)
    with untouched(training=False, seed=seed), torch.no_grad():
        observed = {
            name: site["value"]
            for name, site in sampled(poutine.trace(model).get_trace(*batch.args, **batch.kwargs))
            if site["is_observed"] and site["fn"].event_dim + len(site["fn"].batch_shape)
        }
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*batch.args, **batch.kwargs)
    drawn = {name: site["value"] for name, site in sampled(trace)}
    arguments: dict[Any, Any] = dict(enumerate(batch.args)) | batch.kwargs
    for name, value in observed.items():
        places = [key for key, part in arguments.items() if _is_same(part, value)]
        if not places:
            raise ValueError(
                f"simulate: what the model observes at {name!r}, of shape {tuple(value.shape)}, is none of its arguments; "
                "expected one of them as it is, obs=x, or reshaped"
            )
        for key in places:
            arguments[key] = drawn[name].reshape(arguments[key].shape).to(arguments[key].dtype)
    new = tuple(arguments[i] for i in range(len(batch.args)))
    latents = {name: value for name, value in drawn.items() if name not in observed}
    return Simulated(new, {key: arguments[key] for key in batch.kwargs}, latents)


def _is_same(part: Any, value: Tensor) -> bool:
    if not isinstance(part, Tensor) or part.numel() != value.numel():
        return False
    return part.data_ptr() == value.data_ptr() or bool((part.reshape(value.shape) == value).all())
