"""The checkpoints of a training run, the newest and the best of them."""

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
_KEPT = 2  # so that where the newest is damaged there is another


class Checkpoints:
    """Folders ``step-00000120``, … in one folder: the newest two, and that of the highest score."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Those that were written to their end, oldest first."""
        return [path for path in self._named() if (path / MANIFEST).exists() and is_ours(path)]

    def _named(self) -> list[Path]:
        """All that bear the name of one, oldest first."""
        return sorted((path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_steps)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the folder, for the block: a fit that saves here is the only one.

        :raises BlockingIOError: where another process saves here.
        :raises FileExistsError: where the folder has something of others under the name of a checkpoint.
        """
        with reserved(self.folder):
            self.check_ours()
            yield

    def check_ours(self) -> None:
        """Raise ``FileExistsError`` where something else bears the name of a checkpoint, which would be replaced one day."""
        for path in self._named():
            if not is_ours(path):
                raise FileExistsError(
                    f"{path} is not a checkpoint of pyro_vae, so it is not replaced; move it away, or name another folder"
                )

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
                remove(path)
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
        for path in self._named():
            if path not in kept:
                remove(path)

    def remove_all(self) -> None:
        """Delete every checkpoint, those set aside too, and the folder if nothing else is in it."""
        for path in (*self._named(), *self.folder.glob("aside-step-*")):
            remove(path)
        with suppress(OSError):
            self.folder.rmdir()


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
