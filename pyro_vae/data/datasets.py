"""Data sets: the embedded digits, MNIST and Fashion-MNIST, Frey Face, a ring, users' files; binarization and
splits.

>>> from pyro_vae import load
>>> train, test = load("digits", binarize="stochastic")
>>> train
Data('digits', x: (1497, 8, 8), labels, binarize='stochastic')
"""

import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.data.arrays import SparseRows, as_tensor, check_rows
from pyro_vae.data.readers import Table, read
from pyro_vae.files import is_path

Binarize = Literal["none", "threshold", "stochastic"]
Name = Literal["digits", "mnist", "fashion-mnist", "frey-faces", "ring"]

# SHA-256 of the decompressed IDX files
_IDX_SHA256 = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
# SHA-256 of the array's bytes, 1965 × 28 × 20
_FREY_SHA256 = "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78"
_FREY_BYTES = 1965 * 28 * 20 + 1000  # upper bound, with the header of the .npy format
_IDX_BYTES = 60000 * 28 * 28 + 16  # size of the largest file


_PARTS = ("x", "labels", "condition", "mask")  # the tensors of Data, which have rows

SOURCES: dict[Name, str] = {
    "digits": (
        "1497 + 300 images of 8x8; Alpaydin & Kaynak, UCI Machine Learning Repository, CC BY 4.0; "
        "in the package"
    ),
    "mnist": "60000 + 10000 images of 28x28; LeCun, Cortes & Burges; DIR/MNIST/raw, or DIR",
    "fashion-mnist": (
        "60000 + 10000 images of 28x28; Xiao, Rasul & Vollgraf, MIT licence; DIR/FashionMNIST/raw, or DIR"
    ),
    "frey-faces": "1768 + 197 images of 28x20; S. Roweis & B. Frey; DIR/frey_faces.npz",
    "ring": "2000 + 500 points in the plane; made by pyro_vae.data.ring",
}


@dataclass(frozen=True, eq=False, repr=False)
class Data(Dataset):
    """Data in memory, for ``model(x)`` or ``model(x, condition)``; with missing entries for ``model(x=x,
    c=condition, mask=mask)``.

    :param x: ``(n, *event)``, a tensor, array or data frame of numbers; for images, grey values in [0, 1].
    :param labels: ``(n,)``, integers for plots, which are not passed to the model.
    :param label_names: the names of the labels 0, 1, …, for plots.
    :param condition: ``(n, *event)``, a second argument of model and guide: see :meth:`given`.
    :param binarize: ``"stochastic"`` draws x ~ Bernoulli(grey) at every access, and so anew in every epoch
        (Salakhutdinov & Murray 2008); :meth:`fixed` draws once. ``"threshold"`` sets x once: to 1 where grey
        > 1/2, and to 0 elsewhere.
    :param num_levels: the number of grey levels of the images, 256 for bytes: see :meth:`levels`.
    :param mask: bool, the shape of x, false at missing entries, which may be NaN and are set to 0. Model and
        guide then get all arguments by keyword: x, mask and, if there is a condition, c.
    :raises ValueError: for empty data, non-finite entries, or, with ``binarize``, grey values outside [0, 1].
        The error names the row.
    """

    x: Tensor
    labels: Tensor | None = None
    condition: Tensor | None = None
    binarize: Binarize = "none"
    name: str = "data"
    num_levels: int | None = None
    mask: Tensor | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.binarize not in get_args(Binarize):
            raise ValueError(f"binarize: expected one of {get_args(Binarize)} but got {self.binarize!r}")
        for key in _PARTS:
            part = as_tensor(getattr(self, key), f"{self.name}, {key}")
            if isinstance(part, SparseRows):
                part = part[:]
            if part is not None and not isinstance(part, Tensor):
                raise ValueError(
                    f"{self.name}: expected {key} as a tensor or array but got a {type(part).__name__}"
                )
            object.__setattr__(self, key, part)
        if self.x is None:
            raise ValueError(f"{self.name}: expected x as a tensor or array but got None")
        if self.mask is not None:
            if self.mask.dtype != torch.bool or self.mask.shape != self.x.shape:
                raise ValueError(
                    f"{self.name}: expected a bool mask of shape {tuple(self.x.shape)}, true where observed, "
                    f"but got {self.mask.dtype} of shape {tuple(self.mask.shape)}"
                )
            object.__setattr__(self, "x", self.x.masked_fill(~self.mask, 0))
        check_rows(self.x, self.name)
        if self.binarize in ("threshold", "stochastic") and not self.x.is_floating_point():
            object.__setattr__(self, "x", self.x.to(torch.get_default_dtype()))
        for part in (self.labels, self.condition):
            if part is not None and (not part.dim() or len(part) != len(self.x)):
                raise ValueError(
                    f"{self.name}: x has {len(self.x)} rows but labels or condition has {len(part)}"
                )
        if self.label_names is not None and self.labels is not None:
            low, high = self.labels.aminmax()
            if low < 0 or high >= len(self.label_names):
                raise ValueError(
                    f"{self.name}: there are {len(self.label_names)} label_names but labels in [{low:g}, "
                    f"{high:g}]; expected a name for each of 0, 1, …"
                )
        if self.binarize == "none":
            return
        outside = ((self.x < 0) | (self.x > 1)).reshape(len(self.x), -1).any(1)
        if outside.any():
            row = int(outside.nonzero()[0])
            low, high = self.x[row].aminmax()
            raise ValueError(
                f"{self.name}: row {row} has values in [{low:g}, {high:g}], which cannot be binarized; "
                'expected grey values in [0, 1]: divide by the largest value, or use binarize="none"'
            )
        if self.binarize == "threshold":
            object.__setattr__(self, "x", (self.x > 0.5).to(self.x.dtype))
            object.__setattr__(self, "num_levels", None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice | Tensor) -> Any:
        """x at ``index``, or (x, condition). With missing entries, a dict of x, mask and the condition c, for
        keyword arguments. With stochastic binarization, each call is a new draw."""
        arguments = self.arguments(index)
        if self.mask is not None:
            return dict(zip(("x", "c"), arguments, strict=False)) | {"mask": self.mask[index]}
        return arguments if len(arguments) > 1 else arguments[0]

    def arguments(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        """The positional arguments of the model at ``index``: (x,) or (x, condition)."""
        x = self.x[index]
        if self.binarize == "stochastic":
            x = torch.bernoulli(x)
        return (x,) if self.condition is None else (x, self.condition[index])

    def batches(self, batch_size: int = 100, *, shuffle: bool = True) -> Iterator[Any]:
        """One epoch of minibatches, for plain Pyro: ``for x in data.batches(100): svi.step(x)``. With missing
        entries a minibatch is a dict: ``svi.step(**batch)``."""
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        return (self[rows] for rows in order.split(batch_size))

    def fixed(self, seed: int = 0) -> "Data":
        """The data binarized once, for evaluation. The global random state is unchanged."""
        if self.binarize != "stochastic":
            return self
        generator = torch.Generator().manual_seed(seed)
        x = torch.bernoulli(self.x.cpu(), generator=generator).to(self.x)
        return replace(self, x=x, binarize="none", num_levels=None)

    def levels(self) -> "Data":
        """The data as integer grey levels 0 … num_levels−1, for a Categorical likelihood."""
        if self.num_levels is None:
            raise ValueError(
                f"{self.name}: the data have no grey levels; pass num_levels, such as 256, and do not "
                "binarize"
            )
        if self.binarize != "none":
            raise ValueError(f'{self.name}: binarized data have no grey levels; load with binarize="none"')
        return replace(self, x=(self.x * (self.num_levels - 1)).round().long(), binarize="none")

    def given(self, condition: Tensor) -> "Data":
        """The same data with a second argument for model and guide, such as ``one_hot(labels)`` for a
        conditional VAE."""
        return replace(self, condition=condition)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Data":
        """The data on ``device``, in the floating ``dtype``. Integers keep their dtype."""
        return self._map(lambda part: part.to(device, dtype if part.is_floating_point() else part.dtype))

    def head(self, n: int) -> "Data":
        """The first ``n`` rows."""
        return self.rows(slice(n))

    def rows(self, index: slice | Tensor) -> "Data":
        """The rows at ``index``."""
        return self._map(lambda part: part[index])

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Data":
        parts: dict[str, Any] = {key: f(part) for key in _PARTS if (part := getattr(self, key)) is not None}
        return replace(self, **parts)

    def __repr__(self) -> str:
        parts = [f"{self.name!r}, x: {tuple(self.x.shape)}"]
        parts += [key for key in _PARTS[1:] if getattr(self, key) is not None]
        return f"Data({', '.join(parts)}, binarize={self.binarize!r})"


def load(
    name: Name | str | os.PathLike,
    *,
    binarize: Binarize = "none",
    data_dir: str | os.PathLike | None = None,
    holdout: float | None = None,
    validation: str | os.PathLike | None = None,
    seed: int = 0,
    label: str | None = None,
    condition: str | None = None,
    key: str | None = None,
    image_size: int | None = None,
) -> tuple[Data, Data]:
    """``(train, test)`` of a named data set, or of a file.

    Images are grey values in [0, 1], ``(n, height, width)``. ``"digits"`` (1497 + 300 images of 8×8, shipped
    with the package) and ``"ring"`` need no files. ``"mnist"`` and ``"fashion-mnist"`` (60,000 + 10,000 of
    28×28) are read from four IDX files, plain or ``.gz``, in ``data_dir/MNIST/raw``, ``data_dir/MNIST`` or
    ``data_dir`` itself (``FashionMNIST`` likewise); torchvision downloads missing files. ``"frey-faces"``
    (1768 + 197 of 28×20, every tenth frame held out) is read from ``data_dir/frey_faces.npz``.

    Any other name is the path of a file or folder: see :func:`~pyro_vae.data.read` for the formats, and for
    ``label``, ``condition``, ``key`` and ``image_size``. Missing entries are false in ``mask``.

    :param binarize: see :class:`Data`; the test set is binarized once.
    :param data_dir: by default the environment variable ``PYRO_VAE_DATA``, or ``./data``.
    :param holdout: the fraction of a file's rows that are held out, drawn by ``seed``; 0.1 by default. The
        rows are copied into memory.
    :param validation: a file with the held-out rows, in place of ``holdout``. The rows of a mapped ``.npy``
        file are then not copied.
    :raises ValueError: for an unknown name, a malformed file, or, of a named data set, a file whose contents
        differ from the published file.
    :raises FileNotFoundError: if a file is missing and cannot be downloaded.
    :raises ModuleNotFoundError: if the library for a format is missing.
    """
    options: dict[str, Any] = {"label": label, "condition": condition, "key": key, "image_size": image_size}
    if name not in SOURCES:
        if not is_path(name):
            raise ValueError(
                f"load: there is no data set {name!r}; expected one of {', '.join(SOURCES)}, or the path of "
                "a file"
            )
        table = read(locate(name, data_dir), **options)
        held_out = None if validation is None else read(locate(validation, data_dir), **options)
        return from_tables(table, held_out, binarize=binarize, holdout=holdout, seed=seed)
    given = options | {"holdout": holdout, "validation": validation}
    if unused := [option for option, value in given.items() if value is not None]:
        raise ValueError(f"load: {unused[0]} is for files; {name} has its own held-out data, so leave it out")
    folder = _folder(data_dir)
    loaders = {
        "digits": _load_digits,
        "mnist": lambda: _load_idx(folder, "MNIST"),
        "fashion-mnist": lambda: _load_idx(folder, "FashionMNIST"),
        "frey-faces": lambda: _load_frey_faces(folder),
        "ring": lambda: (ring(2000, seed=0), ring(500, seed=1)),
    }
    train, test = loaders[str(name)]()
    return replace(train, binarize=binarize), replace(test, binarize=binarize).fixed()


def locate(name: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Path:
    """The path of a file: ``name``, or, if that does not exist, ``data_dir/name``.

    :raises FileNotFoundError: if neither exists.
    """
    path = Path(name)
    if path.exists():
        return path
    if not (other := _folder(data_dir) / path).exists():
        raise FileNotFoundError(
            f"{path} does not exist, nor does {other}; pass the path of a file, or its folder as data_dir"
        )
    return other


def split_rows(num_rows: int, holdout: float = 0.1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The row numbers, counted from 0 and in ascending order, of training and held-out data, as :func:`load`
    draws them: row ``i`` of the held-out data is row ``held_out[i]`` of the file.

    >>> train, held_out = split_rows(20, 0.2)
    >>> held_out.tolist()
    [4, 5, 13, 19]

    :param holdout: the fraction of rows that are held out, at least one row.
    :param seed: seed of the draw.
    :raises ValueError: for fewer than two rows, a fraction that is not between 0 and 1, or one that leaves no
        rows for training.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout: expected a fraction between 0 and 1 but got {holdout!r}")
    if isinstance(num_rows, bool) or not isinstance(num_rows, Integral) or num_rows < 2:
        raise ValueError(f"num_rows: expected 2 rows or more but got {num_rows!r}")
    num_held_out = max(1, round(holdout * num_rows))
    if num_held_out == num_rows:
        raise ValueError(
            f"holdout: {holdout:g} of {num_rows} rows leaves none for training; expected a smaller fraction"
        )
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    held_out, train = (part.sort().values for part in order.split([num_held_out, num_rows - num_held_out]))
    return train, held_out


def from_tables(
    table: Table,
    validation: Table | None = None,
    *,
    binarize: Binarize = "none",
    holdout: float | None = None,
    seed: int = 0,
) -> tuple[Data, Data]:
    """``(train, test)`` of the contents of a file.

    The condition of each row becomes a vector: text, and whole numbers of at most 20 different values, are
    one-hot; other numbers are standardized by mean and standard deviation. Labels become integers; the names
    of labels that are no whole numbers are ``label_names``.

    :param validation: the held-out rows. Otherwise a fraction ``holdout`` (0.1 by default) of the rows of
        ``table`` is held out, drawn by ``seed``.
    :raises ValueError: as :func:`split_rows` does, or if ``validation`` has other columns or
        conditions than ``table``.
    """
    name = Path(table.path).name
    if validation is None:
        split = split_rows(len(table), 0.1 if holdout is None else holdout, seed=seed)
        labels, label_names = _codes(table.labels)
        whole = Data(
            table.x,
            labels=labels,
            label_names=label_names,
            condition=_vectors(table.condition, table.condition, name),
            name=name,
            num_levels=table.num_levels,
            mask=table.mask,
        )
        train, test = (whole.rows(rows) for rows in split)
        return replace(train, binarize=binarize), replace(test, binarize=binarize).fixed()
    if holdout is not None:
        raise ValueError("holdout: the held-out rows are those of validation; leave one of the two out")
    if table.columns != validation.columns or table.x.shape[1:] != validation.x.shape[1:]:
        differing = sorted(set(table.columns) ^ set(validation.columns))
        shapes = tuple(validation.x.shape[1:]), tuple(table.x.shape[1:])
        what = (
            f"the columns {differing[:3]} are in one only"
            if differing
            else f"its rows have shape {shapes[0]} instead of {shapes[1]}, or its columns have another order"
        )
        raise ValueError(
            f"{validation.path}: its columns are not those of {table.path}: {what}; expected the same columns"
        )
    labels, label_names = None, None
    if table.labels is not None and validation.labels is not None:
        labels, label_names = _codes(np.concatenate([table.labels, validation.labels]))
    parts = []
    for part, rows in ((table, slice(len(table))), (validation, slice(len(table), None))):
        parts.append(
            Data(
                part.x.to(table.x.dtype),
                labels=None if labels is None else labels[rows],
                label_names=label_names,
                condition=_vectors(part.condition, table.condition, part.path),
                binarize=binarize,
                name=Path(part.path).name,
                num_levels=table.num_levels if part.num_levels == table.num_levels else None,
                mask=part.mask,
            )
        )
    return parts[0], parts[1].fixed()


def _codes(labels: np.ndarray | None) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as integers: whole numbers as they are, others by their rank, with their names in this order."""
    if labels is None:
        return None, None
    if labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and (labels == labels.round()).all()):
        return torch.from_numpy(labels.astype(np.int64)), None
    names, codes = np.unique(labels, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(map(str, names.tolist()))


_MAX_LEVELS = 20  # whole numbers with more different values are not one-hot


def _vectors(condition: np.ndarray | None, of_train: np.ndarray | None, name: str) -> Tensor | None:
    """Conditions as vectors ``(n, k)``. The levels, or mean and standard deviation, are those of
    ``of_train``."""
    if condition is None or of_train is None:
        return None
    levels = np.unique(of_train)
    is_whole = of_train.dtype.kind not in "f" or bool((levels == levels.round()).all())
    if of_train.dtype.kind == "U" or (is_whole and len(levels) <= _MAX_LEVELS):
        code = np.searchsorted(levels, condition).clip(max=len(levels) - 1)
        if (unknown := levels[code] != condition).any():
            row = int(unknown.argmax())
            raise ValueError(
                f"{name}: row {row} has the condition {str(condition[row])!r}, which no row for training "
                "has; remove these rows"
            )
        return torch.eye(len(levels))[torch.from_numpy(code)]
    values = (condition - of_train.mean()) / max(float(of_train.std()), 1e-300)
    return torch.from_numpy(values).to(torch.get_default_dtype()).unsqueeze(1)


def is_here(name: Name, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether ``data_dir`` has the files of a data set. Only :func:`load` verifies their contents."""
    folder = _folder(data_dir)
    if name in ("mnist", "fashion-mnist"):
        return _idx_files(folder, {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]) is not None
    return name != "frey-faces" or (folder / "frey_faces.npz").is_file()


def _folder(data_dir: str | os.PathLike | None) -> Path:
    return Path(data_dir or os.environ.get("PYRO_VAE_DATA") or "data")


def ring(n: int, *, radius: float = 1.0, noise: float = 0.1, seed: int = 0) -> Data:
    """Points on a circle with Gaussian noise on the radius. A deep network can map standard normal noise to
    such points (Doersch 2016, figure 2). ``x: (n, 2)``; the label of a point is its octant, 0 to 7."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    r = radius + noise * torch.randn(n, generator=generator)
    x = torch.stack([r * angle.cos(), r * angle.sin()], -1)
    return Data(x, labels=(angle / (math.pi / 4)).long().clamp(max=7), name="ring")


def _load_digits() -> tuple[Data, Data]:
    # The test set of E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    # Learning Repository (1998), doi 10.24432/C50P49, licence CC BY 4.0; 17 grey levels.
    with resources.files("pyro_vae.data").joinpath("digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images, labels = archive["images"], archive["labels"]
    return _split("digits", images, labels, every=6, levels=17)


def _load_frey_faces(folder: Path) -> tuple[Data, Data]:
    path = folder / "frey_faces.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"frey-faces: {path} is missing; put the file there, or pass its folder as data_dir"
        )
    try:
        with ZipFile(path) as archive, archive.open("images.npy") as file:
            content = file.read(_FREY_BYTES + 1)  # a small archive may expand to gigabytes
        too_large = len(content) > _FREY_BYTES
        images = None if too_large else np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise ValueError(f"frey-faces: {path} is not a .npz file with an array 'images' ({error})") from error
    digest = (
        "not computed"
        if images is None
        else hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    )
    if images is None or digest != _FREY_SHA256:
        raise ValueError(
            f"frey-faces: {path} differs from the published 1965 frames of 28×20: SHA-256 {digest}, "
            f"expected {_FREY_SHA256}"
        )
    return _split("frey-faces", images, None, every=10, levels=256)


def _split(
    name: str, images: np.ndarray, labels: np.ndarray | None, *, every: int, levels: int
) -> tuple[Data, Data]:
    """Training and test set; every ``every``-th image is in the test set."""
    is_test = np.arange(len(images)) % every == 0
    train, test = (
        _grey_images(name, images[rows], None if labels is None else labels[rows], levels)
        for rows in (~is_test, is_test)
    )
    return train, test


def _grey_images(
    name: str, images: np.ndarray | Tensor, labels: np.ndarray | Tensor | None, levels: int
) -> Data:
    x = torch.as_tensor(images).to(torch.get_default_dtype()) / (levels - 1)
    return Data(x, None if labels is None else torch.as_tensor(labels).long(), name=name, num_levels=levels)


_IDX_NAMES = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist"}  # torchvision's names and ours


def _idx_folders(folder: Path, kind: str) -> tuple[Path, ...]:
    """The folders that may have the IDX files: two layouts of torchvision, then ``folder`` itself."""
    return folder / kind / "raw", folder / kind, folder


def _idx_files(folder: Path, kind: str) -> list[Path] | None:
    """The four IDX files, plain or compressed, in the first folder that has all of them."""
    for candidate in _idx_folders(folder, kind):
        files = [_find_idx_file(candidate, name) for name in _IDX_SHA256[kind]]
        if None not in files:
            return files  # type: ignore[return-value]
    return None


def _find_idx_file(folder: Path, name: str) -> Path | None:
    """An IDX file, plain or compressed. Some copies are named ``train-images.idx3-ubyte``."""
    paths = (
        folder / f"{stem}{suffix}" for stem in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")
    )
    return next((path for path in paths if path.is_file()), None)


def _load_idx(folder: Path, kind: Literal["MNIST", "FashionMNIST"]) -> tuple[Data, Data]:
    files = _idx_files(folder, kind)
    if files is None:
        _download(folder, kind)
        files = _idx_files(folder, kind)
    if files is None:
        raise FileNotFoundError(
            f"{_IDX_NAMES[kind]}: torchvision downloaded other files than {', '.join(_IDX_SHA256[kind])}"
        )
    sums = _IDX_SHA256[kind].values()
    arrays = [torch.from_numpy(_read_idx(file, sha256)) for file, sha256 in zip(files, sums, strict=True)]
    train, test = (_grey_images(_IDX_NAMES[kind], arrays[i], arrays[i + 1], 256) for i in (0, 2))
    return train, test


def _download(folder: Path, kind: str) -> None:
    """Download to ``folder/kind/raw`` with torchvision. A failed download leaves no empty folders."""
    target = folder / kind / "raw"
    created = [path for path in (target, *target.parents) if not path.exists()]
    try:
        from torchvision import datasets

        getattr(datasets, kind)(folder, download=True)
    except Exception as error:  # any network error, or a torchvision that was built for another torch
        for path in created:
            with suppress(OSError):  # not empty
                path.rmdir()
        folders = ", ".join(map(str, _idx_folders(folder, kind)))
        raise FileNotFoundError(
            f"{_IDX_NAMES[kind]}: none of the folders {folders} has all of {', '.join(_IDX_SHA256[kind])}, "
            "plain or as .gz, and the download failed "
            f"({(str(error) or type(error).__name__).splitlines()[0]}); put the four files in one of these "
            "folders, or pass their folder as data_dir or PYRO_VAE_DATA"
        ) from error


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    """Read a published IDX file, plain or compressed, as a uint8 array of the shape in its header.

    At most the size of the largest published file is decompressed.

    :raises ValueError: for any other content.
    """
    remedy = "delete it and download it again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_IDX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete .gz file ({error}); {remedy}") from error
    if len(content) > _IDX_BYTES:
        raise ValueError(f"{path} is larger than {_IDX_BYTES} bytes, the largest published file; {remedy}")
    kind, rank = struct.unpack(">xxBB", content[:4].rjust(4, b"\1"))
    if content[:2] != b"\0\0" or kind != 8 or not 1 <= rank <= 3:
        raise ValueError(
            f"{path} is not an IDX file: expected its first bytes to be 00 00 08 01 … 03 but got "
            f"{content[:4].hex(' ')}"
        )
    sizes = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank].rjust(4 * rank, b"\0"))
    if len(content) != 4 + 4 * rank + math.prod(sizes):
        raise ValueError(
            f"{path} is truncated or too long: its header declares an array of shape {sizes}, but it has "
            f"{len(content)} bytes; {remedy}"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        other = next((_IDX_NAMES[k] for k, sums in _IDX_SHA256.items() if digest in sums.values()), None)
        if other:
            remedy = f"it belongs to {other}: load {other}, or pass another folder"
        raise ValueError(
            f"{path} differs from the published file: SHA-256 {digest}, expected {sha256}; {remedy}"
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * rank).reshape(sizes)
