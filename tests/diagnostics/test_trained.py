"""Guides trained by SVI reach the optimum of their family."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vae.diagnostics.families import as_gaussian
from tests.support import oracles
from tests.support.oracles import seeded

MODELS = oracles.make_models()


def trained(model, x, family):
    """A guide with a location and a scale for each datum, trained with plain SVI."""

    def guide(x):
        shape = (len(x), *model.latent_shape)
        loc = pyro.param("loc", torch.zeros(shape, dtype=torch.double))
        scale = pyro.param(
            "scale", 0.5 * torch.ones(shape, dtype=torch.double), constraint=dist.constraints.positive
        )
        with pyro.plate("data", len(x)):
            return pyro.sample("z", family(loc, scale).to_event(1))

    steps = 1500
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.02 ** (1 / steps)}
    )
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optim, loss)
    for _ in range(steps):
        svi.step(x)
        optim.step()
    return family(pyro.param("loc").detach(), pyro.param("scale").detach()).to_event(1)


@pytest.mark.parametrize(
    "name",
    [
        "factor analysis",
        "Funnel",
        pytest.param("BayesianLinearRegression", marks=pytest.mark.slow),
        pytest.param("LinearGaussianStateSpace", marks=pytest.mark.slow),
        pytest.param("Banana", marks=pytest.mark.slow),
        pytest.param("GammaPoisson", marks=pytest.mark.slow),
    ],
)
def test_gap_of_trained_guide_is_the_closed_form_of_its_family(name):
    """Within 1e-3 nats per datum. Between Gaussians the gap is in closed form; otherwise the optimum at the
    same noise is a control variate."""
    model = MODELS[name]
    x = model.sample(3)
    q = trained(model, x, dist.LogNormal if name == "GammaPoisson" else dist.Normal)
    if name in ("Funnel", "Banana", "GammaPoisson"):
        best = model.log_normal(x) if name == "GammaPoisson" else model.mean_field(x)
        formula = model.log_normal_gap(x) if name == "GammaPoisson" else model.mean_field_gap(x)
        noise, posterior = seeded(200_000, 1, *model.latent_shape), model.posterior(x)

        def terms(q):
            z = q.base_dist.loc + q.base_dist.scale * noise
            z = z.exp() if name == "GammaPoisson" else z
            return q.log_prob(z) - posterior.log_prob(z)

        gap = formula + (terms(q) - terms(best)).mean(0)
    else:
        gap = torch.distributions.kl_divergence(as_gaussian(q, 3), as_gaussian(model.posterior(x), 3))
        formula = 0.5 * (model.precision.diagonal().log().sum() - torch.logdet(model.precision))
    assert (gap - formula).abs().max() < 1e-3
