"""Frozen parameters are unchanged by training, for all kinds of registration and times of freezing."""

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
    """Encodes batches of many and of few rows by different layers, whose parameters are registered at
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
def test_frozen_parameters_of_a_pyro_module_are_unchanged_and_train_once_thawed(kind, compile, before):
    """Frozen before the first step, or later, when Adam has momentum. All other parameters change."""
    with pyro.get_param_store().scope():
        torch.manual_seed(0)
        guide = Guide()
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), compile=compile)
        for i in range(before):
            svi.step(data(12 if i else 5, seed=i))
        frozen = FROZEN[kind](guide)
        for p in frozen:
            p.requires_grad_(False)
        before_freezing = [p.detach().clone() for p in frozen]
        others = [p for p in guide.parameters() if p.requires_grad]
        others_before = [p.detach().clone() for p in others]
        for i, rows in enumerate(ROWS):
            svi.step(data(rows, seed=i))
        assert not any(p.requires_grad for p in frozen)
        assert all(torch.equal(p, q) for p, q in zip(frozen, before_freezing, strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(others, others_before, strict=True))
        for p in frozen:
            p.requires_grad_(True)
        for i, rows in enumerate(ROWS):
            svi.step(data(rows, seed=i))
        assert not any(torch.equal(p, q) for p, q in zip(frozen, before_freezing, strict=True))


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_layer_that_is_registered_at_the_last_minibatch_stays_frozen():
    torch.manual_seed(0)
    guide = Guide()
    frozen = FROZEN["layers"](guide)
    for p in frozen:
        p.requires_grad_(False)
    before, loc = [p.detach().clone() for p in frozen], guide.loc.detach().clone()
    pv.fit(model, guide, data(17), num_epochs=3, batch_size=12, compile="trace", check=False, progress=False)
    assert not any(p.requires_grad for p in frozen)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert not torch.equal(guide.loc, loc)


def test_evaluate_loss_before_the_first_step_keeps_parameters_frozen():
    with pyro.get_param_store().scope():
        guide = Guide().eval().requires_grad_(False)
        pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).evaluate_loss(data())
        assert not any(p.requires_grad for p in guide.parameters())


def test_a_parameter_created_by_pyro_param_trains_from_the_first_step():
    with pyro.get_param_store().scope():
        svi = pv.SVI(model, Guide(), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        svi.step(data())
        assert pyro.param("width").item() != pytest.approx(1.0, abs=1e-3)
