"""The estimator of AEVB's appendix D: 1/p(x) as a mean over draws of the posterior."""

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


class _Still(Transition):
    """No move: for draws that are exact."""

    def move(self, path: Path, point: Point, beta: Tensor) -> tuple[Point, Tensor]:  # noqa: ARG002
        return point, torch.ones_like(point.log_base)


_MAX_DIM = 4  # where the paper stops, and a density fitted to draws begins to fail
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
    """1/p̂(x) = mean of q(z) / p(x, z) over draws z of the posterior, q a density fitted to other draws of it
    (Kingma & Welling 2013, appendix D; Gelfand & Dey 1994), per datum.

    Half of the draws (of the chains) fit q, a Gaussian in unconstrained space; the other half make the mean.
    Where the model knows its posterior the draws are exact, and log p̂ is an upper bound in expectation;
    draws by HMC, after a walk from the prior, give no bound. For up to four latent dimensions: beyond, or
    where q has heavier tails than the posterior, the variance is infinite.

    :param data: the arguments of the model, ``(batch, *event)``, as :func:`~pyro_vae.log_weights` takes them.
    :param num_samples: draws of the posterior for each datum; half of them fit q.
    :param annealing: the walk from the prior to the posterior by ``num_chains`` ≥ 2 chains; unused where
        draws are exact.
    :param thinning: moves from one draw of a chain to the next.
    :raises ValueError: for five latent dimensions or more.
    """
    exact = getattr(model, "posterior", None)
    num_chains = annealing.num_chains
    per_chain = -(-num_samples // num_chains)
    if num_samples < 20 or num_chains < 2:
        raise ValueError(
            f"reciprocal_importance: expected num_samples ≥ 20 and num_chains ≥ 2 but got {num_samples}, "
            f"{num_chains}"
        )

    def walk(path: Path, betas: Tensor, move: Transition, bar: tqdm) -> dict[str, Tensor]:
        if path.dim > _MAX_DIM:
            raise ValueError(
                f"reciprocal_importance: the model has {path.dim} latent dimensions a datum; expected "
                f"{_MAX_DIM} or fewer, where a density can be fitted to draws: use ais or importance"
            )
        if exact is not None:
            drawn = exact(*path.batch.args, **path.batch.kwargs).sample((num_samples,))
            points = [path.at(path.unconstrained(drawn.reshape(num_samples, path.batch.num_rows, -1)))]
            bar.update(len(betas) - 1)
        else:
            points = _draws(path, betas, move, num_chains, per_chain, thinning, bar)
        # (draws of a chain, chains, batch, …); draws that are exact are chains of one. Whole chains fit q or
        # make the mean, since draws of one chain depend on each other
        u, log_joint = (
            torch.stack(part).double() for part in zip(*((p.u, p.log_joint) for p in points), strict=True)
        )
        half = u.shape[1] // 2
        log_ratio = _fitted(u[:, :half].flatten(0, 1)).log_prob(u[:, half:]) - log_joint[:, half:]
        error = log_mean_exp_se(log_mean_exp(log_ratio))
        log_ratio = log_ratio.flatten(0, 1)
        return {
            "log_evidence": -log_mean_exp(log_ratio),
            "log_evidence_se": error,
            "ess": effective_sample_size(log_ratio),
        }

    if exact is not None:
        annealing = Annealing(
            num_temperatures=1, num_chains=num_samples, schedule="uniform", transition=_Still()
        )
    found = run_chains(
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
    how = "exact draws" if exact is not None else "draws by HMC"
    return Evidence(
        f"reciprocal importance sampling, {num_samples} {how} of the posterior",
        "none" if exact is None else "upper",
        **found,
        num_particles=num_samples - num_samples // 2,
        cost=num_samples * (1 if exact is not None else thinning),
        joint=False,
    )


def _draws(
    path: Path, betas: Tensor, move: Transition, num_chains: int, per_chain: int, thinning: int, bar: tqdm
) -> list[Point]:
    """Chains that walk from the prior to the posterior, and then along it."""
    point, kept = path.draw(num_chains), []
    for beta in betas[1:]:
        point, _ = move.move(path, point, beta.to(point.u))
        bar.update()
    for _ in range(per_chain):
        for _ in range(thinning):
            point, _ = move.move(path, point, betas[-1].to(point.u))
        kept.append(point)
    return kept


def _fitted(u: Tensor) -> Any:
    """A Gaussian of the draws' mean and covariance, for each datum."""
    spread = covariance(u)
    jitter = 1e-10 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return torch.distributions.MultivariateNormal(
        u.mean(0), spread + jitter * spread.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    )
