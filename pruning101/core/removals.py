"""Activations taken out in rounds: the surgery, and what EASIER, TLC, EGP and NEPENTHE share."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Required, TypedDict, cast

import torch
from torch import BoolTensor, Tensor, nn

from pruning101.core import masks, runs, structure
from pruning101.core.activation_states import Origin
from pruning101.core.data import Dataset
from pruning101.core.measure import footprint
from pruning101.core.slopes import is_activation, separate_activations
from pruning101.core.steps import History, Step, measured
from pruning101.core.surgery import put
from pruning101.core.training import evaluate, fit

# --- surgery -----------------------------------------------------------------------------------


def remove_activations(model: nn.Module, names: Sequence[str]) -> None:
    """Put ``nn.Identity`` in the place of the named activations of ``model``, in place.

    Names are those of ``structure.activations`` (and of slopes that folding put there).

    Raises:
        ValueError: an unknown name, the whole model, or an activation that stands in several
            places; the model is unchanged.
    """
    places = Counter(module for parent in model.modules() for module in parent._modules.values())
    known = {n: m for n, m in model.named_modules() if n and is_activation(m)}
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"the model has no activation {name!r} to remove; it has {listed}.")
        if places[known[name]] > 1:
            raise ValueError(
                f"the activation {name!r} stands in several places; give each one of its own with "
                "core.slopes.separate_activations."
            )
    for name in names:
        put(model, name, nn.Identity())


def silence(model: nn.Module, origin: Origin, off: Tensor) -> None:
    """Let the units that are ``off`` [C] give 0, in place: weights masked, norm and bias zeroed."""
    norm = model.get_submodule(origin.norm) if origin.norm else None
    layer = model.get_submodule(origin.layer) if origin.layer else None
    with torch.no_grad():
        if norm is not None:
            for parameter in norm.parameters(recurse=False):
                parameter[off] = 0
        # LayerNorm mixes all units: those that stay would change if others lost their weights.
        if layer is None or not isinstance(norm, nn.modules.batchnorm._BatchNorm | None):
            return
        weight = masks.original(layer, "weight")
        axis = int(bool(getattr(layer, "transposed", False)))
        if weight.shape[axis] != len(off):  # a concatenation: other layers made the rest
            return
        name = f"{origin.layer}.weight"
        kept = masks.masks_of(model).get(name, cast(BoolTensor, torch.ones_like(weight) != 0))
        gone = off.view([-1 if d == axis else 1 for d in range(weight.ndim)])
        masks.apply(model, {name: cast(BoolTensor, kept & ~gone)})
        if norm is None and layer.bias is not None:
            cast(Tensor, layer.bias)[off] = 0


# --- rounds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal(Step):
    """One round of a recipe: what was chosen and why, and what it bought.

    ``model`` is the network that the recipe goes on with, activations replaced and masks on it;
    ``accuracy``, ``loss`` and ``test_accuracy`` are its own. ``folded`` is a copy with all merged
    that can be and is worth it (:func:`layer_folding.fold`), which computes the same, and
    ``footprint`` is that copy's; ``unfolded_depth`` and ``unfolded_macs`` are those of ``model``.

    ``removed`` lists activations ("easier", "tlc") or counts weights ("egp", "nepenthe");
    ``linearised`` names the activations that went. ``entropies`` (bits) and ``scores`` are those of
    all activations before this round, by name; the smallest score goes first: the entropy, TLC's
    error likelihood or gap of the loss, or, by layer, EGP's importance.
    """

    entropies: dict[str, float] | None = None
    scores: dict[str, float] | None = None
    linearised: tuple[str, ...] = ()
    activations_left: int = 0
    unfolded_depth: int = 0
    unfolded_macs: int = 0
    folded: nn.Module | None = None


@dataclass(frozen=True)
class Choice:
    """What a method took out of the network, and by which figures; fields as in ``Removal``."""

    removed: Any
    linearised: Sequence[str]
    entropies: dict[str, float]
    scores: dict[str, float]


class RoundOptions(TypedDict, total=False):
    """What every recipe takes: ``epochs`` and ``lr`` of a round's retraining, and more.

    ``retrain`` holds further arguments of ``training.fit``; ``epochs=0`` does not retrain.
    ``layers`` are the activations that may go (all); ``tolerance`` is the drop of accuracy on
    ``valid``, from the given model's, that may not be passed; ``seed`` is that of the retraining;
    a ``history`` with steps goes on as if never interrupted.
    """

    epochs: Required[int]
    lr: Required[float]
    retrain: Mapping[str, Any] | None
    layers: Sequence[str] | None
    tolerance: float | None
    seed: int
    history: History | None


def remove_in_rounds(
    model: nn.Module,
    data: Dataset,
    choose: Callable[[nn.Module, list[str], Tensor], Choice | None],
    fold: Callable[[nn.Module, Tensor], nn.Module],
    *,
    limit: int | None,
    settings: Mapping[str, Any],
    epochs: int,
    lr: float,
    retrain: Mapping[str, Any] | None = None,
    layers: Sequence[str] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Removal]:
    """Choose, remove, retrain, measure, fold a copy, and again; ``model`` is left alone.

    ``choose(work, candidates, example)`` takes something out of ``work``, in place, and says what,
    or None when there is nothing left to do. ``fold(model, example)`` gives a smaller network in
    the place of its argument, a copy. At most ``limit`` rounds. The round that passes ``tolerance``
    is not yielded. ``settings`` are those that tell one run's history from another's.
    """
    runs.check_numbers(epochs=epochs, lr=lr, seed=seed)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"the number of rounds must be a whole number, 1 or more, not {limit!r}.")
    if tolerance is not None:
        runs.check_numbers(tolerance=tolerance)
    history = History() if history is None else history
    history.bind(
        layers=None if layers is None else list(layers),
        tolerance=tolerance,
        epochs=epochs,
        lr=lr,
        retrain=dict(retrain or {}),
        seed=seed,
        data=data.name,
        weights=runs.digest(model.state_dict().values()),
        **settings,
    )
    work = history.latest(model)
    separate_activations(work)
    acting = structure.activations(work)
    names = list(acting if layers is None else layers)
    gone = {name for step in history for name in step.linearised}
    if unknown := [name for name in names if name not in gone and name not in acting]:
        known = ", ".join(acting)
        raise ValueError(f"the model has no activation {unknown[0]!r}; it has {known}.")
    if not names and not gone:
        raise ValueError("the model has no activation that could be removed.")
    images, _ = next(iter(data.batches("valid", 2, device=runs.device_of(model))))
    example = images.to(runs.dtype_of(model))
    if not len(history):
        _folded(work, example, fold)  # refuses now what could not be folded after a training

    def run() -> Iterator[Removal]:
        before = 1.0 if tolerance is None else evaluate(model, data, "valid").accuracy
        while limit is None or len(history) < limit:
            start = time.perf_counter()
            index = len(history) + 1
            acting = structure.activations(work)
            left = [name for name in names if name in acting]
            choice = choose(work, left, example.to(runs.device_of(work))) if left else None
            if choice is None:
                return
            if epochs:
                options: dict[str, Any] = {"progress": False, **(retrain or {})}
                fit(work, data, epochs=epochs, lr=lr, seed=runs.derive(seed, index), **options)
            seconds = time.perf_counter() - start
            step = measured(index, choice.removed, work, data, seconds=seconds)
            if tolerance is not None and before - step.accuracy > tolerance + 1e-9:
                return
            # training may have moved the network to an accelerator
            smaller = _folded(work, example.to(runs.device_of(work)), fold)
            removal = Removal(
                **vars(step) | {"footprint": footprint(smaller, example[:1])},
                entropies=choice.entropies,
                scores=choice.scores,
                linearised=tuple(choice.linearised),
                activations_left=len(structure.activations(work)),
                unfolded_depth=step.footprint.depth,
                unfolded_macs=step.footprint.macs,
                folded=smaller,
            )
            history.append(removal)
            yield removal

    return run()


def _folded(
    model: nn.Module, example: Tensor, fold: Callable[[nn.Module, Tensor], nn.Module]
) -> nn.Module:
    """A copy with its masks made permanent, and everything merged that is worth it."""
    plain = masks.clone(model).eval()
    masks.make_permanent(plain)
    return fold(plain, example)
