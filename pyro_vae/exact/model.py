"""Base class of Pyro models with a known posterior and evidence."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.data.arrays import check_rows
from pyro_vae.nets import Shape, as_shape

T = TypeVar("T", float, Tensor, float | Tensor)
_DATA_METHODS = {"posterior", "log_evidence", "mean_field", "mean_field_gap", "log_normal", "log_normal_gap"}


def _in_dtype_of_data(method: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: the method runs on a copy of the model in the dtype of ``x``, if the dtypes differ."""

    @wraps(method)
    def run(self: "ExactModel", x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(self.like(x), x, *args, **kwargs)

    return run


class ExactModel(nn.Module, ABC):
    """p(z) p(x|z) with known p(z|x) and log p(x).

    ``model(x)`` is an ordinary Pyro program with latent site ``"z"``, observed site ``"x"`` and plate
    ``"data"``, so Pyro's ``SVI`` can train a guide for it. x has shape ``(batch, *event_shape)``.

    :param latent_shape: event shape of z.
    :param event_shape: event shape of x.
    """

    def __init__(self, latent_shape: Shape, event_shape: Shape) -> None:
        super().__init__()
        self._double_values: dict[str, Tensor] = {}
        self.latent_shape = as_shape(latent_shape) if latent_shape != () else torch.Size()
        self.event_shape = as_shape(event_shape) if event_shape != () else torch.Size()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _DATA_METHODS & vars(cls).keys():
            setattr(cls, name, _in_dtype_of_data(vars(cls)[name]))

    def register_constant(
        self, name: str, value: float | Tensor, size: int | None = None, like: Tensor | None = None
    ) -> None:
        """Register a buffer, and store its value in double precision too, so that ``.double()`` has all
        digits.

        :param size: length of the vector that ``value`` is expanded to. ``None`` keeps the shape.
        :param like: tensor whose dtype and device the buffer gets. By default they are those of ``value``,
            or torch's default dtype if ``value`` is a number.
        """
        exact = torch.as_tensor(value, dtype=torch.double, device="cpu").detach()
        self._double_values[name] = (exact if size is None else exact.expand(size)).clone()
        tensor = value if isinstance(value, Tensor) else exact
        if like is None:
            like = value if isinstance(value, Tensor) else torch.empty(0)
        self.register_buffer(name, (tensor if size is None else tensor.expand(size)).to(like).clone())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # if load_state_dict or the user has changed a buffer, its stored double-precision value is not used
        pairs = {name: (exact, self.get_buffer(name)) for name, exact in self._double_values.items()}
        unchanged = [name for name, (exact, buffer) in pairs.items() if torch.equal(exact.to(buffer), buffer)]
        super()._apply(fn, recurse)
        for name in unchanged:
            self._buffers[name] = self._double_values[name].to(self.get_buffer(name))
        return self

    def like(self, x: Any) -> "ExactModel":
        """This model if its dtype is that of ``x``, else a copy in the dtype of ``x``."""
        dtypes = {b.dtype for b in self.buffers() if b.is_floating_point()}
        if not isinstance(x, Tensor) or not x.is_floating_point() or dtypes <= {x.dtype}:
            return self
        return deepcopy(self).to(x.dtype)

    @abstractmethod
    def prior(self) -> dist.TorchDistribution:
        """p(z)."""

    @abstractmethod
    def decoder(self, z: Tensor) -> dist.TorchDistribution:
        """p(x|z). z: ``(*batch, *latent_shape)``."""

    @abstractmethod
    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """p(z|x), of ``batch_shape (batch,)``. x: ``(batch, *event_shape)``."""

    @abstractmethod
    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(batch,)``."""

    def best(self, family: type, *args: Any, **kwargs: Any) -> tuple[dist.TorchDistribution, Tensor] | None:
        """The member q of ``family`` with the smallest KL(q‖p(z|x)), and that KL in nats, ``(batch,)``.

        Returns ``None`` if no closed form is known. The default returns the posterior if it is in ``family``.

        :param family: class of a distribution, such as ``dist.Normal`` (independent elements) or
            ``dist.MultivariateNormal``.
        """
        posterior = self.posterior(*args, **kwargs)
        base = posterior.base_dist if isinstance(posterior, torch.distributions.Independent) else posterior
        return (posterior, self.log_evidence(*args, **kwargs) * 0.0) if type(base) is family else None

    def forward(self, x: Tensor | None = None) -> Tensor:
        model = self.like(x)
        with pyro.plate("data", 1 if x is None else len(model.checked(x)), dim=-1):
            z = pyro.sample("z", model.prior())
            return pyro.sample("x", model.decoder(z), obs=x)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) in nats. z: ``(*particles, batch, *latent_shape)`` → ``(*particles, batch)``."""
        model = self.like(x)
        return model.prior().log_prob(z) + model.decoder(z).log_prob(x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n draws of x from p(z) p(x|z): ``(n, *event_shape)``."""
        return self.decoder(self.prior().sample((n,))).sample()

    def checked(self, x: Tensor) -> Tensor:
        """``x``, validated.

        :raises ValueError: if the shape is not ``(batch, *event_shape)`` or a row is not finite. Rows are not
            checked if validation of distributions is turned off.
        """
        name = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[1:] != self.event_shape:
            actual = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            expected = ", ".join(["batch", *map(str, self.event_shape)])
            raise ValueError(f"{name}: expected x of shape ({expected}) but got {actual}")
        if Distribution._validate_args:  # not while a step is traced, since a graph cannot read values
            self.check_values(x)
        return x

    def check_values(self, x: Tensor) -> None:
        """Raise ``ValueError`` if a row is not finite."""
        check_rows(x, type(self).__name__)

    def extra_repr(self) -> str:
        return f"latent_shape={tuple(self.latent_shape)}, event_shape={tuple(self.event_shape)}"


def diagonal_gap(precision: Tensor) -> Tensor:
    """The smallest KL(q‖N(μ, Λ⁻¹)) of a Gaussian q with independent elements, in nats, ``()``.

    It is ½[Σ log Λⱼⱼ − log det Λ].
    """
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


def positive(name: str, value: T) -> T:
    """Return ``value``. Raises ``ValueError`` if it is not positive."""
    if not (torch.as_tensor(value) > 0).all():
        raise ValueError(f"{name}: expected a positive number but got {value}")
    return value
