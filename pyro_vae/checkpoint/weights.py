"""The trained parameters and buffers of any pair; nothing is pickled."""

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
from pyro_vae.data.batches import as_arguments
from pyro_vae.files import is_file
from pyro_vae.pairs.preserve import closed_over, make_parameters
from pyro_vae.pairs.traces import Program

_KIND = "pair"


def save(path: Path | str, pair: Any, *args: Any, param_store: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """Store a trained pair in the folder ``path``, whole or not at all, in the place of one that was there.

    :param pair: a :class:`~pyro_vae.VAE`, anything with ``.model`` and ``.guide``, or a tuple ``(model, guide)``.
    :param args: with ``kwargs`` the arguments of one run, such as two rows of the data, or all of them where the guide has
        parameters for each datum. A pair that is not made of pyro_vae's modules alone shows by it what it consists of:
        parameters of plain functions, and networks that they call and close over. A buffer of a network that is not called
        itself, but only by a method, is not seen.
    :param param_store: where these parameters are: ``history.param_store`` of a fit; by default Pyro's own, of which what the
        pair does not use is left out.
    :raises ValueError: without arguments for such a pair; where parameters that it uses are not in the store, or it does not
        use what is in ``param_store``.
    :raises OSError: with its ``errno``; what was at ``path`` is then as it was.
    """
    save_pair(path, pair, args, kwargs, param_store=param_store)


def save_pair(
    path: Path | str,
    pair: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    param_store: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """:func:`save`, and ``about``: what :func:`read_about` is to tell, stored in one with the parameters."""
    model, guide = _programs(pair)
    plan, weights = describe(pair), _tensors(model, guide, {}, [])
    if plan is None and not (args or kwargs):
        raise ValueError(
            "pair: it is not made of pyro_vae's modules alone, and only a run shows which parameters and buffers it has; "
            "expected the arguments of one too: save(path, (model, guide), x[:2])"
        )
    if plan is None:
        given = (pyro.get_param_store().get_state() if param_store is None else param_store)["params"]
        with pyro.get_param_store().scope():  # as it will be loaded
            ran = make_parameters(model, guide, as_arguments(args, kwargs))
            owned = {id(tensor) for tensor in weights.values()}
            made = pyro.get_param_store().get_state()["params"]
            used = {name for name, value in made.items() if id(value) not in owned}
        if absent := sorted(used - given.keys()):
            raise ValueError(
                f"param_store: the pair has parameters that are not in it, the first of {len(absent)} {absent[0]!r}; expected "
                "param_store=history.param_store of the fit that trained it"
            )
        others = sorted(name for name in given.keys() - made.keys() if not name.startswith("__baseline_"))  # those of a loss
        if others and param_store is not None:
            raise ValueError(
                f"param_store: this run of the pair does not use {others[0]!r} of it, nor would one that loads it; expected "
                "arguments with which it uses all, such as labels"
            )
        weights = _tensors(model, guide, {name: given[name] for name in given if name in used}, ran)
    write(Path(path), _KIND, {"plan": plan, "weights": weights}, **about or {})


def read_about(path: Path | str) -> dict[str, Any]:
    """What ``about`` said when the pair was stored; raises as :func:`load`."""
    about = read_manifest(Path(path), _KIND)["about"]
    if not isinstance(about, dict):
        raise ValueError(f"{path}: its manifest says nothing of the pair; train again")
    return about


def load(path: Path | str, factory: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """The pair stored at ``path``, on the CPU.

    :param factory: makes the pair anew, as it was trained; a VAE of pyro_vae's own parts is built without.
    :param args: with ``kwargs`` the arguments of one run, for parameters that exist only once the pair has run: those of
        plain functions, which are left in Pyro's param store, and of lazy modules; and to meet networks that functions close
        over.
    :return: what ``factory`` makes, or the VAE.
    :raises FileNotFoundError: where nothing is stored at ``path``.
    :raises ValueError: where it is damaged, of another version, or its weights are not this pair's.

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
        raise ValueError(f"{path}: its manifest holds no pair ({error!r})") from error
    if factory is None and plan is None:
        raise ValueError(f"{path}: its pair is not made of pyro_vae's parts alone; pass the factory that makes it")
    pair = _built(plan, weights, str(path)) if factory is None else factory()
    store = pyro.get_param_store()
    with store.scope():
        ran = make_parameters(*_programs(pair), as_arguments(args, kwargs)) if args or kwargs else []
        made = store.get_state()
        copy_all(weights, _tensors(*_programs(pair), made["params"], ran), str(path))
    store.set_state(made)
    return pair


def within(path: Path | str) -> AbstractContextManager[None]:
    """For a block that builds the pair stored at ``path``: it raises ``ValueError`` before it makes a tensor that is far larger
    than what is stored there."""
    files = [file for file in Path(path).glob("*.safetensors") if is_file(file)]
    return bounded(sum(file.stat().st_size for file in files), str(path))


def _built(plan: list[Any], weights: dict[str, Tensor], path: str) -> nn.Module:
    try:
        with bounded(sum(tensor.numel() for tensor in weights.values()), path):
            pair = build(plan)
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the plan of a stored pair is none ({error!r}); pass the pair's factory") from error
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return pair.to(dtype=dtypes.pop()) if len(dtypes) == 1 else pair


def copy_all(stored: dict[str, Tensor], own: dict[str, Tensor], path: str) -> None:
    """Copy each tensor into that of its name. Raises ``ValueError`` where names, shapes or dtypes differ."""
    shapes, expected = ({name: f"{tuple(t.shape)} {t.dtype}" for name, t in each.items()} for each in (stored, own))
    if shapes != expected:
        differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        name = differing[0]
        raise ValueError(
            f"{path} holds the weights of another pair: {len(differing)} differ, the first {name!r} is "
            f"{shapes.get(name, 'missing')} in the file but {expected.get(name, 'missing')} in the pair; build the pair as "
            "it was trained"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if not torch.equal(tensor.cpu(), stored[name]):  # one that is an expanded number does not bear to be written
                tensor.copy_(stored[name])


def _programs(pair: Any) -> tuple[Program, Program]:
    if isinstance(pair, tuple) and len(pair) == 2:
        return pair
    if hasattr(pair, "model") and hasattr(pair, "guide"):
        return pair.model, pair.guide
    raise ValueError(f"pair: expected (model, guide), or an object with both, but got {type(pair).__name__}")


def _tensors(model: Program, guide: Program, params: dict[str, Tensor], ran: Collection[nn.Module]) -> dict[str, Tensor]:
    """Every parameter and buffer of the modules; those that are only in the param store; and of networks that functions close
    over what is not in the store either: buffers, frozen parameters.

    :param params: those of the param store, unconstrained.
    """
    tensors: dict[str, Tensor] = {}
    for side, program in (("model", model), ("guide", guide)):
        if isinstance(program, nn.Module):
            tensors |= {f"{side}.{name}": tensor for name, tensor in program.state_dict(keep_vars=True).items()}
    own = {id(tensor) for tensor in (*tensors.values(), *params.values())}
    inside = {id(tensor) for tensor in tensors.values()}
    tensors |= {f"store.{name}": tensor for name, tensor in params.items() if id(tensor) not in inside}
    for i, module in enumerate(closed_over(model, guide, ran)):
        held = module._parameters | {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        tensors |= {f"closed.{i}.{name}": t for name, t in held.items() if t is not None and id(t) not in own}
    return tensors
