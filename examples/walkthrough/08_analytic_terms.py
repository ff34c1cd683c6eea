"""8. Estimators of the ELBO with analytic entropy or analytic KL.

    plain              log p(x, z) − log q(z|x)      AEVB's estimator A; Pyro's Trace_ELBO
    analytic entropy   log p(x, z) + H(q)
    analytic KL        log p(x|z) − KL(q‖p(z))       AEVB's estimator B; Pyro's TraceMeanField_ELBO

with one sample z ~ q(z|x) are unbiased estimates of the ELBO with different variances. None is always the
best. At the exact posterior only the plain estimator has variance 0. Let h be the curvature of −log p(x|z).
The gradient with respect to a location has standard deviation |h + 1| σ for the plain estimator and |h| σ
for the analytic KL, which is smaller for h > −½, as here, and larger for h < −½.

    python examples/walkthrough/08_analytic_terms.py      # writes 08_analytic_terms.png
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

from pyro_vae import exact

FACTORS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0)


def make_model():
    """A model with two independent factors, whose posterior is mean-field, and one datum."""
    weight = torch.tensor([[1.2, 0.0], [0.0, 0.7], [0.5, 0.0]], dtype=torch.double)
    return exact.LinearGaussian(weight, noise_scale=0.8), torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.double)


def make_q(model, x, factor):
    """The exact posterior with its scales multiplied."""
    best = model.mean_field(x).base_dist
    return dist.Normal(best.loc.requires_grad_(), factor * best.scale).to_event(1)


def estimators(model, x, q):
    """One-sample estimates of the ELBO for each row of x, in nats: ``(batch,)`` each."""
    z = q.rsample()
    log_joint, log_likelihood = model.log_joint(x, z), model.decoder(z).log_prob(x)
    kl = kl_divergence(q.base_dist, dist.Normal(model.prior_loc, model.prior_scale)).sum(-1)
    return {
        "plain": log_joint - q.log_prob(z),
        "analytic entropy": log_joint + q.entropy(),
        "analytic KL": log_likelihood - kl,
    }


def single_draws(model, x, factor, num_draws):
    """``num_draws`` estimates by each estimator, and their gradients with respect to the first location."""
    copies = x.expand(num_draws, -1)
    q = make_q(model, copies, factor)
    values = estimators(model, copies, q)
    loc = q.base_dist.loc
    gradients = {
        name: torch.autograd.grad(v.sum(), loc, retain_graph=True)[0][:, 0] for name, v in values.items()
    }
    return {name: v.detach() for name, v in values.items()}, gradients


def draw(spread):
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, kind, title in zip(axes, ("value", "gradient"), ("of the ELBO", "of its gradient"), strict=True):
        for i, name in enumerate(("plain", "analytic entropy", "analytic KL")):
            style = "--" if kind == "gradient" and i == 1 else "-"
            ax.plot(
                FACTORS, [spread[f][kind][name] for f in FACTORS], f"C{i}o{style}", label=name, ms=9 - 2.5 * i
            )
        ax.axvline(1, color="0.7", lw=1)
        ax.set(xlabel="scale of q / scale of the posterior", ylabel="standard deviation")
        ax.set_title(f"One-sample estimate {title}")
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="08_analytic_terms.png")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    (model, x), n, spread = make_model(), 100_000, {}
    print("mean ± standard error of one-sample estimates, nats per datum")
    for factor in FACTORS:
        values, gradients = single_draws(model, x, factor, n)
        spread[factor] = {
            "value": {name: v.std().item() for name, v in values.items()},
            "gradient": {name: g.std().item() for name, g in gradients.items()},
        }
        cells = "   ".join(f"{name} {v.mean():.4f} ± {v.std() / n**0.5:.4f}" for name, v in values.items())
        print(f"scale × {factor:<5} {cells}")
    draw(spread).savefig(args.out, dpi=150)
