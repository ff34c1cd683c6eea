"""Quality of a guide: comparison with an exact posterior, split of log p(x) − ELBO, calibration, use
of latent dimensions."""

from pyro_vae.diagnostics.calibration import Calibration, calibration
from pyro_vae.diagnostics.compare import Comparison, GuideComparison, compare, compare_guides
from pyro_vae.diagnostics.draws import TwoSample, posterior_draws, to_arviz, two_sample_test
from pyro_vae.diagnostics.energy import FreeEnergy, free_energy, pointwise_identity
from pyro_vae.diagnostics.gap import GapSplit, split_gap
from pyro_vae.diagnostics.report import Diagnosis, diagnose
from pyro_vae.diagnostics.usage import LatentUsage, latent_usage

__all__ = [
    "Calibration",
    "Comparison",
    "Diagnosis",
    "FreeEnergy",
    "GapSplit",
    "GuideComparison",
    "LatentUsage",
    "TwoSample",
    "calibration",
    "compare",
    "compare_guides",
    "diagnose",
    "free_energy",
    "latent_usage",
    "pointwise_identity",
    "posterior_draws",
    "split_gap",
    "to_arviz",
    "two_sample_test",
]
