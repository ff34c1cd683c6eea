"""One fused Adam call for all parameters instead of one of Pyro's optimizers per parameter."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor

from pyro_vae.compiler import internals

_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)  # a subclass may do something else
_SETTINGS = ("lr", "betas", "weight_decay", "eps", "maximize")


class FusedAdam:
    """The update of one of Pyro's optimizers: fused where it is plain Adam or AdamW, whose state stays where the optimizer
    keeps it; any other optimizer is called as it is."""

    def __init__(self, optim: PyroOptim, params: Sequence[Tensor]) -> None:
        self.optim, self.params = optim, params

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Move the parameters."""
        groups = self._groups()
        if groups is None:
            before = [p.grad for p in self.params]
            for p, gradient in zip(self.params, gradients, strict=True):
                p.grad = gradient
            self.optim(self.params)
            for p, zeros in zip(self.params, before, strict=True):
                p.grad = zeros  # as Pyro leaves them
            return
        with torch.no_grad():
            for (update, lr, (beta1, beta2), weight_decay, eps, maximize, *_), members in groups.items():
                places, states = zip(*members, strict=True)
                steps, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
                internals.add_to_all(steps, 1)
                update(
                    [self.params[i] for i in places], [gradients[i] for i in places], means, squares, [], steps, lr=lr,
                    beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=maximize,
                )  # fmt: skip

    def _groups(self) -> dict[tuple, list[tuple[int, dict[str, Tensor]]]] | None:
        """The places and states of the parameters by their settings; ``None`` where one is not plain Adam's, or has no state
        yet."""
        groups: dict[tuple, list[tuple[int, dict[str, Tensor]]]] = {}
        whole: Any = getattr(self.optim, "optimizer", None)
        if whole is not None:  # a torch optimizer, whose step moves all that has a gradient
            own = {id(p) for p in self.params}
            if any(p.grad is not None and id(p) not in own for group in whole.param_groups for p in group["params"]):
                return None
        for i, p in enumerate(self.params):
            found = self._find(p)
            if found is None:
                return None
            update, settings, state = found
            key = (update, *(settings[name] for name in _SETTINGS), p.device)
            groups.setdefault(key, []).append((i, state))
        return groups

    def _find(self, p: Tensor) -> tuple[Any, dict, dict] | None:
        """The fused update, the settings and the state of a parameter."""
        optimizer: Any = getattr(self.optim, "optimizer", None)
        if optimizer is None and type(self.optim).__call__ in _CALLS:
            optimizer = self.optim.optim_objs.get(p)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # under a learning-rate schedule
        kind = type(optimizer)
        if (kind is not torch.optim.Adam and kind is not torch.optim.AdamW) or self.optim.grad_clip.get(p) is not None:
            return None
        group, *others = optimizer.param_groups
        if others:
            group = next((group for group in optimizer.param_groups if any(p is q for q in group["params"])), group)
        state = optimizer.state.get(p)
        if not state or internals.has_hooks(optimizer) or group.get("differentiable") or group.get("capturable"):
            return None
        if group["amsgrad"] or p.is_complex() or isinstance(group["lr"], Tensor) or not isinstance(state["step"], Tensor):
            return None
        if not all(value.is_contiguous() for value in (p, state["exp_avg"], state["exp_avg_sq"])):
            return None  # fused kernels take the numbers in the order of memory
        internals.mark_stepped(optimizer)
        if state["step"].device != p.device:  # fused kernels count where the parameter is
            state["step"] = state["step"].to(p.device)
        decoupled = group.get("decoupled_weight_decay") or kind is torch.optim.AdamW
        return internals.fused_adamw if decoupled else internals.fused_adam, group, state
