"""Read users' files: arrays, tables, count matrices and folders of images.

:func:`read` chooses the reader by the suffix of the path. Each reader is one function, which returns the
arrays of a file as they are stored. :class:`Table` says what was read. No reader runs code from a file:
formats that contain pickled objects are refused.
"""

import csv
import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.arrays import DiskRows, SparseRows, as_tensor, row_blocks

Kind = Literal["binary", "counts", "grey", "real"]

KINDS: dict[Kind, str] = {
    "binary": "0 or 1",
    "counts": "whole numbers ≥ 0",
    "grey": "in [0, 1]",
    "real": "real numbers",
}
_MAX_EXPANSION = 2**30, 200  # an archive may expand to more bytes than this only if by a smaller factor
_CSV_BLOCK = 2**24  # bytes; a line of a CSV file must fit in one block
_CONVERT = 'numpy.save("x.npy", x.numpy()) or safetensors.torch.save_file({"x": x}, "x.safetensors")'


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """The contents of a file: n rows of data, and what they are.

    x: ``(n, *event)``, with 0 in place of missing entries. The tensor of a ``.npy`` file shares the memory of
    the mapped file: its rows are read from disk when they are accessed.
    mask: bool, the shape of x, false at missing entries (NaN, or empty in a table); ``None`` if there are
    none.
    labels, condition: ``(n,)``, numbers or text, as stored.
    columns: the names of the columns of x, if the file has names.
    kind: what the entries are: ``"binary"``, ``"counts"``, ``"grey"`` (in [0, 1]) or ``"real"``.
    low, high: the range of the entries that are not missing.
    num_levels: 256 for images of bytes, which are divided by 255.
    left_out: columns or files that are not in x, each with the reason.
    sha256: SHA-256 of the file; for a folder, of the names and contents of its images.
    """

    path: str
    format: str
    x: Tensor
    mask: Tensor | None
    labels: np.ndarray | None
    condition: np.ndarray | None
    columns: tuple[str, ...]
    kind: Kind
    low: float
    high: float
    dtype: str
    num_levels: int | None
    left_out: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.x)

    @property
    def num_missing(self) -> int:
        """The number of missing entries."""
        return 0 if self.mask is None else int((~self.mask).sum())

    def record(self) -> dict[str, Any]:
        """What was read, as JSON types, without the data. At most 20 columns are listed."""
        return {
            "format": self.format,
            "shape": list(self.x.shape),
            "dtype": self.dtype,
            "range": [self.low, self.high],
            "missing": self.num_missing,
            "kind": self.kind,
            "columns": list(self.columns[:20]),
            "left_out": list(self.left_out[:20]),
        }

    def summary(self) -> str:
        """What was read, as text: shape, dtype, range, missing entries, columns, values of
        labels and condition."""
        lines = [
            f"{self.path}: {self.format}, {tuple(self.x.shape)} {self.dtype} in [{self.low:g}, "
            f"{self.high:g}], {self.kind} ({KINDS[self.kind]})"
        ]
        if self.num_missing:
            share = self.num_missing / self.x.numel()
            lines.append(f"missing: {self.num_missing} entries ({share:.1%}), masked")
        if self.columns:
            lines.append(f"columns: {_listed(self.columns)}")
        for name, values in (("labels", self.labels), ("condition", self.condition)):
            if values is not None:
                lines.append(f"{name}: {_counted(values)}")
        if self.left_out:
            lines.append(f"left out: {_listed(self.left_out)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Table({self.path!r}, x: {tuple(self.x.shape)}, {self.kind})"


class _Content(NamedTuple):
    """What a reader returns. ``num_levels`` is set for integer grey levels."""

    x: Any
    columns: tuple[str, ...] = ()
    labels: Any = None
    condition: Any = None
    num_levels: int | None = None
    left_out: tuple[str, ...] = ()


def read(
    path: str | os.PathLike,
    *,
    label: str | None = None,
    condition: str | None = None,
    key: str | None = None,
    image_size: int | None = None,
    sha256: str | None = None,
) -> Table:
    """Read the data in a file, or a folder of images.

    - ``.npy``: an array ``(n, *event)``, mapped into memory. Bytes ``(n, height, width)`` or
      ``(n, channels, height, width)`` are images: they are divided by 255.
    - ``.npz``, ``.safetensors``: named arrays; x is the array ``key``.
    - ``.csv``, ``.tsv``, ``.parquet``: the numeric columns of a table. Columns of text are left out. Empty
      entries are missing.
    - ``.h5ad``: X of an AnnData, or its layer ``key``. Label and condition are columns of obs.
    - a folder: images, ``(n, height, width)`` if all are grey, else ``(n, 3, height, width)``. If all are in
      subfolders, the subfolders are the labels.

    :param label: the name of a column or array with one label for each row.
    :param condition: the name of a column or array with one condition for each row.
    :param key: the name of the array or layer with the data.
    :param image_size: scale and crop images to squares of this size. Without it, all must have one size.
    :param sha256: the expected SHA-256, ``Table.sha256`` of an earlier call.
    :raises ValueError: if the file is malformed or was changed, contains pickled objects, or has infinite
        entries or columns without entries. The error names the remedy.
    :raises FileNotFoundError: if there is no file at ``path``.
    :raises ModuleNotFoundError: if the library for the format is missing. The error names it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {_EXPECTED}")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a device or a pipe; expected {_EXPECTED}")
    name, reader, options = _reader(path)
    given = {"label": label, "condition": condition, "key": key, "image_size": image_size}
    for option, value in given.items():
        if value is not None and option not in options:
            raise ValueError(
                f'{path}: {name} has no {option}, but got {option}="{value}"; leave it out, or store the '
                f"data in {_REMEDY_OF[option]}"
            )
    found = digest(path)
    if sha256 not in (None, found):
        raise ValueError(
            f"{path} was changed: its SHA-256 is {found[:16]}…, expected {str(sha256)[:16]}…; restore the "
            "file, or train again with the new one"
        )
    content = reader(path, **{option: given[option] for option in options})
    return _table(path, name, content, found)


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file; of a folder, SHA-256 of the names and contents of its images."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for image in _image_files(path)[0]:
        total.update(f"{image.relative_to(path).as_posix()}\0{digest(image)}\n".encode())
    return total.hexdigest()


def _table(path: Path, name: str, content: _Content, sha256: str) -> Table:
    """Validate what a reader returned, and find out what it is."""
    x = as_tensor(content.x, str(path), in_place=True)
    if isinstance(x, DiskRows | SparseRows):
        x = x.whole() if isinstance(x, DiskRows) else x[:]
    stored = str(x.dtype).removeprefix("torch.")
    if x.dim() == 0 or not len(x) or not x.numel():
        raise ValueError(
            f"{path} has no data: the shape is {tuple(x.shape)}; expected (n, *event) with n ≥ 1"
        )
    if x.dim() == 1:
        x = x.unsqueeze(1)
    if x.dtype == torch.bool:
        x = x.to(torch.uint8)
    parts: dict[str, np.ndarray | None] = {}
    for key in ("labels", "condition"):
        part = getattr(content, key)
        if part is not None:
            part = _per_row(part, len(x), f"{path}, {key}", may_be_missing=key == "labels")
        parts[key] = part
    x, mask = _without_missing(x, path, content.columns)
    num_levels = content.num_levels
    if num_levels is None and x.dtype == torch.uint8 and x.dim() in (3, 4) and stored == "uint8":
        num_levels = 256
    if num_levels is not None:
        x = x.to(torch.get_default_dtype()) / (num_levels - 1)
    low, high, kind = _describe(x, mask)
    if kind == "real" and not x.is_floating_point():
        x = x.to(torch.float64 if max(abs(low), abs(high)) > 2**24 else torch.get_default_dtype())
    return Table(
        path=str(path), format=name, x=x, mask=mask, columns=content.columns, kind=kind, low=low, high=high,
        dtype=stored, num_levels=num_levels, left_out=content.left_out, sha256=sha256, **parts,
    )  # fmt: skip


def _without_missing(x: Tensor, path: Path, columns: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """x with 0 in place of NaN, and the mask that is false there. A mapped file is not copied if it has no
    NaN."""
    if not x.is_floating_point():
        return x, None
    has_missing = False
    for start, block in row_blocks(x):
        if block.isinf().any():
            row, *at = block.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"{path}: row {start + row} of {len(x)} has an infinite entry in {_column(at, columns)}; "
                "replace it by a finite number, or remove it if it is missing"
            )
        has_missing = has_missing or bool(block.isnan().any())
    if not has_missing:
        return x, None
    mask = ~x.isnan()
    empty = (~mask.any(0)).nonzero()
    if len(empty):
        raise ValueError(
            f"{path}: {_column(empty[0].tolist(), columns)} has no entries: all {len(x)} are missing; "
            "remove it"
        )
    return x.masked_fill(~mask, 0.0), mask


def _column(index: list[int], columns: tuple[str, ...]) -> str:
    return f"column {columns[index[0]]!r}" if columns else f"element {tuple(index)}"


def _describe(x: Tensor, mask: Tensor | None) -> tuple[float, float, Kind]:
    """The range of the entries that are not missing, and what they are."""
    low, high, whole = math.inf, -math.inf, True
    for start, block in row_blocks(x):
        if mask is not None:
            block = block[mask[start : start + len(block)]]
        if not block.numel():
            continue
        low, high = min(low, block.min().item()), max(high, block.max().item())
        whole = whole and (not block.is_floating_point() or bool((block == block.round()).all()))
    kind: Kind = "real"
    if low >= 0 and whole:
        kind = "binary" if high <= 1 else "counts"
    elif low >= 0 and high <= 1:
        kind = "grey"
    return float(low), float(high), kind


def _per_row(part: Any, num_rows: int, name: str, *, may_be_missing: bool) -> np.ndarray:
    """Labels or conditions as an array ``(n,)`` of numbers or text. Missing ones are NaN or ``"missing"``."""
    array = np.asarray(part)
    if array.shape == (num_rows, 1):
        array = array[:, 0]
    if array.shape != (num_rows,):
        raise ValueError(
            f"{name}: expected one entry for each of {num_rows} rows but got shape {array.shape}"
        )
    if array.dtype.kind == "O":
        missing = [i for i, item in enumerate(array) if item is None or item != item]
        if missing and not may_be_missing:
            raise ValueError(
                f"{name}: row {missing[0]} has no entry ({len(missing)} such rows); fill these in, or remove "
                "the rows"
            )
        array = array.copy()
        array[missing] = "missing"
        array = array.astype(str)
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected text in UTF-8 ({error})") from error
    if array.dtype.kind not in "biufU":
        raise ValueError(f"{name}: expected numbers or text but got dtype {array.dtype}")
    if array.dtype.kind == "f" and not may_be_missing and not np.isfinite(array).all():
        row = int((~np.isfinite(array)).argmax())
        raise ValueError(f"{name}: row {row} has no finite entry; fill it in, or remove the row")
    return array


# the readers: one function for each format


def _read_npy(path: Path) -> _Content:
    check_start(path, b"\x93NUMPY", ".npy")
    return _Content(_checked_objects(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False)))


def _read_npz(path: Path, *, key: str | None, label: str | None, condition: str | None) -> _Content:
    check_start(path, b"PK", ".npz")
    try:
        with ZipFile(path) as archive:
            for member in archive.infolist():
                limit, factor = _MAX_EXPANSION
                if member.file_size > max(limit, factor * member.compress_size):
                    raise ValueError(
                        f"{path}: its array {member.filename!r} expands from {member.compress_size} to "
                        f"{member.file_size} bytes, which is refused; save it with numpy.save"
                    )
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (BadZipFile, OSError, NotImplementedError) as error:
        raise damaged(path, ".npz", error) from error
    if not names:
        raise ValueError(
            f"{path} is a zip archive without arrays (.npy); expected one that numpy.savez wrote"
        )

    def array(name: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as archive:
            return _checked_objects(path, lambda: archive[name])

    return _from_named(path, dict.fromkeys(names, array), key, label, condition)


def _read_safetensors(path: Path, *, key: str | None, label: str | None, condition: str | None) -> _Content:
    from safetensors import SafetensorError, safe_open

    _check_not_empty(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise damaged(path, ".safetensors", error) from error

    def array(name: str) -> Any:
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        return tensor.numpy() if name in (label, condition) else tensor

    return _from_named(path, dict.fromkeys(names, array), key, label, condition)


def _from_named(
    path: Path,
    arrays: Mapping[str, Callable[[str], Any]],
    key: str | None,
    label: str | None,
    condition: str | None,
) -> _Content:
    """The arrays of a file that has names for them. Only those that are needed are read."""
    for option, name in (("key", key), ("label", label), ("condition", condition)):
        if name is not None and name not in arrays:
            raise ValueError(f'{path}: it has no array {option}="{name}"; its arrays are {_listed(arrays)}')
    candidates = [name for name in arrays if name not in (label, condition)]
    if key is None and len(candidates) > 1:
        key = "x" if "x" in candidates else None
        if key is None:
            raise ValueError(
                f"{path}: it has the arrays {_listed(candidates)}; pass the name of one: "
                f'key="{candidates[0]}"'
            )
    if key is None and not candidates:
        raise ValueError(f"{path} has no array besides label and condition; expected one with the data")
    key = key or candidates[0]
    return _Content(
        arrays[key](key),
        labels=None if label is None else arrays[label](label),
        condition=None if condition is None else arrays[condition](condition),
        left_out=tuple(name for name in candidates if name != key),
    )


def _read_csv(path: Path, *, label: str | None, condition: str | None) -> _Content:
    pyarrow = import_library("pyarrow", ".csv")
    from pyarrow import csv as arrow_csv

    name, delimiter = path.suffix.lower(), "\t" if path.suffix.lower() == ".tsv" else ","
    _check_header(path, delimiter, name)
    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(block_size=_CSV_BLOCK),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter),
            convert_options=arrow_csv.ConvertOptions(null_values=_MISSING, strings_can_be_null=True),
        )
        last = table.slice(table.num_rows - 1).to_pylist() if table.num_rows else []
    except pyarrow.ArrowInvalid as error:
        raise damaged(path, name, _reason_of(error)) from error
    # a quote that is not closed makes the rest of the file one text, which is the last entry
    if any("\n" in entry for row in last for entry in row.values() if isinstance(entry, str)):
        with path.open("rb") as file:
            if sum(block.count(b'"') for block in iter(lambda: file.read(2**20), b"")) % 2:
                raise damaged(path, name, "a quote is not closed")
    return _from_arrow(path, table, label, condition)


_MISSING = ["", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "None", "<NA>", "#N/A", "?"]


def _reason_of(error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if "straddling" in reason:
        return f"a line exceeds {_CSV_BLOCK // 2**20} MiB, so a quote is not closed or a cell is too large"
    return reason[:300]


def _check_header(path: Path, delimiter: str, name: str) -> None:
    """Raise ``ValueError`` if the first line of a text table is not a header of several names."""
    _check_not_empty(path)
    with path.open("rb") as file:
        start = file.read(2**16)
    if found := _format_of(start):
        raise ValueError(f"{path} is {found}, not text; export the table as {name} (UTF-8)")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16 text; save it as UTF-8")
    line = start.lstrip(b"\xef\xbb\xbf").lstrip().splitlines()[:1]
    header = line[0].decode("utf-8", "replace") if line else ""
    if header.startswith("<"):
        raise ValueError(
            f"{path} is HTML or XML, not a table: it starts with {header[:40]!r}; download the file"
        )
    other = next((c for c in (",", ";", "\t", "|") if c != delimiter and c in header), None)
    if delimiter not in header and other is not None:
        remedy = "rename it to .tsv" if other == "\t" else f"export it with {delimiter!r} as the delimiter"
        raise ValueError(
            f"{path}: expected columns separated by {delimiter!r} but the first line has {other!r}: "
            f"{header[:60]!r}; {remedy}"
        )
    names = next(csv.reader([header], delimiter=delimiter), [])
    if names and all(_is_number(name) for name in names):
        raise ValueError(
            f"{path}: the first line has numbers instead of names of columns: {header[:60]!r}; add a line of "
            "names"
        )
    if any("\0" in name for name in names):
        raise ValueError(f"{path} is not text: it has zero bytes; export the table as {name} (UTF-8)")


def _is_number(text: str) -> bool:
    if "_" in text:  # which float allows, such as in 10_000
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, *, label: str | None, condition: str | None) -> _Content:
    pyarrow = import_library("pyarrow", ".parquet")
    from pyarrow import parquet

    check_start(path, b"PAR1", ".parquet")
    try:
        table = parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(path, ".parquet", error) from error
    return _from_arrow(path, table, label, condition)


def _from_arrow(path: Path, table: Any, label: str | None, condition: str | None) -> _Content:
    """The numeric columns of a table of Arrow."""
    names: list[str] = table.column_names
    repeated, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"{path}: {count} columns have the name {repeated!r}; rename or remove them")
    for option, name in (("label", label), ("condition", condition)):
        if name is not None and name not in names:
            raise ValueError(f'{path}: it has no column {option}="{name}"; its columns are {_listed(names)}')
    if not table.num_rows:
        raise ValueError(f"{path} has {len(names)} names of columns but no rows; expected one row or more")
    arrays, columns, left_out = [], [], []
    for name, column in zip(names, table.columns, strict=True):
        if name in (label, condition):
            continue
        array, reason = _numeric(path, name, column)
        if array is not None and name in ("", "__index_level_0__"):
            reason = "an index"
        if reason is None and array is not None:
            columns.append(name)
            arrays.append(array)
        else:
            left_out.append(f"{name} ({reason})")
    if not arrays:
        raise ValueError(f"{path} has no numeric columns; its columns are {_listed(left_out)}")
    x = np.stack([array.astype(np.result_type(*arrays), copy=False) for array in arrays], 1)
    labels, conditions = (
        None if name is None else _values(table.column(name)) for name in (label, condition)
    )
    return _Content(x, tuple(columns), labels, conditions, left_out=tuple(left_out))


def _numeric(path: Path, name: str, column: Any) -> tuple[np.ndarray | None, str | None]:
    """A column of Arrow as an array of numbers, or the reason why it is left out."""
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if types.is_null(kind):
        raise ValueError(f"{path}: column {name!r} has no entries: all {len(column)} are missing; remove it")
    if types.is_boolean(kind):
        column = column.cast("uint8")
    elif types.is_decimal(kind):
        column = column.cast("float64")
    elif types.is_binary(kind):
        raise ValueError(f"{path}: column {name!r} is not UTF-8 text; save the file as UTF-8")
    elif types.is_string(kind) or types.is_large_string(kind):
        if not any(map(_is_number, column.drop_null().unique().to_pylist())):
            return None, "text"
        values = column.to_pylist()
        bad = next((i for i, text in enumerate(values) if text is not None and not _is_number(text)), None)
        if bad is not None:
            raise ValueError(
                f"{path}: column {name!r} has both numbers and text: row {bad} of {len(column)} has "
                f"{values[bad][:40]!r}; correct these entries, or remove the column"
            )
        return np.array([math.nan if text is None else float(text) for text in values]), None  # with spaces
    elif not (types.is_integer(kind) or types.is_floating(kind)):
        return None, str(kind)
    if column.null_count:
        column = compute.fill_null(column.cast("float64"), math.nan)
    return column.to_numpy(), None


def _values(column: Any) -> np.ndarray:
    """A column of labels: numbers, or an array of Python objects."""
    from pyarrow import types

    if not column.null_count and (types.is_integer(column.type) or types.is_floating(column.type)):
        return column.to_numpy()
    return np.array(column.to_pylist(), dtype=object)


def _read_h5ad(path: Path, *, key: str | None, label: str | None, condition: str | None) -> _Content:
    anndata = import_library("anndata", ".h5ad")
    check_start(path, b"\x89HDF", ".h5ad")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = anndata.read_h5ad(path)
            x = data.X if key is None else data.layers.get(key)
            if hasattr(x, "check_format"):  # a sparse matrix
                x.check_format(full_check=True)
    except Exception as error:  # errors of h5py and anndata have no common base class
        raise damaged(path, ".h5ad", error) from error
    layers = _listed(data.layers) or "none"
    if key is not None and key not in data.layers:
        raise ValueError(f'{path}: it has no layer key="{key}"; its layers are {layers}')
    if x is None:
        raise ValueError(f"{path}: X is empty; pass the name of a layer as key; its layers are {layers}")
    for option, name in (("label", label), ("condition", condition)):
        if name is not None and name not in data.obs:
            raise ValueError(
                f'{path}: obs has no column {option}="{name}"; its columns are {_listed(data.obs) or "none"}'
            )
    labels, conditions = (None if name is None else np.asarray(data.obs[name]) for name in (label, condition))
    left_out = tuple(f"layer {layer}" for layer in data.layers if layer != key)
    return _Content(
        x, tuple(map(str, data.var_names)), labels, conditions,
        left_out=left_out,
    )  # fmt: skip


_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def _image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The images below a folder, and the names of the other files there. Hidden files are ignored."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    images = [file for file in files if file.suffix.lower() in _IMAGES]
    return images, [str(file.relative_to(folder)) for file in files if file not in set(images)]


def _read_images(path: Path, *, image_size: int | None) -> _Content:
    import_library("PIL", "images", "pillow")
    files, others = _image_files(path)
    if not files:
        raise ValueError(
            f"{path} is a folder without images; expected files that end in {' '.join(_IMAGES)}, or pass the "
            "path of a file"
        )
    images = [_image(file, image_size) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"{path}: images have different sizes: {files[0].name} has {_size(images[0])} pixels and "
                f"{file.name} has {_size(image)}; pass image_size=64, or another size, to scale and crop them"
            )
    if all(image.ndim == 2 for image in images):
        x = np.stack(images)
    else:
        x = np.stack([image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images])
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    subfolders = [file.relative_to(path).parts[:-1] for file in files]
    labels = np.array([parts[0] for parts in subfolders]) if all(subfolders) else None
    return _Content(x, labels=labels, num_levels=256, left_out=tuple(others))


def _image(file: Path, image_size: int | None) -> np.ndarray:
    """An image as bytes, ``(height, width)`` if it is grey, else ``(height, width, 3)``."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Warning, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{file} is not a readable image ({reason}); remove it or save it again") from error
    if image.mode.startswith("I;16"):  # 16 bits for each pixel
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"{file} has pixels of 32 bits ({image.mode}), whose range is not known; save the images as an "
            "array (.npy) in [0, 1]"
        )
    else:
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size))
    return np.asarray(image)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}×{image.shape[1]}"


# choice of the reader, and errors

_TABLE_OPTIONS = ("label", "condition")
_READERS: dict[tuple[str, ...], tuple[Callable[..., _Content], tuple[str, ...]]] = {
    (".npy",): (_read_npy, ()),
    (".npz",): (_read_npz, ("key", *_TABLE_OPTIONS)),
    (".safetensors",): (_read_safetensors, ("key", *_TABLE_OPTIONS)),
    (".csv", ".tsv"): (_read_csv, _TABLE_OPTIONS),
    (".parquet", ".pq"): (_read_parquet, _TABLE_OPTIONS),
    (".h5ad",): (_read_h5ad, ("key", *_TABLE_OPTIONS)),
}
_EXPECTED = f"{', '.join(suffix for suffixes in _READERS for suffix in suffixes)}, or a folder of images"
_REMEDY_OF = {
    "label": "a .npz file or a table",
    "condition": "a .npz file or a table",
    "key": "a .npz file",
    "image_size": "a folder of images",
}
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin")


def _reader(path: Path) -> tuple[str, Callable[..., _Content], tuple[str, ...]]:
    """The name of the format of ``path``, its reader, and the options that the reader takes."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "images", _read_images, ("image_size",)
    for suffixes, (reader, options) in _READERS.items():
        if suffix in suffixes:
            return suffix, reader, options
    if suffix in _PICKLED:
        raise ValueError(
            f"{path}: {suffix} files are pickled, and reading a pickle runs code from the file, so they are "
            f"refused; save the tensor with {_CONVERT}"
        )
    if suffix in _IMAGES:
        raise ValueError(f"{path} is one image; pass the folder of the images")
    raise ValueError(f"{path}: unknown format {suffix or 'without a suffix'}; expected {_EXPECTED}")


def import_library(module: str, what: str, package: str | None = None) -> Any:
    try:
        return __import__(module)
    except ModuleNotFoundError as error:
        package = package or module
        raise ModuleNotFoundError(
            f"{package} is not installed, which reads {what}; pip install {package}, or pip install "
            "'pyro-vae[files]'",
            name=module,
        ) from error


_STARTS = (
    (b"PK\x03\x04", "a zip archive (such as an Excel workbook)"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x93NUMPY", "an array (.npy)"),
    (b"PAR1", "a Parquet table"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"<", "HTML or XML"),
)


def _format_of(start: bytes) -> str | None:
    return next((name for signature, name in _STARTS[:-1] if start.startswith(signature)), None)


def _check_not_empty(path: Path) -> None:
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty (0 bytes); expected {path.suffix} data")


def check_start(path: Path, signature: bytes, name: str) -> None:
    """Raise ``ValueError`` if a file does not start with the signature of its format."""
    _check_not_empty(path)
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(signature):
        found = next((text for begin, text in _STARTS if start.startswith(begin)), "another format")
        raise ValueError(f"{path} is not a {name} file but {found}; save it as {name}, or rename it")


def damaged(path: Path, name: str, error: object) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:300]
    return ValueError(f"{path} is not a complete {name} file ({reason}); correct it, or save it again")


def _checked_objects(path: Path, load: Callable[[], Any]) -> Any:
    """The array that ``load`` returns. Raises ``ValueError`` for objects and damaged files."""
    try:
        return load()
    except Exception as error:  # numpy parses headers with ast, whose errors are of many types
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(
                f"{path} has an array of Python objects, which are pickled, and reading a pickle runs code "
                "from the file, so it is refused; save numbers: numpy.save(path, x.astype(float))"
            ) from error
        if isinstance(error, MemoryError):
            raise
        raise damaged(path, path.suffix, error) from error


def _counted(values: np.ndarray) -> str:
    """Each value and its number of rows, most frequent first; for many different numbers their range."""
    counts = Counter(values.tolist()).most_common()
    if values.dtype.kind in "iuf" and len(counts) > 20:
        return f"{len(counts)} values in [{np.nanmin(values):g}, {np.nanmax(values):g}]"
    return _listed(f"{shorten(repr(value), 40)} × {count}" for value, count in counts)


def _listed(names: Iterable[str], most: int = 8) -> str:
    """Names, separated by commas; of many, the first few and their number."""
    names = list(names)
    rest = f", … ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
