"""Layer folding: activations that have become linear go, and the layers on their sides merge.

Ben Dror, Zehngut, Raviv, Artyomov, Vitek and Jevnisek, Layer folding: neural network depth
reduction using activation linearization, BMVC 2022 (arXiv 2106.09309). Every activation gets a
slope of its own, a penalty pulls the slopes to 1, what came near enough is taken for linear, and
two layers with nothing between them are written as one.
"""

import copy
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pruning101.core import masks, runs, structure
from pruning101.core.data import Dataset
from pruning101.core.fitted import Features, cropped, features, least_squares, relative_error
from pruning101.core.folding import Folding, check_example, check_foldable, compare
from pruning101.core.folding import Pair as Pair
from pruning101.core.merging import Border
from pruning101.core.merging import border_width as border_width  # these are this topic's, too
from pruning101.core.merging import merge as merge
from pruning101.core.merging import merge_norm as merge_norm
from pruning101.core.merging import merge_skip as merge_skip
from pruning101.core.slopes import RECTIFIERS, slope_parameters
from pruning101.core.slopes import Slope as Slope
from pruning101.core.slopes import separate_activations as separate_activations
from pruning101.core.slopes import slopes as slopes
from pruning101.core.steps import History, Step, measured
from pruning101.core.stretches import NORMS, macs, rejoin_norms, split_norms, stretches
from pruning101.core.surgery import all_or_nothing, put
from pruning101.core.tracing import Example
from pruning101.core.training import evaluate, fit

if TYPE_CHECKING:
    import pandas

# --- slopes and their penalty ------------------------------------------------------------------


def make_foldable(
    model: nn.Module,
    *,
    start: float = 0.05,
    layers: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace activations by :class:`Slope`, max(z, 0) + slope * min(z, 0), and return the model.

    Each call of an activation gets a slope of its own (:func:`separate_activations`). ``layers``
    names the activations, as ``structure.activations`` does after that; by default all rectifiers:
    ReLU changes by ``start * min(z, 0)`` only, GELU, SiLU, Hardswish or ReLU6 to something that
    must be trained. Sigmoid, tanh and the like, most of them gates, stay unless they are named.

    ``start`` is not 0 as in the paper, because the gradient of its penalty |1 - slope^2|,
    -2 slope, is 0 there: the penalty alone would never move a slope, and the loss must do so first.
    From s > 0, with a rate r and a strength of 0.25, the penalty alone multiplies a slope by
    1 + r / 2 a step, so the way to 1 takes about 2 log(1 / s) / r steps without momentum. In a
    trial (ResNet-20 on digits, 0.25, 10 epochs) 10 of 19 slopes got away from 0, and all from any
    start between 0.01 and 0.2; up to 0.1 the start cost no accuracy by itself.

    Raises:
        ValueError: a start outside [0, 1], an unknown name, no activation found, or a module whose
            activations cannot be told apart; the model is left as it was.
    """
    if not 0 <= start <= 1:
        raise ValueError(f"start must be a slope in [0, 1], got {start!r}")
    separate = separate_activations(model, inplace=False)
    found = structure.activations(separate)
    if "" in found:
        raise ValueError("the model itself is an activation; put it into an nn.Sequential first")
    chosen = [n for n, m in found.items() if isinstance(m, RECTIFIERS)]
    if layers is not None:
        for name in layers:
            if name not in found:
                raise ValueError(f"there is no activation {name!r}; there are {', '.join(found)}")
        chosen = list(layers)
    if not chosen:
        raise ValueError("this model has no activation that could get a slope")
    if inplace:
        separate = separate_activations(model)
    like = next(separate.parameters(), torch.empty(0))
    for name in chosen:
        slope = Slope(start).to(like.device, like.dtype)
        put(separate, name, slope.train(separate.get_submodule(name).training))
    return separate


def slope_penalty(model: nn.Module, strength: float = 0.25) -> Tensor:
    """Return ``strength * sum |1 - slope^2|`` over all slopes, a scalar (equation 3 of the paper).

    For ``fit(penalty=lambda m: slope_penalty(m), after_step=clamp_slopes)``.

    Raises:
        ValueError: the model has no slopes.
    """
    found = [*slope_parameters(model).values()]
    if not found:
        raise ValueError("this model has no slopes; give it some with make_foldable first")
    return strength * (1 - torch.stack(found).square()).abs().sum()


@torch.no_grad()
def clamp_slopes(model: nn.Module) -> None:
    """Put every slope back into [0, 1], in place, as after a step of the optimiser.

    The paper clamps at 0 only; above 1 nothing is gained, and the penalty has its kink there.
    """
    for slope in slope_parameters(model).values():
        slope.clamp_(0, 1)


# --- folding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldReport:
    """The folded ``model`` and a row for every pair of layers and every activation.

    ``linear`` holds the slopes of the activations that were taken away; ``norms`` says of each norm
    beside a layer what it was merged into, or why not. ``difference`` is the largest one between
    the outputs of the network before and after, on the example.
    """

    model: nn.Module
    pairs: list[Pair]
    linear: dict[str, float]
    norms: dict[str, str]
    difference: float

    @property
    def merged(self) -> list[Pair]:
        """The pairs that are one layer now: by so many layers the network is less deep."""
        return [pair for pair in self.pairs if pair.action == "merged" and pair.second]

    def table(self) -> "pandas.DataFrame":
        """Return one row a pair."""
        import pandas

        return pandas.DataFrame([vars(pair) for pair in self.pairs])


def fold(
    model: nn.Module,
    example: Example,
    *,
    threshold: float = 0.1,
    border: Border = "exact",
    force: bool = False,
    norms: bool = True,
    inplace: bool = False,
) -> FoldReport:
    """Merge every pair of layers with nothing non-linear between them, and say what was done.

    Linear are ``nn.Identity``, dropout in ``eval`` mode, and an activation whose slope is within
    ``threshold`` of 1 (the paper folds from 0.9 up): a slope of 0.95 is taken for 1, which changes
    the function, and the report says by how much. BatchNorm is merged into the layer before it, or
    behind it where that is exact; with ``norms=False`` only where it stands within what merges, as
    in the paper: training goes better with the others in place. Then layers that follow one another
    merge pair by pair, in execution order, if that does not cost more multiply-adds than the two
    (``force=True``: if it does, too), and ``x + layer(x)`` becomes one layer. ``border`` is that of
    :func:`merge`. What is gone is an ``nn.Identity`` in its place; the merged layer stands where
    the first one was.

    ``model`` must be in ``eval`` mode, whose function is what is kept. ``example`` is one input
    batch. A copy is changed, with ``inplace=True`` the model itself.

    Raises:
        ValueError: a norm or dropout in training mode, masks, a threshold outside [0, 1], an
            unknown border, an example that is empty; the model is left as it was.
    """
    check_foldable(model, threshold, border)
    check_example(model, example)
    original, work = (masks.clone(model), model) if inplace else (model, masks.clone(model))
    with all_or_nothing(work):
        joined = split_norms(work)
        folding = Folding(work, threshold, border, force, norms)
        folding.drop_linear()
        while folding.merge_all(example):
            pass  # where a skip was merged, what follows the sum has a new neighbour
        rejoin_norms(work, joined)
        pairs, difference = compare(original, work, folding.rows(), example)
    return FoldReport(work, pairs, folding.linear, folding.norms, difference)


# --- one layer of the usual size instead -------------------------------------------------------


@dataclass(frozen=True)
class Distilled:
    """The network with one layer in the place of two, and what that cost and gained.

    On ``valid``: errors are mean squares of the difference to what the two layers gave, relative to
    its variance, of the merged kernel cut down to its centre and of the fitted one; accuracies are
    those of the network before, with either kernel, and after training.
    """

    model: nn.Module
    error_cropped: float
    error_after: float
    accuracy_before: float
    accuracy_cropped: float
    accuracy_fitted: float
    accuracy_after: float
    macs_before: int
    macs_after: int
    seconds: float


def distil(
    model: nn.Module,
    first: str,
    second: str,
    data: Dataset,
    *,
    kernel_size: int | None = None,
    ridge: float = 1e-6,
    images: int = 1024,
    epochs: int = 1,
    lr: float = 0.001,
    teacher_weight: float = 0.5,
    retrain: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Distilled:
    """Put one convolution of the usual size in the place of two, fitted to what they gave.

    The merged kernel of two convolutions is larger than either; this one has ``kernel_size`` taps
    (by default as many as the larger of the two), and otherwise the geometry of the merged one. Its
    weight and bias minimise the squared difference to the output of ``second`` over all positions
    of the first ``images`` of ``train``, in closed form, with ``ridge`` times the mean square of
    its inputs on the diagonal. What stands between the two, linear or not, goes. Then the whole
    network is trained for ``epochs`` with itself as it was for a teacher; ``retrain`` holds further
    arguments of ``training.fit``. ``model`` is left alone: a changed copy is in the report.

    Raises:
        ValueError: layers that do not follow one another or are no 2d convolutions, or a kernel
            that cannot stand in the place of the merged one, or a number out of range.
    """
    runs.check_numbers(images=images, ridge=ridge, epochs=epochs, lr=lr, seed=seed)
    example, _ = next(iter(data.batches("valid", 1, device=runs.device_of(model))))
    example = example.to(runs.dtype_of(model))
    ways = [s for s in stretches(model, example) if (s.first, s.second) == (first, second)]
    if not ways or any(between.obstacle for between in ways[0].between):
        raise ValueError(
            f"{second!r} does not follow {first!r} with only modules between; see fold's table"
        )
    one, two = model.get_submodule(first), model.get_submodule(second)
    if not isinstance(one, nn.Conv2d) or not isinstance(two, nn.Conv2d):
        raise ValueError(f"{first!r} and {second!r} must be 2d convolutions; try merge for others")
    start, work = time.perf_counter(), masks.clone(model)
    before = evaluate(work, data, "valid").accuracy
    for name in (between.name for between in ways[0].between):
        between = work.get_submodule(name)
        one = merge_norm(one, copy.deepcopy(between).eval()) if isinstance(between, NORMS) else one
        put(work, name, nn.Identity())
    merged = cast(nn.Conv2d, merge(one, two, border="interior"))
    larger = max(*one.kernel_size, *two.kernel_size)
    layer = cropped(merged, larger if kernel_size is None else kernel_size)
    put(work, second, nn.Identity())
    put(work, first, layer.train(one.training))

    def pairs(split: str) -> Iterator[Features]:
        batches = itertools.islice(data.batches(split, 128), -(-images // 128))
        return features(model, first, second, (x.to(example) for x, _ in batches))

    error_cropped = relative_error(layer, pairs("valid"))
    accuracy_cropped = evaluate(work, data, "valid").accuracy
    least_squares(layer, pairs("train"), ridge)
    error_after = relative_error(layer, pairs("valid"))
    accuracy_fitted = evaluate(work, data, "valid").accuracy
    if epochs:
        options = {"progress": False, "teacher_weight": teacher_weight, **(retrain or {})}
        fit(work, data, epochs=epochs, lr=lr, teacher=model, seed=seed, **options)
    return Distilled(
        model=work,
        error_cropped=error_cropped,
        error_after=error_after,
        accuracy_before=before,
        accuracy_cropped=accuracy_cropped,
        accuracy_fitted=accuracy_fitted,
        accuracy_after=evaluate(work, data, "valid").accuracy,
        macs_before=macs(one, ways[0].shape) + macs(two, ways[0].second_shape),
        macs_after=macs(layer, ways[0].shape),
        seconds=time.perf_counter() - start,
    )


# --- the recipe --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded(Step):
    """A ``Step`` of folding: ``removed`` names the activations that went.

    ``merged`` counts the pairs that became one layer, ``slopes`` are those of all activations
    after the penalised training, ``accuracies`` those on ``valid`` after that training, after
    folding and after fine-tuning.
    """

    merged: int = 0
    slopes: dict[str, float] = field(default_factory=dict)
    accuracies: tuple[float, ...] = ()


def fold_iteratively(
    model: nn.Module,
    data: Dataset,
    *,
    strength: float = 0.25,
    start: float = 0.05,
    threshold: float = 0.1,
    rounds: int = 1,
    epochs: int = 4,
    finetune_epochs: int | None = None,
    lr: float = 0.01,
    border: Border = "exact",
    force: bool = False,
    retrain: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Folded]:
    """Train with the penalty, fold what became linear, fine-tune: a ``Folded`` step a round.

    The procedure of the paper (section 3), where there is one round of 100 and 100 epochs.
    ``model`` is a trained network and is left alone; without slopes it gets them
    (:func:`make_foldable` with ``start``). A round trains for ``epochs`` with
    :func:`slope_penalty` of ``strength``, folds with ``threshold``, ``border`` and ``force``, and
    trains for ``finetune_epochs`` (by default as many) without the penalty; slopes that stayed are
    trained on. ``retrain`` holds further arguments of ``training.fit`` for both. It ends early
    when no slope is left. Seeds of a round follow from ``seed`` and its index, so that a
    ``history`` with steps goes on as if never interrupted.

    Raises:
        ValueError: values out of range, a model that cannot get slopes or is masked, or a history
            begun with other settings.
    """
    finetune = epochs if finetune_epochs is None else finetune_epochs
    runs.check_numbers(epochs=min(epochs, finetune), strength=strength, lr=lr, seed=seed)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    with runs.mode(model, training=False):
        check_foldable(model, threshold, border)
    foldable = model if slopes(model) else make_foldable(model, start=start)
    history = History() if history is None else history
    history.bind(
        recipe="layer_folding.fold_iteratively",
        strength=strength,
        start=start,
        threshold=threshold,
        rounds=rounds,
        epochs=epochs,
        finetune_epochs=finetune,
        lr=lr,
        border=border,
        force=force,
        retrain=dict(retrain or {}),
        seed=seed,
        weights=runs.digest(model.state_dict().values()),
    )

    def train(work: nn.Module, epochs: int, index: int, **options: Any) -> None:
        if epochs:
            options = {"progress": False, **options, **(retrain or {})}
            fit(work, data, epochs=epochs, lr=lr, seed=1000 * seed + index, **options)

    def run() -> Iterator[Folded]:
        work = history.latest(foldable)
        example, _ = next(iter(data.batches("valid", 1, device=runs.device_of(work))))
        for index in range(len(history) + 1, rounds + 1):
            if not slopes(work):
                return
            begin = time.perf_counter()
            penalty = functools.partial(slope_penalty, strength=strength)
            train(work, epochs, 2 * index, penalty=penalty, after_step=clamp_slopes)
            found = slopes(work)
            trained = evaluate(work, data, "valid").accuracy
            with runs.mode(work, training=False):
                example = example.to(runs.device_of(work), runs.dtype_of(work))
                report = fold(
                    work, example, threshold=threshold, border=border, force=force, norms=False
                )
            work = report.model
            folded = evaluate(work, data, "valid").accuracy
            train(work, finetune, 2 * index + 1, after_step=clamp_slopes)
            seconds = time.perf_counter() - begin
            step = measured(index, sorted(report.linear), work, data, seconds=seconds)
            told: dict[str, Any] = {"merged": len(report.merged), "slopes": found}
            step = Folded(**vars(step), **told, accuracies=(trained, folded, step.accuracy))
            history.append(step)
            yield step

    return run()
