"""Store nested values and tensors in a folder: a safetensors file and ``manifest.json``, with SHA-256 sums.

The name of the safetensors file is the start of the SHA-256 of its content. This file is written first, and
then the manifest, which names it. Each is written atomically and flushed to the disk, so after a crash the
folder has either the old or the new content.
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

from pyro_vae.files import is_file, meant_for, parse_json, read_bytes, sum_of, write_whole
from pyro_vae.tree import flatten, unflatten

SCHEMA = 1
MANIFEST = "manifest.json"
_DAMAGE_REMEDY = "use an earlier checkpoint"
_TENSOR_FILE = re.compile(r"[0-9a-f]{16}\.safetensors")  # the first digits of the SHA-256 of the file


class MismatchError(ValueError):
    """Stored content was written by another version of pyro_vae, or belongs to another configuration."""


def write(path: Path, kind: str, content: Any, **about: Any) -> None:
    """Store ``content`` in the folder ``path``. Earlier content is replaced.

    :param content: numbers, strings, tensors, and lists and dictionaries of them.
    :param about: entries that :func:`read_manifest` returns without reading the tensors.
    :raises FileExistsError: if the folder has a ``manifest.json`` that :func:`write` did not make.
    :raises OSError: if writing fails, with ``errno`` set. The earlier content is unchanged.
    """
    if os.path.lexists(path / MANIFEST) and not is_ours(path):
        raise FileExistsError(
            f"{path / MANIFEST} was not written by pyro_vae, so it is not replaced; pass another folder"
        )
    tensors: dict[str, Tensor] = {}
    tree = flatten(content, tensors)
    payload = to_bytes(tensors)
    sha256 = hashlib.sha256(payload).hexdigest()
    name = f"{sha256[:16]}.safetensors"
    manifest = {
        "schema": SCHEMA, "pyro_vae": metadata.version("pyro-vae"), "kind": kind, "about": flatten(about, {}),
        "files": {name: {"sha256": sha256, "bytes": len(payload)}}, "content": tree,
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    old_files = _our_files(path)
    write_whole(path / name, payload)
    write_whole(
        path / MANIFEST, json.dumps({"manifest": manifest, "sha256": _checksum(manifest)}, indent=1).encode()
    )
    for file in old_files:
        if file.name not in (name, MANIFEST):
            file.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether :func:`write` made a folder.

    This is so if the manifest is valid. After a crash, the manifest may be missing or damaged: then the
    folder must have only files with names that :func:`write` uses.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    if tensor_file(path) is not None:
        return True
    names = os.listdir(path)
    tensor_files = [name for name in names if _TENSOR_FILE.fullmatch(meant_for(name) or name)]
    others = [n for n in names if n not in tensor_files and n != MANIFEST and meant_for(n) != MANIFEST]
    return not others and bool(tensor_files) == bool(names) and all(is_file(path / name) for name in names)


def remove(path: Path) -> None:
    """Delete the files that :func:`write` made in a folder, and the folder if it is then empty."""
    if not is_ours(path):
        return
    # delete the manifest first, so that an interrupted removal does not leave an apparently complete folder
    for file in sorted(_our_files(path), key=lambda file: file.name != MANIFEST):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _our_files(path: Path) -> list[Path]:
    """The files that :func:`write` made in a folder: the manifest, the tensor file that it names, tensor
    files whose name is their SHA-256, and temporary files that a crash left behind."""
    named, ours = tensor_file(path), is_ours(path)

    def is_our_file(file: Path) -> bool:
        target = meant_for(file.name)
        if target is not None:
            return target == MANIFEST or _TENSOR_FILE.fullmatch(target) is not None
        if _TENSOR_FILE.fullmatch(file.name):
            manifest_damaged = ours and named is None and os.path.lexists(path / MANIFEST)
            return (
                file.name == named or manifest_damaged or sum_of(file).startswith(file.name.partition(".")[0])
            )
        return file.name == MANIFEST and ours

    return [file for file in path.iterdir() if is_file(file) and is_our_file(file)]


def tensor_file(path: Path) -> str | None:
    """The name of the tensor file in the manifest, which depends on its content only; ``""`` if the manifest
    has none. ``None`` if the manifest is invalid or missing."""
    try:
        record = parse_json(read_bytes(path / MANIFEST))
        if record["sha256"] != _checksum(record["manifest"]):
            return None
        return str(next(iter(record["manifest"]["files"]), ""))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read(path: Path, kind: str) -> Any:
    """The content that :func:`write` stored.

    :raises FileNotFoundError: if nothing is stored at ``path``.
    :raises ValueError: if a file is damaged or missing; ``MismatchError`` if a newer version of pyro_vae
        wrote it, or if it is of another ``kind``.
    """
    manifest = read_manifest(path, kind)
    try:
        ((name, entry),) = manifest["files"].items()
        expected_size, sha256 = entry["bytes"], entry["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError):
        name = ""
    if not _TENSOR_FILE.fullmatch(name):
        raise ValueError(f"{path / MANIFEST} names no tensor file; {_DAMAGE_REMEDY}")
    try:
        size = (path / name).lstat().st_size
        payload = read_bytes(path / name, max_bytes=size) if size == expected_size else b""
    except FileNotFoundError:
        raise ValueError(f"{path / name}, which {MANIFEST} names, is missing; {_DAMAGE_REMEDY}") from None
    if size != expected_size or hashlib.sha256(payload).hexdigest() != sha256:
        raise ValueError(
            f"{path / name} is damaged: it has {size} bytes; expected {expected_size} bytes, with the "
            f"SHA-256 in the manifest; {_DAMAGE_REMEDY}"
        )
    try:
        return unflatten(manifest["content"], read_tensors(payload))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: its manifest does not match its tensors ({error!r})") from error


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder. Raises the errors of :func:`read`."""
    file = path / MANIFEST
    try:
        record = parse_json(read_bytes(file))
        manifest, sha256 = record["manifest"], record["sha256"]
        keys = {"schema", "pyro_vae", "kind", "about", "files", "content"}
        is_valid = sha256 == _checksum(manifest) and manifest.keys() >= keys
    except FileNotFoundError:
        raise FileNotFoundError(f"there is nothing stored at {path}: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({str(error)[:100]}); {_DAMAGE_REMEDY}") from error
    if not is_valid:
        raise ValueError(
            f"{file} is damaged: its SHA-256 differs from the one that was written; {_DAMAGE_REMEDY}"
        )
    if not isinstance(manifest["schema"], int) or manifest["schema"] > SCHEMA:
        raise MismatchError(
            f"{file} was written by pyro_vae {manifest['pyro_vae']!r:.20} with schema "
            f"{manifest['schema']!r:.20}; expected schema {SCHEMA} or lower; install that version of pyro_vae"
        )
    if manifest["kind"] != kind:
        raise MismatchError(f"{file} describes a {manifest['kind']!s:.40}; expected a {kind}")
    try:
        return manifest | {"about": unflatten(manifest["about"], {})}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({str(error)[:100]}); {_DAMAGE_REMEDY}") from error


def _checksum(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
