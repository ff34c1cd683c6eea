"""8. What is known in closed form need not be drawn: analytic entropy, analytic KL.

    plain              log p(x, z) − log q(z|x)                  AEVB's estimator A; Pyro's Trace_ELBO
    analytic entropy   log p(x, z) + H(q)
    analytic KL        log p(x|z) − KL(q‖p(z))                   AEVB's estimator B; Pyro's TraceMeanField_ELBO

from one draw z ~ q(z|x) have the same mean, the ELBO, and different variances. None is always the best: at the exact posterior
the plain one has no variance at all, and the others have. Of their gradients for a location, with h the curvature of
−log p(x|z), the plain one has a standard deviation of |h + 1| σ and that of the analytic KL |h| σ: it is quieter where prior
and likelihood pull the same way, as here, and noisier where the likelihood pushes away (h < −½).

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
    """Two independent factors, so that the exact posterior is mean-field, and one datum."""
    weight = torch.tensor([[1.2, 0.0], [0.0, 0.7], [0.5, 0.0]], dtype=torch.double)
    return exact.LinearGaussian(weight, noise_scale=0.8), torch.tensor([[1.0, -0.5, 0.3]], dtype=torch.double)


def make_q(model, x, factor):
    """The exact posterior with its scales multiplied."""
    best = model.mean_field(x).base_dist
    return dist.Normal(best.loc.requires_grad_(), factor * best.scale).to_event(1)


def estimators(model, x, q):
    """Of one draw of q for each row of x, in nats: ``(batch,)`` each."""
    z = q.rsample()
    log_joint, log_likelihood = model.log_joint(x, z), model.decoder(z).log_prob(x)
    kl = kl_divergence(q.base_dist, dist.Normal(model.prior_loc, model.prior_scale)).sum(-1)
    return {
        "plain": log_joint - q.log_prob(z),
        "analytic entropy": log_joint + q.entropy(),
        "analytic KL": log_likelihood - kl,
    }


def single_draws(model, x, factor, num_draws):
    """Each estimator of so many draws, and its gradient for the first location."""
    copies = x.expand(num_draws, -1)
    q = make_q(model, copies, factor)
    values = estimators(model, copies, q)
    loc = q.base_dist.loc
    gradients = {name: torch.autograd.grad(v.sum(), loc, retain_graph=True)[0][:, 0] for name, v in values.items()}
    return {name: v.detach() for name, v in values.items()}, gradients


def draw(spread):
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, kind, title in zip(axes, ("value", "gradient"), ("of the ELBO", "of its gradient for a location"), strict=True):
        for i, name in enumerate(("plain", "analytic entropy", "analytic KL")):
            style = "--" if kind == "gradient" and i == 1 else "-"
            ax.plot(FACTORS, [spread[f][kind][name] for f in FACTORS], f"C{i}o{style}", label=name, ms=9 - 2.5 * i)
        ax.axvline(1, color="0.7", lw=1)
        ax.set(
            xlabel="scale of q, in those of the posterior", ylabel="standard deviation", title=f"One draw's estimate {title}"
        )
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="08_analytic_terms.png")
    parser.add_argument("--smoke-test", action="store_true", help="fewer draws")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    (model, x), n, spread = make_model(), 1000 if args.smoke_test else 100_000, {}
    print("mean ± standard error of single draws, nats per datum")
    for factor in FACTORS:
        values, gradients = single_draws(model, x, factor, n)
        spread[factor] = {
            "value": {name: v.std().item() for name, v in values.items()},
            "gradient": {name: g.std().item() for name, g in gradients.items()},
        }
        cells = "   ".join(f"{name} {v.mean():.4f} ± {v.std() / n**0.5:.4f}" for name, v in values.items())
        print(f"scale × {factor:<5} {cells}")
    draw(spread).savefig(args.out, dpi=150)
