"""Training on a memory-mapped file: anonymous memory on a file larger than memory, and throughput against the
same rows in memory."""

import statistics
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

import pyro_vae as pv
from benchmarks.aevb import PIXELS, make_vae

BATCH_SIZE = 256
_ROW_BYTES = 4 * PIXELS


def print_memory(gigabytes, rounds, folder=None):
    """Train on a sparse file of ``gigabytes``, and in turns on a file of 1 GB (or ``gigabytes``, if this is
    less) and on its rows in memory."""
    print(f"\nMemory maps: AEVB's network, batch {BATCH_SIZE}\n")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name, "x.npy")
        small = _create(path, min(gigabytes, 1.0), density=1.0)
        memory = torch.from_numpy(np.array(small))
        ratios = []
        for i in range(rounds):
            rates = {kind: _rows_per_second(x) for kind, x in (("memory", memory), ("disk", small))}
            ratios.append(rates["disk"] / rates["memory"])
            print(
                f"round {i + 1}: {rates['disk']:.0f} rows/s on disk, {rates['memory']:.0f} in memory: "
                f"{ratios[-1]:.3f}",
                flush=True,
            )
        print(f"throughput on disk / in memory: {statistics.median(ratios):.3f} (asked: 0.9 or more)")
        del small, memory
        path.unlink()
        large = _create(path, gigabytes, density=0.0)
        before = _anonymous_gigabytes()
        with _Peak() as peak:
            seconds = _fit(large, num_epochs=1).epochs[0].seconds
        print(
            f"{gigabytes:g} GB, one epoch in {seconds:.0f} s: at most {peak.value:.2f} GB of anonymous "
            f"memory, {before:.2f} GB before it (asked: below 2 GB)"
        )


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


def _fit(x, num_epochs):
    torch.manual_seed(0)
    vae = make_vae()
    return pv.fit(vae.model, vae.guide, x, num_epochs=num_epochs, batch_size=BATCH_SIZE, progress=False)


def _rows_per_second(x):
    return len(x) / _fit(x, num_epochs=2).epochs[-1].seconds  # the first epoch has the compiler


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
