"""What fit does to a gradient, and in which precision: clip_norm and autocast."""

import pyro
import pyro.optim
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors
from tests.fits import data, run, vae


def moved(clip_norm, compile, epochs):
    """How far plain gradient descent on all data has moved the parameters."""
    torch.manual_seed(0)
    model, guide, _ = vae()
    start = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    torch.manual_seed(1)
    optim = pyro.optim.SGD({"lr": 1.0})
    pv.fit(model, guide, data(), batch_size=None, epochs=epochs, optim=optim, clip_norm=clip_norm, compile=compile)
    return torch.cat(
        [(p - q).detach().flatten() for p, q in zip((*model.parameters(), *guide.parameters()), start, strict=True)]
    )


def test_clipping_scales_the_whole_gradient():
    """One step moves the parameters by lr · g · min(1, c / ‖g‖); a graph, from the second step on, clips as eager Pyro does."""
    whole = moved(None, compile=False, epochs=1)
    assert whole.norm() > 2
    assert torch.allclose(moved(0.1, compile=False, epochs=1), 0.1 * whole / whole.norm(), atol=1e-6)
    assert torch.equal(moved(1e9, compile=False, epochs=1), whole)
    eager, graph = (moved(0.1, compile=compile, epochs=5) for compile in (False, "trace"))
    assert 0.1 < eager.norm() < 0.5 + 1e-6
    assert torch.allclose(eager, graph, atol=1e-5)


@pytest.mark.parametrize("compile", [False, "trace"])
def test_autocast_is_of_lower_precision_in_the_networks_alone(compile):
    """bfloat16 has eight bits: the terms are off by some 2⁻⁸, the parameters and what is reported are of full precision."""
    (whole, (full, *_)), (cast, (low, *_)) = (
        run(epochs=2, compile=compile, autocast=dtype) for dtype in (None, torch.bfloat16)
    )
    assert all(p.dtype == q.dtype for p, q in zip(whole, cast, strict=True))
    off = abs(full.train.elbo - low.train.elbo) / abs(full.train.elbo)
    assert 1e-6 < off < 2**-6
    assert low.train.elbo == pytest.approx(low.train.reconstruction - low.train.kl, rel=1e-5)
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16"):
        run(autocast=torch.float16)


def test_shared_parameters_are_clipped_once():
    """A VampPrior's encoder has two names."""
    for compile in (False, "trace"):
        torch.manual_seed(0)
        encoder = conditionals.Normal(nets.MLP(4, (5,)), event_shape=2)
        decoder = conditionals.Normal(nets.MLP(2, (5,)), event_shape=4)
        made = pv.VAE(priors.VampPrior(encoder, torch.randn(3, 4)), decoder, encoder)
        start = [p.detach().clone() for p in made.parameters()]
        optim = pyro.optim.SGD({"lr": 1.0})
        pv.fit(made.model, made.guide, data(), batch_size=None, epochs=1, optim=optim, clip_norm=0.1, compile=compile)
        move = torch.cat([(p - q).flatten() for p, q in zip(made.parameters(), start, strict=True)])
        assert move.norm().item() == pytest.approx(0.1, rel=1e-3)


def test_a_users_own_autocast_stays():
    model, guide, _ = vae()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        pv.fit(model, guide, data(), epochs=1)
    assert all(seen)
