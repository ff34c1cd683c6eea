"""A fit that is interrupted at any step and resumed is bitwise equal to the uninterrupted fit."""

import logging
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError, read_checkpoint
from pyro_vae.checkpoint.folder import write
from pyro_vae.infer import resume as resume_module
from pyro_vae.infer import snapshot
from pyro_vae.pairs.elbo import MeanElbo
from tests.support.fits import assert_same, data, functions, run, run_until_step


def labelled():
    def model(x):
        logits = pyro.param("logits", torch.zeros(3))
        locs = pyro.param("locs", torch.arange(3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(locs[k].unsqueeze(-1), torch.ones(4)).to_event(1), obs=x)

    return config_enumerate(model), lambda x: None, []


def scheduled(kind, **options):
    return lambda: pyro.optim.PyroLRScheduler(
        kind, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, **options}
    )


def branches():
    """Parameters that only some minibatches use; in other steps momentum updates them."""
    networks = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(4)).to_event(1), obs=x)

    def guide(x):
        pyro.module("networks", networks)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(networks[int(x[0, 0] > 0)](x).squeeze(-1), 1.0))

    return model, guide, list(networks.parameters())


class RandomLayer(nn.Module):
    """Each run uses one of two batch norms at random, so their order of first use must not identify them."""

    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2)), nn.Linear(4, 1)

    def forward(self, x):
        pyro.module("random_layer", self)
        with pyro.plate("data", len(x)):
            chosen = self.layers[int(torch.rand(()) > 0.5)]
            pyro.sample("z", dist.Normal(self.last(chosen(x)).squeeze(-1), 1.0))


def random_layer():
    model, _, _ = branches()
    guide = RandomLayer()
    return model, guide, [*guide.parameters(), *guide.buffers()]


def loader():
    noise = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(data()), 20, shuffle=True, generator=noise)


def batch_sampled():
    rows = data()
    order = torch.utils.data.RandomSampler(rows, generator=torch.Generator().manual_seed(5))
    return DataLoader(
        TensorDataset(rows), batch_sampler=torch.utils.data.BatchSampler(order, 20, drop_last=False)
    )


def memory_map():
    with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the name of the file
        np.save(Path(folder, "x.npy"), data().numpy())
        return np.load(Path(folder, "x.npy"), mmap_mode="r")


class Noisy(torch.utils.data.Dataset):
    """Items that draw from the generators of torch, Python and numpy."""

    def __len__(self):
        return 107

    def __getitem__(self, i):
        import random

        return data()[i] + 0.1 * torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002


class StatefulBatches:
    """A stream of batches in an order of its own. Its position is its state."""

    def __init__(self):
        self.num_passes = self.num_used = 0

    def __iter__(self):
        order = torch.randperm(107, generator=torch.Generator().manual_seed(self.num_passes)).split(20)
        while self.num_used < len(order):
            self.num_used += 1
            yield data()[order[self.num_used - 1]]
        self.num_passes, self.num_used = self.num_passes + 1, 0

    def state_dict(self):
        return {"passes": self.num_passes, "used": self.num_used}

    def load_state_dict(self, state):
        self.num_passes, self.num_used = state["passes"], state["used"]


class StatefulLoader(DataLoader):
    """A loader in the order of its data set, which reads the remaining items only when it is resumed."""

    num_used = 0

    def __iter__(self):
        first, self.num_used = self.num_used, 0
        for i, rows in enumerate(self.batch_sampler):
            if i >= first:
                self.num_used = i + 1
                yield self.collate_fn([self.dataset[row] for row in rows])
        self.num_used = 0

    def state_dict(self):
        return {"used": self.num_used}

    def load_state_dict(self, state):
        self.num_used = state["used"]


CASES = {
    "mean-field": {"loss": TraceMeanField_ELBO},
    "importance-weighted": {"loss": lambda: RenyiELBO(alpha=0, num_particles=3)},
    "many particles": {
        "loss": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    },
    "plain functions": {"pair": functions},
    "some parameters in some steps": {"pair": branches, "check": False},
    "some buffers in some steps": {"pair": random_layer, "check": False},
    "a batch sampler": {"x": batch_sampled},
    "enumerated": {"pair": labelled, "loss": TraceEnum_ELBO},
    "early stopping": {"patience": 3, "optim": lambda: pyro.optim.Adam({"lr": 0.3}), "num_epochs": 30},
    "a DataLoader": {"x": loader},
    "a Dataset that draws": {"x": Noisy},
    "stochastic pixels": {"x": lambda: pv.Data(data().sigmoid(), binarize="stochastic")},
    "a memory map": {"x": memory_map},
    "a loader with a state": {"x": lambda: StatefulLoader(Noisy(), 20)},
    "a stream with a state": {"x": StatefulBatches, "num_data": 107},
    "epochs of a stream with a state": {"x": StatefulBatches, "num_data": 107, "steps_per_epoch": 4},
    "all data at once": {"batch_size": None, "num_epochs": 40},
    "annealed": {"beta": lambda t: min(1.0, t / 3)},
    "clipped": {"clip_norm": 5.0},
    "in bfloat16": {"autocast": torch.bfloat16},
    "exponential": {"optim": scheduled(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8)},
    "milestones": {"optim": scheduled(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3])},
    "plateau": {"optim": scheduled(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)},
    "ClippedAdam": {"optim": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99})},
    "RMSprop": {"optim": lambda: pyro.optim.RMSprop({"lr": 0.01, "momentum": 0.5})},
    "AdamW, clipped by Pyro": {"optim": lambda: pyro.optim.AdamW({"lr": 0.01}, {"clip_norm": 1.0})},
}


# DEFAULT are in the default run; the others are slow
TRACED_CASES = (
    "importance-weighted",
    "plain functions",
    "some parameters in some steps",
    "some buffers in some steps",
    "enumerated",
    "early stopping",
    "a DataLoader",
    "stochastic pixels",
    "annealed",
    "in bfloat16",
    "plateau",
)
DEFAULT = {
    ("importance-weighted", False),
    ("plain functions", False),
    ("some parameters in some steps", False),
    ("a batch sampler", False),
    ("enumerated", False),
    ("early stopping", False),
    ("a DataLoader", False),
    ("a Dataset that draws", False),
    ("a loader with a state", False),
    ("epochs of a stream with a state", False),
    ("in bfloat16", False),
    ("plateau", False),
    ("some buffers in some steps", "trace"),
}


@pytest.mark.parametrize(
    ("compile", "name"),
    [
        pytest.param(compile, name, marks=[] if (name, compile) in DEFAULT else pytest.mark.slow)
        for compile, names in ((False, CASES), ("trace", TRACED_CASES))
        for name in names
    ],
)
def test_a_resumed_fit_equals_the_uninterrupted_fit_bitwise(tmp_path, monkeypatch, name, compile):
    options = CASES[name] | {"compile": compile}
    whole = run(**options)
    for steps in (1, 6, 14):  # after the first step, at the end of an epoch, within an epoch
        folder = tmp_path / str(steps)
        run_until_step(monkeypatch, steps, checkpoint=folder, **options)
        assert_same(run(checkpoint=folder, resume="last", seed=77, **options), whole)


def test_a_loader_with_a_state_reads_the_remaining_items_only(tmp_path, monkeypatch):
    options = {"x": lambda: StatefulLoader(TensorDataset(data()), 20), "validation": None, "num_epochs": 1}
    run_until_step(monkeypatch, 4, checkpoint=tmp_path, **options)
    read, item = [], TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, i: read.append(i) or item(self, i))
    run(checkpoint=tmp_path, resume="last", **options)
    assert read == [*range(20), *range(80, 107)]  # the pair is inspected on the first batch


def in_order():
    yield from data().split(20)


@pytest.mark.parametrize("steps", [1, 8])
def test_an_epoch_of_a_stream_without_a_state_begins_anew(tmp_path, monkeypatch, caplog, steps):
    options = {"x": lambda: in_order, "num_data": 107, "num_epochs": 3, "compile": False}
    run_until_step(monkeypatch, steps, checkpoint=tmp_path, **options)
    used, epoch = steps % 6, steps // 6 + 1
    with caplog.at_level(logging.WARNING):
        _, epochs = run(checkpoint=tmp_path, resume="last", **options)
    assert [record.epoch for record in epochs] == [1, 2, 3]
    assert caplog.text.count(f"epoch {epoch} begins anew") == 1
    assert Checkpoints(tmp_path).last()[1]["steps"] == 18 + used  # the used batches are used again


def test_a_stream_without_a_state_is_resumed_bitwise_between_epochs(tmp_path, caplog):
    options = {"x": lambda: in_order, "num_data": 107, "compile": False}
    run(num_epochs=2, checkpoint=tmp_path, **options)
    with caplog.at_level(logging.WARNING):
        resumed = run(num_epochs=3, checkpoint=tmp_path, resume="last", seed=77, **options)
    assert "anew" not in caplog.text
    assert_same(resumed, run(num_epochs=3, **options))


def test_bounded_epochs_of_a_stream_without_a_state_begin_at_its_start(tmp_path, caplog):
    options = {"x": lambda: in_order, "num_data": 107, "steps_per_epoch": 4, "validation": None}
    run(num_epochs=2, checkpoint=tmp_path, **options)
    with caplog.at_level(logging.WARNING):
        _, epochs = run(num_epochs=3, checkpoint=tmp_path, resume="last", **options)
    assert len(epochs) == 3
    assert caplog.text.count("is read from its start: epoch 3") == 1


@pytest.mark.slow
def test_a_resumed_fit_by_inductor_equals_the_uninterrupted_fit_bitwise(tmp_path, monkeypatch):
    whole = run(compile=True, num_epochs=3)
    run_until_step(monkeypatch, 7, checkpoint=tmp_path, compile=True, num_epochs=3)
    assert_same(run(checkpoint=tmp_path, resume="last", compile=True, num_epochs=3), whole)


def test_a_resumed_fit_with_a_torch_optimizer_equals_the_uninterrupted_fit_bitwise(tmp_path, monkeypatch):
    def fit(**options):
        torch.manual_seed(0)
        made = pv.VAE(
            priors.StandardNormal(2),
            conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
            conditionals.Normal(nets.MLP(4, (9,)), event_shape=2),
        )
        optim = torch.optim.Adam(made.parameters(), 0.01)
        pv.fit(made.model, made.guide, data(), optim=optim, batch_size=20, num_epochs=3, **options)
        return [p.detach() for p in made.parameters()]

    whole = fit()
    fit(checkpoint=tmp_path, every=4)
    resumed = fit(resume=Checkpoints(tmp_path).paths()[0])
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


def with_baseline():
    """A discrete latent with a decaying-average baseline, a parameter that the loss creates."""

    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(len(x))))
            pyro.sample("x", dist.Normal(locs[k.long()].unsqueeze(-1), torch.ones(4)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = pyro.param("weight", torch.ones(4)) @ x.mT
            pyro.sample(
                "k", dist.Bernoulli(logits=logits), infer={"baseline": {"use_decaying_avg_baseline": True}}
            )

    return model, guide, []


def test_parameters_that_the_loss_creates_are_restored(tmp_path, monkeypatch):
    options = {"pair": with_baseline, "x": lambda: data(100), "loss": TraceGraph_ELBO, "validation": None}
    whole = run(**options)
    run_until_step(monkeypatch, 12, checkpoint=tmp_path, **options)
    assert_same(run(checkpoint=tmp_path, resume="last", **options), whole)
    assert len(whole[0]) == 3


def test_resuming_with_more_epochs_equals_one_fit_of_all_epochs(tmp_path):
    """Resuming a finished fit changes nothing."""
    whole = run(num_epochs=5)
    short = run(num_epochs=3, checkpoint=tmp_path)
    assert_same(run(num_epochs=3, checkpoint=tmp_path, resume="last"), short)
    assert_same(run(num_epochs=5, checkpoint=tmp_path, resume="last"), whole)


def test_the_newest_two_and_the_best_checkpoint_are_kept(tmp_path):
    """The best checkpoint is that of the highest validation ELBO."""
    _, epochs = run(optim=lambda: pyro.optim.Adam({"lr": 0.3}), num_epochs=8, checkpoint=tmp_path, every=4)
    best = max(epochs, key=lambda epoch: epoch.validation.elbo).epoch
    steps = [int(path.name.removeprefix("step-")) for path in Checkpoints(tmp_path).paths()]
    assert steps == sorted({6 * best, 44, 48})
    path, content = Checkpoints(tmp_path).best()
    assert (path.name, len(content["history"])) == (f"step-{6 * best:08d}", best)
    resumed = run(
        optim=lambda: pyro.optim.Adam({"lr": 0.3}), num_epochs=8, resume="best", checkpoint=tmp_path
    )
    assert str(resumed[1]) == str(epochs)


def checkpoint_of_one_epoch(folder):
    run(num_epochs=1, checkpoint=folder)
    return Checkpoints(folder).paths()[-1]


def test_invalid_options_for_resuming_raise(tmp_path):
    run(num_epochs=1, checkpoint=tmp_path / "a")
    for options, message in (
        ({"batch_size": 19}, "batch_size is 19 but was 20"),
        ({"validation": data(33) + 1}, "validation is"),
        ({"optim": lambda: pyro.optim.Adam({"lr": 0.02})}, "optim is"),
        ({"optim": lambda: pyro.optim.AdamW({"lr": 0.01})}, "optim is"),
        ({"x": data() + 1}, "data is"),
        ({"loss": TraceMeanField_ELBO}, "loss is"),
        ({"beta": 0.5}, "beta is 0.5 but was 1.0"),
        ({"clip_norm": 1.0}, "clip_norm is"),
    ):
        with pytest.raises(MismatchError, match=message):
            run(checkpoint=tmp_path / "a", resume="last", **options)
    with pytest.raises(ValueError, match="parameters of another pair"):
        run(branches, checkpoint=tmp_path / "a", resume="last", check=False)
    with pytest.raises(FileExistsError, match="resume="):
        run(checkpoint=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="nothing stored"):
        run(resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoint=FOLDER"):
        run(resume="last")
    with pytest.raises(ValueError, match="every: expected a whole number, 1 or more, but got 0"):
        run(every=0, checkpoint=tmp_path / "b")
    with pytest.raises(ValueError, match="clip_norm is -1"):
        run(clip_norm=-1.0)
    with pytest.raises(FileExistsError, match="holds checkpoints already"):
        run(num_epochs=2, checkpoint=tmp_path / "a", resume=checkpoint_of_one_epoch(tmp_path / "other"))
    run(num_epochs=3, checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match="after 3 epochs but num_epochs is 1"):
        run(num_epochs=1, checkpoint=tmp_path / "d", resume="last")
    run(num_epochs=1, validation=None, checkpoint=tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="validation"):
        run(checkpoint=tmp_path / "c", validation=None, resume="best")
    assert not (tmp_path / "b").exists()


def test_resume_last_skips_a_damaged_checkpoint(tmp_path, caplog):
    whole = run(checkpoint=tmp_path)
    newest = Checkpoints(tmp_path).paths()[-1]
    (tensors,) = newest.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert_same(run(checkpoint=tmp_path, resume="last"), whole)
    assert str(tensors) in caplog.text
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(newest)


@pytest.mark.parametrize("name", ["weights", "seconds", "best.epochs_since", "ranks.0.terms", "ranks"])
def test_the_error_for_a_checkpoint_without_an_entry_names_the_entry(tmp_path, name):
    run(num_epochs=1, checkpoint=tmp_path)
    (path, content) = Checkpoints(tmp_path).last()
    *parents, last = name.split(".")
    part = content
    for key in parents:
        part = part[int(key) if isinstance(part, list) else key]
    del part[last]
    write(path, "training run", content, score=-math.inf)
    for resume in ("last", path):
        with pytest.raises(MismatchError, match=rf"{path.name} lacks {re.escape(name)}.*start a new fit"):
            run(checkpoint=tmp_path, resume=resume)


def test_resuming_from_the_best_checkpoint_renames_the_later_ones(tmp_path):
    """No file of the folder is deleted."""
    options = {"optim": lambda: pyro.optim.Adam({"lr": 0.3}), "seed": 3, "checkpoint": tmp_path}
    run(num_epochs=8, **options)
    best = Checkpoints(tmp_path).best()[0]
    names = {path.name for path in Checkpoints(tmp_path).paths()}
    assert best.name < max(names)
    (tmp_path / "step-500").mkdir()  # not a checkpoint
    (tmp_path / "step-notes.txt").write_text("mine")
    resumed = run(num_epochs=8, resume="best", **options)
    assert len(resumed[1]) == 8
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"step-500", "step-notes.txt"} < kept
    assert all(any(name in other for other in kept) for name in names)


def test_epoch_of_is_the_inverse_of_tuple():
    record = pv.Epoch(3, 0.5, MeanElbo(-1.0, -0.5, 0.5, 0.1), None, 2.0)
    assert pv.Epoch.of(tuple(record)) == record


def test_persistent_workers_of_a_loader_give_a_warning(tmp_path):
    """Checkpoints do not contain their random states."""
    persistent = DataLoader(TensorDataset(data()), batch_size=20, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers=False"):
        run(x=lambda: persistent, num_epochs=1, checkpoint=tmp_path)


@pytest.mark.parametrize("package", ["torch", "pyro-ppl"])
def test_another_version_gives_a_warning_and_the_fit_continues(tmp_path, monkeypatch, package):
    whole = run(num_epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "versions", lambda: snapshot.versions() | {package: "0.0.7"})
        run(num_epochs=1, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"{package} 0.0.7 (now {snapshot.versions()[package]})")):
        assert_same(run(num_epochs=3, checkpoint=tmp_path, resume="last"), whole)
    # the last checkpoint is of the installed versions, so there is no warning
    run(num_epochs=4, checkpoint=tmp_path, resume="last")


def test_a_checkpoint_without_versions_gives_no_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "versions", dict)
        run(num_epochs=1, checkpoint=tmp_path)
    assert_same(run(num_epochs=2, checkpoint=tmp_path, resume="last"), run(num_epochs=2))


def test_a_checkpoint_of_a_version_without_objectives_is_resumed(tmp_path, monkeypatch):
    """Its means and terms have no bound and no effective sample size."""
    run_until_step(monkeypatch, 9, checkpoint=tmp_path, num_epochs=3)
    (path, content) = Checkpoints(tmp_path).last()
    assert content["history"]
    for of_rank in content["ranks"]:
        assert len(of_rank["terms"]) == 5
        of_rank["terms"] = of_rank["terms"][:3]
    content["history"] = [
        (epoch, beta, train[:4], validation[:4], seconds)
        for epoch, beta, train, validation, seconds, _ in content["history"]
    ]
    write(path, "training run", content, score=-math.inf)
    assert_same(run(num_epochs=3, checkpoint=tmp_path, resume="last"), run(num_epochs=3))
