"""Trace a function of tensors into a graph of tensor operations, and compile the graph.

The package is optional, since it depends on unstable parts of torch (all of them are in ``internals``). Other
packages import it only inside the calls that need it, so that they work even if its import fails.
"""

from pyro_vae.compiler.graphed import THRESHOLDS, Graphed, Thresholds, restored
from pyro_vae.compiler.internals import has_compiler
from pyro_vae.compiler.trace import CannotTrace, describe

__all__ = ["THRESHOLDS", "CannotTrace", "Graphed", "Thresholds", "describe", "has_compiler", "restored"]
