"""What is wrong with a pair, said before it trains."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.batches import Batch, Batches, InMemory, as_batch, fitting
from pyro_vae.pair import ElboTerms, Program, data_plates, elbo_terms, run_pair, untouched


class SiteReport(NamedTuple):
    """One random variable of a pair. ``plates`` from the outside in; ``programs`` are those that have the site."""

    name: str
    observed: bool
    programs: tuple[str, ...]
    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    distribution: str


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pair` found: the sites of the pair, its data plates, and what is wrong with it, if anything."""

    sites: tuple[SiteReport, ...]
    data_plates: frozenset[str]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        header = ("site", "", "in", "plates", "event_shape", "distribution")
        rows = [header] + [
            (s.name, "observed" if s.observed else "latent", ", ".join(s.programs), ", ".join(s.plates) or "-",
             str(s.event_shape), s.distribution)
            for s in self.sites
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        verdict = [f"- {problem}" for problem in self.problems] or ["Nothing is wrong with this pair."]
        return "\n".join([*table, "", *verdict])


def check_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> PairReport:
    """Run a pair on a batch and say what is wrong with it; nothing is moved by it.

    Looked at: sites missing on one side; event shapes and plates that differ between model and guide; batch dimensions that
    no plate declares; data that are not finite, or outside the likelihood's support, with the row; draws of the guide
    outside the model's support and of the model outside the guide's; log-probabilities that are not finite, with the row;
    nothing to train, or networks that run but are not registered; and data that are not independent given the latents that
    they share: terms of one datum that move when another is replaced, as under batch normalization.

    :param args: the arguments of model and guide, tensors or arrays ``(batch, *event)``.
    :return: :class:`PairReport`; ``print(check_pair(...))`` is a table of the sites and the list of problems.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
    >>> print(check_pair(model, guide, torch.ones(5)))
    site            in            plates  event_shape  distribution
    z     latent    model, guide  data    ()           Normal
    x     observed  model         data    ()           Normal
    <BLANKLINE>
    - guide: 'z' is in plates () but in the model in ('data',); expected the same plates on both sides
    """
    batch = as_batch(args) if args else Batch((), {})
    batch = Batch(batch.args, as_batch(kwargs).kwargs)
    try:
        batch.check("data")
        problems, traces, plates = _look(model, guide, batch, batch)
    except ValueError as error:
        return PairReport((), frozenset(), (str(error),))
    if not problems and plates:
        problems = [*_log_prob_problems(traces, batch, plates), *_coupling_problems(model, guide, batch, plates)]
    return PairReport(tuple(_sites(*traces)), plates, tuple(problems))


def check_first_batch(model: Program, guide: Program, batches: Batches) -> Batch:
    """The part of :func:`check_pair` that costs one run of the pair, on the first batch. Raises ``ValueError``."""
    with untouched():
        batch = fitting(model, next(iter(batches.epoch(shuffle=False))))
    fixed = isinstance(batches, InMemory) and not batches.drawn
    problems, _, _ = _look(model, guide, batch, fitting(model, batches.whole) if fixed else batch)  # type: ignore[attr-defined]
    if problems:
        raise ValueError("; ".join(problems))
    return batch


def _look(model: Program, guide: Program, batch: Batch, whole: Batch) -> tuple[list[str], tuple[Trace, Trace], frozenset[str]]:
    """What one run of the pair shows."""
    with untouched() as ran:
        model_trace, guide_trace = traces = _run(model, guide, batch)
        problems = [
            *_site_problems(model_trace, guide_trace),
            *_plate_problems(model_trace, guide_trace),
            *_support_problems(model_trace, guide_trace),
            *_data_problems(model_trace, batch, whole),
            *_training_problems(ran, *traces),
        ]
    return problems, traces, frozenset() if problems else data_plates(model, batch)


def _run(model: Program, guide: Program, batch: Batch) -> tuple[Trace, Trace]:
    try:
        return run_pair(model, guide, *batch.args, **batch.kwargs)
    except Exception as error:
        cause = str(error).split("\n", 1)[0]  # Pyro appends the shapes of the whole trace
        shapes = {name: tuple(part.shape) for name, part in batch.tensors.items()}
        raise ValueError(f"pair: it fails on a batch of shape {shapes}: {type(error).__name__}: {cause}") from error


def _sampled(trace: Trace) -> Iterator[tuple[str, dict]]:
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield name, site


def _latents(trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in _sampled(trace) if not site["is_observed"]}


def _plates(site: dict) -> tuple[str, ...]:
    return tuple(frame.name for frame in site["cond_indep_stack"])


def _family(distribution: Any) -> str:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _sites(model_trace: Trace, guide_trace: Trace) -> Iterator[SiteReport]:
    model, guide = dict(_sampled(model_trace)), dict(_sampled(guide_trace))
    for name in model | guide:
        programs = tuple(side for side, sites in (("model", model), ("guide", guide)) if name in sites)
        site = model[name] if name in model else guide[name]
        fn = site["fn"]
        yield SiteReport(name, site["is_observed"], programs, _plates(site), tuple(fn.event_shape), _family(fn))


def _site_problems(model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name, site in model.items():
        if name not in guide and not site["infer"].get("enumerate"):
            yield f"guide: it has no site {name!r}, which the model samples; expected pyro.sample({name!r}, …)"
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary"):
            yield (
                f"model: it has no latent {name!r}, which the guide samples; expected one of {sorted(model)}, or mark the "
                'site infer={"is_auxiliary": True}'
            )
    for name in model.keys() & guide.keys():
        shapes = [tuple(trace[name]["fn"].event_shape) for trace in (model, guide)]
        if shapes[0] != shapes[1]:
            yield (
                f"guide: {name!r} has event_shape {shapes[1]} but in the model {shapes[0]}; declare the same event "
                "dimensions with .to_event(k)"
            )
    if not any(site["is_observed"] for _, site in _sampled(model_trace)):
        yield "model: it observes nothing; expected pyro.sample(name, distribution, obs=x)"


def _plate_problems(model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name in model.keys() & guide.keys():
        plates = [_plates(sites[name]) for sites in (model, guide)]
        if set(plates[0]) != set(plates[1]):
            yield (
                f"guide: {name!r} is in plates {plates[1]} but in the model in {plates[0]}; expected the same plates on both "
                "sides"
            )
    for side, trace in (("model", model_trace), ("guide", guide_trace)):
        for name, site in _sampled(trace):
            declared = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            shape = site["fn"].batch_shape
            for dim in range(-len(shape), 0):
                if shape[dim] > 1 and dim not in declared:
                    yield (
                        f"{side}: {name!r} has batch_shape {tuple(shape)}, whose dimension {dim} lies in no plate; declare it "
                        f"as part of the event with .to_event({-dim}), or put the site in a pyro.plate"
                    )
                    break


def _support_problems(model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    """Draws of the guide outside the model's support, and draws of the model outside the guide's."""
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name in model.keys() & guide.keys():
        p, q = model[name]["fn"], guide[name]["fn"]
        if p.event_shape != q.event_shape or not (q.has_rsample or q.has_enumerate_support or hasattr(q, "support")):
            continue
        if not _inside(p, guide[name]["value"]):
            yield (
                f"guide: it draws {name!r} outside the model's support, {p.support}; expected a guide on that support, such as "
                f"one of {_family(p)}"
            )
        elif not _inside(q, p.sample()):
            yield (
                f"guide: {name!r} has support {q.support} but the model {p.support}, so the guide cannot reach the whole "
                f"posterior; expected a guide on the model's support, such as one of {_family(p)}"
            )


def _inside(distribution: Any, value: Tensor) -> bool:
    try:
        return bool(distribution.support.check(value).all())
    except (NotImplementedError, RuntimeError, AttributeError):  # a distribution that does not tell, as Delta's
        return True


def _data_problems(model_trace: Trace, batch: Batch, whole: Batch) -> Iterator[str]:
    """Rows of the data outside the likelihood's support; of all data where an observed site is an argument as it stands."""
    for name, site in _sampled(model_trace):
        if not site["is_observed"]:
            continue
        value = site["value"]
        for key, part in batch.tensors.items():
            if part.shape == value.shape and torch.equal(part.to(value), value):
                value = whole.tensors[key].to(value)
        try:
            fine = site["fn"].support.check(value)
        except (NotImplementedError, RuntimeError):
            continue
        fine = fine.reshape(len(value), -1).all(1) if fine.dim() else fine.reshape(1)
        if not fine.all():
            row = int((~fine).nonzero()[0])
            yield _outside(name, site["fn"], value[row] if value.dim() else value, row, int((~fine).sum()))


def _outside(name: str, distribution: dist.TorchDistribution, value: Tensor, row: int, count: int) -> str:
    support = distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    low, high = (float(end) for end in value.aminmax())
    cause = f"data: row {row} ({count} in all) lies outside the support of {name!r}, {support}: it is in [{low:g}, {high:g}]"
    if support is not constraints.boolean:
        return f"{cause}; rescale the data or use another conditional"
    if low >= 0 and high <= 1:
        return (
            f'{cause}, grey; binarize them with load(…, binarize="threshold") or "stochastic", or keep "none" and use a '
            "continuous conditional such as ContinuousBernoulli or Normal"
        )
    return f"{cause}; divide by the largest (255 for bytes), then binarize, or use another conditional"


def _training_problems(ran: Collection[nn.Module], *traces: Trace) -> Iterator[str]:
    values = [site["value"] for trace in traces for site in trace.nodes.values() if site["type"] == "param"]
    if not any(value.requires_grad for value in values):
        yield (
            "pair: it has nothing to train; expected parameters with requires_grad: use PyroModules, "
            "pyro.module(name, net) or pyro.param(name, start)"
        )
        return
    registered = {id(v.unconstrained() if hasattr(v, "unconstrained") else v) for v in values}
    for module in ran:
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and not any(id(p) in registered for p in own):
            yield (
                f"pair: a {type(module).__name__} runs in it but is not registered, so it would never be trained; expected "
                "pyro.module(name, net), or an attribute of a PyroModule, or net.requires_grad_(False) where it is frozen"
            )
            return


def _log_prob_problems(traces: tuple[Trace, Trace], batch: Batch, plates: frozenset[str]) -> Iterator[str]:
    with torch.no_grad():
        terms = elbo_terms(*traces, plates, num_data=batch.num_rows)
    for name in ("reconstruction", "kl"):
        term = getattr(terms, name)
        bad = (~torch.isfinite(term)).nonzero().flatten().tolist()
        if bad:
            yield (
                f"pair: the {name} term of row {bad[0]} is {float(term[bad[0]])} ({len(bad)} such rows); "
                "expected finite log-probabilities: raise min_scale, or check the networks' output"
            )


def _coupling_problems(model: Program, guide: Program, batch: Batch, plates: frozenset[str]) -> Iterator[str]:
    """Terms of other data that move when one datum is replaced by its neighbour, at the same draws of the latents."""
    n = batch.num_rows
    i = n // 2
    rows = torch.arange(n)
    rows[i] = i - 1
    if n < 2:
        return
    with untouched(), torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)

    def terms(of: Batch) -> ElboTerms:
        # the same latents in both runs: a sampler that rejects would hand the noise on to other rows
        with untouched(seed=0), torch.no_grad():
            traces = run_pair(model, poutine.replay(guide, trace=drawn), *of.args, **of.kwargs)
            return elbo_terms(*traces, plates, num_data=n)

    before, after = terms(batch), terms(batch.map(lambda part: part[rows]))
    for name, one, two in zip(ElboTerms._fields, before, after, strict=True):
        moved = ((one - two).abs() > 1e-4 * (1 + one.abs())).nonzero().flatten()
        others = moved[moved != i]
        if name != "elbo" and len(others):
            yield (
                f"pair: the {name} term of row {int(others[0])} moves by {float((one - two)[others[0]]):.2g} when row {i} is "
                "replaced, so an ELBO per datum does not exist; expected data that are independent given their latents: use "
                "LayerNorm or GroupNorm in place of batch normalization"
            )
