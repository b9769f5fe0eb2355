"""Lesson 9's widget: blocks' distances while a network learns, and blocks taken out of its path."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn
from tqdm import tqdm

from pruning101 import lacoot
from pruning101.core import masks, measure, plots, structure
from pruning101.core.block_features import chosen_blocks
from pruning101.core.data import Dataset
from pruning101.core.steps import History
from pruning101.core.surgery import put
from pruning101.core.training import evaluate, fit
from pruning101.core.transport import Direction
from pruning101.widgets import base

RANDOM, MAXIMISED = "distance (random directions)", "distance (maximised)"
CHANGE, INFLUENCE, SHUFFLED, LAST = "relative change", "block influence", "random", "last first"
RANKINGS = (RANDOM, MAXIMISED, CHANGE, INFLUENCE, SHUFFLED, LAST)
NETWORKS = {True: "with the regulariser", False: "without it"}


@dataclass(frozen=True)
class Trained:
    """A trained network, and its blocks' distances in some of the training steps.

    ``steps`` [points] counts from 1; ``distances`` [points, blocks] are of ``blocks`` in the
    network's order, measured along directions of the kind ``direction``.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    steps: np.ndarray
    distances: np.ndarray
    direction: str
    history: History


@dataclass(frozen=True)
class Removal:
    """Blocks taken out of one network in one order.

    ``order`` are all blocks, the first to go first, and ``scores`` [blocks] what decided it, in the
    network's order. ``accuracy`` [blocks + 1] on ``valid``, in [0, 1], ``macs`` and ``latency_ms``
    (one image on one CPU thread) are those with 0, 1, 2, ... of them gone.
    """

    order: tuple[str, ...]
    scores: np.ndarray
    accuracy: np.ndarray
    macs: np.ndarray
    latency_ms: np.ndarray


@dataclass(frozen=True)
class State:
    """All that the widget shows, computed before: see :func:`precompute`.

    ``path`` is the network from input to output: names of ``blocks``, and None for other layers.
    ``trained`` has the network with the regulariser under True, and that without under False;
    ``removals`` has an entry for each of these and each of :data:`RANKINGS`.
    """

    blocks: tuple[str, ...]
    path: tuple[str | None, ...]
    trained: dict[bool, Trained]
    removals: dict[tuple[bool, str], Removal]
    classes: int
    images: int

    @property
    def ranking(self) -> str:
        """The ranking by the distance that the regulariser lowers."""
        return MAXIMISED if self.trained[True].direction == "ascent" else RANDOM


# --- before ------------------------------------------------------------------------------------


def precompute(
    model: nn.Module,
    data: Dataset,
    *,
    blocks: Sequence[str] | None = None,
    strength: float,
    epochs: int,
    lr: float,
    direction: Direction = "random",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> State:
    """Train two copies of ``model``, with the regulariser and without, and take their blocks out.

    See :func:`train` and :func:`from_trained`, which do one each; ``options`` are further ones of
    ``training.fit``.
    """
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, "progress": progress}
    settings |= {"blocks": blocks, "direction": direction, **options}
    regularised, plain = (train(model, data, strength=s, **settings) for s in (strength, 0.0))
    return from_trained(regularised, plain, data, seed=seed, progress=progress)


def train(
    model: nn.Module,
    data: Dataset,
    *,
    strength: float,
    epochs: int,
    lr: float,
    blocks: Sequence[str] | None = None,
    direction: Direction = "random",
    every: int = 5,
    seed: int = 0,
    **options: Any,
) -> Trained:
    """Train a copy of ``model`` with LaCoOT's penalty, noting distances at each ``every``-th step.

    With ``strength`` 0 distances are only measured, at these steps, and training is what it would
    be without. ``options`` are further ones of ``training.fit``.

    Raises:
        ValueError: no removable block, or an option out of range, as ``lacoot.BlockDistances``.
    """
    copy = masks.clone(model)
    names = tuple(_in_order(copy, blocks, _example(data, copy)))
    steps: list[int] = []
    seen: list[Tensor] = []
    done = 0

    with lacoot.BlockDistances(copy, names, direction=direction, seed=seed) as distances:
        regulariser = distances.penalty(strength)

        def penalty(network: nn.Module) -> Tensor:
            noted = done % every == 0
            if strength:
                cost = regulariser(network)
            else:
                with torch.no_grad():
                    cost = regulariser(network) if noted else torch.zeros(())
            if noted:
                steps.append(done + 1)
                seen.append(torch.stack([distances.latest[name] for name in names]))
            return cost

        def count(network: nn.Module) -> None:
            nonlocal done
            done += 1

        settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, **options}
        history = fit(copy, data, penalty=penalty, after_step=count, **settings)
    found = torch.stack(seen).cpu().numpy() if seen else np.zeros((0, len(names)))
    return Trained(copy, names, np.array(steps), found, direction, history)


def from_trained(
    regularised: Trained,
    plain: Trained,
    data: Dataset,
    *,
    seed: int = 0,
    repeats: int = 60,
    progress: bool = True,
) -> State:
    """Take the blocks of two trained networks out, in the order of each of :data:`RANKINGS`.

    Scores and accuracies are those on ``valid``; latency is the median of ``repeats`` passes of one
    image on one CPU thread, and networks of the same build share it. The models stay as they were.

    Raises:
        ValueError: the networks have not the same blocks.
    """
    blocks = regularised.blocks
    if plain.blocks != blocks:
        raise ValueError(
            f"The networks must have the same blocks, not {blocks} and {plain.blocks}: train both "
            "from one model."
        )
    trained = {True: regularised, False: plain}
    works = {kind: masks.clone(each.model).eval() for kind, each in trained.items()}
    ranked = {
        (kind, ranking): scores
        for kind, work in works.items()
        for ranking, scores in _rankings(work, data, blocks, seed).items()
    }
    orders = {key: sorted(scores, key=lambda name: scores[name]) for key, scores in ranked.items()}
    # Of orders that begin alike, each network is measured once.
    left = {
        (kind, frozenset(order[:n]))
        for (kind, _), order in orders.items()
        for n in range(len(blocks) + 1)
    }
    accuracy: dict[tuple[bool, frozenset[str]], float] = {}
    hidden = not (progress and sys.stderr and sys.stderr.isatty())
    for kind, gone in tqdm(left, desc="removing blocks", leave=False, disable=hidden):
        with _without(works[kind], gone):
            accuracy[kind, gone] = evaluate(works[kind], data, "valid").accuracy
    costs = _costs(works[False].cpu(), data, {gone for _, gone in left}, repeats)
    removals = {}
    for (kind, ranking), order in orders.items():
        subsets = [frozenset(order[:n]) for n in range(len(blocks) + 1)]
        removals[kind, ranking] = Removal(
            order=tuple(order),
            scores=np.array([ranked[kind, ranking][name] for name in blocks]),
            accuracy=np.array([accuracy[kind, gone] for gone in subsets]),
            macs=np.array([costs[gone][0] for gone in subsets]),
            latency_ms=np.array([costs[gone][1] for gone in subsets]),
        )
    path = _path(works[False], blocks, _example(data, works[False]))
    return State(blocks, path, trained, removals, len(data.classes), len(data.valid))


def _example(data: Dataset, model: nn.Module, count: int = 2) -> Tensor:
    images, _ = next(iter(data.batches("valid", count)))
    parameter = next(model.parameters())
    return images.to(parameter.device, parameter.dtype)


def _in_order(model: nn.Module, blocks: Sequence[str] | None, example: Tensor) -> list[str]:
    names = chosen_blocks(model, blocks, example)
    return [name for name in _path(model, names, example) if name is not None]


def _path(model: nn.Module, blocks: Sequence[str], example: Tensor) -> tuple[str | None, ...]:
    """Name the blocks as they are called, with None wherever other layers with weights are."""
    found: list[str | None] = []

    def enter(name: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if name is not None or found[-1:] != [None]:
                found.append(name)

        return hook

    hooks = []
    for name, module in model.named_modules():
        weighted = any(p.ndim > 1 for p in module.parameters(recurse=False))
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if name in blocks:
            hooks.append(module.register_forward_pre_hook(enter(name)))
        elif weighted and name and not inside:
            hooks.append(module.register_forward_pre_hook(enter(None)))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            masks.clone(model).eval()(example)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(found)


def _rankings(
    model: nn.Module, data: Dataset, blocks: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Score all blocks by each ranking; the smallest goes first."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:  # a last batch of one is no distribution
        return (pair for pair in data.batches("valid", 128) if len(pair[0]) > 1)

    order = lacoot.random_order(blocks, seed)
    return {
        RANDOM: lacoot.block_distances(model, batches(), blocks=blocks),
        MAXIMISED: lacoot.block_distances(model, batches(), blocks=blocks, direction="ascent"),
        CHANGE: lacoot.relative_change(model, batches(), blocks=blocks),
        INFLUENCE: lacoot.block_influence(model, batches(), blocks=blocks),
        SHUFFLED: {name: order.index(name) + 1 for name in blocks},
        LAST: {name: len(blocks) - i for i, name in enumerate(blocks)},
    }


@contextmanager
def _without(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Take these blocks out of ``model`` inside the block, and put them back after it."""
    blocks = {name: model.get_submodule(name) for name in names}
    try:
        for name in blocks:
            structure.remove_block(model, name)
        yield
    finally:
        for name, block in blocks.items():
            put(model, name, block)


def _costs(
    model: nn.Module, data: Dataset, subsets: set[frozenset[str]], repeats: int
) -> dict[frozenset[str], tuple[int, float]]:
    """Return MACs and milliseconds, for one image, of ``model`` without each of these subsets."""
    image = _example(data, model, 1)
    macs: dict[frozenset[str], int] = {}
    for gone in subsets:
        with _without(model, gone):
            macs[gone] = measure.macs(model, image)
    kind_of = {
        gone: (macs[gone], *sorted(repr(model.get_submodule(name)) for name in gone))
        for gone in subsets
    }
    built = {kind: gone for gone, kind in kind_of.items()}
    times: dict[Any, list[float]] = {kind: [] for kind in built}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            # In turns, so that whatever else the machine does slows all of them alike.
            for _ in range(max(1, repeats // 10)):
                for kind, gone in built.items():
                    with _without(model, gone):
                        model(image)
                        for _ in range(10):
                            start = time.perf_counter()
                            model(image)
                            times[kind].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {gone: (macs[gone], 1e3 * float(np.median(times[kind_of[gone]]))) for gone in subsets}


# --- the figure --------------------------------------------------------------------------------


def draw(
    state: State, *, regularised: bool = True, removed: int = 0, ranking: str | None = None
) -> Figure:
    """Draw distances in training, accuracy over removals, and the network with its path."""
    ranking = ranking or state.ranking
    figure = plt.figure(figsize=(8.2, 5.6), layout="none")
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=(1, 1.15),
        width_ratios=(1.35, 1),
        left=0.075,
        right=0.985,
        bottom=0.01,
        top=0.95,
        wspace=0.27,
        hspace=0.2,
    )
    distances(state, regularised, removed, ranking, ax=figure.add_subplot(grid[0, 0]))
    accuracies(state, regularised, removed, ranking, ax=figure.add_subplot(grid[0, 1]))
    network(state, regularised, removed, ranking, ax=figure.add_subplot(grid[1, :]))
    return figure


def distances(state: State, regularised: bool, removed: int, ranking: str, *, ax: Axes) -> None:
    """Draw each block's distance in training; blocks that are removed end in a cross."""
    trained = state.trained[regularised]
    gone = state.removals[regularised, ranking].order[:removed]
    for i, name in enumerate(state.blocks):
        out = name in gone
        ax.plot(
            trained.steps,
            trained.distances[:, i],
            color=_GONE if out else _colour(state, i),
            linestyle=(0, (3, 1.5)) if out else "-",
            linewidth=1.0 if out else 1.6,
            marker="X" if out else "o",
            markevery=[-1],
            zorder=2 if out else 3,
            label=name,
        )
    ax.set(xlabel="training step", ylabel="distance (features' unit)", yscale="log")
    ax.set_title(f"distances in training, {NETWORKS[regularised]}")


def accuracies(state: State, regularised: bool, removed: int, ranking: str, *, ax: Axes) -> None:
    """Draw accuracy over the number of removed blocks, of both networks."""
    for kind in (not regularised, regularised):
        chosen = kind == regularised
        accuracy = 100 * state.removals[kind, ranking].accuracy
        ax.plot(
            range(len(accuracy)),
            accuracy,
            color=plots.KEPT if chosen else _GONE,
            marker="o" if kind else "s",
            linestyle="-" if kind else (0, (5, 1.5)),
            label=NETWORKS[kind],
        )
    now = state.removals[regularised, ranking].accuracy[removed]
    ax.plot([removed], [100 * now], "o", ms=12, fillstyle="none", mew=2, color=plots.PALETTE[1])
    ax.axhline(100 / state.classes, color="#555555", linestyle=":", linewidth=1)
    ax.set(xlabel="blocks removed", ylabel="accuracy on valid (%)", ylim=(0, 104))
    ax.set_title(f"removed by: {ranking}")
    ax.legend(loc="lower left")


_GONE = "#A6A6A6"


def _colour(state: State, place: int) -> Any:
    return plt.get_cmap("viridis")(0.85 * place / max(1, len(state.blocks) - 1))


def network(state: State, regularised: bool, removed: int, ranking: str, *, ax: Axes) -> None:
    """Draw the path through the network, each block's score under it, and what it costs."""
    removal = state.removals[regularised, ranking]
    gone = removal.order[:removed]
    x = 0.0
    for name in state.path:
        if name is None:
            ax.add_patch(Rectangle((x, -0.2), 0.4, 0.4, color="#777777", zorder=3))
            x += 0.6
            continue
        out, place = name in gone, state.blocks.index(name)
        colour = _GONE if out else _colour(state, place)
        box = FancyBboxPatch(
            (x + 0.2, 0.5),
            0.6,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="white" if out else colour,
            edgecolor=colour,
            linestyle="--" if out else "-",
            label=name,
        )
        ax.add_patch(box)
        x += 1.1
    ax.plot([-0.3, x + 0.2], [0, 0], color=plots.KEPT, linewidth=2.5)
    ax.set(xlim=(-0.5, x + 0.4), ylim=(-2, 2))
    ax.set_axis_off()


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
        f"{accuracy[0]:.1%}), {macs[removed] / 1e6:.2f} M MACs ({macs[removed] / macs[0]:.0%}), "
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
