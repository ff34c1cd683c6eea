"""A fit that stops anywhere and goes on is, to the last bit, the fit that never stopped."""

import logging
import os
import signal
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.checkpoint import Checkpoints, MismatchError, read_checkpoint
from pyro_vae.infer import SVI
from pyro_vae.infer import state as states
from pyro_vae.pair import MeanElbo


def data(n=107):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3))


def vae():
    made = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
        conditionals.Normal(nn.Sequential(nets.MLP(4, (9,)), nn.BatchNorm1d(9), nn.Dropout(0.1)), event_shape=2),
    )
    return made.model, made.guide, [*made.parameters(), *made.buffers()]


def functions():
    """A pair without modules of its own: parameters in the store, a batch norm that a function closes over."""
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def model(x):
        scale = pyro.param("scale", torch.ones(4), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x).squeeze(-1), pyro.param("width", torch.tensor(0.5))))

    return model, guide, [*network.parameters(), *network.buffers()]


def labelled():
    def model(x):
        logits = pyro.param("logits", torch.zeros(3))
        locs = pyro.param("locs", torch.arange(3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(locs[k].unsqueeze(-1), torch.ones(4)).to_event(1), obs=x)

    return config_enumerate(model), lambda x: None, []


def scheduled(kind, **options):
    return lambda: pyro.optim.PyroLRScheduler(kind, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, **options})


class Stop(Exception):
    pass


def stopped_after(monkeypatch, steps, **given):
    """Run a fit until a checkpoint after so many steps, and no further."""
    save = Checkpoints.save

    def last(self, at, content, *, score):
        save(self, at, content, score=score)
        if at >= steps:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", last)
        with pytest.raises(Stop):
            run(every=1, **given)


def run(pair=vae, x=data, loss=Trace_ELBO, optim=lambda: pyro.optim.Adam({"lr": 0.01}), seed=1, **options):
    torch.manual_seed(0)
    model, guide, tensors = pair()
    x = x() if callable(x) else x
    pyro.set_rng_seed(seed)
    options = {"validation": data(33), "epochs": 5, "batch_size": 20} | options
    if pair is functions:
        options["validation"] = None  # its batch norm cannot be scaled to another number of rows
    history = pv.fit(model, guide, x, loss=loss(), optim=optim(), **options)
    tensors = [*tensors, *history.param_store["params"].values()]
    return [t.detach().clone() for t in tensors], [epoch._replace(seconds=0.0) for epoch in history.epochs]


def assert_same(a, b):
    assert len(a[0]) == len(b[0])
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert str(a[1]) == str(b[1])  # NaN, too


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
    return DataLoader(TensorDataset(rows), batch_sampler=torch.utils.data.BatchSampler(order, 20, drop_last=False))


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
    "many particles": {"loss": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)},
    "plain functions": {"pair": functions},
    "some parameters in some steps": {"pair": branches},
    "some buffers in some steps": {"pair": wandering},
    "a sampler of batches": {"x": lambda: batch_sampled()},
    "enumerated": {"pair": labelled, "loss": TraceEnum_ELBO},
    "early stopping": {"patience": 3, "optim": lambda: pyro.optim.Adam({"lr": 0.3}), "epochs": 30},
    "a DataLoader": {"x": loader},
    "a Dataset that draws": {"x": Noisy},
    "stochastic pixels": {"x": lambda: pv.Data(data().sigmoid(), binarize="stochastic")},
    "all data at once": {"batch_size": None, "epochs": 40},
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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compile", [False, "trace"])
def test_it_goes_on_to_the_last_bit(tmp_path, monkeypatch, name, compile):
    given = CASES[name] | {"compile": compile}
    whole = run(**given)
    for steps in (1, 6, 14):  # after the first, at an epoch's end, within an epoch
        folder = tmp_path / str(steps)
        stopped_after(monkeypatch, steps, checkpoint=folder, **given)
        assert_same(run(checkpoint=folder, resume="last", seed=77, **given), whole)


def test_by_inductor(tmp_path, monkeypatch):
    whole = run(compile=True, epochs=3)
    stopped_after(monkeypatch, 7, checkpoint=tmp_path, compile=True, epochs=3)
    assert_same(run(checkpoint=tmp_path, resume="last", compile=True, epochs=3), whole)


def test_a_torch_optimizer(tmp_path, monkeypatch):
    def fit(**options):
        torch.manual_seed(0)
        made = pv.VAE(
            priors.StandardNormal(2),
            conditionals.Normal(nets.MLP(2, (9,)), event_shape=4),
            conditionals.Normal(nets.MLP(4, (9,)), event_shape=2),
        )
        optim = torch.optim.Adam(made.parameters(), 0.01)
        pv.fit(made.model, made.guide, data(), optim=optim, batch_size=20, epochs=3, **options)
        return [p.detach() for p in made.parameters()]

    whole = fit()
    fit(checkpoint=tmp_path, every=4)
    Checkpoints(tmp_path).paths()
    again = fit(resume=Checkpoints(tmp_path).paths()[0])
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))


def test_more_epochs_train_on(tmp_path):
    """As if they had been asked for at once; epochs that are all done leave everything as it is."""
    whole = run(epochs=5)
    short = run(epochs=3, checkpoint=tmp_path)
    assert_same(run(epochs=3, checkpoint=tmp_path, resume="last"), short)
    assert_same(run(epochs=5, checkpoint=tmp_path, resume="last"), whole)


def test_what_is_kept(tmp_path):
    """The newest two and the best; the best is where the validation ELBO was highest."""
    _, epochs = run(optim=lambda: pyro.optim.Adam({"lr": 0.3}), epochs=8, checkpoint=tmp_path, every=4)
    best = max(epochs, key=lambda epoch: epoch.validation.elbo).epoch
    steps = [int(path.name.removeprefix("step-")) for path in Checkpoints(tmp_path).paths()]
    assert steps == sorted({6 * best, 44, 48})
    path, content = Checkpoints(tmp_path).best()
    assert (path.name, len(content["history"])) == (f"step-{6 * best:08d}", best)
    again = run(optim=lambda: pyro.optim.Adam({"lr": 0.3}), epochs=8, resume="best", checkpoint=tmp_path)
    assert str(again[1]) == str(epochs)


def stopped(folder):
    run(epochs=1, checkpoint=folder)
    return Checkpoints(folder).paths()[-1]


def test_refusals(tmp_path):
    run(epochs=1, checkpoint=tmp_path / "a")
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
        run(branches, checkpoint=tmp_path / "a", resume="last")
    with pytest.raises(FileExistsError, match="resume="):
        run(checkpoint=tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="nothing stored"):
        run(resume=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoint=FOLDER"):
        run(resume="last")
    with pytest.raises(ValueError, match="every is 0"):
        run(every=0, checkpoint=tmp_path / "b")
    with pytest.raises(ValueError, match="clip_norm is -1"):
        run(clip_norm=-1.0)
    with pytest.raises(FileExistsError, match="holds checkpoints already"):
        run(epochs=2, checkpoint=tmp_path / "a", resume=stopped(tmp_path / "other"))
    run(epochs=3, checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match="3 epochs behind it but is to have 1"):
        run(epochs=1, checkpoint=tmp_path / "d", resume="last")
    run(epochs=1, validation=None, checkpoint=tmp_path / "c")
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


def moved(clip_norm, compile, epochs):
    """How far plain gradient descent on all data has moved the parameters."""
    torch.manual_seed(0)
    model, guide, _ = vae()
    start = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    torch.manual_seed(1)
    optim = pyro.optim.SGD({"lr": 1.0})
    pv.fit(model, guide, data(), batch_size=None, epochs=epochs, optim=optim, clip_norm=clip_norm, compile=compile)
    return torch.cat(
        [(p - q).detach().flatten() for p, q in zip((*model.parameters(), *guide.parameters()), start, strict=True)]
    )


def test_clipping_scales_the_whole_gradient():
    """One step moves the parameters by lr · g · min(1, c / ‖g‖); a graph, from the second step on, clips as eager Pyro does."""
    whole = moved(None, compile=False, epochs=1)
    assert whole.norm() > 2
    assert torch.allclose(moved(0.1, compile=False, epochs=1), 0.1 * whole / whole.norm(), atol=1e-6)
    assert torch.equal(moved(1e9, compile=False, epochs=1), whole)
    eager, graph = (moved(0.1, compile=compile, epochs=5) for compile in (False, "trace"))
    assert 0.1 < eager.norm() < 0.5 + 1e-6
    assert torch.allclose(eager, graph, atol=1e-5)


@pytest.mark.parametrize("compile", [False, "trace"])
def test_autocast_is_of_lower_precision_in_the_networks_alone(compile):
    """bfloat16 has eight bits: the terms are off by some 2⁻⁸, the parameters and what is reported are of full precision."""
    (whole, (full, *_)), (cast, (low, *_)) = (
        run(epochs=2, compile=compile, autocast=dtype) for dtype in (None, torch.bfloat16)
    )
    assert all(p.dtype == q.dtype for p, q in zip(whole, cast, strict=True))
    off = abs(full.train.elbo - low.train.elbo) / abs(full.train.elbo)
    assert 1e-6 < off < 2**-6
    assert low.train.elbo == pytest.approx(low.train.reconstruction - low.train.kl, rel=1e-5)
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16"):
        run(autocast=torch.float16)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_checkpoint_and_goes_where_it_was_to_go(tmp_path, monkeypatch, number):
    whole = run()
    stepped, seen = states.Keeper.stepped, []
    before = signal.signal(number, lambda *_: seen.append(len(Checkpoints(tmp_path).paths())))

    def sent(self):
        if self.at.steps == 8:
            os.kill(os.getpid(), number)
        stepped(self)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(states.Keeper, "stepped", sent)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=tmp_path)
        assert seen == [2]  # the user's own handler, once, after that of epoch 1 and that of step 9
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(number, before)
    assert Checkpoints(tmp_path).paths()[-1].name == "step-00000009"
    assert_same(run(checkpoint=tmp_path, resume="last"), whole)


def test_a_signal_while_the_first_graph_of_an_epoch_is_built(tmp_path, monkeypatch):
    """Its minibatch has been drawn by then, and is drawn again."""
    whole = run(compile="trace")
    stopped_after(monkeypatch, 6, checkpoint=tmp_path, compile="trace")
    build = SVI._build

    def sent(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        build(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SVI, "_build", sent)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path, resume="last", compile="trace")
    assert_same(run(checkpoint=tmp_path, resume="last", compile="trace"), whole)


def test_a_signal_that_nobody_hears_is_not_heard(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stepped = states.Keeper.stepped
    monkeypatch.setattr(states.Keeper, "stepped", lambda self: (os.kill(os.getpid(), signal.SIGINT), stepped(self)))
    try:
        run(epochs=1, checkpoint=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_going_back_sets_the_later_ones_aside(tmp_path):
    """From the best on, what is written is the last, and nothing is lost."""
    options = {"optim": lambda: pyro.optim.Adam({"lr": 0.3}), "checkpoint": tmp_path}
    run(epochs=8, **options)
    best = Checkpoints(tmp_path).best()[0]
    names = {path.name for path in Checkpoints(tmp_path).paths()}
    assert best.name < max(names)
    (tmp_path / "step-500").mkdir()  # another's
    (tmp_path / "step-notes.txt").write_text("mine")
    again = run(epochs=8, resume="best", **options)
    assert len(again[1]) == 8
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"step-500", "step-notes.txt"} < kept
    assert all(any(name in other for other in kept) for name in names)


def test_shared_parameters_are_clipped_once():
    """A VampPrior's encoder has two names."""
    for compile in (False, "trace"):
        torch.manual_seed(0)
        encoder = conditionals.Normal(nets.MLP(4, (5,)), event_shape=2)
        decoder = conditionals.Normal(nets.MLP(2, (5,)), event_shape=4)
        made = pv.VAE(priors.VampPrior(encoder, torch.randn(3, 4)), decoder, encoder)
        start = [p.detach().clone() for p in made.parameters()]
        optim = pyro.optim.SGD({"lr": 1.0})
        pv.fit(made.model, made.guide, data(), batch_size=None, epochs=1, optim=optim, clip_norm=0.1, compile=compile)
        move = torch.cat([(p - q).flatten() for p, q in zip(made.parameters(), start, strict=True)])
        assert move.norm().item() == pytest.approx(0.1, rel=1e-3)


def test_a_users_own_autocast_stays():
    model, guide, _ = vae()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        pv.fit(model, guide, data(), epochs=1)
    assert all(seen)


def test_without_a_checkpoint_signals_are_left_alone(monkeypatch):
    handlers = set()
    monkeypatch.setattr(states.Keeper, "stepped", lambda self: handlers.add(signal.getsignal(signal.SIGINT)))
    run(epochs=1)
    assert handlers == {signal.getsignal(signal.SIGINT)}


def test_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(checkpoint=tmp_path, epochs=2)))
    thread.start()
    thread.join()
    assert_same(found[0], run(epochs=2))


def test_epochs_are_read_as_they_were():
    record = states.Epoch(3, 0.5, MeanElbo(-1.0, -0.5, 0.5, 0.1), None, 2.0)
    assert states.Epoch.of(tuple(record)) == record
