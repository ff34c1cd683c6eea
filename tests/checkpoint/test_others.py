"""Files of other tools are unchanged, folders are locked, and received plans and files are limited in
size."""

import gc
import os
import subprocess
import sys

import pytest
import torch

import pyro_vae as pv
from pyro_vae import checkpoint, files
from pyro_vae.checkpoint import Checkpoints
from pyro_vae.checkpoint import folder as stored
from tests.faults import received, small


@pytest.mark.parametrize("name", ["model.pt", "manifest.json", "0123456789abcdef.txt", ".hidden"])
@pytest.mark.parametrize("resume", [None, "last"])
def test_folder_of_another_tool_with_a_checkpoint_name_raises_and_is_unchanged(tmp_path, name, resume):
    other = tmp_path / "step-00001000"
    other.mkdir()
    (other / name).write_text("precious")
    with pytest.raises(FileExistsError, match=r"step-00001000 is not a checkpoint of pyro_vae"):
        small.train(num_epochs=1, compile=False, checkpoint=tmp_path, resume=resume)
    assert [file.name for file in tmp_path.rglob("*")] == ["step-00001000", name]
    assert (other / name).read_text() == "precious"


def test_link_to_a_checkpoint_raises_and_its_target_is_unchanged(tmp_path):
    small.train(num_epochs=1, compile=False, checkpoint=tmp_path / "there")
    (path,) = Checkpoints(tmp_path / "there").paths()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / path.name).symlink_to(path)
    with pytest.raises(FileExistsError, match="is not a checkpoint"):
        small.train(num_epochs=2, compile=False, checkpoint=tmp_path / "here", resume="last")
    assert Checkpoints(tmp_path / "there").paths() == [path]


def test_user_file_in_a_deleted_checkpoint_is_unchanged(tmp_path):
    series = Checkpoints(tmp_path)
    series.save(1, {"a": torch.ones(2)}, score=0.0)
    (series.paths()[0] / "notes.txt").write_text("mine")
    for steps in range(2, 6):
        series.save(steps, {"a": torch.ones(2)}, score=float(steps))
    assert [file.name for file in (tmp_path / "step-00000001").iterdir()] == ["notes.txt"]
    assert [path.name for path in series.paths()] == ["step-00000004", "step-00000005"]


def test_tensor_file_of_another_tool_is_unchanged(tmp_path):
    user_file = tmp_path / "0123456789abcdef.safetensors"
    user_file.write_bytes(b"precious")
    for _ in range(2):
        checkpoint.save(tmp_path, small.make_vae(torch.initial_seed() % 7))
    assert user_file.read_bytes() == b"precious"


def test_manifest_of_another_tool_is_not_replaced(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "my web page"}')
    with pytest.raises(FileExistsError, match="was not written by pyro_vae"):
        checkpoint.save(tmp_path, small.make_vae())
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_second_fit_in_a_folder_raises_until_the_first_ends(tmp_path):
    vae, x = small.make_vae(), small.make_data(20)
    first = pv.infer.train(vae.model, vae.guide, x, num_epochs=3, checkpoint=tmp_path / "a", progress=False)
    next(first)
    with pytest.raises(BlockingIOError, match="in use by this process already"):
        pv.fit(
            vae.model, vae.guide, x, num_epochs=1, checkpoint=tmp_path / "a", resume="last", progress=False
        )
    program = (
        "import sys, pathlib; from pyro_vae import files\nwith files.locked(pathlib.Path(sys.argv[1])): pass"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True
    )
    assert f"in use by process {os.getpid()}" in other.stderr
    first.close()
    gc.collect()
    assert not (tmp_path / "a" / files.LOCK).exists()
    pv.fit(vae.model, vae.guide, x, num_epochs=2, checkpoint=tmp_path / "a", resume="last", progress=False)


def test_lock_of_a_killed_process_is_released(tmp_path):
    program = (
        "import os, sys, pathlib; from pyro_vae import files\n"
        "with files.locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    assert (tmp_path / files.LOCK).exists()
    with files.locked(tmp_path):
        pass
    assert not (tmp_path / files.LOCK).exists()


def test_empty_reserved_folder_is_removed(tmp_path):
    vae = small.make_vae()
    with pytest.raises(ValueError, match="row"):
        pv.fit(
            vae.model,
            vae.guide,
            torch.full((20, 4), torch.nan),
            num_epochs=1,
            checkpoint=tmp_path / "a" / "b",
        )
    assert not list(tmp_path.iterdir())
    with (
        files.reserved(tmp_path / "a", numbered=True) as first,
        files.reserved(tmp_path / "a", numbered=True) as second,
    ):
        (second / "x").touch()
    assert (first.name, second.name) == ("a", "a-2")
    assert os.listdir(tmp_path) == ["a-2"]


@pytest.mark.parametrize(
    ("class_name", "kwargs"),
    [
        ("linear.Linear", {"in_features": 2**15, "out_features": 2**15}),
        ("conv.Conv2d", {"in_channels": 2**14, "out_channels": 2**14, "kernel_size": 3}),
        ("sparse.Embedding", {"num_embeddings": 2**40, "embedding_dim": 1}),
        ("rnn.LSTM", {"input_size": 1, "hidden_size": 2**14}),
        ("rnn.GRU", {"input_size": 1, "hidden_size": 1, "num_layers": 10**7}),
    ],
)
def test_plan_that_is_larger_than_its_parameters_raises(tmp_path, class_name, kwargs):
    stored.write(
        tmp_path,
        "pair",
        {
            "plan": [[f"torch.nn.modules.{class_name}", (), {"dict": kwargs}]],
            "weights": {"a": torch.zeros(1)},
        },
    )
    with pytest.raises(ValueError, match="far larger than the parameters"):
        checkpoint.load(tmp_path)


def test_large_pair_loads_within_the_memory_limit(tmp_path):
    layer = torch.nn.Linear(3000, 3000)
    vae = pv.VAE(
        pv.priors.StandardNormal(3000),
        pv.conditionals.Normal(torch.nn.Sequential(pv.nets.MLP(3000, (3000,)), layer), event_shape=3000),
        pv.conditionals.Normal(pv.nets.MLP(3000, (30,)), event_shape=3000),
    )
    checkpoint.save(tmp_path, vae)
    assert torch.equal(checkpoint.load(tmp_path).state_dict()["model.decoder.trunk.1.weight"], layer.weight)


def test_size_of_a_file_is_checked_before_it_is_read(tmp_path, monkeypatch):
    stored.write(tmp_path, "pair", {"plan": None, "weights": {}})
    received.extend_tensor_file(tmp_path)
    monkeypatch.setattr(
        stored, "read_bytes", lambda file, **kw: files.read_bytes(file) if file.suffix == ".json" else 1 / 0
    )
    with pytest.raises(ValueError, match="damaged: it has 68719476736 bytes"):
        checkpoint.load(tmp_path, lambda: None)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "NaN", "-Infinity", "1e999", "1" * 5000, '{"a": 1, "a": 2}', b"\xff", "{", ""],
    ids=lambda text: repr(text[:8]),
)
def test_parse_json_raises_for_invalid_text(text):
    with pytest.raises(ValueError):  # noqa: PT011
        files.parse_json(text)
    assert files.parse_json('{"é": [1, -0.5, null]}'.encode()) == {"é": [1, -0.5, None]}
