"""Seeds of parts of a computation, and random states that are restored after a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch


def stream_seed(seed: int, index: int = 0) -> int:
    """The seed of torch's generator for the ``index``-th part of the draws of a function with argument
    ``seed``.

    It differs from ``seed``. Otherwise a function with ``seed=0`` would have the same noise as data drawn
    after ``torch.manual_seed(0)``, and its first draws would be the latents that generated the data.
    """
    return ((seed ^ 0x9E3779B9) + 1_000_003 * index) % 2**32


@contextmanager
def restored_random_states(seed: int | None = None, index: int = 0) -> Iterator[None]:
    """Restore the random states of torch, Python and numpy after the block, which starts at ``seed`` if it is
    given, see :func:`stream_seed`."""
    state = pyro.util.get_rng_state()
    try:
        with torch.random.fork_rng():
            if seed is not None:
                pyro.set_rng_seed(stream_seed(seed, index))
            yield
    finally:
        pyro.util.set_rng_state(state)
