"""Variational free energy as energy minus entropy, and the pointwise identity for log p(x)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.diagnostics.tables import over_data, table
from pyro_vae.exact.grid import posterior_of
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program


@dataclass(frozen=True)
class FreeEnergy:
    """Free energy F = E_q[−log p(x, z)] − H(q) = −log p(x) + KL(q‖p(z|x)), the negative ELBO, in nats, each
    ``(batch,)``.

    expected_energy: E_q[−log p(x, z)]. entropy: H(q), analytic if the guide's distribution has ``entropy``,
    else estimated from the guide's draws. free_energy_se: Monte Carlo standard error of F.
    bits_per_dimension: F / (D ln 2), the bits-back code length of a discrete x of D dimensions (Hinton & van
    Camp 1993).
    """

    expected_energy: Tensor
    entropy: Tensor
    free_energy: Tensor
    free_energy_se: Tensor
    bits_per_dimension: Tensor

    def __str__(self) -> str:
        rows = {
            "expected energy": self.expected_energy,
            "entropy": self.entropy,
            "free energy": self.free_energy,
            "bits per dimension": self.bits_per_dimension,
        }
        title = f"{len(self.free_energy)} data, means in nats per datum"
        return table(title, {name: over_data(value) for name, value in rows.items()})


def free_energy(
    model: Program, guide: Program, data: Any, *, num_particles: int = 1000, seed: int = 0, check: bool = True
) -> FreeEnergy:
    """Free energy of a pair per datum, estimated from ``num_particles`` draws of the guide.

    :param data: as for :func:`~pyro_vae.fit`.
    """
    batch = read_whole(data, seed=seed)
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
        free_energy_se=terms.std(0) / math.sqrt(num_particles),
        bits_per_dimension=(energy - entropy) / (dimensions * math.log(2)),
    )


def _entropy(distribution: Any, num_rows: int) -> Tensor | None:
    """Analytic entropy of the guide's distribution, ``(batch,)``, or ``None``."""
    try:
        return None if distribution is None else distribution.entropy().reshape(-1).expand(num_rows)
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class PointwiseIdentity:
    """Terms of log p(x) = log p(x, z) − log p(z|x), which holds for every z. In nats, each
    ``(particles, batch)``.

    log_weight: log p(x, z) − log q(z|x). correction: log q(z|x) − log p(z|x), so that log p(x) = log_weight +
    correction. The sign of the correction varies with z; its mean under q is KL(q‖p) ≥ 0.
    """

    log_evidence: Tensor
    log_weight: Tensor
    correction: Tensor

    def __str__(self) -> str:
        particles, n = self.log_evidence.shape
        rows = {
            "log evidence": self.log_evidence,
            "log-weight": self.log_weight,
            "correction": self.correction,
        }
        lines = [
            f"{particles} z for each of {n} data, in nats",
            f"{'':16}{'smallest':>12}{'mean':>12}{'largest':>12}",
        ]
        for name, value in rows.items():
            lines.append(f"{name:16}{value.min():12.4f}{value.mean():12.4f}{value.max():12.4f}")
        return "\n".join(lines)


def pointwise_identity(exact_model: Any, guide: Program, data: Any, *, z: Tensor) -> PointwiseIdentity:
    """Evaluate log p(x) = log p(x, z) − log p(z|x) at any ``z``. All rows of ``log_evidence`` are equal,
    since the identity holds for every z.

    :param exact_model: as for :func:`~pyro_vae.compare`.
    :param data: as for :func:`~pyro_vae.fit`.
    :param z: latents, ``(particles, batch, *latent)``.
    """
    batch = read_whole(data, seed=0)
    with untouched(training=False), torch.no_grad():
        latents, batch = inspect_latents(exact_model, guide, batch, verb="pointwise_identity")
        flat = z.reshape(*z.shape[:2], -1)
        log_joint = latents.log_joint(exact_model, batch, flat)
        log_q = latents.log_q(guide, batch, flat)
        log_posterior = posterior_of(exact_model, batch).log_prob(z)
    return PointwiseIdentity(log_joint - log_posterior, log_joint - log_q, log_q - log_posterior)
