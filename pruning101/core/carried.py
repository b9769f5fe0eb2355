"""Constants that no bias can carry: at the border of a convolution, and among computed outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core.surgery import keep_only


class ConstantBorder(nn.Module):
    """A convolution that pads with zeros, and its response to a constant that it no longer reads.

    ``border`` convolves an image of ones with one kernel per output, [out, 1, ...]: inside that is
    a bias, at the border less, at any size of the input. It costs as many multiplications as one
    input channel, once for the whole batch, and an addition.
    """

    def __init__(self, layer: nn.Module, border: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.border = border

    def forward(self, input: Tensor) -> Tensor:
        """Return ``layer(input)`` plus the response to the constant."""
        ones = torch.ones_like(input[:1, :1])
        return self.layer(input) + self.border(ones)


class Scattered(nn.Module):
    """A layer that computes fewer outputs than the network wants; the others are constants.

    Output ``i`` is number ``order[i]`` of the layer's outputs followed by the ``constants``, along
    ``axis`` (counted from the end, -3 for the channels of an image). It costs a copy of the output.
    """

    order: Tensor

    def __init__(self, layer: nn.Module, order: Tensor, constants: Tensor, axis: int) -> None:
        super().__init__()
        self.layer = layer
        self.axis = axis
        self.constants: Tensor
        if isinstance(constants, nn.Parameter):
            self.constants = constants
        else:
            self.register_buffer("constants", constants)
        self.register_buffer("order", order)

    def forward(self, input: Tensor) -> Tensor:
        """Return all outputs in their places."""
        output = self.layer(input)
        shape = list(output.shape)
        shape[self.axis] = self.constants.shape[0]
        every = torch.cat([output, self.constants.expand(shape)], self.axis)
        return every.index_select(self.axis, self.order)


def add_border(model: nn.Module, name: str, kernel: Tensor) -> None:
    """Add the response to a constant, one kernel per output, to a convolution of ``model``."""
    above, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(name)
    parent = model.get_submodule(above)
    kernel = kernel.to(layer.weight)
    if isinstance(parent, ConstantBorder):
        border: Any = parent.border
        border.weight = nn.Parameter(border.weight.detach() + kernel, layer.weight.requires_grad)
        return
    border = type(layer)(
        1,
        len(kernel),
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=False,
        device="meta",  # draws no random numbers
    )
    border.weight = nn.Parameter(kernel, layer.weight.requires_grad)
    setattr(parent, leaf, ConstantBorder(layer, border).train(layer.training))


@torch.no_grad()
def scatter(model: nn.Module, name: str, computed: Tensor) -> None:
    """Let a layer of ``model`` compute the outputs that are True in ``computed`` (bool [out]) only.

    The others have rows of zeros, and become constants: the biases.
    """
    layer: Any = model.get_submodule(name)
    weight, bias = layer.weight, layer.bias
    n = int(computed.sum())
    order = torch.where(computed, computed.cumsum(0) - 1, n)
    shape = (-1, *[1] * (weight.dim() - 2))
    fill: Tensor = weight.new_zeros(1).view(shape)
    if bias is not None:
        order[~computed] += torch.arange(len(computed) - n)
        fill = nn.Parameter(bias[~computed.to(bias.device)].view(shape), bias.requires_grad)
    keep_only(layer, "out", computed.nonzero().flatten())
    above, _, leaf = name.rpartition(".")
    scattered = Scattered(layer, order.to(weight.device), fill, 1 - weight.dim())
    setattr(model.get_submodule(above), leaf, scattered.train(layer.training))


def is_border(model: nn.Module, name: str) -> bool:
    """Tell whether this module is the ``border`` of a :class:`ConstantBorder`."""
    above, _, leaf = name.rpartition(".")
    return leaf == "border" and isinstance(model.get_submodule(above), ConstantBorder)


def own_name(model: nn.Module, name: str) -> str:
    """Return the name that a layer had before it was wrapped."""
    above, _, leaf = name.rpartition(".")
    wrapped = leaf in ("layer", "border")
    wrapped = wrapped and isinstance(model.get_submodule(above), ConstantBorder | Scattered)
    return own_name(model, above) if wrapped else name
