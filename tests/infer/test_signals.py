"""SIGINT and SIGTERM are delayed until a checkpoint is saved, and then take effect."""

import os
import signal
import threading

import pytest

from pyro_vae.checkpoint import Checkpoints
from pyro_vae.infer import SVI
from pyro_vae.infer.resume import CheckpointManager
from tests.support.fits import assert_same, run, run_until_step


@pytest.fixture(autouse=True)
def _default_handlers():
    """A background command of a script ignores SIGINT, which its child processes inherit."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_its_handler_after_a_checkpoint_is_saved(tmp_path, monkeypatch, number):
    whole = run()
    after_step, seen = CheckpointManager.after_step, []
    before = signal.signal(number, lambda *_: seen.append(len(Checkpoints(tmp_path).paths())))

    def send_signal(self):
        if self.position.num_steps == 8:
            os.kill(os.getpid(), number)
        after_step(self)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointManager, "after_step", send_signal)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=tmp_path)
        assert seen == [2]  # one call of the user's handler, after the checkpoints of epoch 1 and of step 9
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(number, before)
    assert Checkpoints(tmp_path).paths()[-1].name == "step-00000009"
    assert_same(run(checkpoint=tmp_path, resume="last"), whole)


def test_a_fit_interrupted_while_a_graph_is_traced_resumes_bitwise_equal(tmp_path, monkeypatch):
    """The minibatch of the interrupted step is drawn again."""
    whole = run(compile="trace")
    run_until_step(monkeypatch, 6, checkpoint=tmp_path, compile="trace")
    build = SVI._build

    def send_signal(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        build(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SVI, "_build", send_signal)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path, resume="last", compile="trace")
    assert_same(run(checkpoint=tmp_path, resume="last", compile="trace"), whole)


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    after_step = CheckpointManager.after_step
    monkeypatch.setattr(
        CheckpointManager, "after_step", lambda self: (os.kill(os.getpid(), signal.SIGINT), after_step(self))
    )
    try:
        run(num_epochs=1, checkpoint=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_checkpoints_signal_handlers_are_unchanged(monkeypatch):
    handlers = set()
    monkeypatch.setattr(
        CheckpointManager, "after_step", lambda self: handlers.add(signal.getsignal(signal.SIGINT))
    )
    run(num_epochs=1)
    assert handlers == {signal.getsignal(signal.SIGINT)}


def test_a_fit_with_checkpoints_outside_the_main_thread_equals_one_in_it(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(checkpoint=tmp_path, num_epochs=2)))
    thread.start()
    thread.join()
    assert_same(results[0], run(num_epochs=2))
