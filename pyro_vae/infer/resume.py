"""Save the state of a fit between two steps in a checkpoint, and restore it. A resumed fit gives the same
results as an uninterrupted fit, bit for bit."""

import logging
import math
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from markupsafe import Markup

from pyro_vae.checkpoint import Checkpoints, MismatchError, copy_all, read_checkpoint
from pyro_vae.data.batches import Batch, Batches, Streamed
from pyro_vae.html import plus_minus, table
from pyro_vae.infer.early_stopping import EarlyStopping
from pyro_vae.infer.minibatch import MinibatchSVI
from pyro_vae.infer.signals import Interrupted, deferred, waiting
from pyro_vae.infer.snapshot import (
    optim_state,
    random_state,
    random_state_from_tensors,
    random_state_to_tensors,
    set_optim_state,
    set_random_state,
    versions,
)
from pyro_vae.pairs.elbo import CollectedTerms, ElboTerms, MeanElbo
from pyro_vae.pairs.preserve import make_parameters, untouched
from pyro_vae.processes import Group

logger = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """One epoch of training.

    ``train`` is the mean ELBO over the minibatches of the epoch, each evaluated with the parameters before
    its step. ``validation`` is that of the validation data after the last step. Both are the ELBO itself,
    with β = 1, whatever the loss; for an :class:`~pyro_vae.infer.Objective` that is not the ELBO they also
    have its bound. ``beta`` is the β of the last step. ``mutual_information`` is I_q(x; z) in nats after an
    epoch with ``inference_steps``, else ``None``.
    """

    epoch: int
    beta: float
    train: MeanElbo
    validation: MeanElbo | None
    seconds: float
    mutual_information: float | None = None

    def to_html(self, objective: str = "bound") -> Markup:
        """The means of training and held-out data as a table for a page, see ``pyro_vae.html``.

        :param objective: the name of the bound of an objective other than the ELBO.
        """
        rows = []
        for name, mean in (("held out", self.validation), ("train", self.train)):
            if mean is not None:
                bound = () if mean.bound is None else (plus_minus(mean.bound, mean.bound_se),)
                elbo = plus_minus(mean.elbo, mean.elbo_se)
                rows.append((name, *bound, elbo, f"{mean.reconstruction:.2f}", f"{mean.kl:.2f}"))
        names = () if self.train.bound is None else (objective,)
        return table(rows, ("", *names, "ELBO", "reconstruction", "KL"))

    @classmethod
    def of(cls, record: Any) -> "Epoch":
        """The epoch that a checkpoint stores as the sequence ``record``."""
        epoch, beta, train, validation, *rest = record
        held_out = None if validation is None else MeanElbo(*validation)
        return cls(epoch, beta, MeanElbo(*train), held_out, *rest)


@dataclass
class Position:
    """The position of a fit: the finished epochs, and the number of steps taken in the current epoch."""

    # num_epochs of the first call of fit. compile="auto" depends on it, so a resumed fit uses the same number
    planned_epochs: int
    history: list[Epoch] = field(default_factory=list)
    batch_index: int = 0  # index of the next minibatch in the current epoch
    num_steps: int = 0
    beta: float = 1.0
    terms: CollectedTerms = field(default_factory=CollectedTerms)  # of the steps of the current epoch
    seconds: float = 0.0  # time spent on the current epoch before an interruption
    random_before_epoch: Any = None  # random state at the start of the current epoch
    random_after_step: Any = None  # random state after the last step of the current epoch
    data_state: Any = None  # position in the data at which the current epoch is resumed, see Batches.state

    @property
    def epoch(self) -> int:
        return len(self.history) + 1

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch_index} (step {self.num_steps + 1})"

    def remaining_batches(self, batches: Batches) -> Iterator[Batch]:
        """The minibatches of the current epoch that no step has used."""
        self.start_time = time.perf_counter() - self.seconds
        is_restored = self.data_state is not None
        if is_restored:
            batches.restore(self.data_state, begins=not self.batch_index)
            self.data_state = None
        if self.random_before_epoch is not None:
            set_random_state(self.random_before_epoch, batches)
        else:
            self.random_before_epoch = random_state(batches)
        batches.set_epoch(self.epoch - 1)
        remaining = batches.remaining(self.batch_index)
        if self.random_after_step is not None:
            # a loader that is at its position has drawn its order; other loaders draw it at the first batch
            set_random_state(self.random_after_step, batches if is_restored else None)
        return remaining

    def end_epoch(
        self, validation: MeanElbo | None, group: Group, mutual_information: float | None = None
    ) -> Epoch:
        """Append the record of the current epoch, with the mean over all ranks, and begin the next epoch."""
        of_ranks = group.all_gather([part.cpu() for part in self.terms.all])
        terms = ElboTerms(*map(torch.cat, zip(*of_ranks, strict=True)))
        seconds = time.perf_counter() - self.start_time
        record = Epoch(self.epoch, self.beta, terms.mean(), validation, seconds, mutual_information)
        self.history.append(record)
        self.batch_index, self.terms, self.seconds = 0, CollectedTerms(), 0.0
        self.random_before_epoch = self.random_after_step = None
        return record


class CheckpointManager:
    """Save and restore the checkpoints of a fit. If ``checkpoints`` is ``None``, none are saved."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        every: int | None,
        position: Position,
        stopping: EarlyStopping,
        svi: MinibatchSVI,
        batches: Batches,
        config: dict[str, Any],
    ) -> None:
        self.checkpoints, self.every, self.position, self.stopping = checkpoints, every, position, stopping
        self.svi, self.batches, self.config = svi, batches, config
        self.state, self.group = stopping.state, svi.group
        if checkpoints is not None and batches.persistent:
            warnings.warn(
                "checkpoint: the loader's workers persist between epochs, and checkpoints do not contain "
                "their random states; if the data set draws random numbers, a resumed fit draws different "
                "ones. Pass persistent_workers=False",
                stacklevel=3,
            )

    def start(self, resume: str | Path | None, first: Batch) -> None:
        """Copy the parameters of rank 0 to all ranks, and restore the checkpoint that ``resume`` names, if
        any. Each rank draws other random numbers."""
        if self.group.size > 1:
            seed = int(self.group.broadcast(torch.randint(2**31, (1,))).item())
            pyro.set_rng_seed((seed + self.group.rank) % 2**32)
            make_parameters(self.state.model, self.state.guide, first)
            self.group.broadcast_(self.state.tensors().values())
        if resume is not None:
            self._resume(resume, first)

    def after_step(self) -> None:
        """Count a step, and save a checkpoint after each ``every`` steps. Raises ``Interrupted`` if a rank
        has received a signal."""
        self.position.batch_index += 1
        self.position.num_steps += 1
        if self.checkpoints is not None:
            self.position.random_after_step = random_state(self.batches)
            if self.every is not None and self.position.num_steps % self.every == 0:
                self.save()
            if self.group.any_rank(waiting()):
                raise Interrupted

    @contextmanager
    def save_before_signals(self) -> Iterator[None]:
        """Delay SIGINT and SIGTERM in the block until a checkpoint is saved. If no checkpoints are
        saved, signals are not delayed."""
        if self.checkpoints is None:
            yield
            return
        # several ranks must stop after the same step, so only after_step may stop them
        with deferred(anywhere=self.group.size == 1):
            try:
                yield
            except Interrupted:
                self.save()
                raise

    def save(self) -> None:
        """Save a checkpoint if any step has run. Rank 0 writes the checkpoint for all ranks."""
        if self.checkpoints is None or not self.position.num_steps:
            return
        at = self.position
        before = at.random_before_epoch if at.random_before_epoch is not None else random_state(self.batches)
        of_rank = {
            "began": random_state_to_tensors(before),
            "now": random_state_to_tensors(at.random_after_step),
            "terms": list(at.terms.all) if at.batch_index else [],
            "data": self.batches.state(),
        }
        ranks = self.group.all_gather(of_rank)
        if self.group.rank:
            self.group.barrier()
            return
        validation = at.history[-1].validation if at.history and not at.batch_index else None
        best = self.stopping
        content = {
            "config": self.config,
            "versions": versions(),
            "history": [tuple(epoch) for epoch in at.history],
            "planned": at.planned_epochs,
            "batch": at.batch_index,
            "steps": at.num_steps,
            "beta": at.beta,
            "ranks": ranks,
            "seconds": time.perf_counter() - at.start_time if at.batch_index else 0.0,
            "weights": self.state.copy(),
            # parameters that have a gradient; an optimizer with momentum updates them even if it is zero
            "moved": [name for name, p in pyro.get_param_store().named_parameters() if p.grad is not None],
            "optim": optim_state(self.svi.optim),
            "best": {
                "elbo": best.best_elbo,
                "epochs_since": best.epochs_since_best,
                "weights": best.best_tensors,
            },
            "graphs": self.svi._graph_names(),
            "max_plate_nesting": self.svi._elbo.max_plate_nesting,
        }
        self.checkpoints.save(
            at.num_steps, content, score=-math.inf if validation is None else validation.objective
        )
        self.group.barrier()

    def _resume(self, resume: str | Path, first: Batch) -> None:
        """Restore a checkpoint.

        :raises FileNotFoundError: if the checkpoint does not exist.
        :raises ValueError: if it is damaged, or has the parameters of another pair.
        :raises MismatchError: if another version of pyro_vae wrote it, or if the configuration differs.
        """
        checkpoint = self._find(resume)
        if checkpoint is None:
            logger.info("resume: there is no checkpoint yet, so the fit starts from the beginning")
            return
        path, content = checkpoint
        self._check_content(path, content)
        self._make_parameters(first, content["weights"].keys())
        copy_all(content["weights"], self.state.tensors(), str(path))
        for name, p in pyro.get_param_store().named_parameters():
            p.grad = torch.zeros_like(p) if name in content["moved"] else None
        set_optim_state(self.svi.optim, content["optim"])
        at, best = self.position, content["best"]
        at.history = [Epoch.of(record) for record in content["history"]]
        at.planned_epochs, at.batch_index, at.num_steps, at.beta, at.seconds = (
            content[key] for key in ("planned", "batch", "steps", "beta", "seconds")
        )
        self._restore_position(content["ranks"], first.leaves()[0].device)
        self.stopping.best_elbo, self.stopping.epochs_since_best = best["elbo"], best["epochs_since"]
        self.stopping.best_tensors = best["weights"]
        if self.checkpoints is not None and not self.group.rank:
            self.checkpoints.go_on_from(path)
        self.svi._restore_graphs(content["graphs"])
        # if this is not set, Pyro runs the pair to infer it
        self.svi._elbo.max_plate_nesting = content["max_plate_nesting"]
        logger.info("resume: continuing from %s, after step %d", path, at.num_steps)

    def _restore_position(self, of_ranks: Sequence[Any], device: torch.device) -> None:
        """Restore the position in the data and the random states of this rank, or begin the epoch anew if
        they are not known."""
        at, batches = self.position, self.batches
        if len(of_ranks) != self.group.size:
            if not self.group.rank:
                logger.warning(
                    "resume: %d processes continue a fit of %d: each draws new random numbers, so the result "
                    "has the same distribution as that of an uninterrupted fit, but not the same bits%s",
                    self.group.size,
                    len(of_ranks),
                    f"; epoch {at.epoch} begins anew" if at.batch_index else "",
                )
            at.batch_index, at.seconds = 0, 0.0
            return
        of_rank = of_ranks[self.group.rank]
        terms = [part.to(device) for part in of_rank["terms"]]
        if len(terms) == 3:  # checkpoints of earlier versions have no bound and ESS
            terms = list(ElboTerms.of_elbo(*terms))
        if terms:
            at.terms.append(ElboTerms(*terms))
        at.random_before_epoch = random_state_from_tensors(of_rank["began"])
        at.random_after_step = random_state_from_tensors(of_rank["now"])
        at.data_state = of_rank.get("data")
        if at.data_state is not None or batches.reproducible:
            return
        if at.batch_index or (isinstance(batches, Streamed) and batches.steps_per_epoch is not None):
            logger.warning(
                "resume: the stream or its loader has no methods state_dict and load_state_dict, so it is "
                "read from its start: epoch %d begins anew, and the parameters differ from those of an "
                "uninterrupted fit",
                at.epoch,
            )
        if at.batch_index:
            at.batch_index, at.terms, at.seconds = 0, CollectedTerms(), 0.0
            at.random_before_epoch, at.random_after_step = at.random_after_step, None

    def _check_content(self, path: Path, content: Any) -> None:
        """Raise ``MismatchError`` if entries are missing or the configuration differs. Warn if the versions
        of torch or Pyro differ."""
        missing = [name for name in _required_entries(content) if not _has(content, name)]
        if missing:
            raise MismatchError(
                f"resume: {path} lacks {', '.join(missing[:5])}, which this version of pyro_vae "
                "requires; start a new fit in another folder"
            )
        # the number of processes may change, and with it that of the batches of each
        may_change = ["num_processes"] + ["num_batches"] * (len(content["ranks"]) != self.group.size)
        for key, saved in content["config"].items():
            if self.config.get(key) != saved and key not in may_change:
                raise MismatchError(
                    f"resume: {key} is {self.config.get(key)!r} but was {saved!r} in {path}; pass the same "
                    "value, or start a new fit in another folder"
                )
        # checkpoints of pyro_vae 0.1.0 do not record versions
        installed, saved_versions = versions(), content.get("versions", {})
        changed = [
            f"{name} {saved} (now {installed.get(name)})"
            for name, saved in saved_versions.items()
            if installed.get(name) != saved
        ]
        if changed and not self.group.rank:
            warnings.warn(
                f"resume: {path} was written with {', '.join(changed)}. The fit continues, but its "
                "results may differ by rounding from those of an uninterrupted fit; install the same "
                "versions for bitwise equality",
                stacklevel=5,
            )

    def _make_parameters(self, first: Batch, names: Collection[str]) -> None:
        """Run the pair, which creates its parameters. If ``names`` contains other parameters, evaluate
        the loss too, which may create further parameters, such as running averages."""
        model, guide = self.state.model, self.state.guide
        make_parameters(model, guide, first)
        if set(names) <= self.state.tensors().keys():
            return
        store = pyro.get_param_store()
        with untouched():
            self.svi._elbo.loss_and_grads(model, guide, *first.args, **first.kwargs)
            created = store.get_state()
        store.set_state(created)

    def _find(self, resume: str | Path) -> tuple[Path, Any] | None:
        """The path and content of the checkpoint that ``resume`` names; ``None`` if ``resume`` is "last"
        and the folder has no checkpoints."""
        if resume not in ("last", "best"):
            return Path(resume), read_checkpoint(Path(resume))
        if self.checkpoints is None:
            raise ValueError(
                f'resume: "{resume}" needs a checkpoint folder; pass checkpoint=FOLDER, or resume=PATH'
            )
        if resume == "last":
            return self.checkpoints.last()
        best = self.checkpoints.best()
        if best is None:
            raise FileNotFoundError(
                f"resume: {self.checkpoints.folder} has no checkpoint of an epoch with validation data; pass "
                'resume="last"'
            )
        return best


def _required_entries(content: Any) -> list[str]:
    """The names of the entries that :meth:`CheckpointManager.save` writes. Dots separate nested keys."""
    num_ranks = len(content["ranks"]) if _has(content, "ranks.0") else 1
    return [
        "config",
        "weights",
        "moved",
        "optim",
        "history",
        "planned",
        "batch",
        "steps",
        "beta",
        "seconds",
        "graphs",
        "max_plate_nesting",
        "best.elbo",
        "best.epochs_since",
        "best.weights",
        *(f"ranks.{i}.{name}" for i in range(num_ranks) for name in ("began", "now", "terms")),
    ]


def _has(content: Any, name: str) -> bool:
    """Whether ``content``, of nested dictionaries and lists, has an entry with a name such as
    ``best.elbo``."""
    for key in name.split("."):
        try:
            content = content[int(key) if isinstance(content, list) else key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
