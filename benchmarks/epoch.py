"""A shuffled epoch of AEVB's network on binarized MNIST: by the loop of Pyro's VAE example, by pyro_vae, and
by pythae and NumPyro if they are installed."""

import contextlib
import importlib.util
import io
import logging
import tempfile

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import DataLoader, Dataset

import pyro_vae as pv
from benchmarks.aevb import HIDDEN, LATENT, PIXELS, by_svi, make_vae
from benchmarks.timing import measure

BASE = "loop of Pyro's VAE example"


class Images(Dataset):
    """Images with labels, one at a time, as in torchvision's data sets."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], 0


def example_loop(x, size):
    """The loop of Pyro's ``examples/vae``, except that the images are decoded to tensors before."""
    step, loader = by_svi(pyro.infer.SVI, Trace_ELBO()), DataLoader(Images(x), batch_size=size, shuffle=True)

    def epoch():
        return sum(step(batch) for batch, _ in loader)

    return epoch


def in_memory(x, size):
    """``pyro.infer.SVI`` on minibatches that are indexed from one tensor."""
    step = by_svi(pyro.infer.SVI, Trace_ELBO())
    return lambda: [step(x[rows]) for rows in torch.randperm(len(x)).split(size)]


def fit(x, size, compile):
    vae = make_vae()
    epochs = pv.train(
        vae.model, vae.guide, x, batch_size=size, num_epochs=10_000, compile=compile, progress=False
    )
    return lambda: next(epochs)


def pythae(x, size):
    """pythae's trainer, with the same layers."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from torch import nn

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.h = nn.Linear(PIXELS, HIDDEN)
            self.mean, self.log_var = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

        def forward(self, x):
            h = torch.tanh(self.h(x))
            return ModelOutput(embedding=self.mean(h), log_covariance=self.log_var(h))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS), nn.Sigmoid()
            )

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z))

    logging.disable(logging.INFO)
    config = VAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce")
    training = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size,
        num_epochs=1,
        learning_rate=1e-3,
        no_cuda=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = BaseTrainer(
            model=VAE(config, encoder=Encoder(), decoder=Decoder()),
            train_dataset=BaseDataset(x, torch.zeros(len(x))),
            training_config=training,
        )
        trainer.prepare_training()

    def epoch():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train_step(1)

    return epoch


def numpyro(x, size):
    """NumPyro's SVI, with a jitted loop over the minibatches of an epoch."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax import lax, random

    data, num_batches = jnp.asarray(x.numpy()), len(x) // size

    def weights(name, rows, columns):
        scale = 1 / rows**0.5
        shape = rows, columns
        w = numpyro.param(name + "_w", lambda key: random.uniform(key, shape, minval=-scale, maxval=scale))
        return w, numpyro.param(name + "_b", jnp.zeros(columns))

    def linear(h, name, rows, columns):
        w, b = weights(name, rows, columns)
        return h @ w + b

    def model(batch):
        with numpyro.plate("data", len(batch)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(batch), LATENT)), 1.0).to_event(1))
            logits = linear(jnp.tanh(linear(z, "g", LATENT, HIDDEN)), "logits", HIDDEN, PIXELS)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=batch)

    def guide(batch):
        h = jnp.tanh(linear(batch, "h", PIXELS, HIDDEN))
        loc, log_scale = linear(h, "mean", HIDDEN, LATENT), linear(h, "log_scale", HIDDEN, LATENT)
        with numpyro.plate("data", len(batch)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    state = svi.init(random.PRNGKey(0), data[:size])

    @jax.jit
    def run(state, key):
        order = random.permutation(key, len(data))

        def step(i, carry):
            state, total = carry
            state, loss = svi.update(state, data[lax.dynamic_slice_in_dim(order, i * size, size)])
            return state, total + loss

        state, total = lax.fori_loop(0, num_batches, step, (state, 0.0))
        last = order[num_batches * size :]  # its size differs, so it is not part of the loop
        if len(last):
            state, loss = svi.update(state, data[last])
            total = total + loss
        return state, total

    keys = [random.PRNGKey(1)]

    def epoch():
        nonlocal state
        keys[0], key = random.split(keys[0])
        state, total = run(state, key)
        return total.block_until_ready()

    return epoch


def epochs(x, sizes, rounds):
    """The times of each installed method, by batch size."""
    methods = {
        BASE: example_loop,
        "`pyro.infer.SVI`, data in memory": in_memory,
        "`pv.fit(compile=False)`": lambda x, size: fit(x, size, False),
        '`pv.fit(compile="trace")`, no compiler': lambda x, size: fit(x, size, "trace"),
        "`pv.fit`": lambda x, size: fit(x, size, "auto"),
    }
    optional = {"pythae": pythae, "numpyro": numpyro}
    methods |= {name: method for name, method in optional.items() if importlib.util.find_spec(name)}
    return {
        f"batch {size}": measure(
            {name: lambda method=method: method(x, size) for name, method in methods.items()},  # noqa: B023
            rounds=rounds,
            num_calls=1,
            warm_up=1,
            warm=0,
        )
        for size in sizes
    }
