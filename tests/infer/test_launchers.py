"""Training started by launchers equals training started by ``torchrun``."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae import checkpoint

SCRIPT = Path(__file__).parents[2] / "examples" / "launchers.py"
MODULES = {"fabric": "lightning", "accelerate": "accelerate", "ray": "ray.train"}
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def trained(launcher, folder):
    """The parameters that two processes train, and what they print."""
    words = TORCHRUN if launcher == "torchrun" else ()
    command = [sys.executable, *words, str(SCRIPT), launcher, "--smoke-test", "--out", str(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout + done.stderr
    return list(checkpoint.load(folder).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", MODULES)
def test_launchers_train_the_parameters_of_torchrun(launcher, tmp_path):
    pytest.importorskip(MODULES[launcher])
    expected = trained("torchrun", tmp_path / "torchrun")
    for p, q in zip(trained(launcher, tmp_path / launcher), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
