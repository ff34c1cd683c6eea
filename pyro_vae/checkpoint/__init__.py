"""Save and load trained pairs and checkpoints of training runs: safetensors and JSON, no pickle."""

from pyro_vae.checkpoint.folder import MismatchError, is_ours, remove, tensor_file
from pyro_vae.checkpoint.series import Checkpoints, read_checkpoint
from pyro_vae.checkpoint.weights import copy_all, load, read_about, save, save_pair, within

__all__ = [
    "Checkpoints", "MismatchError", "copy_all", "is_ours", "load", "read_about", "read_checkpoint",
    "remove", "save", "save_pair", "tensor_file", "within",
]  # fmt: skip
