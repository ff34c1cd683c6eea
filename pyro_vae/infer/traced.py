"""A step of SVI as a graph of tensor operations: loss and gradients of any pair, traced once through Pyro's own handlers.

The graph holds the parameters and buffers themselves, not copies, and draws its noise anew from torch's generator. What
Python decided while it was traced stays decided, so a graph comes with guards (everything that Python could have read) and is
held against eager Pyro at the same noise before it is used, and from time to time again.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor, fx
from torch.distributions import Distribution, kl_divergence
from torch.utils import _pytree as pytree

from pyro_vae.batches import Batch
from pyro_vae.infer.graphs import CannotTrace, NotYet, said, trace_graph
from pyro_vae.infer.guards import Guards, names_read
from pyro_vae.pair import Program, untouched

Traces = list[tuple[Trace, Trace]]
# noise as eager torch draws it; no guards of Dynamo's, since a step has its own
_INDUCTOR: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}


def surrogate(elbo: ELBO, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """The loss of one particle, and the function whose gradients Pyro follows, both as tensors: those of ``Trace_ELBO`` and
    ``TraceMeanField_ELBO``, which read their loss out as a number on the way."""
    if type(elbo) is TraceMeanField_ELBO:
        loss = -_mean_field(model_trace, guide_trace)
        return loss.detach(), loss
    value = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    followed, log_r = model_trace.log_prob_sum(), None
    for site in guide_trace.nodes.values():
        if site["type"] != "sample":
            continue
        _, score, entropy = site["score_parts"]
        if not is_identically_zero(entropy):
            followed = followed - entropy.sum()
        if not is_identically_zero(score):
            log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
            followed = followed + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
    return -value.detach(), -followed


def _mean_field(model_trace: Trace, guide_trace: Trace) -> Tensor:
    total: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            total = total + site["log_prob_sum"]
            continue
        guide_site = guide_trace.nodes[name]
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
            total = total - scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
        except NotImplementedError:
            total = total + site["log_prob_sum"] - guide_site["score_parts"].entropy_term.sum()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and name not in model_trace.nodes:
            total = total - site["score_parts"].entropy_term.sum()
    return total


def _in_support(traces: Traces) -> Tensor | None:
    """Whether what is observed lies in the supports of its distributions, where Pyro would ask."""
    found = []
    for site in (site for model_trace, _ in traces for site in model_trace.nodes.values()):
        if site["type"] == "sample" and site["is_observed"] and vars(site["fn"]).get("_validate_args", True):
            try:
                found.append(site["fn"].support.check(site["value"]).all())
            except (NotImplementedError, AttributeError):  # a distribution without a support
                continue
    return torch.stack(found).all() if found else None


class Step:
    """Loss and gradients of a pair for arguments like these, as a graph.

    :param report: from the traces of a run, what else a step is to yield.
    :raises CannotTrace: where it cannot be one, or does not agree with eager Pyro.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Program,
        guide: Program,
        batch: Batch,
        report: Callable[[Traces], tuple[Tensor, ...]],
    ) -> None:
        if type(elbo) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise CannotTrace(f"the loss is {type(elbo).__name__}; Trace_ELBO and TraceMeanField_ELBO are traced")
        self.elbo, self.model, self.guide, self.report = elbo, model, guide, report
        self.validate = Distribution._validate_args
        with untouched() as ran, names_read() as read:
            others = random.getstate(), str(np.random.get_state())  # noqa: NPY002
            self.params = self._parameters(batch)
            if (random.getstate(), str(np.random.get_state())) != others:  # noqa: NPY002
                raise CannotTrace("the pair draws from Python's or numpy's generator, which is not in the graph")
        self.guards = Guards(ran, (model, guide, elbo), self.params, read)
        self.graph = self._trace(batch)
        self.guards.forget_written()
        self.run: Callable[..., Any] = self.graph
        for moved in (True, False):
            try:
                self.check(batch, moved=moved)
            except CannotTrace:
                raise
            except Exception as error:  # parameters or rows that this pair cannot have
                raise CannotTrace(f"it could not be held against eager Pyro: {said(error)}") from error

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss ``()``, NaN where the data are not in their support; the gradient of each of ``params``; what ``report``
        yields."""
        with torch.no_grad():
            loss, *others = self.run(*_tensors(batch))
            gradients, reported = others[: len(self.params)], others[len(self.params) :]
            if self.run is not self.graph and loss.is_cuda:  # the next replay writes over them
                reported = [value.clone() for value in reported]
        return loss, gradients, reported

    def _parameters(self, batch: Batch) -> list[Tensor]:
        """What Pyro trains, unconstrained: the parameters that have a gradient, were it one of an earlier step."""
        known = set(pyro.get_param_store().keys())
        with poutine.trace(param_only=True) as capture:
            self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
        found = {site["value"].unconstrained(): None for site in capture.trace.nodes.values()}
        pyro.infer.util.zero_grads(found)
        if capture.trace.nodes.keys() - known:
            raise NotYet("eager Pyro registers parameters first")
        return [p for p in found if p.grad is not None and p.requires_grad]

    def _trace(self, batch: Batch) -> fx.GraphModule:
        leaves, structure = pytree.tree_flatten(tuple(batch))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            for i, tensor in zip(places, tensors, strict=True):
                leaves[i] = tensor
            args, kwargs = pytree.tree_unflatten(leaves, structure)
            total: Any = 0.0
            followed: Any = 0.0
            traces = []
            for pair in self.elbo._get_traces(self.model, self.guide, args, kwargs):
                loss, surrogate_loss = surrogate(self.elbo, *pair)
                total, followed = total + loss / self.elbo.num_particles, followed + surrogate_loss / self.elbo.num_particles
                traces.append(pair)
            found = torch.autograd.grad(followed, self.params, allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.params, strict=True)]
            with torch.no_grad():
                reported = self.report(traces)
                valid = _in_support(traces) if self.validate else None
                if valid is not None:  # eager Pyro will say what is wrong
                    total = torch.where(valid, total, math.nan)
            return total, *gradients, *reported

        return trace_graph(loss_and_gradients, _tensors(batch))

    def compile(self, batch: Batch) -> None:
        """Compile the graph by Inductor, its noise that of eager torch; on a GPU it is replayed as a CUDA graph. Raises
        ``CannotTrace`` where that fails; the graph itself serves on."""
        options = _INDUCTOR | {"triton.cudagraphs": any(p.is_cuda for p in self.params)}
        self.run = torch.compile(self.graph, fullgraph=True, options=options)
        try:
            self.check(batch)  # Inductor compiles at the first call
        except Exception as error:
            self.run = self.graph
            raise CannotTrace(f"Inductor: {said(error)}") from error
        finally:  # Dynamo turns the checks of distributions off for the whole process
            Distribution.set_default_validate_args(self.validate)

    def check(self, batch: Batch, *, moved: bool = False) -> None:
        """Hold the graph against eager Pyro at the same noise.

        :param moved: with the parameters a little off, and the rows in another order.
        :raises CannotTrace: where loss or gradients differ.
        """
        order = torch.randperm(batch.num_rows if batch.tensors else 0, generator=torch.Generator().manual_seed(0))
        with self._restored():
            pyro.set_rng_seed(2 + moved)  # another than the traces had: noise that they kept must not agree by chance
            if moved:
                noise = torch.Generator().manual_seed(1)
                for p in self.params:
                    step = torch.randn(p.shape, generator=noise).to(p)
                    p.data.add_(0.01 * p.data * step + 1e-3 * step)
                batch = batch.map(lambda part: part[order.to(part.device)] if len(part) == len(order) else part)
            state = pyro.util.get_rng_state()
            with self._restored():
                loss, gradients, _ = self(batch)
                ours = [loss, *gradients, *(value.clone() for value in self.guards.buffers())]
            pyro.util.set_rng_state(state)
            with self._restored(), untouched():
                expected = self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
                eager = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
                pyros = [torch.as_tensor(expected).to(loss), *eager, *(value.clone() for value in self.guards.buffers())]
        for i, (a, b) in enumerate(zip(ours, pyros, strict=True)):
            if not _agree(a, b):
                what = "the loss" if not i else f"the gradient of a parameter of shape {tuple(b.shape)}"
                what = what if i <= len(self.params) else f"a buffer of shape {tuple(b.shape)}"
                raise CannotTrace(
                    f"{what} is not that of eager Pyro at the same noise: something that Python reads or writes as the pair "
                    "runs (noise of another library, an attribute) is not in the graph"
                )

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Run and leave no mark: on parameters, their gradients, buffers and random states."""
        state = pyro.util.get_rng_state()
        kept = [(p, p.detach().clone(), p.grad) for p in self.params]
        buffers = [(value, value.clone()) for value in self.guards.buffers()]
        for p in self.params:
            p.grad = None
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)
            with torch.no_grad():
                for p, value, grad in kept:
                    p.data.copy_(value)
                    p.grad = grad
                for value, was in buffers:
                    if not torch.equal(value, was):  # what was not written may not bear it, as an expanded number
                        value.copy_(was)


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if a.dtype == torch.double else 2e-4
    scale = b.abs().max().item() if b.numel() else 0.0
    if not math.isfinite(scale):
        return not bool(a.isfinite().all())
    return bool(((a - b).abs() <= tolerance * scale + 1e-12).all())


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(batch)) if isinstance(leaf, Tensor)]
