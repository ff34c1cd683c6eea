"""The private names of torch and Pyro that the compiler uses, each with the public name that it stands for."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions.util import is_identically_zero
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx  # torch.export, which does not close over live parameters
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode  # torch.overrides sees no calls that torch makes itself

__all__ = ["FakeTensorMode", "FakeTensorProp", "TorchDispatchMode", "compile_graph", "make_fx"]

# torch.optim.Adam(fused=True), whose call is one for all parameters of one optimizer; Pyro has an optimizer for each
fused_adam, fused_adamw, add_to_all = torch._fused_adam_, torch._fused_adamw_, torch._foreach_add_
asks_if_zero = is_identically_zero.__code__  # Pyro reads whole numbers to skip terms that are zero


# torch.nn.functional.linear, which multiplies by MKL: on CPUs that are not Intel's it is half as fast as oneDNN. It is
# wrapped in a new operation, since Inductor takes torch's only with constant weights.
_library = torch.library.Library("pyro_vae", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.needs_contiguous_strides,  # oneDNN takes a thousand times as long for columns cut out of a matrix
)
_library.impl("linear", lambda x, w, b: torch.ops.mkldnn._linear_pointwise.default(x, w, b, "none", [], ""), "CPU")
torch.library.register_fake("pyro_vae::linear", lambda x, w, _: x.new_empty(len(x), len(w)), lib=_library)
onednn_linear = torch.ops.pyro_vae.linear.default


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler, which Inductor needs."""
    return shutil.which("g++") is not None


def function_of(operation: Any) -> Callable[..., Any]:
    """An operation without the lookups of its public call."""
    return getattr(operation, "_op", operation)


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor is in, which views share; also of a fake tensor, which has no address."""
    return tensor.untyped_storage()._cdata


def compile_graph(graph: fx.GraphModule, tensors: Sequence[Tensor], *, cuda_graphs: bool) -> Callable[..., list[Tensor]]:
    """The graph compiled by Inductor for tensors like these; its noise is that of eager torch."""
    # instead of torch.compile, which traces the graph once more by Dynamo; imported here, since the import takes seconds
    from torch._inductor.compile_fx import compile_fx

    options = {"fallback_random": True, "triton.cudagraphs": cuda_graphs}
    with torch.no_grad():
        compiled: Any = compile_fx(graph, list(tensors), config_patches=options)
        return compiled


@contextmanager
def without_validation() -> Iterator[None]:
    """Turn off the validation of distributions in the block, since it reads the values of tensors. Distributions made earlier,
    such as priors of a module, keep ``_validate_args=True``, so ``_validate_sample`` is replaced too."""
    default, of_values = Distribution._validate_args, Distribution._validate_sample
    with pyro.validation_enabled(False):
        Distribution._validate_args = None  # type: ignore[assignment] # off, and distinguishable from an explicit False
        Distribution._validate_sample = lambda *_: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            Distribution._validate_sample = of_values  # type: ignore[method-assign]
    Distribution._validate_args = default  # Pyro restores its own setting, which may differ from torch's


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Note for schedules of the learning rate, which warn where no step of the optimizer went before theirs."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a user's code runs with a step of an optimizer: hooks, or a replaced ``step``."""
    own = vars(optimizer).get("step")
    return any(
        (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            optimizers._global_optimizer_pre_hooks,
            optimizers._global_optimizer_post_hooks,
            own is not None and not hasattr(own, "_wrapped_by_lr_sched"),
        )
    )
