"""Damaged and malicious files, full disks, lack of memory, non-finite numbers, invalid data."""

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
    """Flipped bits and truncated files: an error names the file, and the previous checkpoint is loaded."""
    small.train(checkpoint=folder, num_epochs=3, compile=False)
    previous, newest = Checkpoints(Path(folder)).paths()[-2:]
    noise = random.Random(0)
    logging.getLogger("pyro_vae").setLevel(logging.ERROR)
    for kind in ("flip", "truncate"):
        for trial in range(200):
            file = noise.choice(sorted(newest.iterdir()))
            original = file.read_bytes()
            i = noise.randrange(len(original))
            flipped = original[:i] + bytes([original[i] ^ 1 << noise.randrange(8)]) + original[i + 1 :]
            file.write_bytes(flipped if kind == "flip" else original[:i])
            message = ""
            try:
                read_checkpoint(newest)
            except ValueError as error:
                message = str(error)
            fallback = Checkpoints(Path(folder)).last()[0]
            file.write_bytes(original)
            passed = str(newest) in message and fallback == previous
            yield f"{kind} {trial} of {file.name} at byte {i}: {message}", passed
    yield "restored", Checkpoints(Path(folder)).last()[0] == newest


class _MakesFolder:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["UNPICKLED"],)


def untrusted_pickle(folder):
    """A pickle with code in place of each file that is read: the code does not run."""
    import pickle

    os.environ["UNPICKLED"] = str(Path(folder, "unpickled"))
    folder = Path(folder)
    payload = pickle.dumps(_MakesFolder())
    buffer = io.BytesIO()
    torch.save({"a": _MakesFolder()}, buffer)
    vae = small.make_vae()
    for i, content in enumerate((payload, buffer.getvalue())):
        subfolder = folder / str(i)
        checkpoint.save(subfolder / "pair", vae)
        (tensors,) = (subfolder / "pair").glob("*.safetensors")
        (subfolder / "a.pt").write_bytes(content)
        (subfolder / "frey_faces.npz").write_bytes(content)
        for name, read in _readers(subfolder, tensors, content).items():
            try:
                read()
                refused = False
            except (ValueError, OSError):
                refused = True
            yield f"pickle {i} {name}", refused and not (folder / "unpickled").exists()
    np.savez(folder / "frey_faces.npz", images=np.array([_MakesFolder()], dtype=object))
    try:
        datasets.load("frey-faces", data_dir=folder)
        refused = False
    except ValueError:
        refused = True
    yield "objects in an array", refused and not (folder / "unpickled").exists()


def _readers(folder, tensors, content):
    pair = folder / "pair"
    return {
        "as tensors": lambda: (tensors.write_bytes(content), checkpoint.load(pair)),
        "as manifest": lambda: ((pair / "manifest.json").write_bytes(content), checkpoint.load(pair)),
        "as a path to resume": lambda: small.train(resume=folder / "a.pt", num_epochs=1),
        "as data": lambda: datasets.load("frey-faces", data_dir=folder),
    }


def disk_full(folder):
    """A limit on file sizes: exit code 74, the previous checkpoint is valid, and no temporary files are
    left."""
    run = Path(folder, "run")
    words = ["train", "ring", "-n", 2, "--out", run]
    assert small.run(small.command, *words) == 0
    for size in (0, 100, 1000, 10_000, 50_000):
        code = small.run(_command_with_file_limit, size, [*words[:3], 4, "--out", run, "--resume", "last"])
        temporary = [f for f in run.rglob(".*") if f.name != ".written.json"]
        last = Checkpoints(run / "checkpoints").last()
        is_valid = last is not None and runs.open_run(run).path == run and not temporary
        yield f"{size} bytes: {code}", code == 74 and is_valid


def out_of_memory(folder):
    """Too little address space: exit code 70, one line with a remedy, and the last checkpoint is valid."""
    run, output = Path(folder, "run"), Path(folder, "output")
    (Path(folder) / "allocating.py").write_text(ALLOCATING_PAIR)
    words = ["train", "ring", "--pair", "allocating:make_pair", "--out", run]
    assert small.run(_command_in_folder, folder, 0, [*words, "-n", 2], output=str(output)) == 0, (
        output.read_text()
    )
    for gigabytes in (1, 8, 64):
        resume = [*words, "-n", 4, "--resume", "last"]
        code = small.run(_command_with_memory_limit, folder, gigabytes, resume, output=str(output))
        lines = [line for line in output.read_text().splitlines() if line.startswith("pyro-vae:")]
        has_remedy = len(lines) == 1 and "memory" in lines[0] and "--batch-size" in lines[0]
        is_valid = Checkpoints(run / "checkpoints").last() is not None
        yield f"{gigabytes} GB: {code}, {output.read_text()}", code == 70 and has_remedy and is_valid


ALLOCATING_PAIR = """
import os, torch
from tests.faults.interruptions import make_pair as small_pair
def make_pair():
    vae = small_pair()
    def allocate(module, args):
        torch.empty(int(os.environ["GIGABYTES"]) * 2**28 + 1).fill_(0.0)
    vae.guide.encoder.register_forward_pre_hook(allocate)
    return vae
"""


def _command_with_memory_limit(folder, gigabytes, words):
    current = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (current + 2**30, resource.RLIM_INFINITY))
    _command_in_folder(folder, gigabytes, words)


def _command_in_folder(folder, gigabytes, words):
    os.chdir(folder)
    os.environ["GIGABYTES"] = str(gigabytes)
    small.command(*words)


def _command_with_file_limit(size, words):
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
    before = small.checksum(vae.parameters())
    try:
        small.pv.fit(vae.model, vae.guide, x, num_epochs=1)
    except ValueError as error:
        survived += f"row {row} " in str(error) and small.checksum(vae.parameters()) == before
print(survived)
"""


def data_not_finite(folder):
    """NaN or infinity in the data, with and without ``python -O``: an error before the first step names the
    row."""
    for flags in ((), ("-O",)):
        process = subprocess.run([sys.executable, *flags, "-c", BAD_DATA], capture_output=True, text=True)
        survived = int(process.stdout or 0)
        for trial in range(30):
            yield f"python {' '.join(flags)}: {process.stderr}", trial < survived


def gradient_not_finite(folder):
    """NaN or infinity in a gradient of a finite loss: an error names the step, and parameters are
    unchanged."""
    for compile in (False, "trace"):
        for step in (1, 2, 7, 40, 71):
            for value in (math.nan, math.inf):
                vae = small.make_vae()
                checksums = []
                _set_gradient(vae, step, value, checksums)
                message = ""
                try:
                    small.train(vae=vae, num_epochs=3, compile=compile)
                except FloatingPointError as error:
                    message = str(error)
                epoch, batch = divmod(step - 1, 34)
                names_step = f"epoch {epoch + 1}, batch {batch} (step {step})" in message
                names_parameter = "'decoder$$$readout.loc.layer.weight';" in message
                unchanged = small.checksum(vae.parameters()) == checksums[-1]
                passed = names_step and names_parameter and unchanged
                yield f"{compile}, {value} at step {step}: {message}", passed


def _set_gradient(vae, step, value, checksums):
    """Make the gradient of one decoder parameter w infinite or NaN at one step, with a finite loss.

    The decoder's mean gets a term √(a + b·(w − w₀)) minus its value, at w = w₀. The derivative b/(2√a) is 0
    before the step, and 1/0 or 0/0 at the step. Graphs read a and b at each step.
    """
    from pyro_vae.infer.minibatch import MinibatchSVI

    original_on = MinibatchSVI.minibatch_step
    count = iter(range(1, 10_000))
    layer = vae.model.decoder.readout["loc"].layer
    a, b = torch.ones(()), torch.zeros(())

    def add_root(layer, inputs, mean):
        weight = layer.weight[0, 0]
        root = (a + b * (weight - weight.detach())).sqrt()
        return mean + root - root.detach()

    def on(self, *args):
        checksums.append(small.checksum(vae.parameters()))
        if next(count) == step:
            MinibatchSVI.minibatch_step = original_on
            a.zero_()
            b.fill_(math.isinf(value))
        return original_on(self, *args)

    layer.register_forward_hook(add_root)
    MinibatchSVI.minibatch_step = on


def grey_pixels(folder):
    """Values outside the support of a likelihood: an error names the row."""
    noise = torch.Generator().manual_seed(0)
    for likelihood, bad in (
        (conditionals.Bernoulli, (0.5, 1.7, -1.0, 255.0)),
        (conditionals.ContinuousBernoulli, (1.7, -0.1)),
    ):
        for value in bad:
            for rows in (1, 7, 300):
                x = torch.rand(rows, 4, generator=noise).round()
                x[-1, 2] = value
                vae = pv.VAE(
                    priors.StandardNormal(2),
                    likelihood(nets.MLP(2, (8,)), event_shape=4),
                    conditionals.Normal(nets.MLP(4, (8,)), event_shape=2),
                )
                message = ""
                try:
                    pv.fit(vae.model, vae.guide, x, num_epochs=1, batch_size=5)
                except ValueError as error:
                    message = str(error)
                passed = f"row {rows - 1}" in message and "support" in message
                yield f"{likelihood.__name__}, {value}: {message}", passed


def versions(folder):
    """A newer schema raises an error that names it; files of earlier versions load."""
    vae = small.make_vae()
    checkpoint.save(Path(folder, "pair"), vae)
    manifest = Path(folder, "pair", "manifest.json")
    record = json.loads(manifest.read_bytes())
    record["manifest"]["schema"] = 99
    record["sha256"] = hashlib.sha256(json.dumps(record["manifest"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(record))
    message = ""
    try:
        checkpoint.load(Path(folder, "pair"))
    except MismatchError as error:
        message = str(error)
    yield f"a newer schema: {message}", "schema 99" in message
    for golden in sorted(GOLDEN.iterdir()):
        pair = checkpoint.load(golden / "pair")
        _, content = Checkpoints(golden / "checkpoints").last()
        passed = small.checksum(pair.parameters()) == (golden / "sum").read_text() and content["steps"] > 0
        yield golden.name, passed


def dataset_integrity(folder):
    """Changed IDX files: each raises an error that names the file."""
    noise = random.Random(0)
    original = bytes([0, 0, 8, 3]) + struct.pack(">3I", 7, 5, 4) + noise.randbytes(140)
    path, digest = Path(folder, "images-idx3-ubyte"), hashlib.sha256(original).hexdigest()
    for trial in range(100):
        mutant = bytearray(original)
        if trial % 3 == 0:
            mutant = mutant[: noise.randrange(len(original))]
        elif trial % 3 == 1:
            mutant[noise.randrange(len(original))] ^= 1 << noise.randrange(8)
        else:
            mutant += noise.randbytes(noise.randrange(1, 50))
        path.write_bytes(mutant)
        message = ""
        try:
            datasets._read_idx(path, digest)
        except ValueError as error:
            message = str(error)
        yield f"mutant {trial}: {message}", str(path) in message


def bombs(folder):
    """Small files that expand to a gigabyte: an error, with less than 64 MB of memory."""
    folder = Path(folder)
    with (
        zipfile.ZipFile(folder / "frey_faces.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (2**30,)}
        )
        file.write(header.getvalue())
        for _ in range(2**10):
            file.write(bytes(2**20))
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in datasets._IDX_SHA256["MNIST"]:
        with (raw / name).open("wb") as file:  # a sparse file of a gigabyte with a matching header
            file.write(struct.pack(">4B3I", 0, 0, 8, 3, 2**14, 2**8, 2**8))
            file.truncate(16 + 2**30)
        with gzip.open(raw / f"{name}.gz", "wb", compresslevel=1) as file:
            file.write(bytes(2**20))
    for name in ("frey-faces", "mnist"):
        output = Path(folder, f"{name}-output")
        code = small.run(_load_and_measure_memory, name, folder, output=str(output))
        yield f"{name}: {output.read_text()[-200:]}", code == 0


def _load_and_measure_memory(name, folder):
    import torchvision.datasets  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        datasets.load(name, data_dir=folder)
    except ValueError as error:
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        print(error, f"; {megabytes:.0f} MB")
        sys.exit(0 if megabytes < 64 else 1)
    sys.exit(2)
