"""Figure 2 of Kingma & Welling (2013): the bound against the number of training samples, for AEVB and for
wake-sleep.

Both train the same pairs with the same optimizer: one hidden layer of tanh units in encoder and decoder (500
for MNIST, 200 for Frey Face), minibatches of 100 and one draw of z for each datum, as in the paper, and Adam
with a learning rate of 1e-3, where the paper has Adagrad.
MNIST is binarized, anew at each access for training and once for the test set. Frey Face has a Gaussian
decoder whose means pass a sigmoid. The bound is the ELBO of 2000 training and 2000 test images at most, in
nats per datum; the last comparison has all test images. Both methods estimate it alike.

    python examples/papers/aevb_figure2.py --data-dir DIR      # writes aevb_figure2.png
"""

import argparse
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import conditionals, infer, nets, priors

BATCH = 100
METHODS = {"AEVB": Trace_ELBO, "wake-sleep": infer.WakeSleep}
COLORS = {"AEVB": "C3", "wake-sleep": "C2"}
PANELS = {"mnist": (3, 20), "frey-faces": (2, 10)}
TITLES = {"mnist": "MNIST", "frey-faces": "Frey Face"}


def make_vae(name, num_latents):
    if name == "mnist":
        shape, hidden = (28, 28), 500
        decoder = conditionals.Bernoulli(nets.MLP(num_latents, (hidden,)), event_shape=shape)
    else:
        shape, hidden = (28, 20), 200
        decoder = conditionals.Normal(
            nets.MLP(num_latents, (hidden,)),
            event_shape=shape,
            min_scale=0.02,
            loc_constraint=constraints.unit_interval,
        )
    encoder = conditionals.Normal(nets.MLP(shape[0] * shape[1], (hidden,)), event_shape=num_latents)
    return pv.VAE(prior=priors.StandardNormal(num_latents), decoder=decoder, encoder=encoder)


def load(name, data_dir):
    if name == "mnist":
        train, test = pv.load(name, binarize="stochastic", data_dir=data_dir)
        return train, test.fixed()
    train, test = pv.load(name, data_dir=data_dir)
    return train.head(len(train) // BATCH * BATCH), test


def is_shown(epoch, per_decade=8):
    """Whether the bound is evaluated after this epoch: about ``per_decade`` times each factor of ten."""
    return any(epoch == round(10 ** (i / per_decade)) for i in range(5 * per_decade))


def run(name, num_latents, method, train, test, num_samples, seed):
    """Train a pair. Returns the samples seen, and the bounds of training and test data at these points; and
    the bound of each test datum at the end."""
    pyro.set_rng_seed(seed)
    vae = make_vae(name, num_latents)
    some, held_out = train.head(2000), test.head(2000)
    num_epochs = max(1, round(num_samples / len(train)))
    points = []
    epochs = pv.train(
        vae.model,
        vae.guide,
        train,
        loss=METHODS[method](),
        optim=Adam({"lr": 1e-3}),
        num_epochs=num_epochs,
        batch_size=BATCH,
        progress=False,
    )
    for record in epochs:
        if is_shown(record.epoch) or record.epoch == num_epochs:
            bounds = [pv.evaluate(vae.model, vae.guide, x, check=False).mean().elbo for x in (some, held_out)]
            points.append((record.epoch * len(train), *bounds))
    return points, pv.evaluate(vae.model, vae.guide, test, num_particles=5).elbo


def draw(curves):
    fig, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    panels = [(name, num_latents) for name, sizes in PANELS.items() for num_latents in sizes]
    for ax, (name, num_latents) in zip(axes, panels, strict=True):
        for method in METHODS:
            seen, train, test = zip(*curves[name, num_latents, method], strict=True)
            ax.semilogx(seen, train, color=COLORS[method], label=f"{method} (train)")
            ax.semilogx(seen, test, color=COLORS[method], ls="--", label=f"{method} (test)")
        ax.set(title=f"{TITLES[name]}, $N_z$ = {num_latents}", xlabel="training samples")
        best = max(max(point[1:]) for method in METHODS for point in curves[name, num_latents, method])
        ax.set_ylim((-160, best + 5) if name == "mnist" else (0, best + 100))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("bound, nats per datum")
    axes[0].legend(frameon=False, fontsize="small")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-samples", type=float, default=3e6, help="training samples of each run")
    parser.add_argument("--data-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="aevb_figure2.png")
    parser.add_argument("--smoke-test", action="store_true", help="an epoch on 200 images")
    args = parser.parse_args()
    mpl.use("Agg")

    curves = {}
    for name, sizes in PANELS.items():
        train, test = load(name, args.data_dir)
        if args.smoke_test:
            train, test, args.num_samples = train.head(200), test.head(100), 200
        for num_latents in sizes:
            bounds = {}
            for method in METHODS:
                start = time.perf_counter()
                points, bounds[method] = run(
                    name, num_latents, method, train, test, args.num_samples, args.seed
                )
                curves[name, num_latents, method] = points
                print(
                    f"{TITLES[name]}, N_z = {num_latents}, {method}: {points[-1][0]} training samples, "
                    f"training bound {points[-1][1]:.2f}, test bound {bounds[method].mean():.2f} nats, "
                    f"{time.perf_counter() - start:.0f} s",
                    flush=True,
                )
            gain = bounds["AEVB"] - bounds["wake-sleep"]
            error = gain.std() / len(gain) ** 0.5
            print(
                f"{TITLES[name]}, N_z = {num_latents}: AEVB above wake-sleep by {gain.mean():.2f} ± "
                f"{error:.2f} nats per datum, {gain.mean() / error:.1f} standard errors",
                flush=True,
            )
    draw(curves).savefig(args.out, dpi=110)
