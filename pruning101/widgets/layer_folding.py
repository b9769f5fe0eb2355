"""Lesson 6's widget: slopes on their way to 1, and one kernel grown from two, with its border."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from pruning101.core import plots
from pruning101.core.merging import border_width, merge
from pruning101.widgets import base

FIRST, SECOND, STRIDES, PADS = (1, 3, 5), (1, 3), (1, 2), ("no", "yes")
NEAR = 0.1  # a slope this near to 1 counts as linear


@dataclass(frozen=True)
class Merged:
    """Two kernels, the one that they make, and where it errs.

    ``first``, ``second`` and ``weight`` are kernels [h, w] of one channel; ``change`` [H, W] is the
    mean size of the difference between one convolution and the two, in standard deviations of what
    the two give; ``border`` is the number of output pixels a side that may differ, ``stride`` the
    first layer's: taps of the second stand so many pixels apart.
    """

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    change: np.ndarray
    border: int
    stride: int

    def grown(self, taps: int) -> np.ndarray:
        """Sum the first kernel, placed and scaled by each of the first ``taps`` of the second."""
        whole = np.zeros_like(self.weight)
        for place in range(taps):
            top, left, height, width = self.patch(place)
            weight = self.second.flat[place]
            whole[top : top + height, left : left + width] += weight * self.first
        return whole

    def patch(self, place: int) -> tuple[int, int, int, int]:
        """Where the first kernel stands for one tap of the second: top, left, height, width."""
        row, column = divmod(place, self.second.shape[1])
        return row * self.stride, column * self.stride, *self.first.shape


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``slopes`` are [iterations, activations] in the order of ``names``; ``merged`` has one entry a
    setting: size of the first kernel, of the second, stride of the first, padding of the second.
    """

    names: tuple[str, ...]
    slopes: np.ndarray
    merged: dict[tuple[int, int, int, str], Merged]


def precompute(slopes: Sequence[Mapping[str, float]], images: Tensor, *, seed: int = 0) -> State:
    """Merge kernels of one channel for every setting, and run them over ``images`` [N, C, H, W].

    ``slopes`` are those of every activation after each iteration of a training.

    Raises:
        ValueError: no slopes are given.
    """
    if not slopes or not slopes[0]:
        raise ValueError(
            "There are no slopes to draw: give those of each iteration, one "
            "`layer_folding.slopes(model)` for every step of the training."
        )
    generator = torch.Generator().manual_seed(seed)
    weights = {size: torch.randn(size, size, generator=generator) / size for size in FIRST}
    after = {size: torch.randn(size, size, generator=generator) / size for size in SECOND}
    found = {}
    for one in FIRST:
        for two in SECOND:
            for stride in STRIDES:
                for pads in PADS:
                    first = _layer(weights[one], stride, one // 2)
                    second = _layer(after[two], 1, two // 2 if pads == "yes" else 0)
                    found[one, two, stride, pads] = _merged(first, second, images[:, :1].float())
    names = tuple(slopes[0])
    return State(names, np.array([[s[name] for name in names] for s in slopes]), found)


def _layer(weight: Tensor, stride: int, padding: int) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, weight.shape[0], stride, padding, device="meta")
    layer.weight = nn.Parameter(weight[None, None], requires_grad=False)
    layer.bias = nn.Parameter(torch.tensor([0.3]), requires_grad=False)
    return layer


def _merged(first: nn.Conv2d, second: nn.Conv2d, images: Tensor) -> Merged:
    single = cast(nn.Conv2d, merge(first, second, border="interior"))
    with torch.no_grad():
        pair = second(first(images))
        change = (single(images) - pair).abs().mean((0, 1)) / pair.std()
    whole = torch.zeros(
        [d * (k - 1) + 1 for d, k in zip(single.dilation, single.kernel_size, strict=True)]
    )
    whole[:: single.dilation[0], :: single.dilation[1]] = single.weight[0, 0]
    return Merged(
        first.weight[0, 0].numpy(),
        second.weight[0, 0].numpy(),
        whole.numpy(),
        change.numpy(),
        border_width(first, second),
        first.stride[0],
    )


def draw(
    state: State,
    *,
    iteration: int = 0,
    first: int = 3,
    second: int = 3,
    stride: int = 1,
    pads: str = "yes",
    taps: int = 9,
) -> Figure:
    """Draw slopes and activations at one iteration, and below them two kernels and their sum."""
    at = _row(state, iteration)
    pair = state.merged[first, second, stride, pads]
    figure = plt.figure(figsize=(8.2, 4.9), layout="none")
    grid = figure.add_gridspec(
        2,
        2,
        width_ratios=(2.1, 1),
        left=0.085,
        right=0.98,
        bottom=0.03,
        top=0.94,
        wspace=0.18,
        hspace=0.32,
    )
    _slopes(state, at, figure.add_subplot(grid[0, 0]))
    _activations(state, at, figure.add_subplot(grid[0, 1]))
    kernels(pair, taps, ax=figure.add_subplot(grid[1, :]))
    return figure


def _slopes(state: State, at: int, ax: Axes) -> None:
    steps = np.arange(1, len(state.slopes) + 1)
    for i, values in enumerate(state.slopes.T):
        style = {"color": _colour(i), "linestyle": plots.DASHES[i % len(plots.DASHES)]}
        ax.plot(steps, values, label=state.names[i], linewidth=1.4, **style)
    ax.axvline(at + 1, color="#555555", linewidth=1)
    ax.axhline(1 - NEAR, color="#555555", linestyle=":", linewidth=1)
    linear = int((np.abs(1 - state.slopes[at]) <= NEAR).sum())
    ax.set(xlabel="iteration", ylabel="slope", ylim=(-0.05, 1.1))
    ax.set_title(f"iteration {at + 1}: {linear} of {len(state.names)} slopes near 1")
    ax.legend(fontsize="x-small", loc="upper left", handlelength=2)


def _activations(state: State, at: int, ax: Axes) -> None:
    z = np.array([-1.0, 0.0, 1.0])
    for i, slope in enumerate(state.slopes[at]):
        style = plots.DASHES[i % len(plots.DASHES)]
        ax.plot(z, [-slope, 0, 1], color=_colour(i), linestyle=style, linewidth=1.4)
    ax.set(xlabel="z", xlim=(-1, 1), ylim=(-1.1, 1.1), yticks=(-1, 0, 1), xticks=(-1, 0, 1))
    ax.set_title("what the activations do")


def kernels(pair: Merged, taps: int = 9, *, ax: Axes) -> None:
    """Draw side by side both kernels, what they make so far, and where one convolution errs.

    Kernels are blue below zero and red above; the error is lighter where it is larger. All four
    share one set of axes: making axes is what takes a figure its time.
    """
    taps = min(taps, pair.second.size)
    side, scale = len(pair.weight), float(np.abs(pair.weight).max())
    for i, (weight, largest, title) in enumerate(
        (
            (pair.first, float(np.abs(pair.first).max()), "first"),
            (pair.second, float(np.abs(pair.second).max()), "second"),
            (pair.grown(taps), scale, f"together: {taps} of {pair.second.size} taps"),
        )
    ):
        size = "".join(f", {n} x {n}" for n in weight.shape[:1])
        colours = plt.get_cmap("RdBu_r")((weight / max(largest, 1e-12) + 1) / 2)
        _tile(colours, i, title + size, ax)
    if 0 < taps < pair.second.size:
        _frame(1, (*divmod(taps - 1, len(pair.second)), 1, 1), len(pair.second), "black", ax)
        _frame(2, pair.patch(taps - 1), side, "black", ax)
    said = f"{pair.border} pixel a side" if pair.border else "none"
    _tile(plt.get_cmap("viridis")(pair.change / 0.5), 3, f"its errors: {said}", ax)
    inner = len(pair.change) - 2 * pair.border
    if pair.border and inner > 0:
        _frame(3, (pair.border, pair.border, inner, inner), len(pair.change), "white", ax)
    ax.set(xlim=(-0.02, 3 * _PITCH + 1.02), ylim=(1.02, -0.14), aspect="equal")
    ax.set_axis_off()


_PITCH = 1.24  # from one tile to the next, in sides of a tile


def _tile(colours: np.ndarray, place: int, title: str, ax: Axes) -> None:
    left = place * _PITCH
    ax.imshow(colours, extent=(left, left + 1, 1, 0), interpolation="nearest")
    _frame(place, (0, 0, 1, 1), 1, "#8C8C8C", ax)
    ax.text(left, -0.05, title, fontsize="small")


def _frame(place: int, patch: tuple[int, int, int, int], side: int, color: str, ax: Axes) -> None:
    """Frame pixels (top, left, height, width) of a tile that is ``side`` pixels wide."""
    top, left, height, width = (n / side for n in patch)
    corner = (place * _PITCH + left, top)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=1.5))


def describe(
    state: State,
    *,
    iteration: int = 0,
    first: int = 3,
    second: int = 3,
    stride: int = 1,
    pads: str = "yes",
    taps: int = 9,
) -> str:
    """Say in words what :func:`draw` shows."""
    at = _row(state, iteration)
    pair = state.merged[first, second, stride, pads]
    values = ", ".join(
        f"{name} {slope:.2f}" for name, slope in zip(state.names, state.slopes[at], strict=True)
    )
    side = len(pair.weight)
    taps = min(taps, pair.second.size)
    ending = (
        f"one convolution is wrong by up to {pair.change.max():.2g} standard deviations on "
        f"{pair.border} output pixel{'s' * (pair.border > 1)} a side."
        if pair.border
        else "one convolution is exact everywhere."
    )
    return (
        f"After iteration {at + 1} the slopes are: {values}. A {first} x {first} kernel of stride "
        f"{stride} and a {second} x {second} one make {side} x {side} "
        f"({taps} of {pair.second.size} taps added); {ending}"
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    last = len(state.slopes)
    step = max(1, last // 36)
    slider, menu = ipywidgets.IntSlider, ipywidgets.Dropdown
    return {
        "iteration": slider(
            description="iteration of training", min=1, max=last, step=step, value=1
        ),
        "taps": slider(
            description="taps of the second kernel added",
            min=0,
            max=max(SECOND) ** 2,
            step=1,
            value=max(SECOND) ** 2,
        ),
        "first": menu(description="first kernel", options=FIRST, value=3),
        "second": menu(description="second kernel", options=SECOND, value=3),
        "stride": menu(description="stride of the first", options=STRIDES, value=1),
        "pads": menu(description="second pads with zeros", options=PADS, value="yes"),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )


def _row(state: State, iteration: int) -> int:
    return min(max(int(iteration) - 1, 0), len(state.slopes) - 1)


def _colour(i: int) -> str:
    return plots.PALETTE[i % len(plots.PALETTE)]
