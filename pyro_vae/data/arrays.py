"""Conversion of users' data to tensors: numpy arrays, data frames, sparse matrices, other array types."""

import math
import mmap
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

_BLOCK_ELEMENTS = 2**22  # elements that a check reads at a time
_COMPLEX_REMEDY = "pass x.real, or the real and imaginary parts as two columns"


class SparseRows:
    """A sparse array in CSR format. ``rows[index]`` is a dense tensor ``(k, *event)``.

    Row i has the entries ``start[i]:start[i + 1]`` of ``column`` and ``values``. The sparse dimensions of an
    event are flattened to ``inner`` columns.
    """

    def __init__(
        self, start: Tensor, column: Tensor, values: Tensor, event_shape: tuple[int, ...], inner: int
    ) -> None:
        self.start, self.column, self.values = start, column, values
        self.event_shape, self.inner = event_shape, inner

    @classmethod
    def of(cls, sparse: Tensor) -> "SparseRows":
        coo = sparse.detach().to_sparse().coalesce()
        (row, *others), values = coo.indices(), coo.values()
        column = torch.zeros_like(row)
        for index, size in zip(others, coo.shape[1:], strict=False):
            column = column * size + index
        counts = torch.bincount(row, minlength=len(coo))
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(start, column, values, tuple(coo.shape[1:]), math.prod(coo.shape[1 : coo.sparse_dim()]))

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        rows = rows.to(self.start.device)
        first, counts = self.start[rows], self.start[rows + 1] - self.start[rows]
        output_row = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        entry = (
            torch.arange(len(output_row), device=rows.device)
            + (first - counts.cumsum(0) + counts)[output_row]
        )
        dense = self.values.new_zeros(len(rows), self.inner, *self.values.shape[1:])
        dense[output_row, self.column[entry]] = self.values[entry]
        return dense.reshape(len(rows), *self.event_shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.event_shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


pytree.register_pytree_node(
    SparseRows,
    lambda rows: ([rows.start, rows.column, rows.values], (rows.event_shape, rows.inner)),
    lambda children, context: SparseRows(*children, *context),
)


class DiskRows:
    """A memory-mapped array. ``rows[index]`` is a tensor ``(k, *event)`` in memory: these rows, read from
    disk and converted to a dtype of torch.

    :param dtype: numpy's name of that dtype.
    """

    def __init__(self, array: np.ndarray, dtype: np.dtype, name: str = "data") -> None:
        self.array, self._dtype, self._name = array.view(np.ndarray), dtype, name
        self.shape, self.dtype = torch.Size(array.shape), torch.from_numpy(np.empty(0, dtype)).dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        is_view = isinstance(rows, slice)
        part = self.array[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        _check_uint64(part, self._name)
        return torch.from_numpy(part.astype(self._dtype, order="C", copy=is_view))

    def whole(self) -> Tensor:
        """All rows as a tensor, which shares the memory of the array if torch supports its dtype and
        strides, and which must not be written to."""
        strides = self.array.strides
        if self.array.dtype != self._dtype or any(s < 0 or s % self._dtype.itemsize for s in strides):
            return self[:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about read-only memory
            return torch.from_numpy(self.array)


Rows = SparseRows | DiskRows  # indexed like tensors, by row


def as_tensor(part: Any, name: str = "data", *, in_place: bool = False) -> Any:
    """Convert an array to a tensor, or to :class:`SparseRows` if it is sparse. Objects that are not arrays
    are returned unchanged.

    Arrays are numpy arrays, pandas and polars frames and series with numeric columns, scipy and torch sparse
    matrices, and objects with ``__array__`` or ``__dlpack__``. Packed sequences and lists of tensors are not.

    :param in_place: do not copy a memory-mapped array, but return :class:`DiskRows`.
    :raises ValueError: for masked entries, arrays of objects or text, lazy frames, nested tensors, lists of
        numbers.
    """
    if isinstance(part, Tensor):
        if part.is_nested:
            raise ValueError(
                f"{name}: expected a tensor (n, *event) but got a nested tensor; pad it: "
                "x.to_padded_tensor(0.0)"
            )
        return part if part.layout is torch.strided else SparseRows.of(part)
    if isinstance(part, np.generic):
        return part.item()
    if isinstance(part, np.ndarray):
        return _from_numpy(part, name, in_place)
    if hasattr(part, "to_numpy") and (hasattr(part, "columns") or hasattr(part, "name")):
        return _from_numpy(_frame(part, name), name)
    if hasattr(part, "tocoo"):
        return SparseRows.of(_from_scipy(part, name))
    if hasattr(part, "collect") and hasattr(part, "lazy"):
        raise ValueError(
            f"{name}: expected an array but got a {type(part).__name__}, which is lazy; call .collect()"
        )
    if hasattr(part, "__array__"):
        return _from_numpy(np.asarray(part), name, in_place)
    if hasattr(part, "__dlpack__"):
        return torch.from_dlpack(part)
    if (
        isinstance(part, list | tuple)
        and not isinstance(part, PackedSequence)
        and not _contains_tensors(part)
        and _is_numeric(part)
    ):
        raise ValueError(
            f"{name}: expected a tensor or array (n, *event) but got a {type(part).__name__} of {len(part)}; "
            "convert it with torch.tensor, or stack its rows with torch.stack"
        )
    return part


def is_nested(part: Any) -> bool:
    """Whether ``part`` is a container of tensors that cannot be indexed by row, such as a packed sequence or
    a list."""
    return isinstance(part, PackedSequence) or (
        isinstance(part, list | tuple | dict) and _contains_tensors(part)
    )


def _contains_tensors(part: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part))


def _is_numeric(part: list | tuple) -> bool:
    return not part or isinstance(part[0], bool | int | float | list | tuple | np.ndarray | np.generic)


def _from_numpy(array: np.ndarray, name: str, in_place: bool = False) -> Any:
    if np.ma.is_masked(array):
        raise ValueError(
            f"{name}: the array has {int(np.ma.getmaskarray(array).sum())} masked entries, and tensors have "
            'no mask; pass {"x": x.filled(0), "mask": ~np.ma.getmaskarray(x)} to a model with an argument '
            "mask, or drop these rows"
        )
    if array.dtype.kind == "O":
        raise ValueError(
            f"{name}: expected an array of numbers but got an array of Python objects "
            f"({_type_names(array)}); convert it with x.astype(float), and pad rows of unequal length"
        )
    if array.dtype.kind == "c":
        raise ValueError(f"{name}: expected real numbers but got {array.dtype}; {_COMPLEX_REMEDY}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected an array of numbers but got dtype {array.dtype}")
    # torch does not support foreign byte orders, and supports uint16, uint32 and uint64 only in part
    dtype = (
        np.dtype(np.int64)
        if array.dtype.kind == "u" and array.dtype.itemsize > 1
        else array.dtype.newbyteorder("=")
    )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    if in_place and array.ndim and _is_mapped(array):
        return DiskRows(array, dtype, name)
    _check_uint64(array, name)
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _is_mapped(array: np.ndarray) -> bool:
    """Whether the memory of an array is that of a mapped file. The results of arithmetic with a
    ``np.memmap`` are not."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def _check_uint64(array: np.ndarray, name: str) -> None:
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {array.max()} exceeds the range of int64; pass x.astype(float)")


def _type_names(array: np.ndarray) -> str:
    return ", ".join(sorted({type(item).__name__ for item in array.flat[:100]})) or "none"


def _from_scipy(matrix: Any, name: str) -> Tensor:
    coo = matrix.tocoo()
    values = _from_numpy(np.asarray(coo.data), name)
    indices = np.stack(
        [np.asarray(index, np.int64) for index in getattr(coo, "coords", None) or (coo.row, coo.col)]
    )
    if values.dtype == torch.bool:  # coalesce does not support bool
        return (
            torch.sparse_coo_tensor(
                torch.from_numpy(indices), values.to(torch.uint8), coo.shape, check_invariants=True
            )
            .coalesce()
            .bool()
        )
    return torch.sparse_coo_tensor(torch.from_numpy(indices), values, coo.shape, check_invariants=True)


def _frame(frame: Any, name: str) -> np.ndarray:
    """A data frame as an array ``(n, columns)``, a series as ``(n,)``."""
    if not hasattr(frame, "columns"):
        return _column(frame, name, frame.name)
    columns = (
        frame.get_columns() if hasattr(frame, "get_columns") else [column for _, column in frame.items()]
    )
    if not columns:
        raise ValueError(f"{name}: the data frame has no columns")
    arrays = [_column(column, name, column.name) for column in columns]
    dtype = np.result_type(*arrays)
    return np.stack([array.astype(dtype, copy=False) for array in arrays], 1)


def _column(column: Any, name: str, label: Any) -> np.ndarray:
    array = column.to_numpy()
    if array.dtype.kind == "O" and getattr(column.dtype, "kind", "O") in "fiub":  # a nullable dtype of pandas
        array = column.to_numpy(dtype=float, na_value=np.nan)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name}: column {label!r} is not numeric: it has dtype {column.dtype}; drop it, or encode it as "
            "numbers (one-hot)"
        )
    return array


def check_shape(x: Tensor | Rows, name: str) -> None:
    """Raise ``ValueError`` if ``x`` is empty or complex."""
    if not x.shape or not x.shape.numel():
        raise ValueError(
            f"{name}: there are no data: the shape is {tuple(x.shape)}; expected (n, *event) with n ≥ 1"
        )
    if x.dtype.is_complex:
        raise ValueError(f"{name}: expected real numbers but got {x.dtype}; {_COMPLEX_REMEDY}")


def check_rows(x: Tensor | SparseRows, name: str, rows: Tensor | None = None, num_rows: int = 0) -> None:
    """Raise ``ValueError`` if ``x`` is empty, complex or has a non-finite entry. The error names the row.

    :param rows: if ``x`` is a part of the data, the numbers of its rows among all ``num_rows`` rows.
    """
    check_shape(x, name)
    if x.dtype.is_floating_point:
        bad = not_finite(x)
        if len(bad):
            row, n = (int(bad[0]), len(x)) if rows is None else (int(rows[bad[0]]), num_rows)
            raise ValueError(
                f"{name}: row {row} of {n} has NaN or infinite entries ({len(bad)} such rows"
                f"{'' if rows is None else ' in this minibatch'}); drop these rows, or give the model a "
                'keyword argument mask and pass {"x": x, "mask": torch.isfinite(x)}'
            )


def not_finite(x: Tensor | SparseRows) -> Tensor:
    """Indices of the rows that have a non-finite entry, ``(k,)``."""
    if isinstance(x, SparseRows):
        bad = (~torch.isfinite(x.values)).unsqueeze(-1).flatten(1).any(1).nonzero().flatten()
        return torch.unique(torch.searchsorted(x.start, bad, right=True) - 1)
    blocks = (
        (start, (~torch.isfinite(block)).reshape(len(block), -1).any(1))
        for start, block in row_blocks(x)
        if not block.detach().sum().isfinite()  # else all entries are finite
    )
    return torch.cat(
        [torch.empty(0, dtype=torch.int64), *(bad.nonzero().flatten().cpu() + start for start, bad in blocks)]
    )


def row_blocks(x: Tensor | SparseRows) -> Iterator[tuple[int, Tensor]]:
    """Consecutive blocks of rows of ``x``, each with the index of its first row."""
    num_rows = rows_per_block(x)
    return ((start, x[start : start + num_rows]) for start in range(0, len(x), num_rows))


def rows_per_block(x: Tensor | Rows) -> int:
    """The number of rows that a check reads at a time."""
    return max(1, _BLOCK_ELEMENTS * len(x) // max(1, x.shape.numel()))


class Ranges:
    """The range of each column of the data: its minimum and maximum over the rows. A column is one element of
    the event."""

    def __init__(self) -> None:
        self._bounds: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, name: str, x: Tensor | SparseRows) -> None:
        """Extend the ranges of the argument ``name`` by the rows of ``x``."""
        for _, block in row_blocks(x):
            block = block.detach()
            if not block.is_floating_point():
                block = block.to(torch.int64)  # amin does not support uint32
            low, high = block.amin(0), block.amax(0)
            if name in self._bounds and self._bounds[name][0].shape == low.shape:
                low, high = (
                    torch.minimum(low, self._bounds[name][0]),
                    torch.maximum(high, self._bounds[name][1]),
                )
            self._bounds[name] = low, high

    def check(self, dtype: torch.dtype, name: str = "data") -> None:
        """Raise ``ValueError`` if rows that differ become equal, or nearly equal, when cast to ``dtype``.

        This is tested for each column. No entry of a column may overflow. Unless the column is constant, its
        range max − min may not be less than the smallest normal number of ``dtype``, nor less than √ε times
        its largest magnitude, since all rows would then agree in half of their digits.
        """
        info = torch.finfo(dtype)
        for argument, (low, high) in self._bounds.items():
            magnitude, spread = torch.maximum(low.abs(), high.abs()).double(), high.double() - low.double()
            eps = torch.finfo(low.dtype).eps if low.dtype.is_floating_point else 0.0
            constant = spread <= 1000 * eps * magnitude  # except for rounding errors in the dtype of the data
            for bad, cause, remedy in (
                (magnitude > info.max, f"the largest number is {info.max:.3g}", "rescale it"),
                (
                    ~constant & (spread < info.eps**0.5 * magnitude),
                    "its rows are equal or differ only by a few rounding errors",
                    "subtract its mean",
                ),
                (
                    ~constant & (spread < info.tiny),
                    "its rows underflow to the same number",
                    "rescale it",
                ),
            ):
                if bad.any():
                    index = tuple(bad.nonzero()[0].tolist())
                    column = f"column {', '.join(map(str, index))} of {argument}" if index else argument
                    raise ValueError(
                        f"{name}: {column} lies in [{float(low[index]):.12g}, {float(high[index]):.12g}]; "
                        f"in {dtype}, the dtype of the pair's parameters, {cause}; {remedy}, or make the "
                        "pair double: module.double()"
                    )


def loses_precision(x: Any, dtype: torch.dtype | None) -> bool:
    """Whether ``dtype`` has fewer digits or a smaller range than the dtype of ``x``."""
    if dtype is None or not isinstance(x, Tensor | Rows) or x.dtype.is_complex or x.dtype is torch.bool:
        return False
    if not x.dtype.is_floating_point:
        return torch.iinfo(x.dtype).max > 1 / torch.finfo(dtype).eps
    source, target = torch.finfo(x.dtype), torch.finfo(dtype)
    return target.eps > source.eps or target.max < source.max
