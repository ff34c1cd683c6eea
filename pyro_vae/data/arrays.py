"""Tensors from the containers that users have: numpy arrays, data frames, sparse matrices, other array types."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

_CHUNK = 2**24  # numbers that a check looks at together


class SparseRows:
    """A sparse array whose rows are made dense when they are taken: ``rows[index]`` is a dense tensor ``(k, *event)``."""

    def __init__(self, start: Tensor, column: Tensor, values: Tensor, event_shape: tuple[int, ...], inner: int) -> None:
        self.start, self.column, self.values = start, column, values  # row i has the entries start[i] … start[i + 1]
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
        new = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        entry = torch.arange(len(new), device=rows.device) + (first - counts.cumsum(0) + counts)[new]
        dense = self.values.new_zeros(len(rows), self.inner, *self.values.shape[1:])
        dense[new, self.column[entry]] = self.values[entry]
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


def as_tensor(part: Any, name: str = "data", *, share: bool = False) -> Any:
    """``part`` as a tensor where it is an array of any kind, or as :class:`SparseRows`; anything else as it is.

    Taken are numpy arrays, pandas and polars frames and series of numeric columns, scipy and torch sparse matrices, and what
    has ``__array__`` or ``__dlpack__``. Packed sequences and lists of tensors stay as they are.

    :param share: use the memory of a memory-mapped array, which is then read as rows are taken; others are copied.
    :raises ValueError: for arrays with masked entries, of objects or text, and for lists of numbers.
    """
    if isinstance(part, Tensor):
        if part.is_nested:
            raise ValueError(f"{name}: expected a tensor (n, *event) but got a nested one; pad it: x.to_padded_tensor(0.0)")
        return part if part.layout is torch.strided else SparseRows.of(part)
    if isinstance(part, np.generic):
        return part.item()
    if isinstance(part, np.ndarray):
        return _from_numpy(part, name, share)
    if hasattr(part, "to_numpy") and (hasattr(part, "columns") or hasattr(part, "name")):
        return _from_numpy(_frame(part, name), name, share)
    if hasattr(part, "tocoo"):
        return SparseRows.of(_from_scipy(part, name))
    if hasattr(part, "collect") and hasattr(part, "lazy"):
        raise ValueError(
            f"{name}: expected numbers but got a {type(part).__name__}, which is not computed yet; call .collect()"
        )
    if hasattr(part, "__array__"):
        return _from_numpy(np.asarray(part), name, share)
    if hasattr(part, "__dlpack__"):
        return torch.from_dlpack(part)
    if (
        isinstance(part, list | tuple)
        and not isinstance(part, PackedSequence)
        and not _holds_tensors(part)
        and _is_numeric(part)
    ):
        raise ValueError(
            f"{name}: expected a tensor or array (n, *event) but got a {type(part).__name__} of {len(part)}; make it one by "
            "torch.tensor, or stack its rows by torch.stack"
        )
    return part


def is_nested(part: Any) -> bool:
    """Whether ``part`` holds tensors, but not as rows that can be taken by index: a packed sequence, a list of tensors."""
    return isinstance(part, PackedSequence) or (isinstance(part, list | tuple | dict) and _holds_tensors(part))


def _holds_tensors(part: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part))


def _is_numeric(part: list | tuple) -> bool:
    return not part or isinstance(part[0], bool | int | float | list | tuple | np.ndarray | np.generic)


def _from_numpy(array: np.ndarray, name: str, share: bool = False) -> Tensor:
    if np.ma.is_masked(array):
        raise ValueError(
            f"{name}: the array has {int(np.ma.getmaskarray(array).sum())} masked entries, and a tensor has no mask; pass "
            '{"x": x.filled(0), "mask": ~np.ma.getmaskarray(x)} to a model with an argument mask, or drop those rows'
        )
    if array.dtype.kind == "O":
        raise ValueError(
            f"{name}: expected an array of numbers but got one of Python objects ({_kinds(array)}); convert it by "
            "x.astype(float), and pad rows of different length"
        )
    if array.dtype.kind == "c":
        raise ValueError(f"{name}: expected real numbers but got {array.dtype}; pass x.real, or both parts as two columns")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected an array of numbers but got dtype {array.dtype}")
    # torch knows neither foreign byte orders nor, everywhere, unsigned numbers beyond bytes
    dtype = np.dtype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array.dtype.newbyteorder("=")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {array.max()} is beyond int64, torch's largest whole numbers; pass x.astype(float)")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    if share and isinstance(array, np.memmap) and dtype == array.dtype and min(array.strides, default=0) >= 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may be read-only; rows are copied before a model sees them
            tensor = torch.from_numpy(array)
    else:
        tensor = torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    return tensor


def _kinds(array: np.ndarray) -> str:
    return ", ".join(sorted({type(item).__name__ for item in array.flat[:100]})) or "none"


def _from_scipy(matrix: Any, name: str) -> Tensor:
    coo = matrix.tocoo()
    values = _from_numpy(np.asarray(coo.data), name)
    indices = np.stack([np.asarray(index, np.int64) for index in getattr(coo, "coords", None) or (coo.row, coo.col)])
    if values.dtype == torch.bool:  # torch cannot add two of them
        return torch.sparse_coo_tensor(torch.from_numpy(indices), values.to(torch.uint8), coo.shape).coalesce().bool()
    return torch.sparse_coo_tensor(torch.from_numpy(indices), values, coo.shape)


def _frame(frame: Any, name: str) -> np.ndarray:
    """A data frame as an array ``(n, columns)``, a series as ``(n,)``."""
    if not hasattr(frame, "columns"):
        return _column(frame, name, frame.name)
    columns = frame.get_columns() if hasattr(frame, "get_columns") else [column for _, column in frame.items()]
    if not columns:
        raise ValueError(f"{name}: the data frame has no columns")
    arrays = [_column(column, name, column.name) for column in columns]
    dtype = np.result_type(*arrays)
    return np.stack([array.astype(dtype, copy=False) for array in arrays], 1)


def _column(column: Any, name: str, label: Any) -> np.ndarray:
    array = column.to_numpy()
    if array.dtype.kind == "O" and getattr(column.dtype, "kind", "O") in "fiub":  # pandas' numbers with missing ones
        array = column.to_numpy(dtype=float, na_value=np.nan)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{name}: column {label!r} is not numeric, it has dtype {column.dtype}; drop it, or encode it as numbers (one-hot)"
        )
    return array


def check_rows(x: Tensor | SparseRows, name: str) -> None:
    """Raise ``ValueError`` where ``x`` is empty, complex, or has a non-finite entry, naming its row."""
    if not x.shape or not x.shape.numel():
        raise ValueError(f"{name}: there are no data, the shape is {tuple(x.shape)}; expected (n, *event) with n ≥ 1")
    if x.dtype.is_complex:
        raise ValueError(f"{name}: expected real numbers but got {x.dtype}; pass x.real, or both parts as two columns")
    if x.dtype.is_floating_point:
        bad = not_finite(x)
        if len(bad):
            raise ValueError(
                f"{name}: row {int(bad[0])} of {len(x)} has NaN or infinite entries ({len(bad)} such rows); drop them, or mark "
                'missing entries by a keyword argument mask of the model: {"x": x, "mask": torch.isfinite(x)}'
            )


def not_finite(x: Tensor | SparseRows) -> Tensor:
    """The rows that have an entry that is not finite."""
    if isinstance(x, SparseRows):
        bad = (~torch.isfinite(x.values)).unsqueeze(-1).flatten(1).any(1).nonzero().flatten()
        return torch.unique(torch.searchsorted(x.start, bad, right=True) - 1)
    found = [(~torch.isfinite(part)).reshape(len(part), -1).any(1).nonzero().flatten() + at for at, part in pieces(x)]
    return torch.cat(found)


def pieces(x: Tensor | SparseRows) -> Iterator[tuple[int, Tensor]]:
    """Rows of ``x`` some at a time, with the index of the first."""
    at_once = max(1, _CHUNK * len(x) // max(1, x.shape.numel()))
    return ((at, x[at : at + at_once]) for at in range(0, len(x), at_once))


class Ranges:
    """The smallest and largest value of every column of the data, entry by entry of an event."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, name: str, x: Tensor | SparseRows) -> None:
        for _, part in pieces(x):
            part = part.detach() if part.is_floating_point() else part.detach().to(torch.int64)  # uint32 has no minimum
            low, high = part.amin(0), part.amax(0)
            if name in self.of and self.of[name][0].shape == low.shape:
                low, high = torch.minimum(low, self.of[name][0]), torch.maximum(high, self.of[name][1])
            self.of[name] = low, high

    def check(self, dtype: torch.dtype, of: str = "data") -> None:
        """Raise ``ValueError`` where rounding to ``dtype`` loses what distinguishes rows: a column that overflows, or whose
        spread max − min is less than √ε of its largest magnitude, so that half of the digits say the same for all rows (for
        single precision 2900 roundings), or less than the smallest normal number."""
        info = torch.finfo(dtype)
        for name, (low, high) in self.of.items():
            size, spread = torch.maximum(low.abs(), high.abs()).double(), high.double() - low.double()
            eps = torch.finfo(low.dtype).eps if low.dtype.is_floating_point else 0.0
            constant = spread <= 1000 * eps * size  # up to the rounding of the data's dtype
            for bad, cause, remedy in (
                (size > info.max, f"beyond its largest number {info.max:.3g}", "rescale it"),
                (
                    ~constant & (spread < info.eps**0.5 * size),
                    "where its rows differ by few roundings or none",
                    "subtract its mean",
                ),
                (~constant & (spread < info.tiny), "where its rows underflow to the same number", "rescale it"),
            ):
                if bad.any():
                    index = tuple(bad.nonzero()[0].tolist())
                    column = f"column {', '.join(map(str, index))} of {name}" if index else name
                    raise ValueError(
                        f"{of}: {column} lies in [{float(low[index]):.12g}, {float(high[index]):.12g}]; the pair's parameters "
                        f"are {dtype}, {cause}; {remedy}, or make the pair double: module.double()"
                    )


def loses_precision(x: Any, dtype: torch.dtype | None) -> bool:
    """Whether ``dtype`` has fewer digits than ``x``, or a smaller range."""
    if dtype is None or not isinstance(x, Tensor | SparseRows) or x.dtype.is_complex or x.dtype is torch.bool:
        return False
    if not x.dtype.is_floating_point:
        return torch.iinfo(x.dtype).max > 1 / torch.finfo(dtype).eps
    have, get = torch.finfo(x.dtype), torch.finfo(dtype)
    return get.eps > have.eps or get.max < have.max
