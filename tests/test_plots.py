"""Plots return Axes or Figures that show the given data."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, evidence, exact, infer, nets, plots, priors
from pyro_vae.pairs.elbo import MeanElbo
from tests.support import maps, pages


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
    ax = plots.plot_reconstructions(x, vae.reconstruct(x))
    shown = np.asarray(ax.images[0].get_array())
    expected = x[0].movedim(0, -1).squeeze() if x.dim() == 4 else x[0]
    np.testing.assert_allclose(shown[:9, :11], expected.double().numpy(), atol=1e-12)
    sheet = plots.plot_manifold(vae, steps=5).images[0].get_array()
    assert sheet.shape[:2] == (45, 55)


def test_empty_cells_and_gaps_are_white():
    """Including the cells of an incomplete last row."""
    for images in (torch.zeros(3, 5, 5), torch.zeros(3, 3, 5, 5)):
        images[0] = 1.0
        image = plots.plot_images(images, columns=2).images[0]
        drawn = image.to_rgba(image.get_array(), bytes=True)
        sheet, alpha = drawn[..., 0], drawn[..., 3]
        assert sheet.shape == (11, 11)
        assert (sheet[:5, :5] == 255).all()  # the first image, which is white
        assert (sheet[:5, 6:] == 0).all()
        assert ((sheet == 255) | (alpha == 0))[6:, 6:].all()


def test_manifold_is_the_decoded_grid_of_quantiles():
    """The first tile is decoded at the lowest quantile of z[0] and the highest quantile of z[1], as in
    figure 4 of Kingma & Welling (2013)."""
    vae = make_vae((9, 11))
    sheet = np.asarray(plots.plot_manifold(vae, steps=4).images[0].get_array())
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
    best = [tuple(ring.get_offsets()[0]) for ring in ax.collections]  # of the held-out curve
    assert best == ([] if np.isnan(elbos).all() else [(np.nanargmax(elbos) + 1, np.nanmax(elbos))])


def test_history_of_an_objective_shows_its_bound_beside_the_elbo():
    train, held_out = (MeanElbo(e, e + 1, 1.0, 0.1, e + 0.5, 0.1, e + 4) for e in (-3.0, -2.0))
    epochs = [infer.Epoch(i, 1.0, train, held_out, 0.1) for i in (1, 2)]
    ax = plots.plot_history(epochs, objective="iwae, K = 5")
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn == {
        "train, iwae, K = 5": [-2.5, -2.5],
        "train, ELBO": [-3.0, -3.0],
        "held out, iwae, K = 5, best -1.50 in epoch 1": [-1.5, -1.5],
        "held out, ELBO": [-2.0, -2.0],
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn)
    ax = plots.plot_ess(epochs, 5)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 1.0], [2.0, 2.0]]
    assert ax.get_ylim() == (1, 5)


def test_no_curve_is_hidden_by_the_legend_or_by_the_limits():
    """If the first epochs are far lower, the others take at least half of the height."""
    for elbos in (np.linspace(-60, -20, 30), -100 - 450 * np.exp(-np.arange(40.0)), np.array([-9.0, -5.0])):
        train, held_out = ([mean(e)._replace(bound=e + 2) for e in elbos - shift] for shift in (0, 1))
        parts = zip(range(1, 100), train, held_out, strict=False)
        epochs = [infer.Epoch(i, 1.0, a, b, 0.1) for i, a, b in parts]
        for ax in (plots.plot_history(epochs), plots.plot_runs({"a": epochs, "b": epochs})):
            ax.figure.draw_without_rendering()
            assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
            low, high = ax.get_ylim()
            values = np.concatenate([line.get_ydata() for line in ax.lines])
            late = min(np.quantile(line.get_ydata(), 0.1) for line in ax.lines)
            assert high - values.max() == pytest.approx((high - low) / 22)
            if low > values.min():
                assert values.max() - late > 0.45 * (high - low)
                assert "below the axis" in ax.get_xlabel()
            else:
                assert ax.get_xlabel() == "epoch"


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


def draw_each(vae, x):
    """A call of each ``plot_*`` that draws on one Axes, by name."""
    found = evidence.Evidence("m", "lower", torch.zeros(3), torch.ones(3), torch.ones(3), 1, 1)
    epochs = [infer.Epoch(i, 1.0, mean(float(i)), mean(float(i)), 0.1) for i in (1, 2)]
    weighted = [epoch._replace(train=mean(1.0)._replace(bound=1.0, ess=2.0)) for epoch in epochs]
    return {
        "plot_history": lambda ax: plots.plot_history(epochs, ax),
        "plot_runs": lambda ax: plots.plot_runs({"a": epochs, "b": epochs[:1]}, ax),
        "plot_ess": lambda ax: plots.plot_ess(weighted, 5, ax),
        "plot_ladder": lambda ax: plots.plot_ladder({"a": [found, found]}, ax),
        "plot_pareto_k": lambda ax: plots.plot_pareto_k(torch.rand(20), ax),
        "plot_images": lambda ax: plots.plot_images(x, ax),
        "plot_reconstructions": lambda ax: plots.plot_reconstructions(x, x, ax),
        "plot_samples": lambda ax: plots.plot_samples(vae, 3, ax),
        "plot_points": lambda ax: plots.plot_points({"a": torch.rand(3, 2)}, ax),
        "plot_manifold": lambda ax: plots.plot_manifold(vae, ax, steps=3),
        "plot_latent": lambda ax: plots.plot_latent(vae, x, None, ax),
    }


def test_every_plot_draws_on_the_given_axes_and_opens_no_figure():
    vae = make_vae((9, 11))
    calls = draw_each(vae, vae.sample(3))
    assert calls.keys() == {name for name in vars(plots) if name.startswith("plot_")} - {"plot_diagnosis"}
    for name, draw in calls.items():
        ax = plt.figure().add_subplot()
        before = plt.get_fignums()
        assert draw(ax) is ax, name
        assert plt.get_fignums() == before, name
        assert ax.lines or ax.collections or ax.images or ax.patches, name


def test_plots_have_labels_and_the_style_and_leave_the_settings_of_matplotlib_unchanged():
    before, vae = dict(plt.rcParams), make_vae((9, 11))
    for name, draw in draw_each(vae, vae.sample(3)).items():
        ax = draw(None)
        assert ax.xaxis.label.get_size() == plots.STYLE["font.size"], name
        if ax.axison:
            assert ax.get_xlabel(), name
            assert ax.get_ylabel(), name
            assert not ax.spines["top"].get_visible(), name
    assert dict(plt.rcParams) == before


def test_latent_draws_the_dimensions_that_vary_most():
    encoder = conditionals.Normal(nets.MLP((9, 11), ()), event_shape=4)
    decoder = conditionals.Bernoulli(nets.MLP(4, ()), event_shape=(9, 11))
    vae, x = pv.VAE(priors.StandardNormal(4), decoder, encoder), torch.rand(20, 9, 11)
    means = vae.encode(x).mean.detach()
    first, second = sorted(means.var(0).argsort()[-2:].tolist())
    ax = plots.plot_latent(vae, x)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), means[:, [first, second]], rtol=1e-5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"z[{first}]", f"z[{second}]")
    ax = plots.plot_latent(vae, x, dims=(3, 0))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), means[:, [3, 0]], rtol=1e-5)
    for dims in ((0, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="expected two different dimensions of z, from 0 to 3"):
            plots.plot_latent(vae, x, dims=dims)
        with pytest.raises(ValueError, match="expected two different dimensions of z, from 0 to 3"):
            plots.latent_map(vae, x, dims=dims)


def map_vae(image, dim):
    return pv.VAE(
        priors.StandardNormal(dim),
        conditionals.Bernoulli(nets.MLP(dim, (20,)), event_shape=image),
        conditionals.Normal(nets.MLP(image, (20,)), event_shape=dim),
    )


@pytest.mark.parametrize(
    ("image", "dim", "dims"),
    [((9, 11), 2, (0, 1)), ((3, 9, 11), 4, (3, 1)), ((1, 9, 11), 3, (0, 2))],
    ids=str,
)
def test_latent_map_has_the_images_of_the_decoder(image, dim, dims):
    vae, x = map_vae(image, dim), torch.rand(30, *image)
    page = plots.latent_map(vae, x, torch.arange(30) % 3, dims=dims)
    read = maps.read(page)
    means = vae.encode(x).mean.detach()
    np.testing.assert_allclose(read.points[:, :2], means[:, dims], atol=6e-4)  # rounded to 3 decimals
    assert read.points[:, 2].tolist() == (torch.arange(30) % 3).tolist()
    assert (read.points[:, :2] > read.low).all()
    assert (read.points[:, :2] < read.low + read.size).all()
    for column, row in maps.cells(read.steps):
        z = means.mean(0)
        z[list(dims)] = torch.tensor(read.centre(column, row), dtype=z.dtype)
        expected = vae.decode(z).mean.detach().numpy()
        assert abs(read.tile(column, row) - expected).max() <= 2 / 255
    assert "<" not in read.json
    assert not re.search(r"(src|href)=\"(?!data:)", page)


@pytest.mark.parametrize(("image", "steps"), [((28, 28), 40), ((3, 200, 200), 4)], ids=str)
def test_latent_map_is_smaller_than_5_mb(monkeypatch, image, steps):
    """Also with many data, and with images of noise, which do not compress."""
    vae, x = map_vae(image, 2), torch.rand(image).expand(30_000, *image)
    monkeypatch.setattr(vae, "encode", lambda x, mask: dist.Normal(torch.randn(len(x), 2), 1.0))
    monkeypatch.setattr(vae, "decode", lambda z: dist.Delta(torch.rand(len(z), *image)))
    page = plots.latent_map(vae, x, torch.arange(30_000) % 10)
    assert len(page) < 5e6
    assert (maps.read(page).steps, len(maps.read(page).points)) == (steps, 20_000)


def test_latent_map_of_images_that_are_too_large_raises():
    with pytest.raises(ValueError, match="expected at most 500000"):
        plots.latent_map(map_vae((1000, 1000), 2), torch.zeros(3, 1000, 1000))


def test_latent_map_of_a_model_that_is_not_finite_raises(monkeypatch):
    vae = map_vae((9, 11), 2)
    monkeypatch.setattr(vae, "decode", lambda z: dist.Delta(torch.full((len(z), 9, 11), torch.inf)))
    with pytest.raises(ValueError, match="not finite; train again with a lower learning rate"):
        plots.latent_map(vae, torch.rand(3, 9, 11))


@pytest.mark.parametrize("labels", [torch.arange(30) / 8, torch.arange(30) % 3, torch.arange(30)], ids=str)
def test_all_points_are_drawn_whatever_the_labels(labels):
    vae, x = map_vae((9, 11), 2), torch.rand(30, 9, 11)
    ax = plots.plot_latent(vae, x, labels)
    assert sum(len(points.get_offsets()) for points in ax.collections) == 30
    assert (ax.get_legend() is None) == (len(labels.unique()) > 20)
    indices = maps.read(plots.latent_map(vae, x, labels)).points[:, 2]
    assert indices.tolist() == labels.unique(return_inverse=True)[1].tolist()


def test_the_key_has_the_names_of_the_labels():
    vae, names = map_vae((9, 11), 2), ("rod", "cone", "a<b")
    test = pv.Data(torch.rand(30, 9, 11), labels=torch.arange(30) % 3, label_names=names)
    ax = plots.plot_latent(vae, test.x, test.labels, label_names=test.label_names)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(names)
    page = plots.latent_map(vae, test.x, test.labels, label_names=test.label_names)
    assert re.findall(r"</i>(.+)</span>", page) == ["rod", "cone", "a&lt;b"]
    assert "with z[0] horizontal and z[1] vertical" in page


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3, 3)], ids=str)
def test_latent_map_of_other_data_raises(shape):
    with pytest.raises(ValueError, match="latent_map: expected"):
        plots.latent_map(make_vae((9, 11)), torch.zeros(shape))


def test_results_render_as_pages_with_their_numbers():
    """As tables without broken markup, in which texts are escaped."""
    model = exact.LinearGaussian(torch.eye(3, 2), noise_scale=0.5)
    guide = pv.Guide(conditionals.Normal(nets.MLP(3, ()), event_shape=2))
    x = model.sample(20)
    history = pv.fit(model, guide, x, validation=x, num_epochs=2)
    compared = pv.compare(model, guide, x, num_particles=50)
    guides = pv.compare_guides(model, {"a<b": guide}, x, num_particles=50)
    diagnosis = pv.diagnose(model, guide, x, num_particles=200, num_simulations=100)
    estimate = pv.evidence.importance(model, guide, x, num_particles=50)
    for result, text in (
        (history, f"{history.best.validation.elbo:.2f}"),
        (compared, f"{compared.gap.mean():.4f}"),
        (guides, "a&lt;b"),
        (diagnosis, f"{diagnosis.importance.mean:.2f}"),
        (estimate, f"{estimate.mean:.3f}"),
        (make_vae((9, 11)), "StandardNormal"),
    ):
        page = result._repr_html_()
        assert text in page
        pages.check(page)
    assert plt.get_fignums() == []
