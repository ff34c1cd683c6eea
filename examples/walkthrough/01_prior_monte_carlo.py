"""1. Naive Monte Carlo over the prior, and why it fails in high dimensions.

    log p(x) = log E_{p(z)} p(x|z) ≈ log 1/S Σ_s p(x|z_s),    z_s ~ p(z)

The estimate of p(x) is unbiased (that of log p(x) is not), but useless: as the latent dimension grows,
almost no sample of the prior lies where the posterior has mass. The effective sample size ESS = (Σ w)²/Σ w²
of the weights w_s = p(x|z_s) measures this. For S samples it tends to S · p(x)² / E_{p(z)} p(x|z)². The
models are probabilistic PCAs of the digits, for which all these quantities have closed forms.

    python examples/walkthrough/01_prior_monte_carlo.py      # writes 01_prior_monte_carlo.png
"""

import argparse
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

import pyro_vae as pv
from pyro_vae import exact

DIMENSIONS = (1, 2, 3, 5, 7, 10, 13, 16, 20)


def digits():
    train, test = pv.load("digits")
    return train.x.flatten(1).double(), test.x.flatten(1).double()


def log_weights(model, x, num_draws):
    """log p(x|z_s) with independent samples of the prior for each datum: ``(num_draws, batch)``."""
    z = model.prior().sample((num_draws, len(x)))
    return model.decoder(z).log_prob(x)


def log_mean_exp(log_w):
    return log_w.logsumexp(0) - math.log(len(log_w))


def effective_sample_size(log_w):
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def expected_share(model, x):
    """p(x)² / E p(x|z)², the limit of ESS/S, in closed form by N(x; m, σ²)² = (4πσ²)^{−½} N(x; m, σ²/2)."""
    sharper = exact.LinearGaussian(model.weight, noise_scale=model.noise_scale / 2**0.5, bias=model.bias)
    log_square = sharper.log_evidence(x) - 0.5 * (4 * math.pi * model.noise_scale**2).log().sum()
    return (2 * model.log_evidence(x) - log_square).exp()


def draw(truth, estimates, sizes, shares):
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(DIMENSIONS, truth, "k-", label="exact")
    for i, (num_draws, values) in enumerate(estimates.items()):
        left.plot(DIMENSIONS, values, "o-", color=f"C{i}", label=f"{num_draws:,} samples of the prior")
        right.semilogy(DIMENSIONS, sizes[num_draws], "o", color=f"C{i}", label=f"{num_draws:,} samples")
        right.semilogy(
            DIMENSIONS, [max(1, num_draws * share) for share in shares], "-", color=f"C{i}", alpha=0.5
        )
    left.set(xlabel="latent dimensions", ylabel="log p(x), nats per datum", title="Evidence under PPCA")
    right.plot([], [], "-", color="0.5", label="limit, in closed form")
    right.set(xlabel="latent dimensions", ylabel="effective sample size", title="Effective sample size")
    for ax in (left, right):
        ax.set_xticks([1, 5, 10, 15, 20])
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="01_prior_monte_carlo.png")
    args = parser.parse_args()
    mpl.use("Agg")

    torch.manual_seed(0)
    train, test = digits()
    x = test[:50]
    counts = (100, 10_000)
    truth, shares, estimates, sizes = [], [], {n: [] for n in counts}, {n: [] for n in counts}
    print(
        f"{'dim':>4} {'log p(x)':>10}"
        + "".join(f" {f'{n:,} draws':>14} {'ESS':>8}" for n in counts)
        + "   nats per datum"
    )
    for k in DIMENSIONS:
        model = exact.LinearGaussian.ppca(train, k)
        truth.append(model.log_evidence(x).mean().item())
        shares.append(expected_share(model, x).log().mean().exp().item())
        for n in counts:
            log_w = log_weights(model, x, n)
            estimates[n].append(log_mean_exp(log_w).mean().item())
            sizes[n].append(effective_sample_size(log_w).log().mean().exp().item())
        cells = "".join(f" {estimates[n][-1]:14.2f} {sizes[n][-1]:8.1f}" for n in counts)
        print(f"{k:4} {truth[-1]:10.2f}{cells}")
    draw(truth, estimates, sizes, shares).savefig(args.out, dpi=150)
