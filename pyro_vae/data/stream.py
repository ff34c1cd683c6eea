"""Minibatches of a Parquet or HDF5 file that is larger than memory, read by blocks of consecutive rows."""

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.batches import check_count, prefetched, slices
from pyro_vae.data.readers import check_start, damaged, import_library
from pyro_vae.processes import Group

_MAX_BLOCK_ROWS, _MIN_BLOCKS = 10_000, 64  # of HDF5 datasets with small chunks or none


class FileStream:
    """The rows of a Parquet or HDF5 file as minibatches ``(batch_size, *event)``, for :func:`~pyro_vae.fit`.

    Random access is slow in these files, so rows are read by blocks: row groups of a Parquet file, chunks of
    an HDF5 dataset (several together if they are small). An epoch takes the blocks in random order.
    ``num_blocks`` of them at a time are in memory, and their rows are permuted. A thread reads the next ones.
    If similar rows are next to each other in the file, such as those of one label, minibatches are less
    random: pass a larger ``num_blocks``, or permute the file once. ::

        stream = pv.data.FileStream("cells.parquet", batch_size=256)
        pv.fit(model, guide, stream)

    The order depends on ``seed`` and on the number of the epoch. With several processes each reads other
    blocks.

    :param columns: names of the columns of a Parquet file; default all.
    :param key: name of the dataset of an HDF5 file; default ``"x"``, or the only one.
    :param shuffle: ``False`` reads the rows in the order of the file, and all of them in each process.
        Functions that return results per datum, such as ``evaluate``, need this.
    :param dtype: of the rows.
    :raises ValueError: for a file that is damaged, has no rows, or has columns that are not numbers.
    :raises OSError: if there is no such file.
    :raises ModuleNotFoundError: if ``pyarrow`` or ``h5py`` is missing.
    """

    def __init__(
        self,
        path: str | PathLike,
        batch_size: int = 256,
        *,
        columns: list[str] | None = None,
        key: str | None = None,
        shuffle: bool = True,
        num_blocks: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path, self.shuffle, self.seed, self.dtype = Path(path), shuffle, seed, dtype
        self.batch_size = check_count("batch_size", batch_size)
        self.num_blocks = check_count("num_blocks", num_blocks)
        is_parquet = self.path.suffix.lower() in (".parquet", ".pq")
        self._blocks, self._read = (
            _parquet_blocks(self.path, columns) if is_parquet else _hdf5_blocks(self.path, key)
        )
        self.num_data = sum(stop - start for start, stop in self._blocks)
        if not self.num_data:
            raise ValueError(f"{self.path} has no rows; expected one or more")
        self._epoch = 0

    @property
    def in_data_order(self) -> bool:
        return not self.shuffle

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, on which the order depends. ``fit`` calls this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        order, group = torch.arange(len(self._blocks)), Group()
        generator = torch.Generator().manual_seed(hash((self.seed, self._epoch)) % 2**63)
        if self.shuffle:
            if len(order) < group.size:
                raise ValueError(
                    f"{self.path} has {len(order)} blocks of rows, too few for {group.size} processes; write "
                    "it with smaller row groups or chunks"
                )
            order = torch.randperm(len(order), generator=generator)[group.rank :: group.size]
        left = torch.empty(0)  # rows of the last blocks that do not fill a minibatch
        for rows in prefetched(self._read_blocks(order)):
            if self.shuffle:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            rows = torch.cat([left, rows]) if len(left) else rows
            num_full = len(rows) - len(rows) % self.batch_size
            for part in slices(num_full, self.batch_size):
                yield rows[part]
            left = rows[num_full:].clone()
        if len(left):
            yield left

    def _read_blocks(self, order: Tensor) -> Iterator[Tensor]:
        """The rows of ``num_blocks`` blocks at a time."""
        for some in order.split(self.num_blocks):
            parts = (self._read(i, *self._blocks[i]) for i in some.tolist())
            yield torch.from_numpy(np.concatenate(list(parts))).to(self.dtype)


Blocks = tuple[list[tuple[int, int]], Callable[[int, int, int], np.ndarray]]


def _parquet_blocks(path: Path, columns: list[str] | None) -> Blocks:
    """First and last row of each row group, and a function that reads one."""
    pyarrow = import_library("pyarrow", ".parquet")
    from pyarrow import parquet, types

    check_start(path, b"PAR1", ".parquet")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, ".parquet", error) from error
    schema = file.schema_arrow
    names = schema.names if columns is None else columns
    if not names:
        raise ValueError(f"{path}: expected one column or more, but got none")
    for name in names:
        if name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema.names[:8])}")
        if schema.names.count(name) > 1:
            raise ValueError(f"{path} has several columns with the name {name!r}; expected different names")
        kind = schema.field(name).type
        is_number = (types.is_integer, types.is_floating, types.is_boolean)
        if not any(check(kind) for check in is_number):
            raise ValueError(
                f"{path}: column {name!r} has type {kind}; expected numbers: pass columns=, the names of the "
                "columns to read"
            )
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def read(index: int, start: int, stop: int) -> np.ndarray:  # noqa: ARG001
        table = file.read_row_group(index, columns=names)
        rows = np.stack([table.column(name).to_numpy() for name in names], 1)
        return rows.astype(float) if rows.dtype == object else rows  # booleans, some of which are null

    return _ranges(sizes), read


def _hdf5_blocks(path: Path, key: str | None) -> Blocks:
    """First and last row of each chunk of a dataset, and a function that reads one."""
    h5py = import_library("h5py", "HDF5")
    check_start(path, b"\x89HDF\r\n\x1a\n", "HDF5")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise damaged(path, "HDF5", error) from error
    names = [name for name, part in file.items() if isinstance(part, h5py.Dataset)]
    name = key or ("x" if "x" in names else names[0] if len(names) == 1 else None)
    if name is None or not isinstance(file.get(name), h5py.Dataset):
        raise ValueError(
            f"{path} has the datasets {', '.join(names[:8]) or 'none'}; expected key=, the name of one"
            + ("" if key is None else f", but got {key!r}")
        )
    dataset: Any = file[name]
    if dataset.dtype.kind not in "fiub" or dataset.dtype.itemsize > 8 or not dataset.shape:
        raise ValueError(
            f"{path}: {name!r} has shape {dataset.shape} and type {dataset.dtype}; expected numbers (n, "
            "*event)"
        )
    num_rows, chunk = len(dataset), dataset.chunks[0] if dataset.chunks else 1
    # whole chunks, but small ones together
    size = max(chunk, min(_MAX_BLOCK_ROWS, num_rows // _MIN_BLOCKS) // chunk * chunk)

    def read(index: int, start: int, stop: int) -> np.ndarray:  # noqa: ARG001
        return dataset[start:stop]

    return [(s.start, s.stop) for s in slices(num_rows, size)], read


def _ranges(sizes: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
