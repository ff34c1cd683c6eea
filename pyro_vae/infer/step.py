"""Loss and gradients of a step of SVI as a function of tensors, which the compiler makes a graph of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, count
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from pyro_vae.compiler import CannotTrace, Graphed, restored
from pyro_vae.compiler.guards import Guards
from pyro_vae.data.batches import Batch
from pyro_vae.infer.validation import validity
from pyro_vae.pairs.preserve import KeepFrozen, modules_that_run, untouched
from pyro_vae.pairs.traces import Program

Traces = list[tuple[Trace, Trace]]


@contextmanager
def without_gradients(params: Sequence[Tensor]) -> Iterator[dict[int, Tensor | None]]:
    """Take the gradients away in the block, and restore them. Yields them by the ``id`` of their parameters."""
    before = {id(p): p.grad for p in params}
    for p in params:
        p.grad = None
    try:
        yield before
    finally:
        for p in params:
            p.grad = before[id(p)]


def surrogate(elbo: ELBO, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """The loss of one particle, and the surrogate whose gradient Pyro follows, both as tensors: those of ``Trace_ELBO`` and
    ``TraceMeanField_ELBO``, which read their loss as a number on the way."""
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
    """The pair makes parameters that are not in the param store yet: eager Pyro is to run once more."""


class GraphStep:
    """Loss and gradients of a pair for arguments of one signature, as a graph.

    :param tensors: the inputs of the graph.
    :param arguments: the function that puts such tensors back among the arguments; with ``as_floats`` those that stand for
        floats as floats.
    :param report: from the traces of a run and its gradients, further outputs of a step.
    :raises CannotTrace: where it cannot be a graph, or differs from eager Pyro.
    :raises NewParameters: where the pair makes parameters.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Program,
        guide: Program,
        tensors: Sequence[Tensor],
        arguments: Callable[..., Batch],
        report: Callable[[Traces, list[Tensor]], tuple[Tensor, ...]],
    ) -> None:
        self.elbo, self.model, self.guide, self.arguments, self.report = elbo, model, guide, arguments, report
        self.validate = Distribution._validate_args
        ran = self._find_parameters(tensors)
        self.guards = Guards([model, guide, *ran, elbo], self.params)
        writes = [*self.guards.buffers(), *self.params]
        self.graphed = Graphed(self._loss_and_gradients, kind="step of SVI", eager=self._eager, writes=writes)
        self.num_steps = self.num_comparisons = 0
        self.zeros: list[tuple[Tensor, Tensor, int]] = []  # the zero gradients that a step left, and their versions
        with self._perturbed(tensors):
            self.graphed.trace(tensors)
        self.guards.restrict([*self.graphed.held, *self.params])
        self._check_held(self.graphed.held)
        self.written, self.written_inputs = self._find_written(tensors)

    def _find_parameters(self, tensors: Sequence[Tensor]) -> Mapping[nn.Module, bool]:
        """Run the pair for the parameters that it trains; returns the modules that ran."""
        stored = [p for _, p in pyro.get_param_store().named_parameters()]
        roots = Guards([self.model, self.guide], stored)
        self.trainable = [value for value, _ in roots.tensors if value.is_leaf and value.requires_grad]
        with (
            restored([*roots.buffers(), *stored]), without_gradients(self.trainable) as before,
            untouched(), modules_that_run() as ran, poutine.trace(param_only=True) as capture, KeepFrozen(),
        ):  # fmt: skip
            batch = self.arguments([tensor.detach().clone() for tensor in tensors], as_floats=True)  # a pair may write them
            self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
            self.named = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
            found = [p for p in dict.fromkeys(self.named.values()) if p.requires_grad]  # one may have two names
            moved = {id(p) for p in found if p.grad is not None or before.get(id(p)) is not None}
        self.params = [p for p in found if id(p) in moved]  # Pyro updates these, if only by momentum
        self.idle = [p for p in found if id(p) not in moved]
        now = dict(pyro.get_param_store().named_parameters())
        for name, p in self.named.items():
            if now.get(name) is not p:
                raise NewParameters(name)
        return ran

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The loss ``()``, NaN where Pyro's validation would raise; the gradient of each of ``params``; the reported."""
        self.num_steps += 1
        loss, *others = self.graphed(*tensors)
        reported = others[len(self.params) :]
        if loss.is_cuda:  # the next replay of a CUDA graph writes over them
            reported = [value.clone() for value in reported]
        return loss, others[: len(self.params)], reported

    def before(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What a step on these tensors is about to write, with its values."""
        return [(value, value.clone()) for value in (*self.written, *(tensors[i] for i in self.written_inputs))]

    def changed(self) -> str:
        """What has changed since the graph was traced, or ``""``."""
        stored = dict(pyro.get_param_store().named_parameters())
        for name, p in self.named.items():
            if stored.get(name) is not p:
                return name
        if any(p.grad is not None for p in self.idle) or any(self.params[i].grad is None for i in self.drifting):
            return "which parameters have gradients"
        return self.guards.changed()

    def has_no_gradients(self) -> bool:
        """Whether there are no gradients to which Pyro would add those of the step. Leaves zeros, as Pyro does."""
        if self.zeros and all(p.grad is zeros and zeros._version == version for p, zeros, version in self.zeros):
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
        """Compile the graph by Inductor. Raises ``CannotTrace`` where that fails; the graph itself serves on."""
        with self._perturbed(tensors):
            self.graphed.compile(tensors)

    def compare(self, tensors: Sequence[Tensor]) -> None:
        """Compare the graph with eager Pyro at the same noise. Raises ``CannotTrace`` where they differ."""
        with self._perturbed(tensors):
            self.graphed.compare(tensors)

    @contextmanager
    def _perturbed(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Perturb the parameters by about one percent in the block: at an optimum a gradient is nothing but rounding errors.
        The seed is another at each comparison, so that what a graph stores as a constant differs."""
        noise = torch.Generator().manual_seed(1)
        self.num_comparisons += 1
        with restored([*self.graphed.writes, *tensors]):
            pyro.set_rng_seed(1 + self.num_comparisons)
            for p in self.params:
                p.data.add_(0.01 * (p.data.abs() + 0.1) * torch.randn(p.shape, generator=noise).to(p))
            yield

    def _loss_and_gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        batch = self.arguments(tensors)
        with KeepFrozen():
            traces = list(self.elbo._get_traces(self.model, self.guide, batch.args, batch.kwargs))
        losses = [surrogate(self.elbo, *pair) for pair in traces]
        total, followed = (sum(part) / self.elbo.num_particles for part in zip(*losses, strict=True))
        found = torch.autograd.grad(followed, self.params, allow_unused=True)
        for p, gradient in zip(self.params, found, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                raise CannotTrace(f"the gradient of a parameter of shape {tuple(p.shape)} is sparse")
        self.drifting = [i for i, gradient in enumerate(found) if gradient is None]
        with torch.no_grad():
            taken = {tensor.data_ptr() for tensor in (*tensors, *self.graphed.writes)}
            gradients = [_owned(p, gradient, taken) for p, gradient in zip(self.params, found, strict=True)]
            reported = self.report(traces, gradients)
            valid = list(validity(traces, default=self.validate))
            if valid:  # at NaN SVI repeats the step by eager Pyro, which raises
                total = torch.where(torch.stack(valid).all(), total, torch.nan)
        return total, *gradients, *reported

    def _eager(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradients of eager Pyro."""
        batch = self.arguments(tensors, as_floats=True)
        with without_gradients(self.trainable), KeepFrozen():
            loss = self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return torch.tensor(float(loss), dtype=torch.double), *gradients

    def _check_held(self, held: Sequence[Tensor]) -> None:
        known = {id(p) for p in (*self.params, *self.idle)}
        for value in held:
            if value.is_leaf and value.requires_grad and id(value) not in known:
                raise CannotTrace(
                    f"a parameter of shape {tuple(value.shape)} requires a gradient but is not in Pyro's param store, so that "
                    "no step trains it; register its network by pyro.module, or freeze it by requires_grad_(False)"
                )

    def _find_written(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The buffers and parameters that a step writes, and the places of the tensors that it writes among its inputs."""
        values = [*self.graphed.writes, *tensors]
        with restored(values):
            before = [(value._version, value.clone()) for value in values]
            self.graphed(*tensors)
            written = [  # batch normalization does not count up the version of what it writes
                value._version != version or not torch.equal(value, was)
                for value, (version, was) in zip(values, before, strict=True)
            ]
        n = len(self.graphed.writes)
        return list(compress(values, written[:n])), list(compress(count(), written[n:]))


def _owned(p: Tensor, gradient: Tensor | None, taken: set[int]) -> Tensor:
    """A gradient in the layout of its parameter and in memory that is not ``taken``, as ``backward()`` leaves it."""
    if gradient is None:
        return torch.zeros_like(p)
    if gradient.stride() != p.stride():
        gradient = gradient.contiguous() if p.is_contiguous() else torch.empty_like(p).copy_(gradient)
    if gradient.data_ptr() in taken:
        gradient = gradient.clone()
    taken.add(gradient.data_ptr())
    return gradient
