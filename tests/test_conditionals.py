"""Conditionals as p(x|z) and q(z|x): shapes, gradients and densities."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae import conditionals as c
from pyro_vae import nets, priors

FAMILIES = {
    "Bernoulli": c.Bernoulli,
    "ContinuousBernoulli": c.ContinuousBernoulli,
    "Poisson": c.Poisson,
    "NegativeBinomial": c.NegativeBinomial,
    "Beta": c.Beta,
    "Gamma": c.Gamma,
    "Normal": c.Normal,
    "Normal, log-variance": lambda *a, **k: c.Normal(*a, scale="log_variance", **k),
    "Normal, learned scale": lambda *a, **k: c.Normal(*a, scale="learned", **k),
    "Normal, isotropic scale": lambda *a, **k: c.Normal(*a, scale="isotropic", **k),
    "Normal, fixed scale": lambda *a, **k: c.Normal(*a, scale=0.5, **k),
    "Normal in (0, 1)": lambda *a, **k: c.Normal(*a, loc_constraint=constraints.unit_interval, **k),
    "Laplace": c.Laplace,
    "LogNormal": c.LogNormal,
    "StudentT": c.StudentT,
    "MultivariateNormal": c.MultivariateNormal,
    "LowRankMultivariateNormal": c.LowRankMultivariateNormal,
    "Categorical": lambda *a, **k: c.Categorical(*a, num_classes=5, **k),
}
VECTORS = ("MultivariateNormal", "LowRankMultivariateNormal")
every_family = pytest.mark.parametrize("name", FAMILIES)


def make(name, trunk, event_shape):
    return FAMILIES[name](trunk, event_shape=event_shape).double()


@every_family
@pytest.mark.parametrize("batch", [(), (6,), (3, 6)], ids=str)
def test_shapes_and_support(name, batch):
    event = (4,) if name in VECTORS else (2, 3)
    conditional = make(name, nets.MLP(5, (8,)), event)
    distribution = conditional(torch.randn(*batch, 5, dtype=torch.double))
    assert distribution.batch_shape == batch
    assert distribution.event_shape == event
    draw = distribution.sample()
    assert distribution.support.check(draw).all()
    log_prob = distribution.log_prob(draw)
    assert log_prob.shape == batch
    assert torch.isfinite(log_prob).all()


@every_family
def test_every_parameter_has_a_gradient(name):
    event = (4,) if name in VECTORS else (2, 3)
    conditional = make(name, nets.MLP(5, (8,)), event)
    distribution = conditional(torch.randn(20, 5, dtype=torch.double))
    distribution.log_prob(distribution.sample()).sum().backward()
    for parameter_name, parameter in conditional.named_parameters():
        assert (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - VECTORS))
@pytest.mark.parametrize("image", [(8, 8), (3, 8, 8)], ids=str)
def test_shapes_with_convolutional_trunks(name, image):
    decoder = make(name, nets.ConvDecoder(5, image, (6, 4)), image)
    distribution = decoder(torch.randn(2, 7, 5, dtype=torch.double))
    assert distribution.batch_shape == (2, 7)
    assert distribution.event_shape == image
    encoder = make(name, nets.ConvEncoder(image, (4, 6)), 3)
    assert encoder(torch.randn(2, 7, *image, dtype=torch.double)).shape() == (2, 7, 3)


@every_family
def test_svi_moves_every_parameter_of_a_likelihood(name):
    event = (4,) if name in VECTORS else (2, 3)
    vae = pv.VAE(
        priors.StandardNormal(2),
        FAMILIES[name](nets.MLP(2, (8,)), event_shape=event),
        c.Normal(nets.MLP(event, (8,)), event_shape=2),
    )
    x = vae.sample(11)
    before = {key: p.detach().clone() for key, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    assert all((p != before[key]).any() for key, p in vae.named_parameters())
    assert vae.reconstruct(x).shape == x.shape


class PriorOnSupport(c.Conditional):
    """A prior from the family of a guide, which has the same support."""

    def __init__(self, conditional):
        super().__init__(conditional.event_shape)
        self.conditional = conditional

    def forward(self, *_):
        return self.conditional(torch.zeros(5))


@pytest.mark.parametrize(
    "name",
    [
        "Beta",
        "Gamma",
        "Laplace",
        "LogNormal",
        "StudentT",
        "ContinuousBernoulli",
        "Normal, learned scale",
        *VECTORS,
    ],
)
def test_svi_moves_every_parameter_of_a_reparameterized_guide(name):
    encoder = FAMILIES[name](nets.MLP(6, (8,)), event_shape=3)
    prior = PriorOnSupport(FAMILIES[name](nets.MLP(5, (8,)), event_shape=3))
    vae = pv.VAE(prior, c.Normal(nets.MLP(3, (8,)), event_shape=6), encoder)
    assert encoder(torch.zeros(2, 6)).has_rsample
    before = [p.detach().clone() for p in encoder.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(3):
        svi.step(torch.randn(11, 6))
    assert all((p != b).any() for p, b in zip(encoder.parameters(), before, strict=True))


@every_family
def test_conditional_without_inputs_raises(name):
    conditional = make(name, nn.Linear(5, 8), 4)
    with pytest.raises(ValueError, match="got no inputs"):
        conditional()


def test_log_prob_of_normal_is_its_formula():
    conditional = c.Normal(nets.MLP(5, (8,)), event_shape=(2, 3), min_scale=0.01).double()
    given, y = torch.randn(7, 5, dtype=torch.double), torch.randn(7, 2, 3, dtype=torch.double)
    h = conditional.trunk(given)
    loc, log_scale = (conditional.readout[name].layer(h).reshape(7, 2, 3) for name in ("loc", "log_scale"))
    scale = 0.01 + log_scale.exp()
    expected = (
        -0.5 * ((y - loc) / scale) ** 2 - scale.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    ).sum((1, 2))
    torch.testing.assert_close(conditional(given).log_prob(y), expected)


def test_covariance_of_multivariate_normal_is_that_of_its_cholesky_factor():
    d = 4
    conditional = c.MultivariateNormal(nets.MLP(5, (8,)), event_shape=d).double()
    given = torch.randn(3, 7, 5, dtype=torch.double)
    h = conditional.trunk(given)
    parts = {name: readout(h) for name, readout in conditional.readout.items()}
    factor = torch.zeros(3, 7, d, d, dtype=torch.double)
    row, column = torch.tril_indices(d, d, offset=-1)
    factor[..., row, column] = parts["lower"]
    factor[..., range(d), range(d)] = 1e-3 + parts["log_diagonal"].exp()
    torch.testing.assert_close(conditional(given).covariance_matrix, factor @ factor.mT)
    assert c.MultivariateNormal(nets.MLP(5, (8,)), event_shape=1)(torch.zeros(2, 5)).event_shape == (1,)


def test_covariance_of_low_rank_normal_is_its_formula():
    conditional = c.LowRankMultivariateNormal(nets.MLP(5, (8,)), event_shape=6, rank=2).double()
    given = torch.randn(7, 5, dtype=torch.double)
    h = conditional.trunk(given)
    factor = conditional.readout["factor"](h)
    diagonal = (1e-3 + conditional.readout["log_diagonal"](h).exp()) ** 2
    torch.testing.assert_close(
        conditional(given).covariance_matrix, factor @ factor.mT + torch.diag_embed(diagonal)
    )


def test_log_prob_and_mean_of_categorical_are_their_formulas():
    conditional = c.Categorical(nets.MLP(5, (8,)), event_shape=(2, 3), num_classes=4).double()
    given = torch.randn(7, 5, dtype=torch.double)
    logits = conditional.readout["logits"](conditional.trunk(given))
    distribution = conditional(given)
    y = distribution.sample()
    expected = logits.log_softmax(1).gather(1, y.long().unsqueeze(1)).sum((1, 2, 3))
    torch.testing.assert_close(distribution.log_prob(y), expected)
    torch.testing.assert_close(
        distribution.mean, (logits.softmax(1) * torch.arange(4).reshape(4, 1, 1)).sum(1)
    )


def test_scales_and_rates_have_lower_bounds():
    """Read-outs of −1e4 give the smallest scale and rate, so densities are bounded."""
    for family in (c.Normal, c.Laplace, c.LogNormal, c.StudentT):
        conditional = family(nets.MLP(5, ()), event_shape=3, min_scale=0.25)
        torch.nn.init.constant_(conditional.readout["log_scale"].layer.bias, -1e4)
        base = conditional(torch.zeros(2, 5)).base_dist
        assert torch.all((base.base_dist if family is c.LogNormal else base).scale == 0.25)
    conditional = c.Gamma(nets.MLP(5, ()), event_shape=3)
    bias = conditional.readout["rate"].layer.bias
    torch.nn.init.constant_(bias, -1e4)
    assert torch.all(conditional(torch.zeros(2, 5)).base_dist.rate == 1e-3 + softplus(bias.detach()))


def test_log_prob_of_masked_is_the_sum_over_observed_entries():
    conditional = c.Bernoulli(nets.MLP(5, (8,)), event_shape=(2, 3)).double()
    distribution = conditional(torch.randn(7, 5, dtype=torch.double))
    y, mask = distribution.sample(), torch.rand(7, 2, 3) > 0.4
    expected = (distribution.base_dist.log_prob(y) * mask).sum((1, 2))
    torch.testing.assert_close(c.masked(distribution, mask).log_prob(y), expected)
    with pytest.raises(ValueError, match="not independent"):
        c.masked(
            c.MultivariateNormal(nets.MLP(5), event_shape=3)(torch.zeros(2, 5)),
            torch.ones(2, 3, dtype=torch.bool),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda trunk: c.Normal(trunk, event_shape=(0,)), "positive whole numbers"),
        (lambda trunk: c.Normal(trunk, event_shape=3, scale=-1.0), "a fixed scale that is a positive"),
        (lambda trunk: c.Normal(trunk, event_shape=3, scale="netwrok"), '"network"'),
        (lambda trunk: c.Normal(trunk, event_shape=3, scale=None), '"network"'),
        (lambda trunk: c.Normal(trunk, event_shape=4, scale=torch.ones(3)), r"of shape \(4,\)"),
        (lambda trunk: c.Normal(trunk, event_shape=3, min_scale=-1.0), "finite number ≥ 0"),
        (lambda trunk: c.Normal(trunk, event_shape=3, min_scale=float("inf")), "finite number ≥ 0"),
        (lambda trunk: priors.Normal(3, min_scale=-1.0), "finite number ≥ 0"),
        (lambda trunk: c.MultivariateNormal(trunk, event_shape=(3, 4)), "one dimension"),
        (lambda trunk: c.Categorical(trunk, event_shape=3, num_classes=1), "2 or more"),
        (lambda trunk: c.Normal(torch.nn.ReLU(), event_shape=3), "out_shape"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make(nets.MLP(5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float, 1e-6), (torch.double, 1e-12)], ids=str)
@pytest.mark.parametrize("family", [c.Normal, c.Laplace, c.LogNormal])
def test_loaded_parameters_give_the_density_of_the_original_network(family, dtype, tolerance):
    """Loads the state_dict of plain layers h = tanh(Ax + a), μ = Bh + b, log σ² = Ch + c."""
    hidden, mean, log_variance = (torch.nn.Linear(*sizes, dtype=dtype) for sizes in [(5, 8), (8, 3), (8, 3)])
    encoder = family(nets.MLP(5, (8,)), event_shape=3, scale="log_variance", min_scale=0.0).to(dtype)
    layers = {"trunk.layers.0": hidden, "readout.loc.layer": mean, "readout.log_variance.layer": log_variance}
    encoder.load_state_dict(
        {f"{path}.{k}": v for path, layer in layers.items() for k, v in layer.state_dict().items()}
    )
    x, y = torch.randn(7, 5, dtype=dtype), torch.rand(7, 3, dtype=dtype) + 0.1
    h = hidden(x).tanh()
    loc, scale = mean(h), (0.5 * log_variance(h)).exp()
    expected = {
        c.Normal: -0.5 * ((y - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi),
        c.Laplace: -(y - loc).abs() / scale - (2 * scale).log(),
        c.LogNormal: -0.5 * ((y.log() - loc) / scale) ** 2
        - scale.log()
        - 0.5 * math.log(2 * math.pi)
        - y.log(),
    }[family].sum(1)
    torch.testing.assert_close(encoder(x).log_prob(y), expected, rtol=tolerance, atol=tolerance)


def test_scales_without_min_scale_are_the_exponential():
    given = torch.randn(7, 5, dtype=torch.double)
    encoder = c.Normal(nets.MLP(5, (8,)), event_shape=3, min_scale=0.0).double()
    log_scale = encoder.readout["log_scale"](encoder.trunk(given))
    torch.testing.assert_close(encoder(given).base_dist.scale, log_scale.exp(), rtol=0, atol=0)
    full = c.MultivariateNormal(nets.MLP(5, (8,)), event_shape=3, min_scale=0.0).double()
    diagonal = full(given).scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(
        diagonal, full.readout["log_diagonal"](full.trunk(given)).exp(), rtol=0, atol=0
    )
