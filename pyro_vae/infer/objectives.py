"""Objectives beyond the ELBO: importance-weighted bounds, their gradient estimators, wake-sleep."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.data.batches import Batch, check_count
from pyro_vae.numerics import effective_sample_size, log_mean_exp
from pyro_vae.pairs.check import refuse
from pyro_vae.pairs.elbo import ElboTerms
from pyro_vae.pairs.enumeration import PARTICLES, Held, is_enumerated, sum_out
from pyro_vae.pairs.observed import check_generative, observed_arguments, simulate_once
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.probe import log_prob_terms, particle_programs, probe_particles
from pyro_vae.pairs.problems import (
    Problem,
    coupled_latents_problems,
    family,
    joint_problems,
    outside_of_plates,
    pair_problems,
    per_datum_problems,
)
from pyro_vae.pairs.structure import Structure, first_line, inspect, row_dim
from pyro_vae.pairs.traces import Program, proposal, sampled, sum_sites

Estimator = Literal["iwae", "dreg", "stl"]
Traces = tuple[Trace, Trace]


class Step(NamedTuple):
    """An objective on a batch.

    - loss: −Σ over data of scale × objective, in nats, ``()``, without a gradient
    - surrogate: a tensor ``()`` whose gradient is that of the loss
    - terms: the objective and the ELBO terms of each datum; ``None`` where :func:`.elbo_terms` of the traces
      are these
    - traces: the traces of model and guide, one pair for each run
    """

    loss: Tensor
    surrogate: Tensor
    terms: ElboTerms | None
    traces: list[Traces]


class Draws(NamedTuple):
    """Particles of a pair on a batch: log-probabilities ``(num_particles, rows)`` in nats, without scales.

    - likelihood, prior, log_q: log p(x|z), log p(z) and log q(z|x); log_p: log p(x, z)
    - score: log q of the latents that are not reparameterized, ``None`` without such latents
    - cut: for each run, the latents whose densities have no gradient with respect to φ, see :class:`_Cut`
    """

    likelihood: Tensor
    prior: Tensor
    log_q: Tensor
    log_p: Tensor
    score: Tensor | None
    traces: list[Traces]
    cut: list[list["_CutLatent"]]

    @property
    def log_w(self) -> Tensor:
        return self.log_p - self.log_q


class Objective(ELBO):
    """A function of model and guide that is maximized, a sum over data, with the interface of Pyro's ELBO
    classes.

    It works with ``pyro.infer.SVI``, ``pv.SVI``, :func:`~pyro_vae.fit` and :func:`~pyro_vae.evaluate`. The
    log-weights log p(x, z) − log q(z|x) are those of :func:`~pyro_vae.log_weights`, for each datum and
    particle, without scales. A factor that all sites in the data plates have, such as N/B, multiplies the
    objective of each datum. If latents lie outside of the data plates, all data share them: the batch must
    then be all data, and a particle has one joint log-weight.

    The first step inspects and checks the pair, see :meth:`prepare`.

    :param num_particles: K, the number of draws of the latents for each datum. They run in one plate if the
        pair allows it.
    """

    # what the value estimates, with its direction
    bound = "the importance-weighted bound of K particles, a lower bound of log p(x)"
    is_elbo = False  # whether the value is the ELBO
    linear = False  # whether it is linear in log-probabilities, and a sum over sites as the ELBO is
    _min_particles = 1

    def __init__(self, num_particles: int = 1) -> None:
        check_count(f"{type(self).__name__}: num_particles", num_particles)
        if num_particles < self._min_particles:
            raise ValueError(
                f"{type(self).__name__}: num_particles is {num_particles}; expected {self._min_particles} or "
                "more, since it compares the weights of particles"
            )
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self._pair: Structure | None = None
        self._observed: dict[str, Any] = {}  # the argument of each observed site, where a step simulates data

    def options(self) -> dict[str, Any]:
        """The arguments of the objective."""
        return {"num_particles": self.num_particles}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pair": None}

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """−Σ over data of the objective, in nats, without gradients."""
        with torch.no_grad():
            return self.step(model, guide, Batch(args, kwargs), differentiate=False).loss.item()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a tensor ``()`` with a gradient."""
        step = self.step(model, guide, Batch(args, kwargs))
        return step.loss + step.surrogate - step.surrogate.detach()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The loss. Its gradients are added to those of the parameters."""
        return self.step_and_grads(model, guide, Batch(args, kwargs)).loss.item()

    def step_and_grads(self, model: Program, guide: Program, batch: Batch) -> Step:
        """:meth:`step`, with its gradients added to those of the parameters."""
        step = self.step(model, guide, batch)
        if step.surrogate.requires_grad:
            step.surrogate.backward()
        return step

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Traces:
        return self.step(model, guide, Batch(args, kwargs), differentiate=False).traces[0]

    def value(self, log_w: Tensor) -> Tensor:
        """The objective of each datum in nats, ``(rows,)``, at log-weights ``(num_particles, rows)``."""
        return log_w.mean(0) if self.is_elbo else log_mean_exp(log_w)

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        """A tensor ``()`` whose gradient is that of Σ over data of the objective, and the draws."""
        draws = _draw(pair, batch, self.num_particles)
        return self.value(draws.log_w).sum(), draws

    @property
    def simulates(self) -> bool:
        """Whether a step simulates data from the model."""
        return False

    def problems(self, pair: Structure) -> Iterator[Problem]:  # noqa: ARG002
        """Why the objective is not defined for a pair."""
        return iter(())

    def prepare(self, model: Program, guide: Program, batch: Batch, *, check: bool = True) -> Structure:
        """Inspect and check a pair. Without this call the first step does so.

        The pair runs a few times in evaluation mode. All state is restored afterwards.

        :param check: ``False`` allows a pair that is judged wrong, see :func:`~pyro_vae.check_pair`.
        :return: the structure of the pair, for the steps of this objective.
        :raises ValueError: for a pair without log-weights per datum, or without a valid objective.
        """
        with untouched(training=False), torch.no_grad():
            return self.use(inspect(model, guide, batch), check=check)

    def use(self, pair: Structure, *, check: bool = True) -> Structure:
        """:meth:`prepare` for a pair that was inspected in evaluation mode."""
        name = type(self).__name__
        with untouched(training=False), torch.no_grad():
            # the log-probability of a site that is summed out is not known, so it cannot be scaled by itself
            is_joint = _all_data_share(pair) and (pair.enumerates or not self.linear)
            weights = joint_problems(pair) if is_joint else () if self.linear else per_datum_problems(pair)
            problems = [*pair_problems(pair), *weights, *_guide_problems(pair), *self.problems(pair)]
            refuse(dict.fromkeys(problems), verb=name, check=check)
            pair = probe_particles(pair)
            if not is_joint and not self.linear:
                refuse(coupled_latents_problems(pair), verb=name, check=check)
            self._observed = _observed(pair) if self.simulates else {}
            self._pair = pair.as_one_datum() if is_joint else pair
            return self._pair

    def step(self, model: Program, guide: Program, batch: Batch, *, differentiate: bool = True) -> Step:
        """Loss, surrogate loss and terms on a batch, for the inference algorithms of this package."""
        pair = self._prepared(model, guide, batch)
        if differentiate:
            total, draws = self.surrogate(pair, batch)
        else:
            draws = _draw(pair, batch, self.num_particles)
            total = draws.log_w.new_zeros(())
        scale = _common_scale(draws.traces[0])
        loss = -scale * self.value(draws.log_w.detach()).sum()
        return Step(loss, -scale * total, self._terms(pair, draws, batch), draws.traces)

    def _prepared(self, model: Program, guide: Program, batch: Batch) -> Structure:
        if self._pair is None or (self._pair.model, self._pair.guide) != (model, guide):
            self._pair = self.prepare(model, guide, batch)
        return self._pair

    @torch.no_grad()
    def _terms(self, pair: Structure, draws: Draws, batch: Batch) -> ElboTerms:
        terms = ElboTerms.of_elbo(
            draws.log_w.mean(0), draws.likelihood.mean(0), (draws.log_q - draws.prior).mean(0)
        )
        if not self.is_elbo:
            terms = terms._replace(bound=self.value(draws.log_w), ess=effective_sample_size(draws.log_w))
        if pair.joint:
            n = batch.num_rows
            terms = ElboTerms(*((part / n).expand(n) for part in terms))._replace(ess=terms.ess.expand(n))
        return terms


class IWAE(Objective):
    """The importance-weighted bound of K particles (Burda et al. 2016), a lower bound of log p(x) that grows
    with K:

    L_K = E[log (1/K) Σ_k w_k], w_k = p(x, z_k) / q(z_k|x), z_k ~ q(z|x).

    The gradient with respect to θ is Σ_k w̃_k ∇ log p(x, z_k), with normalized weights w̃. That with respect
    to φ depends on ``estimator``:

    - ``"iwae"``: the gradient of L_K through z. Its signal-to-noise ratio falls with K as K^(−1/2)
      (Rainforth et al. 2018).
    - ``"dreg"``: Σ_k w̃_k² ∂ log w_k/∂z_k · ∂z_k/∂φ (Tucker et al. 2019). It has the same mean, and its
      signal-to-noise ratio grows as K^(1/2).
    - ``"stl"``: Σ_k w̃_k ∂ log w_k/∂z_k · ∂z_k/∂φ (Roeder et al. 2017). It is **biased** for K > 1; its
      variance vanishes where the guide is the exact posterior.

    :raises ValueError: for a guide with latents that are not reparameterized; use :class:`VIMCO` for these.
    """

    def __init__(self, num_particles: int = 5, estimator: Estimator = "iwae") -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f'IWAE: estimator is {estimator!r}; expected "iwae", "dreg" or "stl"')
        super().__init__(num_particles)
        self.estimator = estimator

    def options(self) -> dict[str, Any]:
        return super().options() | {"estimator": self.estimator}

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        if self.estimator == "iwae":
            return super().surrogate(pair, batch)
        draws = _draw(pair, batch, self.num_particles, _Cut)
        weights = _normalized(draws.log_w)
        log_p = (weights * draws.log_p).sum()
        return _cut_surrogate(pair, draws, log_p, weights, scale_z=self.estimator == "dreg"), draws

    def problems(self, pair: Structure) -> Iterator[Problem]:
        yield from _not_reparameterized(pair, "VIMCO, or TraceEnum_ELBO")
        if self.estimator != "iwae":
            yield from _without_density_at_latents(pair, 'estimator="iwae"')


class STL(Objective):
    """The ELBO with the gradient estimator "sticking the landing" (Roeder et al. 2017): the parameters of q
    are constants in log q(z|x), so only the path through z gives a gradient with respect to φ.

    It is unbiased, and its variance vanishes where the guide is the exact posterior.

    :param num_particles: draws over which the ELBO is averaged.
    :raises ValueError: for a guide with latents that are not reparameterized.
    """

    bound = "the ELBO, a lower bound of log p(x)"
    is_elbo = linear = True

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        draws = _draw(pair, batch, self.num_particles, _Cut)
        weights = torch.full_like(draws.log_w, 1 / self.num_particles).detach()
        return _cut_surrogate(pair, draws, draws.log_p.mean(0).sum(), weights), draws

    def step(self, model: Program, guide: Program, batch: Batch, *, differentiate: bool = True) -> Step:
        pair, k = self._prepared(model, guide, batch), self.num_particles
        if pair.enumerates:
            return super().step(model, guide, batch, differentiate=differentiate)
        # as in Trace_ELBO, each site has its own scale, so that β and latents of all data are right
        draws = _draw(pair, batch, k, _Cut if differentiate else None, scaled=True)
        log_p = sum(model_trace.log_prob_sum() for model_trace, _ in draws.traces) / k
        log_q = sum(_sum_of_log_q(guide_trace, scaled=True) for _, guide_trace in draws.traces) / k
        weights = torch.full_like(draws.log_w, 1 / k).detach()
        total = _cut_surrogate(pair, draws, log_p, weights) if differentiate else log_p
        return Step((log_q - log_p).detach(), -total, None, draws.traces)

    def problems(self, pair: Structure) -> Iterator[Problem]:
        yield from _not_reparameterized(pair, "Trace_ELBO, or TraceEnum_ELBO")
        yield from _without_density_at_latents(pair, "Trace_ELBO")


class Renyi(Objective):
    """The variational Rényi bound of order α with K particles (Li & Turner 2016):

    L_α = E[1/(1−α) log (1/K) Σ_k w_k^(1−α)], w_k = p(x, z_k) / q(z_k|x).

    α = 0 is :class:`IWAE` and α → 1 the ELBO. For α ≥ 0 it is a lower bound of log p(x). For α < 0 it is no
    bound: its limit for K → ∞ is an upper bound, and the estimate of K particles lies below that limit.

    :param alpha: a finite number; 1 for the ELBO.
    :raises ValueError: for a guide with latents that are not reparameterized.
    """

    bound = "the Rényi bound of order α, for α ≥ 0 a lower bound of log p(x)"

    def __init__(self, alpha: float = 0.5, num_particles: int = 5) -> None:
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"Renyi: alpha is {alpha!r}; expected a finite number")
        super().__init__(num_particles)
        self.alpha = float(alpha)

    def options(self) -> dict[str, Any]:
        return {"alpha": self.alpha} | super().options()

    def value(self, log_w: Tensor) -> Tensor:
        if self.alpha == 1:
            return log_w.mean(0)
        return log_mean_exp((1 - self.alpha) * log_w) / (1 - self.alpha)

    def problems(self, pair: Structure) -> Iterator[Problem]:
        return _not_reparameterized(pair, "VIMCO, or TraceEnum_ELBO")


class VIMCO(Objective):
    """The importance-weighted bound of K particles, as :class:`IWAE`, with a gradient for discrete latents
    (Mnih & Rezende 2016):

    ∇L_K = E[Σ_k (L_K − L_K^(−k)) ∇ log q(z_k|x) + Σ_k w̃_k ∇ log w_k],

    where L_K^(−k) is the bound with log w_k replaced by the mean of the other log-weights. As everywhere in
    Pyro, the first sum has the latents that are not reparameterized (``has_rsample`` is false), and the
    gradient of reparameterized latents goes through z, as in :class:`IWAE`.

    :param num_particles: K, 2 or more.
    """

    _min_particles = 2

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        total, draws = super().surrogate(pair, batch)
        if draws.score is not None:
            total = total + (_vimco_signal(draws.log_w.detach()) * draws.score).sum()
        return total, draws


class WakeSleep(Objective):
    """Wake-sleep (Hinton et al. 1995), in one step for model and guide:

    - wake: ∇θ log p(x, z), z ~ q(z|x)
    - sleep: ``∇φ log q(z'|x')``, (x', z') ~ p(x, z)

    These are not gradients of one function. The reported value is the ELBO.

    :param num_particles: draws of z in the wake phase for each datum. The sleep phase has one.
    :raises ValueError: if an observed value is not an argument of the model, so that it cannot be simulated.
    """

    bound = STL.bound
    is_elbo = True

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        draws = _draw(pair, batch, self.num_particles, _Stop, guide_grad=False)
        return draws.log_p.mean(0).sum() + _sleep(pair, batch, self._observed), draws

    @property
    def simulates(self) -> bool:
        return True

    def problems(self, pair: Structure) -> Iterator[Problem]:
        return _without_density_at_latents(pair, "Trace_ELBO")


class ReweightedWakeSleep(Objective):
    """Reweighted wake-sleep (Bornschein & Bengio 2015; Le et al. 2020), in one step for model and guide:

    - wake-θ: Σ_k w̃_k ∇θ log p(x, z_k), as in :class:`IWAE`
    - wake-φ: Σ_k w̃_k ∇φ log q(z_k|x), with a bias of O(1/K)
    - sleep-φ: ``∇φ log q(z'|x')``, (x', z') ~ p(x, z)

    with z_k ~ q(z|x) without reparameterization, and normalized weights w̃. It suits discrete latents. The
    reported value is the importance-weighted bound.

    :param num_particles: K; 2 or more with ``wake_phi``.
    :param wake_phi: the factor of wake-φ.
    :param sleep_phi: the factor of sleep-φ; 0.5 and 0.5 is the mean of both.
    :raises ValueError: for a negative factor, or two that are 0; with ``sleep_phi``, if an observed value is
        not an argument of the model, so that it cannot be simulated.
    """

    def __init__(self, num_particles: int = 5, *, wake_phi: float = 1.0, sleep_phi: float = 0.0) -> None:
        for name, factor in (("wake_phi", wake_phi), ("sleep_phi", sleep_phi)):
            if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise ValueError(
                    f"ReweightedWakeSleep: {name} is {factor!r}; expected 0 or a positive number"
                )
        if not wake_phi and not sleep_phi:
            raise ValueError(
                "ReweightedWakeSleep: wake_phi and sleep_phi are 0, so the guide would not be trained; "
                "expected a positive number for one of them"
            )
        self._min_particles = 2 if wake_phi else 1
        super().__init__(num_particles)
        self.wake_phi, self.sleep_phi = float(wake_phi), float(sleep_phi)

    def options(self) -> dict[str, Any]:
        return super().options() | {"wake_phi": self.wake_phi, "sleep_phi": self.sleep_phi}

    def surrogate(self, pair: Structure, batch: Batch) -> tuple[Tensor, Draws]:
        draws = _draw(pair, batch, self.num_particles, _Stop, guide_grad=self.wake_phi > 0)
        total = (_normalized(draws.log_w) * (draws.log_p + self.wake_phi * draws.log_q)).sum()
        if self.sleep_phi:
            total = total + self.sleep_phi * _sleep(pair, batch, self._observed)
        return total, draws

    @property
    def simulates(self) -> bool:
        return self.sleep_phi > 0

    def problems(self, pair: Structure) -> Iterator[Problem]:
        # without a sleep phase the draws of an autoguide are those of its auxiliary sites
        is_known = pair.points and not self.simulates
        return (_without_inverse if is_known else _without_density_at_latents)(pair, "Trace_ELBO")


def _normalized(log_w: Tensor) -> Tensor:
    """w̃ = softmax of the log-weights over particles, without a gradient."""
    return log_w.detach().softmax(0)


def _vimco_signal(log_w: Tensor) -> Tensor:
    """L_K − L_K^(−k), ``(num_particles, rows)``."""
    k = len(log_w)
    others = (log_w.sum(0) - log_w) / (k - 1)
    replaced = torch.where(torch.eye(k, dtype=torch.bool, device=log_w.device).unsqueeze(-1), others, log_w)
    return log_mean_exp(log_w) - log_mean_exp(replaced, 1)


class _CutLatent(NamedTuple):
    """A latent whose density has no gradient with respect to φ: its site, its value as the model gets it, and
    ∂ log q/∂z at constant parameters of q, summed over all sites."""

    site: dict
    value: Tensor
    gradient: Tensor


class _Stop(Messenger):
    """Detaches the draws of latents."""

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"]:
            msg["value"] = msg["value"].detach()


class _Cut(Messenger):
    """Separates the two ways by which the parameters φ of a guide change log q(z|x): through z, and in the
    density at given z.

    A latent z becomes a copy of itself whose gradient can be blocked on its way to φ. While gradients are
    blocked, that of log q with respect to a copy does not include the latents computed from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, Tensor] = {}
        # hooks refer to this object and not to the handler, whose copies would keep their graph alive
        self.gradients = SimpleNamespace(are_blocked=False)

    def _pyro_post_sample(self, msg: dict) -> None:
        value = msg["value"]
        if msg["is_observed"] or not value.requires_grad:
            return
        gate, gradients = value.view_as(value), self.gradients
        gate.register_hook(lambda g: torch.zeros_like(g) if gradients.are_blocked else g)
        msg["value"] = self.copies[msg["name"]] = gate.view_as(gate)

    def cut(self, guide_trace: Trace, *, scaled: bool) -> list[_CutLatent]:
        """The latents of the run, with ∂ log q/∂z. Replaces the values in the trace by copies for the
        model."""
        if not self.copies:  # a guide without latents, or without parameters that have gradients
            return []
        nodes = {name: guide_trace.nodes[name] for name in self.copies}
        leaves = [copy.detach().requires_grad_() for copy in self.copies.values()]
        for node, leaf in zip(nodes.values(), leaves, strict=True):
            node["value"] = leaf
        self.gradients.are_blocked = True
        gradients = torch.autograd.grad(
            _sum_of_log_q(guide_trace, scaled=scaled),
            [*leaves, *self.copies.values()],
            allow_unused=True,
            retain_graph=True,
        )
        self.gradients.are_blocked = False
        n, latents = len(leaves), []
        for i, (node, copy) in enumerate(zip(nodes.values(), self.copies.values(), strict=True)):
            node["value"] = copy.view_as(copy)
            parts = [part for part in (gradients[i], gradients[n + i]) if part is not None]
            latents.append(_CutLatent(node, node["value"], sum(parts, torch.zeros_like(copy)).detach()))
        return latents


def _draw(
    pair: Structure,
    batch: Batch,
    num_particles: int,
    handler: type[_Stop] | type[_Cut] | None = None,
    *,
    guide_grad: bool = True,
    scaled: bool = False,
) -> Draws:
    """Run a pair for K particles, in one plate or one after another.

    :param handler: what happens to the gradients of the latents.
    :param guide_grad: whether the guide has gradients.
    :param scaled: whether the gradients of cut latents contain the scales of the sites.
    """
    is_vectorized = pair.particles is not None and pair.particles.vectorized
    size, num_runs = (num_particles, 1) if is_vectorized else (None, num_particles)
    parts, traces, cut = [], [], []
    for _ in range(num_runs):
        messenger = None if handler is None else handler()
        model, guide = particle_programs(pair, size)
        with (
            torch.set_grad_enabled(guide_grad and torch.is_grad_enabled()),
            nullcontext() if messenger is None else messenger,
        ):
            guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            if isinstance(messenger, _Cut):
                cut.append(messenger.cut(guide_trace, scaled=scaled))
            replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
        traces.append((model_trace, guide_trace))
        parts.append(_log_probs(pair, traces[-1], batch, size))
    likelihood, prior, log_q, log_p = (
        torch.cat(column) for column in zip(*(p[:4] for p in parts), strict=True)
    )
    scores = [part[4] for part in parts if part[4] is not None]
    score = torch.cat(scores) if scores else None
    return Draws(likelihood, prior, log_q, log_p, score, traces, cut)


def _log_probs(
    pair: Structure, traces: Traces, batch: Batch, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """log p(x|z), log p(z), log q(z|x), log p(x, z), and log q of the latents that are not reparameterized,
    if any. Each is ``(particles, rows)``. If sites are summed out, the first two are unknown, and NaN."""
    dim = None if size is None else -1 - pair.nesting
    shape = size or 1, 1 if pair.joint else batch.num_rows

    def of_guide(sites: list[tuple[str, dict]]) -> Tensor:
        q = sum_sites(sites, pair.plates, particle_dim=dim)
        return shaped(q.shared_latent if pair.joint else q.latent)

    def shaped(log_prob: Tensor) -> Tensor:
        return (log_prob.unsqueeze(-1) if pair.joint else log_prob).expand(shape)

    sites = list(proposal(traces[1]))
    discrete = [(name, site) for name, site in sites if not site["fn"].has_rsample]
    score = of_guide(discrete) if discrete else None
    if pair.enumerates:
        log_q = of_guide(sites)
        log_p = shaped(sum_out([(traces[0], sampled, 1)], pair.plates | {PARTICLES}))
        unknown = torch.full_like(log_p, math.nan)
        return unknown, unknown, log_q, log_p, score
    likelihood, prior, log_q = map(shaped, log_prob_terms(traces, pair.plates, dim))
    return likelihood, prior, log_q, likelihood + prior, score


def _sum_of_log_q(guide_trace: Trace, *, scaled: bool) -> Tensor:
    """Σ of log q over all sites, rows and particles, ``()``."""
    total = torch.zeros(())
    for _, site in proposal(guide_trace):
        log_q = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        total = total + scale_and_mask(log_q, site["scale"] if scaled else 1.0, site["mask"]).sum()
    return total


def _cut_surrogate(
    pair: Structure, draws: Draws, log_p: Tensor, weights: Tensor, *, scale_z: bool = False
) -> Tensor:
    """``log_p``, a weighted sum of log p(x, z), minus Σ of weights × log q at constant parameters of q.

    :param weights: of each particle and datum, ``(num_particles, rows)``, without a gradient.
    :param scale_z: multiply the gradient with respect to z by the weights once more.
    """
    total = log_p
    for latents, of_run in zip(draws.cut, weights.chunk(len(draws.cut)), strict=True):
        for site, value, gradient in latents:
            factor = _as_site(of_run, site, value, pair)
            total = total - (factor * gradient * value).sum()
            if scale_z:
                value.register_hook(factor.mul)
    return total


def _as_site(factor: Tensor, site: dict, value: Tensor, pair: Structure) -> Tensor:
    """``(particles, rows)`` in a shape that broadcasts to the value of a site. Of a site that all rows share
    the factor of the first row, since all rows have the same one."""
    event_dim, rows = site["fn"].event_dim, row_dim(site, pair.plates)
    shape = [1] * (pair.nesting + 1 + event_dim)
    shape[0] = factor.shape[0]
    if rows is None:
        factor = factor[:, :1]
    else:
        shape[rows - event_dim] = factor.shape[1]
    return factor.reshape(shape[len(shape) - value.dim() :])  # the dimensions left out have size 1


def _common_scale(traces: Traces) -> float:
    """The scale that all sites have, such as N/B, also of a data plate that subsamples. Raises ``ValueError``
    if they have different ones."""
    first: tuple[str, float] | None = None
    for name, site in [*sampled(traces[0]), *proposal(traces[1])]:
        if isinstance(site["scale"], Tensor) and site["scale"].numel() > 1:
            raise ValueError(
                f"objective: {name!r} has a tensor of scales (poutine.scale), which would be powers of its "
                "probabilities in a log-weight; expected one number for all sites, or Trace_ELBO"
            )
        scale = float(site["scale"])
        first = first or (name, scale)
        if not math.isclose(scale, first[1], rel_tol=1e-6):
            raise ValueError(
                f"objective: {first[0]!r} is scaled by {first[1]:g} and {name!r} by {scale:g} "
                "(poutine.scale), which would be powers of their probabilities in a log-weight; expected one "
                "scale around all sites, or Trace_ELBO"
            )
    return 1.0 if first is None else first[1]


def _sleep(pair: Structure, batch: Batch, keys: Mapping[str, Any]) -> Tensor:
    """Σ over data of log q(z'|x') at (x', z') ~ p(x, z), ``()``."""
    with torch.no_grad():
        simulated, latents = simulate_once(pair.model, batch, keys)
    guide = Held(latents)(pair.guide)
    trace = poutine.trace(guide).get_trace(*simulated.args, **simulated.kwargs)
    return _sum_of_log_q(trace, scaled=False)


# ---- problems of a pair


def _all_data_share(pair: Structure) -> bool:
    """Whether latents are shared by all data, so that only all data together have log-weights."""
    return bool(pair.shared) and not set(outside_of_plates(pair)) & pair.latents.keys()


def _guide_problems(pair: Structure) -> Iterator[Problem]:
    if pair.is_handler:
        yield Problem(
            "guide: it is a GuideMessenger, which runs its model itself; expected a guide that is a Pyro "
            "program",
            judged=False,
        )
    for name, site in sampled(pair.traces[1]):
        if is_enumerated(site):
            yield Problem(
                f"guide: {name!r} is summed out, so its density cancels in the log-weights and would not be "
                'trained; expected infer={"enumerate": "parallel"} in the model and no such site in the '
                "guide, or TraceEnum_ELBO",
                judged=False,
            )
        if site["is_observed"]:
            yield Problem(
                f"guide: it observes {name!r} (obs=, or pyro.factor), which is not part of q(z|x) and would "
                "be left out; expected a guide that observes nothing, or Trace_ELBO",
                judged=False,
            )
    if not pair.has_density:
        yield Problem(
            f"guide: {pair.points[0]!r} is a point (Delta), which has no density and no log-weight; expected "
            "a distribution with a density, or Trace_ELBO for point estimates",
            judged=False,
        )


def _not_reparameterized(pair: Structure, remedy: str) -> Iterator[Problem]:
    for name, site in proposal(pair.traces[1]):
        if not site["fn"].has_rsample and not is_enumerated(site):
            yield Problem(
                f"guide: draws of {name!r} have no gradient, since {family(site['fn'])} is not "
                f"reparameterized; expected {remedy}",
                judged=False,
            )


def _without_density_at_latents(pair: Structure, remedy: str) -> Iterator[Problem]:
    if pair.points or pair.has_auxiliary:
        name = min(pair.points or pair.guide_latents)
        yield Problem(
            f"guide: {name!r} is computed from auxiliary sites, as in autoguides, so log q(z|x) at given "
            f"latents is not known; expected pyro.sample of a distribution for each latent, or {remedy}",
            judged=False,
        )
    yield from _without_inverse(pair, remedy)


def _without_inverse(pair: Structure, remedy: str) -> Iterator[Problem]:
    """Latents of a guide whose density is known at its own draws only."""
    for name, site in proposal(pair.traces[1]):
        try:
            site["fn"].log_prob(site["value"].clone(), *site["args"], **site["kwargs"])
        except (NotImplementedError, KeyError) as error:  # KeyError: planar flows of Pyro
            yield Problem(
                f"guide: the density of {name!r} at a given value is not known ({first_line(error)}); "
                f"expected distributions that have log_prob and transforms that have an inverse, or {remedy}",
                judged=False,
            )


def _observed(pair: Structure) -> dict[str, Any]:
    """The argument of each observed site. Raises ``ValueError`` for a pair whose data cannot be simulated."""
    try:
        keys = observed_arguments(pair.model, pair.batch)
        check_generative(pair.model, pair.batch, keys)
    except ValueError as error:
        raise ValueError(f"sleep phase: {str(error).removeprefix('simulate: ')}") from error
    return keys
