"""The widget of lesson 2: one weight's error and its parabola, and how far the prediction holds."""

from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn
from torch.func import functional_call

from pruning101 import optimal_brain_damage
from pruning101.core import curvature, masks, plots
from pruning101.core.data import Dataset
from pruning101.widgets import base

PERCENTILES = tuple(range(0, 101, 5))  # of the saliency, weights on offer
SHARES = tuple(range(0, 101, 2))  # of the weights deleted, in per cent


@dataclass(frozen=True)
class State:
    """All that the figures need, computed once.

    `names`, `values`, `saliencies` [weights] belong to the weights at `PERCENTILES`; `offsets`
    [points] are multiples of a weight's size around its trained value, where `rises`
    [weights, points] is the error above that of the trained network; `predicted` and `actual`
    [shares] are the rises after deleting `SHARES` of all `n` weights in order of saliency, and
    `by_magnitude` in order of size. `error` is the trained network's.
    """

    names: tuple[str, ...]
    values: np.ndarray
    saliencies: np.ndarray
    offsets: np.ndarray
    rises: np.ndarray
    n: int
    error: float
    predicted: np.ndarray
    actual: np.ndarray
    by_magnitude: np.ndarray


def precompute(
    model: nn.Module,
    data: Dataset,
    loss: str = "squared_error",
    *,
    method: str = "levenberg_marquardt",
    points: int = 41,
) -> State:
    """Compute the curves of `model` on the train images of `data`, some seconds for a small one."""
    model = masks.clone(model).double().cpu().eval()  # the smallest rises are far below float32
    batches = [(images.double(), labels) for images, labels in data.batches("train", 1024)]
    hessian = optimal_brain_damage.hessian_diagonal(model, batches, loss, method=method)
    weights = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}
    scores = optimal_brain_damage.saliency(model, {name: hessian[name] for name in weights})
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat.argsort(stable=True)
    n = len(order)
    chosen = [int(order[round(p / 100 * (n - 1))]) for p in PERCENTILES]
    offsets = np.linspace(-2, 2, points)  # 0 is the trained value, -1 is deletion
    names, values, rises = [], [], []
    error = _error(model, {}, batches, loss)
    for index in chosen:
        name, place = _place(weights, index)
        where = tuple(int(i) for i in np.unravel_index(place, weights[name].shape))
        u = float(weights[name][where])
        names.append(f"{name}[{', '.join(map(str, where))}]")
        values.append(u)
        row = []
        for offset in offsets:
            moved = weights[name].clone()
            moved[where] = u * (1 + offset)
            row.append(_error(model, {name: moved}, batches, loss) - error)
        rises.append(row)
    counts = [round(share / 100 * n) for share in SHARES]
    summed = torch.cat([flat.new_zeros(1), flat[order].cumsum(0)])
    size = {name: w.abs() for name, w in weights.items()}
    return State(
        names=tuple(names),
        values=np.array(values),
        saliencies=flat[chosen].numpy(),
        offsets=offsets,
        rises=np.array(rises),
        n=n,
        error=error,
        predicted=summed[counts].numpy(),
        actual=_curve(model, batches, loss, scores, counts),
        by_magnitude=_curve(model, batches, loss, size, counts),
    )


def _curve(model: nn.Module, batches: list, loss: str, scores: dict, counts: list) -> np.ndarray:
    return optimal_brain_damage.deletion_curve(model, batches, loss, scores, counts).numpy()


@torch.no_grad()
def _error(model: nn.Module, changed: dict, batches: list, loss: str) -> float:
    total = sum(
        float(curvature.summed_error(functional_call(model, changed, (images,)), labels, loss))
        for images, labels in batches
    )
    return total / sum(len(images) for images, _ in batches)


def _place(weights: dict[str, torch.Tensor], index: int) -> tuple[str, int]:
    """Say in which tensor the weight with this number lies, and where in it."""
    for name, weight in weights.items():
        if index < weight.numel():
            return name, index
        index -= weight.numel()
    raise IndexError(index)


def draw(state: State, *, weight: int = 50, deleted: int = 30) -> Figure:
    """Draw the error around the weight at percentile `weight`, and `deleted` per cent of them gone.

    Pure: settings in, a new figure out. Both are rounded to what was computed.
    """
    k, share = _nearest(PERCENTILES, weight), _nearest(SHARES, deleted)
    blue, orange, green = plots.PALETTE[:3]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="none")
    figure.subplots_adjust(
        0.08, 0.14, 0.99, 0.92, 0.24
    )  # automatic layout would take half the time

    u, s = state.values[k], state.saliencies[k]
    exponent = int(np.floor(np.log10(max(state.rises[k].max(), 1e-12))))
    path, unit = u * (1 + state.offsets), 10.0**exponent
    left.plot(path, state.rises[k] / unit, color=blue, label="actual error")
    left.plot(path, s * state.offsets**2 / unit, color=orange, linestyle="--", label="parabola")
    left.axvline(u, color="#999999", linewidth=1, linestyle=":")
    at_zero = int(np.argmin(np.abs(state.offsets + 1)))
    left.plot(0, s / unit, "s", color=orange, markersize=8, label="predicted at u = 0")
    left.plot(0, state.rises[k, at_zero] / unit, "o", color=blue, label="actual at u = 0")
    left.annotate(
        "trained", (u, 0), xytext=(0, 34), textcoords="offset points", ha="center",
        fontsize="small", color="#555555", arrowprops={"arrowstyle": "-", "color": "#999999"},
    )  # fmt: skip
    left.set(
        xlabel=f"value u of {state.names[k]}",
        ylabel=f"rise of the error E ($10^{{{exponent}}}$)",
        title=f"one weight: saliency percentile {PERCENTILES[k]}",
    )
    left.legend(loc="upper center", frameon=True, edgecolor="none", framealpha=1)

    floor = 1e-5  # a logarithmic axis has no 0
    for y, color, dash, name in (
        (state.actual, blue, "-", "actual, by saliency"),
        (state.predicted, orange, "--", "predicted, by saliency"),
        (state.by_magnitude, green, ":", "actual, by magnitude"),
    ):
        right.plot(SHARES, np.maximum(y, floor), color=color, linestyle=dash, label=name)
    right.axvline(SHARES[share], color="#999999", linewidth=1)
    right.plot(SHARES[share], max(state.predicted[share], floor), "s", color=orange, markersize=8)
    right.plot(SHARES[share], max(state.actual[share], floor), "o", color=blue)
    right.axhline(state.error, color="#555555", linewidth=1, linestyle="-.", label="trained E")
    right.set(
        yscale="log",
        ylim=(floor, None),
        xlabel="weights deleted (%), lowest first",
        ylabel="rise of the error E",
        title=f"many weights: {SHARES[share]} % deleted",
    )
    right.yaxis.set_minor_locator(NullLocator())
    right.legend(loc="lower right")
    return figure


def describe(state: State, *, weight: int = 50, deleted: int = 30) -> str:
    """Say in words what `draw` shows for the same settings."""
    k, share = _nearest(PERCENTILES, weight), _nearest(SHARES, deleted)
    at_zero = int(np.argmin(np.abs(state.offsets + 1)))
    return (
        f"{state.names[k]} = {state.values[k]:.3f}: deleting it should raise the error by "
        f"{state.saliencies[k]:.2e} and does raise it by {state.rises[k, at_zero]:.2e}. Deleting "
        f"{SHARES[share]} % of {state.n} weights: predicted {state.predicted[share]:.3g}, actual "
        f"{state.actual[share]:.3g}, by magnitude {state.by_magnitude[share]:.3g}; the trained "
        f"error is {state.error:.3g}."
    )


def _nearest(grid: tuple[int, ...], value: float) -> int:
    return int(np.argmin(np.abs(np.array(grid) - value)))


def controls() -> dict[str, ipywidgets.IntSlider]:
    """Return the two sliders, by the names of the settings that they move."""
    options: dict[str, Any] = {"min": 0, "max": 100, "continuous_update": False}
    return {
        "weight": ipywidgets.IntSlider(
            value=50, step=5, description="one weight: percentile of saliency", **options
        ),
        "deleted": ipywidgets.IntSlider(
            value=30, step=2, description="many weights: % deleted", **options
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the sliders to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(),
    )
