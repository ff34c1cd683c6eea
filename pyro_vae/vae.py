"""The variational auto-encoder as a Pyro model and guide: the model samples z from p(z) and observes x under
p(x|z), the guide samples z from q(z|x) (Kingma & Welling 2013). In a conditional VAE all three distributions
also depend on conditions (Sohn et al. 2015).

Model and guide are PyroModules with arguments ``(x, *given)``, latent site ``"z"``, observed site ``"x"`` and
plate ``"data"`` at dim −1, and work with any Pyro inference algorithm for a model/guide pair.
"""

from contextlib import suppress

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import normalize_param_name
from torch import Tensor

from pyro_vae.conditionals import Conditional, masked
from pyro_vae.html import details, notebook, pre, table
from pyro_vae.nets import Part, num_inputs, value_if_missing


class _Program(PyroModule):
    """A PyroModule that always uses its own parameters.

    Pyro's param store is keyed by name, so a second pair with the same parameter names would silently train
    the parameters of the first. Therefore each call deletes from the store the parameters of other modules
    that have the same names. The other modules keep their values.
    """

    def __call__(self, *args, **kwargs):
        store = pyro.get_param_store()
        if len(store):
            parameters = dict(self.named_parameters(remove_duplicate=False))
            stale_names = [
                name
                for name, value in store.named_parameters()
                if parameters.get(normalize_param_name(name), value) is not value
            ]
            for name in stale_names:
                # a parameter with several names is in the store under one of them only
                with suppress(KeyError):
                    del store[name]
        return super().__call__(*args, **kwargs)


class Model(_Program):
    """The Pyro model p(z) p(x|z): ``z ~ prior()``, ``x ~ decoder(z)``. With conditions c₁, …: p(z|c…) p(x|z,
    c…), ``z ~ prior(*given)``, ``x ~ decoder(z, *given)``.

    Call it as ``model(x, *given, c=None, mask=None)``. x has shape ``(batch, *event)``, each condition
    ``(batch, *its event)``. ``c`` passes a condition by name, for data in a dict. ``mask``, bool
    ``(batch, *event)``, is true where x is observed; only observed entries contribute to log p(x|z).
    ``model()`` draws one datum from p(x, z), ``model(None, *given)`` one datum for each row of the
    conditions.

    Raises ``ValueError`` if x has another shape, if x is integer and the likelihood is continuous, or if a
    conditional prior gets no condition.
    """

    def __init__(self, prior: Conditional, decoder: Conditional) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder

    @property
    def num_inputs(self) -> int | None:
        """Number of inputs: x and the conditions; ``None`` if the decoder takes any number of conditions."""
        return num_inputs(self.decoder)

    def forward(
        self, x: Tensor | None = None, *given: Tensor, c: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        given = given if c is None else (*given, c)
        rows = len(given[0]) if given else 1
        size = rows if x is None else _check_event(x, self.decoder.event_shape)
        _sample_weights(self)
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", self.prior(*given))
            likelihood = self.decoder(z, *given)
            if x is not None:
                x = _as_observed(x, likelihood, z.dtype)
            if mask is not None and x is not None:
                # missing entries may be NaN, which log_prob rejects; the draws in their place are masked
                x = torch.where(_check_mask(mask, x), x, likelihood.sample())
                likelihood = masked(likelihood, mask)
            return pyro.sample("x", likelihood, obs=x)


class Guide(_Program):
    """The Pyro guide q(z|x), or q(z|x, c…) with conditions: ``z ~ encoder(x, *given)``.

    The arguments are those of :class:`Model`. The encoder sees 0 in place of missing entries (``mask``
    false), or the mean of its :class:`~pyro_vae.nets.Standardize`, which that maps to 0. It does not see the
    mask.
    """

    def __init__(self, encoder: Conditional) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def num_inputs(self) -> int | None:
        """Number of inputs: x and the conditions; ``None`` if the encoder takes any number of conditions."""
        return num_inputs(self.encoder)

    def forward(
        self, x: Tensor, *given: Tensor, c: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        given = given if c is None else (*given, c)
        _sample_weights(self)
        with pyro.plate("data", len(x), dim=-1):
            posterior = self.encoder(self.filled(x, mask), *given)
            if posterior.batch_shape != x.shape[:1]:
                raise ValueError(
                    f"encoder: for x of shape {tuple(x.shape)}, q(z|x) has batch_shape "
                    f"{tuple(posterior.batch_shape)}; expected {tuple(x.shape[:1])}; build the trunk with "
                    f"in_shape={tuple(x.shape[1:])}"
                )
            return pyro.sample("z", posterior)

    def filled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x as the encoder sees it."""
        if mask is None:
            return x
        value = torch.as_tensor(value_if_missing(getattr(self.encoder, "trunk", None))).to(x)
        return torch.where(_check_mask(mask, x), x, value)


class VAE(Part):
    """A variational auto-encoder: ``vae.model`` and ``vae.guide``.

    :param prior: p(z), such as ``priors.StandardNormal(20)``.
    :param decoder: p(x|z), a conditional whose ``event_shape`` is the shape of x.
    :param encoder: q(z|x), a conditional whose ``event_shape`` is the shape of z.
    :raises ValueError: if prior and encoder have different event shapes.

    >>> import pyro_vae as pv
    >>> from pyro_vae import conditionals, nets, priors
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=conditionals.Bernoulli(nets.MLP(2, (50,)), event_shape=(8, 8)),
    ...     encoder=conditionals.Normal(nets.MLP(64, (50,)), event_shape=2),
    ... )
    >>> vae.sample(5).shape
    torch.Size([5, 8, 8])

    In a conditional VAE the decoder p(x|z, c) and the encoder q(z|x, c) take the conditions as arguments
    after z and x. The prior is p(z), independent of the conditions (Doersch 2016), or a conditional p(z|c)
    (Sohn et al. 2015).

    >>> cvae = pv.VAE(
    ...     prior=conditionals.Normal(nets.MLP(10, (50,)), event_shape=2),
    ...     decoder=conditionals.Bernoulli(nets.MLP(((2,), (10,)), (50,)), event_shape=(8, 8)),
    ...     encoder=conditionals.Normal(nets.MLP(((8, 8), (10,)), (50,)), event_shape=2),
    ... )
    >>> cvae.sample(10, torch.eye(10)).shape
    torch.Size([10, 8, 8])
    """

    def __init__(self, prior: Conditional, decoder: Conditional, encoder: Conditional) -> None:
        super().__init__()
        if prior.event_shape != encoder.event_shape:
            raise ValueError(
                f"VAE: the prior has event_shape {tuple(prior.event_shape)} but the encoder has "
                f"{tuple(encoder.event_shape)}; pass both the same event_shape"
            )
        self.model = Model(prior, decoder)
        self.guide = Guide(encoder)

    def _repr_html_(self) -> str:
        parts = {
            "prior p(z)": self.model.prior,
            "decoder p(x|z)": self.model.decoder,
            "encoder q(z|x)": self.guide.encoder,
        }
        return notebook(
            table(
                [
                    (name, type(part).__name__, tuple(part.event_shape), f"{num_parameters(part):,}")
                    for name, part in parts.items()
                ],
                ("VAE", "family", "event shape", "parameters"),
            ),
            details("modules", pre(repr(self))),
        )

    def encode(self, x: Tensor, *given: Tensor, mask: Tensor | None = None) -> dist.TorchDistribution:
        """q(z|x), or q(z|x, c…) with conditions. x and each condition: ``(batch, *its event)``; ``mask`` is
        that of :class:`Guide`."""
        _check_event(x, self.model.decoder.event_shape)
        return self.guide.encoder(self.guide.filled(x, mask), *given)

    def decode(self, z: Tensor, *given: Tensor) -> dist.TorchDistribution:
        """p(x|z), or p(x|z, c…) with conditions. z: ``(*batch, *latent)``. If x is an image, plot the mean of
        p(x|z)."""
        return self.model.decoder(z, *given)

    @torch.no_grad()
    def sample(self, n: int, *given: Tensor) -> Tensor:
        """Draw n samples of x from p(z) p(x|z): ``(n, *event)``. Each condition has n rows, one per sample.

        :raises ValueError: if n is not a positive int, or a condition has another number of rows.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(
                f"sample: expected n ≥ 1 but got {n if isinstance(n, int) else type(n).__name__}; pass the "
                "conditions after n, as in vae.sample(len(c), c)"
            )
        if any(len(c) != n for c in given):
            rows = ", ".join(str(len(c)) for c in given)
            raise ValueError(f"sample: n is {n} but the conditions have {rows} rows; expected n rows each")
        return self.decode(self.model.prior(*given).expand((n,)).sample(), *given).sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *given: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z) at a draw z ~ q(z|x): ``(batch, *event)``. With conditions, the mean of
        p(x|z, c…) at z ~ q(z|x, c…). ``mask`` is that of :class:`Guide`."""
        return self.decode(self.encode(x, *given, mask=mask).sample(), *given).mean


def num_parameters(module: torch.nn.Module) -> int:
    """The number of trainable parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _sample_weights(program: PyroModule) -> None:
    """Sample the ``PyroSample`` attributes of a program's modules, as in Bayesian neural networks.

    All data share these attributes, so they must be sampled outside of the data plate. Pyro caches the
    samples for the rest of the call.
    """
    for module in program.modules():
        if isinstance(module, PyroModule):
            for name in module._pyro_samples:
                getattr(module, name)


def _check_event(x: Tensor, event_shape: torch.Size) -> int:
    """Validate that ``x`` has shape ``(batch, *event_shape)`` and return its number of rows."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[1:] != event_shape:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        remedy = (
            f"event_shape={tuple(x.shape[1:])}"
            if isinstance(x, Tensor) and x.dim() > 1
            else "a tensor with a batch dimension"
        )
        raise ValueError(
            f"decoder: event_shape {tuple(event_shape)} needs x of shape (batch, "
            f"{', '.join(map(str, event_shape))}) but x has {got}; reshape x, or pass {remedy}"
        )
    if not len(x):
        raise ValueError(f"model: x has no rows (shape {tuple(x.shape)}); expected at least one datum")
    return len(x)


def _as_observed(x: Tensor, likelihood: dist.TorchDistribution, dtype: torch.dtype) -> Tensor:
    """``x`` as floating point; integers are valid under a discrete likelihood only."""
    if x.is_floating_point():
        return x
    if not likelihood.support.is_discrete:
        raise ValueError(
            f"decoder: x has whole numbers ({x.dtype}) but the likelihood is continuous; pass x.float() / "
            "255 for bytes, or use a discrete conditional such as Categorical or Poisson"
        )
    return x.to(dtype)


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Validate that ``mask`` is bool with the shape of ``x``, and return it."""
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(
            f"mask: expected bool of shape {tuple(x.shape)}, true where observed, but got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    return mask
