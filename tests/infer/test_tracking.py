"""Experiment trackers get the metrics of each epoch, and cannot stop training."""

import logging
import sys

import pytest
import torch

import pyro_vae as pv
from pyro_vae import infer
from pyro_vae.infer import IWAE, metrics_of
from tests.faults import small


class Recorded:
    def __init__(self):
        self.records = []

    def log(self, metrics, step):
        self.records.append((step, dict(metrics)))

    def figure(self, name, figure, step):
        pass

    def close(self):
        pass


class Failing(Recorded):
    def log(self, metrics, step):
        raise ConnectionError("no network")


def train(**options):
    """A fit of 34 steps per epoch, eager."""
    return small.train(compile=False, **options)


def test_a_tracker_gets_the_metrics_of_each_epoch():
    tracker = Recorded()
    _, history = train(num_epochs=3, tracker=tracker)
    assert tracker.records == [(34 * e.epoch, metrics_of(e)) for e in history.epochs]
    first = tracker.records[0][1]
    assert first["train/elbo"] == history.epochs[0].train.elbo
    assert first["validation/kl"] == history.epochs[0].validation.kl
    assert {"epoch", "beta", "seconds"} <= first.keys()
    assert not [name for name in first if "bound" in name or "mutual" in name]


def test_metrics_of_an_objective_have_its_bound_and_effective_sample_size(monkeypatch):
    monkeypatch.setitem(small.LOSSES, "bound", lambda: IWAE(3))
    _, history = train(loss="bound", num_epochs=1)
    metrics = metrics_of(history.epochs[0])
    assert metrics["train/bound"] > metrics["train/elbo"]
    assert 1 <= metrics["validation/ess"] <= 3


def test_a_tracker_that_fails_is_logged_and_does_not_change_training(caplog):
    with caplog.at_level(logging.WARNING, "pyro_vae"):
        vae, history = train(num_epochs=2, tracker=Failing())
    assert [record.message for record in caplog.records if "tracker" in record.message] == [
        f"fit: the tracker failed at epoch {i}: ConnectionError: no network; training goes on" for i in (1, 2)
    ]
    expected, _ = train(num_epochs=2)
    assert len(history.epochs) == 2
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), expected.parameters(), strict=True))


def test_a_resumed_fit_continues_in_the_same_folder(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for num_epochs in (2, 4):
        tracker, vae, x = infer.TensorBoard(tmp_path / "board"), small.make_vae(), small.make_data()
        history = pv.fit(
            vae.model, vae.guide, x[:1000], validation=x[1000:], batch_size=30, num_epochs=num_epochs,
            checkpoint=tmp_path / "saved", resume="last", tracker=tracker,
        )  # fmt: skip
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name, values in (
        ("train/elbo", [e.train.elbo for e in history.epochs]),
        ("validation/elbo", [e.validation.elbo for e in history.epochs]),
    ):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [34, 68, 102, 136]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=1e-6)


def test_objects_that_are_no_trackers_raise():
    with pytest.raises(ValueError, match=r"tracker is a str; expected .* log, figure and close"):
        train(num_epochs=1, tracker="runs")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        infer.TensorBoard(tmp_path)
