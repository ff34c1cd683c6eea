"""The checkpoints of a training run: the newest ones and the best one."""

import logging
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_vae.checkpoint.folder import MANIFEST, MismatchError, is_ours, read, read_manifest, remove, write
from pyro_vae.files import reserved

logger = logging.getLogger(__name__)
_KIND = "training run"
_NAME = re.compile(r"step-\d{8,}")
_NUM_NEWEST = 2  # a fit resumes from the second newest if the newest is damaged


class Checkpoints:
    """The checkpoints in ``folder``: subfolders such as ``step-00000120``. The two newest and the best are
    kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The paths of the complete checkpoints, oldest first."""
        return [path for path in self._candidates() if (path / MANIFEST).exists() and is_ours(path)]

    def _candidates(self) -> list[Path]:
        """All paths with the name of a checkpoint, oldest first."""
        return sorted((path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_steps)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Lock the folder for the block, so that only one fit saves to it.

        :raises BlockingIOError: if another process saves to the folder.
        :raises FileExistsError: in the cases of :meth:`check_ours`.
        """
        with reserved(self.folder):
            self.check_ours()
            yield

    def check_ours(self) -> None:
        """Raise ``FileExistsError`` if a path has the name of a checkpoint, but pyro_vae did not write it."""
        for path in self._candidates():
            if not is_ours(path):
                raise FileExistsError(
                    f"{path} is not a checkpoint of pyro_vae, so it is not replaced; move it away, or pass "
                    "another folder"
                )

    def check_free(self) -> None:
        """Raise ``FileExistsError`` if the folder has checkpoints."""
        if self.paths():
            raise FileExistsError(
                f'{self.folder} holds checkpoints already; pass resume="last" to continue from them, or pass '
                "another folder"
            )

    def save(self, steps: int, content: Any, *, score: float) -> None:
        """Save the checkpoint of a step, and delete all checkpoints except the two newest and the best.

        :param score: the checkpoint with the highest score is the best. ``-inf`` means that there is no
            score.
        :raises OSError: if writing fails, with ``errno`` set. Earlier checkpoints are unchanged.
        """
        path = self.folder / f"step-{steps:08d}"
        try:
            write(path, _KIND, content, score=score)
        except BaseException:
            if not (path / MANIFEST).exists():
                remove(path)
            raise
        self._delete_old()

    def last(self) -> tuple[Path, Any] | None:
        """Path and content of the newest valid checkpoint; ``None`` if there are no checkpoints.

        :raises ValueError: if all checkpoints are damaged.
        """
        return self._first_valid(list(reversed(self.paths())))

    def best(self) -> tuple[Path, Any] | None:
        """Path and content of the valid checkpoint with the highest score; of several, the newest. ``None``
        if no checkpoint has a score.

        :raises ValueError: if all checkpoints with a score are damaged.
        """
        scored = [(score, path) for path in self.paths() if (score := _score(path)) > -math.inf]
        return self._first_valid([path for _, path in sorted(scored, reverse=True)])

    def go_on_from(self, path: Path) -> None:
        """Rename the checkpoints that are newer than ``path``, so that a fit that resumes from
        ``path`` does not use them.

        :raises FileExistsError: if ``path`` is in another folder, and this folder has checkpoints.
        """
        if path.parent.resolve() != self.folder.resolve():
            self.check_free()
            return
        for newer in self.paths():
            if _steps(newer) > _steps(path):
                newer.rename(newer.with_name(f"aside-{newer.name}-{time.time_ns()}"))

    def _first_valid(self, paths: list[Path]) -> tuple[Path, Any] | None:
        last_error: ValueError | None = None
        for path in paths:
            try:
                return path, read_checkpoint(path)
            except MismatchError:
                raise
            except ValueError as error:
                logger.warning("%s; trying another checkpoint", error)
                last_error = error
        if last_error is not None:
            raise last_error
        return None

    def _delete_old(self) -> None:
        """Delete all checkpoints except the two newest and the best. Incomplete checkpoints, which crashes
        leave behind, are deleted too."""
        paths = self.paths()
        best = max(paths, key=_score)
        keep = {*paths[-_NUM_NEWEST:], *([best] if _score(best) > -math.inf else [])}
        for path in self._candidates():
            if path not in keep:
                remove(path)

    def remove_all(self) -> None:
        """Delete all checkpoints, including those that :meth:`go_on_from` renamed. Delete the folder if it is
        then empty."""
        for path in (*self._candidates(), *self.folder.glob("aside-step-*")):
            remove(path)
        with suppress(OSError):
            self.folder.rmdir()


def _steps(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint.

    :raises FileNotFoundError: if nothing is stored at ``path``.
    :raises ValueError: if a file is damaged or missing; ``MismatchError`` if a newer version of pyro_vae
        wrote it.
    """
    return read(path, _KIND)


def _score(path: Path) -> float:
    try:
        return read_manifest(path, _KIND)["about"]["score"]
    except (ValueError, FileNotFoundError, KeyError, TypeError):
        return -math.inf
