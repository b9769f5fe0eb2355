"""What lesson 9's widget shows: two networks trained, and their blocks taken out in many orders."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning101 import lacoot
from pruning101.core import masks, runs, structure
from pruning101.core.block_features import chosen_blocks, valid_batches
from pruning101.core.data import Dataset
from pruning101.core.measure import macs as count_macs
from pruning101.core.steps import History
from pruning101.core.surgery import put
from pruning101.core.training import evaluate, fit
from pruning101.core.transport import Direction

RANDOM, MAXIMISED = "distance (random directions)", "distance (maximised)"
CHANGE, INFLUENCE, SHUFFLED, LAST = "relative change", "block influence", "random", "last first"
RANKINGS = (RANDOM, MAXIMISED, CHANGE, INFLUENCE, SHUFFLED, LAST)


@dataclass(frozen=True)
class Trained:
    """A trained network, and its blocks' distances in some of the training steps.

    ``steps`` [points] counts from 1; ``distances`` [points, blocks] are those of ``blocks``, named
    in the network's order, by ``measure``, ``direction`` and ``normalise``, which are those of
    ``lacoot.BlockDistances``.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    steps: np.ndarray
    distances: np.ndarray
    measure: lacoot.Measure = "wasserstein"
    direction: Direction = "ascent"
    normalise: bool = False
    history: History | None = None


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
        """The ranking by what the regulariser lowers."""
        trained = self.trained[True]
        if trained.measure == "relative":
            return CHANGE
        return MAXIMISED if trained.direction == "ascent" else RANDOM


def precompute(
    model: nn.Module,
    data: Dataset,
    *,
    blocks: Sequence[str] | None = None,
    strength: float,
    epochs: int,
    lr: float,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> State:
    """Train two copies of ``model``, with the regulariser and without, and take their blocks out.

    See :func:`train` and :func:`from_trained`, which do one each: who has trained already calls the
    second alone. ``options`` are further ones of :func:`train`.
    """
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, "progress": progress}
    settings |= {"blocks": blocks, **options}
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
    measure: lacoot.Measure = "wasserstein",
    direction: Direction = "ascent",
    normalise: bool = False,
    points: int = 40,
    seed: int = 0,
    **options: Any,
) -> Trained:
    """Train a copy of ``model`` with LaCoOT's penalty, noting each block's distance in every step.

    What is kept are the means of ``points`` stretches of training, each under its last step. With
    ``strength`` 0 distances are only measured, and training gives what it gives without.
    ``measure``, ``direction`` and ``normalise`` are those of ``lacoot.BlockDistances``, and
    ``options`` are further ones of ``training.fit``.

    Raises:
        ValueError: no removable block, or an option out of range, as ``lacoot.BlockDistances``.
    """
    copy = masks.clone(model)
    example = _example(data, copy)
    names = tuple(
        name for name in _path(copy, chosen_blocks(copy, blocks, example), example) if name
    )
    how: dict[str, Any] = {"measure": measure, "direction": direction, "normalise": normalise}
    seen: list[Tensor] = []
    with lacoot.BlockDistances(copy, names, seed=seed, **how) as distances:
        regulariser = distances.penalty(strength)

        def penalty(network: nn.Module) -> Tensor:
            with torch.set_grad_enabled(strength > 0):
                cost = regulariser(network)
            seen.append(torch.stack([distances.latest[name] for name in names]))
            return cost

        settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, **options}
        history = fit(copy, data, penalty=penalty, **settings)
    parts = [part for part in np.array_split(np.arange(len(seen)), points) if len(part)]
    found = torch.stack(seen).cpu().numpy() if seen else np.zeros((0, len(names)))
    means = np.array([found[part].mean(0) for part in parts])
    steps = np.array([part[-1] + 1 for part in parts])
    return Trained(copy, names, steps, means, **how, history=history)


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
        ValueError: the networks have not the same blocks, their distances were not measured
            alike, or none was noted.
    """
    blocks = regularised.blocks
    if plain.blocks != blocks:
        raise ValueError(
            f"The networks must have the same blocks, not {blocks} and {plain.blocks}: train both "
            "from one model."
        )
    trained = {True: regularised, False: plain}
    measures = [(each.measure, each.direction, each.normalise) for each in trained.values()]
    if measures[0] != measures[1]:
        raise ValueError(
            f"Both networks' distances must be measured alike, not by {measures[0]} and "
            f"{measures[1]}: train both with the same measure, direction and normalise."
        )
    if not all(len(each.steps) for each in trained.values()):
        raise ValueError("No distance was noted in training: train for one epoch or more.")
    how: dict[str, Any] = {"blocks": blocks, "normalise": regularised.normalise}
    works = {kind: masks.clone(each.model).eval() for kind, each in trained.items()}
    ranked = {
        (kind, ranking): scores
        for kind, work in works.items()
        for ranking, scores in _rankings(work, data, how, seed).items()
    }
    orders = {key: sorted(scores, key=lambda name: scores[name]) for key, scores in ranked.items()}
    # Of orders that begin alike, each network is measured once.
    left = dict.fromkeys(
        (kind, frozenset(order[:n]))
        for (kind, _), order in orders.items()
        for n in range(len(blocks) + 1)
    )
    accuracy: dict[tuple[bool, frozenset[str]], float] = {}
    hidden = not (progress and sys.stderr and sys.stderr.isatty())
    for kind, gone in tqdm(left, desc="removing blocks", leave=False, disable=hidden):
        with _without(works[kind], gone):
            accuracy[kind, gone] = evaluate(works[kind], data, "valid").accuracy
    costs = _costs(works[False].cpu(), data, [gone for _, gone in left], repeats)
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
    images, _ = next(iter(data.batches("valid", count, device=runs.device_of(model))))
    return images.to(runs.dtype_of(model))


def _path(model: nn.Module, blocks: Sequence[str], example: Tensor) -> tuple[str | None, ...]:
    """Name the blocks as they are called, with None wherever other layers with weights are."""
    model = masks.clone(model).eval()
    found: list[str | None] = []

    def note(name: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if name is not None or found[-1:] != [None]:
                found.append(name)

        return hook

    for name, module in model.named_modules():
        weighted = any(p.ndim > 1 for p in module.parameters(recurse=False))
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if name in blocks:
            module.register_forward_pre_hook(note(name))
        elif name and weighted and not inside:
            module.register_forward_pre_hook(note(None))
    with torch.no_grad():
        model(example)
    return tuple(found)


def _rankings(
    model: nn.Module, data: Dataset, how: dict[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Score all blocks by each ranking; the smallest goes first."""
    batches = list(valid_batches(data, 128))
    blocks = how["blocks"]
    order = lacoot.random_order(blocks, seed)
    return {
        RANDOM: lacoot.block_distances(model, batches, direction="random", **how),
        MAXIMISED: lacoot.block_distances(model, batches, direction="ascent", **how),
        CHANGE: lacoot.relative_change(model, batches, blocks=blocks),
        INFLUENCE: lacoot.block_influence(model, batches, blocks=blocks),
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
    model: nn.Module, data: Dataset, subsets: list[frozenset[str]], repeats: int
) -> dict[frozenset[str], tuple[int, float]]:
    """Return MACs and milliseconds, for one image, of ``model`` without each of these subsets."""
    image = _example(data, model, 1)
    macs: dict[frozenset[str], int] = {}
    for gone in subsets:
        with _without(model, gone):
            macs[gone] = count_macs(model, image)
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
