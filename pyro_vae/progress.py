"""Progress bars on stderr, or in a notebook."""

from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, progress: bool | None, *, rank: int = 0, **options: Any) -> tqdm:
    """A bar of :mod:`tqdm`.

    :param progress: whether rank 0 shows the bar; ``None`` for only on a terminal and in a notebook. Other
        ranks show none.
    :param options: of ``tqdm``, such as ``desc``.
    """
    disable = True if rank else None if progress is None else not progress
    return tqdm(total=total, disable=disable, **options)
