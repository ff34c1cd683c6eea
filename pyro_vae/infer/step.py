"""Loss and gradients of a step of SVI as a function of tensors, which the compiler traces into a graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from pyro_vae.compiler import CannotTrace, Graphed, restored
from pyro_vae.compiler.guards import Guards
from pyro_vae.data.batches import Batch
from pyro_vae.infer.objectives import Objective, Step
from pyro_vae.infer.validation import validity
from pyro_vae.pairs.preserve import KeepFrozen, modules_that_run, untouched
from pyro_vae.pairs.traces import Program


@contextmanager
def without_gradients(params: Sequence[Tensor]) -> Iterator[dict[int, Tensor | None]]:
    """Set the gradients of the parameters to ``None`` in the block, and restore them after it. Yields the
    gradients by the ``id`` of their parameters."""
    before = {id(p): p.grad for p in params}
    for p in params:
        p.grad = None
    try:
        yield before
    finally:
        for p in params:
            p.grad = before[id(p)]


def evaluate_loss(elbo: ELBO, model: Program, guide: Program, batch: Batch) -> Step:
    """Evaluate a loss as tensors, where Pyro's own ELBO classes convert it to a number."""
    if isinstance(elbo, Objective):
        return elbo.step(model, guide, batch)
    traces = list(elbo._get_traces(model, guide, batch.args, batch.kwargs))
    if type(elbo) is TraceEnum_ELBO:
        total = -sum(_compute_dice_elbo(*pair) for pair in traces) / elbo.num_particles
        return Step(total.detach(), total, None, traces)
    particles = [surrogate(elbo, *pair) for pair in traces]
    loss, surrogate_loss = (sum(part) / elbo.num_particles for part in zip(*particles, strict=True))
    return Step(loss, surrogate_loss, None, traces)


def surrogate(elbo: ELBO, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """The loss of one particle, and the surrogate loss whose gradient Pyro computes, both as tensors ``()``.

    They equal those of ``Trace_ELBO`` and ``TraceMeanField_ELBO``, which convert the loss to a number.
    """
    if type(elbo) is TraceMeanField_ELBO:
        loss = -_mean_field(model_trace, guide_trace)
        return loss.detach(), loss
    value = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    total, log_r = model_trace.log_prob_sum(), None
    for site in guide_trace.nodes.values():
        if site["type"] != "sample":
            continue
        _, score, entropy = site["score_parts"]
        if not is_identically_zero(entropy):
            total = total - entropy.sum()
        if not is_identically_zero(score):
            log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
            total = total + (log_r.sum_to(site["cond_indep_stack"]) * score).sum()
    return -value.detach(), -total


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


class NewParameters(Exception):
    """The pair makes parameters that are not in the param store yet, so eager Pyro has to run first."""


class GraphStep:
    """Loss and gradients of a pair for arguments of one signature, as a graph.

    :param tensors: the inputs of the graph.
    :param arguments: a function that turns such tensors into the arguments of the pair. With ``as_floats``,
        tensors that stand for floats become floats.
    :param report: a function of the evaluated loss and the gradients that returns further outputs of a step.
    :raises CannotTrace: if the step cannot run as a graph, or the graph differs from eager Pyro.
    :raises NewParameters: if the pair makes parameters.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Program,
        guide: Program,
        tensors: Sequence[Tensor],
        arguments: Callable[..., Batch],
        report: Callable[[Step, list[Tensor]], tuple[Tensor, ...]],
    ) -> None:
        self.elbo, self.model, self.guide = elbo, model, guide
        self.arguments, self.report = arguments, report
        self.validate = Distribution._validate_args
        ran = self._find_parameters(tensors)
        self.guards = Guards([model, guide, *ran, elbo], self.params)
        writes = [*self.guards.buffers(), *self.params]
        self.graphed = Graphed(self._loss_and_gradients, kind="step of SVI", eager=self._eager, writes=writes)
        self.num_steps = self.num_comparisons = 0
        # parameters, their zero gradients, and the versions of the gradients
        self.zeros: list[tuple[Tensor, Tensor, int]] = []
        with self._perturbed(tensors):
            self.graphed.trace(tensors)
        self.guards.drop_replaced([*self.graphed.captured, *self.params])
        self._check_captured(self.graphed.captured)
        self.written, self.written_inputs = self._find_written(tensors)

    def _find_parameters(self, tensors: Sequence[Tensor]) -> Mapping[nn.Module, bool]:
        """Run the pair to find the parameters that it trains. Returns the modules that ran."""
        stored = [p for _, p in pyro.get_param_store().named_parameters()]
        guards = Guards([self.model, self.guide], stored)
        self.trainable = [value for value, _ in guards.tensors if value.is_leaf and value.requires_grad]
        with (
            restored([*guards.buffers(), *stored]), without_gradients(self.trainable) as before,
            untouched(), modules_that_run() as ran, poutine.trace(param_only=True) as capture, KeepFrozen(),
        ):  # fmt: skip
            copies = [tensor.detach().clone() for tensor in tensors]  # the pair may write its arguments
            batch = self.arguments(copies, as_floats=True)
            self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
            self.named = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
            unique = dict.fromkeys(self.named.values())  # a parameter may have two names
            registered = [p for p in unique if p.requires_grad]
            updated = {id(p) for p in registered if p.grad is not None or before.get(id(p)) is not None}
        # Pyro updates the parameters that have a gradient, even a zero gradient of an earlier step
        self.params = [p for p in registered if id(p) in updated]
        self.not_updated = [p for p in registered if id(p) not in updated]
        store = dict(pyro.get_param_store().named_parameters())
        for name, p in self.named.items():
            if store.get(name) is not p:
                raise NewParameters(name)
        return ran

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Return the loss, a scalar tensor that is NaN if Pyro's validation would raise; the gradient of each
        of ``params``; and the outputs of ``report``."""
        self.num_steps += 1
        loss, *others = self.graphed(*tensors)
        reported = others[len(self.params) :]
        if loss.is_cuda:  # the next replay of a CUDA graph overwrites them
            reported = [value.clone() for value in reported]
        return loss, others[: len(self.params)], reported

    def before(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The tensors that a step on these inputs writes, with copies of their current values."""
        written = (*self.written, *(tensors[i] for i in self.written_inputs))
        return [(value, value.clone()) for value in written]

    def changed(self) -> str:
        """The name of what has changed since the graph was traced, or ``""``."""
        store = dict(pyro.get_param_store().named_parameters())
        for name, p in self.named.items():
            if store.get(name) is not p:
                return name
        unused = (self.params[i] for i in self.without_gradient)
        if any(p.grad is not None for p in self.not_updated) or any(p.grad is None for p in unused):
            return "which parameters have gradients"
        return self.guards.changed()

    def has_no_gradients(self) -> bool:
        """Whether all gradients are zero, so that Pyro would add nothing to those of the step. Sets missing
        gradients to zeros, as a step of Pyro does."""
        if self.zeros and all(
            p.grad is zeros and zeros._version == version for p, zeros, version in self.zeros
        ):
            return True
        self.zeros = []
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.any():
                return False
        self.zeros = [(p, p.grad, p.grad._version) for p in self.params if p.grad is not None]
        return True

    def compile(self, tensors: Sequence[Tensor]) -> None:
        """Compile the graph by Inductor. If that raises ``CannotTrace``, the graph is still used."""
        with self._perturbed(tensors):
            self.graphed.compile(tensors)

    def compare(self, tensors: Sequence[Tensor]) -> None:
        """Compare the graph with eager Pyro at the same noise. Raises ``CannotTrace`` if they differ."""
        with self._perturbed(tensors):
            self.graphed.compare(tensors)

    @contextmanager
    def _perturbed(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Perturb the parameters by about one percent in the block, since at an optimum gradients are only
        rounding errors. Each comparison uses a new seed: a graph that wrongly stores noise as a constant
        then differs from eager Pyro."""
        generator = torch.Generator().manual_seed(1)
        self.num_comparisons += 1
        with restored([*self.graphed.writes, *tensors]):
            pyro.set_rng_seed(1 + self.num_comparisons)
            for p in self.params:
                noise = torch.randn(p.shape, generator=generator).to(p)
                p.data.add_(0.01 * (p.data.abs() + 0.1) * noise)
            yield

    def _loss_and_gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        batch = self.arguments(tensors)
        with KeepFrozen():
            step = evaluate_loss(self.elbo, self.model, self.guide, batch)
        loss = step.loss
        computed = torch.autograd.grad(step.surrogate, self.params, allow_unused=True)
        for p, gradient in zip(self.params, computed, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                raise CannotTrace(f"the gradient of a parameter of shape {tuple(p.shape)} is sparse")
        self.without_gradient = [i for i, gradient in enumerate(computed) if gradient is None]
        with torch.no_grad():
            used = {tensor.data_ptr() for tensor in (*tensors, *self.graphed.writes)}
            gradients = [
                _materialize(p, gradient, used) for p, gradient in zip(self.params, computed, strict=True)
            ]
            reported = self.report(step, gradients)
            valid = list(validity(step.traces, default=self.validate))
            if valid:  # for a NaN loss SVI repeats the step by eager Pyro, which raises
                loss = torch.where(torch.stack(valid).all(), loss, torch.nan)
        return loss, *gradients, *reported

    def _eager(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradients of eager Pyro."""
        batch = self.arguments(tensors, as_floats=True)
        with without_gradients(self.trainable), KeepFrozen():
            loss = self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return torch.tensor(float(loss), dtype=torch.double), *gradients

    def _check_captured(self, captured: Sequence[Tensor]) -> None:
        registered = {id(p) for p in (*self.params, *self.not_updated)}
        for value in captured:
            if value.is_leaf and value.requires_grad and id(value) not in registered:
                raise CannotTrace(
                    f"a parameter of shape {tuple(value.shape)} requires a gradient but is not in Pyro's "
                    "param store, so no step trains it; register its network by pyro.module, or freeze it by "
                    "requires_grad_(False)"
                )

    def _find_written(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The buffers and parameters that a step writes, and the indices of the inputs that it writes."""
        values = [*self.graphed.writes, *tensors]
        with restored(values):
            before = [(value._version, value.clone()) for value in values]
            self.graphed(*tensors)
            is_written = [  # batch normalization does not increase the version of its statistics
                value._version != version or not torch.equal(value, old)
                for value, (version, old) in zip(values, before, strict=True)
            ]
        n = len(self.graphed.writes)
        return list(compress(values, is_written[:n])), list(compress(count(), is_written[n:]))


def _materialize(p: Tensor, gradient: Tensor | None, used: set[int]) -> Tensor:
    """A gradient as ``backward()`` stores it: in the layout of its parameter, in memory that is not in
    ``used``."""
    if gradient is None:
        return torch.zeros_like(p)
    if gradient.stride() != p.stride():
        gradient = gradient.contiguous() if p.is_contiguous() else torch.empty_like(p).copy_(gradient)
    if gradient.data_ptr() in used:
        gradient = gradient.clone()
    used.add(gradient.data_ptr())
    return gradient
