"""A step of SVI as a graph of tensor operations: loss and gradients of any pair, traced once through Pyro's own handlers.

The graph holds the parameters and buffers themselves, not copies, and draws its noise anew from torch's generator. What
Python decided while it was traced stays decided, so a graph comes with guards (everything that Python could have read) and is
held against eager Pyro at the same noise before it is used, and from time to time again.
"""

import math
import os
import random
import traceback
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
from torch import Tensor
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.batches import Batch
from pyro_vae.infer.guards import CannotTrace, Guards
from pyro_vae.pair import Program, untouched

# Operations whose result depends on the values of tensors in its shape, or leaves the tensors.
_DYNAMIC = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "repeat_interleave.Tensor", "equal.default")


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


class Step:
    """Loss and gradients of a pair for arguments like these, as a graph.

    :raises CannotTrace: where it cannot be one, or does not agree with eager Pyro.
    """

    def __init__(self, elbo: ELBO, model: Program, guide: Program, batch: Batch) -> None:
        if type(elbo) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise CannotTrace(f"the loss is {type(elbo).__name__}; Trace_ELBO and TraceMeanField_ELBO are traced")
        self.elbo, self.model, self.guide = elbo, model, guide
        self.names = [key for key, part in _parts(batch) if isinstance(part, Tensor)]
        with untouched() as ran:
            others = random.getstate(), str(np.random.get_state())  # noqa: NPY002
            self.params = self._parameters(batch)
            if (random.getstate(), str(np.random.get_state())) != others:  # noqa: NPY002
                raise CannotTrace("the pair draws from Python's or numpy's generator, which is not in the graph")
        self.guards = Guards(ran, (model, guide, elbo), self.params)
        self.graph = self._trace(batch)
        self.guards.keep_read_by(self.graph)
        self.run: Callable[..., Any] = self.graph
        for moved in (True, False):
            try:
                self.check(batch, moved=moved)
            except CannotTrace:
                raise
            except Exception as error:  # parameters or rows that this pair cannot have
                raise CannotTrace(f"it could not be held against eager Pyro: {_said(error)}") from error

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The loss ``()`` and the gradient of each of ``params``, in their order."""
        with torch.no_grad():
            loss, *gradients = self.run(*self._tensors(batch))
        return loss, gradients

    def _tensors(self, batch: Batch) -> list[Tensor]:
        return [part for _, part in _parts(batch) if isinstance(part, Tensor)]

    def _parameters(self, batch: Batch) -> list[Tensor]:
        """What Pyro trains, unconstrained: the parameters that have a gradient."""
        with poutine.trace(param_only=True) as capture:
            self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
        found = {site["value"].unconstrained(): None for site in capture.trace.nodes.values()}
        used = [p for p in found if p.grad is not None and p.requires_grad]  # Pyro moves no other
        pyro.infer.util.zero_grads(used)
        return used

    def _trace(self, batch: Batch) -> torch.fx.GraphModule:
        fixed = dict(_parts(batch))

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            parts = fixed | dict(zip(self.names, tensors, strict=True))
            args = [parts[key] for key in parts if isinstance(key, int)]
            kwargs = {key: part for key, part in parts.items() if isinstance(key, str)}
            total: Any = 0.0
            followed: Any = 0.0
            for traces in self.elbo._get_traces(self.model, self.guide, args, kwargs):
                loss, surrogate_loss = surrogate(self.elbo, *traces)
                total, followed = total + loss / self.elbo.num_particles, followed + surrogate_loss / self.elbo.num_particles
            return total, *torch.autograd.grad(followed, self.params)

        graph, again = (self._traced(loss_and_gradients, batch, seed) for seed in (0, 1))
        for node in graph.graph.nodes:
            self._check_node(graph, again, node)
        return graph

    def _traced(self, f: Callable[..., Any], batch: Batch, seed: int) -> torch.fx.GraphModule:
        try:
            with untouched(seed=seed), pyro.validation_enabled(False):
                return make_fx(f)(*self._tensors(batch))
        except Exception as error:
            raise CannotTrace(_said(error)) from error

    def _check_node(self, graph: torch.fx.GraphModule, again: torch.fx.GraphModule, node: torch.fx.Node) -> None:
        target = str(node.target)
        by_mask = target == "aten.index.Tensor" and any(
            isinstance(index, torch.fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
            for index in node.args[1]  # type: ignore[union-attr]
        )
        if by_mask or any(name in target for name in _DYNAMIC):
            raise CannotTrace(f"the result of {target} has a shape that depends on values")
        if node.op == "get_attr":
            value, other = getattr(graph, target), getattr(again, target, None)
            if (
                isinstance(value, Tensor)
                and value is not other
                and not (isinstance(other, Tensor) and torch.equal(value, other))
            ):
                raise CannotTrace(
                    f"a tensor of shape {tuple(value.shape)} is made by Python as the pair runs, another each time, as by "
                    "numpy; a graph would keep it: draw it by torch"
                )

    def compile(self, batch: Batch) -> None:
        """Compile the graph by Inductor, its noise that of eager torch. Raises ``CannotTrace`` where that fails; the graph
        itself serves on."""
        self.run = torch.compile(self.graph, fullgraph=True, options={"fallback_random": True})
        try:
            self.check(batch)  # Inductor compiles at the first call
        except Exception as error:
            self.run = self.graph
            raise CannotTrace(f"Inductor: {_said(error)}") from error

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
                loss, gradients = self(batch)
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


def _said(error: Exception) -> str:
    """The first sentence of an error, and the line outside of torch that it came from."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in line.filename]
    at = f" at {os.path.basename(lines[-1].filename)}:{lines[-1].lineno}, {lines[-1].line}" if lines else ""
    return f"{type(error).__name__}{at}: {str(error).strip().splitlines()[0].split('. ')[0]}"


def _agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if a.dtype == torch.double else 2e-4
    scale = b.abs().max().item() if b.numel() else 0.0
    if not math.isfinite(scale):
        return not bool(a.isfinite().all())
    return bool(((a - b).abs() <= tolerance * scale + 1e-12).all())


def _parts(batch: Batch) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(batch.args)
    yield from batch.kwargs.items()
