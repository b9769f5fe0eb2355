"""The course's few kinds of figure, in one style that reads without colour too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

# Okabe and Ito's colours, told apart by colour-blind readers; markers and line styles repeat the
# distinction for everyone who prints in grey. Yellow is left out: it is too pale for a line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
    "-",
    (0, (5, 1.5)),
    "-",
)
KEPT, REMOVED = "#0072B2", "#D9D9D9"


def use_style() -> None:
    """Set the course's style for every figure drawn from here on."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "grid.color": "#E6E6E6",
            "legend.frameon": False,
            "legend.fontsize": "small",
            "lines.markersize": 5,
            # an opaque ground, or dark themes would swallow the axis labels
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
        }
    )


def curves(
    series: Mapping[str, tuple[Sequence[float], Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    reference: tuple[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one line a name, with a band from the lowest to the highest seed.

    Args:
        series: name -> ``(x, y)``; ``y`` is [points] for one run or [seeds, points] for several,
            and the line is then their mean.
        xlabel: what ``x`` is, with its unit.
        ylabel: what ``y`` is, with its unit.
        title: what to see in the figure.
        reference: a name and a value, drawn as a dotted level.
        ax: where to draw; a new figure by default.
    """
    ax = ax if ax is not None else plt.subplots()[1]
    for i, (name, (x, y)) in enumerate(series.items()):
        runs = np.atleast_2d(np.asarray(y, dtype=float))
        if runs.shape[1] != len(x):
            raise ValueError(
                f"the curve {name!r} has {len(x)} places but {runs.shape[1]} values; "
                "give y as [points] or [seeds, points]"
            )
        color = PALETTE[i % len(PALETTE)]
        ax.plot(
            x,
            runs.mean(0),
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)],
            label=name,
        )
        if len(runs) > 1:
            ax.fill_between(x, runs.min(0), runs.max(0), color=color, alpha=0.18, linewidth=0)
    if reference is not None:
        name, level = reference
        ax.axhline(level, color="#555555", linestyle=":", label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        ax.set_title(title)
    if len(series) + (reference is not None) > 1:
        ax.legend()
    return ax


def histogram(
    values: Any,
    *,
    threshold: float | None = None,
    bins: int = 60,
    limits: tuple[float, float] | None = None,
    xlabel: str = "weight",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram; with a ``threshold``, what lies within plus or minus it is greyed."""
    ax = ax if ax is not None else plt.subplots()[1]
    array = np.asarray(values, dtype=float).ravel()
    counts, edges = np.histogram(array, bins=bins, range=limits)
    if threshold is None:
        ax.stairs(counts, edges, fill=True, color=KEPT)
    else:
        kept, _ = np.histogram(array[np.abs(array) >= threshold], bins=edges)
        ax.stairs(counts, edges, fill=True, color=REMOVED, label="removed")
        ax.stairs(kept, edges, fill=True, color=KEPT, label="kept")
        for edge in (-threshold, threshold):
            ax.axvline(edge, color=PALETTE[1], linestyle="--", linewidth=1)
        ax.legend(loc="upper right")  # where tails are thin
    ax.set(xlabel=xlabel, ylabel="number of weights")
    if title:
        ax.set_title(title)
    return ax


def scatter(
    x: Any,
    y: Any,
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    label: str | None = None,
    diagonal: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw points; ``diagonal`` adds the line on which both coordinates agree."""
    ax = ax if ax is not None else plt.subplots()[1]
    drawn = len(ax.collections)  # so that a second call on the same axes looks different
    ax.scatter(
        np.asarray(x, dtype=float),
        np.asarray(y, dtype=float),
        s=18,
        color=PALETTE[drawn % len(PALETTE)],
        marker=MARKERS[drawn % len(MARKERS)],
        alpha=0.75,
        label=label,
    )
    if diagonal:
        low = min(ax.get_xlim()[0], ax.get_ylim()[0])
        high = max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([low, high], [low, high], color="#555555", linestyle=":", zorder=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        ax.set_title(title)
    if label is not None:
        ax.legend()
    return ax


def bars(
    values: Mapping[str, Any],
    *,
    ylabel: str,
    title: str | None = None,
    spread: Mapping[str, Any] | None = None,
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one bar a name, its value written above it.

    Args:
        values: name -> height.
        ylabel: what the height is, with its unit.
        title: what to see in the figure.
        spread: name -> (lowest, highest), drawn as a whisker.
        highlight: the one bar that takes the second colour.
        ax: where to draw; a new figure by default.
    """
    ax = ax if ax is not None else plt.subplots()[1]
    names, heights = list(values), [float(v) for v in values.values()]
    colors = [PALETTE[1] if name == highlight else PALETTE[0] for name in names]
    whiskers = None
    if spread is not None:
        low_high = np.array([spread[name] for name in names], dtype=float)
        whiskers = np.abs(low_high - np.array(heights)[:, None]).T
    drawn = ax.bar(names, heights, color=colors, width=0.65, yerr=whiskers, capsize=3)
    ax.bar_label(drawn, fmt="{:.3g}", fontsize="small", padding=2)
    ax.grid(axis="x", visible=False)
    ax.set(ylabel=ylabel)
    if title:
        ax.set_title(title)
    return ax


def mask_image(mask: Any, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a boolean mask [rows, columns]: kept weights dark, removed ones light."""
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(
            f"mask_image draws a mask of two dimensions, this one has shape {array.shape}; "
            "flatten the rest, for instance mask.flatten(1)"
        )
    ax = ax if ax is not None else plt.subplots()[1]
    ax.imshow(
        array.astype(bool),
        cmap=ListedColormap([REMOVED, KEPT]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    ax.grid(visible=False)
    ax.set(xlabel="input", ylabel="unit")
    if title:
        ax.set_title(title)
    return ax
