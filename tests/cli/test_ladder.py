"""``pyro-vae evaluate``: what it prints, what it leaves."""

import json
import signal
import sys

import pytest

from pyro_vae import data
from pyro_vae.cli import app, build


@pytest.fixture
def call(monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGTERM)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["pyro-vae", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        return exit_.value.code, *capfd.readouterr()

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(call, tmp_path):
    folder = tmp_path / "run"
    code, _, err = call("train", "digits", "-n", 2, "--latent-dim", 2, "--hidden", 10, "--out", folder)
    assert code == 0, err
    return folder


def test_the_ladder_is_printed_and_kept(call, run, tmp_path):
    code, out, err = call(
        "evaluate",
        run,
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
    assert not (run / ".evidence").exists()


def test_a_diagnosis_is_printed_and_kept(call, run, tmp_path):
    code, out, err = call(
        "diagnose",
        run,
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
        "diagnosis.txt",
        "pareto-k.png",
        "worst.png",
        "calibration.png",
    }


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--estimator", "elbo,magic"), 2, "expected some of elbo,importance"),
        (("--data", "test[5:5]"), 65, "has no rows"),
        (("--data", "all"), 65, "expected test, train or some of their rows"),
    ],
)
def test_bad_words_say_so(call, run, words, code, said):
    found, _, err = call("evaluate", run, *words)
    assert found == code
    assert said in " ".join(err.replace("│", " ").split())
    assert not (run / "evaluation").exists()


def test_parts_of_data():
    train, test = data.load("digits", binarize="stochastic")
    part = build.part_of("test[10:30]", train, test)
    assert len(part) == 20
    assert part.x.unique().tolist() == [0, 1]  # once and for all
    assert part.x.equal(build.part_of("test", train, test).x[10:30])
    assert len(build.part_of("train[:7]", train, test)) == 7
