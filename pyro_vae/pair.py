"""What any model/guide pair is: two Pyro programs, run together, whose log-probabilities belong to data.

The terms of the ELBO are defined here, once; training reports them, evaluation averages them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_vae.batches import Batch

Program = Callable[..., Any]


class MeanElbo(NamedTuple):
    """The ELBO of a data set: means over its data in nats per datum, elbo = reconstruction − kl.

    ``standard_error`` is that of the mean ``elbo`` over data. Where a pair has enumerated sites, ``reconstruction`` and
    ``kl`` are not told apart and are ``nan``.
    """

    elbo: float
    reconstruction: float
    kl: float
    standard_error: float

    def __str__(self) -> str:
        return (
            f"ELBO {self.elbo:.2f} ± {self.standard_error:.2f} nats per datum "
            f"(reconstruction {self.reconstruction:.2f}, KL {self.kl:.2f})"
        )


class ElboTerms(NamedTuple):
    """The ELBO of each datum in nats, log p(x|z) + log p(z) − log q(z|x) at the guide's draws: a lower bound of log p(x)
    in expectation. Never annealed, never scaled to a data set.

    elbo: ``(batch,)``; reconstruction: log p(x|z), ``(batch,)``; kl: log q(z|x) − log p(z), ``(batch,)``. A latent that all
    data share gives each datum its equal share.
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor

    def mean(self) -> MeanElbo:
        n = len(self.elbo)
        error = (self.elbo.double().std() / n**0.5).item() if n > 1 else float("nan")
        elbo, reconstruction, kl = (part.double().mean().item() for part in self)
        return MeanElbo(elbo, reconstruction, kl, standard_error=error)

    def __str__(self) -> str:
        return f"{self.mean()}, {len(self.elbo)} data"


def run_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide, the model replayed against the guide's latents."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):  # a guide that is a handler of its model
        guide(*args, **kwargs)
        return messenger.get_traces()
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def elbo_terms(
    model_trace: Trace, guide_trace: Trace, plates: frozenset[str], *, num_data: int, num_particles: int = 1
) -> ElboTerms:
    """The terms of one run of a pair, one per datum.

    :param plates: names of the data plates, whose rows are data: see :func:`data_plates`.
    :param num_data: N, over which latents outside the data plates are shared out.
    :param num_particles: particles in the traces, where they are vectorized: terms are averaged over them.
    """
    observed, latent, model_shared = _sum_sites(model_trace, plates)
    _, guide_latent, guide_shared = _sum_sites(guide_trace, plates)
    shared = (model_shared[0] / num_data, (guide_shared[1] - model_shared[1]) / num_data)
    reconstruction = (observed + shared[0]) / num_particles
    kl = (guide_latent - latent + shared[1]) / num_particles
    reconstruction, kl = torch.broadcast_tensors(torch.atleast_1d(reconstruction), torch.atleast_1d(kl))
    return ElboTerms(reconstruction - kl, reconstruction, kl)


def _sum_sites(trace: Trace, plates: frozenset[str]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-probabilities of the observed and of the latent sites: per datum, and of those outside the data plates."""
    local = [torch.zeros(()), torch.zeros(())]
    shared = [torch.zeros(()), torch.zeros(())]
    for site in prune_subsample_sites(trace).nodes.values():
        if site["type"] != "sample" or site["infer"].get("_deterministic"):
            continue
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), mask=site["mask"])
        frames = [frame for frame in site["cond_indep_stack"] if frame.name in plates and frame.vectorized]
        which = 0 if site["is_observed"] else 1
        if frames:
            rows = log_prob.movedim(frames[0].dim, -1)
            local[which] = local[which].to(rows) + rows.reshape(-1, rows.shape[-1]).sum(0)
        else:
            shared[which] = shared[which].to(log_prob) + log_prob.sum()
    return local[0], local[1], (shared[0], shared[1])


def data_plates(model: Program, batch: Batch) -> frozenset[str]:
    """Names of the model's data plates: those with one row for each row of the batch.

    A plate over something else may have that size by accident, but only a data plate shrinks with the data: the model is
    run on fewer rows too. It is run untouched, in evaluation mode.
    """
    with untouched(training=False), torch.no_grad():
        sizes = _plate_sizes(model, batch)
        plates = {name for name, size in sizes.items() if batch.num_rows in size}
        if batch.num_rows > 1 and plates:
            try:
                fewer = _plate_sizes(model, batch.first(batch.num_rows - 1))
            except Exception:  # a model written for one batch size
                return frozenset(plates)
            plates = {name for name in plates if fewer.get(name) != sizes[name]}
    return frozenset(plates)


def _plate_sizes(model: Program, batch: Batch) -> dict[str, tuple[int, int]]:
    trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    return {
        frame.name: (frame.size, frame.full_size)
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }


class Reweighted(Messenger):
    """A handler that makes a minibatch stand for the whole data set, and anneals: sites in data plates are scaled by N/B,
    latent sites by β. It keeps the traces of its runs.

    A plate that subsamples from a larger size scales its sites itself and is left alone.
    """

    def __init__(self, plates: frozenset[str], *, num_rows: int, num_data: int, beta: float = 1.0) -> None:
        super().__init__()
        self.plates, self.num_rows, self.num_data, self.beta = plates, num_rows, num_data, beta
        self.traces: list[Trace] = []

    def __enter__(self) -> "Reweighted":
        self.traces.append(Trace())
        return super().__enter__()

    def _pyro_sample(self, msg: dict) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.plates and frame.full_size == self.num_rows:
                msg["scale"] = msg["scale"] * (self.num_data / self.num_rows)
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta

    def _pyro_post_sample(self, msg: dict) -> None:
        self.traces[-1].add_node(msg["name"], **msg.copy())


@contextmanager
def untouched(*, training: bool | None = None, seed: int | None = None) -> Iterator[Collection[nn.Module]]:
    """Run a pair and leave no mark: random states, Pyro's param store, training flags and buffers of every module
    that ran (batch normalization's averages) are put back. Yields the modules that ran.

    :param training: run the modules in training mode or in evaluation mode; ``None`` leaves them as they are.
    :param seed: seed of the noise inside; ``None`` starts from the caller's random state.
    """
    seen: dict[nn.Module, tuple[bool, dict[str, Tensor | None]]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        if module not in seen:
            buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            seen[module] = (module.training, buffers)
            if training is not None:
                module.training = training

    store = pyro.get_param_store()
    # a global hook, for this block only: it is what reaches the networks that a plain function closes over
    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    state = pyro.util.get_rng_state()
    try:
        with torch.random.fork_rng(), store.scope(store.get_state()):
            if seed is not None:
                pyro.set_rng_seed(seed)
            yield seen.keys()
    finally:
        hook.remove()
        pyro.util.set_rng_state(state)
        for module, (was_training, buffers) in seen.items():
            module.training = was_training
            for name, value in buffers.items():
                if value is not None:
                    module._buffers[name].copy_(value)  # type: ignore[union-attr]
