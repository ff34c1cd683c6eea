"""Comparison of run folders, for ``pyro-vae compare RUN RUN…``: settings that differ, curves, bounds."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.axes import Axes

from pyro_vae import html, plots
from pyro_vae.cli import report, runs
from pyro_vae.infer import Epoch

# options on which the held-out data depend, and the seed for the rows of a file
_DATA_FIELDS = "dataset", "sha256", "validation_sha256", "binarize", "event_shape", "holdout", "condition"


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side.

    settings: the options that differ, with the value of each run. results: held-out ELBO, and the bounds of
    the newest evaluation of each run, as text. epochs: of each run. same_data: whether all runs have the same
    data, so that their bounds can be compared.
    """

    names: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]
    results: dict[str, tuple[str, ...]]
    epochs: dict[str, list[Epoch]]
    same_data: bool

    def rows(self) -> list[tuple[str, ...]]:
        """The settings and results as rows of text."""
        settings = {f"--{key.replace('_', '-')}": value for key, value in self.settings.items()}
        return [(key, *map(_text, values)) for key, values in (settings | self.results).items()]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings and results of each run, as JSON types."""
        return {
            name: {
                part: {key: values[i] for key, values in rows.items()}
                for part, rows in (("settings", self.settings), ("results", self.results))
            }
            for i, name in enumerate(self.names)
        }

    def plot(self) -> Axes:
        """The held-out ELBO of each run against the epoch."""
        return plots.plot_runs(self.epochs)

    def __str__(self) -> str:
        rows = [("", *self.names), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{first:{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            for first, *cells in rows
        ]
        return "\n".join(lines if self.same_data else [*lines, f"{_REMEDY} {_CAUSE}"])

    def page(self, folder: Path, pictures: Sequence[str]) -> str:
        """The comparison as a page in ``folder``, with the pictures there."""
        links = [
            html.link(quote(os.path.relpath(Path(name, "report.html"), folder)), name) for name in self.names
        ]
        settings, results = self.rows()[: len(self.settings)], self.rows()[len(self.settings) :]
        shown = [
            html.picture(quote(name), name)
            if name.endswith((".png", ".svg"))
            else html.paragraph(html.link(quote(name), name))
            for name in pictures
        ]
        none = html.paragraph("All options are the same.")
        return html.page(
            f"Comparison of {len(self.names)} runs",
            *([] if self.same_data else [html.warning(_REMEDY, _CAUSE)]),
            html.paragraph(Markup("Reports: ") + Markup(", ").join(links)),
            html.section("Results", html.table(results, ("", *self.names)), html.note(_ABOUT)),
            html.section("Training", html.pictures(*shown)),
            html.section(
                "Settings that differ", html.table(settings, ("", *self.names)) if settings else none
            ),
        )


_REMEDY = "Compare runs on the same data."
_CAUSE = "The data of these runs differ, so their ELBOs and bounds do not rank the models."
_OF_TRAINING = ", recorded in training"
_ABOUT = (
    "Held-out means in nats per datum, ± their standard error over data. On the same data, differences "
    "between runs are more accurate than these errors. log p(x) ≥ marks a lower bound, ≤ an upper bound, "
    "from the newest evaluation of the parameters of each run, on held-out data if there is one. Values "
    "recorded in training use fewer draws of z than those of evaluate."
)


def compare(paths: Iterable[Path]) -> RunComparison:
    """Compare runs. Raises the errors of :func:`~pyro_vae.cli.runs.read_run`, and ``ValueError`` if
    ``metrics.jsonl`` is invalid."""
    opened = {str(path): runs.read_run(path) for path in paths}
    configs = [asdict(run.config) for run in opened.values()]
    settings = {
        key: tuple(config[key] for config in configs)
        for key in configs[0]
        if any(config[key] != configs[0][key] for config in configs)
    }
    columns = [_results(run) for run in opened.values()]
    is_split = any(run.config.holdout is not None for run in opened.values())
    data_fields = (*_DATA_FIELDS, "seed") if is_split else _DATA_FIELDS
    names = sorted(dict.fromkeys(key for column in columns for key in column), key=_place)
    return RunComparison(
        tuple(opened),
        settings,
        {key: tuple(column.get(key, "") for column in columns) for key in names},
        {name: run.history() for name, run in opened.items()},
        not settings.keys() & set(data_fields),
    )


def _place(name: str) -> int:
    """The place of a row: bounds come first, those of the training, of ELBO and objective, and the others."""
    if name.endswith(_OF_TRAINING):
        return 0
    if name.startswith("log p(x)"):
        return 1 if re.search(r" (elbo|objective),", name) else 2
    return 3


def _results(run: runs.Run) -> dict[str, str]:
    """The numbers of a run, as text."""
    epochs, saved = run.history(), run.saved_epoch()
    mean = saved.validation or saved.train
    result = {f"ELBO{_OF_TRAINING}": html.plus_minus(mean.elbo, mean.elbo_se)}
    if mean.bound is not None:
        result[f"bound of the objective{_OF_TRAINING}"] = html.plus_minus(mean.bound, mean.bound_se)
    result["KL"] = f"{mean.kl:.2f}"
    data, estimates = report.estimates_of(run)
    for estimate in estimates:
        where = "simulated data" if estimate.name.startswith("bdmc") else data
        name = f"log p(x) {estimate.sign} {estimate.name}, evaluated on {where}"
        result[name] = html.plus_minus(estimate.log_evidence, estimate.mean_se)
    return result | {
        "epoch of the parameters": f"{saved.epoch} of {len(epochs)}",
        "seconds of training": f"{sum(epoch.seconds for epoch in epochs):.0f}",
    }


def _text(value: Any) -> str:
    """A setting as on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "–" if value is None else str(value)
