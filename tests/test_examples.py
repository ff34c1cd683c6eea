"""Smoke tests of the examples. Those of ``examples/walkthrough`` run when the documentation is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("papers/*.py")])
FAST = {"custom_pair", "ring"}  # the others are slow


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem not in FAST else [], id=path.stem)
        for path in EXAMPLES
    ],
)
def test_example_runs_and_saves_its_picture(path, tmp_path, request):
    if path.stem == "lightning_svi":
        pytest.importorskip("lightning")
    if path.stem == "trackers":
        pytest.importorskip("tensorboard")
    if path.stem == "own_data":
        pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    if path.stem in ("mnist", "frey_faces", "aevb_figure2", "aevb_figure3", "linear_vae_mnist"):
        folder = request.getfixturevalue("data_dir").resolve()
        os.environ["PYRO_VAE_DATA"] = str(folder)
    process = subprocess.run(
        [sys.executable, "-W", "error", str(path), "--smoke-test"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "nats" in process.stdout
    pictures = list(tmp_path.glob("*.png"))
    assert [picture.stem for picture in pictures] == ([path.stem] if "savefig" in path.read_text() else [])
