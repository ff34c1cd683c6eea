"""``pyro-vae`` in this process, in a folder of its own."""

import os
import signal
import sys

import pytest

from pyro_vae.cli import app


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
            app.main()
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return call
