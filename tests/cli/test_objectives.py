"""``--objective``: what a run maximizes, records and reports."""

import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch

import pyro_vae as pv
from pyro_vae import exact, infer
from pyro_vae.cli import app, build, defaults, ladder, options, runs
from pyro_vae.cli.build import Config, Pair
from pyro_vae.infer import Epoch
from pyro_vae.pairs.elbo import MeanElbo
from tests.support.runs import PAIR, weights_file

DISCRETE = """
import pyro, pyro.distributions as dist, torch

decoder, encoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)

def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

def make():
    return model, guide
"""


def config(**fields):
    return Config(
        **defaults.DEFAULTS["ring"] | {"warm_up": 0, "hidden": (5,)} | fields,
        dataset="ring",
        pair=None,
        binarize="none",
        batch_size=100,
        patience=None,
        clip_norm=None,
        seed=0,
        dtype="float64",
        event_shape=(2,),
    )


def test_names_of_objectives_are_the_keys_of_the_registries():
    names = set(get_args(app.Objective))
    assert names == build.OBJECTIVES.keys() == defaults.OBJECTIVES.keys()
    losses = {name: build.OBJECTIVES[name](defaults.OBJECTIVES[name][1], 0.5) for name in names}
    linear = {name for name, loss in losses.items() if infer.losses.kind_of(loss).linear}
    assert linear == set(defaults.LINEAR_OBJECTIVES)


@pytest.mark.parametrize("name", get_args(app.Objective))
def test_run_records_and_names_its_objective(run, name):
    code, out, err = run("train", "ring", "-n", 1, "--objective", name, "--out", "a", "--json")
    assert code == 0, err
    recorded = json.loads(Path("a/config.json").read_text())
    k = defaults.OBJECTIVES[name][1]
    assert (recorded["objective"], recorded["num_particles"]) == (name, k)
    assert recorded["alpha"] == (0.5 if name == "renyi" else None)
    result = json.loads(out)
    (line,) = map(json.loads, Path("a/metrics.jsonl").read_text().splitlines())
    assert (result["objective"], result["validation"]) == (name, line["validation"])
    page = Path("a/report.html").read_text()
    loss = build.build_loss(runs.open_run(Path("a")).config)
    assert f"<td>{type(loss).__name__}(" in page
    if name in ("elbo", "stl", "wake-sleep"):
        assert line["validation"]["bound"] is None
        assert "ELBO" in err
        assert "ESS" not in err
    else:
        mean = line["validation"]
        assert mean["elbo"] < mean["bound"]
        assert 1 < mean["ess"] < k
        assert f"of {k}" in err
        assert Path("a/plots/ess.png").is_file()


@pytest.mark.parametrize(
    ("given", "cause", "remedy"),
    [
        (("--alpha", 0.3), "--alpha 0.3: only --objective renyi", "leave --alpha out"),
        (("--objective", "iwae", "--alpha", 0), "--alpha 0: only --objective renyi", "--objective renyi"),
        (("--objective", "vimco", "--num-particles", 1), "--num-particles 1", "expected 2 or more"),
        (("--objective", "rws", "--num-particles", 1), "--num-particles 1", "expected 2 or more"),
        (("--objective", "iwae", "--beta", 0.5), "--beta 0.5: --objective iwae", "--objective elbo or stl"),
        (("--objective", "wake-sleep", "--warm-up", 3), "--warm-up 3: --objective", "expected --beta 1"),
        (("--objective", "renyi", "--alpha", "inf"), "--alpha", "expected a finite number"),
        (("--objective", "iawe"), "expected one of elbo", "did you mean 'iwae'?"),
    ],
    ids=str,
)
def test_invalid_combination_is_a_usage_error_with_a_remedy(run, given, cause, remedy):
    code, out, err = run("train", "ring", *given)
    assert (code, out) == (2, "")
    text = " ".join(err.split())
    assert cause in text
    assert remedy in text
    assert not Path("runs").exists()


def test_beta_applies_to_objectives_that_are_linear_in_log_probabilities():
    for name in get_args(app.Objective):
        given = config(objective=name, beta=0.5, num_particles=5)
        if name in defaults.LINEAR_OBJECTIVES:
            options.check_objective(given)
        else:
            with pytest.raises(app.typer.BadParameter, match=f"--objective {name} is not linear"):
                options.check_objective(given)


def test_default_warm_up_of_a_data_set_is_that_of_the_elbo(run):
    assert run("train", "ring", "-n", 1, "--objective", "iwae", "--out", "a")[0] == 0
    assert runs.open_run(Path("a")).config.warm_up == 0
    assert run("train", "ring", "-n", 1, "--objective", "stl", "--out", "b")[0] == 0
    assert runs.open_run(Path("b")).config.warm_up == 50


def test_resumed_run_keeps_its_objective_and_compares_it(run):
    given = ("--objective", "renyi", "--alpha", -0.5, "--num-particles", 3)
    assert run("train", "ring", "-n", 2, *given, "--out", "whole")[0] == 0
    assert run("train", "ring", "-n", 1, *given, "--out", "a")[0] == 0
    code, _, err = run("train", "--out", "a", "--resume", "last", "-n", 2, "--objective", "iwae")
    assert (code, "--objective is iwae but the run at a has renyi" in err) == (78, True)
    code, _, err = run("train", "--out", "a", "--resume", "last", "-n", 2, "--alpha", 0.5)
    assert (code, "--alpha is 0.5 but the run at a has -0.5" in err) == (78, True)
    assert run("train", "--out", "a", "--resume", "last", "-n", 2)[0] == 0
    assert weights_file("a").read_bytes() == weights_file("whole").read_bytes()


def test_run_without_an_objective_in_its_configuration_is_one_of_the_elbo(run):
    assert run("train", "ring", "-n", 1, "--out", "a")[0] == 0
    file = Path("a/config.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: record[key] for key in record.keys() - {"objective", "alpha"}}))
    opened = runs.open_run(Path("a")).config
    assert (opened.objective, opened.alpha) == ("elbo", None)
    assert run("train", "--out", "a", "--resume", "last", "-n", 2)[0] == 0
    assert run("sample", "a", "-n", 2)[0] == 0


@pytest.mark.parametrize(
    "fields", [{"objective": "x"}, {"objective": 1}, {"alpha": "x"}, {"objective": "rws"}], ids=str
)
def test_invalid_objective_in_a_configuration_is_an_error(run, fields):
    assert run("train", "ring", "-n", 1, "--out", "a")[0] == 0
    file = Path("a/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    code, _, err = run("evaluate", "a", "--num-particles", 2, "--data", "test[:5]")
    assert (code, "Traceback" in err) == (65, False)


def test_objectives_train_a_pair_of_functions(run):
    Path("mine.py").write_text(PAIR)
    pair = ("--pair", "mine.py:functions")
    assert run("train", *pair, "-n", 1, "--objective", "dreg", "--out", "a")[0] == 0
    code, out, err = run("evaluate", "a", *pair, "--num-particles", 5, "--data", "test[:5]", "--json")
    assert code == 0, err
    assert list(json.loads(out)) == ["elbo", "objective", "importance-5"]


def test_error_of_a_discrete_guide_names_the_objective_for_it(run):
    Path("mine.py").write_text(DISCRETE)
    pair = ("ring", "--pair", "mine.py:make", "-n", 1)
    code, _, err = run("train", *pair, "--objective", "iwae", "--out", "a")
    assert (code, "expected --objective vimco, rws or wake-sleep\n" in err) == (65, True), err
    for name in ("vimco", "rws", "wake-sleep"):
        code, _, err = run("train", *pair, "--objective", name, "--out", name)
        assert code == 0, err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("not known; expected VIMCO, or TraceEnum_ELBO", "expected --objective vimco, rws or wake-sleep"),
        ("expected Trace_ELBO, or TraceEnum_ELBO", "expected --objective elbo"),
        ("expected pyro.sample, or Trace_ELBO for points", "or --objective elbo for points"),
        ('for each latent, or estimator="iwae"', "for each latent, or --objective iwae"),
        ("VIMCO: 'z' has no density", "VIMCO: 'z' has no density"),
        ("pass batch_size=None, or Trace_ELBO", "pass a --batch-size of all data, or --objective elbo"),
    ],
)
def test_classes_of_objectives_in_remedies_become_options(message, expected):
    assert expected in options.with_option_names(message, app._option_arguments())


NAN = math.nan


@pytest.mark.parametrize(
    "mean",
    [
        MeanElbo(-3.0, -2.0, 1.0, 0.1),
        MeanElbo(-3.0, NAN, NAN, NAN),
        MeanElbo(-3.0, -2.0, 1.0, 0.1, -2.5, 0.2, 3.0),
        MeanElbo(-3.0, NAN, NAN, 0.1, -2.5, NAN, 3.0),
    ],
    ids=str,
)
def test_recorded_means_are_read_as_written(mean):
    """NaN, and the parts that only an objective other than the ELBO has, are both null in the file."""
    record = json.loads(json.dumps(runs.to_json(Epoch(1, 1.0, mean, None, 0.5))))
    again = runs._as_epoch(record).train
    assert repr(tuple(again)) == repr(tuple(mean))
    assert again.objective == mean.objective


def test_means_of_earlier_runs_have_no_objective():
    record = runs.to_json(Epoch(1, 1.0, MeanElbo(-3.0, -2.0, 1.0, 0.1), None, 0.5))
    record["train"] = {key: record["train"][key] for key in ("elbo", "reconstruction", "kl", "elbo_se")}
    assert runs._as_epoch(record).train == MeanElbo(-3.0, -2.0, 1.0, 0.1)


@pytest.mark.parametrize("change", [{"bound": "x"}, {"ess": [1]}, {"bound_se": 10**400}], ids=str)
def test_invalid_bound_in_metrics_is_an_error(change):
    record = runs.to_json(Epoch(1, 1.0, MeanElbo(-3.0, -2.0, 1.0, 0.1, -2.5, 0.2, 3.0), None, 0.5))
    with pytest.raises(ValueError, match="is not a number"):
        runs._as_epoch(record | {"train": record["train"] | change})
    del record["train"]["ess"]
    with pytest.raises(ValueError, match="a bound without ess"):
        runs._as_epoch(record)


def test_early_stopping_selects_the_epoch_of_the_best_objective():
    best_elbo = MeanElbo(-1.0, 0.0, 1.0, 0.1, -1.0, 0.1, 2.0)
    best_bound = MeanElbo(-2.0, 0.0, 2.0, 0.1, -0.5, 0.1, 2.0)
    epochs = [Epoch(i, 1.0, mean, mean, 0.1) for i, mean in enumerate((best_elbo, best_bound, best_elbo), 1)]
    patient = build.replace(config(objective="iwae", beta=1.0, num_particles=5), patience=3)
    assert runs.select_epoch(epochs, patient).epoch == 2


@pytest.mark.parametrize(("name", "alpha"), [("iwae", None), ("rws", None), ("renyi", 0.5), ("renyi", -0.5)])
def test_evaluate_reports_the_bound_that_the_run_maximized(name, alpha, tmp_path):
    """It agrees with ``pyro_vae.evaluate`` of the objective to 4 standard errors of both."""
    torch.manual_seed(0)
    toy = exact.NormalNormal(prior_scale=2.0).double()
    guide = pv.Guide(pv.conditionals.Normal(pv.nets.MLP(1, (4,)), event_shape=1)).double()
    x = toy.sample(20)
    given = config(objective=name, alpha=alpha, beta=1.0, num_particles=3)
    rungs = ladder.compute(
        Pair(toy, guide),
        given,
        (x,),
        ["elbo"],
        num_particles=90,
        num_temperatures=2,
        num_chains=2,
        seed=0,
        resume_folder=tmp_path / "none",
    )
    elbo, objective = rungs
    assert (elbo.name, objective.name) == ("elbo", "objective")
    estimate = objective.estimate
    assert (estimate.num_particles, estimate.cost) == (3, 90)
    assert estimate.bound == ("none" if alpha == -0.5 else "lower")
    expected = pv.evaluate(toy, guide, x, loss=build.build_loss(given), num_particles=30, seed=1).bound
    error = estimate.log_evidence_se * 2**0.5
    assert ((estimate.log_evidence - expected).abs() < 4 * error).all()


def test_evaluate_of_an_elbo_run_has_no_other_objective(run):
    assert run("train", "ring", "-n", 1, "--out", "a", "--objective", "stl")[0] == 0
    _, out, _ = run("evaluate", "a", "--num-particles", 5, "--data", "test[:5]", "--json")
    assert list(json.loads(out)) == ["elbo", "importance-5"]
