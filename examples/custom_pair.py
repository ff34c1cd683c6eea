"""A custom model/guide pair with two latents per datum, written as plain Pyro functions.

The digits are counts 0 … 16 per pixel. Image i has a latent shape zᵢ and a latent brightness sᵢ:

    zᵢ ~ N(0, I)    sᵢ ~ Gamma(2, 2/mean)    xᵢⱼ ~ Poisson(sᵢ · softmax(decoder(zᵢ))ⱼ · number of pixels)

so z does not have to encode the brightness. Every function of the library works on such a pair.

    python examples/custom_pair.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import conditionals, nets

LATENT_DIM, PIXELS, MEAN = 5, 64, 5.0

decoder = nn.Sequential(nn.Linear(LATENT_DIM, 200), nn.Tanh(), nn.Linear(200, PIXELS), nn.Softmax(-1))
shape_encoder = conditionals.Normal(nets.MLP(PIXELS, (200,)), event_shape=LATENT_DIM)
brightness_encoder = conditionals.Gamma(nets.MLP(PIXELS, (50,)), event_shape=1)


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT_DIM), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(x.new_full((1,), 2.0), 2.0 / MEAN).to_event(1))
        pyro.sample("x", dist.Poisson(s * decoder(z) * PIXELS).to_event(1), obs=x)


def guide(x):
    pyro.module("shape_encoder", shape_encoder)
    pyro.module("brightness_encoder", brightness_encoder)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", shape_encoder(x / 16))
        pyro.sample("s", brightness_encoder(x / 16))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("--smoke-test", action="store_true", help="two epochs")
    args = parser.parse_args()

    pyro.set_rng_seed(0)
    x_train, x_test = (data.levels().x.flatten(1).float() for data in pv.load("digits"))
    print(pv.check_pair(model, guide, x_train[:100]), "\n")

    num_epochs = 2 if args.smoke_test else args.num_epochs
    history = pv.fit(
        model, guide, x_train, validation=x_test, optim=Adam({"lr": 2e-3}), num_epochs=num_epochs
    )
    print(history)
    with torch.no_grad():
        s = brightness_encoder(x_test / 16).mean.squeeze(-1)
    print(
        "correlation of E[s|x] with the mean count of an image: "
        f"{torch.corrcoef(torch.stack([s, x_test.mean(1)]))[0, 1]:.3f}"
    )
