"""Data sets: the embedded digits, MNIST and Fashion-MNIST, Frey Face, a ring; binarization and splits.

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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal, get_args
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.data.arrays import SparseRows, as_tensor, check_rows

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
_FREY_BYTES = 1965 * 28 * 20 + 1000  # with its header, at most
_IDX_BYTES = 60000 * 28 * 28 + 16  # of the largest file


SOURCES: dict[Name, str] = {
    "digits": "1497 + 300 images of 8x8; Alpaydin & Kaynak, UCI Machine Learning Repository, CC BY 4.0; in the package",
    "mnist": "60000 + 10000 images of 28x28; LeCun, Cortes & Burges; DIR/MNIST/raw, or DIR",
    "fashion-mnist": "60000 + 10000 images of 28x28; Xiao, Rasul & Vollgraf, MIT licence; DIR/FashionMNIST/raw, or DIR",
    "frey-faces": "1768 + 197 images of 28x20; S. Roweis & B. Frey; DIR/frey_faces.npz",
    "ring": "2000 + 500 points in the plane; made by pyro_vae.data.ring",
}


@dataclass(frozen=True, eq=False, repr=False)
class Data(Dataset):
    """Data in memory, as a model takes them: ``model(x)``, or ``model(x, condition)``.

    :param x: ``(n, *event)``, a tensor, an array or a data frame of numbers; for images, grey values in [0, 1].
    :param labels: ``(n,)`` whole numbers for pictures; a model never sees them.
    :param condition: ``(n, *event)``, a second argument of model and guide: see :meth:`given`.
    :param binarize: with ``"stochastic"`` every epoch sees a fresh draw x ~ Bernoulli(grey) (Salakhutdinov & Murray
        2008), and so does every ``data[i]``; :meth:`fixed` draws once. ``"threshold"`` is done once, at 1/2.
    :param num_levels: how many grey levels the images had, 256 for bytes: see :meth:`levels`.

    :raises ValueError: for empty data, non-finite entries, or grey values outside [0, 1] to binarize, with the row.
    """

    x: Tensor
    labels: Tensor | None = None
    condition: Tensor | None = None
    binarize: Binarize = "none"
    name: str = "data"
    num_levels: int | None = None

    def __post_init__(self) -> None:
        if self.binarize not in get_args(Binarize):
            raise ValueError(f"binarize: expected one of {get_args(Binarize)} but got {self.binarize!r}")
        for key in ("x", "labels", "condition"):
            part = as_tensor(getattr(self, key), f"{self.name}, {key}")
            if isinstance(part, SparseRows):
                part = part[:]
            if part is not None and not isinstance(part, Tensor):
                raise ValueError(f"{self.name}: expected {key} as a tensor or array but got a {type(part).__name__}")
            object.__setattr__(self, key, part)
        if self.x is None:
            raise ValueError(f"{self.name}: expected x as a tensor or array but got None")
        check_rows(self.x, self.name)
        if self.binarize in ("threshold", "stochastic") and not self.x.is_floating_point():
            object.__setattr__(self, "x", self.x.to(torch.get_default_dtype()))  # bytes and bools of 0 and 1
        for part in (self.labels, self.condition):
            if part is not None and (not part.dim() or len(part) != len(self.x)):
                raise ValueError(f"{self.name}: x has {len(self.x)} rows but labels or condition has {len(part)}")
        if self.binarize == "none":
            return
        outside = ((self.x < 0) | (self.x > 1)).reshape(len(self.x), -1).any(1)
        if outside.any():
            row = int(outside.nonzero()[0])
            low, high = self.x[row].aminmax()
            raise ValueError(
                f"{self.name}: row {row} has values in [{low:g}, {high:g}], which cannot be binarized; expected grey "
                'values in [0, 1]: divide by the largest, or use binarize="none"'
            )
        if self.binarize == "threshold":
            object.__setattr__(self, "x", (self.x > 0.5).to(self.x.dtype))
            object.__setattr__(self, "num_levels", None)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor | tuple[Tensor, ...]:
        """The model's arguments at ``index``: x, or (x, condition); freshly binarized where that is stochastic."""
        arguments = self.arguments(index)
        return arguments if len(arguments) > 1 else arguments[0]

    def arguments(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        x = self.x[index]
        if self.binarize == "stochastic":
            x = torch.bernoulli(x)
        return (x,) if self.condition is None else (x, self.condition[index])

    def batches(self, batch_size: int = 100, *, shuffle: bool = True) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """One epoch of minibatches, for plain Pyro: ``for x in data.batches(100): svi.step(x)``."""
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        return (self[rows] for rows in order.split(batch_size))

    def fixed(self, seed: int = 0) -> "Data":
        """The same data binarized once, for evaluation. The caller's random state is left as it was."""
        if self.binarize != "stochastic":
            return self
        generator = torch.Generator().manual_seed(seed)
        return replace(self, x=torch.bernoulli(self.x.cpu(), generator=generator).to(self.x), binarize="none", num_levels=None)

    def levels(self) -> "Data":
        """Whole grey levels 0 … num_levels−1, for a Categorical likelihood."""
        if self.num_levels is None:
            raise ValueError(f"{self.name}: these data have no grey levels; give num_levels, such as 256, and do not binarize")
        if self.binarize != "none":
            raise ValueError(f'{self.name}: grey levels are of grey values, but these are binarized; load with binarize="none"')
        return replace(self, x=(self.x * (self.num_levels - 1)).round().long(), binarize="none")

    def given(self, condition: Tensor) -> "Data":
        """The same data with a second argument for model and guide, such as ``one_hot(labels)`` for a conditional VAE."""
        return replace(self, condition=condition)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Data":
        """The same data on a device, in a floating dtype; whole numbers (labels, grey levels) keep theirs."""
        parts = {k: v for k in ("x", "labels", "condition") if (v := getattr(self, k)) is not None}
        return replace(self, **{k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in parts.items()})

    def head(self, n: int) -> "Data":
        """The first ``n`` data."""
        parts = {k: v[:n] for k in ("x", "labels", "condition") if (v := getattr(self, k)) is not None}
        return replace(self, **parts)

    def __repr__(self) -> str:
        parts = [f"{self.name!r}, x: {tuple(self.x.shape)}"]
        parts += [key for key in ("labels", "condition") if getattr(self, key) is not None]
        return f"Data({', '.join(parts)}, binarize={self.binarize!r})"


def load(name: Name, *, binarize: Binarize = "none", data_dir: str | os.PathLike | None = None) -> tuple[Data, Data]:
    """``(train, test)`` of a named data set; images are grey values in [0, 1], ``(n, height, width)``.

    ``"digits"`` (1497 + 300 images of 8×8, shipped with the package) and ``"ring"`` need no files. ``"mnist"`` and
    ``"fashion-mnist"`` (60,000 + 10,000 of 28×28) are four IDX files, plain or ``.gz``, in ``data_dir/MNIST/raw``,
    ``data_dir/MNIST`` or ``data_dir`` itself (``FashionMNIST`` likewise); torchvision downloads them where they are missing.
    ``"frey-faces"`` (1768 + 197 of 28×20, every tenth frame held out) reads ``data_dir/frey_faces.npz``.

    :param binarize: see :class:`Data`; the test set is binarized once.
    :param data_dir: by default the environment variable ``PYRO_VAE_DATA``, or ``./data``.
    :raises ValueError: for a name that is not listed, or a file with other contents than the published ones.
    :raises FileNotFoundError: where a file is missing and cannot be downloaded.
    """
    folder = _folder(data_dir)
    loaders = {
        "digits": lambda: _digits(),
        "mnist": lambda: _idx(folder, "MNIST"),
        "fashion-mnist": lambda: _idx(folder, "FashionMNIST"),
        "frey-faces": lambda: _frey_faces(folder),
        "ring": lambda: (ring(2000, seed=0), ring(500, seed=1)),
    }
    if name not in loaders:
        raise ValueError(f"load: there is no data set {name!r}; expected one of {', '.join(loaders)}")
    train, test = loaders[name]()
    return replace(train, binarize=binarize), replace(test, binarize=binarize).fixed()


def is_here(name: Name, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether the files of a data set lie in ``data_dir``; their contents are checked by :func:`load`."""
    folder = _folder(data_dir)
    if name in ("mnist", "fashion-mnist"):
        return _idx_files(folder, {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]) is not None
    return name != "frey-faces" or (folder / "frey_faces.npz").is_file()


def _folder(data_dir: str | os.PathLike | None) -> Path:
    return Path(data_dir or os.environ.get("PYRO_VAE_DATA") or "data")


def ring(n: int, *, radius: float = 1.0, noise: float = 0.1, seed: int = 0) -> Data:
    """Points on a circle with Gaussian noise on the radius: a density that no factorial Gaussian has, but that one pushed
    through a deep network reaches (Doersch 2016, figure 2). ``x: (n, 2)``; the label is the octant."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    r = radius + noise * torch.randn(n, generator=generator)
    x = torch.stack([r * angle.cos(), r * angle.sin()], -1)
    return Data(x, labels=(angle / (math.pi / 4)).long().clamp(max=7), name="ring")


def _digits() -> tuple[Data, Data]:
    # The test set of E. Alpaydin & C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    # Repository (1998), doi 10.24432/C50P49, licence CC BY 4.0; 17 grey levels.
    with resources.files("pyro_vae.data").joinpath("digits.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        images, labels = archive["images"], archive["labels"]
    return _split("digits", images, labels, every=6, levels=17)


def _frey_faces(folder: Path) -> tuple[Data, Data]:
    path = folder / "frey_faces.npz"
    if not path.is_file():
        raise FileNotFoundError(f"frey-faces: there is no {path}; put the file there, or name its folder by data_dir")
    try:
        with ZipFile(path) as archive, archive.open("images.npy") as file:
            content = file.read(_FREY_BYTES + 1)  # a small file may hold gigabytes
        images = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False) if len(content) <= _FREY_BYTES else None
    except Exception as error:
        raise ValueError(f"frey-faces: {path} is no .npz file with an array 'images' ({error})") from error
    digest = "another" if images is None else hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    if images is None or digest != _FREY_SHA256:
        raise ValueError(
            f"frey-faces: {path} has other contents than the published 1965 frames of 28×20: SHA-256 {digest}, expected "
            f"{_FREY_SHA256}"
        )
    return _split("frey-faces", images, None, every=10, levels=256)


def _split(name: str, images: np.ndarray, labels: np.ndarray | None, *, every: int, levels: int) -> tuple[Data, Data]:
    """Every ``every``-th image is held out."""
    held_out = np.arange(len(images)) % every == 0
    return tuple(  # type: ignore[return-value]
        _images(name, images[rows], None if labels is None else labels[rows], levels) for rows in (~held_out, held_out)
    )


def _images(name: str, images: np.ndarray | Tensor, labels: np.ndarray | Tensor | None, levels: int) -> Data:
    x = torch.as_tensor(images).to(torch.get_default_dtype()) / (levels - 1)
    return Data(x, None if labels is None else torch.as_tensor(labels).long(), name=name, num_levels=levels)


_TITLES = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist"}


def _places(folder: Path, kind: str) -> tuple[Path, ...]:
    """Where the IDX files may lie, torchvision's layout first; Debian has the four files in one folder."""
    return folder / kind / "raw", folder / kind, folder


def _idx_files(folder: Path, kind: str) -> list[Path] | None:
    """The four IDX files, plain or compressed, of the first place that has them all."""
    for place in _places(folder, kind):
        found = [_first_file(place, name) for name in _IDX_SHA256[kind]]
        if None not in found:
            return found  # type: ignore[return-value]
    return None


def _first_file(place: Path, name: str) -> Path | None:
    """Plain or compressed; some copies spell ``train-images.idx3-ubyte``."""
    spelled = (place / f"{stem}{end}" for stem in (name, name.replace("-idx", ".idx")) for end in ("", ".gz"))
    return next((file for file in spelled if file.is_file()), None)


def _idx(folder: Path, kind: Literal["MNIST", "FashionMNIST"]) -> tuple[Data, Data]:
    files = _idx_files(folder, kind)
    if files is None:
        _download(folder, kind)
        files = _idx_files(folder, kind)
    if files is None:
        raise FileNotFoundError(f"{_TITLES[kind]}: torchvision downloaded other files than {', '.join(_IDX_SHA256[kind])}")
    arrays = [torch.from_numpy(_read_idx(file, digest)) for file, digest in zip(files, _IDX_SHA256[kind].values(), strict=True)]
    return tuple(_images(_TITLES[kind], arrays[i], arrays[i + 1], 256) for i in (0, 2))  # type: ignore[return-value]


def _download(folder: Path, kind: str) -> None:
    """Let torchvision download to ``folder/kind/raw``; folders that a failed download made are removed again."""
    made = [part for part in (folder / kind / "raw", folder / kind, folder, *folder.parents) if not part.exists()]
    try:
        from torchvision import datasets

        getattr(datasets, kind)(folder, download=True)
    except Exception as error:  # whatever the network does; or torchvision is of another build than torch
        for part in made:
            with suppress(OSError):  # it holds what was downloaded
                part.rmdir()
        places = ", ".join(map(str, _places(folder, kind)))
        raise FileNotFoundError(
            f"{_TITLES[kind]}: none of the folders {places} has all of {', '.join(_IDX_SHA256[kind])}, plain or as .gz, and "
            f"the download failed ({(str(error) or type(error).__name__).splitlines()[0]}); put the four files in one of "
            "them, or name their folder by data_dir or PYRO_VAE_DATA"
        ) from error


def _read_idx(path: Path, sha256: str) -> np.ndarray:
    """The bytes of a published IDX file, plain or compressed, in the shape of its header.

    :raises ValueError: for any other content; no more than the largest published file is decompressed.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_IDX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .gz file ({error}); delete it and download it again") from error
    if len(content) > _IDX_BYTES:
        raise ValueError(
            f"{path} is larger than any of the published files, {_IDX_BYTES} bytes; delete it and download it again"
        )
    kind, rank = struct.unpack(">xxBB", content[:4].rjust(4, b"\1"))
    if content[:2] != b"\0\0" or kind != 8 or not 1 <= rank <= 3:
        raise ValueError(f"{path} is not an IDX file: it begins with {content[:4].hex(' ')}, expected 00 00 08 01 … 03")
    sizes = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank].rjust(4 * rank, b"\0"))
    if len(content) != 4 + 4 * rank + math.prod(sizes):
        raise ValueError(
            f"{path} is cut short or too long: its header promises {sizes} bytes, it holds {len(content)} bytes in all; "
            "delete it and download it again"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        other = next((_TITLES[k] for k, sums in _IDX_SHA256.items() if digest in sums.values()), None)
        remedy = f"it is of {other}: load that, or name another folder" if other else "delete it and download it again"
        raise ValueError(f"{path} has other contents than the published file: SHA-256 {digest}, expected {sha256}; {remedy}")
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * rank).reshape(sizes)
