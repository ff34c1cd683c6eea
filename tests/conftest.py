import pyro
import pytest


@pytest.fixture(autouse=True)
def _seeded_and_alone():
    """Each test starts from one seed, in a param store of its own."""
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        yield
