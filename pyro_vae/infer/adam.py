"""One call of Adam over all parameters, in the place of one optimizer object for each."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor


class FusedAdam:
    """The update of one of Pyro's optimizers: fused where it is plain Adam or AdamW, whose state stays where the optimizer
    keeps it; any other optimizer is called as it is."""

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim

    def __call__(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        groups = self._groups(params, gradients)
        if groups is None:
            before = [p.grad for p in params]
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            self.optim(params)
            for p, zeros in zip(params, before, strict=True):
                p.grad = zeros  # as Pyro leaves them
            return
        with torch.no_grad():
            for (fused, settings), (own, grads, means, squares, steps) in groups.items():
                torch._foreach_add_(steps, 1)
                fused(own, grads, means, squares, [], steps, **dict(settings))

    def _groups(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[Any, tuple[list, ...]] | None:
        """Parameters with their state, by their settings; ``None`` where one is not plain Adam's, or has no state yet."""
        groups: dict[Any, tuple[list, ...]] = {}
        for p, gradient in zip(params, gradients, strict=True):
            found = self._state(p)
            if found is None:
                return None
            optimizer, group, state = found
            fused = (
                torch._fused_adamw_
                if group.get("decoupled_weight_decay") or type(optimizer) is torch.optim.AdamW
                else torch._fused_adam_
            )
            settings = (
                ("lr", group["lr"]), ("beta1", group["betas"][0]), ("beta2", group["betas"][1]),
                ("weight_decay", group["weight_decay"]), ("eps", group["eps"]), ("amsgrad", False),
                ("maximize", group["maximize"]),
            )  # fmt: skip
            columns = groups.setdefault((fused, settings), ([], [], [], [], []))
            values = (p, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return groups

    def _state(self, p: Tensor) -> tuple[Any, dict, dict] | None:
        optimizer = getattr(self.optim, "optimizer", None) or self.optim.optim_objs.get(p)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # under a learning-rate schedule
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or self.optim.grad_clip.get(p) is not None:
            return None
        state = optimizer.state.get(p)
        group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
        watched = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if watched or group.get("differentiable") or group.get("capturable"):
            return None
        if not state or group["amsgrad"] or isinstance(group["lr"], Tensor) or not isinstance(state["step"], Tensor):
            return None
        return optimizer, group, state
