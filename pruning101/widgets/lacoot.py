"""Lesson 9's widget: blocks' distances while a network learns, and blocks taken out of its path.

What it shows is computed before, in :mod:`widgets.lacoot_state`.
"""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import ipywidgets
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from pruning101.core import plots
from pruning101.widgets import base
from pruning101.widgets.lacoot_state import CHANGE as CHANGE
from pruning101.widgets.lacoot_state import INFLUENCE as INFLUENCE
from pruning101.widgets.lacoot_state import LAST as LAST
from pruning101.widgets.lacoot_state import MAXIMISED as MAXIMISED
from pruning101.widgets.lacoot_state import RANDOM as RANDOM
from pruning101.widgets.lacoot_state import RANKINGS as RANKINGS
from pruning101.widgets.lacoot_state import SHUFFLED as SHUFFLED
from pruning101.widgets.lacoot_state import Removal as Removal
from pruning101.widgets.lacoot_state import State as State
from pruning101.widgets.lacoot_state import Trained as Trained
from pruning101.widgets.lacoot_state import from_trained as from_trained
from pruning101.widgets.lacoot_state import precompute as precompute
from pruning101.widgets.lacoot_state import train as train

NETWORKS = {True: "with the regulariser", False: "without the regulariser"}
_WIDTH, _HEIGHT, _LOWER = 590, 418, 208  # of the figure, and of its lower part, in points
_LEFT, _RIGHT = 44, 580  # between these the figure lies
_GONE, _STAYS = "#A0A0A0", "#8C8C8C"


def draw(
    state: State, *, regularised: bool = True, removed: int = 0, ranking: str | None = None
) -> Figure:
    """Draw distances in training, accuracy over removals, and the network with its path."""
    ranking = ranking or state.ranking
    figure = plt.figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="none")
    low, high = (_LOWER + 34) / _HEIGHT, 1 - 20 / _HEIGHT
    left = figure.add_axes((_LEFT / _WIDTH, low, 0.52, high - low))
    right = figure.add_axes((0.68, low, _RIGHT / _WIDTH - 0.68, high - low))
    distances(state, regularised=regularised, removed=removed, ranking=ranking, ax=left)
    accuracies(state, regularised=regularised, removed=removed, ranking=ranking, ax=right)
    lower = figure.add_axes((0, 0, 1, _LOWER / _HEIGHT))
    network(state, regularised=regularised, removed=removed, ranking=ranking, ax=lower)
    return figure


def distances(state: State, *, regularised: bool, removed: int, ranking: str, ax: Axes) -> None:
    """Draw each block's distance in training; a removed one's is dashed and ends in a cross."""
    trained = state.trained[regularised]
    gone = state.removals[regularised, ranking].order[:removed]
    every = np.concatenate([each.distances for each in state.trained.values()])
    low, high = max(every.min(), every.max() / 1e4) / 1.25, 1.25 * every.max()
    last = trained.steps[-1]
    ends = np.log(np.maximum(trained.distances[-1], low) / low) / np.log(high / low)
    columns = 1 + (len(state.blocks) > 10)
    for i, name in enumerate(state.blocks):
        out = name in gone
        colour = _GONE if out else _colour(state, i)
        ax.plot(
            trained.steps,
            np.maximum(trained.distances[:, i], low),
            color=colour,
            linestyle=(0, (3, 1.5)) if out else "-",
            linewidth=1.1 if out else 1.7,
            marker="X" if out else "o",
            markevery=[-1],
            zorder=2 if out else 3,
            label=name,
        )
    leaders, inks = [], []
    for rank, (i, height) in enumerate(_spread(ends, 0.064 / columns)):
        inks.append(_GONE if state.blocks[i] in gone else _colour(state, i))
        x = last * (1.07 + 0.07 * (rank % columns))
        y = low * (high / low) ** height
        leaders.append([(last, max(trained.distances[-1, i], low)), (last * 1.05, y)])
        ax.text(x, y, str(i + 1), color=inks[-1], fontsize=8, va="center", ha="center")
    ax.add_collection(LineCollection(leaders, colors=inks, linewidths=0.6), autolim=False)
    unit = "in the features' size" if trained.normalise else "in the features' unit"
    what = "relative change" if trained.measure == "relative" else f"distance ({unit})"
    ax.set(xlabel="training step", ylabel=what, yscale="log")
    ax.set(xlim=(0, last * (1.1 + 0.07 * (columns - 1))), ylim=(low, high))
    ticks = [m * 10.0**e for e in range(-12, 12) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ticks = ticks if len(ticks) < 8 else [t for t in ticks if f"{t:e}"[0] == "1"]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_title(f"blocks' distances in training, {NETWORKS[regularised]}")


def _spread(heights: np.ndarray, gap: float) -> list[tuple[int, float]]:
    """Move heights in [0, 1] apart to at least ``gap``; give each with its place, from below."""
    order = np.argsort(heights, kind="stable")
    wanted = heights[order].astype(float)
    found = wanted.copy()
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    found += (wanted - found).mean()
    ladder = gap * np.arange(len(found))
    found = np.maximum(found, 0.02 + ladder)
    found = np.minimum(found, 0.98 - ladder[::-1])
    return list(zip(order.tolist(), found.tolist(), strict=True))


def accuracies(state: State, *, regularised: bool, removed: int, ranking: str, ax: Axes) -> None:
    """Draw accuracy over the number of removed blocks, of both networks."""
    for kind, label in ((True, "with the regulariser"), (False, "without")):
        chosen = kind == regularised
        accuracy = 100 * state.removals[kind, ranking].accuracy
        ax.plot(
            range(len(accuracy)),
            accuracy,
            color=plots.KEPT if chosen else _GONE,
            marker="o" if kind else "s",
            linestyle="-" if kind else (0, (5, 1.5)),
            label=label,
            zorder=3 if chosen else 2,
        )
    now_of = state.removals[regularised, ranking].accuracy
    mark: dict[str, Any] = {"markersize": 13, "fillstyle": "none", "markeredgewidth": 2.2}
    ax.plot(
        [removed],
        [100 * now_of[removed]],
        "o",
        color=plots.PALETTE[1],
        zorder=4,
        label="_now",
        **mark,
    )
    guessing = 100 / state.classes
    ax.axhline(guessing, color="#555555", linestyle=":", linewidth=1.2, label="_guessing")
    ax.text(-0.02 * len(now_of), guessing - 2, "guessing", fontsize=8, va="top", color="#444444")
    ax.set(xlabel="blocks removed", ylabel="accuracy on valid (%)", ylim=(0, 125))
    count = len(state.blocks)
    ax.set_xticks(range(0, count + 1, 1 if count < 10 else 2 if count < 18 else 4))
    ax.set_yticks(range(0, 101, 20))
    ax.set_title(f"order: {ranking}")
    ax.legend(
        loc="upper center", ncols=2, handlelength=2.2, columnspacing=1.2, borderpad=0.1, fontsize=8
    )


def network(state: State, *, regularised: bool, removed: int, ranking: str, ax: Axes) -> None:
    """Draw what is left, the path through the network, and below each block what ranks it.

    The axes' unit is the point. Kept blocks are filled boxes beside the straight path, and add to
    it; a removed one is a dashed outline that the path passes by.
    """
    removal = state.removals[regularised, ranking]
    ax.set(xlim=(0, _WIDTH), ylim=(0, _LOWER))
    ax.set_axis_off()
    _gauges(removal, removed, ax)
    count = len(state.blocks)
    gone, following = removal.order[:removed], removal.order[removed : removed + 1]
    units = sum(0.5 if name is None else 1.0 for name in state.path)
    start, end = _LEFT + 50, _RIGHT - 46  # between these the path lies
    unit = min(78.0, (end - start) / units)
    x = (start + end - unit * units) / 2
    stream, box, bottom, tall = 96.0, 113.0, 30.0, 36.0
    width = min(0.62 * unit, 36.0)
    names, prefix = _short(state.blocks, unit)
    size = 8.0 if count < 16 else 6.0
    ends = (x - 10, x + unit * units + 8)
    ax.plot(ends, (stream, stream), color="#333333", linewidth=2.6, zorder=2, label="path")
    ax.plot(ends[1], stream, ">", color="#333333", markersize=8, clip_on=False, zorder=2)
    ax.text(ends[0] - 5, stream, "image", ha="right", va="center", fontsize=9)
    ax.text(ends[1] + 8, stream, "class", ha="left", va="center", fontsize=9)
    largest = max(float(removal.scores.max()), 1e-12)
    branches: list[tuple[float, float]] = []
    sums: list[float] = []
    for name in state.path:
        if name is None:
            grey: dict[str, Any] = {"facecolor": _STAYS, "label": "other layers", "zorder": 3}
            corner = (x + 0.125 * unit, stream - 9)
            ax.add_artist(Rectangle(corner, 0.25 * unit, 18, edgecolor="none", **grey))
            x += 0.5 * unit
            continue
        place, out, centre = state.blocks.index(name), name in gone, x + unit / 2
        colour = _GONE if out else _colour(state, place)
        style: dict[str, Any] = {
            "facecolor": "none" if out else colour,
            "edgecolor": colour,
            "linestyle": (0, (3, 2)) if out else "-",
            "linewidth": 1.2,
            "zorder": 3,
        }
        rounded = f"round,pad=0,rounding_size={min(5.0, width / 4)}"
        corner = (centre - width / 2, box)
        ax.add_artist(FancyBboxPatch(corner, width, 30, boxstyle=rounded, label=name, **style))
        ink = _GONE if out else "black" if place / max(1, count - 1) > 0.6 else "white"
        bold: dict[str, Any] = {"fontweight": "bold", "ha": "center", "va": "center", "zorder": 4}
        ax.text(centre, box + 14.5, str(place + 1), color=ink, fontsize=min(10, size + 2), **bold)
        if not out:
            reach = width / 2 + min(0.14 * unit, 9.0)
            middle = box + 15
            outside, nowhere = (centre - reach, stream), (np.nan, np.nan)
            branches += [outside, (centre - reach, middle), (centre - width / 2, middle), nowhere]
            branches += [(centre + width / 2, middle), (centre + reach, middle)]
            branches += [(centre + reach, stream), nowhere]
            sums.append(centre + reach)
        if name in following:
            ax.plot(centre, box + 36, "v", color=plots.PALETTE[1], markersize=6, label="_next")
            ax.text(centre + 6, box + 33, "next", fontsize=8, color=plots.PALETTE[1])
        score = float(removal.scores[place])
        height = tall * score / largest
        corner = (centre - 0.31 * unit, bottom)
        ax.add_artist(Rectangle(corner, 0.62 * unit, height, label=f"score of {name}", **style))
        ink = _GONE if out else "black"
        ax.text(centre, bottom + height + 2, _number(score), ha="center", fontsize=size, color=ink)
        ax.text(centre, bottom - 10, names[place], ha="center", fontsize=size, color=ink)
        x += unit
    if branches:
        bx, by = zip(*branches, strict=True)
        ax.plot(bx, by, color="#333333", linewidth=1.3, zorder=1, label="branches")
        mark: dict[str, Any] = {"color": "white", "markeredgecolor": "#333333", "zorder": 5}
        ax.plot(sums, [stream] * len(sums), "o", markersize=min(9, 0.28 * unit), **mark)
        ax.plot(sums, [stream] * len(sums), "+", markersize=min(6, 0.2 * unit), **mark)
    ax.text(_LEFT, bottom, fill(ranking, 11), ha="left", va="bottom", fontsize=8)
    note: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 7, "color": "#666666"}
    ax.text(_RIGHT, bottom, "grey: layers\nthat stay", **note)
    if prefix:
        ax.text((start + end) / 2, 6, f"(names begin with {prefix})", ha="center", fontsize=8)


def _gauges(removal: Removal, removed: int, ax: Axes) -> None:
    """Write what is left: blocks, accuracy, MACs and latency, each over a bar of its share."""
    accuracy, macs, latency = removal.accuracy, removal.macs, removal.latency_ms
    count, points = len(removal.order), 100 * (accuracy[removed] - accuracy[0])

    def less(values: np.ndarray) -> str:
        return f"{100 * (values[removed] / values[0] - 1):+.0f} %"

    shown = (
        ("blocks", f"{count - removed} of {count}", 1 - removed / count, ""),
        (
            "accuracy on valid",
            f"{accuracy[removed]:.1%}",
            accuracy[removed],
            f"{points:+.1f} points",
        ),
        ("MACs an image", _si(macs[removed]), macs[removed] / macs[0], less(macs)),
        (
            "latency of an image",
            f"{latency[removed]:.3g} ms",
            latency[removed] / latency[0],
            less(latency),
        ),
    )
    pitch = (_RIGHT - _LEFT + 18) / len(shown)
    length = pitch - 18
    for i, (label, value, share, change) in enumerate(shown):
        x, colour = _LEFT + i * pitch, plots.PALETTE[(3, 2, 0, 5)[i]]
        ax.text(x, 187, value, fontsize=13, fontweight="bold")
        ax.text(x, 167, label, fontsize=8, color="#444444")
        if removed:
            change = change.replace("-", "\N{MINUS SIGN}")
            ax.text(x + length, 187, change, fontsize=8, ha="right", color="#444444")
        ax.add_artist(Rectangle((x, 177), length, 6, facecolor="#E6E6E6"))
        ax.add_artist(Rectangle((x, 177), length * share, 6, facecolor=colour, label=label))


def _short(names: Sequence[str], unit: float) -> tuple[list[str], str]:
    """Return names that fit side by side, and what they all begin with where that is left out."""
    if max(map(len, names)) * 4.6 < unit:
        return list(names), ""
    prefix = names[0]
    while not all(name.startswith(prefix) for name in names):
        prefix = prefix[:-1]
    prefix = prefix.rstrip("0123456789")
    return [name[len(prefix) :] for name in names], prefix


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:#.2g}"


def _si(value: float) -> str:
    scale, letter = next(
        p for p in ((1e9, " G"), (1e6, " M"), (1e3, " K"), (1, "")) if value >= p[0]
    )
    return f"{value / scale:.3g}{letter}"


def _colour(state: State, place: int) -> Any:
    """From the first block to the last, from dark to light."""
    return plt.get_cmap("viridis")(0.88 * place / max(1, len(state.blocks) - 1))


def describe(
    state: State, *, regularised: bool = True, removed: int = 0, ranking: str | None = None
) -> str:
    """Say in words what :func:`draw` shows."""
    ranking = ranking or state.ranking
    removal = state.removals[regularised, ranking]
    gone = removal.order[:removed]
    left = [name for name in state.blocks if name not in gone]
    accuracy, macs, latency = removal.accuracy, removal.macs, removal.latency_ms
    return (
        f"The network {NETWORKS[regularised]}, {removed} of {len(state.blocks)} blocks removed by "
        f"{ranking}: {', '.join(gone) or 'none'}. What stays: {', '.join(left) or 'none'}. "
        f"Accuracy on valid ({state.images} images) {accuracy[removed]:.1%} (with all blocks "
        f"{accuracy[0]:.1%}), {_si(macs[removed])} MACs ({macs[removed] / macs[0]:.0%}), "
        f"{latency[removed]:.2f} ms for one image on one CPU thread "
        f"({latency[removed] / latency[0]:.0%})."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the controls, by the names of the settings that they move."""
    return {
        "removed": ipywidgets.IntSlider(
            description="blocks removed", min=0, max=len(state.blocks), step=1, value=0
        ),
        "regularised": ipywidgets.Dropdown(
            description="network", options=[(v, k) for k, v in NETWORKS.items()], value=True
        ),
        "ranking": ipywidgets.Dropdown(
            description="removed in the order of", options=RANKINGS, value=state.ranking
        ),
    }


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )
