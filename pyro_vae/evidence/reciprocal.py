"""Reciprocal importance sampling: 1/p(x) as a mean over posterior draws (AEVB, appendix D)."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.evidence.annealing import MAX_BYTES, Annealing, run_chains
from pyro_vae.evidence.hmc import Transition
from pyro_vae.evidence.path import Path, Point
from pyro_vae.evidence.result import Evidence
from pyro_vae.numerics import covariance, effective_sample_size, log_mean_exp, log_mean_exp_se
from pyro_vae.pairs.preserve import read_whole
from pyro_vae.pairs.traces import Program


class _Identity(Transition):
    """A transition that does not move the chains, for exact posterior draws."""

    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:  # noqa: ARG002
        return point, torch.ones_like(point.log_base)


_MAX_DIM = 4  # as in the paper; in more dimensions a Gaussian fitted to draws becomes inaccurate
ANNEALING = Annealing(num_temperatures=100, num_chains=20, schedule="sigmoid")


def reciprocal_importance(
    model: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    annealing: Annealing = ANNEALING,
    thinning: int = 2,
    seed: int = 0,
    check: bool = True,
    progress: bool | None = None,
) -> Evidence:
    """1/p̂(x) = mean of q(z) / p(x, z) over posterior draws z: an estimate of log p(x) per datum, in nats.

    q is a Gaussian in unconstrained space, fitted to half of the draws. The mean is over the other half
    (Kingma & Welling 2013, appendix D; Gelfand & Dey 1994). If the model has a method ``posterior``, its
    draws are exact, and log p̂ is an upper bound in expectation. Otherwise, annealed HMC chains draw from the
    posterior: log p̂ is then not a bound, and q is fitted to the draws of half of the chains. The model can
    have at most four latent dimensions per datum. The variance of 1/p̂ can be infinite if q has heavier tails
    than the posterior.

    :param data: the arguments of the model, ``(batch, *event)``, in any form that
        :func:`~pyro_vae.log_weights` accepts.
    :param num_samples: posterior draws per datum.
    :param annealing: options of the chains from the prior to the posterior, with ``num_chains`` ≥ 2. They are
        not used if the draws are exact.
    :param thinning: moves of a chain between two draws.
    :raises ValueError: for more than four latent dimensions, fewer than 20 draws or fewer than 2 chains.
    """
    posterior = getattr(model, "posterior", None)
    num_chains = annealing.num_chains
    per_chain = -(-num_samples // num_chains)
    if num_samples < 20 or num_chains < 2 or thinning < 1:
        raise ValueError(
            "reciprocal_importance: expected num_samples ≥ 20, num_chains ≥ 2 and thinning ≥ 1 but got "
            f"{num_samples}, {num_chains} and {thinning}"
        )

    def walk(path: Path, betas: Tensor, transition: Transition, bar: tqdm) -> dict[str, Tensor]:
        if path.dim > _MAX_DIM:
            raise ValueError(
                f"reciprocal_importance: the model has {path.dim} latent dimensions per datum; expected at "
                f"most {_MAX_DIM}, since q is fitted to draws: use ais or importance"
            )
        if posterior is not None:
            z = posterior(*path.batch.args, **path.batch.kwargs).sample((num_samples,))
            points = [path.at(path.unconstrained(z.reshape(num_samples, path.batch.num_rows, -1)))]
            bar.update(len(betas) - 1)
        else:
            points = _posterior_draws(path, betas, transition, num_chains, per_chain, thinning, bar)
        # shape (draws per chain, chains, batch, …); each exact draw counts as one chain. Whole chains go to
        # one half or the other, since the draws of a chain are dependent
        u = torch.stack([point.u for point in points]).double()
        log_joint = torch.stack([point.log_joint for point in points]).double()
        half = u.shape[1] // 2
        log_ratio = _fit_gaussian(u[:, :half].flatten(0, 1)).log_prob(u[:, half:]) - log_joint[:, half:]
        error = log_mean_exp_se(log_mean_exp(log_ratio))
        log_ratio = log_ratio.flatten(0, 1)
        return {
            "log_evidence": -log_mean_exp(log_ratio),
            "log_evidence_se": error,
            "ess": effective_sample_size(log_ratio),
        }

    if posterior is not None:
        annealing = Annealing(
            num_temperatures=1, num_chains=num_samples, schedule="uniform", transition=_Identity()
        )
    estimates = run_chains(
        model,
        read_whole(data, seed=seed),
        walk,
        annealing,
        start=None,
        max_bytes=MAX_BYTES,
        seed=seed,
        check=check,
        progress=progress,
        resume=None,
        name="reciprocal importance sampling",
    )
    draws = "draws by HMC" if posterior is None else "exact draws"
    return Evidence(
        f"reciprocal importance sampling, {num_samples} {draws} of the posterior",
        "none" if posterior is None else "upper",
        **estimates,
        num_particles=num_samples - num_samples // 2,
        cost=num_samples * (thinning if posterior is None else 1),
        joint=False,
    )


def _posterior_draws(
    path: Path,
    betas: Tensor,
    transition: Transition,
    num_chains: int,
    per_chain: int,
    thinning: int,
    bar: tqdm,
) -> list[Point]:
    """Anneal chains from the prior to the posterior. Returns ``per_chain`` states of the chains at β = 1."""
    point, draws = path.draw(num_chains), []
    for beta in betas[1:]:
        point, _ = transition.move(path, point, beta.to(point.u))
        bar.update()
    for _ in range(per_chain):
        for _ in range(thinning):
            point, _ = transition.move(path, point, betas[-1].to(point.u))
        draws.append(point)
    return draws


def _fit_gaussian(u: Tensor) -> Any:
    """A Gaussian with the mean and the covariance of the draws ``(K, batch, dim)``, for each datum."""
    cov = covariance(u)
    jitter = 1e-10 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return torch.distributions.MultivariateNormal(
        u.mean(0), cov + jitter * cov.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    )
