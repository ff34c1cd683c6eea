"""Users' files on the command line: every format, and malformed files."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pyro_vae.data import readers
from tests.support import own_files
from tests.support.own_files import ALL, CSV, config_of, image_bytes
from tests.support.runs import weights_of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "counts.csv" else pytest.mark.slow) for name in ALL]
)
def test_every_format_is_trained_resumed_evaluated_and_diagnosed(run, tmp_path, name):
    write, options, likelihood = ALL[name]
    write(tmp_path / name)
    small = ("--hidden", 8, "--latent-dim", 2)
    code, _, err = run("train", name, *options, "-n", 1, *small, "--out", "a")
    assert code == 0, err
    assert f"--likelihood {likelihood}: the data are" in err
    config = config_of(tmp_path / "a")
    assert (config["dataset"], config["likelihood"]) == (name, likelihood)
    assert config["contents"]["format"] == Path(name).suffix or name == "images"
    assert len(config["sha256"]) == 64
    code, _, err = run("train", "--out", "a", "--resume", "last", "-n", 2)
    assert code == 0, err
    code, _, err = run("train", name, *options, "-n", 2, *small, "--out", "b")
    assert all(torch.equal(tensor, weights_of("b")[key]) for key, tensor in weights_of("a").items())
    code, out, err = run("evaluate", "a", "--num-particles", 10, "--json")
    assert code == 0, err
    assert np.isfinite(json.loads(out)["importance-10"]["log_evidence"])
    code, out, err = run("diagnose", "a", "--num-particles", 30, "--num-simulations", 100)
    assert code == 0, err
    assert "CALIBRATION" in out
    assert "not computed" not in out
    for command in ("sample", "reconstruct", "plot"):
        code, _, err = run(command, "a")
        assert code == 0, err
    assert "warning: the picture" not in err
    assert "cells" not in name or np.load("a/samples/samples.npy").min() >= 0


def test_changed_file_is_refused_by_every_command(run, tmp_path):
    own_files.npz(tmp_path / "x.npz")
    run("train", "x.npz", "-n", 1, "--out", "a")
    np.savez(tmp_path / "x.npz", x=np.ones((60, 4), int), y=np.ones(60))
    for command in (
        ("train", "--out", "a", "--resume", "last", "-n", 2),
        ("evaluate", "a"),
        ("diagnose", "a"),
    ):
        code, _, err = run(*command)
        assert code == 65
        assert "x.npz was changed" in err
    (tmp_path / "x.npz").unlink()
    assert run("evaluate", "a")[0] == 66


def test_validation_file_is_held_out_and_checked(run, tmp_path):
    own_files.npy(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.load(tmp_path / "a.npy")[:7] + 1)
    code, _, err = run("train", "a.npy", "--validation", "b.npy", "-n", 1, "--out", "a")
    assert code == 0, err
    assert "7 held out" in err
    np.save(tmp_path / "b.npy", np.load(tmp_path / "a.npy")[:7])
    code, _, err = run("evaluate", "a")
    assert (code, "b.npy was changed" in err) == (65, True)
    np.save(tmp_path / "b.npy", np.ones((7, 5)))
    code, _, err = run("train", "a.npy", "--validation", "b.npy", "-n", 1)
    assert (code, "(5,) instead of (4,)" in err) == (65, True)
    assert run("train", "a.npy", "--validation", "b.npy", "--holdout", 0.1)[0] == 2


def test_relative_path_is_also_found_in_data_dir(run, tmp_path):
    (tmp_path / "d").mkdir()
    own_files.npz(tmp_path / "d" / "x.npz")
    code, _, err = run("train", "x.npz", "-n", 1, "--data-dir", "d")
    assert code == 0, err
    assert run("evaluate", "runs/x", "--num-particles", 2, "--data-dir", "d")[0] == 0
    assert run("evaluate", "runs/x")[0] == 66


def test_nats_of_real_data_are_those_of_the_original_units(run, tmp_path):
    """A column times 1000 has a density that is 1000 times smaller."""
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.save("one.npy", x)
    np.save("two.npy", x * np.float32([1, 1024, 1]))
    elbos = []
    for name in ("one", "two"):
        code, out, err = run("train", f"{name}.npy", "-n", 2, "--json", "--dtype", "float64")
        assert code == 0, err
        elbos.append(json.loads(out)["validation"]["elbo"])
    assert elbos[0] - elbos[1] == pytest.approx(np.log(1024), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--prior", "vamp"), "missing.csv"),
        (("--prior", "vamp", "--likelihood", "poisson"), "counts.npz"),
        (("--likelihood", "categorical"), "images"),
        (("--likelihood", "bernoulli"), "images"),
        (("--likelihood", "student-t", "--guide", "flow"), "counts.csv"),
        (("--objective", "iwae", "--condition", "group"), "missing.csv"),
    ],
)
def test_options_of_models_apply_to_files(run, tmp_path, options, kind):
    ALL[kind][0](tmp_path / kind)
    code, _, err = run("train", kind, *options, "-n", 1, "--out", "a")
    assert code == 0, err
    code, _, err = run("evaluate", "a", "--num-particles", 3)
    assert code == 0, err


def test_received_run_names_no_file_of_unknown_contents(run, tmp_path):
    own_files.npz(tmp_path / "x.npz")
    run("train", "x.npz", "-n", 1, "--out", "a")
    config = config_of(tmp_path / "a")
    for change in ({"sha256": None}, {"validation": "y.npz"}, {"contents": {}}, {"dataset": 3}):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | change))
        code, _, err = run("evaluate", "a")
        assert code == 65, err
        assert "Traceback" not in err


def test_data_command_reads_a_file(run, tmp_path):
    own_files.npz(tmp_path / "x.npz")
    code, out, err = run("data", "x.npz", "--label", "y", "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "format": ".npz",
        "shape": [60, 4],
        "dtype": "int64",
        "range": [0.0, 8.0],
        "missing": 0,
        "kind": "counts",
        "columns": [],
        "left_out": [],
    }
    assert err.strip() == "next: pyro-vae train x.npz --label y"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "digits", "--label", "y"), "--label is for files"),
        (("train", "nothing"), "or the path of a file"),
        (("train", "x.npz", "--condition", "y", "--prior", "vamp"), "--prior vamp"),
    ],
)
def test_wrong_usage(run, tmp_path, arguments, message):
    own_files.npz(tmp_path / "x.npz")
    code, _, err = run(*arguments)
    assert (code, message in err) == (2, True), err


OWN_PAIR = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


def factory():
    network = nn.Linear(3, 4)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.cat([z, z.sum(-1, keepdim=True)], -1)
            pyro.sample("x", dist.Normal(loc, 1.0).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        pyro.module("network", network)
        loc, s = network(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, s.exp()).to_event(1))

    return model, guide
"""


def test_a_pair_of_ones_own_gets_the_mask_in_all_commands(run, tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 3)).round(3).astype(str)
    rows[::7, 1] = ""
    (tmp_path / "x.csv").write_text("\n".join(map(",".join, [["a", "b", "c"], *rows])))
    (tmp_path / "mine.py").write_text(OWN_PAIR)
    own = "--pair", tmp_path / "mine.py:factory"
    commands = [
        ("train", tmp_path / "x.csv", *own, "-n", 2, "--out", "run"),
        ("evaluate", "run", *own, "--num-particles", 5),
        ("diagnose", "run", *own, "--num-particles", 20, "--num-simulations", 0),
        ("plot", "run", *own),
        ("train", "--out", "run", *own, "--resume", "last", "-n", 3),
    ]
    for command in commands:
        code, _, err = run(*command)
        assert code == 0, err


def test_missing_file_and_missing_library_have_exit_codes(run, tmp_path, monkeypatch):
    assert run("train", "nowhere.npy")[0] == 66

    def missing(*_):
        raise ModuleNotFoundError("No module named 'pyarrow'")

    own_files.csv(tmp_path / "x.csv")
    monkeypatch.setattr("builtins.__import__", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        readers.import_library("pyarrow", ".csv")


# malformed files: each function writes one, and returns what the command line gets


def npy_of(array):
    return lambda path: np.save(path, array, allow_pickle=True)


def text(content, encoding="utf-8"):
    def write(path):
        pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))

    return write


def cut(write, share=0.5):
    """A writer of the first part of a file."""

    def write_part(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return write_part


def folder(**files):
    def write(path):
        pytest.importorskip("PIL", reason="pillow reads images")
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content() if callable(content) else content)

    return write


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xl/workbook.xml", "<xml/>")


def bomb(path):
    np.savez_compressed(path, x=np.zeros((2**10, 2**10)))


def arrow(columns):
    def write(path):
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)

    return write


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    path.write_bytes(pickle.dumps({"x": [1]}))


NAN_COLUMN = np.array([[1.0, np.nan], [2.0, np.nan]])
STRUCTURED = np.zeros(3, dtype=[("a", int), ("b", float)])
# (file, writer, options, a part of the message)
MALFORMED = [
    ("x.npy", cut(own_files.npy), (), "not a complete .npy file"),
    ("x.npy", cut(own_files.npy, 0.02), (), "not a complete .npy file"),
    ("x.npy", empty, (), "is empty (0 bytes)"),
    ("x.npy", npy_of(np.array([{"a": 1}, 2], dtype=object)), (), "runs code"),
    ("x.npy", text("a,b\n1,2\n"), (), "not a .npy file"),
    ("x.npy", npy_of(np.array(["a", "b"])), (), "array of numbers"),
    ("x.npy", npy_of(np.ones((3, 2), complex)), (), "real numbers"),
    ("x.npy", npy_of(np.ones((0, 2))), (), "no data"),
    ("x.npy", npy_of(np.float64(3)), (), "no data"),
    ("x.npy", npy_of(STRUCTURED), (), "array of numbers"),
    ("x.npy", npy_of(np.array([[1.0, 2.0], [np.inf, 2.0]])), (), "row 1 of 2 has an infinite entry"),
    ("x.npy", npy_of(NAN_COLUMN), (), "element (1,) has no entries"),
    ("x.npy", npy_of(np.ones((1, 2))), (), "expected 2 rows or more"),
    ("x.npy", own_files.npy, ("--holdout", "1.5"), "a fraction between 0 and 1"),
    ("x.npy", own_files.npy, ("--label", "y"), "has no label"),
    ("x.npy", npy_of(1e9 + np.random.default_rng(0).normal(size=(50, 2))), (), "subtract its mean"),
    ("x.npz", cut(own_files.npz), (), "not a complete .npz file"),
    ("x.npz", lambda path: np.savez(path, a=np.ones(3), b=np.ones(3)), (), "--key a"),
    ("x.npz", own_files.npz, ("--key", "z"), "its arrays are x, y"),
    ("x.npz", lambda path: np.savez(path, x=np.array([{}], dtype=object)), (), "runs code"),
    ("x.npz", archive, (), "without arrays"),
    ("x.npz", bomb, (), "expands from"),
    ("x.npz", lambda path: np.savez(path, x=np.ones((4, 2)), y=np.ones(3)), ("--label", "y"), "each of 4"),
    ("x.csv", text(""), (), "is empty (0 bytes)"),
    ("x.csv", text("a,b\n"), (), "no rows"),
    ("x.csv", text(CSV[:-6]), (), "not a complete .csv file"),
    ("x.csv", text("a,b\n1,2\n1,2,3\n"), (), "not a complete .csv file"),
    ("x.csv", text(CSV.replace(",", ";")), (), "first line has ';'"),
    ("x.csv", text(CSV.replace(",", "\t")), (), "rename it to .tsv"),
    ("x.csv", text("a,b\n1,2\nx,3\n"), (), "row 1 of 2 has 'x'"),
    ("x.csv", text(CSV), ("--label", "nothing"), "its columns are a, b, c, group"),
    ("x.csv", text("<!DOCTYPE html><html><p>404, not found"), (), "is HTML"),
    ("x.csv", archive, (), "Excel workbook"),
    ("x.csv", text("a,b\n1,2\n1," + "9" * 10**6 + "\n"), (), "a cell is too large"),
    ("x.csv", text("a,b\n1,caf\xe9\n", "latin-1"), (), "not UTF-8"),
    ("x.csv", text("a,b\n1,2\n", "utf-16"), (), "UTF-16"),
    ("x.csv", text("a,b,a\n1,2,3\n"), (), "2 columns have the name 'a'"),
    ("x.csv", text("a,b\n1,inf\n2,3\n"), (), "infinite entry in column 'b'"),
    ("x.csv", text("a,b\n1,\n2,\n"), (), "column 'b' has no entries"),
    ("x.csv", text("a,b\n1,2\n-1,2\n"), ("--likelihood", "poisson"), "are real (real numbers)"),
    ("x.csv", text(CSV), ("--likelihood", "bernoulli"), "are counts"),
    ("x.csv", text('a,b\n1,"2\n3,4\n'), (), "a quote is not closed"),
    ("x.csv", text("1,2\n3,4\n"), (), "numbers instead of names"),
    ("x.csv", text("a,b\nx,y\n"), (), "no numeric columns"),
    ("x.csv", text(b"a,b\0\n1,2\n"), (), "zero bytes"),
    ("x.csv", pickled, (), "a pickle"),
    ("x.csv", text("a,b\n1,u\n2,\n"), ("--condition", "b"), "row 1 has no entry"),
    ("x.tsv", text(CSV), (), "first line has ','"),
    ("x.parquet", cut(own_files.parquet), (), "not a complete .parquet file"),
    ("x.parquet", text(CSV), (), "not a .parquet file"),
    ("x.parquet", arrow({"a": []}), (), "no rows"),
    ("x.h5ad", cut(own_files.h5ad), (), "not a complete .h5ad file"),
    ("x.h5ad", own_files.h5ad, ("--label", "nothing"), "obs has no column"),
    ("x.h5ad", own_files.h5ad, ("--key", "nothing"), "its layers are none"),
    ("x.safetensors", cut(own_files.safetensors), (), "not a complete .safetensors file"),
    ("x.safetensors", lambda path: save_file({"y": np.ones(3)}, path), ("--label", "y"), "no array besides"),
    ("x", folder(a_png=image_bytes, b_png=b"\x89PNG broken"), (), "b.png is not a readable image"),
    ("x", folder(a_png=image_bytes, b_png=lambda: image_bytes((9, 9))), (), "--image-size 64"),
    ("x", folder(a_png=lambda: image_bytes()[:-30]), (), "not a readable image"),
    ("x", folder(a_txt=b"text"), (), "without images"),
    ("x.png", text("a"), (), "pass the folder"),
    ("x.pt", pickled, (), "safetensors.torch.save_file"),
    ("x.pkl", pickled, (), "pickled"),
    ("x.xlsx", archive, (), "unknown format .xlsx"),
]


@pytest.mark.parametrize(
    ("name", "write", "options", "message"),
    MALFORMED,
    ids=[f"{name} {message}" for name, _, _, message in MALFORMED],
)
def test_malformed_file_is_a_clear_error(run, tmp_path, monkeypatch, name, write, options, message):
    monkeypatch.setattr(readers, "_CSV_BLOCK", 2**18)
    monkeypatch.setattr(readers, "_MAX_EXPANSION", (2**20, 200))
    write(tmp_path / name)
    code, out, err = run("train", f"./{name}", *options, "-n", 1)
    assert (code, out) == (65, ""), err
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()[-1]) < 500
    assert not (tmp_path / "runs").exists()
