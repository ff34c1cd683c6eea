"""Auto-Encoding Variational Bayes in Pyro: model/guide pairs trained by SVI.

Submodules and public names are imported on first use, so that ``import pyro_vae`` does not import torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae import (
        checkpoint,
        conditionals,
        data,
        diagnostics,
        evidence,
        exact,
        flows,
        infer,
        nets,
        numerics,
        pairs,
        plots,
        priors,
        vae,
    )
    from pyro_vae.data import Data, load
    from pyro_vae.diagnostics import compare, compare_guides, diagnose, free_energy, split_gap
    from pyro_vae.infer import SVI, Epoch, History, evaluate, fit, train
    from pyro_vae.pairs import JointLogWeights, PairReport, check_pair, joint_log_weights, log_weights
    from pyro_vae.vae import VAE, Guide, Model

__version__ = "0.2.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())

_SUBMODULE_OF = {
    "VAE": "vae",
    "Data": "data",
    "Epoch": "infer",
    "Guide": "vae",
    "History": "infer",
    "JointLogWeights": "pairs",
    "Model": "vae",
    "PairReport": "pairs",
    "SVI": "infer",
    "check_pair": "pairs",
    "compare": "diagnostics",
    "compare_guides": "diagnostics",
    "diagnose": "diagnostics",
    "free_energy": "diagnostics",
    "split_gap": "diagnostics",
    "evaluate": "infer",
    "fit": "infer",
    "joint_log_weights": "pairs",
    "load": "data",
    "log_weights": "pairs",
    "train": "infer",
}
_SUBMODULES = (
    "checkpoint",
    "conditionals",
    "data",
    "diagnostics",
    "evidence",
    "exact",
    "flows",
    "infer",
    "nets",
    "numerics",
    "pairs",
    "plots",
    "priors",
    "vae",
)
__all__ = [
    "SVI",
    "VAE",
    "Data",
    "Epoch",
    "Guide",
    "History",
    "JointLogWeights",
    "Model",
    "PairReport",
    "check_pair",
    "checkpoint",
    "compare",
    "compare_guides",
    "conditionals",
    "data",
    "diagnose",
    "diagnostics",
    "evaluate",
    "evidence",
    "exact",
    "fit",
    "flows",
    "free_energy",
    "infer",
    "joint_log_weights",
    "load",
    "log_weights",
    "nets",
    "numerics",
    "pairs",
    "plots",
    "priors",
    "split_gap",
    "train",
    "vae",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULE_OF:
        return getattr(importlib.import_module(f"pyro_vae.{_SUBMODULE_OF[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"pyro_vae.{name}")
    raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
