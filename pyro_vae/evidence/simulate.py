"""Data simulated from a model, with the latents that made them: what an upper bound of the evidence stands
on."""

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
    """(x, z*) ~ p(x, z): z* is an exact draw of the posterior p(z|x). From :func:`simulate`, or pairs that
    are there: ``Simulated(x, {"z": z})``.

    data: the arguments of model and guide, the observed ones simulated, as every verb takes them: a tensor, a
    tuple for positional arguments, a dict for keyword arguments. latents: z* by name, as the sites take them,
    ``(batch, *event)``.
    """

    data: Any
    latents: dict[str, Tensor]

    @property
    def batch(self) -> Batch:
        return as_batch(self.data)

    def flat(self, latents: Latents, num_rows: int) -> Tensor:
        """z* end to end in one vector for each datum: ``(batch, dim)``.

        :raises ValueError: for a latent that is missing or has another shape than its site.
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
    """Draw data like these from the model: (x, z*) ~ p(x, z).

    :param data: of the shape and number to draw, as :func:`~pyro_vae.log_weights` takes them. What the model
        observes is replaced; conditions and masks are kept.
    :raises ValueError: where what the model observes is none of its arguments.
    """
    batch = read_whole(data, seed=seed)
    with untouched(training=False, seed=seed), torch.no_grad():
        batch = inspect_checked(model, prior_of(model), batch, verb="simulate", check=check).batch
    # another stream than that of the estimators, whose draws must be fresh
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
        key = _place(name, value, given)
        arguments[key] = drawn[name].reshape(given[key].shape).to(given[key].dtype)
    latents = {name: value for name, value in drawn.items() if name not in observed}
    simulated = Simulated(arguments if batch.kwargs else tuple(arguments.values()), latents)
    _check(model, simulated, trace, set(observed))
    return simulated


def check_simulated(verb: str, simulated: Any) -> None:
    if not isinstance(simulated, Simulated):
        raise ValueError(
            f"{verb}: expected data with the latents that made them, evidence.simulate(model, data), but got "
            f"{type(simulated).__name__}"
        )


def _place(name: str, value: Tensor, given: dict[Any, Any]) -> Any:
    """The argument that is observed at a site: the same memory, else the same numbers."""
    parts = {
        key: part for key, part in given.items() if isinstance(part, Tensor) and part.numel() == value.numel()
    }
    same = [key for key, part in parts.items() if part.data_ptr() == value.data_ptr()]
    same = same or [key for key, part in parts.items() if bool((part.reshape(value.shape) == value).all())]
    if len(same) != 1:
        found = "is none of its arguments" if not same else f"may be any of its arguments {same}"
        raise ValueError(
            f"simulate: what the model observes at {name!r}, of shape {tuple(value.shape)}, {found}; "
            "expected one of them as it is, obs=x, or reshaped"
        )
    return same[0]


def _check(model: Program, simulated: Simulated, drawn: Trace, observed: set[str]) -> None:
    """Raise ``ValueError`` where the model, given what was simulated, says something else of it: where it was
    drawn given the data that it replaces."""
    batch = simulated.batch
    with untouched(training=False, seed=0), torch.no_grad():
        again = poutine.trace(Held(simulated.latents)(model)).get_trace(*batch.args, **batch.kwargs)
    for trace in (drawn, again):
        trace.compute_log_prob()
    for name in observed:
        before, after = (trace.nodes[name]["unscaled_log_prob"] for trace in (drawn, again))
        if before.shape != after.shape or not torch.allclose(
            before, after, rtol=1e-4, atol=1e-4, equal_nan=True
        ):
            raise ValueError(
                f"simulate: the distribution of {name!r} depends on data that were simulated too, so it was "
                "drawn given the old ones; expected p(x|z) to depend on latents and conditions alone"
            )
