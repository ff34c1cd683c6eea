"""SIGINT and SIGTERM while something is at work that is not to be cut in the middle."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HANDLED = (signal.SIGINT, signal.SIGTERM)
_waits: int | None = None  # the signal that came
_heard = False  # whether others than who deferred it may raise it
_anywhere = False  # whether the work may be cut wherever it is


class Interrupted(KeyboardInterrupt):
    """A signal waits: the work that it interrupts is to be put away."""


@contextmanager
def deferred(*, anywhere: bool = True) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM wait until the block raises :class:`Interrupted` for it, at the latest
    until its end; then it goes where it would have gone. A second one kills the process. Outside the main
    thread Python hands out no signals.

    :param anywhere: whether :func:`poll` and :func:`interruptible` may raise; else only the block itself
    does.
    """
    global _waits, _heard
    before = {number: signal.getsignal(number) for number in _HANDLED}
    ours = threading.current_thread() is threading.main_thread() and _wait not in before.values()
    if not ours or None in before.values():  # a handler that is not Python's could not be put back
        yield
        return
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a job in the background hears no SIGINT
            signal.signal(number, _wait)
    _heard = anywhere
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        came, _waits, _heard = _waits, None, False
        if came is not None:
            signal.raise_signal(came)


def poll() -> None:
    """Raise :class:`Interrupted` where a signal waits."""
    if _heard and _waits is not None:
        raise Interrupted


def waiting() -> bool:
    """Whether a signal waits."""
    return _waits is not None


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, work that leaves no mark, a signal need not wait: :class:`Interrupted` is raised
    wherever it comes."""
    global _anywhere
    poll()
    before, _anywhere = _anywhere, True
    try:
        yield
    finally:
        _anywhere = before


def _wait(number: int, _: FrameType | None) -> None:
    global _waits
    if _waits is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _waits = number
    if _heard and _anywhere:
        raise Interrupted
