"""Use of latent dimensions: active units, posterior collapse, mutual information of data and latents."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program, unwrapped

_NUM_DRAWS = 100  # for each datum


@dataclass(frozen=True)
class LatentUsage:
    """Activity, KL and mutual information of the latents. KL and mutual information are in nats.

    - names: the dimensions, such as ``("a", "z[0]", "z[1]")`` for a scalar site a and a vector z
    - activity: Var_x E_q[z_j], ``(dim,)``
    - kl: KL(q(z_j|x)‖p(z_j)), ``(batch, dim)``, ``nan`` unless there is one site and the dimensions of guide
      and prior are independent
    - correlation: correlation matrix of the aggregate posterior q(z), the mean of q(z|x) over data,
      ``(dim, dim)``
    - mean_kl: mean of KL(q(z|x)‖p(z)) over data. It is the sum of mutual_information, I_q(x; z), and
      marginal_kl, KL(q(z)‖p(z)) (Hoffman & Johnson 2016). I_q is at most log N for N data.
    """

    names: tuple[str, ...]
    activity: Tensor
    kl: Tensor
    correlation: Tensor
    mean_kl: float
    mutual_information: float
    marginal_kl: float

    @property
    def active(self) -> Tensor:
        """Active dimensions, bool ``(dim,)``: activity above 0.01 (Burda et al. 2016)."""
        return self.activity > 0.01

    def collapsed(self, epsilon: float = 0.01, delta: float = 0.01) -> Tensor:
        """(ε, δ)-collapsed dimensions, bool ``(dim,)``: Pr_x[KL_j < ε] ≥ 1 − δ (Lucas et al. 2019).

        :raises ValueError: if the dimensions of guide or prior are not independent.
        """
        if self.kl.isnan().any():
            raise ValueError(
                "collapsed: the KL per dimension is known for independent dimensions only; use `active`"
            )
        return (self.kl < epsilon).double().mean(0) >= 1 - delta

    def __str__(self) -> str:
        n, dim = self.kl.shape
        inactive = [name for name, active in zip(self.names, self.active, strict=True) if not active]
        others = f" (not {', '.join(inactive[:8])}{', …' if len(inactive) > 8 else ''})" if inactive else ""
        lines = [f"{int(self.active.sum())} of {dim} latent dimensions active{others}"]
        if not self.kl.isnan().any():
            largest = self.kl.mean(0).sort(descending=True).values.tolist()[:12]
            numbers = ", ".join(f"{value:.2f}" for value in largest)
            lines[0] += (
                f", {int(self.collapsed().sum())} collapsed; KL per dimension "
                f"{numbers}{', …' if dim > 12 else ''}"
            )
        lines.append(
            f"KL {self.mean_kl:.2f} = mutual information {self.mutual_information:.2f} (at most log {n} = "
            f"{math.log(n):.2f}) + KL of the aggregate posterior {self.marginal_kl:.2f}"
        )
        if dim > 1:
            off_diagonal = (self.correlation - torch.eye(dim, device=self.correlation.device)).abs()
            lines.append(f"largest correlation of the aggregate posterior {off_diagonal.max():.2f}")
        return "\n".join(lines)


def latent_usage(
    model: Program, guide: Program, data: Any, *, seed: int = 0, check: bool = True
) -> LatentUsage:
    """Use of the latent dimensions of a pair, those of all its sites.

    The aggregate posterior is the mixture of q(z|x_n) over the N data. It is evaluated at one draw for each
    datum, so N² densities are computed.

    :param data: as for :func:`~pyro_vae.fit`.
    :raises ValueError: if the model has no latents, or there are fewer than two data.
    """
    batch = read_whole(data, seed=seed)
    n = batch.num_rows
    if n < 2:
        raise ValueError(f"latent_usage: expected two data or more but got {n}")
    with untouched(training=False, seed=seed), torch.no_grad():
        latents, batch = inspect_latents(model, guide, batch, verb="latent_usage", check=check)
        if not latents.sites:
            raise ValueError("latent_usage: the model has no latent sites; expected one or more")
        z, log_q = latents.draw(guide, batch, _NUM_DRAWS)
        first = z[0]
        log_prior, _ = latents.log_prior_and_joint(model, batch, first.unsqueeze(0))
        log_marginal = latents.log_aggregate(guide, batch, first)
        q = latents.distribution(guide, batch)
        prior = next(iter(latents.sites.values())).fn
        kl = torch.full((n, latents.dim), math.nan).double() if q is None else _kl(q, prior, n, latents.dim)
    pooled = z.reshape(-1, latents.dim).double()
    log_conditional, log_prior = log_q[0].double(), log_prior[0].double()
    noise = z.double().var(0).mean(0) / _NUM_DRAWS  # Monte Carlo variance of the means
    return LatentUsage(
        names=latents.names,
        activity=(z.double().mean(0).var(0) - noise).clamp_min(0),
        kl=kl,
        correlation=torch.corrcoef(pooled.mT).reshape(latents.dim, latents.dim),
        mean_kl=(log_conditional - log_prior).mean().item(),
        mutual_information=(log_conditional - log_marginal).mean().item(),
        marginal_kl=(log_marginal - log_prior).mean().item(),
    )


def _kl(q: Any, p: Any, n: int, dim: int) -> Tensor:
    """Analytic KL per datum and dimension, ``(n, dim)``; ``nan`` if not available."""
    q, p = unwrapped(q), unwrapped(p)
    if len(q.event_shape) or len(p.event_shape):
        return torch.full((n, dim), math.nan, dtype=torch.double)
    try:
        return kl_divergence(q, p).double().reshape(-1, dim).expand(n, dim)
    except NotImplementedError:
        return torch.full((n, dim), math.nan, dtype=torch.double)
