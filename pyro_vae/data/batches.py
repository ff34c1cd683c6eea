"""Minibatches of users' data: tensors, arrays, tuples and dicts of them, data sets, loaders.

For tensors in memory, an epoch is a permutation of the rows, and a minibatch is taken from the tensors by
indexing, which is faster than collating rows one by one. A ``DataLoader`` keeps its own order, batch size and
collate function.
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache, partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
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
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pyro_vae.data.arrays import Ranges, SparseRows, as_tensor, check_rows, is_nested, loses_precision
from pyro_vae.data.datasets import Data

logger = logging.getLogger(__name__)
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
        ranges = Ranges()
        for name, part in self.named.items():
            if _has_rows(part) and loses_precision(part, dtype):
                ranges.update(name, part)
        if dtype is not None:
            ranges.check(dtype)

    def rows(self, rows: slice) -> "Batch":
        """The rows of a slice. Raises ``ValueError`` if a nested argument would be divided."""
        if not self.divisible:
            if rows.indices(self.num_rows) == (0, self.num_rows, 1):
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

    def checked(self, name: str) -> "Batch":
        """The batch after validation, with 0 in place of missing entries.

        The keyword argument ``mask`` is false at missing entries. It is a bool tensor with the shape of an
        argument, or the shape of its first dimensions. Missing entries that are NaN or infinite are replaced
        by 0, so that gradients stay finite. Other entries must be finite.

        :raises ValueError: for no rows, unequal numbers of rows, or non-finite entries that are not missing.
        """
        batch = self._fill_missing()
        parts = {key: part for key, part in batch.named.items() if _has_rows(part)}
        if not parts and batch.divisible:
            raise ValueError(
                f"{name}: expected tensors or arrays of shape (n, *event) but got {self.describe()}"
            )
        for key, part in parts.items():
            check_rows(part, f"{name}, {key}" if len(parts) > 1 else name)
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

    def _fill_missing(self) -> "Batch":
        mask = self.kwargs.get("mask")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.dim():
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
    return (isinstance(part, Tensor) and part.dim() > 0) or isinstance(part, SparseRows)


def _cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if tensor.dtype in _CAST_TO_INT64:
        return torch.int64
    if dtype is None and tensor.dtype in (torch.half, torch.bfloat16):
        return torch.get_default_dtype()  # a pair without parameters computes in the dtype of the data
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _describe(part: Any) -> str:
    if isinstance(part, Tensor | SparseRows):
        return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    if isinstance(part, PackedSequence):
        return f"a PackedSequence of {int(part.batch_sizes[0])} sequences"
    size = f" of {len(part)}" if isinstance(part, list | tuple | dict) else ""
    return f"a {type(part).__name__}{size}"


class Batches(ABC):
    """The minibatches of a data set, epoch after epoch.

    ``num_rows`` is the number N of data. ``persistent`` is true if the data come from worker processes that
    outlive an epoch. The random states of such processes cannot be read. ``in_data_order`` is true if
    ``epoch(shuffle=False)`` yields all data in order.
    """

    num_rows: int
    persistent = False
    in_data_order = True

    def __init__(self) -> None:
        self._prepare: Callable[[Batch], Batch] = lambda batch: batch

    @abstractmethod
    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        """One pass over the data."""

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
    """Minibatches of tensors in memory, by index.

    ``drawn`` is true if the batches are not rows of ``source`` themselves: if ``take`` is given, or if there
    are sparse rows, which become dense.

    :param source: all data.
    :param take: a function that returns the batch of the rows at given indices, for data that are drawn anew
        at each access.
    """

    def __init__(self, source: Batch, batch_size: int, take: Callable[[Tensor], Batch] | None = None) -> None:
        super().__init__()
        self.source = source
        self.drawn = take is not None or any(isinstance(part, SparseRows) for part in source.named.values())
        self.num_rows = source.num_rows
        self.batch_size = min(batch_size, self.num_rows)
        if self.batch_size < self.num_rows and not source.divisible:
            raise ValueError(
                f"data: {source._describe_nested()}, from which minibatches cannot be taken; {_NESTED_REMEDY}"
            )
        self._rank, self._world_size = 0, 1
        self._order_generator: torch.Generator | None = None
        self._take = take or (lambda rows: source.map(partial(_index_rows, rows=rows)))

    @property
    def whole(self) -> Batch:
        """All of ``source`` as one batch, cast as set by :meth:`cast`."""
        return self._prepare(self.source)

    def cast(self, dtype: torch.dtype | None) -> None:
        self.source.check_cast(dtype)
        super().cast(dtype)

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        if shuffle and self.batch_size < self.num_rows:
            order = torch.randperm(self.num_rows, generator=self._order_generator)
        else:  # a full batch stays in data order: a guide may have parameters for each row
            order = torch.arange(self.num_rows)
        if self._world_size == 1:
            return (self._prepare(self._take(rows)) for rows in order.split(self.batch_size))
        shares = ((rows, rows[self._rank :: self._world_size]) for rows in order.split(self.batch_size))
        return (
            self._prepare(self._take(local if len(local) else rows[:1]))
            for rows, local in shares
            if len(local) or shuffle
        )

    def share(self, rank: int, size: int, seed: int) -> None:
        """Divide each minibatch among ``size`` ranks. This rank gets the rows with numbers ``rank``,
        ``rank + size``, …

        All ranks shuffle by ``seed``. A rank for which a shuffled minibatch has no row gets the first row
        instead, so that all ranks take the same number of steps. The caller must ignore the loss of this row.

        :raises ValueError: for nested arguments, which cannot be divided.
        """
        if not self.source.divisible:
            raise ValueError(
                f"data: {self.source._describe_nested()}, whose rows cannot be divided among {size} "
                "processes; pad them to one tensor"
            )
        self._rank, self._world_size = rank, size
        self._order_generator = torch.Generator().manual_seed(seed)

    def generators(self) -> list[torch.Generator]:
        return [] if self._order_generator is None else [self._order_generator]

    @property
    def num_batches(self) -> int:
        return -(-self.num_rows // self.batch_size)


def _index_rows(part: Tensor | SparseRows, rows: Tensor) -> Tensor:
    return part[rows] if isinstance(part, SparseRows) else part.index_select(0, rows.to(part.device))


class Loaded(Batches):
    """The batches of a user's ``DataLoader``, which sets their order and size. Each batch is validated.

    With a ``RandomSampler``, unshuffled epochs iterate over the whole data set in order. Any other sampler is
    used unchanged; unless it is sequential, ``in_data_order`` is false.
    """

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.shuffled, self.ordered = loader, loader
        self.persistent = loader.persistent_workers
        batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        sampler = getattr(batching, "sampler", batching)
        self._must_match_length = isinstance(loader.dataset, IterableDataset) or not isinstance(
            batching, BatchSampler
        )
        self.num_rows = _count_rows(loader, batching, sampler)
        self._num_batches = _length(loader, "the loader and its batch sampler have no length")
        if (
            isinstance(sampler, RandomSampler)
            and not sampler.replacement
            and isinstance(batching, BatchSampler)
        ):
            self.ordered = _sequential(loader, batching.batch_size)
        else:
            stream = isinstance(loader.dataset, IterableDataset)
            self.in_data_order = stream or isinstance(sampler, SequentialSampler)
            if getattr(batching, "drop_last", loader.drop_last):
                self.num_rows = self._num_batches * (
                    getattr(batching, "batch_size", None) or loader.batch_size or 1
                )
        if not self._num_batches:
            raise ValueError(
                f"data: the loader has no batches: its data set has {_num_items(loader)} rows, in batches of "
                f"{loader.batch_size}{' with drop_last=True' if loader.drop_last else ''}; expected at least "
                "one batch: lower batch_size, or pass drop_last=False"
            )
        self._dtype: torch.dtype | None = None
        # ranges of the batches so far; the dtype is known only after the first batch
        self._ranges: Ranges | None = Ranges()

    def cast(self, dtype: torch.dtype | None) -> None:
        super().cast(dtype)
        if dtype != self._dtype:
            self._dtype, self._ranges = dtype, self._ranges or Ranges()

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        loader = self.shuffled if shuffle else self.ordered
        sizes = _batch_sizes(loader)
        generators = self.generators()
        states = [generator.get_state() for generator in generators]
        num_seen = 0
        try:
            for i, items in enumerate(_iterate(loader)):
                batch = as_batch(items).checked(f"data, batch {i}")
                if sizes is not None and batch.num_rows != (size := next(sizes, 0)):
                    raise ValueError(
                        f"data: batch {i} of the loader has {batch.num_rows} rows from {size} items of its "
                        "data set, so the number of data is unknown; expected a collate_fn that returns one "
                        "row for each item"
                    )
                num_seen += batch.num_rows
                if self._must_match_length and num_seen > self.num_rows:
                    break
                self._check_precision(batch, f"data, batch {i}", shuffle)
                yield self._prepare(batch)
            if not num_seen or (self._must_match_length and num_seen != self.num_rows):
                got = "more" if num_seen > self.num_rows else str(num_seen)
                raise ValueError(
                    f"data: expected {self.num_rows} rows in an epoch, by the loader's length, but got "
                    f"{got}; correct the data set's __len__, or divide the rows among the loader's workers "
                    "(torch.utils.data.get_worker_info)"
                )
            if self._ranges is not None and self._dtype is not None:
                self._ranges.check(self._dtype)
                self._ranges = None
        finally:
            if not shuffle:  # an unshuffled epoch leaves random states unchanged
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)

    def _check_precision(self, batch: Batch, name: str, shuffle: bool) -> None:
        """Record the ranges of a batch, and check them at once if the batch is shuffled. Consecutive rows may
        be close to each other, so without shuffling the ranges are checked at the end of the epoch."""
        if self._ranges is None:
            return
        for key, part in batch.tensors.items():
            if loses_precision(part, self._dtype or torch.get_default_dtype()):
                self._ranges.update(key, part)
        if self._dtype is not None and shuffle and self.ordered is not self.shuffled and batch.num_rows > 1:
            self._ranges.check(self._dtype, name)

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def generators(self) -> list[torch.Generator]:
        owners: list[Any] = []
        for loader in (self.shuffled, self.ordered):
            batching = loader.batch_sampler
            owners += [loader, loader.sampler, batching, getattr(batching, "sampler", None)]
        generators = (getattr(owner, "generator", None) for owner in owners)
        return list(dict.fromkeys(generator for generator in generators if generator is not None))


def _length(sized: Any, cause: str) -> int:
    try:
        return len(sized)
    except TypeError as error:
        raise ValueError(
            f"data: {cause}, so a minibatch cannot be scaled to all data; expected a method __len__ that "
            "returns the number of rows (for a batch sampler: the number of batches)"
        ) from error


def _batch_sizes(loader: DataLoader) -> Iterator[int] | None:
    """The number of data-set items in each batch of a loader; ``None`` if it cannot be known in advance."""
    batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(batching) is not BatchSampler:
        return None
    try:
        n = len(batching.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return (min(batching.batch_size, n - start) for start in range(0, n, batching.batch_size))


def _num_items(loader: DataLoader) -> int:
    return _length(loader.dataset, f"the data set, of type {type(loader.dataset).__name__}, has no length")


def _count_rows(loader: DataLoader, batching: Any, sampler: Any) -> int:
    """The number N of data behind a loader."""
    uncountable = (
        "data: the DataLoader has batch_size=None, so the data set itself makes the batches, and their rows "
        "cannot be counted; expected "
    )
    if isinstance(loader.dataset, IterableDataset):
        if loader.batch_size is None:
            raise ValueError(f"{uncountable}a data set of single rows and batch_size in the DataLoader")
        return _num_items(loader)
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
    collate: Any = loader.collate_fn
    order = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    sampling: dict[str, Any] = (
        {"batch_size": batch_size, "sampler": order}
        if loader.batch_size is not None or loader.batch_sampler is not None
        else {"batch_size": None, "sampler": BatchSampler(order, batch_size, drop_last=False)}
    )
    return DataLoader(
        loader.dataset, **sampling, collate_fn=collate, num_workers=loader.num_workers,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        generator=loader.generator, multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )  # fmt: skip


def _iterate(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader. Raises ``ValueError`` if rows cannot be stacked."""
    iterator = iter(loader)
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


def slices(num_rows: int, at_once: int) -> list[slice]:
    """Slices that split ``num_rows`` rows into blocks of ``at_once``."""
    return [slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]


def as_batch(items: Any, *, share: bool = False) -> Batch:
    """The arguments in ``items``: one positional argument for a tensor or array, several for a tuple or list,
    keyword arguments for a mapping."""
    if isinstance(items, Mapping):
        return Batch((), {key: as_tensor(part, f"data, {key}", share=share) for key, part in items.items()})
    if isinstance(items, tuple | list) and not isinstance(items, PackedSequence):
        return Batch(
            tuple(as_tensor(part, f"data, argument {i}", share=share) for i, part in enumerate(items)), {}
        )
    return Batch((as_tensor(items, share=share),), {})


def as_ordered_batches(data: Any, batch_size: int | None) -> Batches:
    """Minibatches whose unshuffled epochs are in data order. Data with stochastic binarization are binarized
    once.

    :raises ValueError: as :func:`as_batches` does, and for a loader whose sampler changes the order.
    """
    batches = as_batches(data.fixed() if isinstance(data, Data) else data, batch_size)
    if not batches.in_data_order:
        raise ValueError(
            "data: the loader's sampler has an order of its own, so results cannot be matched with rows; "
            "pass the data set, or DataLoader(dataset, batch_size, shuffle=False)"
        )
    return batches


def as_whole(data: Any) -> Batch:
    """All data as one batch, in data order.

    :param data: as for :func:`as_ordered_batches`. A :class:`Batch`, which functions of this library pass to
        each other, is returned unchanged.
    :raises ValueError: as :func:`as_ordered_batches` does.
    """
    if isinstance(data, Batch):
        return data
    batches = as_ordered_batches(data, None)
    if isinstance(batches, InMemory):
        return batches.whole.map(lambda part: part[:] if isinstance(part, SparseRows) else part)
    parts = list(batches.epoch(shuffle=False))
    if any(len(part.leaves()) > len(part.tensors) for part in parts):
        raise ValueError(
            f"data: the loader yields {parts[0].describe()}, whose rows cannot be concatenated; pass tensors"
        )
    columns = zip(*(part.leaves() for part in parts), strict=True)
    return parts[0].with_leaves(torch.cat(column) for column in columns)


def as_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments of a call as a validated batch. Raises ``ValueError`` as :meth:`Batch.checked` does."""
    batch = Batch(as_batch(args).args, as_batch(kwargs).kwargs).checked("data")
    return batch.map(lambda part: part[:] if isinstance(part, SparseRows) else part)


def check_count(name: str, value: Any, *, expected: str = "a whole number, 1 or more,") -> int:
    """Validate a count. Raises ``ValueError`` for anything but an integer ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected {expected} but got {value!r}")
    return int(value)


def as_batches(data: Any, batch_size: int | None) -> Batches:
    """The minibatches of ``data``.

    :param data: a torch or numpy array ``(n, *event)``, dense or sparse, or a data frame of numeric columns;
        a tuple of them, for ``model(x, c)``; a dict of them, for ``model(x=…, mask=…)``; a
        :class:`~pyro_vae.data.Data`; a torch ``Dataset`` with a length; or a ``DataLoader``. Packed sequences
        and lists of tensors are allowed if each minibatch has all data. Missing entries may be NaN if
        ``mask`` is false there: see :meth:`Batch.checked`.
    :param batch_size: rows in a minibatch, ``None`` for all data. A ``DataLoader`` has its own batch size.
    :raises ValueError: for empty data, non-finite rows, arguments of unequal length, and unsupported types.
    """
    if batch_size is not None:
        batch_size = check_count(
            "batch_size", batch_size, expected="1 or more, or None for all data at once,"
        )
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
        stream = isinstance(data, IterableDataset)
        n = _length(data, f"the data set, of type {type(data).__name__}, has no length")
        if not n:
            raise ValueError("data: the data set is empty")
        return Loaded(
            DataLoader(data, batch_size or n, shuffle=None if stream else True, collate_fn=_collate)
        )
    if isinstance(data, list):
        if not is_nested(data):
            raise ValueError(
                f"data: expected a tensor or array (n, *event) but got a list of {len(data)}; stack its rows "
                "with torch.stack, or pass a tuple if its items are the arguments of the model"
            )
        data = (data,)
    source = as_batch(data, share=True).checked("data")
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
