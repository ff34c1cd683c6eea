"""Built-in data sets, users' files, and minibatches of users' data."""

from pyro_vae.data.batches import Batch, Batches, as_batches
from pyro_vae.data.datasets import SOURCES, Data, is_here, load, ring, split_rows
from pyro_vae.data.readers import Table, read
from pyro_vae.data.stream import FileStream

__all__ = [
    "SOURCES",
    "Batch",
    "Batches",
    "Data",
    "FileStream",
    "Table",
    "as_batches",
    "is_here",
    "load",
    "read",
    "ring",
    "split_rows",
]
