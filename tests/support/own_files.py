"""Small files of users' data, one function for each format."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

CSV = "a,b,c,group\n" + "".join(f"{i % 7},{3 * i % 5},{i % 3},{'uvw'[i % 3]}\n" for i in range(60))


def rows(seed=0):
    return np.random.default_rng(seed)


def npy(path):
    np.save(path, rows().normal(size=(60, 4)).astype(np.float32) * [1, 10, 100, 1000] + [0, 5, 0, 1e4])


def npz(path):
    np.savez(path, x=rows().integers(0, 9, (60, 4)), y=rows().integers(0, 3, 60))


def safetensors(path):
    save_file({"x": rows().uniform(size=(60, 4, 4)).astype(np.float32), "y": np.arange(60) % 2}, path)


def csv(path):
    pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    path.write_text(CSV)


def csv_with_missing_entries(path):
    pytest.importorskip("pyarrow", reason="pyarrow reads CSV")
    lines = [f"{i % 7 - 3.5},{'' if i % 4 == 0 else 1e4 + 10 * (i % 5)},{'uvw'[i % 3]}" for i in range(60)]
    path.write_text("a,b,group\n" + "\n".join(lines) + "\n")


def parquet(path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet")
    from pyarrow import parquet

    columns = {"a": [i % 2 for i in range(60)], "b": [i % 3 == 0 for i in range(60)]}
    parquet.write_table(arrow.table(columns | {"group": ["uvw"[i % 3] for i in range(60)]}), path)


def h5ad(path):
    pytest.importorskip("anndata", reason="anndata reads .h5ad")
    h5py = pytest.importorskip("h5py")
    from scipy.sparse import csr_matrix

    x = csr_matrix(rows().poisson(1.0, (60, 5)).astype(np.float32))
    with h5py.File(path, "w") as file:  # as anndata writes it
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": x.shape})
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(x, name)
        for name, n in (("obs", 60), ("var", 5)):
            group = file.create_group(name)
            group["_index"] = [f"{name}{i}" for i in range(n)]
            group["group"] = np.arange(n) % 3
            group.attrs.update(
                {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
            )
            group.attrs["column-order"] = ["group"]
            group["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
            group["group"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def image_bytes(size=(6, 6), seed=0):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rows(seed=seed).integers(0, 255, size, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def images(path):
    pytest.importorskip("PIL", reason="pillow reads images")
    for i in range(30):
        folder = path / "uvw"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(image_bytes(seed=i))


# name of the file: its writer, options of the command line, and the likelihood that is chosen
ALL = {
    "real.npy": (npy, (), "normal"),
    "counts.npz": (npz, ("--label", "y"), "negative-binomial"),
    "grey.safetensors": (safetensors, ("--key", "x", "--condition", "y"), "continuous-bernoulli"),
    "counts.csv": (csv, ("--label", "group"), "negative-binomial"),
    "missing.csv": (csv_with_missing_entries, ("--condition", "group"), "normal"),
    "binary.parquet": (parquet, ("--label", "group"), "bernoulli"),
    "cells.h5ad": (h5ad, ("--condition", "group"), "negative-binomial"),
    "images": (images, ("--image-size", "5"), "continuous-bernoulli"),
}


def config_of(run):
    return json.loads((run / "config.json").read_text())
