"""Skeletonization: remove the units that the error would miss least (Mozer and Smolensky, 1988).

The question behind every later method is asked here first: how much worse would the network be
without unit i?

    rho_i = E(without unit i) - E(with unit i)                                       (relevance)

Asking it of one unit after the other takes a pass over the data for each. The paper's shortcut asks
all at once: every unit's output is multiplied by an attentional strength alpha_i, which is 1,

    o_j = f(sum_i w_ji alpha_i o_i),      rho_i = E(alpha_i = 0) - E(alpha_i = 1)     (removal)
    rho_hat_i = -dE/dalpha_i at alpha = 1 = -sum_j delta_j w_ji o_i                   (attention)

Alpha multiplies what leaves the unit, after its nonlinearity (and batch norm): a unit that is gone
hands on 0, whereas a sigmoid whose input is 0 still hands on one half.
"""

import difflib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core import masks, runs, structure, training
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured

Loss = Literal["linear", "quadratic", "task"]
Method = Literal["attention", "removal"]

INPUT = "input"  # stands for the input units where a layer's name is asked for
CONVOLUTION = nn.modules.conv._ConvNd


def relevance(
    model: nn.Module,
    layer: str,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    method: Method = "attention",
    loss: Loss = "linear",
    decay: float | None = None,
) -> Tensor:
    """Return how much the error would grow without each unit of a layer, estimated or measured.

    A unit is an output of a linear layer or a channel of a convolution. Alpha multiplies it after
    the batch norms and activations that follow the layer, as ``structure.linear_chains`` finds
    them. (An activation that is no module, or a module that runs twice, comes after alpha: for ReLU
    that is the same.) The model runs in evaluation mode and is left as it was.

    Args:
        model: any network with outputs [B, K].
        layer: name of a linear layer or convolution, or ``"input"`` for the elements of one input
            (one that is removed becomes 0, which for normalised images is the mean).
        batches: ``(inputs, labels)``; labels are classes, int64 [B], or targets, float [B, K].
        method: ``"attention"``, -dE/dalpha at 1, one backward pass a batch for all units; or
            ``"removal"``, E(alpha_i = 0) - E(alpha_i = 1), one forward pass a batch and unit.
        loss: the error E, see :func:`error`. The paper trains with the quadratic error and yet
            ranks with the linear one: where training ends, the quadratic derivative vanishes.
        decay: None for the mean over all patterns; or, in [0, 1), the paper's running average
            rho <- decay * rho + (1 - decay) * rho_hat, updated once a batch (paper: 0.8). It begins
            at the first batch's estimate.

    Returns:
        [units], error per pattern, on the model's device.

    Raises:
        ValueError: an unknown layer, method or loss, a decay outside [0, 1), or no batches.

    Source: Mozer and Smolensky, "Skeletonization", NIPS 1988.
    """
    _check_choices(method, loss)
    _check_layer(model, layer)
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay!r}; the paper uses 0.8.")
    estimate = _attention if method == "attention" else _removal
    device, site = runs.device_of(model), None
    total: Tensor = torch.tensor(0.0, device=device)
    running, patterns = None, 0
    with runs.mode(model, training=False):
        for inputs, labels in batches:
            inputs, labels = inputs.to(device), labels.to(device)
            site = site or _find_site(model, layer, inputs[:1])
            rho = estimate(model, site, inputs, labels, loss)  # [units]
            total, patterns = total + rho * len(inputs), patterns + len(inputs)
            if decay is not None:
                running = rho if running is None else decay * running + (1 - decay) * rho
    if not patterns:
        raise ValueError("batches is empty: give at least one batch of (inputs, labels).")
    masks.refresh(model)  # effective weights made without gradients would stay so
    return total / patterns if running is None else running


def error(outputs: Tensor, labels: Tensor, loss: Loss, *, sigmoid: bool = False) -> Tensor:
    """Return the error per pattern (a scalar): a sum over the outputs, averaged over the batch.

    ``linear``: sum_j |t_j - o_j|;  ``quadratic``: sum_j (t_j - o_j)^2;  ``task``: cross-entropy.

    Targets t are one-hot classes, 0 or 1 if there is but one output, or ``labels`` themselves if
    those are floats. Outputs o are taken as they are if the network ends in a ``sigmoid`` or if
    targets are floats; otherwise o is their softmax, or their sigmoid if there is but one.
    """
    single, given = outputs.shape[1] == 1, labels.is_floating_point()
    if given:
        targets = labels.reshape(outputs.shape).to(outputs.dtype)
    elif single:
        targets = labels[:, None].to(outputs.dtype)
    else:
        targets = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)  # [B, K]
    if loss == "task":
        if sigmoid:
            return F.binary_cross_entropy(outputs, targets, reduction="sum") / len(outputs)
        if single:
            return F.binary_cross_entropy_with_logits(outputs, targets)
        return F.cross_entropy(outputs, targets)
    if not sigmoid and not given:
        outputs = outputs.sigmoid() if single else outputs.softmax(1)
    gap = targets - outputs
    return (gap.abs() if loss == "linear" else gap.square()).sum(1).mean()


@dataclass(frozen=True)
class _Site:
    """Where alpha multiplies: the output of ``module``, or the network's input if that is None."""

    module: nn.Module | None
    shape: tuple[int, ...]  # of alpha, so that it broadcasts over a batch
    sigmoid: bool  # the network ends in one


def _attention(model: nn.Module, site: _Site, inputs: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    with torch.enable_grad():
        alpha = torch.ones(site.shape, device=inputs.device, dtype=inputs.dtype, requires_grad=True)
        value = error(_attended(model, site, alpha, inputs), labels, loss, sigmoid=site.sigmoid)
        (slope,) = torch.autograd.grad(value, alpha)
    return -slope.flatten()


def _removal(model: nn.Module, site: _Site, inputs: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    with torch.no_grad():
        alpha = torch.ones(site.shape, device=inputs.device, dtype=inputs.dtype)
        whole = error(_attended(model, site, alpha, inputs), labels, loss, sigmoid=site.sigmoid)
        rho, strength = torch.empty_like(alpha).flatten(), alpha.view(-1)
        for i in range(len(rho)):
            strength[i] = 0
            rho[i] = error(
                _attended(model, site, alpha, inputs), labels, loss, sigmoid=site.sigmoid
            )
            strength[i] = 1
    return rho - whole


def _attended(model: nn.Module, site: _Site, alpha: Tensor, inputs: Tensor) -> Tensor:
    """The network's outputs with the units at ``site`` multiplied by ``alpha``."""
    if site.module is None:
        return model(inputs * alpha)
    handle = site.module.register_forward_hook(lambda _module, _inputs, output: output * alpha)
    try:
        return model(inputs)
    finally:
        handle.remove()


def _find_site(model: nn.Module, layer: str, example: Tensor) -> _Site:
    """Follow the layer's output through the batch norms and activations that it alone feeds."""
    sigmoid = isinstance(list(model.modules())[-1], nn.Sigmoid)
    if layer == INPUT:
        return _Site(None, tuple(example.shape[1:]), sigmoid)
    chain = next((c for c in structure.linear_chains(model, example) if layer in c), None)
    if chain is None:
        raise ValueError(
            f"{layer!r} does not run exactly once in a pass, so its units have no one output to "
            "weigh; choose another layer."
        )
    target = model.get_submodule(layer)
    site, activations = target, set(structure.activations(model).values())
    for module in map(model.get_submodule, chain[chain.index(layer) + 1 :]):
        if module not in activations and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            break
        site = module
    spatial = (1,) * len(target.kernel_size) if isinstance(target, CONVOLUTION) else ()
    return _Site(site, (_units(target), *spatial), sigmoid)


def trim(
    model: nn.Module,
    layer: str,
    units: Sequence[int] | Tensor,
    example: Tensor,
    *,
    inplace: bool = False,
) -> nn.Module:
    """Return a smaller dense network without the named units of a layer.

    It computes what the whole network does with those units' outputs multiplied by 0, up to
    floating point.

    Args:
        model: any network.
        layer: name of a linear layer or convolution that is not the output layer and whose units
            are its own: inside a residual block, not where blocks are added up.
        units: indices of the units to remove, in any order.
        example: one input batch.
        inplace: change the given model itself.

    Raises:
        ValueError: an unknown layer, a unit that is not there, no unit left, the output layer,
            units tied to another layer's, or a masked model; the model is then unchanged.
    """
    _check_layer(model, layer)
    if layer == INPUT:
        raise ValueError("input units cannot be trimmed: leave those elements out of the data.")
    for group in structure.channel_groups(model, example, layers=[layer]):
        members = [m for m in (*group.producers, *group.others) if m.role in ("out", "depthwise")]
        tied = [member.layer for member in members if member.layer != layer]
        if tied:
            raise ValueError(
                f"the units of {layer!r} are tied to those of {', '.join(tied)} and cannot go "
                "alone; choose a layer inside a residual block."
            )
    smaller = model if inplace else masks.clone(model)
    structure.remove_channels(smaller, layer, units, example)
    return smaller


def skeletonize(
    model: nn.Module,
    data: Dataset,
    *,
    layers: Sequence[str] | None = None,
    method: Method = "attention",
    loss: Loss = "linear",
    split: str = "valid",
    remove: int | float = 1,
    limit: int | None = None,
    criterion: float | None = None,
    tolerance: float = 0.01,
    epochs: int = 10,
    seed: int = 0,
    history: History | None = None,
    **training_options: Any,
) -> Iterator[Step]:
    """Train to a criterion, remove the least relevant units, train again, and so on.

    Before the first removal and after each, the network has to reach the criterion on ``valid``
    within ``epochs`` epochs, and is not trained where it already does. The recipe ends when it does
    not get there any more (that last removal is undone, not yielded), when every layer is down to
    one unit, or after ``limit`` removals. The given model is not changed.

    Args:
        model, data: what to begin with, trained or not; ``valid`` decides.
        layers: whose units compete; by default all layers that :func:`trim` accepts.
        method, loss: as in :func:`relevance`.
        split: where relevance is measured; the paper uses its training patterns, ``"train"``.
        remove: how many units go at a time, or in (0, 1) which share of those left (at least one).
        limit: the largest number of removals.
        criterion: accuracy on ``valid``, in [0, 1]; by default the given model's less
            ``tolerance``.
        epochs: the most epochs of training after one removal.
        seed, history: order of the batches; steps to go on after, appended to.
        training_options: for ``training.fit``, such as ``lr`` (0.05), ``batch_size`` or ``loss``
            (written ``training_loss`` here); the optimiser begins afresh each epoch.

    Yields:
        A ``Step`` a removal; ``removed`` lists units as ``"fc1:17"``, in the first network's count.

    Raises:
        ValueError: an option out of range, an unknown layer, a history of other settings, or a
            network that does not reach the criterion before anything is removed.
    """
    _check_choices(method, loss)
    share = isinstance(remove, float)
    if (share and not 0 < remove < 1) or (not share and remove < 1):
        raise ValueError(f"remove must be a count from 1 or a share in (0, 1), got {remove!r}.")
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', got {split!r}.")
    device = runs.device_of(model)
    example, _ = next(iter(data.batches("valid", 2, device=device)))
    chosen = _trimmable(model, example) if layers is None else list(layers)
    for layer in chosen:
        _check_layer(model, layer)
        trim(model, layer, [0], example)  # refuses now what could not be done later
    goal = training.evaluate(model, data, "valid").accuracy - tolerance
    goal = goal if criterion is None else criterion
    options = {"lr": 0.05, "batch_size": 32, "progress": False, **training_options}
    options["loss"] = options.pop("training_loss", "cross_entropy")
    history = History() if history is None else history
    settings = dict(layers=chosen, method=method, relevance_loss=loss, split=split, remove=remove)
    history.bind(**settings, criterion=goal, epochs=epochs, seed=seed, **options)

    def reaches_goal(network: nn.Module, removal: int) -> bool:
        for epoch in range(epochs + 1):
            if training.evaluate(network, data, "valid").accuracy >= goal:
                return True
            if epoch < epochs:
                order = runs.derive(seed, removal, epoch)
                training.fit(network, data, epochs=1, seed=order, **options)
        return False

    # current number -> number in the first network
    numbers = {layer: list(range(_units(model.get_submodule(layer)))) for layer in chosen}
    for step in history:
        for layer, _, unit in (name.rpartition(":") for name in step.removed):
            numbers[layer].remove(int(unit))
    current = history.latest(model)
    if not len(history) and not reaches_goal(current, 0):
        raise ValueError(
            f"the network does not reach {goal:.3f} accuracy on valid within {epochs} epochs; "
            "allow more epochs or lower the criterion."
        )
    while limit is None or len(history) < limit:
        start = time.perf_counter()
        batches = data.batches(split, 256, device=device)
        scores = {
            layer: relevance(current, layer, batches, method=method, loss=loss) for layer in chosen
        }
        left = sum(len(rho) for rho in scores.values())
        going = least_relevant(scores, max(1, math.floor(remove * left)) if share else int(remove))
        if not any(going.values()):
            return
        removed = []
        for layer, places in going.items():
            trim(current, layer, places, example, inplace=True)
            removed += [f"{layer}:{numbers[layer][i]}" for i in places]
            numbers[layer] = [n for i, n in enumerate(numbers[layer]) if i not in places]
        if not reaches_goal(current, len(history) + 1):
            return
        seconds = time.perf_counter() - start
        step = measured(len(history) + 1, removed, current, data, seconds=seconds)
        history.append(step)
        yield step


def least_relevant(scores: dict[str, Tensor], count: int) -> dict[str, list[int]]:
    """Return the ``count`` units of smallest relevance over all layers, ascending in each.

    The most relevant unit of every layer is spared, so that no layer is ever emptied; of equals the
    one that comes first goes first.
    """
    pool = []
    for layer, rho in scores.items():
        order = rho.argsort(stable=True).tolist()[:-1]
        pool += [(rho[i].item(), layer, i) for i in order]
    pool = sorted(pool, key=lambda entry: entry[0])[:count]
    return {layer: sorted(i for _, name, i in pool if name == layer) for layer in scores}


def _trimmable(model: nn.Module, example: Tensor) -> list[str]:
    found = []
    for layer, module in structure.prunable(model).items():
        try:
            if _units(module) > 1:
                trim(model, layer, [0], example)
                found.append(layer)
        except ValueError:  # the output layer, or units tied to others
            continue
    return found


def _units(layer: nn.Module) -> int:
    units = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(units, int)
    return units


def _check_choices(method: str, loss: str) -> None:
    if method not in ("attention", "removal"):
        raise ValueError(f"method must be 'attention' or 'removal', got {method!r}.")
    if loss not in ("linear", "quadratic", "task"):
        raise ValueError(f"loss must be 'linear', 'quadratic' or 'task', got {loss!r}.")


def _check_layer(model: nn.Module, layer: str) -> None:
    known = structure.prunable(model)
    if layer != INPUT and layer not in known:
        near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4) or list(known)[:3]
        raise ValueError(
            f"there is no layer {layer!r} with units; near it are {', '.join(map(repr, near))}, "
            f"and {INPUT!r} stands for the input units."
        )
