"""Inspect a pair: run it a few times and record its plates, latents, parameters and particles. All functions
that take a pair use this record."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.data.batches import Batch, fitting
from pyro_vae.pairs.enumeration import is_enumerated, max_nesting
from pyro_vae.pairs.preserve import untouched
from pyro_vae.pairs.traces import (
    Program,
    enough_memory,
    proposal,
    run_pair,
    sampled,
    subsampling_scale,
    unwrapped,
)

Traces = tuple[Trace, Trace]
_MAX_OTHER_ROWS = 16
_OTHER_SEED = 2**31 - 4  # of a second run, whose draws must differ from those of the first
_VALIDATION_OFF: Any = 0  # false, but not the False that validate_args=False leaves in a distribution
LESS_MEMORY = "lower the batch size (--batch-size), or the number of particles"


@dataclass(frozen=True, eq=False)
class Particles:
    """How the log-weights of particles in a plate, and of fewer rows, compare with those of single runs on
    the whole batch.

    vectorized: particles in one plate have the log-weights of single runs; otherwise ``reason`` says why not.
    rows_independent: at the same latents, the log-probabilities of a row do not change when other rows are
    left out; ``None`` if this could not be tested. coupled: the log-probabilities of a row change with the
    latents of other rows. bytes: memory of the tensors that one particle of one row allocates.
    """

    vectorized: bool
    rows_independent: bool | None
    coupled: bool
    bytes: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Structure:
    """The structure of a pair on a batch, the result of :func:`inspect`.

    - batch: the arguments of model and guide, cast to ``dtype``
    - traces: the model trace and the guide trace of one run on the batch
    - modules: the modules that ran, and whether gradients were enabled
    - dtype: the dtype of the parameters, ``None`` if they have several or there are none
    - plates: names of the data plates, which have one entry for each row of the batch
    - other_rows, other_traces: the rows of a second run, and its traces
    - other_rows_error: the error if the pair does not run on another number of rows, else ``""``
    - row_parameters: parameters with an entry for each row of this batch
    - scaled: for model and guide, the sites in data plates that the pair itself scales from the batch to M
      data, by M / number of rows; each is mapped to M
    - created: the parameters that the first run created
    - unvalidated: for model and guide, the sites built with ``validate_args=False``
    - particles: see :class:`Particles`
    - joint: all rows together are one datum, see :meth:`as_one_datum`
    """

    model: Program
    guide: Program
    batch: Batch
    traces: Traces
    modules: Mapping[nn.Module, bool]
    dtype: torch.dtype | None
    plates: frozenset[str]
    other_rows_error: str
    row_parameters: tuple[str, ...]
    scaled: tuple[Mapping[str, float], Mapping[str, float]]
    created: Mapping[str, Tensor]
    unvalidated: tuple[frozenset[str], frozenset[str]]
    other_traces: Traces | None
    other_rows: Tensor | None
    particles: Particles | None = None
    joint: bool = False

    @property
    def num_rows(self) -> int:
        return self.batch.num_rows

    def as_one_datum(self) -> "Structure":
        """A copy that treats all rows as one datum: no plate counts as a data plate, and the pair may not run
        on some of the rows only."""
        particles = self.particles and replace(self.particles, rows_independent=False)
        return replace(self, plates=frozenset(), particles=particles, joint=True)

    @cached_property
    def latents(self) -> dict[str, dict]:
        """The latent sites of the model."""
        return {name: site for name, site in sampled(self.traces[0]) if not site["is_observed"]}

    @cached_property
    def guide_latents(self) -> dict[str, dict]:
        """The latent sites of the guide, auxiliary ones too."""
        return {name: site for name, site in sampled(self.traces[1]) if not site["is_observed"]}

    @cached_property
    def sites(self) -> list[tuple[str, str, dict]]:
        """``(side, name, site)`` of all random variables that are part of p or q."""
        model, guide = self.traces
        named = [("model", name, site) for name, site in sampled(model)]
        return named + [("guide", name, site) for name, site in proposal(guide)]

    @cached_property
    def enumerates(self) -> bool:
        """Whether some sites are enumerated in parallel."""
        return any(is_enumerated(site) for _, _, site in self.sites)

    @cached_property
    def nesting(self) -> int:
        """The largest number of nested plates, ``max_plate_nesting``."""
        return max_nesting([site for trace in self.traces for _, site in sampled(trace)])

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The latents outside of the data plates, which all data share."""
        return tuple(name for name, site in self.latents.items() if row_dim(site, self.plates) is None)

    @cached_property
    def is_handler(self) -> bool:
        """Whether the guide is a ``GuideMessenger``, which runs its model itself."""
        return isinstance(poutine.unwrap(self.guide), GuideMessenger)

    @cached_property
    def has_auxiliary(self) -> bool:
        return any(site["infer"].get("is_auxiliary") for site in self.guide_latents.values())

    @cached_property
    def points(self) -> tuple[str, ...]:
        """The latents that are points (Delta) in the guide but not in the model."""
        guide = self.guide_latents
        return tuple(
            n for n, site in self.latents.items() if n in guide and is_point(guide[n]) and not is_point(site)
        )

    @cached_property
    def has_density(self) -> bool:
        """Whether q(z|x) has a density. A point (Delta) has none, unless it is computed from auxiliary sites
        or has a ``log_density``."""
        stated = [unwrapped(self.guide_latents[name]["fn"]).log_density for name in self.points]
        return self.has_auxiliary or all(bool(torch.as_tensor(density).any()) for density in stated)


def is_point(site: dict) -> bool:
    return isinstance(unwrapped(site["fn"]), dist.Delta)


def row_dim(site: dict, plates: frozenset[str]) -> int | None:
    """The batch dimension of a site's data plate."""
    for frame in site["cond_indep_stack"]:
        if frame.name in plates and frame.vectorized:
            return frame.dim
    return None


def inspect(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    training: bool = False,
) -> Structure:
    """Run a pair a few times and record its structure. All state is restored afterwards, see
    :func:`untouched`.

    The pair runs once on the batch and once on another number of rows. Data plates are the plates whose size
    changes with the number of rows. A third run is needed if the batch does not have the dtype of the
    parameters.

    :param training: run with gradients, and each module in its own mode. By default, run without gradients
        and in evaluation mode.
    :raises ValueError: if model or guide is not callable or lacks an argument, or if the pair fails on the
        batch.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise ValueError(
                f"{name}: expected a Pyro program that can be called with the data, but got {program!r:.80}"
            )
    batch = fitting(batch, model, guide)
    batch, dtype, first = _first_run(model, guide, batch, training)
    rows, second = _other_rows(batch), None
    reason = rows if isinstance(rows, str) else ""
    if isinstance(rows, Tensor):
        run = run_once(
            model,
            guide,
            batch.map(lambda part: part[rows.to(part.device)]),
            False,
            log_probs=True,
            seed=_OTHER_SEED,
        )
        second, reason = None if run.error else run, run.error
    num_rows = batch.num_rows if batch.tensors else _rows_of_nested(batch)
    plates = _data_plates(num_rows, first, second)
    return Structure(
        model,
        guide,
        batch,
        first.traces,
        first.ran,
        dtype,
        plates,
        other_rows_error=reason,
        row_parameters=_row_parameters(num_rows, first, second, plates),
        scaled=_scaled(num_rows, len(rows), first, second, plates),
        created={
            name: value for name, value in first.parameters.items() if name not in pyro.get_param_store()
        },
        unvalidated=first.unvalidated,
        other_traces=None if second is None else second.traces,
        other_rows=None if second is None or isinstance(rows, str) else rows,
    )


def structure_of_run(
    model: Program,
    guide: Program,
    batch: Batch,
    traces: Traces,
    ran: Mapping[nn.Module, bool],
    made: Mapping[str, Tensor],
) -> Structure:
    """The structure of a pair as far as it is known from the traces of one run. Data plates are recognized by
    their size alone."""
    # if validation is off by default, an explicit validate_args=False is not recognized
    known = bool(Distribution._validate_args)
    unvalidated = (_unvalidated(traces[0]), _unvalidated(traces[1])) if known else (frozenset(), frozenset())
    run = Run(ran, {}, traces)
    plates = _data_plates(batch.num_rows if batch.tensors else 0, run, None)
    return Structure(
        model,
        guide,
        batch,
        traces,
        ran,
        None,
        plates,
        "the pair ran once",
        (),
        ({}, {}),
        made,
        unvalidated,
        other_traces=None,
        other_rows=None,
    )


class _Parameters(Messenger):
    """Records the unconstrained values of ``pyro.param`` statements."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            self.values[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value


class _Counted(TorchDispatchMode):
    """Counts the bytes of newly allocated tensors."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)
        }
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before:
                self.bytes += leaf.untyped_storage().nbytes()
        return made


def counted_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a run allocates. All state is restored afterwards."""
    with untouched(), _Counted() as counted:
        run()
    return counted.bytes


@dataclass
class Run:
    """One run of a pair: its traces, or its error."""

    ran: Mapping[nn.Module, bool]
    parameters: dict[str, Tensor]
    traces: Any = None
    unvalidated: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    error: str = ""
    cause: Exception | None = None


def fails_on(pair: Structure, num_rows: int) -> str:
    """The error that the pair raises in training on the first rows of its batch, ``""`` if there is none."""
    return run_once(pair.model, pair.guide, pair.batch.first(num_rows), True, log_probs=True).error


def run_once(
    model: Program,
    guide: Program,
    batch: Batch,
    training: bool,
    *,
    log_probs: bool = False,
    seed: int | None = None,
) -> Run:
    """Run a pair once. All state is restored afterwards.

    :param log_probs: record errors of log-probabilities too, such as shapes that do not match.
    """
    recorded = _Parameters()
    with (
        untouched(training=None if training else False, seed=seed) as ran,
        torch.set_grad_enabled(training),
        recorded,
    ):
        run = Run(ran, recorded.values)
        # ExpandedDistribution copies the default, which must not look like a distribution built with
        # validate_args=False
        Distribution._validate_args = Distribution._validate_args or _VALIDATION_OFF
        try:
            with enough_memory(LESS_MEMORY):
                run.traces = run_pair(model, guide, *batch.args, **batch.kwargs)
                run.unvalidated = _unvalidated(run.traces[0]), _unvalidated(run.traces[1])
                # compute log-probabilities now: some transforms know the density of their latest draws only;
                # errors due to invalid data are left to the checks
                for trace in run.traces:
                    with nullcontext() if log_probs else suppress(Exception):
                        trace.compute_log_prob()
        except MemoryError:
            raise
        except Exception as error:  # user code may raise anything
            run.error, run.cause = f"{type(error).__name__}: {first_line(error)}", error
    return run


def _unvalidated(trace: Trace) -> frozenset[str]:
    """The sites whose distribution was built with ``validate_args=False``."""
    return frozenset(name for name, site in sampled(trace) if _is_unvalidated(site["fn"]))


def _is_unvalidated(distribution: Any) -> bool:
    while vars(distribution).get("_validate_args") is not False:
        if not hasattr(distribution, "base_dist"):
            return False
        distribution = distribution.base_dist
    return True


def first_line(error: Exception) -> str:
    """The first line of an error; Pyro appends the shapes of the whole trace."""
    return (str(error) or repr(error)).split("\n", 1)[0].removesuffix(":")


def _first_run(
    model: Program, guide: Program, batch: Batch, training: bool
) -> tuple[Batch, torch.dtype | None, Run]:
    """Cast the batch to the dtype of the parameters, with small integer types as int64, and run the pair on
    it."""
    batch = batch.cast(None)
    run = run_once(model, guide, batch, training)
    dtype = _dtype(run)
    floating = {leaf.dtype for leaf in batch.leaves() if leaf.is_floating_point()}
    wanted = dtype or (torch.get_default_dtype() if run.error else None)
    if wanted is not None and floating - {wanted}:
        cast = batch.cast(wanted)
        again = run_once(model, guide, cast, training)
        if not again.error or dtype is not None:
            batch, dtype, run = cast, wanted, again
    if run.error:
        shapes = {name: tuple(part.shape) for name, part in batch.tensors.items()}
        hint = ""
        if any(isinstance(part, list) for part in (*batch.args, *batch.kwargs.values())):
            hint = ". A list is passed on unchanged; if its tensors are the rows, pass torch.stack(rows)"
        if "plate(" in run.error:
            hint = (
                ". A guide with parameters for each datum, such as an autoguide of a local latent, runs only "
                "on all the data it was built for: pass batch_size=None"
            )
        raise ValueError(f"pair: it fails on a batch of shape {shapes}: {run.error}{hint}") from run.cause
    return batch, dtype, run


def _dtype(run: Run) -> torch.dtype | None:
    """The floating dtype of the parameters of a run, ``None`` if there is not exactly one."""
    own = [p for module in run.ran for p in module.parameters(recurse=False)]
    found = {p.dtype for p in (*run.parameters.values(), *own) if not is_lazy(p) and p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _other_rows(batch: Batch) -> Tensor | str:
    """Indices of rows for a batch of another size, or the reason why such a batch is impossible."""
    if not batch.tensors:
        return "it is given no tensor with rows"
    if sum(leaf.dim() > 0 for leaf in batch.leaves()) > len(batch.tensors):
        return "one of its arguments is a container of tensors, so rows cannot be taken"
    n = batch.num_rows
    if any(len(part) != n for part in batch.tensors.values()):
        return "its arguments have different numbers of rows"
    if n <= 2:  # neither one row, which would broadcast, nor n rows
        return torch.tensor([0, 0, 1] if n == 2 else [0, 0])
    # in ascending order, since rows may be sorted by length; without the last row, which a pair may treat
    # differently
    return torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[:_MAX_OTHER_ROWS].sort().values


def _rows_of_nested(batch: Batch) -> int:
    """The number of rows of arguments such as packed sequences, 0 if unknown."""
    try:
        return batch.num_rows
    except ValueError:
        return 0


def _plate_sizes(run: Run) -> dict[str, tuple[int, int]]:
    """``(size, full_size)`` of the vectorized plates. The size of a plate without one is that of the batch
    dimension."""
    sizes: dict[str, tuple[int, int]] = {}
    for trace in run.traces:
        for site in trace.nodes.values():
            if site["type"] != "sample":
                continue
            shape = getattr(site["fn"], "batch_shape", ())
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and frame.size >= 0:
                    sizes[frame.name] = frame.size, frame.full_size
                elif frame.vectorized:
                    size = shape[frame.dim] if len(shape) >= -frame.dim else 1
                    sizes[frame.name] = max(sizes.get(frame.name, (1, 1)), (size, size))
    return sizes


def _data_plates(num_rows: int, first: Run, second: Run | None) -> frozenset[str]:
    """Names of the data plates. The size or full size of a data plate is the number of rows, and it changes
    if the number of rows changes."""
    sizes = _plate_sizes(first)
    plates = {name for name, size in sizes.items() if num_rows in size}
    if second is not None:
        others = _plate_sizes(second)
        plates = {name for name in plates if others.get(name) != sizes[name]}
    return frozenset(plates)


def _row_parameters(n: int, first: Run, second: Run | None, plates: frozenset[str]) -> tuple[str, ...]:
    """Parameters with an entry for each of the n rows: their shape changes with the number of rows. If the
    pair runs on n rows only, their shape contains n."""
    if not plates or n < 2:
        return ()
    layers = {
        id(p)
        for module in first.ran
        if type(module).__module__.startswith("torch.nn.")
        for p in module.parameters(recurse=False)
    }
    parameters = {name: value for name, value in first.parameters.items() if id(value) not in layers}
    suspects = [name for name, value in parameters.items() if n in value.shape]
    if second is not None:
        others = second.parameters
        return tuple(
            name for name in suspects if name in others and others[name].shape != first.parameters[name].shape
        )
    if not suspects:  # an autoguide has one vector for all latents, of a length that is divisible by n
        suspects = [name for name, value in parameters.items() if value.numel() and value.numel() % n == 0]
    return tuple(suspects)


def _scaled(
    n: int, m: int, first: Run, second: Run | None, plates: frozenset[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """The sites in data plates that the pair itself scales from the rows of a batch to all data. For model
    and guide, a dictionary from the name of the site to the number of data, which is its scale times the
    number of rows.

    :param n: number of rows in the first run; m: in the second.
    """

    def scales(run: Run, side: int) -> dict[str, float]:
        return {
            name: float(site["scale"]) / subsampling_scale(site)
            for name, site in sampled(run.traces[side])
            if row_dim(site, plates) is not None
            and not (isinstance(site["scale"], Tensor) and site["scale"].numel() > 1)
        }

    found: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for side in (0, 1) if plates else ():
        one = scales(first, side)
        two = scales(second, side) if second is not None else {}
        for name, scale in one.items():
            follows = (
                name in two and scale != two[name] and math.isclose(scale * n, two[name] * m, rel_tol=1e-4)
            )
            if scale != 1.0 and (follows or second is None):
                found[side][name] = scale * n
    return found


_trained: "WeakKeyDictionary[Any, dict[str, ref[Tensor]]]" = WeakKeyDictionary()


def remember_trained(pair: Structure, parameters: Mapping[str, Tensor]) -> None:
    """Record which parameters of the param store a fit trained, for each program that uses them."""
    for program, trace in zip((pair.model, pair.guide), pair.traces, strict=True):
        names = trace.param_nodes
        try:
            _trained[_identity(program)] = {
                name: ref(parameters[name]) for name in names if name in parameters
            }
        except TypeError:  # a program that does not support weak references
            continue


def trained_parameters(program: Program) -> Mapping[str, "ref[Tensor]"]:
    """The parameters, by name, that were trained by the latest fit of this program in this process."""
    try:
        return _trained.get(_identity(program), {})
    except TypeError:
        return {}


def _identity(program: Program) -> Any:
    """The program, or the object that it is a method of: each access of a method creates another bound
    method."""
    return getattr(program, "__self__", program)


def latent_sites(traces: Traces) -> dict[str, dict]:
    """The latent sites of model and guide, auxiliary ones too."""
    return {name: site for trace in traces for name, site in sampled(trace) if not site["is_observed"]}
