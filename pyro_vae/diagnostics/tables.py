"""Tables of means over data."""

import math
from collections.abc import Mapping

from torch import Tensor


def over_data(value: Tensor) -> tuple[float, float]:
    """Mean over data of ``value``, ``(batch,)``, and the standard error of the mean, ``nan`` for a single
    datum. The standard error is from the spread over data, which includes the Monte Carlo error."""
    error = value.std().item() / math.sqrt(len(value)) if len(value) > 1 else math.nan
    return value.mean().item(), error


def table(title: str, rows: Mapping[str, tuple[float, float]]) -> str:
    """One line for each quantity, with its mean and standard error; means that are ``nan`` are omitted."""
    lines = [
        f"{name:24} {mean:10.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
        for name, (mean, error) in rows.items()
        if not math.isnan(mean)
    ]
    return "\n".join([title, *lines])
