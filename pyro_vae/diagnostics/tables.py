"""Results as tables: quantities per datum as means over the data."""

import math
from collections.abc import Mapping

from torch import Tensor


def over_data(value: Tensor) -> tuple[float, float]:
    """The mean over data, and its standard error from the spread over data, which includes Monte Carlo error;
    ``nan`` for one datum. value: ``(batch,)``."""
    error = value.std().item() / math.sqrt(len(value)) if len(value) > 1 else math.nan
    return value.mean().item(), error


def table(title: str, rows: Mapping[str, tuple[float, float]]) -> str:
    """One line for each quantity, its mean and standard error; a mean that is ``nan`` is left out."""
    lines = [
        f"{name:24} {mean:10.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
        for name, (mean, error) in rows.items()
        if not math.isnan(mean)
    ]
    return "\n".join([title, *lines])
