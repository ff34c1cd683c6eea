"""4. A restricted guide family biases the model.

    max over θ of  log p_θ(x) − min over the family of KL(q‖p_θ(z|x))

differs from the maximum of the evidence: θ moves to where the family approximates the posterior well. Two
cases have closed forms:

- x ~ N(Wz, σ²I), where W has two correlated columns. The smaller σ, the stronger the correlation of the
  posterior. A mean-field guide trains σ to the maximum of evidence − ½[Σ log Λⱼⱼ − log |Λ|]. A guide with
  full covariance trains it to the maximum of the evidence.
- The linear VAE with fixed noise σ² and KL weight β. The columns of W have ‖wⱼ‖² = max(0, λⱼ − βσ²), with
  λⱼ the eigenvalues of the data covariance: all but #{λⱼ > βσ²} units collapse to the prior (Lucas et al.
  2019). The data are the digits in units of σ. Columns with similar λⱼ, such as the first three, converge
  slowly.

    python examples/walkthrough/04_restricted_family.py      # writes 04_restricted_family.png; 2 minutes
"""

import argparse

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import ExponentialLR

import pyro_vae as pv
from pyro_vae import conditionals, exact, nets, priors

WEIGHT = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.double)
FAMILIES = {"mean-field": conditionals.Normal, "full covariance": conditionals.MultivariateNormal}
BETAS, UNITS, ACTIVE = (1.0, 2.5, 6.0), 24, 0.05


def model(x):
    sigma = pyro.param("sigma", torch.ones((), dtype=torch.double), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.double), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.mT, sigma).to_event(1), obs=x)


def decayed(lr, num_epochs):
    """Adam with a learning rate that decays by a factor of 1000."""
    return ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": 1e-3 ** (1 / num_epochs)}
    )


def train_sigma(x, family, num_epochs):
    """σ trained with a guide of this family and a linear encoder."""
    guide = pv.Guide(family(nets.MLP(2, ()), event_shape=2)).double()
    loss = TraceMeanField_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    history = pv.fit(
        model, guide, x, loss=loss, num_epochs=num_epochs, batch_size=None, optim=decayed(0.05, num_epochs)
    )
    with history.scope():
        return pyro.param("sigma").item()


def curves(x, sigmas):
    """Mean log evidence and maximal mean-field ELBO for each σ, in nats per datum."""
    models = [exact.LinearGaussian(WEIGHT, noise_scale=sigma) for sigma in sigmas]
    evidence = torch.stack([toy.log_evidence(x).mean() for toy in models])
    return evidence, evidence - torch.stack([toy.mean_field_gap(x).mean() for toy in models])


def train_linear(x, beta, num_epochs):
    """A linear VAE with fixed noise, trained with KL weight β."""
    vae = pv.VAE(
        priors.StandardNormal(UNITS),
        conditionals.Normal(nets.MLP(UNITS, ()), event_shape=x.shape[1], scale=1.0),
        conditionals.Normal(nets.MLP(x.shape[1], ()), event_shape=UNITS, scale="learned"),
    ).double()
    loss = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    pv.fit(
        vae.model,
        vae.guide,
        x,
        loss=loss,
        num_epochs=num_epochs,
        batch_size=None,
        beta=beta,
        optim=decayed(0.05, num_epochs),
    )
    return vae


def column_norms(vae):
    """‖wⱼ‖² in descending order."""
    weight = vae.model.decoder.readout["loc"].layer.weight.detach()
    return (weight**2).sum(0).sort(descending=True).values


def draw(x, trained, eigenvalues, norms):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sigmas = torch.linspace(0.1, 1.2, 200, dtype=torch.double)
    curve = dict(zip(("full covariance", "mean-field"), curves(x, sigmas), strict=True))
    for i, (name, sigma) in enumerate(trained.items()):
        label = (
            "log p(x) = bound of the full covariance"
            if name == "full covariance"
            else f"bound of the {name} guide"
        )
        left.plot(sigmas, curve[name], color=f"C{i}", label=label)
        left.axvline(sigma, color=f"C{i}", ls="--", label=f"σ trained with it: {sigma:.3f}")
    left.set(xlabel="σ", ylabel="nats per datum", title="Correlated posterior: bounds as functions of σ")
    left.set_ylim(curve["mean-field"].max().item() - 0.2, curve["full covariance"].max().item() + 0.4)
    j = range(1, UNITS + 1)
    for i, (beta, values) in enumerate(norms.items()):
        expected = (eigenvalues[:UNITS] - beta).clamp_min(0)
        right.plot(j, expected, "-", color=f"C{i}", label=f"β = {beta:g}: {int((expected > 0).sum())} units")
        right.plot(j, values, "o", color=f"C{i}")
    right.set(xlabel="unit j", ylabel="‖wⱼ‖²", title="Linear VAE of the digits, ‖wⱼ‖² = max(0, λⱼ − βσ²)")
    right.set_xticks([1, 4, 10, 18, 24])
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
    return fig


def digits(rows=None):
    """The 1797 digits or the first ``rows`` of them, grey values 0 … 16, centred and divided by √13.5, the
    noise scale."""
    x = torch.cat([part.levels().x for part in pv.load("digits")])[:rows].flatten(1).double()
    return (x - x.mean(0)) / 13.5**0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=3000, help="of the linear VAE")
    parser.add_argument("--rows", type=int, help="digits that the linear VAE is trained on; all by default")
    parser.add_argument("--out", default="04_restricted_family.png")
    args = parser.parse_args()
    mpl.use("Agg")

    pyro.set_rng_seed(0)
    x = exact.LinearGaussian(WEIGHT, noise_scale=0.4).sample(500)
    trained = {name: train_sigma(x, family, 3000) for name, family in FAMILIES.items()}
    sigmas = torch.linspace(0.1, 1.2, 2201, dtype=torch.double)
    best = dict(zip(("full covariance", "mean-field"), curves(x, sigmas), strict=True))
    for name, sigma in trained.items():
        highest = sigmas[best[name].argmax()]
        print(
            f"σ trained with a {name} guide: {sigma:.4f}; its bound, in nats per datum, peaks at "
            f"{highest:.4f}"
        )

    x_digits = digits(args.rows)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x_digits.mT, correction=0)).flip(0)
    norms = {beta: column_norms(train_linear(x_digits, beta, args.num_epochs)) for beta in BETAS}
    for beta, values in norms.items():
        count = int((eigenvalues > beta).sum())
        print(f"β = {beta:g}: {int((values > ACTIVE).sum())} active units of {UNITS}, #{{λ > βσ²}} = {count}")
    draw(x, trained, eigenvalues, norms).savefig(args.out, dpi=150)
