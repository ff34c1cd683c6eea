"""A step of SVI as a graph of tensor operations: loss and gradients of any pair, traced once through Pyro's own handlers.

The graph holds the parameters and buffers themselves, not copies, and draws its noise anew from torch's generator. What
Python decided while it was traced stays decided, so a graph comes with guards (everything that Python could have read) and is
held against eager Pyro at the same noise before it is used, and from time to time again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress, count
from typing import Any

import pyro
import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor, fx
from torch.distributions import Distribution, kl_divergence

from pyro_vae.batches import Batch
from pyro_vae.graphs import CannotTrace, compiled, said, trace_graph
from pyro_vae.infer.guards import Guards, Watch
from pyro_vae.infer.validation import conditions
from pyro_vae.pair import Program, untouched

Traces = list[tuple[Trace, Trace]]

_ROUNDINGS = 8  # by which parameters are moved, to see how far rounding errors reach
_SPREADS = 30  # of what that does, which another order of operations may do


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

    :param seen: what a step of eager Pyro on such arguments showed.
    :param report: from the traces of a run and its gradients, what else a step is to yield.
    :raises CannotTrace: where it cannot be one, or does not agree with eager Pyro.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Program,
        guide: Program,
        batch: Batch,
        seen: Watch,
        report: Callable[[Traces, list[Tensor]], tuple[Tensor, ...]],
    ) -> None:
        if type(elbo) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise CannotTrace(f"the loss is {type(elbo).__name__}; Trace_ELBO and TraceMeanField_ELBO are traced")
        if seen.reason:
            raise CannotTrace(seen.reason)
        self.elbo, self.model, self.guide, self.report = elbo, model, guide, report
        self.validate = Distribution._validate_args
        found = [p for p in dict.fromkeys(seen.params.values()) if p.requires_grad]  # one may have two names
        self.params = [p for p in found if p.grad is not None]  # Pyro moves them, were it by the momentum of an earlier step
        self.idle = [p for p in found if p.grad is None]
        self.guards = Guards(seen, (model, guide, elbo), self.params)
        read: set[int] = set()
        try:
            with self._restored():
                self.graph = self._trace(_copied(batch))
                self.run: Callable[..., Any] = self.graph
                read = {id(getattr(self.graph, str(node.target))) for node in self.graph.graph.find_nodes(op="get_attr")}
                self._check_read(read)
                self.check(batch)
                self._check_moved(batch)
        finally:
            self.guards.undo(read)
        self.written, self.overwritten = self._written(batch)
        self.grads: list[tuple[Tensor, Tensor | None, int]] = [(p, None, 0) for p in self.params]

    def __call__(self, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss ``()``, NaN where Pyro's validation would object; the gradient of each of ``params``; what ``report``
        yields."""
        with torch.no_grad():
            loss, *others = self.run(*batch.leaves())
            gradients, reported = others[: len(self.params)], others[len(self.params) :]
            if self.run is not self.graph and loss.is_cuda:  # the next replay writes over them
                reported = [value.clone() for value in reported]
        return loss, gradients, reported

    def holds(self) -> bool:
        """Whether all that Python decided while the graph was traced would be decided so again."""
        return (
            self.guards.hold()
            and all(p.grad is None for p in self.idle)
            and all(p.grad is not None for p in self.drifting)
        )  # fmt: skip

    def alone(self) -> bool:
        """Whether no gradients are there yet, to which Pyro would add those of the step. It leaves zeros, as Pyro does."""
        for i, (p, grad, version) in enumerate(self.grads):
            now = p.grad
            if now is None:
                now = p.grad = torch.zeros_like(p)
            if now is not grad or now._version != version:
                if now.any():
                    return False
                self.grads[i] = p, now, now._version
        return True

    def _trace(self, batch: Batch) -> fx.GraphModule:
        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = batch.with_leaves(tensors)
            total: Any = 0.0
            followed: Any = 0.0
            traces = []
            for pair in self.elbo._get_traces(self.model, self.guide, args, kwargs):
                loss, surrogate_loss = surrogate(self.elbo, *pair)
                total, followed = total + loss / self.elbo.num_particles, followed + surrogate_loss / self.elbo.num_particles
                traces.append(pair)
            found = torch.autograd.grad(followed, self.params, allow_unused=True)
            for p, gradient in zip(self.params, found, strict=True):
                if gradient is not None and gradient.layout is not torch.strided:
                    raise CannotTrace(f"the gradient of a parameter of shape {tuple(p.shape)} is sparse")
            self.drifting = [p for p, g in zip(self.params, found, strict=True) if g is None]
            with torch.no_grad():
                taken = {tensor.data_ptr() for tensor in tensors}
                gradients = [_laid_out(p, g, taken) for p, g in zip(self.params, found, strict=True)]
                reported = self.report(traces, gradients)
                asked = list(conditions(traces, default=self.validate))
                if asked:  # eager Pyro will say what is wrong
                    total = torch.where(torch.stack(asked).all(), total, math.nan)
            return total, *gradients, *reported

        return trace_graph(loss_and_gradients, batch.leaves())

    def _check_read(self, read: set[int]) -> None:
        known = {id(p) for p in (*self.params, *self.idle)}  # an idle one is registered, and gets no gradient
        for *_, value in self.guards.tensors:
            if value.is_leaf and value.requires_grad and id(value) in read and id(value) not in known:
                raise CannotTrace(
                    f"a parameter of shape {tuple(value.shape)} requires a gradient but is not in Pyro's param store, so that "
                    "no step trains it; register its network by pyro.module, or freeze it by requires_grad_(False)"
                )

    def _written(self, batch: Batch) -> tuple[list[Tensor], list[int]]:
        """What a step writes, be it the same numbers: buffers, such as running averages, or parameters; and which of its
        arguments."""
        own = [*self.guards.buffers(), *self.params]
        with self._restored():
            batch = _copied(batch)
            values = [*own, *batch.leaves()]
            before = [(value._version, value.clone()) for value in values]
            self(batch)
            moved = [  # batch normalization does not count up the version of what it writes
                value._version != version or not torch.equal(value, was)
                for value, (version, was) in zip(values, before, strict=True)
            ]
        return list(compress(own, moved)), list(compress(count(), moved[len(own) :]))

    def before(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What a step on these data is about to write, with its numbers."""
        if not self.written and not self.overwritten:
            return []
        leaves = batch.leaves()
        return [(value, value.clone()) for value in (*self.written, *(leaves[i] for i in self.overwritten))]

    def compile(self, batch: Batch) -> None:
        """Compile the graph by Inductor, its noise that of eager torch; on a GPU it is replayed as a CUDA graph. Raises
        ``CannotTrace`` where that fails; the graph itself serves on."""
        copied = _copied(batch).leaves()
        if any(ours.stride() != given.stride() for ours, given in zip(copied, batch.leaves(), strict=True)):
            raise CannotTrace("an argument has gaps in memory, or repeats itself there; pass x.contiguous()")
        try:
            self.run = compiled(self.graph, copied, cuda_graphs=any(p.is_cuda for p in self.params))
            self.check(batch)
        except Exception as error:
            self.run = self.graph
            raise CannotTrace(f"Inductor: {said(error)}") from error

    def _check_moved(self, batch: Batch) -> None:
        try:
            self.check(batch, moved=True)
        except CannotTrace:
            raise
        except Exception as error:  # parameters or rows that this pair cannot have
            raise CannotTrace(f"it could not be held against eager Pyro: {said(error)}") from error

    def check(self, batch: Batch, *, moved: bool = False) -> None:
        """Hold the graph against eager Pyro at the same noise: they may differ by a small part of what is largest, or, where
        that is rounding errors itself (at an optimum, where a loss comes close to zero), by not much more than eager Pyro
        differs from itself when its parameters are rounded a little.

        :param moved: with the parameters a little off, and the rows in another order.
        :raises CannotTrace: where loss, gradients or buffers differ.
        """
        order = torch.randperm(batch.num_rows if batch.tensors else 0, generator=torch.Generator().manual_seed(0))
        with self._restored():
            pyro.set_rng_seed(2 + moved)  # another than the traces had: noise that they kept must not agree by chance
            if moved:
                self._move(0.01, 0.1)
                batch = batch.map(lambda part: part[order.to(part.device)] if len(part) == len(order) else part)
            state = pyro.util.get_rng_state()
            with self._restored():
                loss, gradients, _ = self(_copied(batch))
                ours = [loss, *gradients, *(value.clone() for value in self.guards.buffers())]
            pyros = self._eager(batch, state)
            spreads = [0.0] * len(ours)
            if not all(map(_agree, ours, pyros, spreads)) and all(map(torch.equal, self._eager(batch, state), pyros)):
                spreads = self._spreads(batch, state, pyros)
        for i, (a, b, spread) in enumerate(zip(ours, pyros, spreads, strict=True)):
            if not _agree(a, b, spread):
                what = "the loss" if not i else f"the gradient of a parameter of shape {tuple(b.shape)}"
                what = what if i <= len(self.params) else f"a buffer of shape {tuple(b.shape)}"
                raise CannotTrace(
                    f"{what} is not that of eager Pyro at the same noise: something that Python reads or writes as the pair "
                    "runs (noise of another library, an attribute) is not in the graph"
                )

    def _move(self, by: float, least: float) -> None:
        """Move each parameter p by some ``by``·(|p| + ``least``)."""
        noise = torch.Generator().manual_seed(1)
        for p in self.params:
            p.data.add_(by * (p.data.abs() + least) * torch.randn(p.shape, generator=noise).to(p))

    def _eager(self, batch: Batch, state: Any) -> list[Tensor]:
        """Loss, gradients and buffers of eager Pyro, from that random state."""
        pyro.util.set_rng_state(state)
        with self._restored(), untouched():
            copied = _copied(batch)
            loss = self.elbo.loss_and_grads(self.model, self.guide, *copied.args, **copied.kwargs)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
            return [
                torch.tensor(float(loss), dtype=torch.double),
                *gradients,
                *(buffer.clone() for buffer in self.guards.buffers()),
            ]

    def _spreads(self, batch: Batch, state: Any, pyros: list[Tensor]) -> list[float]:
        """How far rounding errors reach in these numbers of eager Pyro; it moves the parameters."""
        eps = max(torch.finfo(p.dtype).eps for p in self.params)
        pyro.util.set_rng_state(state)
        with self._restored(), untouched(), torch.no_grad():
            copied = _copied(batch)
            traces = list(self.elbo._get_traces(self.model, self.guide, copied.args, copied.kwargs))
            sites = [site for pair in traces for trace in pair for site in trace.nodes.values() if "log_prob" in site]
            terms = sum(site["log_prob"].abs().sum().item() for site in sites) / self.elbo.num_particles
        self._move(_ROUNDINGS * eps, 1.0)
        loss, *others = (_distance(a, b) for a, b in zip(self._eager(batch, state), pyros, strict=True))
        return [max(loss, eps * terms), *others]  # densities of thousands may sum up to a loss near zero

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


def _agree(a: Tensor, b: Tensor, spread: float) -> bool:
    if not (b.is_floating_point() or b.is_complex()):  # a mask or a counter has no rounding errors
        return torch.equal(a, b)
    tolerance = 1e-8 if a.dtype == torch.double else 2e-4
    scale = _largest(b)
    if not math.isfinite(scale):
        return not bool(a.isfinite().all())
    return _distance(a, b) <= max(tolerance * scale + 1e-12, _SPREADS * spread)


def _distance(a: Tensor, b: Tensor) -> float:
    return _largest(a - b) if b.is_floating_point() or b.is_complex() else 0.0


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _laid_out(p: Tensor, gradient: Tensor | None, taken: set[int]) -> Tensor:
    """A gradient in the layout of its parameter, and in memory that no other has ``taken``, as ``backward`` leaves it."""
    if gradient is None:
        return torch.zeros_like(p)
    if gradient.stride() != p.stride() or gradient.data_ptr() in taken:
        return torch.empty_like(p).copy_(gradient)
    taken.add(gradient.data_ptr())
    return gradient


def _copied(batch: Batch) -> Batch:
    """The same numbers in other memory: what a pair does to its arguments stays without consequence."""
    return batch.with_leaves(leaf.detach().clone() for leaf in batch.leaves())
