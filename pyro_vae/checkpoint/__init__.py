"""Save and load: a finished pair, and a training run between two steps. Safetensors and JSON, never pickle."""

from pyro_vae.checkpoint.folder import MismatchError, pack, unpack
from pyro_vae.checkpoint.series import Checkpoints, read_checkpoint
from pyro_vae.checkpoint.weights import copy_all, load, save

__all__ = ["Checkpoints", "MismatchError", "copy_all", "load", "pack", "read_checkpoint", "save", "unpack"]
