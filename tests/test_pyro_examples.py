"""Pairs of the shape of Pyro's examples and tutorials: each verb works on them, with plain Pyro's numbers, or
refuses with a reason that is true."""

import inspect
import logging

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

import pyro_vae as pv
from pyro_vae import evidence
from pyro_vae.random_states import stream_seed
from tests.support.pyro_examples import EXAMPLES, build

OK = None  # the verb works
GLOBAL = r"lies? in no data plate, so there is no evidence per datum"
UNDECLARED = r"'eta' has batch_shape \(8,\), whose dimension -1 lies in no plate"
SHARED_NAME = (
    r"register different networks under one name .* 't_nn', so the network of the model would never be"
)
DOCUMENTS = (
    r"plate 'documents' of 24 rows, and all sites of plate 'words' .* dimension 1 of (argument 0|data) has 24"
)
ROWS = r"from which minibatches cannot be taken; pass batch_size=None"
PER_DATUM = ("log_weights", "importance", "diagnose", "ais")
# scale of the example's own poutine.scale, which no verb but training knows
SCALES = {
    "scanvi": 1 / 120,
    "scanvi_batch_norm": 1 / 120,
    "scanvi_unlabelled": 1 / 120,
    "ss_vae_classify": 46.0,
}

REFUSED: dict[str, dict[str, str]] = {
    "ss_vae_classify": {"ais": r"no continuous latent"},
    "cvae": {"ais": r"does not run in a plate of particles"},
    "scanvi_batch_norm": {
        "check_pair": r"in training mode .* changes .* batch normalization",
        "ais": r"plate of particles",
    },
    "cevae_shared_name": dict.fromkeys(("check_pair", "fit", "fit_whole", "SVI"), SHARED_NAME),
    "lda": dict.fromkeys(("check_pair", "fit", "fit_whole", "evaluate"), DOCUMENTS)
    | dict.fromkeys(PER_DATUM, GLOBAL)
    | {"joint_log_weights": r"'documents', which subsamples 8 of its 24 rows"},
    "hmm_1": dict.fromkeys(PER_DATUM, GLOBAL),
    "hmm_6": dict.fromkeys(PER_DATUM, GLOBAL),
    "eight_schools": dict.fromkeys(
        ("check_pair", "fit", "fit_whole", "SVI", "evaluate", "joint_log_weights", *PER_DATUM), UNDECLARED
    ),
    "eight_schools_declared": dict.fromkeys(PER_DATUM, GLOBAL),
    "dmm": {"fit": ROWS},
    "dmm_iaf": {"fit": ROWS},
    "svi_part_i": dict.fromkeys(PER_DATUM, GLOBAL) | {"fit": ROWS},
}
VERBS = ("check_pair", "fit", "fit_whole", "SVI", "evaluate", "joint_log_weights", *PER_DATUM)
EXPECTED = {name: {verb: REFUSED.get(name, {}).get(verb, OK) for verb in VERBS} for name in EXAMPLES}
LOCAL = [name for name in EXAMPLES if EXPECTED[name]["log_weights"] is OK]


# relatives of an example that is tested anyhow, and long programs, whose graphs are slow to make
HEAVY = {
    "scanvi_batch_norm",
    "scanvi_unlabelled",
    "ss_vae_supervised",
    "dmm_iaf",
    "cevae_shared_name",
    "hmm_6",
    "vae_grey",
}
SLOW = dict.fromkeys(("fit_whole", "SVI", "importance", "diagnose", "log_weights"), HEAVY)
SLOW["SVI"] = HEAVY | {"scanvi", "dmm"}
SLOW["diagnose"] = HEAVY | {"scanvi", "cvae", "flow_prior"}
SLOW["ais"] = set(EXAMPLES)


def marks(verb, name):
    """Those of a test: slow where the verb works there and takes long."""
    if EXPECTED[name][verb] is OK and name in SLOW.get(verb, ()):
        yield pytest.mark.slow


def cases(verb, names=EXAMPLES):
    return pytest.mark.parametrize(
        ("name", "reason"),
        [pytest.param(name, EXPECTED[name][verb], id=name, marks=list(marks(verb, name))) for name in names],
    )


def refused(reason):
    return pytest.raises(ValueError, match=reason)


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


def as_data(example):
    """The arguments as ``fit`` takes them."""
    return example.args if len(example.args) > 1 else example.args[0]


def named(example):
    """All arguments by name, where some are keyword arguments."""
    if not example.kwargs:
        return example.args
    return dict(inspect.signature(example.model).bind(*example.args, **example.kwargs).arguments)


def parameters():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def without_observed(guide):
    """log q of the latents alone: what a guide observes is an auxiliary loss and no part of q(z|x)."""
    return poutine.block(guide, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])


def plain_elbo(name, example, seed=0):
    """The ELBO of all data by the example's own loss of Pyro, modules in evaluation mode, its scale taken
    out."""
    pyro.set_rng_seed(stream_seed(seed))
    with torch.no_grad():
        loss = example.loss.loss(
            example.model, without_observed(example.guide), *example.args, **example.kwargs
        )
    return -loss / SCALES.get(name, 1.0)


@cases("check_pair")
def test_check_pair_raises_no_false_alarm(name, reason):
    example = build(name)
    problems = pv.check_pair(example.model, example.guide, example.data).problems
    if reason is OK:
        assert not problems
    else:
        with pytest.raises(ValueError, match=reason):
            check_problems(problems)


def check_problems(problems):
    raise ValueError("; ".join(problems))


@cases("fit_whole")
def test_fit_on_all_data_at_once_is_plain_svi(name, reason):
    example = build(name)
    steps = 2
    options = {
        "loss": example.loss,
        "optim": adam(),
        "num_epochs": steps,
        "batch_size": None,
        "progress": False,
    }
    pyro.set_rng_seed(0)
    if reason is not OK:
        with refused(reason):
            pv.fit(example.model, example.guide, as_data(example), **options)
        return
    history = pv.fit(example.model, example.guide, as_data(example), **options)
    with history.scope():
        ours = parameters()
    example = build(name)
    pyro.set_rng_seed(0)
    svi = SVI(example.model, example.guide, adam(), example.loss)
    for _ in range(steps):
        svi.step(*example.args)
    torch.testing.assert_close(ours, parameters(), rtol=1e-5, atol=1e-5)


@cases("fit")
def test_fit_in_minibatches_is_plain_svi_under_a_scale(name, reason):
    """Where all latents are local, a minibatch of B stands for N data by one factor N/B on model and
    guide."""
    example = build(name)
    options = {"loss": example.loss, "optim": adam(), "num_epochs": 1, "batch_size": 8, "progress": False}
    pyro.set_rng_seed(0)
    if reason is not OK:
        with refused(reason):
            pv.fit(example.model, example.guide, as_data(example), **options)
        return
    history = pv.fit(example.model, example.guide, as_data(example), **options)
    with history.scope():
        ours = parameters()
    assert all(p.isfinite().all() for p in ours.values())
    if name not in LOCAL:
        return
    example = build(name)
    pyro.set_rng_seed(0)
    programs = [poutine.scale(program, scale=3.0) for program in (example.model, example.guide)]
    svi = SVI(*programs, adam(), example.loss)
    for rows in torch.randperm(len(example.args[0])).split(8):
        svi.step(*(part[rows] for part in example.args))
    torch.testing.assert_close(ours, parameters(), rtol=1e-4, atol=1e-5)


@cases("SVI")
def test_svi_is_plain_svi(name, reason):
    losses = []
    for kind in (pv.SVI, SVI):
        example = build(name)
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
            svi = kind(example.model, example.guide, adam(), example.loss)
            if reason is not OK:
                with refused(reason):
                    svi.step(*example.args, **example.kwargs)
                return
            losses.append([svi.step(*example.args, **example.kwargs) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@cases("evaluate")
def test_evaluate_is_the_loss_of_pyro_at_the_same_draws(name, reason):
    example = build(name)
    if reason is not OK:
        with refused(reason):
            pv.evaluate(example.model, example.guide, as_data(example), loss=example.loss)
        return
    terms = pv.evaluate(example.model, example.guide, as_data(example), loss=example.loss)
    if name == "scanvi_batch_norm":  # plain Pyro leaves the mode of modules to the caller
        assert terms.elbo.isfinite().all()
    elif name == "prodlda":  # a divergence in closed form is another estimate of the same bound
        assert terms.elbo.sum().item() == pytest.approx(plain_elbo(name, example), rel=0.1)
    else:
        assert terms.elbo.sum().item() == pytest.approx(plain_elbo(name, example), rel=1e-4)


@cases("log_weights")
def test_log_weights_of_each_datum_sum_to_the_joint_ones(name, reason):
    example = build(name)
    if reason is not OK:
        with refused(reason):
            pv.log_weights(example.model, example.guide, named(example), num_particles=3)
        return
    apart, joint = (
        verb(example.model, example.guide, example.args, num_particles=3, seed=1)
        for verb in (pv.log_weights, pv.joint_log_weights)
    )
    torch.testing.assert_close(apart.sum(1), joint.log_weights, rtol=1e-4, atol=1e-3)


@cases("joint_log_weights", [name for name in EXAMPLES if name not in LOCAL])
def test_joint_log_weights_estimate_the_elbo_of_pyro(name, reason):
    example = build(name)
    if reason is not OK:
        with refused(reason):
            pv.joint_log_weights(example.model, example.guide, named(example), num_particles=3)
        return
    draws = 2 if "hmm" in name else 20  # a guide of points draws nothing
    weights = pv.joint_log_weights(
        example.model, example.guide, example.args, num_particles=draws
    ).log_weights.double()
    plain = torch.tensor([plain_elbo(name, example, seed) for seed in range(draws)], dtype=torch.double)
    error = torch.hypot(weights.std(), plain.std()) / draws**0.5
    assert (weights.mean() - plain.mean()).abs() <= 5 * error + 1e-4 * plain.mean().abs()


@cases("importance")
def test_importance_is_no_lower_than_the_elbo(name, reason):
    """Jensen, at the same draws: log-mean-exp of the log-weights is no lower than their mean."""
    example = build(name)
    options = {"num_particles": 20, "progress": False}
    if reason is not OK:
        with refused(reason):
            evidence.importance(example.model, example.guide, example.args, **options)
        return
    bound = evidence.importance(example.model, example.guide, example.args, **options).log_evidence
    elbo = evidence.elbo(example.model, example.guide, example.args, **options).log_evidence
    assert (bound >= elbo - 1e-4).all()


@cases("diagnose")
def test_diagnose_gives_its_page_or_the_reason(name, reason):
    example = build(name)
    options = {"num_particles": 20, "num_simulations": 100}
    if reason is not OK:
        with refused(reason):
            pv.diagnose(example.model, example.guide, example.args, **options)
        return
    found = pv.diagnose(example.model, example.guide, example.args, **options)
    assert "EVIDENCE" in str(found)
    assert found.importance.log_evidence.isfinite().all()
    assert not any("torch.cat" in note for note in found.notes)


@cases("ais")
def test_ais_is_above_the_elbo_or_refuses(name, reason):
    """Few temperatures, chains from the prior: both are lower bounds, and moves towards the posterior raise
    this one."""
    example = build(name)
    options = {"annealing": evidence.Annealing(3, num_chains=4, schedule="uniform"), "progress": False}
    if reason is not OK:
        with refused(reason):
            evidence.ais(example.model, example.args, **options)
        return
    found = evidence.ais(example.model, example.args, **options).log_evidence
    assert found.isfinite().all()
    if name not in ("ss_vae_unsupervised", "scanvi_unlabelled"):  # their guides draw what the model sums out
        elbo = evidence.elbo(example.model, example.guide, example.args, num_particles=50).log_evidence
        assert found.mean() > elbo.mean() - 1


@pytest.mark.parametrize("name", ["vae", "flow_prior"])
@pytest.mark.slow
def test_split_gap_is_not_negative(name):
    example = build(name)
    gap = pv.split_gap(example.model, example.guide, example.args, num_particles=50, max_steps=100)
    assert (gap.amortization > -5 * gap.amortization_se).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hmm_1", GLOBAL),
        ("svi_part_i", GLOBAL),
        ("dmm", r"family of MaskedDistribution is not supported"),
        ("cvae", r"plate of particles"),
        ("ss_vae_classify", r"no latent"),
        ("scanvi_batch_norm", r"particles"),
    ],
)
def test_split_gap_says_why_it_cannot(name, reason):
    example = build(name)
    with refused(reason):
        pv.split_gap(example.model, example.guide, example.args, num_particles=10, max_steps=100)


def test_documents_in_dimension_1_are_evaluated_together_where_that_is_asked_for():
    """The mean is not per document, but the sum is that of all of them."""
    example = build("lda")._replace(kwargs={})
    terms = pv.evaluate(example.model, example.guide, example.args[0], loss=example.loss, check=False)
    assert terms.elbo.sum().item() == pytest.approx(plain_elbo("lda", example), rel=1e-4)


def test_documents_in_dimension_1_are_trained_together_where_that_is_asked_for():
    example = build("lda")
    options = {
        "loss": example.loss,
        "optim": adam(),
        "num_epochs": 2,
        "batch_size": None,
        "progress": False,
        "check": False,
    }
    pyro.set_rng_seed(0)
    with pv.fit(example.model, example.guide, example.args[0], **options).scope():
        ours = parameters()
    example = build("lda")
    pyro.set_rng_seed(0)
    svi = SVI(example.model, example.guide, adam(), example.loss)
    for _ in range(2):
        svi.step(*example.args)
    torch.testing.assert_close(ours, parameters(), rtol=1e-5, atol=1e-5)


def test_no_message_prints_the_data():
    example = build("dmm")
    with pytest.raises(ValueError, match="PackedSequence") as raised:
        pv.fit(example.model, example.guide, example.args, batch_size=8, progress=False)
    assert "tensor(" not in str(raised.value)


@pytest.mark.parametrize("name", ["hmm_1", "hmm_6"])
def test_joint_log_weights_of_a_point_say_that_it_has_no_density(name, caplog):
    example = build(name)
    with caplog.at_level(logging.WARNING, logger="pyro_vae"):
        pv.joint_log_weights(example.model, example.guide, example.args, num_particles=2)
    assert "density" in caplog.text
