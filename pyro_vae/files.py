"""Files that are written whole or not at all, folders that one process holds, and reading folders that others made.

Nothing here follows a symbolic link at the end of a path: a folder that was received leads nowhere else.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

LOCK = ".lock"  # holds the process id of who writes to the folder
LIST = ".written.json"  # the files that pyro-vae wrote to the folder, by their SHA-256
MAX_TEXT = 2**28  # bytes of a text that is read into memory


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


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file itself, not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def check_no_link(path: Path) -> Path:
    """``path``. Raises ``ValueError`` where it is a symbolic link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which is not followed out of its folder; replace it by what it links to")
    return path


def read_bytes(path: Path, *, max_bytes: int = MAX_TEXT) -> bytes:
    """The content of a regular file.

    :raises FileNotFoundError: where there is none.
    :raises ValueError: for a link, a device, a pipe or a folder, and for more than ``max_bytes``.
    """
    mode = check_no_link(path).lstat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not a regular file; replace it or delete it")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if (size := os.fstat(descriptor).st_size) > max_bytes:
            raise ValueError(f"{path} has {size} bytes; expected at most {max_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)


def parse_json(text: bytes | str) -> Any:
    """A JSON text in UTF-8. Raises ``ValueError`` for NaN, infinity, a repeated key, and too deep a nesting."""
    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word[:20]} is no finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


@contextmanager
def reserved(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """A folder to which this process alone writes, for the block. It is made where it is missing, and removed again if nothing
    was put in it.

    :param numbered: take ``path-2``, ``path-3``, … where ``path`` exists.
    :raises BlockingIOError: where another process holds the folder.
    """
    made: list[Path] = []
    try:
        for parent in reversed(path.parents):
            _make(parent, made)
        if numbered:
            path = next(one for one in _numbered(path) if _make(one, made))
        elif not _make(path, made) and not path.is_dir():
            raise FileExistsError(f"{path} exists already and is not a folder; name another by --out")
        with locked(path):
            yield path
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _make(folder: Path, made: list[Path]) -> bool:
    """Whether the folder was missing, and is made."""
    if os.path.lexists(folder):
        return False
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    made.append(folder)
    return True


def _numbered(path: Path) -> Iterator[Path]:
    return (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))


_held: dict[tuple[int, int], int] = {}  # files that this process has locked; a fork inherits the table but not the locks
_one_at_a_time = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, for the block.

    :raises BlockingIOError: where another process holds it, or this one already does.
    """
    file = folder / LOCK
    with _one_at_a_time:
        descriptor, key = _lock(file)
        _held[key] = os.getpid()
    try:
        yield
    finally:
        with _one_at_a_time:
            with suppress(OSError):
                file.unlink()  # while it is still locked
            _held.pop(key, None)
            os.close(descriptor)


def _lock(file: Path) -> tuple[int, tuple[int, int]]:
    while True:
        if os.path.lexists(file):
            with suppress(FileNotFoundError):
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{file} is not a regular file; delete it")
                if _held.get((status.st_dev, status.st_ino)) == os.getpid():  # to open it would release the lock
                    raise BlockingIOError(
                        f"{file.parent} is in use by this process already; wait for that fit to end, or name another folder"
                    )
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            if os.path.samestat(status, os.stat(file, follow_symlinks=False)):  # not one that its holder has just deleted
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor, (status.st_dev, status.st_ino)
        except (BlockingIOError, PermissionError):
            pid = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(
                f"{file.parent} is in use by process {pid or 'of unknown number'}; wait for it to end, or name another folder"
            ) from None
        except OSError:  # such as a full disk
            with suppress(OSError):
                file.unlink()
            os.close(descriptor)
            raise
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def put(path: Path, content: bytes) -> None:
    """Write a file whole, and list it as one that pyro-vae wrote.

    :raises FileExistsError: where something else is at ``path``.
    """
    listed = written(path.parent)
    if os.path.lexists(path) and not is_listed(path, listed):
        raise FileExistsError(f"{path} was not written by pyro-vae, so it is not overwritten; move it away")
    write_whole(path, content)
    listed[path.name] = hashlib.sha256(content).hexdigest()
    write_whole(path.parent / LIST, (json.dumps(listed, indent=1) + "\n").encode())


def written(folder: Path) -> dict[str, str]:
    """Names and SHA-256 of the files that pyro-vae wrote to a folder; none where it has no list."""
    try:
        found = parse_json(read_bytes(folder / LIST))
    except (OSError, ValueError):
        return {}
    plain = isinstance(found, dict) and all(isinstance(total, str) for total in found.values())
    return {name: total for name, total in found.items() if os.path.basename(name) == name} if plain else {}


def is_listed(path: Path, listed: dict[str, str]) -> bool:
    """Whether a file is as pyro-vae wrote it."""
    return is_file(path) and path.name in listed and sum_of(path) == listed[path.name]


def remove_listed(folder: Path) -> None:
    """Delete the files that pyro-vae wrote to a folder, and the folder if nothing else is in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    listed = written(folder)
    for name in listed:
        if is_listed(folder / name, listed):
            (folder / name).unlink()
    if listed:
        (folder / LIST).unlink()
    for entry in folder.iterdir():
        if meant_for(entry.name) in (LIST, *listed) and is_file(entry):
            entry.unlink()
    with suppress(OSError):
        folder.rmdir()


def sum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
