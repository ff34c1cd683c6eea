"""Files larger than memory, read by blocks."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import infer
from pyro_vae.data import FileStream, as_batches
from tests.faults import small

N = 1010  # the rows of ``small.make_data``, with another one as the first column


@pytest.fixture
def rows():
    return torch.arange(N).double().numpy()


@pytest.fixture(params=["parquet", "hdf5"])
def path(request, tmp_path, rows):
    """Numbered rows, and 4 columns of data, in blocks of 50 rows."""
    return write(tmp_path / f"x.{request.param}", np.column_stack([rows, small.make_data().numpy()]))


def write(path, x, block=50):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({f"c{i}": column for i, column in enumerate(x.T)})
        parquet.write_table(table, path, row_group_size=block)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=x, chunks=(block, x.shape[1]))
    return path


def numbers(stream):
    return torch.cat([batch[:, 0] for batch in stream]).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 50, 128, N, 5000])
@pytest.mark.parametrize("num_blocks", [1, 3, 100])
def test_an_epoch_has_each_row_once_in_full_minibatches(path, batch_size, num_blocks):
    stream = FileStream(path, batch_size, num_blocks=num_blocks)
    sizes = [len(batch) for batch in stream]
    assert sizes == [batch_size] * (N // batch_size) + [N % batch_size] * (N % batch_size > 0)
    assert sorted(numbers(stream)) == list(range(N))
    assert stream.num_data == N


def test_the_order_depends_on_seed_and_epoch_only(path):
    stream, other = FileStream(path, seed=1), FileStream(path, seed=2)
    first = numbers(stream)
    assert numbers(stream) == first != numbers(other)
    stream.set_epoch(1)
    assert numbers(stream) != first
    stream.set_epoch(0)
    assert numbers(stream) == first


def test_rows_of_the_blocks_in_memory_are_mixed(path):
    """The expected correlation of position and row is 0 if all blocks are in memory: its standard error is
    1/√N. Without shuffling it is 1."""
    mixed = torch.tensor(numbers(FileStream(path, num_blocks=1000)))
    positions = torch.arange(N).double()
    correlation = torch.corrcoef(torch.stack([mixed, positions]))[0, 1]
    assert abs(correlation) < 4 / N**0.5
    assert numbers(FileStream(path, shuffle=False)) == list(range(N))


def test_training_and_evaluation_read_the_file(path):
    class Columns:
        """The stream without its first column."""

        def __init__(self, stream):
            self.stream, self.num_data = stream, stream.num_data
            self.in_data_order, self.set_epoch = stream.in_data_order, stream.set_epoch

        def __iter__(self):
            return (batch[:, 1:] for batch in self.stream)

    vae, x = small.make_vae(), small.make_data()
    history = pv.fit(vae.model, vae.guide, Columns(FileStream(path, 100)), num_epochs=3)
    assert history.epochs[-1].train.elbo > history.epochs[0].train.elbo + 0.5
    in_order = Columns(FileStream(path, 100, shuffle=False))
    by_file = pv.evaluate(vae.model, vae.guide, in_order).elbo
    assert torch.equal(by_file, pv.evaluate(vae.model, vae.guide, x, batch_size=100).elbo)
    with pytest.raises(ValueError, match="order of its own"):
        pv.evaluate(vae.model, vae.guide, Columns(FileStream(path)))


def test_ranks_read_different_blocks(path, monkeypatch):
    seen = []
    for rank in range(3):
        group = infer.Group.alone()
        group.rank, group.size = rank, 3
        monkeypatch.setattr("pyro_vae.data.stream.Group", lambda group=group: group)
        seen.append(numbers(FileStream(path, 64)))
        assert numbers(FileStream(path, 64, shuffle=False)) == list(range(N))
    assert sorted(row for rows in seen for row in rows) == list(range(N))


def test_each_pass_of_an_epoch_has_an_order_of_its_own(path):
    """The stream has 3 batches, so 2 epochs of 4 steps need 3 passes."""
    batches = as_batches(FileStream(path, 400), None, steps_per_epoch=4)
    seen = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen += [batch.args[0][:, 0].tolist() for batch in batches.epoch(shuffle=True)]
    passes = [[*seen[start], *seen[start + 1], *seen[start + 2]] for start in (0, 3)]
    assert all(sorted(rows) == list(range(N)) for rows in passes)
    assert passes[0] != passes[1] != seen[6] + seen[7]
    assert seen[6] != seen[0]


def test_columns_with_nulls_become_nan(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"a": [1, None], "b": [None, True]}), tmp_path / "nulls.parquet")
    (rows,) = FileStream(tmp_path / "nulls.parquet", shuffle=False)
    assert rows.isnan().tolist() == [[False, True], [True, False]]


def test_invalid_files_raise(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    h5py = pytest.importorskip("h5py")
    text = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"a": [1.0, 2.0], "b": ["u", "v"]}), text)
    with pytest.raises(ValueError, match=r"column 'b' has type string; expected numbers: pass columns="):
        FileStream(text)
    assert [batch.tolist() for batch in FileStream(text, columns=["a"], shuffle=False)] == [[[1.0], [2.0]]]
    with pytest.raises(ValueError, match="no column 'z'; it has a, b"):
        FileStream(text, columns=["z"])
    with pytest.raises(ValueError, match="one column or more, but got none"):
        FileStream(text, columns=[])
    twice = pyarrow.Table.from_arrays([pyarrow.array([1.0])] * 2, names=["a", "a"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="several columns with the name 'a'"):
        FileStream(tmp_path / "twice.parquet")
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file["x"] = np.ones((2, 2), np.longdouble)
    with pytest.raises(ValueError, match=f"type {np.dtype(np.longdouble)}; expected numbers"):
        FileStream(tmp_path / "long.h5")
    (tmp_path / "cut.parquet").write_bytes(text.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a complete \.parquet file"):
        FileStream(tmp_path / "cut.parquet")
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["a"], file["b"] = np.ones((3, 2)), np.array([b"u"])
    with pytest.raises(ValueError, match="datasets a, b; expected key="):
        FileStream(tmp_path / "two.h5")
    with pytest.raises(ValueError, match="expected numbers"):
        FileStream(tmp_path / "two.h5", key="b")
    empty = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.float32())}), empty)
    with pytest.raises(ValueError, match="has no rows"):
        FileStream(empty)
    missing = tmp_path / "missing.parquet"
    parquet.write_table(pyarrow.table({"a": [1.0, None]}), missing)
    vae = small.make_vae()
    with pytest.raises(ValueError, match="NaN or infinite"):
        pv.evaluate(vae.model, vae.guide, FileStream(missing, shuffle=False))
