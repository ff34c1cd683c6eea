"""Run a model/guide pair and sum the log-probabilities of its traces per datum."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

Program = Callable[..., Any]


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """A context that raises ``MemoryError`` with the given remedy if the machine or a GPU runs out of
    memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in cause
        if short and remedy not in cause:
            raise MemoryError(f"out of memory; {remedy} ({cause})") from error
        raise


def run_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide. The model is replayed with the latents of the guide."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):  # a guide that wraps its model and runs both
        guide(*args, **kwargs)
        return messenger.get_traces()
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def prior_of(model: Program) -> Program:
    """A guide that draws the latents as the model does."""
    return poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


def sampled(trace: Trace) -> Iterator[tuple[str, dict]]:
    """The random variables of a trace, observed and latent, without subsample sites of plates and
    deterministic sites."""
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield name, site


def masks_of(site: dict) -> Iterator[Tensor]:
    """The masks of a site, from handlers and from its distribution. They broadcast with its value."""
    if isinstance(site["mask"], Tensor):
        yield site["mask"].reshape(site["mask"].shape + (1,) * len(site["fn"].event_shape))
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution) and isinstance(fn._mask, Tensor):
            yield fn._mask.reshape(fn._mask.shape + (1,) * len(fn.event_shape))
        fn = fn.base_dist


def unwrapped(distribution: Any) -> Any:
    """The base distribution without ``to_event`` and ``expand``."""
    while isinstance(distribution, torch.distributions.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return distribution


def proposal(guide_trace: Trace) -> Iterator[tuple[str, dict]]:
    """The sites of a guide whose log-probabilities add up to log q(z|x): its latent sites.

    Observed sites of a guide (``obs=``, ``pyro.factor``) affect its training and are not part of q. An
    auxiliary site u counts only if latents are points (Delta) computed from u, as in autoguides. Otherwise
    q(z|x) stands for q(z|x, u), and the log-weight is log p(x, z) − log q(z|x, u).
    """
    latents = [(name, site) for name, site in sampled(guide_trace) if not site["is_observed"]]
    points = any(
        isinstance(unwrapped(s["fn"]), dist.Delta) for _, s in latents if not s["infer"].get("is_auxiliary")
    )
    for name, site in latents:
        if points or not site["infer"].get("is_auxiliary"):
            yield name, site


class SiteSums(NamedTuple):
    """Sums of the log-probabilities of a trace in nats, over its observed and over its latent sites.

    ``observed`` and ``latent`` are sums over the sites in data plates, ``(batch,)``; ``shared_observed`` and
    ``shared_latent`` are sums over the sites outside of data plates, ``()``. With a particle dimension, the
    shapes are ``(particles, …)``.
    """

    observed: Tensor
    latent: Tensor
    shared_observed: Tensor
    shared_latent: Tensor


def sum_sites(
    sites: Iterable[tuple[str, dict]], plates: frozenset[str], *, particle_dim: int | None = None
) -> SiteSums:
    """Sum the log-probabilities of sites, per datum in data plates.

    Subsampling plates within a datum are scaled to their full size. Other scales (N/B, annealing,
    ``poutine.scale``) are removed.

    :param sites: the result of :func:`sampled` or :func:`proposal`.
    :param particle_dim: the batch dimension of the particles, which is not summed over.
    """
    sums = dict.fromkeys(SiteSums._fields, torch.zeros(()))
    for _, site in sites:
        log_prob = site.get("unscaled_log_prob")  # already computed by a loss
        if log_prob is None:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        log_prob = scale_and_mask(log_prob, mask=site["mask"])
        kept = [] if particle_dim is None else [particle_dim]
        kind = "observed" if site["is_observed"] else "latent"
        rows = None
        for frame in site["cond_indep_stack"]:
            if frame.name in plates and frame.vectorized:
                rows = frame.dim
            elif frame.dim != particle_dim:
                log_prob = log_prob * (frame.full_size / frame.size)
        if rows is None:
            kind = f"shared_{kind}"
        else:
            kept.append(rows)
        log_prob = sum_to(log_prob, kept)
        sums[kind] = sums[kind].to(log_prob) + log_prob
    return SiteSums(**sums)


def sum_to(log_prob: Tensor, kept: list[int]) -> Tensor:
    """Sum over all dimensions except the given ones, which are returned in the given order."""
    missing = max((-dim - log_prob.dim() for dim in kept), default=0)
    log_prob = log_prob.reshape((1,) * max(missing, 0) + log_prob.shape).movedim(
        kept, tuple(range(-len(kept), 0))
    )
    return log_prob.reshape(-1, *log_prob.shape[log_prob.dim() - len(kept) :]).sum(0)


class Recorded(Messenger):
    """A handler that records a trace of each run, with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: deque[Trace] = deque()

    def __enter__(self) -> "Recorded":
        self.traces.append(Trace())
        return super().__enter__()

    def _pyro_post_sample(self, msg: dict) -> None:
        self.traces[-1].add_node(msg["name"], **msg.copy())

    def _pyro_post_param(self, msg: dict) -> None:
        if msg["name"] not in self.traces[-1].nodes:
            self.traces[-1].add_node(msg["name"], **msg.copy())


def subsampling_scale(site: dict) -> float:
    """The scale of a site due to its subsampling plates: the product of full_size / size."""
    return math.prod(frame.full_size / frame.size for frame in site["cond_indep_stack"])
