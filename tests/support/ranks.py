"""What one of several processes computes: fits on data of every form, and functions that divide their rows.

``compute(folder)`` writes the results of this rank, or of a single process, to a file.
"""

import functools
import itertools
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import pyro_vae as pv
from pyro_vae import conditionals, evidence, infer, nets, priors
from tests.faults.processes import make_noiseless, make_rows

B = 20  # of 61 rows, so the last minibatch has one row


def rank_and_size():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Parts:
    """A stream of batches. Each rank reads its rows of each of them, or none if there are too few."""

    def __iter__(self):
        rank, size = rank_and_size()
        for part in zip(*(rows.split(B) for rows in make_rows()), strict=True):
            own = tuple(rows[rank::size] for rows in part)
            if len(own[0]):
                yield own


class PartsOfRows(IterableDataset):
    """A stream of rows, which a loader collects in batches."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        rank, size = rank_and_size()
        return itertools.islice(zip(*make_rows(), strict=True), rank, None, size)


class ByBatch(Dataset):
    """A data set that takes the indices of a whole batch."""

    def __len__(self):
        return 61

    def __getitem__(self, rows):
        return tuple(part[rows] for part in make_rows())


def mapped(folder):
    parts = []
    for i, rows in enumerate(make_rows()):
        path = Path(folder, f"{i}-{rank_and_size()[0]}.npy")
        np.save(path, rows.numpy())
        parts.append(np.load(path, mmap_mode="r"))
    return tuple(parts)


def loader(**options):
    return DataLoader(TensorDataset(*make_rows()), **options)


# the same minibatches for any number of processes
FORMS = {
    "tensors": lambda folder: make_rows(),
    "memory map": mapped,
    "loader": lambda folder: loader(batch_size=B),
    "loader with workers": lambda folder: loader(batch_size=B, num_workers=1),
    "loader with a list of batches": lambda folder: loader(
        batch_sampler=[list(part) for part in torch.arange(61).split(B)]
    ),
    "loader of a data set of batches": lambda folder: DataLoader(
        ByBatch(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(61)), B, drop_last=False)
    ),
    "stream": lambda folder: Parts(),
}


def fit(data, num_epochs=2, **options):
    model, guide = make_noiseless()
    num_data = 61 if callable(data) or isinstance(data, Parts) else None
    history = pv.fit(
        model, guide, data, num_epochs=num_epochs, batch_size=B, compile=False,
        optim=pyro.optim.SGD({"lr": 1e-4}), num_data=num_data, **options,
    )  # fmt: skip
    params = {name: value.detach() for name, value in history.param_store["params"].items()}
    elbos = [(e.train.elbo, e.validation.elbo if e.validation else 0.0) for e in history.epochs]
    return params | {"elbos": torch.tensor(elbos)}


def error_of(data, **options):
    try:
        return fit(data, **options)
    except ValueError as error:
        return str(error)


class Seen(TensorDataset):
    """Remembers which rows are loaded."""

    def __init__(self):
        super().__init__(*make_rows())
        self.rows = []

    def __getitem__(self, row):
        self.rows.append(int(row))
        return super().__getitem__(row)


def shuffled():
    """The rows that this rank loads in each of two shuffled epochs, after one in which the pair is inspected
    too."""
    size = rank_and_size()[1]
    seen = {}
    for name in ("loader", "DistributedSampler"):
        data = Seen()
        options = {"shuffle": True}
        if name == "DistributedSampler" and size > 1:
            options = {"sampler": DistributedSampler(data)}
        epochs = []
        model, guide = make_noiseless()
        for _ in pv.train(model, guide, DataLoader(data, batch_size=B, **options), num_epochs=3):
            epochs.append(data.rows)
            data.rows = []
        seen[name] = epochs[1:]
    return seen


def divided():
    """Results per datum of functions that divide their rows."""
    vae = make_vae()
    x = torch.randn(131, 3)
    pair = vae.model, vae.guide
    annealing = evidence.Annealing(num_temperatures=4, num_chains=3)
    with infer.across_processes():
        results = {
            "evaluate": pv.evaluate(*pair, x, batch_size=40).elbo,
            "evaluate a loader": pv.evaluate(*pair, DataLoader(TensorDataset(x), 25)).elbo,
            "evaluate IWAE": pv.evaluate(*pair, x, batch_size=40, loss=infer.IWAE(5)).bound,
            "elbo": evidence.elbo(*pair, x, num_particles=3).log_evidence,
            "importance": evidence.importance(*pair, x, num_particles=7).log_evidence,
            "importance in small chunks": evidence.importance(
                *pair, x, num_particles=7, max_bytes=50_000
            ).log_evidence,
            "ais": evidence.ais(vae.model, x, annealing=annealing).log_evidence,
            "smc": evidence.smc(vae.model, x, annealing=annealing).log_evidence,
            "diagnose": pv.diagnose(*pair, x, num_particles=20, num_simulations=0).importance.ess,
        }
    return results | {"importance alone": evidence.importance(*pair, x, num_particles=7).log_evidence}


def errors():
    """The errors of data that cannot be divided, or are not divided."""
    rank, size = rank_and_size()
    rows = make_rows()
    found = {
        "same stream": error_of(lambda: iter(zip(*(part.split(B) for part in rows), strict=True))),
        "same endless stream": error_of(
            lambda: itertools.cycle(zip(*(part.split(B) for part in rows), strict=True)), steps_per_epoch=3
        ),
        "rows of a rank": error_of(tuple(part[: 40 + rank] for part in rows), num_epochs=1),
        "parts of equal size": error_of(tuple(part[:60][rank::size] for part in rows)),
        "loader of a part": error_of(
            DataLoader(TensorDataset(*(part[:60][rank::size] for part in rows)), batch_size=B, shuffle=True)
        ),
        "sampler of a part": error_of(
            loader(batch_size=B, sampler=SubsetRandomSampler(range(rank, 60, size)))
        ),
        "batches of a part": error_of(
            loader(batch_sampler=[list(range(start + rank, start + 12, size)) for start in range(0, 60, 12)])
        ),
        "endless batch sampler": error_of(loader(batch_sampler=Endless())),
        "no rows on a rank": error_of(NoneOnTheLast()),
        "other sampler": error_of(
            loader(batch_size=B, sampler=DistributedSampler(range(61), size + 1, rank))
        ),
    }
    model, guide = make_noiseless()
    try:
        with infer.across_processes():
            pv.evaluate(model, guide, tuple(part + rank for part in rows))
    except ValueError as error:
        found["evaluate"] = str(error)
    pair, x = make_vae(seed=rank), torch.ones(60, 3)
    with infer.across_processes():
        for name, compute in {
            "evaluate more rows": lambda: pv.evaluate(model, guide, [part[: 40 + rank] for part in rows]),
            "evaluate another pair": lambda: pv.evaluate(pair.model, pair.guide, x),
            "importance of another pair": lambda: evidence.importance(pair.model, pair.guide, x),
            "ais of another pair": lambda: evidence.ais(pair.model, x),
        }.items():
            try:
                found[name] = compute()
            except ValueError as error:
                found[name] = str(error)
    return found


def make_vae(seed=0):
    torch.manual_seed(seed)
    return pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Normal(nets.MLP(2, (8,)), event_shape=3),
        encoder=conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    )


class Endless(Sampler):
    """A batch sampler that does not stop at its length."""

    def __init__(self):
        pass

    def __len__(self):
        return 4

    def __iter__(self):
        return itertools.cycle([list(range(start, start + B)) for start in (0, 20, 40)])


class NoneOnTheLast:
    """A stream without rows on the last rank."""

    num_data = 61

    def __iter__(self):
        rank, size = rank_and_size()
        return iter(()) if rank == size - 1 else zip(*(part.split(B) for part in make_rows()), strict=True)


class Uneven:
    """A stream of 60 rows with smaller batches on rank 0."""

    num_data = 60

    def __iter__(self):
        rank, size = rank_and_size()
        own = [part[:60][rank::size] for part in make_rows()]
        return zip(*(part.split(B if rank else 5) for part in own), strict=True)


class Centered(torch.nn.Module):
    """A guide with buffers: running means of the rows that it has seen, and one that is expanded."""

    def __init__(self):
        super().__init__()
        self.norm, self.loc = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
        self.register_buffer("zero", torch.zeros(1).expand(2))

    def forward(self, x):
        pyro.module("centered", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(self.norm(x)) + self.zero, 1.0).to_event(1))


def equal_on_all_ranks():
    """What must be the same on all ranks: β at each step of a stream whose batches differ in size, and
    parameters and buffers after a fit."""
    betas = []

    def beta(t):
        betas.append(t)
        return 1.0

    fit(Uneven(), beta=beta)
    torch.manual_seed(0)
    decoder, guide = torch.nn.Linear(2, 3), Centered()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    pv.fit(model, guide, torch.randn(60, 3), batch_size=B, num_epochs=2, check=False, compile=False)
    return {"betas": torch.tensor(betas)} | guide.state_dict()


class Kept(logging.Handler):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def in_order(function):
    """Let the function train without shuffling."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        randperm, torch.randperm = torch.randperm, lambda n, **_: torch.arange(n)
        try:
            torch.set_num_threads(1)
            return function(*args, **kwargs)
        finally:
            torch.randperm = randperm

    return wrapped


@in_order
def begin(folder):
    """Train two epochs and save checkpoints."""
    fit(make_rows(), checkpoint=Path(folder, "begun"))


@in_order
def resume(folder):
    """Continue the fit for a third epoch, in a copy of the checkpoints."""
    rank, size = rank_and_size()
    kept, copy = Kept(), Path(folder, f"copy {size}")
    if rank == 0:
        shutil.copytree(Path(folder, "begun"), copy)
    if size > 1:
        torch.distributed.barrier()
    logging.getLogger("pyro_vae").addHandler(kept)
    params = fit(make_rows(), checkpoint=copy, resume="last", num_epochs=3)
    logging.getLogger("pyro_vae").removeHandler(kept)
    num_epochs = len(params.pop("elbos"))
    uninterrupted = fit(make_rows(), num_epochs=3)
    del uninterrupted["elbos"]
    result = {"params": params, "uninterrupted": uninterrupted, "warnings": kept.messages}
    torch.save(result | {"num_epochs": num_epochs}, Path(folder, f"{size}-{rank}.pt"))


@in_order
def trained_forms(folder):
    """Parameters and ELBOs after fits on data of each form."""
    return {name: fit(form(folder), validation=make_rows()) for name, form in FORMS.items()}


def compute(folder):
    torch.set_num_threads(1)
    rank, size = rank_and_size()
    results = {"forms": trained_forms(folder), "shuffled": shuffled(), "divided": divided()}
    if size > 1:
        results["errors"] = errors()
        results["equal"] = equal_on_all_ranks()
        results["drop_last"] = fit(DataLoader(PartsOfRows(61), batch_size=B, drop_last=True))
    torch.save(results, Path(folder, f"{size}-{rank}.pt"))
