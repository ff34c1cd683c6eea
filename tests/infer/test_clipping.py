"""The options clip_norm and autocast of fit, and sparse gradients."""

import functools
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from tests.support.fits import data, run, vae


def displacement(clip_norm, compile, num_epochs):
    """The change of the parameters by gradient descent on all data."""
    torch.manual_seed(0)
    model, guide, _ = vae()
    start = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    torch.manual_seed(1)
    optim = pyro.optim.SGD({"lr": 1.0})
    pv.fit(
        model,
        guide,
        data(),
        batch_size=None,
        num_epochs=num_epochs,
        optim=optim,
        clip_norm=clip_norm,
        compile=compile,
    )
    return torch.cat(
        [
            (p - q).detach().flatten()
            for p, q in zip((*model.parameters(), *guide.parameters()), start, strict=True)
        ]
    )


N = len(data())


def test_clip_norm_bounds_the_norm_of_the_gradient_over_all_parameters():
    """One step changes the parameters by lr · g · min(1, N c / ‖g‖), in a graph as in eager Pyro."""
    whole = displacement(None, compile=False, num_epochs=1)
    assert whole.norm() > 2
    assert torch.allclose(
        displacement(0.1 / N, compile=False, num_epochs=1), 0.1 * whole / whole.norm(), atol=1e-6
    )
    assert torch.equal(displacement(1e9, compile=False, num_epochs=1), whole)
    eager, graph = (displacement(0.1 / N, compile=compile, num_epochs=5) for compile in (False, "trace"))
    assert 0.1 < eager.norm() < 0.5 + 1e-6
    assert torch.allclose(eager, graph, atol=1e-5)


@pytest.mark.parametrize("compile", [False, "trace"])
def test_autocast_rounds_the_networks_and_keeps_the_dtype_of_parameters(compile):
    """bfloat16 has eight bits, so ELBOs change by about 2⁻⁸. Reported terms are consistent in single
    precision."""
    (whole, (full, *_)), (cast, (low, *_)) = (
        run(num_epochs=2, compile=compile, autocast=dtype) for dtype in (None, torch.bfloat16)
    )
    assert all(p.dtype == q.dtype for p, q in zip(whole, cast, strict=True))
    off = abs(full.train.elbo - low.train.elbo) / abs(full.train.elbo)
    assert 1e-6 < off < 2**-6
    assert low.train.elbo == pytest.approx(low.train.reconstruction - low.train.kl, rel=1e-5)
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16"):
        run(autocast=torch.float16)


def test_shared_parameters_are_clipped_once():
    """The encoder of a VampPrior has two names in the param store."""
    for compile in (False, "trace"):
        torch.manual_seed(0)
        encoder = conditionals.Normal(nets.MLP(4, (5,)), event_shape=2)
        decoder = conditionals.Normal(nets.MLP(2, (5,)), event_shape=4)
        made = pv.VAE(priors.VampPrior(encoder, torch.randn(3, 4)), decoder, encoder)
        start = [p.detach().clone() for p in made.parameters()]
        optim = pyro.optim.SGD({"lr": 1.0})
        pv.fit(
            made.model,
            made.guide,
            data(),
            batch_size=None,
            num_epochs=1,
            optim=optim,
            clip_norm=0.1 / N,
            compile=compile,
        )
        move = torch.cat([(p - q).flatten() for p, q in zip(made.parameters(), start, strict=True)])
        assert move.norm().item() == pytest.approx(0.1, rel=1e-3)


def test_autocast_around_fit_applies_in_training():
    model, guide, _ = vae()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        pv.fit(model, guide, data(), num_epochs=1)
    assert all(seen)


def point_model(x):
    """x ~ N(mu, 1), independent of z: the gradient of the loss is N (mu − mean x)."""
    mu = pyro.param("mu", torch.zeros((), dtype=torch.double))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def point_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))


def point(x, optim, **options):
    return (
        pv.fit(point_model, point_guide, x, optim=optim, progress=False, **options)
        .param_store["params"]["mu"]
        .item()
    )


@pytest.mark.parametrize(
    ("loss", "batch_size", "compile"),
    [
        (Trace_ELBO, None, "trace"),
        (Trace_ELBO, 10, False),
        (TraceMeanField_ELBO, 10, "trace"),
        (TraceGraph_ELBO, 10, False),
        (RenyiELBO, 10, False),
    ],
)
def test_clip_norm_is_per_datum_for_every_size_of_data_set(loss, batch_size, compile):
    """The gradient per datum is mu − 4, for N data and for minibatches, so steps of lr = 0.1 / N clipped to
    1.5 are 0.1 · min(1.5, 4 − mu) for every N."""
    steps = []
    for n in (20, 60):
        optim = pyro.optim.SGD({"lr": 0.1 / n})
        num_epochs = 6 if batch_size is None else 6 * batch_size // n or 1
        x = torch.full((n,), 4.0, dtype=torch.double)
        options = {"num_epochs": num_epochs, "batch_size": batch_size, "clip_norm": 1.5, "compile": compile}
        mu = point(x, optim, loss=loss(num_particles=2), **options)
        taken = num_epochs * (1 if batch_size is None else n // batch_size)
        expected = 0.0
        for _ in range(taken):
            expected += 0.1 * min(1.5, 4.0 - expected)
        assert mu == pytest.approx(expected, rel=1e-9)
        steps.append(mu / taken)
    if batch_size is None:
        assert steps[0] == pytest.approx(steps[1], rel=1e-9)


def test_adam_steps_for_k_times_repeated_data_are_equal_if_eps_is_multiplied_by_k():
    """The loss of k-times repeated data is k times that of the data, so Adam takes the same steps with k ·
    eps. With an eps per datum this is N · eps, as in the docstring of ``fit``."""
    x = torch.randn(30, dtype=torch.double, generator=torch.Generator().manual_seed(0)) + 4
    options = {"num_epochs": 20, "batch_size": None}
    once, often = (
        point(x.repeat(k), pyro.optim.Adam({"lr": 0.1, "eps": 1.0 * 30 * k}), **options) for k in (1, 7)
    )
    assert once == pytest.approx(often, rel=1e-9)
    other = point(x.repeat(7), pyro.optim.Adam({"lr": 0.1, "eps": 30.0}), **options)
    assert other != pytest.approx(once, rel=1e-3)


class Words(nn.Module):
    """A pair whose encoder sums rows of an embedding; the decoder is constant."""

    def __init__(self, bag, sparse):
        super().__init__()
        self.table = (
            nn.EmbeddingBag(7, 4, sparse=sparse, mode="sum") if bag else nn.Embedding(7, 4, sparse=sparse)
        )
        self.register_buffer("topics", torch.randn(2, 7))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            words = dist.Categorical(logits=(z @ self.topics).unsqueeze(-2)).expand([len(x), x.shape[1]])
            pyro.sample("x", words.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("words", self)
        summed = self.table(x) if isinstance(self.table, nn.EmbeddingBag) else self.table(x).sum(-2)
        mean, log_scale = summed.chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


def train_embedding(how, optim, bag=True, sparse=True, compile="auto", **options):
    """The embedding after five steps on all data, and ``explain()``."""
    torch.manual_seed(0)
    words = Words(bag, sparse)
    x = torch.randint(0, 5, (12, 3))
    pyro.set_rng_seed(2)
    with pyro.get_param_store().scope():
        if how == "fit":
            pv.fit(
                words.model,
                words.guide,
                x,
                num_epochs=5,
                batch_size=None,
                optim=optim,
                progress=False,
                **options,
            )
            return words.table.weight.detach(), ""
        kind = {"Pyro": SVI, "ours": functools.partial(pv.SVI, compile=compile)}[how]
        svi = kind(words.model, words.guide, optim, Trace_ELBO())
        for _ in range(5):
            svi.step(x)
    return words.table.weight.detach(), svi.explain() if how == "ours" else ""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bag", [True, False])
@pytest.mark.parametrize("optim", [pyro.optim.SparseAdam, pyro.optim.SGD, pyro.optim.Adagrad])
def test_training_with_sparse_gradients_equals_that_by_pyro(optim, bag):
    pyros, _ = train_embedding("Pyro", optim({"lr": 0.01}), bag)
    for how in ("ours", "fit"):
        assert torch.allclose(train_embedding(how, optim({"lr": 0.01}), bag)[0], pyros, atol=1e-6)
    graph, explanation = train_embedding("ours", optim({"lr": 0.01}), bag, compile="trace")
    assert torch.allclose(graph, pyros, atol=1e-6)
    assert "the gradient of a parameter of shape (7, 4) is sparse" in explanation


@pytest.mark.parametrize("bag", [True, False])
@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_clipping_of_sparse_gradients_equals_that_of_dense_gradients(clip_norm, bag):
    """Also if a word occurs in several data, whose entries of a sparse gradient are added."""
    sparse, dense = (
        train_embedding("fit", pyro.optim.SGD({"lr": 1e-3}), bag, sparse, clip_norm=clip_norm)[0]
        for sparse in (True, False)
    )
    assert torch.allclose(sparse, dense, atol=1e-5)


def test_a_non_finite_sparse_gradient_raises_before_parameters_are_updated():
    words = Words(True, True)
    words.table.weight.register_hook(lambda gradient: gradient * math.nan)
    before = words.table.weight.detach().clone()
    x = torch.randint(0, 5, (12, 3))
    with pytest.raises(FloatingPointError, match=r"that of 'words\$\$\$table.weight'"):
        pv.fit(
            words.model,
            words.guide,
            x,
            num_epochs=1,
            optim=pyro.optim.SparseAdam({"lr": 0.1}),
            progress=False,
        )
    assert torch.equal(words.table.weight, before)
