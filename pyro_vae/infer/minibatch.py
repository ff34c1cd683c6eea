"""A step of SVI on a minibatch that stands for all data."""

import cmath
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.data.batches import Batch, Batches, InMemory
from pyro_vae.infer.distributed import Group
from pyro_vae.infer.losses import kind_of, scaled_sites
from pyro_vae.infer.svi import SVI, Traces
from pyro_vae.pairs.check import check_observed
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.problems import has_fixed_support, improbable_rows
from pyro_vae.pairs.structure import Structure
from pyro_vae.pairs.traces import ElboTerms, Program, Reweighted, elbo_terms, prior_of, sampled, subsampling_scale


class MinibatchSVI(SVI):
    """One SVI step on a minibatch that stands for all data, and the ELBO terms it saw."""

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
        self.on_objective = kind_of(loss).factor == "objective"  # where the factor N/B goes
        self.group, self.weight = group, 1.0
        # data in memory were checked before the first step, unless their support follows from the batch
        self.check_each = not isinstance(batches, InMemory) or not has_fixed_support(pair.traces[0])
        self.batch, self.where = Batch((), {}), object()
        self.beta = torch.ones(()) if annealed else None  # a tensor, whose value a graph reads anew at each step
        beta = 1.0 if self.beta is None else self.beta
        self.handlers = [
            Reweighted(pair.plates, num_rows=0, num_data=self.num_data, beta=beta, scaled=scaled)
            for scaled in scaled_sites(pair, self.num_data)
        ]
        self.programs = [handler(program) for handler, program in zip(self.handlers, (model, guide), strict=True)]
        super().__init__(*self.programs, optim, loss, check=False)
        self._later_loss_and_grads = self._checked

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        """Pyro's own, between the checks that must come before the optimizer moves."""
        try:
            value = self.elbo.loss_and_grads(*args, **kwargs)
        except ValueError as error:
            self._check_data()
            cause = str(error).split(":\n", 1)[0].split("\n", 1)[0]
            if not re.search(r"\b(nan|inf)\b", str(error)):
                raise ValueError(f"fit: {self.where}: {cause}") from error
            # the pair went well on the first batch, so it is a distribution that is handed NaN: Pyro's validation says which
            raise FloatingPointError(f"fit: {self.where}: {cause}. Lower the learning rate, or check the data") from error
        if self.check_each:
            self._check_data()
        if kind_of(self.elbo).has_value and not math.isfinite(sum(value) if isinstance(value, tuple) else value):
            raise FloatingPointError(
                f"fit: the loss is {value} at {self.where}{self._improbable()}; no parameter was moved by it. Lower the "
                "learning rate, raise min_scale, or check the data"
            )
        self.terms = self._terms(value)  # now, since a guide's distributions hold parameters that are about to move
        found = dict.fromkeys(p for _, p in pyro.get_param_store().named_parameters())  # one may have two names
        trained = [p for p in found if p.grad is not None]
        if self.on_objective:
            factor = self.num_data / self.batch.num_rows
            torch._foreach_mul_(_entries(p.grad for p in trained if p.grad is not None), factor)
            value = value * factor
        self._accept(trained, [p.grad for p in trained if p.grad is not None])
        return value

    def _accept(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Average the gradients over processes, raise ``FloatingPointError`` where they are not finite, and clip them."""
        self.group.average(params, gradients, self.weight)
        total = _total(gradients) if self._reported is None or self.group.size > 1 else self._reported[-1]
        if not cmath.isfinite(total.item()) and (bad := _not_finite(params, gradients)):
            raise FloatingPointError(
                f"fit: the loss is finite but its gradient is not, at {self.where}: that of {bad}; no parameter was moved by "
                "it. Lower the learning rate, or check the model where it is not smooth"
            )
        if self.clip_norm is not None and gradients:
            whole = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            norm = torch.stack([g.double().norm() for g in whole]).norm()  # squares overflow sooner than their numbers
            longest = self.clip_norm * self.num_data  # the loss stands for all data
            torch._foreach_mul_(_entries(gradients), (longest / norm).clamp_max(1.0).item())

    def _improbable(self) -> str:
        """The site whose log-probability is not finite, and its row."""
        for side, handler in zip(("model", "guide"), self.handlers, strict=True):
            for name, site in sampled(handler.traces[-1]) if handler.traces else ():
                for row, value, _ in improbable_rows(site, self.plates):
                    return f", log-probability {value} of site {name!r} of the {side} at row {row} of the batch"
        return ""

    def _check_data(self) -> None:
        if self.handlers[0].traces:
            check_observed(self.pair, self.handlers[0].traces[-1], self.batch, f"fit: {self.where}")

    def on(self, batch: Batch, beta: float, weight: float, where: object) -> ElboTerms:
        """The step, its loss annealed by β; the terms are not.

        :param weight: of this process in the mean over all; 0 where the batch stands in for rows that it has not.
        :param where: what its ``str`` says is where an error happened.
        """
        self.batch, self.weight, self.where = batch, weight, where
        if self.beta is not None:
            self.beta.fill_(beta)
        num_rows = batch.num_rows
        for handler in self.handlers:
            # a loss that is not linear is multiplied as a whole, so its sites are not scaled
            handler.num_rows, handler.num_data = num_rows, num_rows if self.on_objective else self.num_data
            handler.traces.clear()
        try:
            self._step(batch)
        except Exception:
            pyro.infer.util.zero_grads(p for _, p in pyro.get_param_store().named_parameters())  # as a step leaves them
            raise
        terms = self.terms if self._reported is None else ElboTerms(*self._reported[:-1])
        return terms if weight else ElboTerms(*(part[:0] for part in terms))

    def _report(self, traces: Traces, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return *self._drawn(traces), _total(gradients)

    def _drawn(self, traces: Traces) -> ElboTerms:
        particles = self.elbo.num_particles // len(traces)
        drawn = [elbo_terms(*pair, self.plates, num_data=self.num_data, num_particles=particles) for pair in traces]
        return ElboTerms(*(torch.stack(part).mean(0) for part in zip(*drawn, strict=True)))

    @torch.no_grad()
    def _terms(self, value: Any) -> ElboTerms:
        """Those of a step of eager Pyro, whose loss was that value."""
        runs = 1 if self.elbo.vectorize_particles else self.elbo.num_particles
        models, guides = (list(handler.traces)[-runs:] for handler in self.handlers)
        seen = len(models) == len(guides) > 0  # a guide that is a handler of its model runs it unseen
        if isinstance(self.elbo, TraceEnum_ELBO) or not seen:
            # the loss alone knows; one that is annealed, scaled by the pair, or holds what the guide observes, is computed
            # again without that
            observes = any(site["is_observed"] for trace in guides for _, site in sampled(trace))
            if self.beta is not None or self._is_scaled() or observes or not isinstance(value, float):
                value = self._plain_loss()
            return ElboTerms.of_batch(-value / self.num_data, self.batch.num_rows)
        return self._drawn(list(zip(models, guides, strict=True)))

    def _is_scaled(self) -> bool:
        """Whether ``poutine.scale`` of the pair is in the loss."""
        traces = [handler.traces[-1] for handler in self.handlers if handler.traces]
        return any(
            float(torch.as_tensor(site["scale"]).max()) != subsampling_scale(site) * self._factor(site)
            for trace in traces
            for _, site in sampled(trace)
        )

    def _factor(self, site: dict) -> float:
        """N/B where the handler scales a site by it."""
        rows = self.batch.num_rows
        found = any(f.name in self.plates and f.full_size in (rows, -1) for f in site["cond_indep_stack"])
        return self.num_data / rows if found else 1.0

    def _plain_loss(self) -> Any:
        """The loss without annealing, ``poutine.scale`` and what the guide observes, at the noise of the step to come, which
        is not moved."""
        if self.beta is not None:
            self.beta.fill_(1.0)
        for handler in self.handlers:
            handler.strip = True
        model, guide = self.programs
        if isinstance(self.elbo, TraceEnum_ELBO):
            guide = prior_of(guide)
        try:
            with untouched():
                return self.elbo.loss(model, guide, *self.batch.args, **self.batch.kwargs)
        finally:
            for handler in self.handlers:
                handler.strip = False


def _entries(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The numbers of each, of a sparse one those that it holds; what is written to them is written to the gradients."""
    return [g._values() if g.is_sparse else g for g in gradients]


def _total(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of all numbers, which shows whether one is not finite, and costs less than anything else that reads them."""
    if not gradients:
        return torch.zeros(())
    gradients = _entries(gradients)
    rows = [(g.sum(-1) if g.dim() > 1 else g).flatten().to(gradients[0].device) for g in gradients]
    return torch.cat(rows).sum()  # rows first: Inductor is slow to sum a whole matrix


def _not_finite(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
    """The names of the parameters whose gradients are not finite."""
    bad = [p for p, g in zip(params, _entries(gradients), strict=True) if not g.isfinite().all()]
    return ", ".join(repr(name) for name, p in pyro.get_param_store().named_parameters() if any(p is q for q in bad))
