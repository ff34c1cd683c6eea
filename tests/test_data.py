"""Data sets: contents, binarization, and files that are not what they should be."""

import hashlib
import random
import struct

import pytest
import torch

import pyro_vae as pv
from pyro_vae import data
from pyro_vae.data import Data, load


def test_digits_are_embedded():
    train, test = load("digits")
    assert (len(train), len(test), train.x.shape[1:]) == (1497, 300, (8, 8))
    assert train.x.min() == 0
    assert train.x.max() == 1
    assert set(train.labels.tolist()) == set(range(10))
    # 17 levels come back whole, and no image is in both sets
    levels = train.levels().x
    assert set(levels.unique().tolist()) == set(range(17))
    torch.testing.assert_close(levels / 16, train.x)
    rows = [{tuple(row) for row in part.x.flatten(1).tolist()} for part in (train, test)]
    assert not rows[0] & rows[1]


def test_stochastic_binarization_draws_anew_each_epoch_and_the_test_set_once():
    train, test = load("digits", binarize="stochastic")
    first, second = (torch.cat(list(train.batches(100, shuffle=False))) for _ in range(2))
    for epoch in (first, second):
        assert set(epoch.unique().tolist()) == {0, 1}
    assert not torch.equal(first, second)
    assert torch.equal(test.x, load("digits", binarize="stochastic")[1].x)
    assert set(test.x.unique().tolist()) == {0, 1}
    # the draws are Bernoulli(grey): their mean over many epochs within five standard errors, over all pixels
    mean = torch.stack([train.arguments(slice(0, 100))[0] for _ in range(400)]).mean(0)
    grey = train.x[:100]
    error = (grey * (1 - grey) / 400).sqrt()
    assert ((mean - grey).abs() <= 5 * error + 1e-6).all()


def test_fixed_leaves_the_random_state():
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


def test_to_keeps_whole_numbers():
    train, _ = load("digits")
    moved = train.to(dtype=torch.double)
    assert (moved.x.dtype, moved.labels.dtype) == (torch.double, torch.long)
    assert train.levels().to(dtype=torch.double).x.dtype == torch.long


def test_mnist(data_dir):
    train, test = load("mnist", data_dir=data_dir)
    assert (len(train), len(test), train.x.shape[1:], train.num_levels) == (60_000, 10_000, (28, 28), 256)
    assert (train.x.min(), train.x.max(), train.labels[:5].tolist()) == (0, 1, [5, 0, 4, 1, 9])


def test_frey_faces(data_dir):
    train, test = load("frey-faces", data_dir=data_dir)
    assert (len(train) + len(test), train.x.shape[1:]) == (1965, (28, 20))
    assert 0 <= train.x.min() < train.x.max() <= 1


def test_missing_files_are_named(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def no_network(self):
        raise RuntimeError("Error downloading: no network")

    monkeypatch.setattr(MNIST, "download", no_network)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*data_dir"):
        load("mnist", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"frey_faces\.npz"):
        load("frey-faces", data_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_a_frey_file_that_is_none(tmp_path, content):
    (tmp_path / "frey_faces.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"no \.npz file"):
        load("frey-faces", data_dir=tmp_path)


def test_a_frey_file_with_other_contents(tmp_path):
    import numpy as np

    np.savez(tmp_path / "frey_faces.npz", images=np.zeros((5, 28, 20), np.uint8))
    with pytest.raises(ValueError, match="SHA-256"):
        load("frey-faces", data_dir=tmp_path)


def test_one_hundred_mutated_idx_files(tmp_path):
    """None is accepted, and nothing but a ValueError that names the file comes out."""
    rng = random.Random(0)
    whole = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 5, 4) + rng.randbytes(140)
    path, digest = tmp_path / "images-idx3-ubyte", hashlib.sha256(whole).hexdigest()
    path.write_bytes(whole)
    data._check_idx(path, digest)
    for trial in range(100):
        mutant = bytearray(whole)
        if trial % 3 == 0:
            mutant = mutant[: rng.randrange(len(whole))]
        elif trial % 3 == 1:
            mutant[rng.randrange(len(whole) if trial % 2 else 16)] ^= 1 << rng.randrange(8)
        else:
            mutant += rng.randbytes(rng.randrange(1, 50))
        path.write_bytes(mutant)
        with pytest.raises(ValueError, match="idx3-ubyte"):
            data._check_idx(path, digest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load("mnits"), "expected one of digits, mnist"),
        (lambda: load("digits", binarize="yes"), "binarize: expected one of"),
        (lambda: Data(torch.zeros(0, 3)), "no data"),
        (lambda: Data(torch.tensor([[0.0], [torch.nan]])), "row 1 of 2"),
        (lambda: Data(torch.zeros(3, 2), labels=torch.zeros(4)), "3 rows but labels"),
        (lambda: Data(torch.full((3, 2), 1.7), binarize="stochastic"), "cannot be binarized"),
        (lambda: Data(torch.zeros(3, 2)).levels(), "num_levels"),
        (lambda: load("digits", binarize="stochastic")[0].levels(), "binarized"),
        (lambda: load("digits", binarize="stochastic")[1].levels(), "do not binarize"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_are_a_dataset_for_plain_torch():
    train, _ = pv.load("digits")
    batch = next(iter(torch.utils.data.DataLoader(train, batch_size=7)))
    assert torch.equal(batch, train.x[:7])
    paired = train.given(train.labels)
    assert [part.shape for part in paired[:3]] == [(3, 8, 8), (3,)]
