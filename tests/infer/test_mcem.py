"""Monte Carlo EM: Fisher's identity, the maximum of the likelihood, acceptance rates, states, refusals."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, infer, nets, priors
from pyro_vae.infer import EMHistory, mcem
from tests.support.oracles import seeded


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


class FactorAnalysis:
    """z ~ N(0, I), x ~ N(W z + b, diag σ²), σ = exp s."""

    start: ClassVar = {"w": seeded(4, 1), "b": seeded(4, seed=1), "s": 0.3 * seeded(4, seed=2)}
    x = 1.5 * seeded(30, 4, seed=3)

    @staticmethod
    def model(x):
        w, b, s = (pyro.param(name, FactorAnalysis.start[name].clone()) for name in ("w", "b", "s"))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.mT + b, s.exp()).to_event(1), obs=x)

    @staticmethod
    def log_joint(w, b, s, z):
        likelihood = dist.Normal(z @ w.mT + b, s.exp()).log_prob(FactorAnalysis.x).sum(-1)
        return (likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)).sum(-1)

    @staticmethod
    def log_evidence(w, b, s, x=x):
        return dist.MultivariateNormal(b, w @ w.mT + torch.diag((2 * s).exp())).log_prob(x)

    @classmethod
    def posterior(cls, k):
        w, b, s = cls.start.values()
        scaled = w / (2 * s).exp().unsqueeze(-1)
        precision = torch.eye(1) + w.mT @ scaled
        mean = torch.linalg.solve(precision, ((cls.x - b) @ scaled).mT).mT
        return dist.MultivariateNormal(mean, precision_matrix=precision).sample((k,))


class Mixture:
    """k ~ Categorical(π), summed out; z ~ N(mₖ, 1), x ~ N(z, ½)."""

    start: ClassVar = {"m": torch.tensor([-1.0, 2.0]).double(), "logits": torch.tensor([0.3, -0.2]).double()}
    x = 2.0 * seeded(20, seed=3)

    @staticmethod
    def model(x):
        m, logits = (pyro.param(name, Mixture.start[name].clone()) for name in ("m", "logits"))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(m[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    @staticmethod
    def log_joint(m, logits, z):
        prior = (logits.log_softmax(0) + dist.Normal(m, 1.0).log_prob(z.unsqueeze(-1))).logsumexp(-1)
        return (prior + dist.Normal(z, 0.5).log_prob(Mixture.x)).sum(-1)

    @staticmethod
    def log_evidence(m, logits):
        return (logits.log_softmax(0) + dist.Normal(m, 1.25**0.5).log_prob(Mixture.x[:, None])).logsumexp(-1)

    @classmethod
    def posterior(cls, n):
        m, logits = cls.start.values()
        k = dist.Categorical(logits=logits + dist.Normal(m, 1.25**0.5).log_prob(cls.x[:, None])).sample((n,))
        return dist.Normal((m[k] + 4 * cls.x) / 5, 5**-0.5).sample()


class SharedMean:
    """z ~ N(0, 1) for all data, xᵢ ~ N(a z, σ²), σ = exp s."""

    start: ClassVar = {"a": torch.tensor(1.3).double(), "s": torch.tensor(0.2).double()}
    x = 1.0 + seeded(20, seed=3)

    @staticmethod
    def model(x):
        a, s = (pyro.param(name, SharedMean.start[name].clone()) for name in ("a", "s"))
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a * z, s.exp()), obs=x)

    @staticmethod
    def log_joint(a, s, z):
        return (dist.Normal(a * z, s.exp()).log_prob(SharedMean.x)).sum(-1) + dist.Normal(0.0, 1.0).log_prob(
            z
        ).sum(-1)

    @staticmethod
    def log_evidence(a, s):
        n = len(SharedMean.x)
        covariance = a**2 * torch.ones(n, n) + (2 * s).exp() * torch.eye(n)
        return dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(SharedMean.x)

    @classmethod
    def posterior(cls, k):
        a, s = cls.start.values()
        precision = 1 + len(cls.x) * a**2 * (-2 * s).exp()
        return dist.Normal(a * (-2 * s).exp() * cls.x.sum() / precision, precision**-0.5).sample((k, 1))


def gradient(f, start):
    leaves = [value.clone().requires_grad_() for value in start.values()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(f(*leaves).sum(), leaves)])


def gradient_error(case, k):
    """The standard error of the mean over k exact draws of ∇ log p(x, z)."""
    draws = case.posterior(300)
    gradients = [gradient(lambda *leaves, z=z: case.log_joint(*leaves, z), case.start) for z in draws]
    return torch.stack(gradients).std(0) / k**0.5


@pytest.mark.parametrize(
    ("case", "batch_size"),
    [(FactorAnalysis, None), (FactorAnalysis, 10), (Mixture, None), (Mixture, 5), (SharedMean, None)],
    ids=["factor analysis", "minibatches", "enumerated", "enumerated minibatches", "shared latent"],
)
def test_the_update_at_exact_posterior_draws_is_the_gradient_of_log_evidence(case, batch_size):
    """Fisher's identity. HMC leaves the posterior invariant, so a step that starts at exact draws has
    them. A step of SGD moves the parameters by lr times the gradient."""
    k, lr = 4000, 1e-8
    draws = case.posterior(k)
    n = draws.shape[1]
    exact = EMHistory(torch.ones(1), torch.ones(1), torch.full((n,), 0.3), {"z": draws}, None)
    history = mcem(
        case.model,
        case.x,
        optim=pyro.optim.SGD({"lr": lr}),
        num_epochs=1,
        batch_size=batch_size,
        num_chains=k,
        num_updates=1,
        start=exact,
    )
    num_steps = len(history.log_joint)
    assert num_steps == (1 if batch_size is None else n // batch_size)
    with history.scope():
        moved = torch.cat([(pyro.param(name) - case.start[name]).flatten() for name in case.start]).detach()
    # each minibatch is scaled by N/B
    expected, error = (
        num_steps * value for value in (gradient(case.log_evidence, case.start), gradient_error(case, k))
    )
    assert ((moved / lr - expected).abs() < 4 * error).all()
    assert (expected.abs() > 8 * error).any()
    assert not torch.equal(history.latents["z"], draws)
    assert (history.acceptance > 0.5).all()


def test_the_maximum_likelihood_of_factor_analysis_is_reached():
    """The mean of log p(x) is below its maximum by less than the standard error of the difference over
    data."""
    x = seeded(200, 1, seed=4) @ seeded(1, 4, seed=5) + 0.7 * seeded(200, 4, seed=6)
    best = {name: value.clone().requires_grad_() for name, value in FactorAnalysis.start.items()}
    optim = torch.optim.LBFGS(best.values(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optim.zero_grad()
        value = -FactorAnalysis.log_evidence(*best.values(), x=x).mean()
        value.backward()
        return value

    optim.step(loss)
    schedule = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.97}
    history = mcem(
        FactorAnalysis.model,
        x,
        optim=pyro.optim.ExponentialLR(schedule),
        num_epochs=150,
        num_chains=20,
        num_updates=2,
    )
    with history.scope():
        reached = [pyro.param(name).detach() for name in FactorAnalysis.start]
    with torch.no_grad():
        maximum = FactorAnalysis.log_evidence(*best.values(), x=x)
        below, before = (
            maximum - FactorAnalysis.log_evidence(*values, x=x)
            for values in (reached, FactorAnalysis.start.values())
        )
    error = below.std() / len(x) ** 0.5
    assert 0 <= below.mean() < error
    assert below.mean() < 0.01 * before.mean()
    assert before.mean() > 0.2


@pytest.mark.parametrize("target", [0.9, 0.6])
def test_the_acceptance_rate_is_the_target(target):
    history = mcem(
        FactorAnalysis.model,
        FactorAnalysis.x,
        optim=pyro.optim.SGD({"lr": 0.0}),
        num_epochs=40,
        num_chains=20,
        num_updates=1,
        target_acceptance=target,
        num_leapfrog=4,
    )
    assert history.acceptance.mean() == pytest.approx(target, abs=0.01)
    assert history.step_size.shape == (30,)
    # at fixed parameters the draws are those of the posterior
    z, exact = history.latents["z"], FactorAnalysis.posterior(4000)
    error = (exact.var(0) / 20).sqrt()
    assert ((z.mean(0) - exact.mean(0)).abs() < 4.5 * error).all()


def small_vae():
    return pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Normal(nets.MLP(2, (8,)), event_shape=3, scale="learned"),
        encoder=conditionals.Normal(nets.MLP(3, (8,)), event_shape=2),
    )


def run(model, x=None, **options):
    options = {"num_epochs": 2, "num_warm_up": 2, "num_leapfrog": 2, "batch_size": 10} | options
    return mcem(model, seeded(25, 3) if x is None else x, **options)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_module_is_trained_in_place_and_no_global_state_changes():
    vae, frozen = small_vae(), small_vae()
    frozen.model.decoder.log_scale.requires_grad_(False)
    for each in (vae, frozen):
        before = {name: value.clone() for name, value in each.named_parameters()}
        random = torch.get_rng_state()
        history = run(each.model, seed=3)
        assert torch.equal(random, torch.get_rng_state())
        assert not pyro.get_param_store()
        moved = {name for name, value in each.named_parameters() if not torch.equal(value, before[name])}
        in_model = {name for name in before if name.startswith("model.")}
        if each is frozen:
            in_model.remove("model.decoder.log_scale")
            assert not frozen.model.decoder.log_scale.requires_grad
        assert moved == in_model
        assert all(value.grad is None or not value.grad.any() for value in each.parameters())
    assert history.latents["z"].shape == (1, 25, 2)
    assert history.log_joint.shape == history.acceptance.shape == (6,)
    assert "6 steps of Monte Carlo EM" in str(history)


def test_calls_at_the_same_seed_are_equal():
    histories = []
    for seed in (5, 5, None, None):
        pyro.set_rng_seed(1)
        vae = small_vae()
        pyro.set_rng_seed(len(histories) if seed else 2)
        histories.append((run(vae.model, seed=seed), *vae.parameters()))
    for (a, *p), (b, *q) in zip(histories[::2], histories[1::2], strict=True):
        assert torch.equal(a.log_joint, b.log_joint)
        assert all(map(torch.equal, p, q))
    assert not torch.equal(histories[0][0].log_joint, histories[2][0].log_joint)


def test_parameters_of_functions_are_kept_in_the_param_store_of_the_call():
    options = {"optim": pyro.optim.Adam({"lr": 0.1})}
    first = run(FactorAnalysis.model, FactorAnalysis.x, **options)
    with first.scope():
        w = pyro.param("w").detach().clone()
    assert not torch.equal(w, FactorAnalysis.start["w"])
    options["optim"] = pyro.optim.SGD({"lr": 0.0})
    second = run(
        FactorAnalysis.model, FactorAnalysis.x, param_store=first.param_store, start=first, **options
    )
    with second.scope():
        assert torch.equal(w, pyro.param("w"))


def test_positive_parameters_and_labelled_data_and_short_batches_are_trained():
    def model(x, mask=None):
        scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).mask(mask).to_event(1), obs=x)

    x = seeded(25, 3)
    history = run(model, {"x": x, "mask": torch.ones(25, 3, dtype=torch.bool), "label": torch.arange(25)})
    assert (history.latents["z"] > 0).all()
    with history.scope():
        assert (pyro.param("scale") > 0).all()
        assert (pyro.param("scale") != 1).any()


def scaled(x):
    with poutine.scale(scale=2.0):
        FactorAnalysis.model(x)


def counts(x):
    rate = pyro.param("rate", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def constant(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def shared(x):
    SharedMean.model(x[:, 0])


def with_module(*layers):
    return pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nn.Sequential(nets.MLP(2, (8,)), *layers), event_shape=4),
        conditionals.Normal(nets.MLP(4, (8,)), event_shape=2),
    ).model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (counts, {}, "'z' is discrete and cannot be summed out"),
        (shared, {}, "'z' is shared by all data, .* batch_size=None"),
        (scaled, {}, r"is scaled \(poutine.scale\)"),
        (constant, {}, "nothing to train"),
        (with_module(nn.Dropout(0.5)), {}, "differs between training and evaluation mode"),
        (FactorAnalysis.model, {"batch_size": 0}, "batch_size: expected 1 or more"),
        (FactorAnalysis.model, {"num_updates": 0}, "num_updates"),
        (FactorAnalysis.model, {"target_acceptance": 1.0}, "0 < target_acceptance < 1"),
        (FactorAnalysis.model, {"optim": PyroOptim(torch.optim.LBFGS, {})}, "closure"),
        (
            FactorAnalysis.model,
            {
                "start": EMHistory(
                    torch.ones(1), torch.ones(1), torch.ones(9), {"z": torch.ones(1, 9, 2)}, None
                )
            },
            "start: its latents have the shapes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_defined_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, FactorAnalysis.x, **options)
    assert not pyro.get_param_store()


def test_a_value_that_is_not_finite_raises_before_parameters_are_updated():
    """The first update moves a location so far that the square of its distance overflows."""
    loc = nn.Parameter(torch.zeros(()))

    def model(x):
        pyro.param("loc", loc)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(FloatingPointError, match="at step 1; parameters are unchanged"):
        run(model, seeded(25), optim=pyro.optim.SGD({"lr": 1e200}))
    assert loc.isfinite()
    assert loc.abs() > 1e100
    assert not loc.grad.any()


def test_it_is_public():
    assert infer.mcem is mcem
