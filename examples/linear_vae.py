"""A linear VAE is probabilistic PCA: SVI reaches the maximum likelihood, which has a closed form.

p(x|z) = N(Wz + b, σ²I) with learned W, b and σ, and q(z|x) = N(V x + c, diag s²). The ELBO has no spurious
local maxima. At its maximum the gap is 0 (Lucas et al. 2019; Tipping & Bishop 1999) and its value is
−½[D log 2π + Σ_{j≤k} log λⱼ + (D−k) log σ² + D], with λⱼ the eigenvalues of the data covariance and σ² the
mean of λⱼ for j > k. A unit is active if E[z|x] varies with x.

    python examples/linear_vae.py      # writes linear_vae.png
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import ExponentialLR

import pyro_vae as pv
from pyro_vae import conditionals, exact, nets, priors


def make_vae(num_pixels, num_units):
    return pv.VAE(
        prior=priors.StandardNormal(num_units),
        decoder=conditionals.Normal(nets.MLP(num_units, ()), event_shape=num_pixels, scale="isotropic"),
        encoder=conditionals.Normal(nets.MLP(num_pixels, ()), event_shape=num_units, scale="learned"),
    ).double()


def as_exact(vae):
    """The model of ``vae`` as an exact model."""
    loc = vae.model.decoder.readout["loc"].layer
    noise = vae.decode(torch.zeros(loc.in_features, dtype=torch.double)).base_dist.scale
    return exact.LinearGaussian(loc.weight.detach(), noise_scale=noise.detach(), bias=loc.bias.detach())


def train(vae, x, num_epochs, loss=None):
    """Full-batch training with Adam. The learning rate decays by a factor of 1000."""
    optim = ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 1e-3 ** (1 / num_epochs)}
    )
    return pv.fit(
        vae.model,
        vae.guide,
        x,
        loss=loss or Trace_ELBO(),
        optim=optim,
        num_epochs=num_epochs,
        batch_size=None,
    )


def active_units(vae, x, threshold=0.01):
    """Number of units with Var_x(E[z|x]) above the threshold (Burda et al. 2016)."""
    return int((vae.encode(x).mean.var(0) > threshold).sum())


def digits():
    """All 1797 digits, grey values 0 … 1, centred."""
    x = torch.cat([part.x for part in pv.load("digits")]).flatten(1).double()
    return x - x.mean(0)


def draw(history, best, eigenvalues, vae):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(
        [epoch.epoch for epoch in history.epochs],
        [epoch.train.elbo for epoch in history.epochs],
        label="ELBO, one sample per datum",
    )
    left.axhline(best, color="k", ls="--", label="maximum log-likelihood of PPCA")
    left.set(
        xlabel="epochs",
        ylabel="nats per datum",
        ylim=(best - 30, best + 3),
        title="SVI of a linear VAE",
        xscale="log",
    )
    toy = as_exact(vae)
    noise = toy.noise_scale[0] ** 2
    learned = torch.linalg.svdvals(toy.weight) ** 2 + noise
    right.semilogy(range(1, len(eigenvalues) + 1), eigenvalues.clamp_min(1e-4), "k.", label="data covariance")
    right.plot(range(1, len(learned) + 1), learned, "o", mfc="none", ms=10, label="W Wᵀ + σ² I")
    right.axhline(noise, color="C0", ls="--", label="σ²")
    right.set(xlabel="j", ylabel="eigenvalue", title="Learned eigenvalues")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=5000)
    parser.add_argument("-k", "--num-units", type=int, default=5)
    parser.add_argument("--out", default="linear_vae.png")
    parser.add_argument("--smoke-test", action="store_true", help="twenty epochs")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    x = digits()
    best = exact.LinearGaussian.ppca(x, args.num_units).log_evidence(x).mean().item()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    vae = make_vae(x.shape[1], args.num_units)
    history = train(vae, x, num_epochs=20 if args.smoke_test else args.num_epochs)
    report = pv.compare(as_exact(vae), vae.guide, x, num_particles=2, split=False)
    print(f"maximum log-likelihood of PPCA {best:.4f} nats per datum")
    elbo = report.elbo.mean()
    print(f"ELBO {elbo:.4f}, {best - elbo:.4f} below it; gap {report.gap.mean():.4f}")
    print(f"{active_units(vae, x)} active units of {args.num_units}")
    draw(history, best, eigenvalues, vae).savefig(args.out, dpi=150)
