"""A function of tensors, traced into a graph of tensor operations and compiled.

The package is optional: it depends on unstable parts of torch (all of them are in ``internals``), and whatever imports it does
so inside the call that needs it, so that everything else works where the import fails.
"""

from pyro_vae.compiler.graphed import THRESHOLDS, Graphed, Thresholds, restored
from pyro_vae.compiler.internals import has_compiler
from pyro_vae.compiler.trace import CannotTrace, describe

__all__ = ["THRESHOLDS", "CannotTrace", "Graphed", "Thresholds", "describe", "has_compiler", "restored"]
