"""Run many particles of a pair at once, in an outermost plate, and sum out enumerated sites."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pairs.traces import sampled, sum_to

PARTICLES = "_particles"  # name of the plate of particles
Sites = Callable[[Trace], Iterable[tuple[str, dict]]]


class Held(Messenger):
    """A handler that fixes the values of the named sites, which remain latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


def values_of(trace: Trace) -> dict[str, Tensor]:
    """The values of the latent sites of a trace."""
    return {name: site["value"] for name, site in sampled(trace) if not site["is_observed"]}


def max_nesting(sites: Sequence[dict]) -> int:
    """The number of batch dimensions that plates occupy, at least 1."""
    return max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=1)


def is_enumerated(site: dict) -> bool:
    """Whether a site is enumerated in parallel, to be summed out."""
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def sum_out(traces: Sequence[tuple[Trace, Sites, int]], plates: frozenset[str]) -> Tensor:
    """log Σ Π f, summed over the values of the enumerated sites by variable elimination.

    The factors f are the probabilities of the sites of each trace to the power of the sign of the trace: 1
    for p, −1 for q. Enumerated sites of a trace with sign −1 have no factor, since the mean of p/q over q is
    the sum of p. Scales are removed, masks are applied.

    :param traces: a tuple for each trace: the trace, the function that returns its sites (``sampled`` or
        ``proposal``), and its sign. The trace of the guide comes first, run under
        ``EnumMessenger(first_available_dim)``. Then comes the trace of the model, run under
        ``EnumMessenger()``. So they do not share enumeration dimensions.
    :param plates: names of the plates that are not summed over, of particles and of data.
    :return: ``(particles, batch)``, without the dimension of a plate that contains no site.
    """
    factors: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    symbols: dict[str, str] = {}
    kept: dict[str, Any] = {}
    for trace, sites, sign in traces:
        trace.symbolize_dims(symbols)
        for _, site in sites(trace):
            if sign < 0 and is_enumerated(site):
                continue
            frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
            for frame in frames:
                if frame.name in plates:
                    kept[frame.name] = frame
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            masked = scale_and_mask(log_prob, mask=site["mask"])
            dim = site["infer"].get("_enumerate_dim")
            if dim is not None and site["mask"] is not None:  # the values of a masked site sum to 1
                size = site["value"].shape[dim - site["fn"].event_dim]
                masked = torch.where(
                    torch.as_tensor(site["mask"], device=masked.device), log_prob, -math.log(size)
                )
            term = packed.pack(sign * masked, site["infer"]["_dim_to_symbol"])
            factors.setdefault(frozenset(symbols[frame.name] for frame in frames), []).append(term)
    of_plates = set(symbols.values())
    summed = {dim for terms in factors.values() for term in terms for dim in term._pyro_dims} - of_plates  # type: ignore[attr-defined]
    dims = {symbols[name]: frame.dim for name, frame in kept.items()}
    sizes = {symbols[name]: max(frame.size, 1) for name, frame in kept.items()}
    total = contract_to_tensor(
        factors, summed, target_ordinal=frozenset(dims), ring=LogRing(dim_to_size=sizes)
    )
    order = sorted(kept.values(), key=lambda frame: frame.name != PARTICLES)
    return sum_to(packed.unpack(total, dims), [frame.dim for frame in order])
