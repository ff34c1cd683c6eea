"""The variational free energy in its parts, and the identity behind it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.data.batches import as_arguments
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import Program


class FreeEnergy(NamedTuple):
    """F = E_q[−log p(x, z)] − H(q) = −log p(x) + KL(q‖p(z|x)), in nats, each ``(batch,)``: the negative ELBO.

    expected_energy: E_q[−log p(x, z)], with its standard error; entropy: H(q), analytic where the guide's distribution has
    one, else estimated on the same draws; bits_per_dimension: F / (D ln 2), a code length for discrete x of D dimensions, by
    bits back (Hinton & van Camp 1993).
    """

    expected_energy: Tensor
    entropy: Tensor
    free_energy: Tensor
    error: Tensor
    bits_per_dimension: Tensor


def free_energy(
    model: Program, guide: Program, *args: Any, num_particles: int = 1000, seed: int = 0, check: bool = True, **kwargs: Any
) -> FreeEnergy:
    """The free energy of a pair per datum. args: those of model and guide, ``(batch, *event)``."""
    batch = as_arguments(args, kwargs)
    with untouched(training=False, seed=seed), torch.no_grad():
        latents, batch = inspect_latents(model, guide, batch, verb="free_energy", check=check)
        z, log_q = latents.draw(guide, batch, num_particles)
        energies = -latents.log_joint(model, batch, z)
        entropy = _entropy(latents.distribution(guide, batch), batch.num_rows)
    if entropy is None:
        entropy, terms = -log_q.mean(0), energies + log_q
    else:
        terms = energies
    energy = energies.mean(0)
    dimensions = next(iter(batch.tensors.values()))[0].numel()
    return FreeEnergy(
        expected_energy=energy,
        entropy=entropy,
        free_energy=energy - entropy,
        error=terms.std(0) / math.sqrt(num_particles),
        bits_per_dimension=(energy - entropy) / (dimensions * math.log(2)),
    )


def _entropy(distribution: Any, num_rows: int) -> Tensor | None:
    """The entropy of the guide's one distribution, if it has one in closed form: ``(batch,)``."""
    try:
        return None if distribution is None else distribution.entropy().reshape(-1).expand(num_rows)
    except NotImplementedError:
        return None


class PointwiseIdentity(NamedTuple):
    """log p(x) = log p(x, z) − log p(z|x) for every z, in nats, each ``(particles, batch)``.

    ``log_weight`` is log p(x, z) − log q(z|x), what a guide puts in the posterior's place, and ``correction`` is
    log q(z|x) − log p(z|x), which it leaves out: log p(x) = log_weight + correction. Its sign varies with z; its mean under q
    is KL(q‖p) ≥ 0.
    """

    log_evidence: Tensor
    log_weight: Tensor
    correction: Tensor


def pointwise_identity(exact_model: Any, guide: Program, x: Tensor, z: Tensor) -> PointwiseIdentity:
    """The identity at any z: ``(particles, batch, *latent)``. ``log_evidence`` is the same number in every row."""
    batch = as_arguments((x,), {})
    with untouched(training=False), torch.no_grad():
        latents, batch = inspect_latents(exact_model, guide, batch, verb="pointwise_identity")
        (x,) = batch.args
        flat = z.reshape(*z.shape[:2], -1)
        log_joint = latents.log_joint(exact_model, batch, flat)
        log_q = latents.log_q(guide, batch, flat)
        log_posterior = exact_model.posterior(x).log_prob(z)
    return PointwiseIdentity(log_joint - log_posterior, log_joint - log_q, log_q - log_posterior)
