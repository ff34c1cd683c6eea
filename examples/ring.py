"""A ring in the plane: a deep network maps a Gaussian latent to a ring (Doersch 2016, figure 2).

The weight β of the KL rises from 0 to 1 over 50 epochs. This warm-up prevents posterior collapse early in
training; compare ``--warm-up 0``. The reported ELBO always has β = 1. Its upper bound is E log p(x) = −0.95
nats under the true density.

    python examples/ring.py      # writes ring.png
"""

import argparse

import matplotlib as mpl
import pyro
import torch
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, nets, plots, priors

HIDDEN = (100, 100, 100)


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(2),
        decoder=conditionals.Normal(
            nets.MLP(2, HIDDEN, activation=torch.relu), event_shape=2, min_scale=0.05
        ),
        encoder=conditionals.Normal(nets.MLP(2, HIDDEN, activation=torch.relu), event_shape=2),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=50, help="epochs over which β rises from 0 to 1")
    parser.add_argument("--out", default="ring.png")
    parser.add_argument("--smoke-test", action="store_true", help="two epochs")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    train, test = pv.load("ring")
    vae = make_vae()
    history = pv.fit(
        vae.model,
        vae.guide,
        train,
        validation=test,
        optim=Adam({"lr": 2e-3}),
        num_epochs=2 if args.smoke_test else args.num_epochs,
        beta=lambda epoch: min(1.0, epoch / args.warm_up) if args.warm_up else 1.0,
    )
    print(history)
    ax = plots.plot_points({"data": test.x, "samples of the model": vae.sample(len(test))})
    plots.figure_of(ax).savefig(args.out, dpi=150)
