"""The default options of each data set. Torch is not imported, so that ``--help`` is fast."""

from typing import Any

_MNIST: dict[str, Any] = {
    "likelihood": "bernoulli",
    "guide": "normal",
    "prior": "standard-normal",
    "latent_dim": 20,
    "hidden": (500,),
    "num_epochs": 15,
    "learning_rate": 1e-3,
    "warm_up": 0,
}
_DIGITS = {
    "likelihood": "continuous-bernoulli",
    "latent_dim": 2,
    "hidden": (200,),
    "num_epochs": 200,
    "learning_rate": 3e-3,
}
_RING = {
    "likelihood": "normal",
    "latent_dim": 2,
    "hidden": (100, 100),
    "num_epochs": 200,
    "learning_rate": 3e-3,
    "warm_up": 50,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": _MNIST | _DIGITS,
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "frey-faces": _MNIST | {"likelihood": "normal", "latent_dim": 2, "hidden": (200,), "num_epochs": 200},
    "ring": _MNIST | _RING,
}

LIKELIHOOD_OF = {  # of files, by what their entries are
    "binary": "bernoulli",
    "counts": "negative-binomial",
    "grey": "continuous-bernoulli",
    "real": "normal",
}


def of_file(kind: str, num_rows: int, num_columns: int) -> dict[str, Any]:
    """The defaults for a file: one hidden layer of twice as many units as columns (64 to 512), half as many
    latent dimensions as columns (2 to 20), and about 20,000 steps (10 to 200 epochs of batches of 100)."""
    return _MNIST | {
        "likelihood": LIKELIHOOD_OF[kind],
        "latent_dim": max(2, min(20, num_columns // 2)),
        "hidden": (max(64, min(512, 2 * num_columns)),),
        "num_epochs": max(10, min(200, 2_000_000 // num_rows)),
    }


# what `train --objective` names: a line of help, and the default number of particles
OBJECTIVES: dict[str, tuple[str, int]] = {
    "elbo": ("the ELBO", 1),
    "stl": ("elbo, less noise in gradients", 1),
    "iwae": ("bound of K draws, above elbo", 5),
    "dreg": ("iwae, less noise in gradients", 5),
    "renyi": ("Rényi bound of order --alpha", 5),
    "vimco": ("iwae for discrete latents (--pair)", 5),
    "wake-sleep": ("elbo; guide learns from simulations", 1),
    "rws": ("iwae; guide learns from K draws", 5),
}
LINEAR_OBJECTIVES = "elbo", "stl"  # linear in log-probabilities, so that --beta and --warm-up apply
ALPHA = 0.5  # the order of renyi
