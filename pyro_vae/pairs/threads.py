"""Let one thread at a time run a pair, since all threads of a process share Pyro's param store and handlers
and the random state."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_training: dict[object, threading.Thread] = {}  # the thread of each fit that has not ended


@contextmanager
def exclusive() -> Iterator[None]:
    """A context that only one thread at a time can be in. Other threads wait.

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
                "and random state are shared by all threads; wait until that thread has finished its fit, or "
                "use another process"
            )
