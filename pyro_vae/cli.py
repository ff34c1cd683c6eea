"""``pyro-vae train | sample | reconstruct | plot | data``.

Torch is imported inside the commands, so that ``--help`` answers at once. Progress goes to stderr, results to stdout.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyro_vae.build import Pair
    from pyro_vae.data import Data
    from pyro_vae.infer import Epoch
    from pyro_vae.runs import Run
    from pyro_vae.vae import VAE

Dataset = Literal["digits", "mnist", "fashion-mnist", "frey-faces", "ring"]
Likelihood = Literal["bernoulli", "continuous-bernoulli", "normal", "laplace", "student-t", "categorical"]
Guide = Literal["normal", "full", "low-rank", "laplace", "student-t"]
Prior = Literal["standard-normal", "normal", "mixture", "vamp"]
Binarize = Literal["none", "threshold", "stochastic"]

RunFolder = Annotated[Path, Argument(metavar="RUN", help="A folder that `pyro-vae train` made.")]
DataDir = Annotated[Path | None, Option(help="Folder of the data sets.  [default: $PYRO_VAE_DATA, or ./data]")]
Out = Annotated[Path | None, Option(help="Folder to write.  [default: a new one]")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what --out holds.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Seed = Annotated[int, Option(help="Seed of every random draw.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Auto-Encoding Variational Bayes in Pyro. Numbers are in nats per datum."""


@app.command()
def train(
    dataset: Annotated[Dataset, Argument(help="What to train on; digits come with the package.")] = "digits",
    num_epochs: Annotated[int | None, Option("-n", "--num-epochs", min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[int, Option("-b", "--batch-size", min=1, help="Data in a minibatch.")] = 100,
    learning_rate: Annotated[float | None, Option(help="Step size of Adam.")] = None,
    latent_dim: Annotated[int | None, Option(min=1, help="Dimensions of z.")] = None,
    hidden: Annotated[
        str | None, Option(help="Widths of the encoder's hidden layers, such as 500,500; the decoder mirrors.")
    ] = None,
    likelihood: Annotated[Likelihood | None, Option(help="p(x|z).")] = None,
    guide: Annotated[Guide, Option(help="Family of q(z|x).")] = "normal",
    prior: Annotated[Prior, Option(help="p(z).")] = "standard-normal",
    pair: Annotated[str | None, Option(metavar="MODULE:FACTORY", help="Train a pair of your own.")] = None,
    binarize: Annotated[Binarize | None, Option(help="What grey pixels become.  [default: stochastic for bernoulli]")] = None,
    num_particles: Annotated[int, Option(min=1, help="Draws of z for each datum and step.")] = 1,
    beta: Annotated[float, Option(min=0, help="Weight of the KL in what is optimized, never in what is reported.")] = 1.0,
    warm_up: Annotated[int | None, Option(min=0, help="Epochs over which the weight of the KL rises from 0.")] = None,
    patience: Annotated[int | None, Option(min=1, help="Stop after so many epochs without a better held-out ELBO.")] = None,
    seed: Seed = 0,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[Literal["float32", "float64"], Option(help="Of data and networks.")] = "float32",
    data_dir: DataDir = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a VAE, or a pair of your own, by SVI; leave a run folder."""
    import pyro

    from pyro_vae import build, runs

    chosen = {"likelihood": likelihood, "latent_dim": latent_dim, "hidden": hidden, "num_epochs": num_epochs,
              "learning_rate": learning_rate, "warm_up": warm_up}  # fmt: skip
    config: dict[str, Any] = build.DEFAULTS[dataset] | {key: value for key, value in chosen.items() if value is not None}
    grey_to = "stochastic" if config["likelihood"] == "bernoulli" and pair is None else "none"
    config |= {
        "dataset": dataset, "guide": guide, "prior": prior, "pair": pair, "binarize": binarize or grey_to,
        "batch_size": batch_size, "num_particles": num_particles, "beta": beta, "patience": patience,
        "seed": seed, "device": _device(device), "dtype": dtype, "hidden": _widths(config["hidden"]),
    }  # fmt: skip
    train_data, test = build.build_data(config, data_dir)
    config |= {"event_shape": list(train_data.x.shape[1:]), "num_levels": train_data.num_levels}
    pyro.set_rng_seed(seed)
    own = build.build_pair(config, train_data)
    run = runs.create(out or runs.fresh(Path("runs") / dataset), config, overwrite=overwrite)
    _say(f"{train_data}, {len(test)} held out -> {run.path}")
    seconds = _train(run, own, train_data, test)
    last = run.history()[-1]
    with run.loaded() as trained:
        _draw(run.path / "plots", dict(runs.pictures(run, trained, test)))
    result = {"run": str(run.path), **last._asdict(), "seconds": seconds}
    _print(result, f"{run.path}: {last.epoch} epochs in {seconds:.0f} s; held out: {last.validation}", as_json)


def _train(run: "Run", pair: "Pair", train_data: "Data", test: "Data") -> float:
    """Train the run's pair and keep its weights after each epoch; the seconds it took."""
    from pyro.infer import Trace_ELBO
    from pyro.optim import Adam

    from pyro_vae import infer

    config = run.config
    many: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1} if pair.vae else {}
    loss = Trace_ELBO(num_particles=config["num_particles"], **(many if config["num_particles"] > 1 else {}))
    beta, warm_up = config["beta"], config["warm_up"]
    store: dict[str, Any] = {"params": {}, "constraints": {}}
    seconds = 0.0
    for epoch in infer.train(
        pair.model, pair.guide, train_data, validation=test, loss=loss, optim=Adam({"lr": config["learning_rate"]}),
        epochs=config["num_epochs"], batch_size=config["batch_size"], patience=config["patience"], param_store=store,
        beta=(lambda t: beta * min(1.0, t / warm_up)) if warm_up else beta,
    ):  # fmt: skip
        run.record(epoch)
        run.save(pair, store)
        seconds += epoch.seconds
        if epoch.epoch == 1 or epoch.epoch % max(1, config["num_epochs"] // 20) == 0:
            _say(_line(epoch))
    run.save(pair, store)  # early stopping went back to the best
    return seconds


@app.command()
def sample(
    run: RunFolder,
    n: Annotated[int, Option("-n", "--num-samples", min=1, help="How many.")] = 100,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw x from p(z) p(x|z): samples.npy, and a picture of as many E[x|z]."""
    import torch

    from pyro_vae import plots, runs

    opened = runs.open_run(run)
    with opened.loaded() as pair:
        vae = _vae(pair, "sample")
        torch.manual_seed(seed)
        x = vae.sample(n).cpu()
        figures = {"samples": plots.plot_samples(vae, min(n, 400))} if x.dim() > 2 else _points(x=x)
    _leave(out or runs.fresh(run / "samples"), overwrite, {"samples": x}, figures, as_json)


@app.command()
def reconstruct(
    run: RunFolder,
    n: Annotated[int, Option("-n", "--num-data", min=1, help="The first so many held-out data.")] = 100,
    seed: Seed = 0,
    data_dir: DataDir = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """E[x'|z] at z ~ q(z|x) for held-out x: x.npy, reconstructions.npy, and both in one picture."""
    import torch

    from pyro_vae import build, plots, runs

    opened = runs.open_run(run)
    x = build.build_data(opened.config, data_dir)[1].x[:n]
    with opened.loaded() as pair:
        vae = _vae(pair, "reconstruct")
        torch.manual_seed(seed)
        y = vae.reconstruct(x)
    figures = (
        {"reconstructions": plots.plot_reconstructions(x[:100], y[:100])} if x.dim() > 2 else _points(x=x, reconstructions=y)
    )
    _leave(out or runs.fresh(run / "reconstructions"), overwrite, {"x": x, "reconstructions": y}, figures, as_json)


@app.command()
def plot(
    run: RunFolder, data_dir: DataDir = None, out: Out = None, overwrite: Overwrite = False, as_json: Json = False
) -> None:
    """Draw a run's pictures again."""
    from pyro_vae import build, runs

    opened = runs.open_run(run)
    _, test = build.build_data(opened.config, data_dir)
    with opened.loaded() as pair:
        figures = dict(runs.pictures(opened, pair, test))
    _leave(out or runs.fresh(run / "plots"), overwrite, {}, figures, as_json)


@app.command()
def data(
    dataset: Annotated[Dataset | None, Argument(help="One of them: read it, check its contents, tell its shapes.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List the data sets and where they are read from."""
    from pyro_vae.data import SOURCES, is_here, load

    if dataset is None:
        rows = {name: {"here": is_here(name, data_dir), "source": source} for name, source in SOURCES.items()}
        text = "\n".join(f"{name:14} {'here' if row['here'] else 'not here':9} {row['source']}" for name, row in rows.items())
        return _print(rows, text, as_json)
    train_data, test = load(dataset, data_dir=data_dir)
    low, high = (float(end) for end in train_data.x.aminmax())
    result = {"train": len(train_data), "test": len(test), "shape": list(train_data.x.shape[1:]), "range": [low, high]}
    text = f"{dataset}: {len(train_data)} + {len(test)} held out, each {tuple(train_data.x.shape[1:])} in [{low:g}, {high:g}]"
    return _print(result, text, as_json)


def _widths(hidden: str) -> list[int]:
    try:
        return [int(width) for width in hidden.split(",") if width]
    except ValueError:
        raise typer.BadParameter(f"--hidden: expected widths such as 500 or 500,500 but got {hidden!r}") from None


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {name}: {str(error).splitlines()[0]}; expected cpu, or a device that is here"
        ) from None
    return name


def _vae(pair: "Pair", verb: str) -> "VAE":
    if pair.vae is None:
        raise ValueError(f"{verb}: the run's pair is two programs of your own; expected a factory that returns a pyro_vae.VAE")
    return pair.vae


def _points(**sets: "Tensor") -> "dict[str, Figure]":
    from pyro_vae import plots

    drawable = {name: points for name, points in sets.items() if points.shape[1:] == (2,)}
    return {"points": plots.figure_of(plots.plot_points(drawable))} if drawable else {}


def _leave(folder: Path, overwrite: bool, arrays: "dict[str, Tensor]", figures: "dict[str, Figure]", as_json: bool) -> None:
    """Write arrays and pictures into a folder, and say where."""
    import numpy as np

    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists already; name another folder by --out, or replace it by --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.cpu().numpy())
    _draw(folder, figures)
    files = sorted(str(file) for file in folder.iterdir())
    _print({"files": files}, "\n".join(files), as_json)


def _draw(folder: Path, figures: "dict[str, Figure]") -> None:
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


def _line(epoch: "Epoch") -> str:
    parts = {"train": epoch.train, "held out": epoch.validation}
    means = (
        f"{name} ELBO {m.elbo:8.2f} = {m.reconstruction:8.2f} - KL {m.kl:6.2f}" for name, m in parts.items() if m is not None
    )
    return f"epoch {epoch.epoch:4d}   {'   '.join(means)}"


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _print(result: Any, text: str, as_json: bool) -> None:
    from pyro_vae.runs import as_json as plain

    typer.echo(json.dumps(plain(result)) if as_json else text)


def _fail(code: int, message: object) -> NoReturn:
    typer.echo(f"pyro-vae: {message}", err=True)
    sys.exit(code)


def main() -> NoReturn:
    """Run the command line. Exit codes: 0; 2 usage; 65 bad data; 66 missing input; 70 numerical failure or memory; 74 I/O;
    78 a run of another version; 130 and 143 interrupted; 1 a bug."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except FileNotFoundError as error:
        _fail(66, error)
    except FileExistsError as error:
        _fail(2, error)
    except OSError as error:
        _fail(74, f"{error}; what was written before is kept")
    except (FloatingPointError, MemoryError) as error:
        _fail(70, error)
    except ValueError as error:
        from pyro_vae.runs import VersionError

        _fail(78 if isinstance(error, VersionError) else 65, error)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            _fail(70, f"out of memory; lower --batch-size or --num-particles ({str(error).splitlines()[0]})")
        raise
    sys.exit(0)
