"""What a guide uses its latent dimensions for: active units, collapse, the information between data and
latents."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program, unwrapped

_DRAWS = 100


@dataclass(frozen=True)
class LatentUsage:
    """Per latent dimension, in nats where it is information.

    activity: Var_x E_q[z_j], ``(dim,)``; active where it exceeds 0.01 (Burda et al. 2016). kl:
    KL(q(z_j|x)‖p(z_j)) per datum, ``(batch, dim)``, where guide and prior are of independent dimensions, else
    ``nan``. correlation: of the aggregate posterior, the mean of q(z|x) over data, ``(dim, dim)``. mean_kl =
    mutual_information + marginal_kl (Hoffman and Johnson 2016): KL(q(z|x)‖p(z)) on average = I_q(x; z) +
    KL(q(z)‖p(z)); I_q is at most log N of the N data.
    """

    activity: Tensor
    kl: Tensor
    correlation: Tensor
    mean_kl: float
    mutual_information: float
    marginal_kl: float

    @property
    def active(self) -> Tensor:
        """Which dimensions are active: ``(dim,)``."""
        return self.activity > 0.01

    def collapsed(self, epsilon: float = 0.01, delta: float = 0.01) -> Tensor:
        """Which dimensions are (ε, δ)-collapsed: Pr_x[KL_j < ε] ≥ 1 − δ, ``(dim,)`` (Lucas et al. 2019).
        Raises ``ValueError`` where the KL per dimension is not known."""
        if self.kl.isnan().any():
            raise ValueError(
                "collapsed: the KL per dimension is known for independent dimensions alone; see `active`"
            )
        return (self.kl < epsilon).double().mean(0) >= 1 - delta

    def __str__(self) -> str:
        n, dim = self.kl.shape
        lines = [f"{int(self.active.sum())} of {dim} latent dimensions active"]
        if not self.kl.isnan().any():
            each = ", ".join(
                f"{value:.2f}" for value in self.kl.mean(0).sort(descending=True).values.tolist()[:12]
            )
            lines[0] += (
                f", {int(self.collapsed().sum())} collapsed; KL per dimension "
                f"{each}{', …' if dim > 12 else ''}"
            )
        lines.append(
            f"KL {self.mean_kl:.2f} = mutual information {self.mutual_information:.2f} (at most log {n} = "
            f"{math.log(n):.2f}) + KL of the aggregate posterior {self.marginal_kl:.2f}"
        )
        if dim > 1:
            off = (self.correlation - torch.eye(dim)).abs()
            lines.append(f"largest correlation of the aggregate posterior {off.max():.2f}")
        return "\n".join(lines)


def latent_usage(
    model: Program, guide: Program, data: Any, *, seed: int = 0, check: bool = True
) -> LatentUsage:
    """What the guide of a pair with one latent site uses it for, on these data.

    The aggregate posterior is the mixture of q(z|x_n) over the N data that are given, evaluated at a draw for
    each of them: N² densities.

    :param data: as for :func:`~pyro_vae.fit`.
    :raises ValueError: for several latent sites, or fewer than two data.
    """
    batch = read_whole(data, seed=seed)
    n = batch.num_rows
    if n < 2:
        raise ValueError(f"latent_usage: expected two data or more but got {n}")
    with untouched(training=False, seed=seed), torch.no_grad():
        latents, batch = inspect_latents(model, guide, batch, verb="latent_usage", check=check)
        if len(latents.sites) != 1:
            raise ValueError(
                "latent_usage: expected one latent site but the model has "
                f"{', '.join(latents.sites) or 'none'}"
            )
        z, log_q = latents.draw(guide, batch, _DRAWS)
        one, log_own = z[0], log_q[0]
        log_prior, _ = latents.log_prior_and_joint(model, batch, one.unsqueeze(0))
        # row i: z_i under q(·|x_n) of every n
        each = [
            latents.log_q(guide, batch, one[i : i + 50].unsqueeze(1).expand(-1, n, -1))
            for i in range(0, n, 50)
        ]
        log_marginal = torch.cat(each).double().logsumexp(1) - math.log(n)
        (site,) = latents.sites.values()
        kl = _kl(latents.distribution(guide, batch), site.fn, n, latents.dim)
    pooled = z.reshape(-1, latents.dim).double()
    own, prior = log_own.double(), log_prior[0].double()
    return LatentUsage(
        activity=(z.double().mean(0).var(0) - z.double().var(0).mean(0) / _DRAWS).clamp_min(
            0
        ),  # less what the draws add
        kl=kl,
        correlation=torch.corrcoef(pooled.mT).reshape(latents.dim, latents.dim),
        mean_kl=(own - prior).mean().item(),
        mutual_information=(own - log_marginal).mean().item(),
        marginal_kl=(log_marginal - prior).mean().item(),
    )


def _kl(q: Any, p: Any, n: int, dim: int) -> Tensor:
    """KL per datum and dimension of independent Gaussians and the like: ``(n, dim)``."""
    q, p = unwrapped(q), unwrapped(p)
    if len(q.event_shape) or len(p.event_shape):
        return torch.full((n, dim), math.nan, dtype=torch.double)
    try:
        return kl_divergence(q, p).double().reshape(-1, dim).expand(n, dim)
    except NotImplementedError:
        return torch.full((n, dim), math.nan, dtype=torch.double)
