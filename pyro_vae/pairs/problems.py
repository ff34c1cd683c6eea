"""The problems that a pair can have. Each function generates the problems of one kind;
:mod:`pyro_vae.pairs.check` calls the functions."""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.data.batches import Batch
from pyro_vae.pairs.elbo import elbo_terms
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.structure import Structure, first_line, is_point, row_dim, trained_parameters
from pyro_vae.pairs.traces import masks_of, proposal, run_pair, sampled, sum_sites


class Problem(NamedTuple):
    """A problem of a pair. If ``judged`` is true, results are defined but probably wrong, and ``check=False``
    allows the problem. Otherwise results are undefined, and the problem is always an error."""

    text: str
    judged: bool = True


def pair_problems(pair: Structure) -> Iterator[Problem]:
    """Problems of a pair for every function that takes a pair."""
    yield from _site_problems(pair)
    yield from _auxiliary_problems(pair)
    yield from _plate_problems(pair)
    yield from _support_problems(pair)
    outside = [
        Problem(text)
        for text in data_problems(pair.traces[0], pair.batch, pair.plates, None, pair.unvalidated[0])
    ]
    yield from outside or _density_problems(pair)


def per_datum_problems(pair: Structure) -> Iterator[Problem]:
    """Why a pair has no log-weights per datum."""
    outside = {
        name: bool(site["infer"].get("is_auxiliary"))
        for _, name, site in pair.sites
        if row_dim(site, pair.plates) is None and (not site["is_observed"] or _counts(pair, name, site))
    }
    if outside:
        named = [
            name for name, is_auxiliary in outside.items() if not is_auxiliary
        ] or outside  # auxiliary sites, such as those of an autoguide, only if there are no others
        yield Problem(
            f"pair: {_lie(named)} in no data plate, so there is no evidence per datum; expected all sites "
            "within "
            'pyro.plate("data", len(x)) over the rows of the data. If all data share the latents, use '
            "joint_log_weights, or joint=True in evidence.importance, elbo, prior_monte_carlo, ais, and in "
            "diagnose, posterior_draws, to_arviz",
            judged=False,
        )
    for side, name, site in pair.sites:
        around = [
            f"{frame.name!r}"
            for frame in site["cond_indep_stack"]
            if frame.name in pair.plates and frame.vectorized
        ]
        if len(around) > 1:
            yield Problem(
                f"{side}: {name!r} lies in the plates {' and '.join(around)}, which both have "
                f"{pair.num_rows} rows, so it is ambiguous which is the data plate "
                f"({pair.other_rows_error or 'both sizes change with the number of rows'}); expected a pair "
                "that runs on another number of rows, or joint=True for the evidence of all data together",
                judged=False,
            )
            break
    yield from subsample_problems(pair)


def joint_problems(pair: Structure) -> Iterator[Problem]:
    """Why a pair has no log-weights of all data together."""
    yield from subsample_problems(pair)
    full = {
        f.name: f.full_size
        for _, _, site in pair.sites
        for f in site["cond_indep_stack"]
        if f.name in pair.plates
    }
    for plate, size in full.items():
        if size not in (pair.num_rows, -1):
            yield Problem(
                f"pair: plate {plate!r} declares {size} data, of which {pair.num_rows} are given, so the "
                "evidence of all data cannot be estimated; expected all data, or a plate over the rows that "
                "are given",
                judged=False,
            )


def _counts(pair: Structure, name: str, site: dict) -> bool:
    """Whether an observed site has a non-zero log-probability: a masked site and ``pyro.factor`` of 0 have
    none."""
    sites = [site]
    if pair.other_traces is not None and name in pair.other_traces[0].nodes:
        sites.append(pair.other_traces[0].nodes[name])
    return any(
        bool(scale_and_mask(each["fn"].log_prob(each["value"]), mask=each["mask"]).any()) for each in sites
    )


def coupled_latents_problems(pair: Structure) -> Iterator[Problem]:
    """The problem that rows depend on the latents of other rows, as in a random walk over the rows.

    :param pair: a structure with ``particles``.
    """
    if pair.particles is not None and pair.particles.coupled:
        yield Problem(
            "pair: the log-weight of a row changes when the latents of another row are replaced, so there is "
            "no evidence per datum; expected rows that are independent given their own latents and the "
            "latents that all rows share. If the rows depend on each other, such as the steps of one time "
            "series, use joint_log_weights, or joint=True in evidence.importance, elbo, prior_monte_carlo, "
            "ais, and in diagnose, posterior_draws, to_arviz; or make a whole series one row of the data"
        )


def dividing_problems(pair: Structure, num_data: int) -> Iterator[Problem]:
    """Why a pair cannot be evaluated in minibatches: the log-probabilities of a row depend on the other rows
    of the batch.

    :param pair: a structure with ``particles``.
    """
    if pair.particles is not None and pair.particles.rows_independent is False:
        yield Problem(
            "pair: at the same latents, the log-probabilities of a row change when other rows are left out, "
            f"so minibatches of {pair.num_rows} of the {num_data} data give other results than all data at "
            "once. Usual causes: a statistic of the batch (x.mean()), a parameter indexed by the position in "
            "the batch (loc[:len(x)]), a prior that uses len(x). Pass batch_size=None to take all data at "
            "once"
        )


def outside_of_plates(pair: Structure) -> list[str]:
    """The sites of the model outside of the data plates whose shapes depend on the number of rows."""
    if pair.other_traces is None:
        return []
    others, outside = dict(sampled(pair.other_traces[0])), []
    for name, site in sampled(pair.traces[0]):
        if row_dim(site, pair.plates) is None and name in others:
            shapes = [
                (tuple(each["value"].shape), tuple(each["fn"].batch_shape)) for each in (site, others[name])
            ]
            if shapes[0] != shapes[1]:
                outside.append(name)
    return outside


def subsample_problems(pair: Structure) -> Iterator[Problem]:
    inside: dict[tuple[str, int, int], list[str]] = {}
    for _, name, site in pair.sites:
        for frame in site["cond_indep_stack"]:
            inside.setdefault((frame.name, frame.size, frame.full_size), []).append(name)
    for (plate, size, full_size), names in inside.items():
        if plate in pair.plates and size not in (pair.num_rows, -1):
            yield Problem(
                f"pair: plate {plate!r} subsamples {size} of the {pair.num_rows} rows at each run, so there "
                "are no log-weights per datum; expected a plate over the rows that are given",
                judged=False,
            )
        elif plate not in pair.plates and full_size != size:
            yield Problem(
                f"pair: {_lie(names)} in plate {plate!r}, which subsamples {size} of its {full_size} rows, "
                "so the evidence cannot be estimated; expected all of its rows",
                judged=False,
            )


def _lie(sites: Iterable[str]) -> str:
    """Subject and verb of an error message, such as ``'a' and 'b' lie``. Of many sites, four are named and
    the others are counted."""
    names = [repr(name) for name in dict.fromkeys(sites)]
    listed = names if len(names) <= 5 else [*names[:4], f"{len(names) - 4} more sites"]
    return f"{listed[0]} lies" if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]} lie"


def rows_problem(pair: Structure) -> Problem | None:
    """The problem that a plate of the model is over a dimension of the data that is not the first. Rows are
    counted along the first dimension."""
    if not pair.batch.tensors:
        return None
    for name, site in sampled(pair.traces[0]):
        for frame in site["cond_indep_stack"] if site["is_observed"] else ():
            for key, part in pair.batch.tensors.items():
                size = frame.full_size
                if not frame.vectorized or size <= 1 or size == len(part) or size not in part.shape[1:]:
                    continue
                if pair.plates and not _is_within(pair, frame.name):
                    continue
                dim = part.shape[1:].index(size) + 1
                rows = f"no plate is over the {len(part)} rows of the data"
                remedy = f"pass the data with rows first, such as x.transpose(0, {dim})"
                if pair.plates:
                    inner = min(pair.plates)
                    rows = f"all sites of plate {inner!r} (the {len(part)} rows of the data) lie in it too"
                    remedy += f", or give plate {inner!r} the size len(x) if its rows are the data"
                return Problem(
                    f"model: {name!r} lies in plate {frame.name!r} of {size} rows, and {rows}: dimension "
                    f"{dim} of {key} has {size}. A datum is an index of dimension 0, so a mean per datum "
                    f"would be a mean over the wrong dimension; {remedy}"
                )
    return None


def _is_within(pair: Structure, outer: str) -> bool:
    """Whether the data plates are nested in the plate ``outer``, which has more sites. False unless the pair
    runs on one number of rows only: its data plates are then recognized by their size alone."""
    if pair.other_rows is not None or any(len(part) != pair.num_rows for part in pair.batch.tensors.values()):
        return False
    sites = list(sampled(pair.traces[0]))
    within = {name for name, site in sites if outer in plates_of(site)}
    return {name for name, site in sites if row_dim(site, pair.plates) is not None} < within


def plates_of(site: dict) -> tuple[str, ...]:
    return tuple(frame.name for frame in site["cond_indep_stack"])


def family(distribution: Any) -> str:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _site_problems(pair: Structure) -> Iterator[Problem]:
    model, guide = pair.latents, pair.guide_latents
    for name, site in model.items():
        if name not in guide and site["infer"].get("enumerate") != "parallel":
            is_summed = site["infer"].get("enumerate") is not None
            remedy = (
                'infer={"enumerate": "parallel"} in the model' if is_summed else f"pyro.sample({name!r}, …)"
            )
            yield Problem(
                f"guide: it has no site {name!r}, which the model samples; expected {remedy}", judged=False
            )
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary"):
            yield Problem(
                f"guide: its site {name!r} is not in the model, so log q(z|x) is not known; expected one of "
                f"{sorted(model)}, "
                'or mark the site infer={"is_auxiliary": True}',
                judged=False,
            )
    for name in model.keys() & guide.keys():
        shapes = [tuple(sites[name]["fn"].event_shape) for sites in (model, guide)]
        if shapes[0] != shapes[1]:
            yield Problem(
                f"guide: {name!r} has event_shape {shapes[1]} but in the model it has {shapes[0]}; declare "
                "the same event dimensions with .to_event(k)",
                judged=False,
            )
    for name in model.keys() & guide.keys():
        if not _same_mask(model[name]["mask"], guide[name]["mask"]):
            yield Problem(
                f"guide: {name!r} is masked differently than in the model, so p and q count different "
                "entries of it; expected the same poutine.mask on both sides"
            )
    if not any(site["is_observed"] for _, site in sampled(pair.traces[0])):
        yield Problem("model: it observes nothing; expected pyro.sample(name, distribution, obs=x)")


def _auxiliary_problems(pair: Structure) -> Iterator[Problem]:
    """The problem that a guide has points (Delta), and auxiliary sites from which no point is computed, see
    :func:`.proposal`."""
    auxiliary = {
        name
        for name, site in pair.guide_latents.items()
        if site["infer"].get("is_auxiliary") and not is_point(site)
    }
    points = {
        n
        for n, site in pair.guide_latents.items()
        if is_point(site) and not site["infer"].get("is_auxiliary")
    }
    if not auxiliary or not points or pair.is_handler:
        return
    with untouched(training=False, seed=0), torch.no_grad(), TrackProvenance():
        trace = poutine.trace(pair.guide).get_trace(*pair.batch.args, **pair.batch.kwargs)
    behind = {name for point in points for name in get_provenance(trace.nodes[point]["value"])}
    if others := sorted(auxiliary - behind):
        yield Problem(
            f"guide: {min(points)!r} is a point (Delta) that is not computed from the auxiliary site "
            f"{others[0]!r}, so it is not known whether log q(z|x) counts that site; compute the point from "
            "the auxiliary site, as autoguides do, or use no Delta",
            judged=False,
        )


def _same_mask(a: Tensor | bool | None, b: Tensor | bool | None) -> bool:
    one, two = (torch.as_tensor(True if mask is None else mask) for mask in (a, b))
    try:
        return bool((one == two.to(one.device)).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def _plate_problems(pair: Structure) -> Iterator[Problem]:
    model, guide = pair.latents, pair.guide_latents
    for name in model.keys() & guide.keys():
        plates = [plates_of(sites[name]) for sites in (model, guide)]
        common = [_common_names(sites[name], pair) for sites in (model, guide)]
        dims = [
            sorted(f.dim for f in sites[name]["cond_indep_stack"] if f.vectorized) for sites in (model, guide)
        ]
        if common[0] != common[1]:
            yield Problem(
                f"guide: {name!r} is in plates {plates[1]} but in the model in {plates[0]}; expected the "
                "same plates on both sides"
            )
        elif dims[0] != dims[1]:
            yield Problem(
                f"guide: the plates of {name!r} have dimensions {dims[1]} but in the model {dims[0]}; "
                "expected the same dimensions on both sides: pass dim to pyro.plate",
                judged=False,
            )
    for side, trace in zip(("model", "guide"), pair.traces, strict=True):
        for name, site in sampled(trace):
            yield from _undeclared(side, name, site)
            shape = site["fn"].batch_shape
            for frame in site["cond_indep_stack"]:
                if frame.name not in pair.plates or not frame.vectorized or frame.size >= 0:
                    continue
                if (
                    (len(shape) < -frame.dim or shape[frame.dim] == 1)
                    and pair.num_rows > 1
                    and site["value"].numel()
                ):
                    yield Problem(
                        f"{side}: plate {frame.name!r} has no size and {name!r} has batch_shape "
                        f"{tuple(shape)}, so all data share one draw; give the plate its size, "
                        f"pyro.plate({frame.name!r}, len(x)), or expand the distribution"
                    )


def _common_names(site: dict, pair: Structure) -> set[str]:
    """Names of a site's plates, with one name for all data plates, since model and guide may name them
    differently. With enumeration the names must be equal, since Pyro eliminates variables by plate name."""
    data = pair.plates if pair.other_rows is not None and not pair.enumerates else ()
    return {"data" if name in data else name for name in plates_of(site)}


def _undeclared(side: str, name: str, site: dict) -> Iterator[Problem]:
    """Batch dimensions that no plate declares."""
    declared = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    fn = site["fn"]
    for dim in range(-len(fn.batch_shape), 0):
        if fn.batch_shape[dim] > 1 and dim not in declared:
            yield Problem(
                f"{side}: {name!r} has batch_shape {tuple(fn.batch_shape)}, whose dimension {dim} lies in no "
                f"plate; declare it as part of the event with .to_event({len(fn.event_shape) - dim}), or put "
                "the site in a pyro.plate"
            )
            return


def _support_problems(pair: Structure) -> Iterator[Problem]:
    """Draws of the guide outside of the model's support."""
    model, guide = pair.latents, pair.guide_latents
    for name in model.keys() & guide.keys():
        p, q = model[name]["fn"], guide[name]["fn"]
        value = guide[name]["value"]
        if p.event_shape == q.event_shape and name not in pair.unvalidated[0] and not _inside(p, value):
            yield Problem(
                f"guide: it draws {name!r} outside the model's support, {p.support}; expected a guide on "
                f"that support, such as one of {family(p)}"
            )


def reach_problems(pair: Structure) -> Iterator[Problem]:
    """Draws of the model outside of the guide's support. Training allows them: a guide may be truncated on
    purpose."""
    model, guide = pair.latents, pair.guide_latents
    for name in model.keys() & guide.keys():
        p, q = model[name]["fn"], guide[name]["fn"]
        if (
            p.event_shape == q.event_shape
            and name not in pair.unvalidated[1]
            and not _inside(q, drawn_from=p)
        ):
            yield Problem(
                f"guide: {name!r} has support {q.support} but in the model {p.support}, so the guide cannot "
                "reach the whole posterior; expected a guide on the model's support, such as one of "
                f"{family(p)}"
            )


def _inside(distribution: Any, value: Tensor | None = None, *, drawn_from: Any = None) -> bool:
    """Whether a value, or a draw of another distribution, is within the support of a distribution."""
    try:
        return bool(distribution.support.check(drawn_from.sample() if value is None else value).all())
    except (NotImplementedError, RuntimeError, AttributeError):  # no support, such as Delta, or no sampling
        return True


def data_problems(
    model_trace: Trace,
    batch: Batch,
    plates: frozenset[str],
    whole: Batch | None = None,
    trusted: frozenset[str] = frozenset(),
    rows: Tensor | None = None,
) -> Iterator[str]:
    """Rows of the data outside the likelihood's support.

    :param whole: all data. If an observed value is an argument of the model and its support is fixed, all
        data are checked instead of the batch. The support of a ``Multinomial`` is not fixed: it depends on
        the batch.
    :param trusted: names of sites that are not checked.
    :param rows: the numbers of the rows of the batch in the data, for the text.
    """
    for name, site in sampled(model_trace):
        value, fn = site["value"], site["fn"]
        if not site["is_observed"] or not value.numel() or name in trusted:  # pyro.factor observes nothing
            continue
        try:
            support = _elementwise(fn.support)
            if whole is not None and is_fixed(support):
                for key, part in batch.tensors.items():
                    if part.shape == value.shape and torch.equal(part.to(value), value):
                        value = whole.tensors[key].to(value)
            outside = ~support.check(value)
            for mask in masks_of(site):  # masked values are not checked
                outside = outside & mask
        except (NotImplementedError, RuntimeError):
            continue
        bad = _by_row(outside, row_dim(site, plates), len(fn.event_shape))
        if bad.any():
            row = int(bad.nonzero()[0])
            if rows is not None and len(rows) == len(bad):
                row = int(rows[row])
            yield _outside(name, support, value, outside, row, int(bad.sum()))


def is_fixed(support: Any) -> bool:
    """Whether a support is a constant of torch, which does not depend on the distribution's parameters."""
    return any(support is each for each in vars(constraints).values())


def has_fixed_support(model_trace: Trace) -> bool:
    """Whether the supports of all observed sites are fixed."""
    for _, site in sampled(model_trace):
        if site["is_observed"] and site["value"].numel():
            try:
                if not is_fixed(_elementwise(site["fn"].support)):
                    return False
            except NotImplementedError:
                continue
    return True


def _by_row(elements: Tensor, dim: int | None, event_dim: int) -> Tensor:
    """For each row, whether any of its elements is true: ``(rows,)``, or ``(1,)`` without a data plate."""
    if dim is None or elements.dim() < event_dim - dim:
        return elements.reshape(len(elements), -1).any(1) if elements.dim() else elements.reshape(1)
    rows = elements.movedim(dim - event_dim, 0)
    return rows.reshape(len(rows), -1).any(1)


def _elementwise(support: Any) -> Any:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _outside(name: str, support: Any, value: Tensor, outside: Tensor, row: int, count: int) -> str:
    found = (
        value.expand(torch.broadcast_shapes(value.shape, outside.shape))[outside]
        if outside.shape == value.shape
        else value
    )
    low, high = (float(end) for end in found.aminmax())
    cause = (
        f"data: row {row} ({count} in all) lies outside the support of {name!r}, {support}: such values are "
        f"in [{low:g}, {high:g}]"
    )
    if support is not constraints.boolean:
        return f"{cause}; rescale the data or use another conditional"
    if low >= 0 and high <= 1:
        return (
            f'{cause}, so they are grey; binarize them with load(…, binarize="threshold") or "stochastic", '
            'or keep "none" and use a continuous conditional such as ContinuousBernoulli or Normal'
        )
    return f"{cause}; divide by the largest value (255 for bytes) and binarize, or use another conditional"


def _density_problems(pair: Structure) -> Iterator[Problem]:
    """Observed sites whose log-probability is not finite."""
    for side, trace in zip(("model", "guide"), pair.traces, strict=True):
        for name, site in sampled(trace):
            if side == "model" and site["is_observed"] and name not in pair.unvalidated[0]:
                try:
                    site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                except (RuntimeError, ValueError) as error:  # such as Bernoulli for integer tensors
                    is_integer = not site["value"].is_floating_point()
                    remedy = (
                        "floating data: x.float()" if is_integer else "data and parameters of matching shapes"
                    )
                    yield Problem(
                        f"model: the log-probability of {name!r} cannot be computed for data of "
                        f"{site['value'].dtype}: {first_line(error)}; expected {remedy}",
                        judged=False,
                    )
                    continue
                for row, value, count in improbable_rows(site, pair.plates):
                    if value == -math.inf and not _always(pair, name, row):
                        continue  # zero likelihood at this draw of the latents only
                    yield Problem(
                        f"model: the log-probability of {name!r} is {value} at row {row} ({count} such "
                        "rows); expected a finite number: check this row, or use another conditional",
                        judged=False,
                    )
                    break


def improbable_rows(site: dict, plates: frozenset[str]) -> Iterator[tuple[int, float, int]]:
    """The rows of a site whose log-probability is not finite: ``(row, value, number of such rows)``."""
    with torch.no_grad():
        log_prob = scale_and_mask(
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]).detach(), mask=site["mask"]
        )
    dim = row_dim(site, plates)
    bad = ~log_prob.isfinite()
    if not bad.any():
        return
    rows = _by_row(bad, dim, 0)
    by_row = (
        log_prob.movedim(dim, 0).reshape(len(rows), -1)
        if dim is not None and log_prob.dim() >= -dim
        else (log_prob.reshape(len(rows), -1))
    )
    for row in rows.nonzero().flatten().tolist():
        values = by_row[row]
        yield row, float(values[~values.isfinite()][0]), int(rows.sum())


def _always(pair: Structure, name: str, row: int) -> bool:
    """Whether the log-probability of a row is not finite at several other draws of the latents too."""
    if not pair.latents:
        return True
    for seed in range(4):
        with untouched(training=False, seed=seed), torch.no_grad():
            trace, _ = run_pair(pair.model, pair.guide, *pair.batch.args, **pair.batch.kwargs)
        site = trace.nodes[name]
        if row not in {found for found, _, _ in improbable_rows(site, pair.plates)}:
            return False
    return True


def lost_parameters(pair: Structure) -> Iterator[Problem]:
    """The problem that a run created parameters that a fit has trained, because the param store of the fit is
    not active."""
    for program, trace in zip((pair.model, pair.guide), pair.traces, strict=True):
        trained, asked = trained_parameters(program), set(trace.param_nodes)
        lost = [
            name
            for name in asked & trained.keys() & pair.created.keys()
            if trained[name]() is not pair.created[name]
        ]
        if lost:
            yield Problem(
                f"pair: it created the parameter {min(lost)!r} anew, although a fit in this process trained "
                "it, so the results would be those of an untrained pair; expected `with history.scope():` "
                "around the call, with the History that the fit returned, or check=False if the param store "
                "was cleared on purpose"
            )
            return


def training_problems(pair: Structure) -> Iterator[Problem]:
    """Why a pair, or a part of it, would not be trained. Only functions that train a pair call this, since a
    frozen pair can be evaluated."""
    parameters = {
        name: value.unconstrained() if hasattr(value := site["value"], "unconstrained") else value
        for trace in pair.traces
        for name, site in trace.nodes.items()
        if site["type"] == "param"
    }
    # parameters of a GuideMessenger are not in the traces
    stored = [value for _, value in pyro.get_param_store().named_parameters()]
    used = [*parameters.values(), *pair.created.values(), *(stored if pair.is_handler else ())]
    if not any(value.requires_grad for value in used):
        yield Problem(
            "pair: it has nothing to train; expected parameters with requires_grad: use PyroModules, "
            "pyro.module(name, net) or pyro.param(name, start)"
        )
        return
    registered = {id(value) for value in [*parameters.values(), *stored]}
    for module, with_gradients in pair.modules.items():
        own = {
            name: p
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad and with_gradients
        }
        if not own or any(id(p) in registered for p in own.values()):
            continue
        yield Problem(
            _replaced(own.values(), pair)
            or f"pair: {_named(module, pair)} runs but is not registered, so it would never be trained; "
            "expected pyro.module(name, net) with a name that no other network has, or a PyroModule that has "
            "the network as an attribute and calls it in forward or in a method marked @pyro_method; if the "
            "network is frozen, call net.requires_grad_(False)"
        )
        return


def _replaced(own: Collection[Tensor], pair: Structure) -> str:
    """A message if the param store has another tensor under the name of one of these parameters, ``""``
    otherwise."""
    model, guide = pair.traces
    for side, trace, other in (("model", model, guide), ("guide", guide, model)):
        for key, site in trace.nodes.items():
            if site["type"] != "param" or not any(start is p for start in site["args"][1:2] for p in own):
                continue
            name = key.partition("$$$")[0] if "$$$" in key else key.rpartition(".")[0]
            starts = other.nodes[key]["args"][1:2] if key in other.nodes else ()
            if any(start is not site["args"][1] for start in starts):
                return (
                    "pair: model and guide register different networks under one name in Pyro's param store, "
                    f"{name!r}, so the network of the {side} would never be trained; expected two "
                    "names: on one side, rename the attribute, or change the name passed to pyro.module"
                )
            return (
                f"pair: Pyro's param store holds a network of an earlier pair as {name!r}, so the network of "
                f"the {side} would never be trained; expected pyro.clear_param_store() before the first run "
                "of this pair, or a separate param store for this pair"
            )
    return ""


def _named(module: nn.Module, pair: Structure) -> str:
    """A description of a network, with its name in the PyroModule of model or guide if it has one."""
    for program in (pair.model, pair.guide):
        owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        for name, part in owner.named_modules() if isinstance(owner, nn.Module) else ():
            if part is module and name:
                return f"the network {name!r} of {type(owner).__name__}, a {type(module).__name__},"
    return f"a {type(module).__name__}"


def log_prob_problems(pair: Structure) -> Iterator[Problem]:
    with torch.no_grad():
        terms = elbo_terms(*pair.traces, pair.plates, num_data=pair.num_rows)
    for name in ("reconstruction", "kl"):
        term = getattr(terms, name)
        bad = (~torch.isfinite(term)).nonzero().flatten().tolist()
        if bad:
            yield Problem(
                f"pair: the {name} term of row {bad[0]} is {float(term[bad[0]])} ({len(bad)} such rows); "
                "expected finite log-probabilities: raise min_scale, or check the networks' output"
            )


def coupling_problems(pair: Structure) -> Iterator[Problem]:
    """The problem that the log-probabilities of other rows change, at the same latents, when one row of the
    data is replaced."""
    model, guide, batch, plates = pair.model, pair.guide, pair.batch, pair.plates
    n = batch.num_rows if batch.tensors else 0
    if n < 2:
        return
    i = n // 2
    rows = torch.arange(n)
    rows[i] = i - 1
    with untouched(), torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)

    def sums(of: Batch) -> dict[str, Tensor]:
        # replay the latents: at the same seed, rejection sampling may still give rows other noise
        with untouched(seed=0), torch.no_grad():
            traces = run_pair(model, poutine.replay(guide, trace=drawn), *of.args, **of.kwargs)
        p, q = sum_sites(sampled(traces[0]), plates), sum_sites(proposal(traces[1]), plates)
        local = {"log p(x|z)": p.observed, "log p(z)": p.latent, "log q(z|x)": q.latent}
        return {name: term for name, term in local.items() if term.shape == (n,)}  # without subsampled rows

    try:
        before, after = sums(batch), sums(batch.map(lambda part: part[rows]))
    except KeyError:  # from a transform that has no inverse except for its own draws
        return
    for name, one in before.items():
        moved = ((one - after[name]).abs() > 1e-4 * (1 + one.abs())).nonzero().flatten()
        others = moved[moved != i]
        if len(others):
            j = int(others[0])
            yield Problem(
                f"pair: in training mode {name} of row {j} changes by {float((one - after[name])[j]):.2g} "
                f"when row {i} is replaced, so there is no ELBO per datum; expected rows that are "
                "independent given the shared latents: LayerNorm or GroupNorm in place of batch normalization"
            )
