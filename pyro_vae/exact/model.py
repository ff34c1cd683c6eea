"""What every exact model is: an ordinary Pyro model that also knows its posterior and its evidence."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.data.arrays import check_rows
from pyro_vae.nets import Shape, as_shape

T = TypeVar("T", float, Tensor, float | Tensor)
_OF_DATA = {"posterior", "log_evidence", "mean_field", "mean_field_gap", "log_normal", "log_normal_gap"}


def _in_dtype_of_data(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, run by the model in the dtype of the data."""

    @wraps(method)
    def run(self: "ExactModel", x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(self.like(x), x, *args, **kwargs)

    return run


class ExactModel(nn.Module, ABC):
    """p(z) p(x|z) with known p(z|x) and log p(x).

    ``model(x)``: the Pyro program, latent ``"z"``, observed ``"x"``, plate ``"data"``; x ``(batch, *event_shape)``. Everything
    that works on a model works on it: a guide is trained on it by plain ``SVI``.

    :param latent_shape: shape of one z.
    :param event_shape: shape of one x.
    """

    def __init__(self, latent_shape: Shape, event_shape: Shape) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}
        self.latent_shape = as_shape(latent_shape) if latent_shape != () else torch.Size()
        self.event_shape = as_shape(event_shape) if event_shape != () else torch.Size()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _OF_DATA & vars(cls).keys():
            setattr(cls, name, _in_dtype_of_data(vars(cls)[name]))

    def register_constant(
        self, name: str, value: float | Tensor, size: int | None = None, like: Tensor | None = None
    ) -> None:
        """Register a buffer, a scalar or a vector of this size. Its value is kept in double precision, so that ``.double()``
        gives the number that was meant; the buffer is in the dtype of ``like``, of the tensor given, or the default one."""
        exact = torch.as_tensor(value, dtype=torch.double, device="cpu").detach()
        self._exact[name] = (exact if size is None else exact.expand(size)).clone()
        if like is None:
            like = value if isinstance(value, Tensor) else torch.empty(0)
        given = value if isinstance(value, Tensor) else exact
        self.register_buffer(name, (given if size is None else given.expand(size)).to(like).clone())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # a buffer that holds another value than the constant, such as a loaded one, is converted like any other
        pairs = {name: (exact, self.get_buffer(name)) for name, exact in self._exact.items()}
        held = [name for name, (exact, buffer) in pairs.items() if torch.equal(exact.to(buffer), buffer)]
        super()._apply(fn, recurse)
        for name in held:
            self._buffers[name] = self._exact[name].to(self.get_buffer(name))
        return self

    def like(self, x: Any) -> "ExactModel":
        """The model in the dtype of the data: itself, or a copy."""
        dtypes = {b.dtype for b in self.buffers() if b.is_floating_point()}
        if not isinstance(x, Tensor) or not x.is_floating_point() or dtypes <= {x.dtype}:
            return self
        return deepcopy(self).to(x.dtype)

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
        model = self.like(x)
        with pyro.plate("data", 1 if x is None else len(model.checked(x)), dim=-1):
            z = pyro.sample("z", model.prior())
            return pyro.sample("x", model.likelihood(z), obs=x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) in nats. z: ``(*particles, batch, *latent_shape)`` → ``(*particles, batch)``."""
        model = self.like(x)
        return model.prior().log_prob(z) + model.likelihood(z).log_prob(x)

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


def positive(name: str, value: T) -> T:
    """A constant itself. Raises ``ValueError`` where it is not positive."""
    if not (torch.as_tensor(value) > 0).all():
        raise ValueError(f"{name}: expected a positive number but got {value}")
    return value
