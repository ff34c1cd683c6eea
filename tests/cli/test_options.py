"""Options, progress, warnings and errors of the command line."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pytest
import torch

import pyro_vae
import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.cli import app, build, options, output, runs
from pyro_vae.cli.build import Pair
from pyro_vae.cli.defaults import DEFAULTS
from pyro_vae.infer.step import GraphStep
from tests.support.runs import PAIR
from tests.support.steps import vae


def last_lines(err):
    """The path of the report, if any, and the next command, if any, from the last lines of stderr."""
    lines = err.strip().splitlines()
    if not lines[-1].startswith("next: pyro-vae "):
        return lines[-1].removeprefix("report: "), None
    pages = [line.removeprefix("report: ") for line in lines[-2:-1] if line.startswith("report: ")]
    return pages[0] if pages else None, shlex.split(lines[-1].removeprefix("next: pyro-vae "))


def test_commands_end_with_the_report_and_a_valid_next_command(run):
    code, out, err = run("train", "ring", "-n", 1, "--out", "a b", "--json")
    assert code == 0, err
    json.loads(out)
    report, following = last_lines(err)
    verbs = []
    while following:
        assert report == "a b/report.html"
        assert Path(report).is_file()
        verbs.append(following[0])
        small = {
            "evaluate": ["--num-particles", 2],
            "diagnose": ["--num-particles", 20, "--num-simulations", 0],
        }
        code, out, err = run(*following, *small.get(following[0], []), "--json")
        assert code == 0, err
        json.loads(out)  # stdout has nothing else
        report, following = last_lines(err)
    assert verbs == ["evaluate", "diagnose", "sample", "reconstruct"]  # each once
    for command in (
        ("sample", "a b", "-n", 3),
        ("plot", "a b"),
        ("data", "ring"),
        ("data",),
        ("compare", "--list"),
    ):
        code, out, err = run(*command, "--json")
        assert code == 0, err
        json.loads(out)
        last_lines(err)


def test_next_command_repeats_pair_and_data_dir(run, tmp_path):
    (tmp_path / "mine.py").write_text(PAIR)
    _, _, err = run("train", "--pair", "mine:functions", "-n", 1, "--out", "f", "--data-dir", tmp_path)
    assert last_lines(err)[1] == ["evaluate", "f", "--pair", "mine:functions", "--data-dir", str(tmp_path)]
    run("train", "-n", 1, "--out", "v")
    assert "or --resume last to train it further" in run("train", "-n", 1, "--out", "v")[2]
    for verb, following in (("sample", "evaluate"), ("evaluate", "diagnose"), ("reconstruct", "diagnose")):
        small = ("--num-particles", 2) if verb == "evaluate" else ("-n", 2)
        words = last_lines(run(verb, "v", "--data-dir", tmp_path, *small)[2])[1]
        assert words == [following, "v", "--data-dir", str(tmp_path)]


@pytest.mark.parametrize("broken", ["plot_latent", "plot_reconstructions", "plot_history"])
def test_failed_picture_is_a_warning(run, monkeypatch, broken):
    def fail(*_, **__):
        plots.plt.figure()
        raise RuntimeError("no ink\nand more")

    monkeypatch.setattr(plots, broken, fail)
    before = plots.plt.get_fignums()
    code, out, err = run("train", "-n", 1, "--out", "a", "--json")
    assert code == 0, err
    assert json.loads(out)["num_epochs"] == 1
    name = {"plot_latent": "latent", "plot_reconstructions": "reconstructions", "plot_history": "curve"}[
        broken
    ]
    assert f"warning: the picture a/plots/{name}.png could not be drawn (RuntimeError: no ink)" in err
    left = {file.stem for file in Path("a/plots").glob("*.png")}
    assert left == {"curve", "reconstructions", "samples", "latent", "manifold"} - {name}
    assert Path("a/report.html").is_file()
    assert plots.plt.get_fignums() == before


def test_latent_plot_of_a_guide_without_mean_has_draws(run):
    code, _, err = run("train", "ring", "--guide", "flow", "-n", 1, "--out", "a")
    assert code == 0, err
    with runs.open_run(Path("a")).loaded() as pair:
        torch.manual_seed(0)
        ax = plots.plot_latent(pair.vae, torch.zeros(50, 2))
        assert ax.get_title() == "Draws of q(z|x), held-out data"
        assert ax.collections[0].get_offsets().std() > 0  # means of equal data would be equal
        plots.plt.close(ax.figure)


def interrupted(command, file, number=signal.SIGINT):
    """Run a command in a process, and send it a signal once ``file`` exists. Returns exit code and stderr."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from pyro_vae.cli.app import main; main()",
            *map(str, command),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if Path(file).exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_training_prints_a_valid_resume_command(run, number):
    code, err = interrupted(("train", "-n", 300, "--out", "a b", "--seed", 3), "a b/metrics.jsonl", number)
    assert code == 128 + number
    assert "Traceback" not in err
    assert re.search(r"^interrupted: a b has a checkpoint after step \d+; resume with$", err, re.MULTILINE)
    command = shlex.split(err.strip().splitlines()[-1])
    assert command == ["pyro-vae", "train", "--out", "a b", "--resume", "last"]
    _, _, err = run("sample", "a b", "-n", 3)
    assert "a b is not finished: the parameters are those of epoch" in err
    num_epochs = len(Path("a b/metrics.jsonl").read_text().splitlines())
    code, _, err = run(*command[1:], "-n", num_epochs + 1)
    assert code == 0, err
    assert len(Path("a b/metrics.jsonl").read_text().splitlines()) == num_epochs + 1


def test_interruption_before_the_first_checkpoint_saves_nothing(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupt)
    code, _, err = run("train", "-n", 3, "--out", "a b")
    assert code == 130
    assert err.endswith(
        "interrupted: nothing was saved; start again with\n  pyro-vae train -n 3 --out 'a b'\n"
    )
    assert not Path("a b").exists()


def test_run_interrupted_in_its_first_epoch_prints_the_resume_command(run, monkeypatch):
    save = runs._RunCheckpoints.save

    def save_and_interrupt(self, steps, content, *, score):
        save(self, steps, content, score=score)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs._RunCheckpoints, "save", save_and_interrupt)
        assert run("train", "ring", "-n", 3, "--every", 2, "--out", "a")[0] == 130
    code, _, err = run("sample", "a")
    assert code == 66
    assert "pyro-vae train --out a --resume last" in err
    assert "nothing stored" not in err


def test_interrupted_evaluation_prints_the_same_command(run, monkeypatch):
    from pyro_vae.cli import ladder

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    run("train", "ring", "-n", 1, "--out", "a")
    monkeypatch.setattr(ladder, "compute", interrupt)
    code, _, err = run("evaluate", "a", "--num-particles", 5)
    assert code == 130
    assert err.endswith(
        "interrupted: nothing was saved; resume with the same command\n"
        "  pyro-vae evaluate a --num-particles 5\n"
    )


def test_help_has_the_defaults_of_each_data_set(run):
    code, out, _ = run("train", "--help")
    assert code == 0
    text = " ".join(out.split()).replace("- ", "-")
    for key in DEFAULTS["digits"]:
        assert options.default_text(key) in text, key
    assert "200 for digits, frey-faces, ring; 15 for mnist, fashion-mnist" in options.default_text(
        "num_epochs"
    )
    assert options.default_text("guide") == "[default: normal]"


def test_version_option_prints_the_version(run):
    code, out, err = run("--version")
    assert (code, out, err) == (0, f"pyro-vae {pyro_vae.__version__}\n", "")


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        (("train", "--guide", "fulll"), "'full'"),
        (("train", "--prior", "vampp"), "'vamp'"),
        (("train", "--likelihood", "bernouli"), "'bernoulli'"),
        (("train", "--binarize", "treshold"), "'threshold'"),
        (("train", "mnits"), "'mnist'"),
        (("data", "digit"), "'digits'"),
        (("compare", "bananna"), "'banana'"),
        (("compare", "banana", "--guide", "normal,splin"), "'spline'"),
        (("evaluate", "a", "--estimator", "elbo,importanc"), "'importance'"),
    ],
)
def test_error_of_a_misspelled_choice_suggests_the_closest(run, given, suggested):
    code, out, err = run(*given)
    assert (code, out) == (2, "")
    assert f"did you mean {suggested}?" in err


def test_too_few_simulations_are_an_error(run):
    code, _, err = run("diagnose", "a", "--num-simulations", 50)
    assert (code, "--num-simulations: expected 100 or more, or 0" in err) == (2, True)


def test_result_of_evaluate_has_estimators_as_keys(run):
    run("train", "ring", "-n", 1, "--out", "a")
    _, out, _ = run(
        "evaluate",
        "a",
        "--estimator",
        "importance,elbo,bdmc",
        "--num-particles",
        20,
        "--num-temperatures",
        3,
        "--num-chains",
        2,
        "--data",
        "test[:4]",
        "--json",
    )
    result = json.loads(out)
    assert list(result) == ["importance-10", "importance-20", "elbo", "bdmc-below", "bdmc-above"]
    assert result["importance-20"]["num_particles"] == 20
    assert result == json.loads(Path("a/evaluation/evaluation.json").read_text())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("try a smaller batch_size or num_particles", "try a smaller --batch-size or --num-particles"),
        ('pass resume="last" to go on', "pass --resume last to go on"),
        ("expected beta=1 with sites", "expected --beta 1 with sites"),
        ("clip_norm=0.5; data_dir or PYRO_VAE_DATA", "--clip-norm 0.5; --data-dir or PYRO_VAE_DATA"),
        ("fit: expected num_epochs=3 or more", "fit: expected --num-epochs 3 or more"),
        ("the prior of a guide, data and seed", "the prior of a guide, data and seed"),
        ("/tmp/batch_size/x and --batch-size 3", "/tmp/batch_size/x and --batch-size 3"),
        ("a/config.json: latent_dim is 2.5", "a/config.json: latent_dim is 2.5"),
        (
            "Lower the learning rate, raise min_scale, or check the data",
            "Lower --learning-rate, or check the data",
        ),
        ("batch_sizes and my_data_dir", "batch_sizes and my_data_dir"),
    ],
)
def test_arguments_in_error_texts_become_options(message, expected):
    assert options.with_option_names(message, app._option_arguments()) == expected


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (("--likelihood", "bernoulli", "--binarize", "none"), "--likelihood continuous-bernoulli"),
        (("--likelihood", "categorical", "--binarize", "threshold"), "--likelihood bernoulli"),
        (("mnist", "--data-dir", "nowhere"), "--data-dir"),
        (("--learning-rate", "1e30"), "--learning-rate"),
    ],
)
def test_errors_of_the_command_line_name_its_options(run, monkeypatch, given, remedy):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: 1 / 0)
    code, _, err = run("train", *given)
    assert code in (65, 66, 70)
    assert remedy in err.splitlines()[-1]
    assert not re.search(r"\w=|load\(|data_dir|min_scale", err.splitlines()[-1])


def test_small_products_run_on_one_thread_unless_a_number_is_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def num_threads(given, largest=None):
        with options.threads(given, largest):
            return torch.get_num_threads()

    try:
        assert num_threads(3, 1) == num_threads(3) == 3
        assert num_threads(None, options.SMALL_PRODUCT) == 1
        assert num_threads(None, options.SMALL_PRODUCT + 1) == num_threads(None) == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert num_threads(None, 1) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_largest_product_requires_linear_layers():
    linear, convolution = torch.nn.Linear(7, 5), torch.nn.Conv2d(1, 4, 3)
    assert options.largest_product(Pair(linear, torch.nn.Linear(3, 2)), 10) == 350
    assert options.largest_product(Pair(linear, convolution), 10) is None
    assert options.largest_product(Pair(linear, lambda x: None), 10) is None


@pytest.mark.parametrize("prior", ["vamp", "mixture"])
def test_largest_product_ignores_parameters_of_the_prior(prior):
    config = build.Config(
        **DEFAULTS["digits"] | {"prior": prior},
        dataset="digits",
        pair=None,
        binarize="none",
        batch_size=100,
        num_particles=1,
        beta=1.0,
        patience=None,
        clip_norm=None,
        seed=0,
        dtype="float32",
        event_shape=(8, 8),
        num_levels=17,
    )
    assert options.largest_product(build.build_pair(config), 100) == 100 * 200 * 64


@pytest.mark.parametrize("dataset", ["digits", "ring"])
def test_small_runs_use_one_thread(run, monkeypatch, dataset):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    run("train", dataset, "-n", 1, "--out", "a")
    assert json.loads(Path("a/env.json").read_text())["threads"] == 1
    run("train", dataset, "-n", 1, "--out", "b", "--threads", 2)
    assert json.loads(Path("b/env.json").read_text())["threads"] == 2


def test_warnings_are_lines_on_stderr_without_those_of_other_libraries(capfd):
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.resetwarnings()  # as outside pytest
        with output.progress_lines():
            warnings.warn_explicit(
                "foreign", UserWarning, "/x/torch/_inductor/a.py", 1, module="torch._inductor.a"
            )
            warnings.warn_explicit("own\nmore", UserWarning, "/x/pyro_vae/a.py", 1, module="pyro_vae.a")
            warnings.warn_explicit("a user's", UserWarning, "/x/pyrotechnics.py", 1, module="pyrotechnics")
            logging.getLogger("pyro_vae.infer.fit").warning("of %s", "fit")
            logging.getLogger("pyro_vae.infer.fit").info("quiet")
    assert capfd.readouterr().err.splitlines() == ["warning: own", "warning: a user's", "warning: of fit"]


def test_compilation_is_reported(capfd, monkeypatch):
    model, guide = vae()
    monkeypatch.setattr(GraphStep, "compile", lambda *_: None)
    with output.progress_lines(), pyro.get_param_store().scope():
        svi = pv.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO(), compile=True)
        for _ in range(2):
            svi.step(torch.ones(4, 6))
    assert capfd.readouterr().err == "compiling the step for float32[4, 6] …\n"
