"""Every guide, prior and likelihood that the command line offers, in every combination that its data
allow."""

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
OF_DATA = {"digits": LIKELIHOODS, "ring": ("normal", "laplace", "student-t")}
REFUSED = [("ring", likelihood) for likelihood in LIKELIHOODS if likelihood not in OF_DATA["ring"]]
EVERY = [(name, *words) for name, own in OF_DATA.items() for words in itertools.product(GUIDES, PRIORS, own)]
# of 8 guides, 4 priors and at most 6 likelihoods: any two are together once at least
PAIRWISE = [
    (name, guide, PRIORS[(i + j) % len(PRIORS)], likelihood)
    for name, own in OF_DATA.items()
    for i, guide in enumerate(GUIDES)
    for j, likelihood in enumerate(own if len(own) >= len(PRIORS) else (*own, own[i % len(own)]))
]


def test_the_pairwise_combinations_have_any_two_words_together():
    for name, own in OF_DATA.items():
        chosen = [words for data, *words in PAIRWISE if data == name]
        for (a, first), (b, second) in itertools.combinations(enumerate((GUIDES, PRIORS, own)), 2):
            assert {(words[a], words[b]) for words in chosen} == set(itertools.product(first, second))


@pytest.mark.parametrize(("name", "guide", "prior", "likelihood"), PAIRWISE)
def test_a_pair_of_every_two_families_is_trained_judged_and_drawn(
    name, guide, prior, likelihood, tmp_path, monkeypatch
):
    """At the default latent size, on few data, to the last picture."""
    monkeypatch.setattr(build, "PSEUDO_INPUTS", 5)
    grey = "stochastic" if likelihood == "bernoulli" else "none"
    words = {"guide": guide, "prior": prior, "likelihood": likelihood, "hidden": (20,)}
    config = build.Config(
        **DEFAULTS[name] | words,
        dataset=name,
        pair=None,
        binarize=grey,
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
    for found in (
        evidence.elbo(vae.model, vae.guide, x, num_particles=5),
        evidence.importance(vae.model, vae.guide, x, num_particles=5),
    ):
        assert found.log_evidence.isfinite().all()
    found = diagnostics.diagnose(vae.model, vae.guide, x, num_particles=30, num_simulations=100)
    assert not found.notes
    assert vae.sample(3).shape == vae.reconstruct(x[:3]).shape == (3, *x.shape[1:])
    plot_samples = plots.plot_samples
    monkeypatch.setattr(plots, "plot_samples", lambda vae: plot_samples(vae, 4))
    monkeypatch.setattr(runs.Run, "history", lambda self: epochs)
    drawn = runs.pictures(runs.Run(tmp_path, config), pair, test)
    expected = {"curve", "samples", "latent"} | ({"reconstructions"} if name == "digits" else set())
    assert drawn.keys() - {"manifold"} == expected
    for picture in [*drawn.values(), *plots.plot_diagnosis(found, x).values()]:
        figure = picture()
        shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        for image in shown:  # whole images of 8 × 8 pixels, with gaps between them that are masked
            drawn = int((~np.ma.getmaskarray(image)).sum())
            assert drawn > 0
            assert drawn % 64 == 0
        plt.close(figure)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guide", "prior", "likelihood"), EVERY)
def test_every_combination_goes_from_training_to_the_last_picture(
    run, name, guide, prior, likelihood, monkeypatch
):
    monkeypatch.setattr(build, "PSEUDO_INPUTS", 20)  # of 100: a density of z costs as many of the guide
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **given: savefig(self, *args, **given | {"dpi": 40})
    )
    words = ("--guide", guide, "--prior", prior, "--likelihood", likelihood)
    commands = [
        ("train", name, *words, "-n", 1, "--out", "a"),
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


@pytest.mark.parametrize(("name", "likelihood"), REFUSED)
def test_a_likelihood_that_is_not_of_the_data_is_refused_in_one_line(run, name, likelihood):
    code, out, err = run("train", name, "--likelihood", likelihood, "-n", 1)
    assert (code, out) == (65, "")
    assert err.count("\n") == 1
    assert "--likelihood normal or laplace or student-t" in err
    assert not Path("runs").exists()
