"""Atomic file writes, folder locks, and reading of folders from untrusted sources.

If the last component of a path is a symbolic link, no function follows it. So a link in an untrusted folder
cannot lead to files elsewhere.
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

LOCK = ".lock"  # contains the id of the process that has locked the folder
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
    """The name of the file that :func:`write_whole` writes by way of the temporary file ``name``.

    ``None`` if ``name`` is not the name of such a temporary file.
    """
    match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", name)  # the names that mkstemp makes
    return match[1] if match else None


def is_path(name: str | os.PathLike) -> bool:
    """Whether ``name`` is meant as a path: it exists, has a suffix, or has a separator of folders."""
    text = os.fspath(name)
    return not isinstance(name, str) or os.sep in text or bool(Path(text).suffix) or os.path.exists(text)


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
    :raises ValueError: if ``path`` is a link, a device, a pipe or a folder, or has more than ``max_bytes``.
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
    """A context that locks the folder ``path`` and yields its path.

    Missing folders of the path are created. Those that are still empty at the end are removed.

    :param numbered: create a new folder: ``path``, or if it exists the first of ``path-2``, ``path-3``, …
        that does not exist.
    :raises BlockingIOError: if the folder is locked already, by another process or by this one.
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


# (device, inode) of each lock file -> id of the process that holds the lock. A forked process inherits this
# table but not the locks.
_lock_owners: dict[tuple[int, int], int] = {}
_lock_owners_mutex = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that locks a folder.

    :raises BlockingIOError: if the folder is locked already, by another process or by this one.
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
    """Lock a file. Returns its descriptor, and its device and inode."""
    while True:
        if os.path.lexists(file):
            with suppress(FileNotFoundError):
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{file} is not a regular file; delete it")
                # do not open a file that this process has locked: closing it would release the lock
                if _lock_owners.get((status.st_dev, status.st_ino)) == os.getpid():
                    raise BlockingIOError(
                        f"{file.parent} is in use by this process already; wait until the fit that uses it "
                        "ends, or pass another folder"
                    )
        descriptor = os.open(
            file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(descriptor)
            # not the same file if the previous owner has deleted its lock file in the meantime
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

    :raises FileExistsError: if ``path`` exists and pyro-vae did not write it, or its content has changed
        since.
    """
    listed = written(path.parent)
    if os.path.lexists(path) and not is_listed(path, listed):
        raise FileExistsError(f"{path} was not written by pyro-vae, so it is not overwritten; move it away")
    write_whole(path, content)
    _write_list(path.parent, listed | {path.name: hashlib.sha256(content).hexdigest()})


def discard(path: Path) -> None:
    """Delete a file that pyro-vae wrote and that is unchanged, and take it off the list of these files."""
    listed = written(path.parent)
    if is_listed(path, listed):
        path.unlink()
        del listed[path.name]
        _write_list(path.parent, listed)


def _write_list(folder: Path, listed: dict[str, str]) -> None:
    write_whole(folder / LIST, (json.dumps(listed, indent=1) + "\n").encode())


def written(folder: Path) -> dict[str, str]:
    """Names and SHA-256 of the files that pyro-vae wrote to a folder, read from its list of these files.

    Empty if the list is missing or invalid.
    """
    try:
        listed = parse_json(read_bytes(folder / LIST))
    except (OSError, ValueError):
        return {}
    if not isinstance(listed, dict) or not all(isinstance(sha256, str) for sha256 in listed.values()):
        return {}
    return {name: sha256 for name, sha256 in listed.items() if os.path.basename(name) == name}


def is_listed(path: Path, listed: dict[str, str]) -> bool:
    """Whether pyro-vae wrote a file and its content is unchanged. ``listed`` is the result of
    :func:`written`."""
    return is_file(path) and path.name in listed and sum_of(path) == listed[path.name]


def remove_listed(folder: Path) -> None:
    """Delete the unchanged files that pyro-vae wrote to a folder, and the folder if it is then empty."""
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
    """Write the list of file names of a folder to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
