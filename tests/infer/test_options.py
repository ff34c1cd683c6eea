"""Options of the wrong type or range raise ValueError before the first step."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import evidence
from tests.support.fits import data, vae

INVALID = [
    ({"num_epochs": 2.5}, "fit: num_epochs: expected a whole number, 1 or more, but got 2.5"),
    ({"num_epochs": True}, "fit: num_epochs: expected a whole number, 1 or more, but got True"),
    ({"num_epochs": "3"}, "fit: num_epochs: expected a whole number, 1 or more, but got '3'"),
    ({"num_epochs": 0}, "fit: num_epochs: expected a whole number, 1 or more, but got 0"),
    ({"num_epochs": None}, "fit: num_epochs: expected a whole number, 1 or more, but got None"),
    ({"batch_size": 2.5}, "batch_size: expected 1 or more, or None for all data at once, but got 2.5"),
    ({"batch_size": True}, "batch_size: expected 1 or more"),
    ({"batch_size": 0}, "batch_size: expected 1 or more"),
    ({"beta": None}, "fit: beta is None; expected a finite number, or a function that returns one"),
    ({"beta": "0.5"}, "fit: beta is '0.5'; expected a finite number"),
    ({"beta": float("nan")}, "fit: beta is nan; expected a finite number"),
    ({"beta": lambda epoch: None}, r"fit: beta\(0\) is None; expected a finite number"),
    (
        {"beta": lambda epoch: torch.ones(2)},
        r"fit: beta\(0\) is tensor\(\[1., 1.\]\); expected a finite number",
    ),
    (
        {"patience": 1.5, "validation": data(9)},
        "fit: patience: expected a whole number, 1 or more, but got 1.5",
    ),
    ({"patience": 0, "validation": data(9)}, "fit: patience: expected a whole number, 1 or more, but got 0"),
    ({"patience": 2}, "fit: patience is 2 without validation data"),
    ({"clip_norm": "1"}, "fit: clip_norm is '1'; expected a positive number"),
    ({"clip_norm": True}, "fit: clip_norm is True; expected a positive number"),
    ({"clip_norm": float("nan")}, "fit: clip_norm is nan; expected a positive number"),
    ({"every": 1.5}, "fit: every: expected a whole number, 1 or more, but got 1.5"),
    ({"every": 5}, "fit: every=5 needs a checkpoint folder"),
]


@pytest.mark.parametrize(("options", "message"), INVALID)
def test_invalid_options_of_fit_raise_before_the_first_step(options, message):
    torch.manual_seed(0)
    model, guide, tensors = vae()
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=message):
        pv.fit(model, guide, data(), **{"num_epochs": 1, "progress": False} | options)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("invalid", [2.5, True, "2", 0, None])
@pytest.mark.parametrize("verb", [pv.evaluate, evidence.importance, evidence.elbo])
def test_an_invalid_number_of_particles_raises(verb, invalid):
    model, guide, _ = vae()
    with pytest.raises(ValueError, match="expected a whole number of particles or chains, 1 or more"):
        verb(model, guide, data(), num_particles=invalid)


@pytest.mark.parametrize("invalid", [2.5, True, 0])
def test_an_invalid_batch_size_of_evaluate_raises(invalid):
    model, guide, _ = vae()
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, or None"):
        pv.evaluate(model, guide, data(), batch_size=invalid)


def test_options_may_be_numbers_of_numpy_and_torch():
    def fitted(num_epochs, batch_size, beta, clip_norm):
        torch.manual_seed(0)
        model, guide, tensors = vae()
        options = {"num_epochs": num_epochs, "batch_size": batch_size, "beta": beta, "clip_norm": clip_norm}
        pv.fit(model, guide, data(), progress=False, **options)
        return tensors

    converted = fitted(np.int64(2), np.int32(40), lambda epoch: torch.tensor(0.5), np.float32(0.5))
    expected = fitted(2, 40, lambda epoch: 0.5, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(converted, expected, strict=True))


class Closing(torch.optim.SGD):
    """A user-defined optimizer whose step needs a closure."""

    def step(self, closure):
        closure()
        return super().step(closure)


CLOSURES = {
    "LBFGS of Pyro's wrapper": lambda params: pyro.optim.PyroOptim(torch.optim.LBFGS, {"lr": 0.1}),
    "LBFGS under a schedule": lambda params: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.LBFGS, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ),
    "LBFGS of torch": lambda params: torch.optim.LBFGS(params),
    "a user-defined optimizer": lambda params: pyro.optim.PyroOptim(Closing, {"lr": 0.1}),
}


@pytest.mark.parametrize("verb", ["fit", "SVI"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_an_optimizer_that_needs_a_closure_raises_before_the_first_step(kind, verb):
    model, guide, tensors = vae()
    before = [tensor.clone() for tensor in tensors]
    params = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    verbs = {
        "fit": lambda optim: pv.fit(model, guide, data(), num_epochs=1, optim=optim, progress=False),
        "SVI": lambda optim: pv.SVI(model, guide, optim, Trace_ELBO()),
    }
    with pytest.raises(
        ValueError, match=r"optim: a step of (LBFGS|Closing) computes the loss .* pyro.optim.Adam"
    ):
        verbs[verb](CLOSURES[kind](params))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
