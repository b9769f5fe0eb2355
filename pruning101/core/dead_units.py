"""Units that lost all inputs or all outputs: taken out, their constants folded onwards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning101.core import masks, structure
from pruning101.core.measure import Example, model_inputs, undisturbed


@dataclass(frozen=True)
class DeadUnits:
    """What :func:`remove_dead_units` did.

    ``model`` is the smaller network; ``removed`` counts the units taken out of each layer; ``kept``
    says for a layer why units without inputs had to stay.
    """

    model: nn.Module
    removed: dict[str, int]
    kept: dict[str, str]


@dataclass(frozen=True)
class _Span:
    """A layer, the modules that treat each of its units by itself, and the one that mixes them."""

    producer: str
    output: torch.Size  # of the producer
    between: tuple[tuple[str, int], ...]  # names, and the dimensions of what goes in
    consumer: str


def remove_dead_units(model: nn.Module, example: Example, *, inplace: bool = True) -> DeadUnits:
    """Take units without inputs or without outputs out of ``model`` in place, masks made permanent.

    The result is a smaller dense network that computes the same in ``eval`` mode, for inputs of the
    size of ``example``. A unit without outgoing weights just goes. A unit without incoming ones
    still emits ``act(bias)``, after whatever norm and pooling follow: this constant, times the
    outgoing weights, is added to the next layer's bias. Where the next layer is a convolution that
    pads with zeros, a constant other than 0 is cut off at the border, no bias can say that, and the
    unit stays. This repeats until nothing changes: a unit may lose its last input with another
    unit. Looked at are layers whose output one other layer uses, with activations, norms over the
    batch, pooling, flattening and depthwise convolutions between; coupled ones (at a residual sum)
    and the network's outputs stay. ``inplace=False`` works on a copy.

    The paper (section 3.5) leaves this to retraining with regularisation, and does not mention
    what a dead unit's bias still emits.
    """
    if not inplace:
        model = masks.clone(model)
    masks.make_permanent(model)
    spans = _spans(model, example)
    removed: dict[str, int] = {}
    kept: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for span in spans:
            dead, reason = _fold_dead(model, span)
            kept.pop(span.producer, None)
            if reason:
                kept[span.producer] = reason
            if dead:
                structure.remove_channels(model, span.producer, dead, example)
                removed[span.producer] = removed.get(span.producer, 0) + len(dead)
                changed = True
    return DeadUnits(model, removed, kept)


@torch.no_grad()
def _fold_dead(model: nn.Module, span: _Span) -> tuple[list[int], str]:
    """Fold constants onwards; return the dead units that may go, and why others stay."""
    producer, consumer = (cast(Any, model.get_submodule(n)) for n in (span.producer, span.consumer))
    units = producer.weight.shape[0]
    outgoing = consumer.weight.reshape(consumer.weight.shape[0], units, -1)  # [out, units, each]
    no_input = (producer.weight == 0).flatten(1).all(1)
    no_output = (outgoing == 0).all(2).all(0)
    gone = no_output.nonzero().flatten().tolist()
    constant = (no_input & ~no_output).nonzero().flatten().tolist()
    if constant:
        emitted = _emission(model, span)
    border = 0
    foldable: list[tuple[int, Tensor]] = []
    for unit in constant:
        reached = _contribution(consumer, emitted, unit, units)  # [out, positions]
        first = reached[:, :1]
        rounding = 100 * torch.finfo(reached.dtype).eps * reached.abs().max()
        if bool((reached - first).abs().max() <= rounding):
            foldable.append((unit, first[:, 0]))
        else:
            border += 1
    reasons = []
    if border:
        reasons.append(
            f"{border} without inputs emit a constant that zero padding cuts off at the border"
        )
    if len(gone) + len(foldable) == units:
        # A layer keeps at least one unit, if possible one whose removal would need no folding.
        (gone if gone else foldable).pop()
        reasons.append("one stays because a layer needs a unit")
    for _, shift in foldable:
        if consumer.bias is None:
            consumer.bias = nn.Parameter(torch.zeros_like(shift))
        consumer.bias += shift
    return sorted([*gone, *(unit for unit, _ in foldable)]), "; ".join(reasons)


def _emission(model: nn.Module, span: _Span) -> Tensor:
    """What reaches the consumer if every unit of the producer emits its bias everywhere."""
    producer = cast(Any, model.get_submodule(span.producer))
    units = producer.weight.shape[0]
    bias = producer.weight.new_zeros(units) if producer.bias is None else producer.bias
    if isinstance(producer, nn.Linear):
        values = bias.expand(1, *span.output[1:-1], units)
    else:
        places = span.output[2:]
        values = bias.view(1, units, *[1] * len(places)).expand(1, units, *places)
    values = values.clone()  # an activation may work in place
    with undisturbed(model):
        for name, dimensions in span.between:
            # a function that flattens may stand between two modules
            values = values if values.dim() == dimensions else values.flatten(1)
            values = model.get_submodule(name)(values)
    return values


def _contribution(consumer: Any, emitted: Tensor, unit: int, units: int) -> Tensor:
    """What one unit adds to each output of the consumer, at each position: [out, positions]."""
    if isinstance(consumer, nn.Linear):
        each = consumer.in_features // units
        columns = slice(unit * each, (unit + 1) * each)
        if each > 1 or emitted.shape[-1] != consumer.in_features:
            emitted = emitted.flatten(1)
        added = emitted[..., columns] @ consumer.weight[:, columns].T  # [1, ..., out]
        return added.flatten(0, -2).T
    here = slice(unit, unit + 1)
    added = consumer._conv_forward(emitted[:, here], consumer.weight[:, here], None)
    return added[0].flatten(1)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


def _spans(model: nn.Module, example: Example) -> list[_Span]:
    """Every layer with the one layer that reads its units, in execution order."""
    chains = structure.linear_chains(model, example, shared=True)
    shapes = _shapes(model, example, {name for chain in chains for name in chain})
    spans = []
    for chain in chains:
        modules = [model.get_submodule(name) for name in chain]
        for i, producer in enumerate(modules):
            if not _makes_units(producer):
                continue
            output = shapes[chain[i]][1]
            images = not isinstance(producer, nn.Linear)
            units = output[1] if images else output[-1]
            for j in range(i + 1, len(modules)):
                dimensions = len(shapes[chain[j]][0])
                if _mixes_units(modules[j], units, images, dimensions):
                    between = tuple((name, len(shapes[name][0])) for name in chain[i + 1 : j])
                    spans.append(_Span(chain[i], output, between, chain[j]))
                if not _acts_per_unit(modules[j], units, images, dimensions):
                    break
    return spans


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _CONVOLUTIONS)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def _makes_units(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, _CONVOLUTIONS) and (module.groups == 1 or _is_depthwise(module))
    )


def _mixes_units(module: nn.Module, units: int, images: bool, dimensions: int) -> bool:
    """Whether ``module`` is a layer that reads the units, at an input of so many ``dimensions``."""
    if isinstance(module, nn.Linear):
        return dimensions == 2 if images else module.in_features == units
    return images and isinstance(module, _CONVOLUTIONS) and module.groups == 1


def _acts_per_unit(module: nn.Module, units: int, images: bool, dimensions: int) -> bool:
    """Whether ``module`` in ``eval`` mode computes each unit's output from that unit alone."""
    second = images or dimensions == 2  # units are the second dimension, not the last of many
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1 or (second and module.num_parameters == units)
    if structure.activations(nn.Sequential(module)):
        return True
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return second and module.num_features == units and module.running_mean is not None
    if isinstance(module, nn.Flatten):
        return second and module.start_dim == 1 and module.end_dim in (-1, dimensions - 1)
    return images and (isinstance(module, _POOLS) or _is_depthwise(module))


def _shapes(
    model: nn.Module, example: Example, names: set[str]
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of what goes into and comes out of each module, by name."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                shapes[name] = inputs[0].shape, output.shape
            else:  # no layer of ours: nothing that acts on units or mixes them
                shapes[name] = torch.Size(), torch.Size()

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(remember(n)) for n in sorted(names)]
    try:
        with undisturbed(model), torch.no_grad():
            model(*model_inputs(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes
