"""5. Training guide and model alternately or jointly.

The bound log p_θ(x) − KL(q‖p_θ(z|x)) increases in either argument: with a frozen model, the guide
approaches the posterior; with a frozen guide, the model adapts to it. With exact steps this is the EM
algorithm (Neal & Hinton 1998). SVI takes both steps at once. The model is a linear VAE of the digits. Its
evidence is known throughout training, and its maximum is the maximum likelihood of probabilistic PCA.

    python examples/walkthrough/05_in_turn.py      # writes 05_in_turn.png
"""

import argparse
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import conditionals, exact, nets, priors

UNITS = 5


def digits():
    x = torch.cat([part.x for part in pv.load("digits")]).flatten(1).double()
    return x - x.mean(0)


def make_vae():
    return pv.VAE(
        priors.StandardNormal(UNITS),
        conditionals.Normal(nets.MLP(UNITS, ()), event_shape=64, scale="isotropic"),
        conditionals.Normal(nets.MLP(64, ()), event_shape=UNITS, scale="learned"),
    ).double()


def as_exact(vae):
    """The model of ``vae`` as an exact model."""
    loc = vae.model.decoder.readout["loc"].layer
    noise = vae.decode(torch.zeros(UNITS, dtype=torch.double)).base_dist.scale
    return exact.LinearGaussian(loc.weight.detach(), noise_scale=noise.detach(), bias=loc.bias.detach())


def bounds(vae, x):
    """Mean ELBO and mean log evidence in closed form, in nats per datum."""
    report = pv.compare(as_exact(vae), vae.guide, x, num_particles=2, split=False)
    return report.elbo.mean().item(), report.log_evidence.mean().item()


def climb(vae, x, turns, epochs_each, every=10):
    """Train the given parts in turn and return records (epoch, ELBO, log evidence, part).

    :param turns: the part that each turn trains: "guide", "model" or "both".
    """
    optims = {part: Adam({"lr": 0.01}) for part in turns}
    records = [(0, *bounds(vae, x), "both")]
    for part in turns:
        for other, frozen in ((vae.model, part == "guide"), (vae.guide, part == "model")):
            other.requires_grad_(not frozen).train(not frozen)
        for _ in range(epochs_each // every):
            pv.fit(
                vae.model,
                vae.guide,
                x,
                loss=TraceMeanField_ELBO(),
                optim=optims[part],
                num_epochs=every,
                batch_size=None,
            )
            records.append((records[-1][0] + every, *bounds(vae, x), part))
    vae.requires_grad_(True).train()
    return records


def draw(in_turn, at_once, best):
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    colours = {"guide": "C0", "model": "C1", "both": "C2"}
    for ax, records, title in zip(axes, (in_turn, at_once), ("Alternating", "Joint"), strict=True):
        epochs, _, evidence, _ = zip(*records, strict=True)
        ax.semilogy(epochs, [best - value for value in evidence], "k-", lw=1, label="log p(x) of the model")
        for before, after in pairwise(records):
            ax.plot([before[0], after[0]], [best - before[1], best - after[1]], color=colours[after[3]], lw=2)
        for part in dict.fromkeys(record[3] for record in records[1:]):
            what = {"guide": "training q", "model": "training p", "both": "training both"}[part]
            ax.plot([], [], color=colours[part], lw=2, label=f"ELBO, {what}")
        ax.set(xlabel="epochs", title=title)
        ax.legend(frameon=False, loc="lower right")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("below the maximum likelihood, nats per datum")
    axes[0].invert_yaxis()
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of 100 epochs of guide and of model")
    parser.add_argument("--out", default="05_in_turn.png")
    args = parser.parse_args()
    mpl.use("Agg")

    x, runs = digits(), {}
    best = exact.LinearGaussian.ppca(x, UNITS).log_evidence(x).mean().item()
    for name, turns in {
        "in turn": ["guide", "model"] * args.rounds,
        "at once": ["both"] * (2 * args.rounds),
    }.items():
        pyro.set_rng_seed(0)
        runs[name] = climb(make_vae(), x, turns, epochs_each=100)
        epochs, elbo, evidence, _ = runs[name][-1]
        print(
            f"{name}: after {epochs} epochs ELBO {elbo:.3f}, log p(x) {evidence:.3f}; at best {best:.3f} "
            "nats per datum"
        )
    draw(*runs.values(), best).savefig(args.out, dpi=150)
