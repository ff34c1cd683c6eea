"""Training by an objective on several processes, compared with the formulas at the draws of all of them."""

import math
from pathlib import Path

import pyro
import torch
import torch.distributed

import pyro_vae as pv
from pyro_vae.infer import IWAE, STL, VIMCO, ReweightedWakeSleep, WakeSleep
from tests.support import objective_pairs as pairs
from tests.support.objective_pairs import record_steps, reference

N, BATCH_SIZE, RATE = 9, 4, 1e-3  # the last minibatch has one row, so that rank 1 has none
CASES_OF_RANKS = {
    "IWAE": (pairs.FactorAnalysis, lambda: IWAE(3)),
    "DReG": (pairs.Hierarchical, lambda: IWAE(3, "dreg")),
    "DReG, not vectorized": (pairs.HierarchicalNotVectorized, lambda: IWAE(3, "dreg")),
    "STL with a shared latent": (pairs.Shared, lambda: STL(2)),
    "VIMCO": (pairs.Discrete, lambda: VIMCO(3)),
    "wake-sleep": (pairs.InnerPlate, WakeSleep),
    "half wake, half sleep": (pairs.Enumerated, lambda: ReweightedWakeSleep(3, wake_phi=0.5, sleep_phi=0.5)),
}


def train_rank(folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.double)
    pyro.set_rng_seed(0)
    rank = torch.distributed.get_rank()
    lines = [f"{name}: {train_case(rank, *case)}" for name, case in CASES_OF_RANKS.items()]
    lines.append(f"shared latent: {refused()}")
    Path(folder, str(rank)).write_text("\n".join(lines))


def train_case(rank, kind, make):
    """Compare the updates of a fit with the sum over ranks of the gradients by the formulas."""
    pair, other, objective = kind(), kind(), make()
    records = record_steps(objective, pair)
    data, _ = pair.arguments(N)
    pv.fit(
        pair.model, pair.guide, data, loss=objective, optim=pyro.optim.SGD({"lr": RATE}), num_epochs=2,
        batch_size=BATCH_SIZE, compile=False,
    )  # fmt: skip
    after = [record[0] for record in records[1:]] + [pair.state_dict()]
    num_batches = math.ceil(N / BATCH_SIZE)
    for i, ((before, arguments, z, asleep), now) in enumerate(zip(records, after, strict=True)):
        rows = min(BATCH_SIZE, N - i % num_batches * BATCH_SIZE)
        own = len(range(rank, rows, 2))
        other.load_state_dict(before)
        # the terms of shared latents are multiplied by the part of the rows on this rank
        linear = isinstance(objective, STL)
        _, expected = reference(objective, other, arguments, z, asleep, scale=N / max(own, 1), inside=linear)
        for name, g in expected.items():
            total = g * (own / rows)
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(now[name] - before[name], RATE * total, rtol=1e-7, atol=1e-12)
    return f"{len(records)} steps"


def refused():
    """The error of an objective that is not linear, for a latent that all data share."""
    pair = pairs.Shared()
    (x,), _ = pair.arguments(N)
    try:
        pv.fit(pair.model, pair.guide, x, loss=IWAE(3), batch_size=None, num_epochs=1)
    except ValueError as error:
        return str(error)
    return "trained"
