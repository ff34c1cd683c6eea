"""What every exact model is: an ordinary Pyro model that also knows its posterior and its evidence."""

from abc import ABC, abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.data import check_rows
from pyro_vae.nets import Shape, as_shape


class ExactModel(nn.Module, ABC):
    """p(z) p(x|z) with known p(z|x) and log p(x).

    ``model(x)``: the Pyro program, latent ``"z"``, observed ``"x"``, plate ``"data"``; x ``(batch, *event_shape)``. Everything
    that works on a model works on it: a guide is trained on it by plain ``SVI``.

    :param latent_shape: shape of one z.
    :param event_shape: shape of one x.
    """

    def __init__(self, latent_shape: Shape, event_shape: Shape) -> None:
        super().__init__()
        self.latent_shape = as_shape(latent_shape) if latent_shape != () else torch.Size()
        self.event_shape = as_shape(event_shape) if event_shape != () else torch.Size()

    @abstractmethod
    def prior(self) -> dist.TorchDistribution:
        """p(z)."""

    @abstractmethod
    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z). z: ``(*batch, *latent_shape)``."""

    @abstractmethod
    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """p(z|x), of ``batch_shape (batch,)``. x: ``(batch, *event_shape)``."""

    @abstractmethod
    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(batch,)``."""

    def best(self, family: type, *args: Any, **kwargs: Any) -> tuple[dist.TorchDistribution, Tensor] | None:
        """q*, the member of a family of distributions with the smallest KL(q‖p(z|x)), and that KL in nats ``(batch,)``, where
        they are known in closed form; ``None`` elsewhere. Here: the posterior itself, where it is of the family.

        :param family: a class of Pyro's, such as ``dist.Normal`` (of independent elements) or ``dist.MultivariateNormal``.
        """
        posterior = self.posterior(*args, **kwargs)
        base = posterior.base_dist if isinstance(posterior, torch.distributions.Independent) else posterior
        return (posterior, self.log_evidence(*args, **kwargs) * 0.0) if type(base) is family else None

    def forward(self, x: Tensor | None = None) -> Tensor:
        with pyro.plate("data", 1 if x is None else len(self.checked(x)), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) in nats. z: ``(*particles, batch, *latent_shape)`` → ``(*particles, batch)``."""
        return self.prior().log_prob(z) + self.likelihood(z).log_prob(x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n draws of x from p(z) p(x|z): ``(n, *event_shape)``."""
        return self.likelihood(self.prior().sample((n,))).sample()

    def checked(self, x: Tensor) -> Tensor:
        """``x`` itself. Raises ``ValueError`` for another shape than ``(batch, *event_shape)`` or rows that are not finite."""
        name = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[1:] != self.event_shape:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            expected = ", ".join(["batch", *map(str, self.event_shape)])
            raise ValueError(f"{name}: expected x of shape ({expected}) but got {got}")
        check_rows(x, name)
        return x

    def extra_repr(self) -> str:
        return f"latent_shape={tuple(self.latent_shape)}, event_shape={tuple(self.event_shape)}"


def diagonal_gap(precision: Tensor) -> Tensor:
    """½[Σ log Λⱼⱼ − log |Λ|] in nats, the KL of the best independent Gaussians from N(μ, Λ⁻¹): ``()``."""
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


def positive(name: str, value: float | Tensor) -> Tensor:
    """A constant that must be positive, as a tensor."""
    tensor = as_constant(value)
    if not (tensor > 0).all():
        raise ValueError(f"{name}: expected a positive number but got {value}")
    return tensor


def as_constant(value: float | Tensor) -> Tensor:
    """A constant of a model: a tensor keeps its dtype, a number is of the default one."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.get_default_dtype())


def as_vector(value: float | Tensor, size: int, like: Tensor) -> Tensor:
    """A constant of a model as a vector, a number standing for all its entries, in the dtype and on the device of ``like``."""
    return as_constant(value).to(like).expand(size).clone()
