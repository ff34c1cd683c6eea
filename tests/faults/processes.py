"""Several processes: what they train is what one would; one that dies ends the job, which goes on where it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from safetensors.torch import load_file, save_file
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.checkpoint import Checkpoints
from tests.faults import small

LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
}


def make_noiseless():
    """A pair whose noise comes with the data, so that one process and several see the same; with a latent that all data
    share, and parameters of plain functions."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()

    def model(x, noise):
        scale = pyro.param("scale", torch.ones(3).double(), constraint=constraints.positive)
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x, noise):
        pyro.module("network", network)
        weight = pyro.param("weight_loc", torch.eye(2, 3).double())
        pyro.sample("weight", dist.Delta(weight, event_dim=2))
        with pyro.plate("data", len(x)):
            loc = network(x)
            z = loc + 0.5 * noise
            pyro.sample("z", dist.Delta(z, dist.Normal(loc, 0.5).log_prob(z).sum(-1), event_dim=1))

    return model, guide


def make_rows():
    noise = torch.Generator().manual_seed(1)
    # the last minibatch of 20 has 1 row: more processes than rows
    return torch.randn(61, 3, generator=noise).double(), torch.randn(61, 2, generator=noise).double()


def train(place, loss, compile, num_epochs=3, optim=None, **options):
    """A fit that is the same for one process and for several: the data in their own order."""
    torch.set_num_threads(1)
    torch.randperm = lambda n, **_: torch.arange(n)
    model, guide = make_noiseless()
    rows = make_rows()
    history = pv.fit(
        model, guide, rows, validation=(rows[0][:7], rows[1][:7]), loss=LOSSES[loss](), batch_size=20, num_epochs=num_epochs,
        optim=optim or pyro.optim.SGD({"lr": 1e-4}), compile=compile, **options,
    )  # fmt: skip
    rank = int(os.environ.get("RANK", 0))
    means = [mean for epoch in history.epochs for part in (epoch.train, epoch.validation) for mean in part[:3]]
    params = {name: value.detach() for name, value in history.param_store["params"].items()}
    save_file({**params, "means": torch.tensor(means, dtype=torch.double)}, Path(place, str(rank)))


def grouped(rank, size, port, target, *args, **kwargs):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    target(*args, **kwargs)
    torch.distributed.destroy_process_group()


def together(size, target, *args, **kwargs):
    """Run so many processes; whether all went well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        small.CONTEXT.Process(target=grouped, args=(rank, size, port, target, *args), kwargs=kwargs) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return all(process.exitcode == 0 for process in processes)


def one_and_several(folder):
    """Two and three processes at the same global batch: parameters after plain gradient descent to 1e-12, means to 1e-6;
    two with gradients of different parameters are refused."""
    for loss in LOSSES:
        for compile in (False, "trace"):
            found = []
            for size in (1, 2, 3):
                place = Path(folder, f"{loss}-{compile}-{size}")
                place.mkdir()
                fine = together(size, train, place, loss, compile) if size > 1 else small.run(train, place, loss, compile) == 0
                if not fine:
                    yield f"{loss}, {compile}, {size} processes: failed", False
                    continue
                found.append([load_file(place / str(rank)) for rank in range(size)])
            for several in found[1:]:
                one = found[0][0]
                off = {n: max(((each[n] - p).abs() / p.abs().max()).max().item() for each in several) for n, p in one.items()}
                means = off.pop("means")
                what = f"{loss}, {compile}, {len(several)} processes: parameters {max(off.values()):.1e}, means {means:.1e}"
                yield what, max(off.values()) < 1e-12 and means < 1e-6

    place = Path(folder, "apart")
    place.mkdir()
    fine = together(2, train_apart, place)
    said = [Path(place, str(rank)).read_text() for rank in range(2)] if fine else []
    yield f"different parameters: {said}", fine and all("gradients of different parameters" in text for text in said)


def train_apart(place):
    """Each process uses a network of its own, though both have both."""
    rank = int(os.environ["RANK"])
    networks = [torch.nn.Linear(3, 2) for _ in range(2)]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x)

    def guide(x):
        for i, network in enumerate(networks):
            pyro.module(f"network{i}", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(networks[rank](x), 1.0).to_event(1))

    try:
        pv.fit(model, guide, torch.randn(20, 3), num_epochs=1)
    except ValueError as error:
        Path(place, str(rank)).write_text(str(error))


def death(folder):
    """``torchrun`` with two workers, one killed: the job ends in less than 30 s. With a restart it goes on, to the
    parameters of a job that nothing happened to."""
    whole, ended, restarted = (Path(folder, name) for name in ("whole", "ended", "restarted"))
    log = Path(folder, "log")
    words = ["train", "ring", "-n", 6, "-b", 50, "--every", 5]
    assert torchrun([*words, "--out", whole], log).wait(120) == 0, log.read_text()
    expected = _weights(whole)
    job = torchrun([*words, "--out", ended], log)
    _kill_a_worker(ended)
    start = time.perf_counter()
    code = job.wait(60)
    yield f"ended after {time.perf_counter() - start:.1f} s with {code}", code != 0 and time.perf_counter() - start < 30
    code = torchrun([*words, "--out", ended, "--resume", "last"], log).wait(120)
    yield f"resumed: {code}, {log.read_text()}", code == 0 and _weights(ended) == expected
    job = torchrun([*words, "--out", restarted, "--resume", "last"], log, "--max-restarts=1")
    _kill_a_worker(restarted)
    code = job.wait(120)
    yield f"restarted by torchrun: {code}, {log.read_text()}", code == 0 and _weights(restarted) == expected


def torchrun(words, log, *options):
    """Start the command line on two processes; what they print goes into a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    with open(log, "w") as file:
        return subprocess.Popen([*command, "-m", "pyro_vae", *map(str, words)], stdout=file, stderr=file)


def _kill_a_worker(run):
    """The one that writes nothing, once there is a checkpoint."""
    for _ in range(600):
        if Checkpoints(run / "checkpoints").paths():
            break
        time.sleep(0.05)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, given = (entry / "cmdline").read_bytes().split(b"\0"), (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and b"RANK=1" in given:
            os.kill(int(entry.name), signal.SIGKILL)


def _weights(run):
    ((file,),) = [list((run / "weights").glob("*.safetensors"))]
    return file.name
