"""Frozen parameters stay where they are, whatever registers them and whenever they are frozen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_vae as pv
from tests.support.steps import D, K, data


class Guide(PyroModule):
    """Many rows are encoded by one layer and few by another, so that those parameters are registered at
    different steps."""

    def __init__(self):
        super().__init__()
        self.many, self.few = PyroModule[nn.Linear](D, K), PyroModule[nn.Linear](D, K)
        self.plain = nn.Linear(D, K)
        self.loc = nn.Parameter(torch.zeros(K))
        self.scale = PyroParam(torch.ones(K), constraint=dist.constraints.positive)

    def forward(self, x):
        mean = (self.many if len(x) > 8 else self.few)(x) + self.plain(x) + self.loc
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, self.scale).to_event(1))


def model(x):
    width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand_as(x), width).to_event(1), obs=x)


FROZEN = {
    "all": lambda guide: list(guide.parameters()),
    "layers": lambda guide: [*guide.many.parameters(), *guide.few.parameters()],
    "a plain layer": lambda guide: list(guide.plain.parameters()),
    "a parameter": lambda guide: [guide.loc],
    "a constrained parameter": lambda guide: [guide.scale_unconstrained],
}
ROWS = (12, 12, 12, 5, 5, 5, 12, 5)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize(
    ("kind", "compile", "before"),
    [(kind, False, before) for kind in FROZEN for before in (0, 3)]
    + [("layers", "trace", 0), ("all", "trace", 3)],
)
def test_frozen_parameters_of_a_pyro_module_stay(kind, compile, before):
    """Frozen before the first step or after some, when Adam has momentum; the others train, and these once
    they are thawed."""
    with pyro.get_param_store().scope():
        torch.manual_seed(0)
        guide = Guide()
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), compile=compile)
        for i in range(before):
            svi.step(data(12 if i else 5, seed=i))
        frozen = FROZEN[kind](guide)
        for p in frozen:
            p.requires_grad_(False)
        kept = [p.detach().clone() for p in frozen]
        others = [p for p in guide.parameters() if p.requires_grad]
        were = [p.detach().clone() for p in others]
        for i, rows in enumerate(ROWS):
            svi.step(data(rows, seed=i))
        assert not any(p.requires_grad for p in frozen)
        assert all(torch.equal(p, was) for p, was in zip(frozen, kept, strict=True))
        assert not any(torch.equal(p, was) for p, was in zip(others, were, strict=True))
        for p in frozen:
            p.requires_grad_(True)
        for i, rows in enumerate(ROWS):
            svi.step(data(rows, seed=i))
        assert not any(torch.equal(p, was) for p, was in zip(frozen, kept, strict=True))


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_fit_whose_last_minibatch_registers_a_layer_keeps_it_frozen():
    torch.manual_seed(0)
    guide = Guide()
    frozen = FROZEN["layers"](guide)
    for p in frozen:
        p.requires_grad_(False)
    kept, loc = [p.detach().clone() for p in frozen], guide.loc.detach().clone()
    pv.fit(model, guide, data(17), num_epochs=3, batch_size=12, compile="trace", check=False, progress=False)
    assert not any(p.requires_grad for p in frozen)
    assert all(torch.equal(p, was) for p, was in zip(frozen, kept, strict=True))
    assert not torch.equal(guide.loc, loc)


def test_a_loss_that_is_looked_at_first_leaves_them_frozen():
    with pyro.get_param_store().scope():
        guide = Guide().eval().requires_grad_(False)
        pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).evaluate_loss(data())
        assert not any(p.requires_grad for p in guide.parameters())


def test_a_tensor_that_is_no_parameter_yet_becomes_one_that_trains():
    with pyro.get_param_store().scope():
        svi = pv.SVI(model, Guide(), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        svi.step(data())
        assert pyro.param("width").item() != pytest.approx(1.0, abs=1e-3)
