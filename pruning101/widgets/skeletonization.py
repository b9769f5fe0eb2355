"""The widget of lesson 1: units leave in order of relevance, and the decision regions follow."""

from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from pruning101.core import plots
from pruning101.skeletonization import relevance, trim
from pruning101.widgets import base

ORDERS = {
    "least relevant first": "linear",
    "least relevant first (quadratic)": "quadratic",
    "most relevant first": "most",
}
GRID = 60  # places along each side of the map of decisions


@dataclass(frozen=True)
class State:
    """All that the figure needs, computed once.

    `points` [N, 2] and `labels` [N] are the task; `relevances` [units] by attention, of the linear
    error. For each of `ORDERS`: `orders` [units] is who goes first, `maps` [units, GRID, GRID] the
    probability of class 1 over `extent` and `accuracies` [units] after 0, 1, 2... removals.
    """

    points: np.ndarray
    labels: np.ndarray
    extent: tuple[float, float, float, float]
    relevances: np.ndarray
    orders: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]
    accuracies: dict[str, np.ndarray]


def toy(seed: int = 0, *, units: int = 12, n: int = 240) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained network on two interleaved half-moons, the points [n, 2], the labels [n]."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(n // 2, generator=g)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])
    points += 0.15 * torch.randn(points.shape, generator=g)
    labels = torch.arange(2).repeat_interleave(n // 2)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers = [nn.Linear(2, units), nn.ReLU(), nn.Linear(units, 2)]
        model = nn.Sequential(*layers)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):  # to a criterion, not to the bottom
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimiser.step()
    return model, points, labels


def precompute(model: nn.Module, points: Tensor, labels: Tensor, layer: str = "0") -> State:
    """Trim the units of `layer` one after the other, in each order, and map every network."""
    batches = [(points, labels)]
    rho = relevance(model, layer, batches)
    quadratic = relevance(model, layer, batches, loss="quadratic")
    orders = {
        "linear": rho.argsort(),
        "quadratic": quadratic.argsort(),
        "most": rho.argsort().flip(0),
    }
    low, high = points.min(0).values - 0.4, points.max(0).values + 0.4
    axes = [torch.linspace(float(low[i]), float(high[i]), GRID) for i in (0, 1)]
    places = torch.cartesian_prod(*axes)  # [GRID * GRID, 2], the first axis slowest
    maps: dict[str, np.ndarray] = {}
    accuracies: dict[str, np.ndarray] = {}
    for name, order in orders.items():
        drawn, right = [], []
        for removed in range(len(rho)):
            smaller = trim(model, layer, order[:removed], points[:2])
            with torch.no_grad():
                p = smaller(places).softmax(1)[:, 1].reshape(GRID, GRID).T
                right.append((smaller(points).argmax(1) == labels).float().mean().item())
            drawn.append(p.numpy())
        maps[name], accuracies[name] = np.stack(drawn), np.array(right)
    return State(
        points=points.numpy(),
        labels=labels.numpy(),
        extent=(float(low[0]), float(high[0]), float(low[1]), float(high[1])),
        relevances=rho.numpy(),
        orders={name: order.numpy() for name, order in orders.items()},
        maps=maps,
        accuracies=accuracies,
    )


def draw(state: State, *, removed: int, order: str = "least relevant first") -> Figure:
    """Draw the decision regions and the units left after `removed` of them went in this order.

    Pure: settings in, a new figure out.
    """
    key = ORDERS[order]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="none")
    figure.subplots_adjust(0.07, 0.13, 0.99, 0.91, 0.26)  # automatic layout takes half the time
    regions(state, removed=removed, order=order, ax=left)

    by_relevance = np.argsort(state.relevances)
    gone = set(state.orders[key][:removed].tolist())
    heights = state.relevances[by_relevance]
    for names, color, hatch, label in (
        ([i for i, u in enumerate(by_relevance) if u not in gone], plots.KEPT, "", "kept"),
        ([i for i, u in enumerate(by_relevance) if u in gone], plots.REMOVED, "///", "removed"),
    ):
        right.bar(names, heights[names], color=color, hatch=hatch, edgecolor="white", label=label)
    right.axhline(0, color="#555555", linewidth=1)
    right.set_xticks(range(len(heights)), [str(u) for u in by_relevance])
    right.grid(axis="x", visible=False)
    right.set(
        xlabel="number of the unit, least relevant first",
        ylabel="relevance (linear error per pattern)",
        title=f"{len(heights) - removed} of {len(heights)} units left",
    )
    right.legend(loc="upper left")
    return figure


def regions(
    state: State, *, removed: int, order: str = "least relevant first", ax: plt.Axes
) -> plt.Axes:
    """Draw the decisions of the network without its first `removed` units, and the points."""
    key = ORDERS[order]
    pale = ListedColormap(["#CFE3F2", "#F6D9C6"])  # of the two classes' colours
    ax.imshow(
        state.maps[key][removed] > 0.5, origin="lower", extent=state.extent, cmap=pale,
        vmin=0, vmax=1, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    for label in (0, 1):
        here = state.points[state.labels == label]
        ax.plot(
            here[:, 0], here[:, 1], plots.MARKERS[label], color=plots.PALETTE[label],
            markersize=3.5, linestyle="none", label=f"class {label}",
        )  # fmt: skip
    ax.grid(visible=False)
    accuracy = state.accuracies[key][removed]
    ax.set(
        xlabel="input $x_1$",
        ylabel="input $x_2$",
        title=f"{removed} removed: {accuracy:.0%} right",
    )
    ax.legend(loc="upper right", frameon=True, handletextpad=0.1)
    return ax


def describe(state: State, *, removed: int, order: str = "least relevant first") -> str:
    """Say in words what `draw` shows for the same settings."""
    key = ORDERS[order]
    units = len(state.relevances)
    gone = ", ".join(str(u) for u in state.orders[key][:removed]) or "none"
    return (
        f"{removed} of {units} units removed, {order} ({gone}), no retraining: accuracy "
        f"{state.accuracies[key][removed]:.3f}, before {state.accuracies[key][0]:.3f}."
    )


def controls(state: State) -> dict[str, ipywidgets.ValueWidget]:
    """Return the slider and the menu, by the names of the settings that they move."""
    return {
        "removed": ipywidgets.IntSlider(
            value=0, min=0, max=len(state.relevances) - 1, continuous_update=False,
            description="units removed",
        ),
        "order": ipywidgets.Dropdown(options=list(ORDERS), description="order"),
    }  # fmt: skip


def show(state: State) -> ipywidgets.VBox:
    """Bind the controls to the figure."""
    return base.explore(
        lambda **settings: draw(state, **settings),
        lambda **settings: describe(state, **settings),
        **controls(state),
    )
