"""Trainings counted in steps of the optimiser: watched on the way, and the line between two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import nn

from pruning101.core import masks, runs
from pruning101.core.data import Dataset
from pruning101.core.training import evaluate, fit


@dataclass(frozen=True)
class Run:
    """One training: ``model`` as trained, and what was measured on the way.

    ``valid_loss[i]`` and the accuracies (in [0, 1]) were measured after ``iterations[i]`` steps of
    the optimiser; 0 and the last step are among them.
    """

    model: nn.Module
    iterations: tuple[int, ...]
    valid_loss: tuple[float, ...]
    valid_accuracy: tuple[float, ...]
    test_accuracy: tuple[float, ...]

    @property
    def early_stop(self) -> int:
        """The iteration of the least loss on ``valid``, the first if there are several."""
        return self.iterations[self._least]

    @property
    def accuracy_at_early_stop(self) -> float:
        """Accuracy on ``test`` at :attr:`early_stop`: reported, never decided on."""
        return self.test_accuracy[self._least]

    @property
    def _least(self) -> int:
        return self.valid_loss.index(min(self.valid_loss))


class _Enough(Exception):
    """Raised inside the last epoch, when all iterations are done."""


def train(
    model: nn.Module,
    data: Dataset,
    *,
    iterations: int,
    optimizer: str = "adam",
    lr: float = 1.2e-3,
    batch_size: int = 60,
    evaluate_every: int = 100,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a copy of ``model`` for so many steps of the optimiser, measuring it on the way.

    Masked weights stay zero. ``training.fit`` does the training, and ``options`` holds further
    arguments of it. The same ``seed`` gives the same order of the data (and dropout, augmentation),
    however many iterations there are and however often the network is measured. The defaults are
    those of Frankle and Carbin 2019 for LeNet-300-100.

    Raises:
        ValueError: iterations below 0, evaluate_every below 1, or what ``fit`` refuses.
    """
    for name, value, least in (
        ("iterations", iterations, 0),
        ("evaluate_every", evaluate_every, 1),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
    work = masks.clone(model)
    points: list[tuple[int, float, float, float]] = []
    done = 0

    def look() -> None:
        valid, test = (evaluate(work, data, split) for split in ("valid", "test"))
        points.append((done, valid.loss, valid.accuracy, test.accuracy))

    def watch(_model: nn.Module) -> None:
        nonlocal done
        done += 1
        if done % evaluate_every == 0 or done == iterations:
            look()
        if done == iterations:
            raise _Enough  # fit counts epochs: this leaves the last one when it has enough steps

    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
        **(options or {}),
    }
    fit(work, data, epochs=0, **settings)  # checks all of it, and moves the copy to its device
    look()
    if iterations:
        epochs = math.ceil(iterations / max(1, len(data.train) // batch_size))
        try:
            fit(work, data, epochs=epochs, after_step=watch, **settings)
        except _Enough:
            work.zero_grad()
    return Run(work, *cast(Any, zip(*points, strict=True)))


# --- the line between two networks ---------------------------------------------------------------


def interpolate(
    a: nn.Module, b: nn.Module, alphas: Sequence[float], data: Dataset, *, split: str = "test"
) -> list[float]:
    """Return the error (in [0, 1]) of ``alpha * a + (1 - alpha) * b`` for each alpha.

    Effective weights, biases and norms' weights are interpolated. The running statistics of batch
    norms belong to no point but the ends: at every alpha, the ends included, they are measured anew
    on the first 100 batches of 128 train images, shuffled, always in the same order.

    Raises:
        ValueError: networks of different layers or shapes.
    """
    work, *ends = (masks.clone(model) for model in (a, a, b))
    for model in (work, *ends):
        masks.make_permanent(model)
    first, second = (dict(model.named_parameters()) for model in ends)
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        raise ValueError("only networks of the same layers and shapes can be interpolated")
    errors = []
    for alpha in alphas:
        with torch.no_grad():
            for name, parameter in work.named_parameters():
                there = second[name].to(parameter.device)
                parameter.copy_(alpha * first[name] + (1 - alpha) * there)
        _measure_norms(work, data)
        errors.append(1 - evaluate(work, data, split).accuracy)
    return errors


def _measure_norms(model: nn.Module, data: Dataset) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    with runs.mode(model, training=False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        batches = data.batches("train", 128, shuffle=True, device=runs.device_of(model))
        for _, (images, _) in zip(range(100), batches, strict=False):
            if len(images) > 1:  # of a single one there is no variance
                model(images.to(runs.dtype_of(model)))


@dataclass(frozen=True)
class Instability:
    """Error on the line between two trainings: ``errors[i]`` at ``alphas[i]``, shares in [0, 1]."""

    alphas: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def value(self) -> float:
        """The barrier: the highest error less the mean of the two ends' (0 where stable)."""
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2


def instability(
    model: nn.Module,
    data: Dataset,
    *,
    rewind_to: int = 0,
    iterations: int,
    seeds: tuple[int, int] = (0, 1),
    points: int = 11,
    split: str = "test",
    optimizer: str = "adam",
    lr: float = 1.2e-3,
    batch_size: int = 60,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Instability:
    """Train twice from iteration ``rewind_to`` on, in two orders of the data, and interpolate.

    ``model`` (masked or not) is trained to ``rewind_to`` once, in the order of ``seed``; two copies
    then go on to ``iterations`` and differ only in their order (and dropout or augmentation, if
    there are any), which follows from ``seeds``. ``points`` alphas lie evenly from 0 to 1. A
    network is called stable where the barrier is about 0 (below 0.02, say the authors).

    Source: Frankle, Dziugaite, Roy and Carbin 2020 (arXiv 1912.05671), sections 2 and 3.

    Raises:
        ValueError: counts out of range, or two equal seeds.
    """
    if not 0 <= rewind_to < iterations or points < 3 or len(set(seeds)) != 2:
        raise ValueError(
            "instability needs rewind_to < iterations, at least 3 points and two different seeds; "
            f"got rewind_to={rewind_to!r}, iterations={iterations!r}, points={points!r}, "
            f"seeds={seeds!r}"
        )
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": lr,
        "batch_size": batch_size,
        "evaluate_every": iterations,
        "options": options,
        "progress": progress,
    }
    if rewind_to:
        model = train(model, data, iterations=rewind_to, seed=seed, **settings).model
    rest = iterations - rewind_to
    a, b = (
        train(model, data, iterations=rest, seed=runs.derive(seed, rewind_to, s), **settings).model
        for s in seeds
    )
    alphas = tuple(i / (points - 1) for i in range(points))
    return Instability(alphas, tuple(interpolate(a, b, alphas, data, split=split)))
