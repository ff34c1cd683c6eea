"""Bounds on the evidence of a VAE trained on MNIST, with the gap of bidirectional Monte Carlo; the memory and
the time of importance sampling; errors of the estimates for a model whose evidence is known.

    python -m benchmarks.evidence ladder      # 25 minutes on 2 cores
    python -m benchmarks.evidence memory      # 5 minutes
    python -m benchmarks.evidence speed       # 3 minutes
    python -m benchmarks.evidence toys        # 15 minutes
"""

import argparse
import resource
import time

import pyro
import torch
from pyro.infer.importance import vectorized_importance_weights

import pyro_vae as pv
from benchmarks.aevb import make_vae
from benchmarks.timing import measure, print_table
from pyro_vae import evidence
from pyro_vae.numerics import log_mean_exp


def trained(data_dir, num_epochs):
    pyro.set_rng_seed(0)
    train, test = pv.load("mnist", binarize="stochastic", data_dir=data_dir)
    train, test = (pv.Data(part.x.flatten(1), binarize="stochastic", name="mnist") for part in (train, test))
    vae = make_vae()
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 2e-3}, "gamma": 0.9}
    )
    print(pv.fit(vae.model, vae.guide, train, optim=optim, num_epochs=num_epochs))
    return vae.requires_grad_(False).eval(), test.fixed().x


def ladder(args):
    vae, test = trained(args.data_dir, args.num_epochs)
    x = test[: args.num_data]
    rungs = {
        "prior Monte Carlo, 5000": lambda: evidence.prior_monte_carlo(vae.model, x, num_particles=5000),
        "ELBO": lambda: evidence.importance(vae.model, vae.guide, x, num_particles=1),
        "IWAE-100": lambda: evidence.importance(vae.model, vae.guide, x, num_particles=100),
        "IWAE-5000": lambda: evidence.importance(vae.model, vae.guide, x, num_particles=5000),
        "AIS, 1000 temperatures": lambda: evidence.ais(
            vae.model, x, annealing=evidence.Annealing(num_temperatures=1000)
        ),
        "AIS from the guide, 1000": lambda: evidence.ais(
            vae.model, x, annealing=evidence.Annealing(num_temperatures=1000), start=vae.guide
        ),
        "AIS, 10000 temperatures": lambda: evidence.ais(
            vae.model, x[:20], annealing=evidence.Annealing(num_temperatures=10_000)
        ),
        "AIS, 1000, first 20 data": lambda: evidence.ais(
            vae.model, x[:20], annealing=evidence.Annealing(num_temperatures=1000)
        ),
    }
    for name, rung in rungs.items():
        start = time.perf_counter()
        bound = rung()
        print(f"\n{name}, {time.perf_counter() - start:.0f} s\n{bound}", flush=True)
    for temperatures in (1000, 10_000):
        start = time.perf_counter()
        found = evidence.bdmc(vae.model, x[:20], annealing=evidence.Annealing(num_temperatures=temperatures))
        print(
            f"\nBDMC, {temperatures} temperatures, {time.perf_counter() - start:.0f} s\n{found}", flush=True
        )


def toys(args):
    """Errors of the estimates for factor analysis in 100 dimensions, in nats."""
    for k in (2, 10, 50):
        torch.manual_seed(k)
        toy = pv.exact.LinearGaussian(0.3 * torch.randn(100, k, dtype=torch.double), noise_scale=1.0)
        x = toy.sample(args.num_data)
        truth = toy.log_evidence(x)

        def guide(x, toy=toy):
            with pyro.plate("data", len(x)):
                pyro.sample("z", toy.mean_field(x))

        bounds = {
            "prior Monte Carlo, 1000": evidence.prior_monte_carlo(toy, x),
            "mean-field guide, IWAE-1000": evidence.importance(toy, guide, x),
            "AIS, 1000 temperatures": evidence.ais(toy, x),
            "SMC, 100 temperatures": evidence.smc(toy, x),
        }
        for name, bound in bounds.items():
            error = bound.log_evidence - truth
            standard_error = error.std() / len(x) ** 0.5
            print(f"k = {k}: {name}: error {error.mean():.4f} ± {standard_error:.4f} nats", flush=True)


def memory(args):
    vae, test = trained(args.data_dir, 1)

    def peak():
        """The peak memory of the process, in GB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    print(f"before: {peak():.2f} GB")
    for num_particles in (50, 500, 5000):
        start = time.perf_counter()
        evidence.importance(vae.model, vae.guide, test, num_particles=num_particles)
        seconds = time.perf_counter() - start
        print(
            f"{num_particles} particles x {len(test)} images: {seconds:.1f} s, peak {peak():.2f} GB",
            flush=True,
        )


def speed(args):
    """Times of importance sampling by pyro_vae, by Pyro, and by a loop in plain PyTorch."""
    vae, test = trained(args.data_dir, 1)
    x, k = test[:100], 5000

    @torch.no_grad()
    def by_hand():
        """100 images and 10 particles at a time."""
        parts = []
        q = vae.encode(x)
        for _ in range(k // 10):
            z = q.sample((10,))
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
            parts.append(vae.decode(z).log_prob(x) + prior - q.log_prob(z))
        return log_mean_exp(torch.cat(parts))

    @torch.no_grad()
    def by_pyro():
        return [
            vectorized_importance_weights(
                vae.model, vae.guide, x, num_samples=10, max_plate_nesting=1, normalized=False
            )
            for _ in range(k // 10)
        ]

    methods = {
        "a plain loop by hand": by_hand,
        "Pyro's `vectorized_importance_weights`": by_pyro,
        "`pv.evidence.importance`": lambda: evidence.importance(vae.model, vae.guide, x, num_particles=k),
    }
    makers = {name: lambda method=method: method for name, method in methods.items()}
    times = measure(makers, rounds=11, num_calls=1, warm_up=1, warm=0)
    print_table("Importance sampling", {f"{len(x)} images, {k} particles": times}, "a plain loop by hand")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["ladder", "memory", "speed", "toys"])
    parser.add_argument("--num-epochs", type=int, default=15)
    parser.add_argument("--num-data", type=int, default=100)
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{torch.get_num_threads()} threads, {capability}, torch {torch.__version__}")
    {"ladder": ladder, "memory": memory, "speed": speed, "toys": toys}[args.what](args)
