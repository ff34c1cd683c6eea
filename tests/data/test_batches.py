"""Minibatches and arguments of all types of data equal those of a dense tensor, or raise a clear error."""

import numpy as np
import pandas as pd
import polars as pl
import pyro
import pytest
import torch
from pyro import poutine
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_vae.data.arrays import SparseRows
from pyro_vae.data.batches import Batch, as_batches, as_whole, fitting
from pyro_vae.data.datasets import Data, load

N = 23


def sparse_normal(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * (x.abs() > 1)


def rows_of(batches):
    return torch.cat([batch.args[0] for batch in batches.epoch(shuffle=False)])


class StreamWithoutLength(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Stream(StreamWithoutLength):
    def __len__(self):
        return len(self.x)


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


# --- containers ---


def scipy_matrix(x, kind):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    return getattr(scipy_sparse, kind)(x.numpy())


CONTAINERS = {
    "numpy": lambda x: x.numpy(),
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "pandas": lambda x: pd.DataFrame(x.numpy()),
    "polars": lambda x: pl.DataFrame(x.numpy()),
    "scipy csr": lambda x: scipy_matrix(x, "csr_matrix"),
    "scipy coo array": lambda x: scipy_matrix(x, "coo_array"),
    "torch coo": lambda x: x.to_sparse(),
    "torch csr": lambda x: x.to_sparse_csr(),
    "torch csc": lambda x: x.to_sparse_csc(),
    "Data": Data,
    "Data of numpy": lambda x: Data(x.numpy()),
    "TensorDataset": TensorDataset,
    "Dataset": lambda x: Items(list(x)),
    "Subset": lambda x: Subset(TensorDataset(x), range(N)),
    "stream": Stream,
    "loader of a stream": lambda x: DataLoader(Stream(x), 5),
    "loader": lambda x: DataLoader(TensorDataset(x), 5),
    "shuffled loader": lambda x: DataLoader(TensorDataset(x), 5, shuffle=True),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # CSR support of torch is in beta
@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
@pytest.mark.parametrize("batch_size", [5, None])
def test_batches_of_every_container_equal_the_rows_of_the_tensor(make, batch_size):
    x = sparse_normal(N, 4)
    batches = as_batches(make(x), batch_size)
    assert batches.num_rows == N
    assert batches.in_data_order
    torch.testing.assert_close(rows_of(batches), x, rtol=0, atol=0)
    shuffled = torch.cat([batch.args[0] for batch in batches.epoch(shuffle=True)])
    torch.testing.assert_close(shuffled.sort(0).values, x.sort(0).values, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dia_matrix", "lil_matrix", "csc_array", "bsr_array"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_scipy_arguments_are_dense_and_keep_their_dtype(kind, dtype):
    x = (sparse_normal(7, 5) > 0).to(dtype)
    (dense,) = as_whole((scipy_matrix(x, kind),)).args
    expected = (
        x.to(torch.get_default_dtype()) if dtype == torch.float64 and dense.dtype == torch.float32 else x
    )
    torch.testing.assert_close(dense, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 3, 4)])
@pytest.mark.parametrize("dense_dims", [0, 1])
def test_sparse_rows_equal_dense_rows(shape, dense_dims):
    x = sparse_normal(*shape)
    rows = SparseRows.of(x.to_sparse(max(1, len(shape) - dense_dims)))
    index = torch.tensor([3, 3, 0, 8])
    assert (rows.shape, len(rows)) == (x.shape, 9)
    assert torch.equal(rows[index], x[index])
    assert torch.equal(rows[2:5], x[2:5])


def test_duplicate_sparse_entries_are_added():
    x = torch.sparse_coo_tensor([[1, 1, 0], [2, 2, 0]], [1.0, 2.0, 5.0], (3, 4), check_invariants=True)
    assert torch.equal(as_whole((x,)).args[0], x.to_dense())


def test_non_finite_sparse_rows_raise_with_the_row():
    x = sparse_normal(N, 4)
    x[17, 2] = torch.nan
    with pytest.raises(ValueError, match="row 17 of 23"):
        as_batches(x.to_sparse(), 5)


@pytest.mark.parametrize("library", [pd, pl], ids=["pandas", "polars"])
def test_frames_and_series_can_be_mixed_with_tensors(library):
    frame = library.DataFrame({"a": [1.0, 2.0, 3.0], "b": [True, False, True], "c": [4, 5, 6]})
    expected = torch.tensor([[1.0, 1.0, 4.0], [2.0, 0.0, 5.0], [3.0, 1.0, 6.0]])
    batch = as_whole({"x": frame, "y": frame["c"]})
    torch.testing.assert_close(batch.kwargs["x"].float(), expected)
    assert batch.kwargs["y"].tolist() == [4, 5, 6]
    assert [b.num_rows for b in as_batches((frame, torch.ones(3)), 2).epoch(shuffle=False)] == [2, 1]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"a": [1.0], "city": ["Oslo"]}), "'city' is not numeric"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), "'when' is not numeric"),
        (pd.DataFrame({"kind": pd.Categorical(["u"])}), "'kind' is not numeric"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), "row 1 of 2"),
        (pd.Series(["u", "v"], name="kind"), "'kind' is not numeric"),
        (pl.DataFrame({"a": [1.0], "city": ["Oslo"]}), "'city' is not numeric"),
        (pl.DataFrame({"a": [1, None]}), "row 1 of 2"),
        (pl.DataFrame({"a": [1]}).lazy(), r"\.collect\(\)"),
        (pd.DataFrame({}), "no columns"),
    ],
)
def test_invalid_frames_raise_with_the_column(frame, message):
    with pytest.raises(ValueError, match=message):
        as_batches(frame, 5)


def test_masked_arrays_raise_with_a_remedy_that_works():
    x = np.ma.masked_values([[1.0, -999.0], [2.0, 3.0]], -999.0)
    remedy = r"~np\.ma\.getmaskarray\(x\)"
    for data in (x, (x, torch.ones(2)), {"x": x}, Items(list(x))):
        with pytest.raises(ValueError, match=remedy):
            list(as_batches(data, 2).epoch(shuffle=False))
    with pytest.raises(ValueError, match=remedy):
        as_whole((x,))
    with pytest.raises(ValueError, match=remedy):
        Data(x)
    batch = as_batches({"x": x.filled(0), "mask": ~np.ma.getmaskarray(x)}, None).whole
    assert batch.kwargs["mask"].tolist() == [[True, False], [True, True]]
    # no masked entries
    assert rows_of(as_batches(np.ma.masked_values([[1.0]], -999.0), 1)).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.array([[1.0], [1.0, 2.0]], dtype=object), "Python objects"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([2**64 - 1], dtype=np.uint64), "range of int64"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "pad"),
        ([1.0, 2.0], "list of 2"),
        ((torch.ones(2), [1.0, 2.0]), "list of 2"),
        ((torch.ones(3), torch.ones(2)), "2 rows but the first argument has 3"),
        (None, "NoneType"),
        ("digits", "a str"),
    ],
)
def test_invalid_data_raise_with_their_type(data, message):
    with pytest.raises(ValueError, match=message):
        as_batches(data, 5)


def test_errors_are_short_for_large_data():
    x = torch.arange(10_000.0)
    bad = x.clone()
    bad[77] = torch.nan
    trials = [
        lambda: as_batches(list(x.tolist()), 5),
        lambda: as_batches((bad, x), 5),
        lambda: as_batches({"x": x.tolist()}, 5),
        lambda: as_batches(object(), 5),
        lambda: as_batches(pd.DataFrame({"a": ["x" * 50] * 1000}), 5),
        lambda: fitting(Batch((x,), {"y": x}), lambda x, c: None),
        lambda: Data(x * 1.0, binarize="threshold"),
    ]
    for trial in trials:
        with pytest.raises(ValueError, match=r"^.{10,400}$"):
            trial()


# --- casts ---


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32])
def test_small_integers_are_cast_to_int64_in_every_container(dtype):
    x = torch.tensor([[100], [127]], dtype=torch.int64).to(dtype)
    for data in (x, TensorDataset(x), DataLoader(TensorDataset(x), 2), Data(x)):
        batches = as_batches(data, 2)
        batches.cast(torch.float32)
        (part,) = next(iter(batches.epoch(shuffle=False))).args
        assert part.dtype == torch.int64
        assert (part + part).tolist() == [[200], [254]]


def test_cast_changes_floating_tensors_only():
    packed = pack_sequence([torch.ones(3, 2, dtype=torch.double), torch.ones(2, 2, dtype=torch.double)])
    batch = Batch(
        (torch.ones(2, dtype=torch.double), packed, [torch.ones((), dtype=torch.double)], 3),
        {"m": torch.ones(2).bool()},
    )
    cast = batch.cast(torch.float32)
    assert cast.args[0].dtype == cast.args[1].data.dtype == cast.args[2][0].dtype == torch.float32
    assert (cast.args[1].batch_sizes.dtype, cast.args[3], cast.kwargs["m"].dtype) == (
        torch.int64,
        3,
        torch.bool,
    )
    assert cast.cast(torch.float32) is cast
    assert batch.cast(None) is batch


def normal_doubles(n=200, seed=0):
    return torch.randn(n, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def test_cast_allows_rounding_that_keeps_rows_distinct():
    x = normal_doubles()
    x[:, 1] = 1.0  # a constant column
    x[:, 2] = 1 + 1e-16 * x[:, 2]  # constant up to rounding errors
    for offset in (0, 1, 1000):
        batches = as_batches(x + offset, 50)
        batches.cast(torch.float32)
        torch.testing.assert_close(rows_of(batches), (x + offset).float(), rtol=0, atol=0)
        assert batches.whole.args[0].dtype == torch.float32
    as_batches(x[:1] + 1e8, None).cast(torch.float32)  # a single row is constant
    as_batches(x, None).cast(torch.bfloat16)


PRECISION_LOSSES = {
    "offset": (lambda x: x + 1e8, "column 0 of argument 0.*subtract its mean"),
    "one column": (lambda x: x + torch.tensor([0, 0, -3e7]), "column 2 of argument 0.*subtract its mean"),
    "overflow": (lambda x: x * 1e40, "column 0 of argument 0.*largest number is 3.4e\\+38.*rescale"),
    "underflow": (lambda x: x * 1e-45, "column 0 of argument 0.*underflow.*rescale"),
}


@pytest.mark.parametrize(("transform", "message"), PRECISION_LOSSES.values(), ids=PRECISION_LOSSES.keys())
def test_cast_raises_if_rows_become_equal(transform, message):
    message += r".*\.double\(\)"
    x = transform(normal_doubles())
    with pytest.raises(ValueError, match=message):
        as_whole((x,)).check_cast(torch.float32)
    for data in (x, TensorDataset(x), Data(x), x.to_sparse()):
        batches = as_batches(data, 50)
        with pytest.raises(ValueError, match=message):
            batches.cast(torch.float32)
        batches.cast(torch.double)
        torch.testing.assert_close(rows_of(batches), x, rtol=0, atol=0)
    for data in (
        Items(list(x)),
        DataLoader(TensorDataset(x), 50, shuffle=True),
        DataLoader(TensorDataset(x), 50),
        Stream(x),
    ):
        batches = as_batches(data, 50)
        batches.cast(torch.float32)
        with pytest.raises(ValueError, match=message):
            list(batches.epoch(shuffle=True))


def test_precision_loss_in_a_shuffled_loader_raises_before_the_first_batch():
    batches = as_batches(DataLoader(TensorDataset(normal_doubles() + 1e8), 50, shuffle=True), None)
    batches.cast(torch.float32)
    with pytest.raises(ValueError, match="subtract its mean"):
        next(iter(batches.epoch(shuffle=True)))


@pytest.mark.parametrize("size", [50, 200])
def test_precision_check_includes_batches_before_the_cast(size):
    batches = as_batches(DataLoader(TensorDataset(normal_doubles() + 1e8), size), None)
    epoch = batches.epoch(shuffle=False)
    next(epoch)
    batches.cast(torch.float32)
    with pytest.raises(ValueError, match="subtract its mean"):
        list(epoch)


def test_consecutive_rows_may_be_close_to_each_other():
    days = (2.45e6 + torch.arange(8000, dtype=torch.double)).unsqueeze(1)  # a batch spans 50 days
    for data in (days, DataLoader(TensorDataset(days), 50)):
        batches = as_batches(data, 50)
        batches.cast(torch.float32)
        assert len(rows_of(batches)) == 8000


# --- loaders ---


def test_unshuffled_epoch_of_a_random_sampler_has_all_rows_in_order():
    x = torch.arange(float(N))
    data = TensorDataset(x)
    loaders = [
        DataLoader(data, 5, shuffle=True),
        DataLoader(data, 5, shuffle=True, drop_last=True),
        DataLoader(data, 5, sampler=RandomSampler(data, generator=torch.Generator())),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 5, drop_last=True)),
        DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 5, drop_last=False)),
        DataLoader(data, 5, shuffle=True, collate_fn=lambda rows: torch.stack([row for (row,) in rows])),
    ]
    for loader in loaders:
        batches = as_batches(loader, None)
        assert batches.in_data_order
        assert batches.num_rows == N
        assert torch.equal(rows_of(batches), x)
        assert not torch.equal(next(iter(batches.epoch(shuffle=True))).args[0], x[:5])


def test_other_samplers_are_used_unchanged():
    x = torch.arange(float(N))
    data = TensorDataset(x)
    samplers = {
        "weighted": WeightedRandomSampler(torch.ones(N), N),
        "subset": SubsetRandomSampler(range(10)),
        "distributed": DistributedSampler(data, num_replicas=2, rank=0),
        "replacement": RandomSampler(data, replacement=True),
        "reversed": list(range(N))[::-1],
    }
    for name, sampler in samplers.items():
        batches = as_batches(DataLoader(data, 5, sampler=sampler), None)
        assert not batches.in_data_order, name
        assert batches.num_rows == len(sampler) == len(rows_of(batches)), name
    assert torch.equal(rows_of(batches), x.flip(0))


def test_num_rows_of_batch_samplers():
    data = TensorDataset(torch.arange(float(N)))
    subset = as_batches(
        DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(range(10)), 4, False)), None
    )
    assert subset.num_rows == 10
    lists = as_batches(DataLoader(data, batch_sampler=[[0, 1], [5], [7, 8, 9]]), None)
    assert lists.num_rows == 6
    assert rows_of(lists).tolist() == [0, 1, 5, 7, 8, 9]
    without_last = as_batches(DataLoader(data, 5, drop_last=True), None)
    assert (without_last.num_rows, len(rows_of(without_last)), without_last.in_data_order) == (20, 20, True)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(TensorDataset(torch.ones(3, 2)), 10, drop_last=True),
        lambda: DataLoader(TensorDataset(torch.ones(3, 2)), 10, drop_last=True, shuffle=True),
        lambda: DataLoader(TensorDataset(torch.ones(0, 2)), 10),
        lambda: DataLoader(TensorDataset(torch.ones(3, 2)), 10, sampler=SubsetRandomSampler([])),
        lambda: DataLoader(TensorDataset(torch.ones(3, 2)), batch_sampler=[]),
        lambda: DataLoader(Stream(torch.ones(0, 2)), 10),
        lambda: DataLoader(Stream(torch.ones(3, 2)), 10, drop_last=True),
    ],
)
def test_loader_without_batches_raises(loader):
    with pytest.raises(ValueError, match=r"no batches"):
        as_batches(loader(), None)


def test_empty_data_sets_raise():
    for data in (Items([]), Stream(torch.ones(0, 2)), TensorDataset(torch.ones(0, 2))):
        with pytest.raises(ValueError, match=r"empty|no data"):
            as_batches(data, 5)


def test_stream_without_length_raises_and_with_length_works():
    x = sparse_normal(N, 2)
    for data in (StreamWithoutLength(x), DataLoader(StreamWithoutLength(x), 5)):
        with pytest.raises(ValueError, match="__len__"):
            as_batches(data, 5)
    for data in (Stream(x), DataLoader(Stream(x), 5)):
        batches = as_batches(data, 5)
        assert (batches.num_rows, batches.num_batches) == (N, 5)
        assert torch.equal(rows_of(batches), x)


class StreamWithWrongLength(StreamWithoutLength):
    def __init__(self, x, n):
        super().__init__(x)
        self.n = n

    def __len__(self):
        return self.n


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("n", [20, 22, 24, 100])
def test_stream_with_wrong_length_raises_within_an_epoch(n):
    batches = as_batches(StreamWithWrongLength(torch.ones(N, 2), n), 5)
    with pytest.raises(ValueError, match=rf"{n} rows"):
        list(batches.epoch(shuffle=True))


def test_loader_without_batch_size_raises():
    x = torch.ones(N, 2)
    for loader in (DataLoader(Stream(x), batch_size=None), DataLoader(TensorDataset(x), batch_size=None)):
        with pytest.raises(ValueError, match="cannot be counted"):
            as_batches(loader, None)


@pytest.mark.parametrize(
    "load", [lambda d: d, lambda d: DataLoader(d, 3), lambda d: DataLoader(d, 3, shuffle=True)]
)
def test_rows_of_unequal_length_raise(load):
    for items in ([torch.ones(i + 1) for i in range(6)], [[1.0] * (i + 1) for i in range(6)]):
        with pytest.raises(ValueError, match=r"differ in length.*pad"):
            list(as_batches(load(Items(items)), 3).epoch(shuffle=False))


def test_dict_items_become_keyword_arguments():
    items = [{"x": torch.ones(2) * i, "y": float(i), "name": f"row {i}"} for i in range(7)]
    batches = as_batches(Items(items), 3)
    batches.cast(torch.float32)
    first = next(iter(batches.epoch(shuffle=False)))
    assert first.kwargs["x"].shape == (3, 2)
    assert first.kwargs["y"].dtype == torch.float32
    assert fitting(first, lambda x, y: None).kwargs.keys() == {"x", "y"}


def test_subclass_of_tensor_dataset_is_read_by_item():
    class Doubled(TensorDataset):
        def __getitem__(self, i):
            return tuple(2 * part for part in super().__getitem__(i))

    x = sparse_normal(N, 2)
    assert torch.equal(rows_of(as_batches(Doubled(x), 5)), 2 * x)


# --- arguments without rows ---


def test_nested_arguments_are_allowed_in_full_batches_only():
    sequences = [torch.randn(t, 2) for t in (4, 3, 2)]
    packed = pack_sequence(sequences)
    for data, n in (
        (packed, 3),
        (sequences, 3),
        ((packed, torch.ones(3)), 3),
        ({"x": packed, "n": 7}, 3),
        ((sequences,), 3),
    ):
        for size in (None, 3, 100):
            batches = as_batches(data, size)
            (batch,) = batches.epoch(shuffle=True)
            assert batch.num_rows == batches.num_rows == n
            assert next(iter(batch.named.values())) in (packed, sequences)
        with pytest.raises(ValueError, match=r"batch_size=None.*pad"):
            as_batches(data, 2)
    batch = as_whole((packed, torch.ones(3), 5, [torch.tensor(4), torch.tensor(3)]))
    assert batch.args[0] is packed
    assert batch.args[2] == 5
    assert batch.rows(slice(0, 3)) is batch
    with pytest.raises(ValueError, match="a PackedSequence of 3"):
        batch.first(2)
    with pytest.raises(ValueError, match="NaN"):
        as_whole((pack_sequence([torch.tensor([1.0, torch.nan])]),))


def test_arguments_without_rows_are_in_every_minibatch():
    batches = as_batches((torch.arange(6.0), 3, "linear", None, torch.tensor(2.0)), 4)
    for batch in batches.epoch(shuffle=False):
        assert batch.args[1:4] == (3, "linear", None)
        assert batch.args[4] == 2
    assert batch.num_rows == 2
    assert batches.whole.first(2).args[0].tolist() == [0, 1]


# --- missing entries ---


def loader_of_dicts(columns):
    return DataLoader(
        Items([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]), 2
    )


@pytest.mark.parametrize("make", [dict, loader_of_dicts])
def test_non_finite_entries_are_zero_under_the_mask_and_raise_elsewhere(make):
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 4.0], [5.0, 6.0]])
    batches = as_batches(make({"x": x, "mask": x.isfinite()}), 2)
    filled = torch.cat([batch.kwargs["x"] for batch in batches.epoch(shuffle=False)])
    assert filled.tolist() == [[1, 0], [0, 4], [5, 6]]
    with pytest.raises(ValueError, match="row 1 of"):
        list(as_batches(make({"x": x, "mask": ~x.isnan()}), 2).epoch(shuffle=False))
    assert x[0, 1].isnan()  # the caller's tensor is unchanged


def test_mask_may_have_the_first_dimensions_only():
    x = torch.ones(3, 4, 2)
    x[1, 2] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    assert as_whole({"x": x, "mask": mask}).kwargs["x"][1, 2].tolist() == [0, 0]
    for other in ({"seen": mask}, {"mask": mask.float()}, {"mask": mask[:, :2]}, {}):
        with pytest.raises(ValueError, match="row 1 of 3"):
            as_whole({"x": x} | other)


# --- arguments of programs ---

X = torch.ones(3)
CUTS = [
    (lambda x: None, lambda x: None, ("x",), {}, 1, set()),
    (lambda x: None, lambda x: None, ("x", "y"), {}, 1, set()),
    (lambda x: None, lambda x: None, (), {"x", "label"}, 0, {"x"}),
    (lambda x: None, lambda x: None, ("x",), {"label"}, 1, set()),
    (lambda x, y=None: None, lambda x, y=None: None, ("x", "y", "z"), {}, 2, set()),
    (lambda x: None, lambda *args, **kwargs: None, ("x", "y"), {"label"}, 1, set()),
    (lambda *args, **kwargs: None, lambda *args, **kwargs: None, ("x", "y"), {"label"}, 2, {"label"}),
    (lambda x, *, mask=None: None, lambda x, *, mask=None: None, ("x",), {"mask", "label"}, 1, {"mask"}),
    (lambda: None, lambda: None, ("x",), {}, 0, set()),
]


@pytest.mark.parametrize(("model", "guide", "args", "kwargs", "num_args", "names"), CUTS)
def test_arguments_that_no_program_takes_are_dropped(model, guide, args, kwargs, num_args, names):
    cut = fitting(Batch(tuple(X for _ in args), dict.fromkeys(kwargs, X)), model, guide)
    assert (len(cut.args), set(cut.kwargs)) == (num_args, names)
    model(*cut.args, **cut.kwargs)
    guide(*cut.args, **cut.kwargs)


@pytest.mark.parametrize(
    ("model", "guide", "batch", "message"),
    [
        (lambda x, c: None, lambda x, c: None, Batch((X,), {}), r"model.*'c'.*argument 0: float32 \(3,\)"),
        (lambda x, c: None, lambda x, c: None, Batch((), {"x": X, "label": X}), r"model.*'c'.*label"),
        (lambda x: None, lambda x, c: None, Batch((X,), {}), "guide.*'c'"),
        (lambda x: None, lambda x: None, Batch((X,), {"x": X}), "model.*'x' both by position and by name"),
        (lambda x, c=None: None, lambda x: None, Batch((X, X), {}), "guide.*expected the same arguments"),
        (
            lambda x, c=None: None,
            lambda x: None,
            Batch((), {"x": X, "c": X}),
            "guide.*expected the same arguments",
        ),
    ],
)
def test_mismatched_arguments_raise_with_the_program_and_argument(model, guide, batch, message):
    with pytest.raises(ValueError, match=message):
        fitting(batch, model, guide)


def test_modules_and_handlers_are_cut_by_their_forward_signature():
    class Model(pyro.nn.PyroModule):
        def forward(self, x):
            return x

    batch = Batch((X, X), {"label": X})
    for model in (Model(), poutine.scale(lambda x: x, scale=2.0), poutine.block(Model().forward)):
        assert len(fitting(batch, model).args) == 1


def test_like_keeps_the_arguments_of_the_other_batch():
    batch = Batch((X, X), {"a": X, "b": X})
    assert batch.like(batch) is batch
    cut = batch.like(Batch((X,), {"b": X}))
    assert (len(cut.args), set(cut.kwargs)) == (1, {"b"})


# --- Data ---


def test_binarization_of_integers_bools_and_arrays():
    ones = np.array([[0, 1], [1, 1]])
    for dtype in (np.uint8, np.bool_, np.int64, np.float32):
        for binarize in ("stochastic", "threshold"):
            data = Data(ones.astype(dtype), binarize=binarize, labels=np.array([1, 2]))
            assert data[:].tolist() == ones.tolist()
            assert data[:].dtype == torch.get_default_dtype()
            assert isinstance(data.labels, torch.Tensor)
            (batch,) = as_batches(data, None).epoch(shuffle=False)
            assert batch.args[0].tolist() == ones.tolist()
    assert Data(torch.tensor([[3, 7]])).x.dtype == torch.int64
    with pytest.raises(ValueError, match="cannot be binarized"):
        Data(np.array([[255]], np.uint8), binarize="stochastic")
    with pytest.raises(ValueError, match="list"):
        Data([1.0, 2.0])
    assert SequentialSampler(Data(pd.DataFrame({"a": [1.0, 2.0]}))).data_source.x.tolist() == [[1], [2]]


def test_as_whole_concatenates_all_rows_in_order():
    x, c = torch.randn(7, 3), torch.arange(7)
    data = TensorDataset(x, c)
    for source in (
        (x, c),
        data,
        DataLoader(data, batch_size=3),
        DataLoader(data, batch_size=3, shuffle=True),
    ):
        batch = as_whole(source)
        assert torch.equal(batch.args[0], x)
        assert torch.equal(batch.args[1], c)
        assert as_whole(batch) is batch
    with pytest.raises(ValueError, match="an order of its own"):
        as_whole(DataLoader(data, 3, sampler=SubsetRandomSampler(range(7))))


def test_as_whole_binarizes_stochastic_data_once():
    train, _ = load("digits", binarize="stochastic")
    assert torch.equal(as_whole(train).args[0], as_whole(train).args[0])
