"""One call of Adam over all parameters, in the place of one optimizer object for each."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_CALLS = (PyroOptim.__call__, PyroLRScheduler.__call__)  # a subclass may do something else
_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


class _Group:
    """The parameters of one setting, and their state."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.params: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []

    def count(self) -> None:
        """Keep the number of steps of all of them in one tensor, which one operation counts up."""
        self.steps = [state["step"] for state in self.states]
        counts = self.steps[0]._base
        if counts is None or len(counts) != len(self.steps) or any(step._base is not counts for step in self.steps):
            counts = torch.stack(self.steps)
            self.steps = [counts[i] for i in range(len(counts))]
            for state, step in zip(self.states, self.steps, strict=True):
                state["step"] = step
        self.counts = counts
        self.means = [state["exp_avg"] for state in self.states]
        self.squares = [state["exp_avg_sq"] for state in self.states]


class FusedAdam:
    """The update of one of Pyro's optimizers: fused where it is plain Adam or AdamW, whose state stays where the optimizer
    keeps it; any other optimizer is called as it is."""

    def __init__(self, optim: PyroOptim, params: Sequence[Tensor]) -> None:
        self.optim, self.params = optim, params
        self.groups: dict[tuple, _Group] | None = None

    def __call__(self, gradients: Sequence[Tensor], *, again: bool) -> None:
        """Move the parameters.

        :param again: nothing has touched the optimizer, its settings or its state, since this was called before.
        """
        if not again or self.groups is None:
            self.groups = self._groups()
        if self.groups is None:
            before = [p.grad for p in self.params]
            for p, gradient in zip(self.params, gradients, strict=True):
                p.grad = gradient
            self.optim(self.params)
            for p, zeros in zip(self.params, before, strict=True):
                p.grad = zeros  # as Pyro leaves them
            return
        with torch.no_grad():
            for (fused, lr, (beta1, beta2), weight_decay, eps, maximize, *_), group in self.groups.items():
                group.counts.add_(1)
                own = gradients if len(group.places) == len(gradients) else [gradients[i] for i in group.places]
                fused(
                    group.params, own, group.means, group.squares, [], group.steps, lr=lr,
                    beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=maximize,
                )  # fmt: skip

    def _groups(self) -> dict[tuple, _Group] | None:
        """The parameters by their settings; ``None`` where one is not plain Adam's, or has no state yet."""
        groups: dict[tuple, _Group] = {}
        for i, p in enumerate(self.params):
            found = self._state(p)
            if found is None:
                return None
            fused, settings, state = found
            kind = settings["lr"], settings["betas"], settings["weight_decay"], settings["eps"], settings["maximize"]
            group = groups.setdefault((fused, *kind, p.device, state["step"].dtype), _Group())
            group.places.append(i)
            group.params.append(p)
            group.states.append(state)
        for group in groups.values():
            group.count()
        return groups

    def _state(self, p: Tensor) -> tuple[Any, dict, dict] | None:
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
            group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
        state = optimizer.state.get(p)
        watched = any((*_HOOKS, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))
        own = vars(optimizer).get("step")
        watched = watched or (own is not None and not hasattr(own, "_wrapped_by_lr_sched"))
        if not state or watched or group.get("differentiable") or group.get("capturable"):
            return None
        if group["amsgrad"] or p.is_complex() or isinstance(group["lr"], Tensor) or not isinstance(state["step"], Tensor):
            return None
        if state["step"].device != p.device:  # fused kernels count where the parameter is
            state["step"] = state["step"].to(p.device)
        decoupled = group.get("decoupled_weight_decay") or kind is torch.optim.AdamW
        return torch._fused_adamw_ if decoupled else torch._fused_adam_, group, state
