import os
from pathlib import Path

import matplotlib as mpl
import pyro
import pytest
import torch

mpl.use("Agg")
# as many threads in all as there are processors, also in the processes that tests start
_NUM_THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(_NUM_THREADS)
os.environ.setdefault("OMP_NUM_THREADS", str(_NUM_THREADS))


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
