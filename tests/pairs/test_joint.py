"""All data as one datum: the verbs with ``joint=True``, for models with latents that all data share."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex

import pyro_vae as pv
from pyro_vae import diagnostics, evidence, exact
from pyro_vae.compiler import THRESHOLDS, Thresholds

N = 12
X = 0.5 + torch.randn(N, generator=torch.manual_seed(1), dtype=torch.double)
DESIGN = torch.randn(N, 3, generator=torch.manual_seed(2), dtype=torch.double)
REGRESSION = exact.BayesianLinearRegression(DESIGN, prior_precision=1.0, noise_precision=4.0)
Y = torch.randn(N, generator=torch.manual_seed(3), dtype=torch.double)
ZERO = torch.zeros((), dtype=torch.double)


def mean_model(x):
    mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def mean_guide(x, scale=1.0):
    precision = 0.25 + len(x)
    pyro.sample("mu", dist.Normal(x.sum() / precision, scale * precision**-0.5))


def mean_evidence(x):
    return dist.MultivariateNormal(0 * x, torch.eye(len(x), dtype=x.dtype) + 4.0).log_prob(x)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def regression_guide(x, y):
    truth = exact.BayesianLinearRegression(x, prior_precision=1.0, noise_precision=4.0)
    posterior = truth.posterior(y.unsqueeze(0))
    pyro.sample("w", dist.MultivariateNormal(posterior.mean[0], posterior.covariance_matrix[0]))


def hierarchy(x):
    """mu ~ N(0, 2²), z_i ~ N(mu, 1), x_i ~ N(z_i, 1)."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchy_guide(x):
    precision = 0.25 + len(x) / 2
    mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mu + x) / 2, 0.5**0.5))


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale * 0.5**0.5))


def hierarchy_evidence(x):
    return dist.MultivariateNormal(0 * x, 2 * torch.eye(len(x), dtype=x.dtype) + 4.0).log_prob(x)


EXACT = {
    "mean": (mean_model, mean_guide, (X,), mean_evidence(X)),
    "regression": (regression, regression_guide, (DESIGN, Y), REGRESSION.log_evidence(Y.unsqueeze(0))[0]),
    "global and local": (hierarchy, hierarchy_guide, (X,), hierarchy_evidence(X)),
}
exactly = pytest.mark.parametrize("name", EXACT)


@exactly
def test_under_the_exact_posterior_each_joint_weight_is_the_log_evidence_of_all_data(name):
    model, guide, data, truth = EXACT[name]
    found = pv.joint_log_weights(model, guide, data, num_particles=50)
    torch.testing.assert_close(found.log_weights, truth.expand(50), rtol=0, atol=1e-10)
    assert found.log_evidence == pytest.approx(truth.item(), abs=1e-10)
    assert found.ess == pytest.approx(50)
    assert found.log_evidence_se == pytest.approx(0, abs=1e-10)
    assert found.pareto_k == -math.inf
    for estimate in (evidence.importance, evidence.elbo):
        bound = estimate(model, guide, data, num_particles=50, joint=True)
        torch.testing.assert_close(bound.log_evidence, truth.unsqueeze(0), rtol=0, atol=1e-10)
        torch.testing.assert_close(bound.ess, torch.full((1,), 50.0).double())


@exactly
@pytest.mark.parametrize("start", ["prior", pytest.param("guide", marks=pytest.mark.slow)])
def test_joint_ais_is_within_its_error_of_the_log_evidence(name, start):
    model, guide, data, truth = EXACT[name]
    found = evidence.ais(
        model,
        data,
        annealing=evidence.Annealing(num_temperatures=60, num_chains=100),
        start=guide if start == "guide" else None,
        joint=True,
        progress=False,
    )
    assert found.log_evidence.shape == found.ess.shape == found.acceptance.shape == (1,)
    assert (found.log_evidence - truth).abs().item() < 4 * found.log_evidence_se.item() + 1e-9
    if start == "guide":  # base and target are one
        torch.testing.assert_close(found.log_evidence, truth.unsqueeze(0), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_joint_ais_of_few_chains_is_a_lower_bound_on_average():
    found = [
        evidence.ais(
            mean_model,
            X,
            annealing=evidence.Annealing(num_temperatures=4, num_chains=2, schedule="uniform"),
            joint=True,
            seed=s,
            progress=False,
        )
        for s in range(8)
    ]
    logs = torch.cat([one.log_evidence for one in found]) - mean_evidence(X)
    weights = logs.exp()
    assert (weights.mean() - 1).abs() < 4 * weights.std() / 8**0.5
    assert logs.mean() < 0


@exactly
def test_joint_bounds_of_the_prior_are_below_the_log_evidence(name):
    model, _, data, truth = EXACT[name]
    found = evidence.prior_monte_carlo(model, data, num_particles=20_000, joint=True)
    assert found.log_evidence < truth + 4 * found.log_evidence_se
    lower = evidence.elbo(model, poutine.block(model, hide=["x", "y"]), data, joint=True)
    assert lower.log_evidence < truth


def test_posterior_draws_of_a_regression_have_the_moments_of_the_exact_posterior():
    n = 20_000
    draws = diagnostics.posterior_draws(regression, regression_guide, (DESIGN, Y), num_draws=n, joint=True)
    assert draws.keys() == {"w"}
    assert draws["w"].shape == (n, 3)
    posterior = REGRESSION.posterior(Y.unsqueeze(0))
    mean, covariance = posterior.mean[0], posterior.covariance_matrix[0]
    assert ((draws["w"].mean(0) - mean).abs() < 4 * (covariance.diagonal() / n).sqrt()).all()
    products = (draws["w"] - mean).unsqueeze(-1) * (draws["w"] - mean).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / n**0.5).all()


@exactly
def test_the_weights_belong_to_the_draws(name):
    """log p(x, z) − log q(z|x), once more by plain Pyro at each draw."""
    model, _, data, _ = EXACT[name]
    prior = poutine.block(model, hide=["x", "y"])
    found = pv.joint_log_weights(model, prior, data, num_particles=4)
    for i, weight in enumerate(found.log_weights):
        values = {site: draws[i] for site, draws in found.draws.items()}
        p, q = (
            poutine.trace(poutine.condition(each, values)).get_trace(*data).log_prob_sum()
            for each in (model, prior)
        )
        torch.testing.assert_close(weight, p - q, rtol=0, atol=1e-10)


def test_verbs_agree_at_one_seed():
    options = {"seed": 5}
    guide = lambda x: mean_guide(x, 2.0)  # noqa: E731
    found = pv.joint_log_weights(mean_model, guide, X, num_particles=300, **options)
    bound = evidence.importance(mean_model, guide, X, num_particles=300, joint=True, **options)
    assert bound.log_evidence.item() == pytest.approx(found.log_evidence, abs=1e-12)
    assert bound.log_evidence_se.item() == pytest.approx(found.log_evidence_se, abs=1e-12)
    assert bound.ess.item() == pytest.approx(found.ess)
    assert bound.pareto_k.item() == pytest.approx(found.pareto_k)
    draws = diagnostics.posterior_draws(mean_model, guide, X, num_draws=300, joint=True, **options)
    torch.testing.assert_close(draws["mu"], found.draws["mu"], rtol=0, atol=0)
    report = pv.diagnose(mean_model, guide, X, num_particles=300, joint=True, **options)
    torch.testing.assert_close(report.importance.log_evidence, bound.log_evidence, rtol=0, atol=0)
    assert report.elbo.log_evidence.item() == pytest.approx(found.log_weights.mean().item(), abs=1e-12)
    assert report.pareto_k.shape == (1,)


def test_draws_and_weights_are_those_of_one_run_in_whatever_chunks(monkeypatch):
    """Chunks of particles, and chunks by a graph: each weight is that of its draw."""
    loc, scale = X.sum() / (0.25 + N), (0.25 + N) ** -0.5

    def expected(mu):
        return (
            mean_evidence(X) + dist.Normal(loc, scale).log_prob(mu) - dist.Normal(loc, 2 * scale).log_prob(mu)
        )

    for graph_from in (10**9, 5):
        monkeypatch.setitem(THRESHOLDS, "log-weights", Thresholds(graph_from, 10**9))
        found = pv.joint_log_weights(
            mean_model, lambda x: mean_guide(x, 2.0), X, num_particles=403, max_bytes=40_000
        )
        assert found.draws["mu"].unique().shape == (403,)
        torch.testing.assert_close(found.log_weights, expected(found.draws["mu"]), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- eight schools


SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.double),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.double),
)


def eight_schools(y, sigma):
    """As Stan has it, with no plate; ``mu + tau * eta`` does not run in a plate of particles."""
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(ZERO, 1.0))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8).double(), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


def eight_schools_from_the_right(y, sigma):
    mu = pyro.sample("mu", dist.Normal(ZERO, 5.0)).unsqueeze(-1)
    tau = pyro.sample("tau", dist.LogNormal(ZERO, 1.0)).unsqueeze(-1)
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8).double(), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


def eight_schools_evidence():
    """Over mu and eta y is Gaussian, N(0, diag sigma² + 25 + tau² I); over log tau a fine grid."""
    y, sigma = SCHOOLS
    log_tau = torch.linspace(-7, 7, 4001, dtype=torch.double)
    covariance = torch.diag(sigma**2) + 25.0 + log_tau.mul(2).exp().reshape(-1, 1, 1) * torch.eye(8).double()
    log_prob = dist.MultivariateNormal(0 * y, covariance).log_prob(y) + dist.Normal(ZERO, 1.0).log_prob(
        log_tau
    )
    return log_prob.logsumexp(0) + math.log(14 / 4000)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("model", [eight_schools, eight_schools_from_the_right])
@pytest.mark.slow
def test_eight_schools_without_a_plate(model, autoguide):
    guide = autoguide(model, init_scale=0.5)
    pv.fit(
        model,
        guide,
        SCHOOLS,
        num_epochs=300,
        batch_size=None,
        optim=pyro.optim.Adam({"lr": 0.03}),
        progress=False,
    )
    n = 400
    bound = evidence.importance(model, guide, SCHOOLS, num_particles=n, joint=True, progress=False)
    assert (bound.log_evidence - eight_schools_evidence()).abs() < 4 * bound.log_evidence_se
    report = pv.diagnose(model, guide, SCHOOLS, num_particles=n, joint=True)
    torch.testing.assert_close(report.importance.log_evidence, bound.log_evidence, rtol=0, atol=0)
    assert report.usage is report.calibration is None
    draws = diagnostics.posterior_draws(model, guide, SCHOOLS, num_draws=n, joint=True)
    assert {name: tuple(part.shape) for name, part in draws.items()} == {
        "mu": (n,),
        "tau": (n,),
        "eta": (n, 8),
    }
    assert (draws["tau"] > 0).all()
    pytest.importorskip("arviz_base")
    tree = diagnostics.to_arviz(model, guide, SCHOOLS, num_draws=n, joint=True)
    assert tree["posterior"]["eta"].dims == ("chain", "draw", "eta_0")
    assert tree["posterior"]["mu"].dims == ("chain", "draw")
    weights = torch.from_numpy(tree["sample_stats"]["log_weight"].values.copy())
    assert weights.shape == (1, n)
    assert (weights[0].logsumexp(0) - math.log(n)).item() == pytest.approx(
        bound.log_evidence.item(), abs=1e-12
    )
    assert tree["posterior"].attrs["pareto_k"] == pytest.approx(bound.pareto_k.item())


@pytest.mark.slow
def test_joint_ais_of_eight_schools_is_the_log_evidence():
    found = evidence.ais(
        eight_schools_from_the_right,
        SCHOOLS,
        annealing=evidence.Annealing(num_temperatures=60, num_chains=60),
        joint=True,
        progress=False,
    )
    assert (found.log_evidence - eight_schools_evidence()).abs() < 4 * found.log_evidence_se


def test_joint_ais_refuses_a_model_that_does_not_run_in_a_plate_of_particles():
    with pytest.raises(ValueError, match=r"does not run in a plate of particles.*unsqueeze\(-1\)"):
        evidence.ais(
            eight_schools,
            SCHOOLS,
            annealing=evidence.Annealing(num_temperatures=3, num_chains=2),
            joint=True,
            progress=False,
        )


# ---------------------------------------------------------------- plates, enumeration


def test_sites_in_the_data_plate_have_its_dimension():
    n = 7
    draws = diagnostics.posterior_draws(hierarchy, hierarchy_guide, X, num_draws=n, joint=True)
    assert {name: tuple(part.shape) for name, part in draws.items()} == {"mu": (n,), "z": (n, N)}
    one = diagnostics.posterior_draws(hierarchy, hierarchy_guide, X[:1], num_draws=n, joint=True)
    assert one["z"].shape == (n, 1)
    pytest.importorskip("arviz_base")
    tree = diagnostics.to_arviz(hierarchy, hierarchy_guide, X, num_draws=30, joint=True)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "z_0")
    assert tree["sample_stats"]["log_weight"].dims == ("chain", "draw")
    apart = diagnostics.to_arviz(local_model, local_guide, X, num_draws=30)
    assert apart["posterior"]["z"].dims == ("chain", "draw", "data")
    assert apart["sample_stats"]["log_weight"].dims == ("chain", "draw", "data")


def test_latents_in_sequential_plates_are_served():
    """The same model as ``hierarchy``, its local latents one by one."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        precision = 0.25 + len(x) / 2
        mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", dist.Normal((mu + x[i]) / 2, 0.5**0.5))

    x, truth = X[:3], hierarchy_evidence(X[:3])
    found = pv.joint_log_weights(model, guide, x, num_particles=5)
    torch.testing.assert_close(found.log_weights, truth.expand(5), rtol=0, atol=1e-10)
    assert found.draws.keys() == {"mu", "z_0", "z_1", "z_2"}
    ais = evidence.ais(
        model, x, annealing=evidence.Annealing(num_temperatures=30, num_chains=50), joint=True, progress=False
    )
    assert (ais.log_evidence - truth).abs() < 4 * ais.log_evidence_se


WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.double)


def mixture(x):
    """As the tutorial on mixtures has it: locs[y], which does not run in a plate of particles."""
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(ZERO, 3.0))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[y], 1.0), obs=x)


def mixture_from_the_right(x):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(Vindex(locs)[..., y], 1.0), obs=x)


def mixture_by_brute_force(x, locs):
    """log p(x, locs): Σ_i log Σ_k w_k N(x_i; loc_k, 1), and the prior."""
    each = WEIGHTS.log() + dist.Normal(locs.unsqueeze(-2), 1.0).log_prob(x.unsqueeze(-1))
    return each.logsumexp(-1).sum(-1) + dist.Normal(ZERO, 3.0).log_prob(locs).sum(-1)


@pytest.mark.parametrize("model", [mixture, mixture_from_the_right])
def test_enumerated_sites_of_each_datum_are_summed_out(model):
    guide = AutoNormal(poutine.block(model, hide=["y"]), init_scale=0.5)
    found = pv.joint_log_weights(model, guide, X, num_particles=50)
    assert found.draws.keys() == {"locs"}
    assert found.draws["locs"].shape == (50, 2)
    scale, loc = guide.scales.locs.double(), guide.locs.locs.double()
    log_q = dist.Normal(loc, scale).log_prob(found.draws["locs"]).sum(-1)
    expected = mixture_by_brute_force(X, found.draws["locs"]) - log_q
    # the guide is single precision
    torch.testing.assert_close(found.log_weights, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_joint_ais_sums_enumerated_sites_out():
    """Against the integral over both locs on a grid."""
    axis = torch.linspace(-15, 15, 601, dtype=torch.double)
    grid = torch.cartesian_prod(axis, axis)
    truth = torch.cat([mixture_by_brute_force(X, part) for part in grid.split(20_000)]).logsumexp(
        0
    ) + 2 * math.log(30 / 600)
    found = evidence.ais(
        mixture_from_the_right,
        X,
        annealing=evidence.Annealing(num_temperatures=60, num_chains=100),
        joint=True,
        progress=False,
    )
    assert (found.log_evidence - truth).abs() < 4 * found.log_evidence_se


def test_sites_that_a_guide_draws_for_each_value_have_no_draws():
    """y and z of each datum: the guide sums y out, and draws z for both of its values."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(ZERO, 2.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(mu + y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(ZERO, 2.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(0.5 * y, 1.5))

    found = pv.joint_log_weights(model, guide, X, num_particles=5)
    assert found.draws.keys() == {"mu"}
    assert found.draws["mu"].shape == (5,)
    assert found.log_weights.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_joint_weight_is_the_sum_of_those_of_each_datum(scale):
    apart = pv.log_weights(local_model, lambda x: local_guide(x, scale), X, num_particles=20, seed=3)
    found = pv.joint_log_weights(local_model, lambda x: local_guide(x, scale), X, num_particles=20, seed=3)
    torch.testing.assert_close(found.log_weights, apart.sum(1), rtol=0, atol=1e-10)
    assert found.draws["z"].shape == (20, N)
    elbos = [
        evidence.elbo(
            local_model, lambda x: local_guide(x, scale), X, num_particles=20, seed=3, joint=joint
        ).log_evidence
        for joint in (False, True)
    ]
    torch.testing.assert_close(elbos[0].sum(0, keepdim=True), elbos[1], rtol=0, atol=1e-10)


# ---------------------------------------------------------------- what is refused, and said


REFUSING = {
    "importance": lambda **o: evidence.importance(mean_model, mean_guide, X, **o),
    "elbo": lambda **o: evidence.elbo(mean_model, mean_guide, X, **o),
    "prior_monte_carlo": lambda **o: evidence.prior_monte_carlo(mean_model, X, **o),
    "ais": lambda **o: evidence.ais(
        mean_model, X, annealing=evidence.Annealing(num_temperatures=3, num_chains=2), **o
    ),
    "posterior_draws": lambda **o: diagnostics.posterior_draws(mean_model, mean_guide, X, **o),
    "to_arviz": lambda **o: diagnostics.to_arviz(mean_model, mean_guide, X, **o),
    "diagnose": lambda **o: pv.diagnose(mean_model, mean_guide, X, **o),
}


@pytest.mark.parametrize("verb", REFUSING)
def test_shared_latents_are_refused_without_joint(verb):
    if verb == "to_arviz":
        pytest.importorskip("arviz_base")
    with pytest.raises(ValueError, match=rf"'mu' lies in no data plate.*joint=True in .*{verb}"):
        REFUSING[verb]()
    REFUSING[verb](joint=True)


@pytest.mark.parametrize(
    "verb",
    [
        lambda: evidence.smc(mean_model, X, annealing=evidence.Annealing(num_temperatures=3, num_chains=2)),
        lambda: evidence.bdmc(mean_model, X, annealing=evidence.Annealing(num_temperatures=3, num_chains=2)),
        lambda: evidence.reciprocal_importance(mean_model, X),
        lambda: pv.split_gap(mean_model, mean_guide, X),
        lambda: diagnostics.calibration(mean_model, mean_guide, X),
        lambda: diagnostics.latent_usage(mean_model, mean_guide, X),
    ],
)
def test_verbs_of_each_datum_refuse_shared_latents(verb):
    with pytest.raises(ValueError, match="'mu' lies in no data plate"):
        verb()


def test_joint_ais_refuses_discrete_latents_that_cannot_be_summed_out():
    def model(x):
        rate = pyro.sample("rate", dist.Poisson(torch.tensor(3.0).double()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    with pytest.raises(ValueError, match="'rate' is discrete and cannot be summed out"):
        evidence.ais(model, X, annealing=evidence.Annealing(num_temperatures=3, num_chains=2), joint=True)


def test_results_say_that_all_data_are_together():
    guide = lambda x: mean_guide(x, 2.0)  # noqa: E731
    bound = str(evidence.importance(mean_model, guide, X, num_particles=100, joint=True))
    assert "log p(x₁…x_N) ≥" in bound
    assert "per datum" not in bound
    assert "nan" not in bound
    page = str(pv.diagnose(mean_model, guide, X, num_particles=100, joint=True))
    assert "all data together" in page
    assert "effective sample size" in page
    assert "latent dimensions: not computed" in page
    assert "calibration: not computed" in page
    table = str(pv.joint_log_weights(mean_model, guide, X, num_particles=100)).splitlines()
    assert len(table) == 4
    assert "nats" in table[0]


def test_an_interrupted_joint_run_resumes_and_is_told_from_one_of_each_datum(tmp_path):
    options = {"num_particles": 20, "resume": tmp_path / "file", "progress": False}
    first = evidence.importance(local_model, local_guide, X, joint=True, **options)
    again = evidence.importance(local_model, local_guide, X, joint=True, **options)
    torch.testing.assert_close(first.log_evidence, again.log_evidence, rtol=0, atol=0)
    with pytest.raises(ValueError, match="to another run"):
        evidence.importance(local_model, local_guide, X, **options)


def test_the_elbo_of_evaluate_is_the_mean_joint_weight():
    """An estimate of the same bound by other code."""
    guide = lambda x: mean_guide(x, 2.0)  # noqa: E731
    found = pv.joint_log_weights(mean_model, guide, X, num_particles=4000).log_weights
    other = pv.evaluate(mean_model, guide, X, num_particles=4000, seed=1).elbo.sum()
    assert (found.mean() - other).abs() < 4 * 2**0.5 * found.std() / 4000**0.5
