"""VAE and conditional VAE work with plain Pyro."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from pyro_vae.pairs.elbo import elbo_terms
from pyro_vae.pairs.traces import run_pair


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


def test_second_pair_with_equal_names_trains_its_parameters():
    """Pyro's param store is keyed by name, but the second pair does not get the parameters of the first."""
    x = torch.bernoulli(torch.rand(16, 4, 4))
    for vae in (make_vae(), make_vae()):
        before = [p.detach().clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
        assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))


def test_elbo_module_has_every_parameter():
    vae = make_vae()
    elbo = Trace_ELBO()(vae.model, vae.guide)
    assert {id(p) for p in elbo.parameters()} == {id(p) for p in vae.parameters()}


def test_predictive_and_format_shapes():
    vae, x = make_vae(), torch.bernoulli(torch.rand(5, 4, 4))
    draws = Predictive(vae.model, guide=vae.guide, num_samples=7)(x)
    assert draws["z"].shape == (7, 5, 3)
    assert "z" in poutine.trace(vae.model).get_trace(x).format_shapes()


def test_loss_is_the_hand_written_elbo_at_the_same_noise():
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
    decoder_scale = vae.model.decoder.fixed_scale  # sigma, rounded to float32
    r = (x - z @ decode.weight.T - decode.bias) / decoder_scale
    log2pi = math.log(2 * math.pi)
    log_px = -0.5 * (r**2 + log2pi).sum() - 11 * decoder_scale.log().sum()
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


def test_likelihood_is_independent_of_missing_entries():
    vae, x = make_vae(), torch.bernoulli(torch.rand(6, 4, 4))
    mask = torch.rand(6, 4, 4) > 0.3
    with_nan = torch.where(mask, x, torch.nan)
    losses = []
    for data in (x, with_nan):
        pyro.set_rng_seed(3)
        losses.append(Trace_ELBO().loss(vae.model, vae.guide, data, mask=mask))
    assert losses[0] == losses[1]


def test_invalid_shapes_raise():
    vae = make_vae()
    with pytest.raises(ValueError, match=r"event_shape \(4, 4\)"):
        vae.model(torch.zeros(5, 3, 3))
    with pytest.raises(ValueError, match="in_shape"):
        vae.guide(torch.zeros(5, 3, 3))
    with pytest.raises(ValueError, match="prior has event_shape"):
        pv.VAE(priors.StandardNormal(2), vae.model.decoder, vae.guide.encoder)


def test_render_model():
    pytest.importorskip("graphviz")
    vae, x = make_vae(), torch.bernoulli(torch.rand(5, 4, 4))
    source = pyro.render_model(vae.model, model_args=(x,), render_distributions=True).source
    assert "z" in source
    assert "Bernoulli" in source
    assert "z" in pyro.render_model(vae.guide, model_args=(x,)).source


def test_mean_reparameterized_gradient_is_its_closed_form():
    """A linear-Gaussian pair has an ELBO in closed form. Each element of the mean of 600 gradients is within
    5 standard errors of its gradient."""
    d, k, n = 4, 2, 6
    vae = pv.VAE(
        prior=priors.StandardNormal(k),
        decoder=conditionals.Normal(nets.MLP(k, ()), event_shape=d, scale="learned"),
        encoder=conditionals.Normal(nets.MLP(d, ()), event_shape=k, scale="learned"),
    ).double()
    x = torch.randn(n, d, dtype=torch.double)
    parameters = list(vae.parameters())
    draws = []
    for _ in range(600):
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    draws = torch.stack(draws)

    encoder, decoder = vae.guide.encoder, vae.model.decoder
    encode, decode = encoder.readout["loc"].layer, decoder.readout["loc"].layer
    sigma, s = (c.min_scale + c.log_scale.exp() for c in (decoder, encoder))
    mean = encode(x)
    # E_q ||(x − W z − b) / σ||² = ||(x − W m − b) / σ||² + Σ s_k² ||W_k / σ||²
    spread = (s**2 * (decode.weight / sigma.unsqueeze(1)) ** 2).sum()
    square = (((x - decode(mean)) / sigma) ** 2).sum(1) + spread
    reconstruction = -0.5 * square - sigma.log().sum() - 0.5 * d * math.log(2 * math.pi)
    kl = 0.5 * (s**2 + mean**2 - 1 - (s**2).log()).sum(1)
    exact = torch.autograd.grad(-(reconstruction - kl).sum(), parameters)
    exact = torch.cat([g.flatten() for g in exact])

    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()


def make_cvae(prior):
    return pv.VAE(
        prior=prior,
        decoder=conditionals.Bernoulli(nets.MLP(((3,), (2,)), (8,)), event_shape=(4, 4)),
        encoder=conditionals.Normal(nets.MLP(((4, 4), (2,)), (8,)), event_shape=3),
    )


@pytest.mark.parametrize("is_conditional", [False, True])
def test_plain_svi_moves_every_parameter_of_a_conditional_vae(is_conditional):
    prior = conditional_prior() if is_conditional else priors.StandardNormal(3)
    cvae, x, c = make_cvae(prior), torch.bernoulli(torch.rand(16, 4, 4)), torch.randn(16, 2)
    before = {name: p.detach().clone() for name, p in cvae.named_parameters()}
    svi = SVI(cvae.model, cvae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for _ in range(2):
        svi.step(x, c)
    assert all((p != before[name]).any() for name, p in cvae.named_parameters())
    assert cvae.sample(16, c).shape == cvae.model(None, c).shape == x.shape
    assert cvae.reconstruct(x, c).shape == x.shape
    # the distribution of z depends on c only if the prior is conditional
    z = poutine.trace(cvae.model).get_trace(x, c).nodes["z"]["fn"]
    assert z.has_rsample
    assert (z.mean.std(0) > 0).all() == is_conditional


def conditional_prior():
    return conditionals.Normal(nets.MLP(2, (8,)), event_shape=3)


def test_conditional_prior_without_a_condition_raises():
    vae, x = make_vae(), torch.bernoulli(torch.rand(5, 4, 4))
    vae = pv.VAE(conditional_prior(), vae.model.decoder, vae.guide.encoder)
    for call in (
        vae.model,
        lambda: vae.model(x),
        lambda: vae.sample(5),
        lambda: pv.fit(vae.model, vae.guide, x, num_epochs=1),
    ):
        with pytest.raises(ValueError, match="Normal: it is conditional but got no inputs"):
            call()


@pytest.mark.parametrize("number", [0, 2])
def test_invalid_number_of_conditions_raises(number):
    vae, x = make_cvae(priors.StandardNormal(3)), torch.bernoulli(torch.rand(5, 4, 4))
    c = [torch.randn(5, 2)] * number
    for call in (vae.model, vae.guide, vae.encode, vae.decode, vae.reconstruct):
        with pytest.raises(ValueError, match=f"got {number + 1} inputs but was built for 2"):
            call(x[:, 0, :3] if call == vae.decode else x, *c)
    with pytest.raises(ValueError, match="built for 2"):
        vae.sample(5, *c)


def test_sample_raises_unless_conditions_have_n_rows():
    vae, c = make_cvae(priors.StandardNormal(3)), torch.randn(5, 2)
    for n in (1, 4):
        with pytest.raises(ValueError, match=f"n is {n} but the conditions have 5 rows"):
            vae.sample(n, c)
    for n, got in ((0, "0"), (c, "Tensor")):
        with pytest.raises(ValueError, match=f"expected n ≥ 1 but got {got}"):
            vae.sample(n)


@pytest.mark.parametrize("prior", [lambda: priors.Normal(3), conditional_prior], ids=["p(z)", "p(z|c)"])
def test_log_prob_of_conditional_model_is_the_sum_of_prior_and_decoder(prior):
    vae = make_cvae(prior()).double()
    x, c = torch.bernoulli(torch.rand(5, 4, 4, dtype=torch.double)), torch.randn(5, 2, dtype=torch.double)
    z = torch.randn(5, 3, dtype=torch.double)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x, c)
    part = vae.model.prior
    if isinstance(part, priors.Normal):
        loc, log_scale = part.loc, part.log_scale
    else:
        loc, log_scale = (part.readout[name](part.trunk(c)) for name in ("loc", "log_scale"))
    scale = 1e-3 + log_scale.exp()
    log_pz = (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum()
    decoder = vae.model.decoder
    logits = decoder.readout["logits"](decoder.trunk(z, c))
    log_px = (x * logits - nn.functional.softplus(logits)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), log_pz + log_px)


def test_each_row_depends_on_both_of_its_conditions():
    """Model p(z|a, b) p(x|z, a, b): ``fit`` moves every parameter, and each row depends on its rows of a and
    b."""
    event, a, b = (4, 4), torch.randn(16, 2).double(), torch.randn(16, 5).double()
    vae = pv.VAE(
        prior=conditionals.Normal(nets.MLP(((2,), (5,)), (8,)), event_shape=3),
        decoder=conditionals.Normal(
            nets.ConvDecoder(((3,), (2,), (5,)), event, (4, 8), activation=torch.tanh), event_shape=event
        ),
        encoder=conditionals.Normal(nets.MLP((event, (2,), (5,)), (8,)), event_shape=3),
    ).double()
    x = torch.randn(16, *event, dtype=torch.double)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    pv.fit(vae.model, vae.guide, (x, a, b), num_epochs=1, batch_size=8)
    assert all((p != before[name]).any() for name, p in vae.named_parameters())
    assert (
        vae.sample(16, a, b).shape == vae.reconstruct(x, a, b).shape == vae.model(None, a, b).shape == x.shape
    )
    z = vae.encode(x, a, b).sample()
    for given in ((a.roll(1, 0), b), (a, b.roll(1, 0))):
        assert (vae.encode(x, *given).mean != vae.encode(x, a, b).mean).any(1).all()
        assert (vae.model.prior(*given).mean != vae.model.prior(a, b).mean).any(1).all()
        assert (vae.decode(z, *given).mean != vae.decode(z, a, b).mean).flatten(1).any(1).all()


def test_unused_labels_are_ignored():
    """``num_inputs`` is the number of inputs of a pair, so a VAE without conditions ignores labels."""
    x, labels = torch.bernoulli(torch.rand(16, 4, 4)), torch.randn(16, 2)
    assert (make_vae().model.num_inputs, make_cvae(conditional_prior()).guide.num_inputs) == (1, 2)
    bounds = []
    for data in (x, (x, labels)):
        pyro.set_rng_seed(4)
        vae = make_vae()
        bounds.append(pv.evaluate(vae.model, vae.guide, data).elbo)
    assert torch.equal(*bounds)


def test_vectorized_particles_give_the_same_loss():
    vae, x = make_vae().double(), torch.bernoulli(torch.rand(9, 4, 4, dtype=torch.double))
    loss = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(
        vae.model, vae.guide, x
    )
    pyro.set_rng_seed(5)
    draws = torch.tensor([Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(400)])
    error = draws.std() * (1 / 400 + 1 / 2000) ** 0.5
    assert abs(loss - draws.mean()) < 4 * error


def test_integers_are_valid_under_a_discrete_likelihood_only():
    vae = make_vae()
    x = torch.ones(5, 4, 4, dtype=torch.uint8)
    assert math.isfinite(Trace_ELBO().loss(vae.model, vae.guide, x))
    vae.model.decoder = conditionals.Normal(nets.MLP(3), event_shape=(4, 4))
    with pytest.raises(ValueError, match=r"x\.float\(\) / 255"):
        vae.model(x)


def test_condition_and_mask_by_keyword():
    """A condition by name gives the same ELBO as by position, and missing entries give a finite ELBO."""
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(nets.MLP(((2,), (3,)), (8,)), event_shape=4),
        conditionals.Normal(nets.MLP(((4,), (3,)), (8,)), event_shape=2),
    )
    x, c = torch.randn(9, 4), torch.randn(9, 3)
    by_name = pv.evaluate(vae.model, vae.guide, {"x": x, "c": c})
    assert torch.equal(by_name.elbo, pv.evaluate(vae.model, vae.guide, (x, c)).elbo)
    mask = torch.rand(9, 4) > 0.3
    missing = pv.evaluate(vae.model, vae.guide, {"x": x.where(mask, torch.nan), "c": c, "mask": mask})
    assert missing.elbo.isfinite().all()
    pv.fit(vae.model, vae.guide, {"x": x, "c": c, "mask": mask}, num_epochs=1, batch_size=4, progress=False)
