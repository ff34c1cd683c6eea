"""9. The amortization gap: one encoder for all data or one q per datum.

    log p(x) − ELBO = approximation + amortization
                    = [log p(x) − L(q*)] + [L(q*) − L(q)]

with q* the best diagonal Gaussian for the datum. An encoder needs no optimization for a new datum. Its
amortization gap has two sources: the limits of its network and training and, on new data, overfitting. A
VAE of binarized digits with a 2-D latent is trained once and its model is frozen. Encoders of several
widths are trained for it. log p(x) is computed by quadrature.

    python examples/walkthrough/09_amortization.py      # writes 09_amortization.png; 2 minutes
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, exact, nets, priors

WIDTHS = (2, 10, 50, 500)


def make_encoder(width):
    return conditionals.Normal(nets.MLP(64, (width,)), event_shape=2)


def train_model(data, num_epochs):
    """p(z) p(x|z), trained with a separate encoder and frozen."""
    decoder = conditionals.Bernoulli(nets.MLP(2, (100,)), event_shape=(8, 8))
    vae = pv.VAE(priors.StandardNormal(2), decoder, make_encoder(100))
    pv.fit(vae.model, vae.guide, data, num_epochs=num_epochs, optim=Adam({"lr": 2e-3}))
    return vae.model.requires_grad_(False).eval()


def train_guide(model, data, width, num_epochs):
    guide = pv.Guide(make_encoder(width))
    pv.fit(model, guide, data, num_epochs=num_epochs, optim=Adam({"lr": 2e-3}))
    return guide


def mean_of(values):
    """Mean over data ± standard error."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def draw(splits, widths):
    fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, split in enumerate(splits.values()):
        at = i + 0.6 * (i // len(widths))
        approximation, amortization = split.approximation.mean().item(), split.amortization.mean().item()
        ax.bar(at, approximation, color="C7", label="approximation: diagonal Gaussians" if i == 0 else None)
        ax.bar(
            at,
            amortization,
            bottom=approximation,
            color="C1",
            label="amortization: one encoder for all" if i == 0 else None,
        )
        ax.text(
            at, approximation + amortization, f"{approximation + amortization:.2f}", ha="center", va="bottom"
        )
    places = [i + 0.6 * (i // len(widths)) for i in range(len(splits))]
    ax.set_xticks(places, [f"{width} units\n{name if width == widths[0] else ''}" for name, width in splits])
    ax.set(ylabel="log p(x) − ELBO, nats per datum", title="Gap by width of the encoder")
    ax.margins(y=0.1)
    ax.legend(frameon=False, loc="upper right")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=50, help="data of each set to split the gap of")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="hidden units of each encoder")
    parser.add_argument("--out", default="09_amortization.png")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    num_epochs, rows, widths = args.num_epochs, args.rows, args.widths
    train, test = pv.load("digits", binarize="threshold")
    model = train_model(train, num_epochs)
    sets = {"data it was trained on": train.fixed().x[:rows], "new data": test.fixed().x[:rows]}
    evidence = {name: exact.Grid(model, tolerance=1e-4).log_evidence(x).to(x) for name, x in sets.items()}
    guides = {width: train_guide(model, train, width, num_epochs) for width in widths}
    splits = {}
    for name, x in sets.items():
        print(f"{name}: log p(x) = {evidence[name].mean():.2f} nats per datum")
        for width, guide in guides.items():
            split = pv.split_gap(model, guide, x, log_evidence=evidence[name])
            splits[name, width] = split
            parts = (f"{part} {mean_of(getattr(split, part))}" for part in ("approximation", "amortization"))
            print(f"  {width:4} units: {', '.join(parts)}")
    draw(splits, widths).savefig(args.out, dpi=150)
