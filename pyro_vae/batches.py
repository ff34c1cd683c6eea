"""Minibatches of whatever users have: tensors, arrays, tuples and dicts of them, data sets, loaders.

Data in memory stay in memory: an epoch is a permutation of the rows and one index per minibatch, without collating item
by item; a ``DataLoader`` keeps its own ways.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from pyro_vae.data import Data, check_rows


class Batch(NamedTuple):
    """The arguments of model and guide for some rows of the data: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {f"argument {i}": part for i, part in enumerate(self.args)} | self.kwargs
        return {name: part for name, part in named.items() if isinstance(part, Tensor) and part.dim()}

    @property
    def num_rows(self) -> int:
        return next(len(part) for part in (*self.args, *self.kwargs.values()) if isinstance(part, Tensor) and part.dim())

    def map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        def each(part: Any) -> Any:
            return f(part) if isinstance(part, Tensor) and part.dim() else part

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

    def rows(self, rows: slice) -> "Batch":
        """Some of the data."""
        return self.map(lambda part: part[rows])

    def first(self, n: int) -> "Batch":
        return self.rows(slice(n))

    def check(self, name: str) -> None:
        """Raise ``ValueError`` for no rows, unequal rows, or non-finite ones."""
        if not self.tensors:
            raise ValueError(f"{name}: expected tensors of shape (n, *event) but got {self}")
        for key, part in self.tensors.items():
            check_rows(part, f"{name}, {key}" if len(self.tensors) > 1 else name)
            if len(part) != self.num_rows:
                raise ValueError(f"{name}: {key} has {len(part)} rows but the first has {self.num_rows}")


class Batches(ABC):
    """The minibatches of a data set, epoch after epoch. ``num_rows`` is the number N of data, ``persistent`` whether they
    come from processes that live on, with random states that nobody else sees."""

    num_rows: int
    persistent = False

    @abstractmethod
    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        """One pass over the data."""

    @property
    @abstractmethod
    def num_batches(self) -> int:
        """Minibatches in one epoch."""

    def generators(self) -> list[torch.Generator]:
        """The generators that they draw from besides torch's own."""
        return []


class InMemory(Batches):
    """Tensors in memory, taken by index; ``take`` gives the rows at an index where they are drawn anew each time."""

    def __init__(self, whole: Batch, batch_size: int, take: Callable[[Tensor], Batch] | None = None) -> None:
        self.drawn = take is not None
        self.whole = whole
        self.num_rows = whole.num_rows
        self.batch_size = min(batch_size, self.num_rows)
        self._rank, self._size = 0, 1
        self._shared: torch.Generator | None = None
        self._take = take or (lambda rows: whole.map(lambda part: part.index_select(0, rows.to(part.device))))

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        if self.batch_size == self.num_rows:
            # in the data's own order: a guide with parameters for each datum meets its rows where it left them
            order = torch.arange(self.num_rows)
        else:
            order = torch.randperm(self.num_rows, generator=self._shared) if shuffle else torch.arange(self.num_rows)
        if self._size == 1:
            return map(self._take, order.split(self.batch_size))
        parts = ((rows, rows[self._rank :: self._size]) for rows in order.split(self.batch_size))
        return (self._take(own if len(own) else rows[:1]) for rows, own in parts if len(own) or shuffle)

    def share(self, rank: int, size: int, seed: int) -> None:
        """Take every ``size``-th row of each minibatch from ``rank`` on, the order of the data drawn from that seed. A shuffled
        minibatch that has none for this process is its first row, which is to count for nothing: all take equal steps."""
        self._rank, self._size, self._shared = rank, size, torch.Generator().manual_seed(seed)

    def generators(self) -> list[torch.Generator]:
        return [] if self._shared is None else [self._shared]

    @property
    def num_batches(self) -> int:
        return -(-self.num_rows // self.batch_size)


class Loaded(Batches):
    """A user's ``DataLoader``, which decides on order and size of its batches; each is checked as it comes."""

    def __init__(self, shuffled: DataLoader, ordered: DataLoader) -> None:
        self.shuffled, self.ordered = shuffled, ordered
        self.persistent = shuffled.persistent_workers
        try:
            len(shuffled.dataset)  # type: ignore[arg-type]
            self.num_rows, self._num_batches = len(shuffled.sampler), len(shuffled)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                "data: the loader's data set has no length, so a minibatch cannot be scaled to it; expected a data set "
                "with __len__ (give an IterableDataset the number of its data as __len__)"
            ) from error
        if shuffled.drop_last:
            self.num_rows = max(1, self._num_batches) * (shuffled.batch_size or 1)

    def epoch(self, *, shuffle: bool) -> Iterator[Batch]:
        loader = self.shuffled if shuffle else self.ordered
        own = self.generators()
        states = [generator.get_state() for generator in own]
        try:
            for i, items in enumerate(loader):
                batch = as_batch(items)
                batch.check(f"data, batch {i}")
                yield batch
        finally:
            if not shuffle:  # to look at the data is not to move the loader's random state
                for generator, state in zip(own, states, strict=True):
                    generator.set_state(state)

    @property
    def num_batches(self) -> int:
        return self._num_batches

    def generators(self) -> list[torch.Generator]:
        loaders: tuple[Any, ...] = (self.shuffled, self.ordered)
        drawing = [(loader, loader.sampler, loader.batch_sampler) for loader in loaders]
        parts = (part for each in drawing for part in (*each, getattr(each[2], "sampler", None)))
        return list(dict.fromkeys(g for part in parts if (g := getattr(part, "generator", None)) is not None))


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers as they lie in memory, for sums over them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def slices(num_rows: int, at_once: int) -> list[slice]:
    """So many rows, some at a time."""
    return [slice(start, min(start + at_once, num_rows)) for start in range(0, num_rows, at_once)]


def as_batch(items: Any) -> Batch:
    """A tensor or array is one argument, a tuple or list several, a mapping the keyword arguments."""
    if isinstance(items, Mapping):
        return Batch((), {key: _as_tensor(part) for key, part in items.items()})
    if isinstance(items, tuple | list) and any(isinstance(part, Tensor | np.ndarray) for part in items):
        return Batch(tuple(map(_as_tensor, items)), {})
    return Batch((_as_tensor(items),), {})


def as_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments that a verb was called with, for model and guide. Raises ``ValueError`` as :meth:`Batch.check` does."""
    batch = Batch(as_batch(args).args if args else (), as_batch(kwargs).kwargs)
    batch.check("data")
    return batch


def as_batches(data: Any, batch_size: int | None) -> Batches:
    """The minibatches of ``data``.

    :param data: ``Tensor`` or ``ndarray`` ``(n, *event)``; a tuple of them, for ``model(x, c)``; a dict of them, for
        ``model(x=…, mask=…)``; our :class:`~pyro_vae.data.Data`; any torch ``Dataset``; or a ``DataLoader``.
    :param batch_size: rows in a minibatch, ``None`` for all of them at once; a ``DataLoader`` has its own.
    :raises ValueError: for empty data, non-finite rows, arguments of unequal length, and what is no data at all.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, or None for all data at once, but got {batch_size}")
    if isinstance(data, DataLoader):
        return Loaded(data, data)
    if isinstance(data, Data):
        whole = Batch(tuple(part for part in (data.x, data.condition) if part is not None), {})
        draw = (lambda rows: Batch(data.arguments(rows), {})) if data.binarize == "stochastic" else None
        return InMemory(whole, batch_size or len(data), draw)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        if not len(data):  # type: ignore[arg-type]
            raise ValueError("data: the data set is empty")
        size = batch_size or len(data)  # type: ignore[arg-type]
        ways = (DataLoader(data, size, shuffle=shuffle, collate_fn=_collate) for shuffle in (True, False))
        return Loaded(*ways)
    if isinstance(data, list):
        raise ValueError(
            f"data: expected a tensor or array (n, *event) but got a list of {len(data)}; stack its rows by torch.stack, or "
            "pass a tuple where its parts are the arguments of the model"
        )
    whole = as_batch(data)
    whole.check("data")
    return InMemory(whole, batch_size or whole.num_rows)


def fitting(model: Callable[..., Any], batch: Batch) -> Batch:
    """The batch cut to the positional arguments that the model takes: labels go where nothing asks for them."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return batch
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return batch
    room = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    return Batch(batch.args[:room], batch.kwargs)


def _as_tensor(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        if part.dtype.kind not in "fiub":
            raise ValueError(f"data: expected an array of numbers but got dtype {part.dtype}")
        # torch knows neither foreign byte orders nor unsigned numbers beyond bytes
        dtype = np.dtype(np.int64) if part.dtype.kind == "u" and part.dtype.itemsize > 1 else part.dtype.newbyteorder("=")
        if part.dtype.kind == "f" and part.dtype.itemsize > 8:
            dtype = np.dtype(np.float64)
        tensor = torch.from_numpy(np.array(part, dtype=dtype, order="C"))
        # numpy makes float64 of everything; the networks are of the default dtype
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    if isinstance(part, Tensor) or not isinstance(part, Sequence | str | type(None)):
        return part
    raise ValueError(f"data: expected tensors or arrays of shape (n, *event) but got {type(part).__name__}: {part!r:.80}")


def _collate(items: list[Any]) -> Any:
    try:
        return default_collate(items)
    except TypeError as error:
        raise ValueError(
            f"data: the items of the data set cannot be stacked into tensors ({str(error).splitlines()[0]}); for images "
            "give the data set transform=torchvision.transforms.ToTensor()"
        ) from error
