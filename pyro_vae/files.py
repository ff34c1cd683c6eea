"""Files that are written whole or not at all."""

import os
import re
import tempfile
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside ``path`` and move it there, so that a crash leaves the old file or the new one.

    :raises OSError: with its ``errno``; the old file is then as it was.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)  # the name, too, is on the disk


def meant_for(name: str) -> str | None:
    """The file that a crash left half-written under this name; ``None`` for any other name."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", name)  # as tempfile makes them of the prefix above
    return found[1] if found else None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
