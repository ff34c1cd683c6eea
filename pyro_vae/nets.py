"""Trunks: networks that compute features. A conditional maps the features to the parameters of its
distribution by linear layers, its read-outs.

A trunk accepts any leading batch shape, such as ``(particles, batch)``, and preserves it. Its attribute
``out_shape`` is the event shape of the features. A conditional needs it to construct the read-outs.
"""

import inspect
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
    """``shape`` as a ``torch.Size``; ``20`` becomes ``(20,)``.

    :raises ValueError: unless all sizes are positive whole numbers.
    """
    try:
        sizes = tuple(map(operator.index, shape if isinstance(shape, Sequence) else (shape,)))
    except TypeError:
        sizes = (0,)
    if not all(size > 0 for size in sizes):
        raise ValueError(f"shape: expected positive whole numbers, such as 20 or (28, 28), but got {shape!r}")
    return torch.Size(sizes)


def split_shape(x: Tensor, shape: Shape) -> torch.Size:
    """The batch shape of ``x``: its shape without the trailing dimensions, which are an event of ``shape``.

    A number as ``shape`` matches any event with that many elements: ``784`` matches ``(batch, 784)`` and
    ``(batch, 28, 28)``. The fewest trailing dimensions that match are used.

    :raises ValueError: if no trailing dimensions match.
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
    """``x`` with integers cast to the dtype of ``parameter``.

    :raises ValueError: if the floating dtypes or the devices differ.
    """
    if not x.is_floating_point():
        x = x.to(parameter.dtype)
    if x.dtype != parameter.dtype or x.device != parameter.device:
        raise ValueError(
            f"trunk: the input is {x.dtype} on {x.device} but the parameters are {parameter.dtype} on "
            f"{parameter.device}; pass x.to({parameter.dtype}) or move the module with .to(...)"
        )
    return x


def out_shape(trunk: nn.Module) -> torch.Size:
    """Event shape of the features of ``trunk``: its attribute ``out_shape`` or ``out_features``.

    For an ``nn.Sequential``, it is the attribute of the last layer that has one.

    :raises ValueError: if there is no such attribute, or an ``nn.Flatten`` or ``nn.Unflatten`` follows.
    """
    layers = reversed(trunk) if isinstance(trunk, nn.Sequential) else [trunk]
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            return out_shape(layer)
        if isinstance(layer, nn.Flatten | nn.Unflatten):
            break  # the shape that it returns is not inferred
        for attribute in ("out_shape", "out_features"):
            if hasattr(layer, attribute):
                return as_shape(getattr(layer, attribute))
    raise ValueError(
        f"trunk: cannot infer the output shape of {type(trunk).__name__}; expected a trunk such as "
        "nets.MLP(784, (500,)), or set trunk.out_shape = (500,). A conditional flattens the features itself, "
        "so remove a final nn.Flatten"
    )


def num_inputs(module: nn.Module) -> int | None:
    """Number of tensors that ``module(...)`` takes, or ``None`` for any number.

    It is the attribute ``num_inputs`` of the module. If there is none, it is the number of positional
    arguments of ``forward``.
    """
    if hasattr(module, "num_inputs"):
        return module.num_inputs  # type: ignore[return-value]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in positional for kind in kinds)


class Part(nn.Module):
    """A module that stores its constructor arguments, so that a checkpoint can rebuild it."""

    given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        part = super().__new__(cls)
        vars(part)["given"] = args, kwargs
        return part


class MLP(Part):
    """Multi-layer perceptron: h ← f(W h + b) for each hidden layer. The default is the network of Kingma &
    Welling (2013).

    :param in_shape: event shape of the input. A number matches any event with that many elements: ``784``
        matches ``(*batch, 28, 28)``. For several inputs, a tuple with a shape for each, such as
        ``((28, 28), (10,))``: the inputs are flattened, broadcast and concatenated.
    :param hidden: widths of the hidden layers. With ``()`` the features are the flattened inputs, for linear
        models.
    :param activation: f, a function of a tensor (``torch.tanh``, ``torch.nn.functional.softplus``,
        ``nn.GELU()``).
    :param residual: add the input of a hidden layer to its output if their widths are equal (He et al. 2016).

    ``forward(*inputs)``: ``(*batch, *in_shape)`` each → ``(*batch, hidden[-1])``. Raises ``ValueError`` if an
    input has another shape.

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
        self.num_inputs = len(self.in_shapes)
        widths = [sum(math.prod(as_shape(shape)) for shape in self.in_shapes), *as_shape(tuple(hidden))]
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.activation = activation
        self.residual = residual
        self.out_shape = torch.Size(widths[-1:])

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) != self.num_inputs:
            raise ValueError(
                f"MLP: got {len(inputs)} inputs but was built for {self.num_inputs}, of shapes "
                f"{[s if isinstance(s, int) else tuple(s) for s in self.in_shapes]}; pass that many inputs, "
                "x or z first and then the conditions, or build the MLP with one in_shape per input"
            )
        batches = [split_shape(x, shape) for x, shape in zip(inputs, self.in_shapes, strict=True)]
        batch = torch.broadcast_shapes(*batches)
        flat = [x.reshape(*shape, -1).expand(*batch, -1) for x, shape in zip(inputs, batches, strict=True)]
        if not self.layers:
            return torch.cat(flat, -1)
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]  # of a PyroSample, a sample
        h = torch.cat([matching(x, weight) for x in flat], -1)
        for layer in self.layers:
            out = self.activation(layer(h))
            h = h + out if self.residual and out.shape == h.shape else out
        return h

    def extra_repr(self) -> str:
        return f"activation={getattr(self.activation, '__name__', self.activation)}, residual={self.residual}"


class ConvEncoder(Part):
    """Convolutional trunk for images. Each layer is a stride-2 convolution that halves height and width.

    :param in_shape: ``(channels, height, width)`` or ``(height, width)``.
    :param channels: number of feature maps of each layer.
    :param activation: as for :class:`MLP`.

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
            nn.Conv2d(fan_in, fan_out, kernel_size=3, stride=2, padding=1)
            for fan_in, fan_out in pairwise(maps)
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
    """Convolutional trunk that maps a latent to feature maps of the size of an image.

    Each layer is a stride-2 transposed convolution that doubles height and width.

    :param in_shape: event shape of the input, as for :class:`MLP`.
    :param image_shape: ``(height, width)`` or ``(channels, height, width)``; the number of channels is
        ignored.
    :param channels: number of feature maps of each layer, coarsest first.
    :param activation: as for :class:`MLP`.

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
        self.num_inputs = self.project.num_inputs
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(fan_in, fan_out, kernel_size=4, stride=2, padding=1)
            for fan_in, fan_out in pairwise(maps)
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
    """(x − mean) / scale, to standardize the input of a trunk.

    ``forward(x)`` preserves the shape and accepts integers. Example:
    ``nn.Sequential(Standardize(0, 255), MLP(784))``.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: float | Tensor, scale: float | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return (matching(x, self.mean) - self.mean) / self.scale


class Log1p(Part):
    """log(1 + x), to compress counts as the input of a trunk. ``forward(x)`` preserves the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return (x if x.is_floating_point() else x.to(torch.get_default_dtype())).log1p()


class Preprocess(Part):
    """A trunk whose first input passes through a layer such as :class:`Standardize`. Further inputs, such as
    conditions, reach the trunk unchanged.

    :param layer: a module that preserves the shape of its input.
    :param trunk: any trunk.

    ``forward(x, *given)`` is ``trunk(layer(x), *given)``.
    """

    def __init__(self, layer: nn.Module, trunk: nn.Module) -> None:
        super().__init__()
        self.layer, self.trunk = layer, trunk
        self.num_inputs, self.out_shape = num_inputs(trunk), out_shape(trunk)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return self.trunk(self.layer(x), *given)


def value_if_missing(trunk: nn.Module | None) -> Tensor | float:
    """The value that stands for a missing entry in the first input of a trunk: the mean of a
    :class:`Standardize` that this input reaches first, which it maps to 0; else 0."""
    first = trunk.layer if isinstance(trunk, Preprocess) else trunk
    if isinstance(trunk, nn.Sequential) and len(trunk):
        first = trunk[0]
    return first.mean if isinstance(first, Standardize) else 0.0


class Readout(nn.Module):
    """Linear last layer that maps features of shape ``in_shape`` to one parameter of shape ``shape``.

    If the features are maps with the height and width of ``shape``, it is a 1×1 convolution, otherwise an
    ``nn.Linear``. ``forward(h)``: ``(*batch, *in_shape)`` → ``(*batch, *shape)``.

    :param image: whether the last two dimensions of ``shape`` are the height and width of an image.
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
        # under autocast the layer returns half precision, which is too low for the parameters of a density
        return self.layer(rows).reshape(*batch, *self.shape).to(self.layer.weight.dtype)


def _channels(channels: Sequence[int]) -> torch.Size:
    if not channels:
        raise ValueError("channels: expected at least one layer, such as (32, 64), but got none")
    return as_shape(tuple(channels))


def _image_shape(shape: torch.Size) -> tuple[int, int, int]:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"image: expected (height, width) or (channels, height, width) but got {tuple(shape)}"
        )
    channels, height, width = (1, *shape)[-3:]
    return channels, height, width
