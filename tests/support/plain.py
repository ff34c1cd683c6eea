"""A model and a guide as plain functions, with networks registered by ``pyro.module``."""

import pyro
import pyro.distributions as dist
from torch import nn

decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))
