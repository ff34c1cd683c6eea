"""``pyro-vae train | evaluate | diagnose | sample | reconstruct | plot | compare | data``.

Each command imports torch when it runs, so that ``--help`` is fast. Progress goes to stderr, results go to
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
from pyro_vae.cli import defaults, options, output
from pyro_vae.cli.defaults import ALPHA, DEFAULTS, LINEAR_OBJECTIVES, OBJECTIVES
from pyro_vae.cli.options import default_text, one_of
from pyro_vae.files import put, reserved

if TYPE_CHECKING:
    from pyro_vae.cli.build import Pair
    from pyro_vae.cli.runs import Run
    from pyro_vae.evidence import Evidence
    from pyro_vae.vae import VAE

Dataset = Literal["digits", "mnist", "fashion-mnist", "frey-faces", "ring"]
Likelihood = Literal[
    "bernoulli",
    "continuous-bernoulli",
    "normal",
    "laplace",
    "student-t",
    "categorical",
    "poisson",
    "negative-binomial",
]
Guide = Literal["normal", "full", "low-rank", "laplace", "student-t", "flow", "spline", "mixture"]
Prior = Literal["standard-normal", "normal", "mixture", "vamp"]
Objective = Literal["elbo", "stl", "iwae", "dreg", "renyi", "vimco", "wake-sleep", "rws"]
Binarize = Literal["none", "threshold", "stochastic"]

RunFolder = Annotated[Path, Argument(metavar="RUN", help="A folder that `pyro-vae train` wrote.")]
DataDir = Annotated[
    Path | None, Option(help="Folder with the data sets.  [default: $PYRO_VAE_DATA, or ./data]")
]
RunPair = Annotated[
    str | None,
    Option(
        "--pair",
        metavar="SOURCE:FACTORY",
        help="The --pair that the run was trained with, if any. Its code is executed.",
    ),
]
Label = Annotated[
    str | None, Option(metavar="COLUMN", help="Column or array of a file with labels, for the plots.")
]
Condition = Annotated[
    str | None,
    Option(metavar="COLUMN", help="Column or array of a file with the condition c of p(x|z, c), q(z|x, c)."),
]
Key = Annotated[
    str | None, Option(metavar="NAME", help="Array of a .npz or .safetensors file, or layer of a .h5ad file.")
]
ImageSize = Annotated[
    int | None, Option(min=1, help="Scale and crop the images of a folder to squares of this size.")
]
Out = Annotated[Path | None, Option(help="Output folder.  [default: a new one]")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the files that pyro-vae wrote to --out.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Format = Annotated[
    output.PictureFormat,
    Option("--format", **one_of(output.PictureFormat), help="File format of the pictures."),
]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Random seed.")]
Threads = Annotated[
    int | None,
    Option(min=1, help="Number of threads of torch.  [default: OMP_NUM_THREADS, or torch's default]"),
]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"pyro-vae {__version__}", file=sys.__stdout__, flush=True)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Auto-Encoding Variational Bayes in Pyro. All log-densities and bounds are in nats per datum."""


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[str, Argument(**options.data_source(Dataset, "Data set"))] = "digits",
    label: Label = None,
    condition: Condition = None,
    key: Key = None,
    image_size: ImageSize = None,
    holdout: Annotated[
        float | None,
        Option(help="Fraction of a file's rows that are held out, drawn by --seed.  [default: 0.1]"),
    ] = None,
    validation: Annotated[
        str | None, Option(metavar="PATH", help="File with the held-out rows, in place of --holdout.")
    ] = None,
    num_epochs: Annotated[
        int | None,
        Option("-n", "--num-epochs", min=1, help=f"Passes over the data.  {default_text('num_epochs')}"),
    ] = None,
    batch_size: Annotated[int, Option("-b", "--batch-size", min=1, help="Size of a minibatch.")] = 100,
    learning_rate: Annotated[
        float | None, Option(min=0, help=f"Learning rate of Adam.  {default_text('learning_rate')}")
    ] = None,
    latent_dim: Annotated[
        int | None, Option(min=1, help=f"Dimension of z.  {default_text('latent_dim')}")
    ] = None,
    hidden: Annotated[
        str | None,
        Option(
            help="Widths of the hidden layers of the encoder, such as 500,500; those of the decoder are in "
            "reverse order.  " + default_text("hidden")
        ),
    ] = None,
    likelihood: Annotated[
        Likelihood | None,
        Option(**one_of(Likelihood), help=f"Likelihood p(x|z).  {default_text('likelihood')}"),
    ] = None,
    guide: Annotated[
        Guide | None, Option(**one_of(Guide), help=f"Family of q(z|x).  {default_text('guide')}")
    ] = None,
    prior: Annotated[
        Prior | None, Option(**one_of(Prior), help=f"Prior p(z).  {default_text('prior')}")
    ] = None,
    pair: Annotated[
        str | None, Option(metavar="SOURCE:FACTORY", help="Train your own model and guide instead of a VAE.")
    ] = None,
    binarize: Annotated[
        Binarize | None,
        Option(
            **one_of(Binarize),
            help="Binarization of grey values.  [default: stochastic for bernoulli, else none]",
        ),
    ] = None,
    objective: Annotated[
        Objective, Option(**one_of(Objective), show_default=False, help=options.objective_help())
    ] = "elbo",
    num_particles: Annotated[
        int | None,
        Option(min=1, help=f"K, draws of z per datum and step.  {options.num_particles_text()}"),
    ] = None,
    alpha: Annotated[float | None, Option(help=f"Order of --objective renyi.  [default: {ALPHA}]")] = None,
    beta: Annotated[
        float,
        Option(
            min=0,
            help=f"Weight of the KL in the loss, for --objective {' and '.join(LINEAR_OBJECTIVES)}. The "
            "reported ELBOs use weight 1.",
        ),
    ] = 1.0,
    warm_up: Annotated[
        int | None,
        Option(
            min=0,
            help=f"Epochs over which the KL weight rises from 0.  {default_text('warm_up')}; 0 where --beta "
            "does not apply",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        Option(min=1, help="Stop early, after this many epochs without a higher held-out objective."),
    ] = None,
    clip_norm: Annotated[
        float | None, Option(min=0, help="Clip the gradient to this norm, in nats per datum.")
    ] = None,
    every: Annotated[
        int | None, Option(min=1, help="Steps between checkpoints, in addition to the end of each epoch.")
    ] = None,
    resume: Annotated[
        str | None,
        Option(
            metavar="last|best|PATH",
            help="Resume the run at --out from its last or best checkpoint, or from the one at PATH.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, Option(help="Device: cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float64"], Option(help="Type of the data and the networks.")
    ] = "float32",
    threads: Annotated[
        int | None,
        Option(
            min=1,
            help="Number of threads of torch.  [default: OMP_NUM_THREADS; else 1 if a step is small; else "
            "torch's default]",
        ),
    ] = None,
    data_dir: DataDir = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a VAE, or your own model and guide, by SVI, and write a run folder. With --out RUN --resume last,
    an interrupted run resumes with its recorded options; the result is the same as without the interruption.
    With a larger --num-epochs in addition, a finished run trains for more epochs."""
    import pyro

    from pyro_vae import infer
    from pyro_vae.cli import build, report, runs

    families = {
        "likelihood": likelihood,
        "guide": guide,
        "prior": prior,
        "latent_dim": latent_dim,
        "hidden": options.parse_widths(hidden),
    }
    of_file: dict[str, Any] = {
        "label": label,
        "condition": condition,
        "key": key,
        "image_size": image_size,
        "holdout": holdout,
        "validation": validation,
    }
    options.check_file_options(dataset, of_file, prior)
    given = {"num_epochs": num_epochs, "learning_rate": learning_rate, "warm_up": warm_up} | families
    tables, values = None, DEFAULTS.get(dataset, DEFAULTS["digits"])
    if dataset not in DEFAULTS and not (resume and out and runs.is_run(out)):  # a run has its own values
        tables = build.read_tables(dataset, of_file, data_dir)
        values = defaults.of_file(tables.kind, len(tables.train), tables.train.x[0].numel())
    values = values | {key: value for key, value in given.items() if value is not None}
    if warm_up is None and objective not in LINEAR_OBJECTIVES:
        values["warm_up"] = 0
    if pair is not None:
        options.check_pair_option(pair, families)
        values |= dict.fromkeys(build.VAE_FIELDS)
    contents = None if tables is None else tables.record()
    kind = contents["kind"] if contents else "real" if dataset == "ring" else "grey"
    default_binarize = "stochastic" if values["likelihood"] == "bernoulli" and kind == "grey" else "none"
    config = build.Config(
        **values,
        **of_file,
        contents=contents,
        dataset=dataset,
        pair=pair,
        binarize=binarize or default_binarize,
        batch_size=batch_size,
        num_particles=num_particles or OBJECTIVES[objective][1],
        objective=objective,
        alpha=ALPHA if alpha is None and objective == "renyi" else alpha,
        beta=options.check_finite("--beta", beta),
        patience=patience,
        clip_norm=clip_norm,
        seed=seed,
        dtype=dtype,
    )
    options.check_finite("--learning-rate", config.learning_rate)
    options.check_finite("--alpha", config.alpha or 0.0)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    options.check_device(device)
    is_first = infer.rank_and_world_size()[0] == 0
    if resume is not None:
        config = options.resumed_config(context, out, overwrite, config)
    options.check_objective(config)
    if tables is not None:
        config = replace(
            config,
            num_levels=tables.train.num_levels,
            holdout=0.1 if holdout is None and validation is None else holdout,
            sha256=tables.train.sha256,
            validation_sha256=None if tables.validation is None else tables.validation.sha256,
        )
        if is_first:
            for table in filter(None, tables):
                output.print_progress(table.summary())
            if pair is None:
                output.print_progress(options.likelihood_text(config, chosen=likelihood is None))
    options.check_likelihood(config)
    folder = out or Path("runs") / Path(dataset).stem
    if is_first:  # only rank 0 writes and prints
        folder = context.with_resource(reserved(folder, numbered=out is None))
        runs.check_no_links(folder)
        if resume is None or not runs.is_run(folder):
            runs.check_free(folder, overwrite=overwrite)
    train_data, test = build.build_data(config, data_dir, tables)
    config = replace(
        config,
        event_shape=tuple(train_data.x.shape[1:]),
        num_levels=train_data.num_levels,
        condition_size=None if train_data.condition is None else train_data.condition.shape[1],
    )
    pyro.set_rng_seed(config.seed)
    built = build.build_pair(config, train_data)
    print_progress = output.print_progress if is_first else lambda _: None
    print_progress(f"{train_data}, {len(test)} held out -> {folder}")
    unrecorded = {"--device": device if device != "cpu" else None, "--every": every, "--threads": threads}
    repeated = _repeated_options(pair, data_dir) + [
        word for key, value in unrecorded.items() if value is not None for word in (key, value)
    ]

    def describe_saved() -> str:
        if (step := runs.last_step(folder)) is None:
            return _nothing_saved()
        command = runs.resume_command(folder, repeated)
        return f"{folder} has a checkpoint after step {step}; resume with\n  {command}"

    largest = options.largest_product(built, config.batch_size * config.num_particles)
    with (
        options.threads(threads, largest),
        infer.process_group(device),
        output.report_interruption(describe_saved, is_first),
    ):
        run = runs.train(
            folder,
            config,
            built,
            train_data,
            test,
            device=device,
            overwrite=overwrite,
            every=every,
            resume=resume,
            print_progress=print_progress,
        )
    if not is_first:
        return
    epochs = run.history()
    with run.loaded(runs.first_rows(test)) as trained:
        pictures = runs.pictures(run, trained, test)
        folder = runs.replaceable_or_new(run.path / "plots")
        output.write_pictures(folder, pictures, format)
        _put_record(folder / "plots.json", run.source())
    epoch, seconds = run.saved_epoch(), sum(epoch.seconds for epoch in epochs)
    result = {
        "run": str(run.path),
        "objective": config.objective,
        "num_epochs": len(epochs),
        **epoch._asdict(),
        "seconds": seconds,
    }
    page = report.write_report(run)
    output.print_result(result, f"{run.path}: {run.summary()}", as_json)
    _print_next("train", run, page, data_dir)


@app.command()
def sample(
    context: typer.Context,
    run: RunFolder,
    n: Annotated[int, Option("-n", "--num-samples", min=1, help="Number of samples.")] = 100,
    seed: Seed = 0,
    data_dir: DataDir = None,
    pair: RunPair = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw x from p(z) p(x|z), with --condition at conditions drawn from the held-out data. Writes
    samples.npy, and a picture of up to 400 means E[x|z]. The default output folder is the first unused one of
    RUN/samples, RUN/samples-2, …"""
    import torch

    from pyro_vae import plots
    from pyro_vae.cli import build, report, runs

    opened = _open_run(run, pair)
    folder = output.reserve_folder(context, out, run / "samples", overwrite)
    test = None if opened.config.condition is None else build.build_data(opened.config, data_dir)[1]
    with opened.loaded() as trained:
        vae = _vae(trained, "sample")
        torch.manual_seed(seed)
        given = () if test is None else runs.draw_conditions(test, n)
        x = vae.sample(n, *given)
        first = tuple(c[:400] for c in given)
        image = {"samples": lambda: plots.plot_samples(vae, min(n, 400), given=first)}
        pictures = image if x.dim() > 2 else output.points(samples=x)
        files = output.write_results(folder, {"samples": x}, pictures, format)
    output.print_files(files, as_json)
    _put_record(folder / "samples.json", opened.source())
    page = report.write_report(opened, folder)
    _print_next("sample", opened, page, data_dir)


@app.command()
def reconstruct(
    context: typer.Context,
    run: RunFolder,
    n: Annotated[
        int, Option("-n", "--num-data", min=1, help="Number of held-out data, starting at the first.")
    ] = 100,
    seed: Seed = 0,
    data_dir: DataDir = None,
    pair: RunPair = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Reconstruct held-out x as E[x'|z] at z ~ q(z|x). A --pair must return a pyro_vae.VAE. Writes x.npy,
    reconstructions.npy and a picture.
    The default output folder is the first unused one of RUN/reconstructions, RUN/reconstructions-2, …"""
    import torch

    from pyro_vae import plots
    from pyro_vae.cli import build, report, runs

    opened = _open_run(run, pair)
    folder = output.reserve_folder(context, out, run / "reconstructions", overwrite)
    test = build.build_data(opened.config, data_dir)[1].head(n)
    x, *given = test.arguments(slice(None))
    with opened.loaded(runs.first_rows(test)) as trained:
        vae = _vae(trained, "reconstruct")
        torch.manual_seed(seed)
        y = vae.reconstruct(x, *given, mask=test.mask)
    image = {"reconstructions": lambda: plots.plot_reconstructions(x[:100], y[:100])}
    pictures = image if x.dim() > 2 else output.points(x=x, reconstructions=y)
    files = output.write_results(folder, {"x": x, "reconstructions": y}, pictures, format)
    output.print_files(files, as_json)
    _put_record(folder / "reconstructions.json", opened.source(f"test[:{n}]"))
    page = report.write_report(opened, folder)
    _print_next("reconstruct", opened, page, data_dir)


@app.command()
def plot(
    context: typer.Context,
    run: RunFolder,
    dims: Annotated[
        str | None,
        Option(
            metavar="I,J",
            help="Dimensions of z to draw, counted from 0.  [default: the two that vary most]",
        ),
    ] = None,
    data_dir: DataDir = None,
    pair: RunPair = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a run again, and for images a map of the latent plane: a page that shows the
    decoded image under the pointer. The default output folder is the first unused one of RUN/plots,
    RUN/plots-2, …"""
    from pyro_vae.cli import build, report, runs

    chosen = options.parse_dims(dims)
    opened = _open_run(run, pair)
    folder = output.reserve_folder(context, out, run / "plots", overwrite)
    _, test = build.build_data(opened.config, data_dir)
    with opened.loaded(runs.first_rows(test)) as trained:
        if chosen is not None:
            options.check_dims(chosen, _vae(trained, "plot --dims").model.prior.event_shape)
        files = output.write_pictures(folder, runs.pictures(opened, trained, test, chosen), format)
    output.print_files(files, as_json)
    _put_record(folder / "plots.json", opened.source())
    page = report.write_report(opened, folder)
    _print_next("plot", opened, page, data_dir)


@app.command()
def evaluate(
    context: typer.Context,
    run: RunFolder,
    estimator: Annotated[str, Option(help="Some of elbo,importance,prior,ais,smc,bdmc.")] = "elbo,importance",
    num_particles: Annotated[int, Option(min=1, help="Maximal number of draws of z per datum.")] = 1000,
    num_temperatures: Annotated[int, Option(min=1, help="Maximal number of annealing temperatures.")] = 1000,
    num_chains: Annotated[int, Option(min=1, help="Chains of ais and bdmc per datum.")] = 16,
    data: Annotated[str, Option(help="Data to use: test, train, or rows such as test[:1000].")] = "test",
    seed: Seed = 0,
    threads: Threads = None,
    data_dir: DataDir = None,
    pair: RunPair = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Estimate and bound log p(x) under the model of a run, in nats per datum. Writes a table and a picture
    of the estimators at increasing cost. The estimator elbo includes the bound that the run maximized, if it
    is another. The default output folder is the first unused one of RUN/evaluation, RUN/evaluation-2, … To
    resume after an interruption, repeat the command. Processes started by torchrun divide the data."""
    from pyro_vae import infer, plots
    from pyro_vae.cli import build, ladder, report, runs

    names = options.comma_separated("--estimator", estimator, ladder.ESTIMATORS)
    opened = _open_run(run, pair)
    is_first = infer.rank_and_world_size()[0] == 0  # only rank 0 writes and prints
    if is_first:
        folder = output.reserve_folder(context, out, run / "evaluation", overwrite, ignore=".evidence")
    selected, first_row = build.select_rows(data, *build.build_data(opened.config, data_dir))
    source = opened.source(data)
    resume_folder = opened.subpath(".evidence") if out is None else out / ".evidence"
    rungs = []

    def describe_saved() -> str:
        saved = "finished chunks are saved" if resume_folder.is_dir() else "nothing was saved"
        return f"{saved}; resume with the same command\n  {output.current_command()}"

    with (
        build.rows_numbered_from(first_row),
        opened.loaded(runs.first_rows(selected)) as trained,
        options.threads(threads),
        infer.process_group("cpu"),
        infer.across_processes(),
        output.report_interruption(describe_saved, is_first),
    ):
        for rung in ladder.compute(
            trained,
            opened.config,
            selected,
            names,
            num_particles=num_particles,
            num_temperatures=num_temperatures,
            num_chains=num_chains,
            seed=seed,
            resume_folder=resume_folder,
        ):
            rungs.append(rung)
            if is_first:
                output.print_progress(
                    f"{rung.estimate.method}: {rung.estimate.mean:.3f}, {rung.seconds:.1f} s"
                )
    if not is_first:
        return
    by_estimator: dict[str, list[Evidence]] = {}
    for rung in rungs:
        by_estimator.setdefault(rung.estimator, []).append(rung.estimate)
    text, rows = ladder.table(rungs, data), {rung.name: rung.row() | source for rung in rungs}
    output.write_pictures(folder, {"ladder": lambda: plots.plot_ladder(by_estimator)}, format)
    put(folder / "evaluation.txt", f"{text}\n".encode())
    _put_record(folder / "evaluation.json", rows)
    page = report.write_report(opened, folder)
    output.print_result(rows, f"{text}\n{folder}", as_json)
    _print_next("evaluate", opened, page, data_dir)


@app.command()
def diagnose(
    context: typer.Context,
    run: RunFolder,
    num_particles: Annotated[int, Option(min=1, help="Draws of z per datum.")] = 1000,
    num_simulations: Annotated[
        int, Option(min=0, help="Simulated data for the calibration: 100 or more, or 0 for no calibration.")
    ] = 1000,
    data: Annotated[
        str, Option(help="Data to use: test, train, or rows such as test[:1000].")
    ] = "test[:1000]",
    seed: Seed = 0,
    threads: Threads = None,
    data_dir: DataDir = None,
    pair: RunPair = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Diagnose the guide of a run. Writes a text, and pictures of Pareto k, of the data with the worst fit
    and of the calibration. The default output folder is the first unused one of RUN/diagnosis,
    RUN/diagnosis-2, … Processes started by torchrun divide the data."""
    from pyro_vae import diagnostics, infer, plots
    from pyro_vae.cli import build, report, runs

    if 0 < num_simulations < 100:
        raise typer.BadParameter(
            f"--num-simulations: expected 100 or more, or 0 for no calibration, but got {num_simulations}"
        )
    opened = _open_run(run, pair)
    is_first = infer.rank_and_world_size()[0] == 0  # only rank 0 writes and prints
    if is_first:
        folder = output.reserve_folder(context, out, run / "diagnosis", overwrite)
    selected, first_row = build.select_rows(data, *build.build_data(opened.config, data_dir))
    source = opened.source(data)
    with (
        build.rows_numbered_from(first_row),
        opened.loaded(runs.first_rows(selected)) as trained,
        options.threads(threads),
        infer.process_group("cpu"),
        infer.across_processes(),
        output.report_interruption(_nothing_saved, is_first),
    ):
        diagnosis = diagnostics.diagnose(
            trained.model,
            trained.guide,
            selected,
            num_particles=num_particles,
            num_simulations=num_simulations,
            seed=seed,
        )
    if not is_first:
        return
    output.write_pictures(folder, plots.plot_diagnosis(diagnosis, selected.x), format)
    diagnosis = replace(diagnosis, first_row=first_row)
    text = f"DATA\n{data}\n{diagnosis}"
    put(folder / "diagnosis.txt", f"{text}\n".encode())
    _put_record(folder / "diagnosis.json", diagnosis.to_dict() | source)
    page = report.write_report(opened, folder)
    worst = (diagnosis.worst() + first_row).tolist()
    result = {"data": data, "pareto_k": diagnosis.pareto_k.tolist(), "worst": worst}
    output.print_result(result, f"{text}\n{folder}", as_json)
    _print_next("diagnose", opened, page, data_dir)


@app.command()
def compare(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        Argument(metavar="MODEL|RUN…", help="Name of a model, see --list; or two or more run folders."),
    ] = None,
    guide: Annotated[str, Option(help="Families of q(z|x), such as normal,full,flow.")] = "normal,full,flow",
    num_epochs: Annotated[
        int,
        Option("-n", "--num-epochs", min=1, help="Passes over the training data, 2000 draws from the model."),
    ] = 100,
    num_data: Annotated[int, Option(min=2, help="Number of new draws from the model to compare on.")] = 50,
    list_models: Annotated[bool, Option("--list", help="List the models.")] = False,
    seed: Seed = 0,
    threads: Annotated[
        int | None, Option(min=1, help="Number of threads of torch.  [default: OMP_NUM_THREADS, or 1]")
    ] = None,
    format: Format = "png",
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """With a MODEL, whose posterior is known: train guides on it, and write a table and a figure of their
    gaps, log p(x) − ELBO. With RUN folders: write a table and a page of the settings that differ, the curves
    and the bounds."""
    from pyro_vae.cli import comparison, exact_models, report, runs

    if list_models or not names:
        descriptions = {name: text for name, (_, text) in exact_models.MODELS.items()}
        listing = "\n".join(f"{name:16} {text}" for name, text in descriptions.items())
        output.print_result(descriptions, listing, as_json)
        return output.print_next(None, "compare", next(iter(descriptions)))
    if names[0] not in exact_models.MODELS or len(names) > 1:
        options.check_runs(context, names, exact_models.MODELS, options.OF_MODELS)
        folder = output.reserve_folder(context, out, Path("runs") / "comparison", overwrite)
        compared = comparison.compare(map(Path, names))
        files = output.write_pictures(folder, {"curves": compared.plot}, format)
        put(folder / "comparison.txt", f"{compared}\n".encode())
        _put_record(folder / "comparison.json", compared.to_dict())
        put(folder / "comparison.html", compared.page(folder, [file.name for file in files]).encode())
        output.print_result(compared.to_dict(), f"{compared}\n{folder}", as_json)
        opened = map(runs.read_run, map(Path, names))
        lacking = next((run for run in opened if "evaluate" in report.missing_verbs(run)), None)
        following = lacking and ("evaluate", lacking.path, *_repeated_options(lacking.config.pair))
        return output.print_next(folder / "comparison.html", *following or ())
    (model,) = names
    families = options.comma_separated("--guide", guide, get_args(Guide))
    folder = output.reserve_folder(context, out, Path("runs") / f"compare-{model}", overwrite)
    with options.threads(threads, exact_models.LARGEST_PRODUCT), output.report_interruption(_nothing_saved):
        ranking = exact_models.train_guides(
            exact_models.MODELS[model][0](), families, num_epochs=num_epochs, num_data=num_data, seed=seed
        )
    output.write_pictures(folder, {"guides": ranking.plot}, format)
    put(folder / "comparison.txt", f"{ranking}\n".encode())
    result = {name: dict(guide.rows()) for name, guide in ranking.comparisons.items()}
    _put_record(folder / "comparison.json", result)
    output.print_result(result, f"{ranking}\n{folder}", as_json)
    return output.print_next(None, "compare", "--list")


@app.command()
def data(
    dataset: Annotated[
        str | None, Argument(**options.data_source(Dataset, "Data set to load and validate"))
    ] = None,
    label: Label = None,
    condition: Condition = None,
    key: Key = None,
    image_size: ImageSize = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the data sets and their sources, or read a data set or a file and print its shape and range."""
    from pyro_vae.data.datasets import SOURCES, is_here, load, locate
    from pyro_vae.data.readers import read

    if dataset is None:
        rows = {name: {"here": is_here(name, data_dir), "source": source} for name, source in SOURCES.items()}
        text = "\n".join(
            f"{name:14} {'here' if row['here'] else 'not here':9} {row['source']}"
            for name, row in rows.items()
        )
        output.print_result(rows, text, as_json)
        return output.print_next(None, "train", "digits")
    given: dict[str, Any] = {"label": label, "condition": condition, "key": key, "image_size": image_size}
    options.check_file_options(dataset, given)
    if dataset not in DEFAULTS:
        table = read(locate(dataset, data_dir), **given)
        output.print_result(table.record(), table.summary(), as_json)
        return output.print_next(None, "train", dataset, *_repeated_options(None, data_dir, **given))
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
    output.print_result(result, text, as_json)
    return output.print_next(None, "train", dataset, *_repeated_options(None, data_dir))


def _open_run(run: Path, pair: str | None) -> "Run":
    """Open a run folder. Prints a warning if the training is not finished."""
    from pyro_vae.cli import runs

    opened = runs.open_run(run, pair)
    if unfinished := opened.unfinished():
        command = runs.resume_command(run, _repeated_options(pair))
        output.print_progress(f"warning: {unfinished}; resume with\n  {command}")
    return opened


def _print_next(verb: str, run: "Run", page: Path | None, data_dir: Path | None) -> None:
    """Print the last lines of ``verb``: the path of the report, and a command whose result the run lacks, if
    there is one."""
    from pyro_vae.cli import report

    following = [other for other in report.missing_verbs(run) if other != verb][:1]
    options_ = _repeated_options(run.config.pair, data_dir)
    output.print_next(page, *(word for other in following for word in (other, run.path, *options_)))


def _put_record(file: Path, record: Any) -> None:
    """Write a result as a JSON file."""
    from pyro_vae.cli.runs import to_json

    put(file, (json.dumps(to_json(record), indent=2) + "\n").encode())


def _repeated_options(pair: str | None, data_dir: Path | None = None, **others: object) -> list[object]:
    """The options of this command that the next command on the same run must repeat."""
    return [
        word
        for key, value in {"pair": pair, "data_dir": data_dir, **others}.items()
        if value is not None
        for word in (f"--{key.replace('_', '-')}", value)
    ]


def _nothing_saved() -> str:
    return f"nothing was saved; start again with\n  {output.current_command()}"


def _vae(pair: "Pair", verb: str) -> "VAE":
    if pair.vae is None:
        raise ValueError(
            f"{verb}: the run was trained with a model and a guide of your own; expected a run whose --pair "
            "returns a pyro_vae.VAE"
        )
    return pair.vae


def _option_arguments() -> set[str]:
    """The names of the parameters of all commands that are options on the command line, ``--name``."""
    functions: list[Any] = [command.callback for command in app.registered_commands]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return {name for name in names if len(name) > 1} - {
        "context",
        "run",
        "dataset",
        "names",
        "as_json",
        "list_models",
    }


def _fail(code: int, error: Exception) -> NoReturn:
    output.exit_with_error(code, options.with_option_names(str(error), _option_arguments()))


def main() -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 success; 1 a bug; 2 usage; 65 invalid data; 66 missing input; 69 a library for a file is
    missing; 70 numerical failure or out of memory; 74 I/O; 78 a run of another version or configuration; 130
    and 143 interrupted.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    for stream in (sys.__stdout__, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the encoding of the locale may lack ≥ and ±
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        arguments = sys.argv[1:]
        prints_help = not arguments or "--help" in arguments
        # results go to sys.__stdout__, and the output of a user's code goes to stderr
        redirect = contextlib.nullcontext() if prints_help else contextlib.redirect_stdout(sys.stderr)
        with redirect, output.progress_lines():
            app()
    except FileExistsError as error:
        _fail(2, error)
    except OSError as error:
        # pyro_vae raises FileNotFoundError without errno for missing input
        is_missing_input = isinstance(error, FileNotFoundError) and error.errno is None
        _fail(66 if is_missing_input else 74, error)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # a bug, not a library that readers.read names
            raise
        _fail(69, error)
    except (FloatingPointError, MemoryError) as error:
        _fail(70, error)
    except ValueError as error:
        from pyro_vae.checkpoint import MismatchError

        _fail(78 if isinstance(error, MismatchError) else 65, error)
    sys.exit(0)
