"""Figure 3 of Kingma & Welling (2013): the marginal likelihood against the number of training samples, for
AEVB, wake-sleep and Monte Carlo EM.

The pairs have 3 latents and one hidden layer of 100 tanh units in encoder and decoder. They are trained on
1000 and on 50,000 binarized MNIST images in minibatches of 100, with Adam, where the paper has Adagrad. Monte
Carlo EM has 10 leapfrog steps, step sizes for an acceptance rate of 90 %, and 5 updates of the parameters for
each draw; a training sample is a datum in an update. It needs a chain for each datum, so it is not run on
50,000 images.

The curves are AIS, a lower bound of log p(x) in expectation, of the first 100 training and test images. At
the end the estimator of the paper's appendix D is printed too: a Gaussian q is fitted to half of the HMC
draws from p(z|x), with 4 leapfrog steps, and 1/p(x) is the mean of q(z)/p(x, z) over the other half. For
data whose chains end in different modes it is wrong by tens of nats or more, so its difference from AIS is
printed as a median over data and as a mean.

    python examples/papers/aevb_figure3.py --data-dir DIR      # writes aevb_figure3.png
"""

import argparse
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, evidence, infer, nets, priors

BATCH, UPDATES = 100, 5
MAX_MCEM = 1000  # training images of Monte Carlo EM, which has a chain for each
COLORS = {"AEVB": "C3", "wake-sleep": "C2", "Monte Carlo EM": "C0"}
MOVES = evidence.HMC(num_leapfrog=4)
DRAWS = evidence.Annealing(num_temperatures=60, num_chains=10, schedule="sigmoid", transition=MOVES)
AIS = evidence.Annealing(num_temperatures=200, num_chains=4, transition=MOVES)
SEEN = (10_000, 50_000, 200_000, 1_000_000)


def make_vae():
    return pv.VAE(
        prior=priors.StandardNormal(3),
        decoder=conditionals.Bernoulli(nets.MLP(3, (100,)), event_shape=(28, 28)),
        encoder=conditionals.Normal(nets.MLP(784, (100,)), event_shape=3),
    )


def by_fit(vae, x, loss, seen):
    """Train by SVI. Yields the number of training samples at the first epoch from each of ``seen`` on."""
    seen = sorted({-(-point // len(x)) * len(x) for point in seen})
    epochs = pv.train(
        vae.model,
        vae.guide,
        x,
        loss=loss,
        optim=Adam({"lr": 1e-3}),
        num_epochs=seen[-1] // len(x),
        batch_size=BATCH,
        progress=False,
    )
    for record in epochs:
        if record.epoch * len(x) in seen:
            yield record.epoch * len(x)


def by_mcem(vae, x, seen):
    """Train by Monte Carlo EM, as :func:`by_fit`."""
    per_epoch, optim, history, done = UPDATES * len(x), Adam({"lr": 1e-3}), None, 0
    for point in seen:
        num_epochs = -(-point // per_epoch) - done
        if num_epochs > 0:
            history = infer.mcem(
                vae.model,
                x,
                optim=optim,
                num_epochs=num_epochs,
                batch_size=BATCH,
                num_updates=UPDATES,
                start=history,
                progress=False,
            )
            done += num_epochs
            yield done * per_epoch
    print(f"Monte Carlo EM, at the end: {history}")


METHODS = {
    "AEVB": lambda vae, x, seen: by_fit(vae, x, Trace_ELBO(), seen),
    "wake-sleep": lambda vae, x, seen: by_fit(vae, x, infer.WakeSleep(), seen),
    "Monte Carlo EM": by_mcem,
}


def run(method, train, evaluated, seen, seed):
    """Train a pair. Returns the training samples seen, with log p(x) of the training and of the test images
    at these points by AIS; and the final log p(x) of each image by AIS and by appendix D."""
    pyro.set_rng_seed(seed)
    vae, points = make_vae(), []
    for num_seen in METHODS[method](vae, train, seen):
        by_ais = evidence.ais(vae.model, evaluated, annealing=AIS, progress=False).log_evidence
        points.append((num_seen, *(part.mean().item() for part in by_ais.chunk(2))))
    by_draws = evidence.reciprocal_importance(
        vae.model, evaluated, num_samples=100, annealing=DRAWS, thinning=1, progress=False
    ).log_evidence
    return points, by_ais, by_draws


def mean_and_error(values):
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def draw(curves):
    sizes = sorted({n for n, _ in curves})
    fig, axes = plt.subplots(
        1, len(sizes), figsize=(1 + 4 * len(sizes), 3.8), layout="constrained", sharey=True, squeeze=False
    )
    for ax, num_data in zip(axes[0], sizes, strict=True):
        for (n, method), points in curves.items():
            if n == num_data:
                seen, train, test = zip(*points, strict=True)
                ax.semilogx(seen, train, ".-", color=COLORS[method], label=f"{method} (train)")
                ax.semilogx(seen, test, ".--", color=COLORS[method], label=f"{method} (test)")
        ax.set(title=f"$N_{{train}}$ = {num_data}", xlabel="training samples")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("marginal log-likelihood, nats per datum")
    axes[0][0].legend(frameon=False, fontsize="small")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-data", type=int, nargs="+", default=[1000, 50_000], help="training images")
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="aevb_figure3.png")
    parser.add_argument("--smoke-test", action="store_true", help="an epoch on 100 images")
    args = parser.parse_args()
    mpl.use("Agg")

    train, test = (part.fixed() for part in pv.load("mnist", binarize="stochastic", data_dir=args.data_dir))
    sizes, seen, num_evaluated = args.num_data, SEEN, 100
    if args.smoke_test:
        sizes, seen, num_evaluated = (100,), (1000,), 10
    evaluated = torch.cat([part.head(num_evaluated).x for part in (train, test)])
    curves = {}
    for size in sizes:
        final = {}
        for method in METHODS:
            if method == "Monte Carlo EM" and size > MAX_MCEM:
                continue
            start = time.perf_counter()
            points, by_ais, by_draws = run(method, train.head(size), evaluated, seen, args.seed)
            curves[size, method], final[method] = points, by_ais
            for name, a, d in zip(("training", "test"), by_ais.chunk(2), by_draws.chunk(2), strict=True):
                print(
                    f"N = {size}, {method}, {points[-1][0]} samples, {name} images: log p(x) by AIS "
                    f"{mean_and_error(a)} nats; appendix D minus AIS: median {(d - a).median():.2f}, mean "
                    f"{mean_and_error(d - a)}",
                    flush=True,
                )
            print(f"N = {size}, {method}: {time.perf_counter() - start:.0f} s", flush=True)
        for method in list(final)[1:]:
            for i, name in enumerate(("training", "test")):
                gain = (final["AEVB"] - final[method]).chunk(2)[i]
                print(
                    f"N = {size}, {name} images: AEVB above {method} by {mean_and_error(gain)} nats per "
                    "datum",
                    flush=True,
                )
    draw(curves).savefig(args.out, dpi=110)
