"""Plots return Axes or Figures that show the given data."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, infer, nets, plots, priors
from pyro_vae.pairs.elbo import MeanElbo


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def make_vae(image):
    return pv.VAE(
        priors.StandardNormal(2),
        conditionals.Bernoulli(nets.ConvDecoder(2, image, (4,)), event_shape=image),
        conditionals.Normal(nets.ConvEncoder(image, (4,)), event_shape=2),
    )


@pytest.mark.parametrize("image", [(9, 11), (1, 9, 11), (3, 9, 11)], ids=str)
def test_image_plots_show_the_pixels_of_grey_and_rgb_images(image):
    vae = make_vae(image)
    x = vae.sample(13)
    plots.plot_samples(vae, 7)
    figure = plots.plot_reconstructions(x, vae.reconstruct(x))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    expected = x[0].movedim(0, -1).squeeze() if x.dim() == 4 else x[0]
    np.testing.assert_allclose(shown[:9, :11], expected.double().numpy(), atol=1e-12)
    sheet = plots.plot_manifold(vae, steps=5).axes[0].images[0].get_array()
    assert sheet.shape[:2] == (45, 55)


def test_empty_cells_and_gaps_are_white():
    """Including the cells of an incomplete last row."""
    for images in (torch.zeros(3, 5, 5), torch.zeros(3, 3, 5, 5)):
        images[0] = 1.0
        image = plots.plot_images(images, columns=2).axes[0].images[0]
        drawn = image.to_rgba(image.get_array(), bytes=True)
        sheet, alpha = drawn[..., 0], drawn[..., 3]
        assert sheet.shape == (11, 11)
        assert (sheet[:5, :5] == 255).all()  # the first image, which is white
        assert (sheet[:5, 6:] == 0).all()
        assert ((sheet == 255) | (alpha == 0))[6:, 6:].all()


def test_manifold_is_the_decoded_grid_of_quantiles():
    """The first tile is decoded at the lowest quantile of z₁ and the highest quantile of z₂, as in figure 4
    of Kingma & Welling (2013)."""
    vae = make_vae((9, 11))
    sheet = np.asarray(plots.plot_manifold(vae, steps=4).axes[0].images[0].get_array())
    low, high = (torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(q)) for q in (0.125, 0.875))
    with torch.no_grad():
        top_left = vae.decode(torch.stack([low, high])).mean.numpy()
        top_right = vae.decode(torch.stack([high, high])).mean.numpy()
    np.testing.assert_allclose(sheet[:9, :11], top_left, atol=1e-6)
    np.testing.assert_allclose(sheet[:9, -11:], top_right, atol=1e-6)


def mean(elbo):
    return MeanElbo(elbo, elbo + 1, 1.0, 0.1)


@pytest.mark.parametrize("elbos", [[1.0], [1.0, 3.0, 2.0], [float("nan")], list(range(20))], ids=str)
def test_history_shows_the_elbos(elbos):
    ax = plots.plot_history(
        [infer.Epoch(i, 1.0, mean(e), mean(e), 0.1) for i, e in enumerate(elbos, start=1)]
    )
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), elbos)
    assert ax.lines[0].get_marker() == ("o" if len(elbos) < 10 else "None")


def test_history_of_an_objective_shows_its_bound_beside_the_elbo():
    train, held_out = (MeanElbo(e, e + 1, 1.0, 0.1, e + 0.5, 0.1, e + 4) for e in (-3.0, -2.0))
    epochs = [infer.Epoch(i, 1.0, train, held_out, 0.1) for i in (1, 2)]
    ax = plots.plot_history(epochs, objective="iwae, K = 5")
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn == {
        "train, iwae, K = 5": [-2.5, -2.5],
        "train, ELBO": [-3.0, -3.0],
        "held out, iwae, K = 5, best -1.50": [-1.5, -1.5],
        "held out, ELBO": [-2.0, -2.0],
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn)
    ax = plots.plot_ess(epochs, 5)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 1.0], [2.0, 2.0]]
    assert ax.get_ylim() == (1, 5)


def test_latent_shows_the_posterior_means():
    vae, x = make_vae((9, 11)), torch.rand(20, 9, 11)
    ax = plots.plot_latent(vae, x, torch.arange(20) % 3)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    np.testing.assert_allclose(np.sort(drawn, 0), np.sort(vae.encode(x).mean.detach().numpy(), 0), rtol=1e-5)
    assert len(plots.plot_points({"a": torch.zeros(3, 2), "b": torch.ones(4, 2)}).collections) == 2


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 2, 3, 3), (5,)], ids=str)
def test_invalid_image_shape_raises(shape):
    with pytest.raises(ValueError, match="expected"):
        plots.plot_images(torch.zeros(shape))
