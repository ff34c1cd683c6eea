"""fit: scaling, annealing, isolation, early stopping, errors; evaluate changes no state."""

import math
from inspect import signature

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, infer, nets, priors


def small_vae():
    return pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Normal(nets.MLP(2, (8,)), event_shape=3, scale="learned"),
        encoder=conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    )


def mean_model(x):
    """A global latent mean: z ~ N(0, 1), xᵢ ~ N(z, 1)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampling_model(x, size=200):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mean_guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.parametrize("model", [mean_model, subsampling_model])
def test_minibatches_are_scaled_with_and_without_subsampling_in_the_model(model):
    """The posterior of a global mean has scale (1 + N)^-1/2; without scaling it would be (1 + B)^-1/2."""
    x = 1.5 + torch.randn(200)
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.98}
    )
    loss = Trace_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=1)
    history = pv.fit(model, mean_guide, x, batch_size=20, num_epochs=150, optim=optim, loss=loss)
    assert len(pyro.get_param_store()) == 0
    with history.scope():
        scale, loc = pyro.param("scale").item(), pyro.param("loc").item()
    assert scale == pytest.approx(201**-0.5, rel=0.15)  # (1 + 20)^-1/2 would be three times that
    assert loc == pytest.approx((x.sum() / 201).item(), abs=0.05)


def as_dataset(x):
    return TensorDataset(x, torch.arange(len(x)))  # labelled


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: x.numpy().astype(np.float64)[::-1],
        as_dataset,
        lambda x: DataLoader(as_dataset(x), batch_size=10, shuffle=True),
        lambda x: pv.Data(x),
        lambda x: {"x": x, "mask": torch.ones_like(x, dtype=torch.bool)},
    ],
    ids=["tensor", "array", "dataset", "loader", "Data", "dict"],
)
def test_every_type_of_data_is_accepted(wrap):
    vae = small_vae()
    history = pv.fit(vae.model, vae.guide, wrap(torch.randn(25, 3)), num_epochs=2, batch_size=10)
    assert len(history.epochs) == 2
    assert math.isfinite(history.epochs[-1].train.elbo)


@pytest.mark.parametrize(
    "loss",
    [TraceMeanField_ELBO(), RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True)],
    ids=["mean", "renyi"],
)
def test_the_elbo_is_reconstruction_minus_kl_for_other_losses(loss):
    vae = small_vae()
    record = pv.fit(vae.model, vae.guide, torch.randn(25, 3), loss=loss, num_epochs=2, batch_size=10).epochs[
        -1
    ]
    assert record.train.elbo == pytest.approx(record.train.reconstruction - record.train.kl)


def test_autoguides_and_enumerated_models_are_trained():
    x = torch.randn(40)
    guide = AutoNormal(mean_model)
    assert math.isfinite(pv.fit(mean_model, guide, x, num_epochs=2, batch_size=None).epochs[-1].train.elbo)

    @config_enumerate
    def mixture(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    history = pv.fit(
        mixture, lambda x: None, x, loss=TraceEnum_ELBO(), validation=x, num_epochs=2, batch_size=10
    )
    with history.scope():
        loc = pyro.param("loc").detach()
    exact = torch.logsumexp(dist.Normal(loc, 1.0).log_prob(x[:, None]) - math.log(2), -1).mean().item()
    assert history.epochs[-1].validation.elbo == pytest.approx(exact, rel=1e-5)


def test_reported_elbos_do_not_contain_beta():
    """At learning rate 0, fits that differ only in β report the same ELBO."""
    x, records = torch.randn(30, 3), []
    pyro.set_rng_seed(1)
    vae = small_vae()
    for beta in (1.0, 0.1, lambda t: t):
        pyro.set_rng_seed(2)
        optim = pyro.optim.SGD({"lr": 0.0})
        records.append(
            pv.fit(vae.model, vae.guide, x, num_epochs=1, batch_size=10, beta=beta, optim=optim)
            .epochs[0]
            .train
        )
    assert records[0] == records[1] == records[2]


def test_a_smaller_beta_gives_a_larger_kl():
    """At β = 0 the loss does not contain the KL."""
    x, kl = torch.randn(100, 3), []
    for beta in (1.0, 0.0):
        pyro.set_rng_seed(3)
        vae = small_vae()
        optim = pyro.optim.Adam({"lr": 0.01})
        kl.append(pv.fit(vae.model, vae.guide, x, num_epochs=40, beta=beta, optim=optim).epochs[-1].train.kl)
    assert kl[1] > kl[0] + 1


def test_fits_at_the_same_seed_are_bitwise_equal_whatever_is_in_the_param_store():
    def run():
        pyro.set_rng_seed(4)
        return pv.fit(mean_model, mean_guide, torch.randn(50), num_epochs=3, batch_size=10)

    with run().scope():
        first = pyro.param("loc").item()
    pyro.param("loc", torch.tensor(7.0))  # a parameter of the user
    with run().scope():
        assert pyro.param("loc").item() == first
    assert pyro.param("loc").item() == 7.0


def test_evaluate_changes_no_state():
    net = torch.nn.BatchNorm1d(3)  # in the closure of a plain function

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x)[:, :2], 1.0).to_event(1))

    vae = small_vae()
    before, state = net.running_mean.clone(), torch.get_rng_state()
    one, two = (
        pv.evaluate(vae.model, guide, torch.randn(20, 3, generator=torch.manual_seed(0))) for _ in range(2)
    )
    torch.set_rng_state(state)
    assert torch.equal(one.elbo, two.elbo)
    assert torch.equal(net.running_mean, before)
    assert net.training
    assert len(pyro.get_param_store()) == 0


def test_early_stopping_restores_the_parameters_of_the_best_epoch():
    x = torch.randn(60, 3)
    vae = small_vae()
    optim = pyro.optim.Adam({"lr": 0.3})
    history = pv.fit(vae.model, vae.guide, x[:10], validation=x[10:], num_epochs=60, patience=3, optim=optim)
    assert len(history.epochs) < 60
    assert pv.evaluate(vae.model, vae.guide, x[10:]).mean().elbo == history.best.validation.elbo
    assert history.kept == history.best != history.epochs[-1]
    last = str(history).splitlines()[-1]
    assert last == f"parameters of epoch {history.best.epoch}, validation: {history.best.validation}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3), "no data"),
        (torch.zeros(5, 4), "built for events of 3"),
        (torch.tensor([[0.0, 0, 0], [0, math.nan, 0]]), "row 1"),
        (torch.ones(5, 3, dtype=torch.uint8), "whole numbers"),
    ],
)
def test_invalid_data_raise(data, message):
    vae = small_vae()
    with pytest.raises(ValueError, match=message):
        pv.fit(vae.model, vae.guide, data)


def test_the_error_for_grey_pixels_names_the_row_and_the_remedies():
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.MLP(2, (8,)), event_shape=3),
        conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    )
    x = torch.ones(300, 3)
    x[217, 1] = 0.5
    with pytest.raises(ValueError, match=r"row 217 .*threshold.*stochastic.*none"):
        pv.fit(vae.model, vae.guide, x)


def test_invalid_pairs_raise():
    x = torch.randn(10)
    with pytest.raises(ValueError, match="no site 'z'"):
        pv.fit(mean_model, lambda x: pyro.param("loc", torch.zeros(())), x)
    with pytest.raises(ValueError, match="nothing to train"):
        pv.fit(mean_model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro warns in addition to the error
@pytest.mark.parametrize("validate", [True, False])
def test_a_non_finite_loss_raises_before_parameters_are_updated(validate):
    """At a huge learning rate the loss is NaN after the first step."""
    vae = small_vae()
    optim = pyro.optim.SGD({"lr": 1e30})
    with (
        pyro.validation_enabled(validate),
        pytest.raises(FloatingPointError, match=r"epoch 1, batch [1-9].*learning rate"),
    ):
        pv.fit(vae.model, vae.guide, torch.randn(100, 3), batch_size=5, optim=optim)
    assert all(torch.isfinite(p).all() for p in vae.parameters())


def test_a_network_whose_parameters_are_not_registered_raises():
    net = torch.nn.Linear(1, 1)

    def guide(x):
        pyro.param("scale", torch.ones(()))
        pyro.sample("z", dist.Normal(net(x[:1]).squeeze(), 1.0))

    with pytest.raises(ValueError, match="a Linear runs but is not registered"):
        pv.fit(mean_model, guide, torch.randn(10))
    net.requires_grad_(False)
    assert pv.fit(mean_model, guide, torch.randn(10), num_epochs=1).epochs


def ramp(epoch):
    return min(1.0, 0.2 + epoch / 2)


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        (Trace_ELBO, 1.0),
        pytest.param(Trace_ELBO, 0.5, marks=pytest.mark.slow),
        (Trace_ELBO, ramp),
        (TraceMeanField_ELBO, ramp),
        pytest.param(lambda: Trace_ELBO(num_particles=3), ramp, marks=pytest.mark.slow),
        (lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1), ramp),
    ],
    ids=["ELBO", "beta", "annealed", "mean field", "particles", "vectorized particles"],
)
def test_a_fit_with_graphs_equals_one_with_eager_pyro(loss, beta, caplog):
    """Parameters, and ELBO terms of each epoch, with a last minibatch of fewer rows."""
    x = torch.randn(64, 3, dtype=torch.double)

    def run(compile):
        pyro.set_rng_seed(0)
        vae = small_vae().double()
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.7}
        )
        history = pv.fit(
            vae.model,
            vae.guide,
            x,
            validation=x[:20],
            loss=loss(),
            beta=beta,
            optim=optim,
            num_epochs=4,
            batch_size=20,
            compile=compile,
            patience=2,
        )
        return vae, history

    caplog.set_level("INFO", "pyro_vae")
    (eager, expected), (graph, history) = run(False), run("trace")
    assert caplog.messages[-1].count("traced") == 2  # whole minibatches, and the last one
    for ours, pyros in zip(graph.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-9, atol=1e-9)
    for ours, pyros in zip(history.epochs, expected.epochs, strict=True):
        for ours_mean, pyros_mean in ((ours.train, pyros.train), (ours.validation, pyros.validation)):
            np.testing.assert_allclose(ours_mean[:4], pyros_mean[:4], rtol=1e-9)
            assert ours_mean[4:] == pyros_mean[4:] == (None,) * 3  # the ELBO has no other bound
        assert ours.beta == pyros.beta


def test_compile_auto_depends_on_the_number_of_steps(caplog):
    caplog.set_level("INFO", "pyro_vae")
    vae = small_vae()
    pv.fit(vae.model, vae.guide, torch.randn(30, 3), num_epochs=2, batch_size=10)
    assert caplog.records[-1].message == "fit ran as\neager Pyro: compile=False, 6 steps"
    # the last minibatches of five rows are too few for a graph
    pv.fit(vae.model, vae.guide, torch.randn(65, 3), num_epochs=50, batch_size=10)
    assert caplog.records[-1].message == (
        "fit ran as\nfloat32[10, 3]: traced, 300 steps\neager Pyro: compile=False, 50 steps"
    )


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_graphs_raise_for_invalid_batches_of_a_loader():
    """Grey pixels under a Bernoulli and NaN, in a batch after the graph is traced."""
    for invalid, error, message in ((0.5, ValueError, "support"), (math.nan, ValueError, "row 3")):
        x = (torch.randn(80, 3) > 0).float()
        x[73] = invalid
        vae = pv.VAE(
            prior=priors.StandardNormal(2),
            decoder=conditionals.Bernoulli(nets.MLP(2, (8,)), event_shape=3),
            encoder=conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
        )
        loader = DataLoader(TensorDataset(x), batch_size=10)
        with pytest.raises(error, match=message):
            pv.fit(vae.model, vae.guide, loader, compile="trace")


def test_fit_and_train_have_the_same_signature():
    ours, theirs = signature(pv.fit), signature(pv.train)
    assert ours.parameters == theirs.parameters
    assert ours.return_annotation is pv.infer.History
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.parameters.values())[3:])


def test_train_returns_the_history_of_fit():
    def run(verb):
        torch.manual_seed(0)
        pyro.set_rng_seed(0)
        return verb(mean_model, mean_guide, torch.arange(20.0), num_epochs=2, batch_size=10, progress=False)

    def values(history):
        return [epoch._replace(seconds=0.0) for epoch in history.epochs], history.param_store["params"][
            "loc"
        ].item()

    epochs = run(pv.train)
    yielded = [next(epochs), next(epochs)]
    with pytest.raises(StopIteration) as end:
        next(epochs)
    assert end.value.value.epochs == tuple(yielded)
    assert values(end.value.value) == values(run(pv.fit))


@pytest.mark.parametrize(
    ("loss", "objective", "bound"),
    [
        (None, "Trace_ELBO()", "the ELBO"),
        (RenyiELBO(alpha=0, num_particles=3), "RenyiELBO(num_particles=3, alpha=0)", "the Rényi bound"),
        (infer.IWAE(3), "IWAE(num_particles=3, estimator='iwae')", "the importance-weighted bound"),
        (infer.STL(), "STL(num_particles=1)", "the ELBO, a lower bound of log p(x)"),
    ],
    ids=["Trace_ELBO", "RenyiELBO", "IWAE", "STL"],
)
def test_history_names_the_objective_and_what_it_bounds(loss, objective, bound):
    vae = small_vae()
    history = pv.fit(vae.model, vae.guide, torch.randn(20, 3), num_epochs=1, loss=loss, progress=False)
    assert history.objective == objective
    assert history.bound.startswith(bound)
    first, train = str(history).splitlines()
    assert first == f"1 epochs of {objective}, {history.bound}"
    assert train.startswith("train: bound" if "IWAE" in objective else "train: ELBO")
