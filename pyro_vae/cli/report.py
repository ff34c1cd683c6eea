"""Write ``report.html``: what a run trained, warnings, numbers and pictures on one page. Nothing is computed:
the page shows the files of the run folder that other commands wrote."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from pyro_vae import html
from pyro_vae.cli import output
from pyro_vae.cli.build import Config, build_loss
from pyro_vae.cli.defaults import LINEAR_OBJECTIVES
from pyro_vae.cli.runs import RESULT_FOLDERS, Run, resume_command, train_command
from pyro_vae.data.datasets import SOURCES
from pyro_vae.diagnostics.report import summary_table
from pyro_vae.files import is_file, is_folder, parse_json, read_bytes, write_whole
from pyro_vae.infer import Epoch
from pyro_vae.infer.losses import kind_of

_TITLES = {
    "plots": "Pictures",
    "evaluation": "Evidence: estimates of log p(x)",
    "diagnosis": "Diagnosis of the guide",
    "samples": "Samples",
    "reconstructions": "Reconstructions",
}
_CAPTIONS = {
    "curve": "Higher is better. The training curve is a mean over the steps of each epoch, while the "
    "parameters change. A held-out curve that falls while the other rises shows overfitting.",
    "ess": "Near 1, one of the K draws outweighs the others.",
    "reconstructions": "Held-out data, and E[x|z] at a draw z of q(z|x).",
    "samples": "What the model generates. If these look worse than the reconstructions, the aggregate "
    "posterior differs from the prior.",
    "latent": "Where the guide puts held-out data in the latent space.",
    "manifold": "What the decoder makes of each place in the latent space. Equal steps are equally probable "
    "under the prior.",
    "ladder": "Error bars are Monte Carlo standard errors. A lower bound that still rises with its cost is "
    "not yet tight.",
    "pareto-k": "Data above 0.7 have a guide that is too narrow, or in the wrong place, for importance "
    "sampling.",
    "worst": "Look for what these data have in common.",
    "calibration": "Ranks of the true latents among draws of the guide, on data simulated from the model. "
    "Flat is calibrated; a U is a guide that is too narrow, a hump one that is too wide.",
}
_FILES = {
    "config.json": "options",
    "env.json": "versions, device and command",
    "metrics.jsonl": "ELBO of each epoch",
    "weights": "parameters of model and guide, as safetensors",
    "checkpoints": "states from which the training resumes",
}


def write_report(run: Run, changed: Path | None = None) -> Path | None:
    """Write ``report.html`` and return its path. A failure prints a warning and returns ``None``.

    :param changed: the folder with new results. If it is not in the run folder, nothing is written.
    """
    if changed is not None and changed.resolve().parent != run.path.resolve():
        return None
    try:
        page = html.page(run.path.resolve().name, *_parts(run))
        write_whole(run.path / "report.html", page.encode("utf-8", "replace"))
        return run.path / "report.html"
    except (OSError, ValueError) as error:
        output.print_progress(f"{run.path}: report.html was not written: {error}")
        return None


def _parts(run: Run) -> Iterator[Markup]:
    """The parts of the page, from the top."""
    epochs, saved, results = run.history(), run.saved_epoch(), _results(run)
    seconds = sum(epoch.seconds for epoch in epochs)
    yield html.paragraph(f"{_what(run.config)}: {_count(len(epochs), 'epoch')} in {seconds:.0f} s.")
    for remedy, cause in _warnings(run, epochs, saved, results):
        yield html.warning(remedy, cause)
    yield html.section("Result", *_numbers(run, epochs, saved))
    curves = [
        picture
        for result in _valid(results["plots"])[:1]
        for picture in result.pictures()
        if picture.stem in ("curve", "ess")
    ]
    if curves:
        yield html.section("Training", html.pictures(*map(_picture, curves)))
    for kind, title in _TITLES.items():
        for i, result in enumerate(results[kind]):
            if parts := result.parts(without=curves):
                name = title + (f", on {result.data}" if result.data else "")
                if i == 0 and not result.other:
                    yield html.section(name, *parts)
                else:
                    of = f", of {result.other}" if result.other else ""
                    yield html.details(f"{name} ({result.folder.name}{of})", *parts)
    yield html.section("What was trained", *_settings(run))
    yield html.section("Files", _files(run.path, results))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _what(config: Config) -> str:
    """The pair and the data in one line."""
    name = Path(config.dataset).name
    if config.pair is not None:
        return f"The pair {config.pair} on {name}"
    return (
        f"A VAE on {name} with {_count(config.latent_dim or 0, 'latent dimension')}, a {config.likelihood} "
        f"likelihood and a {config.guide} guide"
    )


def _numbers(run: Run, epochs: Sequence[Epoch], saved: Epoch) -> Iterator[Markup]:
    """The ELBO and its parts, what they are, and of which epoch."""
    yield saved.to_html(run.config.bound_name())
    which = (
        f"The parameters are those of epoch {saved.epoch} of {len(epochs)}."
        if run.config.patience is None
        else f"Early stopping restored the parameters of epoch {saved.epoch} of {len(epochs)}."
    )
    bound = ""
    if saved.train.bound is not None:
        bound = f"{run.config.bound_name()} is {kind_of(build_loss(run.config)).bound}. "
    yield html.note(
        "Means over data in nats per datum, ± their standard error. In expectation the ELBO, "
        f"reconstruction − KL, is a lower bound of log p(x). {bound}"
        f"The training values are from the steps of the epoch. {which}"
    )


def _warnings(
    run: Run, epochs: Sequence[Epoch], saved: Epoch, results: "Mapping[str, Sequence[_Result]]"
) -> Iterator[tuple[str, str]]:
    """A remedy and a cause for each fault that the files of the run show."""
    if unfinished := run.unfinished():
        yield f"Resume the training: {_resume(run)}", f"{unfinished}."
    yield from _training_warnings(run, epochs, saved)
    for verb, kind in (("evaluate", "evaluation"), ("diagnose", "diagnosis")):
        if results[kind] and not _valid(results[kind]):
            yield (
                f"Repeat the {kind}: {_command(run, verb)}",
                f"The {kind} is of {results[kind][0].other}, so the advice on this page leaves it out.",
            )
    for result in _valid(results["diagnosis"])[:1]:
        record = result.diagnosis()
        if record.get("pareto_k_above_0.7", 0.0) > 0.1:
            yield (
                f"Train {_richer_guide(run.config)}.",
                f"Pareto k is above 0.7 for {record['pareto_k_above_0.7']:.0%} of the data ({result.data}): "
                "the guide is far from the posterior there.",
            )
        if record.get("not_calibrated"):
            yield (
                "Do not read intervals of the guide as those of the posterior. It may help to train "
                f"{_richer_guide(run.config)}.",
                f"On simulated data the guide is not calibrated: {', '.join(record['not_calibrated'])}.",
            )
    for result in _valid(results["evaluation"])[:1]:
        estimates = result.estimates()
        unreliable = [e for e in estimates if e.k_share is not None and e.k_share > 0.1]
        if unreliable:
            last, selection = unreliable[-1], ("--data", result.data) if result.data else ()
            command = _command(run, "evaluate", "--estimator", "elbo,importance,ais", *selection)
            condition = "" if run.config.pair is None else ", if all latents are continuous"
            yield (
                "Prefer the estimate of AIS: it depends on the guide less."
                if any(estimate.name.startswith("ais") for estimate in estimates)
                else f"Add the estimate of AIS{condition}: it depends on the guide less. {command}",
                f"For {last.k_share:.0%} of the data ({result.data}) Pareto k is above 0.7 ({last.method}): "
                "the bound is valid but loose, and its Monte Carlo error is not accurate.",
            )


def _richer_guide(config: Config) -> str:
    """A guide to try when the one of the run is too far from the posterior, as text."""
    if config.pair is not None:
        return "a guide of a richer family, or with more parameters"
    if config.guide in ("flow", "spline", "mixture"):
        return "with wider layers, --hidden"
    families = ("flow",) if config.guide == "full" else ("full", "flow")
    return f"a guide of a richer family, such as {' or '.join(f'--guide {name}' for name in families)}"


def _training_warnings(run: Run, epochs: Sequence[Epoch], saved: Epoch) -> Iterator[tuple[str, str]]:
    """Faults that the curves show. A fall of the held-out objective counts if it exceeds the standard error
    over data, and a rise at the end if it is more than 2 % of the whole rise."""
    mean = saved.validation or saved.train
    if not math.isfinite(mean.objective):
        yield (
            "Train again with a lower --learning-rate, or with --clip-norm.",
            f"The objective is not finite after epoch {saved.epoch}.",
        )
    if mean.kl < 0.1:
        objective = "" if run.config.objective in LINEAR_OBJECTIVES else "--objective elbo "
        warm_up = f"{objective}--warm-up {max(1, len(epochs) // 4)}"
        yield (
            f"Train again with {warm_up}, so that the KL weight rises from 0.",
            f"The KL from guide to prior is only {mean.kl:.2f} nats: z carries almost no information on x.",
        )
    values = [epoch.validation.objective for epoch in epochs if epoch.validation is not None]
    error = mean.elbo_se if mean.bound_se is None else mean.bound_se
    if len(values) != len(epochs) or not all(map(math.isfinite, values)):
        return
    best, start = max(values), len(values) - max(1, len(values) // 10)
    if run.config.patience is None and best - values[-1] > error:
        yield (
            "Train again with --patience 20, which stops early and restores the best parameters.",
            f"The held-out objective was highest after epoch {epochs[values.index(best)].epoch}, {best:.2f}, "
            f"and is {values[-1]:.2f} at the end: the model overfits.",
        )
    rise = best - max(values[:start], default=best)
    is_stopped_early = len(epochs) < run.config.num_epochs
    if best - values[0] > error and rise > 0.02 * (best - values[0]) and not is_stopped_early:
        yield (
            f"Train for more epochs: {_resume(run)} --num-epochs {2 * run.config.num_epochs}",
            f"The held-out objective still rises: by {rise:.2f} nats in the last tenth of the training.",
        )


def _resume(run: Run) -> str:
    """The command that resumes the training."""
    return resume_command(run.path, _pair_option(run.config))


def _command(run: Run, verb: str, *options: str) -> str:
    """The command that runs ``verb`` on the run."""
    return output.shell_command(verb, run.path, *options, *_pair_option(run.config))


def _pair_option(config: Config) -> tuple[str, ...]:
    return () if config.pair is None else ("--pair", config.pair)


def _settings(run: Run) -> Iterator[Markup]:
    """The data, the pair, the objective and the optimizer, and the command that trains the same."""
    config = run.config
    rows = [("data", _data(config))]
    if config.pair is None:
        network = f"network with hidden layers of {', '.join(map(str, config.hidden or ()))} units"
        reversed_network = (
            f"network with hidden layers of {', '.join(map(str, (config.hidden or ())[::-1]))} units"
        )
        rows += [
            ("prior p(z)", f"{config.prior}, {_count(config.latent_dim or 0, 'dimension')}"),
            ("likelihood p(x|z)", f"{config.likelihood}, {reversed_network}"),
            ("guide q(z|x)", f"{config.guide}, {network}"),
        ]
    else:
        rows.append(("model and guide", f"--pair {config.pair}"))
    clip = "" if config.clip_norm is None else f", gradients clipped to the norm {config.clip_norm:g}"
    warm_up = f", KL weight rising over {_count(config.warm_up, 'epoch')}" if config.warm_up else ""
    beta = "" if config.beta == 1 else f", KL weight {config.beta:g}"
    rows += [
        ("objective", f"{run.objective()}{beta}{warm_up}"),
        ("optimizer", f"Adam, learning rate {config.learning_rate:g}, batches of {config.batch_size}{clip}"),
        ("seed, type", f"{config.seed}, {config.dtype}"),
    ]
    yield html.table(rows)
    yield html.paragraph("To train the same again:")
    yield html.command(train_command(config))
    given = {key: value for key, value in asdict(config).items() if value is not None}
    yield html.details("config.json", html.table(given.items()))


def _data(config: Config) -> str:
    """What the data are."""
    about = [config.dataset]
    if config.contents is None:
        source = SOURCES.get(config.dataset, "")  # type: ignore[call-overload]
        about += [part for part in source.split("; ") if not part.startswith("DIR")]
    else:
        contents = config.contents
        about += [f"{key} {contents[key]}" for key in ("format", "shape", "kind") if contents.get(key)]
        if contents.get("missing"):
            about.append(f"{contents['missing']} missing entries")
        held_out = f"{config.holdout:g} of the rows" if config.holdout else config.validation
        about.append(f"held out: {held_out}")
    if config.binarize != "none":
        about.append(f"binarized: {config.binarize}")
    return "; ".join(filter(None, about))


def _files(run: Path, results: "Mapping[str, Sequence[_Result]]") -> Markup:
    """Links to the files of the run."""
    rows = [
        (html.link(quote(name), name), text)
        for name, text in _FILES.items()
        if is_file(run / name) or is_folder(run / name)
    ]
    listed = [result for kind in RESULT_FOLDERS for result in results[kind]]
    for result in sorted(listed, key=lambda result: (RESULT_FOLDERS.index(result.kind), result.number)):
        links = Markup(", ").join(html.link(_url(file), file.name) for file in result.files)
        if links:
            rows.append((html.link(quote(result.folder.name), result.folder.name), links))
    return html.table(rows)


def _url(file: Path) -> str:
    """The URL of a file in a result folder, relative to the run."""
    return quote(f"{file.parent.name}/{file.name}")


def _picture(file: Path) -> Markup:
    """A picture with its caption. A PDF and a page are links."""
    caption = _CAPTIONS.get(file.stem, file.name)
    if file.suffix in (".png", ".svg"):
        return html.picture(_url(file), file.name, caption)
    return html.paragraph(html.link(_url(file), file.name) + f": {caption}")


class Estimate(NamedTuple):
    """An entry of ``evaluation.json``, see :meth:`pyro_vae.cli.ladder.Rung.row`."""

    name: str
    method: str
    bound: str
    k_share: float | None
    log_evidence: float
    mean_se: float
    noise: float
    ess: float
    num_data: float
    cost: float
    seconds: float

    @property
    def sign(self) -> str:
        """How log p(x) compares with the estimate."""
        return {"lower": "≥", "upper": "≤"}.get(self.bound, "≈")


class _Result(NamedTuple):
    """A result folder of a run, and the regular files in it by name. Symbolic links are ignored.

    data: the selection that the result is on, if known. other: empty if the result is of the parameters of
    the run, else which it is of.
    """

    folder: Path
    kind: str
    files: list[Path]
    data: str | None = None
    other: str = ""

    @property
    def number(self) -> int:
        """The number at the end of the name: 10 for ``plots-10``, 1 for ``plots``."""
        match = re.search(r"-(\d+)$", self.folder.name)
        return int(match[1]) if match else 1

    def of_run(self, weights: str | None) -> "_Result":
        """The result with ``data`` and ``other`` as its JSON file records them, see
        :meth:`~pyro_vae.cli.runs.Run.source`.

        :param weights: the name of the file of the parameters of the run.
        """
        record = self.record(f"{self.kind}.json")
        if self.kind == "evaluation":  # the same in each row
            record = next(iter(record.values()), {})
        record = record if isinstance(record, dict) else {}
        known = isinstance(record.get("weights"), str)
        other = "" if known and record["weights"] == weights else "earlier parameters"
        data = record.get("data")
        return self._replace(
            data=data if isinstance(data, str) else None, other=other if known else "unknown parameters"
        )

    def pictures(self) -> list[Path]:
        return [file for file in self.files if file.suffix in (".png", ".svg", ".pdf")]

    def record(self, name: str) -> dict[str, Any]:
        """A file of JSON, which is empty if it is missing or invalid."""
        try:
            record = parse_json(read_bytes(self.folder / name, max_bytes=2**24))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def estimates(self) -> list[Estimate]:
        """The estimates in ``evaluation.json``; none if it is missing or invalid."""
        try:
            return [_estimate(name, row) for name, row in self.record("evaluation.json").items()]
        except (KeyError, TypeError, AttributeError):
            return []

    def diagnosis(self) -> dict[str, Any]:
        """The numbers in ``diagnosis.json``; empty if it is missing or invalid."""
        record = self.record("diagnosis.json")
        try:
            summary_table(record)
        except (KeyError, TypeError, ValueError):
            return {}
        return record

    def parts(self, without: Sequence[Path] = ()) -> list[Markup]:
        """Tables, texts and pictures, except for the pictures in ``without``."""
        parts, shown = [], None
        if estimates := self.estimates():
            parts, shown = [*_estimates(estimates)], "evaluation.txt"
        elif record := self.diagnosis():
            parts, shown = [summary_table(record)], "diagnosis.txt"
        texts = [file for file in self.files if file.suffix == ".txt" and file.name != shown]
        parts += [html.pre(_read_or_error(file)) for file in texts]
        maps = [file for file in self.files if file.name == "latent_map.html"]
        parts += [
            html.paragraph(
                html.link(_url(file), "Latent map")
                + ": move the pointer, and see the decoded image under it."
            )
            for file in maps
        ]
        pictures = [_picture(file) for file in self.pictures() if file not in without]
        return [*parts, html.pictures(*pictures)] if pictures else parts


def _results(run: Run) -> dict[str, list[_Result]]:
    """The result folders of a run by kind: those of its parameters first, of these those on held-out data
    first, and of these the newest first."""
    weights = run.source()["weights"]

    def results(kind: str) -> list[_Result]:
        entries = (entry for entry in run.path.iterdir() if re.fullmatch(rf"{kind}(-\d+)?", entry.name))
        found = [
            _Result(folder, kind, list(filter(is_shown, sorted(folder.iterdir())))).of_run(weights)
            for folder in filter(is_folder, entries)
        ]
        return sorted(found, key=lambda r: (bool(r.other), (r.data or "").startswith("train"), -r.number))

    return {kind: results(kind) for kind in RESULT_FOLDERS}


def _valid(results: Sequence[_Result]) -> list[_Result]:
    """The results that are of the parameters of the run."""
    return [result for result in results if not result.other]


def missing_verbs(run: Run) -> list[str]:
    """The commands that have no result for the parameters of the run, in the order to run them."""
    results = _results(run)
    kinds = {"evaluate": "evaluation", "diagnose": "diagnosis"}
    if run.config.pair is None:
        kinds |= {"sample": "samples", "reconstruct": "reconstructions"}
    return [verb for verb, kind in kinds.items() if not _valid(results[kind])]


def is_shown(file: Path) -> bool:
    """Whether it is a regular file that is not hidden."""
    return is_file(file) and not file.name.startswith(".")


def estimates_of(run: Run) -> tuple[str | None, list[Estimate]]:
    """The data and the estimates of the newest evaluation of the parameters of a run; no estimates if there
    is none."""
    for result in _valid(_results(run)["evaluation"])[:1]:
        return result.data, result.estimates()
    return None, []


def _estimate(name: str, row: dict[str, Any]) -> Estimate:
    """Convert an entry of ``evaluation.json``. Raises ``KeyError`` or ``TypeError`` if it is invalid."""

    def number(key: str) -> float:
        value = math.nan if row[key] is None else row[key]
        if type(value) not in (int, float):
            raise TypeError(f"{key} is not a number")
        return value

    keys = ("log_evidence", "mean_se", "noise", "ess", "num_data", "cost", "seconds")
    share = None if row["pareto_k_above_0.7"] is None else number("pareto_k_above_0.7")
    return Estimate(name, str(row["method"]), str(row["bound"]), share, *map(number, keys))


def _estimates(estimates: Sequence[Estimate]) -> Iterator[Markup]:
    """A table of estimates of log p(x), and what its columns are."""
    header = ("", "nats per datum", "Monte Carlo error", "ESS", "Pareto k > 0.7", "evaluations", "seconds")
    yield html.table(
        [
            (
                f"log p(x) {e.sign} {e.method}" + (", simulated data" if e.name.startswith("bdmc") else ""),
                html.plus_minus(e.log_evidence, e.mean_se, 3),
                f"{e.noise:.3f}",
                f"{e.ess:.1f}",
                "" if e.k_share is None else f"{e.k_share:.0%}",
                f"{e.cost:,}",
                f"{e.seconds:.1f}",
            )
            for e in estimates
        ],
        header,
        narrow=3,
    )
    yield html.note(
        f"Means over {estimates[0].num_data} data, ± their standard error over data. log p(x) ≥ marks a "
        "lower bound in expectation, ≤ an upper bound. The Monte Carlo error is the spread over seeds on the "
        "same data; ESS is the median effective sample size; evaluations are those of the model per datum."
    )


def _read_or_error(file: Path) -> str:
    """The text of a file, or the error text if it is too large."""
    try:
        return read_bytes(file, max_bytes=2**20).decode("utf-8", "replace").rstrip()
    except ValueError as error:
        return str(error)
