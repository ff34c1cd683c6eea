"""The private names of torch and Pyro that the compiler uses. Comments state why the public alternative is
not used."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import Dice
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx  # torch.export does not capture live parameters
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode  # torch.overrides misses calls inside torch

__all__ = ["TorchDispatchMode", "compile_graph", "make_fx"]

# instead of torch.optim.Adam(fused=True), which makes one call per optimizer; Pyro has one optimizer for each
# parameter
fused_adam, fused_adamw, foreach_add = torch._fused_adam_, torch._fused_adamw_, torch._foreach_add_
zero_check_code = is_identically_zero.__code__  # in this function Pyro reads values, to skip terms of 0
# In this function Pyro asks whether all probabilities of enumerated values are positive, and leaves out terms
# of probability 0. A graph keeps them: they are 0, or NaN for 0 · ∞. After a NaN loss eager Pyro repeats the
# step.
positive_check_code = Dice.compute_expectation.__code__


# instead of torch.nn.functional.linear, which uses MKL: on CPUs that are not Intel's, MKL takes twice as long
# as oneDNN. The operation is registered under a new name, since Inductor accepts torch's oneDNN operation
# only for constant weights.
_library = torch.library.Library("pyro_vae", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.needs_contiguous_strides,  # oneDNN takes 1000 times as long for a slice of columns
)
_library.impl(
    "linear", lambda x, w, b: torch.ops.mkldnn._linear_pointwise.default(x, w, b, "none", [], ""), "CPU"
)
torch.library.register_fake("pyro_vae::linear", lambda x, w, _: x.new_empty(len(x), len(w)), lib=_library)
onednn_linear = torch.ops.pyro_vae.linear.default


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler, which Inductor needs."""
    return shutil.which("g++") is not None


def direct_call(operation: Any) -> Callable[..., Any]:
    """The function behind an operation, whose call is faster: the public call looks it up each time."""
    return getattr(operation, "_op", operation)


def compile_graph(
    graph: fx.GraphModule, tensors: Sequence[Tensor], *, cuda_graphs: bool
) -> Callable[..., list[Tensor]]:
    """Compile a graph by Inductor for tensors of this signature. It draws the same noise as eager torch."""
    # not torch.compile, which would trace the graph again by Dynamo; imported here, since it takes seconds
    from torch._inductor.compile_fx import compile_fx

    options = {"fallback_random": True, "triton.cudagraphs": cuda_graphs}
    with torch.no_grad():
        compiled: Any = compile_fx(graph, list(tensors), config_patches=options)
        return compiled


@contextmanager
def without_validation() -> Iterator[None]:
    """A context that turns off the validation of distributions, which reads the values of tensors.

    Distributions that were constructed before, such as the priors in a module, keep ``_validate_args=True``,
    so ``_validate_sample`` is replaced too.
    """
    default, validate_sample = Distribution._validate_args, Distribution._validate_sample
    with pyro.validation_enabled(False):
        # None turns validation off too, and differs from an explicit validate_args=False
        Distribution._validate_args = None  # type: ignore[assignment]
        Distribution._validate_sample = lambda *_: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            Distribution._validate_sample = validate_sample  # type: ignore[method-assign]
    Distribution._validate_args = default  # Pyro restores its own setting, which may differ from torch's


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell learning-rate schedulers that the optimizer has stepped; otherwise their ``step()`` warns."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer runs code of the user: hooks, or a ``step`` that the user replaced."""
    replaced = vars(optimizer).get("step")
    return any(
        (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            optimizers._global_optimizer_pre_hooks,
            optimizers._global_optimizer_post_hooks,
            replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"),
        )
    )
