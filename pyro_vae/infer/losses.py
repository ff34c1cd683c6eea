"""The kinds of losses: how each is scaled by N/B on minibatches, and whether ``fit`` supports it."""

import math
from typing import Any, Literal, NamedTuple

import torch
from pyro.infer import (
    ELBO,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)

from pyro_vae.infer.objectives import Objective
from pyro_vae.pairs.problems import Problem
from pyro_vae.pairs.structure import Structure, row_dim
from pyro_vae.pairs.traces import subsampling_scale

Factor = Literal["sites", "objective", "none"]


class Loss(NamedTuple):
    """A kind of loss.

    - factor: what ``fit`` multiplies by N/B, the number of data over the rows of a minibatch. ``"sites"``:
      the log-probabilities of sites in data plates. ``"objective"``: the loss and its gradients.
      ``"none"``: nothing, so that minibatches are not supported.
    - bound: what the loss estimates
    - linear: whether the loss is linear in log-probabilities. Only then can β weight the latent terms, and
      minibatches be unbiased if all data share a latent.
    - has_value: whether its method ``loss`` returns a number
    - trains: whether ``fit`` supports the loss
    - reason: why ``fit`` does not support it, else empty
    """

    factor: Factor
    bound: str
    linear: bool = True
    has_value: bool = True
    trains: bool = True
    reason: str = ""


_JIT = "it compiles β and N/B of the first minibatch as constants; expected {} instead"

LOSSES: dict[type, Loss] = {
    Trace_ELBO: Loss("sites", "the ELBO"),
    TraceGraph_ELBO: Loss("sites", "the ELBO"),
    TraceMeanField_ELBO: Loss("sites", "the ELBO"),
    TraceEnum_ELBO: Loss("sites", "the ELBO, enumerated sites summed out"),
    RenyiELBO: Loss("objective", "the Rényi bound of order α", linear=False),
    TraceTMC_ELBO: Loss("objective", "the tensor Monte Carlo bound", linear=False),
    TraceTailAdaptive_ELBO: Loss(
        "objective", "no bound: an f-divergence by ranks of weights", linear=False, has_value=False
    ),
    Trace_MMD: Loss(
        "objective", "no bound: E_q[log p(x|z)] minus a kernel distance of q(z) from p(z)", linear=False
    ),
    ReweightedWakeSleep: Loss(
        "none",
        "two losses, of model and guide",
        linear=False,
        has_value=False,
        trains=False,
        reason="it has one joint weight for a batch, not one for each datum, and model and guide need an "
        "argument `observations`; expected pyro_vae.infer.ReweightedWakeSleep",
    ),
    EnergyDistance: Loss(
        "none",
        "no bound: an energy distance",
        linear=False,
        trains=False,
        reason="it is not an ELBO object and has no guide, so it has no ELBO; expected pyro.infer.SVI for it",
    ),
    JitTrace_ELBO: Loss("none", "the ELBO", trains=False, reason=_JIT.format("Trace_ELBO")),
    JitTraceEnum_ELBO: Loss("none", "the ELBO", trains=False, reason=_JIT.format("TraceEnum_ELBO")),
    JitTraceGraph_ELBO: Loss("none", "the ELBO", trains=False, reason=_JIT.format("TraceGraph_ELBO")),
    JitTraceMeanField_ELBO: Loss("none", "the ELBO", trains=False, reason=_JIT.format("TraceMeanField_ELBO")),
}
_UNKNOWN = Loss("none", "unknown")


def kind_of(loss: Any) -> Loss:
    """The kind of a loss, by its exact class, since a subclass may compute something else."""
    if isinstance(loss, Objective):
        return Loss("sites", loss.bound, linear=loss.linear)
    return LOSSES.get(type(loss), _UNKNOWN)


def name_of(loss: ELBO) -> str:
    """The class of a loss with its options, such as ``"IWAE(num_particles=5, estimator='iwae')"``."""
    if isinstance(loss, Objective):
        return repr(loss)
    options = {"num_particles": loss.num_particles} if loss.num_particles > 1 else {}
    options |= {"alpha": loss.alpha} if hasattr(loss, "alpha") else {}
    return f"{type(loss).__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


def check_loss(
    loss: Any,
    pair: Structure,
    num_data: int,
    *,
    annealed: bool = False,
    check: bool = True,
    verb: str = "fit",
    num_processes: int = 1,
) -> None:
    """Raise ``ValueError`` for a loss that is not supported for this pair and these minibatches.

    :param annealed: whether latent terms are weighted by β.
    :param num_processes: the number of ranks, which divide the rows of a batch.
    :param check: ``False`` assumes that an unknown subclass of ``ELBO`` is linear in log-probabilities.
    """
    name, kind = type(loss).__name__, kind_of(loss)
    if not kind.trains:
        raise ValueError(f"{verb}: {name}: {kind.reason}")
    if not isinstance(loss, ELBO):
        raise ValueError(
            f"{verb}: the loss is {name}; expected one of Pyro's ELBO objects, such as Trace_ELBO()"
        )
    if annealed and not kind.linear:
        raise ValueError(
            f"beta: {name} is not linear in log-probabilities, so β would be a power of probabilities in its "
            "weights; expected beta=1, or Trace_ELBO"
        )
    if pair.batch.tensors and pair.num_rows < num_data * num_processes:
        remedy = "batch_size=None" if num_processes == 1 else "batch_size=None in one process"
        if kind.factor == "none" and check:
            raise ValueError(
                f"{verb}: {name} is a loss that pyro_vae does not know, so it cannot be scaled by N/B on "
                f"minibatches; pass {remedy}, or check=False if the loss is linear in log-probabilities"
            )
        if not kind.linear and pair.shared:
            raise ValueError(
                f"{verb}: {name} is not linear in log-probabilities, and {pair.shared[0]!r} is shared by all "
                "data, so no factor makes its loss on some of the data an estimate of that on all; pass "
                f"{remedy}, or Trace_ELBO"
            )
        if isinstance(loss, Objective) and pair.shared and pair.enumerates:
            raise ValueError(
                f"{verb}: {pair.shared[0]!r} is shared by all data and other sites are summed out, so "
                f"{name} has one value for all data; pass {remedy}, or TraceEnum_ELBO"
            )


def reports_bound(loss: Any) -> bool:
    """Whether ``evaluate`` can report the value of a loss: an ELBO, or an objective of this package."""
    return (
        loss is None
        or isinstance(loss, Objective)
        or kind_of(loss).bound.startswith("the ELBO")
        or kind_of(loss) is _UNKNOWN
    )


def scale_problem(loss: Any, pair: Structure, num_data: int) -> Problem | None:
    """The problem of a pair that scales sites by M/rows, where M is not the number of data, or in a way that
    would apply N/B twice; ``None`` without one."""
    if pair.other_rows_error or not pair.batch.tensors or pair.num_rows == num_data:
        return None
    scales = [torch.as_tensor(site["scale"]) for _, _, site in pair.sites]
    if all(not scale.dim() and scale == scales[0] for scale in scales):
        return None  # a constant factor of the whole loss
    for side, scaled in zip(("model", "guide"), pair.scaled, strict=True):
        for name, m in scaled.items():
            if abs(m - num_data) > 1e-3 * num_data:
                return Problem(
                    f"{side}: {name!r} is scaled by {m:g}/rows, but there are {num_data} data; fit scales "
                    "minibatches itself, so remove the poutine.scale, or scale by the number of data over "
                    "the rows",
                    judged=False,
                )
            if kind_of(loss).factor == "objective":
                return Problem(
                    f"{side}: {name!r} is scaled by {m:g}/rows, which under {type(loss).__name__} is a "
                    "power of the importance weights; remove the poutine.scale, since fit scales the loss",
                    judged=False,
                )
    scaled_by_pair = scaled_sites(pair, num_data)
    ratio = num_data / pair.num_rows
    for side, name, site in pair.sites:
        scale = torch.as_tensor(site["scale"]).double().mean().item() / subsampling_scale(site)
        # N/B for sites of the rows, B/N for global sites
        factor = 1 / ratio if row_dim(site, pair.plates) is None else ratio
        if name not in scaled_by_pair[side == "guide"] and math.isclose(scale, factor, rel_tol=1e-3):
            return Problem(
                f"{side}: {name!r} is scaled by {scale:g}, as minibatches of {pair.num_rows} of {num_data} "
                "data are; fit scales them itself, so remove the poutine.scale, or pass check=False if it "
                "has another purpose"
            )
    return None


def scaled_sites(pair: Structure, num_data: int) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the sites of model and of guide that the pair scales by N/rows itself."""
    if not pair.batch.tensors or pair.num_rows == num_data:
        return frozenset(), frozenset()
    model, guide = (
        frozenset(name for name, m in scaled.items() if abs(m - num_data) <= 1e-3 * num_data)
        for scaled in pair.scaled
    )
    return model, guide
