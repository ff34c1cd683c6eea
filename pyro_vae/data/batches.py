"""Minibatches of users' data: tensors, arrays, tuples and dicts of them, data sets, loaders.

For tensors in memory, an epoch is a permutation of the rows, and a minibatch is taken from the tensors by
indexing, which is faster than collating rows one by one. The same holds for memory-mapped arrays, whose rows
are read from disk for each minibatch. A ``DataLoader`` keeps its own order, batch size and collate function.
A stream of batches is read in its order.
"""

import inspect
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from functools import cache, partial
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pyro_vae.data.arrays import (
    DiskRows,
    Ranges,
    Rows,
    SparseRows,
    as_tensor,
    check_rows,
    check_shape,
    is_nested,
    loses_precision,
    rows_per_block,
)
from pyro_vae.data.datasets import Data
from pyro_vae.processes import Group
from pyro_vae.random_states import restored_random_states

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CAST_TO_INT64 = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)


class Batch(NamedTuple):
    """The arguments of model and guide for some rows of the data: ``model(*args, **kwargs)``.

    A tensor of one dimension or more has a row for each datum. Containers of tensors that have no row index,
    such as packed sequences and lists of tensors, are *nested*. Any other argument is the same for all data.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name. The first positional argument is ``"argument 0"``."""
        return {f"argument {i}": part for i, part in enumerate(self.args)} | self.kwargs

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have rows."""
        return {name: part for name, part in self.named.items() if isinstance(part, Tensor) and part.dim()}

    @property
    def num_rows(self) -> int:
        """The number of data. Raises ``ValueError`` if no argument has rows."""
        for part in (*self.args, *self.kwargs.values()):
            if _has_rows(part):
                return len(part)
        for part in (*self.args, *self.kwargs.values()):
            if isinstance(part, PackedSequence):
                return int(part.batch_sizes[0])
            if is_nested(part):
                return len(part)
        raise ValueError(f"data: expected tensors of shape (n, *event) but got {self.describe()}")

    @property
    def divisible(self) -> bool:
        """Whether every argument that has rows can be indexed by row."""
        return self.plain or not any(map(is_nested, (*self.args, *self.kwargs.values())))

    def map(self, f: Callable[[Any], Any]) -> "Batch":
        """Apply ``f`` to every argument that has rows; keep the others."""

        def apply(part: Any) -> Any:
            return f(part) if _has_rows(part) else part

        return Batch(tuple(map(apply, self.args)), {key: apply(part) for key, part in self.kwargs.items()})

    @property
    def plain(self) -> bool:
        """Whether all arguments are positional tensors. In this usual case there are no containers to
        search."""
        return not self.kwargs and all(type(part) is Tensor for part in self.args)

    def leaves(self) -> list[Tensor]:
        """All tensors in the arguments and in their containers."""
        if self.plain:
            return list(self.args)
        return [leaf for leaf in pytree.tree_leaves(tuple(self)) if isinstance(leaf, Tensor)]

    def with_leaves(self, tensors: Iterable[Tensor]) -> "Batch":
        """The same arguments with other tensors, in the order of :meth:`leaves`."""
        replacements = iter(tensors)
        return Batch(
            *pytree.tree_map(
                lambda leaf: next(replacements) if isinstance(leaf, Tensor) else leaf, tuple(self)
            )
        )

    def cast(self, dtype: torch.dtype | None) -> "Batch":
        """Cast floating-point tensors to ``dtype``, and integer tensors to int64, so that sums of bytes do
        not overflow. With ``dtype=None``, the only floating-point tensors that are cast are those of half
        precision, to torch's default dtype."""
        if all(_cast_dtype(leaf, dtype) is leaf.dtype for leaf in self.leaves()):
            return self
        return self.with_leaves(leaf.to(_cast_dtype(leaf, dtype)) for leaf in self.leaves())

    def check_cast(self, dtype: torch.dtype | None) -> None:
        """Raise ``ValueError`` if different rows become equal in ``dtype``: see :meth:`Ranges.check`."""
        _check_cast([self], dtype)

    def rows(self, rows: slice | Tensor) -> "Batch":
        """The rows of a slice, or at indices. Raises ``ValueError`` if a nested argument would be divided."""
        if not self.divisible:
            if isinstance(rows, slice) and rows.indices(self.num_rows) == (0, self.num_rows, 1):
                return self
            raise ValueError(
                f"data: {self._describe_nested()}, from which rows cannot be taken; {_NESTED_REMEDY}"
            )
        return self.map(lambda part: part[rows])

    def first(self, n: int) -> "Batch":
        """The first ``n`` rows."""
        return self.rows(slice(n))

    def like(self, other: "Batch") -> "Batch":
        """This batch without the arguments that ``other`` does not have."""
        if len(self.args) == len(other.args) and self.kwargs.keys() == other.kwargs.keys():
            return self
        return Batch(
            self.args[: len(other.args)],
            {key: self.kwargs[key] for key in other.kwargs if key in self.kwargs},
        )

    def describe(self) -> str:
        """Types and shapes of the arguments, without their contents."""
        return ", ".join(f"{name}: {_describe(part)}" for name, part in self.named.items()) or "no arguments"

    def checked(self, name: str, rows: Tensor | None = None, num_rows: int = 0) -> "Batch":
        """The batch after validation, with 0 in place of missing entries.

        The keyword argument ``mask`` is false at missing entries. It is a bool tensor with the shape of an
        argument, or the shape of its first dimensions. Missing entries that are NaN or infinite are replaced
        by 0, so that gradients stay finite. Other entries must be finite. If an argument is on disk, only
        shapes are validated: entries are validated when rows are read.

        :param rows: the numbers of these rows among all ``num_rows`` rows of the data, for errors.
        :raises ValueError: for no rows, unequal numbers of rows, or non-finite entries that are not missing.
        """
        batch = self._fill_missing()
        parts = {key: part for key, part in batch.named.items() if _has_rows(part)}
        if not parts and batch.divisible:
            remedy, others = "", [part for part in self.named.values() if not isinstance(part, Tensor)]
            if any(isinstance(part, str | os.PathLike) for part in others):
                remedy = "; pv.load reads files"
            elif any(hasattr(part, "data") for part in others):  # such as evidence.Simulated
                remedy = "; pass its field data"
            raise ValueError(
                f"{name}: expected tensors or arrays of shape (n, *event) but got {self.describe()}{remedy}"
            )
        for key, part in parts.items():
            label = f"{name}, {key}" if len(parts) > 1 else name
            check_shape(part, label) if self.on_disk else check_rows(part, label, rows, num_rows)
            if len(part) != batch.num_rows:
                raise ValueError(
                    f"{name}: {key} has {len(part)} rows but the first argument has {batch.num_rows}"
                )
        for key, part in batch.named.items():
            if is_nested(part):
                for leaf in pytree.tree_leaves(part):
                    if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
                        raise ValueError(
                            f"{name}: {key}, {_describe(part)}, has NaN or infinite entries; fill or drop "
                            "them"
                        )
        return batch

    @property
    def on_disk(self) -> bool:
        """Whether an argument is a memory-mapped array, of which no rows have been read."""
        return not self.plain and any(
            isinstance(part, DiskRows) for part in (*self.args, *self.kwargs.values())
        )

    def _fill_missing(self) -> "Batch":
        mask = self.kwargs.get("mask")
        if self.on_disk or not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.dim():
            return self

        def fill(part: Any) -> Any:
            if (
                not isinstance(part, Tensor)
                or not part.is_floating_point()
                or part.shape[: mask.dim()] != mask.shape
            ):
                return part
            missing = ~mask.reshape(mask.shape + (1,) * (part.dim() - mask.dim())) & ~part.isfinite()
            return part.masked_fill(missing, 0.0) if missing.any() else part

        return self.map(fill)

    def _describe_nested(self) -> str:
        return next(f"{name} is {_describe(part)}" for name, part in self.named.items() if is_nested(part))


_NESTED_REMEDY = (
    "pass batch_size=None to take all data at once, or pad them to one tensor (n, *event) with a mask"
)


def _has_rows(part: Any) -> bool:
    return (isinstance(part, Tensor) and part.dim() > 0) or isinstance(part, Rows)


def _check_cast(blocks: Iterable[Batch], dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` if different rows in the blocks become equal: see :meth:`Ranges.check`."""
    ranges = Ranges()
    for block in blocks:
        for name, part in block.named.items():
            if _has_rows(part) and loses_precision(part, dtype):
                ranges.update(name, part)
    if dtype is not None:
        ranges.check(dtype)


def _dense(part: Tensor | SparseRows) -> Tensor:
    return part[:] if isinstance(part, SparseRows) else part


def _cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if tensor.dtype in _CAST_TO_INT64:
        return torch.int64
    if dtype is None and tensor.dtype in (torch.half, torch.bfloat16):
        return torch.get_default_dtype()  # a pair without parameters computes in the dtype of the data
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _describe(part: Any) -> str:
    if isinstance(part, Tensor | Rows):
        return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    if isinstance(part, PackedSequence):
        return f"a PackedSequence of {int(part.batch_sizes[0])} sequences"
    size = f" of {len(part)}" if isinstance(part, list | tuple | dict) else ""
    return f"a {type(part).__name__}{size}"


class Batches(ABC):
    """The minibatches of a data set, epoch after epoch.

    ``num_rows`` is the number N of data. ``persistent`` is true if the data come from worker processes that
    outlive an epoch. The random states of such processes cannot be read. ``in_data_order`` is true if
    ``epoch(shuffle=False)`` yields all data in order. ``reproducible`` is true if the random states before an
    epoch determine its batches. ``rows`` has the numbers of the rows of the batch that an epoch yielded last,
    if they are known. ``idle`` is true if this batch repeats rows because this rank has none left: all ranks
    take the same number of steps, and the gradient of such a batch does not count.
    """

    num_rows: int
    persistent = False
    in_data_order = True
    reproducible = True
    rows: Tensor | None = None
    idle = False
    group = Group.alone()

    def __init__(self) -> None:
        self._prepare: Callable[[Batch], Batch] = lambda batch: batch

    @abstractmethod
    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        """One pass over the data. Only shuffled epochs are divided among ranks, see :meth:`share`."""

    def share(self, group: Group) -> None:
        """Divide the rows of shuffled epochs among the ranks of a group. All ranks must call this.

        :raises ValueError: for data that cannot be divided, or differ between ranks.
        """
        self.group = group

    def set_epoch(self, epoch: int) -> None:  # noqa: ARG002
        """Tell the number of the next epoch, from 0, to samplers and data sets that shuffle by it."""
        return None

    def state(self) -> Any:
        """The position in the data, for :meth:`restore`; ``None`` for data that do not know it."""
        return None

    def restore(self, state: Any, *, begins: bool) -> None:  # noqa: ARG002
        """Go to a position that :meth:`state` returned, from which the next call of :meth:`remaining`
        continues.

        :param begins: whether an epoch begins there.
        """
        raise ValueError(
            "resume: the checkpoint has the position of a loader with a state_dict; expected the same data"
        )

    def remaining(self, num_used: int) -> Iterator[Batch]:
        """The minibatches of a shuffled epoch after the first ``num_used``."""
        epoch = self.epoch(shuffle=True)
        for _ in islice(epoch, num_used):
            pass
        return epoch

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """The number of minibatches in an epoch."""

    def cast(self, dtype: torch.dtype | None) -> None:
        """Cast all following batches: see :meth:`Batch.cast`.

        :raises ValueError: if different rows become equal: see :meth:`Ranges.check`. Batches of a loader are
            checked when it yields them.
        """
        self._prepare = partial(Batch.cast, dtype=dtype)

    def generators(self) -> list[torch.Generator]:
        """The random generators in use besides torch's default generator."""
        return []


class InMemory(Batches):
    """Minibatches of tensors in memory, or of arrays on disk, by index.

    ``drawn`` is true if the batches are not rows of ``source`` themselves: if ``take`` is given, or if there
    are sparse rows, which become dense.

    If an array is on disk, a thread reads the next batch while the caller uses the current one, and each
    batch is validated when it is taken. The file is then read once in an epoch, and not a second time before
    the first step.

    :param source: all data.
    :param take: a function that returns the batch of the rows at given indices, for data that are drawn anew
        at each access.
    """

    def __init__(self, source: Batch, batch_size: int, take: Callable[[Tensor], Batch] | None = None) -> None:
        super().__init__()
        self.source, self.on_disk = source, source.on_disk
        self.drawn = take is not None or any(isinstance(part, SparseRows) for part in source.named.values())
        self.num_rows = source.num_rows
        self.batch_size = min(batch_size, self.num_rows)
        if self.batch_size < self.num_rows and not source.divisible:
            raise ValueError(
                f"data: {source._describe_nested()}, from which minibatches cannot be taken; {_NESTED_REMEDY}"
            )
        self._order_generator: torch.Generator | None = None
        self._take = take or (lambda rows: source.map(partial(_index_rows, rows=rows)))

    @property
    def whole(self) -> Batch:
        """All of ``source`` as one batch, cast as set by :meth:`cast`. Arrays on disk become tensors that
        share their memory if that is possible."""
        if not self.on_disk:
            return self._prepare(self.source)
        whole = self.source.map(lambda part: part.whole() if isinstance(part, DiskRows) else part)
        return self._prepare(whole.checked("data"))

    def blocks(self) -> Iterator[Batch]:
        """All of ``source`` as consecutive batches, validated and cast as set by :meth:`cast`. Their memory
        is bounded if an array is on disk; otherwise there is one batch."""
        return map(self._prepare, self._blocks()) if self._is_read_by_blocks else iter([self.whole])

    @property
    def _is_read_by_blocks(self) -> bool:
        return self.on_disk and self.source.divisible

    def _blocks(self) -> Iterator[Batch]:
        size = min(rows_per_block(part) for part in self.source.named.values() if _has_rows(part))
        for rows in slices(self.num_rows, size):
            numbers = torch.arange(rows.start, rows.stop)
            yield self.source.rows(rows).checked("data", numbers, self.num_rows)

    def cast(self, dtype: torch.dtype | None) -> None:
        loses = any(loses_precision(part, dtype) for part in self.source.named.values())
        if loses:  # a property of all rows together, so arrays on disk are read once more
            _check_cast(self._blocks() if self._is_read_by_blocks else [self.source], dtype)
        super().cast(dtype)

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        return self._epoch(shuffle=shuffle)

    def remaining(self, num_used: int) -> Iterator[Batch]:
        return self._epoch(shuffle=True, start=num_used)

    def _epoch(self, *, shuffle: bool, start: int = 0) -> Iterator[Batch]:
        if shuffle and self.batch_size < self.num_rows:
            order = torch.randperm(self.num_rows, generator=self._order_generator)
        else:  # a full batch stays in data order: a guide may have parameters for each row
            order = torch.arange(self.num_rows)
        of_batches = order.split(self.batch_size)[start:]
        shares = (_share(rows, self.group) if shuffle else (rows, False) for rows in of_batches)
        return self._taken(shares)

    def _taken(self, shares: Iterable[tuple[Tensor, bool]]) -> Iterator[Batch]:
        taken = ((rows, idle, self._take(rows)) for rows, idle in shares)
        for rows, idle, batch in prefetched(taken) if self.on_disk else taken:
            self.rows, self.idle = rows, idle
            yield self._prepare(batch.checked("data", rows, self.num_rows) if self.on_disk else batch)

    def share(self, group: Group) -> None:
        """Divide each minibatch: this rank gets the rows with numbers ``rank``, ``rank + size``, …, in an
        order that is the same on all ranks."""
        if not self.source.divisible:
            raise ValueError(
                f"data: {self.source._describe_nested()}, whose rows cannot be divided among {group.size} "
                "processes; pad them to one tensor"
            )
        _check_equal_counts(group, self.num_rows)
        check_same_data(group, self.source.first(_NUM_COMPARED))
        super().share(group)
        seed = int(group.broadcast(torch.randint(2**31, (1,))).item())
        self._order_generator = torch.Generator().manual_seed(seed)

    def generators(self) -> list[torch.Generator]:
        return [] if self._order_generator is None else [self._order_generator]

    @property
    def num_batches(self) -> int:
        return -(-self.num_rows // self.batch_size)


_NUM_COMPARED = 1000  # rows of data in memory or on disk that ranks compare


def _index_rows(part: Tensor | Rows, rows: Tensor) -> Tensor:
    return part[rows] if isinstance(part, Rows) else part.index_select(0, rows.to(part.device))


def _share(rows: Any, group: Group) -> tuple[Any, bool]:
    """This rank's part of the rows of a minibatch, and false. If it has none, the first row, and true."""
    own = rows[group.rank :: group.size]
    return (own, False) if len(own) else (rows[:1], True)


def _check_equal_counts(group: Group, num_rows: int) -> None:
    group.check_equal(num_rows, f"data: this process has {num_rows} rows; all rows must be passed")


def check_same_data(group: Group, batch: Batch, num_rows: int | None = None) -> None:
    """Raise ``ValueError`` unless all ranks have the same batch, and the same number of rows in all."""
    if group.size > 1:
        group.check_equal([num_rows, *checksums(batch.leaves())], _DIFFERENT_DATA)


_DIFFERENT_DATA = "data: the processes have different data; expected all rows, in order,"


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """The items of an iterator. A thread computes the next item while the caller uses the current one. Its
    errors are raised here."""
    end: Any = object()
    with ThreadPoolExecutor(1, "pyro_vae prefetch") as thread:
        item = thread.submit(next, items, end)
        while (current := item.result()) is not end:
            item = thread.submit(next, items, end)
            yield current


class Received(Batches):
    """Batches that a user's object yields. Each is validated when it arrives.

    If the object has the methods ``state_dict`` and ``load_state_dict``, as the ``StatefulDataLoader`` of
    torchdata, its position is part of a checkpoint.
    """

    def __init__(self, source: Any, num_rows: int) -> None:
        super().__init__()
        has_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._stateful, self.num_rows = source if has_state else None, num_rows
        self._num_seen = self._num_batches_seen = 0  # in the current pass of training
        self._is_restored = False  # whether the next iteration continues at a restored position
        self._dtype: torch.dtype | None = None
        # ranges of the batches so far; the dtype is known only after the first batch
        self._ranges: Ranges | None = Ranges()

    def cast(self, dtype: torch.dtype | None) -> None:
        super().cast(dtype)
        if dtype != self._dtype:
            self._dtype, self._ranges = dtype, self._ranges or Ranges()

    def state(self) -> Any:
        if self._stateful is None:
            return None
        seen = [self._num_batches_seen, self._num_seen]
        return {"seen": seen, "state": self._stateful.state_dict()}

    def restore(self, state: Any, *, begins: bool) -> None:
        if self._stateful is None:
            return super().restore(state, begins=begins)
        self._is_restored = True
        self._num_batches_seen, self._num_seen = state["seen"]
        self._stateful.load_state_dict(state["state"])

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Restore the states of the generators, and the position of the user's object if it has one, after
        the block."""
        with _kept(self.generators()):
            if self._stateful is None:
                yield
                return
            state = self._stateful.state_dict()
            try:
                yield
            finally:
                self._stateful.load_state_dict(state)

    @staticmethod
    def _validated(item: Any, name: str) -> Batch:
        return as_batch(item).checked(name).map(_dense)

    def _record_ranges(self, batch: Batch) -> None:
        if self._ranges is not None:
            for key, part in batch.tensors.items():
                if loses_precision(part, self._dtype or torch.get_default_dtype()):
                    self._ranges.update(key, part)

    def _check_ranges(self) -> None:
        """Check the ranges of all batches so far. This ends their record."""
        if self._ranges is not None and self._dtype is not None:
            self._ranges.check(self._dtype)
            self._ranges = None


class Loaded(Received):
    """The batches of a user's ``DataLoader`` of a map-style data set, which sets their order and size.

    With a ``RandomSampler``, unshuffled epochs iterate over the whole data set in order. Any other sampler is
    used unchanged; unless it is sequential, ``in_data_order`` is false.
    """

    def __init__(self, loader: DataLoader) -> None:
        batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._sampler = sampler = getattr(batching, "sampler", batching)
        super().__init__(loader, _count_rows(loader, batching, sampler))
        self.shuffled, self.ordered = loader, loader
        self._batching, self._own_generators = batching, _generators(loader)
        self._plan: _Plan | None = None  # the batches of this rank, if the loader is divided among ranks
        self._is_compared = False  # whether the ranks are known to have the same data set and sampler
        self.persistent = loader.persistent_workers
        self._must_match_length = not isinstance(batching, BatchSampler)
        self._num_batches = _length(loader, "the loader and its batch sampler have no length")
        if (
            isinstance(sampler, RandomSampler)
            and not sampler.replacement
            and isinstance(batching, BatchSampler)
        ):
            self.ordered = _sequential(loader, batching.batch_size)
        else:
            self.in_data_order = isinstance(sampler, SequentialSampler)
            if getattr(batching, "drop_last", loader.drop_last):
                self.num_rows = self._num_batches * (
                    getattr(batching, "batch_size", None) or loader.batch_size or 1
                )
        _check_not_empty(loader, self._num_batches)

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        return self._epoch(shuffle=shuffle)

    def share(self, group: Group) -> None:
        """Each rank loads its part of each batch. Rank 0 draws the items of all batches of an epoch. A
        ``DistributedSampler`` has divided the data set already, and is used unchanged."""
        sampler = self._sampler
        super().share(group)
        if (num_replicas := getattr(sampler, "num_replicas", None)) is not None:
            if (num_replicas, sampler.rank) != (group.size, group.rank):
                raise ValueError(
                    f"data: the loader's sampler is of rank {sampler.rank} of {num_replicas}, but this "
                    f"process has rank {group.rank} of {group.size}; expected DistributedSampler(dataset), "
                    "which takes both from the process group, or a loader without it"
                )
            self.num_rows = _num_items(self.shuffled)
            _check_equal_counts(group, self.num_rows)
            return
        _check_equal_counts(group, self.num_rows)
        self._plan, self._stateful = _Plan(), None
        self.shuffled = _with_batches(self.shuffled, self._plan)

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(epoch, self._batching, getattr(self._batching, "sampler", None))

    def restore(self, state: Any, *, begins: bool) -> None:
        super().restore(state, begins=begins)
        if begins:  # the loader goes to its position now, and draws the new epoch at its next iteration
            iter(self.shuffled)
            self._is_restored = False

    def remaining(self, num_used: int) -> Iterator[Batch]:
        if not self._is_restored:
            return super().remaining(num_used)
        self._is_restored = False
        return self._epoch(shuffle=True, items=_iterate(self.shuffled))

    def _epoch(self, *, shuffle: bool, items: Iterator[Any] | None = None) -> Iterator[Batch]:
        """One pass over the data.

        :param items: the rest of a pass that has been resumed.
        """
        loader = self.shuffled if shuffle else self.ordered
        num_batches, num_seen = (0, 0) if items is None else (self._num_batches_seen, self._num_seen)
        plan = self._plan if shuffle else None
        if plan is not None:
            of_batches = self._of_batches(plan)
            plan.shares = [_share(items, self.group) for items in of_batches]
        sizes = _batch_sizes(loader, num_batches) if plan is None else map(len, plan)
        is_moved = self.ordered is self.shuffled
        unmoved = self._unmoved() if is_moved else _kept(self.generators())
        with nullcontext() if shuffle else unmoved:
            for i, item in enumerate(_iterate(loader) if items is None else items, num_batches):
                batch = self._validated(item, f"data, batch {i}")
                if sizes is not None and batch.num_rows != (size := next(sizes, 0)):
                    raise ValueError(
                        f"data: batch {i} of the loader has {batch.num_rows} rows from {size} items of its "
                        "data set, so the number of data is unknown; expected a collate_fn that returns one "
                        "row for each item"
                    )
                num_seen += batch.num_rows
                if plan is not None:
                    self.idle = plan.shares[i][1]
                elif self._must_match_length and num_seen > self.num_rows:
                    break
                self._record_ranges(batch)
                # consecutive rows may be close to each other, so they are checked at the end of the epoch
                is_mixed = shuffle and self.ordered is not self.shuffled and batch.num_rows > 1
                if is_mixed and self._ranges is not None and self._dtype is not None:
                    self._ranges.check(self._dtype, f"data, batch {i}")
                if shuffle:
                    self._num_batches_seen, self._num_seen = i + 1, num_seen
                yield self._prepare(batch)
            if plan is None:
                self._check_planned(num_seen)
            if shuffle:
                self._num_batches_seen = self._num_seen = 0
            self._check_ranges()

    def _of_batches(self, plan: "_Plan") -> list[list[Any]]:
        """The items of all batches of an epoch, as rank 0 draws them."""
        if self._is_compared:
            of_batches = self.group.from_first(self._drawn)
            self._check_planned(sum(map(len, of_batches)))
            return of_batches
        self._is_compared = True
        with _kept_random(self.generators()) if self.group.rank else nullcontext():
            drawn = self._drawn()
        of_ranks = self.group.all_gather(drawn)
        self._check_planned(sum(map(len, of_ranks[0])))
        sets = [{str(item) for items in of_batches for item in items} for of_batches in of_ranks]
        # random samplers with few draws may have none in common, but these take from all of the data set
        if not isinstance(self._sampler, RandomSampler | WeightedRandomSampler):
            for rank, own in enumerate(sets[1:], 1):
                if not own & sets[0]:
                    raise ValueError(
                        f"data: the loader's sampler has other items on rank {rank} than on rank 0, but rank "
                        "0 draws the items of all ranks; expected the sampler of one process, or "
                        "DistributedSampler(dataset)"
                    )
        self._check_same_rows(of_ranks[0][0], plan)
        return of_ranks[0]

    def _drawn(self) -> list[list[Any]]:
        """The items of all batches of an epoch. A batch sampler without an end is stopped."""
        of_batches: list[list[Any]] = []
        num_drawn = 0
        for items in self._batching:
            of_batches.append(list(items))
            num_drawn += len(of_batches[-1])
            if self._must_match_length and num_drawn > self.num_rows:
                break
        return of_batches

    def _check_same_rows(self, items: list[Any], plan: "_Plan") -> None:
        """Raise ``ValueError`` if the ranks load different rows for the same items. A data set that draws
        its rows at random, by its own generator, yields different ones when they are loaded twice, and
        is not compared."""
        plan.shares = [(items, False)] * 2
        with _kept_random(self.generators()):
            pyro.set_rng_seed(0)
            for generator in self.generators():
                generator.manual_seed(0)
            first, second = (
                checksums(self._validated(item, "data, batch 0").leaves()) for item in _iterate(self.shuffled)
            )
        of_ranks = self.group.all_gather([first, second])
        if all(one == other for one, other in of_ranks) and any(one != first for one, _ in of_ranks):
            raise ValueError(f"{_DIFFERENT_DATA} in each of the {self.group.size} processes")

    def _check_planned(self, num_seen: int) -> None:
        """Check the number of rows in an epoch."""
        if not num_seen or (self._must_match_length and num_seen != self.num_rows):
            got = "more" if num_seen > self.num_rows else str(num_seen)
            raise ValueError(
                f"data: expected {self.num_rows} rows in an epoch, by the loader's length, but got "
                f"{got}; correct the length of the data set or its batch sampler"
            )

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def generators(self) -> list[torch.Generator]:
        return list(dict.fromkeys([*self._own_generators, *_generators(self.ordered)]))


class _Plan(Sampler[list[int]]):
    """The items of each batch of an epoch on this rank, and whether the rank is idle then."""

    shares: Sequence[tuple[list[int], bool]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (items for items, _ in self.shares)

    def __len__(self) -> int:
        return len(self.shares)


class Streamed(Received):
    """The batches of a stream, in its order: a loader of an ``IterableDataset``, or any iterable of batches.

    A shuffled epoch has the next ``steps_per_epoch`` batches: it continues where the last one ended, and the
    stream is read again when it ends. With ``steps_per_epoch=None`` an epoch is one pass over the stream, as
    an unshuffled epoch always is.

    On several ranks each rank reads its own part of the rows. A rank whose part has ended repeats its last
    batch, until all have ended.

    :param source: a loader, an iterable whose ``__iter__`` starts anew, or a function that returns an
        iterator.
    :param num_rows: the number of rows in a pass. Only an endless stream with ``steps_per_epoch`` may have
        another number.
    """

    reproducible = False

    def __init__(self, source: Any, num_rows: int, steps_per_epoch: int | None = None) -> None:
        super().__init__(source, num_rows)
        self.source, self.steps_per_epoch = source, steps_per_epoch
        self.in_data_order = getattr(source, "in_data_order", True)
        self.persistent = isinstance(source, DataLoader) and source.persistent_workers
        self._pass: Iterator[Batch] | None = None  # the pass of training that the next epoch continues
        self._first: Batch | None = None  # a row of the first batch, whose shape all rows have
        self._own_first: Batch  # the first batch of this rank, if there are several
        self._is_checked = False  # whether the ranks are known to read different rows
        self._num_batches = steps_per_epoch
        self._next_pass = 0  # the number of the next pass, at least that of the epoch in which it starts
        if not isinstance(source, DataLoader) and self._open() is self._open():
            raise ValueError(
                f"data: a {type(source).__name__} can be read once only, but each epoch reads the stream "
                "anew; expected a function that returns a new iterator, such as a generator function, or an "
                "object whose __iter__ starts anew"
            )

    def _open(self) -> Iterator[Any]:
        if isinstance(self.source, DataLoader):
            return _iterate(self.source)
        try:
            return iter(self.source() if callable(self.source) else self.source)
        except TypeError as error:
            raise ValueError(
                f"data: a {type(self.source).__name__} does not yield batches ({error}); expected an "
                "iterable of batches, or a function without arguments that returns an iterator of them"
            ) from error

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        return self.remaining(0) if shuffle else self._read(training=False)

    def remaining(self, num_used: int) -> Iterator[Batch]:
        rest = self._read(items=self._open()) if self._is_restored else None
        self._is_restored = False
        if self.steps_per_epoch is None:
            rows = self._read() if rest is None else rest
            return rows if self.group.size == 1 else self._until_all_end(rows)
        self._pass = rest or self._pass
        return self._steps(self.steps_per_epoch - num_used)

    def share(self, group: Group) -> None:
        """Each rank reads its own part. The number of batches is the same on all ranks, since β depends on
        it."""
        super().share(group)
        with self._unmoved():
            item = next(self._open(), None)
        if item is not None:
            self._own_first = self._validated(item, "data, batch 0")
        sizes = group.all_gather(0 if item is None else self._own_first.num_rows)
        if not all(sizes):
            raise ValueError(
                f"data: the stream has no batches on rank {sizes.index(0)}; expected one batch of rows or "
                f"more in each of the {group.size} processes"
            )
        self._num_batches = self._num_batches or -(-self.num_rows // sum(sizes))

    def set_epoch(self, epoch: int) -> None:
        if self.steps_per_epoch is None:
            self._set_pass(epoch)
        else:  # an epoch may have several passes, and each has its own order
            self._next_pass = max(self._next_pass, epoch)

    def _set_pass(self, number: int) -> None:
        dataset = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        _set_epoch(number, dataset)

    def _until_all_end(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A pass of training in which each rank reads its part, and repeats its last batch when this has
        ended and others have not."""
        last = None
        while True:
            batch = next(batches, None)
            if not self.group.sum(batch is not None):
                break
            # a pass that is resumed may have ended on this rank, and then the first batch is repeated
            self.idle, last = batch is None, batch or last or self._prepare(self._own_first)
            self._check_different(last)
            yield last
        num_seen = self.group.sum(self._num_seen)
        if not self.num_rows - self._max_dropped() <= num_seen <= self.num_rows:
            raise ValueError(
                f"data: expected {self.num_rows} rows in a pass over the stream but got {num_seen} on all "
                f"{self.group.size} processes together; {_SHARD_REMEDY}, or correct num_data"
            )
        self._num_batches_seen = self._num_seen = 0

    def _max_dropped(self) -> int:
        """The most rows that a loader with ``drop_last=True`` drops on all ranks."""
        if not isinstance(self.source, DataLoader) or not self.source.drop_last:
            return 0
        num_loading = self.group.size * max(1, self.source.num_workers)
        return num_loading * ((self.source.batch_size or 1) - 1)

    def _check_different(self, first: Batch) -> None:
        """Raise ``ValueError`` if all ranks read the same first batch."""
        if self._is_checked:
            return
        self._is_checked = True
        of_ranks = self.group.all_gather(checksums(first.leaves()))
        if all(other == of_ranks[0] for other in of_ranks):
            raise ValueError(
                f"data: the stream has the same first batch in each of the {self.group.size} processes; "
                f"{_SHARD_REMEDY}"
            )

    def _steps(self, num_steps: int) -> Iterator[Batch]:
        """The next batches of training."""
        for _ in range(num_steps):
            batch = None if self._pass is None else next(self._pass, None)
            if batch is None:
                self._set_pass(self._next_pass)
                self._next_pass += 1
                self._pass = self._read()
                batch = next(self._pass)
            if self.group.size > 1:
                self._check_different(batch)
            yield batch
        self._check_ranges()

    def _read(self, *, training: bool = True, items: Iterator[Any] | None = None) -> Iterator[Batch]:
        """One pass over the stream.

        :param training: whether this is the pass whose position :meth:`state` returns.
        :param items: the rest of a pass that has been resumed.
        """
        num_batches, num_seen = (0, 0) if items is None else (self._num_batches_seen, self._num_seen)
        is_part = training and self.group.size > 1
        endless = training and self.steps_per_epoch is not None
        with nullcontext() if training else self._unmoved():
            for i, item in enumerate(self._open() if items is None else items, num_batches):
                batch = self._validated(item, f"data, batch {i}")
                self._check_shapes(batch, i)
                num_seen += batch.num_rows
                if num_seen > self.num_rows and not endless:
                    raise ValueError(
                        f"data: expected {self.num_rows} rows in a pass over the stream but got more; "
                        "correct num_data or the length of the data set, divide the rows among the loader's "
                        "workers (torch.utils.data.get_worker_info), or bound the epochs of fit by "
                        "steps_per_epoch"
                    )
                self._record_ranges(batch)
                if training:
                    self._num_batches_seen, self._num_seen = i + 1, num_seen
                yield self._prepare(batch)
        if not num_seen:
            self._raise_empty()
        if is_part:
            return self._check_ranges()
        if num_seen != self.num_rows:
            raise ValueError(
                f"data: expected {self.num_rows} rows in a pass over the stream but got {num_seen}; pass "
                f"num_data={num_seen}, correct the length of the data set, or, if the stream does not start "
                "anew each time, pass a function that returns a new iterator"
            )
        if training:
            self._num_batches_seen = self._num_seen = 0
        self._check_ranges()

    def _raise_empty(self) -> None:
        if self._first is not None:
            raise ValueError(
                "data: the stream has no batches when it is read again; expected a function that returns a "
                "new iterator, or an object whose __iter__ starts anew"
            )
        raise ValueError("data: the stream has no batches; expected one batch of rows or more")

    def _check_shapes(self, batch: Batch, index: int) -> None:
        """Raise ``ValueError`` if a batch has other arguments, or rows of another shape, than the first."""
        self._num_batches = self._num_batches or -(-self.num_rows // batch.num_rows)
        if not batch.divisible:
            return
        row = batch.first(1)
        if self._first is None:
            self._first = row.map(torch.empty_like)
        if row.describe() != self._first.describe():
            raise ValueError(
                f"data: a row of batch {index} of the stream is {row.describe()}, but a row of the first "
                f"batch is {self._first.describe()}; expected the same arguments, dtypes and shapes in all "
                "batches: pad rows to one length and add a mask"
            )

    def count(self) -> None:
        """Set ``num_rows``, which is the limit until now, to the number of rows in a pass."""
        limit, self.num_rows = self.num_rows, 0
        with self._unmoved():
            for i, item in enumerate(self._open()):
                self.num_rows += self._validated(item, f"validation, batch {i}").num_rows
                if self.num_rows > limit:
                    raise ValueError(
                        f"validation: the stream has more than {limit} rows, the number of training data, so "
                        "it may have no end; expected fewer rows, or a data set with a length"
                    )
        if not self.num_rows:
            self._raise_empty()

    @property
    def num_batches(self) -> int:
        """The number of minibatches in an epoch; estimated by the size of the first batch if the stream has
        no length."""
        if self._num_batches is None:
            next(self.epoch(shuffle=False))
        return self._num_batches or 1

    def generators(self) -> list[torch.Generator]:
        return _generators(self.source) if isinstance(self.source, DataLoader) else []


_SHARD_REMEDY = (
    "expected a stream that yields other rows in each process, such as itertools.islice(batches, rank, None, "
    "world_size) with the rank of torch.distributed.get_rank()"
)


def _set_epoch(epoch: int, *owners: Any) -> None:
    for owner in owners:
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


@contextmanager
def _kept(generators: list[torch.Generator]) -> Iterator[None]:
    """Leave the states of the generators unchanged."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def _kept_random(generators: list[torch.Generator]) -> Iterator[None]:
    """Leave the states of the generators, and of the global ones, unchanged."""
    with restored_random_states(), _kept(generators):
        yield


def _generators(*loaders: DataLoader) -> list[torch.Generator]:
    """The generators that loaders and their samplers use."""
    owners: list[Any] = []
    for loader in loaders:
        batching = loader.batch_sampler
        owners += [loader, loader.sampler, batching, getattr(batching, "sampler", None)]
    generators = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(generator for generator in generators if generator is not None))


def _check_not_empty(loader: DataLoader, num_batches: int) -> None:
    if not num_batches:
        raise ValueError(
            f"data: the loader has no batches: its data set has {_num_items(loader)} rows, in batches of "
            f"{loader.batch_size}{' with drop_last=True' if loader.drop_last else ''}; expected at least "
            "one batch: lower batch_size, or pass drop_last=False"
        )


def _length(sized: Any, cause: str) -> int:
    try:
        return len(sized)
    except TypeError as error:
        raise ValueError(
            f"data: {cause}, so a minibatch cannot be scaled to all data; expected a method __len__ that "
            "returns the number of rows (for a batch sampler: the number of batches)"
        ) from error


def _batch_sizes(loader: DataLoader, start: int) -> Iterator[int] | None:
    """The number of data-set items in each batch of a loader from batch ``start`` on; ``None`` if it cannot
    be known in advance."""
    batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(batching) is not BatchSampler:
        return None
    try:
        n = len(batching.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    size = batching.batch_size
    return (min(size, n - first) for first in range(start * size, n, size))


def _num_items(loader: DataLoader) -> int:
    return _length(loader.dataset, f"the data set, of type {type(loader.dataset).__name__}, has no length")


def _count_rows(loader: DataLoader, batching: Any, sampler: Any) -> int:
    """The number N of data behind a loader."""
    uncountable = (
        "data: the DataLoader has batch_size=None, so the data set itself makes the batches, and their rows "
        "cannot be counted; expected "
    )
    if loader.batch_sampler is None and not isinstance(batching, BatchSampler):
        raise ValueError(f"{uncountable}batch_size in the DataLoader, or sampler=BatchSampler(...)")
    if isinstance(sampler, RandomSampler):
        return len(sampler.data_source)
    if isinstance(sampler, WeightedRandomSampler):  # N is not num_samples, the number of draws in an epoch
        return len(sampler.weights)
    if isinstance(batching, BatchSampler):
        return _length(sampler, "the loader's sampler has no length")
    if isinstance(batching, list | tuple):  # its items are the lists of indices of the batches
        return sum(map(len, batching))
    return _num_items(loader)  # a custom batch sampler; ``Loaded.epoch`` verifies the count


def _sequential(loader: DataLoader, batch_size: int) -> DataLoader:
    """A loader of the same data set in order, with the last batch even if it is smaller."""
    order = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    return _with_batches(loader, BatchSampler(order, batch_size, drop_last=False))


def _with_batches(loader: DataLoader, batch_sampler: Sampler[list[int]]) -> DataLoader:
    """A loader of the same data set with other batches."""
    collate: Any = loader.collate_fn
    batches_itself = loader.batch_sampler is None  # the data set takes the indices of a whole batch
    sampling: dict[str, Any] = (
        {"batch_size": None, "sampler": batch_sampler} if batches_itself else {"batch_sampler": batch_sampler}
    )
    return DataLoader(
        loader.dataset, **sampling, collate_fn=collate, num_workers=loader.num_workers,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        generator=loader.generator, multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )  # fmt: skip


def _iterate(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, whose iteration starts with this call. Raises ``ValueError`` if rows cannot be
    stacked."""
    return _stacked(iter(loader))


def _stacked(iterator: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            items = next(iterator)
        except StopIteration:
            return
        except (TypeError, RuntimeError) as error:
            cause = str(error).strip().splitlines()[-1] if str(error).strip() else ""
            if "equal size" in cause:
                raise ValueError(
                    f"data: rows of the data set differ in length and cannot be stacked ({cause}); pad them "
                    "to one length and add a mask, or pass a DataLoader whose collate_fn pads them "
                    "(torch.nn.utils.rnn.pad_sequence)"
                ) from error
            if "default_collate" in cause:
                raise ValueError(
                    f"data: the items of the data set cannot be stacked into tensors ({cause}); for images, "
                    "pass transform=torchvision.transforms.ToTensor() to the data set"
                ) from error
            raise
        yield items


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's elements, for checksums."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def rows_per_chunk(num_rows: int, limit: int) -> int:
    """The number of rows in a chunk of the data, at most ``limit``, the rows that fit in memory.

    There are six chunks or more, so that several processes can divide them, unless a chunk would then be so
    small, less than 1/64 of ``limit``, that its time is mostly overhead. The number does not depend on that
    of the processes, so neither does the noise. Chunks are of equal size if possible, since each size has its
    own graph.
    """
    num_chunks = next((k for k in range(6, 13) if num_rows % k == 0), 6)
    return min(limit, num_rows, max(limit // 64, 50, -(-num_rows // num_chunks)))


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """A checksum of each tensor, to compare the tensors of ranks."""
    return [zlib.crc32(bytes_of(tensor)) for tensor in tensors]


def slices(num_rows: int, at_once: int) -> list[slice]:
    """Slices that split ``num_rows`` rows into blocks of ``at_once``."""
    return [slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]


def as_batch(items: Any, *, in_place: bool = False) -> Batch:
    """The arguments in ``items``: one positional argument for a tensor or array, several for a tuple or list,
    keyword arguments for a mapping."""
    convert = partial(as_tensor, in_place=in_place)
    if isinstance(items, Mapping):
        return Batch((), {key: convert(part, f"data, {key}") for key, part in items.items()})
    if isinstance(items, tuple | list) and not isinstance(items, PackedSequence):
        return Batch(tuple(convert(part, f"data, argument {i}") for i, part in enumerate(items)), {})
    return Batch((convert(items),), {})


def as_ordered_batches(data: Any, batch_size: int | None, num_data: int | None = None) -> Batches:
    """Minibatches whose unshuffled epochs are in data order. Data with stochastic binarization are binarized
    once.

    :raises ValueError: as :func:`as_batches` does, and for a loader whose sampler changes the order.
    """
    batches = as_batches(data.fixed() if isinstance(data, Data) else data, batch_size, num_data=num_data)
    if not batches.in_data_order:
        raise ValueError(
            "data: the loader or stream has an order of its own, so results cannot be matched with rows; "
            "pass the data set, DataLoader(dataset, batch_size, shuffle=False), or a stream without shuffling"
        )
    return batches


def as_whole(data: Any, num_data: int | None = None) -> Batch:
    """All data as one batch, in data order. Those of a loader or a stream are collected in memory.

    :param data: as for :func:`as_ordered_batches`. A :class:`Batch`, which functions of this library pass to
        each other, is returned unchanged.
    :raises ValueError: as :func:`as_ordered_batches` does.
    """
    if isinstance(data, Batch):
        return data
    batches = as_ordered_batches(data, None, num_data)
    if isinstance(batches, InMemory):
        return batches.whole.map(_dense)
    parts = list(batches.epoch(shuffle=False))
    if any(len(part.leaves()) > len(part.tensors) for part in parts):
        raise ValueError(
            f"data: the loader yields {parts[0].describe()}, whose rows cannot be concatenated; pass tensors"
        )
    columns = zip(*(part.leaves() for part in parts), strict=True)
    return parts[0].with_leaves(torch.cat(column) for column in columns)


def check_count(name: str, value: Any, *, expected: str = "a whole number, 1 or more,") -> int:
    """Validate a count. Raises ``ValueError`` for anything but an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected {expected} but got {value!r}")
    return int(value)


def as_batches(
    data: Any, batch_size: int | None, *, num_data: int | None = None, steps_per_epoch: int | None = None
) -> Batches:
    """The minibatches of ``data``.

    :param data: a torch or numpy array ``(n, *event)``, dense or sparse, or a data frame of numeric columns;
        a tuple of them, for ``model(x, c)``; a dict of them, for ``model(x=…, mask=…)``; a
        :class:`~pyro_vae.data.Data`; a torch ``Dataset``; a ``DataLoader``; or a stream of batches: an
        iterable whose ``__iter__`` starts anew, or a function that returns an iterator. Packed sequences and
        lists of tensors are allowed if each minibatch has all data. Missing entries may be NaN if ``mask`` is
        false there: see :meth:`Batch.checked`.
    :param batch_size: rows in a minibatch, ``None`` for all data. A ``DataLoader`` has its own batch size.
    :param num_data: the number of rows, which a stream without a length needs.
    :param steps_per_epoch: the number of batches in an epoch of a stream, see :class:`Streamed`.
    :raises ValueError: for empty data, non-finite rows, arguments of unequal length, unsupported types, a
        stream without a number of rows, or another number of rows than ``num_data``.
    """
    if batch_size is not None:
        batch_size = check_count(
            "batch_size", batch_size, expected="1 or more, or None for all data at once,"
        )
    for name, count in (("num_data", num_data), ("steps_per_epoch", steps_per_epoch)):
        if count is not None:
            check_count(name, count)
    batches = (
        _as_stream(data, batch_size, num_data, steps_per_epoch)
        if _is_stream(data)
        else _as_finite(data, batch_size)
    )
    if steps_per_epoch is not None and not isinstance(batches, Streamed):
        raise ValueError(
            f"steps_per_epoch: these data have {batches.num_rows} rows, so an epoch has "
            f"{batches.num_batches} steps; expected a stream (an IterableDataset, its loader, or an iterable "
            "of batches), or steps_per_epoch=None"
        )
    if num_data is not None and num_data != batches.num_rows:
        raise ValueError(
            f"num_data is {num_data} but the data have {batches.num_rows} rows; expected num_data=None, or "
            "the number of rows"
        )
    return batches


def _is_stream(data: Any) -> bool:
    """Whether ``data`` yields rows or batches, and cannot be indexed."""
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset)
    if isinstance(data, IterableDataset):
        return True
    if isinstance(data, torch.nn.Module | type):
        return False
    has_index = hasattr(data, "__getitem__") or hasattr(data, "__array__") or hasattr(data, "__dlpack__")
    return not has_index and (callable(data) or hasattr(data, "__iter__"))


def _as_stream(
    data: Any, batch_size: int | None, num_data: int | None, steps_per_epoch: int | None
) -> Streamed:
    length, yields_batches = _stream_length(data), _yields_batches(data)
    num_rows = num_data if length is None else length
    if num_rows is None and isinstance(data, DataLoader) and yields_batches:
        raise ValueError(
            "data: the DataLoader has batch_size=None, so the data set itself makes the batches, and their "
            "rows cannot be counted; pass num_data, the number of rows in a pass, or batch_size in the "
            "DataLoader"
        )
    if num_rows is None:
        kind = type(data.dataset if isinstance(data, DataLoader) else data).__name__
        raise ValueError(
            f"data: the stream, of type {kind}, has no length, so a minibatch cannot be scaled to all data; "
            "pass num_data, the number of rows in a pass, where the function has this option"
            + ("" if yields_batches else ", or add a method __len__ that returns it")
        )
    if isinstance(data, DataLoader):
        if length is not None:
            num_batches = len(data)
            _check_not_empty(data, num_batches)
            if data.drop_last:
                num_rows = num_batches * (data.batch_size or 1)
        return Streamed(data, num_rows, steps_per_epoch)
    if yields_batches:
        return Streamed(data, num_rows, steps_per_epoch)
    if not num_rows:
        raise ValueError("data: the data set is empty")
    loader: DataLoader = DataLoader(
        data,
        batch_size or num_rows,
        collate_fn=_collate,
        generator=torch.Generator(),  # else each pass draws a seed for workers from the global random state
    )
    return Streamed(loader, num_rows, steps_per_epoch)


def as_counted_batches(data: Any, batch_size: int | None, *, limit: int) -> Batches:
    """Minibatches as of :func:`as_batches`. The rows of a stream without a length are counted.

    :raises ValueError: as :func:`as_batches` does, and if such a stream has more than ``limit`` rows.
    """
    if not _is_stream(data) or _stream_length(data) is not None:
        return as_batches(data, batch_size)
    batches = _as_stream(data, batch_size, limit, None)
    batches.count()
    return batches


def _yields_batches(stream: Any) -> bool:
    """Whether a stream yields batches and not rows."""
    if isinstance(stream, DataLoader):
        return stream.batch_size is None
    return not isinstance(stream, IterableDataset)


def _stream_length(stream: Any) -> int | None:
    """The number of rows of a stream, if it is known: its attribute ``num_data``, or the length of a stream
    of rows. The length of a stream of batches is not that."""
    if _yields_batches(stream):
        return getattr(stream, "num_data", None)
    dataset: Any = stream.dataset if isinstance(stream, DataLoader) else stream
    try:
        return len(dataset)
    except TypeError:
        return None


def _as_finite(data: Any, batch_size: int | None) -> Batches:
    """The minibatches of data that are not a stream."""
    if isinstance(data, DataLoader):
        return Loaded(data)
    if isinstance(data, Data):
        parts = {"x": data.x, "c": data.condition, "mask": data.mask}
        parts = {key: part for key, part in parts.items() if part is not None}
        source = Batch(tuple(parts.values()), {}) if data.mask is None else Batch((), parts)
        draw = (lambda rows: as_batch(data[rows])) if data.binarize == "stochastic" else None
        return InMemory(source, batch_size or len(data), draw)
    if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
        data = data.tensors
    if isinstance(data, Dataset):
        n = _length(data, f"the data set, of type {type(data).__name__}, has no length")
        if not n:
            raise ValueError("data: the data set is empty")
        return Loaded(DataLoader(data, batch_size or n, shuffle=True, collate_fn=_collate))
    if isinstance(data, list):
        if not is_nested(data):
            raise ValueError(
                f"data: expected a tensor or array (n, *event) but got a list of {len(data)}; stack its rows "
                "with torch.stack, or pass a tuple if its items are the arguments of the model"
            )
        data = (data,)
    source = as_batch(data, in_place=True).checked("data")
    return InMemory(source, batch_size or source.num_rows)


def fitting(batch: Batch, *programs: Callable[..., Any]) -> Batch:
    """Drop the arguments that neither model nor guide takes, such as labels.

    Model and guide get the same arguments. If one has ``*args`` or ``**kwargs``, the signature of the other
    decides which arguments are kept.

    :param programs: the model, and optionally the guide.
    :raises ValueError: if a program needs an argument that the batch lacks, gets an argument both by position
        and by name, or does not take an argument that the other program takes.
    """
    signatures = [_signature(program) for program in programs]
    known = [signature for signature in signatures if signature is not None]
    num_positional = [n for n in map(_num_positional, programs, signatures) if n is not None]
    names = [taken for taken in map(_keyword_names, known) if taken is not None]
    args = batch.args[: max(num_positional)] if num_positional else batch.args
    kwargs = {
        key: part for key, part in batch.kwargs.items() if not names or any(key in taken for taken in names)
    }
    cut = Batch(args, kwargs)
    mask = batch.kwargs.get("mask")
    if "mask" not in kwargs and isinstance(mask, Tensor) and mask.dtype == torch.bool and not mask.all():
        raise ValueError(
            f"data: {int((~mask).sum())} entries are missing, but neither model nor guide takes mask; give "
            "both a keyword argument mask, as pyro_vae.VAE has, or remove the rows"
        )
    for name in batch.kwargs.keys() - kwargs.keys():
        optional = {
            key for signature in known for key in _keyword_names(signature) or () if key not in kwargs
        }
        if close := get_close_matches(name, optional, n=1):
            _warn_misspelled(name, close[0])
    for side, signature in zip(("model", "guide"), signatures, strict=False):
        if signature is not None:
            _check_call(side, signature, cut, batch)
    return cut


@cache
def _warn_misspelled(name: str, taken: str) -> None:
    logger.warning("data: neither model nor guide takes %r, so it is left out; they take %r", name, taken)


def _signature(program: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)
    except (TypeError, ValueError):
        return None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _num_positional(program: Callable[..., Any], signature: inspect.Signature | None) -> int | None:
    """The number of positional arguments that a program takes, ``None`` for any number. It is the attribute
    ``num_inputs`` of the program, or counted in its signature."""
    if hasattr(program, "num_inputs") or signature is None:
        return getattr(program, "num_inputs", None)
    kinds = [p.kind for p in signature.parameters.values()]
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in _POSITIONAL for kind in kinds)


def _keyword_names(signature: inspect.Signature) -> set[str] | None:
    """The names of the arguments that can be passed by keyword; ``None`` for any name (``**kwargs``)."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _check_call(side: str, signature: inspect.Signature, cut: Batch, batch: Batch) -> None:
    try:
        signature.bind(*cut.args, **cut.kwargs)
        return
    except TypeError as error:
        cause = str(error)
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
    filled = {p.name for p in positional[: len(cut.args)]}
    repeated = filled & cut.kwargs.keys()
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in filled
        and p.name not in cut.kwargs
    ]
    if repeated:
        problem = f"is given {min(repeated)!r} both by position and by name; expected one of them"
    elif missing:
        problem = f"needs {', '.join(map(repr, missing))}, but the data have only {batch.describe()}"
    else:
        problem = f"does not take the data ({cause}); expected the same arguments in model and guide"
    raise ValueError(f"{side}: it {problem}")


def _collate(items: list[Any]) -> Any:
    for i, part in enumerate(pytree.tree_leaves(items[0])):
        if isinstance(part, np.ma.MaskedArray):
            parts = np.ma.stack([pytree.tree_leaves(item)[i] for item in items])
            as_tensor(parts, "data")  # raises for masked entries, which default_collate ignores
    return default_collate(items)
