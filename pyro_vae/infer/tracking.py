"""Where ``fit`` sends its metrics: any experiment tracker."""

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pyro_vae.infer.resume import Epoch

logger = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """The interface of an experiment tracker for ``fit(tracker=…)``.

    ``examples/trackers.py`` has trackers for Weights & Biases and MLflow, of about 20 lines each.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers. ``fit`` calls this on rank 0 after each epoch, see :func:`metrics_of`.

        :param step: the number of steps of the optimizer so far.
        """

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Record a figure of matplotlib."""

    def close(self) -> None:
        """Write what is left. ``fit`` does not call this."""


class TensorBoard:
    """A :class:`Tracker` that writes for TensorBoard, which reads a folder: ``tensorboard --logdir FOLDER``.

    Several runs of a program, such as one that resumes training, may write to the same folder::

        tracker = infer.TensorBoard("runs/first")
        for epoch in pv.train(vae.model, vae.guide, train, tracker=tracker):
            tracker.figure("samples", plots.plot_samples(vae).figure, epoch.epoch)
        tracker.close()

    :raises ModuleNotFoundError: if the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError(
                "infer.TensorBoard needs the package tensorboard; install it: pip install tensorboard"
            ) from error
        self.folder = folder

    @cached_property
    def writer(self) -> Any:
        """The writer of torch. It is made when it is first used, so that only rank 0 makes a file."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        self.writer.add_figure(name, figure, step, close=False)

    def close(self) -> None:
        self.writer.close()


def metrics_of(epoch: Epoch) -> dict[str, float]:
    """The numbers of an epoch by name, such as ``train/elbo`` and ``validation/kl``, in nats per datum.

    ``train/bound``, ``train/bound_se`` and ``train/ess`` are there for an objective that is not the ELBO;
    ``epoch``, ``beta`` and ``seconds`` are always there.
    """
    parts = {"train": epoch.train, "validation": epoch.validation}
    numbers = {
        f"{part}/{name}": value
        for part, means in parts.items()
        if means is not None
        for name, value in means._asdict().items()
    }
    numbers |= {name: getattr(epoch, name) for name in ("epoch", "beta", "seconds", "mutual_information")}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def log_epoch(tracker: Tracker, epoch: Epoch, step: int) -> None:
    """Pass the metrics of an epoch to a tracker. An error of the tracker is logged, and training goes on."""
    try:
        tracker.log(metrics_of(epoch), step)
    except Exception as error:  # such as a lost connection
        logger.warning(
            "fit: the tracker failed at epoch %d: %s: %s; training goes on",
            epoch.epoch,
            type(error).__name__,
            error,
        )
