"""Fixtures that run ``pyro-vae`` in this process and in a temporary working folder."""

import os
import signal
import sys

import pytest

from pyro_vae.cli import app


@pytest.fixture(autouse=True)
def _temporary_working_folder(tmp_path, monkeypatch):
    if folder := os.environ.get("PYRO_VAE_DATA"):
        monkeypatch.setenv("PYRO_VAE_DATA", os.path.abspath(folder))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(monkeypatch, capfd):
    """A function that runs ``pyro-vae`` and returns the exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyro-vae", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        out, err = capfd.readouterr()
        return exit_.value.code, out, err

    return call
