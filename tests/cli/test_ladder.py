"""Output of ``pyro-vae evaluate`` and ``pyro-vae diagnose``."""

import json

import pytest

from pyro_vae import data
from pyro_vae.cli import build
from tests.faults.processes import torchrun


@pytest.fixture
def trained(run, tmp_path):
    """The folder of a trained run."""
    folder = tmp_path / "run"
    code, _, err = run("train", "digits", "-n", 2, "--latent-dim", 2, "--hidden", 10, "--out", folder)
    assert code == 0, err
    return folder


def test_evaluate_prints_and_writes_a_row_per_estimate(run, trained, tmp_path):
    code, out, err = run(
        "evaluate",
        trained,
        "--estimator",
        "elbo,importance,prior,ais,smc,bdmc",
        "--num-particles",
        50,
        "--num-temperatures",
        5,
        "--num-chains",
        2,
        "--data",
        "test[:6]",
        "--out",
        tmp_path / "e",
    )
    assert code == 0, err
    rows = list(json.loads((tmp_path / "e" / "evaluation.json").read_text()).values())
    names = ["elbo", "importance", "importance", "prior", "ais", "smc", "bdmc", "bdmc"]
    assert [row["estimator"].split()[0] for row in rows] == names
    assert rows[0]["log_evidence"] < rows[2]["log_evidence"] < rows[0]["log_evidence"] + 20
    assert [row["bound"] for row in rows[-2:]] == ["lower", "upper"]
    assert (tmp_path / "e" / "evaluation.txt").read_text() in out
    assert (tmp_path / "e" / "ladder.png").stat().st_size > 10_000
    assert "6 data" in out
    assert not (trained / ".evidence").exists()


@pytest.mark.slow
def test_two_processes_evaluate_and_diagnose_as_one(run, trained, tmp_path):
    """They write the same files once."""
    estimators = "elbo,importance,ais"
    sizes = "--num-particles", 20, "--num-temperatures", 4, "--num-chains", 2, "--data", "test[:130]"
    commands = {
        "evaluation.json": ["evaluate", trained, "--estimator", estimators, *sizes],
        "diagnosis.txt": ["diagnose", trained, "--num-particles", 20, "--num-simulations", 100],
    }
    for name, words in commands.items():
        code, _, err = run(*words, "--out", tmp_path / f"one {name}")
        assert code == 0, err
        assert torchrun([*words, "--out", tmp_path / f"two {name}"], tmp_path / "log").wait(120) == 0
        one, two = ((tmp_path / f"{size} {name}" / name).read_text() for size in ("one", "two"))
        if name.endswith("json"):
            one, two = (
                {key: {**row, "seconds": 0.0} for key, row in json.loads(text).items()} for text in (one, two)
            )
        assert one == two
        assert not (trained / ".evidence").exists()


def test_diagnose_prints_and_writes_the_diagnosis(run, trained, tmp_path):
    code, out, err = run(
        "diagnose",
        trained,
        "--num-particles",
        100,
        "--num-simulations",
        100,
        "--data",
        "test[:12]",
        "--out",
        tmp_path / "d",
    )
    assert code == 0, err
    assert (tmp_path / "d" / "diagnosis.txt").read_text() in out
    assert {file.name for file in (tmp_path / "d").iterdir()} == {
        ".written.json",
        "diagnosis.json",
        "diagnosis.txt",
        "pareto-k.png",
        "worst.png",
        "calibration.png",
    }


@pytest.mark.parametrize(
    ("options", "expected_code", "message"),
    [
        (("--estimator", "elbo,magic"), 2, "expected some of elbo,importance"),
        (("--data", "test[5:5]"), 65, "has no rows"),
        (("--data", "all"), 65, "expected test, train or some of their rows"),
    ],
)
def test_invalid_options_of_evaluate_are_errors(run, trained, options, expected_code, message):
    code, _, err = run("evaluate", trained, *options)
    assert code == expected_code
    assert message in err
    assert not (trained / "evaluation").exists()


def test_select_rows_slices_data_with_one_binarization():
    train, test = data.load("digits", binarize="stochastic")
    selected, first_row = build.select_rows("test[10:30]", train, test)
    assert first_row == 10
    assert len(selected) == 20
    assert selected.x.unique().tolist() == [0, 1]
    assert selected.x.equal(build.select_rows("test", train, test)[0].x[10:30])
    assert len(build.select_rows("train[:7]", train, test)[0]) == 7


def test_rows_are_numbered_within_the_whole_set(run, trained, tmp_path):
    """The worst datum of a slice, evaluated alone, is the worst datum of that slice."""

    def worst(selection, name):
        words = "--num-particles", 20, "--num-simulations", 0, "--out", tmp_path / name
        code, out, err = run("diagnose", trained, "--data", selection, *words, "--json")
        assert code == 0, err
        record = json.loads((tmp_path / name / "diagnosis.json").read_text())
        assert record["data"] == json.loads(out)["data"] == selection
        assert record["worst"] == json.loads(out)["worst"][:8]
        text = (tmp_path / name / "diagnosis.txt").read_text()
        assert text.startswith(f"DATA\n{selection}\n")
        assert f"worst data: {record['worst'][0]} (" in text
        return record["worst"]

    assert sorted(worst("test[20:26]", "a")) == [20, 21, 22, 23, 24, 25]
    assert sorted(worst("train[7:9]", "b")) == [7, 8]


def test_errors_number_rows_within_the_whole_set():
    with pytest.raises(ValueError, match="row 23 is nan, row 24 too"), build.rows_numbered_from(20):
        raise ValueError("row 3 is nan, row 4 too")
