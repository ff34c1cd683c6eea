"""Early stopping: keep the parameters of the epoch with the highest validation ELBO."""

import math
from collections.abc import Collection

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pairs.elbo import MeanElbo
from pyro_vae.pairs.preserve import closed_over
from pyro_vae.pairs.traces import Program


class PairState:
    """The tensors that training changes: the parameters in Pyro's param store, including those of
    modules, and the buffers of the modules that the pair has called."""

    def __init__(self, model: Program, guide: Program, modules: Collection[nn.Module]) -> None:
        self.model, self.guide, self.modules = model, guide, modules

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"params.{name}": value for name, value in pyro.get_param_store().named_parameters()
        } | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        of_programs = {
            f"{side}.{name}": buffer
            for side, program in (("model", self.model), ("guide", self.guide))
            if isinstance(program, nn.Module)
            for name, buffer in program.named_buffers()
        }
        of_others = {
            f"{i}.{name}": buffer
            for i, module in enumerate(closed_over(self.model, self.guide, self.modules))
            for name, buffer in module.named_buffers(recurse=False)
        }
        return {f"buffers.{name}": buffer for name, buffer in (of_programs | of_others).items()}

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}


class EarlyStopping:
    """Records the highest validation ELBO and the number of epochs since it was reached. If ``patience`` is
    given, also keeps a copy of the tensors at the end of that epoch."""

    def __init__(self, state: PairState, patience: int | None) -> None:
        self.state, self.patience = state, patience
        self.best_elbo, self.epochs_since_best = -math.inf, 0
        self.best_tensors: dict[str, Tensor] = {}

    def update(self, validation: MeanElbo | None) -> None:
        """Record the validation ELBO of an epoch."""
        if validation is None:
            return
        self.epochs_since_best += 1
        if validation.objective > self.best_elbo:
            self.best_elbo, self.epochs_since_best = validation.objective, 0
            self.best_tensors = {} if self.patience is None else self.state.copy()

    def should_stop(self) -> bool:
        return self.patience is not None and self.epochs_since_best >= self.patience

    @torch.no_grad()
    def restore_best(self) -> None:
        for name, tensor in self.state.tensors().items():
            if name in self.best_tensors:
                tensor.copy_(self.best_tensors[name])
