"""What can be wrong with a pair, one generator of messages for each kind; :mod:`pyro_vae.infer.check` asks them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.batches import Batch
from pyro_vae.pair import Program, SiteSums, elbo_terms, run_pair, sampled, sum_sites, untouched


def first_problems(
    traces: tuple[Trace, Trace], batch: Batch, ran: Mapping[nn.Module, bool], whole: Batch | None = None
) -> Iterator[str]:
    """What one run of the pair shows."""
    yield from _site_problems(*traces)
    yield from _plate_problems(*traces)
    yield from _support_problems(*traces)
    yield from data_problems(traces[0], batch, whole)
    yield from _training_problems(ran, *traces)


def _latents(trace: Trace) -> dict[str, Any]:
    return {name: site for name, site in sampled(trace) if not site["is_observed"]}


def plates_of(site: dict) -> tuple[str, ...]:
    return tuple(frame.name for frame in site["cond_indep_stack"])


def family(distribution: Any) -> str:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return type(distribution).__name__


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
    if not any(site["is_observed"] for _, site in sampled(model_trace)):
        yield "model: it observes nothing; expected pyro.sample(name, distribution, obs=x)"


def _plate_problems(model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name in model.keys() & guide.keys():
        plates = [plates_of(sites[name]) for sites in (model, guide)]
        if set(plates[0]) != set(plates[1]):
            yield (
                f"guide: {name!r} is in plates {plates[1]} but in the model in {plates[0]}; expected the same plates on both "
                "sides"
            )
    for side, trace in (("model", model_trace), ("guide", guide_trace)):
        for name, site in sampled(trace):
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
    """Draws of the guide that the model gives no probability."""
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name in model.keys() & guide.keys():
        p, q = model[name]["fn"], guide[name]["fn"]
        if p.event_shape == q.event_shape and not _inside(p, lambda name=name: guide[name]["value"]):  # type: ignore[misc]
            yield (
                f"guide: it draws {name!r} outside the model's support, {p.support}; expected a guide on that support, such as "
                f"one of {family(p)}"
            )


def reach_problems(model_trace: Trace, guide_trace: Trace) -> Iterator[str]:
    """Draws of the model that the guide gives no probability: a guide may be truncated knowingly, so training allows it."""
    model, guide = _latents(model_trace), _latents(guide_trace)
    for name in model.keys() & guide.keys():
        p, q = model[name]["fn"], guide[name]["fn"]
        if p.event_shape == q.event_shape and not _inside(q, p.sample):
            yield (
                f"guide: {name!r} has support {q.support} but the model {p.support}, so the guide cannot reach the whole "
                f"posterior; expected a guide on the model's support, such as one of {family(p)}"
            )


def _inside(distribution: Any, draw: Callable[[], Tensor]) -> bool:
    try:
        return bool(distribution.support.check(draw()).all())
    except (NotImplementedError, RuntimeError, AttributeError):  # one that does not tell, as Delta, or cannot be drawn from
        return True


def data_problems(model_trace: Trace, batch: Batch, whole: Batch | None = None) -> Iterator[str]:
    """Rows of the data outside the likelihood's support; of all data where an observed site is an argument as it stands."""
    for name, site in sampled(model_trace):
        value = site["value"]
        if not site["is_observed"] or not value.numel():  # pyro.factor observes nothing
            continue
        support = _elementwise(site["fn"].support)
        rowwise = any(isinstance(bound, Tensor) and bound.dim() for bound in vars(support).values())
        if whole is not None and not rowwise:
            for key, part in batch.tensors.items():
                if part.shape == value.shape and torch.equal(part.to(value), value):
                    value = whole.tensors[key].to(value)
        try:
            outside = ~support.check(value)
            for mask in _masks(site):
                outside = outside & mask
        except (NotImplementedError, RuntimeError):
            continue
        rows = outside.reshape(len(value), -1).any(1) if outside.dim() else outside.reshape(1)
        if rows.any():
            row = int(rows.nonzero()[0])
            yield _outside(name, support, value[row] if value.dim() else value, row, int(rows.sum()))


def _elementwise(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _masks(site: dict) -> Iterator[Tensor]:
    """Masks on a site, by handlers and by its distribution: what is masked may hold anything."""
    if isinstance(site["mask"], Tensor):
        yield site["mask"].reshape(site["mask"].shape + (1,) * len(site["fn"].event_shape))
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution) and isinstance(fn._mask, Tensor):
            yield fn._mask.reshape(fn._mask.shape + (1,) * len(fn.event_shape))
        fn = fn.base_dist


def _outside(name: str, support: Any, value: Tensor, row: int, count: int) -> str:
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


def _training_problems(ran: Mapping[nn.Module, bool], *traces: Trace) -> Iterator[str]:
    values = [site["value"] for trace in traces for site in trace.nodes.values() if site["type"] == "param"]
    if not any(value.requires_grad for value in values):
        yield (
            "pair: it has nothing to train; expected parameters with requires_grad: use PyroModules, "
            "pyro.module(name, net) or pyro.param(name, start)"
        )
        return
    registered = {id(v.unconstrained() if hasattr(v, "unconstrained") else v) for v in values}
    for module, with_gradients in ran.items():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and with_gradients]
        if own and not any(id(p) in registered for p in own):
            yield (
                f"pair: a {type(module).__name__} runs in it but is not registered, so it would never be trained; expected "
                "pyro.module(name, net), or an attribute of a PyroModule, or net.requires_grad_(False) where it is frozen"
            )
            return


def log_prob_problems(traces: tuple[Trace, Trace], batch: Batch, plates: frozenset[str]) -> Iterator[str]:
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


def coupling_problems(model: Program, guide: Program, batch: Batch, plates: frozenset[str]) -> Iterator[str]:
    """Local terms of other data that move when one datum is replaced by its neighbour, at the same draws of the latents."""
    n = batch.num_rows
    if n < 2:
        return
    i = n // 2
    rows = torch.arange(n)
    rows[i] = i - 1
    with untouched(), torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)

    def sums(of: Batch) -> dict[str, Tensor]:
        # the same latents in both runs: a sampler that rejects would hand the noise on to other rows
        with untouched(seed=0), torch.no_grad():
            traces = run_pair(model, poutine.replay(guide, trace=drawn), *of.args, **of.kwargs)
        local = dict(
            zip(("log p(x|z)", "log p(z)", "log q(z|x)"), _local(*(sum_sites(t, plates) for t in traces)), strict=True)
        )
        return {name: term for name, term in local.items() if term.shape == (n,)}  # not those of a subsample of the rows

    before, after = sums(batch), sums(batch.map(lambda part: part[rows]))
    for name, one in before.items():
        moved = ((one - after[name]).abs() > 1e-4 * (1 + one.abs())).nonzero().flatten()
        others = moved[moved != i]
        if len(others):
            j = int(others[0])
            yield (
                f"pair: {name} of row {j} moves by {float((one - after[name])[j]):.2g} when row {i} is replaced, so an ELBO "
                "per datum does not exist; expected data that are independent given what they share: LayerNorm or GroupNorm "
                "in place of batch normalization"
            )


def _local(model: SiteSums, guide: SiteSums) -> tuple[Tensor, Tensor, Tensor]:
    return model.observed, model.latent, guide.latent + guide.observed
