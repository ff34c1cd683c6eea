"""Processes that work on the same data: a process group of torch, the mean of gradients over its ranks, and
functions that divide their work among the ranks.

Gradients are averaged between the backward pass and the optimizer, so this works with every ELBO object, with
several particles and with the compiled step. ``DistributedDataParallel`` cannot be used: it requires calls of
its ``forward``, which SVI does not make.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import pyro
import torch
import torch.distributed as dist

# imported before a process group exists, since default arguments of its functions would keep the group alive
import torch.distributed.nn.functional
from torch import Tensor

from pyro_vae.tree import pack, unpack

T = TypeVar("T")
_divides: ContextVar[bool] = ContextVar("divides", default=False)


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
        self._names: tuple[str, ...] | None = None  # of the parameters at the first step

    @classmethod
    def alone(cls) -> "Group":
        """A single rank, also if there is a process group."""
        group = cls()
        group.rank, group.size = 0, 1
        return group

    @classmethod
    def dividing(cls) -> "Group":
        """The ranks that divide the work of a function: those of the process group in a block of
        :func:`across_processes`, else a single rank."""
        return cls() if _divides.get() else cls.alone()

    def average_gradients(self, params: Sequence[Tensor], gradients: Sequence[Tensor], num_rows: int) -> None:
        """Replace the gradients by their mean over ranks, Σ_r n_r g_r / Σ_r n_r, in place.

        All parameters of Pyro's param store have a place in the message, and zeros where they have no
        gradient, so that the messages of all ranks have the same length.

        :param num_rows: n_r, the rows of the minibatch on this rank. It is 0 on a rank that has none left,
            whose gradients do not count.
        :raises ValueError: for sparse gradients, for a parameter that appears after the first step, and if
            ranks have gradients of different parameters.
        """
        if self.size == 1:
            return
        if any(g.is_sparse for g in gradients):
            raise ValueError(
                f"fit: {self.size} processes cannot average sparse gradients; expected sparse=False in the "
                "pair's embeddings"
            )
        stored = self._stored_parameters()
        given = {id(p): g for p, g in zip(params, gradients, strict=True)}
        has_gradient = [id(p) in given for p in stored]
        for dtype in dict.fromkeys(p.dtype for p in stored):
            of_dtype = [p for p in stored if p.dtype == dtype]
            parts = [given[id(p)] if id(p) in given else torch.zeros_like(p) for p in of_dtype]
            header = torch.tensor([num_rows, *has_gradient], dtype=dtype, device=parts[0].device)
            flat = torch.cat([header, *(part.reshape(-1) * num_rows for part in parts)])
            dist.all_reduce(flat)
            total, *counts = flat[: len(header)].tolist()
            if any(count not in (0.0, self.size) for count in counts):
                raise ValueError(
                    f"fit: {self.size} processes have gradients of different parameters, which cannot be "
                    "averaged; expected a pair that uses the same parameters for all rows"
                )
            mean = (flat[len(header) :] / total).split([p.numel() for p in of_dtype])
            for p, part in zip(of_dtype, mean, strict=True):
                if id(p) in given:
                    given[id(p)].copy_(part.view_as(p))

    def _stored_parameters(self) -> list[Tensor]:
        """The parameters in Pyro's param store, each once, in an order that is the same on all ranks."""
        first_names: dict[int, str] = {}
        stored = list(pyro.get_param_store().named_parameters())
        for name, p in stored:  # a tied parameter has several names
            first_names[id(p)] = min(name, first_names.get(id(p), name))
        by_name = {first_names[id(p)]: p for _, p in stored}
        names = tuple(sorted(by_name))
        if self._names is None:
            self._names = names
            self.check_equal(names, "fit: the processes have different parameters; expected the same pair")
        if names != self._names:
            # the ranks would start it at different values, and one rank may have it alone
            new = min({*names} ^ {*self._names})
            raise ValueError(
                f"fit: the parameter {new!r} appeared or vanished after the first step, so it may differ "
                f"between the {self.size} processes; expected a pair that makes all parameters at its first "
                "run"
            )
        return [by_name[name] for name in names]

    def check_equal(self, value: Any, error: str) -> None:
        """Raise ``ValueError`` on all ranks unless they pass the same value."""
        values = self.all_gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{error} in each of the {self.size} processes")

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
                value = self.broadcast(tensor)
                if not torch.equal(tensor, value):  # copy_() raises for an expanded tensor
                    tensor.copy_(value)

    def sum(self, number: int) -> int:
        """The sum of the numbers that the ranks pass."""
        if self.size == 1:
            return number
        total = torch.tensor([number], device=self._device())
        dist.all_reduce(total)
        return int(total.item())

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return self.sum(int(flag)) > 0

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        if self.size > 1:
            dist.barrier()

    def all_gather(self, value: T) -> list[T]:
        """The values that the ranks pass, in the order of the ranks: numbers, strings, tensors, and lists,
        tuples and dictionaries of them. Tensors are returned on the CPU."""
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

    def from_first(self, compute: Callable[[], T]) -> T:
        """The result of a function, which only rank 0 calls. It is of the types that :meth:`all_gather`
        takes."""
        return self.all_gather(None if self.rank else compute())[0]  # type: ignore[return-value]

    def _device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend() == "nccl"
            else torch.device("cpu")
        )


@contextmanager
def across_processes() -> Iterator[None]:
    """Divide the data among the processes of torch's process group in the block.

    In the block, :func:`~pyro_vae.evaluate`, the estimators of :mod:`pyro_vae.evidence` and
    :func:`~pyro_vae.diagnose` compute a part of the data on each rank, and return the whole result on every
    rank. All ranks must call them, with the same arguments and all data. The numbers are the same for any
    number of processes. Without a process group, or outside of the block, each process computes everything::

        with infer.process_group("cpu"):  # started by torchrun
            pv.fit(vae.model, vae.guide, train)
            with infer.across_processes():
                bound = evidence.importance(vae.model, vae.guide, test)
    """
    token = _divides.set(True)
    try:
        yield
    finally:
        _divides.reset(token)
