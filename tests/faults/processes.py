"""Several processes train the same parameters as one. A killed process ends the job, which can be resumed."""

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
    """A pair with a global latent and parameters of plain functions. Its noise is an argument, so that it
    does not depend on the number of processes."""
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
    # the last minibatch of 20 has 1 row, fewer than processes
    return torch.randn(61, 3, generator=noise).double(), torch.randn(61, 2, generator=noise).double()


def train(folder, loss, compile, num_epochs=3, optim=None, **options):
    """A fit without shuffling, so that it does not depend on the number of processes."""
    torch.set_num_threads(1)
    torch.randperm = lambda n, **_: torch.arange(n)
    model, guide = make_noiseless()
    rows = make_rows()
    history = pv.fit(
        model, guide, rows, validation=(rows[0][:7], rows[1][:7]), loss=LOSSES[loss](), batch_size=20,
        num_epochs=num_epochs, optim=optim or pyro.optim.SGD({"lr": 1e-4}), compile=compile, **options,
    )  # fmt: skip
    rank = int(os.environ.get("RANK", 0))
    means = [
        mean for epoch in history.epochs for part in (epoch.train, epoch.validation) for mean in part[:3]
    ]
    params = {name: value.detach() for name, value in history.param_store["params"].items()}
    save_file({**params, "means": torch.tensor(means, dtype=torch.double)}, Path(folder, str(rank)))


def run_rank(rank, size, port, target, *args, **kwargs):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    target(*args, **kwargs)
    torch.distributed.destroy_process_group()


def run_group(size, target, *args, **kwargs):
    """Run ``target`` on ``size`` processes. Returns whether all exit codes are 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        small.CONTEXT.Process(target=run_rank, args=(rank, size, port, target, *args), kwargs=kwargs)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return all(process.exitcode == 0 for process in processes)


def one_and_several(folder):
    """Two and three processes at the same global batch equal one process: parameters after gradient descent
    to 1e-12, means to 1e-6. Ranks with gradients of different parameters raise."""
    for loss in LOSSES:
        for compile in (False, "trace"):
            results = []
            for size in (1, 2, 3):
                subfolder = Path(folder, f"{loss}-{compile}-{size}")
                subfolder.mkdir()
                args = (train, subfolder, loss, compile)
                succeeded = run_group(size, *args) if size > 1 else small.run(*args) == 0
                if not succeeded:
                    yield f"{loss}, {compile}, {size} processes: failed", False
                    continue
                results.append([load_file(subfolder / str(rank)) for rank in range(size)])
            for ranks in results[1:]:
                errors = {
                    name: max(((params[name] - p).abs() / p.abs().max()).max().item() for params in ranks)
                    for name, p in results[0][0].items()
                }
                means, parameters = errors.pop("means"), max(errors.values())
                description = f"{loss}, {compile}, {len(ranks)} processes"
                yield (
                    f"{description}: parameters {parameters:.1e}, means {means:.1e}",
                    parameters < 1e-12 and means < 1e-6,
                )

    subfolder = Path(folder, "different")
    subfolder.mkdir()
    succeeded = run_group(2, train_different_parameters, subfolder)
    messages = [Path(subfolder, str(rank)).read_text() for rank in range(2)] if succeeded else []
    passed = succeeded and all("gradients of different parameters" in message for message in messages)
    yield f"different parameters: {messages}", passed


def train_different_parameters(folder):
    """A fit in which each rank uses another one of two networks."""
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
        Path(folder, str(rank)).write_text(str(error))


def death(folder):
    """``torchrun`` with two workers, of which one is killed: the job ends in less than 30 s. When it is
    resumed, or restarted by ``torchrun``, it trains the same parameters as an uninterrupted job."""
    reference, ended, restarted = (Path(folder, name) for name in ("reference", "ended", "restarted"))
    log = Path(folder, "log")
    words = ["train", "ring", "-n", 6, "-b", 50, "--every", 5]
    assert torchrun([*words, "--out", reference], log).wait(120) == 0, log.read_text()
    expected = _weights(reference)
    job = torchrun([*words, "--out", ended], log)
    _kill_a_worker(ended)
    start = time.perf_counter()
    code = job.wait(60)
    seconds = time.perf_counter() - start
    yield f"ended after {seconds:.1f} s with {code}", code != 0 and seconds < 30
    code = torchrun([*words, "--out", ended, "--resume", "last"], log).wait(120)
    yield f"resumed: {code}, {log.read_text()}", code == 0 and _weights(ended) == expected
    job = torchrun([*words, "--out", restarted, "--resume", "last"], log, "--max-restarts=1")
    _kill_a_worker(restarted)
    code = job.wait(120)
    yield f"restarted by torchrun: {code}, {log.read_text()}", code == 0 and _weights(restarted) == expected


def torchrun(words, log, *options):
    """Start the command line on two processes, with their output in the file ``log``."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
    ]
    with open(log, "w") as file:
        return subprocess.Popen([*command, "-m", "pyro_vae", *map(str, words)], stdout=file, stderr=file)


def _kill_a_worker(run):
    """Kill rank 1, which writes no files, after the first checkpoint."""
    for _ in range(600):
        if Checkpoints(run / "checkpoints").paths():
            break
        time.sleep(0.05)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(run).encode() in words and b"RANK=1" in environment:
            os.kill(int(entry.name), signal.SIGKILL)


def _weights(run):
    ((file,),) = [list((run / "weights").glob("*.safetensors"))]
    return file.name
