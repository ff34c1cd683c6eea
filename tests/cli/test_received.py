"""Received run folders: no code is executed, links are not followed, and a user's files are unchanged."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_vae import files
from pyro_vae.cli import runs
from tests.support.runs import PAIR, weights_file


@pytest.fixture
def ring(run):
    assert run("train", "ring", "-n", 1, "--out", "a")[0] == 0
    return Path("a")


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("command", ["sample", "reconstruct", "plot", "evaluate", "diagnose"])
@pytest.mark.parametrize("pair", ["payload:make", "payload.py:make", "os:abort"])
def test_code_of_a_recorded_pair_runs_only_if_the_option_repeats_it(run, ring, command, pair):
    edit_config(ring, pair=pair)
    Path("payload.py").write_text("open('it ran', 'w')")
    code, _, err = run(command, "a")
    assert (code, f"--pair {pair!r}" in err) == (78, True)
    assert run(command, "a", "--pair", "another:make")[0] == 78
    assert not Path("it ran").exists()
    assert not Path("a", "samples").exists()


def test_resume_requires_the_pair_option_again(run):
    Path("folder").mkdir()
    Path("folder", "mine.py").write_text("from beside import *\n")
    Path("folder", "beside.py").write_text(PAIR)
    pair = ("--pair", "folder/mine.py:vae")
    assert run("train", *pair, "-n", 1, "--out", "a")[0] == 0
    assert run("train", "--out", "a", "--resume", "last", "-n", 2)[0] == 78
    assert run("train", "--out", "a", "--resume", "last", "-n", 2, *pair)[0] == 0
    assert run("sample", "a", "-n", 2, *pair)[0] == 0
    assert run("train", "-n", 1, "--pair", "nowhere.py:vae")[0] == 66
    assert run("train", "-n", 1, "--pair", "mine.py")[0] == 2


def test_pair_option_on_a_run_without_pair_is_an_error(run, ring):
    code, _, err = run("sample", "a", "--pair", "os:abort")
    assert (code, "trained without --pair" in err) == (78, True)


def test_python_m_does_not_import_from_the_working_folder(ring):
    for name in ("numpy", "matplotlib", "safetensors"):
        Path(f"{name}.py").write_text("open('it ran', 'w')")
    subprocess.run(
        [sys.executable, "-m", "pyro_vae", "sample", "a", "-n", "2"], capture_output=True, timeout=60
    )
    assert not Path("it ran").exists()
    assert Path("a", "samples", "samples.npy").exists()


@pytest.mark.parametrize(
    "name", ["env.json", "report.html", "metrics.jsonl", "weights", "checkpoints", "config.json"]
)
def test_files_of_others_are_not_overwritten(run, ring, name):
    path = ring / name
    if path.is_dir():
        path.rename("aside")
        (path / "step-00000007" if name == "checkpoints" else path).mkdir(parents=True)
        path = next(path.glob("step*"), path) / "model.pt"
    path.write_text('{"mine": 1}')
    assert run("train", "ring", "-n", 1, "--out", "a", "--overwrite")[0] == 2
    assert path.read_text() == '{"mine": 1}'


def test_files_of_a_user_in_a_run_folder_are_unchanged(run, ring):
    run("sample", "a", "-n", 3)
    (ring / "plots" / "mine.png").write_text("mine")
    (ring / "samples" / "samples.npy").write_text("changed")
    (ring / "weights" / "mine.txt").write_text("mine")
    (ring / "diagnosis").mkdir()
    (ring / "diagnosis" / "notes.txt").write_text("mine")
    assert run("train", "ring", "-n", 1, "--out", "a", "--overwrite")[0] == 0
    for name, content in (
        ("plots/mine.png", "mine"),
        ("samples/samples.npy", "changed"),
        ("weights/mine.txt", "mine"),
        ("diagnosis/notes.txt", "mine"),
    ):
        assert (ring / name).read_text() == content
    assert not (ring / "samples" / "points.png").exists()


def test_changed_result_is_not_overwritten(run, ring):
    assert run("sample", "a", "-n", 3, "--out", "s")[0] == 0
    assert run("sample", "a", "-n", 3, "--out", "s")[0] == 2
    assert run("sample", "a", "-n", 3, "--out", "s", "--overwrite")[0] == 0
    assert run("sample", "a", "-n", 3, "--out", "s", "--format", "svg", "--overwrite")[0] == 0
    assert {path.suffix for path in Path("s").glob("points.*")} == {".svg"}
    Path("s", "samples.npy").write_text("mine")
    assert run("sample", "a", "-n", 3, "--out", "s", "--overwrite")[0] == 2
    assert Path("s", "samples.npy").read_text() == "mine"


@pytest.mark.parametrize("name", ["weights", "checkpoints", "plots", "metrics.jsonl"])
@pytest.mark.parametrize("options", [("--overwrite",), ("--resume", "last")], ids=" ".join)
def test_links_in_a_run_are_not_followed(run, ring, name, options):
    (ring / name).rename("there")
    (ring / name).symlink_to(Path("there").resolve())

    def contents():
        files = [Path("there"), *Path("there").rglob("*")]
        return {file: file.read_bytes() for file in files if file.is_file()}

    before = contents()
    code, _, err = run("train", "ring", "-n", 2, "--out", "a", *options)
    assert (code in (2, 65), "Traceback" in err) == (True, False), err
    assert contents() == before
    assert (ring / name).is_symlink()


def test_report_does_not_include_linked_files(run, ring):
    Path("there").mkdir()
    Path("there", "secret.txt").write_text("a secret")
    (ring / "plots" / "b.txt").symlink_to(Path("there", "secret.txt").resolve())
    (ring / "plots" / "b.png").symlink_to(Path("there", "secret.txt").resolve())
    (ring / "samples-7").symlink_to(Path("there").resolve())
    assert run("sample", "a", "-n", 3)[0] == 0
    page = (ring / "report.html").read_text()
    assert "a secret" not in page
    assert "b.png" not in page


@pytest.mark.parametrize("patience", [(), ("--patience", 5)], ids=["last", "best"])
def test_crash_before_the_record_saves_the_epoch_with_the_parameters(run, monkeypatch, patience):
    def crash(*_, **__):
        raise KeyboardInterrupt

    command = ("train", "ring", "-n", 3, "--learning-rate", 1e-3, *patience)
    assert run(*command, "--out", "whole")[0] == 0
    count, record = iter(range(9)), runs.Run.record
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.Run, "record", lambda *args, **kw: (crash if next(count) == 1 else record)(*args, **kw)
        )
        assert run(*command, "--out", "a")[0] == 130
    opened = runs.open_run(Path("a"))
    assert len(Path("a", "metrics.jsonl").read_text().splitlines()) == 1
    assert (len(opened.history()), opened.saved_epoch().epoch) == (2, 2)
    assert opened.saved_epoch().validation == runs.open_run(Path("whole")).history()[1].validation


def test_run_without_metrics_file_has_the_saved_epoch(run, ring):
    (ring / "metrics.jsonl").unlink()
    assert runs.open_run(ring).saved_epoch().epoch == 1
    assert run("plot", "a")[0] == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
)
def test_invalid_rank_or_world_size_is_an_error(run, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("train", "ring", "-n", 1, "--out", "a")
    assert (code, "torchrun" in err) == (65, True)
    assert not Path("a").exists()


def test_evaluate_and_diagnose_with_out_do_not_change_the_run(run, ring):
    def state():
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in [ring, *ring.rglob("*")]}

    before = state()
    options = ("--data", "test[:5]", "--num-particles", 2)
    assert run("evaluate", "a", "--estimator", "importance", *options, "--out", "e")[0] == 0
    assert run("diagnose", "a", "--num-simulations", 0, *options, "--out", "d")[0] == 0
    assert state() == before
    assert {file.name for file in Path("e").iterdir()} == {
        "evaluation.json",
        "evaluation.txt",
        "ladder.png",
        ".written.json",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"latent_dim": 2**30},
        {"hidden": [2**20, 2**20]},
        {"hidden": [1] * 10**4},
        {"hidden": [-1]},
        {"hidden": [True]},
        {"event_shape": [2**15, 2**15]},
        {"event_shape": [[2]]},
        {"seed": -1},
        {"seed": 2**70},
        {"batch_size": 0},
        {"beta": -1.0},
        {"dataset": "../../etc"},
        {"hidden": {}},
        {"latent_dim": True},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_invalid_configuration_is_a_one_line_error(run, ring, fields):
    edit_config(ring, **fields)
    code, _, err = run("reconstruct", "a")
    assert code == 65, err
    assert len(err.splitlines()) == 1
    assert len(err) < 1000


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1e400}',
        "[" * 100_000,
        '{"epoch": 1, "train": [1]}',
        '{"epoch": true, "train": null}',
        "9" * 9000,
        '{"a": 1, "a": 1}',
    ],
    ids=lambda line: line[:12],
)
def test_invalid_metrics_line_is_a_short_error(run, ring, line):
    (ring / "metrics.jsonl").write_text(line)
    code, _, err = run("plot", "a")
    assert (code, "line 1 is not an epoch" in err) == (65, True)
    assert len(err) < 1000


@pytest.mark.parametrize("change", [{"elbo": "x"}, {"elbo": 10**400}, {"elbo": [1]}, {"unknown": 1}], ids=str)
def test_invalid_mean_in_metrics_is_an_error(run, ring, change):
    file = ring / "metrics.jsonl"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"train": record["train"] | change}))
    assert run("plot", "a")[0] == 65


@pytest.mark.slow
def test_evaluate_runs_in_an_ascii_locale(ring):
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = "evaluate a --estimator elbo --num-particles 2 --data test[:5] --out é"
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vae", *command.split()], env=os.environ | env, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "±" in Path("é", "evaluation.txt").read_text(encoding="utf-8")


def test_text_files_are_opened_with_an_encoding():
    package = Path(files.__file__).parent
    for source in package.rglob("*.py"):
        for call in re.findall(r"\.(?:read_text|write_text)\([^\n]*", source.read_text(encoding="utf-8")):
            assert "encoding=" in call, f"{source}: {call}"


def test_error_of_a_locked_run_names_its_owner(run, ring):
    before = weights_file("a").read_bytes()
    with files.locked(ring):
        for options in (("--resume", "last"), ("--overwrite",), ()):
            code, _, err = run("train", "ring", "-n", 2, "--out", "a", *options)
            assert (code, "is in use by this process" in err) == (74, True)
    assert weights_file("a").read_bytes() == before
