"""Priors: SVI trains every parameter, and log-probabilities equal their formulas."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors


def make_vae(prior_of):
    encoder = conditionals.Normal(nets.MLP(6, (8,)), event_shape=2)
    return pv.VAE(prior_of(encoder), conditionals.Normal(nets.MLP(2, (8,)), event_shape=6), encoder)


PRIORS = {
    "standard": lambda encoder: priors.StandardNormal(2),
    "normal": lambda encoder: priors.Normal(2),
    "mixture": lambda encoder: priors.GaussianMixture(2, 4),
    "vamp": lambda encoder: priors.VampPrior(encoder, torch.randn(5, 6)),
    "vamp on images": lambda encoder: priors.VampPrior(
        encoder, torch.rand(5, 6), constraint=constraints.unit_interval
    ),
}


@pytest.mark.parametrize("prior_of", PRIORS.values(), ids=PRIORS.keys())
def test_plain_svi_moves_every_parameter(prior_of):
    vae = make_vae(prior_of).double()
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(torch.rand(16, 6, dtype=torch.double))
    assert all((p != before[name]).any() for name, p in vae.named_parameters())
    assert vae.sample(7).shape == (7, 6)


def test_vamp_prior_is_the_mixture_of_posteriors():
    vae = make_vae(PRIORS["vamp"]).double()
    prior, z = vae.model.prior, torch.randn(9, 2, dtype=torch.double)
    log_probs = vae.guide.encoder(prior.pseudo_inputs).log_prob(z.unsqueeze(1))
    torch.testing.assert_close(prior().log_prob(z), torch.logsumexp(log_probs, 1) - math.log(5))
    assert prior.encoder is vae.guide.encoder


def test_log_prob_of_mixture_is_its_formula():
    prior = priors.GaussianMixture((2, 3), 4).double()
    torch.nn.init.normal_(prior.logits)
    z = torch.randn(9, 2, 3, dtype=torch.double)
    scale = 1e-3 + prior.log_scale.exp()
    log_probs = torch.distributions.Normal(prior.loc, scale).log_prob(z.unsqueeze(1)).sum((2, 3))
    torch.testing.assert_close(
        prior().log_prob(z), torch.logsumexp(log_probs + prior.logits.log_softmax(0), 1)
    )


@pytest.mark.parametrize("prior_of", PRIORS.values(), ids=PRIORS.keys())
def test_prior_of_a_conditional_vae_is_independent_of_the_conditions(prior_of):
    prior = prior_of(conditionals.Normal(nets.MLP(6, (8,)), event_shape=2)).double()
    vae = pv.VAE(
        prior,
        conditionals.Normal(nets.MLP(((2,), (3,)), (8,)), event_shape=6),
        conditionals.Normal(nets.MLP(((6,), (3,)), (8,)), event_shape=2),
    ).double()
    x, c = torch.rand(5, 6, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    site = poutine.trace(vae.model).get_trace(x, c).nodes["z"]
    assert site["fn"].batch_shape == (5,)
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), prior().log_prob(site["value"]))
    # every row has a separate draw of z
    assert len(poutine.trace(vae.model).get_trace(None, c).nodes["z"]["value"].unique(dim=0)) == 5
    assert len(vae.sample(5, c[:1].expand(5, 3)).unique(dim=0)) == 5


@pytest.mark.parametrize(
    "pseudo_inputs", [torch.zeros(0, 6), torch.zeros(6)], ids=["no rows", "no event dimension"]
)
def test_vamp_prior_without_pseudo_inputs_raises(pseudo_inputs):
    with pytest.raises(ValueError, match="K ≥ 1"):
        make_vae(lambda encoder: priors.VampPrior(encoder, pseudo_inputs))
