"""Lesson 5's widget: a filter bank loses weights or channels; bytes and time follow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from pruning101 import magnitude, structured
from pruning101.core import masks, plots
from pruning101.core.data import Dataset
from pruning101.core.measure import footprint
from pruning101.core.training import evaluate, fit
from pruning101.widgets import base

WEIGHTS, CHANNELS = "single weights", "whole channels"
COSTS = ("dense bytes", "coded bytes", "MACs", "latency")
_ROWS = 12  # filters shown of the second convolution


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``sparsities`` is the slider's grid; the other fields have, for each kind of pruning, one entry
    a grid point. ``first`` is the first convolution [filters, h, w], ``second`` some filters of the
    one that reads it [filters, channels, h, w]; NaN stands where a weight is gone. ``shown`` are
    these filters' numbers. ``cost`` has the :data:`COSTS` relative to the dense network,
    ``parameters`` counts those that are not zero, ``accuracy`` is that on ``valid``, in [0, 1].
    """

    sparsities: np.ndarray
    shown: np.ndarray
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]
    cost: dict[str, dict[str, np.ndarray]]
    parameters: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]


def relative_latency(models: Sequence[nn.Module], example: Tensor, *, rounds: int = 30) -> Any:
    """Time each model on ``example`` and return its latency relative to the first's, [models].

    The models take turns, so that a machine that is busy for a while slows all of them alike, and
    of each the fastest round counts: other work only ever adds. The models stay as they were.
    """
    plain = [masks.clone(model).eval() for model in models]
    for model in plain:
        masks.make_permanent(model)
    seconds = np.empty((rounds, len(plain)))
    with torch.inference_mode():
        for taken in seconds:
            for i, model in enumerate(plain):
                model(example)  # its weights come back into the caches
                start = time.perf_counter()
                model(example)
                model(example)
                taken[i] = time.perf_counter() - start
    return seconds.min(0) / seconds[:, 0].min()


def precompute(
    model: nn.Module,
    data: Dataset,
    *,
    sparsities: Sequence[float] = tuple(np.arange(0, 0.91, 0.1)),
    epochs: int = 2,
    lr: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
) -> State:
    """Prune at every sparsity in either way, the same share in each layer, and retrain shortly.

    Raises:
        ValueError: the model does not begin with two convolutions, the second reading the first.
    """
    example, _ = next(iter(data.batches("valid", batch_size)))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)][:2]
    convolutions = [cast(nn.Conv2d, model.get_submodule(name)) for name in names]
    if len(names) < 2 or convolutions[1].weight.shape[1] != convolutions[0].out_channels:
        raise ValueError(
            "the widget draws two convolutions of which the second reads the first; this model's "
            f"first are {names}: give another, such as lenet5"
        )
    # Along the ranking, so that what is in view goes at the rate of all.
    ranked = structured.filter_norms(model)[names[1]].argsort().numpy()
    rows = min(_ROWS, len(ranked))
    shown = np.sort(ranked[((np.arange(rows) + 0.5) * len(ranked) / rows).astype(int)])
    found: dict[str, list[nn.Module]] = {WEIGHTS: [], CHANNELS: []}
    banks: dict[str, list[list[np.ndarray]]] = {WEIGHTS: [], CHANNELS: []}
    for sparsity in map(float, sparsities):
        for kind in found:
            pruned, alive = _pruned(model, example, kind, sparsity)
            if epochs:
                options: dict[str, Any] = {"schedule": "cosine", "batch_size": batch_size}
                fit(pruned, data, epochs=epochs, lr=lr, seed=seed, progress=False, **options)
            found[kind].append(pruned)
            masks.make_permanent(pruned)
            banks[kind].append([_placed(pruned, name, alive[name]) for name in names])
    first, second, cost, parameters, accuracy = {}, {}, {}, {}, {}
    for kind, networks in found.items():
        dense = footprint(model, example)
        prints = [footprint(network, example) for network in networks]
        cost[kind] = {
            "dense bytes": np.array([p.dense_bytes / dense.dense_bytes for p in prints]),
            "coded bytes": np.array([p.coded_bytes / dense.coded_bytes for p in prints]),
            "MACs": np.array([p.macs / dense.macs for p in prints]),
            "latency": relative_latency([model, *networks], example)[1:],
        }
        parameters[kind] = np.array([p.nonzero for p in prints])
        accuracy[kind] = np.array([evaluate(m, data, "valid").accuracy for m in networks])
        first[kind] = np.stack([bank[0].mean(1) for bank in banks[kind]])
        second[kind] = np.stack([bank[1][shown] for bank in banks[kind]])
    grid = np.asarray(sparsities, dtype=float)
    return State(grid, shown, first, second, cost, parameters, accuracy)


def _pruned(
    model: nn.Module, example: Tensor, kind: str, sparsity: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pruned copy, and for each layer where in the dense one its weights stand."""
    places = {n: torch.ones_like(w, dtype=torch.bool) for n, w in _weights(model).items()}
    if kind == WEIGHTS:
        copy = masks.clone(model)
        masks.apply(copy, masks.from_scores(magnitude.scores(model), sparsity, scope="layer"))
        return copy, {n.removesuffix(".weight"): m for n, m in masks.masks_of(copy).items()}
    pruned = structured.prune_channels(model, example, sparsity, inplace=False)
    names = list(places)
    for name, kept in pruned.kept.items():
        gone = torch.ones(places[name].shape[0], dtype=torch.bool)
        gone[kept] = False
        places[name][gone] = False
        reader = names[names.index(name) + 1]
        places[reader].unflatten(1, (len(gone), -1))[:, gone] = False
    return pruned.model, places


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n.removesuffix(".weight"): s for n, s in magnitude.scores(model).items()}


def _placed(model: nn.Module, name: str, alive: Tensor) -> np.ndarray:
    """A layer's weights where they stood in the dense network, NaN where they are gone."""
    weight = cast(Tensor, model.get_submodule(name).weight).detach()
    whole = torch.full(alive.shape, torch.nan)
    whole[alive] = weight[alive] if weight.shape == alive.shape else weight.flatten()
    return whole.numpy()


def draw(state: State, *, kind: str = WEIGHTS, sparsity: float = 0.5) -> Figure:
    """Draw the two filter banks and, relative to the dense network, what is left to pay."""
    at = _nearest(state, sparsity)
    figure = plt.figure(figsize=(8.2, 4.4), layout="none")
    grid = figure.add_gridspec(
        2,
        2,
        width_ratios=(1.9, 1),
        height_ratios=(1.2, len(state.shown)),
        left=0.06,
        right=0.975,
        bottom=0.09,
        top=0.93,
        wspace=0.4,
        hspace=0.16,
    )
    above, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    side = figure.add_subplot(grid[:, 1])
    bank(state.first[kind][at][None], ax=above)
    above.set_title(f"{kind}: {state.sparsities[at]:.0%} gone in each layer", fontsize="medium")
    above.set_ylabel("first\nlayer", fontsize="small", rotation=0, labelpad=16, va="center")
    bank(state.second[kind][at], ax=below)
    below.set_xlabel(
        f"second layer: {len(state.shown)} of its filters, one a row; "
        "each column reads\nthe filter above it. Grey and crossed: gone",
        fontsize="small",
    )
    _bars(state, kind, at, side)
    return figure


def bank(weights: np.ndarray, *, ax: Axes) -> None:
    """Draw kernels [rows, columns, h, w] as tiles, NaN in grey, and cross out what is all gone."""
    rows, columns, height, width = weights.shape
    tiles = np.full((rows, height + 1, columns, width + 1), np.inf)  # a frame between the tiles
    tiles[:, :height, :, :width] = weights.transpose(0, 2, 1, 3)
    image = tiles.reshape(rows * (height + 1), -1)[:-1, :-1]
    scale = float(np.nanmax(np.abs(weights))) if np.isfinite(weights).any() else 1.0
    colours = plt.get_cmap("RdBu_r")((np.clip(image / scale, -1, 1) + 1) / 2)[..., :3]
    colours[np.isnan(image)] = to_rgb(plots.REMOVED)
    colours[np.isposinf(image)] = 1.0
    ax.imshow(colours, interpolation="nearest", aspect="auto")
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    top, left = np.nonzero(np.isnan(weights).all((2, 3)))
    top, left = top * (height + 1) - 0.5, left * (width + 1) - 0.5
    for start, end in ((0, height), (height, 0)):
        ends = np.stack([left, left + width, np.full(len(left), np.nan)], 1).ravel()
        sides = np.stack([top + start, top + end, np.full(len(top), np.nan)], 1).ravel()
        ax.plot(ends, sides, color="#8C8C8C", linewidth=0.7, gid="gone")


def _bars(state: State, kind: str, at: int, ax: Axes) -> None:
    left = [100 * state.cost[kind][name][at] for name in COSTS]
    ax.barh(COSTS, left, color=plots.KEPT, height=0.55)
    for place, value in enumerate(left):
        beside = 100 if 85 < value < 100 else value  # the number keeps clear of the dotted line
        ax.text(beside + 2, place, f"{value:.0f}", va="center", fontsize="small")
    ax.axvline(100, color="#555555", linestyle=":")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 125)
    ax.set_xlabel("left, % of the dense network")
    ax.set_title(f"accuracy {state.accuracy[kind][at]:.1%}")


def describe(state: State, *, kind: str = WEIGHTS, sparsity: float = 0.5) -> str:
    """Say in words what :func:`draw` shows."""
    at = _nearest(state, sparsity)
    parameters = state.parameters[kind]
    costs = ", ".join(f"{name} {state.cost[kind][name][at]:.0%}" for name in COSTS)
    return (
        f"{state.sparsities[at]:.0%} of the {kind.split()[-1]} gone in each layer: "
        f"{parameters[at]:,} parameters that are not zero ({parameters[at] / parameters[0]:.0%} of "
        f"the dense network's). Of the dense network there remain: {costs}. Accuracy on valid "
        f"{state.accuracy[kind][at]:.1%}, shortly retrained."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    grid = state.sparsities
    return {
        "sparsity": ipywidgets.FloatSlider(
            description="share removed",
            min=float(grid[0]),
            max=float(grid[-1]),
            step=float(grid[1] - grid[0]),
            value=float(grid[len(grid) // 2]),
            readout_format=".0%",
        ),
        "kind": ipywidgets.Dropdown(
            description="what goes", options=[WEIGHTS, CHANNELS], value=WEIGHTS
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )


def _nearest(state: State, sparsity: float) -> int:
    return int(np.abs(state.sparsities - sparsity).argmin())
