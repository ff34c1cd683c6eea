"""Minibatches of whatever users have: tensors, arrays, tuples and dicts of them, data sets, loaders.

Data in memory stay in memory: an epoch is a permutation of the rows and one index per minibatch, without collating item
by item; a ``DataLoader`` keeps its own ways.
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
_WIDENED = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)


class Batch(NamedTuple):
    """The arguments of model and guide for some rows of the data: ``model(*args, **kwargs)``.

    Tensors of one dimension or more have a row for each datum. Other arguments are the same for all of them, or hold tensors
    in a way that rows cannot be taken from: packed sequences, lists of tensors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """All arguments, by name or by position."""
        return {f"argument {i}": part for i, part in enumerate(self.args)} | self.kwargs

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: part for name, part in self.named.items() if isinstance(part, Tensor) and part.dim()}

    @property
    def num_rows(self) -> int:
        """The number of data. Raises ``ValueError`` where no argument says it."""
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
        """Whether rows can be taken from every argument that has some."""
        return self.plain or not any(map(is_nested, (*self.args, *self.kwargs.values())))

    def map(self, f: Callable[[Any], Any]) -> "Batch":
        """``f`` of every argument that has rows; the others as they are."""

        def each(part: Any) -> Any:
            return f(part) if _has_rows(part) else part

        return Batch(tuple(map(each, self.args)), {key: each(part) for key, part in self.kwargs.items()})

    @property
    def plain(self) -> bool:
        """Whether it is tensors by position and nothing else, as most are: a search takes its time, at every step."""
        return not self.kwargs and all(type(part) is Tensor for part in self.args)

    def leaves(self) -> list[Tensor]:
        """Every tensor among the arguments, however nested."""
        if self.plain:
            return list(self.args)
        return [leaf for leaf in pytree.tree_leaves(tuple(self)) if isinstance(leaf, Tensor)]

    def with_leaves(self, tensors: Iterable[Tensor]) -> "Batch":
        """The same arguments with other tensors, in the order of :meth:`leaves`."""
        given = iter(tensors)
        return Batch(*pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, tuple(self)))

    def cast(self, dtype: torch.dtype | None) -> "Batch":
        """The same arguments as a pair takes them: floating tensors in ``dtype`` (``None``: as they are), and small whole
        numbers as int64, in which sums and differences of bytes do not wrap around."""
        if all(_cast_dtype(leaf, dtype) is leaf.dtype for leaf in self.leaves()):
            return self
        return self.with_leaves(leaf.to(_cast_dtype(leaf, dtype)) for leaf in self.leaves())

    def check_cast(self, dtype: torch.dtype | None) -> None:
        """Raise ``ValueError`` where rounding to ``dtype`` loses what distinguishes these rows, see :meth:`Ranges.check`."""
        ranges = Ranges()
        for name, part in self.named.items():
            if _has_rows(part) and loses_precision(part, dtype):
                ranges.see(name, part)
        if dtype is not None:
            ranges.check(dtype)

    def rows(self, rows: slice) -> "Batch":
        """Some of the data. Raises ``ValueError`` where an argument cannot be divided by rows."""
        if not self.divisible:
            if rows.indices(self.num_rows) == (0, self.num_rows, 1):
                return self
            raise ValueError(f"data: {self._nested()}, from which rows cannot be taken; {_WHOLE}")
        return self.map(lambda part: part[rows])

    def first(self, n: int) -> "Batch":
        return self.rows(slice(n))

    def like(self, other: "Batch") -> "Batch":
        """The arguments that ``other`` has too, by position and by name."""
        if len(self.args) == len(other.args) and self.kwargs.keys() == other.kwargs.keys():
            return self
        return Batch(self.args[: len(other.args)], {key: self.kwargs[key] for key in other.kwargs if key in self.kwargs})

    def describe(self) -> str:
        """What the arguments are, without their contents."""
        return ", ".join(f"{name}: {_kind(part)}" for name, part in self.named.items()) or "no arguments"

    def checked(self, name: str) -> "Batch":
        """The batch, with zeros for missing entries.

        An entry is missing where the keyword argument ``mask`` is false: a bool tensor of the shape of an argument, or of its
        first dimensions. There NaN and infinities become 0 in what model and guide are given, so that gradients stay
        finite; anywhere else they are an error.

        :raises ValueError: for no rows, unequal rows, or entries that are not finite and not missing.
        """
        batch = self._filled()
        parts = {key: part for key, part in batch.named.items() if _has_rows(part)}
        if not parts and batch.divisible:
            raise ValueError(f"{name}: expected tensors or arrays of shape (n, *event) but got {self.describe()}")
        for key, part in parts.items():
            check_rows(part, f"{name}, {key}" if len(parts) > 1 else name)
            if len(part) != batch.num_rows:
                raise ValueError(f"{name}: {key} has {len(part)} rows but the first has {batch.num_rows}")
        for key, part in batch.named.items():
            if is_nested(part):
                for leaf in pytree.tree_leaves(part):
                    if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
                        raise ValueError(f"{name}: {key}, {_kind(part)}, has NaN or infinite entries; fill or drop them")
        return batch

    def _filled(self) -> "Batch":
        mask = self.kwargs.get("mask")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.dim():
            return self

        def fill(part: Any) -> Any:
            if not isinstance(part, Tensor) or not part.is_floating_point() or part.shape[: mask.dim()] != mask.shape:
                return part
            missing = ~mask.reshape(mask.shape + (1,) * (part.dim() - mask.dim())) & ~part.isfinite()
            return part.masked_fill(missing, 0.0) if missing.any() else part

        return self.map(fill)

    def _nested(self) -> str:
        return next(f"{name} is {_kind(part)}" for name, part in self.named.items() if is_nested(part))


_WHOLE = "pass batch_size=None to take all data at once, or pad them to one tensor (n, *event) with a mask"


def _has_rows(part: Any) -> bool:
    return (isinstance(part, Tensor) and part.dim() > 0) or isinstance(part, SparseRows)


def _cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if tensor.dtype in _WIDENED:
        return torch.int64
    if dtype is None and tensor.dtype in (torch.half, torch.bfloat16):  # in which a pair without parameters would compute
        return torch.get_default_dtype()
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _kind(part: Any) -> str:
    if isinstance(part, Tensor | SparseRows):
        return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    if isinstance(part, PackedSequence):
        return f"a PackedSequence of {int(part.batch_sizes[0])} sequences"
    return f"a {type(part).__name__} of {len(part)}" if isinstance(part, list | tuple | dict) else f"a {type(part).__name__}"


class Batches(ABC):
    """The minibatches of a data set, epoch after epoch. ``num_rows`` is the number N of data, ``persistent`` whether they
    come from processes that live on, with random states that nobody else sees. ``in_data_order`` says whether
    ``epoch(shuffle=False)`` goes through all data in their own order."""

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
        """Minibatches in one epoch."""

    def cast(self, dtype: torch.dtype | None) -> None:
        """From now on give batches as :meth:`Batch.cast` makes them.

        :raises ValueError: where that loses what distinguishes the rows of a column: see :meth:`Ranges.check`. What a loader
            gives is checked as it comes.
        """
        self._prepare = partial(Batch.cast, dtype=dtype)

    def generators(self) -> list[torch.Generator]:
        """The generators that they draw from besides torch's own."""
        return []


class InMemory(Batches):
    """Tensors in memory, taken by index; ``take`` gives the rows at an index where they are drawn anew each time.

    ``source`` is what they are taken from. Where it is ``drawn`` (sparse rows too), it is not what a model is given.
    """

    def __init__(self, source: Batch, batch_size: int, take: Callable[[Tensor], Batch] | None = None) -> None:
        super().__init__()
        self.source = source
        self.drawn = take is not None or any(isinstance(part, SparseRows) for part in source.named.values())
        self.num_rows = source.num_rows
        self.batch_size = min(batch_size, self.num_rows)
        if self.batch_size < self.num_rows and not source.divisible:
            raise ValueError(f"data: {source._nested()}, from which minibatches cannot be taken; {_WHOLE}")
        self._rank, self._size = 0, 1
        self._shared: torch.Generator | None = None
        self._take = take or (lambda rows: source.map(partial(_take, rows=rows)))

    @property
    def whole(self) -> Batch:
        """All data as a model is given them, unless they are drawn."""
        return self._prepare(self.source)

    def cast(self, dtype: torch.dtype | None) -> None:
        self.source.check_cast(dtype)
        super().cast(dtype)

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        if self.batch_size == self.num_rows:
            # in the data's own order: a guide with parameters for each datum meets its rows where it left them
            order = torch.arange(self.num_rows)
        else:
            order = torch.randperm(self.num_rows, generator=self._shared) if shuffle else torch.arange(self.num_rows)
        if self._size == 1:
            return (self._prepare(self._take(rows)) for rows in order.split(self.batch_size))
        parts = ((rows, rows[self._rank :: self._size]) for rows in order.split(self.batch_size))
        return (self._prepare(self._take(own if len(own) else rows[:1])) for rows, own in parts if len(own) or shuffle)

    def share(self, rank: int, size: int, seed: int) -> None:
        """Take every ``size``-th row of each minibatch from ``rank`` on, the order of the data drawn from that seed. A shuffled
        minibatch that has none for this process is its first row, which is to count for nothing: all take equal steps.

        :raises ValueError: for data that cannot be divided.
        """
        if not self.source.divisible:
            raise ValueError(f"data: {self.source._nested()}, whose rows {size} processes cannot share; pad them to one tensor")
        self._rank, self._size, self._shared = rank, size, torch.Generator().manual_seed(seed)

    def generators(self) -> list[torch.Generator]:
        return [] if self._shared is None else [self._shared]

    @property
    def num_batches(self) -> int:
        return -(-self.num_rows // self.batch_size)


def _take(part: Tensor | SparseRows, rows: Tensor) -> Tensor:
    return part[rows] if isinstance(part, SparseRows) else part.index_select(0, rows.to(part.device))


class Loaded(Batches):
    """A user's ``DataLoader``, which decides on order and size of its batches; each is checked as it comes.

    Unshuffled epochs of a loader with a ``RandomSampler`` go through its whole data set in order. A sampler with an order or a
    selection of its own is left as it is, and ``in_data_order`` is false.
    """

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.shuffled, self.ordered = loader, loader
        self.persistent = loader.persistent_workers
        batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        sampler = getattr(batching, "sampler", batching)
        self._exact = isinstance(loader.dataset, IterableDataset) or not isinstance(batching, BatchSampler)
        self.num_rows = _count(loader, batching, sampler)
        self._num_batches = _length(loader, "the loader has no length, nor its batch sampler")
        if isinstance(sampler, RandomSampler) and not sampler.replacement and isinstance(batching, BatchSampler):
            self.ordered = _ordered(loader, batching.batch_size)
        else:
            stream = isinstance(loader.dataset, IterableDataset)
            self.in_data_order = stream or isinstance(sampler, SequentialSampler)
            if getattr(batching, "drop_last", loader.drop_last):
                self.num_rows = self._num_batches * (getattr(batching, "batch_size", None) or loader.batch_size or 1)
        if not self._num_batches:
            raise ValueError(
                f"data: the loader has no batches: its data set has {_rows_of(loader)} rows, in batches of "
                f"{loader.batch_size}{', the last dropped' if loader.drop_last else ''}; expected one or more: lower "
                "batch_size, or pass drop_last=False"
            )
        self._dtype: torch.dtype | None = None
        self._ranges: Ranges | None = Ranges()  # of the batches so far: a pair's dtype is known once it has seen one

    def cast(self, dtype: torch.dtype | None) -> None:
        super().cast(dtype)
        if dtype != self._dtype:
            self._dtype, self._ranges = dtype, self._ranges or Ranges()

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        loader = self.shuffled if shuffle else self.ordered
        sizes = _batch_sizes(loader)
        own = self.generators()
        states = [generator.get_state() for generator in own]
        seen = 0
        try:
            for i, items in enumerate(_iterate(loader)):
                batch = as_batch(items).checked(f"data, batch {i}")
                if sizes is not None and batch.num_rows != (size := next(sizes, 0)):
                    raise ValueError(
                        f"data: batch {i} of the loader has {batch.num_rows} rows, made of {size} items of its data set, so "
                        "the number of data is not known; expected a collate_fn that gives one row for each item"
                    )
                seen += batch.num_rows
                if self._exact and seen > self.num_rows:
                    break
                self._look(batch, f"data, batch {i}", shuffle)
                yield self._prepare(batch)
            if not seen or (self._exact and seen != self.num_rows):
                given = "more" if seen > self.num_rows else str(seen)
                raise ValueError(
                    f"data: the loader has {self.num_rows} rows in an epoch by its length but gave {given}; correct the data "
                    "set's __len__, or share the rows among the loader's workers (torch.utils.data.get_worker_info)"
                )
            if self._ranges is not None and self._dtype is not None:
                self._ranges.check(self._dtype)
                self._ranges = None
        finally:
            if not shuffle:  # to look at the data is not to move the loader's random state
                for generator, state in zip(own, states, strict=True):
                    generator.set_state(state)

    def _look(self, batch: Batch, name: str, shuffle: bool) -> None:
        """Check what a cast loses: at once where the batch is a random one, else when all rows have been seen, since rows that
        follow each other may be close."""
        if self._ranges is None:
            return
        for key, part in batch.tensors.items():
            if loses_precision(part, self._dtype or torch.get_default_dtype()):
                self._ranges.see(key, part)
        if self._dtype is not None and shuffle and self.ordered is not self.shuffled and batch.num_rows > 1:
            self._ranges.check(self._dtype, name)

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def generators(self) -> list[torch.Generator]:
        loaders: tuple[Any, ...] = (self.shuffled, self.ordered)
        drawing = [(loader, loader.sampler, loader.batch_sampler) for loader in loaders]
        parts = (part for each in drawing for part in (*each, getattr(each[2], "sampler", None)))
        return list(dict.fromkeys(g for part in parts if (g := getattr(part, "generator", None)) is not None))


def _length(sized: Any, cause: str) -> int:
    try:
        return len(sized)
    except TypeError as error:
        raise ValueError(
            f"data: {cause}, so a minibatch cannot be scaled to all data; expected a method __len__ that returns the number of "
            "rows (of batches, for a sampler of batches)"
        ) from error


def _batch_sizes(loader: DataLoader) -> Iterator[int] | None:
    """How many items of its data set each batch of a loader has; ``None`` where a sampler of its own decides."""
    batching: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or type(batching) is not BatchSampler:
        return None
    try:
        n = len(batching.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return (min(batching.batch_size, n - start) for start in range(0, n, batching.batch_size))


def _rows_of(loader: DataLoader) -> int:
    return _length(loader.dataset, f"the data set, of type {type(loader.dataset).__name__}, has no length")


def _count(loader: DataLoader, batching: Any, sampler: Any) -> int:
    """The number of data that a loader goes through."""
    if isinstance(loader.dataset, IterableDataset):
        if loader.batch_size is None:
            raise ValueError(
                "data: a DataLoader with batch_size=None gives batches that the data set makes, whose rows cannot be counted; "
                "expected a data set of single rows, and the batch_size in the loader"
            )
        return _rows_of(loader)
    if loader.batch_sampler is None and not isinstance(batching, BatchSampler):
        raise ValueError(
            "data: a DataLoader with batch_size=None gives batches that the data set makes, whose rows cannot be counted; "
            "expected batch_size in the loader, or sampler=BatchSampler(...)"
        )
    if isinstance(sampler, RandomSampler):
        return len(sampler.data_source)
    if isinstance(sampler, WeightedRandomSampler):  # an epoch has num_samples draws of these data
        return len(sampler.weights)
    if isinstance(batching, BatchSampler):
        return _length(sampler, "the loader's sampler has no length")
    if isinstance(batching, list | tuple):  # of indices
        return sum(map(len, batching))
    return _rows_of(loader)  # a sampler of batches: epochs are counted


def _ordered(loader: DataLoader, batch_size: int) -> DataLoader:
    """A loader of the same data set in its own order, to the last row."""
    collate: Any = loader.collate_fn
    order = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    how: dict[str, Any] = (
        {"batch_size": batch_size, "sampler": order}
        if loader.batch_size is not None or loader.batch_sampler is not None
        else {"batch_size": None, "sampler": BatchSampler(order, batch_size, drop_last=False)}
    )
    return DataLoader(
        loader.dataset, **how, collate_fn=collate, num_workers=loader.num_workers, pin_memory=loader.pin_memory,
        timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context, prefetch_factor=loader.prefetch_factor,
    )  # fmt: skip


def _iterate(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises ``ValueError`` where rows cannot be stacked."""
    coming = iter(loader)
    while True:
        try:
            items = next(coming)
        except StopIteration:
            return
        except (TypeError, RuntimeError) as error:
            cause = str(error).strip().splitlines()[-1] if str(error).strip() else ""
            if "equal size" in cause:
                raise ValueError(
                    f"data: rows of the data set differ in length and cannot be stacked ({cause}); pad them to one length and "
                    "add a mask, or give a DataLoader whose collate_fn does (torch.nn.utils.rnn.pad_sequence)"
                ) from error
            if "default_collate" in cause:
                raise ValueError(
                    f"data: the items of the data set cannot be stacked into tensors ({cause}); for images give the data set "
                    "transform=torchvision.transforms.ToTensor()"
                ) from error
            raise
        yield items


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers as they lie in memory, for sums over them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def slices(num_rows: int, at_once: int) -> list[slice]:
    """So many rows, some at a time."""
    return [slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]


def as_batch(items: Any, *, share: bool = False) -> Batch:
    """A tensor or array is one argument, a tuple or list several, a mapping the keyword arguments."""
    if isinstance(items, Mapping):
        return Batch((), {key: as_tensor(part, f"data, {key}", share=share) for key, part in items.items()})
    if isinstance(items, tuple | list) and not isinstance(items, PackedSequence):
        return Batch(tuple(as_tensor(part, f"data, argument {i}", share=share) for i, part in enumerate(items)), {})
    return Batch((as_tensor(items, share=share),), {})


def as_whole(data: Any) -> Batch:
    """All data as one batch, in their own order: what a verb that takes them at once is given.

    :param data: as for :func:`as_batches`; stochastically binarized data are binarized once.
    :raises ValueError: as :func:`as_batches` does, and for a loader that gives the data in an order of its own.
    """
    batches = as_batches(data.fixed() if isinstance(data, Data) else data, None)
    if not batches.in_data_order:
        raise ValueError(
            "data: the loader's sampler gives the data in an order of its own, so results could not be matched with data; "
            "pass the data set, or DataLoader(dataset, batch_size, shuffle=False)"
        )
    if isinstance(batches, InMemory):
        return batches.whole.map(lambda part: part[:] if isinstance(part, SparseRows) else part)
    parts = list(batches.epoch(shuffle=False))
    if any(len(part.leaves()) > len(part.tensors) for part in parts):
        raise ValueError(f"data: the loader gives {parts[0].describe()}, whose rows cannot be put together; pass tensors")
    columns = zip(*(part.leaves() for part in parts), strict=True)
    return parts[0].with_leaves(torch.cat(column) for column in columns)


def as_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments that a verb was called with, for model and guide. Raises ``ValueError`` as :meth:`Batch.checked` does."""
    batch = Batch(as_batch(args).args, as_batch(kwargs).kwargs).checked("data")
    return batch.map(lambda part: part[:] if isinstance(part, SparseRows) else part)


def check_count(name: str, value: Any, *, expected: str = "a whole number, 1 or more,") -> int:
    """A number of things. Raises ``ValueError`` for anything but a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected {expected} but got {value!r}")
    return int(value)


def as_batches(data: Any, batch_size: int | None) -> Batches:
    """The minibatches of ``data``.

    :param data: a tensor or array ``(n, *event)``: of torch or numpy, dense or sparse, a data frame of numeric columns; a
        tuple of them, for ``model(x, c)``; a dict of them, for ``model(x=…, mask=…)``; our :class:`~pyro_vae.data.Data`; any
        torch ``Dataset`` with a length; or a ``DataLoader``. Packed sequences and lists of tensors can be arguments where all
        data are taken at once. Missing entries may be NaN where ``mask`` is false: see :meth:`Batch.checked`.
    :param batch_size: rows in a minibatch, ``None`` for all of them at once; a ``DataLoader`` has its own.
    :raises ValueError: for empty data, non-finite rows, arguments of unequal length, and what is no data at all.
    """
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, expected="1 or more, or None for all data at once,")
    if isinstance(data, DataLoader):
        return Loaded(data)
    if isinstance(data, Data):
        source = Batch(tuple(part for part in (data.x, data.condition) if part is not None), {})
        draw = (lambda rows: Batch(data.arguments(rows), {})) if data.binarize == "stochastic" else None
        return InMemory(source, batch_size or len(data), draw)
    if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
        data = data.tensors
    if isinstance(data, Dataset):
        stream = isinstance(data, IterableDataset)
        n = _length(data, f"the data set, of type {type(data).__name__}, has no length")
        if not n:
            raise ValueError("data: the data set is empty")
        return Loaded(DataLoader(data, batch_size or n, shuffle=None if stream else True, collate_fn=_collate))
    if isinstance(data, list):
        if not is_nested(data):
            raise ValueError(
                f"data: expected a tensor or array (n, *event) but got a list of {len(data)}; stack its rows by torch.stack, "
                "or pass a tuple where its parts are the arguments of the model"
            )
        data = (data,)
    source = as_batch(data, share=True).checked("data")
    return InMemory(source, batch_size or source.num_rows)


def fitting(batch: Batch, *programs: Callable[..., Any]) -> Batch:
    """The batch cut to the arguments that model and guide take: labels go where nothing asks for them.

    The same arguments go to both. One is dropped where neither takes it; ``*args`` and ``**kwargs`` take what the other
    program does.

    :param programs: the model, and the guide where there is one.

    :raises ValueError: where a program needs an argument that the batch lacks, is given one both by position and by name, or
        does not take one that the other takes.
    """
    signatures = [_signature(program) for program in programs]
    known = [signature for signature in signatures if signature is not None]
    room = [n for n in map(_room, programs, signatures) if n is not None]
    names = [taken for taken in map(_keywords, known) if taken is not None]
    args = batch.args[: max(room)] if room else batch.args
    kwargs = {key: part for key, part in batch.kwargs.items() if not names or any(key in taken for taken in names)}
    cut = Batch(args, kwargs)
    for name in batch.kwargs.keys() - kwargs.keys():
        optional = {key for signature in known for key in _keywords(signature) or () if key not in kwargs}
        if close := get_close_matches(name, optional, n=1):
            _warn_of_name(name, close[0])
    for side, signature in zip(("model", "guide"), signatures, strict=False):
        if signature is not None:
            _check_call(side, signature, cut, batch)
    return cut


@cache
def _warn_of_name(name: str, taken: str) -> None:
    logger.warning("data: neither model nor guide takes %r, so it is left out; they take %r", name, taken)


def _signature(program: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program)
    except (TypeError, ValueError):
        return None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _room(program: Callable[..., Any], signature: inspect.Signature | None) -> int | None:
    """How many positional arguments a program takes, ``None`` for any number: its ``num_inputs``, or as its signature says."""
    if hasattr(program, "num_inputs") or signature is None:
        return getattr(program, "num_inputs", None)
    kinds = [p.kind for p in signature.parameters.values()]
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in _POSITIONAL for kind in kinds)


def _keywords(signature: inspect.Signature) -> set[str] | None:
    """The names that it takes, ``None`` for any."""
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
    twice = filled & cut.kwargs.keys()
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in filled
        and p.name not in cut.kwargs
    ]
    if twice:
        problem = f"is given {min(twice)!r} both by position and by name; expected one of them"
    elif missing:
        problem = f"needs {', '.join(map(repr, missing))}, which the data lack; they have {batch.describe()}"
    else:
        problem = f"does not take the arguments that the data have ({cause}); expected the same arguments in model and guide"
    raise ValueError(f"{side}: it {problem}")


def _collate(items: list[Any]) -> Any:
    for i, part in enumerate(pytree.tree_leaves(items[0])):
        if isinstance(part, np.ma.MaskedArray):
            parts = np.ma.stack([pytree.tree_leaves(item)[i] for item in items])
            as_tensor(parts, "data")  # refuses masked entries, which would be lost
    return default_collate(items)
