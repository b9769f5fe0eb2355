"""Whole blocks removed, by how far their output is from their input.

A penalty on the max-sliced Wasserstein distance between each block's input and output makes the
blocks that matter least into near-identities while the network trains; then they are deleted, in
ascending order of the distance, until accuracy falls too far. Next to it stand scores that need no
training (block influence, angular distance, relative change, a random order) and LaCo's merge.

LaCoOT: Quétu et al., Layer collapse through optimal transport, ICCV 2025 (arXiv 2406.08933). The
neighbours' sources are in :mod:`core.block_scores`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pruning101.core import masks, runs, structure
from pruning101.core.block_features import (
    InputBatches,
    StepFeatures,
    chosen_blocks,
    mean_over_batches,
    valid_batches,
)
from pruning101.core.block_scores import angular_distance as angular_distance
from pruning101.core.block_scores import block_influence as block_influence
from pruning101.core.block_scores import laco_merge as laco_merge
from pruning101.core.block_scores import mean_relative_change
from pruning101.core.block_scores import random_order as random_order
from pruning101.core.block_scores import relative_change as relative_change
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured
from pruning101.core.tracing import Example
from pruning101.core.training import evaluate, fit
from pruning101.core.transport import Direction, check_options
from pruning101.core.transport import max_sliced_wasserstein as max_sliced_wasserstein

Order = Literal["distance", "reference", "last"]
Measure = Literal["wasserstein", "relative"]

# --- the distances of blocks -------------------------------------------------------------------


class BlockDistances:
    """Measure, in every training step, how far each block's output is from its input.

    In a ``with`` statement, with its penalty handed to ``training.fit``::

        with BlockDistances(model, example=images) as distances:
            fit(model, data, epochs=10, lr=0.1, penalty=distances.penalty(0.1))

    ``blocks`` are names; without them all that :func:`structure.removable_blocks` finds with
    ``example``, one input batch or a tuple for ``model(*example)``. An input's features are one
    sample, whatever the batch's size. Gradients go to input and output. ``measure`` is

    - ``"wasserstein"``: :func:`max_sliced_wasserstein`, the paper's, whose options
      ``n_projections``, ``p``, ``direction``, ``iterations`` and ``normalise`` are; or
    - ``"relative"``: the mean of |output - input| / |input|, what :func:`relative_change` ranks
      by: each output is compared with its own input, not one set of features with the other.

    By default the direction is really maximised ("ascent"), since that left more accuracy after
    removal on CIFAR-10; the published code's is "random", 50 of them, at a ``strength`` some 30
    times as large. The climb is a short one, so that a step stays cheap: no random starts and 4
    iterations, unless told otherwise. Nothing is kept from step to step, since the best direction
    for one batch is none for the next.

    Every step draws random directions of its own, from ``generator``, or from ``seed`` and the seed
    that ``torch`` was last given: that is new in each epoch of ``fit``, so that a run that goes on
    from a checkpoint draws what an uninterrupted one does. The global random state is not used.

    Only forward passes in training mode count; hooks are off after the ``with`` statement, however
    it ends. Copies of the model measure nothing. ``latest`` holds the last step's distances.

    Raises:
        ValueError: no removable block (with every candidate's reason), an unknown one, neither
            blocks nor example, or an option out of range; in training, a block that changes the
            shape, a batch of one, NaN features (on the CPU; ``fit`` tells of them elsewhere), a
            model in ``eval`` mode, or one that is not called between two penalties.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str] | None = None,
        *,
        example: Example | None = None,
        measure: Measure = "wasserstein",
        n_projections: int | None = None,
        p: float = 2,
        direction: Direction = "ascent",
        iterations: int = 4,
        normalise: bool = False,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        if measure not in ("wasserstein", "relative"):
            raise ValueError(f'measure must be "wasserstein" or "relative", not {measure!r}.')
        given = n_projections, p, direction, iterations, normalise
        if measure == "relative" and given != (None, 2, "ascent", 4, False):
            raise ValueError(
                'measure="relative" takes no n_projections, p, direction, iterations or normalise; '
                "leave them out."
            )
        if n_projections is None:
            n_projections = 50 if direction == "random" else 0
        check_options(n_projections, p, direction, iterations)
        runs.check_numbers(seed=seed)
        self.model = model
        self.blocks = chosen_blocks(model, blocks, example)
        self.measure = measure
        self.options: dict[str, Any] = {}
        if measure == "wasserstein":
            self.options |= {"n_projections": n_projections, "p": p, "direction": direction}
            self.options |= {"iterations": iterations, "normalise": normalise}
        self.seed = seed
        self.latest: dict[str, Tensor] = {}
        self._given = generator
        self._drawn: tuple[Any, torch.Generator] | None = None
        self._features = StepFeatures(model, self.blocks)

    def __enter__(self) -> "BlockDistances":
        self._features.__enter__()
        self._drawn = None
        return self

    def __exit__(self, *error: Any) -> None:
        self._features.__exit__(*error)

    def distances(self) -> dict[str, Tensor]:
        """Return each block's distance in the last forward pass, a scalar with its graph.

        Once a forward pass: the features are let go of.
        """
        found = {}
        for name, (x, y) in self._features.take().items():
            if self.measure == "relative":
                found[name] = _relative(name, x, y)
            else:
                generator = self._generator(x.device)
                found[name] = _distance(name, x, y, generator=generator, **self.options)
        self.latest = {name: distance.detach() for name, distance in found.items()}
        return found

    def penalty(self, strength: float) -> Callable[[nn.Module], Tensor]:
        """Return ``penalty(model)`` for ``fit``: ``strength`` times the mean distance of blocks.

        Raises:
            ValueError: a strength that is negative or not finite.
        """
        runs.check_numbers(strength=strength)

        def mean_distance(model: nn.Module) -> Tensor:
            if model is not self.model:
                raise ValueError("The penalty is asked for another model than its blocks are of.")
            return strength * torch.stack(list(self.distances().values())).mean()

        # What a checkpoint compares, so that none is continued with another penalty.
        named = {"measure": self.measure, **self.options}
        options = ", ".join(f"{k}={v!r}" for k, v in named.items())
        mean_distance.__qualname__ = f"BlockDistances.penalty({strength}, {options})"
        return mean_distance

    def _generator(self, device: torch.device) -> torch.Generator:
        if self._given is not None:
            return self._given
        source = torch.initial_seed(), device
        if self._drawn is None or self._drawn[0] != source:
            seed = runs.derive(self.seed, source[0])
            self._drawn = source, torch.Generator(device).manual_seed(seed)
        return self._drawn[1]


def _distance(name: str, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    try:
        return max_sliced_wasserstein(x, y, **options)
    except ValueError as error:
        raise ValueError(f"Block {name!r} cannot be measured: {error}") from error


def _relative(name: str, x: Tensor, y: Tensor) -> Tensor:
    change = mean_relative_change(x, y)
    if change.device.type == "cpu" and not change.isfinite():
        raise ValueError(
            f"Block {name!r} cannot be measured: The features hold NaN or infinity; look for them "
            "in weights and inputs."
        )
    return change


def block_distances(
    model: nn.Module,
    batches: InputBatches,
    *,
    blocks: Sequence[str] | None = None,
    n_projections: int = 50,
    p: float = 2,
    direction: Direction = "ascent",
    iterations: int = 16,
    normalise: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Return the distance between each block's input and output, by name, the smallest first.

    The mean over ``batches``, each weighted by its size, in ``eval`` mode; each draws directions
    from ``generator`` (by default one seeded with 0). The distance of few samples is larger than
    that of many: compare at one batch size. A batch is a pair of inputs (a tensor, or a tuple for
    ``model(*inputs)``) and labels, which are not used. Without ``blocks``, all that may be removed.
    Options are those of :func:`max_sliced_wasserstein`. The model stays as it was.

    Source: Quétu et al. 2025.

    Raises:
        ValueError: no removable block (with every candidate's reason), an unknown one or one that
            changes the shape, no batches, a batch of one, NaN features, or an option out of range.
    """
    check_options(n_projections, p, direction, iterations)

    def measure(name: str, x: Tensor, y: Tensor) -> Tensor:
        nonlocal generator
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(0)
        return _distance(
            name,
            x,
            y,
            n_projections=n_projections,
            p=p,
            direction=direction,
            iterations=iterations,
            generator=generator,
            normalise=normalise,
        )

    return mean_over_batches(model, batches, blocks, measure)


# --- removal -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRemoval(Step):
    """One block removed; or, where ``healed_epochs`` > 0, the training after the last removal.

    ``removed`` is the block's name, or None for that training. ``distances`` are those of all
    blocks that decided, by name, the same in all steps; none where the order was given.
    """

    distances: dict[str, float] | None = None
    healed_epochs: int = 0


def remove_blocks(
    model: nn.Module,
    data: Dataset,
    *,
    tolerance: float | None,
    distances: Mapping[str, float] | None = None,
    order: Order | Sequence[str] = "distance",
    batch_size: int = 128,
    heal_epochs: int = 0,
    lr: float = 0.01,
    heal: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[BlockRemoval]:
    """Delete one block after the other, yielding a step for each, while accuracy holds.

    ``model`` is a trained network and is left alone. The block of smallest distance goes first; the
    removal after which accuracy on ``valid`` is more than ``tolerance`` below the given model's is
    not yielded, and the last. With ``tolerance=None`` all blocks go.

    ``distances`` are any scores by block, and blocks without one stay; by default,
    :func:`block_distances` of the given model over ``valid``, ``batch_size`` images at a time.
    ``order`` is

    - ``"distance"``: ascending, the paper's;
    - ``"reference"``: ascending |z| + percentile / 100, as the published code ranks a Swin-T's
      blocks, where z are the distances less their mean over their deviation, and the percentile
      is the share of blocks at or below; it lets the smallest distances go late;
    - ``"last"``: from the last block back, as the published code does with ResNet-18;
    - or names of blocks, as :func:`random_order` gives them. The last two need no distances.

    With ``heal_epochs`` the smallest network is then trained on at ``lr`` (``heal`` are further
    arguments of ``training.fit``) and yielded as one more step, which no decision hangs on.
    ``history`` with steps goes on as if never interrupted.

    Source: Quétu et al. 2025; healing is not in the paper.

    Raises:
        ValueError: no removable block (with every candidate's reason), unknown ones, an empty
            ``valid``, NaN features, options out of range, or a history begun with another model
            or other settings; all before any removal.
    """
    runs.check_numbers(epochs=heal_epochs, lr=lr, seed=seed, batch_size=batch_size)
    if tolerance is not None:
        runs.check_numbers(tolerance=tolerance)
    if len(data.valid) < 2:
        raise ValueError(
            f"The valid split of {data.name!r} is too small ({len(data.valid)} images); removal is "
            "decided on it and needs at least two."
        )
    named = order in ("distance", "reference", "last")
    if isinstance(order, str) and not named:
        raise ValueError(
            f'order must be "distance", "reference", "last" or names of blocks, not {order!r}.'
        )
    images, _ = next(iter(data.batches("valid", 2, device=runs.device_of(model))))
    blocks = chosen_blocks(model, None, images.to(runs.dtype_of(model)))
    for name in [*(distances or {}), *([] if named else order)]:
        if name not in blocks:
            raise ValueError(f"{name!r} is no block that may be removed; those are {blocks}.")
    if not named and len(set(order)) < len(order):
        raise ValueError(f"order names a block twice: {list(order)}.")
    if distances is not None and any(math.isnan(value) for value in distances.values()):
        raise ValueError(f"A distance is NaN, which cannot be ranked: {dict(distances)}.")
    history = History() if history is None else history
    history.bind(
        recipe="lacoot.remove_blocks",
        tolerance=tolerance,
        distances=None if distances is None else dict(distances),
        order=order if isinstance(order, str) else list(order),
        batch_size=batch_size,
        heal_epochs=heal_epochs,
        lr=lr,
        heal=dict(heal or {}),
        seed=seed,
        data=data.name,
        weights=runs.digest(model.state_dict().values()),
    )
    found = None if distances is None else dict(distances)
    if found is None and order in ("distance", "reference"):
        found = history[0].distances if len(history) else _on_valid(model, data, batch_size)
    if not named:
        ranked = list(order)
    elif order == "last":
        ranked = [name for name in reversed(blocks) if found is None or name in found]
    else:
        ranked = _ranked(cast(dict[str, float], found), cast(Order, order))

    def run() -> Iterator[BlockRemoval]:
        work = history.latest(model)
        done = [step.removed for step in history]
        if None in done:
            return
        before = 1.0 if tolerance is None else evaluate(model, data, "valid").accuracy
        for name in ranked[len(done) :]:
            start = time.perf_counter()
            smaller = masks.clone(work)
            structure.remove_block(smaller, name)
            seconds = time.perf_counter() - start
            step = measured(len(history) + 1, name, smaller, data, seconds=seconds)
            if tolerance is not None and before - step.accuracy > tolerance + 1e-9:
                break
            work = smaller
            removal = BlockRemoval(**vars(step), distances=found)
            history.append(removal)
            yield removal
        if heal_epochs and len(history):
            start = time.perf_counter()
            options: dict[str, Any] = {"progress": False, "seed": seed, **(heal or {})}
            fit(work, data, epochs=heal_epochs, lr=lr, **options)
            seconds = time.perf_counter() - start
            step = measured(len(history) + 1, None, work, data, seconds=seconds)
            removal = BlockRemoval(**vars(step), distances=found, healed_epochs=heal_epochs)
            history.append(removal)
            yield removal

    return run()


def _on_valid(model: nn.Module, data: Dataset, batch_size: int) -> dict[str, float]:
    return block_distances(model, valid_batches(data, max(2, batch_size), runs.device_of(model)))


def _ranked(distances: dict[str, float], order: Order) -> list[str]:
    scores = distances
    if order == "reference":
        values = list(distances.values())
        mean, deviation = statistics.fmean(values), statistics.pstdev(values) or 1.0
        scores = {
            name: abs(value - mean) / deviation + sum(v <= value for v in values) / len(values)
            for name, value in distances.items()
        }
    return sorted(scores, key=lambda name: scores[name])
