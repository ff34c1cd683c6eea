"""Delay SIGINT and SIGTERM until a consistent state is reached."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_pending: int | None = None  # the number of the delayed signal
_may_poll = False  # whether `poll` and `interruptible` may raise
_raise_at_once = False  # whether the handler raises `Interrupted`: true in an `interruptible` block


class Interrupted(KeyboardInterrupt):
    """Raised to end the current work early, because a delayed signal is pending."""


@contextmanager
def deferred(*, anywhere: bool = True) -> Iterator[None]:
    """Delay the first SIGINT or SIGTERM to the end of the block. The handler that was installed before the
    block then receives the signal. A second signal kills the process.

    Code in the block may raise :class:`Interrupted` to end the block early when a signal is pending. Outside
    the main thread, this context manager does nothing: Python runs signal handlers only in the main thread.

    :param anywhere: whether :func:`poll` and :func:`interruptible` raise :class:`Interrupted` in the block.
        If false, they do nothing.
    """
    global _pending, _may_poll
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_nested = _delay in previous.values()
    # getsignal returns None for a handler that was not installed from Python, which cannot be restored
    if not in_main_thread or is_nested or None in previous.values():
        yield
        return
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # a background job of a shell goes on ignoring SIGINT
            signal.signal(number, _delay)
    _may_poll = anywhere
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        received, _pending, _may_poll = _pending, None, False
        if received is not None:
            signal.raise_signal(received)


def poll() -> None:
    """Raise :class:`Interrupted` if a signal is pending."""
    if _may_poll and _pending is not None:
        raise Interrupted


def waiting() -> bool:
    """Whether a signal is pending."""
    return _pending is not None


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interrupted` as soon as a signal arrives in the block. Use it only for work without side
    effects, since the block may stop at any point."""
    global _raise_at_once
    poll()
    before, _raise_at_once = _raise_at_once, True
    try:
        yield
    finally:
        _raise_at_once = before


def _delay(number: int, _: FrameType | None) -> None:
    """The signal handler in a :func:`deferred` block."""
    global _pending
    if _pending is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _pending = number
    if _may_poll and _raise_at_once:
        raise Interrupted
