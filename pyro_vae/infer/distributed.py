"""Several processes that train one pair: each takes its share of every minibatch, and all move by the same gradient.

Gradients are averaged where they are looked at before the optimizer moves, so that every ELBO object, several particles and
the compiled step take part alike; a wrapper around ``forward``, which SVI does not call, would not see them.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its default arguments keep the process group that exists when it is imported
from torch import Tensor

from pyro_vae.checkpoint import pack, unpack
from pyro_vae.data.batches import Batches, InMemory
from pyro_vae.pairs.traces import ElboTerms


def launched() -> tuple[int, int]:
    """RANK and WORLD_SIZE of a job that ``torchrun`` started; (0, 1) where it did not.

    :raises ValueError: where only one of the two is set, or they are no rank and size.
    """
    words = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if not any(words.values()):
        return 0, 1
    for word in words.values():
        if word is None or not word.isdecimal():
            raise ValueError(
                f"the environment has RANK={words['RANK']} and WORLD_SIZE={words['WORLD_SIZE']}; expected two whole numbers: "
                "start the processes by torchrun, or unset both"
            )
    rank, size = (int(word or 0) for word in words.values())
    if rank >= size:
        raise ValueError(f"RANK is {rank} but WORLD_SIZE is {size}; start the processes by torchrun, or unset both")
    return rank, size


@contextmanager
def torchrun(device: str) -> Iterator[None]:
    """The process group of a job that ``torchrun`` started, where it did; over gloo, or NCCL on GPUs."""
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun's store lives through restarts, with the addresses of processes that are gone (pytorch/pytorch#135712);
        # on several machines it alone can know which start this is
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group:
    """The processes of torch's default process group; where there is none, this one alone."""

    def __init__(self) -> None:
        here = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)

    def share(self, batches: Batches) -> None:
        """Give each process its rows of every minibatch, and its own noise. The order of the data is the same for all.

        :raises ValueError: for data that are not in memory.
        """
        if self.size == 1:
            return
        if not isinstance(batches, InMemory):
            raise ValueError(
                f"data: {self.size} processes share out the rows of every minibatch, which a DataLoader decides by itself; "
                "expected tensors, arrays or a pyro_vae.Data"
            )
        seed = self.first(torch.randint(2**31, (1,))).item()
        batches.share(self.rank, self.size, int(seed))
        pyro.set_rng_seed((int(seed) + 1 + self.rank) % 2**32)

    def weight(self, batches: Batches, index: int) -> float:
        """What the gradient of this process counts for in the mean over processes: n·W/B where it has n of B rows."""
        if self.size == 1 or not isinstance(batches, InMemory):
            return 1.0
        whole = min(batches.batch_size, batches.num_rows - index * batches.batch_size)
        return len(range(self.rank, whole, self.size)) * self.size / whole

    def average(self, params: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
        """The weighted mean over processes, in place.

        :raises ValueError: where processes have gradients of different parameters.
        """
        if self.size == 1:
            return
        if any(g.is_sparse for g in gradients):
            raise ValueError(
                f"fit: {self.size} processes cannot average sparse gradients; expected sparse=False in the pair's embeddings"
            )
        names: dict[int, str] = {}
        for name, p in pyro.get_param_store().named_parameters():  # one may have two
            names[id(p)] = min(name, names.get(id(p), name))
        order = sorted(range(len(params)), key=lambda i: names[id(params[i])])
        gradients = [gradients[i] for i in order]  # a graph may have found them in another
        key = zlib.crc32(repr([names[id(params[i])] for i in order]).encode())
        found = torch.tensor([key, -key], device=self._device())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        if found[0] != -found[1]:
            raise ValueError(
                f"fit: {self.size} processes have gradients of different parameters, which cannot be averaged; expected a pair "
                "that uses the same ones whatever the rows"
            )
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            some = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in some]) * (weight / self.size)
            dist.all_reduce(flat)
            for g, part in zip(some, flat.split([g.numel() for g in some]), strict=True):
                g.copy_(part.view_as(g))

    def first(self, tensor: Tensor) -> Tensor:
        """That of the first process."""
        if self.size == 1:
            return tensor
        there = tensor.detach().to(self._device(), copy=True)
        dist.broadcast(there, 0)
        return there.to(tensor.device)

    @torch.no_grad()
    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Copy those of the first process, in place."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self.first(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.size == 1:
            return flag
        found = torch.tensor([float(flag)], device=self._device())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def wait(self) -> None:
        """For all processes to be here."""
        if self.size > 1:
            dist.barrier()

    def terms(self, own: ElboTerms) -> ElboTerms:
        """Those of all processes, end to end."""
        if self.size == 1:
            return own
        parts = [ElboTerms(*(tensor.to(own.elbo) for tensor in part)) for part in self.all(list(own))]
        return ElboTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def all(self, value: Any) -> list[Any]:
        """What each process has: numbers, words and tensors, and lists and dictionaries of them."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8).to(self._device())
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device()) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)], device=self._device()))
        longest = int(max(sizes).item())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device())
        padded[: len(content)] = content
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [unpack(one[: int(size)].cpu().numpy().tobytes()) for one, size in zip(found, sizes, strict=True)]

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
