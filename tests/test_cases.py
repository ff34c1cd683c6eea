"""Cases from public bug reports: the result is correct, or an error states the reason."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import conditionals, evidence, nets, priors
from pyro_vae.diagnostics import latent_usage, posterior_draws
from pyro_vae.pairs.log_weights import joint_log_weights, log_weights


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def log_evidence(x):
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)


def global_guide(x):
    loc = pyro.param("a", torch.tensor(2.0))
    pyro.sample("mu", dist.Normal(loc, pyro.param("s", torch.tensor(0.1), constraint=constraints.positive)))


# each function that takes a pair and data x; all raise the same error for the same invalid pair
VERBS = {
    "fit": lambda m, g, x: pv.fit(m, g, x, num_epochs=1, batch_size=None),
    "SVI": lambda m, g, x: pv.SVI(m, g, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x),
    "evaluate": pv.evaluate,
    "log_weights": log_weights,
    "importance": lambda m, g, x: evidence.importance(m, g, x, num_particles=10),
    "elbo": lambda m, g, x: evidence.elbo(m, g, x, num_particles=10),
    "diagnose": lambda m, g, x: pv.diagnose(m, g, x, num_particles=10, num_simulations=0),
    "split_gap": lambda m, g, x: pv.split_gap(m, g, x, num_particles=10, max_steps=1),
    "usage": latent_usage,
    "draws": lambda m, g, x: posterior_draws(m, g, x, num_draws=3),
    "ais": lambda m, g, x: evidence.ais(
        m, x, annealing=evidence.Annealing(num_temperatures=2, num_chains=2), start=g
    ),
    "free_energy": lambda m, g, x: pv.free_energy(m, g, x, num_particles=10),
}


# -------------------------------- pairs that scale minibatches


@pytest.mark.parametrize("where", ["plate", "handler", "guide side too"])
def test_fit_does_not_scale_sites_that_the_pair_scales_by_n_over_b(where):
    """The parameters equal those of a fit of the pair without scales."""
    n, size = 40, 10
    x = torch.randn(n, generator=torch.manual_seed(0)) + 2

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = poutine.scale(scale=n / len(x))
        with pyro.plate("data", len(x)), scale:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def unscaled(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def scaled_by_handler(x):
        with poutine.scale(scale=n / len(x)), pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu_of(), 1.0), obs=x)

    def mu_of():
        return pyro.param("mu", torch.tensor(0.5))

    pairs = {
        "plate": (model, global_guide, unscaled),
        "handler": (scaled_by_handler, lambda x: None, None),
        "guide side too": (model, global_guide, unscaled),
    }
    with_scale, guide, without_scale = pairs[where]
    pyro.set_rng_seed(1)
    scaled = pv.fit(with_scale, guide, x, num_epochs=3, batch_size=size, optim=pyro.optim.SGD({"lr": 1e-4}))
    if without_scale is None:

        def without_scale(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu_of(), 1.0), obs=x)

    pyro.set_rng_seed(1)
    expected = pv.fit(
        without_scale, guide, x, num_epochs=3, batch_size=size, optim=pyro.optim.SGD({"lr": 1e-4})
    )
    for name, value in expected.param_store["params"].items():
        torch.testing.assert_close(scaled.param_store["params"][name], value)


def test_a_scale_by_another_number_of_data_raises():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=1000 / len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'x' is scaled by 1000/rows, but there are 40 data"):
        pv.fit(model, global_guide, torch.randn(40), num_epochs=1, batch_size=10)


def scaled_constantly(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=4.0):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def scaled_by_row(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=torch.ones(len(x)) * 40 / len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def prior_scaled_down(x):
    with poutine.scale(scale=len(x) / 40):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize("model", [scaled_constantly, scaled_by_row, prior_scaled_down])
def test_other_scales_of_minibatches_raise_unless_check_is_false(model):
    x = torch.randn(40)
    with pytest.raises(ValueError, match=r"is scaled by .* as minibatches of 10 of 40 data are"):
        pv.fit(model, global_guide, x, num_epochs=1, batch_size=10, progress=False)
    with pyro.get_param_store().scope():
        pv.fit(model, global_guide, x, num_epochs=1, batch_size=None, progress=False)
        pv.fit(model, global_guide, x, num_epochs=1, batch_size=10, check=False, progress=False)


def test_a_pair_that_scales_minibatches_raises_for_an_importance_weighted_loss():
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=40 / len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)), poutine.scale(scale=40 / len(x)):
            pyro.sample("z", dist.Normal(0.0, scale))

    def mixed(x):  # one site without the scale, so that the scale is not a constant factor of the loss
        model(x)
        pyro.factor("regularizer", torch.tensor(0.0))

    loss = RenyiELBO(alpha=0, num_particles=5)
    with pytest.raises(ValueError, match="power of the importance weights"):
        pv.fit(
            mixed, guide, torch.randn(40), loss=loss, num_epochs=1, batch_size=10, check=False, progress=False
        )


# -------------------------------- frozen parameters


class Frozen(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x.unsqueeze(-1)).squeeze(-1), 1.0))


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("fit", "SVI")])
def test_frozen_parameters_stay_frozen(verb):
    guide = Frozen().requires_grad_(False).eval()
    VERBS[verb](local_model, guide, torch.randn(6))
    assert not any(p.requires_grad for p in guide.parameters())
    assert pv.check_pair(local_model, guide, torch.randn(6)).problems == ()
    assert not any(p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("compile", [False, "trace"])
def test_frozen_parameters_are_unchanged_by_training(compile):
    class Half(Frozen):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x.unsqueeze(-1)).squeeze(-1), self.scale.exp()))

    for train in ("fit", "SVI"):
        guide = Half()
        guide.net.requires_grad_(False)
        before = [p.detach().clone() for p in guide.net.parameters()]
        start, x, optim = guide.scale.item(), torch.randn(20), pyro.optim.Adam({"lr": 0.1})
        with pyro.get_param_store().scope():
            if train == "fit":
                pv.fit(local_model, guide, x, num_epochs=3, batch_size=5, optim=optim, compile=compile)
            else:
                svi = pv.SVI(local_model, guide, optim, Trace_ELBO(), compile=compile)
                for _ in range(5):
                    svi.step(x)
        assert not any(p.requires_grad for p in guide.net.parameters())
        assert all(map(torch.equal, guide.net.parameters(), before))
        assert guide.scale.item() != start


# -------------------------------- losses that are not linear


def test_unknown_losses_raise_for_minibatches_unless_check_is_false():
    class UserELBO(Trace_ELBO):
        pass

    x = torch.randn(20)
    with pytest.raises(ValueError, match=r"UserELBO is a loss that pyro_vae does not know.*batch_size=None"):
        pv.fit(local_model, amortized, x, loss=UserELBO(), num_epochs=1, batch_size=5)
    assert pv.fit(local_model, amortized, x, loss=UserELBO(), num_epochs=1, batch_size=None)
    assert pv.fit(local_model, amortized, x, loss=UserELBO(), num_epochs=1, batch_size=5, check=False)
    for loss in (EnergyDistance(), ReweightedWakeSleep()):
        with pytest.raises(
            ValueError,
            match=rf"{type(loss).__name__}.*expected pyro(.infer.SVI|_vae.infer.ReweightedWakeSleep)",
        ):
            pv.fit(local_model, amortized, x, loss=loss, num_epochs=1)


def amortized(x):
    a = pyro.param("slope", torch.tensor(0.2))
    s = pyro.param("width", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, s))


NONLINEAR = {
    "Renyi": lambda: RenyiELBO(alpha=0.0, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "Renyi .5": lambda: RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "tail-adaptive": lambda: TraceTailAdaptive_ELBO(
        num_particles=4, vectorize_particles=True, max_plate_nesting=1
    ),
    "TMC": lambda: TraceTMC_ELBO(max_plate_nesting=1),  # a tensor of samples, see `with_samples`
    "ELBO": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "mean field": lambda: TraceMeanField_ELBO(),
    "graph": lambda: TraceGraph_ELBO(),
}


def with_samples(loss, guide):
    """The guide with a tensor of samples at each site, for the tensor Monte Carlo loss."""
    if loss != "TMC":
        return guide
    return config_enumerate(
        lambda x: guide(x), default="parallel", expand=False, num_samples=4, tmc="diagonal"
    )


@pytest.mark.parametrize("loss", NONLINEAR)
def test_gradients_of_a_minibatch_are_those_of_pyro_times_n_over_b(loss):
    """One step of SGD at the same noise, with the learning rate of Pyro's multiplied by N/B."""
    x = torch.randn(4, generator=torch.manual_seed(0))
    whole = torch.cat([x, torch.randn(12)])
    steps = {}
    for name, factor in (("fit", 1.0), ("pyro", 16 / 4)):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(3)
            if name == "pyro":
                optim = pyro.optim.SGD({"lr": 1e-3 * factor})
                SVI(local_model, with_samples(loss, amortized), optim, NONLINEAR[loss]()).step(x)
            else:
                # one minibatch of 4 of the 16 data
                optim = pyro.optim.SGD({"lr": 1e-3})
                _one_step(local_model, with_samples(loss, amortized), whole, x, optim, NONLINEAR[loss]())
            steps[name] = {k: v.detach().clone() for k, v in pyro.get_param_store().named_parameters()}
    for key, value in steps["pyro"].items():
        torch.testing.assert_close(steps["fit"][key], value)


def _one_step(model, guide, whole, x, optim, loss):
    from pyro_vae.data.batches import Batch, as_batches
    from pyro_vae.infer.fit import inspect_for_training
    from pyro_vae.infer.minibatch import MinibatchSVI
    from pyro_vae.processes import Group

    batches = as_batches(whole, len(x))
    pair = inspect_for_training(model, guide, batches, loss, annealed=False, check=True)
    step = MinibatchSVI(
        model, guide, loss, optim, pair, batches, annealed=False, clip_norm=None, group=Group()
    )
    step.compile = False
    step.minibatch_step(Batch((x,), {}), 1.0, "here")


def test_a_nonlinear_loss_with_a_shared_latent_raises_for_minibatches():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    loss = RenyiELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match="'mu' is shared by all data"):
        pv.fit(model, global_guide, torch.randn(20), loss=loss, num_epochs=1, batch_size=5)
    assert pv.fit(model, global_guide, torch.randn(20), loss=loss, num_epochs=1, batch_size=None)


@pytest.mark.parametrize("make", [RenyiELBO, lambda **k: TraceTailAdaptive_ELBO(**k)])
def test_evaluate_raises_for_a_loss_that_is_not_an_elbo(make):
    with pytest.raises(ValueError, match=r"which is not an ELBO.*an objective of pyro_vae.infer"):
        pv.evaluate(
            local_model, prior_guide, torch.randn(5), loss=make(num_particles=3, vectorize_particles=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["Renyi", "TMC"])
def test_training_on_minibatches_converges_to_the_guide_of_training_on_all_data(loss):
    """Linear Gaussian model with guide N(a x, s²)."""
    x = 1.4 * torch.randn(200, generator=torch.manual_seed(0))
    params = {}
    for size in (50, None):
        pyro.set_rng_seed(0)
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.97}
        )
        history = pv.fit(
            local_model,
            with_samples(loss, lambda x: amortized(x)),
            x,
            loss=NONLINEAR[loss](),
            num_epochs=150,
            batch_size=size,
            optim=optim,
        )
        with history.scope():
            params[size] = [pyro.param("slope").item(), pyro.param("width").item()]
    assert params[50] == pytest.approx(params[None], abs=0.06)


# -------------------------------- parameters for each datum


def per_row(x):
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AutoNormal(local_model), "locs.z"),
        (lambda: AutoDelta(local_model), "z"),
        (lambda: AutoDiagonalNormal(local_model), "loc"),
        (lambda: per_row, "loc"),
    ],
)
@pytest.mark.parametrize("size", [20, 7])
def test_parameters_for_each_datum_raise_for_minibatches(make, name, size):
    x = torch.randn(60)
    with pytest.raises(ValueError, match=rf"{name}.*batch_size=None"):
        pv.fit(local_model, make(), x, num_epochs=1, batch_size=size)
    history = pv.fit(local_model, make(), x, num_epochs=1, batch_size=None, validation=x)
    assert math.isfinite(history.epochs[0].validation.elbo)
    with pytest.raises(
        ValueError, match=r"validation: the parameter .* has an entry for each of the training data"
    ):
        pv.fit(local_model, make(), x, num_epochs=1, batch_size=None, validation=torch.randn(60))


def test_a_table_indexed_by_the_data_is_trained_on_minibatches():
    """Each row of a minibatch uses its entry of the table over all data."""

    def model(x, i):
        local_model(x)

    def guide(x, i):
        table = pyro.param("table", torch.zeros(60))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(table[i], 1.0))

    assert pv.fit(model, guide, (torch.randn(60), torch.arange(60)), num_epochs=1, batch_size=20)


# -------------------------------- validation of pairs by all functions


def no_plate(x):
    pyro.param("unused", torch.zeros(()))
    pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))


def no_site(x):
    pyro.param("unused", torch.zeros(()))


def column(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def column_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(1)).expand(len(x), 1), 1.0).to_event(1))


def wrong_support(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def trainable(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(-3.0)), 0.1))


def new_trainable():
    """A new function, since a fit records the functions whose parameters it trained."""
    return lambda x: trainable(x)


def grey_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


INVALID = {
    "no site": (local_model, no_site, torch.zeros(9), "guide: it has no site 'z'"),
    "no plate": (
        local_model,
        no_plate,
        torch.zeros(9),
        r"'z' is in plates \(\) but in the model in \('data',\)",
    ),
    "a column against a vector": (
        column,
        column_guide,
        torch.zeros(9),
        r"'x' has batch_shape \(9, 9\)|Shape mismatch",
    ),
    "support": (wrong_support, trainable, torch.zeros(9), "outside the model's support"),
    "grey data": (
        grey_model,
        trainable,
        torch.full((9,), 0.5),
        r"data: row 0 \(9 in all\) lies outside the support of 'x'",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", INVALID)
def test_all_functions_raise_the_same_error_for_an_invalid_pair(case, verb):
    model, guide, x, message = INVALID[case]
    if verb == "SVI" and case in ("a column against a vector", "grey data"):
        pytest.skip("Pyro raises another error")
    with pytest.raises(ValueError, match=message):
        VERBS[verb](model, guide, x)


def test_check_false_allows_what_is_judged_wrong():
    x = torch.full((5,), 0.5)
    with pytest.raises(ValueError, match="pass check=False to run log_weights all the same"):
        log_weights(grey_model, prior_guide, x)
    with pyro.validation_enabled(False):  # the ELBO then contains the cross-entropy of grey values
        assert log_weights(grey_model, prior_guide, x, check=False).isfinite().all()
        assert pv.evaluate(grey_model, prior_guide, x, check=False).elbo.isfinite().all()
        assert pv.fit(grey_model, new_trainable(), x, num_epochs=1, check=False)
    with pytest.raises(ValueError, match="guide: it has no site 'z'"):
        log_weights(local_model, no_site, x, check=False)


# -------------------------------- parameters of an earlier fit


@pytest.mark.parametrize("verb", ["evaluate", "importance", "diagnose", "log_weights", "draws"])
def test_functions_that_a_fit_trained_raise_without_its_param_store(verb):
    x = torch.randn(30)
    history = pv.fit(local_model, amortized_again, x, num_epochs=1)
    with pytest.raises(
        ValueError, match=r"it created the parameter '(slope|width)' anew.*with history.scope\(\):"
    ):
        VERBS[verb](local_model, amortized_again, x)
    with history.scope():
        assert VERBS[verb](local_model, amortized_again, x) is not None


def amortized_again(x):
    amortized(x)


def test_trained_modules_are_evaluated_without_the_param_store_of_their_fit():
    vae = pv.VAE(
        priors.StandardNormal(1),
        conditionals.Normal(nets.MLP(1, (4,)), event_shape=2),
        conditionals.Normal(nets.MLP(2, (4,)), event_shape=1),
    )
    pv.fit(vae.model, vae.guide, torch.randn(30, 2), num_epochs=1)
    assert pv.evaluate(vae.model, vae.guide, torch.randn(30, 2)).elbo.shape == (30,)


# -------------------------------- arrays


@pytest.mark.parametrize("verb", ["fit", "evaluate", "log_weights"])
def test_masked_arrays_raise(verb):
    x = np.ma.masked_values(np.array([1.0, -999.0, 2.0]), -999.0)
    with pytest.raises(ValueError, match=r"masked entries.*getmaskarray"):
        VERBS[verb](local_model, amortized, x)


def double_model(x):
    mu = pyro.param("mu", torch.tensor(1e8).double())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def double_guide(x):
    mu = pyro.param("mu", torch.tensor(1e8).double())
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + mu) / 2, torch.tensor(math.sqrt(0.5)).double()))


def test_arrays_are_converted_to_the_dtype_of_the_parameters():
    x = 1e8 + np.random.default_rng(0).normal(size=200)
    exact = dist.Normal(torch.tensor(1e8).double(), math.sqrt(2.0)).log_prob(torch.from_numpy(x))
    estimate = evidence.importance(double_model, double_guide, x, num_particles=5)
    torch.testing.assert_close(estimate.log_evidence, exact)
    elbo = pv.evaluate(double_model, double_guide, x).elbo
    torch.testing.assert_close(elbo, exact)
    for verb in ("evaluate", "fit", "importance"):
        with pytest.raises(ValueError, match=r"column|double"):
            VERBS[verb](local_model, lambda x: amortized(x), x)  # single precision
    assert pv.fit(local_model, lambda x: amortized(x), x - 1e8, num_epochs=1)


def test_data_are_converted_to_the_dtype_of_the_network():
    for dtype in (torch.float32, torch.float64):
        vae = pv.VAE(
            priors.StandardNormal(1),
            conditionals.Normal(nets.MLP(1, (4,)), event_shape=3),
            conditionals.Normal(nets.MLP(3, (4,)), event_shape=1),
        ).to(dtype)
        for x in (
            np.random.default_rng(0).normal(size=(20, 3)),
            torch.randn(20, 3),
            torch.randn(20, 3).double(),
        ):
            assert pv.evaluate(vae.model, vae.guide, x).elbo.dtype == dtype
            assert pv.fit(vae.model, vae.guide, x, num_epochs=1, batch_size=7, validation=x)
            assert log_weights(vae.model, vae.guide, x).dtype == dtype


# -------------------------------- supports that depend on the batch


def test_a_pair_whose_support_depends_on_the_batch_is_trained_and_evaluated():
    counts = torch.arange(1.0, 41.0).unsqueeze(-1).expand(40, 3).floor()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            probs = torch.softmax(torch.stack([z, -z, 0 * z], -1), -1)
            total = int(x.sum(-1).max())
            pyro.sample("x", dist.Multinomial(total, probs, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    assert pv.fit(model, guide, counts, num_epochs=1, batch_size=10)
    history = pv.fit(model, guide, counts.flip(0), num_epochs=1, batch_size=10)
    with history.scope():
        assert pv.evaluate(model, guide, counts, batch_size=10).elbo.shape == (40,)


def test_an_invalid_row_raises_in_its_minibatch_if_the_support_depends_on_the_batch():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Categorical(logits=z.unsqueeze(-1) * torch.arange(3.0)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    x = torch.zeros(40)
    x[33] = 5
    with pytest.raises(ValueError, match=r"row \d+ \(1 in all\) lies outside the support of 'x'"):
        pv.fit(model, guide, x, num_epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="row 3"):
        pv.evaluate(model, guide, x, batch_size=10)


# -------------------------------- rows in another dimension


def sequences(x):
    p = pyro.param("p", torch.tensor(0.0))
    with pyro.plate("seq", x.shape[1]):
        pyro.sample("x", dist.Normal(p, 1.0).expand([x.shape[0]]).to_event(1), obs=x.T)


def test_rows_in_another_dimension_raise():
    x = torch.randn(6, 50)
    message = r"plate 'seq' of 50 rows.*dimension 1 of argument 0 has 50.*x.transpose\(0, 1\)"
    for run in (
        lambda: pv.evaluate(sequences, lambda x: None, x),
        lambda: pv.fit(sequences, lambda x: None, x, num_epochs=1, batch_size=None),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    assert any("plate 'seq'" in problem for problem in pv.check_pair(sequences, lambda x: None, x).problems)
    assert pv.evaluate(sequences, lambda x: None, x, check=False).elbo.shape == (6,)


def features_of(num_rows):
    """x[n, d] ~ N(m[d], 1): m is in a plate of the features, and only x is in the plate of the rows."""

    def model(x):
        with pyro.plate("features", x.shape[1]):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", num_rows(x)):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", x.shape[1]):
            pyro.sample("m", dist.Normal(pyro.param("shift", torch.zeros(())) + x.mean(0), 1.0))

    return model, guide


def test_a_nested_data_plate_has_to_have_the_size_of_the_batch():
    x = torch.randn(6, 50)
    fixed = features_of(lambda _: 6)
    message = (
        r"plate 'features' of 50 rows, and all sites of plate 'rows' \(the 6 rows of the data\).*len\(x\)"
    )
    with pytest.raises(ValueError, match=message):
        pv.evaluate(*fixed, x)
    assert any("plate 'rows'" in problem for problem in pv.check_pair(*fixed, x).problems)
    sized = features_of(len)
    assert pv.check_pair(*sized, x).problems == ()
    torch.testing.assert_close(pv.evaluate(*sized, x).elbo, pv.evaluate(*fixed, x, check=False).elbo)


# -------------------------------- loaders


def test_evaluate_returns_terms_in_the_order_of_the_data_for_a_shuffling_loader():
    x = torch.linspace(-3, 3, 35)
    expected = pv.evaluate(local_model, exact_guide, x).elbo
    for loader in (
        DataLoader(TensorDataset(x), 10, shuffle=True),
        DataLoader(TensorDataset(x), 10, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(x), 35),
    ):
        torch.testing.assert_close(pv.evaluate(local_model, exact_guide, loader).elbo, expected)
    weighted = torch.utils.data.WeightedRandomSampler(torch.ones(35), 35)
    with pytest.raises(ValueError, match="order of its own"):
        pv.evaluate(local_model, exact_guide, DataLoader(TensorDataset(x), 10, sampler=weighted))


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_an_empty_loader_raises(verb):
    loader = DataLoader(TensorDataset(torch.randn(3)), 10, drop_last=True, sampler=None)
    with pytest.raises(ValueError, match=r"the loader has no batches"):
        VERBS[verb](local_model, lambda x: amortized(x), loader)


# -------------------------------- log-probabilities that are not finite


def gamma_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Gamma(0.5 * torch.ones_like(z), z.exp()), obs=x)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "SVI"])
def test_the_error_for_a_zero_under_a_gamma_names_site_and_row(verb):
    x = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match=r"log-probability of 'x' is inf at row 2 \(1 such rows\)"):
        VERBS[verb](gamma_model, trainable, x)


def test_integers_of_few_bits_do_not_overflow():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson((z + 5.5).exp()), obs=x)

    x = torch.tensor([255, 250, 3])
    expected = log_weights(model, trainable, x)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(log_weights(model, trainable, x.to(dtype)), expected)
        assert pv.evaluate(model, trainable, x.to(dtype)).elbo.isfinite().all()
    torch.testing.assert_close(log_weights(model, trainable, x.numpy().astype(np.uint8)), expected)


def test_importance_is_correct_if_the_likelihood_is_zero_at_some_draws():
    """x ~ Uniform(z − 1, z + 1): the mean of the weights, some of which are 0, is the evidence."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    x = torch.zeros(5)
    estimate = evidence.importance(model, prior_guide, x, num_particles=20_000)
    expected = math.log(0.5 * (2 * dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0)) - 1))
    assert ((estimate.log_evidence - expected).abs() < 4 * estimate.log_evidence_se).all()


# -------------------------------- observed sites of guides, scales, subsampling


def treated(x, t):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("t", dist.Bernoulli(0.5), obs=t)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def observing_guide(x, t, mark):
    with pyro.plate("data", len(x)):
        mark(t)
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


MARKS = {
    "auxiliary": lambda t: pyro.sample("t", dist.Bernoulli(0.5), obs=t, infer={"is_auxiliary": True}),
    "observed": lambda t: pyro.sample("t_q", dist.Bernoulli(0.25), obs=t),
    "factor": lambda t: pyro.factor("f", 0.7 * t, has_rsample=False),
    "auxiliary draw": lambda t: pyro.sample(
        "u", dist.Normal(torch.zeros(len(t)), 3.0), infer={"is_auxiliary": True}
    ),
}


@pytest.mark.parametrize("mark", MARKS)
def test_sites_that_a_guide_observes_are_not_part_of_q(mark):
    x, t = torch.randn(8, generator=torch.manual_seed(0)), torch.ones(8)
    guide = lambda x, t: observing_guide(x, t, MARKS[mark])  # noqa: E731
    exact = log_evidence(x) + math.log(0.5)
    torch.testing.assert_close(log_weights(treated, guide, (x, t), num_particles=3), exact.expand(3, 8))
    torch.testing.assert_close(
        evidence.importance(treated, guide, (x, t), num_particles=5).log_evidence, exact.double()
    )
    torch.testing.assert_close(pv.evaluate(treated, guide, (x, t)).elbo, exact)
    torch.testing.assert_close(
        joint_log_weights(treated, guide, (x, t)).log_weights, exact.sum().unsqueeze(0)
    )
    if mark == "auxiliary draw":
        with pytest.raises(ValueError, match="'u' is not in the model"):
            pv.free_energy(treated, guide, (x, t))
        return
    free_energy = pv.free_energy(treated, guide, (x, t), num_particles=5000).free_energy
    torch.testing.assert_close(free_energy, -exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "loss", [None, TraceEnum_ELBO(strict_enumeration_warning=False), TraceMeanField_ELBO()]
)
def test_reported_elbos_do_not_contain_scales(loss):
    x = torch.randn(12, generator=torch.manual_seed(0))

    def scaled(program):
        return poutine.scale(program, scale=1e-3)

    elbo = pv.evaluate(scaled(local_model), scaled(exact_guide), x, loss=loss).mean().elbo
    assert elbo == pytest.approx(log_evidence(x).mean().item(), rel=1e-5)
    history = pv.fit(
        scaled(local_model),
        scaled(amortized),
        x,
        loss=loss,
        num_epochs=1,
        batch_size=4,
        optim=pyro.optim.SGD({"lr": 0.0}),
    )
    with history.scope():
        plain = pv.evaluate(local_model, amortized, x, num_particles=3000).mean().elbo
    # one draw; with the scale it would be near 0
    assert history.epochs[0].train.elbo == pytest.approx(plain, abs=1.0)


def test_joint_log_weights_of_a_subsample_raise():
    for enumerate_it in (False, True):

        def model(x, enumerate_it=enumerate_it):
            infer = {"enumerate": "parallel"} if enumerate_it else {}
            with pyro.plate("data", len(x), subsample_size=5) as rows:
                k = pyro.sample("k", dist.Bernoulli(0.5), infer=infer)
                pyro.sample("x", dist.Normal(k, 1.0), obs=x[rows])

        guide = (lambda x: None) if enumerate_it else poutine.block(model, hide=["x"])
        with pytest.raises(ValueError, match="subsamples 5 of the 30 rows"):
            joint_log_weights(model, guide, torch.randn(30))


def test_evaluate_averages_an_enumerated_loss_over_particles():
    x = torch.randn(10, generator=torch.manual_seed(0))
    loss = TraceEnum_ELBO(strict_enumeration_warning=False)
    single = [pv.evaluate(local_model, prior_guide, x, loss=loss, seed=s).mean().elbo for s in range(40)]
    averaged = [
        pv.evaluate(local_model, prior_guide, x, loss=loss, seed=s, num_particles=25).mean().elbo
        for s in range(40)
    ]
    assert np.std(averaged) < 0.4 * np.std(single)


# -------------------------------- plates without a size, and distributions without validation


def unsized(x):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def unsized_guide(x):
    with pyro.plate("data"):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x, math.sqrt(0.5)))


def test_a_plate_without_a_size_is_a_data_plate():
    x = torch.randn(12, generator=torch.manual_seed(0))
    assert pv.check_pair(unsized, unsized_guide, x).problems == ()
    assert pv.check_pair(unsized, unsized_guide, x).data_plates == {"data"}
    torch.testing.assert_close(
        log_weights(unsized, unsized_guide, x, num_particles=3), log_evidence(x).expand(3, 12)
    )
    torch.testing.assert_close(pv.evaluate(unsized, unsized_guide, x, batch_size=5).elbo, log_evidence(x))
    pyro.set_rng_seed(0)
    ours = pv.fit(unsized, unsized_guide, x, num_epochs=2, batch_size=4)
    pyro.set_rng_seed(0)

    def sized_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x, math.sqrt(0.5)))

    sized = pv.fit(local_model, sized_guide, x, num_epochs=2, batch_size=4)
    assert ours.param_store["params"]["a"].item() == pytest.approx(
        sized.param_store["params"]["a"].item(), rel=1e-6
    )


def test_a_plate_without_a_size_raises_if_its_rows_share_a_draw():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)), 1.0))

    with pytest.raises(ValueError, match=r"plate 'data' has no size.*share one draw"):
        pv.evaluate(model, guide, torch.randn(9))


@pytest.mark.parametrize("default", [True, False])
def test_data_under_a_distribution_with_validate_args_false_are_not_validated(default, monkeypatch):
    """For each default of torch, which some libraries change for the process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", default)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z, validate_args=False), obs=x)

    x = torch.rand(12)
    assert pv.check_pair(model, trainable, x).problems == ()
    assert pv.fit(model, new_trainable(), x, num_epochs=1, batch_size=4)
    assert pv.evaluate(model, new_trainable(), x).elbo.isfinite().all()
    with pytest.raises(ValueError, match="grey"):
        pv.evaluate(grey_model, new_trainable(), x)

    def expanded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.mean()).expand([len(x)]), obs=x)

    with pytest.raises(ValueError, match="grey"):
        pv.evaluate(expanded, new_trainable(), x)
    assert torch.distributions.Distribution._validate_args is default


# -------------------------------- evidence, number of runs, unchanged state


@pytest.mark.parametrize("verb", ["ais", "smc", "bdmc", "reciprocal_importance", "prior_monte_carlo"])
def test_evidence_raises_for_data_outside_the_support(verb):
    x = torch.full((6,), 0.5)
    options = (
        {} if verb in ("reciprocal_importance", "prior_monte_carlo") else {"annealing": evidence.Annealing(3)}
    )
    with pytest.raises(ValueError, match=r"data: row 0 \(6 in all\) lies outside the support of 'x'"):
        getattr(evidence, verb)(grey_model, x, **options)


@pytest.mark.parametrize("rows", [1, 2, 3, 20, 100])
@pytest.mark.parametrize("num_particles", [1, 50])
def test_log_weights_run_the_pair_at_most_five_times_before_the_weighted_draws(rows, num_particles):
    runs = {"model": 0, "guide": 0}

    def model(x):
        runs["model"] += 1
        local_model(x)

    def guide(x):
        runs["guide"] += 1
        exact_guide(x)

    log_weights(model, guide, torch.randn(rows), num_particles=num_particles)
    assert max(runs.values()) <= 5 + 1  # one more for the draws


def test_validating_and_evaluating_a_pair_changes_no_state():
    from torch.distributions import Distribution

    guide = Frozen()
    guide.net.weight.requires_grad_(False)
    x = torch.randn(9)
    for validate in (False, True):
        Distribution.set_default_validate_args(validate)
        try:
            before = (
                torch.get_rng_state(),
                [p.requires_grad for p in guide.parameters()],
                [m.training for m in guide.modules()],
                len(pyro.get_param_store()),
            )
            pv.check_pair(local_model, guide, x)
            for verb in set(VERBS) - {"fit", "SVI"}:
                VERBS[verb](local_model, guide, x)
            assert Distribution._validate_args is validate
            assert torch.equal(torch.get_rng_state(), before[0])
            assert [p.requires_grad for p in guide.parameters()] == before[1]
            assert [m.training for m in guide.modules()] == before[2]
            assert len(pyro.get_param_store()) == before[3]
        finally:
            Distribution.set_default_validate_args(True)


# -------------------------------- parts of a diagnosis that cannot be computed


def test_diagnose_returns_the_other_parts_if_one_cannot_be_computed():
    class Normalized(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Sequential](nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                loc, scale = self.net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    planar = dist.transforms.Planar(2)

    def flow_guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x, torch.ones_like(x)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    x = torch.randn(12, 2)
    for guide, part in ((Normalized(), 0), (flow_guide, 1)):
        diagnosis = pv.diagnose(model, guide, x, num_particles=50, num_simulations=0)
        assert diagnosis.elbo.log_evidence.isfinite().all()
        assert len(diagnosis.notes) == part  # a planar flow computes only the density of its draws
        assert all(note.startswith("latent dimensions: not computed") for note in diagnosis.notes)


def test_the_error_of_ais_names_a_prior_without_support():
    class NoSupport(dist.Normal):
        @property
        def support(self):
            raise NotImplementedError

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", NoSupport(x.new_zeros(()), 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="NoSupport of 'z' does not define its support"):
        evidence.ais(model, torch.randn(4), annealing=evidence.Annealing(num_temperatures=3, num_chains=2))


# -------------------------------- probes and the param store


@pytest.mark.parametrize("in_store", [False, True])
def test_joint_log_weights_are_exact_if_parameters_have_the_shape_of_the_rows(in_store):
    """Without a plate, the rows are an event. Under the exact guide each joint log-weight is log p(x), and
    the probes leave no parameters in the param store."""
    x = torch.randn(8, generator=torch.manual_seed(0))

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        offset = pyro.param("offset", torch.zeros(len(x)))
        pyro.sample("z", dist.Normal(x / 2 + offset, math.sqrt(0.5)).to_event(1))

    if in_store:
        guide(x)
    joint = joint_log_weights(model, guide, x, num_particles=4).log_weights
    torch.testing.assert_close(joint, log_evidence(x).sum().expand(4))
    assert len(pyro.get_param_store()) == in_store


def test_probes_leave_no_parameters_for_the_weighted_draws():
    """A parameter that is initialized to the mean of the rows is initialized to that of all data."""
    x = torch.arange(20.0)
    starts = []

    def guide(x):
        start = pyro.param("start", lambda: x.mean())
        starts.append(start.item())
        exact_guide(x)

    log_weights(local_model, guide, x, num_particles=3)
    assert starts[-1] == x.mean().item()


def test_a_likelihood_outside_the_data_plate_raises_for_minibatches():
    """Its term would not be scaled, but those of the latents would."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x, pyro.param("s", torch.tensor(0.7)))
            )

    x = torch.randn(100)
    for verb in (
        lambda: pv.fit(model, guide, x, batch_size=10, num_epochs=1, progress=False),
        lambda: pv.evaluate(model, guide, x, batch_size=10),
    ):
        with pytest.raises(ValueError, match=r"'x' lies in no plate of the batch's 10 rows.*batch_size=None"):
            verb()
    with pyro.get_param_store().scope():
        pv.fit(model, guide, x, batch_size=None, num_epochs=1, progress=False)


def test_entries_in_a_separate_plate_raise_for_minibatches():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("entries", y.numel()):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y.reshape(-1))

    def guide(x, y):
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.1))

    with pytest.raises(ValueError, match="'y' lies in no plate"):
        pv.fit(
            model, guide, (torch.randn(40), torch.randn(40, 3)), batch_size=10, num_epochs=1, progress=False
        )


def test_joint_evidence_raises_for_a_plate_that_declares_more_data():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 60, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 0.2))

    x = torch.randn(20)
    for verb in (pv.joint_log_weights, lambda *args: evidence.importance(*args, joint=True)):
        with pytest.raises(ValueError, match="declares 60 data, of which 20 are given"):
            verb(model, guide, x)


def test_each_particle_is_a_new_draw_for_a_guide_of_deltas_with_log_density(monkeypatch):
    """Also at the default seed, since probes use other noise."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            q = dist.Normal(x / 2, 0.6)
            z = q.sample()
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z)))

    x = torch.tensor([0.5, -1.0, 0.2])
    for seed in (0, 1):
        w = pv.log_weights(model, guide, x, num_particles=2000, seed=seed)
        assert (w.std(0) > 0).all()
        truth = dist.Normal(0.0, 2**0.5).log_prob(x)
        assert (
            (w.logsumexp(0) - math.log(2000) - truth).abs() < 4 * w.exp().std(0) / w.exp().mean(0) / 2000**0.5
        ).all()


def test_check_false_raises_if_the_result_is_undefined():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        # judged wrong: no plate declares its dimension
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu + w.sum(), 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(ValueError, match="no data plate"):
        evidence.importance(model, guide, torch.randn(4), check=False)


def test_sequential_enumeration_raises():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "sequential"})
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"no site 'k'.*parallel"):
        evidence.importance(model, lambda x: None, torch.randn(4))


def test_integers_that_differ_only_by_rounding_errors_raise():
    x = 1_700_000_000 + torch.tensor([0, 10, 20, 30, 40])
    loc = torch.nn.Parameter(torch.tensor(1.7e9))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("loc", loc), 20.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="differ only by a few rounding errors"):
        evidence.importance(model, guide, x)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_data_are_converted_to_the_default_dtype_for_a_pair_without_parameters(dtype):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(3000).to(dtype)
    w = pv.log_weights(model, guide, x)
    torch.testing.assert_close(
        w.sum(), dist.Normal(0.0, 2**0.5).log_prob(x.float()).sum(), rtol=1e-5, atol=0.01
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_the_error_for_integers_under_a_bernoulli_names_the_remedy(dtype):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = (torch.rand(6) > 0.5).to(dtype)
    assert "x.float()" in " ".join(pv.check_pair(model, guide, x).problems)
    with pytest.raises(ValueError, match=r"x\.float\(\)"):
        evidence.importance(model, guide, x)
