"""Flows and mixtures: shapes, normalized densities, samples, training, gaps."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv
from pyro_vae import conditionals, exact, flows, nets, priors
from pyro_vae.vae import Guide


def zuko_flow(trunk, event_shape):
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(features=event_shape, context=8, transforms=2, hidden_features=(16,))
    inverted = zuko.flows.Flow([t.inv for t in flow.transform.transforms], flow.base)
    return flows.Zuko(trunk, event_shape=event_shape, flow=inverted, context_dim=8)


FAMILIES = {
    "affine": lambda trunk, event_shape: flows.AffineAutoregressive(trunk, event_shape=event_shape),
    "spline": lambda trunk, event_shape: flows.NeuralSpline(trunk, event_shape=event_shape),
    "mixture": lambda trunk, event_shape: flows.NormalMixture(trunk, event_shape=event_shape),
    "zuko": zuko_flow,
}
for_each_family = pytest.mark.parametrize("name", FAMILIES)


@for_each_family
@pytest.mark.parametrize("batch", [(4,), (3, 4)], ids=str)
def test_sample_and_log_prob_shapes(name, batch):
    conditional = FAMILIES[name](nets.MLP(6, (10,)), 2)
    q = conditional(torch.randn(*batch, 6))
    assert q.has_rsample
    z = q(()) if name == "zuko" else q.rsample()
    assert z.shape == (*batch, 2)
    assert q.log_prob(z).shape == batch


@for_each_family
def test_density_is_normalized_and_matches_samples(name):
    q = FAMILIES[name](nets.MLP(6, (10,)), 2)(torch.randn(1, 6))
    with torch.no_grad():
        draws = (q.dist if name == "zuko" else q).sample((4000,))[:, 0]
        low, high = draws.amin(0) - 3, draws.amax(0) + 3
        axes = [torch.linspace(float(a), float(b), 300) for a, b in zip(low, high, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 1, 2)
        cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
        density = q.log_prob(grid).double().exp()[:, 0]
        assert density.sum().item() * cell == pytest.approx(1.0, abs=2e-3)
        mean = (density.unsqueeze(1) * grid[:, 0]).sum(0) * cell
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - mean).abs() < 5 * error + 5e-3).all()


@for_each_family
def test_svi_updates_each_parameter_of_a_guide(name):
    encoder = FAMILIES[name](nets.MLP(6, (10,)), 2)
    vae = pv.VAE(priors.StandardNormal(2), conditionals.Normal(nets.MLP(2, (8,)), event_shape=6), encoder)
    x = torch.randn(20, 6)
    before = {key: p.detach().clone() for key, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        assert math.isfinite(svi.step(x))
    unchanged = [key for key, p in vae.named_parameters() if torch.equal(p, before[key])]
    assert not unchanged
    assert pv.check_pair(vae.model, vae.guide, x).problems == ()


def bimodal_model():
    """A bimodal prior with noise so large that posteriors are bimodal."""
    locs = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    return exact.MixturePrior(torch.ones(2), locs, 0.5 * torch.eye(2), weight=torch.eye(2), noise_scale=3.0)


def train_guide(toy, conditional, x):
    guide = Guide(conditional)
    pv.fit(toy, guide, x, num_epochs=60, batch_size=200, optim=pyro.optim.Adam({"lr": 5e-3}))
    return guide


@pytest.mark.slow
def test_flows_and_mixtures_have_smaller_gaps_on_bimodal_posteriors():
    toy = bimodal_model()
    pyro.set_rng_seed(1)
    x = toy.sample(1000)
    guides = {
        "Gaussian": train_guide(toy, conditionals.MultivariateNormal(nets.MLP(2, (32,)), event_shape=2), x),
        "spline": train_guide(toy, flows.NeuralSpline(nets.MLP(2, (32,)), event_shape=2), x),
        "mixture": train_guide(toy, flows.NormalMixture(nets.MLP(2, (32,)), event_shape=2), x),
    }
    gaps = {
        name: pv.compare(toy, guide, toy.sample(50), split=False).gap.mean() for name, guide in guides.items()
    }
    assert gaps["mixture"] < 0.5 * gaps["Gaussian"]
    assert gaps["spline"] < 0.8 * gaps["Gaussian"]


@pytest.mark.slow
def test_split_gap_of_a_mixture_guide_sums_to_the_gap():
    toy = bimodal_model()
    pyro.set_rng_seed(1)
    guide = train_guide(toy, flows.NormalMixture(nets.MLP(2, (32,)), event_shape=2), toy.sample(200))
    report = pv.compare(toy, guide, toy.sample(6), num_particles=4000)
    split = report.split
    error = torch.hypot(split.approximation_se, torch.hypot(split.amortization_se, report.gap_se))
    assert ((split.approximation + split.amortization - report.gap).abs() < 4.5 * error).all()
    assert (split.amortization > -4.5 * split.amortization_se).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda trunk: flows.AffineAutoregressive(trunk, event_shape=1), "a Gaussian"),
        (lambda trunk: flows.NeuralSpline(trunk, event_shape=(2, 3)), "one dimension"),
        (lambda trunk: flows.NormalMixture(trunk, event_shape=1), "2 or more"),
        (lambda trunk: flows.NeuralSpline(trunk, event_shape=2, num_transforms=0), "positive whole"),
        (lambda trunk: flows.NormalMixture(trunk, event_shape=2, min_scale=-1.0), "finite number ≥ 0"),
    ],
)
def test_invalid_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make(nets.MLP(6))
