"""The terms of the ELBO, and a handler that scales them from B rows to N data and anneals the KL."""

import math
from typing import NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pairs.traces import Recorded, proposal, sampled, subsampling_scale, sum_sites

_MIN_COLLECTED = 2**14  # rows for which memory is allocated at first


class MeanElbo(NamedTuple):
    """The ELBO of a data set: means over its data in nats per datum, elbo = reconstruction − kl.

    - elbo_se: the standard error of the mean ``elbo`` over data; ``nan`` for one datum, and if only the ELBO
      of a whole batch is known
    - reconstruction, kl: ``nan`` for a pair with enumerated sites, since only their difference is known
    - bound, bound_se: the value of an objective other than the ELBO, and its standard error, else ``None``
    - ess: effective sample size of the K weights of this objective, else ``None``
    """

    elbo: float
    reconstruction: float
    kl: float
    elbo_se: float
    bound: float | None = None
    bound_se: float | None = None
    ess: float | None = None

    @property
    def objective(self) -> float:
        """What training maximizes: ``bound`` where the objective has one, else ``elbo``."""
        return self.elbo if self.bound is None else self.bound

    def __str__(self) -> str:
        parts = (
            "" if math.isnan(self.kl) else f" (reconstruction {self.reconstruction:.2f}, KL {self.kl:.2f})"
        )
        text = f"ELBO {_with_se(self.elbo, self.elbo_se)} nats per datum{parts}"
        if self.bound is None:
            return text
        return f"bound {_with_se(self.bound, self.bound_se)}, ESS {self.ess:.1f}, {text}"


def _with_se(mean: float, se: float | None) -> str:
    return f"{mean:.2f}" if se is None or math.isnan(se) else f"{mean:.2f} ± {se:.2f}"


class ElboTerms(NamedTuple):
    """The ELBO of each datum in nats, log p(x|z) + log p(z) − log q(z|x) at draws of the guide: a lower bound
    of log p(x) in expectation. Annealing, scaling to a data set and ``poutine.scale`` are not applied.

    All are tensors ``(batch,)``. Terms of latents that all data share are divided evenly among the data.

    - elbo = reconstruction − kl
    - reconstruction: log p(x|z)
    - kl: log q(z|x) − log p(z)
    - bound: the value of an objective other than the ELBO, see :mod:`pyro_vae.infer`, else ``nan``
    - ess: effective sample size of its K weights, else ``nan``
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    bound: Tensor
    ess: Tensor

    @classmethod
    def of_elbo(cls, elbo: Tensor, reconstruction: Tensor, kl: Tensor) -> "ElboTerms":
        """Terms of the ELBO itself, without another objective."""
        unknown = torch.full_like(elbo, torch.nan)
        return cls(elbo, reconstruction, kl, unknown, unknown)

    @classmethod
    def of_batch(cls, elbo: float | Tensor, num_rows: int) -> "ElboTerms":
        """Terms of a batch of which only the ELBO of all rows together is known.

        :param elbo: the ELBO of the batch per datum, in nats. Each row gets this value; its other terms are
            NaN.
        """
        return cls.of_elbo(torch.as_tensor(elbo).expand(num_rows), *torch.full((2, num_rows), torch.nan))

    def mean(self) -> MeanElbo:
        elbo, reconstruction, kl, bound, ess = (part.double().mean().item() for part in self)
        # values of of_batch do not show the spread over data
        is_mean = math.isnan(kl) and math.isnan(bound)
        mean = MeanElbo(elbo, reconstruction, kl, math.nan if is_mean else _mean_se(self.elbo))
        if math.isnan(bound):
            return mean
        return mean._replace(bound=bound, bound_se=_mean_se(self.bound), ess=ess)

    def __str__(self) -> str:
        return f"{self.mean()}, {len(self.elbo)} data"


def _mean_se(values: Tensor) -> float:
    """The standard error of the mean. ``nan`` for a single value, and if all values are equal: they come from
    one total that was divided evenly among the data, so they do not show the spread over data."""
    n = len(values)
    if n < 2 or (values == values[0]).all():
        return math.nan
    return (values.double().std() / n**0.5).item()


def elbo_terms(
    model_trace: Trace, guide_trace: Trace, plates: frozenset[str], *, num_data: int, num_particles: int = 1
) -> ElboTerms:
    """The ELBO terms of one run of a pair, per datum.

    :param plates: names of the data plates. If there are none, the run must be over all data at once.
    :param num_data: N. Terms of sites outside of the data plates are divided by N.
    :param num_particles: the number of vectorized particles in the traces. The terms are means over
        particles.
    """
    model, guide = sum_sites(sampled(model_trace), plates), sum_sites(proposal(guide_trace), plates)
    reconstruction = (model.observed + model.shared_observed / num_data) / num_particles
    kl = (
        guide.latent - model.latent + (guide.shared_latent - model.shared_latent) / num_data
    ) / num_particles
    reconstruction, kl = torch.broadcast_tensors(torch.atleast_1d(reconstruction), torch.atleast_1d(kl))
    if not plates:
        reconstruction, kl = reconstruction.expand(num_data), kl.expand(num_data)
    return ElboTerms.of_elbo(reconstruction - kl, reconstruction, kl)


class CollectedTerms:
    """ELBO terms of minibatches, one after another.

    They are copied to a few large tensors. Small tensors that are kept between the large temporary ones of
    each step would fragment the heap, and the memory of the process would grow with every step.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, terms: ElboTerms) -> None:
        end = self._num_rows + len(terms.elbo)
        if not self._parts:
            self._parts = [torch.empty_like(part) for part in terms]
        for i, part in enumerate(terms):
            buffer = self._parts[i]
            dtype = torch.promote_types(buffer.dtype, part.dtype)
            if end > len(buffer) or dtype != buffer.dtype:
                size = len(buffer) if end <= len(buffer) else max(end, 2 * len(buffer), _MIN_COLLECTED)
                larger = torch.empty(size, dtype=dtype, device=buffer.device)
                larger[: self._num_rows] = buffer[: self._num_rows]
                buffer = self._parts[i] = larger
            buffer[self._num_rows : end] = part.detach()
        self._num_rows = end

    @property
    def all(self) -> ElboTerms:
        """The terms of all rows; without a minibatch, those of no rows."""
        if not self._parts:
            return ElboTerms.of_batch(0.0, 0)
        return ElboTerms(*(part[: self._num_rows].clone() for part in self._parts))


class Reweighted(Recorded):
    """A handler that scales sites in data plates by N/B and latent sites by β, and records a trace of each
    run.

    Sites that are scaled already are not scaled again: those in a subsampling plate, and those in ``scaled``.

    :param scaled: names of the sites that the pair itself scales by N/B, see ``Structure.scaled``.
    :param strip: remove the ``poutine.scale`` of the pair itself, to report the ELBO without annealing.
    """

    def __init__(
        self,
        plates: frozenset[str],
        *,
        num_rows: int,
        num_data: int,
        beta: float | Tensor = 1.0,
        scaled: frozenset[str] = frozenset(),
        strip: bool = False,
    ) -> None:
        super().__init__()
        self.plates, self.num_rows, self.num_data, self.beta = plates, num_rows, num_data, beta
        self.scaled, self.strip = scaled, strip

    def _pyro_sample(self, msg: dict) -> None:
        if self.strip:
            msg["scale"] = subsampling_scale(msg)
        if self.strip or msg["name"] not in self.scaled:
            for frame in msg["cond_indep_stack"]:
                if frame.name in self.plates and frame.full_size in (self.num_rows, -1):
                    msg["scale"] = msg["scale"] * (self.num_data / self.num_rows)
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta
