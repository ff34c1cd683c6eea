import os
from pathlib import Path

import matplotlib as mpl
import pyro
import pytest

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _seeded_and_alone():
    """Each test starts from one seed, in a param store of its own."""
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def data_dir():
    """The folder that PYRO_VAE_DATA names, with MNIST and Frey Face in it."""
    folder = os.environ.get("PYRO_VAE_DATA")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("PYRO_VAE_DATA names no folder with MNIST and Frey Face")
    return Path(folder)
