"""Frey Face (Kingma & Welling 2013, section 5).

The latent has two dimensions. The Gaussian decoder learns the mean and the scale.

    python examples/frey_faces.py --data-dir DIR      # writes frey_faces.png
"""

import argparse

import matplotlib as mpl
import pyro
from pyro.optim import Adam
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, nets, plots, priors


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(2),
        # A sigmoid constrains the means to (0, 1). min_scale bounds the density: with a bound of 0.001, a
        # quarter of a grey level, the model fits the discrete grey levels instead of the faces.
        decoder=conditionals.Normal(
            nets.MLP(2, (200,)),
            event_shape=(28, 20),
            min_scale=0.02,
            loc_constraint=constraints.unit_interval,
        ),
        encoder=conditionals.Normal(nets.MLP(560, (200,)), event_shape=2),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=300)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", default="frey_faces.png")
    parser.add_argument("--smoke-test", action="store_true", help="two epochs")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    train, test = pv.load("frey-faces", data_dir=args.data_dir)
    vae = make_vae()
    num_epochs = 2 if args.smoke_test else args.num_epochs
    history = pv.fit(
        vae.model, vae.guide, train, validation=test, optim=Adam({"lr": 1e-3}), num_epochs=num_epochs
    )
    print(history)
    plots.figure_of(plots.plot_manifold(vae, steps=12)).savefig(args.out, dpi=150)
