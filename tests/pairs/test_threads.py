"""Pyro's param store and torch's random state belong to the process: one thread at a time trains, or looks at
a pair."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.support.fits import data


def pair(entered=None, leave=None):
    """A pair of functions; its model tells that it runs, and waits to go on."""

    def model(x):
        if entered is not None:
            entered.set()
            assert leave.wait(20)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), pyro.param("width", torch.tensor(0.5))))

    return model, guide


def trained(seed):
    pyro.set_rng_seed(seed)
    return pv.fit(*pair(), data(), num_epochs=2, progress=False).param_store["params"]


VERBS = {
    "fit": lambda: pv.fit(*pair(), data(), num_epochs=1, progress=False),
    "train": lambda: next(pv.infer.train(*pair(), data(), num_epochs=1, progress=False)),
    "evaluate": lambda: pv.evaluate(*pair(), data()),
    "importance": lambda: pv.evidence.importance(*pair(), data(), num_particles=2),
}


@pytest.mark.parametrize("verb", VERBS)
def test_while_a_thread_trains_every_verb_is_refused_in_another(verb):
    """And the fit that trains ends as it does alone."""
    expected = trained(seed=1)
    began, go_on = threading.Event(), threading.Event()

    def beta(epoch):  # called by the fit before each step
        began.set()
        assert go_on.wait(20)
        return 1.0

    def first():
        pyro.set_rng_seed(1)
        return pv.fit(*pair(), data(), num_epochs=2, beta=beta, progress=False).param_store["params"]

    with ThreadPoolExecutor(1, thread_name_prefix="first") as pool:
        future = pool.submit(first)
        assert began.wait(20)
        try:
            with pytest.raises(RuntimeError, match="thread 'first_0' of this process trains"):
                VERBS[verb]()
        finally:
            go_on.set()
        found = future.result()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    VERBS[verb]()


def test_verbs_that_do_not_train_wait_for_each_other():
    entered, leave = threading.Event(), threading.Event()
    expected = pv.evaluate(*pair(), data()).elbo
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pv.evaluate, *pair(entered, leave), data())
        assert entered.wait(20)
        second = pool.submit(pv.evaluate, *pair(), data())
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        leave.set()
        assert torch.equal(first.result().elbo, expected)
        assert torch.equal(second.result().elbo, expected)


def test_fits_of_one_thread_may_alternate():
    """Two ``train()`` in one loop; the random state that they share apart, each has its parameters for
    itself."""
    x, stores = data(), [{"params": {}, "constraints": {}} for _ in range(2)]
    fits = [pv.infer.train(*pair(), x, num_epochs=3, progress=False, param_store=store) for store in stores]
    epochs = [record.epoch for records in zip(*fits, strict=True) for record in records]
    assert epochs == [1, 1, 2, 2, 3, 3]
    assert all(store["params"].keys() == {"scale", "width"} for store in stores)
    assert not torch.equal(*(store["params"]["width"] for store in stores))


@pytest.mark.parametrize("end", ["closed", "thread has ended"])
def test_a_fit_that_does_not_go_on_is_in_nobodys_way(end):
    kept = []

    def begin():
        fit = pv.infer.train(*pair(), data(), num_epochs=3, progress=False)
        next(fit)
        kept.append(fit)
        if end == "closed":
            fit.close()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert trained(seed=1)


def test_a_fit_that_fails_leaves_no_trace():
    with pytest.raises(ValueError, match="num_epochs"):
        pv.fit(*pair(), data(), num_epochs=0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trained, 1).result()
