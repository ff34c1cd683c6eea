"""``report.html``, the latent map, the comparison of runs, and the formats of pictures."""

import base64
import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.cli import build, report, runs
from pyro_vae.infer import Epoch
from pyro_vae.pairs.elbo import MeanElbo
from tests.support import maps, pages
from tests.support.runs import PAIR


def trained(run, *arguments):
    code, _, err = run("train", *arguments)
    assert code == 0, err
    return err


def command_of(page):
    """The command with which the page says to train again."""
    return text_of(re.search(r'<pre class="command">(pyro-vae .*?)</pre>', page)[1])


def text_of(page):
    return html.unescape(re.sub("<[^>]*>", "", page.replace("<br>", "\n")))


@pytest.mark.parametrize(
    "options",
    [
        ("digits", "--guide", "full", "--hidden", "30,20", "--clip-norm", 100, "--beta", 0.5, "--seed", 3),
        ("ring", "--objective", "renyi", "--alpha", -0.5, "--num-particles", 3, "--dtype", "float64"),
        ("a table.csv", "--label", "kind", "--prior", "mixture", "--warm-up", 1, "--patience", 4),
        ("digits", "--pair", "mine.py:vae", "--binarize", "threshold", "-b", 50),
    ],
    ids=lambda options: Path(options[0]).stem,
)
def test_command_of_the_report_trains_the_same(run, options):
    rows = np.random.default_rng(0).normal(size=(40, 3))
    table = ["a,b,c,kind", *(",".join([*map(str, row), str(i % 2)]) for i, row in enumerate(rows))]
    Path("a table.csv").write_text("\n".join(table))
    Path("mine.py").write_text(PAIR)
    trained(run, *options, "-n", 1, "--out", "a")
    command = command_of(Path("a/report.html").read_text())
    assert command.startswith("pyro-vae train ")
    trained(run, *shlex.split(command)[2:], "--out", "b")
    assert Path("a/config.json").read_text() == Path("b/config.json").read_text()


def make_epochs(values, kl=5.0):
    means = [MeanElbo(value, value + kl, kl, 0.5) for value in values]
    return [Epoch(i, 1.0, mean, mean, 0.1) for i, mean in enumerate(means, start=1)]


@pytest.fixture
def ring(run):
    trained(run, "ring", "-n", 1, "--out", "a")
    return runs.open_run(Path("a"))


STEADY = [*range(-50, -10), *[-10.0] * 10]
CURVES = [
    (STEADY, 5.0, []),
    ([*range(-50, -10), *[-10.2] * 10], 5.0, []),  # lower by less than the standard error
    ([*range(-50, -10), *[-12.0] * 10], 5.0, ["--patience"]),
    (list(range(-50, -10)), 5.0, ["--num-epochs 2"]),
    ([*STEADY[:-1], -9.5], 5.0, []),  # higher by less than 2 % of the whole rise
    ([*STEADY[:-1], -9.1], 5.0, ["--num-epochs 2"]),
    (STEADY, 0.01, ["--warm-up"]),
    ([-10.0, float("nan")], 5.0, ["--learning-rate"]),
    ([-10.0], 5.0, []),
]


def test_warnings_state_the_fault_of_the_curve(ring):
    for values, kl, remedies in CURVES:
        epochs = make_epochs(values, kl)
        found = list(report._training_warnings(ring, epochs, epochs[-1]))
        assert len(found) == len(remedies), values
        for (remedy, cause), expected in zip(found, remedies, strict=True):
            assert expected in remedy
            assert cause


@pytest.mark.parametrize("options", [("ring",), ("digits", "--pair", "mine.py:functions")], ids=len)
def test_unfinished_run_says_how_to_resume(run, options):
    Path("mine.py").write_text(PAIR)
    trained(run, *options, "-n", 1, "--out", "a")
    config = json.loads(Path("a/config.json").read_text())
    Path("a/config.json").write_text(json.dumps(config | {"num_epochs": 2}))
    page = text_of(Path(report.write_report(runs.read_run(Path("a")))).read_text())
    command = re.search("Resume the training: (pyro-vae .*)", page)[1]
    trained(run, *shlex.split(command.split("a is not finished")[0])[2:])
    assert "Resume the training" not in text_of(Path("a/report.html").read_text())
    assert len(runs.read_run(Path("a")).history()) == 2


def test_diagnosis_shows_its_numbers_and_warnings(run, ring):
    assert run("diagnose", "a", "--num-particles", 100, "--num-simulations", 100)[0] == 0
    record = json.loads(Path("a/diagnosis/diagnosis.json").read_text())
    page = Path("a/report.html").read_text()
    assert f"{record['elbo']:.2f} ± {record['elbo_se']:.2f} nats per datum" in page
    assert ("--guide full" in text_of(page)) == (record["pareto_k_above_0.7"] > 0.1)
    record["pareto_k_above_0.7"] = 0.5
    Path("a/diagnosis/diagnosis.json").write_text(json.dumps(record))
    page = Path(report.write_report(ring)).read_text()
    assert "Pareto k is above 0.7 for 50% of the data" in page
    pages.check(page)


INVALID = (
    "", "[]", "{}", "null", '{"elbo": 1}', '{"elbo": {}}', '{"elbo": {"method": "<b>"}}', '{"worst": 3}',
    '{"pareto_k_above_0.7": "x"}', '{"not_calibrated": 7, "pareto_k_above_0.7": []}',
)  # fmt: skip


@pytest.mark.parametrize("name", ["evaluation", "diagnosis"])
def test_invalid_results_show_their_text(ring, name):
    Path("a", name).mkdir()
    Path("a", name, f"{name}.txt").write_text("the <text>")
    for content in INVALID:
        Path("a", name, f"{name}.json").write_text(content)
        page = Path(report.write_report(ring)).read_text()
        assert "the &lt;text&gt;" in page, content
        pages.check(page)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_have_the_format(run, suffix):
    trained(run, "-n", 1, "--out", "a", "--format", suffix)
    files = {file.name for file in Path("a/plots").iterdir() if not file.name.startswith(".")}
    names = ("curve", "latent", "manifold", "reconstructions", "samples")
    assert files == {f"{name}.{suffix}" for name in names} | {"latent_map.html", "plots.json"}
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert all(Path("a/plots", f"{name}.{suffix}").read_bytes().startswith(start) for name in names)
    page = Path("a/report.html").read_text()
    assert all(f'"plots/{file}"' in page for file in files)
    assert len(pages.check(page)) == (0 if suffix == "pdf" else 5)
    assert run("sample", "a", "-n", 2, "--format", "gif")[0] == 2


def test_plot_draws_the_given_dimensions(run):
    trained(run, "-n", 1, "--latent-dim", 4, "--out", "a")
    assert run("plot", "a", "--dims", "3,1")[0] == 0
    read = maps.read(Path("a/plots-2/latent_map.html").read_text())
    opened = runs.open_run(Path("a"))
    test = build.build_data(opened.config, None)[1]
    with opened.loaded() as pair, torch.no_grad():
        means = pair.vae.encode(test.x).mean
    np.testing.assert_allclose(read.points[:, :2], means[:, [3, 1]], atol=6e-4)
    assert "plots-2/latent_map.html" in Path("a/report.html").read_text()
    for dims in ("0,4", "1,1", "1", "a,b", "0,1,2", "-1,0"):
        assert run("plot", "a", "--dims", dims)[0] == 2
    assert not Path("a/plots-3").exists()


def test_runs_are_compared_side_by_side(run):
    for name, options in {"a": (), "b&c": ("--latent-dim", 3, "--hidden", "20,10")}.items():
        trained(run, "ring", "-n", 2, "--out", name, *options)
        run("evaluate", name, "--estimator", "elbo,importance", "--num-particles", 10)
    code, out, err = run("compare", "a", "b&c", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["a"]["settings"] == {"latent_dim": 2, "hidden": [100, 100]}
    assert result["b&c"]["settings"] == {"latent_dim": 3, "hidden": [20, 10]}
    for name in ("a", "b&c"):
        mean = runs.open_run(Path(name)).saved_epoch().validation
        assert (
            result[name]["results"]["ELBO, recorded in training"] == f"{mean.elbo:.2f} ± {mean.elbo_se:.2f}"
        )
        rung = json.loads(Path(name, "evaluation/evaluation.json").read_text())["importance-10"]
        expected = f"{rung['log_evidence']:.2f} ± {rung['mean_se']:.2f}"
        assert result[name]["results"]["log p(x) ≥ importance-10, evaluated on test"] == expected
    folder = Path("runs/comparison")
    files = {file.name for file in folder.iterdir()} - {".written.json"}
    assert files == {"comparison.html", "comparison.json", "comparison.txt", "curves.png"}
    page = (folder / "comparison.html").read_text()
    assert pages.check(page) == ["curves.png"]
    links = map(html.unescape, re.findall('href="([^"]+)"', page))
    assert [(folder / link.replace("%26", "&")).is_file() for link in links] == [True, True]
    assert "Compare runs on the same data" not in page
    text = (folder / "comparison.txt").read_text()
    assert re.search(r"--latent-dim +2 +3\n", text)
    assert re.search(r"--hidden +100,100 +20,10\n", text)


def test_runs_on_other_data_are_not_ranked(run):
    trained(run, "ring", "-n", 1, "--out", "a")
    trained(run, "digits", "-n", 1, "--out", "b")
    trained(run, "digits", "-n", 1, "--out", "c", "--seed", 1)
    assert "Compare runs on the same data" in run("compare", "a", "b", "--out", "ab")[1]
    assert "Compare runs on the same data" in Path("ab/comparison.html").read_text()
    assert "Compare runs on the same data" not in run("compare", "b", "c", "--out", "bc")[1]


def command_after(text, phrase):
    """The words of the command that follows a phrase on a page."""
    return shlex.split(re.search(f"{re.escape(phrase)} ?pyro-vae (.*)", text)[1])


def test_results_of_earlier_parameters_give_no_numbers_and_no_advice(run):
    """Training further makes them so, until they are made again."""
    trained(run, "ring", "-n", 1, "--out", "a")
    trained(run, "ring", "-n", 2, "--out", "b")
    small = {"evaluate": ("--num-particles", 10), "diagnose": ("--num-simulations", 0)}

    def repeat():
        for verb, options in small.items():
            assert run(verb, "a", *options)[0] == 0

    def state():
        compared = json.loads(run("compare", "a", "b", "--out", "c", "--overwrite", "--json")[1])["a"]
        page = text_of(Path("a/report.html").read_text())
        return "of earlier parameters" in page, any("evaluated on" in name for name in compared["results"])

    repeat()
    assert state() == (False, True)
    trained(run, "--out", "a", "--resume", "last", "-n", 2)
    assert state() == (True, False)
    opened = runs.read_run(Path("a"))
    assert report.missing_verbs(opened) == ["evaluate", "diagnose", "sample", "reconstruct"]
    diagnosis = json.loads(Path("a/diagnosis/diagnosis.json").read_text()) | {"pareto_k_above_0.7": 0.5}
    Path("a/diagnosis/diagnosis.json").write_text(json.dumps(diagnosis))
    page = text_of(Path(report.write_report(opened)).read_text())
    assert "Pareto k is above 0.7 for" not in page
    assert command_after(page, "Repeat the evaluation:") == ["evaluate", "a"]
    repeat()
    assert state()[1]
    page = text_of(Path("a/report.html").read_text())
    assert "Repeat the" not in page
    assert "(evaluation, of earlier parameters)" in page


def test_results_without_a_record_are_of_unknown_parameters(ring, run):
    assert run("diagnose", "a", "--num-simulations", 0)[0] == 0
    record = json.loads(Path("a/diagnosis/diagnosis.json").read_text()) | {"pareto_k_above_0.7": 0.5}
    del record["weights"]
    Path("a/diagnosis/diagnosis.json").write_text(json.dumps(record))
    page = text_of(Path(report.write_report(ring)).read_text())
    assert "(diagnosis, of unknown parameters)" in page
    assert "Pareto k is above 0.7 for" not in page


def test_report_says_which_data_and_prefers_held_out_data(ring, run):
    for selection in ("train", "test[:100]", "train[20:40]"):
        assert run("diagnose", "a", "--num-simulations", 0, "--data", selection)[0] == 0
        assert run("evaluate", "a", "--num-particles", 10, "--data", selection)[0] == 0
    page = Path("a/report.html").read_text()
    assert "<h2>Diagnosis of the guide, on test[:100]</h2>" in page
    assert "<h2>Evidence: estimates of log p(x), on test[:100]</h2>" in page
    assert "<summary>Diagnosis of the guide, on train[20:40] (diagnosis-3)</summary>" in page


def test_advice_of_a_report_works_as_printed(run):
    Path("mine.py").write_text(PAIR)
    trained(run, "digits", "--pair", "mine.py:functions", "-n", 1, "--out", "a")
    few = "--pair", "mine.py:functions", "--num-particles", 10, "--num-temperatures", 2
    for verb in ("evaluate", "diagnose"):
        options = few if verb == "evaluate" else (*few[:4], "--num-simulations", 0)
        assert run(verb, "a", "--data", "test[:9]", *options)[0] == 0
    opened, path = runs.read_run(Path("a")), Path("a/diagnosis/diagnosis.json")
    found = {"pareto_k_above_0.7": 0.5, "not_calibrated": ["z"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | found))
    path = Path("a/evaluation/evaluation.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({key: row | {"pareto_k_above_0.7": 0.5} for key, row in rows.items()}))
    page = text_of(Path(report.write_report(opened)).read_text())
    assert "--guide" not in page  # refused together with --pair
    command = command_after(page, "it depends on the guide less.")
    code, _, err = run(*command, "--num-particles", 10, "--num-temperatures", 2)
    assert code == 0, err
    path = Path("a/evaluation-2/evaluation.json")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({key: row | {"pareto_k_above_0.7": 0.5} for key, row in rows.items()}))
    assert "Prefer the estimate of AIS" in text_of(Path(report.write_report(opened)).read_text())


def test_advice_on_the_guide_names_another_family(ring):
    for guide, expected in {"normal": "full", "full": "flow", "flow": "--hidden"}.items():
        text = report._richer_guide(replace(ring.config, guide=guide))
        assert expected in text
        assert f"--guide {guide}" not in text


def test_next_command_of_compare_is_for_a_run_without_evaluation(run):
    Path("mine.py").write_text(PAIR)
    trained(run, "ring", "-n", 1, "--out", "a")
    trained(run, "digits", "--pair", "mine.py:functions", "-n", 1, "--out", "b")
    assert run("evaluate", "a", "--num-particles", 2)[0] == 0
    err = run("compare", "a", "b", "--out", "c")[2]
    command = command_after(err, "next:")
    assert command[:2] == ["evaluate", "b"]
    code, _, err = run(*command, "--num-particles", 2)
    assert code == 0, err
    assert "next:" not in run("compare", "a", "b", "--out", "d")[2]


def test_bounds_of_all_runs_are_side_by_side(run):
    """Those that only the second run has are not at the end of the table."""
    trained(run, "ring", "-n", 1, "--out", "a")
    trained(run, "ring", "-n", 1, "--out", "b", "--objective", "iwae", "--num-particles", 2)
    for name in "ab":
        assert run("evaluate", name, "--num-particles", 10)[0] == 0
    names = list(json.loads(run("compare", "a", "b", "--json")[1])["b"]["results"])
    assert names == [
        "ELBO, recorded in training",
        "bound of the objective, recorded in training",
        "log p(x) ≥ elbo, evaluated on test",
        "log p(x) ≥ objective, evaluated on test",
        "log p(x) ≥ importance-10, evaluated on test",
        "KL",
        "epoch of the parameters",
        "seconds of training",
    ]


REFUSED = {
    ("a",): "two or more",
    ("a", "banana"): "'banana' is the name of a model",
    ("banana", "a"): "'banana' is the name of a model",
    ("banana", "funnel"): "'banana' is the name of a model",
    ("a", "b"): "'b' is not a run folder",
    ("a", "./a"): "two or more different",
    ("a", "c", "--guide", "full"): "--guide is for",
    ("a", "c", "-n", 3): "--num-epochs is for",
    ("banan",): "did you mean 'banana'",
}


def test_compare_refuses_other_arguments(run):
    for name in ("a", "c"):
        trained(run, "ring", "-n", 1, "--out", name)
    for arguments, message in REFUSED.items():
        code, _, err = run("compare", *arguments)
        assert code == 2, arguments
        assert message in re.sub(r"\s+", " ", err), arguments


def test_pages_run_in_chromium_without_messages(run, tmp_path):
    """The image of the latent map at twenty points is that of the decoder."""
    trained(run, "-n", 2, "--latent-dim", 3, "--out", "a")
    trained(run, "-n", 1, "--out", "b")
    assert run("compare", "a", "b", "--out", "c")[0] == 0
    for path in ("a/report.html", "c/comparison.html"):
        assert pages.dumped(path, tmp_path)[1] == []
    page = Path("a/plots/latent_map.html").read_text()
    cells = maps.cells(maps.read(page).steps)
    script = """
<script>
sheet.decode().then(() => {
  const shown = CELLS.map(([i, j]) => {
    show(i, j);
    const data = image.getContext("2d").getImageData(0, 0, map.width, map.height).data;
    return [where.textContent, [...data].filter((_, k) => k % 4 == 0)];
  });
  const out = document.createElement("pre");
  out.id = "out";
  out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(shown))));
  document.body.append(out);
});
</script>
</body>"""
    Path("test.html").write_text(page.replace("</body>", script.replace("CELLS", json.dumps(cells))))
    dom, messages = pages.dumped("test.html", tmp_path)
    assert [message for message in messages if "getImageData" not in message] == []
    shown = json.loads(base64.b64decode(re.search(r'<pre id="out">([^<]+)</pre>', dom)[1]))
    opened, read = runs.open_run(Path("a")), maps.read(page)
    test = build.build_data(opened.config, None)[1]
    with opened.loaded() as pair, torch.no_grad():
        means = pair.vae.encode(test.x).mean
        dims = sorted(means.var(0).topk(2).indices.tolist())
        for (column, row), (where, pixels) in zip(cells, shown, strict=True):
            z = means.mean(0)
            z[dims] = torch.tensor(read.centre(column, row), dtype=z.dtype)
            expected = pair.vae.decode(z).mean.numpy()
            assert abs(np.array(pixels).reshape(8, 8) / 255 - expected).max() <= 2 / 255
            numbers = re.findall(r"z\[(\d)\] = ([−\d.]+)", where)
            assert [int(dim) for dim, _ in numbers] == dims
            at = [float(value.replace("−", "-")) for _, value in numbers]
            np.testing.assert_allclose(at, read.centre(column, row), atol=0.006)
