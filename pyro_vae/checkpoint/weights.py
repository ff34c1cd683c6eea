"""Save and load the trained parameters and buffers of any pair, without pickle."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.checkpoint.blueprint import build, describe
from pyro_vae.checkpoint.budget import bounded
from pyro_vae.checkpoint.folder import read, read_manifest, write
from pyro_vae.data.batches import as_whole
from pyro_vae.files import is_file
from pyro_vae.pairs.preserve import closed_over, make_parameters
from pyro_vae.pairs.structure import inspect
from pyro_vae.pairs.traces import Program

_KIND = "pair"


def save(path: Path | str, pair: Any, data: Any = None, *, param_store: dict[str, Any] | None = None) -> None:
    """Save a trained pair to the folder ``path``, atomically. An earlier pair in that folder is replaced.

    :param pair: a :class:`~pyro_vae.VAE`, an object with ``.model`` and ``.guide``, or ``(model, guide)``.
    :param data: data as for :func:`~pyro_vae.fit`, of which two rows are enough; all data if the guide has
        parameters for each datum. They are needed if the pair has other parts than modules of
        pyro_vae and torch. :func:`save` then runs the pair, to find the parameters of plain functions and of
        the networks that these functions close over and call. If a function calls only a method of a
        network, and not the network itself, the buffers of the network are not found.
    :param param_store: the state of the param store that has the parameters, ``history.param_store`` of a
        fit. The default is Pyro's global store; parameters in it that the pair does not use are not saved.
    :raises ValueError: if data are needed and missing; if parameters of the pair are not in the store;
        if the pair does not use a parameter of ``param_store``.
    :raises OSError: if writing fails, such as on a full disk. The earlier pair is unchanged.
    """
    save_pair(path, pair, data, param_store=param_store)


def save_pair(
    path: Path | str,
    pair: Any,
    data: Any = None,
    *,
    param_store: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """As :func:`save`. The entries ``about`` are also stored; :func:`read_about` returns them."""
    model, guide = _programs(pair)
    plan, weights = describe(pair), _tensors(model, guide, {}, [])
    if plan is None and data is None:
        raise ValueError(
            "pair: it has modules that are not of pyro_vae or torch, or that were changed after "
            "construction, so save must run the pair to find its parameters and buffers; expected rows of "
            "the data: save(path, (model, guide), x[:2])"
        )
    if plan is None:
        params = (pyro.get_param_store().get_state() if param_store is None else param_store)["params"]
        with pyro.get_param_store().scope():  # run the pair with an empty store, as load does
            modules = _make_parameters(model, guide, data)
            in_modules = {id(tensor) for tensor in weights.values()}
            created = pyro.get_param_store().get_state()["params"]
            used = {name for name, value in created.items() if id(value) not in in_modules}
        if missing := sorted(used - params.keys()):
            raise ValueError(
                f"param_store: the pair has {len(missing)} parameters that are not in it, the first is "
                f"{missing[0]!r}; expected param_store=history.param_store of the fit that trained the pair"
            )
        # a loss with baselines has parameters that neither model nor guide uses
        unused = sorted(name for name in params.keys() - created.keys() if not name.startswith("__baseline_"))
        if unused and param_store is not None:
            raise ValueError(
                f"param_store: the pair does not use parameter {unused[0]!r} with these arguments, so load "
                "could not restore it; pass data, such as labels, with which all parameters are used"
            )
        weights = _tensors(model, guide, {name: params[name] for name in params if name in used}, modules)
    write(Path(path), _KIND, {"plan": plan, "weights": weights}, **about or {})


def read_about(path: Path | str) -> dict[str, Any]:
    """The entries ``about`` that :func:`save_pair` stored. Raises the errors of :func:`load`."""
    about = read_manifest(Path(path), _KIND)["about"]
    if not isinstance(about, dict):
        raise ValueError(f"{path}: its manifest has no entries about the pair; train again")
    return about


def load(path: Path | str, factory: Callable[[], Any] | None = None, data: Any = None) -> Any:
    """Load the pair saved at ``path``, on the CPU.

    :param factory: a function that builds the pair with the architecture that was trained. It is needed
        unless model and guide consist of modules of pyro_vae and torch, not changed after their construction.
    :param data: rows of the data. They are needed if :func:`save` needed them, and for lazy modules, which
        create their parameters at the first call. Parameters of plain functions are loaded into Pyro's global
        param store.
    :return: the result of ``factory``, or the rebuilt pair.
    :raises FileNotFoundError: if nothing is stored at ``path``.
    :raises ValueError: if the files are damaged or a newer version of pyro_vae wrote them, or if they have
        the parameters of another pair.

    >>> import tempfile, torch, pyro_vae as pv
    >>> from pyro_vae import checkpoint, conditionals, nets, priors
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     decoder=conditionals.Bernoulli(nets.MLP(2, (50,)), event_shape=(8, 8)),
    ...     encoder=conditionals.Normal(nets.MLP(64, (50,)), event_shape=2),
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, vae)
    ...     again = checkpoint.load(folder)
    >>> x = torch.rand(5, 8, 8)
    >>> torch.equal(again.encode(x).mean, vae.encode(x).mean)
    True
    """
    content = read(Path(path), _KIND)
    try:
        plan, weights = content["plan"], dict(content["weights"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its manifest does not describe a pair ({error!r})") from error
    if factory is None and plan is None:
        raise ValueError(
            f"{path}: its pair has modules that are not of pyro_vae or torch, or that were changed after "
            "construction; pass a factory that builds the pair"
        )
    pair = _rebuild(plan, weights, str(path)) if factory is None else factory()
    store = pyro.get_param_store()
    with store.scope():
        modules = [] if data is None else _make_parameters(*_programs(pair), data)
        state = store.get_state()
        own = _tensors(*_programs(pair), state["params"], modules)
        if data is None and any(
            name.startswith(("store.", "closed.")) for name in weights.keys() - own.keys()
        ):
            raise ValueError(
                f"{path}: parameters of plain functions are made when the functions run, so load must run "
                "the pair; expected rows of the data: load(path, factory, x[:2])"
            )
        copy_all(weights, own, str(path))
    store.set_state(state)
    return pair


def within(path: Path | str) -> AbstractContextManager[None]:
    """A context manager for code that builds the pair saved at ``path``. It raises ``ValueError`` if the code
    would allocate far more memory than the saved files have."""
    files = [file for file in Path(path).glob("*.safetensors") if is_file(file)]
    return bounded(sum(file.stat().st_size for file in files), str(path))


def _rebuild(plan: list[Any], weights: dict[str, Tensor], path: str) -> nn.Module:
    try:
        with bounded(sum(tensor.numel() for tensor in weights.values()), path):
            pair = build(plan)
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{path}: its description of the pair is invalid ({error!r}); pass a factory that builds the pair"
        ) from error
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return pair.to(dtype=dtypes.pop()) if len(dtypes) == 1 else pair


def copy_all(stored: dict[str, Tensor], own: dict[str, Tensor], path: str) -> None:
    """Copy each stored tensor into the pair's ``own`` tensor of the same name.

    :raises ValueError: if names, shapes or dtypes differ.
    """
    got, expected = (
        {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
        for tensors in (stored, own)
    )
    if got != expected:
        differing = sorted(
            name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name)
        )
        name = differing[0]
        raise ValueError(
            f"{path} has the parameters of another pair: {len(differing)} tensors differ, the first is "
            f"{name!r}: expected {expected.get(name, 'none')} but got {got.get(name, 'none')}; build the "
            "pair as it was trained"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if not torch.equal(tensor.cpu(), stored[name]):  # copy_ would raise for an expanded tensor
                tensor.copy_(stored[name])


def _programs(pair: Any) -> tuple[Program, Program]:
    if isinstance(pair, tuple) and len(pair) == 2:
        return pair
    if hasattr(pair, "model") and hasattr(pair, "guide"):
        return pair.model, pair.guide
    raise ValueError(f"pair: expected (model, guide), or an object with both, but got {type(pair).__name__}")


def _make_parameters(model: Program, guide: Program, data: Any) -> list[nn.Module]:
    """Run a pair on the data, in the dtype of its parameters, see :func:`make_parameters`."""
    return make_parameters(model, guide, inspect(model, guide, as_whole(data)).batch)


def _tensors(
    model: Program, guide: Program, params: dict[str, Tensor], modules: Collection[nn.Module]
) -> dict[str, Tensor]:
    """The parameters and buffers of a pair by name: those of model and guide if they are modules, the other
    entries of the param store, and the buffers and frozen parameters of networks that plain functions close
    over.

    :param params: the unconstrained parameters in the param store.
    :param modules: the modules that a run of the pair called.
    """
    tensors: dict[str, Tensor] = {}
    for side, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            tensors |= {
                f"{side}.{name}": tensor for name, tensor in program.state_dict(keep_vars=True).items()
            }
    in_modules = {id(tensor) for tensor in tensors.values()}
    tensors |= {f"store.{name}": tensor for name, tensor in params.items() if id(tensor) not in in_modules}
    named = in_modules | {id(tensor) for tensor in params.values()}
    for i, module in enumerate(closed_over(model, guide, modules)):
        state = module._parameters | {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        tensors |= {
            f"closed.{i}.{name}": tensor
            for name, tensor in state.items()
            if tensor is not None and id(tensor) not in named
        }
    return tensors
