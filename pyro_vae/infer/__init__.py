"""Verbs on any pair: train it, evaluate it, check it."""

from pyro_vae.check import PairReport, SiteReport, check_pair
from pyro_vae.infer.evaluate import evaluate
from pyro_vae.infer.fit import History, fit, train
from pyro_vae.infer.group import Group, launched, torchrun
from pyro_vae.infer.state import Epoch
from pyro_vae.infer.svi import SVI

__all__ = [
    "SVI",
    "Epoch",
    "Group",
    "History",
    "PairReport",
    "SiteReport",
    "check_pair",
    "evaluate",
    "fit",
    "launched",
    "torchrun",
    "train",
]
