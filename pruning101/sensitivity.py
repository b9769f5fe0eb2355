"""Regularise by sensitivity: shrink what the network hardly feels, then remove what became small.

Two penalties and the procedure they share. LOBSTER (Tartaglione, Bragagnolo, Fiandrotti and
Grangetto, arXiv 2011.09905) shrinks every weight in proportion to how little the loss feels it.
SeReNe (Tartaglione, Bragagnolo, Odierna, Fiandrotti and Grangetto, IEEE TNNLS 2021, arXiv
2102.03773) shrinks all weights of a neuron together, by how little the network's output feels its
pre-activation, so that whole neurons vanish. Both train to a plateau, remove every weight below one
threshold that costs no more than a given share of the loss, and begin again.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import BoolTensor, Tensor, nn

from pruning101.core import masks, runs, structure
from pruning101.core.data import Dataset
from pruning101.core.steps import History, Step, measured
from pruning101.core.training import evaluate, fit

Kind = Literal["full", "lower_bound", "local"]

# --- the penalties -----------------------------------------------------------------------------


def lobster(
    strength: float = 1e-4, *, biases: bool = False, norms: bool = False
) -> Callable[[nn.Module], None]:
    """Return ``shrink(model)`` for ``fit(after_step=...)``: ``w -= strength w relu(1 - |dL/dw|)``.

    A weight that the loss does not feel decays at the full ``strength`` (no learning rate times
    it), one with a gradient of 1 or more not at all. Biases of layers, and weights and biases of
    norms, are left alone unless asked for; the published code shrinks all. Frozen and masked
    weights stay as they are.

    The gradient is that of the step just made: of the whole objective, a penalty of ``fit``
    included, but without the optimiser's weight decay. The paper's update shrinks by the weight
    before that step, this one (as the published code) by the weight after it, which any optimiser
    leaves to be read; the two differ by at most ``strength`` times the length of the step.

    Raises:
        ValueError: a strength outside [0, 1]; called on a model without gradients.
    """
    _check(strength)

    @torch.no_grad()
    def shrink(model: nn.Module) -> None:
        if all(p.grad is None for p in model.parameters()):
            raise ValueError("the model has no gradients; call this after backward()")
        for module, leaf in _targets(model, biases=biases, norms=norms).values():
            weight = masks.original(module, leaf)
            slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
            _shrink(module, leaf, strength * (1 - slope.abs()).relu())
        masks.refresh(model)

    return shrink


def neuron_sensitivity(
    model: nn.Module, batches: Iterable[tuple[Tensor, Any]], *, kind: Kind = "full"
) -> dict[str, Tensor]:
    """Return how strongly the outputs y feel the pre-activation z_i of every neuron.

    ``"full"`` is ``mean_k |dy_k / dz_i|``, one backward pass for each of K outputs;
    ``"lower_bound"`` is ``|mean_k dy_k / dz_i|``, one backward pass and never more than full;
    ``"local"`` is ``1[z_i > 0]``, the slope of the neuron's own ReLU. Each is averaged over images
    and positions, in evaluation mode, where images do not mix. (The published code's ``full`` is
    smaller by the number of images: it averages over the batch twice.)

    A neuron is an output of a linear layer or a channel of a convolution (not a transposed one) and
    z_i what that layer gives; layers that are not called are left out. ``model`` has outputs [B, K]
    and is left as it was; labels are not looked at. Returns tensors [neurons] by layer name; those
    of the output layer are 1 / K.

    Raises:
        ValueError: an unknown kind, no batches, outputs of another shape, or no layer with neurons.
    """
    _check(sensitivity=kind)
    device, dtype = runs.device_of(model), runs.dtype_of(model)
    felt: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    for images, _ in batches:
        for layer, s in _felt(model, images.to(device, dtype), kind):  # s: [..., neurons]
            felt[layer] = felt.get(layer, 0) + s.flatten(0, -2).sum(0)
            seen[layer] = seen.get(layer, 0) + s[..., 0].numel()
    if not all(seen.values()) or not felt:
        raise ValueError("nothing to measure: give a batch, and a model that has neurons")
    return {layer: total / seen[layer] for layer, total in felt.items()}


def _felt(model: nn.Module, images: Tensor, kind: Kind) -> list[tuple[str, Tensor]]:
    """What is felt of every neuron, image and position, [..., neurons], at each layer's call."""
    names: list[str] = []
    z: list[Tensor] = []

    def watch(layer: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            last = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
            names.append(layer)
            z.append(last)
            # A copy of it goes on: a ReLU in place would overwrite z.
            return (last if last is output else last.movedim(-1, 1)).clone()

        return hook

    layers = _layers_with_neurons(model)
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        with runs.mode(model, training=False), torch.enable_grad():
            y = model(images.detach().requires_grad_().clone())  # a graph even if all is frozen
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(y, Tensor) or y.ndim != 2:
        what = f"have shape {list(y.shape)}" if isinstance(y, Tensor) else "are no tensor"
        raise ValueError(f"the outputs must be [B, K] to be felt, but {what}")
    if kind == "local":
        return [(name, (value > 0).to(value.dtype)) for name, value in zip(names, z, strict=True)]
    felt = [torch.zeros_like(value) for value in z]
    outputs = [y.mean(1)] if kind == "lower_bound" else y.unbind(1)  # each [B]
    for output in outputs:  # as images do not mix, the slopes of their sum are those of each
        slopes = torch.autograd.grad(output.sum(), z, retain_graph=True, materialize_grads=True)
        for total, slope in zip(felt, slopes, strict=True):
            total += slope.abs() / len(outputs)
    return list(zip(names, felt, strict=True))


class serene:
    """Shrink all weights of what the output hardly feels: ``w -= strength w relu(1 - S_i)``.

    Use it around training::

        with serene(model, 1e-4) as shrink:
            fit(model, data, epochs=10, lr=0.1, after_step=shrink)

    After each step, S is :func:`neuron_sensitivity` on its batch, and all incoming weights of
    neuron i shrink alike, but not its bias, nor what is masked or frozen. That costs a forward pass
    more and the backward passes of ``sensitivity``. The hook that remembers the batch is gone when
    the block ends, however it ends.

    Raises:
        ValueError: a strength outside [0, 1] or an unknown sensitivity.
        RuntimeError: called outside its ``with`` block, or before the model has run in training.
    """

    def __init__(self, model: nn.Module, strength: float = 1e-4, *, sensitivity: Kind = "full"):
        _check(strength, sensitivity)
        self.model, self.strength, self.sensitivity = model, strength, sensitivity
        self._images: Tensor | None = None

    def __enter__(self) -> "serene":
        def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if module.training:  # not the images of an evaluation
                self._images = inputs[0].detach()

        self._handle = self.model.register_forward_pre_hook(remember)
        return self

    def __exit__(self, *_error: Any) -> None:
        self._handle.remove()
        self._images = None

    def __call__(self, model: nn.Module) -> None:
        """Shrink ``model`` in place, by its sensitivity on the last batch that it trained on."""
        if self._images is None:
            raise RuntimeError("no batch seen: `with serene(...) as s: fit(..., after_step=s)`")
        felt = neuron_sensitivity(model, [(self._images, None)], kind=self.sensitivity)
        # Each process of `accelerate launch` has its share of the batch, and all must shrink alike.
        count = torch.tensor(float(len(self._images)), device=self._images.device)
        sums = {layer: s * count for layer, s in felt.items()}
        runs.Group(count.device).sum([*sums.values(), count])
        with torch.no_grad():
            for layer, total in sums.items():
                share = self.strength * (1 - total / count).relu()  # [neurons]
                module = model.get_submodule(layer)
                ones = [1] * (masks.original(module, "weight").ndim - 1)
                _shrink(module, "weight", share.view(-1, *ones))
        masks.refresh(model)


def removed_neurons(model: nn.Module) -> dict[str, int]:
    """Return how many neurons of each layer have no incoming weight left, by layer name."""
    masks.refresh(model)
    return {
        layer: int((cast(Tensor, module.weight).detach().flatten(1) == 0).all(1).sum())
        for layer, module in _layers_with_neurons(model).items()
    }


# --- the threshold -----------------------------------------------------------------------------


def prune_within(
    model: nn.Module,
    data: Dataset,
    *,
    tolerance: float = 0.05,
    split: Literal["valid", "train"] = "valid",
    resolution: float = 0.001,
    biases: bool = False,
    norms: bool = False,
) -> dict[str, BoolTensor]:
    """Return masks that remove the smallest weights of all layers, at a loss within the bound.

    Bisection finds one threshold on the magnitude: on its safe side the loss on ``split`` is at
    most ``(1 + tolerance)`` times the model's, on the other side not. It ends when at most a share
    ``resolution`` of the weights lies between the two, and returns the safe side, whose loss was
    measured (the published LOBSTER returns the middle, which may break the bound). The loss need
    not grow evenly with the threshold: some larger one may be within the bound too.

    What was masked stays masked, and the model is left as it is: ``masks.apply`` does the pruning.
    Biases and norms take part where asked for (in the published code always). A layer may lose all
    its weights where the loss allows it, with a warning. Of equal magnitudes the first goes first.

    Raises:
        ValueError: a value out of range, ``split="test"``, a loss not finite, nothing to prune.
    """
    _check(tolerance=tolerance, resolution=resolution)
    if split not in ("train", "valid"):
        raise ValueError(f'split must be "valid" or "train", got {split!r}: test decides nothing')
    kept = masks.masks_of(model)
    trial = masks.clone(model)
    masks.make_permanent(trial)
    targets = _targets(trial, biases=biases, norms=norms)
    if not targets:
        raise ValueError("the model has no convolution or linear layer to prune")
    weights = {name: masks.original(*at) for name, at in targets.items()}
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    magnitudes = {name: weight.abs() for name, weight in original.items()}
    for name in magnitudes.keys() & kept.keys():  # gone ranks below all that is left
        magnitudes[name].masked_fill_(~kept[name], -math.inf)
    loss = evaluate(trial, data, split).loss
    if not math.isfinite(loss):
        raise ValueError(f"the loss on {split} is {loss}: look at the training that made the model")

    total = sum(m.numel() for m in magnitudes.values())
    safe = sum(int((~kept[name]).sum()) for name in magnitudes.keys() & kept.keys())
    beyond, between = total, resolution * (total - safe)  # with no weight left, nothing is learnt
    first = result = masks.from_scores(magnitudes, safe / total)
    while beyond - safe > max(1, between):
        middle = (safe + beyond) // 2
        tried = masks.from_scores(magnitudes, middle / total)
        with torch.no_grad():
            for name, mask in tried.items():
                weights[name].copy_(original[name] * mask)
        if evaluate(trial, data, split).loss <= loss * (1 + tolerance):
            safe, result = middle, tried
        else:
            beyond = middle
    names = ", ".join(name for name in result if first[name].any() and not result[name].any())
    if names:
        warnings.warn(f"no weight is left in {names}: the loss is within its bound", stacklevel=2)
    return result


# --- the procedure -----------------------------------------------------------------------------


def regularise_and_prune(
    model: nn.Module,
    data: Dataset,
    *,
    method: Literal["lobster", "serene"] | None = "lobster",
    strength: float = 1e-4,
    sensitivity: Kind = "full",
    tolerance: float = 0.05,
    rounds: int = 10,
    patience: int = 5,
    epochs: int = 50,
    lr: float = 0.1,
    biases: bool = False,
    norms: bool = False,
    train: Mapping[str, Any] | None = None,
    seed: int = 0,
    history: History | None = None,
) -> Iterator[Step]:
    """Train with the penalty to a plateau, prune within the bound, and again, a ``Step`` a round.

    The procedure of both papers, on a copy. A round trains until the loss on ``valid`` has not
    fallen below its best for ``patience`` epochs, at most ``epochs``; puts the weights of the best
    epoch back; and applies :func:`prune_within` with that epoch's loss (so the bound of all rounds
    together is looser). It ends after ``rounds``, or when a round finds nothing to remove.

    ``method=None`` trains without a penalty: what is left is magnitude pruning at the same budget.
    ``sensitivity`` is that of :class:`serene`; ``biases`` and ``norms`` are shrunk (by LOBSTER) and
    pruned only where asked for. ``train`` holds further arguments of ``training.fit``, whose
    optimiser begins afresh each epoch. Each epoch's seed follows from ``seed``, round and epoch, so
    that a ``history`` with steps goes on as if never interrupted.

    ``Step.removed`` is the number of weights removed in the round; :func:`removed_neurons` of
    ``Step.model`` counts the neurons gone so far.

    Raises:
        ValueError: values out of range, or a history begun with other settings.
    """
    _check(strength, sensitivity, tolerance)
    if method not in ("lobster", "serene", None):
        raise ValueError(f'method must be "lobster", "serene" or None, got {method!r}')
    if any(type(n) is not int or n < 1 for n in (rounds, patience, epochs)):
        raise ValueError(f"{rounds=}, {patience=} and {epochs=} must be whole numbers, 1 or more")
    if own := {"epochs", "lr", "seed", "after_step"} & set(train or {}):
        raise ValueError(f"{min(own)!r} is set by the procedure; take it out of train")
    history = History() if history is None else history
    options: dict[str, Any] = {"progress": False, **(train or {}), "lr": lr}
    penalty = dict(method=method, strength=strength, sensitivity=sensitivity)
    limits = dict(tolerance=tolerance, patience=patience, epochs=epochs, biases=biases, norms=norms)
    history.bind(recipe="sensitivity", seed=seed, **penalty, **limits, **options)

    def penalty_of(work: nn.Module) -> Any:
        if method == "serene":
            return serene(work, strength, sensitivity=sensitivity)
        return nullcontext(lobster(strength, biases=biases, norms=norms) if method else None)

    def train_to_plateau(work: nn.Module, index: int) -> None:
        best, waited = math.inf, 0
        state: dict[str, Tensor] = {}
        for epoch in range(1, epochs + 1):
            options["seed"] = runs.derive(seed, index, epoch)
            with penalty_of(work) as after_step:
                (record,) = fit(work, data, epochs=1, after_step=after_step, **options)
            waited += 1
            if record.valid_loss < best or not state:
                best, waited = record.valid_loss, 0
                state = {name: tensor.clone() for name, tensor in work.state_dict().items()}
            if waited == patience:
                break
        work.load_state_dict(state)
        masks.refresh(work)

    def gone_in(work: nn.Module) -> int:
        return sum(int((~mask).sum()) for mask in masks.masks_of(work).values())

    work = history.latest(model)

    def run() -> Iterator[Step]:
        for index in range(len(history) + 1, rounds + 1):
            start = time.perf_counter()
            train_to_plateau(work, index)
            selected = prune_within(work, data, tolerance=tolerance, biases=biases, norms=norms)
            before = gone_in(work)
            masks.apply(work, selected)
            removed = gone_in(work) - before
            if not removed:
                return
            step = measured(index, removed, work, data, seconds=time.perf_counter() - start)
            history.append(step)
            yield step

    return run()


# --- what takes part ---------------------------------------------------------------------------


def _targets(model: nn.Module, *, biases: bool, norms: bool) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter that takes part, once, by name: its module and its name there."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    layers = structure.prunable(model)
    targets: dict[str, tuple[nn.Module, str]] = {}
    seen: set[int] = set()  # shared parameters take part once
    for prefix, module in model.named_modules():
        norm = norms and isinstance(module, kinds)
        wanted = {"weight": prefix in layers or norm, "bias": (prefix in layers and biases) or norm}
        for leaf in (leaf for leaf, takes_part in wanted.items() if takes_part):
            parameter = masks.original(module, leaf)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                targets[f"{prefix}.{leaf}" if prefix else leaf] = (module, leaf)
    return targets


def _layers_with_neurons(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions, whose weights have the neurons first."""
    transposed = nn.modules.conv._ConvTransposeNd
    return {n: m for n, m in structure.prunable(model).items() if not isinstance(m, transposed)}


def _shrink(module: nn.Module, leaf: str, share: Tensor) -> None:
    """Take ``share`` of each weight away, where it is neither masked nor frozen."""
    weight, mask = masks.original(module, leaf), module._buffers.get(f"{leaf}_mask")
    if weight.requires_grad:
        weight.addcmul_(weight, share if mask is None else share * mask, value=-1)


def _check(
    strength: float = 0, sensitivity: str = "full", tolerance: float = 0, resolution: float = 0
) -> None:
    for name, share in (("strength", strength), ("resolution", resolution)):
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share of the weights in [0, 1], got {share!r}")
    if sensitivity not in get_args(Kind):
        raise ValueError(f"the sensitivity must be one of {get_args(Kind)}, got {sensitivity!r}")
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite share of the loss, 0 or more: {tolerance!r}")
