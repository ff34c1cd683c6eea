"""Grid against exact models and independent quadratures."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, exact, nets, priors
from tests.support import oracles
from tests.support.oracles import seeded

MODELS = oracles.make_models()


@pytest.mark.parametrize(
    "name",
    [
        "NormalNormal",
        "LinearGaussian with prior parameters",
        "MixturePrior",
        "BetaBernoulli",
        "GammaPoisson",
        "Banana",
    ],
)
def test_grid_matches_exact_models(name):
    model = MODELS[name]
    x = model.sample(5)
    grid = exact.Grid(model)
    solution = grid.solve(x)
    torch.testing.assert_close(solution.log_evidence, model.log_evidence(x), rtol=0, atol=1e-7)
    assert (solution.error < 1e-6).all()
    q, p = grid.posterior(x), model.posterior(x)
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-6)
    z = p.sample((6,))
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z), rtol=0, atol=1e-7)
    if hasattr(p, "covariance_matrix"):
        torch.testing.assert_close(q.covariance_matrix, p.covariance_matrix, rtol=0, atol=1e-6)


def test_error_bounds_the_error_at_kinks():
    model = MODELS["ReluDecoder"]
    x = model.sample(4)
    solution = exact.Grid(model).solve(x)
    deviation = (solution.log_evidence - model.log_evidence(x)).abs()
    assert (deviation < 1e-4).all()
    assert (deviation <= 2 * solution.error + 1e-9).all()


def test_samples_have_the_moments_of_the_posterior():
    model = MODELS["MixturePrior"]
    x = model.sample(3)
    posterior, n = exact.Grid(model).posterior(x), 40_000
    draws = posterior.sample((n,))
    assert draws.shape == (n, 3, 2)
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * draws.std(0) / n**0.5).all()
    assert posterior.sample().shape == (3, 2)


def normal_gamma(x):
    """A location and a precision for each datum, and a plate of observations nested in the data plate."""
    bias = pyro.param("bias", torch.tensor(0.3, dtype=torch.double))
    with pyro.plate("rows", len(x), dim=-2):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
        tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0, dtype=torch.double), 1.0))
        with pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("obs", dist.Normal(mu + bias, tau**-0.5), obs=x)


def test_two_scalar_latents_match_marginalization_by_hand():
    """With μ marginalized in closed form, a one-dimensional integral over τ remains."""
    x = 0.5 * seeded(3, 6)
    grid = exact.Grid(normal_gamma)
    n = x.shape[1]

    def over_tau(t):
        tau = t.exp()[:, None]
        r = x - 0.3
        # N(r; 0, I/τ + 11ᵀ): determinant lemma and Woodbury
        log_det = -n * tau.log() + torch.log1p(n * tau)
        square = tau * (r**2).sum(1) - tau**2 * r.sum(1) ** 2 / (1 + n * tau)
        prior = dist.Gamma(2.0, 1.0).log_prob(tau)
        return prior + t[:, None] - 0.5 * (n * math.log(2 * math.pi) + log_det + square)

    torch.testing.assert_close(
        grid.log_evidence(x), oracles.log_integral(over_tau, -25, 8), rtol=0, atol=1e-6
    )
    posterior = grid.posterior(x)
    assert posterior.event_shape == (2,)
    assert (posterior.mean[:, 1] > 0).all()
    assert len(pyro.get_param_store()) == 0  # the param store is restored


def test_narrow_posteriors_are_integrated():
    """100 observations with σ = 0.01: the posterior is 1000 times narrower than the prior."""
    model = exact.NormalNormal(100, noise_scale=torch.tensor(0.01, dtype=torch.double)).double()
    x = model.sample(4)
    torch.testing.assert_close(exact.Grid(model).log_evidence(x), model.log_evidence(x), rtol=0, atol=1e-6)


def test_two_narrow_modes_are_integrated():
    """x ~ N(z², σ²) with a small σ has modes at ±√x."""

    def narrow_modes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z**2, 1e-3), obs=x)

    x = torch.tensor([0.7, 1.3, 2.0], dtype=torch.double)

    def log_joint(t):
        return dist.Normal(0.0, 1.0).log_prob(t)[:, None] + dist.Normal(t[:, None] ** 2, 1e-3).log_prob(x)

    grid = exact.Grid(narrow_modes)
    torch.testing.assert_close(
        grid.log_evidence(x), oracles.log_integral(log_joint, -4, 4, 2_000_001), rtol=0, atol=1e-7
    )
    assert grid.posterior(x).mean.abs().max() < 1e-9


@pytest.mark.parametrize("noise", [0.01, 0.003])
def test_error_bounds_the_error_on_narrow_ridges(noise):
    def ridge(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), noise), obs=x)

    x = torch.tensor([1.0, 2.3], dtype=torch.double)
    solution = exact.Grid(ridge).solve(x)
    deviation = (solution.log_evidence - dist.Normal(0.0, math.sqrt(2 + noise**2)).log_prob(x)).abs()
    assert (deviation <= solution.error + 1e-7).all()


def test_log_prob_broadcasts():
    model = MODELS["NormalNormal"]
    posterior = exact.Grid(model).posterior(model.sample(3))
    assert posterior.log_prob(torch.zeros(1).double()).shape == (3,)
    assert posterior.log_prob(torch.zeros(5, 1, 1).double()).shape == (5, 3)


def make_vae():
    return pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.MLP(2, (30,)), event_shape=(8, 8)),
        conditionals.Normal(nets.MLP(64, (30,)), event_shape=2),
    )


@pytest.fixture(scope="module")
def trained():
    pyro.set_rng_seed(0)
    train, test = pv.load("digits", binarize="stochastic")
    vae = make_vae()
    pv.fit(vae.model, vae.guide, train, num_epochs=15, optim=pyro.optim.Adam({"lr": 3e-3}))
    return vae, test.x[:20]


@pytest.mark.slow
def test_evidence_of_a_trained_vae_is_converged_and_above_iwae_bounds(trained):
    """A smaller tolerance does not change it, and importance-weighted bounds approach it from below."""
    vae, x = trained
    solution = exact.Grid(vae.model, tolerance=1e-8).solve(x)
    assert (solution.error < 1e-6).all()
    coarse = exact.Grid(vae.model, tolerance=1e-3).log_evidence(x)
    assert (coarse - solution.log_evidence).abs().max() < 1e-6
    bounds = []
    for k in (1, 10, 1000):
        with torch.no_grad():
            q = vae.encode(x)
            z = q.sample((200 if k < 1000 else 20, k))
            log_w = vae.decode(z).log_prob(x) + vae.model.prior().log_prob(z) - q.log_prob(z)
            draws = torch.logsumexp(log_w.double(), 1) - math.log(k)
            bounds.append((draws.mean(1).mean(), draws.mean(1).std() / len(draws) ** 0.5))
    truth = solution.log_evidence.mean()
    assert bounds[0][0] < bounds[1][0] < bounds[2][0] < truth + 3 * bounds[2][1]
    assert truth - bounds[2][0] < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in vae.parameters())


@pytest.mark.slow
def test_max_points_does_not_change_the_result(trained):
    vae, x = trained
    whole, parts = (exact.Grid(vae.model, max_points=m).log_evidence(x) for m in (2**21, 2**17))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-9)


def global_latent(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_plate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)


def three_dimensions(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def simplex(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def no_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (global_latent, "'w' lies in no data plate"),
        (no_plate, "'z' and 'x' lie in no data plate"),
        (three_dimensions, "3 latent dimensions"),
        (discrete, "'z' is discrete"),
        (simplex, "fewer dimensions than its event"),
        (no_latents, "0 latent dimensions"),
    ],
)
def test_unsupported_models_raise(model, message):
    with pytest.raises(ValueError, match=message):
        exact.Grid(model).log_evidence(torch.randn(5))


def test_invalid_data_raise():
    with pytest.raises(ValueError, match="row 1"):
        exact.Grid(discrete).log_evidence(torch.tensor([0.0, math.nan]))


def test_warns_iff_the_error_exceeds_the_tolerance(monkeypatch, caplog):
    """A warning is logged if and only if the error at the limit of points is above the tolerance."""
    model = MODELS["NormalNormal"]
    x = model.sample(1)
    for max_points, warned in ((2**17, False), (4000, False), (1700, True)):
        monkeypatch.setattr("pyro_vae.exact.grid._MAX_POINTS", {1: max_points})
        caplog.clear()
        solution = exact.Grid(model).solve(x)
        assert solution.points.shape[1] <= max_points
        assert bool(caplog.records) == warned == bool(solution.error > 1e-7)
        deviation = (solution.log_evidence - model.log_evidence(x)).abs()
        assert deviation <= solution.error + 1e-12


def mixture(locs, scales, noise_scale=5.0):
    """A mixture prior with isotropic components of equal weights, and x ~ N(z, noise_scale²)."""
    locs, scales = torch.tensor(locs, dtype=torch.double), torch.tensor(scales, dtype=torch.double)
    eye = torch.eye(locs.shape[1], dtype=torch.double)
    return exact.MixturePrior(
        torch.ones(len(locs)), locs, scales[:, None, None] * eye, weight=eye, noise_scale=noise_scale
    ).double()


def check_against_closed_form(model, x, tolerance=1e-7):
    grid = exact.Grid(model, tolerance=tolerance)
    solution, q, p = grid.solve(x), grid.posterior(x), model.posterior(x)
    deviation = (solution.log_evidence - model.log_evidence(x)).abs()
    assert (deviation <= solution.error + 1e-12).all()
    assert (solution.error < 1.01 * tolerance).all()
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(q.variance, p.variance, rtol=0, atol=100 * tolerance)
    return solution.points.shape[1]


@pytest.mark.parametrize(
    ("locs", "scales", "max_points"),
    [
        ([[-2.0, -0.3], [2.0, 0.4]], [0.05, 0.05], 100_000),
        ([[-3.0, 0.0], [3.0, 0.0]], [0.1, 0.1], 100_000),
        ([[-2.0, -2.0], [2.0, 2.0]], [0.1, 0.05], 100_000),
        ([[0.0, 0.0], [2.5, 1.0]], [1.0, 0.05], 100_000),
        ([[0.0, 0.0], [2.5, 1.0]], [1.0, 0.01], 100_000),
        ([[-2.0], [2.5]], [0.05, 0.05], 4000),
        ([[0.0], [2.5]], [1.0, 0.01], 4000),
        ([[0.0], [2.5]], [1.0, 0.001], 4000),
    ],
)
def test_number_of_points_is_small_for_narrow_modes(locs, scales, max_points):
    model = mixture(locs, scales)
    x = torch.full((1, len(locs[0])), 0.1, dtype=torch.double)
    assert check_against_closed_form(model, x) <= max_points


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-9])
def test_error_bounds_the_error_at_any_tolerance(tolerance):
    check_against_closed_form(
        mixture([[-2.0, -0.3], [2.0, 0.4]], [0.05, 0.3]), torch.zeros(1, 2).double(), tolerance
    )


def test_refinement_is_per_datum():
    """Some data have one narrow mode, some two distant modes, some a broad mode."""
    model = mixture(
        [[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -3.0]], [0.1, 0.05, 0.1, 0.7], noise_scale=0.7
    )
    x = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [2.0, 2.0], [0.0, -3.0], [-1.5, 1.5]], dtype=torch.double)
    assert check_against_closed_form(model, x) <= 150_000
    alone = torch.cat([exact.Grid(model).log_evidence(row) for row in x.split(1)])
    torch.testing.assert_close(exact.Grid(model).log_evidence(x), alone, rtol=0, atol=2e-7)


def test_a_datum_at_the_limit_of_points_does_not_affect_others(monkeypatch, caplog):
    monkeypatch.setattr("pyro_vae.exact.grid._MAX_POINTS", {1: 3000})

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.where(x < 0, 100 * (20 * z).sin(), z), 1.0), obs=x)

    x = torch.tensor([-1.0, 0.3], dtype=torch.double)
    error = exact.Grid(model).solve(x).error
    assert caplog.records
    assert error[0] > 1e-7 >= error[1]


def test_rows_that_need_many_points_are_divided(monkeypatch):
    """With few points at once, rows are halved, and their results are those of each row alone."""
    model = exact.Banana(scale=2.0).double()
    x = torch.zeros(2, 1, dtype=torch.double)
    together = exact.Grid(model).solve(x)
    num_points = []
    refine = exact.Grid._refine

    def counted(self, box):
        refined = refine(self, box)
        num_points.append(None if refined is None else refined[0].weights.numel())
        return refined

    monkeypatch.setattr(exact.Grid, "_refine", counted)
    grid = exact.Grid(model, max_points=2**17)
    parts = grid.solve(x)
    assert None in num_points
    assert all(n is None or n <= 4 * 2**17 for n in num_points)
    torch.testing.assert_close(parts.log_evidence, together.log_evidence, rtol=0, atol=2e-7)
    torch.testing.assert_close(grid.posterior(x).mean, model.posterior(x).mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "max_points"), [(exact.Funnel(1, scale=1.0), 200_000), (exact.Banana(scale=2.0), 400_000)]
)
def test_curved_densities_match_exact_models(model, max_points):
    model, x = model.double(), torch.zeros(1, 1, dtype=torch.double)
    grid = exact.Grid(model)
    solution = grid.solve(x)
    assert (solution.log_evidence.abs() <= solution.error).all()
    assert (solution.error < 1.01e-7).all()
    assert solution.points.shape[1] <= max_points
    q, p = grid.posterior(x), model.posterior(x)
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(q.covariance_matrix, p.covariance_matrix, rtol=0, atol=1e-5)


def laplace_prior(x):
    """The density has a kink at the prior mean."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(False), obs=x)


def uniform_likelihood(x):
    """The density jumps at z = x. ∫ₓ^∞ z e^{−z} / z dz = e^{−x}."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Uniform(torch.zeros_like(z), z, validate_args=False), obs=x)


@pytest.mark.parametrize(
    ("model", "log_evidence"), [(laplace_prior, torch.zeros_like), (uniform_likelihood, torch.neg)]
)
def test_kinks_and_jumps_are_refined(model, log_evidence):
    x = torch.tensor([1.0, 2.3, 0.2, 0.7], dtype=torch.double)
    solution = exact.Grid(model).solve(x)
    assert ((solution.log_evidence - log_evidence(x)).abs() <= solution.error).all()
    assert (solution.error < 1.01e-7).all()


def test_samples_have_the_moments_and_weights_of_narrow_modes():
    model, n = mixture([[-2.0, -0.3], [2.0, 0.4]], [0.05, 0.3]), 40_000
    x = torch.tensor([[1.0, 0.2]], dtype=torch.double)
    draws, p = exact.Grid(model).posterior(x).sample((n,))[:, 0], model.posterior(x)
    right = draws[:, 0] > 0
    weight = p.mixture_distribution.probs[0, 1]
    assert (right.double().mean() - weight).abs() < 5 * (weight * (1 - weight) / n) ** 0.5
    for k, part in enumerate((draws[~right], draws[right])):
        component = p.component_distribution
        mean, variance = component.mean[0, k], component.variance[0, k]
        assert ((part.mean(0) - mean).abs() < 5 * (variance / len(part)) ** 0.5).all()
        assert ((part.var(0) / variance - 1).abs() < 5 * (2 / len(part)) ** 0.5).all()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_moments_of_heavy_tails(scale):
    """The variance of LogNormal(0, 3²) is made where log z = 18, at six standard deviations."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), scale))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    posterior = exact.Grid(model).posterior(torch.zeros(1, dtype=torch.double))
    prior = dist.LogNormal(torch.zeros((), dtype=torch.double), scale)
    torch.testing.assert_close(posterior.mean[0], prior.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(posterior.variance[0], prior.variance, rtol=2e-5, atol=0)


def test_invalid_options_raise():
    for options, message in (({"max_points": 0}, "max_points"), ({"tolerance": -1.0}, "tolerance")):
        with pytest.raises(ValueError, match=message):
            exact.Grid(MODELS["NormalNormal"], **options)
