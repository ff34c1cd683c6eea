"""The pair works with plain Pyro, unchanged."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.pair import elbo_terms, run_pair


def make_vae(latent_dim=3, event_shape=(4, 4)):
    size = math.prod(event_shape)
    return pv.VAE(
        prior=priors.StandardNormal(latent_dim),
        decoder=conditionals.Bernoulli(nets.MLP(latent_dim, (8,)), event_shape=event_shape),
        encoder=conditionals.Normal(nets.MLP(size, (8,)), event_shape=latent_dim),
    )


def test_plain_svi_moves_every_parameter():
    vae, x = make_vae(), torch.bernoulli(torch.rand(16, 4, 4))
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(2):
        assert math.isfinite(svi.step(x))
    assert all((p != before[name]).any() for name, p in vae.named_parameters())


def test_a_second_pair_trains_its_own_parameters():
    """Pyro's store goes by name; a second pair of the same names must not be handed the first one's."""
    x = torch.bernoulli(torch.rand(16, 4, 4))
    for vae in (make_vae(), make_vae()):
        before = [p.detach().clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
        assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))


def test_elbo_module_exposes_every_parameter():
    vae = make_vae()
    elbo = Trace_ELBO()(vae.model, vae.guide)
    assert {id(p) for p in elbo.parameters()} == {id(p) for p in vae.parameters()}


def test_predictive_and_format_shapes():
    vae, x = make_vae(), torch.bernoulli(torch.rand(5, 4, 4))
    draws = Predictive(vae.model, guide=vae.guide, num_samples=7)(x)
    assert draws["z"].shape == (7, 5, 3)
    assert "z" in poutine.trace(vae.model).get_trace(x).format_shapes()


def test_the_loss_is_the_hand_written_elbo_at_the_same_noise():
    d, k, sigma = 5, 2, 0.7
    vae = pv.VAE(
        prior=priors.StandardNormal(k),
        decoder=conditionals.Normal(nets.MLP(k, ()), event_shape=d, scale=sigma),
        encoder=conditionals.Normal(nets.MLP(d, ()), event_shape=k, scale=0.3),
    ).double()
    x = torch.randn(11, d, dtype=torch.double)
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    encode, decode = vae.guide.encoder.readout["loc"].layer, vae.model.decoder.readout["loc"].layer
    scale = vae.guide.encoder.fixed_scale
    mean = x @ encode.weight.T + encode.bias
    z = mean + scale * torch.randn(11, k, dtype=torch.double)
    sigma_stored = vae.model.decoder.fixed_scale  # the fixed scale as the module holds it
    r = (x - z @ decode.weight.T - decode.bias) / sigma_stored
    log2pi = math.log(2 * math.pi)
    log_px = -0.5 * (r**2 + log2pi).sum() - 11 * sigma_stored.log().sum()
    log_pz = -0.5 * (z**2 + log2pi).sum()
    log_qz = -0.5 * (((z - mean) / scale) ** 2 + log2pi).sum() - 11 * scale.log().sum()
    assert loss == pytest.approx(-(log_px + log_pz - log_qz).item(), rel=1e-10)


def test_elbo_terms_sum_to_the_loss():
    vae, x = make_vae().double(), torch.bernoulli(torch.rand(9, 4, 4, dtype=torch.double))
    pyro.set_rng_seed(2)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(2)
    terms = elbo_terms(*run_pair(vae.model, vae.guide, x), frozenset({"data"}), num_data=9)
    assert terms.elbo.shape == (9,)
    assert -terms.elbo.sum().item() == pytest.approx(loss, rel=1e-10)


def test_missing_entries_leave_the_likelihood_whatever_they_hold():
    vae, x = make_vae(), torch.bernoulli(torch.rand(6, 4, 4))
    mask = torch.rand(6, 4, 4) > 0.3
    with_nan = torch.where(mask, x, torch.nan)
    losses = []
    for data in (x, with_nan):
        pyro.set_rng_seed(3)
        losses.append(Trace_ELBO().loss(vae.model, vae.guide, data, mask=mask))
    assert losses[0] == losses[1]


def test_wrong_shapes_name_the_remedy():
    vae = make_vae()
    with pytest.raises(ValueError, match=r"event_shape \(4, 4\)"):
        vae.model(torch.zeros(5, 3, 3))
    with pytest.raises(ValueError, match="in_shape"):
        vae.guide(torch.zeros(5, 3, 3))
    with pytest.raises(ValueError, match="prior is over z"):
        pv.VAE(priors.StandardNormal(2), vae.model.decoder, vae.guide.encoder)
