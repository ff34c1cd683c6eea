"""Training on a memory-mapped file: anonymous memory on a file larger than memory, on one process and on
two, and throughput against the same rows in memory."""

import gc
import statistics
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pyro_vae as pv
from benchmarks.aevb import PIXELS, make_vae
from benchmarks.processes import free_port, join_group

BATCH_SIZE = 256
_ROW_BYTES = 4 * PIXELS
_NUM_ROWS = 25_600  # of an epoch when throughput is measured


def print_memory(gigabytes, rounds, folder=None):
    """Train on rows of a file of 1 GB (or ``gigabytes``, if this is less) and on the same rows in memory, in
    turns of an epoch. Then train on a sparse file of ``gigabytes``, on one process and on two."""
    print(f"\nMemory maps: AEVB's network, batch {BATCH_SIZE}\n")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name, "x.npy")
        small = _create(path, min(gigabytes, 1.0), density=1.0)
        # rows from all parts of the file, so that an epoch is short and the two take turns often
        disk = small[:: max(1, len(small) // _NUM_ROWS)]
        seconds = _turns({"memory": torch.from_numpy(np.array(disk)), "disk": disk}, rounds)
        ratios = [a / b for a, b in zip(seconds["memory"], seconds["disk"], strict=True)]
        rates = {kind: len(disk) / statistics.median(times) for kind, times in seconds.items()}
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"rows per second: {rates['disk']:.0f} on disk, {rates['memory']:.0f} in memory; ratio over "
            f"{rounds} turns {middle:.3f} ({low:.3f}–{high:.3f}; asked: 0.9 or more)",
            flush=True,
        )
        del small, disk
        path.unlink()
        large = _create(path, gigabytes, density=0.0)
        before = _anonymous_gigabytes()
        with _Peak() as peak:
            (epoch,) = _epochs(large, 1)
        print(
            f"{gigabytes:g} GB, one epoch in {epoch.seconds:.0f} s: at most {peak.value:.2f} GB of anonymous "
            f"memory, {before:.2f} GB before it (asked: below 2 GB)",
            flush=True,
        )
        del large
        gc.collect()  # the file is unmapped here, so that two processes share its pages, not three
        print("2 processes on the same file:", flush=True)
        mp.spawn(_rank, (free_port(), path), nprocs=2)


def _rank(rank, port, path):
    """An epoch on one of two processes, each of which maps the file. A page that both have read is in memory
    once, and half of it counts for each in the proportional share (PSS)."""
    join_group(rank, port)
    x = np.load(path, mmap_mode="r")
    with _Peak() as peak:
        (epoch,) = _epochs(x, 1)
    dist.barrier()
    resident, share = _mapped_gigabytes(path)
    dist.barrier()
    print(
        f"rank {rank}, {epoch.seconds:.0f} s: at most {peak.value:.2f} GB of anonymous memory; "
        f"{resident:.2f} GB of the file resident, of which its share is {share:.2f} GB\n",
        end="",
        flush=True,
    )
    dist.destroy_process_group()


def _create(path, gigabytes, density):
    """A file of float32 rows of 0 and 1, mapped. With ``density=0`` all rows but every 1000th are a hole in
    the file."""
    n = int(gigabytes * 1e9) // _ROW_BYTES
    x = np.lib.format.open_memmap(path, "w+", np.float32, (n, PIXELS))
    generator = np.random.default_rng(0)
    if density:
        for start in range(0, n, 10_000):
            block = x[start : start + 10_000]
            block[:] = generator.random(block.shape, np.float32) < 0.5
    else:
        x[::1000] = generator.random((len(x[::1000]), PIXELS), np.float32) < 0.5
    x.flush()
    return np.load(path, mmap_mode="r")


def _epochs(x, num_epochs):
    """A fit as a generator of epochs."""
    torch.manual_seed(0)
    vae = make_vae()
    return pv.train(vae.model, vae.guide, x, num_epochs=num_epochs, batch_size=BATCH_SIZE, progress=False)


def _turns(data, rounds):
    """Seconds per epoch of fits that take turns, without their first two epochs, in which graphs are made."""
    fits = {kind: _epochs(x, rounds + 2) for kind, x in data.items()}
    times = {kind: [] for kind in fits}
    for _ in range(rounds + 2):
        for kind, epochs in fits.items():
            times[kind].append(next(epochs).seconds)
    return {kind: each[2:] for kind, each in times.items()}


class _Peak:
    """The largest anonymous memory of this process in a block, sampled ten times per second."""

    def __enter__(self):
        self.value, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while not self._stop.wait(0.1):
            self.value = max(self.value, _anonymous_gigabytes())

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def _anonymous_gigabytes():
    """Resident anonymous memory, an upper bound of its proportional share (PSS)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("/proc/self/status has no RssAnon; expected Linux")


def _mapped_gigabytes(path):
    """What this process has of a mapped file in memory: all of it (RSS) and its proportional share (PSS)."""
    sizes, inside = {"Rss:": 0.0, "Pss:": 0.0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = line.split(maxsplit=5)[-1] == str(path.resolve())
        elif inside and first in sizes:
            sizes[first] += int(rest[0]) * 1024 / 1e9
    if not sizes["Rss:"]:
        raise OSError(f"/proc/self/smaps does not have {path}")
    return sizes["Rss:"], sizes["Pss:"]
