"""Lesson 4's widget: rounds of the search move; masks, learning curves and accuracies follow."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from pruning101 import lottery_tickets
from pruning101.core import masks, plots, runs, structure
from pruning101.core.data import Dataset
from pruning101.lottery_tickets import Run, Ticket
from pruning101.widgets import base

KINDS = ("ticket", "re-initialised", "random")
MEASURES = {
    "early stop": "iteration of least loss on valid",
    "accuracy": "test accuracy at that iteration",
}
_ROWS = 60  # units of the first layer that the pictures show


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``densities`` has one share in [0, 1] a round, the dense network's 1 first. For each of
    ``KINDS``, ``valid_loss`` is [rounds + 1, seeds, points] at ``iterations`` [points];
    ``early_stop`` (iterations) and ``accuracy`` (in [0, 1], on ``test`` at the early stop) are
    [rounds + 1, seeds]. Their round 0 is the dense network, for every kind. ``masks`` are those of
    the first layer, [units, inputs] a round, of the first seed's ticket and of its random one.
    """

    densities: np.ndarray
    iterations: np.ndarray
    valid_loss: dict[str, np.ndarray]
    early_stop: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    masks: dict[str, list[np.ndarray]]


def precompute(
    searches: Sequence[Sequence[Ticket]], data: Dataset, *, progress: bool = True, **training: Any
) -> State:
    """Train, at every round of every search, the ticket's two controls.

    ``searches`` has one list of tickets a seed, round 0 first, as ``find_ticket`` yields them from
    iteration 0; ``training`` are the arguments of ``lottery_tickets.train`` that the search had.

    Raises:
        ValueError: searches of different lengths, or none.
    """
    if not searches or len({len(search) for search in searches}) != 1 or not searches[0]:
        lengths = [len(search) for search in searches]
        raise ValueError(f"give one search a seed, all of as many rounds; got lengths {lengths}")
    found: dict[str, list[list[Run]]] = {kind: [] for kind in KINDS}
    pictures: dict[str, list[np.ndarray]] = {"ticket": [], "random": []}
    rounds = len(searches[0])
    hidden = not (progress and sys.stderr and sys.stderr.isatty())
    with tqdm(total=rounds, desc="controls", leave=False, disable=hidden) as bar:
        for index in range(rounds):
            row: dict[str, list[Run]] = {kind: [] for kind in KINDS}
            for seed, search in enumerate(searches):
                step, own = search[index], runs.derive(seed, index)
                controls = {
                    "re-initialised": lottery_tickets.random_reinitialisation(step, seed=own),
                    "random": lottery_tickets.random_ticket(step, seed=own),
                }
                row["ticket"].append(step.run)
                for kind, model in controls.items():
                    run = step.run  # of the dense network there is nothing to draw anew
                    if index:
                        run = lottery_tickets.train(
                            model, data, seed=own, progress=False, **training
                        )
                    row[kind].append(run)
                if seed == 0:
                    shown = {"ticket": step.ticket, "random": controls["random"]}
                    for kind, network in shown.items():
                        pictures[kind].append(_first_mask(network))
            for kind in KINDS:
                found[kind].append(row[kind])
            bar.update()
    return State(
        np.array([step.density for step in searches[0]]),
        np.array(searches[0][0].iterations),
        {kind: _collect(found[kind], lambda run: run.valid_loss) for kind in KINDS},
        {kind: _collect(found[kind], lambda run: run.early_stop) for kind in KINDS},
        {kind: _collect(found[kind], lambda run: run.accuracy_at_early_stop) for kind in KINDS},
        pictures,
    )


def draw(state: State, *, round: int = 7, measure: str = "early stop") -> Figure:
    """Draw one round: two masks, the learning curves, and where it stands among all rounds."""
    figure = plt.figure(figsize=(8.2, 3.5), layout="none")
    grid = figure.add_gridspec(2, 3, width_ratios=(0.62, 1.3, 1.1))
    grid.update(left=0.06, right=0.985, bottom=0.145, top=0.845, wspace=0.36, hspace=0.42)
    for place, kind in enumerate(state.masks):
        ax = figure.add_subplot(grid[place, 0])
        plots.mask_image(state.masks[kind][round][:_ROWS], title=f"mask: {kind}", ax=ax)
        ax.set(xticks=[], yticks=[], xlabel="input" if place else "", ylabel="unit")
    curves, levels = figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])
    draw_curves(state, round, curves)
    draw_levels(state, measure, levels)
    levels.axvline(100 * state.densities[round], color="#555555", linestyle=":", linewidth=1)
    for i, kind in enumerate(KINDS):
        levels.plot(
            100 * state.densities[round],
            _values(state, measure)[kind][round].mean(),
            marker=plots.MARKERS[i],
            markersize=9,
            color=plots.PALETTE[i],
            markeredgecolor="black",
        )
    cast(Any, levels.get_legend()).remove()  # one legend, above the curves, serves both
    curves.legend(
        loc="lower left", bbox_to_anchor=(-0.16, 1.07), ncols=4, columnspacing=1.2, handlelength=1.8
    )
    return figure


def draw_curves(state: State, round: int, ax: Any = None) -> Any:
    """Draw the loss on valid over the iterations: three kinds and the dense network's mean."""
    at = state.iterations.tolist()
    series = {kind: (at, state.valid_loss[kind][round]) for kind in KINDS}
    ax = plots.curves(
        series,
        xlabel="iteration",
        ylabel="loss on valid",
        title=f"{state.densities[round]:.1%} of the weights left",
        ax=ax,
    )
    for line in ax.lines:
        line.set_markersize(3)
    dense = state.valid_loss["ticket"][0].mean(0)
    ax.plot(state.iterations, dense, color="#555555", linestyle=":", label="dense")
    for i, kind in enumerate(KINDS):
        stop = state.early_stop[kind][round].mean()
        ax.axvline(stop, 0, 0.07, color=plots.PALETTE[i], linewidth=4)
    # the interesting part: from the least loss to what chance would give some way into training
    lowest = min(values.min() for values in state.valid_loss.values())
    top = np.median(dense) + 2.5 * (np.median(dense) - lowest) + 0.1
    ax.set_ylim(max(0.0, lowest - 0.15 * (top - lowest)), top)
    ax.legend()
    return ax


def draw_levels(state: State, measure: str, ax: Any = None) -> Any:
    """Draw one of ``MEASURES`` over the share of weights left, for all rounds and kinds."""
    left = (100 * state.densities).tolist()
    values = _values(state, measure)
    ax = plots.curves(
        {kind: (left, values[kind].T) for kind in KINDS},
        xlabel="weights left (%)",
        ylabel="iteration" if measure == "early stop" else "test accuracy",
        title=MEASURES[measure],
        ax=ax,
    )
    for line in ax.lines:
        line.set_markersize(4)
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= left[-1] * 0.8]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{t}" for t in ticks])
    ax.minorticks_off()
    ax.invert_xaxis()
    return ax


def describe(state: State, *, round: int = 7, measure: str = "early stop") -> str:
    """Say in words what :func:`draw` shows."""
    if measure == "early stop":
        what, shown = "Iteration of the least loss on valid", "{:.0f}".format
    else:
        what, shown = "Test accuracy at the least loss on valid", "{:.1%}".format
    values = _values(state, measure)

    def told(kind: str, at: int) -> str:
        here = values[kind][at]
        return f"{shown(here.mean())} ({shown(here.min())} to {shown(here.max())})"

    parts = [f"{kind} {told(kind, round)}" for kind in KINDS]
    return (
        f"Round {round}: {state.densities[round]:.1%} of the weights left. {what}, mean (range) "
        f"over {values['ticket'].shape[1]} seeds: {', '.join(parts)}; dense {told('ticket', 0)}."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    last = len(state.densities) - 1
    return {
        "round": ipywidgets.IntSlider(
            description="rounds of pruning", min=0, max=last, value=min(7, last)
        ),
        "measure": ipywidgets.Dropdown(
            description="right panel",
            options=list(MEASURES),
            value="early stop",
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )


def _values(state: State, measure: str) -> dict[str, np.ndarray]:
    return {"early stop": state.early_stop, "accuracy": state.accuracy}[measure]


def _collect(table: list[list[Run]], read: Any) -> np.ndarray:
    return np.array([[read(run) for run in row] for row in table], dtype=float)


def _first_mask(model: nn.Module | None) -> np.ndarray:
    """The first layer's mask, [units, inputs]; all ones where nothing is masked yet."""
    assert model is not None  # a search keeps the networks of its rounds
    layer, module = next(iter(structure.prunable(model).items()))
    whole = torch.ones_like(cast(Tensor, module.weight), dtype=torch.bool)
    return masks.masks_of(model).get(f"{layer}.weight", whole).flatten(1).numpy()
