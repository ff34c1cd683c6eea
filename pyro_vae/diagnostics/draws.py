"""Draws of a guide by site or as an ArviZ ``DataTree``, and a classifier two-sample test for draws."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.batches import Batch
from pyro_vae.numerics import pareto_k
from pyro_vae.pairs.latents import inspect_latents
from pyro_vae.pairs.log_weights import joint_log_weights
from pyro_vae.pairs.preserve import read_whole, untouched
from pyro_vae.pairs.traces import Program


def posterior_draws(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_draws: int = 1000,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
) -> dict[str, Tensor]:
    """Draws z ~ q(z|x) of each latent site, ``(num_draws, batch, *shape)``.

    :param data: as for :func:`~pyro_vae.fit`.
    :param joint: treat all data as one datum, for models with global latents. Draws then have shape
        ``(num_draws, *shape)``, where ``shape`` has a dimension for each plate of the site, including the
        data plate.
    :raises ValueError: if a latent is outside of the data plate and ``joint`` is false.
    """
    batch = read_whole(data, seed=seed)
    return _draws("posterior_draws", model, guide, batch, num_draws, seed, check, joint, weighted=False)[0]


def to_arviz(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_draws: int = 1000,
    seed: int = 0,
    check: bool = True,
    joint: bool = False,
) -> Any:
    """A guide's draws as an ArviZ ``DataTree``.

    Group ``posterior`` has one chain and a dimension ``data``. Its attribute ``pareto_k`` is k̂ per datum.
    Group ``sample_stats`` has the log-weight log p(x, z) − log q(z|x) of each draw, in nats.

    The arguments are those of :func:`posterior_draws`; with ``joint`` there is no dimension ``data``, and a
    single k̂.

    :raises ImportError: if ``arviz-base`` is not installed.
    :raises ValueError: if a latent is outside of the data plate and ``joint`` is false.
    """
    try:
        from arviz_base import from_dict
    except ImportError as error:
        raise ImportError("to_arviz: arviz-base is not installed; pip install arviz-base") from error
    batch = read_whole(data, seed=seed)
    draws, log_weight = _draws("to_arviz", model, guide, batch, num_draws, seed, check, joint, weighted=True)
    data_dims = [] if joint else ["data"]
    sites = {name: part.cpu().numpy()[np.newaxis] for name, part in draws.items()}
    stats = {"log_weight": log_weight.cpu().numpy()[np.newaxis]}
    dims = {
        name: [*data_dims, *(f"{name}_{i}" for i in range(part.ndim - 2 - len(data_dims)))]
        for name, part in sites.items()
    }
    tree = from_dict({"posterior": sites, "sample_stats": stats}, dims=dims | {"log_weight": data_dims})
    tree["posterior"].attrs["pareto_k"] = pareto_k(log_weight).tolist()
    return tree


def _draws(
    verb: str,
    model: Program,
    guide: Program,
    batch: Batch,
    num_draws: int,
    seed: int,
    check: bool,
    joint: bool,
    *,
    weighted: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of each site, and one number for each draw: its log-weight if ``weighted``, for which the model
    is run, else log q(z|x)."""
    if joint:
        joint_draws = joint_log_weights(model, guide, batch, num_particles=num_draws, seed=seed, check=check)
        return joint_draws.draws, joint_draws.log_weights
    with untouched(training=False, seed=seed), torch.no_grad():
        latents, batch = inspect_latents(model, guide, batch, verb=verb, check=check)
        z, log_q = latents.draw(guide, batch, num_draws)
        return latents.by_site(z), latents.log_joint(model, batch, z) - log_q if weighted else log_q


@dataclass(frozen=True)
class TwoSample:
    """Held-out accuracy of a classifier that tells two sets of draws apart: about ½ if both have the same
    distribution. ``accuracy_se`` is the binomial standard error at an accuracy of ½."""

    accuracy: float
    accuracy_se: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f} ± {self.accuracy_se:.3f} (0.5 for equal distributions)"


def two_sample_test(a: Tensor, b: Tensor, *, num_folds: int = 5, seed: int = 0) -> TwoSample:
    """Classifier two-sample test (Lopez-Paz & Oquab 2017): a network with two hidden layers on z-scored
    features, cross-validated.

    Use it to compare draws of a guide for one datum with draws of the posterior, exact or by NUTS. For draws
    of N(0, I) and of N(δ, I), the best possible accuracy is Φ(‖δ‖/2).

    :param a, b: draws ``(n, dim)`` of equal shape, with n ≥ 10 ``num_folds``.
    :raises ImportError: if ``scikit-learn`` is not installed.
    :raises ValueError: if the shapes differ or n is too small.
    """
    if a.dim() != 2 or a.shape != b.shape or len(a) < 10 * num_folds:
        raise ValueError(
            f"two_sample_test: expected two sets of draws of equal shape (n, dim) with n ≥ {10 * num_folds}, "
            f"but got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    try:
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "two_sample_test: scikit-learn is not installed; pip install scikit-learn"
        ) from error
    x = torch.cat([a, b]).detach().cpu().double().numpy()
    y = np.repeat([0, 1], len(a))
    width = 10 * a.shape[1]
    network = MLPClassifier((width, width), early_stopping=True, max_iter=500, random_state=seed)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    accuracy = cross_val_score(make_pipeline(StandardScaler(), network), x, y, cv=folds).mean()
    return TwoSample(float(accuracy), 0.5 / len(y) ** 0.5)
