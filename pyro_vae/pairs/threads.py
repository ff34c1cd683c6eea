"""One thread at a time: the param store, the handlers and the random state are shared by all threads of a
process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_training: dict[object, threading.Thread] = {}  # the thread of each fit that has not ended


@contextmanager
def exclusive() -> Iterator[None]:
    """Run the block while no other thread is in such a block.

    :raises RuntimeError: if another thread trains.
    """
    with _lock:
        _refuse_others("this call")
        yield


@contextmanager
def training() -> Iterator[None]:
    """Mark the current thread as training until the block ends. Several fits of one thread may alternate.

    :raises RuntimeError: if another thread trains.
    """
    fit = object()
    with _lock:
        _refuse_others("fit")
        _training[fit] = threading.current_thread()
    try:
        yield
    finally:
        _training.pop(fit, None)


def _refuse_others(what: str) -> None:
    here = threading.current_thread()
    for thread in list(_training.values()):
        if thread is not here and thread.is_alive():  # the fit of a thread that ended will not continue
            raise RuntimeError(
                f"{what}: thread {thread.name!r} of this process trains, and Pyro's param store, handlers "
                "and random state are shared by all threads; run it after that fit, or in a process of its "
                "own"
            )
