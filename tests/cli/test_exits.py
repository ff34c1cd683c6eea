"""Exit codes of the command line, and files that it must not change."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pyro_vae import data, infer
from pyro_vae.cli import runs
from tests.support.runs import PAIR, weights_file


@pytest.mark.parametrize(
    ("arguments", "expected_code", "message"),
    [
        (("train", "mnits"), 2, "mnits"),
        (("train", "-n", "0"), 2, "-n"),
        (("train", "--hidden", "a"), 2, "--hidden"),
        (("train", "--device", "cuda:99"), 2, "--device"),
        (("train", "--likelihood", "bernoulli", "--binarize", "none"), 65, "binarize"),
        (("train", "ring", "--likelihood", "bernoulli"), 65, "points in the plane"),
        (("train", "ring", "--likelihood", "categorical"), 65, "points in the plane"),
        (("train", "--pair", "nowhere:make"), 65, "nowhere"),
        (("train", "--pair", "nowhere"), 2, "module:factory"),
        (("train", "frey-faces", "--data-dir", "nowhere"), 66, "frey_faces.npz"),
        (("sample", "nowhere"), 66, "no run at nowhere"),
        (("train", "--hidden", "0"), 2, "--hidden"),
        (("train", "--learning-rate", "-1"), 2, "--learning-rate"),
        (("train", "--learning-rate", "inf"), 2, "finite"),
        (("train", "--seed", "-1"), 2, "--seed"),
        (("train", "--device", "meta"), 2, "--device"),
        (("train", "--pair", "mine:make", "--latent-dim", "2"), 2, "leave out --latent-dim"),
        (("train", "--likelihood", "categorical", "--binarize", "stochastic"), 65, "grey levels"),
        (("train", "--learning-rate", "1e30"), 70, "--learning-rate"),
        (("train", "--out", "/dev/null/a"), 74, "Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_have_an_exit_code_and_a_message(run, arguments, expected_code, message):
    code, out, err = run(*arguments)
    assert (code, out) == (expected_code, "")
    assert message in err
    assert "Traceback" not in err


def test_overwrite_option_is_required_to_replace_a_run(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    before = weights_file("a").read_bytes()
    code, _, err = run("train", "-n", 1, "--out", "a", "--seed", 1)
    assert (code, "--overwrite" in err) == (2, True)
    assert weights_file("a").read_bytes() == before
    (tmp_path / "a" / "mine.txt").write_text("kept")
    assert run("train", "-n", 1, "--out", "a", "--seed", 1, "--overwrite")[0] == 0
    assert weights_file("a").read_bytes() != before
    assert (tmp_path / "a" / "mine.txt").read_text() == "kept"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("kept")
    assert run("train", "-n", 1, "--out", "b", "--overwrite")[0] == 2
    run("train", "-n", 1)
    run("train", "-n", 1)
    assert sorted(os.listdir("runs")) == ["digits", "digits-2"]


def test_damaged_and_newer_runs_have_exit_codes(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    weights, config = weights_file("a"), tmp_path / "a" / "config.json"
    content, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(content[: len(content) // 2])
    assert run("sample", "a")[0] == 65
    weights.write_bytes(content)
    config.write_text(text.replace('"latent_dim": 2', '"latent_dim": 3'))
    code, _, err = run("sample", "a")
    assert (code, "parameters of another pair" in err) == (65, True)
    config.write_text(text.replace('"schema": 2', '"schema": 99'))
    assert run("sample", "a")[0] == 78
    config.write_text("{")
    assert run("sample", "a")[0] == 65
    config.write_text(text)
    weights.unlink()
    assert run("sample", "a")[0] == 65
    shutil.rmtree(weights.parent)
    assert run("sample", "a")[0] == 66


def test_failed_start_leaves_files_unchanged(run, tmp_path):
    run("train", "ring", "-n", 1, "--out", "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert (
        run("train", "ring", "-n", 1, "--likelihood", "continuous-bernoulli", "--out", "a", "--overwrite")[0]
        == 65
    )
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()} == before
    assert run("train", "-n", 1, "--learning-rate", "1e30", "--out", "b")[0] == 70
    assert not (tmp_path / "b").exists()


def test_early_stopping_reports_the_elbo_of_the_saved_parameters(run, tmp_path):
    out = run("train", "-n", 60, "--learning-rate", 0.03, "--patience", 2, "--out", "a", "--json")[1]
    result = json.loads(out)
    assert result["num_epochs"] < 60
    test = data.load("digits")[1]
    with runs.open_run(tmp_path / "a").loaded() as pair:
        evaluated = infer.evaluate(pair.model, pair.guide, test, batch_size=500).mean()
    assert evaluated.elbo == pytest.approx(result["validation"]["elbo"], abs=1e-4)


def test_interrupted_early_stopping_saves_the_best_parameters(run, tmp_path, monkeypatch):
    epoch_line, elbos = runs._epoch_line, []

    def interrupt(epoch, num_particles):
        elbos.append(epoch.validation.elbo)
        if elbos[-1] < max(elbos):
            raise KeyboardInterrupt
        return epoch_line(epoch, num_particles)

    monkeypatch.setattr(runs, "_epoch_line", interrupt)
    assert run("train", "-n", 19, "--learning-rate", 0.03, "--patience", 9, "--out", "a")[0] == 130
    opened = runs.open_run(tmp_path / "a")
    assert opened.saved_epoch().epoch == len(opened.history()) - 1
    with opened.loaded() as pair:
        evaluated = infer.evaluate(pair.model, pair.guide, data.load("digits")[1], batch_size=500).mean()
    assert evaluated.elbo == pytest.approx(max(elbos), abs=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("make = 3", "TypeError"),
        ("def make(x): pass", "TypeError"),
        ("def make(): raise OSError('no disk')", "OSError: no disk"),
        ("def make(): return 3", "returned int"),
    ],
)
def test_errors_of_a_factory_are_reported(run, tmp_path, body, message, monkeypatch):
    name = f"pair_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    code, out, err = run("train", "--pair", f"{name}:make", "-n", 1)
    assert (code, out) == (65, "")
    assert message in err


def test_prints_of_a_factory_go_to_stderr(run, tmp_path):
    source = f"{PAIR}\nprint('hello')\ndef make():\n    import other\n    print('again')\n    return vae()\n"
    (tmp_path / "printing.py").write_text(source)
    (tmp_path / "other.py").write_text("")
    code, out, err = run("train", "--pair", "printing:make", "-n", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["num_epochs"] == 1
    assert "again" in err


@pytest.mark.slow
def test_closed_stdout_and_full_stderr_are_not_errors():
    script = f"{sys.executable} -m pyro_vae data | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", script], capture_output=True).returncode == 0
    command = [sys.executable, "-m", "pyro_vae", "train", "-n", "1"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full).returncode == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[1]"),
        ("config.json", '{"schema": 2}'),
        ("config.json", "\udcff"),
        ("metrics.jsonl", "3"),
        ("metrics.jsonl", "{}"),
        ("metrics.jsonl", '{"epoch": 1, "be'),
        ("metrics.jsonl", ""),
        *[
            ("config.json", assignment)
            for assignment in ("event_shape=null", "prior=zzz", "guide=null", "dtype=zzz", "latent_dim=2.5")
        ],
    ],
)
def test_invalid_text_files_are_errors(run, tmp_path, name, text):
    """``text`` is the content of the file, or the assignment of a field."""
    run("train", "-n", 1, "--out", "a")
    file = tmp_path / "a" / name
    key, separator, value = text.partition("=")
    if separator:
        config = json.loads(file.read_text())
        config[key] = None if value == "null" else float(value) if value[0].isdigit() else value
        text = json.dumps(config)
    file.write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = run("plot", "a")
    assert code == 65, err
    assert "Traceback" not in err


def test_overwrite_deletes_only_files_of_pyro_vae(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    run("sample", "a")
    (tmp_path / "od").mkdir()
    (tmp_path / "od" / "precious.txt").write_text("hi")
    assert run("sample", "a", "--out", "od")[0] == 2
    assert run("sample", "a", "--out", "od", "--overwrite")[0] == 2
    assert os.listdir("od") == ["precious.txt"]
    run("train", "-n", 1, "--out", "a", "--overwrite")
    assert not (tmp_path / "a" / "samples").exists()  # sampled from the replaced parameters


def test_help_does_not_import_torch():
    imports = "import sys; from pyro_vae.cli import app"
    program = f"{imports}\ntry: app.main()\nfinally: assert not {{'torch', 'pyro'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reconstruct" in done.stdout


def test_python_m_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vae", "train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout
