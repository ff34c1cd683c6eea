"""save and load restore the same pair without pickle; mismatches raise."""

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
from torch.utils.data import DataLoader

import pyro_vae as pv
from pyro_vae import checkpoint, conditionals, flows, nets, priors
from pyro_vae.checkpoint import folder as stored
from pyro_vae.tree import flatten, unflatten


def make_pair(decoder=conditionals.Normal, encoder=conditionals.Normal, prior=None, trunk=None, **options):
    q = encoder(nets.Standardize(0.5, 2.0) if trunk is None else trunk, event_shape=2)
    return pv.VAE(
        prior(q) if prior else priors.StandardNormal(2),
        decoder(nets.MLP(2, (7,)), event_shape=(4, 3), **options),
        q,
    )


def make_trunk(*layers):
    return nn.Sequential(nets.MLP((4, 3), (6,)), *layers)


PAIRS = {
    "plain": lambda: make_pair(trunk=make_trunk()),
    "learned scale": lambda: make_pair(trunk=make_trunk(), scale="learned", min_scale=0.1),
    "fixed scale": lambda: make_pair(trunk=make_trunk(), scale=torch.full((4, 3), 0.3)),
    "sigmoid means": lambda: make_pair(trunk=make_trunk(), loc_constraint=constraints.unit_interval),
    "categorical": lambda: make_pair(conditionals.Categorical, trunk=make_trunk(), num_classes=5),
    "low rank": lambda: make_pair(encoder=conditionals.LowRankMultivariateNormal, trunk=make_trunk()),
    "flow": lambda: make_pair(encoder=flows.AffineAutoregressive, trunk=make_trunk()),
    "spline": lambda: make_pair(encoder=flows.NeuralSpline, trunk=make_trunk()),
    "mixture prior": lambda: make_pair(prior=lambda q: priors.GaussianMixture(2, 3), trunk=make_trunk()),
    "vamp": lambda: make_pair(prior=lambda q: priors.VampPrior(q, torch.rand(5, 4, 3)), trunk=make_trunk()),
    "torch's layers": lambda: make_pair(
        trunk=make_trunk(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.GELU(), nn.Dropout(0.1))
    ),
    "other activations": lambda: make_pair(
        trunk=nets.MLP(12, (6, 6), activation=nn.functional.softplus, residual=True)
    ),
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


def perturb(vae):
    with torch.no_grad():
        for tensor in vae.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return vae


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_load_rebuilds_the_saved_vae(name, dtype, tmp_path):
    vae = perturb(PAIRS[name]().to(dtype)).eval()
    state = torch.get_rng_state()
    checkpoint.save(tmp_path / "a", vae)
    loaded = checkpoint.load(tmp_path / "a").eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(loaded) == repr(vae)
    torch.testing.assert_close(loaded.state_dict(), vae.state_dict(), rtol=0, atol=0)
    is_shared, expected = (
        [[a is b for b in pair.modules()] for a in pair.modules()] for pair in (loaded, vae)
    )
    assert is_shared == expected
    x = torch.rand(3, *vae.model.decoder.event_shape, dtype=dtype)
    if name == "categorical":
        x = x.round()
    args = (x, torch.rand(3, 3, dtype=dtype)) if name == "conditional" else (x,)
    draws = []
    for pair in (vae, loaded):
        torch.manual_seed(0)
        draws.append(pair.encode(*args).sample())
    assert torch.equal(*draws)


def test_pair_that_was_changed_after_construction_needs_a_factory(tmp_path):
    def make_changed():
        vae = make_pair(trunk=make_trunk())
        vae.model.decoder.trunk.activation = torch.relu
        return vae

    vae = perturb(make_changed())
    with pytest.raises(ValueError, match="expected rows of the data"):
        checkpoint.save(tmp_path / "a", vae)
    checkpoint.save(tmp_path / "a", vae, torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="factory"):
        checkpoint.load(tmp_path / "a")
    z = torch.randn(3, 2)
    assert torch.equal(checkpoint.load(tmp_path / "a", make_changed).decode(z).mean, vae.decode(z).mean)


class UserModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)
        self.out_shape = (4,)

    def forward(self, x):
        return self.layer(x.flatten(-2))


def test_pair_with_a_user_module_needs_a_factory(tmp_path):
    vae = perturb(make_pair(trunk=UserModule()))
    checkpoint.save(tmp_path / "a", vae, torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="factory"):
        checkpoint.load(tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", lambda: make_pair(trunk=UserModule()))
    assert torch.equal(loaded.guide.encoder.trunk.layer.weight, vae.guide.encoder.trunk.layer.weight)
    with pytest.raises(ValueError, match="parameters of another pair"):
        checkpoint.load(tmp_path / "a", lambda: make_pair(trunk=make_trunk()))


def model(x):
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a") * x if "a" in pyro.get_param_store() else 0.5 * x, 1.0))


def test_parameters_and_constraints_of_plain_functions_are_restored(tmp_path):
    x = torch.randn(50)
    history = pv.fit(model, guide, x, num_epochs=3)
    with history.scope():
        trained = pyro.param("scale").item()
    checkpoint.save(tmp_path / "a", (model, guide), x[:2], param_store=history.param_store)
    assert len(pyro.get_param_store()) == 0
    with pytest.raises(ValueError, match=r"made when the functions run.*load\(path, factory, x"):
        checkpoint.load(tmp_path / "a", lambda: (model, guide))
    assert checkpoint.load(tmp_path / "a", lambda: (model, guide), x[:2]) == (model, guide)
    assert pyro.param("scale").item() == trained != 1.0
    assert pyro.get_param_store()._constraints["scale"] is constraints.positive


def test_data_are_in_every_form_and_dtype(tmp_path):
    """Data in double precision with missing entries, for a pair in single precision."""
    x = torch.randn(20, 3, dtype=torch.double)
    mask = torch.rand(20, 3) > 0.2
    table = pv.data.Data(x, mask=mask)
    decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def model(x, mask=True):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).mask(mask).to_event(1), obs=x)

    def guide(x, mask=True):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    history = pv.fit(model, guide, table, num_epochs=1)
    trained = encoder.weight.detach().clone()
    for form in (table, table[:2], {"x": x, "mask": mask}, DataLoader(table, 5)):
        checkpoint.save(tmp_path, (model, guide), form, param_store=history.param_store)
        nn.init.zeros_(encoder.weight)
        with pyro.get_param_store().scope():
            checkpoint.load(tmp_path, lambda: (model, guide), form)
        assert torch.equal(encoder.weight, trained)


def make_closure():
    """Functions that close over a network with running means, a frozen layer and a non-persistent buffer."""
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


@pytest.mark.filterwarnings("ignore:.*requires_grad=False")  # Pyro warns of frozen layers
def test_buffers_of_closed_over_networks_are_restored(tmp_path):
    x = 3 + torch.randn(50, 3)
    pair, net = make_closure()
    history = pv.fit(*pair, x, num_epochs=3)
    checkpoint.save(tmp_path / "a", pair, x[:2], param_store=history.param_store)
    new_pair, new_net = make_closure()
    assert not torch.equal(new_net[0].running_mean, net[0].running_mean)
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", lambda: new_pair, x[:2])
    for name, tensor in net.state_dict().items():
        assert torch.equal(new_net.state_dict()[name], tensor), name


def test_unused_parameters_of_the_global_store_are_not_saved(tmp_path):
    x = torch.randn(5)
    with pyro.get_param_store().scope():
        pyro.param("unused", torch.ones(()))
        pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        checkpoint.save(tmp_path / "a", (model, guide), x)
        checkpoint.save(tmp_path / "b", perturb(make_pair(trunk=make_trunk())))
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", lambda: (model, guide), x)
        assert list(pyro.get_param_store()) == ["scale"]
        assert pyro.param("scale").item() == pytest.approx(3.0)
        checkpoint.load(tmp_path / "b")


def make_semi_supervised():
    network = nn.Linear(1, 1)

    def with_labels(x, y=None):
        model(x)
        if y is not None:
            pyro.module("network", network)

    def hidden(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.rand(())) * x, 1.0))

    return with_labels, poutine.block(hidden, hide_types=["param"])


def test_param_store_that_does_not_match_the_pair_raises(tmp_path):
    pair, x = make_semi_supervised(), torch.randn(5)
    with pyro.get_param_store().scope() as store:
        pair[0](x, x)
        pair[1](x, x)
    with pytest.raises(ValueError, match=r"'network.*pass data, such as labels"):
        checkpoint.save(tmp_path / "a", pair, x, param_store=store)
    with pytest.raises(ValueError, match=r"parameters that are not in it.*param_store=history\.param_store"):
        checkpoint.save(tmp_path / "a", pair, x)
    assert not (tmp_path / "a").exists()
    checkpoint.save(tmp_path / "a", pair, (x, x), param_store=store)
    with pyro.get_param_store().scope():
        checkpoint.load(tmp_path / "a", make_semi_supervised, (x, x))
        loaded = dict(pyro.get_param_store().get_state()["params"])
    assert loaded.keys() == {"scale", "slope", "network$$$weight", "network$$$bias"}
    torch.testing.assert_close(loaded, dict(store["params"]), rtol=0, atol=0)


def test_second_save_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path / "a", perturb(make_pair(trunk=make_trunk())))
    vae = perturb(make_pair(trunk=make_trunk()))
    checkpoint.save(tmp_path / "a", vae)
    assert len(list((tmp_path / "a").iterdir())) == 2
    name = "model.decoder.readout.loc.layer.bias"
    assert torch.equal(checkpoint.load(tmp_path / "a").state_dict()[name], vae.state_dict()[name])


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "pyro_vae.nets.as_shape", "torch.nn.modules.nothing.No"]
)
def test_plan_with_other_names_than_modules_raises(tmp_path, name):
    with pytest.raises(ValueError, match="not a module"):
        checkpoint.blueprint.build([[name, ("touch file",), {}]])


def test_save_leaves_other_files_unchanged(tmp_path):
    others = ["mine.safetensors", "manifest.json.bak", ".hidden", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("unchanged")
    checkpoint.save(tmp_path, perturb(make_pair(trunk=make_trunk())))
    checkpoint.save(tmp_path, perturb(make_pair(trunk=make_trunk())))
    assert [(tmp_path / name).read_text() for name in others] == ["unchanged"] * 4
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"sha256": "", "bytes": 0}}}, {"files": {}}, {"files": 3},
        {"schema": "1"},
        {"content": {"$tensor": "none"}}, {"content": {"$no": 1}}, {"content": {"$tuple": 3}},
        {"content": 7}, {"kind": []}, {"about": {"$tensor": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_manifest_with_a_valid_checksum_raises(tmp_path, change):
    checkpoint.save(tmp_path, make_pair(trunk=make_trunk()))
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_bytes())["manifest"] | change
    file.write_text(json.dumps({"manifest": manifest, "sha256": stored._checksum(manifest)}))
    with pytest.raises(ValueError, match=r"manifest"):
        checkpoint.load(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path)


def test_invalid_arguments_raise(tmp_path):
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
def test_flatten_and_unflatten_are_inverse(value):
    tree = json.loads(json.dumps(flatten(value, {}), allow_nan=False))
    restored = unflatten(tree, {})
    assert restored == value
    assert repr(restored) == repr(value)


@pytest.mark.parametrize(
    "dtype", [torch.float, torch.double, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_read_restores_tensors_exactly(tmp_path, dtype):
    value = {
        "a": [torch.randn(3, 4).to(dtype).T, torch.ones((), dtype=dtype), torch.zeros(0, 2, dtype=dtype)]
    }
    stored.write(tmp_path / "a", "test", value)
    for a, b in zip(value["a"], stored.read(tmp_path / "a", "test")["a"], strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, lambda: 0, np.zeros(2), {"deep": [{"in": b"bytes"}]}], ids=range(5)
)
def test_unsupported_types_raise(tmp_path, value):
    with pytest.raises(ValueError, match="which is not stored"):
        stored.write(tmp_path / "a", "test", {"state": value})
    assert not (tmp_path / "a").exists()
