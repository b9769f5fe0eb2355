"""Lesson 3's widget: a threshold moves over the weights; accuracy and sparsity follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from pruning101 import magnitude
from pruning101.core import masks, plots, structure
from pruning101.core.data import Dataset
from pruning101.core.training import evaluate
from pruning101.widgets import base

ALL = "all layers"
_BINS = 61


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``qualities`` is the slider's grid, in standard deviations. For each layer, and for all of them
    at once, ``sparsity`` and ``accuracy`` (in [0, 1], on ``valid``) have one value a grid point.
    ``weights`` are each layer's weights in units of its standard deviation.
    """

    qualities: np.ndarray
    weights: dict[str, np.ndarray]
    sparsity: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]


def precompute(
    model: nn.Module,
    data: Dataset,
    *,
    qualities: Sequence[float] = tuple(np.arange(0, 3.01, 0.125)),
) -> State:
    """Prune at every threshold, each layer alone and all together, without retraining."""
    work = masks.clone(model)
    masks.make_permanent(work)
    layers = list(structure.prunable(work))
    dense = {n: cast(Tensor, m.weight).detach() for n, m in structure.prunable(work).items()}
    everything = {f"{n}.weight": torch.ones_like(w, dtype=torch.bool) for n, w in dense.items()}
    weights = {n: (w / w.std(correction=0)).flatten().numpy() for n, w in dense.items()}
    sparsity: dict[str, Any] = {name: [] for name in [ALL, *layers]}
    accuracy: dict[str, Any] = {name: [] for name in [ALL, *layers]}
    for quality in map(float, qualities):
        for name in [ALL, *layers]:
            chosen = quality if name == ALL else {name: quality}
            masks.apply(work, cast(Any, everything))
            masks.apply(work, magnitude.masks_by_std(work, chosen))
            kept = masks.masks_of(work)
            shown = [kept[f"{layer}.weight"] for layer in layers if name in (ALL, layer)]
            total = sum(mask.numel() for mask in shown)
            sparsity[name].append(1 - sum(int(mask.sum()) for mask in shown) / total)
            accuracy[name].append(evaluate(work, data, "valid").accuracy)
    return State(
        np.asarray(qualities, dtype=float),
        weights,
        {name: np.array(values) for name, values in sparsity.items()},
        {name: np.array(values) for name, values in accuracy.items()},
    )


def draw(state: State, *, layer: str = ALL, quality: float = 1.0) -> Figure:
    """Draw the weights with the threshold, and where it stands on the curves of the whole range."""
    at = _nearest(state, quality)
    threshold = float(state.qualities[at])
    shown = _shown(state, layer)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.2, 3.1), layout="none", gridspec_kw={"width_ratios": (1, 1.15)}
    )
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.17, top=0.89, wspace=0.28)
    plots.histogram(
        shown,
        threshold=threshold,
        bins=_BINS,
        limits=(-4, 4),
        xlabel="weight (standard deviations of its layer)",
        title=f"{layer}: {state.sparsity[layer][at]:.0%} removed",
        ax=left,
    )
    plots.curves(
        {
            "accuracy on valid": (state.qualities.tolist(), state.accuracy[layer]),
            "sparsity": (state.qualities.tolist(), state.sparsity[layer]),
        },
        xlabel="threshold (standard deviations)",
        ylabel="share, 0 to 1",
        title=f"accuracy {state.accuracy[layer][at]:.1%}",
        ax=right,
    )
    for line in right.lines:
        line.set_markersize(3)
    right.axvline(threshold, color=plots.PALETTE[1], linestyle="--", linewidth=1)
    for i, values in enumerate((state.accuracy[layer], state.sparsity[layer])):
        right.plot(
            threshold,
            values[at],
            marker=plots.MARKERS[i],
            markersize=10,
            color=plots.PALETTE[i],
            markeredgecolor="black",
        )
    right.set_ylim(-0.03, 1.05)
    # above the curves: inside, it would lie on one of them for some layer
    right.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncols=2, columnspacing=1.0)
    return figure


def describe(state: State, *, layer: str = ALL, quality: float = 1.0) -> str:
    """Say in one sentence what :func:`draw` shows."""
    at = _nearest(state, quality)
    gone = round(float(state.sparsity[layer][at]) * _shown(state, layer).size)
    where = "all layers" if layer == ALL else layer
    return (
        f"Threshold {state.qualities[at]:.3g} standard deviations on {where}: {gone:,} of "
        f"{_shown(state, layer).size:,} weights removed ({state.sparsity[layer][at]:.1%}; a "
        f"Gaussian would lose {magnitude.gaussian_sparsity(state.qualities[at]):.1%}), accuracy "
        f"{state.accuracy[layer][at]:.1%} without retraining (dense: "
        f"{state.accuracy[layer][0]:.1%})."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    grid = state.qualities
    return {
        "quality": ipywidgets.FloatSlider(
            description="threshold (standard deviations)",
            min=float(grid[0]),
            max=float(grid[-1]),
            step=float(grid[1] - grid[0]),
            value=float(grid[len(grid) // 3]),
            readout_format=".3f",
        ),
        "layer": ipywidgets.Dropdown(description="layer", options=[ALL, *state.weights], value=ALL),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )


def _nearest(state: State, quality: float) -> int:
    return int(np.abs(state.qualities - quality).argmin())


def _shown(state: State, layer: str) -> np.ndarray:
    if layer == ALL:
        return np.concatenate(list(state.weights.values()))
    return state.weights[layer]
