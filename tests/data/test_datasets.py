"""Data sets: contents, binarization, and damaged or missing files."""

import gzip
import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import datasets as data
from pyro_vae.data.datasets import Data, load


def test_digits_have_the_published_shape_and_levels():
    train, test = load("digits")
    assert (len(train), len(test), train.x.shape[1:]) == (1497, 300, (8, 8))
    assert train.x.min() == 0
    assert train.x.max() == 1
    assert set(train.labels.tolist()) == set(range(10))
    levels = train.levels().x
    assert set(levels.unique().tolist()) == set(range(17))
    torch.testing.assert_close(levels / 16, train.x)
    train_rows, test_rows = ({tuple(row) for row in part.x.flatten(1).tolist()} for part in (train, test))
    assert not train_rows & test_rows


def test_stochastic_binarization_redraws_each_epoch_and_fixes_the_test_set():
    train, test = load("digits", binarize="stochastic")
    first, second = (torch.cat(list(train.batches(100, shuffle=False))) for _ in range(2))
    for epoch in (first, second):
        assert set(epoch.unique().tolist()) == {0, 1}
    assert not torch.equal(first, second)
    assert torch.equal(test.x, load("digits", binarize="stochastic")[1].x)
    assert set(test.x.unique().tolist()) == {0, 1}
    # Bernoulli(grey): the mean of many draws is within five standard errors at every pixel
    mean = torch.stack([train.arguments(slice(0, 100))[0] for _ in range(400)]).mean(0)
    grey = train.x[:100]
    error = (grey * (1 - grey) / 400).sqrt()
    assert ((mean - grey).abs() <= 5 * error + 1e-6).all()


def test_fixed_leaves_the_random_state_unchanged():
    train, _ = load("digits", binarize="stochastic")
    state = torch.get_rng_state()
    fixed = train.fixed(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fixed.x, train.fixed(seed=3).x)
    assert not torch.equal(fixed.x, train.fixed(seed=4).x)


def test_threshold_is_at_one_half():
    grey = torch.tensor([[0.0, 0.5, 0.51, 1.0]])
    assert Data(grey, binarize="threshold").x.tolist() == [[0, 0, 1, 1]]


def test_ring_has_its_radius_and_noise():
    r = data.ring(20_000, radius=2.0, noise=0.1).x.double().norm(dim=1)
    assert abs(r.mean() - 2.0) < 5 * 0.1 / 20_000**0.5
    assert abs(r.std() - 0.1) < 5 * 0.1 / (2 * 20_000) ** 0.5


def test_to_keeps_integer_dtypes():
    train, _ = load("digits")
    moved = train.to(dtype=torch.double)
    assert (moved.x.dtype, moved.labels.dtype) == (torch.double, torch.long)
    assert train.levels().to(dtype=torch.double).x.dtype == torch.long


def test_mnist_has_the_published_shape(data_dir):
    train, test = load("mnist", data_dir=data_dir)
    assert (len(train), len(test), train.x.shape[1:], train.num_levels) == (60_000, 10_000, (28, 28), 256)
    assert (train.x.min(), train.x.max(), train.labels[:5].tolist()) == (0, 1, [5, 0, 4, 1, 9])


def test_frey_faces_have_the_published_shape(data_dir):
    train, test = load("frey-faces", data_dir=data_dir)
    assert (len(train) + len(test), train.x.shape[1:]) == (1965, (28, 20))
    assert 0 <= train.x.min() < train.x.max() <= 1


@pytest.fixture
def small_idx(monkeypatch):
    """The four files of a small Fashion-MNIST by name, and its images. Downloads fail."""
    from torchvision.datasets import MNIST

    def no_network(self):
        Path(self.raw_folder).mkdir(parents=True, exist_ok=True)
        raise RuntimeError("Error downloading: no network")

    monkeypatch.setattr(MNIST, "download", no_network)
    files, images = {}, np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for part, rows in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        shape = images[rows].shape
        files[f"{part}-images-idx3-ubyte"] = (
            bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + images[rows].tobytes()
        )
        files[f"{part}-labels-idx1-ubyte"] = (
            bytes([0, 0, 8, 1]) + struct.pack(">I", len(images[rows])) + bytes(range(shape[0]))
        )
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(data._IDX_SHA256, "FashionMNIST", sums)
    return files, images


@pytest.mark.parametrize("layout", [".", "FashionMNIST", "FashionMNIST/raw"])
@pytest.mark.parametrize("naming", ["", ".gz", "mixed", "dots"])
def test_idx_files_load_from_every_layout_plain_or_compressed(tmp_path, small_idx, layout, naming):
    files, images = small_idx
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    for i, (name, content) in enumerate(files.items()):
        if naming == ".gz" or (naming == "mixed" and i % 2):
            (tmp_path / layout / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / layout / (name.replace("-idx", ".idx") if naming == "dots" else name)).write_bytes(
                content
            )
    assert data.is_here("fashion-mnist", tmp_path)
    train, test = load("fashion-mnist", data_dir=tmp_path)
    torch.testing.assert_close(torch.cat([train.x, test.x]), torch.from_numpy(images).float() / 255)
    assert (train.labels.tolist(), test.labels.tolist()) == (list(range(8)), list(range(4)))


def test_incomplete_data_set_raises_with_the_missing_file(tmp_path, small_idx):
    for name, content in list(small_idx[0].items())[:3]:
        (tmp_path / name).write_bytes(content)
    assert not data.is_here("fashion-mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte, plain or as \.gz"):
        load("fashion-mnist", data_dir=tmp_path)


def test_files_of_another_data_set_raise_with_its_name(tmp_path, small_idx):
    for name, content in small_idx[0].items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="it belongs to fashion-mnist"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: gzip.compress(content)[:-20], "complete .gz"),
        (lambda content: content, "complete .gz"),
        (lambda content: gzip.compress(content)[:40] + b"\0\xff" * 20, "complete .gz"),
        (lambda content: gzip.compress(content) + b"more", "complete .gz"),
        (lambda content: gzip.compress(content[:-1]), "truncated"),
        (lambda content: gzip.compress(b"not an IDX file"), "not an IDX file"),
        (lambda content: gzip.compress(bytes(data._IDX_BYTES + 1)), "larger than"),
    ],
)
def test_damaged_gz_file_raises(tmp_path, damage, message):
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 5, 4) + random.Random(0).randbytes(140)
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(damage(content))
    with pytest.raises(ValueError, match=message) as error:
        data._read_idx(path, hashlib.sha256(content).hexdigest())
    assert str(path) in str(error.value)


def test_decompression_stops_at_the_size_of_the_largest_published_file(tmp_path, monkeypatch):
    sizes = []
    gzip_read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: sizes.append(n) or gzip_read(self, n))
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(2 * data._IDX_BYTES)))
    with pytest.raises(ValueError, match="larger than"):
        data._read_idx(path, "")
    assert sizes == [data._IDX_BYTES + 1]


def test_missing_files_raise_with_their_names_and_create_no_folder(tmp_path, small_idx):
    folder = tmp_path / "new" / "deep"
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw.*train-images-idx3-ubyte.*data_dir"):
        load("mnist", data_dir=folder)
    assert not (tmp_path / "new").exists()
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "notes.txt").write_text("unchanged")
    with pytest.raises(FileNotFoundError, match="no network"):
        load("mnist", data_dir=tmp_path)
    assert [file.name for file in (tmp_path / "MNIST").iterdir()] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match=r"frey_faces\.npz"):
        load("frey-faces", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_invalid_frey_faces_file_raises(tmp_path, content):
    (tmp_path / "frey_faces.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a \.npz file"):
        load("frey-faces", data_dir=tmp_path)


def test_frey_faces_file_with_other_contents_raises(tmp_path):
    np.savez(tmp_path / "frey_faces.npz", images=np.zeros((5, 28, 20), np.uint8))
    with pytest.raises(ValueError, match="SHA-256"):
        load("frey-faces", data_dir=tmp_path)


def test_mutated_idx_files_raise_with_the_path(tmp_path):
    rng = random.Random(0)
    original = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 5, 4) + rng.randbytes(140)
    path, digest = tmp_path / "images-idx3-ubyte", hashlib.sha256(original).hexdigest()
    path.write_bytes(original)
    data._read_idx(path, digest)
    for trial in range(100):
        mutant = bytearray(original)
        if trial % 3 == 0:
            mutant = mutant[: rng.randrange(len(original))]
        elif trial % 3 == 1:
            mutant[rng.randrange(len(original) if trial % 2 else 16)] ^= 1 << rng.randrange(8)
        else:
            mutant += rng.randbytes(rng.randrange(1, 50))
        path.write_bytes(mutant)
        with pytest.raises(ValueError, match="idx3-ubyte"):
            data._read_idx(path, digest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load("mnits"), "expected one of digits, mnist"),
        (lambda: load("digits", binarize="yes"), "binarize: expected one of"),
        (lambda: Data(torch.zeros(0, 3)), "no data"),
        (lambda: Data(torch.tensor([[0.0], [torch.nan]])), "row 1 of 2"),
        (lambda: Data(torch.zeros(3, 2), labels=torch.zeros(4)), "3 rows but labels"),
        (
            lambda: Data(torch.zeros(3, 2), torch.arange(3), label_names=("a", "b")),
            "2 label_names but labels",
        ),
        (lambda: Data(torch.full((3, 2), 1.7), binarize="stochastic"), "cannot be binarized"),
        (lambda: Data(torch.zeros(3, 2)).levels(), "num_levels"),
        (lambda: load("digits", binarize="stochastic")[0].levels(), "binarized"),
        (lambda: load("digits", binarize="stochastic")[1].levels(), "do not binarize"),
    ],
)
def test_invalid_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_work_with_a_torch_loader():
    train, _ = pv.load("digits")
    batch = next(iter(torch.utils.data.DataLoader(train, batch_size=7)))
    assert torch.equal(batch, train.x[:7])
    paired = train.given(train.labels)
    assert [part.shape for part in paired[:3]] == [(3, 8, 8), (3,)]
