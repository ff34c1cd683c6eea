"""Train and evaluate any pair of a model and a guide."""

from pyro_vae.infer.evaluate import evaluate
from pyro_vae.infer.fit import History, fit, train
from pyro_vae.infer.mcem import EMHistory, mcem
from pyro_vae.infer.objectives import (
    IWAE,
    STL,
    VIMCO,
    Objective,
    Renyi,
    ReweightedWakeSleep,
    WakeSleep,
)
from pyro_vae.infer.resume import Epoch
from pyro_vae.infer.svi import SVI
from pyro_vae.infer.tracking import TensorBoard, Tracker, metrics_of
from pyro_vae.processes import Group, across_processes, process_group, rank_and_world_size

__all__ = [
    "IWAE",
    "STL",
    "SVI",
    "VIMCO",
    "EMHistory",
    "Epoch",
    "Group",
    "History",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "TensorBoard",
    "Tracker",
    "WakeSleep",
    "across_processes",
    "evaluate",
    "fit",
    "mcem",
    "metrics_of",
    "process_group",
    "rank_and_world_size",
    "train",
]
