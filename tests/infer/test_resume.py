"""A fit that stops anywhere and goes on is, to the last bit, the fit that never stopped."""

import logging
import math
import re

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
from pyro_vae.pairs.traces import MeanElbo
from tests.support.fits import assert_same, data, functions, run, stopped_after


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
    """Parameters that only some minibatches use: momentum moves the others on."""
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


class Wandering(nn.Module):
    """Two batch norms, of which each run takes one: which ran first is no name for it."""

    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2)), nn.Linear(4, 1)

    def forward(self, x):
        pyro.module("wandering", self)
        with pyro.plate("data", len(x)):
            chosen = self.layers[int(torch.rand(()) > 0.5)]
            pyro.sample("z", dist.Normal(self.last(chosen(x)).squeeze(-1), 1.0))


def wandering():
    model, _, _ = branches()
    guide = Wandering()
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


class Noisy(torch.utils.data.Dataset):
    """Items that draw from every generator there is."""

    def __len__(self):
        return 107

    def __getitem__(self, i):
        import random

        return data()[i] + 0.1 * torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002


CASES = {
    "mean-field": {"loss": TraceMeanField_ELBO},
    "importance-weighted": {"loss": lambda: RenyiELBO(alpha=0, num_particles=3)},
    "many particles": {
        "loss": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    },
    "plain functions": {"pair": functions},
    "some parameters in some steps": {"pair": branches, "check": False},
    "some buffers in some steps": {"pair": wandering, "check": False},
    "a sampler of batches": {"x": lambda: batch_sampled()},
    "enumerated": {"pair": labelled, "loss": TraceEnum_ELBO},
    "early stopping": {"patience": 3, "optim": lambda: pyro.optim.Adam({"lr": 0.3}), "num_epochs": 30},
    "a DataLoader": {"x": loader},
    "a Dataset that draws": {"x": Noisy},
    "stochastic pixels": {"x": lambda: pv.Data(data().sigmoid(), binarize="stochastic")},
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


TRACED = {"some buffers in some steps", "a DataLoader"}  # in the default run; the others are slow


@pytest.mark.parametrize(
    ("compile", "name"),
    [(False, name) for name in CASES]
    + [pytest.param("trace", name, marks=[] if name in TRACED else pytest.mark.slow) for name in CASES],
)
def test_it_goes_on_to_the_last_bit(tmp_path, monkeypatch, name, compile):
    given = CASES[name] | {"compile": compile}
    whole = run(**given)
    for steps in (1, 6, 14):  # after the first, at an epoch's end, within an epoch
        folder = tmp_path / str(steps)
        stopped_after(monkeypatch, steps, checkpoint=folder, **given)
        assert_same(run(checkpoint=folder, resume="last", seed=77, **given), whole)


@pytest.mark.slow
def test_by_inductor(tmp_path, monkeypatch):
    whole = run(compile=True, num_epochs=3)
    stopped_after(monkeypatch, 7, checkpoint=tmp_path, compile=True, num_epochs=3)
    assert_same(run(checkpoint=tmp_path, resume="last", compile=True, num_epochs=3), whole)


def test_a_torch_optimizer(tmp_path, monkeypatch):
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
    Checkpoints(tmp_path).paths()
    again = fit(resume=Checkpoints(tmp_path).paths()[0])
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))


def switched():
    """A discrete latent whose score is compared with a running average of its cost, a parameter that the loss
    makes."""

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


def test_parameters_of_the_loss_are_kept(tmp_path, monkeypatch):
    given = {"pair": switched, "x": lambda: data(100), "loss": TraceGraph_ELBO, "validation": None}
    whole = run(**given)
    stopped_after(monkeypatch, 12, checkpoint=tmp_path, **given)
    assert_same(run(checkpoint=tmp_path, resume="last", **given), whole)
    assert len(whole[0]) == 3


def test_more_epochs_train_on(tmp_path):
    """As if they had been asked for at once; epochs that are all done leave everything as it is."""
    whole = run(num_epochs=5)
    short = run(num_epochs=3, checkpoint=tmp_path)
    assert_same(run(num_epochs=3, checkpoint=tmp_path, resume="last"), short)
    assert_same(run(num_epochs=5, checkpoint=tmp_path, resume="last"), whole)


def test_what_is_kept(tmp_path):
    """The newest two and the best; the best is where the validation ELBO was highest."""
    _, epochs = run(optim=lambda: pyro.optim.Adam({"lr": 0.3}), num_epochs=8, checkpoint=tmp_path, every=4)
    best = max(epochs, key=lambda epoch: epoch.validation.elbo).epoch
    steps = [int(path.name.removeprefix("step-")) for path in Checkpoints(tmp_path).paths()]
    assert steps == sorted({6 * best, 44, 48})
    path, content = Checkpoints(tmp_path).best()
    assert (path.name, len(content["history"])) == (f"step-{6 * best:08d}", best)
    again = run(optim=lambda: pyro.optim.Adam({"lr": 0.3}), num_epochs=8, resume="best", checkpoint=tmp_path)
    assert str(again[1]) == str(epochs)


def stopped(folder):
    run(num_epochs=1, checkpoint=folder)
    return Checkpoints(folder).paths()[-1]


def test_refusals(tmp_path):
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
    with pytest.raises(ValueError, match="weights of another pair"):
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
        run(num_epochs=2, checkpoint=tmp_path / "a", resume=stopped(tmp_path / "other"))
    run(num_epochs=3, checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match="after 3 epochs but num_epochs is 1"):
        run(num_epochs=1, checkpoint=tmp_path / "d", resume="last")
    run(num_epochs=1, validation=None, checkpoint=tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="validation"):
        run(checkpoint=tmp_path / "c", validation=None, resume="best")
    assert not (tmp_path / "b").exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
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
def test_a_sound_checkpoint_that_lacks_an_entry_is_refused_by_its_name(tmp_path, name):
    run(num_epochs=1, checkpoint=tmp_path)
    (path, content) = Checkpoints(tmp_path).last()
    *parents, last = name.split(".")
    part = content
    for key in parents:
        part = part[int(key) if isinstance(part, list) else key]
    del part[last]
    write(path, "training run", content, score=-math.inf)
    for resume in ("last", path):
        with pytest.raises(MismatchError, match=rf"{path.name} lacks {re.escape(name)}.*begin anew"):
            run(checkpoint=tmp_path, resume=resume)


def test_going_back_sets_the_later_ones_aside(tmp_path):
    """From the best on, what is written is the last, and nothing is lost."""
    options = {"optim": lambda: pyro.optim.Adam({"lr": 0.3}), "seed": 3, "checkpoint": tmp_path}
    run(num_epochs=8, **options)
    best = Checkpoints(tmp_path).best()[0]
    names = {path.name for path in Checkpoints(tmp_path).paths()}
    assert best.name < max(names)
    (tmp_path / "step-500").mkdir()  # another's
    (tmp_path / "step-notes.txt").write_text("mine")
    again = run(num_epochs=8, resume="best", **options)
    assert len(again[1]) == 8
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"step-500", "step-notes.txt"} < kept
    assert all(any(name in other for other in kept) for name in names)


def test_epochs_are_read_as_they_were():
    record = pv.Epoch(3, 0.5, MeanElbo(-1.0, -0.5, 0.5, 0.1), None, 2.0)
    assert pv.Epoch.of(tuple(record)) == record


def test_workers_that_live_on_are_told_of(tmp_path):
    """What they draw is in no checkpoint."""
    lasting = DataLoader(TensorDataset(data()), batch_size=20, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers=False"):
        run(x=lambda: lasting, num_epochs=1, checkpoint=tmp_path)


@pytest.mark.parametrize("package", ["torch", "pyro-ppl"])
def test_another_version_is_a_warning_and_the_fit_continues(tmp_path, monkeypatch, package):
    whole = run(num_epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "versions", lambda: snapshot.versions() | {package: "0.0.7"})
        run(num_epochs=1, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"{package} 0.0.7 (now {snapshot.versions()[package]})")):
        assert_same(run(num_epochs=3, checkpoint=tmp_path, resume="last"), whole)
    run(
        num_epochs=4, checkpoint=tmp_path, resume="last"
    )  # the checkpoint is now of these versions: no warning


def test_a_checkpoint_that_names_no_versions_is_no_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume_module, "versions", dict)
        run(num_epochs=1, checkpoint=tmp_path)
    assert_same(run(num_epochs=2, checkpoint=tmp_path, resume="last"), run(num_epochs=2))
