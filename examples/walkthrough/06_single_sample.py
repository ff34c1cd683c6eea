"""6. One sample of z per datum is enough.

    ELBO ≈ log p(x, z) − log q(z|x),    z ~ q(z|x)

is an unbiased estimate for every q. For q = N(m, S) and a Gaussian posterior N(μ, Λ⁻¹) its variance is
½‖LᵀΛL − I‖² + ‖LᵀΛδ‖² with S = LLᵀ and δ = m − μ, which is 0 at the exact posterior. For a minibatch of M
data with K samples each, the variance of the mean is

    Var_x(ELBO)/M + E_x Var_q/(M K)

More samples per datum reduce only the second term; more data reduce both. AEVB uses K = 1.

    python examples/walkthrough/06_single_sample.py      # writes 06_single_sample.png
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae import exact

WEIGHT = torch.tensor([[1.0, 0.8], [0.8, 1.0], [0.3, 0.9]], dtype=torch.double)
BATCHES, DRAWS = (1, 10, 100), (1, 2, 5, 10, 20, 50, 100)


def make_model():
    return exact.LinearGaussian(WEIGHT, noise_scale=0.5)


def make_guide(model, shift=0.0):
    """The best independent Gaussians with their means shifted."""

    def guide(x):
        q = model.mean_field(x).base_dist
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(q.loc + shift, q.scale).to_event(1))

    return guide


def single_draws(model, guide, x, num_draws):
    """One-sample estimates of the ELBO of the datum x ``(1, D)``: ``(num_draws,)``."""
    return pv.evaluate(model, guide, x.expand(num_draws, -1)).elbo


def variance(model, shift):
    """Variance of a one-sample estimate, in closed form."""
    scale = model.precision.diagonal() ** -0.5
    stretched = scale.unsqueeze(-1) * model.precision * scale - torch.eye(len(scale))
    delta = torch.full_like(scale, shift)
    return (0.5 * (stretched**2).sum() + ((scale * (model.precision @ delta)) ** 2).sum()).item()


def minibatch_errors(model, guide, x, batch, num_draws, repeats):
    """Standard deviation of the mean ELBO over minibatches with new data and new samples."""
    rows = torch.randint(len(x), (repeats, batch, 1)).expand(-1, -1, num_draws).reshape(-1)
    each = pv.evaluate(model, guide, x[rows], batch_size=100_000).elbo
    return each.reshape(repeats, -1).mean(1).std().item()


def draw(singles, elbo, evidence, errors, between, within):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, values) in enumerate(singles.items()):
        if values.std() < 1e-6:
            left.axvline(values[0], color=f"C{i}", lw=3, alpha=0.5, label=f"{name}: constant")
        else:
            left.hist(values, bins=100, density=True, color=f"C{i}", alpha=0.5, label=f"{name}, one-sample")
    left.axvline(elbo, color="C0", ls="--", label="ELBO of the guide")
    left.axvline(evidence, color="k", ls=":", label="log p(x)")
    left.set(xlabel="nats", yticks=[], title="Estimates of the ELBO of one datum")
    for i, batch in enumerate(BATCHES):
        right.loglog(
            DRAWS, [errors[batch, k] for k in DRAWS], "o", color=f"C{i}", label=f"minibatches of {batch}"
        )
        right.loglog(DRAWS, [((between + within / k) / batch) ** 0.5 for k in DRAWS], "-", color=f"C{i}")
    right.set(
        xlabel="samples per datum",
        ylabel="standard deviation (nats)",
        title="Minibatch estimates of the ELBO",
    )
    right.grid(alpha=0.3, which="both")
    for ax in (left, right):
        ax.legend(frameon=False)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="06_single_sample.png")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    model, shift, n = make_model(), 0.2, 100_000
    x, guide = model.sample(1000), make_guide(model, shift)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    datum = x[:1]
    singles = {
        "guide": single_draws(model, guide, datum, n),
        "exact posterior": single_draws(model, posterior, datum, n),
    }
    report = pv.compare(model, guide, x, num_particles=2, split=False)
    elbo, evidence = report.elbo[0].item(), report.log_evidence[0].item()
    print(f"log p(x) = {evidence:.4f}, ELBO = {elbo:.4f} nats per datum")
    for name, values in singles.items():
        error = values.std() / n**0.5
        mean = f"mean of {n} one-sample estimates {values.mean():.4f} ± {error:.4f}"
        print(f"{name:16} {mean}, standard deviation {values.std():.4f}")
    print(f"standard deviation in closed form {variance(model, shift) ** 0.5:.4f}")

    between, within = report.elbo.var(correction=0).item(), variance(model, shift)
    errors = {(b, k): minibatch_errors(model, guide, x, b, k, 1000) for b in BATCHES for k in DRAWS}
    print(f"minibatches of 100: 1 sample ± {errors[100, 1]:.3f}, 100 samples ± {errors[100, 100]:.3f}")
    draw(singles, elbo, evidence, errors, between, within).savefig(args.out, dpi=150)
