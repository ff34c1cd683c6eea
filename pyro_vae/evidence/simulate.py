"""Simulate data from a model, together with their latents. Upper bounds of the evidence require such data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.batches import Batch, as_batch
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.latents import Latents
from pyro_vae.pairs.observed import check_generative, observed_arguments, simulate_once
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program, prior_of
from pyro_vae.random_states import stream_seed


@dataclass(frozen=True)
class Simulated:
    """Pairs (x, z*) ~ p(x, z), so z* is an exact draw from the posterior p(z|x).

    The result of :func:`simulate`; or construct it from given pairs: ``Simulated(x, {"z": z})``.

    :param data: the arguments of model and guide, with simulated observations: a tensor, a tuple for
        positional arguments, or a dict for keyword arguments. After :func:`simulate` it is a tuple or a
        dict: for ``model(x)``, ``(x,) = simulated.data``.
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
    # another random stream than that of the estimators, whose draws must be independent of z*
    with untouched(training=False, seed=stream_seed(seed, 1)), torch.no_grad():
        keys = observed_arguments(model, batch)
        simulated, latents = simulate_once(model, batch, keys)
    check_generative(model, batch, keys)
    return Simulated(simulated.kwargs or simulated.args, latents)


def check_simulated(verb: str, simulated: Any) -> None:
    """Raise ``ValueError`` if ``simulated`` is not a :class:`Simulated`. ``verb`` is the name of the
    caller."""
    if not isinstance(simulated, Simulated):
        raise ValueError(
            f"{verb}: expected simulated data with their latents, evidence.simulate(model, data), but got "
            f"{type(simulated).__name__}"
        )
