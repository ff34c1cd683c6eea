"""Update all parameters by one fused Adam call, instead of by one optimizer for each parameter as Pyro
does."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor

from pyro_vae.compiler import internals

_SUPPORTED_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)  # a subclass may override __call__
_SETTINGS = ("lr", "betas", "weight_decay", "eps", "maximize")


class FusedAdam:
    """A function that makes the update of one of Pyro's optimizers. If it is plain Adam or AdamW, all
    parameters are updated in one fused call, and the state remains in the optimizer. Any other optimizer is
    called as it is."""

    def __init__(self, optim: PyroOptim, params: Sequence[Tensor]) -> None:
        self.optim, self.params = optim, params

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Update the parameters by their gradients. Those without a gradient are unchanged."""
        groups = self._groups(gradients)
        if groups is None:
            before = [p.grad for p in self.params]
            for p, gradient in zip(self.params, gradients, strict=True):
                p.grad = gradient
            self.optim([p for p in self.params if p.grad is not None])
            for p, zeros in zip(self.params, before, strict=True):
                p.grad = zeros  # as after a step of Pyro, which sets gradients to zero
            return
        with torch.no_grad():
            for settings, members in groups.items():
                update, lr, (beta1, beta2), weight_decay, eps, maximize, _ = settings
                indices, states = zip(*members, strict=True)
                steps, means, squares = (
                    [state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq")
                )
                internals.foreach_add(steps, 1)
                update(
                    [self.params[i] for i in indices], [gradients[i] for i in indices], means, squares, [],
                    steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False,
                    maximize=maximize,
                )  # fmt: skip

    def _groups(
        self, gradients: Sequence[Tensor | None]
    ) -> dict[tuple, list[tuple[int, dict[str, Tensor]]]] | None:
        """The indices and states of the parameters, grouped by update, settings and device. ``None`` if the
        fused update does not apply to one of them."""
        groups: dict[tuple, list[tuple[int, dict[str, Tensor]]]] = {}
        torch_optimizer: Any = getattr(self.optim, "optimizer", None)
        if torch_optimizer is not None:  # its step would also update other parameters with a gradient
            ids = {id(p) for p in self.params}
            others = (
                p for group in torch_optimizer.param_groups for p in group["params"] if id(p) not in ids
            )
            if any(p.grad is not None for p in others):
                return None
        for i, (p, gradient) in enumerate(zip(self.params, gradients, strict=True)):
            if gradient is None:
                continue
            adam = self._adam(p)
            if adam is None:
                return None
            update, settings, state = adam
            key = (update, *(settings[name] for name in _SETTINGS), p.device)
            groups.setdefault(key, []).append((i, state))
        return groups

    def _adam(self, p: Tensor) -> tuple[Any, dict, dict] | None:
        """The fused update, the settings and the state of a parameter. ``None`` if its optimizer is not plain
        Adam or AdamW, or has no state yet."""
        optimizer: Any = getattr(self.optim, "optimizer", None)
        if optimizer is None and type(self.optim).__call__ in _SUPPORTED_CALLS:
            optimizer = self.optim.optim_objs.get(p)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of a learning-rate scheduler
        kind = type(optimizer)
        if kind not in (torch.optim.Adam, torch.optim.AdamW) or self.optim.grad_clip.get(p) is not None:
            return None
        group, *others = optimizer.param_groups
        if others:
            groups = optimizer.param_groups
            group = next((group for group in groups if any(p is q for q in group["params"])), group)
        state = optimizer.state.get(p)
        if (
            not state
            or internals.has_hooks(optimizer)
            or group.get("differentiable")
            or group.get("capturable")
        ):
            return None
        if group["amsgrad"] or p.is_complex():
            return None
        if isinstance(group["lr"], Tensor) or not isinstance(state["step"], Tensor):
            return None
        if not all(value.is_contiguous() for value in (p, state["exp_avg"], state["exp_avg_sq"])):
            return None  # fused kernels ignore strides
        internals.mark_stepped(optimizer)
        if state["step"].device != p.device:  # fused kernels expect the step count on the parameter's device
            state["step"] = state["step"].to(p.device)
        decoupled = group.get("decoupled_weight_decay") or kind is torch.optim.AdamW
        return internals.fused_adamw if decoupled else internals.fused_adam, group, state
