"""One thread at a time: Pyro's param store and handlers, and torch's random state, belong to the whole process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_training: dict[object, threading.Thread] = {}  # the fits that have begun and not ended, and their threads


@contextmanager
def exclusive() -> Iterator[None]:
    """Run the block while no other thread is in such a block.

    :raises RuntimeError: where another thread trains.
    """
    with _lock:
        _refuse_others("this call")
        yield


@contextmanager
def training() -> Iterator[None]:
    """The block, or what runs in it between the steps of a generator, trains.

    :raises RuntimeError: where another thread trains. Fits of one thread may alternate.
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
        if thread is not here and thread.is_alive():  # a fit whose thread has ended will not go on
            raise RuntimeError(
                f"{what}: thread {thread.name!r} of this process trains, and Pyro's param store, handlers and random state are "
                "shared by all threads; run it after that fit, or in a process of its own"
            )
