"""3. Free energy = −evidence + KL, with equality only at the exact posterior.

    F(q) = E_q[−log p(x, z)] − H(q) = −log p(x) + KL(q‖p(z|x)) ≥ −log p(x)

The expected energy favours a narrow q, the entropy a wide one. The model is factor analysis with two
factors and posterior N(μ, Λ⁻¹). The guides are N(μ + δ, c² Λ⁻¹), with KL = ½ δᵀΛδ + ½ k (c² − 1 − log c²).

    python examples/walkthrough/03_free_energy.py      # writes 03_free_energy.png
"""

import argparse
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae import exact

WEIGHT = torch.tensor([[1.0, 0.4], [0.3, 1.2], [0.8, 0.8]], dtype=torch.double)
DIRECTION = torch.tensor([1.0, -0.5], dtype=torch.double)
X = torch.tensor([[1.0, -0.5, 0.7]], dtype=torch.double)


def make_model():
    return exact.LinearGaussian(WEIGHT, noise_scale=0.7)


def make_guide(model, shift, factor):
    """The exact posterior with its mean shifted along ``DIRECTION`` and its scales multiplied."""

    def guide(x):
        p = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.MultivariateNormal(p.loc + shift * DIRECTION, scale_tril=factor * p.scale_tril)
            )

    return guide


def divergence(model, shift, factor):
    """KL(q‖p) in closed form."""
    k = model.latent_shape[0]
    stretched = 0.5 * k * (factor**2 - 1 - 2 * math.log(factor))
    return 0.5 * shift**2 * (DIRECTION @ model.precision @ DIRECTION).item() + stretched


def draw(model, shifts, factors, measured):
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    surprise = -model.log_evidence(X).item()
    paths = [
        (shifts, lambda t: (t, 1.0), "shift of the mean"),
        (factors, lambda t: (0.0, t), "factor of the scales"),
    ]
    for ax, (points, member, label) in zip(axes, paths, strict=True):
        fine = torch.linspace(points[0], points[-1], 200).tolist()
        ax.plot(
            fine, [surprise + divergence(model, *member(t)) for t in fine], "C0-", label="−log p(x) + KL(q‖p)"
        )
        ax.axhline(surprise, color="k", label="−log p(x)")
        energies = [measured[member(t)] for t in points]
        ax.errorbar(
            points,
            [e.free_energy.item() for e in energies],
            [2 * e.free_energy_se.item() for e in energies],
            fmt="C0o",
            label="free energy",
        )
        ax.plot(points, [e.expected_energy.item() for e in energies], "C1s--", ms=4, label="expected energy")
        ax.plot(points, [e.entropy.item() for e in energies], "C2^--", ms=4, label="entropy")
        ax.set(xlabel=label, ylabel="nats")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    fig.suptitle("Free energy equals −log p(x) only at the exact posterior")
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="03_free_energy.png")
    args = parser.parse_args()
    mpl.use("Agg")

    model, num_particles = make_model(), 10_000
    shifts, factors = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5), (0.3, 0.5, 0.75, 1.0, 1.4, 1.8)
    members = [(shift, 1.0) for shift in shifts] + [(0.0, factor) for factor in factors]
    measured = {
        member: pv.free_energy(model, make_guide(model, *member), X, num_particles=num_particles, seed=seed)
        for seed, member in enumerate(dict.fromkeys(members))
    }
    print(f"−log p(x) = {-model.log_evidence(X).item():.4f} nats per datum")
    print(f"{'shift':>6} {'factor':>6} {'F(q)':>16} {'−log p(x) + KL':>15}")
    for (shift, factor), energy in measured.items():
        expected = -model.log_evidence(X).item() + divergence(model, shift, factor)
        print(
            f"{shift:6} {factor:6} {energy.free_energy.item():8.4f} ± {energy.free_energy_se.item():.4f} "
            f"{expected:15.4f}"
        )
    draw(model, shifts, factors, measured).savefig(args.out, dpi=150)
