"""A small pair, its fit, and processes that run them."""

import hashlib
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pyro
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.cli import app

LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "IWAE": lambda: RenyiELBO(alpha=0, num_particles=3),
}
# forks of a server that has imported torch and Pyro and has no threads
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.fx.experimental.proxy_tensor", "pyro_vae.cli.runs", "tests.faults.small"]
)


def make_vae(seed=0, **kwargs):
    torch.manual_seed(seed)
    return pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Normal(nets.MLP(2, (30,)), event_shape=4),
        encoder=conditionals.Normal(nets.MLP(4, (30,)), event_shape=2),
    )


def make_data(n=1010):
    noise = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, generator=noise) @ torch.randn(2, 4, generator=noise) + 0.3 * torch.randn(
        n, 4, generator=noise
    )


def checksum(tensors):
    """SHA-256 of the bytes of tensors."""
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def train(loss="Trace_ELBO", *, vae=None, seed=1, num_epochs=8, compile="trace", **options):
    """A fit with a learning-rate schedule, early stopping, and a smaller last batch."""
    torch.set_num_threads(1)
    vae, x = vae or make_vae(), make_data()
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    )
    pyro.set_rng_seed(seed)
    history = pv.fit(
        vae.model,
        vae.guide,
        x[:1000],
        validation=x[1000:],
        loss=LOSSES[loss](),
        optim=optim,
        num_epochs=num_epochs,
        batch_size=30,
        patience=num_epochs,
        compile=compile,
        **options,
    )
    return vae, history


def train_to_checksum(folder, *args, **kwargs):
    """Train, and write the checksum of the parameters to the file ``sum``."""
    vae, _ = train(*args, **kwargs)
    Path(folder, "sum").write_text(checksum(vae.parameters()))


def run(target, *args, timeout=120, **kwargs):
    """Call ``target`` in a new process. Returns its exit code, or minus the number of the signal that killed
    it."""
    process = CONTEXT.Process(target=call_with_output, args=(target, args, kwargs))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return "hangs"
    return process.exitcode


def call_with_output(target, args, kwargs):
    """Call ``target`` with its output in the file ``output``."""
    output = kwargs.pop("output", os.devnull)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # no semaphore, which a killed process would leak
    target(*args, **kwargs)


def command(*words):
    """Run the command line in this process."""
    torch.set_num_threads(1)
    sys.argv = ["pyro-vae", *map(str, words)]
    app.main()
