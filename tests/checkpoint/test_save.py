"""save and load: the same pair, without pickle; what does not fit is refused."""

import json
from collections import Counter

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import checkpoint, conditionals, flows, nets, priors
from pyro_vae.checkpoint import folder as stored
from pyro_vae.checkpoint.tree import flatten, unflatten


def pair(decoder=conditionals.Normal, encoder=conditionals.Normal, prior=None, trunk=None, **options):
    q = encoder(nets.Standardize(0.5, 2.0) if trunk is None else trunk, event_shape=2)
    return pv.VAE(prior(q) if prior else priors.StandardNormal(2), decoder(nets.MLP(2, (7,)), event_shape=(4, 3), **options), q)


def trunk(*layers):
    return nn.Sequential(nets.MLP((4, 3), (6,)), *layers)


MADE = {
    "plain": lambda: pair(trunk=trunk()),
    "learned scale": lambda: pair(trunk=trunk(), scale="learned", min_scale=0.1),
    "fixed scale": lambda: pair(trunk=trunk(), scale=torch.full((4, 3), 0.3)),
    "sigmoid means": lambda: pair(trunk=trunk(), loc_constraint=constraints.unit_interval),
    "categorical": lambda: pair(conditionals.Categorical, trunk=trunk(), num_classes=5),
    "low rank": lambda: pair(encoder=conditionals.LowRankMultivariateNormal, trunk=trunk()),
    "flow": lambda: pair(encoder=flows.AffineAutoregressive, trunk=trunk()),
    "spline": lambda: pair(encoder=flows.NeuralSpline, trunk=trunk()),
    "mixture prior": lambda: pair(prior=lambda q: priors.GaussianMixture(2, 3), trunk=trunk()),
    "vamp": lambda: pair(prior=lambda q: priors.VampPrior(q, torch.rand(5, 4, 3)), trunk=trunk()),
    "torch's layers": lambda: pair(trunk=trunk(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.GELU(), nn.Dropout(0.1))),
    "other activations": lambda: pair(trunk=nets.MLP(12, (6, 6), activation=nn.functional.softplus, residual=True)),
    "convolutions": lambda: pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.ConvDecoder(2, (8, 8), (4, 8)), event_shape=(8, 8)),
        conditionals.Normal(nets.ConvEncoder((8, 8), (4, 8)), event_shape=2),
    ),
    "conditional": lambda: pv.VAE(
        conditionals.Normal(nets.MLP(3, (5,)), event_shape=2),
        conditionals.Normal(nets.MLP(((2,), (3,)), (5,)), event_shape=4),
        conditionals.Normal(nets.MLP(((4,), (3,)), (5,)), event_shape=2),
    ),
}


def moved(vae):
    with torch.no_grad():
        for tensor in vae.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return vae


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_a_vae_is_built_again(name, dtype, tmp_path):
    vae = moved(MADE[name]().to(dtype)).eval()
    state = torch.get_rng_state()
    checkpoint.save(tmp_path / "a", vae)
    again = checkpoint.load(tmp_path / "a").eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(again) == repr(vae)
    ours, theirs = vae.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    shared = [[a is b for b in one.modules()] for one in (vae, again) for a in one.modules()]
    assert shared[: len(shared) // 2] == shared[len(shared) // 2 :]
    x = torch.rand(3, *vae.model.decoder.event_shape, dtype=dtype)
    if name == "categorical":
        x = x.round()
    given = (x, torch.rand(3, 3, dtype=dtype)) if name == "conditional" else (x,)
    draws = []
    for one in (vae, again):
        torch.manual_seed(0)
        draws.append(one.encode(*given).sample())
    assert torch.equal(*draws)


def test_what_was_changed_after_it_was_built_needs_its_factory(tmp_path):
    """A plan tells how a pair was built; where that is no longer how it is, the plan is not kept."""

    def changed():
        vae = pair(trunk=trunk())
        vae.model.decoder.trunk.activation = torch.relu
        return vae

    vae = moved(changed())
    with pytest.raises(ValueError, match="expected the arguments of one"):
        checkpoint.save(tmp_path / "a", vae)
    checkpoint.save(tmp_path / "a", vae, torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="factory"):
        checkpoint.load(tmp_path / "a")
    z = torch.randn(3, 2)
    assert torch.equal(checkpoint.load(tmp_path / "a", changed).decode(z).mean, vae.decode(z).mean)


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.out_shape = (4,)

    def forward(self, x):
        return self.layer(x.flatten(-2))


def test_a_user_class_needs_its_factory(tmp_path):
    vae = moved(pair(trunk=Mine()))
    checkpoint.save(tmp_path / "a", vae, torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="factory"):
        checkpoint.load(tmp_path / "a")
    again = checkpoint.load(tmp_path / "a", lambda: pair(trunk=Mine()))
    assert torch.equal(again.guide.encoder.trunk.layer.weight, vae.guide.encoder.trunk.layer.weight)
    with pytest.raises(ValueError, match="weights of another pair"):
        checkpoint.load(tmp_path / "a", lambda: pair(trunk=trunk()))


def model(x):
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a") * x if "a" in pyro.get_param_store() else 0.5 * x, 1.0))


def test_plain_functions_keep_their_parameters_and_constraints(tmp_path):
    x = torch.randn(50)
    history = pv.fit(model, guide, x, epochs=3)
    with history.scope():
        trained = pyro.param("scale").item()
    checkpoint.save(tmp_path / "a", (model, guide), x[:2], param_store=history.param_store)
    assert len(pyro.get_param_store()) == 0
    assert checkpoint.load(tmp_path / "a", lambda: (model, guide), x[:2]) == (model, guide)
    assert pyro.param("scale").item() == trained != 1.0
    assert pyro.get_param_store()._constraints["scale"] is constraints.positive


def normalizing():
    """Plain functions over a network with running averages, a frozen layer, and a buffer that is no part of its state."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    net.register_buffer("scratch", torch.rand(int(torch.randint(1, 9, ()))), persistent=False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return (model, guide), net


@pytest.mark.filterwarnings("ignore:.*requires_grad=False")  # Pyro's, of frozen layers
def test_buffers_of_networks_that_functions_close_over_are_kept(tmp_path):
    x = 3 + torch.randn(50, 3)
    pair, net = normalizing()
    history = pv.fit(*pair, x, epochs=3)
    checkpoint.save(tmp_path / "a", pair, x[:2], param_store=history.param_store)
    again, anew = normalizing()
    assert not torch.equal(anew[0].running_mean, net[0].running_mean)
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", lambda: again, x[:2])
    for name, tensor in net.state_dict().items():
        assert torch.equal(anew.state_dict()[name], tensor), name


def test_only_what_a_pair_uses_is_kept(tmp_path):
    """What others left in Pyro's param store is none of it."""
    x = torch.randn(5)
    with pyro.get_param_store().scope():
        pyro.param("of another", torch.ones(()))
        pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        checkpoint.save(tmp_path / "a", (model, guide), x)
        checkpoint.save(tmp_path / "b", moved(pair(trunk=trunk())))
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", lambda: (model, guide), x)
        assert list(pyro.get_param_store()) == ["scale"]
        assert pyro.param("scale").item() == pytest.approx(3.0)
        checkpoint.load(tmp_path / "b")


def half_labelled():
    network = nn.Linear(1, 1)

    def with_labels(x, y=None):
        model(x)
        if y is not None:
            pyro.module("network", network)

    def hidden(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.rand(())) * x, 1.0))

    return with_labels, poutine.block(hidden, hide_types=["param"])


def test_a_store_that_is_not_the_pairs_is_refused(tmp_path):
    """Nothing that was trained is left behind unsaid."""
    pair, x = half_labelled(), torch.randn(5)
    with pyro.get_param_store().scope() as store:
        pair[0](x, x)
        pair[1](x, x)
    with pytest.raises(ValueError, match=r"'network.*expected arguments with which it uses all"):
        checkpoint.save(tmp_path / "a", pair, x, param_store=store)
    with pytest.raises(ValueError, match=r"parameters that are not in it.*param_store=history\.param_store"):
        checkpoint.save(tmp_path / "a", pair, x)
    assert not (tmp_path / "a").exists()
    checkpoint.save(tmp_path / "a", pair, x, x, param_store=store)
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", half_labelled, x, x)
        ours, theirs = pyro.get_param_store().get_state()["params"], store["params"]
    assert ours.keys() == theirs.keys() == {"scale", "slope", "network$$$weight", "network$$$bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_place_of_another(tmp_path):
    """Saved twice, the second is what is there, and nothing else."""
    checkpoint.save(tmp_path / "a", moved(pair(trunk=trunk())))
    vae = moved(pair(trunk=trunk()))
    checkpoint.save(tmp_path / "a", vae)
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert torch.equal(checkpoint.load(tmp_path / "a").state_dict()["model.decoder.readout.loc.layer.bias"],
                       vae.state_dict()["model.decoder.readout.loc.layer.bias"])  # fmt: skip


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "pyro_vae.nets.as_shape", "torch.nn.modules.nothing.No"])
def test_a_plan_builds_modules_and_nothing_else(tmp_path, name):
    with pytest.raises(ValueError, match="no module"):
        checkpoint.blueprint.build([[name, ("touch it",), {}]])


def test_files_of_others_stay(tmp_path):
    """A folder that holds more than a pair keeps it."""
    others = ["mine.safetensors", "manifest.json.bak", ".hidden", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("kept")
    checkpoint.save(tmp_path, moved(pair(trunk=trunk())))
    checkpoint.save(tmp_path, moved(pair(trunk=trunk())))
    assert [(tmp_path / name).read_text() for name in others] == ["kept"] * 4
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"sha256": "", "bytes": 0}}}, {"files": {}}, {"files": 3}, {"schema": "1"},
        {"content": {"$tensor": "none"}}, {"content": {"$no": 1}}, {"content": {"$tuple": 3}},
        {"content": 7}, {"kind": []}, {"about": {"$tensor": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_manifest_is_a_value_error(tmp_path, change):
    """Its sum is right, what it says is not."""
    checkpoint.save(tmp_path, pair(trunk=trunk()))
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_bytes())["manifest"] | change
    file.write_text(json.dumps({"manifest": manifest, "sha256": stored._sum_of(manifest)}))
    with pytest.raises(ValueError, match=r"manifest"):
        checkpoint.load(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing stored"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected \\(model, guide\\)"):
        checkpoint.save(tmp_path / "a", 3)
    stored.write(tmp_path / "b", "training run", {})
    with pytest.raises(checkpoint.MismatchError, match="training run"):
        checkpoint.load(tmp_path / "b")


VALUES = [
    None, True, 3, "word", 1.5, float("inf"), (1, (2.5, "a"), []), {"a": {}, "$b": 1}, {1: "x", (1, 2): None},
    Counter({3: 2}), [{"a": [1, {"b": (2,)}]}], -0.0, 1e-310, 0.1 + 0.2, {},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_were(value):
    tree = json.loads(json.dumps(flatten(value, {}), allow_nan=False))
    back = unflatten(tree, {})
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float, torch.double, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_to_the_last_bit(tmp_path, dtype):
    value = {"a": [torch.randn(3, 4).to(dtype).T, torch.ones((), dtype=dtype), torch.zeros(0, 2, dtype=dtype)]}
    stored.write(tmp_path / "a", "test", value)
    for a, b in zip(value["a"], stored.read(tmp_path / "a", "test")["a"], strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.zeros(2), {"deep": [{"in": b"bytes"}]}], ids=range(5))
def test_what_is_not_stored_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="which is not stored"):
        stored.write(tmp_path / "a", "test", {"state": value})
    assert not (tmp_path / "a").exists()
