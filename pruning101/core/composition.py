"""The algebra of two convolutions, one after the other.

Along one axis, a convolution (kernel k1, stride s1, padding p1, dilation d1) gives

    y[i] = b1 + sum_a W1[a] x[i s1 + a d1 - p1],    0 <= i < n,    x = 0 outside the input,

and the next one

    z[j] = b2 + sum_u W2[u] y[j s2 + u d2 - p2],                   y = 0 outside 0 <= i < n.

Put into each other, tap (u, a) reads x at j s1 s2 + (u d2 s1 + a d1) - (p1 + p2 s1): this is one
convolution of stride s1 s2 and padding p1 + p2 s1, whose kernel holds at u d2 s1 + a d1 the sum of
W2[u] W1[a]. It uses the first formula for every i. Outside 0 <= i < n, though, the second layer
sees the zeros of its padding and not what the formula gives there, so that outputs near the border
come out wrong by the sum of W2[u] y[...] over the taps that hang over. Which those are depends only
on how far the output's window hangs over, its ``overhang`` of 1 to p2 values, and what they add is
again a sum of some of the products W2[u] W1[a], on the few pixels of the input that are really
there. In two dimensions a tap is missing if its row or its column is: rows plus columns, minus
the corners, which were counted twice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PRODUCTS = 2**21  # numbers kept at a time


class Convolution(NamedTuple):
    """One convolution, as plain tensors and numbers, (rows, columns) each."""

    weight: Tensor  # [O, I / groups, kh, kw]
    bias: Tensor | None  # [O]; None also where it is all zeros
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


_Taps = list[tuple[int, int, int, int]]  # second's tap, first's tap, index of overhang, place


@dataclass(frozen=True)
class Axis:
    """Sizes, strides, paddings and dilations of both layers along one axis."""

    k1: int
    k2: int
    s1: int
    s2: int
    p1: int
    p2: int
    d1: int
    d2: int

    @property
    def dilation(self) -> int:
        """The common step of all taps of the merged kernel."""
        steps = [self.d1] * (self.k1 > 1) + [self.d2 * self.s1] * (self.k2 > 1)
        return math.gcd(*steps) or 1

    @property
    def reach(self) -> int:
        """The last input pixel, from 0, that the first value outside the feature map looks at."""
        return (self.k1 - 1) * self.d1 - self.p1 - self.s1

    def overhangs(self, side: str) -> list[int]:
        """How far outputs may hang over this side; over the far one, that depends on the input."""
        if side == "all":
            return [0]
        return list(range(self.p2, 0, -self.s2)) if side == "near" else list(range(1, self.p2 + 1))

    def size(self, side: str) -> int:
        """Extent of the kernel of this side."""
        if side == "all":
            span = (self.k1 - 1) * self.d1 + (self.k2 - 1) * self.d2 * self.s1
            return span // self.dilation + 1
        return max(0, self.reach + (1 if side == "near" else self.s1))

    def missing(self, side: str) -> list[list[int]]:
        """Taps of the second layer that are concerned, for each overhang."""
        if side == "all":
            return [list(range(self.k2))]
        near = [[u for u in range(self.k2) if u * self.d2 < t] for t in self.overhangs(side)]
        return near if side == "near" else [[self.k2 - 1 - u for u in taps] for taps in near]

    def taps(self, side: str) -> _Taps:
        """Which products stand where in the kernel of this side.

        The far side is the near one in a mirror, but that the first layer may stop up to s1 - 1
        pixels short of the input's end. Its kernel has a place for all of those, the last ones.
        """
        found: _Taps = []
        overhangs = self.overhangs(side)
        for index, (t, taps) in enumerate(zip(overhangs, self.missing(side), strict=True)):
            for u in taps:
                for a in range(self.k1):
                    if side == "all":
                        place = (u * self.d2 * self.s1 + a * self.d1) // self.dilation
                    elif side == "near":
                        place = a * self.d1 - self.p1 - (t - u * self.d2) * self.s1
                    else:
                        outside = t - (self.k2 - 1 - u) * self.d2
                        pixel = (self.k1 - 1 - a) * self.d1 - self.p1 - outside * self.s1
                        place = self.reach - pixel
                    if 0 <= place < self.size(side):
                        found.append((u, a, index, place))
        return found

    def to_list(self) -> list[int]:
        """Return what :class:`~bordered.BorderedConv2d` has to know of the pair at run time."""
        window1 = (self.k1 - 1) * self.d1 + 1 - 2 * self.p1
        window2 = (self.k2 - 1) * self.d2 + 1 - 2 * self.p2
        return [self.s1, self.s2, self.p2, window1, window2, self.reach]

    def border_width(self, bias: bool) -> int:
        """Outputs that may be wrong at either end: all that hang over, or none.

        Without a bias it matters whether the first value outside the feature map reads the input
        for some input size, which it does at the far end if it does anywhere.
        """
        return -(-self.p2 // self.s2) if bias or self.taps("far") else 0


# The border: four sides and, counted twice by them, four corners.
SIDES = {
    "top": ("near", "all"),
    "bottom": ("far", "all"),
    "left": ("all", "near"),
    "right": ("all", "far"),
    "top_left": ("near", "near"),
    "top_right": ("near", "far"),
    "bottom_left": ("far", "near"),
    "bottom_right": ("far", "far"),
}


@dataclass(frozen=True)
class Composition:
    """Two convolutions that compose; the tensors of both, merged, come in ``dtype``."""

    one: Convolution
    two: Convolution
    dtype: torch.dtype

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Rows and columns."""
        rows, columns = (
            Axis(
                *(layer.weight.shape[2 + i] for layer in (self.one, self.two)),
                *(layer.stride[i] for layer in (self.one, self.two)),
                *(layer.padding[i] for layer in (self.one, self.two)),
                *(layer.dilation[i] for layer in (self.one, self.two)),
            )
            for i in (0, 1)
        )
        return rows, columns

    @property
    def groups(self) -> int:
        """Groups of channels that do not mix in either layer."""
        return math.gcd(self.one.groups, self.two.groups)

    def border_width(self) -> int:
        """Outputs a side that the merged kernel alone may get wrong."""
        return max(axis.border_width(self.one.bias is not None) for axis in self.axes)

    def geometry(self) -> dict[str, Any]:
        """The merged convolution's arguments."""
        rows, columns = self.axes
        return {
            "in_channels": self.one.weight.shape[1] * self.one.groups,
            "out_channels": self.two.weight.shape[0],
            "kernel_size": (rows.size("all"), columns.size("all")),
            "stride": (rows.s1 * rows.s2, columns.s1 * columns.s2),
            "padding": (rows.p1 + rows.p2 * rows.s1, columns.p1 + columns.p2 * columns.s1),
            "dilation": (rows.dilation, columns.dilation),
            "groups": self.groups,
        }

    def kernels(self, names: Iterable[str] = ("weight", *SIDES)) -> dict[str, Tensor]:
        """Return the kernels, those that are zero left out.

        [O, overhangs, overhangs, I / groups, rows, columns] each, that of ``weight`` without the
        overhangs. Sides are taken off, corners put back.
        """
        rows, columns = self.axes
        wanted = {
            name: sides
            for name in names
            if rows.taps((sides := SIDES.get(name, ("all", "all")))[0]) and columns.taps(sides[1])
        }
        left, right = self._factors()
        g, h1, h2, _, _, outputs, _ = left.shape
        kernels = {
            name: self.two.weight.new_empty(
                g * h2 * outputs,
                len(rows.overhangs(side)),
                len(columns.overhangs(other)),
                h1 * right.shape[-1],
                rows.size(side),
                columns.size(other),
                dtype=self.dtype,
            )
            for name, (side, other) in wanted.items()
        }
        # All products at once would be large, and made anew in memory each time: some at a time.
        step = max(1, _PRODUCTS // (left[..., 0, 0].numel() * right[0, 0, 0, 0].numel()))
        for start in range(0, outputs, step):
            products = _products(left[..., start : start + step, :], right)
            by_row: dict[str, Tensor] = {}
            for name, (side, other) in wanted.items():
                if side not in by_row:  # [overhang, row, v, b, ...]
                    by_row[side] = _sum_taps(products, rows, side)
                kernel = _sum_taps(by_row[side].movedim((2, 3), (0, 1)), columns, other)
                target = kernels[name].unflatten(3, (h1, -1)).unflatten(0, (g, h2, -1))
                target[:, :, start : start + step] = kernel.permute(4, 5, 6, 2, 0, 7, 8, 3, 1)
        for name, (side, other) in wanted.items():
            if (side == "all") != (other == "all"):
                kernels[name].neg_()
        if "weight" in kernels:
            kernels["weight"] = kernels["weight"][:, 0, 0]
        return kernels

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return both weights: [g, h1, h2, u, v, O'', M'] and [g, h1, h2, M', a, b, I'].

        g are the groups that both layers share, h1 and h2 what each splits those into further, so
        that the middle channels come in g * h1 * h2 blocks of M'. Where both split them further,
        in ways that do not fit, the first layer is written out without.
        """
        g = self.groups
        h1, h2 = self.one.groups // g, self.two.groups // g
        w1, w2 = self.one.weight, self.two.weight
        if h1 > 1 and h2 > 1:
            split = w1.unflatten(0, (g, h1, -1))  # [g, h1, M', I', a, b]
            wide = split.new_zeros(*split.shape[:3], h1, *split.shape[3:])
            wide.diagonal(dim1=1, dim2=3).copy_(split.movedim(1, -1))
            w1, h1 = wide.flatten(0, 2).flatten(1, 2), 1
        left = w2.unflatten(1, (h1, -1)).unflatten(0, (g, h2, -1)).permute(0, 3, 1, 5, 6, 2, 4)
        right = w1.unflatten(0, (g, h1, h2, -1)).permute(0, 1, 2, 3, 5, 6, 4)
        return left, right.contiguous()

    def through(self) -> Tensor:
        """What each tap of the second layer makes of the first's bias: [O, u, v]."""
        assert self.one.bias is not None
        bias = self.one.bias.unflatten(0, (self.two.groups, -1))
        weight = self.two.weight.unflatten(0, (self.two.groups, -1))
        return torch.einsum("gomuv,gm->gouv", weight, bias).flatten(0, 1)

    def bias(self) -> Tensor | None:
        """The merged bias, [O]."""
        if self.one.bias is None:
            return None if self.two.bias is None else self.two.bias.to(self.dtype, copy=True)
        through = self.through().sum((1, 2))
        return (through if self.two.bias is None else through + self.two.bias).to(self.dtype)

    def shifts(self) -> dict[str, Tensor]:
        """What the missing taps made of the first layer's bias: [O, overhangs, overhangs] each."""
        if self.one.bias is None:
            return {}
        through = self.through()
        found: dict[str, Tensor] = {}
        for name, sides in SIDES.items():
            rows, columns = (
                torch.tensor([[u in taps for u in range(k)] for taps in axis.missing(side)])
                for axis, side, k in zip(self.axes, sides, through.shape[1:], strict=True)
            )
            if len(rows) and len(columns):
                rows, columns = rows.to(through), columns.to(through)
                shift = torch.einsum("ouv,tu,sv->ots", through, rows, columns)
                found[f"{name}_bias"] = (-shift if "all" in sides else shift).to(self.dtype)
        return found


def _products(left: Tensor, right: Tensor) -> Tensor:
    """W2[:, :, u, v] @ W1[:, :, a, b], all of them: [u, a, v, b, g, h2, O'', h1, I']."""
    g, h1, h2, k2, _, outputs, _ = left.shape
    k1 = right.shape[4]
    if left.device.type == "cpu" and left.dtype == torch.float32 and k2 > 1:
        # Direct convolutions are faster than matrix products on many processors. One image for
        # each column b, its rows a; dilated so that no two rows meet, the taps u come out apart.
        images = right.flatten(0, 2).permute(3, 0, 1, 2, 4).flatten(1, 2)
        kernel = left.flip(3).flatten(0, 2).permute(0, 2, 3, 4, 1).flatten(0, 2).unsqueeze(3)
        every = F.conv2d(images, kernel, None, 1, ((k2 - 1) * k1, 0), (k1, 1), groups=g * h1 * h2)
        every = every.unflatten(2, (k2, k1)).unflatten(1, (g, h1, h2, -1, outputs))
        return every.permute(6, 7, 4, 0, 1, 3, 5, 2, 8)
    every = torch.matmul(left.flatten(3, 5), right.flatten(4, 6))
    every = every.unflatten(4, right.shape[4:]).unflatten(3, left.shape[3:6])
    return every.permute(3, 6, 4, 7, 0, 2, 5, 1, 8)


def _sum_taps(products: Tensor, axis: Axis, side: str) -> Tensor:
    """Sum products [u, a, ...] over the taps of one side: [overhang, place, ...]."""
    total = products.new_zeros(len(axis.overhangs(side)), axis.size(side), *products.shape[2:])
    for u, a, index, place in axis.taps(side):
        total[index, place] += products[u, a]
    return total
