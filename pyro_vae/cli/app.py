"""``pyro-vae train | evaluate | diagnose | sample | reconstruct | plot | compare | data``.

Torch is imported inside the commands, so that ``--help`` answers at once. Progress goes to stderr, results to
stdout.
"""

import contextlib
import inspect
import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer
from typer import Argument, Option

from pyro_vae import __version__
from pyro_vae.cli import options, output
from pyro_vae.cli.defaults import DEFAULTS
from pyro_vae.cli.options import default, one_of
from pyro_vae.files import put, reserved

if TYPE_CHECKING:
    from pyro_vae.cli.build import Pair
    from pyro_vae.cli.runs import Run
    from pyro_vae.vae import VAE

Dataset = Literal["digits", "mnist", "fashion-mnist", "frey-faces", "ring"]
Likelihood = Literal["bernoulli", "continuous-bernoulli", "normal", "laplace", "student-t", "categorical"]
Guide = Literal["normal", "full", "low-rank", "laplace", "student-t", "flow", "spline", "mixture"]
Prior = Literal["standard-normal", "normal", "mixture", "vamp"]
Binarize = Literal["none", "threshold", "stochastic"]

RunFolder = Annotated[Path, Argument(metavar="RUN", help="A folder that `pyro-vae train` made.")]
DataDir = Annotated[
    Path | None, Option(help="Folder of the data sets.  [default: $PYRO_VAE_DATA, or ./data]")
]
OwnPair = Annotated[
    str | None,
    Option(
        "--pair",
        metavar="SOURCE:FACTORY",
        help="The --pair that the run was trained with, if any: its code runs.",
    ),
]
Out = Annotated[Path | None, Option(help="Folder to write.  [default: a new one]")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what pyro-vae wrote to --out.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Seed of every random draw.")]
Threads = Annotated[
    int | None, Option(min=1, help="Threads of torch.  [default: torch's, or OMP_NUM_THREADS]")
]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)


def _version(asked: bool) -> None:
    if asked:
        print(f"pyro-vae {__version__}", file=sys.__stdout__, flush=True)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Auto-Encoding Variational Bayes in Pyro. Numbers are in nats per datum."""


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[Dataset, Argument(**options.argument(Dataset, "What to train on"))] = "digits",
    num_epochs: Annotated[
        int | None,
        Option("-n", "--num-epochs", min=1, help=f"Passes over the data.  {default('num_epochs')}"),
    ] = None,
    batch_size: Annotated[int, Option("-b", "--batch-size", min=1, help="Data in a minibatch.")] = 100,
    learning_rate: Annotated[
        float | None, Option(min=0, help=f"Step size of Adam.  {default('learning_rate')}")
    ] = None,
    latent_dim: Annotated[
        int | None, Option(min=1, help=f"Dimensions of z.  {default('latent_dim')}")
    ] = None,
    hidden: Annotated[
        str | None,
        Option(
            help=f"Hidden widths of the encoder, such as 500,500; the decoder mirrors.  {default('hidden')}"
        ),
    ] = None,
    likelihood: Annotated[
        Likelihood | None, Option(**one_of(Likelihood), help=f"p(x|z).  {default('likelihood')}")
    ] = None,
    guide: Annotated[
        Guide | None, Option(**one_of(Guide), help=f"Family of q(z|x).  {default('guide')}")
    ] = None,
    prior: Annotated[Prior | None, Option(**one_of(Prior), help=f"p(z).  {default('prior')}")] = None,
    pair: Annotated[
        str | None, Option(metavar="SOURCE:FACTORY", help="Train a pair of your own, in place of a VAE.")
    ] = None,
    binarize: Annotated[
        Binarize | None,
        Option(**one_of(Binarize), help="What grey pixels become.  [default: stochastic for bernoulli]"),
    ] = None,
    num_particles: Annotated[int, Option(min=1, help="Draws of z for each datum and step.")] = 1,
    beta: Annotated[
        float, Option(min=0, help="Weight of the KL in what is optimized, never in what is reported.")
    ] = 1.0,
    warm_up: Annotated[
        int | None,
        Option(min=0, help=f"Epochs over which the weight of the KL rises from 0.  {default('warm_up')}"),
    ] = None,
    patience: Annotated[
        int | None, Option(min=1, help="Stop after so many epochs without a better held-out ELBO.")
    ] = None,
    clip_norm: Annotated[
        float | None, Option(min=0, help="The largest norm of the gradient, in nats per datum.")
    ] = None,
    every: Annotated[
        int | None, Option(min=1, help="Steps between checkpoints, besides that at each epoch's end.")
    ] = None,
    resume: Annotated[
        str | None, Option(metavar="last|best|PATH", help="Go on with the run at --out from there.")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[Literal["float32", "float64"], Option(help="Of data and networks.")] = "float32",
    threads: Annotated[
        int | None,
        Option(
            min=1,
            help="Threads of torch.  [default: one where a step is small, else torch's, or OMP_NUM_THREADS]",
        ),
    ] = None,
    data_dir: DataDir = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a VAE, or a pair of your own, by SVI; leave a run folder. An interrupted run goes on by --out RUN
    --resume last, to the same end as if it had not been: all other options are the run's, and with more
    --num-epochs it trains on."""
    import pyro

    from pyro_vae import infer
    from pyro_vae.cli import build, report, runs

    families = {
        "likelihood": likelihood,
        "guide": guide,
        "prior": prior,
        "latent_dim": latent_dim,
        "hidden": options.widths(hidden),
    }
    given = {"num_epochs": num_epochs, "learning_rate": learning_rate, "warm_up": warm_up} | families
    values = DEFAULTS[dataset] | {key: value for key, value in given.items() if value is not None}
    if pair is not None:
        options.check_pair_words(pair, families)
        values |= dict.fromkeys(build.FAMILIES)
    grey_to = "stochastic" if values["likelihood"] == "bernoulli" else "none"
    config = build.Config(
        **values,
        dataset=dataset,
        pair=pair,
        binarize=binarize or grey_to,
        batch_size=batch_size,
        num_particles=num_particles,
        beta=options.finite("--beta", beta),
        patience=patience,
        clip_norm=clip_norm,
        seed=seed,
        dtype=dtype,
    )
    options.finite("--learning-rate", config.learning_rate)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    options.check_device(device)
    first = infer.rank_and_world_size()[0] == 0  # only rank 0 prints
    if resume is not None:
        config = options.to_go_on(context, out, overwrite, config)
    options.check_likelihood(config)
    folder = out or Path("runs") / dataset
    if first:  # it writes for all
        folder = context.with_resource(reserved(folder, numbered=out is None))
        runs.check_parts(folder)
        if resume is None or not runs.is_run(folder):
            runs.check_free(folder, overwrite=overwrite)
    train_data, test = build.build_data(config, data_dir)
    config = replace(config, event_shape=tuple(train_data.x.shape[1:]), num_levels=train_data.num_levels)
    pyro.set_rng_seed(config.seed)
    own = build.build_pair(config, train_data)
    say = output.say if first else lambda _: None
    say(f"{train_data}, {len(test)} held out -> {folder}")
    other = {"--device": device if device != "cpu" else None, "--every": every, "--threads": threads}
    repeated = _own(pair, data_dir) + [
        word for key, value in other.items() if value is not None for word in (key, value)
    ]

    def left() -> str:
        if (step := runs.last_step(folder)) is None:
            return _nothing_left()
        return f"{folder} has a checkpoint after step {step}; go on by\n  {runs.go_on(folder, repeated)}"

    largest = options.largest_product(own, config.batch_size * config.num_particles)
    with options.threads(threads, largest), infer.process_group(device), output.interrupted(left, first):
        run = runs.train(
            folder,
            config,
            own,
            train_data,
            test,
            device=device,
            overwrite=overwrite,
            every=every,
            resume=resume,
            say=say,
        )
    if not first:
        return
    epochs = run.history()
    with run.loaded(test.x[:2]) as trained:
        output.draw(runs.with_room(run.path / "plots"), runs.pictures(run, trained, test))
    written = report.write_page(run)
    seconds = sum(epoch.seconds for epoch in epochs)
    result = {"run": str(run.path), "num_epochs": len(epochs), **run.kept()._asdict(), "seconds": seconds}
    output.show(result, f"{run.path}: {run.summary()}", as_json)
    output.done(written, "evaluate", run.path, *_own(pair, data_dir))


@app.command()
def sample(
    context: typer.Context,
    run: RunFolder,
    n: Annotated[int, Option("-n", "--num-samples", min=1, help="How many.")] = 100,
    seed: Seed = 0,
    pair: OwnPair = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw x from p(z) p(x|z): samples.npy, and a picture of as many E[x|z]. By default to RUN/samples,
    samples-2, …"""
    import torch

    from pyro_vae import plots
    from pyro_vae.cli import report

    opened = _opened(run, pair)
    folder = output.free(context, out, run / "samples", overwrite)
    with opened.loaded() as own:
        vae = _vae(own, "sample")
        torch.manual_seed(seed)
        x = vae.sample(n)
        image = {"samples": lambda: plots.plot_samples(vae, min(n, 400))}
        files = output.leave(folder, {"samples": x}, image if x.dim() > 2 else output.points(samples=x))
    output.show_files(files, as_json)
    output.done(report.write_page(opened, folder), "reconstruct", run, *_own(pair))


@app.command()
def reconstruct(
    context: typer.Context,
    run: RunFolder,
    n: Annotated[int, Option("-n", "--num-data", min=1, help="The first so many held-out data.")] = 100,
    seed: Seed = 0,
    data_dir: DataDir = None,
    pair: OwnPair = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """E[x'|z] at z ~ q(z|x) for held-out x: x.npy, reconstructions.npy, and both in one picture. By default
    to RUN/reconstructions, reconstructions-2, …"""
    import torch

    from pyro_vae import plots
    from pyro_vae.cli import build, report

    opened = _opened(run, pair)
    folder = output.free(context, out, run / "reconstructions", overwrite)
    x = build.build_data(opened.config, data_dir)[1].x[:n]
    with opened.loaded(x) as own:
        vae = _vae(own, "reconstruct")
        torch.manual_seed(seed)
        y = vae.reconstruct(x)
    image = {"reconstructions": lambda: plots.plot_reconstructions(x[:100], y[:100])}
    files = output.leave(
        folder,
        {"x": x, "reconstructions": y},
        image if x.dim() > 2 else output.points(x=x, reconstructions=y),
    )
    output.show_files(files, as_json)
    output.done(report.write_page(opened, folder), "diagnose", run, *_own(pair, data_dir))


@app.command()
def plot(
    context: typer.Context,
    run: RunFolder,
    data_dir: DataDir = None,
    pair: OwnPair = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw a run's pictures again, by default to RUN/plots-2, plots-3, …"""
    from pyro_vae.cli import build, report, runs

    opened = _opened(run, pair)
    folder = output.free(context, out, run / "plots", overwrite)
    _, test = build.build_data(opened.config, data_dir)
    with opened.loaded(test.x[:2]) as own:
        files = output.draw(folder, runs.pictures(opened, own, test))
    output.show_files(files, as_json)
    output.done(report.write_page(opened, folder), "evaluate", run, *_own(pair, data_dir))


@app.command()
def evaluate(
    context: typer.Context,
    run: RunFolder,
    estimator: Annotated[str, Option(help="Of elbo, importance, prior, ais, smc, bdmc.")] = "elbo,importance",
    num_particles: Annotated[int, Option(min=1, help="Draws of z for each datum, at most.")] = 1000,
    num_temperatures: Annotated[int, Option(min=1, help="Temperatures of ais and bdmc, at most.")] = 1000,
    num_chains: Annotated[int, Option(min=1, help="Chains of ais and bdmc for each datum.")] = 16,
    data: Annotated[str, Option(help="Which data, such as test, train, test[:1000].")] = "test",
    seed: Seed = 0,
    threads: Threads = None,
    data_dir: DataDir = None,
    pair: OwnPair = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Bound log p(x) of a run's model, in nats per datum: the ladder of estimators as one table and a
    picture. By default to RUN/evaluation, evaluation-2, … An interrupted call goes on where it was when it is
    given again."""
    from pyro_vae import plots
    from pyro_vae.cli import build, ladder, report, runs

    names = options.some_of("--estimator", estimator, ladder.ESTIMATORS)
    opened = _opened(run, pair)
    folder = output.free(context, out, run / "evaluation", overwrite, apart=".evidence")
    part = build.part_of(data, *build.build_data(opened.config, data_dir))
    kept = opened.part(".evidence") if out is None else out / ".evidence"
    rungs = []

    def left() -> str:
        what = "what was finished is kept" if kept.is_dir() else "nothing was finished"
        return f"{what}; the same command goes on:\n  {output.again()}"

    with opened.loaded(part.x[:2]) as own, options.threads(threads), output.interrupted(left):
        for rung in ladder.climb(
            own,
            part.arguments(slice(None)),
            names,
            num_particles=num_particles,
            num_temperatures=num_temperatures,
            num_chains=num_chains,
            seed=seed,
            kept=kept,
        ):
            rungs.append(rung)
            output.say(f"{rung.found.method}: {rung.found.mean:.3f}, {rung.seconds:.1f} s")
    by_name = {
        name: [r.found for r in rungs if r.estimator == name]
        for name in dict.fromkeys(r.estimator for r in rungs)
    }
    text, rows = ladder.table(rungs), {rung.name: rung.row() for rung in rungs}
    output.draw(folder, {"ladder": lambda: plots.figure_of(plots.plot_ladder(by_name))})
    put(folder / "evaluation.txt", f"{text}\n".encode())
    put(folder / "evaluation.json", (json.dumps(runs.as_json(rows), indent=2) + "\n").encode())
    written = report.write_page(opened, folder)
    output.show(rows, f"{text}\n{folder}", as_json)
    output.done(written, "diagnose", run, *_own(pair, data_dir))


@app.command()
def diagnose(
    context: typer.Context,
    run: RunFolder,
    num_particles: Annotated[int, Option(min=1, help="Draws of z for each datum.")] = 1000,
    num_simulations: Annotated[
        int, Option(min=0, help="Data to simulate for the calibration, 100 or more; 0 leaves it out.")
    ] = 1000,
    data: Annotated[str, Option(help="Which data, such as test, train, test[:1000].")] = "test[:1000]",
    seed: Seed = 0,
    threads: Threads = None,
    data_dir: DataDir = None,
    pair: OwnPair = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Ask whether a run's guide is good: one page, and pictures of Pareto k, the worst data and the
    calibration. By default to RUN/diagnosis, diagnosis-2, …"""
    from pyro_vae import diagnostics, plots
    from pyro_vae.cli import build, report

    if 0 < num_simulations < 100:
        raise typer.BadParameter(
            f"--num-simulations: expected 100 or more, or 0 for no calibration, but got {num_simulations}"
        )
    opened = _opened(run, pair)
    folder = output.free(context, out, run / "diagnosis", overwrite)
    part = build.part_of(data, *build.build_data(opened.config, data_dir))
    with opened.loaded(part.x[:2]) as own, options.threads(threads), output.interrupted(_nothing_left):
        found = diagnostics.diagnose(
            own.model,
            own.guide,
            part,
            num_particles=num_particles,
            num_simulations=num_simulations,
            seed=seed,
        )
    output.draw(folder, plots.plot_diagnosis(found, part.x))
    put(folder / "diagnosis.txt", f"{found}\n".encode())
    written = report.write_page(opened, folder)
    output.show(
        {"pareto_k": found.pareto_k.tolist(), "worst": found.worst().tolist()}, f"{found}\n{folder}", as_json
    )
    output.done(written, "reconstruct" if opened.config.pair is None else "plot", run, *_own(pair, data_dir))


@app.command()
def compare(
    context: typer.Context,
    model: Annotated[str | None, Argument(help="One of --list.")] = None,
    guide: Annotated[str, Option(help="Families of q(z|x), such as normal,full,flow.")] = "normal,full,flow",
    num_epochs: Annotated[
        int, Option("-n", "--num-epochs", min=1, help="Passes over 2000 draws of the model.")
    ] = 100,
    num_data: Annotated[int, Option(min=2, help="Draws of the model to compare on.")] = 50,
    list_models: Annotated[bool, Option("--list", help="List the models.")] = False,
    seed: Seed = 0,
    threads: Annotated[
        int | None, Option(min=1, help="Threads of torch.  [default: 1, or OMP_NUM_THREADS]")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train guides on a model that knows its posterior; leave a table and a figure of how far they are from
    it."""
    from pyro_vae.cli import exact_models, runs

    if list_models or model is None:
        about = {name: text for name, (_, text) in exact_models.MODELS.items()}
        output.show(about, "\n".join(f"{name:16} {text}" for name, text in about.items()), as_json)
        return output.done(None, "compare", next(iter(about)))
    if model not in exact_models.MODELS:
        near = options.nearest(model, exact_models.MODELS)
        raise typer.BadParameter(
            f"MODEL: expected one of {', '.join(exact_models.MODELS)}, but got {model!r}{near}"
        )
    families = options.some_of("--guide", guide, get_args(Guide))
    folder = output.free(context, out, Path("runs") / f"compare-{model}", overwrite)
    with options.threads(threads, exact_models.LARGEST_PRODUCT), output.interrupted(_nothing_left):
        found = exact_models.train_guides(
            exact_models.MODELS[model][0](), families, num_epochs=num_epochs, num_data=num_data, seed=seed
        )
    output.draw(folder, {"guides": found.plot})
    put(folder / "comparison.txt", f"{found}\n".encode())
    result = {name: dict(one.rows()) for name, one in found.comparisons.items()}
    put(folder / "comparison.json", (json.dumps(runs.as_json(result), indent=2) + "\n").encode())
    output.show(result, f"{found}\n{folder}", as_json)
    return output.done(None, "compare", "--list")


@app.command()
def data(
    dataset: Annotated[
        Dataset | None, Argument(**options.argument(Dataset, "Read it, check its contents, tell its shapes"))
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the data sets and where they are read from."""
    from pyro_vae.data.datasets import SOURCES, is_here, load

    if dataset is None:
        rows = {name: {"here": is_here(name, data_dir), "source": source} for name, source in SOURCES.items()}
        text = "\n".join(
            f"{name:14} {'here' if row['here'] else 'not here':9} {row['source']}"
            for name, row in rows.items()
        )
        output.show(rows, text, as_json)
        return output.done(None, "train", "digits")
    train_data, test = load(dataset, data_dir=data_dir)
    low, high = (float(end) for end in train_data.x.aminmax())
    result = {
        "train": len(train_data),
        "test": len(test),
        "shape": list(train_data.x.shape[1:]),
        "range": [low, high],
    }
    shape = tuple(train_data.x.shape[1:])
    text = f"{dataset}: {len(train_data)} + {len(test)} held out, each {shape} in [{low:g}, {high:g}]"
    output.show(result, text, as_json)
    return output.done(None, "train", dataset, *_own(None, data_dir))


def _opened(run: Path, pair: str | None) -> "Run":
    from pyro_vae.cli import runs

    opened = runs.open_run(run, pair)
    if unfinished := opened.unfinished():
        output.say(f"warning: {unfinished}; go on by\n  {runs.go_on(run, _own(pair))}")
    return opened


def _own(pair: str | None, data_dir: Path | None = None) -> list[object]:
    """The options that every command on a run needs again."""
    return [
        word
        for key, value in (("--pair", pair), ("--data-dir", data_dir))
        if value is not None
        for word in (key, value)
    ]


def _nothing_left() -> str:
    return f"nothing was kept; begin again by\n  {output.again()}"


def _vae(pair: "Pair", verb: str) -> "VAE":
    if pair.vae is None:
        raise ValueError(
            f"{verb}: the run's pair is two programs of your own; expected a factory that returns a "
            "pyro_vae.VAE"
        )
    return pair.vae


def _arguments() -> set[str]:
    """The commands' arguments that are options."""
    commands: list[Any] = [command.callback for command in app.registered_commands]
    names = {name for command in commands for name in inspect.signature(command).parameters if len(name) > 1}
    return names - {"context", "run", "dataset", "model", "as_json", "list_models"}


def _fail(code: int, error: Exception) -> NoReturn:
    output.fail(code, options.as_options(str(error), _arguments()))


def main() -> NoReturn:
    """Run the command line. Exit codes: 0; 2 usage; 65 bad data; 66 missing input; 70 numerical failure or
    memory; 74 I/O; 78 a run of another version; 130 and 143 interrupted; 1 a bug."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    for stream in (sys.__stdout__, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a locale without ≥ and ±, other signs stand for them
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # stdout is for results; what a user's own code prints is progress
        given = sys.argv[1:]
        asks = not given or "--help" in given
        with contextlib.nullcontext() if asks else contextlib.redirect_stdout(sys.stderr), output.shown():
            app()
    except FileExistsError as error:
        _fail(2, error)
    except OSError as error:
        missing = (
            isinstance(error, FileNotFoundError) and error.errno is None
        )  # ours, with a cause and a remedy
        _fail(66 if missing else 74, error)
    except (FloatingPointError, MemoryError) as error:
        _fail(70, error)
    except ValueError as error:
        from pyro_vae.checkpoint import MismatchError

        _fail(78 if isinstance(error, MismatchError) else 65, error)
    sys.exit(0)
