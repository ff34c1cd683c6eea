"""Evidence on two processes that divide the data, against two processes that each compute half of it."""

import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.aevb import PIXELS, make_vae
from pyro_vae import evidence, infer


def print_efficiency(rounds, num_data=1200):
    """Time both in turns, each process with one thread."""
    print(f"\nEvidence of {num_data} data on 2 processes, AEVB's network\n")
    mp.spawn(_rank, (free_port(), rounds, num_data), nprocs=2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_group(rank, port):
    """Make this process one of two, with one thread."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=2)


def _rank(rank, port, rounds, num_data):
    join_group(rank, port)
    vae, x = make_vae(), torch.bernoulli(torch.rand(num_data, PIXELS))
    annealing = evidence.Annealing(num_temperatures=20, num_chains=4)
    methods = {
        "`importance`, 100 draws": lambda x: evidence.importance(vae.model, vae.guide, x, num_particles=100),
        "`ais`, 20 temperatures": lambda x: evidence.ais(vae.model, x[: len(x) // 6], annealing=annealing),
    }
    for name, compute in methods.items():
        ratios = []
        for _ in range(rounds + 1):
            alone = _seconds(lambda f=compute: f(x[: num_data // 2]))
            with infer.across_processes():
                divided = _seconds(lambda f=compute: f(x))
            ratios.append(alone / divided)
        low, middle, high = statistics.quantiles(ratios[1:], n=4)  # graphs are made in the first round
        if rank == 0:
            print(f"{name}: efficiency {middle:.3f} ({low:.3f}–{high:.3f}; asked: 0.9), {divided:.1f} s")
    dist.destroy_process_group()


def _seconds(compute):
    """The time until both processes have computed."""
    dist.barrier()
    start = time.perf_counter()
    compute()
    dist.barrier()
    return time.perf_counter() - start
