"""Signal-to-noise ratios of gradients by the number of particles (Rainforth et al. 2018, Tucker et al. 2019).

p(z) = N(μ, I), p(x|z) = N(z, I), q(z|x) = N(Ax + b, ⅔ I), and 1024 data, as in Rainforth et al.; θ = μ and
φ = (A, b). The optimum is μ = mean of x, A = ½ I, b = ½ μ; each element is moved from there by N(0, 0.01²).
An estimate is the gradient of the bound of K particles, a mean over the data, with K draws for each datum.
Its signal-to-noise ratio is

    ‖E g‖ / √(E‖g − E g‖²),

for g the gradient with respect to b, or to μ. The papers say: as K grows it falls as K^(−1/2) for φ, and
grows as K^(1/2) for θ, and with the doubly reparameterized estimator (DReG) as K^(1/2) for φ too.

These are limits. They are reached at a K that grows with the dimension, so they are shown for 2 dimensions
and for the 20 of the paper. The error of the guide biases the gradient of θ by O(1/K), which at small K is
more than the signal; so θ is shown a second time, with μ moved and the guide at its optimum for that μ.

Both estimators of the φ-gradient have the same mean, so both signals are taken from DReG, where it is known
to a few percent. The last line says how far the two means are apart.

    python examples/papers/signal_to_noise.py --out FOLDER      # writes signal_to_noise.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_vae import infer

NUM_DATA, GUIDE_SCALE, PERTURBATION = 1024, (2 / 3) ** 0.5, 0.01
CLAIMS = {"φ, IWAE": -0.5, "φ, DReG": 0.5, "θ": 0.5, "θ, guide at its optimum": 0.5}
COLORS = {"φ, IWAE": "C3", "φ, DReG": "C0", "θ": "0.6", "θ, guide at its optimum": "C2"}


def make_problem(dim):
    """Data ``(NUM_DATA, dim)``, μ, and the means of the moved guide and of the optimal one."""
    x = torch.randn(dim) + 2**0.5 * torch.randn(NUM_DATA, dim)
    mean = x.mean(0)
    mu, b, weight = (
        optimum + PERTURBATION * torch.randn_like(optimum) for optimum in (mean, mean / 2, torch.eye(dim) / 2)
    )
    return x, mu, x @ weight.mT + b, (x + mu) / 2


def gradients(x, mu, loc, objective):
    """Gradients with respect to μ and b for each row, ``(2, rows, dim)``."""
    # each row has its own copy of the parameters, so the gradient of a sum over rows holds that of each row
    mu, loc = mu.expand_as(x).clone().requires_grad_(), loc.clone().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, GUIDE_SCALE).to_event(1))

    return -torch.stack(torch.autograd.grad(objective.differentiable_loss(model, guide, x), (mu, loc)))


def estimates(x, mu, loc, objective, count):
    """``count`` gradients for each datum, ``(2, count, NUM_DATA, dim)``."""
    rows = max(1, 200_000 // (x.shape[1] * objective.num_particles))  # small tensors stay in the cache
    blocks = zip(x.repeat(count, 1).split(rows), loc.repeat(count, 1).split(rows), strict=True)
    found = torch.cat([gradients(some, mu, of_rows, objective) for some, of_rows in blocks], 1)
    return found.unflatten(1, (count, NUM_DATA))


class Moments:
    """Mean and noise of the estimates of a gradient."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, g):
        """g: ``(count, NUM_DATA, dim)``."""
        self.count += len(g)
        self.total = self.total + g.sum(0)
        self.squares = self.squares + (g**2).sum(0)

    @property
    def mean(self):
        return (self.total / self.count).mean(0)

    @property
    def variance(self):
        """Of each element of an estimate. The draws of different data are independent."""
        of_datum = (self.squares - self.total**2 / self.count) / (self.count - 1)
        return of_datum.mean(0) / NUM_DATA

    @property
    def signal(self):
        """‖E g‖; the squared norm of the measured mean is too large by the variance of that mean."""
        return (self.mean.square().sum() - self.variance.sum() / self.count).clamp_min(0).sqrt().item()

    @property
    def noise(self):
        return self.variance.sum().sqrt().item()


def measure(problem, k, num_draws):
    """Moments of the gradients with K particles, from ``num_draws`` draws for each datum."""
    x, mu, moved, optimal = problem
    found = {name: Moments() for name in CLAIMS}
    count = max(1, num_draws // (8 * k))
    for _ in range(max(2, num_draws // (count * k))):
        theta, phi = estimates(x, mu, moved, infer.IWAE(k), count)
        found["θ"].add(theta)
        found["φ, IWAE"].add(phi)
        found["φ, DReG"].add(estimates(x, mu, moved, infer.IWAE(k, estimator="dreg"), count)[1])
        found["θ, guide at its optimum"].add(estimates(x, mu, optimal, infer.IWAE(k), count)[0])
    return found


def slope(numbers, values):
    """Of log ``values`` over log ``numbers``, by least squares."""
    return np.polyfit(np.log(numbers), np.log(values), 1)[0]


def draw(numbers, ratios):
    fig, axes = plt.subplots(
        len(ratios), 2, figsize=(11, 4 * len(ratios)), layout="constrained", sharex=True, squeeze=False
    )
    k = np.array(numbers, dtype=float)
    for row, (dim, of_dim) in zip(axes, ratios.items(), strict=True):
        for name, values in of_dim.items():
            ax, last = row[int(name.startswith("θ"))], len(k) // 2
            label = f"{name}: slope {slope(k, values):+.2f}, from K = {numbers[last]} on "
            label += f"{slope(k[last:], values[last:]):+.2f}"
            ax.loglog(k, values, "o", color=COLORS[name], label=label)
            ax.loglog(k, values[-1] * (k / k[-1]) ** CLAIMS[name], color=COLORS[name], lw=1, alpha=0.5)
        row[0].set(title=f"Guide (b), {dim} dimensions", ylabel="signal-to-noise ratio")
        row[1].set(title=f"Model (μ), {dim} dimensions")
        for ax in row:
            ax.set_xticks(numbers, numbers)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend(frameon=False, fontsize=8)
    for ax in axes[-1]:
        ax.set(xlabel="K")
    fig.suptitle("Gradients of the bound of K particles; the lines have slopes −½ and +½", fontsize=11)
    return fig


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, nargs="+", default=(2, 20))
    parser.add_argument(
        "-n", "--num-draws", type=int, default=5120, help="for each datum, over the dimensions"
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    parser.add_argument("--smoke-test", action="store_true", help="2 dimensions, K ≤ 8, fewer draws")
    args = parser.parse_args()
    mpl.use("Agg")
    torch.set_default_dtype(torch.double)
    numbers, dims, num_draws = [2**i for i in range(9)], args.dims, args.num_draws
    if args.smoke_test:
        numbers, dims, num_draws = numbers[:4], (2,), 1024

    ratios, distances = {}, []
    for dim in dims:
        pyro.set_rng_seed(0)
        problem, ratios[dim] = make_problem(dim), {name: [] for name in CLAIMS}
        print(f"{dim} dimensions: signal-to-noise ratios of gradients, in nats per datum")
        print(" " * 9 + "K" + "".join(f"{name:>25}" for name in CLAIMS))
        for k in numbers:
            found = measure(problem, k, num_draws // dim)
            iwae, dreg = found["φ, IWAE"], found["φ, DReG"]
            for name, moments in found.items():
                signal = dreg.signal if moments is iwae else moments.signal
                ratios[dim][name].append(signal / moments.noise)
            print(f"{k:10}" + "".join(f"{values[-1]:25.3f}" for values in ratios[dim].values()), flush=True)
            se = (iwae.variance / iwae.count + dreg.variance / dreg.count).sqrt()
            distances.append((iwae.mean - dreg.mean) / se)
        for first in (0, len(numbers) // 2):
            slopes = (slope(numbers[first:], values[first:]) for values in ratios[dim].values())
            print(f"slope K≥{numbers[first]:<2}" + "".join(f"{value:25.3f}" for value in slopes))
    squares = torch.cat(distances).square()
    print(
        f"E g by IWAE and by DReG: mean squared distance {squares.mean():.2f} in squared standard errors, "
        f"1 ± {(2 / len(squares)) ** 0.5:.2f} if they are equal"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    draw(numbers, ratios).savefig(args.out / "signal_to_noise.png", dpi=110)
