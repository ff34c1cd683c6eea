"""A fit on memory maps on one of several processes."""

import os
from pathlib import Path

import numpy as np
import pyro
import torch
from safetensors.torch import save_file

import pyro_vae as pv
from tests.faults.processes import make_noiseless


def train_rank(folder):
    """A fit without shuffling and without noise, so that it does not depend on the number of processes."""
    torch.set_num_threads(1)
    torch.randperm = lambda n, **_: torch.arange(n)
    model, guide = make_noiseless()
    rows = tuple(np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in ("x", "noise"))
    history = pv.fit(
        model, guide, rows, validation=rows, batch_size=20, num_epochs=2, compile=False,
        optim=pyro.optim.SGD({"lr": 1e-4}),
    )  # fmt: skip
    params = {name: value.detach() for name, value in history.param_store["params"].items()}
    means = torch.tensor([epoch.validation.elbo for epoch in history.epochs], dtype=torch.double)
    save_file({**params, "means": means}, Path(folder, os.environ.get("RANK", "one")))
