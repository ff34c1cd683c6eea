"""Saved parameters of runs, and the source of a user's model and guide."""

from pathlib import Path

from safetensors.torch import load_file

PAIR = """
import pyro, pyro.distributions as dist, torch
import pyro_vae as pv
from pyro_vae import conditionals, nets, priors

encoder = torch.nn.Sequential(torch.nn.Linear(64, 2))

def model(x):
    scale = pyro.param("scale", torch.ones(64), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale).to_event(1), obs=x.flatten(1))

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x.flatten(1)), 1.0).to_event(1))

def functions():
    return model, guide

def vae():
    return pv.VAE(
        priors.StandardNormal(3),
        conditionals.Normal(nets.ConvDecoder(3, (8, 8), (8,)), event_shape=(8, 8)),
        conditionals.Normal(nets.ConvEncoder((8, 8), (8,)), event_shape=3),
    )
"""


def weights_file(run):
    (file,) = Path(run, "weights").glob("*.safetensors")
    return file


def weights_of(run):
    return {name.removeprefix("weights."): tensor for name, tensor in load_file(weights_file(run)).items()}
