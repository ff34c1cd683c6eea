"""Verbs on any pair: train it, evaluate it, check it."""

from pyro_vae.infer.evaluate import evaluate
from pyro_vae.infer.fit import Epoch, History, fit, train

__all__ = ["Epoch", "History", "evaluate", "fit", "train"]
