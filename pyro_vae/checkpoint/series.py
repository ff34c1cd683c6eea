"""The checkpoints of a training run, the newest and the best of them."""

import logging
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

from pyro_vae.checkpoint.folder import MANIFEST, MismatchError, read, read_manifest, write

logger = logging.getLogger(__name__)
_KIND = "training run"
_NAME = re.compile(r"step-\d{8,}")
_KEPT = 2  # so that where the newest is damaged there is another


class Checkpoints:
    """Folders ``step-00000120``, … in one folder: the newest two, and that of the highest score."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Those that were written to their end, oldest first."""
        found = (
            manifest.parent for manifest in self.folder.glob(f"step-*/{MANIFEST}") if _NAME.fullmatch(manifest.parent.name)
        )
        return sorted(found, key=_steps)

    def check_free(self) -> None:
        """Raise ``FileExistsError`` where there are some already."""
        if self.paths():
            raise FileExistsError(
                f'{self.folder} holds checkpoints already; pass resume="last" to go on from them, or name another folder'
            )

    def save(self, steps: int, content: Any, *, score: float) -> None:
        """:param score: what "best" goes by; ``-inf`` for none.

        :raises OSError: with its ``errno``; those written before are then still there.
        """
        path = self.folder / f"step-{steps:08d}"
        try:
            write(path, _KIND, content, score=score)
        except BaseException:
            if not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)
            raise
        self._sweep()

    def last(self) -> tuple[Path, Any] | None:
        """The newest that is sound, and what it holds; ``None`` where there is none at all.

        :raises ValueError: where there are some, and all are damaged.
        """
        return self._first_sound(list(reversed(self.paths())))

    def best(self) -> tuple[Path, Any] | None:
        """That of the highest score, the newest of equals; as :meth:`last`."""
        scored = [(score, path) for path in self.paths() if (score := _score(path)) > -math.inf]
        return self._first_sound([path for _, path in sorted(scored, reverse=True)])

    def go_on_from(self, path: Path) -> None:
        """Set those aside that come after ``path``, or all where it is none of these."""
        if path.parent.resolve() != self.folder.resolve():
            self.check_free()
            return
        for other in self.paths():
            if _steps(other) > _steps(path):
                other.rename(other.with_name(f"aside-{other.name}-{time.time_ns()}"))

    def _first_sound(self, paths: list[Path]) -> tuple[Path, Any] | None:
        damage: ValueError | None = None
        for path in paths:
            try:
                return path, read_checkpoint(path)
            except MismatchError:
                raise
            except ValueError as error:
                logger.warning("%s; going back to the one before", error)
                damage = error
        if damage is not None:
            raise damage
        return None

    def _sweep(self) -> None:
        paths = self.paths()
        best = max(paths, key=_score)
        kept = {*paths[-_KEPT:], *([best] if _score(best) > -math.inf else [])}
        for path in self.folder.glob("step-*"):
            if path not in kept and _NAME.fullmatch(path.name) and path.is_dir():
                (path / MANIFEST).unlink(missing_ok=True)  # first, so that what is left is not taken for whole
                shutil.rmtree(path, ignore_errors=True)


def _steps(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> Any:
    """What one of them holds; raises as :func:`~pyro_vae.checkpoint.folder.read`."""
    return read(path, _KIND)


def _score(path: Path) -> float:
    try:
        return read_manifest(path, _KIND)["about"]["score"]
    except (ValueError, FileNotFoundError, KeyError, TypeError):
        return -math.inf
