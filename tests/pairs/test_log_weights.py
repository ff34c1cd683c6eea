"""Log-weights per datum: of every kind of pair, against closed forms."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae.compiler import THRESHOLDS, Graphed, Thresholds
from pyro_vae.numerics import log_mean_exp, log_mean_exp_se
from pyro_vae.pairs.log_weights import joint_log_weights, log_weights
from tests.support.oracles import seeded

TOY = exact.LinearGaussian(seeded(5, 2), noise_scale=0.7)
with torch.random.fork_rng():
    torch.manual_seed(0)
    X = TOY.sample(12)
    DECODER, ENCODER, CLASSIFIER = (
        torch.nn.Linear(*sizes).double() for sizes in ((2 + 3, 5), (5 + 3, 2), (5, 3))
    )
LABELS = torch.tensor([0.2, 0.3, 0.5]).double()


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", TOY.posterior(x))


def point_guide(x):
    """No noise: the weights are log p(x, z) at a known z."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))


def wide_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(TOY.posterior(x).mean, 0.6).to_event(1))


def joined(z, y):
    y = torch.nn.functional.one_hot(y, 3).to(z)
    shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
    return torch.cat([z.expand(*shape, -1), y.expand(*shape, -1)], -1)


def labelled(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(LABELS))
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(DECODER(joined(z, y)), 1.0).to_event(1), obs=x)


def label_guide(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(logits=CLASSIFIER(x)))
        pyro.sample("z", dist.Normal(ENCODER(joined(x, y)), 1.0).to_event(1))


def z_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x[:, :2], 1.0).to_event(1))


@torch.no_grad()
def labelled_evidence(x):
    by_label = [
        exact.LinearGaussian(
            DECODER.weight[:, :2], noise_scale=1.0, bias=DECODER.bias + DECODER.weight[:, 2 + k]
        ).log_evidence(x)
        for k in range(3)
    ]
    return torch.logsumexp(torch.stack(by_label) + LABELS.log().unsqueeze(1), 0)


def test_the_exact_guide_has_constant_weights():
    w = log_weights(TOY, exact_guide, X, num_particles=7)
    assert w.shape == (7, 12)
    torch.testing.assert_close(w, TOY.log_evidence(X).expand(7, 12))


def test_the_mean_weight_is_the_evidence():
    w = log_weights(TOY, wide_guide, X, num_particles=20_000)
    assert ((log_mean_exp(w) - TOY.log_evidence(X)).abs() < 4 * log_mean_exp_se(w)).all()
    elbo = pv.evaluate(TOY, wide_guide, X, num_particles=500).elbo  # the other definition of the same terms
    assert ((w.mean(0) - elbo).abs() < 5 * w.std(0) * (1 / 20_000 + 1 / 500) ** 0.5).all()


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (labelled, label_guide),
        (labelled, config_enumerate(label_guide)),
        (config_enumerate(labelled), z_guide),
        (config_enumerate(labelled), config_enumerate(label_guide)),
    ],
    ids=["label drawn", "summed over the guide's", "summed out of the model", "marked in both"],
)
def test_an_enumerated_label_is_summed_out(model, guide):
    w = log_weights(model, guide, X, num_particles=20_000)
    known = log_mean_exp_se(w) < 0.1  # beyond, a few weights make the error too
    assert known.sum() >= 6
    assert ((log_mean_exp(w) - labelled_evidence(X)).abs() < 4.5 * log_mean_exp_se(w))[known].all()


def test_to_sum_out_is_to_have_less_noise():
    drawn, summed = (
        log_weights(labelled, g, X, num_particles=4000) for g in (label_guide, config_enumerate(label_guide))
    )
    assert log_mean_exp_se(summed).mean() < log_mean_exp_se(drawn).mean()


def test_plates_within_a_datum():
    """Words, each of a topic that is summed out, given a vector for each datum."""
    topics, x = seeded(3, 2), seeded(6, 4, 2)

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("words", 4, dim=-1):
                topic = pyro.sample("topic", dist.Categorical(LABELS))
                scale = pyro.sample("scale", dist.LogNormal(torch.zeros(1, 1).double(), 1.0))
                pyro.sample("x", dist.Normal(z + topics[topic], scale.unsqueeze(-1)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Delta(x.mean(-2, keepdim=True), event_dim=1))
            with pyro.plate("words", 4, dim=-1):
                pyro.sample("scale", dist.Delta(x[..., 0].exp()))

    z, scale = x.mean(1), x[..., 0].exp()
    each = (
        dist.Normal(z[:, None, None] + topics, scale[..., None, None]).log_prob(x[:, :, None]).sum(-1)
        + LABELS.log()
    )
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + (
        each.logsumexp(-1) + dist.LogNormal(0.0, 1.0).log_prob(scale)
    ).sum(-1)
    for max_bytes in (1, 2**24):
        w = log_weights(model, guide, x, num_particles=3, max_bytes=max_bytes)
        torch.testing.assert_close(w, expected.expand(3, 6))


def test_scales_are_stripped_and_masks_are_kept():
    def scaled(x, mask):
        with (
            pyro.plate("data", 1000, subsample_size=len(x)),
            poutine.scale(scale=0.1),
            poutine.mask(mask=mask.any(-1)),
        ):
            z = pyro.sample("z", TOY.prior())
            pyro.sample("x", TOY.decoder(z).base_dist.mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", 1000, subsample_size=len(x)), poutine.mask(mask=mask.any(-1)):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.5).to_event(1))

    mask = torch.rand(12, 5) < 0.6
    mask[0] = False
    w = log_weights(scaled, guide, (X, mask), num_particles=20_000)
    assert (w[:, 0] == 0).all()  # what is masked whole has no part in p, nor in q
    for i in range(1, 12):
        seen = mask[i]
        part = exact.LinearGaussian(TOY.weight[seen], noise_scale=0.7).log_evidence(X[i : i + 1, seen])
        assert (log_mean_exp(w)[i] - part).abs() < 4 * log_mean_exp_se(w)[i]
    elsewhere = torch.where(mask, X, 1e3)
    torch.testing.assert_close(
        *(log_weights(scaled, guide, (x, mask), num_particles=9) for x in (elsewhere, X))
    )


@pytest.mark.parametrize("max_bytes", [1, 5000, 2**24])
def test_chunks_do_not_change_what_is_weighed(max_bytes):
    w = log_weights(TOY, point_guide, X, num_particles=70, max_bytes=max_bytes)
    torch.testing.assert_close(w, TOY.log_joint(X, X[:, :2]).expand(70, 12))


def test_graphs_weigh_as_pyro_does(monkeypatch):
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.conditionals.Bernoulli(pv.nets.MLP(2, (8,)), event_shape=6),
        pv.conditionals.Normal(pv.nets.MLP(6, (8,)), event_shape=2),
    )
    x = torch.bernoulli(torch.rand(10, 6))
    eager = log_weights(vae.model, vae.guide, x, num_particles=64, max_bytes=2**13)
    for limits, how in ((Thresholds(3, 10**9), "traced"), (Thresholds(3, 3), "compiled by Inductor")):
        made = []
        monkeypatch.setitem(THRESHOLDS, "log-weights", limits)
        module = sys.modules["pyro_vae.pairs.log_weights"]
        monkeypatch.setattr(
            module, "graphed", lambda f, kind, made=made: made.append(Graphed(f, kind=kind)) or made[-1]
        )
        torch.testing.assert_close(
            log_weights(vae.model, vae.guide, x, num_particles=64, max_bytes=2**13), eager
        )
        assert {each.how for each in made} <= {how, "traced"}
        assert made


def test_a_graph_that_fails_leaves_log_weights_to_eager_pyro(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such kernel")

    caplog.set_level("INFO", logger="pyro_vae")
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.conditionals.Bernoulli(pv.nets.MLP(2, (8,)), event_shape=6),
        pv.conditionals.Normal(pv.nets.MLP(6, (8,)), event_shape=2),
    )
    x, options = torch.bernoulli(torch.rand(10, 6)), {"num_particles": 64, "max_bytes": 2**13}
    eager = log_weights(vae.model, vae.guide, x, **options)
    monkeypatch.setitem(THRESHOLDS, "log-weights", Thresholds(2, 10**9))
    monkeypatch.setattr("pyro_vae.compiler.trace.Graph.__call__", fails)
    torch.testing.assert_close(log_weights(vae.model, vae.guide, x, **options), eager)
    assert "no such kernel" in caplog.text


def test_a_pair_that_knows_no_particles():
    """A network that flattens to as many rows as there are data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", TOY.prior())
            mean = z.reshape(len(x), 2) @ TOY.weight.mT
            pyro.sample("x", dist.Normal(mean, TOY.noise_scale).to_event(1), obs=x)

    w = log_weights(model, exact_guide, X, num_particles=5)
    torch.testing.assert_close(w, TOY.log_evidence(X).expand(5, 12))


def test_an_autoguide_of_local_latents():
    guide = AutoNormal(TOY, init_scale=0.5)
    pv.fit(TOY, guide, X, num_epochs=300, batch_size=None, optim=pyro.optim.Adam({"lr": 0.03}))
    w = log_weights(TOY, guide, X, num_particles=10_000, max_bytes=10_000)
    assert ((log_mean_exp(w) - TOY.log_evidence(X)).abs() < 4 * log_mean_exp_se(w)).all()


def test_a_regression_has_one_joint_weight():
    design = seeded(15, 3)
    truth = exact.BayesianLinearRegression(design, prior_precision=1.0, noise_precision=4.0)
    y = truth.sample(1)[0]

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.5), obs=y)

    guide = AutoDiagonalNormal(model, init_scale=0.15)
    pv.fit(model, guide, (design, y), num_epochs=300, batch_size=None, optim=pyro.optim.Adam({"lr": 0.02}))
    found = joint_log_weights(model, guide, (design, y), num_particles=20_000)
    assert found.log_weights.shape == (20_000,)
    assert (found.log_evidence - truth.log_evidence(y.unsqueeze(0))[0]).abs() < 4 * found.log_evidence_se
    with pytest.raises(ValueError, match=r"'w' lies in no data plate.*joint_log_weights"):
        log_weights(model, guide, (design, y))


def test_nothing_is_moved():
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    log_weights(TOY, wide_guide, X)
    assert torch.equal(state, torch.get_rng_state())
    assert dict(pyro.get_param_store().items()) == store
    assert torch.equal(log_weights(TOY, wide_guide, X, seed=3), log_weights(TOY, wide_guide, X, seed=3))
    assert not torch.equal(log_weights(TOY, wide_guide, X, seed=3), log_weights(TOY, wide_guide, X, seed=4))


def more(x):
    exact_guide(x)
    pyro.sample("other", dist.Normal(0.0, 1.0))


def subsampled(x):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        z = pyro.sample("z", TOY.prior())
        pyro.sample("x", TOY.decoder(z), obs=x[rows])


def subsampled_guide(x):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        pyro.sample("z", TOY.posterior(x[rows]))


def hierarchical(x):
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    with pyro.plate("groups", 6, subsample_size=2):
        c, d = (pyro.sample(name, dist.Normal(a, 1.0)) for name in "cd")
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b + c.sum() + d.sum(), 1.0), obs=x[:, 0])


def test_sites_that_are_refused_for_one_reason_are_named_in_one_sentence():
    guide = poutine.block(hierarchical, hide=["x"])
    reasons = (
        r"^pair: 'a', 'b', 'c' and 'd' lie in no data plate[^;]*; expected[^;]*; "
        r"pair: 'c' and 'd' lie in plate 'groups'[^;]*;"
    )
    with pytest.raises(ValueError, match=reasons) as raised:
        log_weights(hierarchical, guide, X)
    assert str(raised.value).count("no data plate") == str(raised.value).count("'groups'") == 1
    with pytest.raises(
        ValueError, match=r"^pair: 'c' and 'd' lie in plate 'groups', which subsamples 2 of its 6 rows"
    ):
        joint_log_weights(hierarchical, guide, X)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (TOY, lambda x: None, "guide: it has no site 'z'"),
        (TOY, more, "guide: its site 'other' is not in the model"),
        (subsampled, subsampled_guide, "subsamples 4 of the 12 rows"),
    ],
)
def test_what_has_no_weight_says_so(model, guide, message):
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, X)


def summed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])


def elsewhere(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))


def words(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 1).double(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, :1])


def flat_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))


def some_words(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 1).double(), 1.0))
        with pyro.plate("words", 5, subsample_size=2, dim=-1) as words:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, words])


def word_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(torch.zeros(1, 1).double(), 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (summed, elsewhere, r"'z' has event_shape \(3,\) but in the model it has \(2,\)"),
        (words, flat_guide, r"the plates of 'z' have dimensions \[-1\] but in the model \[-2\]"),
        (some_words, word_guide, "subsamples 2 of its 5 rows"),
    ],
    ids=["another shape", "another plate", "some of the words"],
)
def test_what_would_be_weighed_wrong_says_so(model, guide, message):
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, X)


def test_what_is_masked_sums_to_one():
    def model(x, mask):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            y = pyro.sample("y", dist.Categorical(LABELS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(y.double(), 1.0), obs=x)

    mask = torch.tensor([True, False])
    w = log_weights(model, lambda x, mask: None, (torch.zeros(2).double(), mask), num_particles=3)
    seen = torch.logsumexp(
        LABELS.log() + dist.Normal(torch.arange(3.0).double(), 1.0).log_prob(torch.zeros(()).double()), 0
    )
    torch.testing.assert_close(w, torch.stack([seen, torch.zeros_like(seen)]).expand(3, 2))


def test_bad_numbers_say_so():
    with pytest.raises(
        ValueError, match="expected a whole number of particles or chains, 1 or more, but got 0"
    ):
        log_weights(TOY, exact_guide, X, num_particles=0)
    with pytest.raises(ValueError, match="data"):
        log_weights(TOY, exact_guide, ())
