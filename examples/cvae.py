"""Conditional VAEs (Sohn et al. 2015; Doersch 2016) of digits given their class.

One has a prior p(z) that does not depend on the class, as in Doersch's tutorial; the other learns p(z|c).
In both, z encodes what the class does not determine, such as the handwriting. Each row of the figure shows
one class.

    python examples/cvae.py      # writes cvae.png
"""

import argparse

import matplotlib as mpl
import pyro
import torch
from pyro.optim import Adam
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import conditionals, nets, plots, priors

LATENT_DIM, CLASSES = 4, 10


def make_cvae(prior):
    return pv.VAE(
        prior=prior,
        decoder=conditionals.ContinuousBernoulli(
            nets.MLP(((LATENT_DIM,), (CLASSES,)), (200,)), event_shape=(8, 8)
        ),
        encoder=conditionals.Normal(nets.MLP(((8, 8), (CLASSES,)), (200,)), event_shape=LATENT_DIM),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=200)
    parser.add_argument("--out", default="cvae.png")
    parser.add_argument("--smoke-test", action="store_true", help="two epochs")
    args = parser.parse_args()
    mpl.use("Agg")

    # the condition is a second argument of model and guide: model(x, c), guide(x, c)
    train, test = (data.given(one_hot(data.labels, CLASSES).float()) for data in pv.load("digits"))
    num_epochs = 2 if args.smoke_test else args.num_epochs
    pyro.set_rng_seed(0)
    conditional_prior = conditionals.Normal(nets.MLP(CLASSES, (50,)), event_shape=LATENT_DIM)
    for name, prior in (("p(z)", priors.StandardNormal(LATENT_DIM)), ("p(z|c)", conditional_prior)):
        cvae = make_cvae(prior)
        history = pv.fit(
            cvae.model, cvae.guide, train, validation=test, optim=Adam({"lr": 2e-3}), num_epochs=num_epochs
        )
        print(f"{name:7} {history}")
    with torch.no_grad():
        c = torch.eye(CLASSES).repeat_interleave(CLASSES, 0)
        images = cvae.decode(cvae.model.prior(c).sample(), c).mean
    ax = plots.plot_images(images, title="E[x|z, c] at z ~ p(z|c), a row for each class")
    plots.figure_of(ax).savefig(args.out, dpi=150)
