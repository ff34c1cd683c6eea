"""The ELBO of pairs that are not simple: what is reported is Pyro's own loss, however the data are cut and
scaled."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import pyro_vae as pv
from pyro_vae.data.batches import as_batch
from pyro_vae.pairs import elbo_terms, traces
from pyro_vae.pairs.elbo import CollectedTerms, ElboTerms
from pyro_vae.pairs.structure import inspect
from tests.support.plain import decoder, encoder, guide, model


@config_enumerate
def mixture(x):
    """Global means, one component indicator for each datum, summed out."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(loc[..., k] if loc.dim() == 1 else loc[k], 1.0), obs=x)


def mixture_guide(x):
    loc = pyro.param("loc_q", torch.tensor([-1.0, 1.0]))
    pyro.sample("loc", dist.Delta(loc).to_event(1))


@pytest.mark.parametrize("batch_size", [10, 30, 60, None])
def test_enumerated_pairs_with_a_shared_latent_have_one_elbo_however_the_data_are_cut(batch_size):
    x = torch.randn(60, generator=torch.manual_seed(0))
    loc = torch.tensor([-1.0, 1.0])
    each = torch.logsumexp(dist.Normal(loc, 1.0).log_prob(x[:, None]) - math.log(2), -1)
    exact = (each.sum() + dist.Normal(0.0, 3.0).log_prob(loc).sum()) / 60
    elbo = pv.evaluate(mixture, mixture_guide, x, loss=TraceEnum_ELBO(), batch_size=batch_size)
    assert elbo.elbo.shape == (60,)
    assert elbo.mean().elbo == pytest.approx(exact.item(), rel=1e-5)


def test_no_standard_error_is_printed_where_none_is_known():
    """An enumerated loss has one number for a batch, and one datum has no spread."""
    x = torch.randn(60, generator=torch.manual_seed(0))
    for batch_size in (25, None):
        terms = pv.evaluate(mixture, mixture_guide, x, loss=TraceEnum_ELBO(), batch_size=batch_size)
        assert math.isnan(terms.mean().elbo_se)
        assert re.fullmatch(r"ELBO -\d\.\d\d nats per datum, 60 data", str(terms))
    rows = torch.randn(60, 3, generator=torch.manual_seed(0))
    assert re.fullmatch(
        r"ELBO \S+ nats per datum \(reconstruction .*\), 1 data", str(pv.evaluate(model, guide, rows[:1]))
    )
    terms = pv.evaluate(model, guide, rows)
    assert terms.mean().elbo_se == pytest.approx(terms.elbo.double().std().item() / 60**0.5)
    assert f" ± {terms.mean().elbo_se:.2f} nats" in str(terms)


def observing_guide(x):
    """Its ELBO is a number: what it draws is a point."""
    mixture_guide(x)
    with pyro.plate("data", len(x)):
        label = dist.Bernoulli(logits=pyro.param("logit", torch.zeros(())))
        pyro.sample("label", label, obs=(x > 0).float(), infer={"is_auxiliary": True})
    pyro.factor("penalty", pyro.param("logit").square() - 7.0, has_rsample=False)


@pytest.mark.parametrize("batch_size", [20, None])
def test_the_history_of_an_enumerated_fit_leaves_out_what_the_guide_observes_as_evaluate_does(batch_size):
    x = torch.randn(60, generator=torch.manual_seed(0))
    options = {"loss": TraceEnum_ELBO(), "optim": pyro.optim.SGD({"lr": 0.0}), "batch_size": batch_size}
    history = pv.fit(mixture, observing_guide, x, validation=x, num_epochs=1, **options)
    expected = pv.evaluate(mixture, mixture_guide, x, loss=TraceEnum_ELBO()).mean().elbo
    assert history.epochs[0].validation.elbo == pytest.approx(expected, rel=1e-5)
    assert history.epochs[0].train.elbo == pytest.approx(expected, rel=1e-5)


def nested(x, size=100):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("pixels", size, subsample_size=10, dim=-1) as pixels:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, pixels])


def nested_guide(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def with_factors(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.factor("tilt", x.sum(-1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)
    pyro.factor("penalty", -(decoder.weight**2).sum())


def guide_with_factor(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))
        pyro.factor("volume", x[:, 0], has_rsample=True)


@pytest.mark.parametrize(
    ("programs", "x"),
    [
        ((nested, nested_guide), torch.randn(7, 100)),
        ((with_factors, guide), torch.randn(7, 3)),
        ((model, AutoNormal(model)), torch.randn(7, 3)),
        ((model, AutoDelta(model)), torch.randn(7, 3)),
        ((model, AutoDiagonalNormal(model)), torch.randn(7, 3)),
    ],
    ids=["nested subsample", "factors in the model", "AutoNormal", "AutoDelta", "AutoDiagonalNormal"],
)
def test_the_terms_sum_to_pyros_loss(programs, x):
    programs[1](x)  # an autoguide sets itself up, by draws, when it first runs
    plates = inspect(*programs, as_batch(x)).plates
    pyro.set_rng_seed(5)
    loss = Trace_ELBO().loss(*programs, x)
    pyro.set_rng_seed(5)
    terms = elbo_terms(*traces.run_pair(*programs, x), plates, num_data=7)
    assert terms.elbo.shape == (7,)
    assert -terms.elbo.sum().item() == pytest.approx(loss, rel=1e-4)
    assert pv.check_pair(*programs, x).problems == ()
    assert math.isfinite(pv.fit(*programs, x, num_epochs=1, batch_size=None).epochs[0].train.elbo)


def test_what_a_guide_observes_is_no_part_of_q():
    x = torch.randn(7, 3)
    with_factor, without = (pv.evaluate(model, g, x) for g in (guide_with_factor, guide))
    assert torch.equal(with_factor.elbo, without.elbo)
    assert torch.equal(pv.log_weights(model, guide_with_factor, x), pv.log_weights(model, guide, x))


def sequential(x):
    c = pyro.param("c", torch.zeros(()))
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(c, 1.0), obs=x[i])


def plateless(x):
    c = pyro.param("c", torch.zeros(()))
    pyro.sample("x", dist.Normal(c, 1.0).expand([len(x)]).to_event(1), obs=x)


@pytest.mark.parametrize("program", [sequential, plateless])
def test_without_a_vectorized_data_plate_only_the_whole_data_set_will_do(program):
    x, exact = torch.randn(20), None
    exact = dist.Normal(0.0, 1.0).log_prob(x).mean().item()
    terms = pv.evaluate(program, lambda x: None, x)
    assert terms.elbo.shape == (20,)
    assert terms.mean().elbo == pytest.approx(exact, rel=1e-5)
    for verb in (pv.evaluate, pv.fit):
        with pytest.raises(ValueError, match="no vectorized plate"):
            verb(program, lambda x: None, x, batch_size=5)


def test_a_plate_of_one_is_not_taken_for_the_data():
    def with_a_plate_of_one(x):
        with pyro.plate("k", 1):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        model(x)

    assert inspect(with_a_plate_of_one, guide, as_batch(torch.randn(1, 3))).plates == {"data"}


def test_labelled_data_train_and_validate_pairs_without_labels():
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40).long())
    assert pv.fit(model, guide, data, validation=data, num_epochs=1).epochs[0].validation
    assert pv.check_pair(model, guide, data).problems == ()


def test_a_sampler_says_how_many_data_there_are():
    data = TensorDataset(torch.randn(1000, 3))
    loader = DataLoader(data, 5, sampler=SubsetRandomSampler(range(10)))
    from pyro_vae.data.batches import as_batches

    assert as_batches(loader, None).num_rows == 10


def test_looking_at_a_loader_does_not_move_its_random_state():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(20, 3)), 5, shuffle=True, generator=generator)
    before = generator.get_state()
    pv.evaluate(model, guide, loader)
    assert torch.equal(generator.get_state(), before)


def test_a_loaders_bad_row_is_named_before_the_optimizer_moves():
    def bits(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    x = torch.ones(40, 3)
    x[35, 1] = 2
    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match=r"batch 3 \(step 4\): data: row 5 \(1 in all\)"),
        ):
            pv.fit(bits, guide, DataLoader(TensorDataset(x), 10), num_epochs=1)


def test_losses_that_do_not_fit():
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match="JitTrace_ELBO: it compiles"):
        pv.fit(model, guide, x, loss=JitTrace_ELBO())
    with pytest.raises(ValueError, match="'k' is summed out"):
        pv.fit(mixture, mixture_guide, torch.randn(20), loss=TraceEnum_ELBO(), beta=0.5)
    loss = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(pv.fit(model, guide, x, loss=loss, num_epochs=1).epochs[0].train.elbo)


def test_annealing_is_not_reported_where_the_loss_alone_knows():
    """An enumerated loss on a pair without enumerated sites, at a vanishing learning rate."""
    x = torch.randn(20, 3)
    elbos = []
    for beta in (1.0, 0.1):
        pyro.set_rng_seed(1)
        loss = TraceEnum_ELBO(
            num_particles=500, vectorize_particles=True, max_plate_nesting=1, strict_enumeration_warning=False
        )
        optim = pyro.optim.SGD({"lr": 0.0})
        history = pv.fit(model, guide, x, loss=loss, optim=optim, num_epochs=1, batch_size=None, beta=beta)
        elbos.append(history.epochs[0].train.elbo)
    # other draws; annealing would raise it by 0.9 KL, over a nat
    assert elbos[0] == pytest.approx(elbos[1], abs=0.2)


def test_a_plateau_schedule_is_shown_the_loss():
    optim = pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "patience": 0}
    )
    assert len(pv.fit(model, guide, torch.randn(20, 3), optim=optim, num_epochs=3).epochs) == 3


def test_a_pair_with_parameters_for_each_datum_is_validated_whole():
    x = torch.randn(600, 3)
    guide = AutoNormal(model)
    history = pv.fit(model, guide, x, validation=x, batch_size=None, num_epochs=1)
    assert math.isfinite(history.epochs[0].validation.elbo)


@pytest.mark.parametrize("as_module", [True, False])
def test_early_stopping_restores_buffers_of_every_network_that_ran(as_module):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def normalized(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    x = 3 + torch.randn(100, 3)
    optim = pyro.optim.Adam({"lr": 0.1})
    history = pv.fit(
        model, normalized, x[:50], validation=x[50:], batch_size=10, num_epochs=30, patience=3, optim=optim
    )
    with history.scope():
        again = pv.evaluate(model, normalized, x[50:]).mean().elbo
    assert again == history.best.validation.elbo


def test_untouched_puts_back_whatever_a_module_did_to_its_buffers():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(3))
            self.register_buffer("cache", torch.zeros(0))
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            self.last = x[0]
            self.cache = torch.arange(len(x))
            return self.net(x)

    net = Remembers()

    def remembering(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    x = torch.randn(9, 3)
    before = x.clone()
    pv.evaluate(model, remembering, x)
    assert torch.equal(x, before)
    assert torch.equal(net.last, torch.zeros(3))
    assert net.cache.shape == (0,)


def test_collected_terms_are_the_concatenated_terms():
    collected, parts = CollectedTerms(), []
    assert [len(part) for part in collected.all] == [0] * 5
    for n, dtype in ((3, torch.float32), (0, torch.float32), (20_000, torch.float32), (5, torch.double)):
        elbo, kl = torch.randn(2, n, dtype=dtype)
        parts.append(ElboTerms.of_elbo(elbo, elbo + kl, kl))
        collected.append(parts[-1])
    assert len(collected) == 20_008
    for part, expected in zip(collected.all, map(torch.cat, zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)
