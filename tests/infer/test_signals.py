"""SIGINT and SIGTERM wait for a checkpoint; Pyro and torch are otherwise left as they are."""

import os
import signal
import threading

import pytest

from pyro_vae.checkpoint import Checkpoints
from pyro_vae.infer import SVI
from pyro_vae.infer.resume import CheckpointManager
from tests.support.fits import assert_same, run, stopped_after


@pytest.fixture(autouse=True)
def _default_handlers():
    """A command that a script starts in the background ignores SIGINT, and its children inherit that."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_a_checkpoint_and_goes_where_it_was_to_go(tmp_path, monkeypatch, number):
    whole = run()
    after_step, seen = CheckpointManager.after_step, []
    before = signal.signal(number, lambda *_: seen.append(len(Checkpoints(tmp_path).paths())))

    def sent(self):
        if self.position.num_steps == 8:
            os.kill(os.getpid(), number)
        after_step(self)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointManager, "after_step", sent)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=tmp_path)
        assert seen == [2]  # the user's own handler, once, after that of epoch 1 and that of step 9
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(number, before)
    assert Checkpoints(tmp_path).paths()[-1].name == "step-00000009"
    assert_same(run(checkpoint=tmp_path, resume="last"), whole)


def test_a_signal_while_the_first_graph_of_an_epoch_is_built(tmp_path, monkeypatch):
    """Its minibatch has been drawn by then, and is drawn again."""
    whole = run(compile="trace")
    stopped_after(monkeypatch, 6, checkpoint=tmp_path, compile="trace")
    build = SVI._build

    def sent(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        build(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SVI, "_build", sent)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path, resume="last", compile="trace")
    assert_same(run(checkpoint=tmp_path, resume="last", compile="trace"), whole)


def test_a_signal_that_nobody_hears_is_not_heard(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    after_step = CheckpointManager.after_step
    monkeypatch.setattr(
        CheckpointManager, "after_step", lambda self: (os.kill(os.getpid(), signal.SIGINT), after_step(self))
    )
    try:
        run(num_epochs=1, checkpoint=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_checkpoint_signals_are_left_alone(monkeypatch):
    handlers = set()
    monkeypatch.setattr(
        CheckpointManager, "after_step", lambda self: handlers.add(signal.getsignal(signal.SIGINT))
    )
    run(num_epochs=1)
    assert handlers == {signal.getsignal(signal.SIGINT)}


def test_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(checkpoint=tmp_path, num_epochs=2)))
    thread.start()
    thread.join()
    assert_same(found[0], run(num_epochs=2))
