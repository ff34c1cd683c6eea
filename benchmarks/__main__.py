"""Relative times of pyro_vae and its alternatives. The methods of a table take turns in one process.

    python -m benchmarks

Takes about 20 minutes on 2 cores. MNIST is loaded as by ``pyro-vae train mnist``. With the argument
``memory``, training on a memory-mapped file of 20 GB is measured, and with ``processes`` evidence on two
processes.
"""

import argparse
import platform

import pyro
import torch

import pyro_vae as pv
from benchmarks import epoch, memory, objectives, posterior, processes, step
from benchmarks.timing import print_table
from pyro_vae.compiler.passes import PASSES

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables",
        nargs="*",
        help="step, objectives, epoch, posterior; memory; processes; default: all but the last two",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=5, help="rounds of the epoch table")
    parser.add_argument("--num-data", type=int, default=60_000, help="MNIST images per epoch")
    parser.add_argument("--data-dir")
    parser.add_argument("--gigabytes", type=float, default=20, help="size of the file of the memory table")
    parser.add_argument("--folder", help="where the memory table makes its files")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=list(PASSES), help="compiler passes to turn off"
    )
    args = parser.parse_args()
    for name in args.without:
        del PASSES[name]
    tables = args.tables or ["step", "objectives", "epoch", "posterior"]

    pyro.set_rng_seed(0)
    print(f"{platform.system()} {platform.machine()}", end=", ")
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", end=", ")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    if "step" in tables:
        print_table("One step of SVI", step.steps((20, 100, 256, 1024), args.rounds), step.BASE)
    if "objectives" in tables:
        columns = objectives.steps(((5, 20), (5, 100), (50, 20), (50, 100)), args.rounds)
        for base in (objectives.PRODUCTS, objectives.RENYI, objectives.IWAE_STEP):
            print_table("One compiled step of an objective", columns, base)
        columns = objectives.labels(args.rounds)
        print_table("One step of TraceEnum_ELBO, 10 labels summed out", columns, objectives.LABELS)
    if "epoch" in tables:
        train, _ = pv.load("mnist", binarize="threshold", data_dir=args.data_dir)
        x = train.x[: args.num_data].reshape(-1, 784)
        columns = epoch.epochs(x, (128, 256), args.epochs)
        print_table(f"An epoch of {len(x)} images", columns, epoch.BASE)
        if all("numpyro" in times for times in columns.values()):
            print_table("The same epochs", columns, "numpyro")
    if "posterior" in tables:
        columns = {"100 data, 50 particles": posterior.importance(100, 50, args.rounds)}
        print_table("Log-weights", columns, posterior.IMPORTANCE)
        columns = {f"{n} data, 16 chains": posterior.hmc(n, 16, args.rounds) for n in (1, 100)}
        print_table("Gradient of log p(x, z) for a leapfrog step of HMC", columns, posterior.HMC)
    if "memory" in tables:
        memory.print_memory(args.gigabytes, args.rounds, args.folder)
    if "processes" in tables:
        processes.print_efficiency(args.rounds)
