"""The rules of the package that a program can check: layers, tools, no pickle, no assert."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
# A module imports from the rows above its own, and from the left of it in its row.
LAYERS = (
    # parts: distributions given something; tools
    (
        *("files", "tree", "progress", "processes", "numerics", "random_states", "html", "plots"),
        *("nets", "conditionals", "priors", "flows"),
    ),
    ("data",),  # what pairs are trained on
    ("pairs", "compiler"),  # reading any pair; steps as graphs
    ("vae", "exact"),  # programs
    ("checkpoint", "evidence", "infer", "diagnostics"),  # verbs on any pair
    ("cli", "__main__"),  # the command line
)
PLACE = {name: (row, column) for row, names in enumerate(LAYERS) for column, name in enumerate(names)}


def home(path):
    """``infer/fit.py`` belongs to ``infer``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The parts of the package that a file imports when it runs, wherever in the file."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    # where it is known whether it can be imported
    optional = {"compiler"} if path.name == "graphs.py" else set()
    for node in ast.walk(tree):
        if id(node) in for_types or optional & {
            (getattr(node, "module", None) or "").removeprefix("pyro_vae.")
        }:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "pyro_vae":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyro_vae.")
            )


def upward(path):
    here = home(path)
    return [name for name in imported(path) if name != here and PLACE.get(name, (99, 0)) >= PLACE[here]]


SOURCES = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_the_table(path):
    assert not upward(path)


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    bad = tmp_path / "nets.py"
    bad.write_text("def f():\n    from pyro_vae.infer import fit\n    from pyro_vae import data\n")
    assert upward(bad) == ["infer", "data"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_pickled(path):
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & forbidden
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {
                ("torch", "load"),
                ("torch", "save"),
                ("pyro", "clear_param_store"),
            }
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert node.value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_check_is_an_assert(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


def test_public_names_are_there():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'vea'"):
        _ = pyro_vae.vea


@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(("ruff", "check", "."), id="ruff check"),
        pytest.param(("ruff", "format", "--check", "."), id="ruff format"),
        pytest.param(("mypy",), id="mypy", marks=pytest.mark.slow),
    ],
)
def test_tools_are_clean(tool):
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        pytest.skip("the package is installed without its sources")
    done = subprocess.run([sys.executable, "-m", *tool], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
