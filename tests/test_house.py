"""The house rules that a program can hold: the floors, the tools, no pickle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
# From the ground up; a module imports from lower floors only, and neighbours do not import each other.
FLOORS = (
    ("nets", "arrays", "numerics", "files", "signals", "defaults", "threads"),
    ("data",),
    ("batches", "conditionals"),
    ("pair", "priors", "flows"),
    ("vae", "particles", "compiler"),
    ("structure", "graphs"),
    ("problems",),
    ("check",),
    ("latents",),
    ("exact", "weights", "checkpoint"),
    ("infer", "evidence"),
    ("diagnostics",),
    ("plots",),
    ("build",),
    ("runs", "zoo", "ladder"),
    ("report", "words"),
    ("page",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}


def home(path):
    """``infer/fit.py`` belongs to ``infer``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The parts of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom) and node.module == "pyro_vae":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyro_vae."))


def upward(path):
    here = home(path)
    return [name for name in imported(path) if name != here and HEIGHT.get(name, 99) >= HEIGHT[here]]


SOURCES = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    assert not upward(path)


def test_the_floors_test_sees_an_upward_import(tmp_path, monkeypatch):
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
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("pyro", "clear_param_store")}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert node.value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_checks_hold_without_assert(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


def test_public_names_are_there():
    for name in pyro_vae.__all__:
        assert getattr(pyro_vae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'vea'"):
        _ = pyro_vae.vea


@pytest.mark.parametrize("tool", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join)
def test_tools_are_clean(tool):
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        pytest.skip("the package is installed without its sources")
    done = subprocess.run([sys.executable, "-m", *tool], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
