"""Streams of batches: epochs, bounded epochs, evaluation in the order of the data, and clear errors."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.data.batches import as_batches, as_counted_batches, as_whole
from tests.support.fits import assert_same, data, run

N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


class Rows(IterableDataset):
    """A stream of rows without a length."""

    def __init__(self, x=X):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Restarting:
    """An iterable of batches."""

    def __init__(self, x=X, size=5):
        self.x, self.size = x, size

    def __iter__(self):
        yield from self.x.split(self.size)


class RowsInBatches(IterableDataset):
    def __iter__(self):
        return iter(X.split(5))


def generated():
    yield from X.split(5)


def endless():
    while True:
        yield from X.split(5)


KINDS = {
    "generator function": lambda: generated,
    "function": lambda: lambda: iter(X.split(5)),
    "iterable": Restarting,
    "IterableDataset": Rows,
    "loader": lambda: DataLoader(Rows(), 5, generator=torch.Generator()),
    "loader of batches": lambda: DataLoader(RowsInBatches(), batch_size=None),
    "numpy": lambda: lambda: (part.numpy() for part in X.split(5)),
    "frames": lambda: lambda: (pd.DataFrame(part.numpy()) for part in X.split(5)),
    "sparse": lambda: lambda: (part.to_sparse() for part in X.split(5)),
    "uneven": lambda: lambda: iter(X.split([7, 1, 15])),
}


def rows_of(epoch):
    return torch.cat([batch.args[0] for batch in epoch])


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_an_epoch_is_one_pass_in_order(make):
    batches = as_batches(make(), 5, num_data=N)
    assert (batches.num_rows, batches.in_data_order) == (N, True)
    for shuffle in (False, True, True, False):
        assert torch.equal(rows_of(batches.epoch(shuffle=shuffle)), X)
    assert torch.equal(as_whole(make(), N).args[0], X)
    if make is not KINDS["uneven"]:
        assert batches.num_batches == 5


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_bounded_epochs_continue_the_stream_and_restart_it_at_its_end(make):
    batches = as_batches(make(), 5, num_data=N, steps_per_epoch=3)
    first = next(batches.epoch(shuffle=False))  # another pass, which does not move the epochs
    sizes = [7, 1, 15] if make is KINDS["uneven"] else [5, 5, 5, 5, 3]
    expected = itertools.cycle(X.split(sizes))
    assert torch.equal(first.args[0], X[: sizes[0]])
    for _ in range(4):
        epoch = list(batches.epoch(shuffle=True))
        assert len(epoch) == batches.num_batches == 3
        assert torch.equal(rows_of(epoch), torch.cat(list(itertools.islice(expected, 3))))
    assert torch.equal(rows_of(batches.epoch(shuffle=False)), X)


def test_batches_of_tuples_and_dicts_are_arguments():
    c = torch.arange(float(N))
    (pair, *_) = as_batches(lambda: zip(X.split(5), c.split(5), strict=True), 5, num_data=N).epoch(
        shuffle=True
    )
    assert [part.shape for part in pair.args] == [(5, 4), (5,)]
    named = as_batches(lambda: ({"x": part, "n": 3} for part in X.split(5)), 5, num_data=N)
    (batch, *_) = named.epoch(shuffle=True)
    assert batch.kwargs["n"] == 3
    masked = X.clone()
    masked[7, 1] = torch.nan
    for batch in as_batches(
        lambda: ({"x": part, "mask": part.isfinite()} for part in masked.split(5)), 5, num_data=N
    ).epoch(shuffle=True):
        assert batch.kwargs["x"].isfinite().all()


def test_an_endless_stream_has_bounded_epochs_only():
    batches = as_batches(endless, 5, num_data=N, steps_per_epoch=9)
    assert len(list(batches.epoch(shuffle=True))) == 9
    for stream in (batches.epoch(shuffle=False), as_batches(endless, 5, num_data=N).epoch(shuffle=True)):
        with pytest.raises(
            ValueError, match=r"23 rows in a pass over the stream but got more.*steps_per_epoch"
        ):
            list(stream)
    with pytest.raises(ValueError, match="got more"):
        as_whole(endless, N)


class Exhausted:
    """Its second pass is empty."""

    def __init__(self):
        self.parts = list(X.split(5))

    def __iter__(self):
        parts, self.parts = self.parts, []
        yield from parts


def second_pass():
    batches = as_batches(Exhausted(), 5, num_data=N)
    return [list(batches.epoch(shuffle=True)) for _ in range(2)]


def missing_rows():
    return list(as_batches(generated, 5, num_data=N + 1).epoch(shuffle=True))


ERRORS = {
    "a generator": (lambda: as_batches(generated(), 5, num_data=N), "a generator can be read once only"),
    "an iterator": (lambda: as_batches(iter([X]), 5, num_data=N), "can be read once only.*__iter__"),
    "a function of one iterator": (
        lambda: as_batches(partial(next, iter([iter([X])] * 2)), 5, num_data=N),
        "can be read once only",
    ),
    "exhausted": (second_pass, "no batches when it is read again.*starts anew"),
    "no num_data": (lambda: as_batches(generated, 5), "type function, has no length.*pass num_data"),
    "no length": (lambda: as_batches(Rows(), 5), r"type Rows, has no length.*num_data.*__len__"),
    "loader without length": (lambda: as_batches(DataLoader(Rows(), 5), 5), "type Rows.*num_data"),
    "loader of batches": (
        lambda: as_batches(DataLoader(RowsInBatches(), None), 5),
        "cannot be counted.*num_data",
    ),
    "too few": (missing_rows, "expected 24 rows in a pass over the stream but got 23; pass num_data=23"),
    "too many": (
        lambda: list(as_batches(generated, 5, num_data=N - 1).epoch(shuffle=True)),
        "expected 22 rows.*got more.*num_data",
    ),
    "too few in bounded epochs": (
        lambda: list(as_batches(generated, 5, num_data=N - 1, steps_per_epoch=9).epoch(shuffle=True)),
        "expected 22 rows.*got 23; pass num_data=23",
    ),
    "empty": (
        lambda: list(as_batches(lambda: iter([]), 5, num_data=N).epoch(shuffle=True)),
        "the stream has no batches; expected one batch",
    ),
    "empty rows": (
        lambda: list(as_batches(lambda: iter([X[:0]]), 5, num_data=N).epoch(shuffle=True)),
        r"data, batch 0: there are no data: the shape is \(0, 4\)",
    ),
    "unequal rows": (
        lambda: list(as_batches(lambda: iter([(X, X[:3])]), 5, num_data=N).epoch(shuffle=True)),
        "data, batch 0: argument 1 has 3 rows but the first argument has 23",
    ),
    "other columns": (
        lambda: list(as_batches(lambda: iter([X[:20], X[20:, :3]]), 5, num_data=N).epoch(shuffle=True)),
        r"a row of batch 1 of the stream is argument 0: float32 \(1, 3\).*first batch is.*\(1, 4\).*pad",
    ),
    "other arguments": (
        lambda: list(as_batches(lambda: iter([X, (X, X)]), 5, num_data=2 * N).epoch(shuffle=True)),
        "a row of batch 1 of the stream is argument 0.*argument 1",
    ),
    "rows of unequal length": (
        lambda: list(
            as_batches(Rows([torch.ones(i + 1) for i in range(6)]), 3, num_data=6).epoch(shuffle=True)
        ),
        "differ in length.*pad",
    ),
    "a ragged batch": (
        lambda: list(as_batches(lambda: iter([[[1.0], [1.0, 2.0]]]), 5, num_data=2).epoch(shuffle=True)),
        "list of 1.*torch.tensor",
    ),
    "not batches": (
        lambda: list(as_batches(lambda: iter([1, 2]), 5, num_data=2).epoch(shuffle=True)),
        "data, batch 0: expected tensors or arrays of shape",
    ),
    "not an iterator": (lambda: as_batches(lambda: 3, 5, num_data=2), "a function does not yield batches"),
    "a function of arguments": (
        lambda: as_batches(lambda n: iter([X]), 5, num_data=2),
        "does not yield batches",
    ),
    "a non-finite row": (
        lambda: list(as_batches(lambda: iter([X, X.log()]), 5, num_data=2 * N).epoch(shuffle=True)),
        "data, batch 1: row 0 of 23 has NaN",
    ),
    "num_data of a tensor": (lambda: as_batches(X, 5, num_data=7), "num_data is 7 but the data have 23 rows"),
    "steps_per_epoch of a tensor": (
        lambda: as_batches(X, 5, steps_per_epoch=2),
        "23 rows, so an epoch has 5 steps; expected a stream",
    ),
    "steps_per_epoch of a loader": (
        lambda: as_batches(DataLoader(TensorDataset(X), 5), 5, steps_per_epoch=2),
        "expected a stream",
    ),
    "num_data of 0": (lambda: as_batches(generated, 5, num_data=0), "num_data: expected a whole number"),
    "more validation than training rows": (
        lambda: as_counted_batches(endless, 5, limit=50),
        "validation: the stream has more than 50 rows",
    ),
}


@pytest.mark.parametrize(("trial", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_invalid_streams_raise(trial, message):
    with pytest.raises(ValueError, match=message):
        trial()


def test_errors_of_the_stream_are_raised_unchanged():
    def broken():
        yield X
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(as_batches(broken, 5, num_data=N).epoch(shuffle=True))


def test_precision_is_checked_at_the_end_of_an_epoch():
    rows = 1e8 + torch.randn(N, 4, dtype=torch.double)
    for steps in (None, 3):
        batches = as_batches(lambda: iter(rows.split(5)), 5, num_data=N, steps_per_epoch=steps)
        batches.cast(torch.float32)
        with pytest.raises(ValueError, match="subtract its mean"):
            list(batches.epoch(shuffle=True))


def test_rows_of_a_validation_stream_are_counted():
    assert as_counted_batches(generated, 5, limit=100).num_rows == N
    assert as_counted_batches(Rows(), None, limit=100).num_rows == N
    assert as_counted_batches(X, 5, limit=1).num_rows == N


# --- verbs ---


def in_order():
    yield from data().split(20)


def test_a_fit_on_a_stream_equals_the_fit_on_a_loader_in_order_bitwise():
    options = {"num_epochs": 3, "compile": False}
    # torch draws the seed of workers from this generator and not from the global random state
    loader = DataLoader(TensorDataset(data()), 20, generator=torch.Generator())
    expected = run(x=lambda: loader, validation=data(33), **options)
    for stream, validation in (
        (in_order, lambda: iter(data(33).split(33))),
        (Restarting(data(), 20), Rows(data(33))),
    ):
        assert_same(run(x=lambda s=stream: s, num_data=107, validation=validation, **options), expected)


def test_epochs_may_be_bounded():
    """Six batches in a pass: two epochs of three steps are one pass."""
    parameters, one = run(x=lambda: in_order, num_data=107, num_epochs=2, validation=None, compile=False)
    half = run(
        x=lambda: in_order, num_data=107, num_epochs=4, steps_per_epoch=3, validation=None, compile=False
    )
    assert all(map(torch.equal, parameters, half[0]))
    assert len(half[1]) == 2 * len(one)


def test_an_endless_stream_trains_and_counts_num_data_in_the_loss():
    def noise():
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(20, 4, generator=generator)

    epochs = run(
        x=lambda: noise, num_data=10**6, steps_per_epoch=7, num_epochs=2, validation=None, compile=False
    )[1]
    assert len(epochs) == 2
    with pytest.raises(ValueError, match="got more"):
        run(x=lambda: noise, num_data=45, num_epochs=1, validation=None, compile=False)


def pair():
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
        conditionals.Normal(nets.MLP(4, (9,)), event_shape=2),
    )
    return vae.model, vae.guide


VERBS = {
    "evaluate": lambda x, **n: pv.evaluate(*pair(), x, batch_size=5, **n).elbo,
    "log_weights": lambda x, **n: pv.log_weights(*pair(), x, num_particles=3, **n),
    "importance": lambda x, **n: pv.evidence.importance(*pair(), x, num_particles=9, **n).log_evidence,
    "elbo": lambda x, **n: pv.evidence.elbo(*pair(), x, num_particles=9, **n).log_evidence,
    "diagnose": lambda x, **n: pv.diagnose(*pair(), x, num_particles=40, num_simulations=0, **n).pareto_k,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_verbs_return_the_results_of_a_stream_in_its_order(verb):
    expected = verb(X)
    assert len(expected.unique()) > N / 2
    for make in (KINDS["generator function"], KINDS["IterableDataset"], KINDS["loader"]):
        assert torch.equal(verb(make(), num_data=N), expected)
    with pytest.raises(ValueError, match="pass num_data"):
        verb(generated)
    with pytest.raises(ValueError, match="got more"):
        verb(endless, num_data=N)


# --- files, as in the documentation of fit ---


def test_record_batches_of_a_parquet_file_are_a_stream(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    pd.DataFrame(X.numpy(), columns=list("abcd")).to_parquet(path)

    def batches():
        for part in parquet.ParquetFile(path).iter_batches(5):
            yield np.stack([column.to_numpy() for column in part.columns], 1)

    read = as_batches(batches, None, num_data=parquet.read_metadata(path).num_rows)
    assert torch.equal(rows_of(read.epoch(shuffle=True)), X)


def test_blocks_of_an_hdf5_file_are_a_stream(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = X.numpy()

    def batches():
        with h5py.File(tmp_path / "x.h5") as file:
            for start in torch.randperm(5).tolist():
                yield file["x"][5 * start : 5 * start + 5]

    rows = rows_of(as_batches(batches, None, num_data=N).epoch(shuffle=True))
    assert not torch.equal(rows, X)
    assert torch.equal(rows.sort(0).values, X.sort(0).values)
