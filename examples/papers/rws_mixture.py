"""Reweighted wake-sleep and VIMCO by the number of particles: the Gaussian mixture of Le et al. (2020).

z ~ Categorical(softmax(θ/2)) with 20 components, x ~ N(10z, 5²); q(z|x) is the softmax of a network
1–16–16–20 of tanh units. As in the paper the data come from weights ∝ 5, 6, …, 24, a fresh batch of 100 at
each step; θ begins far off, at 38, 36, …, 0, where nearly all data belong to the first component; Adam with a
learning rate of 1e-3.

The error of the guide is the mean over test data of ‖q(z|x) − p(z|x)‖, with p(z|x) the exact posterior of
the mixture that made the data. The paper says: with K it falls for reweighted wake-sleep (wake-wake), and not
for VIMCO, whose gradient of φ has a signal-to-noise ratio that falls with K.

The seeds run side by side: each row of a batch has the parameters of its seed, and the loss is a sum over
rows, so each seed is trained as it would be alone.

    python examples/papers/rws_mixture.py --out FOLDER      # writes rws_mixture.png
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, infer

NUM_COMPONENTS, DISTANCE, SCALE, BATCH = 20, 10.0, 5.0, 100
NUM_PARTICLES = (2, 5, 20)
OBJECTIVES = {"reweighted wake-sleep": infer.ReweightedWakeSleep, "VIMCO": infer.VIMCO}
COLORS = {"reweighted wake-sleep": "C0", "VIMCO": "C3"}


class Pair(nn.Module):
    """The model with its learned weights, and the guide, once for each seed."""

    def __init__(self, num_seeds):
        super().__init__()
        self.logits = nn.Parameter(2.0 * torch.arange(NUM_COMPONENTS).flip(0).repeat(num_seeds, 1))
        sizes = (1, 16, 16, NUM_COMPONENTS)
        layers = [[nn.Linear(*shape) for _ in range(num_seeds)] for shape in pairwise(sizes)]
        self.weights, self.biases = (
            nn.ParameterList(torch.stack([getattr(one, name).detach() for one in layer]) for layer in layers)
            for name in ("weight", "bias")
        )

    def prior(self, seed):
        return dist.Categorical(logits=self.logits[seed] / 2)

    def posterior(self, x, seed):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x if i == 0 else x.tanh()
            x = (weight[seed] @ x.unsqueeze(-1)).squeeze(-1) + bias[seed]
        return dist.Categorical(logits=x)

    def model(self, x, seed):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(seed))
            pyro.sample("x", dist.Normal(DISTANCE * z.unsqueeze(-1), SCALE).to_event(1), obs=x)

    def guide(self, x, seed):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x, seed))


def make_mixture(weights):
    locs = DISTANCE * torch.arange(float(NUM_COMPONENTS)).unsqueeze(-1)
    return exact.FiniteMixture(weights, locs, torch.tensor([[SCALE]]))


@torch.no_grad()
def errors(pair, truth, x, num_seeds):
    """Of each seed, ``(3, num_seeds)``: ‖q(z|x) − p(z|x)‖, KL(q‖p) in nats, and that of the weights."""
    posterior, found = truth.posterior(x), []
    for seed in range(num_seeds):
        index = torch.full((len(x),), seed)
        q = pair.posterior(x, index)
        weights = pair.prior(index[:1]).probs[0]
        found.append(
            (
                (q.probs - posterior.probs).norm(dim=-1).mean(),
                (q.probs * (q.logits - posterior.logits)).sum(-1).mean(),
                (weights - truth.weights).norm(),
            )
        )
    return torch.tensor(found).mT


def train(objective, truth, x_test, num_seeds, num_steps):
    """Returns the :func:`errors` of the trained pairs, ``(3, num_seeds)``."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pair = Pair(num_seeds)
    svi = pv.SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), objective)
    seed = torch.arange(num_seeds).repeat_interleave(BATCH)
    for _ in range(num_steps):
        svi.step(truth.sample(len(seed)), seed)
    return errors(pair, truth, x_test, num_seeds)


def draw(means, ses):
    """``means``, ``ses``: of the :func:`errors`, by objective and K."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for ax, part in zip(axes, (0, 2), strict=True):
        for name in OBJECTIVES:
            mean, se = (torch.stack([of[name, k][part] for k in NUM_PARTICLES]) for of in (means, ses))
            ax.errorbar(NUM_PARTICLES, mean, yerr=se, fmt="o-", capsize=4, color=COLORS[name], label=name)
        ax.set(xlabel="K", xscale="log", yscale="log")
        ax.set_xticks(NUM_PARTICLES, NUM_PARTICLES)
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    axes[0].set(ylabel="‖q(z|x) − p(z|x)‖", title="Error of the guide")
    axes[1].set(ylabel="‖softmax(θ/2) − weights‖", title="Error of the mixture weights")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-steps", type=int, default=50_000)
    parser.add_argument("--num-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--smoke-test", action="store_true", help="twenty steps")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(1)
    truth, num_steps = make_mixture(torch.arange(5.0, 5 + NUM_COMPONENTS)), args.num_steps
    x_test, means, ses = truth.sample(1000), {}, {}
    if args.smoke_test:
        num_steps = 20
    print(f"after {num_steps} steps: mean and standard error of {args.num_seeds} seeds")
    for name, make in OBJECTIVES.items():
        for k in NUM_PARTICLES:
            last = train(make(k), truth, x_test, args.num_seeds, num_steps)
            means[name, k], ses[name, k] = last.mean(-1), last.std(-1) / args.num_seeds**0.5
            guide, kl, weights = (
                f"{mean:.4f} ± {se:.4f}" for mean, se in zip(means[name, k], ses[name, k], strict=True)
            )
            print(f"{name:22} K = {k:2}: guide {guide}, KL {kl} nats, mixture weights {weights}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(means, ses).savefig(args.out / "rws_mixture.png", dpi=110)
