"""The variational auto-encoder as two Pyro programs: a model that samples z from p(z) and observes x under
p(x|z), and a guide that samples z from q(z|x) (Kingma & Welling 2013); all given conditions too in a
conditional VAE (Sohn et al. 2015).

Both are PyroModules with the same arguments ``(x, *given)``, latent site ``"z"``, observed site ``"x"`` and
plate ``"data"`` at dim −1: whatever Pyro does with a model/guide pair works on them unchanged.
"""

from contextlib import suppress

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import normalize_param_name
from torch import Tensor

from pyro_vae.conditionals import Conditional, masked
from pyro_vae.nets import Part, num_inputs


class _Program(PyroModule):
    """A Pyro program whose parameters are its own.

    Pyro's param store goes by name, so a second pair would silently be handed the first one's parameters and
    train those. Here the module is the truth: entries of the same name that are not its own leave the store
    before it runs, and nothing is lost with them, for they live in their own module.
    """

    def __call__(self, *args, **kwargs):
        store = pyro.get_param_store()
        if len(store):
            own = dict(self.named_parameters(remove_duplicate=False))
            stale = [
                name
                for name, value in store.named_parameters()
                if (mine := own.get(normalize_param_name(name))) is not None and mine is not value
            ]
            for name in stale:
                with suppress(KeyError):  # a parameter shared under two names is known to the store by one
                    del store[name]
        return super().__call__(*args, **kwargs)


class Model(_Program):
    """p(z) p(x|z): ``z ~ prior()``, ``x ~ decoder(z)``, a Pyro program. With conditions c₁, …, each ``(batch,
    *its event)``, p(z|c…) p(x|z, c…): ``z ~ prior(*given)``, ``x ~ decoder(z, *given)``.

    ``model(x, *given)``: x ``(batch, *event)``. ``mask``: bool like x, true where an entry is observed; log p
    is then that of the observed entries. ``c``: a condition by name, for data in a dict. ``model()`` draws
    one datum from the joint, ``model(None, *given)`` one for each row of the conditions. Raises
    ``ValueError`` for x of another shape, whole numbers under a continuous likelihood, or a conditional prior
    without a condition.
    """

    def __init__(self, prior: Conditional, decoder: Conditional) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder

    @property
    def num_inputs(self) -> int | None:
        """1 for x, and the number of conditions: as many as the decoder takes after z; ``None`` for any
        number."""
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
                # a missing entry may hold anything, NaN too: a draw takes its place, and the mask takes it
                # out again
                x = torch.where(_check_mask(mask, x), x, likelihood.sample())
                likelihood = masked(likelihood, mask)
            return pyro.sample("x", likelihood, obs=x)


class Guide(_Program):
    """q(z|x), or q(z|x, c…) with conditions: ``z ~ encoder(x, *given)``, a Pyro program. Missing entries
    (``mask`` false) reach the encoder as zeros."""

    def __init__(self, encoder: Conditional) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def num_inputs(self) -> int | None:
        """1 for x, and the number of conditions; ``None`` for any number."""
        return num_inputs(self.encoder)

    def forward(
        self, x: Tensor, *given: Tensor, c: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        given = given if c is None else (*given, c)
        _sample_weights(self)
        with pyro.plate("data", len(x), dim=-1):
            if mask is not None:
                x = torch.where(_check_mask(mask, x), x, torch.zeros_like(x))
            posterior = self.encoder(x, *given)
            if posterior.batch_shape != x.shape[:1]:
                raise ValueError(
                    f"encoder: it read x of shape {tuple(x.shape)} as a batch of shape "
                    f"{tuple(posterior.batch_shape)}; expected {tuple(x.shape[:1])}: build its trunk with "
                    f"in_shape={tuple(x.shape[1:])}"
                )
            return pyro.sample("z", posterior)


class VAE(Part):
    """A variational auto-encoder: the pair ``vae.model``, ``vae.guide`` over shared parts.

    :param prior: p(z), such as ``priors.StandardNormal(20)``.
    :param decoder: p(x|z), a conditional over events of x.
    :param encoder: q(z|x), a conditional over events of z.
    :raises ValueError: where prior and encoder disagree on the shape of z.

    >>> import pyro_vae as pv
    >>> from pyro_vae import conditionals, nets, priors
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=conditionals.Bernoulli(nets.MLP(2, (50,)), event_shape=(8, 8)),
    ...     encoder=conditionals.Normal(nets.MLP(64, (50,)), event_shape=2),
    ... )
    >>> vae.sample(5).shape
    torch.Size([5, 8, 8])

    A conditional VAE is a VAE whose decoder p(x|z, c) and encoder q(z|x, c) take conditions, after z and x.
    Its prior is p(z), independent of them (Doersch 2016), or a conditional p(z|c) (Sohn et al. 2015).

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
                f"VAE: the prior is over z of shape {tuple(prior.event_shape)} but the encoder gives "
                f"{tuple(encoder.event_shape)}; pass both the same event_shape"
            )
        self.model = Model(prior, decoder)
        self.guide = Guide(encoder)

    def encode(self, x: Tensor, *given: Tensor) -> dist.TorchDistribution:
        """q(z|x), or q(z|x, c…). x, and each condition: ``(batch, *its event)``."""
        _check_event(x, self.model.decoder.event_shape)
        return self.guide.encoder(x, *given)

    def decode(self, z: Tensor, *given: Tensor) -> dist.TorchDistribution:
        """p(x|z), or p(x|z, c…). z: ``(*batch, *latent)``; its ``mean`` is what a picture wants."""
        return self.model.decoder(z, *given)

    @torch.no_grad()
    def sample(self, n: int, *given: Tensor) -> Tensor:
        """n draws of x from p(z) p(x|z): ``(n, *event)``. Conditions have n rows, one for each draw. Raises
        ``ValueError`` for other numbers of rows."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(
                f"sample: expected one draw or more but got {n if isinstance(n, int) else type(n).__name__}; "
                "conditions follow the number of draws, as in vae.sample(len(c), c)"
            )
        if any(len(c) != n for c in given):
            rows = ", ".join(str(len(c)) for c in given)
            raise ValueError(
                f"sample: {n} draws of conditions with {rows} rows; expected one row for each draw"
            )
        return self.decode(self.model.prior(*given).expand((n,)).sample(), *given).sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *given: Tensor) -> Tensor:
        """E[x'|z] at z ~ q(z|x): ``(batch, *event)``; E[x'|z, c…] at z ~ q(z|x, c…) with conditions."""
        return self.decode(self.encode(x, *given).sample(), *given).mean


def _sample_weights(program: PyroModule) -> None:
    """Sample the ``PyroSample`` attributes of a program's parts, as Bayesian networks have: all data share
    them, so they are sampled before the data plate. Within one call of the program, later reads of an
    attribute return the same draw."""
    for module in program.modules():
        if isinstance(module, PyroModule):
            for name in module._pyro_samples:
                getattr(module, name)


def _check_event(x: Tensor, event_shape: torch.Size) -> int:
    """The number of rows of ``x``, whose other dimensions must be the event's."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[1:] != event_shape:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        remedy = (
            f"event_shape={tuple(x.shape[1:])}"
            if isinstance(x, Tensor) and x.dim() > 1
            else "a tensor with a batch"
        )
        raise ValueError(
            f"decoder: event_shape {tuple(event_shape)} needs x of shape (batch, "
            f"{', '.join(map(str, event_shape))}) but x has {got}; reshape x, or pass {remedy}"
        )
    if not len(x):
        raise ValueError(f"model: x has no rows, its shape is {tuple(x.shape)}; expected at least one datum")
    return len(x)


def _as_observed(x: Tensor, likelihood: dist.TorchDistribution, dtype: torch.dtype) -> Tensor:
    if x.is_floating_point():
        return x
    if not likelihood.support.is_discrete:
        raise ValueError(
            f"decoder: x holds whole numbers ({x.dtype}) but the likelihood is continuous; pass x.float() / "
            "255 for bytes, or use a discrete conditional such as Categorical or Poisson"
        )
    return x.to(dtype)


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(
            f"mask: expected bool of x's shape {tuple(x.shape)}, true where observed, but got {mask.dtype} "
            f"of shape {tuple(mask.shape)}"
        )
    return mask
