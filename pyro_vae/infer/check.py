"""What is wrong with a pair, said before it trains."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.batches import Batch, Batches, InMemory, fitting
from pyro_vae.pair import Program, run_pair, untouched


def check_first_batch(model: Program, guide: Program, batches: Batches) -> Batch:
    """Run the pair once on the first batch and raise ``ValueError`` for what would go wrong; nothing is moved by it."""
    with untouched():
        batch = fitting(model, next(iter(batches.epoch(shuffle=False))))
        model_trace, guide_trace = _run(model, guide, batch)
        fixed = isinstance(batches, InMemory) and not batches.drawn
        whole = fitting(model, batches.whole) if fixed else batch  # type: ignore[attr-defined]
        problems = [
            *_site_problems(model_trace, guide_trace),
            *_support_problems(model_trace, batch, whole),
            *_training_problems(model_trace, guide_trace),
        ]
    if problems:
        raise ValueError("; ".join(problems))
    return batch


def _run(model: Program, guide: Program, batch: Batch) -> tuple[Trace, Trace]:
    try:
        return run_pair(model, guide, *batch.args, **batch.kwargs)
    except Exception as error:
        cause = str(error).split("\n", 1)[0]  # Pyro appends the shapes of the whole trace
        shapes = {name: tuple(part.shape) for name, part in batch.tensors.items()}
        raise ValueError(f"pair: it fails on the first batch, of shape {shapes}: {cause}") from error


def _latents(trace: Trace) -> dict[str, Any]:
    sites = prune_subsample_sites(trace).nodes.items()
    return {name: site for name, site in sites if site["type"] == "sample" and not site["is_observed"]}


def _site_problems(model_trace: Trace, guide_trace: Trace) -> list[str]:
    model, guide = _latents(model_trace), _latents(guide_trace)
    problems = []
    for name, site in model.items():
        if name not in guide and not site["infer"].get("enumerate"):
            problems.append(f"guide: it has no site {name!r}, which the model samples; expected pyro.sample({name!r}, …)")
    for name, site in guide.items():
        if name not in model and not site["infer"].get("is_auxiliary"):
            problems.append(
                f"model: it has no latent {name!r}, which the guide samples; expected one of {sorted(model)}, or mark the "
                'site infer={"is_auxiliary": True}'
            )
    for name in model.keys() & guide.keys():
        shapes = [tuple(trace[name]["fn"].event_shape) for trace in (model, guide)]
        if shapes[0] != shapes[1]:
            problems.append(
                f"guide: {name!r} has event_shape {shapes[1]} but in the model {shapes[0]}; declare the same event "
                "dimensions with .to_event(k)"
            )
    if not any(site["type"] == "sample" and site["is_observed"] for site in model_trace.nodes.values()):
        problems.append("model: it observes nothing; expected pyro.sample(name, distribution, obs=x)")
    return problems


def _training_problems(*traces: Trace) -> list[str]:
    parameters = [site["value"] for trace in traces for site in trace.nodes.values() if site["type"] == "param"]
    if any(value.requires_grad for value in parameters):
        return []
    return [
        "pair: it has nothing to train; expected parameters with requires_grad: use PyroModules, pyro.module(name, net) or "
        "pyro.param(name, start)"
    ]


def _support_problems(model_trace: Trace, batch: Batch, whole: Batch) -> list[str]:
    """Rows of the data outside the likelihood's support; of all data where an observed site is an argument as it stands."""
    problems = []
    for name, site in prune_subsample_sites(model_trace).nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
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
            problems.append(_outside(name, site["fn"], value[row], row, int((~fine).sum())))
    return problems


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
