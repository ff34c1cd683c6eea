"""Steps of SVI on minibatches, scaled so that the loss estimates that on all data."""

import cmath
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data.batches import Batch, Batches, InMemory
from pyro_vae.infer.losses import kind_of, scaled_sites
from pyro_vae.infer.objectives import Objective, Step
from pyro_vae.infer.svi import SVI
from pyro_vae.pairs.check import check_observed
from pyro_vae.pairs.elbo import ElboTerms, Reweighted, elbo_terms
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.problems import has_fixed_support, improbable_rows
from pyro_vae.pairs.structure import Structure
from pyro_vae.pairs.traces import Program, prior_of, sampled, subsampling_scale
from pyro_vae.processes import Group


class MinibatchSVI(SVI):
    """SVI on minibatches: the loss of a minibatch is scaled to all N data, and each step returns the ELBO
    terms of its rows.

    Training calls :meth:`minibatch_step`, not ``step``.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss: ELBO,
        optim: PyroOptim,
        pair: Structure,
        batches: Batches,
        *,
        annealed: bool,
        clip_norm: float | None,
        group: Group,
    ) -> None:
        self.pair, self.plates, self.num_data, self.clip_norm = pair, pair.plates, batches.num_rows, clip_norm
        self.scales_objective = kind_of(loss).factor == "objective"  # else sites are scaled by N/B
        self.batches, self.group = batches, group
        self.not_updated: frozenset[str] = frozenset()  # parameters that the next step leaves unchanged
        # data in memory are validated before the first step, unless the support depends on the batch
        is_checked = isinstance(batches, InMemory) and not batches.on_disk
        self.checks_batches = not is_checked or not has_fixed_support(pair.traces[0])
        self.batch, self.position = Batch((), {}), object()
        self.beta = torch.ones(()) if annealed else None  # a tensor: a graph reads its value at each step
        beta = 1.0 if self.beta is None else self.beta
        self.handlers = [  # the number of rows is set at each step
            Reweighted(pair.plates, num_rows=1, num_data=self.num_data, beta=beta, scaled=scaled)
            for scaled in scaled_sites(pair, self.num_data)
        ]
        self.programs = [
            handler(program) for handler, program in zip(self.handlers, (model, guide), strict=True)
        ]
        super().__init__(*self.programs, optim, loss, check=False)
        self.loss_and_grads = self._loss_and_grads = self._checked_loss_and_grads  # fit has checked the pair

    def _checked_loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
        """Compute loss and gradients by Pyro, check the loss, and average and clip the gradients."""
        try:
            value, terms = self._evaluate_loss(*args, **kwargs)
        except ValueError as error:
            self._check_data()
            cause = str(error).split(":\n", 1)[0].split("\n", 1)[0]
            if not re.search(r"\b(nan|inf)\b", str(error)):
                raise ValueError(f"fit: {self.position}: {cause}") from error
            # the pair ran on the first batch, so now a parameter of a distribution is NaN, which Pyro's error
            # names
            raise FloatingPointError(
                f"fit: {self.position}: {cause}. Lower the learning rate, or check the data"
            ) from error
        if self.checks_batches:
            self._check_data()
        if kind_of(self._elbo).has_value and not math.isfinite(
            sum(value) if isinstance(value, tuple) else value
        ):
            raise FloatingPointError(
                f"fit: the loss is {value} at {self.position}{self._nonfinite_site()}; parameters are "
                "unchanged. Lower the learning rate, raise min_scale, or check the data"
            )
        # before the update, since the distributions in the traces refer to the parameters
        self.terms = self._terms_of_eager_step(value) if terms is None else terms
        # a parameter may have two names
        unique = dict.fromkeys(p for _, p in pyro.get_param_store().named_parameters())
        trained = [p for p in unique if p.grad is not None]
        if self.scales_objective:
            factor = self.num_data / self.batch.num_rows
            torch._foreach_mul_(_stored_values(p.grad for p in trained if p.grad is not None), factor)
            value = value * factor
        gradients = self._before_update(trained, [p.grad for p in trained if p.grad is not None])
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient  # Pyro's optimizers leave a parameter without a gradient unchanged
        return value

    def _evaluate_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss, whose gradients are added to those of the parameters, and the ELBO terms if the loss
        computes them."""
        if not isinstance(self._elbo, Objective):
            return self._elbo.loss_and_grads(model, guide, *args, **kwargs), None
        step = self._elbo.step_and_grads(model, guide, Batch(args, kwargs))
        terms = self._terms_of_traces(step.traces) if step.terms is None else step.terms
        return step.loss.item(), terms

    def _before_update(
        self, params: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Average the gradients over ranks, raise ``FloatingPointError`` if they are not finite, and clip
        them. Returns them, ``None`` for parameters that are not updated."""
        num_rows = 0 if self.batches.idle else self.batch.num_rows
        self.group.average_gradients(params, gradients, num_rows)
        total = _sum_of_entries(gradients) if self._extra is None or self.group.size > 1 else self._extra[-1]
        if not cmath.isfinite(total.item()) and (bad := nonfinite_parameters(params, gradients)):
            raise FloatingPointError(
                f"fit: the loss is finite but its gradient is not, at {self.position}: that of {bad}; "
                "parameters are unchanged. Lower the learning rate, or check the model where it is not smooth"
            )
        stored = pyro.get_param_store().named_parameters() if self.not_updated else ()
        unchanged = {id(p) for name, p in stored if name in self.not_updated}
        updated = [g for p, g in zip(params, gradients, strict=True) if id(p) not in unchanged]
        if self.clip_norm is not None and updated:
            dense = [g.coalesce().values() if g.is_sparse else g for g in updated]
            # in double precision, since squares overflow in single precision
            norm = torch.stack([g.double().norm() for g in dense]).norm()
            max_norm = self.clip_norm * self.num_data  # clip_norm is per datum; the loss is a sum over data
            torch._foreach_mul_(_stored_values(updated), (max_norm / norm).clamp_max(1.0).item())
        return [None if id(p) in unchanged else g for p, g in zip(params, gradients, strict=True)]

    def _nonfinite_site(self) -> str:
        """The part of an error message that names the first site with a non-finite log-probability and its
        row; ``""`` without such a site."""
        for side, handler in zip(("model", "guide"), self.handlers, strict=True):
            for name, site in sampled(handler.traces[-1]) if handler.traces else ():
                for row, value, _ in improbable_rows(site, self.plates):
                    return (
                        f", log-probability {value} of site {name!r} of the {side} at row {row} of the batch"
                    )
        return ""

    def _check_data(self) -> None:
        """Raise ``ValueError`` if the batch is outside the support of an observed site."""
        for trace in reversed(self.handlers[0].traces):
            if any(site["is_observed"] for _, site in sampled(trace)):  # simulations observe nothing
                check_observed(self.pair, trace, self.batch, f"fit: {self.position}", self.batches.rows)
                return

    def minibatch_step(self, batch: Batch, beta: float, position: object) -> ElboTerms:
        """Take one step of the optimizer on the loss annealed by β. Returns the ELBO terms of the rows, which
        do not contain β; of no rows if this rank is idle.

        :param position: its ``str`` names the step in errors.
        """
        self.batch, self.position = batch, position
        if self.beta is not None:
            self.beta.fill_(beta)
        num_rows = batch.num_rows
        for handler in self.handlers:
            handler.num_rows = num_rows
            # if the loss as a whole is multiplied by N/B, sites are not scaled
            handler.num_data = num_rows if self.scales_objective else self.num_data
            handler.traces.clear()
        try:
            self._step(batch)
        except Exception:  # zero the gradients, as a successful step does
            pyro.infer.util.zero_grads(p for _, p in pyro.get_param_store().named_parameters())
            raise
        terms = self.terms if self._extra is None else ElboTerms(*self._extra[:-1])
        return ElboTerms(*(part[:0] for part in terms)) if self.batches.idle else terms

    def _extra_outputs(self, step: Step, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if isinstance(self._elbo, TraceEnum_ELBO):
            if self._differs_from_elbo([guide_trace for _, guide_trace in step.traces]):
                from pyro_vae.compiler import CannotTrace

                raise CannotTrace("a scale, or what the guide observes, makes the loss differ from the ELBO")
            terms = ElboTerms.of_batch(-step.loss / self.num_data, self.batch.num_rows)
        else:
            terms = self._terms_of_traces(step.traces) if step.terms is None else step.terms
        return *terms, _sum_of_entries(gradients)

    def _terms_of_traces(self, traces: Sequence[tuple[Trace, Trace]]) -> ElboTerms:
        """The ELBO terms of the rows, averaged over particles."""
        particles = self._elbo.num_particles // len(traces)
        terms = [
            elbo_terms(*pair, self.plates, num_data=self.num_data, num_particles=particles) for pair in traces
        ]
        return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*terms, strict=True)))

    @torch.no_grad()
    def _terms_of_eager_step(self, value: Any) -> ElboTerms:
        """The terms of a step of eager Pyro, whose loss is ``value``."""
        runs = 1 if self._elbo.vectorize_particles else self._elbo.num_particles
        models, guides = (list(handler.traces)[-runs:] for handler in self.handlers)
        # a guide that is a handler of its model also runs the model
        traced = len(models) == len(guides) > 0
        if isinstance(self._elbo, TraceEnum_ELBO) or not traced:
            # the traces do not contain the terms, so all rows get the mean of the loss. A loss that contains
            # β, poutine.scale, or sites that the guide observes is computed again without them
            if self._differs_from_elbo(guides) or not isinstance(value, float):
                value = self._unscaled_loss()
            return ElboTerms.of_batch(-value / self.num_data, self.batch.num_rows)
        return self._terms_of_traces(list(zip(models, guides, strict=True)))

    def _differs_from_elbo(self, guide_traces: Sequence[Trace]) -> bool:
        """Whether the loss has β, ``poutine.scale``, or sites that the guide observes."""
        observes = any(site["is_observed"] for trace in guide_traces for _, site in sampled(trace))
        return self.beta is not None or self._is_scaled() or observes

    def _is_scaled(self) -> bool:
        """Whether the pair scales a site by ``poutine.scale``."""
        traces = [handler.traces[-1] for handler in self.handlers if handler.traces]
        return any(
            (float(scale.max()) if isinstance(scale, Tensor) else scale)
            != subsampling_scale(site) * self._factor(site)
            for trace in traces
            for _, site in sampled(trace)
            for scale in [site["scale"]]
        )

    def _factor(self, site: dict) -> float:
        """The factor by which :class:`Reweighted` scales a site: N/B in a data plate, else 1."""
        rows = self.batch.num_rows
        in_data_plate = any(
            f.name in self.plates and f.full_size in (rows, -1) for f in site["cond_indep_stack"]
        )
        return self.num_data / rows if in_data_plate else 1.0

    def _unscaled_loss(self) -> Any:
        """The loss without β, ``poutine.scale`` and sites that the guide observes. The random state is
        restored after it."""
        if self.beta is not None:
            self.beta.fill_(1.0)
        for handler in self.handlers:
            handler.strip = True
        model, guide = self.programs
        if isinstance(self._elbo, TraceEnum_ELBO):
            guide = prior_of(guide)
        try:
            with untouched():
                return self._elbo.loss(model, guide, *self.batch.args, **self.batch.kwargs)
        finally:
            for handler in self.handlers:
                handler.strip = False


def _stored_values(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The gradients, with sparse ones replaced by the tensors of their values, which share their memory."""
    return [g._values() if g.is_sparse else g for g in gradients]


def _sum_of_entries(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of all entries, which is not finite if an entry is not: the cheapest check of all entries."""
    if not gradients:
        return torch.zeros(())
    gradients = _stored_values(gradients)
    rows = [(g.sum(-1) if g.dim() > 1 else g).flatten().to(gradients[0].device) for g in gradients]
    return torch.cat(rows).sum()  # rows first: Inductor is slow to sum a whole matrix


def nonfinite_parameters(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
    """The names of the parameters whose gradients are not finite."""
    bad = [p for p, g in zip(params, _stored_values(gradients), strict=True) if not g.isfinite().all()]
    return ", ".join(
        repr(name) for name, p in pyro.get_param_store().named_parameters() if any(p is q for q in bad)
    )
