"""Trunks: the networks that conditionals read their parameters from.

Every trunk takes any leading batch shape, ``(particles, batch, ...)`` say, flattens inside and restores outside, and
names what it returns by ``out_shape``, so that a conditional can size its own read-out.
"""

import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

Shape = int | Sequence[int]
Activation = Callable[[Tensor], Tensor]


def as_shape(shape: Shape) -> torch.Size:
    """``20`` and ``(20,)`` are one event shape."""
    try:
        sizes = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
    except TypeError:
        sizes = (0,)
    if not all(size > 0 for size in sizes):
        raise ValueError(f"shape: expected positive whole numbers, such as 20 or (28, 28), but got {shape!r}")
    return torch.Size(sizes)


def split_shape(x: Tensor, shape: Shape) -> torch.Size:
    """The leading (batch) shape of ``x`` over events of ``shape``.

    A number stands for any event with that many elements: ``784`` matches ``(batch, 784)`` and ``(batch, 28, 28)``, the
    fewest trailing dimensions being taken.
    """
    if not isinstance(shape, int):
        batch_dims = x.dim() - len(shape)
        if batch_dims >= 0 and x.shape[batch_dims:] == torch.Size(shape):
            return x.shape[:batch_dims]
    else:
        for event_dims in range(1, x.dim() + 1):
            if math.prod(x.shape[-event_dims:]) == shape:
                return x.shape[:-event_dims]
    raise ValueError(
        f"trunk: the input has shape {tuple(x.shape)} but the trunk was built for events of {shape}; "
        f"pass inputs of shape (*batch, *event), or build the trunk with in_shape={tuple(x.shape[1:])}"
    )


def matching(x: Tensor, parameter: Tensor) -> Tensor:
    """``x`` as the parameters take it: integers are cast, another floating dtype or device is an error."""
    if not x.is_floating_point():
        x = x.to(parameter.dtype)
    if x.dtype != parameter.dtype or x.device != parameter.device:
        raise ValueError(
            f"trunk: the input is {x.dtype} on {x.device} but the parameters are {parameter.dtype} on "
            f"{parameter.device}; pass x.to({parameter.dtype}) or move the module with .to(...)"
        )
    return x


def out_shape(trunk: nn.Module) -> torch.Size:
    """Shape of one feature event of ``trunk``: its ``out_shape``, its ``out_features``, or those of the last layer of an
    ``nn.Sequential`` that has them. Raises ``ValueError`` where the trunk tells neither."""
    layers = reversed(trunk) if isinstance(trunk, nn.Sequential) else [trunk]
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            return out_shape(layer)
        if isinstance(layer, nn.Flatten | nn.Unflatten):
            break  # what it makes of the shape below is not ours to guess
        for attribute in ("out_shape", "out_features"):
            if hasattr(layer, attribute):
                return as_shape(getattr(layer, attribute))
    raise ValueError(
        f"trunk: {type(trunk).__name__} does not say its out_shape, so its read-out cannot be sized; expected e.g. "
        "nets.MLP(784, (500,)), or set trunk.out_shape = (500,); a read-out flattens by itself, so drop a last nn.Flatten"
    )


class Part(nn.Module):
    """A module that remembers the arguments it was built from, so that a stored pair can be built again."""

    given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        part = super().__new__(cls)
        vars(part)["given"] = args, kwargs
        return part


class MLP(Part):
    """Multi-layer perceptron, h ← f(W h + b) for each hidden layer; AEVB's network with ``hidden=(500,)``.

    :param in_shape: a number of elements (``784`` takes ``(*batch, 28, 28)`` too), an event shape, or one shape per input
        where the trunk reads several, ``((28, 28), (10,))``: these are flattened, broadcast and concatenated.
    :param hidden: widths of the hidden layers; ``()`` is the identity, for linear models.
    :param activation: f, any callable of a tensor (``torch.tanh``, ``torch.nn.functional.softplus``, ``nn.GELU()``).
    :param residual: add each hidden layer's input to its output where their widths agree (He et al. 2016).

    ``forward(*inputs)``: ``(*batch, *in_shape)`` each → ``(*batch, hidden[-1])``. Raises ``ValueError`` on other shapes.

    >>> MLP(784, (500, 300))(torch.zeros(7, 64, 28, 28)).shape
    torch.Size([7, 64, 300])
    """

    def __init__(
        self,
        in_shape: Shape | Sequence[Sequence[int]],
        hidden: Sequence[int] = (500,),
        *,
        activation: Activation = torch.tanh,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(activation, type):
            raise ValueError(
                f"MLP: activation is the class {activation.__name__}; pass {activation.__name__}()"
            )
        several = not isinstance(in_shape, int) and any(not isinstance(size, int) for size in in_shape)
        shapes = in_shape if several else (in_shape,)
        self.in_shapes: list[Shape] = [s if isinstance(s, int) else as_shape(s) for s in shapes]  # type: ignore[union-attr, arg-type]
        widths = [sum(math.prod(as_shape(shape)) for shape in self.in_shapes), *as_shape(tuple(hidden))]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.activation = activation
        self.residual = residual
        self.out_shape = torch.Size(widths[-1:])

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != len(self.in_shapes):
            raise ValueError(
                f"MLP: got {len(inputs)} inputs but was built for {len(self.in_shapes)}, of shape "
                f"{[s if isinstance(s, int) else tuple(s) for s in self.in_shapes]}; give in_shape one shape per input"
            )
        batches = [split_shape(x, shape) for x, shape in zip(inputs, self.in_shapes, strict=True)]
        batch = torch.broadcast_shapes(*batches)
        flat = [x.reshape(*own, -1).expand(*batch, -1) for x, own in zip(inputs, batches, strict=True)]
        if not self.layers:
            return torch.cat(flat, -1)
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]  # a draw, where it is a PyroSample
        h = torch.cat([matching(x, weight) for x in flat], -1)
        for layer in self.layers:
            out = self.activation(layer(h))
            h = h + out if self.residual and out.shape == h.shape else out
        return h

    def extra_repr(self) -> str:
        return f"activation={getattr(self.activation, '__name__', self.activation)}, residual={self.residual}"


class ConvEncoder(Part):
    """Convolutional trunk for images: each layer a stride-2 convolution, which halves height and width.

    :param in_shape: ``(channels, height, width)``, or ``(height, width)`` for images without a channel dimension.
    :param channels: feature maps of each layer.

    ``forward(x)``: ``(*batch, *in_shape)`` → ``(*batch, channels[-1], height', width')``.

    >>> ConvEncoder((28, 28), (16, 32))(torch.zeros(5, 64, 28, 28)).shape
    torch.Size([5, 64, 32, 7, 7])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        *,
        activation: Activation = torch.relu,
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape)
        first, height, width = _image_shape(self.in_shape)
        maps = [first, *_channels(channels)]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1) for before, after in pairwise(maps)
        )
        self.activation = activation
        for _ in channels:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.out_shape = torch.Size((maps[-1], height, width))

    def forward(self, x: Tensor) -> Tensor:
        batch = split_shape(x, self.in_shape)
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        h = matching(x, weight).reshape(-1, *_image_shape(self.in_shape))
        for layer in self.layers:
            h = self.activation(layer(h))
        return h.reshape(*batch, *self.out_shape)


class ConvDecoder(Part):
    """Convolutional trunk from a latent to feature maps of an image's size, by stride-2 transposed convolutions.

    :param in_shape: shape of the latent, as for :class:`MLP`.
    :param image_shape: ``(height, width)`` or ``(channels, height, width)``; the channels are the conditional's business.
    :param channels: feature maps, coarsest first; each doubles height and width.

    ``forward(z)``: ``(*batch, *in_shape)`` → ``(*batch, channels[-1], height, width)``.

    >>> ConvDecoder(20, (28, 28), (32, 16))(torch.zeros(5, 64, 20)).shape
    torch.Size([5, 64, 16, 28, 28])
    """

    def __init__(
        self,
        in_shape: Shape,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        *,
        activation: Activation = torch.relu,
    ) -> None:
        super().__init__()
        _, height, width = _image_shape(as_shape(image_shape))
        coarsest, *finer = _channels(channels)
        maps = (coarsest, coarsest, *finer)
        factor = 2 ** len(channels)
        self.coarse_shape = (maps[0], math.ceil(height / factor), math.ceil(width / factor))
        self.project = MLP(in_shape, (math.prod(self.coarse_shape),), activation=activation)
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in pairwise(maps)
        )
        self.activation = activation
        self.out_shape = torch.Size((maps[-1], height, width))

    def forward(self, *inputs: Tensor) -> Tensor:
        h = self.project(*inputs)
        batch = h.shape[:-1]
        h = h.reshape(-1, *self.coarse_shape)
        for layer in self.layers:
            h = self.activation(layer(h))
        _, height, width = self.out_shape
        return h[..., :height, :width].reshape(*batch, *self.out_shape)


class Standardize(Part):
    """(x − mean) / scale, for trunks whose data are far from unit size: ``nn.Sequential(Standardize(0, 255), MLP(784))``.

    ``forward(x)`` keeps the shape and takes integers too.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: float | Tensor, scale: float | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return (matching(x, self.mean) - self.mean) / self.scale


class Readout(nn.Module):
    """The linear last layer, from features of ``in_shape`` to one tensor of ``shape``.

    Where the features are maps of the wanted image's height and width it is a 1×1 convolution, else a full matrix.
    ``forward(h)``: ``(*batch, *in_shape)`` → ``(*batch, *shape)``.

    :param image: the last two dimensions of ``shape`` are an image's.
    """

    def __init__(self, in_shape: Shape, shape: Shape, *, image: bool = True) -> None:
        super().__init__()
        self.in_shape, self.shape = as_shape(in_shape), as_shape(shape)
        self.convolutional = image and len(self.in_shape) == 3 and self.in_shape[1:] == self.shape[-2:]
        self.layer: nn.Conv2d | nn.Linear
        if self.convolutional:
            self.layer = nn.Conv2d(self.in_shape[0], math.prod(self.shape[:-2]), kernel_size=1)
        else:
            self.layer = nn.Linear(math.prod(self.in_shape), math.prod(self.shape))

    def forward(self, h: Tensor) -> Tensor:
        batch = split_shape(h, self.in_shape)
        rows = h.reshape(-1, *self.in_shape) if self.convolutional else h.reshape(*batch, -1)
        # under autocast the layers are of lower precision, the densities are not
        return self.layer(rows).reshape(*batch, *self.shape).to(self.layer.weight.dtype)


def _channels(channels: Sequence[int]) -> torch.Size:
    if not channels:
        raise ValueError("channels: expected one layer or more, such as (32, 64), but got none")
    return as_shape(tuple(channels))


def _image_shape(shape: torch.Size) -> tuple[int, int, int]:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"image: expected (height, width) or (channels, height, width) but got {tuple(shape)}"
        )
    channels, height, width = (1, *shape)[-3:]
    return channels, height, width
