"""What is built from the sources, and the versions that it asks for."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pyro_vae

ROOT = Path(__file__).parent.parent
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip(
        "these tests read pyproject.toml, and the package is installed without its sources",
        allow_module_level=True,
    )
ROOT_FILES = "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lower_bounds():
    """The versions that ``pyproject.toml`` gives after ``>=``, by name: a set, since extras may repeat a
    requirement. Those of the documentation and of the launchers, which are tried with the newest versions
    only, are left out."""
    optional = PROJECT["project"]["optional-dependencies"]
    extras = [requirements for name, requirements in optional.items() if name not in ("docs", "launchers")]
    lines = [
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        *(line for e in extras for line in e),
    ]
    bounds = {}
    for requirement in map(Requirement, lines):
        found = [each.version for each in requirement.specifier if each.operator == ">="]
        bounds.setdefault(canonicalize_name(requirement.name), set()).update(found or [None])
    return bounds


def test_every_lower_bound_is_a_version_that_ci_installs():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert lower_bounds() == {name: {version} for name, version in pins.items()}


@pytest.fixture
def clone(tmp_path):
    """A copy of what is built, in a folder with the name of the package, as a clone may have."""
    folder = tmp_path / "pyro_vae"
    shutil.copytree(ROOT / "pyro_vae", folder / "pyro_vae", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT_FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def built(clone, kind):
    """The path of a ``wheel``, an ``editable`` wheel or an ``sdist`` of a clone."""
    pytest.importorskip("hatchling")
    out = clone.parent / kind
    out.mkdir()
    code = f"from hatchling.build import build_{kind} as build; build({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True)
    (path,) = out.iterdir()
    return path


def test_wheel_and_sdist_hold_every_file_of_the_package(clone):
    files = {str(path.relative_to(clone)) for path in (clone / "pyro_vae").rglob("*") if path.is_file()}
    assert {"pyro_vae/data/digits.npz", "pyro_vae/py.typed"} < files
    wheel_path = built(clone, "wheel")
    assert wheel_path.stat().st_size < 2_000_000
    with zipfile.ZipFile(wheel_path) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
        licences = {Path(name).name for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    with tarfile.open(built(clone, "sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert files | set(ROOT_FILES) <= names


@pytest.mark.parametrize("place", ["the parent of the clone", "the clone", "another folder"])
def test_a_script_imports_an_editable_install(clone, place):
    """Also beside the clone, where Python finds a folder named ``pyro_vae`` that is not the package."""
    environment = clone.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(built(clone, "editable")) as wheel:
        wheel.extractall(site_packages)  # what an installer does with it, but for the command's script
    folder = {"the parent of the clone": clone.parent, "the clone": clone}.get(
        place, clone.parent / "elsewhere"
    )
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text("import pyro_vae\nprint(pyro_vae.__version__, pyro_vae.__file__)\n")
    done = subprocess.run(
        [environment / "bin" / "python", script],
        cwd=folder,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [pyro_vae.__version__, str(clone / "pyro_vae" / "__init__.py")]


def test_the_version_of_a_wheel_is_that_of_the_package(clone):
    assert built(clone, "wheel").name.startswith(f"pyro_vae-{pyro_vae.__version__}-")
