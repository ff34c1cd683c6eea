"""Users' files in Python: what is read, held-out rows, labels, conditions, missing entries."""

import math

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import conditionals, data, nets, priors
from tests.support import own_files
from tests.support.own_files import image_bytes


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npy_file_is_mapped_and_not_copied(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12.0).reshape(4, 3))
    table = data.read(path)
    with path.open("r+b") as file:  # seen through the mapping
        file.seek(-8, 2)
        file.write(np.float64(99).tobytes())
    assert table.x[3, 2] == 99
    train, _ = pv.load(path, validation=path)
    batches = data.as_batches(train, 2)
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(np.float64(98).tobytes())
    assert batches.source.args[0][3, 2] == train.x[3, 2] == 98


@pytest.mark.parametrize("array", [np.arange(12).reshape(4, 3), np.ones((3, 2), bool), np.ones(5, "f2")])
@pytest.mark.parametrize("order", ["C", "F"])
def test_entries_are_those_of_the_array(tmp_path, array, order):
    np.save(tmp_path / "x.npy", np.asarray(array, order=order))
    table = data.read(tmp_path / "x.npy")
    assert np.array_equal(table.x.numpy(), array.reshape(len(array), -1))
    assert table.mask is None


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([0.0, 1.0], "binary"),
        ([True, False], "binary"),
        ([0, 7], "counts"),
        ([3.0, 7.0], "counts"),
        ([0.0, 0.5], "grey"),
        ([0.0, 1.5], "real"),
        ([-1, 3], "real"),
        ([0, math.nan, 2], "counts"),
        ([math.nan, 0.25], "grey"),
    ],
)
def test_kind_of_data(tmp_path, entries, kind):
    np.save(tmp_path / "x.npy", np.array(entries))
    table = data.read(tmp_path / "x.npy")
    assert table.kind == kind
    finite = [entry for entry in entries if not math.isnan(entry)]
    assert (table.low, table.high) == (min(finite), max(finite))


def test_images_of_bytes_are_grey_levels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    train, test = pv.load(tmp_path / "x.npy")
    levels = torch.cat([train.levels().x, test.levels().x])
    assert sorted(levels.flatten().tolist()) == sorted(images.ravel().tolist())


def test_columns_of_a_table(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    (tmp_path / "x.csv").write_text(',a,b,name,ok\n0,1,2.5,u,true\n1,,3.5,v,false\n2,4,NA,"w,x",true\n')
    table = data.read(tmp_path / "x.csv", label="name")
    assert table.columns == ("a", "b", "ok")
    assert table.left_out == (" (an index)",)
    assert table.x.tolist() == [[1, 2.5, 1], [0, 3.5, 0], [4, 0, 1]]
    assert table.mask.tolist() == [[True, True, True], [False, True, True], [True, False, True]]
    assert table.labels.tolist() == ["u", "v", "w,x"]
    text = table.summary()
    assert "(3, 3) float64 in [0, 4], real" in text
    assert "missing: 2 entries (22.2%)" in text
    assert "labels: 'u' × 1, 'v' × 1, 'w,x' × 1" in text
    assert data.read(tmp_path / "x.csv").left_out == (" (an index)", "name (text)")


def test_text_that_looks_like_numbers(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    (tmp_path / "x.csv").write_text('a,id\n" 1 ",10_20\n 2,10_21\n,10_22\n')
    table = data.read(tmp_path / "x.csv")
    assert (table.columns, table.left_out) == (("a",), ("id (text)",))
    assert table.x.tolist() == [[1], [2], [0]]
    assert table.mask.tolist() == [[True], [True], [False]]


def test_parquet_and_csv_of_one_table_are_equal(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads tables")
    from pyarrow import csv, parquet

    table = pyarrow.table({"a": [1, None, 3], "b": [0.5, 1.5, -2.0], "c": ["u", "v", "u"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    csv.write_csv(table, tmp_path / "x.csv")
    one, two = (data.read(tmp_path / name, label="c") for name in ("x.parquet", "x.csv"))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.mask, two.mask)
    assert one.columns == two.columns
    assert np.array_equal(one.labels, two.labels)


def test_counts_of_h5ad_are_dense(tmp_path):
    own_files.h5ad(tmp_path / "x.h5ad")
    table = data.read(tmp_path / "x.h5ad", label="group")
    expected = np.random.default_rng(0).poisson(1.0, (60, 5))
    assert np.array_equal(table.x.numpy(), expected)
    assert (table.kind, table.columns[0], table.labels[:4].tolist()) == ("counts", "var0", [0, 1, 2, 0])


def test_folder_of_images_has_labels_and_channels(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="pillow reads images")
    (tmp_path / "im" / "a").mkdir(parents=True)
    (tmp_path / "im" / "b").mkdir()
    (tmp_path / "im" / "a" / "1.png").write_bytes(image_bytes((6, 4)))
    (tmp_path / "im" / "notes.txt").write_text("left out")
    (tmp_path / "im" / ".hidden").write_text("ignored")
    table = data.read(tmp_path / "im")
    assert (tuple(table.x.shape), table.labels.tolist(), table.left_out) == ((1, 6, 4), ["a"], ("notes.txt",))
    colour = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)
    image.fromarray(colour).save(tmp_path / "im" / "b" / "1.png")
    image.fromarray((np.arange(24, dtype=np.uint16) * 2600).reshape(6, 4)).save(
        tmp_path / "im" / "b" / "2.png"
    )
    table = data.read(tmp_path / "im")
    assert tuple(table.x.shape) == (3, 3, 6, 4)
    assert torch.equal((table.x[1] * 255).round().to(torch.uint8), torch.from_numpy(colour).movedim(-1, 0))
    assert (table.x[2, 0].flatten() * 255).round().tolist() == [i * 2600 >> 8 for i in range(24)]
    assert tuple(data.read(tmp_path / "im", image_size=3).x.shape) == (3, 3, 3, 3)


def test_held_out_rows_are_drawn_by_the_seed(tmp_path):
    path = save(tmp_path / "x.npz", x=np.arange(50.0).reshape(50, 1), y=np.arange(50))
    train, test = pv.load(path, holdout=0.2, seed=3, label="y")
    assert (len(train), len(test)) == (40, 10)
    assert sorted(torch.cat([train.x, test.x]).flatten().tolist()) == list(range(50))
    assert torch.equal(test.labels, test.x.flatten().long())
    assert torch.equal(pv.load(path, holdout=0.2, seed=3)[1].x, test.x)
    assert not torch.equal(pv.load(path, holdout=0.2, seed=4)[1].x, test.x)
    state = torch.get_rng_state()
    pv.load(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_that_are_no_whole_numbers_keep_their_names(tmp_path):
    kinds = np.array(["rod", "cone", "rod", "gap"] * 5)
    path = save(tmp_path / "x.npz", x=np.ones((20, 1)), kind=kinds, half=np.arange(20) / 2, y=np.arange(20))
    for binarize in ("none", "stochastic"):
        for part in pv.load(path, key="x", label="kind", binarize=binarize):
            rows = part.given(part.x).to(dtype=torch.double).fixed().head(9).rows(torch.tensor([0, 1]))
            assert rows.label_names == ("cone", "gap", "rod")
    train, test = pv.load(path, validation=path, key="x", label="kind")
    assert [test.label_names[code] for code in test.labels] == kinds.tolist()
    assert train.label_names == test.label_names
    assert pv.load(path, key="x", label="half")[0].label_names[:2] == ("0.0", "0.5")
    assert pv.load(path, key="x", label="y")[0].label_names is None


def test_conditions_are_one_hot_or_standardized(tmp_path):
    path = save(tmp_path / "x.npz", x=np.ones((6, 1)), text=np.array(list("uvwuvw")), age=np.arange(6) * 7.5)
    whole = torch.cat([part.condition for part in pv.load(path, condition="text", key="x")])
    assert whole.sum(1).tolist() == [1] * 6
    assert whole.sum(0).tolist() == [2] * 3
    age = torch.cat([part.condition for part in pv.load(path, condition="age", key="x")])
    torch.testing.assert_close(age.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(age.std(correction=0), torch.tensor(1.0))
    other = save(tmp_path / "y.npz", x=np.ones((2, 1)), text=np.array(["u", "z"]))
    with pytest.raises(ValueError, match=r"y.npz: row 1 has the condition 'z', which no row for training"):
        pv.load(path, validation=other, condition="text", key="x")


def test_options_of_files_are_refused_for_data_sets():
    with pytest.raises(ValueError, match="label is for files"):
        pv.load("digits", label="y")
    with pytest.raises(ValueError, match=r"no data set 'dgits'.*or the path of a file"):
        pv.load("dgits")
    with pytest.raises(FileNotFoundError, match="pass the path of a file"):
        pv.load("./nothing.npy")


def test_sha256_of_a_folder_depends_on_names_and_contents(tmp_path):
    from pyro_vae.data.readers import digest

    own_files.images(tmp_path / "im")
    before = digest(tmp_path / "im")
    (tmp_path / "im" / "u" / "0.png").rename(tmp_path / "im" / "v" / "0.png")
    assert digest(tmp_path / "im") != before
    with pytest.raises(ValueError, match="im was changed"):
        data.read(tmp_path / "im", sha256=before)


# missing entries


def make_vae(standardize):
    mean, scale = torch.tensor([5.0, -3.0, 0.0]), torch.tensor([2.0, 10.0, 0.1])
    trunk = nets.MLP(3, (8,))
    return pv.VAE(
        priors.StandardNormal(2),
        conditionals.Normal(
            nets.MLP(2, (8,)),
            event_shape=3,
            standardize=nets.Standardize(mean, scale) if standardize else None,
        ),
        conditionals.Normal(
            nets.Preprocess(nets.Standardize(mean, scale), trunk) if standardize else trunk, event_shape=2
        ),
    )


def missing_data(n=30):
    x = torch.randn(n, 3) * torch.tensor([2.0, 10.0, 0.1]) + torch.tensor([5.0, -3.0, 0.0])
    mask = torch.rand(n, 3) > 0.3
    return x, mask


@pytest.mark.parametrize("standardize", [False, True])
def test_data_with_a_mask_are_the_arguments_of_the_model_by_name(standardize):
    vae, (x, mask) = make_vae(standardize), missing_data()
    whole = pv.Data(x.masked_fill(~mask, torch.nan), mask=mask)
    expected = pv.log_weights(vae.model, vae.guide, {"x": x, "mask": mask}, num_particles=3, seed=1)
    found = pv.log_weights(vae.model, vae.guide, whole, num_particles=3, seed=1)
    torch.testing.assert_close(found, expected)
    assert whole[:4].keys() == {"x", "mask"}
    loaded = torch.utils.data.DataLoader(whole, 7)
    torch.testing.assert_close(
        pv.log_weights(vae.model, vae.guide, loaded, num_particles=3, seed=1), expected
    )
    pv.fit(vae.model, vae.guide, whole, num_epochs=2, batch_size=10, progress=False)


def test_encoder_sees_the_mean_in_place_of_missing_entries():
    vae, (x, mask) = make_vae(True), missing_data()
    filled = torch.where(mask, x, torch.tensor([5.0, -3.0, 0.0]))
    assert torch.equal(vae.encode(x, mask=mask).mean, vae.encode(filled).mean)
    assert torch.equal(vae.encode(x.masked_fill(~mask, torch.nan), mask=mask).mean, vae.encode(filled).mean)


def test_missing_entries_need_a_model_with_a_mask():
    vae, (x, mask) = make_vae(False), missing_data()
    with pytest.raises(ValueError, match=r"entries are missing, but neither model nor guide takes mask"):
        pv.fit(lambda x: vae.model(x), lambda x: vae.guide(x), pv.Data(x, mask=mask), progress=False)
    with pytest.raises(ValueError, match="expected a bool mask of shape"):
        pv.Data(x, mask=mask[:, :2])


def test_rows_of_simulated_data_keep_the_mask():
    vae, (x, mask) = make_vae(True), missing_data(40)
    simulated = pv.evidence.simulate(vae.model, pv.Data(x, mask=mask))
    assert torch.equal(simulated.data["mask"], mask)
    assert not torch.equal(simulated.data["x"], x)


@pytest.mark.parametrize("family", [conditionals.Normal, conditionals.Laplace, conditionals.StudentT])
def test_standardized_likelihood_is_the_density_of_the_original_units(family):
    """log p(y) = log p((y − m)/s) − Σ log s, for the same networks."""
    torch.manual_seed(0)
    m, s = torch.tensor([5.0, -3.0, 0.0]), torch.tensor([2.0, 10.0, 0.1])
    plain = family(nets.MLP(2, (8,)), event_shape=3)
    scaled = family(nets.MLP(2, (8,)), event_shape=3, standardize=nets.Standardize(m, s))
    scaled.load_state_dict(plain.state_dict() | {"standardize.mean": m, "standardize.scale": s})
    z, y = torch.randn(50, 2), torch.randn(50, 3)
    torch.testing.assert_close(
        scaled(z).log_prob(m + s * y), plain(z).log_prob(y) - s.log().sum(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(scaled(z).mean, m + s * plain(z).mean)


def test_preprocessing_changes_the_first_input_only():
    trunk = nets.MLP(((3,), (2,)), (4,))
    x, c = torch.rand(5, 3), torch.rand(5, 2)
    both = nets.Preprocess(nets.Log1p(), trunk)
    assert (both.num_inputs, both.out_shape) == (2, (4,))
    torch.testing.assert_close(both(x, c), trunk(x.log1p(), c))
    assert nets.Log1p()(torch.arange(3)).tolist() == pytest.approx([0, math.log(2), math.log(3)])
