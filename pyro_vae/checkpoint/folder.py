"""A folder of tensors and what they mean: a safetensors file, and ``manifest.json`` with SHA-256 sums. No pickle.

The tensors' file bears their sum in its name and is written first, the manifest that names it last, each whole and on the
disk before the next: whenever a process dies, the folder holds what was there before, or what was to be.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as to_bytes
from torch import Tensor

from pyro_vae.checkpoint.tree import flatten, unflatten
from pyro_vae.files import is_file, meant_for, parse_json, read_bytes, sum_of, write_whole

SCHEMA = 1
MANIFEST = "manifest.json"
_TENSORS = re.compile(r"[0-9a-f]{16}\.safetensors")  # by their sum


class MismatchError(ValueError):
    """What is stored was written by another version of pyro_vae, or for another configuration."""


def write(path: Path, kind: str, content: Any, **about: Any) -> None:
    """Store ``content`` in the folder ``path``, in the place of what it held.

    :param content: numbers, words, tensors, and lists and dictionaries of them.
    :param about: what :func:`read_manifest` is to tell without the tensors.
    :raises FileExistsError: where the folder has a ``manifest.json`` that is not one of these.
    :raises OSError: with its ``errno``; what the folder held is then still there.
    """
    if os.path.lexists(path / MANIFEST) and not is_ours(path):
        raise FileExistsError(f"{path / MANIFEST} was not written by pyro_vae, so it is not replaced; name another folder")
    tensors: dict[str, Tensor] = {}
    tree = flatten(content, tensors)
    payload = to_bytes(tensors)
    total = hashlib.sha256(payload).hexdigest()
    name = f"{total[:16]}.safetensors"
    manifest = {
        "schema": SCHEMA, "pyro_vae": metadata.version("pyro-vae"), "kind": kind, "about": flatten(about, {}),
        "files": {name: {"sha256": total, "bytes": len(payload)}}, "content": tree,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    before = _ours_in(path)
    write_whole(path / name, payload)
    write_whole(path / MANIFEST, json.dumps({"manifest": manifest, "sha256": _sum_of(manifest)}, indent=1).encode())
    for other in before:
        if other.name not in (name, MANIFEST):
            other.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether a folder is one that :func:`write` made: by its manifest; or, where that is missing or damaged after a crash, by
    what else is in it."""
    if path.is_symlink() or not path.is_dir():
        return False
    if _named_by_manifest(path) is not None:
        return True
    names = os.listdir(path)
    tensors = [name for name in names if _TENSORS.fullmatch(meant_for(name) or name)]
    others = [name for name in names if name not in tensors and name != MANIFEST and meant_for(name) != MANIFEST]
    return not others and bool(tensors) == bool(names) and all(is_file(path / name) for name in names)


def remove(path: Path) -> None:
    """Delete what :func:`write` left in a folder, and the folder if nothing else is in it."""
    if not is_ours(path):
        return
    for file in sorted(
        _ours_in(path), key=lambda file: file.name != MANIFEST
    ):  # first, so that the rest is not taken for whole
        file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _ours_in(path: Path) -> list[Path]:
    """The files of a folder that :func:`write` made: the manifest, the tensors that it names or that bear their own sum, and
    what a crash left half-written."""
    named, ours = _named_by_manifest(path), is_ours(path)

    def made(file: Path) -> bool:
        left = meant_for(file.name)
        if left is not None:
            return left == MANIFEST or _TENSORS.fullmatch(left) is not None
        if _TENSORS.fullmatch(file.name):
            damaged = ours and named is None and os.path.lexists(path / MANIFEST)
            return file.name == named or damaged or sum_of(file).startswith(file.name.partition(".")[0])
        return file.name == MANIFEST and ours

    return [file for file in path.iterdir() if is_file(file) and made(file)]


def _named_by_manifest(path: Path) -> str | None:
    """The file of tensors that a sound manifest names; ``""`` where it names none, ``None`` where it is not sound."""
    try:
        record = parse_json(read_bytes(path / MANIFEST))
        if record["sha256"] != _sum_of(record["manifest"]):
            return None
        return str(next(iter(record["manifest"]["files"]), ""))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def pack(content: Any) -> bytes:
    """``content`` in one piece, for another process."""
    tensors: dict[str, Tensor] = {}
    tree = flatten(content, tensors)
    return to_bytes(tensors, {"content": json.dumps(tree)})


def unpack(packed: bytes) -> Any:
    """What :func:`pack` was given."""
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    return unflatten(json.loads(header["__metadata__"]["content"]), read_tensors(packed))


def read(path: Path, kind: str) -> Any:
    """What :func:`write` stored.

    :raises FileNotFoundError: where nothing is stored at ``path``.
    :raises ValueError: where a file of it is damaged or missing; ``MismatchError`` where it is of a newer pyro_vae.
    """
    manifest = read_manifest(path, kind)
    try:
        ((name, told),) = manifest["files"].items()
        size, total = told["bytes"], told["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError):
        name = ""
    if not _TENSORS.fullmatch(name):
        raise ValueError(f"{path / MANIFEST} names no file of tensors; take an earlier checkpoint")
    try:
        found = (path / name).lstat().st_size
        payload = read_bytes(path / name, max_bytes=found) if found == size else b""
    except FileNotFoundError:
        raise ValueError(f"{path / name} is missing, which {MANIFEST} names; take an earlier checkpoint") from None
    if found != size or hashlib.sha256(payload).hexdigest() != total:
        raise ValueError(
            f"{path / name} is damaged: it has {found} bytes, and is not what was written ({size} bytes, SHA-256 in the "
            "manifest); take an earlier checkpoint"
        )
    try:
        return unflatten(manifest["content"], read_tensors(payload))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: its manifest and its tensors are not of one another ({error!r})") from error


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """What is said of a stored folder; raises as :func:`read`."""
    file = path / MANIFEST
    try:
        record = parse_json(read_bytes(file))
        manifest, told = record["manifest"], record["sha256"]
        sound = told == _sum_of(manifest) and manifest.keys() >= {"schema", "pyro_vae", "kind", "about", "files", "content"}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is nothing stored at {path}: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({str(error)[:100]}); take an earlier checkpoint") from error
    if not sound:
        raise ValueError(f"{file} is damaged: it is not what was written, by its SHA-256; take an earlier checkpoint")
    if not isinstance(manifest["schema"], int) or manifest["schema"] > SCHEMA:
        raise MismatchError(
            f"{file} has schema {manifest['schema']!r:.20}, of pyro_vae {manifest['pyro_vae']!r:.20}, but this one reads up "
            f"to {SCHEMA}; install the version that wrote it"
        )
    if manifest["kind"] != kind:
        raise MismatchError(f"{file} is of a {manifest['kind']!s:.40}; expected that of a {kind}")
    try:
        return manifest | {"about": unflatten(manifest["about"], {})}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({str(error)[:100]}); take an earlier checkpoint") from error


def _sum_of(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
