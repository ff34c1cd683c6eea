"""Processes that are killed, interrupted, or crash during a save."""

import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from pyro_vae import checkpoint
from pyro_vae.checkpoint import Checkpoints
from tests.faults import small


def exact_resume(folder):
    """A run killed at ten random times and resumed each time: the same parameters as the uninterrupted run.

    After each kill a copy of the run is resumed to the end.
    """
    noise = random.Random(0)
    for loss in small.LOSSES:
        reference, run = Path(folder, loss, "reference"), Path(folder, loss, "run")
        reference.mkdir(parents=True)
        run.mkdir()
        assert small.run(small.train_to_checksum, reference, loss) == 0
        expected = (reference / "sum").read_text()
        for kill in range(10):
            delay = noise.uniform(0.02, 0.25)
            code = small.run(
                _train_until_killed, delay, loss, checkpoint=run / "checkpoints", resume="last", every=5
            )
            copy = Path(folder, loss, f"copy-{kill}")
            shutil.copytree(run, copy)
            small.run(
                small.train_to_checksum,
                copy,
                loss,
                checkpoint=copy / "checkpoints",
                resume="last",
                every=50,
                vae=None,
            )
            yield f"{loss}, kill {kill}", code == -signal.SIGKILL and (copy / "sum").read_text() == expected
        assert (
            small.run(small.train_to_checksum, run, loss, checkpoint=run / "checkpoints", resume="last") == 0
        )
        yield f"{loss}, killed ten times", (run / "sum").read_text() == expected


def _train_until_killed(delay, loss, **options):
    """Train, and kill the process ``delay`` seconds after its first step."""
    from pyro_vae.infer.resume import CheckpointManager

    original_stepped = CheckpointManager.after_step

    def stepped(self):
        CheckpointManager.after_step = original_stepped
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        original_stepped(self)

    CheckpointManager.after_step = stepped
    small.train(loss, num_epochs=8, **options)
    time.sleep(10)  # the fit may end before the timer


OPERATIONS = ("mkdir", "open", "fdopen", "fsync", "chmod", "replace", "unlink", "rmdir", "rename")


def crash_during_save(folder):
    """SIGKILL at every file operation of a save and within every write: the old or the new content loads."""
    for kind in ("pair", "series"):
        for n in range(1, 200):
            subfolder = Path(folder, f"{kind}-{n}")
            subfolder.mkdir()
            _save(kind, subfolder, 1)
            code = small.run(_crash, kind, subfolder, n)
            if code == 0:
                break
            yield f"{kind}, operation {n}", code == -signal.SIGKILL and _read(kind, subfolder) in (1, 2)
            code = small.run(_save, kind, subfolder, 3)
            yield f"{kind}, the save after operation {n}", code == 0 and _read(kind, subfolder) == 3
        assert n > 10


def _crash(kind, folder, n):
    """Save, and kill the process at the ``n``-th file operation."""
    count = iter(range(1, 10_000))

    def counted(operation):
        def call(*args, **kwargs):
            if next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **kwargs)
            return _FileWithCrash(result, count, n) if operation.__name__ == "fdopen" else result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    _save(kind, folder, 2)


class _FileWithCrash:
    """A file that may kill the process in the middle of a write, which counts as an operation."""

    def __init__(self, file, count, n):
        self.file, self.count, self.n = file, count, n

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        if next(self.count) == self.n:
            os.kill(os.getpid(), signal.SIGKILL)
        self.file.write(content[len(content) // 2 :])

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)


def _save(kind, folder, number):
    if kind == "pair":
        vae = small.make_vae()
        torch.nn.init.constant_(vae.guide.encoder.trunk.layers[0].bias, number)
        checkpoint.save(folder / "pair", vae)
        return
    series = Checkpoints(folder / "series")
    for steps in range(3 if number == 1 else 1):  # the next save deletes the first of three
        content = {"number": number, "tensor": torch.full((1000,), number)}
        series.save(10 * number + steps, content, score=-math.inf)


def _read(kind, folder):
    if kind == "pair":
        return int(checkpoint.load(folder / "pair").guide.encoder.trunk.layers[0].bias[0])
    _, content = Checkpoints(folder / "series").last()
    (number,) = set(content["tensor"].tolist())
    assert number == content["number"]
    return number


PHASES = ("training", "evaluation", "building a graph")


def signals(folder):
    """SIGTERM and SIGINT to ``pyro-vae train``: it saves a checkpoint and exits with code 143 or 130 within 5
    s. The resumed run equals the uninterrupted one. A second signal kills the process."""
    words = ["train", "ring", "-n", 3, "-b", 50, "--pair", "tests.faults.interruptions:make_pair"]
    reference = Path(folder, "reference")
    assert small.run(_command_with_signal, None, None, 0, [*words, "--out", reference]) == 0
    expected = _weights(reference)
    for number, expected_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for phase in PHASES:
            run = Path(folder, f"{number}-{phase}")
            code = small.run(
                _command_with_signal, number, phase, 1, [*words, "--out", run], output=f"{folder}/output"
            )
            seconds = time.perf_counter() - float(Path(folder, "sent").read_text())
            resumed = small.run(
                _command_with_signal, None, None, 0, [*words, "--out", run, "--resume", "last"]
            )
            passed = code == expected_code and seconds < 5 and resumed == 0 and _weights(run) == expected
            yield f"{signal.Signals(number).name} in {phase}: {code}, {seconds:.1f} s, {resumed}", passed
        code = small.run(
            _command_with_signal, number, "training", 2, [*words, "--out", Path(folder, f"{number}-twice")]
        )
        yield f"{signal.Signals(number).name} twice", code == -number


def make_pair():
    torch.manual_seed(0)
    from pyro_vae import VAE, conditionals, nets, priors

    return VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (30,)), event_shape=2, min_scale=0.02),
        conditionals.Normal(nets.MLP(2, (30,)), event_shape=2),
    )


def _command_with_signal(number, phase, times, words):
    """Run the command line, which sends itself a signal ``times`` times in a phase of the run."""
    from pyro_vae.compiler import THRESHOLDS, Thresholds
    from pyro_vae.infer import fit as _  # noqa: F401
    from pyro_vae.infer.minibatch import MinibatchSVI
    from pyro_vae.infer.svi import SVI

    def send_signal(function, after):
        calls = iter(range(1_000_000))

        def call(*args, **kwargs):
            if next(calls) == after:
                Path(words[words.index("--out") + 1]).parent.joinpath("sent").write_text(
                    str(time.perf_counter())
                )
                for _ in range(times):
                    os.kill(os.getpid(), number)
                time.sleep(0.01)  # Python handles signals between two bytecode instructions
            return function(*args, **kwargs)

        return call

    fit = sys.modules["pyro_vae.infer.fit"]
    if phase == "training":
        MinibatchSVI.minibatch_step = send_signal(MinibatchSVI.minibatch_step, 25)
    elif phase == "evaluation":
        fit.evaluate_batches = send_signal(fit.evaluate_batches, 1)
    elif phase == "building a graph":
        SVI._build = send_signal(SVI._build, 0)
    THRESHOLDS["fit"] = Thresholds(0, 10**9)  # compile even for few steps
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background jobs
    small.command(*words)


def _weights(run):
    ((file,),) = [list((run / "weights").glob("*.safetensors"))]
    return file.name


def reproducibility(folder):
    """Three processes train the same parameters."""
    checksums = []
    for i in range(3):
        subfolder = Path(folder, str(i))
        subfolder.mkdir()
        small.run(small.train_to_checksum, subfolder)
        checksums.append((subfolder / "sum").read_text())
        yield f"process {i}", checksums[i] == checksums[0]


def two_fits(folder):
    """Two fits in one process, in either order, equal fits in separate processes; the global param store is
    unchanged."""
    import pyro

    def fit(seed):
        vae, _ = small.train(compile=False, num_epochs=2, vae=small.make_vae(seed), seed=seed)
        return small.checksum(vae.parameters())

    expected = []
    for seed in (0, 1):
        subfolder = Path(folder, str(seed))
        subfolder.mkdir()
        assert small.run(_fit_alone, subfolder, seed) == 0
        expected.append((subfolder / "sum").read_text())
    with pyro.get_param_store().scope():
        user_param = pyro.param("user", torch.ones(3))
        for order in ((0, 1), (1, 0)):
            for seed in order:
                yield f"{seed} of {order}", fit(seed) == expected[seed]
        yield "the global store", pyro.param("user") is user_param and len(pyro.get_param_store()) == 1


def _fit_alone(folder, seed):
    vae, _ = small.train(compile=False, num_epochs=2, vae=small.make_vae(seed), seed=seed)
    Path(folder, "sum").write_text(small.checksum(vae.parameters()))
