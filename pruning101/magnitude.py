"""Magnitude pruning: remove the smallest weights, retrain those that stay, and again.

Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks,
NIPS 2015 (arXiv 1506.02626). Train, remove every weight below its layer's threshold, retrain the
survivors from their trained values, repeat; at the end take out the units that lost all their
inputs or all their outputs.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import BoolTensor, Tensor, nn

from pruning101.core import masks, structure
from pruning101.core.data import Dataset
from pruning101.core.dead_units import DeadUnits as DeadUnits  # both are this topic's, too
from pruning101.core.dead_units import remove_dead_units as remove_dead_units
from pruning101.core.steps import History, Step, measured
from pruning101.core.training import evaluate, fit

if TYPE_CHECKING:
    import pandas

PerLayer = float | Mapping[str, float]

# --- score and threshold -----------------------------------------------------------------------


def scores(model: nn.Module) -> dict[str, Tensor]:
    """Return ``|w|`` of every convolution and linear weight, keyed by parameter name.

    Masked weights count as the zeros they act as. Biases are not scored: the paper's counts are
    of connections.
    """
    return {f"{layer}.weight": w.abs() for layer, w in _weights(model).items()}


def survivors(model: nn.Module) -> dict[str, BoolTensor]:
    """Return what no mask has removed yet, by parameter name: True where the weight is there."""
    present = masks.masks_of(model)
    weights = {f"{layer}.weight": w for layer, w in _weights(model).items()}
    whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    return {name: present.get(name, cast(BoolTensor, mask)) for name, mask in whole.items()}


def masks_by_std(model: nn.Module, quality: PerLayer) -> dict[str, BoolTensor]:
    """Return masks that remove ``|w| < T_l`` with ``T_l = q_l * std(w_l)`` (section 4).

    ``quality`` is q, one number for all layers or one a layer by name (``{"fc1": 1.0}``; layers
    left out keep what they have). A removed weight stays removed, and the standard deviation
    (about the mean, divided by n) is that of the weights still there: the paper does not say
    whether later rounds use these or the first round's. For Gaussian weights about zero the first
    round removes the share :func:`gaussian_sparsity`.

    Raises:
        ValueError: a negative or NaN quality, an unknown layer, or NaN among the weights.
    """
    weights, kept = _weights(model), survivors(model)
    qualities = _per_layer(quality, weights, "quality", default=0.0)
    result: dict[str, BoolTensor] = {}
    for layer, w in weights.items():
        if not qualities[layer] >= 0 or math.isinf(qualities[layer]):
            q = qualities[layer]
            raise ValueError(f"quality must be a number of deviations >= 0; {layer!r} has {q!r}")
        if bool(w.isnan().any()):
            raise ValueError(
                f"the weights of {layer!r} contain NaN, which no threshold can judge; "
                "look at the training that made them"
            )
        alive = kept[f"{layer}.weight"]
        threshold = 0.0
        if bool(alive.any()):
            threshold = qualities[layer] * float(w[alive].std(correction=0))
        result[f"{layer}.weight"] = cast(BoolTensor, alive & (w.abs() >= threshold))
    return result


def gaussian_sparsity(quality: float) -> float:
    """Return the share of a zero-mean Gaussian within ``quality`` standard deviations of zero.

    ``erf(q / sqrt(2))``: 0.383 for q = 0.5, 0.683 for 1, 0.866 for 1.5.
    """
    return math.erf(quality / math.sqrt(2))


# --- how much each layer can bear --------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """Accuracy on ``valid`` with one layer pruned alone, as :func:`sensitivity_scan` measured it.

    ``accuracy[layer][i]`` belongs to ``sparsities[i]`` (0 is always there, first); ``weights``
    counts each layer's weights.
    """

    sparsities: tuple[float, ...]
    accuracy: dict[str, tuple[float, ...]]
    weights: dict[str, int]

    def table(self) -> "pandas.DataFrame":
        """Return one row a sparsity, one column a layer, accuracies in [0, 1]."""
        import pandas

        return pandas.DataFrame(self.accuracy, index=pandas.Index(self.sparsities, name="sparsity"))


def sensitivity_scan(
    model: nn.Module,
    data: Dataset,
    *,
    sparsities: Sequence[float] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    layers: Sequence[str] | None = None,
    batch_size: int = 1024,
) -> Scan:
    """Prune one layer at a time, without retraining, and measure the accuracy on ``valid``.

    Figure 6 of the paper. The model is left as it is; with masks already there, a layer's
    sparsity counts them in.

    Raises:
        ValueError: a sparsity outside [0, 1] or an unknown layer.
    """
    if any(not 0 <= s <= 1 for s in sparsities):
        raise ValueError(f"sparsities must be shares in [0, 1], got {tuple(sparsities)}")
    grid = tuple(sorted({0.0, *map(float, sparsities)}))
    trial = masks.clone(model)
    masks.make_permanent(trial)
    modules = structure.prunable(trial)
    chosen = list(modules) if layers is None else [_layer_name(name, modules) for name in layers]
    dense = evaluate(trial, data, "valid", batch_size=batch_size).accuracy
    accuracy: dict[str, tuple[float, ...]] = {}
    for layer in chosen:
        weight = cast(nn.Parameter, modules[layer].weight)
        original = weight.detach().clone()
        values = [dense]
        for sparsity in grid[1:]:
            keep = masks.from_scores({layer: original.abs()}, sparsity)[layer]
            with torch.no_grad():
                weight.copy_(original * keep)
            values.append(evaluate(trial, data, "valid", batch_size=batch_size).accuracy)
        with torch.no_grad():
            weight.copy_(original)
        accuracy[layer] = tuple(values)
    weights = {layer: cast(Tensor, modules[layer].weight).numel() for layer in chosen}
    return Scan(grid, accuracy, weights)


def sparsities_from_scan(scan: Scan, sparsity: float) -> dict[str, float]:
    """Return one sparsity a layer such that all layers together reach ``sparsity``.

    Every layer is pruned to the point where, alone, it costs the same drop of accuracy, so the most
    sensitive layer gets the smallest threshold (section 4: the paper sets them by eye from the
    scan). Between scanned points the drop is interpolated linearly, and a layer goes no further
    than the scan did.

    Raises:
        ValueError: the scan does not reach that far.
    """
    total = sum(scan.weights.values())
    reach = scan.sparsities[-1]
    if not 0 <= sparsity <= reach:
        raise ValueError(
            f"the scan reaches from 0 to {reach}, but a sparsity of {sparsity} was asked for; "
            "scan further or ask for less"
        )

    def at(drop: float) -> dict[str, float]:
        return {layer: _bearable(scan, layer, drop) for layer in scan.accuracy}

    def overall(drop: float) -> float:
        return sum(s * scan.weights[layer] for layer, s in at(drop).items()) / total

    low, high = 0.0, 1.0
    for _ in range(60):  # bisection on the drop, the same for all
        middle = (low + high) / 2
        low, high = (middle, high) if overall(middle) < sparsity else (low, middle)
    # The total can jump at a drop, where a layer's curve is flat: meet it between the two sides.
    below, above = at(low), at(high)
    if overall(low) > sparsity:  # even a drop of 0 goes too far
        below = dict.fromkeys(above, 0.0)
    reached, further = (
        sum(s[layer] * n for layer, n in scan.weights.items()) / total for s in (below, above)
    )
    share = (sparsity - reached) / (further - reached) if further > reached else 1.0
    return {layer: below[layer] + share * (above[layer] - below[layer]) for layer in above}


def _bearable(scan: Scan, layer: str, drop: float) -> float:
    """The largest sparsity up to which this layer, alone, never loses more than ``drop``."""
    values = scan.accuracy[layer]
    worst = 0.0  # the drop so far: an accuracy that recovers by chance does not count
    for i in range(1, len(values)):
        here = max(worst, values[0] - values[i])
        if here > drop:
            left, right = scan.sparsities[i - 1], scan.sparsities[i]
            return left + (right - left) * (drop - worst) / (here - worst)
        worst = here
    return scan.sparsities[-1]


def dropout_rate(rate: float, connections_before: int, connections_after: int) -> float:
    """Return the dropout rate for retraining, ``D_r = D_o * sqrt(C_ir / C_io)`` (section 3.2).

    Fewer connections overfit less, so they need less dropout: 0.5 becomes 0.15 with 9 % of the
    connections left. ``rate`` is the share dropped, in [0, 1]; the counts are those of the layer.

    Raises:
        ValueError: a rate outside [0, 1], or counts that are negative or grow.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be a share in [0, 1], got {rate!r}")
    if not 0 <= connections_after <= connections_before or connections_before == 0:
        raise ValueError(
            "a pruned layer has at most the connections it had before, and had some; got "
            f"{connections_before!r} before and {connections_after!r} after"
        )
    return rate * math.sqrt(connections_after / connections_before)


# --- the recipe --------------------------------------------------------------------------------


def prune_iteratively(
    model: nn.Module,
    data: Dataset,
    *,
    sparsity: PerLayer | None = None,
    quality: PerLayer | None = None,
    rounds: int = 4,
    scope: Literal["global", "layer"] = "layer",
    score: Callable[[nn.Module], dict[str, Tensor]] = scores,
    epochs: int = 4,
    lr: float = 0.01,
    penalty: Literal["l1", "l2"] | None = "l2",
    strength: float = 1e-4,
    retrain: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Step]:
    """Prune and retrain in ``rounds``, yielding a ``Step`` after each (Han et al. 2015, section 3).

    ``model`` is a trained network, masked or not, and is left alone. How much goes is said in one
    of two ways (by default, a ``sparsity`` of 0.9):

    - ``sparsity``, the share of weights gone at the end, for all layers (``scope`` says whether
      they compete) or one a layer by name (layers left out stay whole). Every round removes the
      same share of what is left: after round r of R the density is ``(1 - sparsity) ** (r / R)``.
    - ``quality``, the q of :func:`masks_by_std`, applied in every round.

    The lowest ``score`` goes first. Survivors go on from their trained values, for ``epochs`` at
    ``lr`` (the paper: a tenth of training's for LeNet); ``epochs=0`` measures without retraining.
    ``penalty`` adds ``strength * sum |w|`` or ``strength / 2 * sum w**2`` over the weights, not the
    biases. ``retrain`` holds further arguments of ``training.fit``. Each round's seed follows from
    ``seed`` and its index, so that a ``history`` with steps goes on as if never interrupted.

    ``Step.removed`` is the number of weights that the round removed.

    Raises:
        ValueError: both sparsity and quality given, values out of range, unknown layers,
            or a history begun with other settings.
    """
    layers = structure.prunable(model)
    if sparsity is None and quality is None:
        sparsity = 0.9
    if sparsity is not None and quality is not None:
        raise ValueError("sparsity and quality both say how much goes; give only one of them")
    if rounds < 1 or epochs < 0:
        raise ValueError(f"rounds must be at least 1 and epochs at least 0, got {rounds}, {epochs}")
    if penalty not in ("l1", "l2", None):
        raise ValueError(f'penalty must be "l1", "l2" or None, got {penalty!r}')
    if sparsity is not None:
        for layer, s in _per_layer(sparsity, layers, "sparsity", default=0.0).items():
            if not 0 <= s <= 1:
                raise ValueError(f"sparsity must be a share in [0, 1]; {layer!r} has {s!r}")
    else:
        masks_by_std(model, cast(PerLayer, quality))  # raises what it has to raise
    history = History() if history is None else history
    history.bind(
        recipe="magnitude.prune_iteratively",
        sparsity=sparsity,
        quality=quality,
        rounds=rounds,
        scope=scope,
        score=score,
        epochs=epochs,
        lr=lr,
        penalty=penalty,
        strength=strength,
        retrain=dict(retrain or {}),
        seed=seed,
    )

    def select(work: nn.Module, index: int) -> dict[str, BoolTensor]:
        if quality is not None:
            return masks_by_std(work, quality)
        return _masks_by_score(work, score(work), cast(PerLayer, sparsity), index / rounds, scope)

    def run() -> Iterator[Step]:
        work = history.latest(model)
        for index in range(len(history) + 1, rounds + 1):
            start = time.perf_counter()
            before = _count(survivors(work).values())
            masks.apply(work, select(work, index))
            removed = before - _count(survivors(work).values())
            if epochs:
                options: dict[str, Any] = {"progress": False, **(retrain or {})}
                if penalty is not None:
                    options["penalty"] = weight_penalty(penalty, strength)
                fit(work, data, epochs=epochs, lr=lr, seed=1000 * seed + index, **options)
            seconds = time.perf_counter() - start
            step = measured(index, removed, work, data, seconds=seconds)
            history.append(step)
            yield step

    return run()


def weight_penalty(kind: Literal["l1", "l2"], strength: float) -> Callable[[nn.Module], Tensor]:
    """Return ``penalty(model)``: ``strength * sum |w|``, or ``strength / 2 * sum w**2`` for "l2".

    Over the effective weights of convolutions and linear layers; biases and norms are left out.
    """

    def penalty(model: nn.Module) -> Tensor:
        weights = [cast(Tensor, m.weight) for m in structure.prunable(model).values()]
        if kind == "l1":
            return strength * torch.stack([w.abs().sum() for w in weights]).sum()
        return strength / 2 * torch.stack([w.square().sum() for w in weights]).sum()

    return penalty


def _masks_by_score(
    model: nn.Module,
    score: dict[str, Tensor],
    sparsity: PerLayer,
    progress: float,
    scope: Literal["global", "layer"],
) -> dict[str, BoolTensor]:
    """Masks for the share ``progress`` of the way to ``sparsity``, on a geometric schedule."""
    kept = survivors(model)
    # What is gone ranks below all that is left, whatever the score says of it.
    ranked = {name: s.masked_fill(~kept[name], -math.inf) for name, s in score.items()}
    if not isinstance(sparsity, Mapping):
        return masks.from_scores(ranked, 1 - (1 - sparsity) ** progress, scope=scope)
    shares = _per_layer(sparsity, structure.prunable(model), "sparsity", default=0.0)
    result: dict[str, BoolTensor] = {}
    for name, s in ranked.items():
        share = 1 - (1 - shares[name.removesuffix(".weight")]) ** progress
        # A layer that came in sparser than its share stays as sparse as it is.
        gone = 1 - _count([kept[name]]) / s.numel()
        result |= masks.from_scores({name: s}, max(share, gone))
    return result


def _weights(model: nn.Module) -> dict[str, Tensor]:
    masks.refresh(model)  # an optimiser's step leaves the effective weights behind
    return {n: cast(Tensor, m.weight).detach() for n, m in structure.prunable(model).items()}


def _count(kept: Any) -> int:
    return sum(int(mask.sum()) for mask in kept)


def _layer_name(name: str, layers: Mapping[str, Any]) -> str:
    layer = name.removesuffix(".weight")
    if layer not in layers:
        raise ValueError(f"the model has no prunable layer {name!r}; it has {', '.join(layers)}")
    return layer


def _per_layer(
    value: PerLayer, layers: Mapping[str, Any], what: str, *, default: float
) -> dict[str, float]:
    if isinstance(value, Mapping):
        given = {_layer_name(name, layers): float(v) for name, v in value.items()}
        return {layer: given.get(layer, default) for layer in layers}
    if not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number or a mapping from layer to number, got {value!r}")
    return dict.fromkeys(layers, float(value))
