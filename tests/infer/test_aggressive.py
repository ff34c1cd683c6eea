"""Aggressive training of the guide: which parameters move, when it ends, and what it prevents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.data.batches import Batch
from pyro_vae.infer import IWAE, WakeSleep
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.pairs.check import inspect_checked
from pyro_vae.pairs.latents import mutual_information
from tests.faults.processes import run_group


def small_vae():
    return pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(2, (8,)), event_shape=3, scale="learned"),
        conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    ).double()


def data(n=40, seed=0):
    return torch.randn(n, 3, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def trained(num_epochs=1, compile=False, optim=None, **options):
    pyro.set_rng_seed(0)
    vae = small_vae()
    optim = optim or pyro.optim.Adam({"lr": 0.01})
    history = pv.fit(
        vae.model,
        vae.guide,
        data(),
        num_epochs=num_epochs,
        batch_size=10,
        compile=compile,
        optim=optim,
        **options,
    )
    return vae, history


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("compile", [False, "trace"])
def test_only_every_kth_step_moves_the_model(compile, monkeypatch):
    moved = []
    step = MinibatchSVI.minibatch_step

    def recorded(svi, *args):
        before = parameters(vae_of[0].model), parameters(vae_of[0].guide)
        terms = step(svi, *args)
        after = parameters(vae_of[0].model), parameters(vae_of[0].guide)
        moved.append(
            tuple(
                any(not torch.equal(a, b) for a, b in zip(*side, strict=True))
                for side in zip(before, after, strict=True)
            )
        )
        return terms

    pyro.set_rng_seed(0)
    vae_of = [small_vae()]
    monkeypatch.setattr("pyro_vae.infer.minibatch.MinibatchSVI.minibatch_step", recorded)
    monkeypatch.setattr("pyro_vae.infer.aggressive.AggressiveInference.is_on", lambda *_: True)
    pv.fit(
        vae_of[0].model,
        vae_of[0].guide,
        data(),
        num_epochs=3,
        batch_size=10,
        inference_steps=3,
        compile=compile,
    )
    assert [model for model, _ in moved] == [False, False, True] * 4
    assert all(guide for _, guide in moved)


@pytest.mark.parametrize("optim", [None, pyro.optim.ClippedAdam({"lr": 0.01}), pyro.optim.SGD({"lr": 1e-4})])
def test_graphs_equal_eager_pyro(optim):
    results = []
    for compile in (False, "trace"):
        vae, history = trained(4, compile, optim, inference_steps=3, clip_norm=0.1)
        results.append((parameters(vae), [epoch.mutual_information for epoch in history.epochs]))
    for ours, pyros in zip(*(parameters for parameters, _ in results), strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-9, atol=1e-9)
    assert results[0][1] == pytest.approx(results[1][1], nan_ok=True)


def test_it_ends_when_the_mutual_information_no_longer_rises(monkeypatch):
    values = iter([1.0, 2.0, 3.0, 2.5, 3.0, 2.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr("pyro_vae.infer.aggressive.mutual_information", lambda pair: next(values))
    _, history = trained(9, inference_steps=2)  # the first value is that before training
    measured = [epoch.mutual_information for epoch in history.epochs]
    assert measured == [2.0, 3.0, 2.5, 3.0, 2.0, 1.0, 2.0, None, None]  # five epochs after the maximum


def test_a_resumed_fit_is_bitwise_equal(tmp_path):
    options = {"inference_steps": 3, "checkpoint": tmp_path / "run"}
    vae, _ = trained(3, inference_steps=3)
    trained(1, **options)
    resumed, history = trained(3, **options, resume="last")
    assert all(torch.equal(a, b) for a, b in zip(parameters(vae), parameters(resumed), strict=True))
    assert history.epochs[0].mutual_information is not None
    with pytest.raises(pv.checkpoint.MismatchError, match="inference_steps is 2 but was 3"):
        trained(3, inference_steps=2, checkpoint=tmp_path / "run", resume="last")


def test_mutual_information_of_a_gaussian_channel():
    """z ~ N(x, s²), x ~ N(0, 1): I(x; z) = ½ log(1 + 1/s²), here over a finite sample of x."""
    s, n = 0.5, 4000
    x = torch.randn(n, 1, dtype=torch.double, generator=torch.Generator().manual_seed(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, s).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    pair = inspect_checked(model, guide, Batch((x,), {}), verb="test", per_datum=True)
    z = torch.linspace(-6, 6, 4001, dtype=torch.double)
    log_marginal = dist.Normal(x[:, 0], s).log_prob(z[:, None]).logsumexp(1) - torch.tensor(float(n)).log()
    entropy = -torch.trapezoid(log_marginal.exp() * log_marginal, z)
    exact_value = entropy - dist.Normal(0.0, s).entropy()
    # the standard deviation of log q(z|x) − log q(z) is below 1.2 nats
    assert abs(mutual_information(pair) - exact_value) < 4 * 1.2 / n**0.5
    assert exact_value == pytest.approx(0.5 * torch.tensor(1 + 1 / s**2).log().item(), abs=0.05)


class OneModule(nn.Module):
    """Model and guide register the same module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layer(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x), 1.0).to_event(1))


def test_shared_parameters_are_refused():
    pair = OneModule().double()
    with pytest.raises(ValueError, match="the model registers no parameter that the guide does not"):
        pv.fit(pair.model, pair.guide, data(), num_epochs=1, inference_steps=2)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_invalid_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="inference_steps"):
        trained(inference_steps=steps)


def local_model(x):
    slope = pyro.param("slope", torch.ones(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(slope * z, 1.0).to_event(1), obs=x)


def local_guide(x):
    loc = pyro.param("loc", torch.zeros(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 1.0).to_event(1))


def shared_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    mean = pyro.sample("mean", dist.Normal(0.0, pyro.param("scale", torch.ones(()))))
    with pyro.plate("observations", len(x)):
        pyro.sample("x", dist.Normal(z + mean, 1.0).to_event(1), obs=x)


def shared_guide(x):
    local_guide(x)
    pyro.sample("mean", dist.Normal(pyro.param("mean_loc", torch.zeros(())), 1.0))


def mixture_model(x):
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=dist.constraints.simplex)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(k.unsqueeze(-1).double(), 1.0).to_event(1), obs=x)


def two_latents_model(x):
    local_model(x)
    with pyro.plate("others", len(x)):
        pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def flattened_guide(x):
    loc = pyro.param("loc", torch.zeros(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc * x, 1.0).to_event(1))
    with pyro.plate("others", len(x)):
        pyro.sample("b", dist.Normal(z.reshape(len(x), 1), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "loss", "cause"),
    [
        (shared_model, shared_guide, Trace_ELBO, "'mean' lies in no data plate"),
        (local_model, AutoDiagonalNormal(local_model), Trace_ELBO, "auxiliary"),
        (two_latents_model, flattened_guide, Trace_ELBO, "plate of particles"),
        (mixture_model, lambda x: None, lambda: TraceEnum_ELBO(max_plate_nesting=1), "no latent per datum"),
    ],
    ids=[
        "a latent that all data share",
        "an autoguide",
        "a guide that reshapes",
        "only latents that are summed out",
    ],
)
def test_pairs_without_a_known_mutual_information_are_refused(model, guide, loss, cause):
    x = torch.randn(8, 1)
    with pytest.raises(ValueError, match=f"inference_steps=2 ends by the mutual information.*{cause}"):
        pv.fit(model, guide, x, loss=loss(), batch_size=None, num_epochs=1, inference_steps=2)


@pytest.mark.parametrize("loss", [lambda: IWAE(3, "dreg"), WakeSleep, lambda: RenyiELBO(num_particles=2)])
def test_other_losses_leave_the_model_unchanged_between_its_steps(loss):
    x = torch.randn(20, 1)
    # two steps of an epoch, of which the third would be the first of the model
    history = pv.fit(
        local_model,
        local_guide,
        x,
        loss=loss(),
        batch_size=10,
        num_epochs=1,
        inference_steps=3,
        compile=False,
    )
    params = history.param_store["params"]
    assert torch.equal(params["slope"], torch.ones(1))
    assert not torch.equal(params["loc"], torch.zeros(1))


def train_rank(folder):
    torch.set_num_threads(1)
    vae, history = trained(3, inference_steps=3)
    result = parameters(vae), [epoch.mutual_information for epoch in history.epochs]
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")


def test_processes_have_the_same_parameters_and_the_same_mutual_information(tmp_path):
    assert run_group(2, train_rank, tmp_path)
    (params, information), (others, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert information == same
    assert None not in information
