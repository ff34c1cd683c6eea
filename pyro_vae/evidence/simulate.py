"""Simulate data from a model, together with their latents. Upper bounds of the evidence require such data."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data.batches import Batch, as_batch
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.enumeration import Held
from pyro_vae.pairs.latents import Latents
from pyro_vae.pairs.preserve import read_whole, stream_seed, untouched
from pyro_vae.pairs.traces import Program, prior_of, sampled


@dataclass(frozen=True)
class Simulated:
    """Pairs (x, z*) ~ p(x, z), so z* is an exact draw from the posterior p(z|x).

    The result of :func:`simulate`; or construct it from given pairs: ``Simulated(x, {"z": z})``.

    :param data: the arguments of model and guide, with simulated observations: a tensor, a tuple for
        positional arguments, or a dict for keyword arguments.
    :param latents: z* by site name, in the shapes of the sites, ``(batch, *event)``.
    """

    data: Any
    latents: dict[str, Tensor]

    @property
    def batch(self) -> Batch:
        """The data as arguments of the model."""
        return as_batch(self.data)

    def flat(self, latents: Latents, num_rows: int) -> Tensor:
        """Concatenate z* to one vector per datum, ``(batch, dim)``.

        :raises ValueError: for a latent that is missing or whose shape differs from the shape of its site.
        """
        for name, site in latents.sites.items():
            if name not in self.latents:
                raise ValueError(
                    f"simulated: it has no latent {name!r}, which the model samples; got "
                    f"{sorted(self.latents)}"
                )
            plates = list(site.plates)
            plates[len(plates) + site.rows] = num_rows
            expected, got = (*plates, *site.event), tuple(self.latents[name].shape)
            if (1,) * (len(expected) - len(got)) + got != expected:
                raise ValueError(f"simulated: expected the latent {name!r} of shape {expected} but got {got}")
        return latents.flat(self.latents, 1, num_rows)[0]


def simulate(model: Program, data: Any, *, seed: int = 0, check: bool = True) -> Simulated:
    """Simulate (x, z*) ~ p(x, z) from the model, with the shape and the number of rows of ``data``.

    :param data: the arguments of the model, in any form that :func:`~pyro_vae.log_weights` accepts. In the
        result, arguments that the model observes have simulated values; conditions and masks are unchanged.
    :raises ValueError: if an observed value is not an argument of the model, or if the distribution of a
        simulated site depends on another observed argument.
    """
    batch = read_whole(data, seed=seed)
    with untouched(training=False, seed=seed), torch.no_grad():
        batch = inspect_checked(model, prior_of(model), batch, verb="simulate", check=check).batch
    # a random stream of its own, since the draws of the estimators must be independent of z*
    with untouched(training=False, seed=stream_seed(seed, 1)), torch.no_grad():
        observed = {
            name: site["value"]
            for name, site in sampled(poutine.trace(model).get_trace(*batch.args, **batch.kwargs))
            if site["is_observed"] and site["fn"].event_dim + len(site["fn"].batch_shape)
        }
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*batch.args, **batch.kwargs)
    drawn = {name: site["value"] for name, site in sampled(trace)}
    given: dict[Any, Any] = dict(enumerate(batch.args)) | batch.kwargs
    arguments = dict(given)
    for name, value in observed.items():
        key = _observed_argument(name, value, given)
        arguments[key] = drawn[name].reshape(given[key].shape).to(given[key].dtype)
    latents = {name: value for name, value in drawn.items() if name not in observed}
    simulated = Simulated(arguments if batch.kwargs else tuple(arguments.values()), latents)
    _check_observed(model, simulated, trace, set(observed))
    return simulated


def check_simulated(verb: str, simulated: Any) -> None:
    """Raise ``ValueError`` if ``simulated`` is not a :class:`Simulated`. ``verb`` is the name of the
    caller."""
    if not isinstance(simulated, Simulated):
        raise ValueError(
            f"{verb}: expected simulated data with their latents, evidence.simulate(model, data), but got "
            f"{type(simulated).__name__}"
        )


def _observed_argument(name: str, value: Tensor, given: dict[Any, Any]) -> Any:
    """The key of the argument that a site observes: the argument shares memory with the observed ``value``.
    If there is no such argument, it is the one whose entries equal ``value``."""
    candidates = {
        key: part for key, part in given.items() if isinstance(part, Tensor) and part.numel() == value.numel()
    }
    keys = [key for key, part in candidates.items() if part.data_ptr() == value.data_ptr()]
    if not keys:
        keys = [key for key, part in candidates.items() if bool((part.reshape(value.shape) == value).all())]
    if len(keys) != 1:
        problem = f"equals several of its arguments, {keys}" if keys else "is not one of its arguments"
        raise ValueError(
            f"simulate: the value that the model observes at {name!r}, of shape {tuple(value.shape)}, "
            f"{problem}; expected an argument, obs=x, unchanged or reshaped"
        )
    return keys[0]


def _check_observed(model: Program, simulated: Simulated, drawn: Trace, observed: set[str]) -> None:
    """Raise ``ValueError`` if the log-probability of a simulated value changes when the model runs on
    the simulated data.

    The distribution of that site then depends on an observed argument. When the trace ``drawn`` was made,
    that argument still had its value from before the simulation.
    """
    batch = simulated.batch
    with untouched(training=False, seed=0), torch.no_grad():
        rerun = poutine.trace(Held(simulated.latents)(model)).get_trace(*batch.args, **batch.kwargs)
    for trace in (drawn, rerun):
        trace.compute_log_prob()
    for name in observed:
        before, after = (trace.nodes[name]["unscaled_log_prob"] for trace in (drawn, rerun))
        if before.shape != after.shape or not torch.allclose(
            before, after, rtol=1e-4, atol=1e-4, equal_nan=True
        ):
            raise ValueError(
                f"simulate: the distribution of {name!r} depends on an observed argument, so {name!r} was "
                "drawn given the original data; expected p(x|z) to depend only on latents and conditions"
            )
