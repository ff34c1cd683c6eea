"""AEVB's network on binarized MNIST (Kingma & Welling 2013): 500 tanh units on both sides, 20 latents, a
Bernoulli decoder.

It is trained twice: with plain ``pyro.infer.SVI``, and with ``fit``, which runs the same steps and records
the ELBO.

    python examples/mnist.py --data-dir DIR
"""

import argparse

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ExponentialLR

import pyro_vae as pv
from pyro_vae import conditionals, nets, priors


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(20),
        decoder=conditionals.Bernoulli(nets.MLP(20, (500,)), event_shape=(28, 28)),
        encoder=conditionals.Normal(nets.MLP(784, (500,)), event_shape=20),
    )


def make_optim():
    return ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "gamma": 0.85})


def by_svi(train, test, num_epochs):
    """The usual Pyro training loop."""
    vae, optim = make_vae(), make_optim()
    svi = SVI(vae.model, vae.guide, optim, Trace_ELBO())
    for epoch in range(1, num_epochs + 1):
        loss = sum(svi.step(x) for x in train.batches(100))  # resampled binary images in every epoch
        optim.step()
        print(f"epoch {epoch}: train ELBO {-loss / len(train):.2f}")
    return pv.evaluate(vae.model, vae.guide, test).mean()


def by_fit(train, test, num_epochs):
    vae = make_vae()
    history = pv.fit(vae.model, vae.guide, train, validation=test, optim=make_optim(), num_epochs=num_epochs)
    for record in history.epochs:
        print(f"epoch {record.epoch}: train ELBO {record.train.elbo:.2f}, held-out {record.validation}")
    return history.epochs[-1].validation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=15)
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="one epoch on 1000 images")
    args = parser.parse_args()

    train, test = pv.load("mnist", binarize="stochastic", data_dir=args.data_dir)
    if args.smoke_test:
        train, test, args.num_epochs = train.head(1000), test.head(1000), 1
    for name, run in (("SVI", by_svi), ("fit", by_fit)):
        pyro.set_rng_seed(args.seed)
        print(f"held-out, {name}: {run(train, test, args.num_epochs)}")
