"""Atomic file writes, folder locks, and safe reading of received folders.

No function follows a symbolic link at the end of a path: a received folder cannot refer to other folders.
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

LOCK = ".lock"  # contains the process id of the writer
LIST = ".written.json"  # names and SHA-256 of the files that pyro-vae wrote to the folder
MAX_TEXT = 2**28  # maximal size of a text file, in bytes


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash, ``path`` has either the old or the new content.

    :raises OSError: if writing fails, such as on a full disk. The old file is unchanged.
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
    _sync_folder(path.parent)


def meant_for(name: str) -> str | None:
    """The target of a temporary file of :func:`write_whole`, by its name; ``None`` for any other name."""
    match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", name)  # the names that mkstemp makes
    return match[1] if match else None


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file and not a symbolic link."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder and not a symbolic link."""
    return path.is_dir() and not path.is_symlink()


def check_no_link(path: Path) -> Path:
    """Return ``path``. Raises ``ValueError`` if it is a symbolic link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, and links are not followed; replace it by its target")
    return path


def read_bytes(path: Path, *, max_bytes: int = MAX_TEXT) -> bytes:
    """Read a regular file.

    :raises FileNotFoundError: if ``path`` does not exist.
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
    """Parse JSON in UTF-8. Raises ``ValueError`` for NaN, infinity, repeated keys and too deep nesting."""
    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_constant=_parse_finite, parse_float=_parse_finite, object_pairs_hook=_dict_of_unique,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _parse_finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("the JSON has a repeated key")
    return result


@contextmanager
def reserved(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Lock a folder for the block. A missing folder is created, and removed again if it stays empty.

    :param numbered: if ``path`` exists, use ``path-2``, ``path-3``, …
    :raises BlockingIOError: if another process has locked the folder.
    """
    created: list[Path] = []
    try:
        for parent in reversed(path.parents):
            _create(parent, created)
        if numbered:
            path = next(candidate for candidate in _numbered(path) if _create(candidate, created))
        elif not _create(path, created) and not path.is_dir():
            raise FileExistsError(f"{path} exists already and is not a folder; pass another folder as --out")
        with locked(path):
            yield path
    finally:
        for folder in reversed(created):
            with suppress(OSError):  # not empty
                folder.rmdir()


def _create(folder: Path, created: list[Path]) -> bool:
    """Create a folder and append it to ``created``. False if it exists."""
    if os.path.lexists(folder):
        return False
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    created.append(folder)
    return True


def _numbered(path: Path) -> Iterator[Path]:
    return (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))


# (device, inode) of each lock file -> process id of its owner. A fork inherits the table but not the locks.
_lock_owners: dict[tuple[int, int], int] = {}
_lock_owners_mutex = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for the block.

    :raises BlockingIOError: if the folder is locked, by another process or by this one.
    """
    file = folder / LOCK
    with _lock_owners_mutex:
        descriptor, key = _lock(file)
        _lock_owners[key] = os.getpid()
    try:
        yield
    finally:
        with _lock_owners_mutex:
            with suppress(OSError):
                file.unlink()  # before the lock is released
            _lock_owners.pop(key, None)
            os.close(descriptor)


def _lock(file: Path) -> tuple[int, tuple[int, int]]:
    """Lock a file. Returns its descriptor, device and inode."""
    while True:
        if os.path.lexists(file):
            with suppress(FileNotFoundError):
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{file} is not a regular file; delete it")
                # opening and closing a file would release the lock that this process has on it
                if _lock_owners.get((status.st_dev, status.st_ino)) == os.getpid():
                    raise BlockingIOError(
                        f"{file.parent} is in use by this process already; wait for that fit to end, or pass "
                        "another folder"
                    )
        descriptor = os.open(
            file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            # false if the previous owner has deleted the file in the meantime
            if os.path.samestat(status, os.stat(file, follow_symlinks=False)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor, (status.st_dev, status.st_ino)
        except (BlockingIOError, PermissionError):
            pid = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(
                f"{file.parent} is in use by process {pid or '(unknown id)'}; wait for it to end, or pass "
                "another folder"
            ) from None
        except FileNotFoundError:  # deleted before the comparison: try again
            pass
        except OSError:  # such as a full disk
            with suppress(OSError):
                file.unlink()
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def put(path: Path, content: bytes) -> None:
    """Write a file atomically, and record its SHA-256 in the list of files that pyro-vae wrote.

    :raises FileExistsError: if ``path`` exists with other content than pyro-vae wrote.
    """
    listed = written(path.parent)
    if os.path.lexists(path) and not is_listed(path, listed):
        raise FileExistsError(f"{path} was not written by pyro-vae, so it is not overwritten; move it away")
    write_whole(path, content)
    listed[path.name] = hashlib.sha256(content).hexdigest()
    write_whole(path.parent / LIST, (json.dumps(listed, indent=1) + "\n").encode())


def written(folder: Path) -> dict[str, str]:
    """Names and SHA-256 of the files that pyro-vae wrote to a folder; empty without a valid list."""
    try:
        listed = parse_json(read_bytes(folder / LIST))
    except (OSError, ValueError):
        return {}
    if not isinstance(listed, dict) or not all(isinstance(sha256, str) for sha256 in listed.values()):
        return {}
    return {name: sha256 for name, sha256 in listed.items() if os.path.basename(name) == name}


def is_listed(path: Path, listed: dict[str, str]) -> bool:
    """Whether a file has the content that pyro-vae wrote."""
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
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush the file names of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
