"""The command line: what it leaves, what it prints, how it exits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from pyro_vae import build, cli, data, infer, runs


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    if folder := os.environ.get("PYRO_VAE_DATA"):
        monkeypatch.setenv("PYRO_VAE_DATA", os.path.abspath(folder))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(monkeypatch, capfd):
    """``pyro-vae`` in this process: exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pyro-vae", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return call


def weights_file(run):
    (file,) = Path(run, "weights").glob("*.safetensors")
    return file


def weights_of(run):
    return {name.removeprefix("weights."): tensor for name, tensor in load_file(weights_file(run)).items()}


def test_train_leaves_a_whole_run_folder(run, tmp_path):
    code, out, err = run("train", "-n", 2, "--json")
    assert code == 0, err
    result = json.loads(out)
    folder = tmp_path / result["run"]
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "weights",
        "checkpoints",
        "plots",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["dataset"], config["num_epochs"], config["latent_dim"], config["event_shape"]) == ("digits", 2, 2, [8, 8])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for side in ("train", "validation"):
        mean = lines[-1][side]
        assert mean["elbo"] == pytest.approx(mean["reconstruction"] - mean["kl"], rel=1e-4)
    assert result["validation"] == lines[-1]["validation"]
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())
    pictures = {file.stem: imread(file) for file in (folder / "plots").iterdir()}
    assert pictures.keys() == {"curve", "reconstructions", "samples", "latent", "manifold"}
    assert all(picture[..., :3].std() > 0.02 for picture in pictures.values())  # none is blank
    assert "epoch    2" in err
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_sample_reconstruct_and_plot_go_by_the_weights(run):
    run("train", "-n", 1, "--out", "a")
    code, out, _ = run("sample", "a", "-n", 7, "--seed", 3)
    assert code == 0
    assert out.split() == ["a/samples/samples.npy", "a/samples/samples.png"]
    first = np.load("a/samples/samples.npy")
    assert first.shape == (7, 8, 8)
    assert run("sample", "a", "-n", 7, "--seed", 3)[1].split()[0] == "a/samples-2/samples.npy"
    assert np.array_equal(first, np.load("a/samples-2/samples.npy"))
    run("reconstruct", "a", "-n", 5, "--out", "r")
    x, y = np.load("r/x.npy"), np.load("r/reconstructions.npy")
    assert np.array_equal(x, data.load("digits")[1].x[:5].numpy())
    assert y.shape == x.shape
    assert 0 < y.min() < y.max() < 1
    assert run("plot", "a", "--json")[0] == 0
    assert os.path.isdir("a/plots-2")


def test_the_same_seed_gives_the_same_run_and_another_another(run):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("train", "-n", 2, "--out", out, "--seed", seed)
    a, b, c = map(weights_of, "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "words",
    [
        ("--likelihood", "bernoulli", "--guide", "full", "--prior", "mixture", "--hidden", "20,10"),
        ("--likelihood", "categorical", "--guide", "low-rank", "--prior", "vamp", "--latent-dim", 3, "--dtype", "float64"),
        ("--likelihood", "normal", "--guide", "laplace", "--prior", "normal", "--num-particles", 3, "--warm-up", 2),
        ("--likelihood", "student-t", "--guide", "student-t", "--beta", 0.5, "--patience", 1, "-b", 500),
        ("--likelihood", "laplace", "--binarize", "threshold"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_options(run, words):
    code, _, err = run("train", "-n", 1, "--out", "a", *words)
    assert code == 0, err
    assert run("sample", "a", "-n", 3)[0] == 0
    assert run("plot", "a")[0] == 0


def test_the_ring_and_the_other_data_sets(run, data_dir):
    assert run("train", "ring", "-n", 1)[0] == 0
    assert os.path.isfile("runs/ring/plots/samples.png")
    code, out, _ = run("data", "frey-faces", "--json")
    assert code == 0
    assert json.loads(out)["shape"] == [28, 20]
    assert {line.split()[0] for line in run("data")[1].splitlines()} == set(data.SOURCES)


def test_compare(run, tmp_path):
    code, out, err = run("compare", "factor-analysis", "--guide", "normal,full", "-n", 15, "--num-data", 5, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert list(result) == ["full", "normal"]  # ranked
    gap, _ = result["normal"]["gap KL(q||p)"]
    elbo, evidence = (result["normal"][key][0] for key in ("ELBO", "log evidence"))
    assert gap == pytest.approx(evidence - elbo, abs=1e-4)
    folder = tmp_path / "runs" / "compare-factor-analysis"
    assert {file.name for file in folder.iterdir()} == {"comparison.json", "comparison.txt", "guides.png"}
    assert imread(folder / "guides.png")[..., :3].std() > 0.02
    assert "factor-analysis" in run("compare", "--list")[1]
    assert run("compare", "nothing")[0] == 2
    assert run("compare", "banana", "--guide", "nothing")[0] == 2


@pytest.mark.parametrize("name", ["normal-normal", "regression", "two-modes", "relu", "funnel", "banana", "state-space"])
def test_every_model_of_the_list_is_compared(run, name):
    code, _, err = run("compare", name, "--guide", "normal", "-n", 1, "--num-data", 3)
    assert code == 0, err


PAIR = """
import pyro, pyro.distributions as dist, torch
import pyro_vae as pv
from pyro_vae import conditionals, nets, priors

encoder = torch.nn.Sequential(torch.nn.Linear(64, 2))

def model(x):
    scale = pyro.param("scale", torch.ones(64), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale).to_event(1), obs=x.flatten(1))

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x.flatten(1)), 1.0).to_event(1))

def functions():
    return model, guide

def vae():
    return pv.VAE(
        priors.StandardNormal(3),
        conditionals.Normal(nets.ConvDecoder(3, (8, 8), (8,)), event_shape=(8, 8)),
        conditionals.Normal(nets.ConvEncoder((8, 8), (8,)), event_shape=3),
    )
"""


def test_a_pair_of_ones_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(PAIR)
    assert run("train", "--pair", "mine:functions", "-n", 2, "--out", "f")[0] == 0
    weights = weights_of("f")
    assert weights.keys() == {"store.scale", "store.encoder$$$0.weight", "store.encoder$$$0.bias"}
    assert not torch.equal(weights["store.scale"], torch.zeros(64))  # unconstrained, log 1 at the start
    assert run("plot", "f")[0] == 0
    code, _, err = run("sample", "f")
    assert (code, "two programs of your own" in err) == (65, True)
    assert run("train", "--pair", "mine:vae", "-n", 1, "--out", "v")[0] == 0
    assert run("sample", "v", "-n", 4)[0] == 0


def test_loaded_weights_are_the_trained_ones(run, tmp_path):
    (tmp_path / "mine.py").write_text(PAIR)
    run("train", "--pair", "mine:functions", "-n", 1, "--out", "f")
    import mine

    with torch.no_grad():
        mine.encoder[0].weight.zero_()
    with runs.open_run(tmp_path / "f").loaded(torch.zeros(2, 8, 8)) as pair:
        assert pair.model is mine.model
        assert torch.equal(mine.encoder[0].weight, weights_of("f")["store.encoder$$$0.weight"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "mnits"), 2, "mnits"),
        (("train", "-n", "0"), 2, "-n"),
        (("train", "--hidden", "a"), 2, "--hidden"),
        (("train", "--device", "cuda:99"), 2, "--device"),
        (("train", "--likelihood", "bernoulli", "--binarize", "none"), 65, "binarize"),
        (("train", "ring", "--likelihood", "bernoulli"), 65, "cannot be binarized"),
        (("train", "ring", "--likelihood", "categorical"), 65, "grey levels"),
        (("train", "--pair", "nowhere:make"), 65, "nowhere"),
        (("train", "--pair", "nowhere"), 2, "module:factory"),
        (("train", "frey-faces", "--data-dir", "nowhere"), 66, "frey_faces.npz"),
        (("sample", "nowhere"), 66, "no run at nowhere"),
        (("train", "--hidden", "0"), 2, "--hidden"),
        (("train", "--learning-rate", "-1"), 2, "--learning-rate"),
        (("train", "--learning-rate", "inf"), 2, "finite"),
        (("train", "--seed", "-1"), 2, "--seed"),
        (("train", "--device", "meta"), 2, "--device"),
        (("train", "--pair", "mine:make", "--latent-dim", "2"), 2, "--latent-dim would have no effect"),
        (("train", "--likelihood", "categorical", "--binarize", "stochastic"), 65, "binarized"),
        (("train", "--learning-rate", "1e30"), 70, "learning rate"),
        (("train", "--out", "/dev/null/a"), 74, "Not a directory"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_exit_codes(run, words, code, message):
    got, out, err = run(*words)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_nothing_is_overwritten_unasked(run, tmp_path):
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


def test_damaged_and_newer_runs(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    weights, config = weights_file("a"), tmp_path / "a" / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    assert run("sample", "a")[0] == 65
    weights.write_bytes(whole)
    config.write_text(text.replace('"latent_dim": 2', '"latent_dim": 3'))
    code, _, err = run("sample", "a")
    assert (code, "weights of another pair" in err) == (65, True)
    config.write_text(text.replace('"schema": 2', '"schema": 99'))
    assert run("sample", "a")[0] == 78
    config.write_text("{")
    assert run("sample", "a")[0] == 65
    config.write_text(text)
    weights.unlink()
    assert run("sample", "a")[0] == 65
    shutil.rmtree(weights.parent)
    assert run("sample", "a")[0] == 66


def test_a_start_that_fails_replaces_nothing(run, tmp_path):
    run("train", "ring", "-n", 1, "--out", "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert run("train", "ring", "-n", 1, "--likelihood", "continuous-bernoulli", "--out", "a", "--overwrite")[0] == 65
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()} == before
    assert run("train", "-n", 1, "--learning-rate", "1e30", "--out", "b")[0] == 70
    assert not (tmp_path / "b").exists()


def test_early_stopping_reports_the_weights_that_it_keeps(run, tmp_path):
    out = run("train", "-n", 60, "--learning-rate", 0.03, "--patience", 2, "--out", "a", "--json")[1]
    result = json.loads(out)
    assert result["num_epochs"] < 60
    test = data.load("digits")[1]
    with runs.open_run(tmp_path / "a").loaded() as pair:
        again = infer.evaluate(pair.model, pair.guide, test, batch_size=500).mean()
    assert again.elbo == pytest.approx(result["validation"]["elbo"], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("make = 3", "TypeError"),
        ("def make(x): pass", "TypeError"),
        ("def make(): raise OSError('no disk')", "OSError: no disk"),
        ("def make(): return 3", "made a int"),
    ],
)
def test_whatever_a_factory_does_is_told(run, tmp_path, body, message, monkeypatch):
    name = f"pair_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    code, out, err = run("train", "--pair", f"{name}:make", "-n", 1)
    assert (code, out) == (65, "")
    assert message in err


def test_stdout_holds_the_result_alone_whatever_a_factory_prints(run, tmp_path):
    talker = f"{PAIR}\nprint('hello')\ndef make():\n    import other\n    print('again')\n    return vae()\n"
    (tmp_path / "talker.py").write_text(talker)
    (tmp_path / "other.py").write_text("")
    code, out, err = run("train", "--pair", "talker:make", "-n", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["num_epochs"] == 1
    assert "again" in err


def test_a_reader_that_leaves_is_no_error():
    words = f"{sys.executable} -m pyro_vae data | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", words], capture_output=True).returncode == 0
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-m", "pyro_vae", "train", "-n", "1"], stderr=full).returncode == 0


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
        *[("config.json", change) for change in ("event_shape=null", "prior=zzz", "guide=null", "dtype=zzz", "latent_dim=2.5")],
    ],
)
def test_damaged_texts(run, tmp_path, name, text):
    run("train", "-n", 1, "--out", "a")
    file = tmp_path / "a" / name
    key, found, value = text.partition("=")
    if found:
        config = json.loads(file.read_text())
        config[key] = None if value == "null" else float(value) if value[0].isdigit() else value
        text = json.dumps(config)
    file.write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = run("plot", "a")
    assert code == 65, err
    assert "Traceback" not in err


def test_overwrite_takes_only_what_is_ours(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    run("sample", "a")
    (tmp_path / "od").mkdir()
    (tmp_path / "od" / "precious.txt").write_text("hi")
    assert run("sample", "a", "--out", "od")[0] == 2
    code, out, _ = run("sample", "a", "--out", "od", "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["files"] == ["od/samples.npy", "od/samples.png"]
    run("train", "-n", 1, "--out", "a", "--overwrite")
    assert not (tmp_path / "a" / "samples").exists()  # of the weights that are gone


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from pyro_vae import cli\ntry: cli.main()\nfinally: assert not {'torch', 'pyro'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reconstruct" in done.stdout


def test_module_and_script_are_the_same():
    done = subprocess.run([sys.executable, "-m", "pyro_vae", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--learning-rate" in done.stdout


def test_a_run_goes_on(run, tmp_path):
    """By --resume alone, to where it was to go and beyond; what would make it another run is refused."""
    assert run("train", "ring", "-n", 4, "--out", "whole", "--seed", 3)[0] == 0
    assert run("train", "ring", "-n", 2, "--out", "a", "--seed", 3)[0] == 0
    code, _, err = run("train", "--out", "a", "--resume", "last", "--latent-dim", 3)
    assert (code, "--latent-dim is 3 but the run at a was begun with 2" in err) == (78, True)
    assert run("train", "--out", "a", "--resume", "last", "-n", 4)[0] == 0
    assert weights_file("a").read_bytes() == weights_file("whole").read_bytes()
    ours, theirs = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("a", "whole"))
    assert [json.loads(line)["train"] for line in ours] == [json.loads(line)["train"] for line in theirs]
    assert json.loads(Path("a", "config.json").read_text())["num_epochs"] == 4
    assert run("train", "ring", "-n", 1, "--out", "new", "--resume", "last")[0] == 0  # a job that restarts itself
    assert run("train", "--resume", "last")[0] == 2
    Path("mine").mkdir()
    Path("mine", "notes.txt").write_text("kept")
    assert run("train", "ring", "-n", 1, "--out", "mine", "--resume", "last")[0] == 2
    assert os.listdir("mine") == ["notes.txt"]
    assert run("train", "ring", "--out", "a", "--resume", "nowhere")[0] == 66


def test_the_words_of_the_command_line_are_the_registries():
    assert set(get_args(cli.Likelihood)) == build.LIKELIHOODS.keys()
    assert set(get_args(cli.Guide)) == build.GUIDES.keys()
    assert set(get_args(cli.Prior)) == build.PRIORS.keys()
    assert set(get_args(cli.Dataset)) == build.DEFAULTS.keys() == set(get_args(data.Name)) == data.SOURCES.keys()
    assert get_args(cli.Binarize) == get_args(data.Binarize)
