"""7. The reparameterized gradient against the score-function gradient.

    ∇ E_q[f(z)] = E[∇ f(μ + σε)],  ε ~ N(0, I)          reparameterized
                = E_q[f(z) ∇ log q(z)]                    score function
                = E_q[(f(z) − b) ∇ log q(z)]              with a baseline b

with f(z) = log p(x, z) − log q(z|x). Each is an unbiased one-sample estimate of the gradient of the ELBO.
The variance of the reparameterized gradient hardly grows with the dimension of z. That of the
score-function gradient does, mostly because f is far from 0; a baseline, here the ELBO, removes this part
only. Pyro uses the reparameterized gradient if `has_rsample` is true for a distribution, else the
score-function gradient. The exact gradient is that of −KL(q‖p(z|x)) in closed form.

    python examples/walkthrough/07_gradients.py      # writes 07_gradients.png
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import kl_divergence

from pyro_vae import exact

DIMENSIONS = (1, 2, 5, 10, 20, 50)


def make_model(k):
    """A model with k factors and 2k observed dimensions, and one datum."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(2 * k, k, dtype=torch.double, generator=generator) / k**0.5
    model = exact.LinearGaussian(weight, noise_scale=1.0)
    return model, torch.randn(1, 2 * k, dtype=torch.double, generator=generator)


def start(model, x):
    """Location and log-scale of a partly trained guide: half a standard deviation off and too narrow."""
    best = model.mean_field(x).base_dist
    return best.loc + 0.5 * best.scale, (0.7 * best.scale).log().expand_as(best.loc)


class ScoreFunctionNormal(dist.Normal):
    """A normal distribution that Pyro does not reparameterize."""

    has_rsample = False


def with_baseline(model, baseline):
    """The model with ``baseline`` subtracted from the log-probability of each datum."""

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model.prior())
            pyro.sample("x", model.decoder(z), obs=x)
            pyro.factor("baseline", x.new_full((len(x),), -baseline))

    return program


def single_gradients(model, x, num_draws, family, baseline=0.0):
    """One-sample gradients of the ELBO with respect to location and log-scale: ``(num_draws, 2k)``."""
    loc, log_scale = (part.expand(num_draws, -1).clone().requires_grad_() for part in start(model, x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(loc, log_scale.exp()).to_event(1))

    # each copy of the datum has separate parameters, so the gradient of the sum holds one gradient per copy
    loss = Trace_ELBO().differentiable_loss(with_baseline(model, baseline), guide, x.expand(num_draws, -1))
    return torch.cat([-gradient for gradient in torch.autograd.grad(loss, (loc, log_scale))], -1)


def exact_elbo(model, x):
    """The ELBO at :func:`start` and its gradient, in closed form."""
    loc, log_scale = (part.clone().requires_grad_() for part in start(model, x))
    q = torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag_embed(log_scale.exp()))
    elbo = (model.log_evidence(x) - kl_divergence(q, model.posterior(x))).sum()
    return elbo.item(), torch.cat(torch.autograd.grad(elbo, (loc, log_scale)), -1).squeeze(0)


def draw(gradients, truth, spread):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, values) in enumerate(gradients.items()):
        spread_of = 3 * gradients["score function, baseline"][:, 0].std().item()
        limits = (truth[0].item() - spread_of, truth[0].item() + spread_of)
        left.hist(
            values[:, 0], bins=100, range=limits, density=True, histtype="step", color=f"C{i}", label=name
        )
        right.loglog(DIMENSIONS, [spread[k][name] for k in DIMENSIONS], "o-", color=f"C{i}", label=name)
    left.axvline(truth[0], color="k", ls="--", label="exact")
    left.set(xlabel="∂ELBO/∂μ₁", yticks=[], title=f"One-sample gradients, {len(truth) // 2} dimensions")
    right.set(xlabel="dimensions of z", ylabel="standard deviation", title="Root mean square over parameters")
    right.set_xticks(DIMENSIONS, DIMENSIONS)
    right.grid(alpha=0.3, which="both")
    for ax in (left, right):
        ax.legend(frameon=False, loc="upper left")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="07_gradients.png")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    n, spread = 20_000, {}
    print("one-sample gradients, in nats: standard deviation (largest error of the mean in standard errors)")
    for k in DIMENSIONS:
        model, x = make_model(k)
        elbo, truth = exact_elbo(model, x)
        gradients = {
            "reparameterized": single_gradients(model, x, n, dist.Normal),
            "score function": single_gradients(model, x, n, ScoreFunctionNormal),
            "score function, baseline": single_gradients(model, x, n, ScoreFunctionNormal, baseline=elbo),
        }
        spread[k] = {name: values.var(0).mean().sqrt().item() for name, values in gradients.items()}
        off = {
            name: ((g.mean(0) - truth) / (g.std(0) / n**0.5)).abs().max().item()
            for name, g in gradients.items()
        }
        print(
            f"{k:3} dimensions  "
            + "   ".join(f"{name} {spread[k][name]:9.3f} ({off[name]:.1f})" for name in gradients)
        )
        if k == 5:
            shown = gradients, truth
    draw(*shown, spread).savefig(args.out, dpi=150)
