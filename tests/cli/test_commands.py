"""Files and output of the commands."""

import html
import json
import os
import re
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pyro_vae.cli import app, build, runs
from pyro_vae.cli.defaults import DEFAULTS
from pyro_vae.data import datasets
from pyro_vae.data.batches import as_batch
from tests.support import pages
from tests.support.runs import PAIR, weights_file, weights_of


def test_train_writes_a_run_folder(run, tmp_path):
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
        "report.html",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["dataset"], config["num_epochs"], config["latent_dim"], config["event_shape"]) == (
        "digits",
        2,
        2,
        [8, 8],
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for part in ("train", "validation"):
        mean = lines[-1][part]
        assert mean["elbo"] == pytest.approx(mean["reconstruction"] - mean["kl"], rel=1e-4)
    assert result["validation"] == lines[-1]["validation"]
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(folder).values())
    assert (folder / "plots" / "latent_map.html").is_file()
    pictures = {file.stem: imread(file) for file in (folder / "plots").glob("*.png")}
    assert pictures.keys() == {"curve", "reconstructions", "samples", "latent", "manifold"}
    assert all(picture[..., :3].std() > 0.02 for picture in pictures.values())  # not blank
    assert "epoch    2" in err
    environment = json.loads((folder / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_sample_reconstruct_and_plot_write_arrays_and_pictures(run):
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
    assert np.array_equal(x, datasets.load("digits")[1].x[:5].numpy())
    assert y.shape == x.shape
    assert 0 < y.min() < y.max() < 1
    assert run("plot", "a", "--json")[0] == 0
    assert os.path.isdir("a/plots-2")


def test_report_has_all_pictures_and_texts_escaped(run, tmp_path):
    run("train", "-n", 1, "--out", "a&b")
    run("sample", "a&b", "-n", 4)
    run("evaluate", "a&b", "--estimator", "elbo", "--num-particles", 2, "--data", "test[:20]")
    run("plot", "a&b")
    folder = tmp_path / "a&b"
    page = (folder / "report.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert sorted(shown) == sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    (elbo,) = json.loads((folder / "evaluation" / "evaluation.json").read_text()).values()
    assert f"<td>{elbo['log_evidence']:.3f} ± {elbo['mean_se']:.3f}</td>" in page
    assert elbo["method"] in html.unescape(page)
    assert "<h1>a&amp;b</h1>" in page
    for file in folder.rglob("*.*"):
        if "checkpoints" not in file.parts and "weights" not in file.parts and not file.name.startswith("."):
            assert f'href="{quote(str(file.relative_to(folder)))}"' in page or file.name == "report.html"
    pages.check(page)
    assert run("train", "-n", 1, "--out", "a&b", "--overwrite")[0] == 0
    assert "evaluation" not in (folder / "report.html").read_text()


def test_failed_report_is_a_warning(run, tmp_path):
    run("train", "-n", 1, "--out", "a")
    (tmp_path / "a" / "samples_mine").mkdir()
    (tmp_path / "a" / "samples_mine" / "note.txt").write_text("mine")
    (tmp_path / "a" / "plots" / "folder.txt").mkdir()
    (tmp_path / "a" / "plots" / "note.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a" / "plots" / "a#b.png").write_bytes(b"")
    assert run("sample", "a")[0] == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert 'src="plots/a%23b.png"' in page
    assert "mine" not in page
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    code, out, err = run("sample", "a", "--json")
    assert (code, "report.html was not written" in err) == (0, True)
    assert json.loads(out)["files"]


def test_train_starts_in_a_folder_with_the_temporary_file_of_a_crash(run, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".config.json.bak").write_text("mine")
    assert run("train", "-n", 1, "--out", "a", "--resume", "last")[0] == 2
    (tmp_path / "a" / ".config.json.bak").rename(tmp_path / "a" / ".config.json.a_3k9xyz")
    assert run("train", "-n", 1, "--out", "a", "--resume", "last")[0] == 0


def test_parameters_depend_on_the_seed_only(run):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("train", "-n", 2, "--out", out, "--seed", seed)
    a, b, c = map(weights_of, "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        ("--likelihood", "bernoulli", "--guide", "full", "--prior", "mixture", "--hidden", "20,10"),
        (
            "--likelihood",
            "categorical",
            "--guide",
            "low-rank",
            "--prior",
            "vamp",
            "--latent-dim",
            3,
            "--dtype",
            "float64",
        ),
        (
            "--likelihood",
            "normal",
            "--guide",
            "laplace",
            "--prior",
            "normal",
            "--num-particles",
            3,
            "--warm-up",
            2,
        ),
        ("--likelihood", "student-t", "--guide", "student-t", "--beta", 0.5, "--patience", 1, "-b", 500),
        ("--likelihood", "laplace", "--binarize", "threshold"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_run_with_options_is_sampled_and_plotted(run, options):
    code, _, err = run("train", "-n", 1, "--out", "a", *options)
    assert code == 0, err
    assert run("sample", "a", "-n", 3)[0] == 0
    assert run("plot", "a")[0] == 0


def test_data_lists_and_loads_data_sets(run, data_dir):
    assert run("train", "ring", "-n", 1)[0] == 0
    assert os.path.isfile("runs/ring/plots/samples.png")
    code, out, _ = run("data", "frey-faces", "--json")
    assert code == 0
    assert json.loads(out)["shape"] == [28, 20]
    assert {line.split()[0] for line in run("data")[1].splitlines()} == set(datasets.SOURCES)


def test_compare_ranks_guides_by_their_gap(run, tmp_path):
    code, out, err = run(
        "compare", "factor-analysis", "--guide", "normal,full", "-n", 15, "--num-data", 5, "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert list(result) == ["full", "normal"]  # ranked
    gap, _ = result["normal"]["gap KL(q||p)"]
    elbo, evidence = (result["normal"][key][0] for key in ("ELBO", "log evidence"))
    assert gap == pytest.approx(evidence - elbo, abs=1e-4)
    folder = tmp_path / "runs" / "compare-factor-analysis"
    assert {file.name for file in folder.iterdir()} == {
        "comparison.json", "comparison.txt", "guides.png", ".written.json",
    }  # fmt: skip
    assert imread(folder / "guides.png")[..., :3].std() > 0.02
    assert "factor-analysis" in run("compare", "--list")[1]
    assert run("compare", "nothing")[0] == 2
    assert run("compare", "banana", "--guide", "nothing")[0] == 2


@pytest.mark.parametrize(
    "name",
    [
        "normal-normal",
        "banana",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("regression", "two-modes", "relu", "funnel")),
        pytest.param("state-space", marks=pytest.mark.slow),
    ],
)
def test_compare_runs_on_each_model(run, name):
    code, _, err = run("compare", name, "--guide", "normal", "-n", 1, "--num-data", 3)
    assert code == 0, err


def test_pair_option_trains_functions_and_a_vae(run, tmp_path):
    (tmp_path / "mine.py").write_text(PAIR)
    assert run("train", "--pair", "mine:functions", "-n", 2, "--out", "f")[0] == 0
    weights = weights_of("f")
    assert weights.keys() == {"store.scale", "store.encoder$$$0.weight", "store.encoder$$$0.bias"}
    assert not torch.equal(weights["store.scale"], torch.zeros(64))  # unconstrained: initially log 1
    assert run("plot", "f", "--pair", "mine:functions")[0] == 0
    code, _, err = run("sample", "f", "--pair", "mine:functions")
    assert (code, "model and a guide of your own" in err) == (65, True)
    assert run("train", "--pair", "mine:vae", "-n", 1, "--out", "v")[0] == 0
    assert run("sample", "v", "-n", 4, "--pair", "mine:vae")[0] == 0


def test_loaded_parameters_are_the_trained_ones(run, tmp_path):
    (tmp_path / "mine.py").write_text(PAIR)
    run("train", "--pair", "mine:functions", "-n", 1, "--out", "f")
    import mine

    with torch.no_grad():
        mine.encoder[0].weight.zero_()
    with runs.open_run(tmp_path / "f", "mine:functions").loaded(as_batch(torch.zeros(2, 8, 8))) as pair:
        assert pair.model is mine.model
        assert torch.equal(mine.encoder[0].weight, weights_of("f")["store.encoder$$$0.weight"])


def test_resumed_run_equals_an_uninterrupted_run(run, tmp_path):
    """Also with a larger --num-epochs. Other changed options are refused."""
    assert run("train", "ring", "-n", 4, "--out", "whole", "--seed", 3)[0] == 0
    assert run("train", "ring", "-n", 2, "--out", "a", "--seed", 3)[0] == 0
    code, _, err = run("train", "--out", "a", "--resume", "last", "--latent-dim", 3)
    assert (code, "--latent-dim is 3 but the run at a has 2" in err) == (78, True)
    assert run("train", "--out", "a", "--resume", "last", "-n", 4)[0] == 0
    assert weights_file("a").read_bytes() == weights_file("whole").read_bytes()
    resumed, whole = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("a", "whole"))
    assert [json.loads(line)["train"] for line in resumed] == [json.loads(line)["train"] for line in whole]
    assert json.loads(Path("a", "config.json").read_text())["num_epochs"] == 4
    # without a run at --out, --resume starts one
    assert run("train", "ring", "-n", 1, "--out", "new", "--resume", "last")[0] == 0
    assert run("train", "--resume", "last")[0] == 2
    Path("mine").mkdir()
    Path("mine", "notes.txt").write_text("kept")
    assert run("train", "ring", "-n", 1, "--out", "mine", "--resume", "last")[0] == 2
    assert os.listdir("mine") == ["notes.txt"]
    assert run("train", "ring", "--out", "a", "--resume", "nowhere")[0] == 66


def test_choices_of_the_options_are_the_keys_of_the_registries():
    assert set(get_args(app.Likelihood)) == build.LIKELIHOODS.keys()
    assert set(get_args(app.Guide)) == build.GUIDES.keys()
    assert set(get_args(app.Prior)) == build.PRIORS.keys()
    assert (
        set(get_args(app.Dataset))
        == DEFAULTS.keys()
        == set(get_args(datasets.Name))
        == datasets.SOURCES.keys()
    )
    assert get_args(app.Binarize) == get_args(datasets.Binarize)
