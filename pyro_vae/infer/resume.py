"""All that a fit is made of between two steps, so that it can go on from there to the last bit."""

import logging
import math
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.checkpoint import Checkpoints, MismatchError, copy_all, read_checkpoint
from pyro_vae.data.batches import Batch, Batches
from pyro_vae.infer.distributed import Group
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.infer.signals import Interrupted, deferred, waiting
from pyro_vae.infer.snapshot import (
    optim_state,
    random_state,
    set_optim_state,
    set_random_state,
    stored,
    unstored,
    versions,
)
from pyro_vae.pairs.preserve import closed_over, make_parameters, untouched
from pyro_vae.pairs.traces import ElboTerms, MeanElbo, Program

logger = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """One epoch of training. ``train`` is averaged over the epoch's minibatches while the parameters move, ``validation``
    is evaluated at its end; both are the ELBO itself, whatever β and the loss. ``beta`` is that of the last step."""

    epoch: int
    beta: float
    train: MeanElbo
    validation: MeanElbo | None
    seconds: float

    @classmethod
    def of(cls, record: Any) -> "Epoch":
        """From what a checkpoint holds of one."""
        epoch, beta, train, validation, seconds = record
        return cls(epoch, beta, MeanElbo(*train), None if validation is None else MeanElbo(*validation), seconds)


class Weights:
    """The tensors that training moves: the parameters in Pyro's param store, where those of modules are too, and the buffers
    of every module that ran."""

    def __init__(self, model: Program, guide: Program, ran: Collection[nn.Module]) -> None:
        self.model, self.guide, self.ran = model, guide, ran

    def tensors(self) -> dict[str, Tensor]:
        return {f"params.{name}": value for name, value in pyro.get_param_store().named_parameters()} | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        programs = {name: one for name, one in (("model", self.model), ("guide", self.guide)) if isinstance(one, nn.Module)}
        own = {f"{side}.{name}": buffer for side, one in programs.items() for name, buffer in one.named_buffers()}
        others = {
            f"{i}.{name}": buffer
            for i, module in enumerate(closed_over(self.model, self.guide, self.ran))
            for name, buffer in module.named_buffers(recurse=False)
        }
        return {f"buffers.{name}": buffer for name, buffer in (own | others).items()}

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}


class Best:
    """The weights of a pair as they were at the highest validation ELBO."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.elbo, self.epochs_since = -math.inf, 0
        self.kept: dict[str, Tensor] = {}

    def see(self, elbo: float, patience: int | None) -> None:
        self.epochs_since += 1
        if elbo > self.elbo:
            self.elbo, self.epochs_since = elbo, 0
            self.kept = {} if patience is None else self.weights.copy()

    def waited(self, patience: int | None) -> bool:
        """Whether so many epochs have brought nothing better."""
        return patience is not None and self.epochs_since >= patience

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self.weights.tensors().items():
            if name in self.kept:
                tensor.copy_(self.kept[name])


@dataclass
class Position:
    """Where a fit is: the epochs behind it, and how far it is in the present one."""

    history: list[Epoch] = field(default_factory=list)
    planned: int = 0  # epochs when it began, by which it was chosen how steps run
    batch: int = 0  # the next of this epoch
    steps: int = 0
    beta: float = 1.0
    terms: list[ElboTerms] = field(default_factory=list)  # of this epoch's steps
    seconds: float = 0.0  # of this epoch, in processes that are gone
    began: Any = None  # random state before this epoch
    now: Any = None  # and after its last step

    @property
    def epoch(self) -> int:
        return len(self.history) + 1

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch} (step {self.steps + 1})"

    def rest(self, batches: Batches) -> Iterator[Batch]:
        """The batches of this epoch that are to come."""
        self.since = time.perf_counter() - self.seconds
        if self.began is not None:
            set_random_state(self.began, batches)
        else:
            self.began = random_state(batches)
        coming = batches.epoch(shuffle=True)
        for _ in islice(coming, self.batch):  # drawn again, and passed over
            pass
        if self.now is not None:
            set_random_state(self.now)
        return coming

    def close(self, validation: MeanElbo | None, group: Group) -> Epoch:
        """The record of this epoch, of all processes; the next begins."""
        terms = group.terms(ElboTerms(*(torch.cat(part) for part in zip(*self.terms, strict=True))))
        record = Epoch(self.epoch, self.beta, terms.mean(), validation, time.perf_counter() - self.since)
        self.history.append(record)
        self.batch, self.terms, self.seconds, self.began, self.now = 0, [], 0.0, None, None
        return record


class Keeper:
    """Writes the checkpoints of a fit, and reads them."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        every: int | None,
        at: Position,
        best: Best,
        step: MinibatchSVI,
        batches: Batches,
        config: dict[str, Any],
    ) -> None:
        self.checkpoints, self.every, self.at, self.best = checkpoints, every, at, best
        self.step, self.batches, self.config, self.group = step, batches, config, step.group
        if checkpoints is not None and batches.persistent:
            warnings.warn(
                "checkpoint: the loader's workers live on from epoch to epoch, and no checkpoint has their random states; if "
                "its data set draws random numbers, a fit that goes on will draw others. Pass persistent_workers=False",
                stacklevel=4,
            )

    def stepped(self) -> None:
        """After each step."""
        self.at.batch += 1
        self.at.steps += 1
        if self.checkpoints is not None:
            self.at.now = random_state()
            if self.every is not None and self.at.steps % self.every == 0:
                self.save()
            if self.group.any(waiting()):
                raise Interrupted

    @contextmanager
    def safe(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM wait for a checkpoint, where there are any."""
        if self.checkpoints is None:
            yield
            return
        with deferred(anywhere=self.group.size == 1):  # processes that wait for one another stop together
            try:
                yield
            except Interrupted:
                self.save()
                raise

    def save(self) -> None:
        """Write a checkpoint, where there is something that is not the start. The first process writes for all."""
        if self.checkpoints is None or not self.at.steps:
            return
        at = self.at
        began = at.began if at.began is not None else random_state(self.batches)
        terms = [torch.cat(part) for part in zip(*at.terms, strict=True)]
        ranks = self.group.all({"began": stored(began), "now": stored(at.now), "terms": terms})
        if self.group.rank:
            self.group.wait()
            return
        validation = at.history[-1].validation if at.history and not at.batch else None
        content = {
            "config": self.config,
            "versions": versions(),
            "history": [tuple(epoch) for epoch in at.history],
            "planned": at.planned, "batch": at.batch, "steps": at.steps, "beta": at.beta, "ranks": ranks,
            "seconds": time.perf_counter() - at.since if at.batch else 0.0,
            "weights": self.best.weights.copy(),
            # one that was used once is moved by momentum for good, and counted
            "moved": [name for name, p in pyro.get_param_store().named_parameters() if p.grad is not None],
            "optim": optim_state(self.step.optim),
            "best": {"elbo": self.best.elbo, "epochs_since": self.best.epochs_since, "weights": self.best.kept},
            "graphs": self.step._graphs(), "max_plate_nesting": self.step.elbo.max_plate_nesting,
        }  # fmt: skip
        self.checkpoints.save(at.steps, content, score=-math.inf if validation is None else validation.elbo)
        self.group.wait()  # none goes on before it is there

    def begin(self, resume: str | Path | None, model: Program, guide: Program, first: Batch, held_out: Batches | None) -> None:
        """Bring all processes to one start, and that to a checkpoint."""
        if self.group.size > 1:
            self.group.share(self.batches)
            if held_out is not None:
                self.group.share(held_out)
            make_parameters(model, guide, first)
            self.group.agree(self.best.weights.tensors().values())
        if resume is not None:
            self._resume(resume, model, guide, first)

    def _resume(self, resume: str | Path, model: Program, guide: Program, first: Batch) -> None:
        """Put everything back as it was at a checkpoint.

        :raises FileNotFoundError: where it is not there.
        :raises ValueError: where it is damaged, or of another pair; ``MismatchError`` where it is of another version or
            configuration.
        """
        found = self._find(resume)
        if found is None:
            logger.info("resume: there is no checkpoint yet, so the fit begins")
            return
        path, content = found
        missing = [name for name in _entries(self.group.size) if not _has(content, name)]
        if missing:
            raise MismatchError(
                f"resume: {path} lacks {', '.join(missing[:5])}, which fit writes in this version of pyro_vae; begin anew in "
                "another folder"
            )
        for key, was in content["config"].items():
            if self.config.get(key) != was:
                raise MismatchError(
                    f"resume: {key} is {self.config.get(key)!r} but was {was!r} in {path}; expected the same, or begin anew in "
                    "another folder"
                )
        self._warn_of_versions(path, content.get("versions", {}))
        self._make(model, guide, first, content["weights"].keys())
        copy_all(content["weights"], self.best.weights.tensors(), str(path))
        for name, p in pyro.get_param_store().named_parameters():
            p.grad = torch.zeros_like(p) if name in content["moved"] else None
        set_optim_state(self.step.optim, content["optim"])
        at, best = self.at, content["best"]
        at.history = [Epoch.of(record) for record in content["history"]]
        at.planned, at.batch, at.steps, at.beta, at.seconds = (
            content[key] for key in ("planned", "batch", "steps", "beta", "seconds")
        )
        own = content["ranks"][self.group.rank]
        device = first.leaves()[0].device
        at.terms = [ElboTerms(*(part.to(device) for part in own["terms"]))] if own["terms"] else []
        at.began, at.now = unstored(own["began"]), unstored(own["now"])
        self.best.elbo, self.best.epochs_since, self.best.kept = best["elbo"], best["epochs_since"], best["weights"]
        if self.checkpoints is not None and not self.group.rank:
            self.checkpoints.go_on_from(path)
        self.step._resume(content["graphs"])
        self.step.elbo.max_plate_nesting = content["max_plate_nesting"]  # or Pyro draws again to guess it
        logger.info("resume: from %s, after step %d", path, at.steps)

    def _warn_of_versions(self, path: Path, were: dict[str, str]) -> None:
        """Older checkpoints do not name any."""
        found = versions()
        changed = [f"{name} {was} (now {found.get(name)})" for name, was in were.items() if found.get(name) != was]
        if changed and not self.group.rank:
            warnings.warn(
                f"resume: {path} was written with {', '.join(changed)}. The fit continues, but its last bits may differ from "
                "those of a fit without interruption; install the same versions where they must agree",
                stacklevel=4,
            )

    def _make(self, model: Program, guide: Program, first: Batch, names: Collection[str]) -> None:
        """The parameters that exist only once the pair has run, or the loss: averages of its costs, say."""
        make_parameters(model, guide, first)
        if set(names) <= self.best.weights.tensors().keys():
            return
        store = pyro.get_param_store()
        with untouched():
            self.step.elbo.loss_and_grads(model, guide, *first.args, **first.kwargs)
            made = store.get_state()
        store.set_state(made)

    def _find(self, resume: str | Path) -> tuple[Path, Any] | None:
        if resume not in ("last", "best"):
            return Path(resume), read_checkpoint(Path(resume))
        if self.checkpoints is None:
            raise ValueError(f'resume: "{resume}" is one of the checkpoints in a folder; pass checkpoint=FOLDER, or a path')
        if resume == "last":
            return self.checkpoints.last()
        found = self.checkpoints.best()
        if found is None:
            raise FileNotFoundError(f"resume: {self.checkpoints.folder} has no checkpoint of an epoch with validation data")
        return found


def _entries(num_processes: int) -> list[str]:
    """What :meth:`Keeper.save` writes and :meth:`Keeper._resume` reads, by dotted names."""
    return [
        "config", "weights", "moved", "optim", "history", "planned", "batch", "steps", "beta", "seconds", "graphs",
        "max_plate_nesting", "best.elbo", "best.epochs_since", "best.weights",
        *(f"ranks.{i}.{name}" for i in range(num_processes) for name in ("began", "now", "terms")),
    ]  # fmt: skip


def _has(content: Any, name: str) -> bool:
    """Whether dictionaries and lists of them hold a dotted name."""
    for key in name.split("."):
        try:
            content = content[int(key) if isinstance(content, list) else key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
