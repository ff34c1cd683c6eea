"""Guides, priors and likelihoods of the command line: each of them, and each pair."""

import itertools
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from pyro.optim import Adam

from pyro_vae import diagnostics, evidence, infer, plots
from pyro_vae.cli import app, build, runs
from pyro_vae.cli.defaults import DEFAULTS

GUIDES, PRIORS, LIKELIHOODS = map(get_args, (app.Guide, app.Prior, app.Likelihood))
COUNTS = ("poisson", "negative-binomial")
LIKELIHOODS_OF = {
    "digits": [name for name in LIKELIHOODS if name not in COUNTS],
    "ring": ("normal", "laplace", "student-t"),
}
INVALID = [("ring", likelihood) for likelihood in LIKELIHOODS if likelihood not in LIKELIHOODS_OF["ring"]]
# each family occurs at least once
EACH = [
    (name, *(of[i % len(of)] for of in (GUIDES, PRIORS, likelihoods)))
    for name, likelihoods in LIKELIHOODS_OF.items()
    for i in range(max(map(len, (GUIDES, PRIORS, likelihoods))))
]
# each pair of two families occurs at least once
PAIRWISE = [
    (name, guide, PRIORS[(i + j) % len(PRIORS)], likelihood)
    for name, likelihoods in LIKELIHOODS_OF.items()
    for i, guide in enumerate(GUIDES)
    for j, likelihood in enumerate(
        likelihoods if len(likelihoods) >= len(PRIORS) else (*likelihoods, likelihoods[i % len(likelihoods)])
    )
]


def test_pairwise_combinations_cover_each_pair_of_families():
    for name, likelihoods in LIKELIHOODS_OF.items():
        chosen = [families for data, *families in PAIRWISE if data == name]
        for (a, first), (b, second) in itertools.combinations(enumerate((GUIDES, PRIORS, likelihoods)), 2):
            assert {(families[a], families[b]) for families in chosen} == set(
                itertools.product(first, second)
            )


@pytest.mark.parametrize(("name", "guide", "prior", "likelihood"), EACH)
def test_each_family_trains_evaluates_and_is_plotted(name, guide, prior, likelihood, tmp_path, monkeypatch):
    """At the default latent dimension, on 100 data."""
    monkeypatch.setattr(build, "PSEUDO_INPUTS", 5)
    families = {"guide": guide, "prior": prior, "likelihood": likelihood, "hidden": (20,)}
    config = build.Config(
        **DEFAULTS[name] | families,
        dataset=name,
        pair=None,
        binarize="stochastic" if likelihood == "bernoulli" else "none",
        batch_size=100,
        num_particles=1,
        beta=1.0,
        patience=None,
        clip_norm=None,
        seed=0,
        dtype="float32",
    )
    train, test = (part.head(n) for part, n in zip(build.build_data(config, None), (100, 8), strict=True))
    config = build.replace(config, event_shape=tuple(train.x.shape[1:]), num_levels=train.num_levels)
    pair = build.build_pair(config, train)
    epochs = infer.fit(
        pair.model, pair.guide, train, num_epochs=1, optim=Adam({"lr": 1e-3}), progress=False
    ).epochs
    assert torch.tensor(epochs[0].train.elbo).isfinite()
    vae, x = pair.vae, test.x
    for estimate in (
        evidence.elbo(vae.model, vae.guide, x, num_particles=5),
        evidence.importance(vae.model, vae.guide, x, num_particles=5),
    ):
        assert estimate.log_evidence.isfinite().all()
    diagnosis = diagnostics.diagnose(vae.model, vae.guide, x, num_particles=30, num_simulations=100)
    assert not diagnosis.notes
    assert vae.sample(3).shape == vae.reconstruct(x[:3]).shape == (3, *x.shape[1:])
    plot_samples = plots.plot_samples
    monkeypatch.setattr(plots, "plot_samples", lambda vae, given: plot_samples(vae, 4))
    monkeypatch.setattr(runs.Run, "history", lambda self: epochs)
    pictures = runs.pictures(runs.Run(tmp_path, config), pair, test)
    expected = {"curve", "samples", "latent"} | ({"reconstructions"} if name == "digits" else set())
    assert pictures.keys() - {"manifold", "latent_map"} == expected
    if "latent_map" in pictures:
        assert pictures.pop("latent_map")().startswith("<!doctype html>")
    for draw in [*pictures.values(), *plots.plot_diagnosis(diagnosis, x).values()]:
        figure = draw().figure  # of axes or of a figure
        grids = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        for grid in grids:  # images of 8 × 8 pixels, with masked gaps between them
            num_pixels = int((~np.ma.getmaskarray(grid)).sum())
            assert num_pixels > 0
            assert num_pixels % 64 == 0
        plt.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guide", "prior", "likelihood"), PAIRWISE)
def test_pairwise_combinations_pass_all_commands_without_warning(
    run, name, guide, prior, likelihood, monkeypatch
):
    monkeypatch.setattr(build, "PSEUDO_INPUTS", 20)  # for speed: VampPrior runs the guide on each
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: savefig(self, *args, **kwargs | {"dpi": 40})
    )
    families = ("--guide", guide, "--prior", prior, "--likelihood", likelihood)
    commands = [
        ("train", name, *families, "-n", 1, "--out", "a"),
        ("evaluate", "a", "--num-particles", 20, "--data", "test[:20]"),
        ("diagnose", "a", "--num-particles", 50, "--num-simulations", 100, "--data", "test[:20]"),
        ("sample", "a", "-n", 9),
        ("reconstruct", "a", "-n", 9),
        ("plot", "a"),
    ]
    for command in commands:
        code, _, err = run(*command)
        assert code == 0, err
        assert "warning" not in err
        assert "Traceback" not in err
    pictures = {file.relative_to("a").as_posix(): imread(file) for file in Path("a").rglob("*.png")}
    assert {
        "plots/latent.png",
        "plots-2/latent.png",
        "evaluation/ladder.png",
        "diagnosis/calibration.png",
    } <= pictures.keys()
    assert all(picture[..., :3].std() > 0.02 for picture in pictures.values())  # none is blank


@pytest.mark.parametrize(("name", "likelihood"), INVALID)
def test_likelihood_with_other_support_than_the_data_is_refused(run, name, likelihood):
    code, out, err = run("train", name, "--likelihood", likelihood, "-n", 1)
    assert (code, out) == (65, "")
    assert err.count("\n") == 1
    assert "--likelihood normal or laplace or student-t" in err
    assert not Path("runs").exists()
