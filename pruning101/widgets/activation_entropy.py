"""Lesson 7's widget: one layer's pre-activations while a network learns, with their entropy."""

from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from pruning101.core import masks, plots
from pruning101.core.activation_states import observe
from pruning101.core.data import Dataset
from pruning101.core.state_entropy import binary_entropy
from pruning101.core.training import evaluate, fit
from pruning101.widgets import base

_GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``layers`` are the activations' names; ``edges`` [layers, bins + 1] bound the bins of each
    layer's histogram, the middle one of them at 0; ``shares`` [epochs + 1, layers, bins] are the
    shares of its pre-activations in each bin, the first row before any training. ``on`` has for
    each layer [epochs + 1, units] the share of a unit's pre-activations above 0 among those that
    are not 0. ``accuracy`` [epochs + 1] is that on ``valid``, in [0, 1].
    """

    layers: tuple[str, ...]
    edges: np.ndarray
    shares: np.ndarray
    on: dict[str, np.ndarray]
    accuracy: np.ndarray


def precompute(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int = 12,
    lr: float = 0.05,
    batch_size: int = 64,
    images: int = 256,
    bins: int = 60,
    seed: int = 0,
) -> State:
    """Train a copy of ``model`` and look at its pre-activations before and after each epoch.

    They are those of the first ``images`` of ``train``, in ``eval`` mode.

    Raises:
        ValueError: the model has no activation that is a module.
    """
    copy = masks.clone(model)
    example, _ = next(iter(data.batches("train", images)))
    full, rest = divmod(len(data.train), batch_size)
    steps = full + (rest > 1)  # fit leaves out a last batch of a single image
    seen: list[dict[str, Tensor]] = []
    accuracy: list[float] = []
    done = 0

    def look(network: nn.Module) -> None:
        seen.append(_pre_activations(network, example))
        accuracy.append(evaluate(network, data, "valid").accuracy)

    def after_step(network: nn.Module) -> None:
        nonlocal done
        done += 1
        if done % steps == 0:
            look(network)

    look(copy)
    options: dict[str, Any] = {"schedule": "cosine", "batch_size": batch_size, "progress": False}
    fit(copy, data, epochs=epochs, lr=lr, seed=seed, after_step=after_step, **options)

    edges, shares, on = [], [], {}
    for name in seen[0]:
        values = torch.stack([found[name] for found in seen])  # [epochs + 1, units, the rest]
        # One scale for all epochs; the few largest would make everything else a needle.
        reach = float(np.quantile(values.abs().numpy(), 0.995)) or 1.0
        borders = np.linspace(-reach, reach, bins + 1)
        counts = [np.histogram(v, bins=borders)[0] for v in values.numpy()]
        edges.append(borders)
        shares.append(np.stack(counts) / values[0].numel())
        states = (values != 0).sum(2)
        on[name] = ((values > 0).sum(2) / states.clamp_min(1)).numpy()
    return State(tuple(seen[0]), np.stack(edges), np.stack(shares, 1), on, np.array(accuracy))


def _pre_activations(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """What enters each activation, [units, images and positions], in the order of the calls."""
    found: dict[str, Tensor] = {}

    def see(name: str, z: Tensor, axis: int) -> None:
        found[name] = z.detach().transpose(0, axis).flatten(1).clone()

    observe(model, [(example, example)], None, see)
    return found


def entropies(on: Any) -> np.ndarray:
    """Entropy in bits of units that are ON for these shares, elementwise."""
    return binary_entropy(torch.as_tensor(on, dtype=torch.float64)).numpy()


def draw(state: State, *, layer: str | None = None, epoch: int = 0) -> Figure:
    """Draw a layer's pre-activations after an epoch, and where its units lie on the entropy."""
    name = layer if layer is not None else state.layers[0]
    figure = plt.figure(figsize=(8.2, 3.4), layout="none")
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1.35, 1), left=0.08, right=0.98, bottom=0.15, top=0.88, wspace=0.25
    )
    left, right = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    distribution(state, name, epoch, ax=left)
    place = state.layers.index(name)
    left.set_ylim(0, 115 * state.shares[epoch, place].max())
    left.set_title(f"{name} after {epoch} epochs: {state.on[name][epoch].mean():.0%} ON")
    left.legend(loc="upper right", handlelength=1)
    units(state.on[name][epoch], ax=right)
    return figure


def distribution(state: State, layer: str, epoch: int, *, ax: Axes) -> None:
    """Draw the histogram of a layer's pre-activations, what is ON in the strong colour."""
    place = state.layers.index(layer)
    shares, edges = state.shares[epoch, place], state.edges[place]
    middle = len(shares) // 2
    off, on = slice(0, middle), slice(middle, None)
    ax.stairs(100 * shares[off], edges[: middle + 1], fill=True, color=plots.REMOVED, label="OFF")
    ax.stairs(100 * shares[on], edges[middle:], fill=True, color=plots.KEPT, label="ON")
    ax.axvline(0, color=plots.PALETTE[1], linestyle="--", linewidth=1)
    ax.set(xlabel="pre-activation $z$", ylabel="share (%)", xlim=(edges[0], edges[-1]))


def units(on: np.ndarray, *, ax: Axes) -> None:
    """Draw each unit, ON for this share, on the curve of entropy, with both means."""
    ax.plot(_GRID, entropies(_GRID), color="#999999", linewidth=1)
    ax.plot(on, entropies(on), "o", color=plots.PALETTE[0], alpha=0.6, label="a unit")
    mean = float(entropies(on).mean())
    ax.axhline(mean, color=plots.PALETTE[1], linestyle="--", label="mean of the entropies")
    ax.plot(
        [on.mean()],
        [float(entropies(on.mean()))],
        "s",
        color=plots.PALETTE[2],
        markersize=8,
        fillstyle="none",
        markeredgewidth=1.8,
        label="entropy of the mean",
    )
    ax.set(xlabel="share ON", ylabel="entropy (bits)", xlim=(-0.03, 1.03), ylim=(-0.03, 1.06))
    ax.set_title(f"H = {mean:.2f} bits")
    ax.legend(loc="lower center", handlelength=1.4)


def describe(state: State, *, layer: str | None = None, epoch: int = 0) -> str:
    """Say in words what :func:`draw` shows."""
    name = layer if layer is not None else state.layers[0]
    on = state.on[name][epoch]
    return (
        f"{name} after {epoch} epochs (accuracy on valid {state.accuracy[epoch]:.1%}): its "
        f"{len(on)} units are ON for {on.min():.0%} to {on.max():.0%} of what they see, on average "
        f"{on.mean():.0%}. Mean entropy {entropies(on).mean():.3f} bits; the entropy of the mean "
        f"would be {float(entropies(on.mean())):.3f}."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    last = len(state.accuracy) - 1
    return {
        "epoch": ipywidgets.IntSlider(
            description="epochs trained", min=0, max=last, step=1, value=last
        ),
        "layer": ipywidgets.Dropdown(
            description="layer", options=list(state.layers), value=state.layers[0]
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )
