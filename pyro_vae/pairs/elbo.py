"""The terms of the ELBO, and a handler that scales them from B rows to N data and anneals the KL."""

import math
from typing import NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pairs.traces import Recorded, proposal, sampled, subsampling_scale, sum_sites


class MeanElbo(NamedTuple):
    """The ELBO of a data set: means over its data in nats per datum, elbo = reconstruction − kl.

    ``elbo_se`` is the standard error of the mean ``elbo`` over data. It is ``nan`` for one datum, and if only
    the ELBO of a whole batch is known. For a pair with enumerated sites ``reconstruction`` and ``kl`` are
    ``nan``, since only their difference is known.
    """

    elbo: float
    reconstruction: float
    kl: float
    elbo_se: float

    def __str__(self) -> str:
        se = "" if math.isnan(self.elbo_se) else f" ± {self.elbo_se:.2f}"
        parts = (
            "" if math.isnan(self.kl) else f" (reconstruction {self.reconstruction:.2f}, KL {self.kl:.2f})"
        )
        return f"ELBO {self.elbo:.2f}{se} nats per datum{parts}"


class ElboTerms(NamedTuple):
    """The ELBO of each datum in nats, log p(x|z) + log p(z) − log q(z|x) at draws of the guide: a lower bound
    of log p(x) in expectation. Annealing, scaling to a data set and ``poutine.scale`` are not applied.

    elbo: ``(batch,)``; reconstruction: log p(x|z), ``(batch,)``; kl: log q(z|x) − log p(z), ``(batch,)``.
    Terms of latents that all data share are divided evenly among the data.
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor

    @classmethod
    def of_batch(cls, elbo: float, num_rows: int) -> "ElboTerms":
        """Terms of a batch of which only the ELBO of all rows together is known.

        :param elbo: the ELBO of the batch per datum, in nats. Each row gets this value; its other terms are
            NaN.
        """
        unknown = torch.full((num_rows,), torch.nan)
        return cls(torch.full((num_rows,), elbo), unknown, unknown)

    def mean(self) -> MeanElbo:
        n = len(self.elbo)
        # equal values, such as those of of_batch, do not show the spread over data
        varies = n > 1 and not self.kl.isnan().any() and not (self.elbo == self.elbo[0]).all()
        se = (self.elbo.double().std() / n**0.5).item() if varies else math.nan
        elbo, reconstruction, kl = (part.double().mean().item() for part in self)
        return MeanElbo(elbo, reconstruction, kl, elbo_se=se)

    def __str__(self) -> str:
        return f"{self.mean()}, {len(self.elbo)} data"


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
    return ElboTerms(reconstruction - kl, reconstruction, kl)


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
