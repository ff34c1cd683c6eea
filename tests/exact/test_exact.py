"""Exact models: log-evidence against independent oracles, the pointwise identity, moments and gaps."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch.distributions import biject_to, constraints

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae.pairs.traces import run_pair
from tests.support import oracles
from tests.support.oracles import seeded

MODELS = oracles.make_models()
DISCRETE = {"FiniteMixture", "SigmoidBeliefNet"}
all_models = pytest.mark.parametrize("name", MODELS)


@all_models
def test_log_evidence_matches_the_oracle(name):
    model = MODELS[name]
    x = model.sample(7)
    assert model.log_evidence(x).shape == (7,)
    torch.testing.assert_close(model.log_evidence(x), oracles.log_evidence(name, model, x), rtol=0, atol=1e-8)


@all_models
def test_log_joint_minus_log_posterior_is_log_evidence(name):
    """log p(x, z) − log p(z|x) = log p(x) at samples of the prior, which do not depend on x."""
    model = MODELS[name]
    x = model.sample(7)
    z = model.prior().sample((20, 7))
    value = model.index(z) if name == "SigmoidBeliefNet" else z
    difference = model.log_joint(x, z) - model.posterior(x).log_prob(value)
    torch.testing.assert_close(difference, model.log_evidence(x).expand(20, 7), rtol=0, atol=1e-8)


@all_models
def test_log_weights_under_the_exact_guide_equal_log_evidence(name):
    model = MODELS[name]
    x = model.sample(7)

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior = model.posterior(x)
            if name == "SigmoidBeliefNet":
                index = pyro.sample("index", posterior, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(model.states[index]).to_event(1))
            else:
                pyro.sample("z", posterior)

    model_trace, guide_trace = run_pair(model, guide, x)
    log_weights = sum(
        sign * site["fn"].log_prob(site["value"])
        for sign, trace in ((1, model_trace), (-1, guide_trace))
        for site in trace.nodes.values()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    )
    torch.testing.assert_close(log_weights, model.log_evidence(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - DISCRETE))
def test_a_step_of_svi_runs_as_a_graph(name):
    model = MODELS[name]
    x = model.sample(7)

    def guide(x):
        with pyro.plate("data", len(x)):
            prior = model.prior()
            support = prior.support
            if isinstance(support, constraints.MixtureSameFamilyConstraint):
                support = support.base_constraint
            scale = pyro.param("scale", torch.ones(prior.event_shape, dtype=x.dtype))
            q = dist.Normal(0.5 + 0 * scale, scale.exp()).expand((len(x), *prior.event_shape))
            pyro.sample("z", dist.TransformedDistribution(q, biject_to(support)))

    with pyro.get_param_store().scope():
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), compile="trace")
        for _ in range(3):
            svi.step(x)
        assert ": traced" in svi.explain(), svi.explain()


@pytest.mark.parametrize("name", sorted(MODELS.keys() - DISCRETE))
def test_posterior_moments_match_samples(name):
    model = MODELS[name]
    x = model.sample(3)
    posterior, n = model.posterior(x), 40_000
    draws = posterior.sample((n,))
    assert draws.shape == (n, 3, *model.latent_shape)
    if name == "Funnel":  # only the mean of v converges at this sample size: y has heavy tails
        draws, mean = draws[..., 0], posterior.mean[..., 0]
    else:
        mean = posterior.mean
    error = draws.std(0) / math.sqrt(n)
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()
    if name != "Funnel":
        if hasattr(posterior, "covariance_matrix"):
            variance = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        else:
            variance = posterior.variance
        kurtosis = ((draws - mean) ** 4).mean(0) / draws.var(0) ** 2
        assert ((draws.var(0) - variance).abs() < 5 * variance * ((kurtosis - 1) / n).sqrt()).all()


@all_models
def test_trace_svi_and_check_pair_support_the_model(name):
    """The trace has log-probability log p(x, z), SVI updates a guide, and check_pair reports no problems."""
    model = MODELS[name]
    x = model.sample(7)
    trace = pyro.poutine.trace(model).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), model.log_joint(x, trace.nodes["z"]["value"]).sum())
    if name in DISCRETE:
        if name == "FiniteMixture":
            loss = TraceEnum_ELBO().loss(config_enumerate(model), lambda x: None, x)
            assert loss == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-8)
        return
    prior = model.prior()
    positive = name in ("BetaBernoulli", "GammaPoisson")

    def guide(x):
        loc = pyro.param("loc", torch.zeros(model.latent_shape, dtype=torch.double))
        with pyro.plate("data", len(x)):
            q = dist.Normal(loc, 1.0).to_event(1)
            if positive:
                transform = torch.distributions.biject_to(prior.support)
                q = dist.TransformedDistribution(q, [transform])
            pyro.sample("z", q)

    assert pv.check_pair(model, guide, x).problems == ()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert math.isfinite(svi.step(x))
    before = pyro.param("loc").detach().clone()
    assert math.isfinite(svi.step(x))
    assert not torch.equal(pyro.param("loc"), before)


@all_models
def test_invalid_data_raise(name):
    model = MODELS[name]
    x = model.sample(4)
    with pytest.raises(ValueError, match=r"expected x of shape \(batch"):
        model.log_evidence(torch.cat([x, x], -1))
    with pytest.raises(ValueError, match="no data"):
        model.posterior(x[:0])
    x[2] = math.nan
    with pytest.raises(ValueError, match=r"row 2|model has no data"):
        model.log_evidence(x)


def kl(q, p):
    """KL(q‖p) of multivariate Gaussians in closed form."""
    mean = q.base_dist.loc if isinstance(q, dist.Independent) else q.loc
    diagonal = isinstance(q, dist.Independent)
    scale_tril = q.base_dist.scale.expand_as(mean).diag_embed() if diagonal else q.scale_tril
    q = torch.distributions.MultivariateNormal(mean, scale_tril=scale_tril)
    return torch.distributions.kl_divergence(
        q, torch.distributions.MultivariateNormal(p.loc, p.covariance_matrix)
    )


@pytest.mark.parametrize(
    "name",
    [
        "factor analysis",
        "LinearGaussian with prior parameters",
        "BayesianLinearRegression",
        "NormalNormal",
        "LinearGaussianStateSpace",
    ],
)
def test_mean_field_gap_is_the_closed_form_kl(name):
    model = MODELS[name]
    x = model.sample(7)
    gap = kl(model.mean_field(x), model.posterior(x))
    torch.testing.assert_close(gap, model.mean_field_gap(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["Funnel", "Banana"])
def test_mean_field_gap_matches_monte_carlo_and_is_minimal(name):
    """Perturbed members of the family, evaluated with the same noise, have no smaller gap."""
    model = MODELS[name]
    x = model.sample(1)
    q, p, noise = model.mean_field(x).base_dist, model.posterior(x), seeded(100_000, 1, *model.latent_shape)

    def gaps(loc, scale):
        z = loc + scale * noise
        return dist.Normal(loc, scale).log_prob(z).sum(-1) - p.log_prob(z)

    best = gaps(q.loc, q.scale)
    assert abs(best.mean() - model.mean_field_gap(x)) < 4 * best.std() / 100_000**0.5
    for j in range(model.latent_shape[0]):
        step = torch.zeros(model.latent_shape, dtype=torch.double)
        step[j] = 0.15
        for loc, scale in (
            (q.loc + step, q.scale),
            (q.loc - step, q.scale),
            (q.loc, q.scale * step.exp()),
            (q.loc, q.scale / step.exp()),
        ):
            increase = gaps(loc, scale) - best
            assert increase.mean() > -3 * increase.std() / 100_000**0.5
    assert exact.Funnel(9, scale=3.0).mean_field_gap(torch.zeros(1, 1)).item() == pytest.approx(
        1.8628, abs=5e-5
    )


def test_log_normal_gap_matches_quadrature():
    """It is also the remainder of Stirling's formula, about 1/(12 A)."""
    model = MODELS["GammaPoisson"]
    x = model.sample(5)
    q, p = model.log_normal(x).base_dist.base_dist, model.posterior(x)
    t = torch.linspace(-12, 12, 20_001, dtype=torch.double)[:, None, None]
    u = q.loc + q.scale * t
    log_q = q.log_prob(u)
    difference = (log_q - u).squeeze(-1) - p.log_prob(u.exp())
    gap = (log_q.squeeze(-1).exp() * difference).sum(0) * (24 / 20_000) * q.scale.squeeze(-1)
    torch.testing.assert_close(gap, model.log_normal_gap(x), rtol=0, atol=1e-9)
    a = p.base_dist.concentration.squeeze(-1)
    torch.testing.assert_close(model.log_normal_gap(x), 1 / (12 * a), rtol=0.01, atol=0)


def test_rotating_the_loadings_changes_only_the_mean_field_gap():
    """W → W R. The gap is 0 if Λ is diagonal."""
    model = MODELS["factor analysis"]
    x = model.sample(5)
    _, rotation = torch.linalg.eigh(model.precision)
    rotated = exact.LinearGaussian(model.weight @ rotation, noise_scale=model.noise_scale, bias=model.bias)
    torch.testing.assert_close(rotated.log_evidence(x), model.log_evidence(x))
    assert model.mean_field_gap(x).min() > 0.01
    assert rotated.mean_field_gap(x).abs().max() < 1e-12


def test_ppca_maximizes_the_likelihood():
    x = seeded(300, 5) @ seeded(5, 5, seed=1) + seeded(5, seed=2)
    model = exact.LinearGaussian.ppca(x, 2)
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    noise = values[2:].mean()
    best = -0.5 * (5 * math.log(2 * math.pi) + values[:2].log().sum() + 3 * noise.log() + 5)
    assert model.log_evidence(x).mean().item() == pytest.approx(best.item(), abs=1e-10)
    parts = [p.clone().requires_grad_() for p in (model.weight, model.noise_scale[0], model.bias)]
    mean = exact.LinearGaussian(parts[0], noise_scale=parts[1], bias=parts[2]).log_evidence(x).mean()
    for gradient in torch.autograd.grad(mean, parts):
        assert gradient.abs().max() < 1e-10
    with pytest.raises(ValueError, match="0 < latent_dim < D"):
        exact.LinearGaussian.ppca(x, 5)
    with pytest.raises(ValueError, match="smaller latent_dim"):
        exact.LinearGaussian.ppca(seeded(50, 2) @ seeded(2, 5), 3)


def test_mixture_posterior_moments_between_distant_components():
    """Components at ±8 and x = 0: the posterior components have weight ½ each."""
    one = torch.eye(1).double()
    locs = torch.tensor([[-8.0], [8.0]]).double()
    model = exact.MixturePrior(torch.ones(2).double(), locs, one, weight=one, noise_scale=10.0)
    posterior = model.posterior(torch.zeros(1, 1).double())
    component_mean = 8.0 * 100 / 101
    assert posterior.mean.item() == pytest.approx(0.0, abs=1e-12)
    assert posterior.variance.item() == pytest.approx(component_mean**2 + 100 / 101, rel=1e-10)


def test_relu_posterior_is_accurate_in_the_tails():
    """Observations far from the mean of x truncate normals deep in their tails."""
    one = torch.ones(1, dtype=torch.double)
    model = exact.ReluDecoder(one, 0 * one, one.unsqueeze(0), noise_scale=0.1 * one)
    x = torch.tensor([[-30.0], [30.0], [0.0]]).double()
    posterior = model.posterior(x)
    draws = posterior.sample((4000,))
    assert torch.isfinite(draws).all()
    assert torch.isfinite(posterior.log_prob(draws)).all()
    # at x = 30 the posterior is N(30/1.01, 0.01/1.01)
    assert posterior.mean[1].item() == pytest.approx(30 / 1.01, rel=1e-12)
    # at x = −30 the unit is off, so the posterior is close to the prior truncated to z < 0
    assert abs(posterior.mean[0].item() + math.sqrt(2 / math.pi)) < 0.01


def test_relu_units_may_share_a_breakpoint():
    one = torch.ones(2, dtype=torch.double)
    model = exact.ReluDecoder(one, 0 * one, seeded(2, 2), noise_scale=0.5)
    x = model.sample(3)
    posterior = model.posterior(x)
    assert posterior.mean.isfinite().all()
    assert posterior.sample((100,)).isfinite().all()
    torch.testing.assert_close(
        model.log_evidence(x), oracles.log_evidence("ReluDecoder", model, x), rtol=0, atol=1e-8
    )


def test_log_evidence_is_accurate_in_single_precision():
    """With small noise and a large mean, Woodbury's formula cancels completely in single precision."""
    model = exact.LinearGaussian(seeded(50, 2).float(), noise_scale=0.01)
    x = model.sample(3)
    expected = exact.LinearGaussian(
        model.weight.double(), noise_scale=model.noise_scale.double()
    ).log_evidence(x.double())
    torch.testing.assert_close(model.log_evidence(x).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exact.LinearGaussian(torch.ones(3), noise_scale=1.0), r"weight of shape \(D, k\)"),
        (lambda: exact.LinearGaussian(torch.ones(3, 2), noise_scale=0.0), "positive"),
        (lambda: exact.GammaPoisson(rate=-1.0), "rate: expected a positive"),
        (lambda: exact.FiniteMixture(torch.ones(2), torch.ones(3, 2), torch.eye(2)), r"weights \(K,\)"),
        (lambda: exact.SigmoidBeliefNet(torch.ones(3, 13)), "k ≤ 12"),
        (
            lambda: exact.ReluDecoder(torch.ones(2), torch.ones(3), torch.ones(4, 2), noise_scale=1.0),
            r"\(H,\)",
        ),
        (lambda: exact.Funnel().log_evidence(torch.ones(3, 1)), r"torch\.zeros"),
        (
            lambda: exact.LinearGaussianStateSpace(
                *[torch.eye(2)] * 3, torch.eye(3), torch.eye(2), num_steps=2
            ),
            "observation_covariance",
        ),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
