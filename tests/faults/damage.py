"""Files that are damaged, hostile or do not fit; memory that is not there; numbers that are none."""

import gzip
import hashlib
import io
import json
import logging
import math
import os
import random
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import pyro_vae as pv
from pyro_vae import checkpoint, conditionals, nets, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError, read_checkpoint
from pyro_vae.cli import runs
from pyro_vae.data import datasets
from tests.faults import small

GOLDEN = Path(__file__).parent.parent / "checkpoint" / "golden"


def corruption(folder):
    """Bits flipped and files cut short: an error that names the file, and the checkpoint before it."""
    small.train(checkpoint=folder, num_epochs=3, compile=False)
    before, newest = Checkpoints(Path(folder)).paths()[-2:]
    noise = random.Random(0)
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    for kind in ("flip", "cut"):
        for trial in range(200):
            file = noise.choice(sorted(newest.iterdir()))
            whole = file.read_bytes()
            at = noise.randrange(len(whole))
            flipped = whole[:at] + bytes([whole[at] ^ 1 << noise.randrange(8)]) + whole[at + 1 :]
            file.write_bytes(flipped if kind == "flip" else whole[:at])
            try:
                read_checkpoint(newest)
                found = None
            except ValueError as error:
                found = str(error)
            fallback = Checkpoints(Path(folder)).last()[0]
            file.write_bytes(whole)
            yield f"{kind} {trial} of {file.name} at {at}: {found}", found and str(newest) in found and fallback == before
    yield "whole again", Checkpoints(Path(folder)).last()[0] == newest


class _Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICE"],)


def untrusted_pickle(folder):
    """A pickle that runs something, wherever a file is read: nothing runs."""
    import pickle

    os.environ["MALICE"] = str(Path(folder, "it ran"))
    folder = Path(folder)
    payload = pickle.dumps(_Malice())
    buffer = io.BytesIO()
    torch.save({"a": _Malice()}, buffer)
    vae = small.make_vae()
    for i, content in enumerate((payload, buffer.getvalue())):
        place = folder / str(i)
        checkpoint.save(place / "pair", vae)
        (tensors,) = (place / "pair").glob("*.safetensors")
        (place / "a.pt").write_bytes(content)
        (place / "frey_faces.npz").write_bytes(content)
        for name, attempt in _readings(place, tensors, content).items():
            try:
                attempt()
                refused = False
            except (ValueError, OSError):
                refused = True
            yield f"pickle {i} {name}", refused and not (folder / "it ran").exists()
    np.savez(folder / "frey_faces.npz", images=np.array([_Malice()], dtype=object))
    try:
        datasets.load("frey-faces", data_dir=folder)
        refused = False
    except ValueError:
        refused = True
    yield "objects in an array", refused and not (folder / "it ran").exists()


def _readings(place, tensors, content):
    pair = place / "pair"
    return {
        "as tensors": lambda: (tensors.write_bytes(content), checkpoint.load(pair)),
        "as manifest": lambda: ((pair / "manifest.json").write_bytes(content), checkpoint.load(pair)),
        "as a path to resume": lambda: small.train(resume=place / "a.pt", num_epochs=1),
        "as data": lambda: datasets.load("frey-faces", data_dir=place),
    }


def disk_full(folder):
    """Files that may not grow beyond some size: exit code 74, the checkpoint before is whole, nothing half-written stays."""
    run = Path(folder, "run")
    words = ["train", "ring", "-n", 2, "--out", run]
    assert small.run(small.command, *words) == 0
    for size in (0, 100, 1000, 10_000, 50_000):
        code = small.run(_limited, size, [*words[:3], 4, "--out", run, "--resume", "last"])
        after = list(run.rglob("*"))
        last = Checkpoints(run / "checkpoints").last()
        whole = (
            last is not None
            and runs.open_run(run).path == run
            and not [f for f in after if f.name.startswith(".") and f.name != ".written.json"]
        )
        yield f"{size} bytes: {code}", code == 74 and whole


def out_of_memory(folder):
    """An address space that is too small: exit code 70, one line with a hint, the last checkpoint is whole."""
    run, said = Path(folder, "run"), Path(folder, "said")
    (Path(folder) / "greedy.py").write_text(GREEDY)
    words = ["train", "ring", "--pair", "greedy:make_pair", "--out", run]
    assert small.run(_in_folder, folder, 0, [*words, "-n", 2], said=str(said)) == 0, said.read_text()
    for greed in (1, 8, 64):
        code = small.run(_short_of_memory, folder, greed, [*words, "-n", 4, "--resume", "last"], said=str(said))
        lines = [line for line in said.read_text().splitlines() if line.startswith("pyro-vae:")]
        hint = len(lines) == 1 and "memory" in lines[0] and "--batch-size" in lines[0]
        yield (
            f"{greed} GB: {code}, {said.read_text()}",
            code == 70 and hint and Checkpoints(run / "checkpoints").last() is not None,
        )


GREEDY = """
import os, torch
from tests.faults.interruptions import make_pair as small_pair
def make_pair():
    vae = small_pair()
    def greedy(module, args):
        torch.empty(int(os.environ["GREED"]) * 2**28 + 1).fill_(0.0)
    vae.guide.encoder.register_forward_pre_hook(greedy)
    return vae
"""


def _short_of_memory(folder, greed, words):
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**30, resource.RLIM_INFINITY))
    _in_folder(folder, greed, words)


def _in_folder(folder, greed, words):
    os.chdir(folder)
    os.environ["GREED"] = str(greed)
    small.command(*words)


def _limited(size, words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    small.command(*words)


BAD_DATA = """
import random, torch
from tests.faults import small
noise, survived = random.Random(0), 0
for trial in range(30):
    x, row = small.make_data(200), noise.randrange(200)
    x[row, noise.randrange(4)] = noise.choice([float("nan"), float("inf"), float("-inf")])
    vae = small.make_vae()
    before = small.sum_of(vae.parameters())
    try:
        small.pv.fit(vae.model, vae.guide, x, num_epochs=1)
    except ValueError as error:
        survived += f"row {row} " in str(error) and small.sum_of(vae.parameters()) == before
print(survived)
"""


def data_not_finite(folder):
    """NaN or infinity in the data, with and without ``python -O``: refused before the first step, with the row."""
    for flags in ((), ("-O",)):
        done = subprocess.run([sys.executable, *flags, "-c", BAD_DATA], capture_output=True, text=True)
        survived = int(done.stdout or 0)
        for trial in range(30):
            yield f"python {' '.join(flags)}: {done.stderr}", trial < survived


def gradient_not_finite(folder):
    """NaN and infinity in a gradient under a finite loss, at some step: named, and nothing has moved."""
    for compile in (False, "trace"):
        for step in (1, 2, 7, 40, 71):
            for value in (math.nan, math.inf):
                vae = small.make_vae()
                sums = []
                _poison(vae, step, value, sums)
                try:
                    small.train(vae=vae, num_epochs=3, compile=compile)
                    said = ""
                except FloatingPointError as error:
                    said = str(error)
                epoch, batch = divmod(step - 1, 34)
                named = f"epoch {epoch + 1}, batch {batch} (step {step})" in said
                named = named and "'decoder$$$readout.loc.layer.weight';" in said
                kept = small.sum_of(vae.parameters()) == sums[-1]
                yield f"{compile}, {value} at step {step}: {said}", named and kept


def _poison(vae, step, value, sums):
    """The gradient of the decoder's mean is ``value`` at one step: there, a root of zero is added to the mean and taken away,
    with one parameter under it: ∂√(a + b·w)/∂w = b/(2√a), 1/0 or 0/0. A graph reads a and b anew at each step."""
    from pyro_vae.infer.minibatch import MinibatchSVI

    minibatch_step = MinibatchSVI.minibatch_step
    count = iter(range(1, 10_000))
    layer = vae.model.decoder.readout["loc"].layer
    a, b = torch.ones(()), torch.zeros(())

    def add_root(layer, inputs, mean):
        weight = layer.weight[0, 0]
        root = (a + b * (weight - weight.detach())).sqrt()
        return mean + root - root.detach()

    def stepping(self, *args):
        sums.append(small.sum_of(vae.parameters()))
        if next(count) == step:
            MinibatchSVI.minibatch_step = minibatch_step
            a.zero_()
            b.fill_(math.isinf(value))
        return minibatch_step(self, *args)

    layer.register_forward_hook(add_root)
    MinibatchSVI.minibatch_step = stepping


def grey_pixels(folder):
    """Values outside of a likelihood's support: a ValueError that says so."""
    noise = torch.Generator().manual_seed(0)
    for likelihood, bad in ((conditionals.Bernoulli, (0.5, 1.7, -1.0, 255.0)), (conditionals.ContinuousBernoulli, (1.7, -0.1))):
        for value in bad:
            for rows in (1, 7, 300):
                x = torch.rand(rows, 4, generator=noise).round()
                x[-1, 2] = value
                vae = pv.VAE(
                    priors.StandardNormal(2),
                    likelihood(nets.MLP(2, (8,)), event_shape=4),
                    conditionals.Normal(nets.MLP(4, (8,)), event_shape=2),
                )
                try:
                    pv.fit(vae.model, vae.guide, x, num_epochs=1, batch_size=5)
                    said = ""
                except ValueError as error:
                    said = str(error)
                yield f"{likelihood.__name__}, {value}: {said}", f"row {rows - 1}" in said and "support" in said


def versions(folder):
    """A newer schema is refused by name; what earlier versions wrote is read."""
    vae = small.make_vae()
    checkpoint.save(Path(folder, "pair"), vae)
    manifest = Path(folder, "pair", "manifest.json")
    record = json.loads(manifest.read_bytes())
    record["manifest"]["schema"] = 99
    record["sha256"] = hashlib.sha256(json.dumps(record["manifest"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(record))
    try:
        checkpoint.load(Path(folder, "pair"))
        said = ""
    except MismatchError as error:
        said = str(error)
    yield f"a newer schema: {said}", "schema 99" in said
    for golden in sorted(GOLDEN.iterdir()):
        pair = checkpoint.load(golden / "pair")
        _, content = Checkpoints(golden / "checkpoints").last()
        yield golden.name, small.sum_of(pair.parameters()) == (golden / "sum").read_text() and content["steps"] > 0


def dataset_integrity(folder):
    """Changed IDX files: none is read, none crashes."""
    noise = random.Random(0)
    whole = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 5, 4) + noise.randbytes(140)
    path, digest = Path(folder, "images-idx3-ubyte"), hashlib.sha256(whole).hexdigest()
    for trial in range(100):
        mutant = bytearray(whole)
        if trial % 3 == 0:
            mutant = mutant[: noise.randrange(len(whole))]
        elif trial % 3 == 1:
            mutant[noise.randrange(len(whole))] ^= 1 << noise.randrange(8)
        else:
            mutant += noise.randbytes(noise.randrange(1, 50))
        path.write_bytes(mutant)
        try:
            datasets._read_idx(path, digest)
            said = ""
        except ValueError as error:
            said = str(error)
        yield f"mutant {trial}: {said}", str(path) in said


def bombs(folder):
    """A gigabyte of zeros in a small file: refused, with less than 64 MB of memory."""
    place = Path(folder)
    with (
        zipfile.ZipFile(place / "frey_faces.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**30,)})
        file.write(header.getvalue())
        for _ in range(2**10):
            file.write(bytes(2**20))
    raw = place / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in datasets._IDX_SHA256["MNIST"]:
        with (raw / name).open("wb") as file:  # as large on paper, and with a header that agrees
            file.write(struct.pack(">4B3I", 0, 0, 8, 3, 2**14, 2**8, 2**8))
            file.truncate(16 + 2**30)
        with gzip.open(raw / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write(bytes(2**20))
    for name in ("frey-faces", "mnist"):
        said = Path(folder, f"{name}-said")
        code = small.run(_load_and_weigh, name, folder, said=str(said))
        yield f"{name}: {said.read_text()[-200:]}", code == 0


def _load_and_weigh(name, folder):
    import torchvision.datasets  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        datasets.load(name, data_dir=folder)
    except ValueError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        print(error, f"; {grown:.0f} MB")
        sys.exit(0 if grown < 64 else 1)
    sys.exit(2)
