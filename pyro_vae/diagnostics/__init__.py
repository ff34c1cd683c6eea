"""Is the guide good? Comparison with an exact posterior, and the gap split into approximation and amortization."""

from pyro_vae.diagnostics.compare import Comparison, GuideComparison, compare, compare_guides
from pyro_vae.diagnostics.energy import FreeEnergy, free_energy, pointwise_identity
from pyro_vae.diagnostics.gap import GapSplit, split_gap

__all__ = [
    "Comparison",
    "FreeEnergy",
    "GapSplit",
    "GuideComparison",
    "compare",
    "compare_guides",
    "free_energy",
    "pointwise_identity",
    "split_gap",
]
