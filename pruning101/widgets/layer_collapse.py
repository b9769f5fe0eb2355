"""Lesson 8's widget: a two-layer network on a curve, its activation more and more linear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pruning101.core import plots
from pruning101.widgets import base

NOISE = 0.4
_TRAIN, _TEST = "on the examples", "on new data"


@dataclass(frozen=True)
class Fits:
    """Networks fitted to the same kind of data, one for each slope and seed.

    ``inputs`` and ``targets`` are [seeds, examples], ``curves`` [slopes, seeds, grid] what the
    networks give on the grid, ``train`` and ``test`` [slopes, seeds] mean squared errors, on the
    examples and on new data.
    """

    inputs: np.ndarray
    targets: np.ndarray
    curves: np.ndarray
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``slopes`` is the slider's grid; ``grid`` and ``truth`` are the curve that the data scatter
    around; ``fits`` has one entry a number of examples.
    """

    slopes: np.ndarray
    grid: np.ndarray
    truth: np.ndarray
    fits: dict[int, Fits]


def target(x: Tensor) -> Tensor:
    """Return the curve to be learnt, elementwise: a line that is bent twice."""
    return x + 0.5 * torch.sin(2 * x)


def precompute(
    *,
    slopes: Sequence[float] = tuple(np.arange(21) / 20),
    examples: Sequence[int] = (12, 24, 48),
    seeds: int = 5,
    hidden: int = 64,
    steps: int = 700,
    lr: float = 0.03,
    seed: int = 0,
) -> State:
    """Fit all networks, each with its activation's slope fixed below zero (figure 1 of the paper).

    A network is ``second(activation(first(x)))`` with ``hidden`` units, trained on squared error by
    Adam on all examples at once. Each of the ``seeds`` has data and initial weights of its own,
    the same for all slopes.
    """
    grid = torch.linspace(-2, 2, 201)  # [grid]
    fits = {n: _fit(n, slopes, grid, seeds, hidden, steps, lr, seed) for n in examples}
    return State(np.asarray(slopes, dtype=float), grid.numpy(), target(grid).numpy(), fits)


def _fit(
    examples: int,
    slopes: Sequence[float],
    grid: Tensor,
    seeds: int,
    hidden: int,
    steps: int,
    lr: float,
    seed: int,
) -> Fits:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:  # from -2 to 2, as the inputs
        return 4 * torch.rand(shape, generator=generator) - 2

    x = uniform(seeds, examples, 1)
    y = target(x) + NOISE * torch.randn(x.shape, generator=generator)
    weight = torch.randn(seeds, 1, hidden, generator=generator)
    first = [weight, weight * uniform(seeds, 1, hidden)]  # every unit bends within the data
    second = [torch.randn(seeds, hidden, 1, generator=generator) / hidden**0.5]
    start = [*first, *second, torch.zeros(seeds, 1, 1)]
    w1, b1, w2, b2 = (t.repeat(len(slopes), 1, 1, 1).requires_grad_() for t in start)
    slope = torch.tensor(slopes, dtype=torch.float32)[:, None, None, None]

    def network(x: Tensor) -> Tensor:
        z = x * w1 + b1  # [slopes, seeds, examples, hidden]
        return torch.maximum(z, slope * z) @ w2 + b2  # [slopes, seeds, examples, 1]

    optimiser = torch.optim.Adam([w1, b1, w2, b2])
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad()
        (network(x) - y).square().mean((2, 3)).sum().backward()
        optimiser.step()
    with torch.no_grad():
        curves = network(grid[:, None])[..., 0]
        train = (network(x) - y).square().mean((2, 3))
    # the noise of new data is known: no need to draw it
    test = (curves - target(grid)).square().mean(-1) + NOISE**2
    found = (t.numpy() for t in (x[..., 0], y[..., 0], curves, train, test))
    return Fits(*found)


def draw(state: State, *, examples: int = 24, slope: float = 0.5, seed: int = 0) -> Figure:
    """Draw the activation, one fit through its examples, and the errors over all slopes."""
    at, fits = _nearest(state, slope), state.fits[examples]
    figure, axes = plt.subplots(
        1, 3, figsize=(8.2, 3.1), layout="none", gridspec_kw={"width_ratios": (0.55, 1, 1.1)}
    )
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.17, top=0.89, wspace=0.33)
    left, middle, right = axes
    shape = np.array([-2.0, 0.0, 2.0])
    left.plot(shape, np.maximum(shape, state.slopes[at] * shape), color=plots.PALETTE[0], lw=2)
    left.set(xlabel="$z$", ylim=(-2.2, 2.2), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    left.set_title(f"slope {state.slopes[at]:.2f}")
    draw_fit(state, at, examples=examples, seed=seed, ax=middle)
    middle.set_title(f"{examples} examples")
    for i, (name, errors) in enumerate(((_TRAIN, fits.train), (_TEST, fits.test))):
        color = plots.PALETTE[i]
        right.plot(state.slopes, errors.mean(1), color=color, linestyle=plots.DASHES[i], label=name)
        right.fill_between(
            state.slopes, errors.min(1), errors.max(1), color=color, alpha=0.18, linewidth=0
        )
        right.plot(
            state.slopes[at],
            errors.mean(1)[at],
            marker=plots.MARKERS[i],
            markersize=9,
            color=color,
            markeredgecolor="black",
        )
    right.axvline(state.slopes[at], color="#555555", linestyle=":", linewidth=1, zorder=0)
    right.set(xlabel="slope (0: ReLU, 1: linear)", ylabel="squared error")
    right.set(xlim=(-0.03, 1.03), ylim=(0, 1.05 * max(f.test.max() for f in state.fits.values())))
    right.legend(loc="upper left")
    return figure


def draw_fit(state: State, at: int, *, examples: int, seed: int = 0, ax: Axes) -> None:
    """Draw one network among its examples, and the curve that it should have found."""
    fits = state.fits[examples]
    ax.plot(state.grid, state.truth, color="#555555", linestyle=":", label="truth")
    ax.plot(
        fits.inputs[seed], fits.targets[seed], "o", color=plots.PALETTE[1], ms=4, label="examples"
    )
    ax.plot(state.grid, fits.curves[at, seed], color=plots.PALETTE[0], label="network")
    ax.set(xlabel="$x$", ylabel="$y$", ylim=(-3.3, 3.3), xticks=(-2, 0, 2))
    ax.legend(loc="upper left", handlelength=1.2)


def describe(state: State, *, examples: int = 24, slope: float = 0.5, seed: int = 0) -> str:
    """Say in one sentence what :func:`draw` shows."""
    at, fits = _nearest(state, slope), state.fits[examples]
    train, test = fits.train.mean(1), fits.test.mean(1)
    best = int(test.argmin())
    return (
        f"Slope {state.slopes[at]:.2f}, {examples} examples: squared error {train[at]:.2f} "
        f"{_TRAIN} and {test[at]:.2f} {_TEST} (means over {fits.test.shape[1]} seeds; the noise "
        f"alone is {NOISE**2:.2f}). Least {_TEST}: {test[best]:.2f}, at slope "
        f"{state.slopes[best]:.2f}."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    grid, numbers = state.slopes, list(state.fits)
    return {
        "slope": ipywidgets.FloatSlider(
            description="slope of the activation below zero",
            min=float(grid[0]),
            max=float(grid[-1]),
            step=float(grid[1] - grid[0]),
            value=float(grid[0]),
            readout_format=".2f",
        ),
        "examples": ipywidgets.Dropdown(
            description="examples to learn from",
            options=numbers,
            value=numbers[len(numbers) // 2],
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )


def _nearest(state: State, slope: float) -> int:
    return int(np.abs(state.slopes - slope).argmin())
