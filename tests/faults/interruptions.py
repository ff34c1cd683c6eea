"""Processes that are killed, interrupted, or die in the middle of a save."""

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
    """A run killed at ten random moments and resumed each time; after each kill a copy of it is run to the end."""
    noise = random.Random(0)
    for loss in small.LOSSES:
        reference, run = Path(folder, loss, "reference"), Path(folder, loss, "run")
        reference.mkdir(parents=True)
        run.mkdir()
        assert small.run(small.outcome, reference, loss) == 0
        expected = (reference / "sum").read_text()
        for kill in range(10):
            delay = noise.uniform(0.02, 0.25)
            code = small.run(_killed, delay, loss, checkpoint=run / "checkpoints", resume="last", every=5)
            copy = Path(folder, loss, f"copy-{kill}")
            shutil.copytree(run, copy)
            small.run(small.outcome, copy, loss, checkpoint=copy / "checkpoints", resume="last", every=50, vae=None)
            yield f"{loss}, kill {kill}", code == -signal.SIGKILL and (copy / "sum").read_text() == expected
        assert small.run(small.outcome, run, loss, checkpoint=run / "checkpoints", resume="last") == 0
        yield f"{loss}, killed ten times", (run / "sum").read_text() == expected


def _killed(delay, loss, **options):
    """Train, and die at a random moment after the first step of this process."""
    from pyro_vae.infer.resume import CheckpointManager

    after_step = CheckpointManager.after_step

    def first(self):
        CheckpointManager.after_step = after_step
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        after_step(self)

    CheckpointManager.after_step = first
    small.train(loss, num_epochs=8, **options)
    time.sleep(10)  # it was faster than its death


OPERATIONS = ("mkdir", "open", "fdopen", "fsync", "chmod", "replace", "unlink", "rmdir", "rename")


def crash_during_save(folder):
    """SIGKILL at every file operation of a save, and in the middle of every write: the old or the new one loads."""
    for what in ("pair", "series"):
        for n in range(1, 200):
            place = Path(folder, f"{what}-{n}")
            place.mkdir()
            _save(what, place, 1)
            code = small.run(_crash, what, place, n)
            if code == 0:
                break
            yield f"{what}, operation {n}", code == -signal.SIGKILL and _read(what, place) in (1, 2)
            code = small.run(_save, what, place, 3)  # and what is left does not stand in the way
            yield f"{what}, the save after operation {n}", code == 0 and _read(what, place) == 3
        assert n > 10


def _crash(what, place, n):
    count = iter(range(1, 10_000))

    def counted(operation):
        def call(*args, **kwargs):
            if next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            done = operation(*args, **kwargs)
            return _Torn(done, count, n) if operation.__name__ == "fdopen" else done

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    _save(what, place, 2)


class _Torn:
    """A file whose writes may be cut in the middle."""

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


def _save(what, place, number):
    if what == "pair":
        vae = small.make_vae()
        torch.nn.init.constant_(vae.guide.encoder.trunk.layers[0].bias, number)
        checkpoint.save(place / "pair", vae)
        return
    series = Checkpoints(place / "series")
    for steps in range(3 if number == 1 else 1):  # so that the next save has one to remove
        series.save(10 * number + steps, {"number": number, "tensor": torch.full((1000,), number)}, score=-math.inf)


def _read(what, place):
    if what == "pair":
        return int(checkpoint.load(place / "pair").guide.encoder.trunk.layers[0].bias[0])
    _, content = Checkpoints(place / "series").last()
    (number,) = set(content["tensor"].tolist())
    assert number == content["number"]
    return number


PHASES = ("training", "evaluation", "building a graph")


def signals(folder):
    """SIGTERM and SIGINT to ``pyro-vae train``: a checkpoint, exit code 143 or 130, within 5 s; the resumed run is the
    uninterrupted one. A second signal kills."""
    words = ["train", "ring", "-n", 3, "-b", 50, "--pair", "tests.faults.interruptions:make_pair"]
    reference = Path(folder, "reference")
    assert small.run(_signalled, None, None, 0, [*words, "--out", reference]) == 0
    expected = _weights(reference)
    for number, expected_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for phase in PHASES:
            run = Path(folder, f"{number}-{phase}")
            code = small.run(_signalled, number, phase, 1, [*words, "--out", run], said=f"{folder}/said")
            took = time.perf_counter() - float(Path(folder, "sent").read_text())
            resumed = small.run(_signalled, None, None, 0, [*words, "--out", run, "--resume", "last"])
            fine = code == expected_code and took < 5 and resumed == 0 and _weights(run) == expected
            yield f"{signal.Signals(number).name} in {phase}: {code}, {took:.1f} s, {resumed}", fine
        code = small.run(_signalled, number, "training", 2, [*words, "--out", Path(folder, f"{number}-twice")])
        yield f"{signal.Signals(number).name} twice", code == -number


def make_pair():
    torch.manual_seed(0)
    from pyro_vae import VAE, conditionals, nets, priors

    return VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (30,)), event_shape=2, min_scale=0.02),
        conditionals.Normal(nets.MLP(2, (30,)), event_shape=2),
    )


def _signalled(number, phase, times, words):
    """The command line, which sends itself a signal in some phase of its work."""
    from pyro_vae.compiler import THRESHOLDS, Thresholds
    from pyro_vae.infer import fit as _  # noqa: F401
    from pyro_vae.infer.minibatch import MinibatchSVI
    from pyro_vae.infer.svi import SVI

    def sent(function, after):
        calls = iter(range(1_000_000))

        def call(*args, **kwargs):
            if next(calls) == after:
                Path(words[words.index("--out") + 1]).parent.joinpath("sent").write_text(str(time.perf_counter()))
                for _ in range(times):
                    os.kill(os.getpid(), number)
                time.sleep(0.01)  # Python hands it out between two of its instructions
            return function(*args, **kwargs)

        return call

    fit = sys.modules["pyro_vae.infer.fit"]
    if phase == "training":
        MinibatchSVI.minibatch_step = sent(MinibatchSVI.minibatch_step, 25)
    elif phase == "evaluation":
        fit.evaluate_batches = sent(fit.evaluate_batches, 1)
    elif phase == "building a graph":
        SVI._build = sent(SVI._build, 0)
    THRESHOLDS["fit"] = Thresholds(0, 10**9)  # a graph even for so few steps
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a script runs this in the background
    small.command(*words)


def _weights(run):
    ((file,),) = [list((run / "weights").glob("*.safetensors"))]
    return file.name


def reproducibility(folder):
    """Three processes end at the same parameters."""
    sums = []
    for i in range(3):
        place = Path(folder, str(i))
        place.mkdir()
        small.run(small.outcome, place)
        sums.append((place / "sum").read_text())
        yield f"process {i}", sums[i] == sums[0]


def two_fits(folder):
    """Two fits in one process are each what they are alone, in either order; the user's param store is as it was."""
    import pyro

    def fit(which):
        vae, _ = small.train(compile=False, num_epochs=2, vae=small.make_vae(which), seed=which)
        return small.sum_of(vae.parameters())

    alone = []
    for which in (0, 1):
        place = Path(folder, str(which))
        place.mkdir()
        assert small.run(_alone, place, which) == 0
        alone.append((place / "sum").read_text())
    with pyro.get_param_store().scope():
        mine = pyro.param("mine", torch.ones(3))
        for order in ((0, 1), (1, 0)):
            for which in order:
                yield f"{which} of {order}", fit(which) == alone[which]
        yield "the user's store", pyro.param("mine") is mine and len(pyro.get_param_store()) == 1


def _alone(place, which):
    vae, _ = small.train(compile=False, num_epochs=2, vae=small.make_vae(which), seed=which)
    Path(place, "sum").write_text(small.sum_of(vae.parameters()))
