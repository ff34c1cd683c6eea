"""Data-parallel training of one pair: each rank computes the gradient of its rows of a minibatch, and all
ranks apply the mean gradient.

Gradients are averaged between the backward pass and the optimizer, so this works with every ELBO object, with
several particles and with the compiled step. ``DistributedDataParallel`` cannot be used: it requires calls of
its ``forward``, which SVI does not make.
"""

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
import torch.distributed as dist

# imported before a process group exists, since default arguments of its functions would keep the group alive
import torch.distributed.nn.functional
from torch import Tensor

from pyro_vae.checkpoint import pack, unpack
from pyro_vae.data.batches import Batches, InMemory
from pyro_vae.pairs.elbo import ElboTerms


def rank_and_world_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE, which ``torchrun`` sets in the environment; (0, 1) if neither is set.

    :raises ValueError: if only one of the two is set, or RANK is not a whole number below WORLD_SIZE.
    """
    env = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if not any(env.values()):
        return 0, 1
    for value in env.values():
        if value is None or not value.isdecimal():
            raise ValueError(
                f"the environment has RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']}; expected "
                "two whole numbers: start the processes by torchrun, or unset both"
            )
    rank, size = (int(value or 0) for value in env.values())
    if rank >= size:
        raise ValueError(
            f"RANK is {rank} but WORLD_SIZE is {size}; start the processes by torchrun, or unset both"
        )
    return rank, size


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Initialize torch's process group for the block if ``torchrun`` started several processes. The backend
    is NCCL on GPUs, else gloo."""
    if rank_and_world_size()[1] == 1 or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # after a restart, torchrun's store still has the addresses of the old processes
        # (pytorch/pytorch#135712): a prefix that differs between starts hides them. With several machines
        # there is no prefix, since their restart counts may differ
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Group:
    """The ranks of torch's default process group; a single rank if no process group is initialized."""

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)

    def shard(self, batches: Batches) -> None:
        """Give each rank its share of the rows of every minibatch, and a different random seed. All ranks
        shuffle the data in the same order.

        :raises ValueError: for data that are not in memory.
        """
        if self.size == 1:
            return
        if not isinstance(batches, InMemory):
            raise ValueError(
                f"data: {self.size} processes cannot divide the minibatches of a DataLoader; expected "
                "tensors, arrays or a pyro_vae.Data"
            )
        seed = int(self.broadcast(torch.randint(2**31, (1,))).item())
        batches.share(self.rank, self.size, seed)
        pyro.set_rng_seed((seed + 1 + self.rank) % 2**32)

    def gradient_weight(self, batches: Batches, index: int) -> float:
        """The weight of this rank's gradient in the mean over ranks: n·W/B, where W is the number of
        ranks, B the number of rows of minibatch ``index``, and n the number of these rows on this rank."""
        if self.size == 1 or not isinstance(batches, InMemory):
            return 1.0
        num_rows = min(batches.batch_size, batches.num_rows - index * batches.batch_size)
        return len(range(self.rank, num_rows, self.size)) * self.size / num_rows

    def average_gradients(self, params: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
        """Replace the gradients by their weighted mean over ranks, in place.

        :param weight: the result of :meth:`gradient_weight`.
        :raises ValueError: for sparse gradients, and if ranks have gradients of different parameters.
        """
        if self.size == 1:
            return
        if any(g.is_sparse for g in gradients):
            raise ValueError(
                f"fit: {self.size} processes cannot average sparse gradients; expected sparse=False in the "
                "pair's embeddings"
            )
        names: dict[int, str] = {}
        for name, p in pyro.get_param_store().named_parameters():  # the first name of a tied parameter
            names[id(p)] = min(name, names.get(id(p), name))
        order = sorted(range(len(params)), key=lambda i: names[id(params[i])])
        # sorted by name, since the order of the parameters of a compiled graph may differ between ranks
        gradients = [gradients[i] for i in order]
        checksum = zlib.crc32(repr([names[id(params[i])] for i in order]).encode())
        largest = torch.tensor([checksum, -checksum], device=self._device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if largest[0] != -largest[1]:
            raise ValueError(
                f"fit: {self.size} processes have gradients of different parameters, which cannot be "
                "averaged; expected a pair that uses the same parameters for all rows"
            )
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            of_dtype = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.reshape(-1) for g in of_dtype]) * (weight / self.size)
            dist.all_reduce(flat)
            for g, part in zip(of_dtype, flat.split([g.numel() for g in of_dtype]), strict=True):
                g.copy_(part.view_as(g))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor that rank 0 passes."""
        if self.size == 1:
            return tensor
        copy = tensor.detach().to(self._device(), copy=True)
        dist.broadcast(copy, 0)
        return copy.to(tensor.device)

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace the values of the tensors on all ranks by those on rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self.broadcast(tensor))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        if self.size == 1:
            return flag
        largest = torch.tensor([float(flag)], device=self._device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return bool(largest.item())

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        if self.size > 1:
            dist.barrier()

    def gather_terms(self, terms: ElboTerms) -> ElboTerms:
        """The ELBO terms of the data on all ranks, concatenated."""
        if self.size == 1:
            return terms
        parts = [
            ElboTerms(*(tensor.to(terms.elbo) for tensor in part)) for part in self.all_gather(list(terms))
        ]
        return ElboTerms(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def all_gather(self, value: Any) -> list[Any]:
        """The values that the ranks pass, in the order of the ranks. Values may be numbers, strings, tensors,
        and lists and dictionaries of them."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8).to(self._device())
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device()) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)], device=self._device()))
        padded = torch.zeros(int(max(sizes).item()), dtype=torch.uint8, device=self._device())
        padded[: len(content)] = content
        contents = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(contents, padded)
        return [
            unpack(part[: int(size)].cpu().numpy().tobytes())
            for part, size in zip(contents, sizes, strict=True)
        ]

    def _device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )
