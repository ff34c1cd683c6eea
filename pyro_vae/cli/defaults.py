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
