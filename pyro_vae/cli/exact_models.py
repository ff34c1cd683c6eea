"""The exact models of ``pyro-vae compare`` by name, and the training of guides on them."""

from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.optim import ExponentialLR

from pyro_vae import exact, nets
from pyro_vae.cli.build import GUIDES
from pyro_vae.diagnostics import GuideComparison, compare_guides
from pyro_vae.infer import fit
from pyro_vae.vae import Guide

_HIDDEN, _BATCH_SIZE = 64, 200
LARGEST_PRODUCT = _BATCH_SIZE * _HIDDEN**2  # multiply-adds of the largest matrix product of a step


def _loadings(d: int, k: int) -> torch.Tensor:
    """A ``(d, k)`` matrix with correlated columns, so that the posterior is correlated too."""
    angle = torch.arange(d).unsqueeze(1) + 0.6 * torch.arange(k)
    return 0.8 + 0.7 * torch.cos(angle)


def _two_modes() -> exact.MixturePrior:
    locs = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
    return exact.MixturePrior(torch.ones(2), locs, 0.5 * torch.eye(2), weight=torch.eye(2), noise_scale=3.0)


def _state_space() -> exact.LinearGaussianStateSpace:
    transition = torch.tensor([[0.9, -0.3], [0.3, 0.9]])  # rotation with decay
    return exact.LinearGaussianStateSpace(
        transition, 0.1 * torch.eye(2), torch.eye(1, 2), 0.2 * torch.eye(1), torch.eye(2), num_steps=5
    )


MODELS: dict[str, tuple[Callable[[], exact.ExactModel], str]] = {
    "normal-normal": (
        lambda: exact.NormalNormal(5),
        "the mean of five observations: a normal posterior",
    ),
    "factor-analysis": (
        lambda: exact.LinearGaussian(_loadings(6, 2), noise_scale=0.7),
        "two correlated factors: a mean-field guide has a gap",
    ),
    "regression": (
        lambda: exact.BayesianLinearRegression(_loadings(10, 3), noise_precision=4.0),
        "Bayesian linear regression on collinear columns",
    ),
    "two-modes": (_two_modes, "a Gaussian-mixture prior: a posterior with two modes"),
    "relu": (
        lambda: exact.ReluDecoder(
            torch.tensor([1.0, -1.0]), torch.zeros(2), torch.eye(1, 2) + 0.8, noise_scale=0.4
        ),
        "a ReLU decoder of |z|: a one-dimensional posterior with two modes",
    ),
    "funnel": (
        lambda: exact.Funnel(2, scale=1.5),
        "Neal's funnel: the scale of one latent depends on another",
    ),
    "banana": (lambda: exact.Banana(), "a posterior along a curved ridge"),
    "state-space": (_state_space, "five steps of a linear-Gaussian state space model"),
}


def train_guides(
    model: exact.ExactModel, names: Sequence[str], *, num_epochs: int, num_data: int, seed: int
) -> GuideComparison:
    """Train a guide of each family on 2000 draws of the model, and compare them on ``num_data`` new draws.

    :param names: names of guide families, keys of :data:`~pyro_vae.cli.build.GUIDES`.
    :raises ValueError: if the latent of the model has too few dimensions for a family.
    """
    pyro.set_rng_seed(seed)
    x, test = model.sample(2000), model.sample(num_data)
    guides = {}
    for name in names:
        guide = Guide(
            GUIDES[name](
                nets.MLP(tuple(model.event_shape), (_HIDDEN, _HIDDEN)), event_shape=model.latent_shape
            )
        )
        schedule = {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 5e-3},
            "gamma": 0.02 ** (1 / num_epochs),
        }
        fit(model, guide, x, num_epochs=num_epochs, batch_size=_BATCH_SIZE, optim=ExponentialLR(schedule))
        guides[name] = guide
    return compare_guides(model, guides, test)
