"""Pyro's SVI, its step a graph where it can be one."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from inspect import signature as signature_of
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from pyro_vae.batches import Batch
from pyro_vae.check import refuse
from pyro_vae.graphs import CannotTrace, has_compiler, said
from pyro_vae.infer.adam import FusedAdam
from pyro_vae.infer.guards import SIMPLE, Watch, layout, watching
from pyro_vae.infer.traced import Step, Traces
from pyro_vae.pair import KeepFrozen, Program, Recorded, modules_that_run, sampled, untouched
from pyro_vae.problems import Problem, pair_problems, training_problems
from pyro_vae.signals import interruptible
from pyro_vae.structure import Structure, structure_of_run

logger = logging.getLogger(__name__)
Compile = Literal["auto", "trace"] | bool

_TRACE_AFTER = 100  # steps of one signature, before the second that a graph takes is worth it
_CHECK_EVERY = 1000  # steps between two looks at eager Pyro
_INDUCTOR_AFTER = 5 * _CHECK_EVERY  # steps of one signature, before the seconds that Inductor takes; where it is looked at
_MAX_BUILDS = 16  # graphs built for one pair, before it is left to eager Pyro
_MAX_SIGNATURES = 64  # likewise, of arguments that are new each time


class SVI(pyro.infer.SVI):
    """``pyro.infer.SVI``, as fast as the hardware: the same constructor, ``step`` and ``evaluate_loss``.

    Loss and gradients are traced through Pyro's handlers into a graph of tensor operations, one for each signature (shapes,
    dtypes and devices of the tensors, values of other arguments), which is held against eager Pyro at the same noise, and run
    in the place of it; Adam and AdamW go over all parameters in one call. What cannot be traced runs as eager Pyro, with one
    logged line that says why. A graph is built anew when something changes that Python could have read: training flags,
    attributes, globals, what functions close over, parameters that are frozen or replaced; what is out of sight is found when
    the graph is held against eager Pyro again, every 1000 steps. What a pair does beside its loss, such as to print, is done
    only while it is traced.

    :param optim: one of Pyro's optimizers, or a ``torch.optim.Optimizer`` over the pair's parameters.
    :param loss: one of Pyro's ELBO objects; ``Trace_ELBO`` and ``TraceMeanField_ELBO`` are traced.
    :param compile: ``"trace"``: the graph as it is, ready in a second; ``True``: compiled by Inductor at once, some seconds or
        a minute; ``"auto"``: the graph after 100 steps of one signature, and Inductor after 5000 where there is a C++ compiler;
        ``False``: eager Pyro.
    :param check: raise ``ValueError`` at the first step, before a parameter moves, for a pair that is judged wrong (see
        :func:`~pyro_vae.check_pair`).
    :raises ValueError: for another ``compile``, an optimizer whose step needs a closure (LBFGS), or a torch optimizer that
        lacks one of the pair's parameters.
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
        self.elbo, self.compile = loss, compile
        self._check, self._is_elbo = check, isinstance(loss, ELBO)  # Pyro calls anything else as a function
        self._later_loss_and_grads: Any = self.loss_and_grads
        self.loss_and_grads: Any = self._first_loss_and_grads
        self._signatures: dict[Hashable, _Signature] = {}
        self._eager_steps: Counter[str] = Counter()  # steps that no graph was looked for, by the reason
        self._builds = 0
        self._quiet: object | None = None  # while it is the same object, nothing but the data changes between two steps
        self._latest: tuple[tuple, _Signature] | None = None  # that object with the shapes of the data, and what ran on them
        self._resumed: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_signatures": {}, "_eager_steps": Counter(), "_latest": None}  # a copy makes graphs of its own

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the optimizer on the loss; the loss, an estimate of −ELBO in nats."""
        return self.step_on(Batch(args, kwargs))

    def _first_loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Loss and gradients of the first step, whose traces are checked before a parameter moves."""
        self.loss_and_grads = self._later_loss_and_grads
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
            made = {name: value for name, value in now if before.get(name) is not value}
            pair = structure_of_run(self.model, self.guide, Batch(args, kwargs), traces, ran, made)
            problems = self._problems(pair, whole=failure is None)
        if problems:
            self.loss_and_grads = self._first_loss_and_grads
            pyro.infer.util.zero_grads(p for _, p in pyro.get_param_store().named_parameters())
        refuse(problems, verb="SVI")
        if failure is not None:
            raise failure
        return value

    def _problems(self, pair: Structure, *, whole: bool) -> list[Problem]:
        """What is wrong with the pair, by the traces of its first step."""
        sites = [site for trace in pair.traces for _, site in sampled(trace)]
        if any(site["infer"].get("_enumerate_dim") is not None for site in sites):
            return []  # its values have dimensions for what is enumerated
        try:
            return [*pair_problems(pair), *(training_problems(pair) if whole else ())]
        except Exception as error:  # a run that ended in an error, which says what is wrong
            logger.debug("SVI: the pair was not checked: %s", error)
            return []

    def step_on(self, batch: Batch) -> Any:
        """:meth:`step` on these arguments."""
        self.reported: Sequence[Tensor] | None = None
        latest, self._latest = self._latest, None
        replaced = not self._is_elbo or getattr(self.loss_and_grads, "__self__", None) not in (self.elbo, self)
        if self.compile is False or replaced or _PYRO_STACK:  # a handler around the step is not in the graph
            self._eager_steps[self._why_eager(replaced)] += 1
            return self._eager_step(batch)
        kind = None if self._quiet is None else (self._quiet, [leaf.shape for leaf in batch.leaves()])
        if latest is not None and latest[0] == kind and latest[1].repeats():
            return self._by_graph(latest[1], batch, kind, again=True)
        signature = self._signature(batch)
        if signature is None:
            self._eager_steps[f"more than {_MAX_SIGNATURES} kinds of arguments"] += 1
            return self._eager_step(batch)
        if not self._ready(signature, batch):
            return self._watched(signature, batch)
        return self._by_graph(signature, batch, kind, again=False)

    def _eager_step(self, batch: Batch) -> Any:
        with KeepFrozen():
            return super().step(*batch.args, **batch.kwargs)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, an estimate of −ELBO in nats, without gradients."""
        with KeepFrozen():
            return super().evaluate_loss(*args, **kwargs)

    def _by_graph(self, signature: "_Signature", batch: Batch, kind: tuple | None, *, again: bool) -> Any:
        """
        :param kind: what the step after this one is held against, to go the same way at once.
        :param again: this one did.
        """
        state = torch.get_rng_state()
        before = signature.step.before(batch)
        failure: Exception | None = None
        try:
            loss, gradients, reported = signature.step(batch)
            value = loss.item()
        except Exception as error:  # such as of a matrix that has no Cholesky factor
            failure, value = error, math.nan
        if not math.isfinite(value):  # Pyro's own checks say what is wrong, before anything is moved
            torch.set_rng_state(state)
            with torch.no_grad():
                for value, was in before:
                    value.copy_(was)
            value = self._eager_step(batch)
            if failure is not None:
                signature.refuse(f"its graph failed where that does not: {said(failure)}")
            return value
        self.reported = reported
        self.accept(signature.step.params, gradients)
        signature.move(gradients, again=again)
        if kind is not None and signature.move.groups is not None:  # or else the optimizer's code ran, which may be the user's
            self._latest = kind, signature
        return value

    def _watched(self, signature: "_Signature", batch: Batch) -> Any:
        """A step of eager Pyro, which registers parameters and shows what a graph is to be made of."""
        if signature.refused or (self.compile == "auto" and signature.count < _TRACE_AFTER):
            return self._eager_step(batch)
        failure, signature.failure = signature.failure, None
        with watching() as seen:
            loss = self._eager_step(batch)
        signature.seen = seen
        if failure is not None:  # that of a graph, not of the pair
            signature.refuse(failure)
        return loss

    def accept(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Called before the optimizer moves: a subclass may change the gradients in place, or raise."""

    def graphs(self) -> list[str]:
        """The arguments whose next step is, or may be, that of a graph."""
        met = {signature.name: signature.seen is not None for signature in self._signatures.values()}
        return [name for name, has_one in (dict.fromkeys(self._resumed, True) | met).items() if has_one]

    def resume(self, graphs: Collection[str]) -> None:
        """Go on where another process was: arguments of these names have graphs from their first step on, which says the
        same in other last bits than eager Pyro."""
        self._resumed = frozenset(graphs)

    def _look(self, batch: Batch) -> Watch:
        """What :meth:`_watched` sees, of a step that is not taken."""
        with untouched(), watching() as seen:
            self.elbo.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs)
        pyro.infer.util.zero_grads(seen.params.values())
        return seen

    def report(self, traces: Traces, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What else a graph is to yield, from the traces of model and guide and the gradients: a subclass finds it in
        ``reported`` from ``accept`` on, which is ``None`` where eager Pyro ran."""
        return ()

    def explain(self) -> str:
        """What runs how, and why: a line for each signature, and for each reason for steps that none was looked for."""
        lines = [f"{signature.name}: {signature.how}, {signature.count} steps" for signature in self._signatures.values()]
        lines += [f"eager Pyro: {reason}, {count} steps" for reason, count in self._eager_steps.items()]
        if not lines:
            return "eager Pyro: compile=False" if self.compile is False else "nothing has run yet"
        return "\n".join(lines)

    def _why_eager(self, replaced: bool) -> str:
        if self.compile is False:
            return "compile=False"
        if not replaced:
            return "a handler is around the step, which a graph would not see"
        if self._is_elbo:
            return "loss_and_grads is not that of the loss"
        return "the loss is a function; Trace_ELBO and TraceMeanField_ELBO are traced"

    def _signature(self, batch: Batch) -> "_Signature | None":
        leaves: Any
        structure: Any
        leaves, structure = batch.args, len(batch.args)
        if not batch.plain:
            leaves, structure = pytree.tree_flatten(tuple(batch))
        modes = (
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
            torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), Distribution._validate_args,
        )  # fmt: skip
        key = (modes, structure, *map(_key, leaves))
        found = self._signatures.get(key)
        if found is None and len(self._signatures) < _MAX_SIGNATURES:
            found = self._signatures[key] = _Signature(", ".join(map(_name, leaves)))
            for leaf in leaves:
                if not isinstance(leaf, (Tensor, *SIMPLE)):
                    found.refuse(f"an argument is of type {type(leaf).__name__}, which may change unseen; pass tensors")
                elif isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.layout is not torch.strided):
                    found.refuse("an argument is sparse, or asks for its gradient, which a graph does not leave in it")
            if len(self._signatures) == _MAX_SIGNATURES:
                logger.warning("SVI: %d kinds of arguments: others run as eager Pyro; pass numbers as tensors", _MAX_SIGNATURES)
        return found

    def _ready(self, signature: "_Signature", batch: Batch) -> bool:
        """Whether a graph serves for this step."""
        signature.count += 1
        if signature.count == 1 and signature.name in self._resumed:
            signature.seen = self._look(batch)
        if signature.refused or signature.seen is None:
            return False
        if signature.step is not None and not self._holds(signature):
            signature.step = signature.seen = None
            signature.how = "eager Pyro: something changed, a graph is built at the next step"
            return False
        try:
            if signature.step is None:
                with interruptible():
                    self._build(signature, batch)
            elif signature.count % _CHECK_EVERY == 0:
                signature.step.check(batch)
        except CannotTrace as reason:
            signature.refuse(str(reason))
            return False
        except Exception as error:  # if the pair itself fails on these data, eager Pyro is about to say so
            signature.step, signature.seen, signature.failure = None, None, said(error)
            signature.how = f"eager Pyro: {signature.failure}"
            return False
        if self.compile == "auto" and signature.count == _INDUCTOR_AFTER and has_compiler():
            with interruptible():
                self._compile(signature, batch)
        return signature.step.alone()

    def _holds(self, signature: "_Signature") -> bool:
        """Whether all is as it was when the graph was traced."""
        kept = signature.step
        now = self.model, self.guide, self.elbo, self.optim
        return now == (kept.model, kept.guide, kept.elbo, signature.move.optim) and kept.holds()

    def _build(self, signature: "_Signature", batch: Batch) -> None:
        self._builds += 1
        if self._builds > _MAX_BUILDS:
            raise CannotTrace(f"{_MAX_BUILDS} graphs were built, and what they depend on changed again")
        step = Step(self.elbo, self.model, self.guide, batch, signature.seen, self.report)
        signature.step, signature.move = step, FusedAdam(self.optim, step.params)
        signature.how = "traced"
        if self.compile is True:
            self._compile(signature, batch)

    def _compile(self, signature: "_Signature", batch: Batch) -> None:
        logger.info("compiling the step for %s …", signature.name)
        try:
            signature.step.compile(batch)
            signature.how = "compiled by Inductor"
        except CannotTrace as reason:
            signature.how = f"traced ({reason})"
            logger.warning("SVI: %s: not compiled: %s", signature.name, reason)


class _Signature:
    """What runs for arguments of one kind."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.seen: Any = None  # what its last step of eager Pyro showed
        self.step: Any = None
        self.move: Any = None
        self.how, self.refused = "eager Pyro: the first steps", False
        self.failure: str | None = None  # of the latest attempt, until eager Pyro runs on the same arguments

    def repeats(self) -> bool:
        """Count a step that is as the one before, unless a look at eager Pyro is due."""
        due = (self.count + 1) % _CHECK_EVERY == 0
        self.count += not due
        return not due

    def refuse(self, reason: str) -> None:
        self.step, self.refused, self.how = None, True, f"eager Pyro: {reason}"
        logger.warning("SVI: %s runs as eager Pyro: %s", self.name, reason)


def _key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return *layout(leaf), leaf.requires_grad
    return type(leaf), leaf if isinstance(leaf, SIMPLE) else None


def _name(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def check_optimizer(optim: Any) -> None:
    """Raise ``ValueError`` for an optimizer whose step computes the loss several times by a closure."""
    kind: Any = type(optim) if isinstance(optim, torch.optim.Optimizer) else getattr(optim, "pt_optim_constructor", None)
    step = getattr(kind, "step", None)
    closure = signature_of(step).parameters.get("closure") if isinstance(kind, type) and step is not None else None
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optim: a step of {getattr(kind, '__name__', kind)} computes the loss several times by a closure, which SVI does "
            "not have; expected an optimizer of one gradient a step, such as pyro.optim.Adam, or call "
            "optimizer.step(closure) without SVI, where closure computes Trace_ELBO().differentiable_loss(model, guide, x) and "
            "its gradients"
        )


class OneOptimizer(PyroOptim):
    """A torch optimizer over a pair's parameters, where Pyro expects one of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        own = {p for group in self.optimizer.param_groups for p in group["params"]}
        for p in params:
            if p not in own:
                raise ValueError(
                    f"optim: the pair trains a parameter of shape {tuple(p.shape)} that {type(self.optimizer).__name__} does "
                    "not have; expected all of them: build the pair first, or pass one of Pyro's optimizers"
                )
        self.optimizer.step(*args, **kwargs)
