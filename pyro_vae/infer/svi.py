"""Pyro's SVI with a step that runs as a graph of tensor operations where that is possible."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from inspect import signature as signature_of
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from pyro_vae.data.batches import Batch
from pyro_vae.infer.objectives import Objective, Step
from pyro_vae.infer.signals import interruptible
from pyro_vae.pairs.check import refuse
from pyro_vae.pairs.graphs import can_compile
from pyro_vae.pairs.preserve import KeepFrozen, modules_that_run
from pyro_vae.pairs.problems import Problem, pair_problems, training_problems
from pyro_vae.pairs.structure import Structure, inspect, structure_of_run
from pyro_vae.pairs.traces import Program, Recorded, sampled

logger = logging.getLogger(__name__)
Compile = Literal["auto", "trace"] | bool

_COMPARE_AT, _COMPARE_EVERY = (10, 100), 1000  # steps of a graph at which it is compared with eager Pyro
_MAX_BUILDS = 16  # graphs of one signature, after which it runs as eager Pyro
_MAX_SIGNATURES = 64  # signatures, after which others run as eager Pyro
_NUM_FLOATS = 3  # values of floating arguments at which a graph is compared with eager Pyro
_TRACED = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)


class SVI(pyro.infer.SVI):
    """``pyro.infer.SVI`` with a faster step: the same constructor, ``step`` and ``evaluate_loss``.

    Loss and gradients are traced through Pyro's handlers into a graph of tensor operations. There is one
    graph for each signature of the arguments: shapes, dtypes and devices of tensors, and values of other
    arguments except floats. Adam and AdamW update all parameters in one call. Steps that cannot be traced run
    as eager Pyro, and the reason is logged once.

    **Contract**, the same as that of ``jax.jit``: the Python code of a pair runs once for each signature. The
    graph is traced again when parameters or buffers are replaced, frozen or moved, when training flags or
    hooks change, and when plain values (numbers, strings) change: attributes of the modules that ran, and
    closure variables and globals of the pair's functions. After any other change call :meth:`retrace`. The
    graph is compared with eager Pyro at the same noise when it is traced, at its 10th and 100th step and at
    every 1000th. If they differ, this is logged, and further steps run as eager Pyro. Tracing and comparing
    a graph runs the pair a few more times, which matters to a pair that counts its runs.

    The public interface is ``step``, ``evaluate_loss``, :meth:`explain`, :meth:`retrace`, the attribute
    ``compile``, and the interface of ``pyro.infer.SVI``.

    :param optim: one of Pyro's optimizers, or a ``torch.optim.Optimizer`` over the pair's parameters.
    :param loss: one of Pyro's ELBO objects, of which ``Trace_ELBO``, ``TraceMeanField_ELBO`` and
        ``TraceEnum_ELBO`` are traced, or an :class:`~pyro_vae.infer.Objective`, such as
        :class:`~pyro_vae.infer.IWAE`.
    :param compile: ``"trace"``: a graph from the second step on; tracing takes about a second. ``True``: a
        graph compiled by Inductor, which takes from some seconds to a minute. ``"auto"``: a graph after 100
        steps of one signature, and Inductor after 5000 if there is a C++ compiler. ``False``: eager Pyro.
    :param check: validate the pair at the first step, before parameters are updated (see
        :func:`~pyro_vae.check_pair`).
    :raises ValueError: for another ``compile``, an optimizer whose step needs a closure (LBFGS), a torch
        optimizer that lacks one of the pair's parameters, or, with ``check``, an invalid pair.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Any,
        loss: Any,
        *args: Any,
        compile: Compile = "auto",
        check: bool = True,
        **kwargs: Any,
    ) -> None:
        if compile not in ("auto", "trace", True, False):
            raise ValueError(f'compile: expected "auto", "trace", True or False but got {compile!r}')
        check_optimizer(optim)
        if isinstance(optim, torch.optim.Optimizer):
            optim = OneOptimizer(optim)
        super().__init__(model, guide, optim, loss, *args, **kwargs)
        self._elbo, self.compile = loss, compile
        self._check, self._is_elbo = check, isinstance(loss, ELBO)  # Pyro calls anything else as a function
        self._loss_and_grads: Any = self.loss_and_grads
        self.loss_and_grads: Any = self._first_loss_and_grads
        self._eager_steps: Counter[str] = Counter()  # steps for which no graph was tried, by the reason
        self._restored_graphs: frozenset[str] = frozenset()  # names of signatures, see _restore_graphs
        self._logged: set[str] = set()
        self.retrace()

    def retrace(self) -> None:
        """Discard all graphs. Call this after a change that no guard detects (see the contract above)."""
        self._signatures: dict[Hashable, _Signature] = {}
        self._floats_by_value = False  # whether floats are part of a signature, and not inputs of a graph

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_signatures": {}, "_eager_steps": Counter()}  # a copy retraces its graphs

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the optimizer. Returns the loss, an estimate of −ELBO in nats."""
        return self._step(Batch(args, kwargs))

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, an estimate of −ELBO in nats, without gradients."""
        with KeepFrozen():
            return super().evaluate_loss(*args, **kwargs)

    def explain(self) -> str:
        """How the steps ran: a line for each signature, and for each reason why steps without a signature
        ran as eager Pyro."""
        lines = [
            f"{signature.name}: {signature.how}, {signature.count} steps"
            for signature in self._signatures.values()
        ]
        lines += [f"eager Pyro: {reason}, {count} steps" for reason, count in self._eager_steps.items()]
        return "\n".join(lines) or (
            "eager Pyro: compile=False" if self.compile is False else "no step has run yet"
        )

    def _first_loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Loss and gradients of the first step. Raises ``ValueError`` for an invalid pair."""
        self.loss_and_grads = self._loss_and_grads
        if isinstance(self._elbo, Objective):
            return self._first_objective(model, guide, Batch(args, kwargs))
        handlers = [Recorded(), Recorded()]
        programs = [handler(program) for handler, program in zip(handlers, (model, guide), strict=True)]
        check = self._check and not isinstance(poutine.unwrap(guide), GuideMessenger)
        failure: Exception | None = None
        value: Any = None
        before = dict(pyro.get_param_store().named_parameters())
        with modules_that_run() as ran:
            try:
                value = self.loss_and_grads(*(programs if check else (model, guide)), *args, **kwargs)
            except Exception as error:
                failure = error
        problems: list[Problem] = []
        if check and all(handler.traces for handler in handlers):
            traces = handlers[0].traces[-1], handlers[1].traces[-1]
            now = pyro.get_param_store().named_parameters()
            created = {name: value for name, value in now if before.get(name) is not value}
            pair = structure_of_run(self.model, self.guide, Batch(args, kwargs), traces, ran, created)
            problems = self._problems(pair, whole=failure is None)
        if problems:
            self.loss_and_grads = self._first_loss_and_grads
            pyro.infer.util.zero_grads(p for _, p in pyro.get_param_store().named_parameters())
        refuse(problems, verb="SVI")
        if failure is not None:
            raise failure
        return value

    def _first_objective(self, model: Program, guide: Program, batch: Batch) -> Any:
        """Loss and gradients of the first step of an objective, which inspects the pair itself."""
        try:
            if self._check:
                refuse(training_problems(inspect(model, guide, batch, training=True)), verb="SVI")
            self._elbo.prepare(model, guide, batch, check=self._check)
        except Exception:
            self.loss_and_grads = self._first_loss_and_grads
            raise
        return self.loss_and_grads(model, guide, *batch.args, **batch.kwargs)

    def _problems(self, pair: Structure, *, whole: bool) -> list[Problem]:
        """The problems of the pair in the traces of its first step. ``whole``: the step raised no error."""
        sites = [site for trace in pair.traces for _, site in sampled(trace)]
        if any(site["infer"].get("_enumerate_dim") is not None for site in sites):
            return []  # the values have additional dimensions for enumeration
        try:
            return [*pair_problems(pair), *(training_problems(pair) if whole else ())]
        except Exception as error:  # the step failed, too, and its error is raised by the caller
            logger.debug("SVI: the pair was not checked: %s", error)
            return []

    def _step(self, batch: Batch) -> Any:
        # values of _extra_outputs; None if eager Pyro ran the step
        self._extra: Sequence[Tensor] | None = None
        reason = self._reason_for_eager()
        signature = None if reason else self._signature(batch)
        if signature is None:
            reason = reason or f"more than {_MAX_SIGNATURES} signatures of arguments"
            if self.compile is not False and can_compile():
                self._log(f"runs as eager Pyro: {reason}")
            self._eager_steps[reason] += 1
            return self._eager_step(batch)
        failure = self._prepare(signature, batch)
        if signature.step is not None and signature.step.has_no_gradients():
            return self._graph_step(signature, batch)
        value = self._eager_step(batch)
        if failure:  # the eager step succeeded, so only the graph fails
            self._run_eagerly(signature, failure)
        return value

    def _eager_step(self, batch: Batch) -> Any:
        with KeepFrozen():
            return super().step(*batch.args, **batch.kwargs)

    def _graph_step(self, signature: "_Signature", batch: Batch) -> Any:
        tensors = signature.inputs(batch)
        on_gpu = any(tensor.is_cuda for tensor in signature.step.params)
        state = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
        before = signature.step.before(tensors)
        failure: Exception | None = None
        try:
            loss, gradients, reported = signature.step(tensors)
            value = loss.item()
        except Exception as error:  # for example, a matrix without a Cholesky factor
            failure, value = error, math.nan
        if not math.isfinite(value):  # repeat the step by eager Pyro, whose validation raises
            torch.set_rng_state(state[0])
            if on_gpu:
                torch.cuda.set_rng_state_all(state[1])
            with torch.no_grad():
                for tensor, saved in before:
                    tensor.copy_(saved)
            value = self._eager_step(batch)
            if failure is not None:
                from pyro_vae.compiler import describe

                self._run_eagerly(signature, f"the graph failed but eager Pyro did not: {describe(failure)}")
            return value
        self._extra = reported
        signature.update(self._before_update(signature.step.params, gradients))
        return value

    def _before_update(
        self,
        params: Sequence[Tensor],  # noqa: ARG002
        gradients: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Called after the gradients are computed and before the optimizer's update. Returns the gradients
        for the update, ``None`` for parameters that it leaves unchanged. A subclass may raise."""
        return gradients

    def _extra_outputs(self, step: Step, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Additional outputs of a graph, computed from the evaluated loss and the gradients. After a step of
        the graph ``_extra`` contains their values."""
        return ()

    def _graph_names(self) -> list[str]:
        """Names of the signatures that have or may get a graph. A graph rounds differently from eager Pyro,
        so a resumed fit needs them to reproduce each step."""
        has_graph = dict.fromkeys(self._restored_graphs, True) | {
            signature.name: signature.count > 0 and not signature.always_eager
            for signature in self._signatures.values()
        }
        return [name for name, value in has_graph.items() if value]

    def _restore_graphs(self, names: Collection[str]) -> None:
        """Run these signatures as graphs from their first step on; see :meth:`_graph_names`."""
        self._restored_graphs = frozenset(names)

    def _reason_for_eager(self) -> str:
        """Why a step runs as eager Pyro for all arguments; ``""`` if it may run as a graph."""
        if self.compile is False:
            return "compile=False"
        if not self._is_elbo:
            return "the loss is a function, and not an ELBO object"
        if type(self._elbo) not in _TRACED and not isinstance(self._elbo, Objective):
            traced = ", ".join(kind.__name__ for kind in _TRACED)
            return f"the loss is {type(self._elbo).__name__}; {traced} and objectives of pyro_vae are traced"
        if getattr(self.loss_and_grads, "__self__", None) not in (self._elbo, self):
            return "loss_and_grads is not the method of the loss"
        if _PYRO_STACK:
            return "the step runs in a Pyro handler, which a graph does not apply"
        return "" if can_compile() else "pyro_vae.compiler cannot be imported"

    def _signature(self, batch: Batch) -> "_Signature | None":
        """The signature of the arguments; ``None`` if there are too many."""
        leaves, structure = pytree.tree_flatten(tuple(batch))
        modes = (
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            Distribution._validate_args,
        )
        key = (modes, structure, *(_key(leaf, self._floats_by_value) for leaf in leaves))
        signature = self._signatures.get(key)
        if signature is None and len(self._signatures) < _MAX_SIGNATURES:
            signature = self._signatures[key] = _Signature(leaves, self._floats_by_value)
            if reason := _reason_for_invalid_inputs(leaves):
                self._run_eagerly(signature, reason)
            if len(self._signatures) == _MAX_SIGNATURES:
                self._log(
                    f"{_MAX_SIGNATURES} signatures of arguments: others run as eager Pyro; pass numbers as "
                    "tensors"
                )
        return signature

    def _prepare(self, signature: "_Signature", batch: Batch) -> str:
        """Trace, compile or compare the graph of a signature if that is due. Returns the reason of a failure
        that the eager step may share, or ``""``."""
        from pyro_vae.compiler import THRESHOLDS, CannotTrace, describe

        signature.count += 1
        limits = THRESHOLDS["step of SVI"]
        due = (
            signature.count > (limits.trace if self.compile == "auto" else 1)
            or signature.name in self._restored_graphs
        )
        if signature.always_eager or not due:
            return ""
        try:
            if signature.step is not None:
                changed = (
                    "a program, the loss or the optimizer"
                    if self._is_replaced(signature)
                    else signature.step.changed()
                )
                if changed:
                    signature.step, signature.how = (
                        None,
                        f"eager Pyro: {changed} changed; traced again at the next step",
                    )
                    return ""
            else:
                with interruptible():
                    self._build(signature, batch)
            if signature.step is not None:
                n = signature.step.num_steps + 1
                if signature.has_new_floats(batch) or n in _COMPARE_AT or n % _COMPARE_EVERY == 0:
                    signature.step.compare(signature.inputs(batch))
                if self.compile == "auto" and signature.count == limits.compile:
                    with interruptible():
                        self._compile(signature, batch)
        except Exception as error:
            signature.step, signature.how = None, f"eager Pyro: {describe(error)}"
            if signature.has_floats:  # Python may branch on the value of a float
                self._floats_by_value = True
            elif isinstance(error, CannotTrace):
                self._run_eagerly(signature, str(error))
            else:  # if the pair itself fails on these data, the eager step raises
                return describe(error)
        return ""

    def _is_replaced(self, signature: "_Signature") -> bool:
        step = signature.step
        return (self.model, self.guide, self._elbo, self.optim) != (
            step.model,
            step.guide,
            step.elbo,
            signature.update.optim,
        )

    def _build(self, signature: "_Signature", batch: Batch) -> None:
        """Trace the graph of a signature, and compile it if ``compile`` is ``True``."""
        from pyro_vae.compiler import CannotTrace
        from pyro_vae.compiler.optim import FusedAdam
        from pyro_vae.infer.step import GraphStep, NewParameters

        signature.num_builds += 1
        if signature.num_builds > _MAX_BUILDS:
            raise CannotTrace(f"{_MAX_BUILDS} graphs were traced, and the pair changed after each")
        tensors, arguments = signature.inputs(batch), signature.arguments(batch)
        try:
            step = GraphStep(self._elbo, self.model, self.guide, tensors, arguments, self._extra_outputs)
        except NewParameters as name:
            signature.how = f"eager Pyro: the pair made the parameter {str(name)!r}; traced at the next step"
            return
        signature.step, signature.update, signature.how = step, FusedAdam(self.optim, step.params), "traced"
        if self.compile is True:
            self._compile(signature, batch)

    def _compile(self, signature: "_Signature", batch: Batch) -> None:
        from pyro_vae.compiler import CannotTrace, has_compiler

        if self.compile == "auto" and not has_compiler():
            return
        logger.info("compiling the step for %s …", signature.name)
        try:
            signature.step.compile(signature.inputs(batch))
            signature.how = "compiled by Inductor"
        except CannotTrace as reason:
            signature.how = f"traced ({reason})"
            logger.warning("SVI: %s: not compiled: %s", signature.name, reason)

    def _run_eagerly(self, signature: "_Signature", reason: str) -> None:
        """Run steps of this signature as eager Pyro from now on."""
        signature.step, signature.always_eager, signature.how = None, True, f"eager Pyro: {reason}"
        self._log(f"{signature.name} runs as eager Pyro: {reason}", reason)

    def _log(self, text: str, reason: str = "") -> None:
        """Log a line once for each reason."""
        if (reason or text) not in self._logged:
            self._logged.add(reason or text)
            logger.warning("SVI: %s", text)


class _Signature:
    """One signature of arguments: the number of its steps, and its graph or the reason for eager steps."""

    def __init__(self, leaves: Sequence[Any], floats_by_value: bool) -> None:
        is_float_input = [_is_float(leaf) and not floats_by_value for leaf in leaves]
        self.inputs_at = [
            i
            for i, (leaf, is_float) in enumerate(zip(leaves, is_float_input, strict=True))
            if isinstance(leaf, Tensor) or is_float
        ]
        self.has_floats = any(is_float_input)
        self.floats: set[tuple[float, ...]] = set()  # values at which the graph was compared with eager Pyro
        self.name = ", ".join(
            "float" if is_float else _name(leaf)
            for leaf, is_float in zip(leaves, is_float_input, strict=True)
        )
        self.count = self.num_builds = 0
        self.step: Any = None
        self.update: Any = None  # the optimizer's update of the parameters
        self.how, self.always_eager = "eager Pyro: the first steps", False

    def inputs(self, batch: Batch) -> list[Tensor]:
        """The inputs of the graph: the tensors among the arguments, and the floats as tensors ``()``."""
        leaves = pytree.tree_leaves(tuple(batch))
        inputs = (leaves[i] for i in self.inputs_at)
        return [
            leaf if isinstance(leaf, Tensor) else torch.tensor(float(leaf), dtype=torch.double)
            for leaf in inputs
        ]

    def has_new_floats(self, batch: Batch) -> bool:
        """Whether the floats among the arguments have new values, for the first few values: Python may use
        a float as a dictionary key."""
        if not self.has_floats or len(self.floats) == _NUM_FLOATS:
            return False
        num_known = len(self.floats)
        self.floats.add(tuple(float(leaf) for leaf in pytree.tree_leaves(tuple(batch)) if _is_float(leaf)))
        return len(self.floats) > num_known

    def arguments(self, batch: Batch) -> Any:
        """The inverse of :meth:`inputs`: a function that returns the arguments for given inputs. With
        ``as_floats`` it converts tensors that stand for floats to floats."""
        leaves, structure = pytree.tree_flatten(tuple(batch))
        # without the tensors, so that the function does not keep the batch in memory
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def arguments(tensors: Sequence[Tensor], *, as_floats: bool = False) -> Batch:
            leaves = list(others)
            for i, tensor in zip(self.inputs_at, tensors, strict=True):
                leaves[i] = tensor.item() if as_floats and _is_float(others[i]) else tensor
            return Batch(*pytree.tree_unflatten(leaves, structure))

        return arguments


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, float | np.floating)


def _reason_for_invalid_inputs(leaves: Sequence[Any]) -> str:
    """Why these arguments cannot be inputs of a graph, or ``""``."""
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, np.floating, *_PLAIN)):
            name = type(leaf).__name__
            return f"an argument is of type {name}, whose changes a graph cannot detect; pass tensors"
        if isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.layout is not torch.strided):
            return "an argument is sparse or requires a gradient, which a graph does not support"
    return ""


def _key(leaf: Any, floats_by_value: bool) -> Hashable:
    if isinstance(leaf, Tensor):
        strided = leaf.layout is torch.strided
        return (
            leaf.shape,
            leaf.stride() if strided else leaf.layout,
            leaf.dtype,
            leaf.device,
            leaf.requires_grad,
        )
    if _is_float(leaf):
        return float, float(leaf) if floats_by_value else None
    return type(leaf), leaf if isinstance(leaf, _PLAIN) else None


def _name(leaf: Any) -> str:
    return (
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
    )


def check_optimizer(optim: Any) -> None:
    """Raise ``ValueError`` for an optimizer whose step needs a closure that computes the loss."""
    kind: Any = (
        type(optim)
        if isinstance(optim, torch.optim.Optimizer)
        else getattr(optim, "pt_optim_constructor", None)
    )
    step = getattr(kind, "step", None)
    closure = (
        signature_of(step).parameters.get("closure") if isinstance(kind, type) and step is not None else None
    )
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optim: a step of {getattr(kind, '__name__', kind)} computes the loss by a closure, which SVI "
            "does not pass; expected an optimizer that needs one gradient for each step, such as "
            "pyro.optim.Adam, or call optimizer.step(closure) without SVI, where the closure computes "
            "Trace_ELBO().differentiable_loss(model, guide, x) and its gradients"
        )


class OneOptimizer(PyroOptim):
    """Adapter from a torch optimizer over a pair's parameters to the interface of Pyro's optimizers."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        registered = {p for group in self.optimizer.param_groups for p in group["params"]}
        for p in params:
            if p not in registered:
                raise ValueError(
                    f"optim: the pair trains a parameter of shape {tuple(p.shape)} that "
                    f"{type(self.optimizer).__name__} does not have; expected an optimizer over all "
                    "parameters: create the pair first, or pass one of Pyro's optimizers"
                )
        self.optimizer.step(*args, **kwargs)
