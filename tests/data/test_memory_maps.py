"""A memory-mapped array is used in place, and its minibatches and fits equal those of the array in memory."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError
from pyro_vae.data import batches as batches_module
from pyro_vae.data.arrays import DiskRows
from pyro_vae.data.batches import as_batches, as_whole, prefetched
from pyro_vae.infer.resume import CheckpointManager
from tests.support.fits import assert_same, data, run, run_until_step

N = 23
DTYPES = ["f4", "f8", "f2", ">f4", "u1", "i2", "u2", "u4", "u8", "i8", "?"]


def mapped(folder, array, name="x"):
    np.save(Path(folder, f"{name}.npy"), array)
    return np.load(Path(folder, f"{name}.npy"), mmap_mode="r")


def values(shape, dtype="f4", seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x > 0 if dtype == "?" else 50 + 20 * x).astype(dtype)


@pytest.fixture(params=["prefetch", "no prefetch"])
def prefetch(request, monkeypatch):
    if request.param == "no prefetch":
        monkeypatch.setattr(batches_module, "prefetched", lambda items: items)


def epochs(data, batch_size, dtype=torch.float32):
    """Two shuffled epochs and one in data order."""
    torch.manual_seed(0)
    batches = as_batches(data, batch_size)
    batches.cast(dtype)
    return [
        [part for batch in batches.epoch(shuffle=shuffle) for part in batch.leaves()]
        for shuffle in (True, True, False)
    ]


# --- minibatches ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(N,), (N, 4), (N, 3, 2), (N, 1, 2, 3)], ids=len)
def test_minibatches_equal_those_in_memory(tmp_path, prefetch, shape, dtype):
    x = values(shape, dtype)
    for batch_size in (5, N):
        disk, memory = (epochs(each, batch_size) for each in (mapped(tmp_path, x), x))
        for parts in zip(disk, memory, strict=True):
            for a, b in zip(*parts, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


VIEWS = {
    "every other row": lambda m: m[::2],
    "in reverse": lambda m: m[::-1],
    "columns": lambda m: m[:, 1:3],
    "transposed": lambda m: m.T,
    "an ndarray": np.asarray,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_of_a_memory_map_are_used_in_place(tmp_path, view):
    x = values((N, 4))
    m = view(mapped(tmp_path, x))
    batches = as_batches(m, 5)
    assert isinstance(batches.source.args[0], DiskRows)
    assert np.shares_memory(batches.source.args[0].array, m)
    for a, b in zip(epochs(m, 5)[0], epochs(view(x), 5)[0], strict=True):
        assert torch.equal(a, b)


def test_memory_map_of_a_raw_file_and_computed_arrays(tmp_path):
    x = values((N, 4))
    x.tofile(tmp_path / "x")
    raw = np.memmap(tmp_path / "x", "f4", "r", shape=x.shape)
    assert torch.equal(as_whole(raw).args[0], torch.from_numpy(x))
    for computed in (raw * 2, raw.astype("f8"), raw[[1, 2]]):  # they are in memory
        assert isinstance(as_batches(computed, 5).source.args[0], torch.Tensor)


FORMS = {
    "tuple": lambda x, c, mask: (x, c),
    "tuple of two maps": lambda x, c, mask: (x, mask),
    "dict": lambda x, c, mask: {"x": x, "c": c},
    "mask": lambda x, c, mask: {"x": x, "mask": mask},
    "number": lambda x, c, mask: (x, 3, "linear", torch.tensor(2.0)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_containers_may_mix_arrays_on_disk_and_in_memory(tmp_path, prefetch, form):
    x, c = values((N, 4)), torch.arange(float(N))
    mask = values((N, 4), "?", 1)
    x[~mask] = np.nan if form is FORMS["mask"] else 0.0
    x_disk, mask_disk = mapped(tmp_path, x), mapped(tmp_path, mask, "mask")
    memory = epochs(form(x, c, mask), 5)
    for parts in ((x_disk, c, mask_disk), (x, c, mask_disk), (x_disk, c, torch.from_numpy(mask))):
        for a, b in zip(epochs(form(*parts), 5), memory, strict=True):
            assert all(map(torch.equal, a, b))
            assert len(a) == len(b)


def test_batches_are_copies(tmp_path):
    x = values((N, 4))
    m = mapped(tmp_path, x)
    for batch in as_batches(m, 5).epoch(shuffle=False):
        batch.args[0].zero_()
    assert np.array_equal(m, x)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_non_finite_row_raises_when_it_is_taken(tmp_path, prefetch, dtype):
    x = values((N, 4), dtype)
    x[17, 2] = np.nan
    m = mapped(tmp_path, x)
    taken, epoch = [], as_batches(m, 5).epoch(shuffle=True)
    with pytest.raises(ValueError, match=r"data: row 17 of 23 has NaN.*in this minibatch.*mask"):
        taken += epoch  # extended by all batches before the error
    with pytest.raises(ValueError, match="data, c: row 17 of 23"):
        list(as_batches({"x": torch.ones(N), "c": m}, 5).epoch(shuffle=False))
    with pytest.raises(ValueError, match="row 17 of 23"):
        as_whole(m)
    assert not any(batch.args[0].isnan().any() for batch in taken)


def test_large_finite_entries_are_allowed(tmp_path):
    """Their sum is not finite."""
    x = np.full((N, 4), 3e38, "f4")
    assert len(list(as_batches(mapped(tmp_path, x), 5).epoch(shuffle=False))) == 5
    as_batches(x, 5)


@pytest.mark.parametrize(
    ("transform", "message"),
    [(lambda x: x + 1e8, "subtract its mean"), (lambda x: x * 1e40, "largest number")],
)
def test_cast_raises_if_rows_become_equal(tmp_path, monkeypatch, transform, message):
    monkeypatch.setattr("pyro_vae.data.arrays._BLOCK_ELEMENTS", 64)  # several blocks
    m = mapped(tmp_path, transform(np.random.default_rng(0).normal(size=(200, 3))))
    batches = as_batches(m, 50)
    with pytest.raises(ValueError, match=message):
        batches.cast(torch.float32)
    batches.cast(torch.double)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4), "f4"), "no data"),
        (np.ones((N, 2), "c8"), "complex64.*x.real"),
        (np.array([["a"]]), "dtype <U1"),
        (np.array([1, 2**64 - 1], np.uint64), "range of int64"),
    ],
)
def test_invalid_memory_maps_raise(tmp_path, array, message):
    if not array.size:
        array = np.memmap(tmp_path / "empty", "f4", "w+", shape=(3, 4))[3:]
    else:
        array = mapped(tmp_path, array)
    with pytest.raises(ValueError, match=message):
        list(as_batches(array, 2).epoch(shuffle=False))


def test_unequal_numbers_of_rows_raise(tmp_path):
    with pytest.raises(ValueError, match="argument 1 has 3 rows but the first argument has 23"):
        as_batches((mapped(tmp_path, values((N, 2))), torch.ones(3)), 5)


# --- prefetching ---


def threads():
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_prefetched_items_are_those_of_the_iterator_and_one_ahead():
    made = []
    items = (made.append(i) or i for i in range(5))
    for i, item in enumerate(prefetched(items)):
        assert item == i
        assert i + 1 <= len(made) <= i + 2
    assert made == list(range(5))
    assert not threads()


def test_an_error_of_the_thread_is_raised_here_after_the_items_before_it():
    def items():
        yield from range(3)
        raise OSError("disk")

    iterator = prefetched(items())
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk"):
        next(iterator)
    assert not threads()


def test_the_thread_ends_when_the_epoch_is_left_early(tmp_path):
    epoch = as_batches(mapped(tmp_path, values((N, 4))), 5).epoch(shuffle=True)
    next(epoch)
    assert threads()
    del epoch
    assert not threads()


# --- verbs ---


def bernoulli_pair():
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.MLP(2, (9,)), event_shape=4),
        conditionals.Normal(nets.MLP(4, (9,)), event_shape=2),
    )
    return vae.model, vae.guide, list(vae.parameters())


FITS = {
    "float32": (lambda x: x, {}),
    "float64": (lambda x: x.astype("f8"), {}),
    "big-endian": (lambda x: x.astype(">f4"), {}),
    "bytes": (lambda x: (x > 0).astype("u1"), {"pair": lambda: poisson_pair()}),
    "all at once": (lambda x: x, {"batch_size": None, "num_epochs": 20}),
    "graph": (lambda x: x, {"compile": "trace", "num_epochs": 2}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "graph" else name for name in FITS]
)
def test_a_fit_on_a_memory_map_equals_the_fit_in_memory_bitwise(tmp_path, prefetch, name):
    convert, options = FITS[name]
    x, options = convert(data().numpy()), {"num_epochs": 3, "compile": False} | options
    disk = run(x=lambda: mapped(tmp_path, x), validation=mapped(tmp_path, x[:33], "validation"), **options)
    assert_same(disk, run(x=lambda: x, validation=x[:33], **options))


def poisson_pair():
    """A pair that takes integers."""
    network = torch.nn.Linear(4, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp().unsqueeze(-1).expand(-1, 4)).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x.float()).squeeze(-1), 0.1))

    return model, guide, list(network.parameters())


def test_a_resumed_fit_on_a_memory_map_equals_the_uninterrupted_fit_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.data.arrays._BLOCK_ELEMENTS", 64)  # checksums by several blocks
    m = mapped(tmp_path, data().numpy())
    whole = run(x=lambda: m)
    for steps in (1, 6, 14):
        folder = tmp_path / str(steps)
        run_until_step(monkeypatch, steps, checkpoint=folder, x=lambda: m)
        assert_same(run(checkpoint=folder, resume="last", seed=77, x=lambda: m), whole)
    # the configuration has the same checksums for the array in memory
    run_until_step(monkeypatch, 8, checkpoint=tmp_path / "memory", x=data)
    assert_same(run(checkpoint=tmp_path / "memory", resume="last", x=lambda: m), whole)
    other = mapped(tmp_path, data().numpy() + 1, "other")
    with pytest.raises(MismatchError, match="data is"):
        run(checkpoint=tmp_path / "memory", resume="last", x=lambda: other)


def test_resuming_reads_only_the_remaining_minibatches(tmp_path, monkeypatch):
    m = mapped(tmp_path, data().numpy())
    run_until_step(monkeypatch, 4, checkpoint=tmp_path / "fit", x=lambda: m, num_epochs=1, validation=None)
    read = []
    take = DiskRows.__getitem__
    monkeypatch.setattr(DiskRows, "__getitem__", lambda self, rows: read.append(rows) or take(self, rows))
    run(checkpoint=tmp_path / "fit", resume="last", x=lambda: m, num_epochs=1, validation=None)
    by_index = [rows for rows in read if isinstance(rows, torch.Tensor)]
    shuffled = [rows for rows in by_index if not torch.equal(rows, rows.sort().values)]
    assert len(shuffled) == 2  # the last two of six


def test_a_signal_during_a_fit_on_a_memory_map_saves_and_ends(tmp_path, monkeypatch):
    m = mapped(tmp_path, data().numpy())
    whole = run(x=lambda: m)
    after_step = CheckpointManager.after_step
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send_signal(self):
        if self.position.num_steps == 8:
            os.kill(os.getpid(), signal.SIGINT)
        after_step(self)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointManager, "after_step", send_signal)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=tmp_path / "fit", x=lambda: m)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Checkpoints(tmp_path / "fit").paths()[-1].name == "step-00000009"
    assert_same(run(checkpoint=tmp_path / "fit", resume="last", x=lambda: m), whole)


@pytest.mark.parametrize("compile", [False, "trace"])
def test_a_row_outside_of_the_support_raises_before_its_step(tmp_path, compile):
    x = (data().numpy() > 0).astype("f4")
    x[71, 2] = 0.5
    model, guide, parameters = bernoulli_pair()
    with pytest.raises(ValueError, match=r"batch \d.*row 71 .*outside the support of 'x'"):
        pv.fit(model, guide, mapped(tmp_path, x), batch_size=10, compile=compile, num_epochs=1)
    assert all(p.isfinite().all() for p in parameters)
    with pytest.raises(ValueError, match="row 71"):
        pv.evaluate(model, guide, mapped(tmp_path, x), batch_size=10)


def test_evaluation_of_a_memory_map_equals_that_in_memory(tmp_path, prefetch):
    x = data().numpy()
    m = mapped(tmp_path, x)
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
        conditionals.Normal(nets.MLP(4, (9,)), event_shape=2),
    )
    pair = vae.model, vae.guide
    for verb in (
        lambda x: pv.evaluate(*pair, x, batch_size=10).elbo,
        lambda x: pv.log_weights(*pair, x, num_particles=3),
        lambda x: pv.evidence.importance(*pair, x, num_particles=10).log_evidence,
        lambda x: pv.diagnose(*pair, x, num_particles=40, num_simulations=0).pareto_k,
    ):
        assert torch.equal(verb(m), verb(x))


MEMORY = """
import sys
import numpy as np, torch, pyro, pyro.distributions as dist, pyro_vae as pv

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Pss_Anon:")) / 1024

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(x.shape[1])).to_event(1), obs=x)
    seen.append(anonymous())

def guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0 * x[:, 0], 1.0))

x = np.load(sys.argv[1], mmap_mode="r")
seen = []
def fit(x, folder):
    return pv.fit(
        model, guide, x, validation=x, num_epochs=1, batch_size=500, compile=False, checkpoint=folder
    )

fit(x[:8000], sys.argv[2] + "/first")
start, seen = max(seen), []
history = fit(x, sys.argv[2] + "/second")
with history.scope():
    pv.evaluate(model, guide, x)
print(max(seen) - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_anonymous_memory_of_a_fit_is_far_below_the_size_of_the_file(tmp_path):
    """A fit that computes checksums, casts to float32 and validates."""
    num_rows, width = 2**15, 2**10  # 256 MB
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f8", (num_rows, width))[::50] = 1.0
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "x.npy", tmp_path],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 128


def test_two_epochs_of_different_seeds_differ(tmp_path):
    """The order of rows on disk is drawn anew for each epoch."""
    m = mapped(tmp_path, np.arange(float(N)))
    first, second, ordered = (torch.cat(parts) for parts in epochs(m, 5))
    for a, b in itertools.combinations((first, second, ordered), 2):
        assert not torch.equal(a, b)
        assert torch.equal(a.sort().values, b.sort().values)
