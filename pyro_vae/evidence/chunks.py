"""Run an estimator on chunks of the data, with a progress bar and a file to resume from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from pyro_vae.data.batches import Batch, bytes_of
from pyro_vae.files import write_whole
from pyro_vae.processes import Group
from pyro_vae.progress import progress_bar as bar_of
from pyro_vae.random_states import stream_seed


def in_chunks(
    compute: Callable[[slice], dict[str, Tensor]],
    chunks: Sequence[slice],
    *,
    seed: int,
    bar: tqdm,
    resume: Path | str | None,
    fingerprint: str,
) -> dict[str, Tensor]:
    """Call ``compute`` on each chunk of the data and concatenate the returned tensors along their last
    dimension.

    Each chunk has its own seed, so a resumed run returns the same numbers as an uninterrupted run, and
    several processes, which compute the chunks in turn, the same as one.

    :param resume: a file that stores the finished chunks; if it exists, the run resumes from it.
    :param fingerprint: a hash of everything that the result depends on, see :func:`fingerprint`.
    :raises ValueError: if the file at ``resume`` has another fingerprint or is damaged.
    """
    path, group = None if resume is None else Path(resume), Group.dividing()
    settings = [seed, *((chunk.start, chunk.stop) for chunk in chunks)]
    group.check_equal(settings, "the processes have different arguments; expected the same seed and settings")
    done = _read(path, fingerprint) if path is not None and path.exists() else []
    group.check_equal(len(done), "resume: the processes have different files; expected the same file")
    bar.update(int(bar.total * len(done) / len(chunks)))
    for first in range(len(done), len(chunks), group.size):
        own, index = [], first + group.rank
        if index < len(chunks):
            pyro.set_rng_seed(stream_seed(seed, index))
            own = [compute(chunks[index])]
        done += [part for parts in group.all_gather(own) for part in parts]
        if path is not None and not group.rank:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {
                f"{i}.{name}": value.contiguous()
                for i, part in enumerate(done)
                for name, value in part.items()
            }
            write_whole(path, to_bytes(tensors, {"fingerprint": fingerprint, "chunks": str(len(done))}))
    return {name: torch.cat([part[name] for part in done], -1) for name in done[0]}


@contextmanager
def progress_bar(total: int, progress: bool | None, name: str) -> Iterator[tqdm]:
    """The progress bar of an estimator, see :func:`pyro_vae.progress.progress_bar`."""
    group = Group.dividing()  # rank 0 shows the progress of its own part
    with bar_of(-(-total // group.size), progress, rank=group.rank, desc=name) as bar:
        yield bar


def fingerprint(batch: Batch, probe: Iterable[Tensor], **settings: Any) -> str:
    """SHA-256 of the data, of the settings, and of ``probe``, log-densities or log-weights of a part of the
    data, which identify the pair."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for tensor in (*batch.tensors.values(), *probe):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> list[dict[str, Tensor]]:
    """The finished chunks in a file that :func:`in_chunks` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"resume: {path} is not a file of an evidence run, or it is truncated ({error}); delete it"
        ) from error
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(
            f"resume: {path} belongs to another run: the pair, the data, the seed or a setting such as "
            "max_bytes differs; pass another file, or delete this one"
        )
    done: list[dict[str, Tensor]] = [{} for _ in range(int(metadata["chunks"]))]
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        done[int(index)][field] = value
    return done
