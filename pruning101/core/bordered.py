"""Two convolutions as one layer that is right at the border, too."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core.composition import SIDES, Composition


class BorderedConv2d(nn.Module):
    """Two convolutions as one that is right at the border, too; made by ``merging.merge``.

    [B, I, H, W] or [I, H, W] in, of any size that the pair takes, and out what the pair gives.

    ``weight`` [O, I / groups, kh, kw] and ``bias`` are those of the plain merged convolution. It
    runs over the whole input, with ``stride``, ``padding``, ``dilation`` and ``groups``. The few
    outputs whose window hangs over into the padding of the second layer are then corrected, by
    small convolutions of the outermost rows and columns of the input. Their kernels are parameters
    of their own: ``top``, ``bottom``, ``left``, ``right`` and the corners ``top_left`` and so on,
    where two sides have corrected the same taps, each [O, overhangs, overhangs, I / groups, rows,
    columns] (``core.composition`` says what an overhang is). ``top_bias`` and so on, [O, overhangs,
    overhangs], are what the first layer's bias did there. None where nothing is to be corrected.
    All of them read the input, so the module is one layer deep.
    """

    weight: Tensor
    bias: Tensor | None
    top: Tensor | None
    top_bias: Tensor | None
    bottom: Tensor | None
    bottom_bias: Tensor | None
    left: Tensor | None
    left_bias: Tensor | None
    right: Tensor | None
    right_bias: Tensor | None
    top_left: Tensor | None
    top_left_bias: Tensor | None
    top_right: Tensor | None
    top_right_bias: Tensor | None
    bottom_left: Tensor | None
    bottom_left_bias: Tensor | None
    bottom_right: Tensor | None
    bottom_right_bias: Tensor | None

    def __init__(self, pair: Composition, *, requires_grad: bool = True) -> None:
        super().__init__()
        geometry = pair.geometry()
        self.in_channels: int = geometry["in_channels"]
        self.out_channels: int = geometry["out_channels"]
        self.kernel_size: tuple[int, int] = geometry["kernel_size"]
        self.stride: tuple[int, int] = geometry["stride"]
        self.padding: tuple[int, int] = geometry["padding"]
        self.dilation: tuple[int, int] = geometry["dilation"]
        self.groups: int = geometry["groups"]
        self.padding_mode = "zeros"
        self._rows, self._columns = (axis.to_list() for axis in pair.axes)
        with torch.no_grad():
            values = {"bias": pair.bias()} | pair.shifts() | pair.kernels()
        for name in ["weight", "bias", *SIDES, *(f"{side}_bias" for side in SIDES)]:
            value = values.get(name)
            self.register_parameter(
                name, None if value is None else nn.Parameter(value, requires_grad)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return what the two layers give: [B, O, H', W'], or [O, H', W'] for one input.

        Raises ``ValueError`` if the input is smaller than the first layer's kernel.
        """
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        z = F.conv2d(
            batch, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        (dh, dw), g = self.dilation, self.groups
        rows, top, bottom = _strips(batch.shape[2], z.shape[2], self._rows, kh, sh, ph, dh)
        columns, left, right = _strips(batch.shape[3], z.shape[3], self._columns, kw, sw, pw, dw)
        # Written out one by one, so that the module can be scripted. Columns as rows of the input
        # turned round: a convolution of images one pixel wide takes twice the time.
        _correct(z, batch, self.top, self.top_bias, top, columns, g)
        _correct(z, batch, self.bottom, self.bottom_bias, bottom, columns, g)
        _correct(*_turned(z, batch, self.left, self.left_bias), left, rows, g)
        _correct(*_turned(z, batch, self.right, self.right_bias), right, rows, g)
        _correct(z, batch, self.top_left, self.top_left_bias, top, left, g)
        _correct(z, batch, self.top_right, self.top_right_bias, top, right, g)
        _correct(z, batch, self.bottom_left, self.bottom_left_bias, bottom, left, g)
        _correct(z, batch, self.bottom_right, self.bottom_right_bias, bottom, right, g)
        return z if x.dim() == 4 else z.squeeze(0)

    def extra_repr(self) -> str:
        """Say what the plain convolution is and where it is corrected."""
        corrected = [
            side
            for side in SIDES
            if getattr(self, side) is not None or getattr(self, f"{side}_bias") is not None
        ]
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, corrected={corrected}"
        )


class _Strip(NamedTuple):
    """Along one axis: which outputs a kernel is for, which part of it, and what it reads."""

    output: int  # the first one
    outputs: int
    overhang: int  # index of the first one
    overhangs: int
    step: int
    pixel: int  # the first one
    pixels: int
    place: int  # the first one in the kernel
    places: int
    stride: int
    padding: int
    dilation: int


def _strips(
    size: int, outputs: int, pair: list[int], kernel: int, stride: int, padding: int, dilation: int
) -> tuple[_Strip, _Strip, _Strip]:
    """Return, for one axis, all outputs, those over the near side, and those over the far side."""
    s1, s2, p2, window1, window2, reach = pair
    features = (size - window1) // s1 + 1
    if features < 1:
        raise ValueError("The input is smaller than the kernel of the first of the merged layers.")
    rest1 = (size - window1) % s1  # pixels that the first layer leaves over at the end
    rest2 = (features - window2) % s2
    every = _Strip(0, outputs, 0, 1, 1, 0, size, 0, kernel, stride, padding, dilation)

    number = min((p2 + s2 - 1) // s2, outputs)
    pixels = min(max(0, reach + 1), size)
    near = _Strip(0, number, 0, number, 1, 0, pixels, 0, pixels, 1, 0, 1)

    number = min(max(0, p2 - rest2 + s2 - 1) // s2, outputs)
    first = p2 - rest2 - 1 - s2 * (number - 1)
    places = max(0, reach + 1 + rest1)
    pixels = min(places, size)
    start, place = size - pixels, places - pixels
    far = _Strip(outputs - number, number, first, number, s2, start, pixels, place, pixels, 1, 0, 1)
    return every, near, far


def _turned(
    z: Tensor, x: Tensor, kernel: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Give rows for columns."""
    kernel = None if kernel is None else kernel.transpose(1, 2).transpose(4, 5)
    shift = None if shift is None else shift.transpose(1, 2)
    return z.transpose(2, 3), x.transpose(2, 3), kernel, shift


def _correct(
    z: Tensor,
    x: Tensor,
    kernel: Tensor | None,
    shift: Tensor | None,
    h: _Strip,
    w: _Strip,
    groups: int,
) -> None:
    """Add what one side or corner needs to its outputs in ``z``, in place."""
    if h.outputs == 0 or w.outputs == 0:
        return
    region = z[:, :, h.output : h.output + h.outputs, w.output : w.output + w.outputs]
    top, bottom = h.overhang, h.overhang + h.step * h.overhangs
    left, right = w.overhang, w.overhang + w.step * w.overhangs
    if shift is not None:
        shift = shift[:, top : bottom : h.step, left : right : w.step]
    if kernel is None or h.pixels == 0 or w.pixels == 0:
        if shift is not None:
            region += shift
        return
    kernel = kernel[:, top : bottom : h.step, left : right : w.step]
    kernel = kernel[..., h.place : h.place + h.places, w.place : w.place + w.places]
    strip = F.conv2d(
        x[:, :, h.pixel : h.pixel + h.pixels, w.pixel : w.pixel + w.pixels],
        kernel.flatten(0, 2),
        None if shift is None else shift.flatten(),
        [h.stride, w.stride],
        [h.padding, w.padding],
        [h.dilation, w.dilation],
        groups,
    )
    # [B, O * overhangs * overhangs, H', W']: of overhangs and outputs of an axis, one is a 1.
    strip = strip.unflatten(1, [-1, h.overhangs, w.overhangs]).transpose(3, 4)
    region += strip.flatten(4, 5).flatten(2, 3)
