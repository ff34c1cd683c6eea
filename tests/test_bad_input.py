"""Whatever is handed in as data, nothing but a ValueError comes out, and no NaN reaches a parameter. Also
under ``python -O``, which switches Pyro's and torch's validation off: so there is no ``assert`` in this
file."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors

LIKELIHOODS = {
    "bernoulli": conditionals.Bernoulli,
    "continuous-bernoulli": conditionals.ContinuousBernoulli,
    "normal": conditionals.Normal,
    "poisson": conditionals.Poisson,
    "gamma": conditionals.Gamma,
}
DTYPES = [
    np.float16,
    np.float32,
    np.float64,
    np.uint8,
    np.int8,
    np.int64,
    np.uint16,
    np.bool_,
    np.complex64,
    ">f4",
]


def make_vae(likelihood="bernoulli"):
    return pv.VAE(
        priors.StandardNormal(2),
        LIKELIHOODS[likelihood](nets.MLP(2, (4,)), event_shape=(2, 3)),
        conditionals.Normal(nets.MLP(6, (4,)), event_shape=2),
    )


def fine(parameters):
    return all(torch.isfinite(p).all() for p in parameters)


shapes = st.one_of(
    st.tuples(st.integers(0, 5), st.just(2), st.just(3)),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
)
data = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype=dtype, shape=shapes))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(x=data, likelihood=st.sampled_from(sorted(LIKELIHOODS)), as_tensor=st.booleans())
def test_fit_trains_or_says_why_not(x, likelihood, as_tensor):
    vae = make_vae(likelihood)
    if as_tensor and x.dtype not in (np.dtype(np.uint16), np.dtype(">f4")):
        x = torch.from_numpy(x)
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on its own casts
        try:
            history = pv.fit(vae.model, vae.guide, x, num_epochs=1, batch_size=3)
        except (ValueError, FloatingPointError) as error:
            # a loss beyond float32's range, from data within it, is numerical failure and no bad input
            huge = np.abs(np.asarray(x)).max(initial=0) > 1e15
            # where its density is 0 or infinite; data are in single precision by then
            at_zero = likelihood == "gamma" and (np.asarray(x).astype(np.float32) == 0).any()
            if isinstance(error, FloatingPointError) and not huge and not at_zero:
                pytest.fail(f"{error!r} on {x!r}")
            if not str(error).strip():
                pytest.fail("the error says nothing")
        else:
            if not np.isfinite(history.epochs[0].train.elbo):
                pytest.fail(f"the ELBO is {history.epochs[0].train.elbo}")
        if not fine(vae.parameters()):
            pytest.fail("a parameter is not finite")


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 2, 3),
        torch.zeros(5, 3, 3),
        torch.zeros(5),
        torch.tensor(1.0),
        torch.full((5, 2, 3), torch.nan),
        torch.full((5, 2, 3), torch.inf),
        torch.full((5, 2, 3), 0.5),
        torch.full((5, 2, 3), 255, dtype=torch.uint8),
        torch.full((5, 2, 3), -1.0),
        torch.zeros(5, 2, 3, dtype=torch.complex64),
        np.array([["a", "b"]]),
        np.array([object()]),
        [],
        [1.0, 2.0],
        {},
        None,
        "digits",
        3,
        (torch.zeros(5, 2, 3), torch.zeros(4)),
        torch.utils.data.TensorDataset(torch.zeros(0, 2, 3)),
        torch.utils.data.DataLoader(torch.zeros(3, 2, 3), 10, drop_last=True),
        np.ma.masked_values(np.full((5, 2, 3), -999.0), -999.0),
        {"x": torch.zeros(5, 2, 3), "condition": torch.zeros(4, 2, 3)},
        {"y": torch.zeros(5, 2, 3)},
    ],
    ids=lambda x: re.sub(r" at 0x\w+", "", repr(x))[:40].replace("\n", " "),  # the same in every process
)
def test_what_is_no_data_is_a_value_error(x):
    vae = make_vae()
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(ValueError, match=r"data|pair|model"):
        pv.fit(vae.model, vae.guide, x, num_epochs=1)
    if not all(torch.equal(p, b) for p, b in zip(vae.parameters(), before, strict=True)):
        pytest.fail("bad data moved a parameter")


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((5, 4, 6), np.float32)[:, ::2, ::2],
        np.zeros((3, 2, 5), ">f8").T,
        np.asfortranarray(np.zeros((5, 2, 3), np.uint8)),
        torch.zeros(3, 2, 5).permute(2, 1, 0),
        torch.zeros(1, 2, 3).expand(5, 2, 3),
        np.zeros((5, 2, 3), bool),
        torch.zeros(5, 2, 3, dtype=torch.double),
        torch.zeros(5, 2, 3).to_sparse(),
        {"x": torch.zeros(5, 2, 3), "label": torch.arange(5)},
        {"x": torch.full((5, 2, 3), torch.nan), "mask": torch.zeros(5, 2, 3, dtype=torch.bool)},
    ],
    ids=[
        "strided",
        "big-endian",
        "fortran",
        "permuted",
        "expanded",
        "bool",
        "double",
        "sparse",
        "labelled",
        "missing",
    ],
)
def test_arrays_of_any_layout_train(x):
    vae = make_vae()
    if not np.isfinite(pv.fit(vae.model, vae.guide, x, num_epochs=1).epochs[0].train.elbo):
        pytest.fail("the ELBO is not finite")


@pytest.mark.parametrize(
    "options",
    [{"num_epochs": 0}, {"batch_size": 0}, {"patience": 2}, {"patience": 0, "validation": 1}],
    ids=str,
)
def test_options_out_of_range(options):
    vae = make_vae()
    with pytest.raises(ValueError, match="expected"):
        pv.fit(vae.model, vae.guide, torch.zeros(5, 2, 3), **options)


@pytest.mark.slow
@pytest.mark.skipif(sys.flags.optimize > 0, reason="this is the run under -O")
def test_all_of_it_under_optimization():
    command = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
    ]
    # pytest warns that its asserts are off; there are none here
    done = subprocess.run(
        [*command, "-W", "ignore::pytest.PytestConfigWarning"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
