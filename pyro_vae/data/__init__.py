"""Built-in data sets, and minibatches of users' data."""

from pyro_vae.data.batches import Batch, Batches, as_batches
from pyro_vae.data.datasets import SOURCES, Data, is_here, load, ring

__all__ = ["SOURCES", "Batch", "Batches", "Data", "as_batches", "is_here", "load", "ring"]
