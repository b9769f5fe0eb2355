"""Structured zeros made good: a smaller network of the same function, constants carried along."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_map_only

from pruning101.core import carried, constants, masks, surgery
from pruning101.core.attention import NarrowAttention
from pruning101.core.channels import (
    ChannelGroup,
    Member,
    coupling,
    member_weight,
    remove_from_groups,
)
from pruning101.core.structure import linear_chains
from pruning101.core.tracing import Example, model_inputs, tensors_in, undisturbed

_READERS = (
    *constants.LAYERS,
    NonDynamicallyQuantizableLinear,
    nn.MultiheadAttention,
    NarrowAttention,
)


@dataclass(frozen=True)
class Materialised:
    """What :func:`materialise` did.

    ``model`` is the smaller network; ``removed`` counts the outputs that each layer no longer
    computes; ``kept`` says for a layer (of the new network) why structured zeros are still there.
    """

    model: nn.Module
    removed: dict[str, int]
    kept: dict[str, str]


def materialise(
    model: nn.Module,
    example: Example,
    *,
    partial: Literal["keep", "scatter"] = "keep",
    inplace: bool = False,
) -> Materialised:
    """Turn the structured zeros of ``model`` into a smaller network of the same function.

    The same in ``eval`` mode, up to rounding, for inputs of any size that ``model`` takes. Masks
    are made permanent. A copy is changed, or with ``inplace`` the model itself.

    A channel is a constant where its layer has a row of zeros (its bias is left) or its norm a
    factor of 0; what only hears constants is a constant, too. It is followed through norms,
    activations, pooling, sums and concatenations, and whoever reads it gets its effect added to the
    bias instead. A convolution that pads with zeros, where the constant is cut off at the border,
    is wrapped in a :class:`~pruning101.core.carried.ConstantBorder`, as exact, which costs as much
    as one input channel. Channels that nobody reads any more are then taken out with all that makes
    them, and this repeats until nothing changes.

    A channel of a residual stream can only go if *everyone* who reads it can do without: it stays
    if one branch still writes to it. With ``partial="scatter"`` layers that keep rows of zeros
    compute only the others, and a :class:`~pruning101.core.carried.Scattered` puts these in their
    places: fewer parameters and multiplications, at the price of a copy (results/materialise.json:
    faster on ResNets, no faster on MobileNetV2), and of a network whose channels cannot be traced
    any more: let it be the last step. Channels that a norm over channels
    reads (the streams of ConvNeXt and ViT) always stay. ``kept`` says so, layer by layer.

    The number of parameters never grows. New parameters are new tensors: an optimiser made before
    still holds the old ones and must be made anew.

    Raises ``ValueError``, with ``model`` as it was, for an unknown ``partial``, a model that cannot
    be traced (see :func:`~pruning101.core.structure.channel_groups`), or one whose function would
    change, because something in it reads channels in a way that cannot be seen.
    """
    if partial not in ("keep", "scatter"):
        raise ValueError(f'partial must be "keep" or "scatter", not {partial!r}.')
    return shrink(model, example, borders=True, scatter=partial == "scatter", inplace=inplace)


def shrink(
    model: nn.Module, example: Example, *, borders: bool, scatter: bool, inplace: bool
) -> Materialised:
    """Do the work of :func:`materialise`; without ``borders`` no convolution is wrapped."""
    if not inplace:
        model = masks.clone(model)
    try:
        expected = _outputs(model, example)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{type(model).__name__} fails on the example: {reason}") from error
    removed: Counter[str] = Counter()
    try:
        with surgery.all_or_nothing(model):
            masks.make_permanent(model)
            _silence(model, example)
            kept = _remove_all(model, example, borders, removed)
            if scatter:
                _scatter(model, example, kept, removed)
            if removed:
                _compare(model, expected, _outputs(model, example))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run without its zeros ({error}); nothing was changed."
        ) from error
    texts: dict[str, str] = {}
    for (layer, _), text in kept.items():
        texts[layer] = f"{texts[layer]}; {text}" if layer in texts else text
    return Materialised(model, dict(removed), texts)


# --- what may go ---------------------------------------------------------------------------------

_Place = tuple[str, str]  # a layer, and a role in it or "rows" or "columns"


def _remove_all(
    model: nn.Module, example: Example, borders: bool, removed: Counter[str]
) -> dict[_Place, str]:
    """Take out what may go until nothing changes; say why the zeros that are left have to stay."""
    while any(bool(zero.any()) for *_, zero in _zeros(model)):
        inflow = constants.inflow(model, example)
        coupled = coupling(model, example)
        reasons: dict[_Place, dict[int, str]] = defaultdict(dict)
        cut: dict[_Place, list[int]] = defaultdict(list)
        folds: list[tuple[str, Tensor]] = []
        channels: dict[str, Tensor] = {}
        for group in reversed(coupled.groups):  # what goes does not read any more
            why = _why_not(model, group, inflow, cut, borders)
            gone = torch.tensor([not reason for reason in why])
            for member in group.members:
                side = "columns" if member.role == "in" else "rows"
                places = zip(member.index.tolist(), member.channel.tolist(), strict=True)
                reasons[member.layer, side].update({i: why[c] for i, c in places})
                positions = member.index[gone[member.channel]]
                cut[member.layer, member.role] += positions.tolist()
                if member.role == "in" and len(positions):
                    folds.append((member.layer, positions))
            if gone.any():
                channels[group.name] = gone.nonzero().flatten()
        if not channels:
            return _explained(model, reasons, coupled.fixed)
        kernels: dict[str, Tensor] = {}
        for layer, columns in folds:
            if layer in inflow:
                _fold(model, layer, columns, inflow[layer], cut[layer, "out"], kernels)
        for (layer, role), rows in cut.items():
            if role in ("out", "depthwise") and rows and not carried.is_border(model, layer):
                removed[carried.own_name(model, layer)] += len(rows)
        remove_from_groups(model, coupled, channels, example)
        for layer, kernel in kernels.items():
            carried.add_border(model, layer, _without(kernel, 0, cut[layer, "out"]))
    return {}


def _why_not(
    model: nn.Module,
    group: ChannelGroup,
    inflow: dict[str, Tensor],
    cut: dict[_Place, list[int]],
    borders: bool,
) -> list[str]:
    """Return for each channel of the group why it has to stay, or nothing."""
    hints = [""] * group.channels  # what made something of its constant
    shared = _shared(model)
    for member in group.members:
        if member.role != "heads" and id(member_weight(model, member)) in shared:
            return [f"{member.layer!r} shares its weights with another layer"] * group.channels
    for member in group.others:
        if member.role == "parameter":
            continue
        module: Any = model.get_submodule(member.layer)
        if not (
            member.role in ("depthwise", "heads") or isinstance(module, (constants.NORMS, nn.PReLU))
        ):
            return [f"{member.layer!r} reads all channels together"] * group.channels
        if member.role == "depthwise" and constants.cut_off(module):
            value = _reaching(inflow, member)
            used = _used(module.weight, 0)[member.index] & ~value.isnan()
            _note(hints, member.channel[used & (value != 0)], _border(model, member))
    for member in sorted(group.producers, key=lambda m: carried.is_border(model, m.layer)):
        if len(group.producers) > 1:
            written = _used(member_weight(model, member), member.axis)[member.index]
            makes = f"{carried.own_name(model, member.layer)!r} makes them, too"
            border = carried.is_border(model, member.layer)
            _note(hints, member.channel[written], _border(model, member) if border else makes)

    why = [""] * group.channels
    folding = torch.zeros(group.channels, dtype=torch.bool)
    for member in group.consumers:
        module = model.get_submodule(member.layer)
        if type(module) not in _READERS:
            return [f"how {member.layer!r} reads them is not known"] * group.channels
        weight = member_weight(model, member)
        weight = _without(weight, 1 - cast(int, member.axis), cut[member.layer, "out"])
        used = _used(weight, member.axis)[member.index]
        value = _reaching(inflow, member)
        folding[member.channel[used]] = True
        reads = (
            f"{carried.own_name(model, member.layer)!r} reads them, and there they are no constants"
        )
        for channel in member.channel[used & value.isnan()].tolist():
            why[channel] = why[channel] or hints[channel] or reads
        wrappable = borders and type(module) in constants.CONVOLUTIONS
        if constants.cut_off(module) and not wrappable:
            _note(why, member.channel[used & (value != 0)], _border(model, member))
    if not any(why):
        spared = int(folding.int().argmin())  # if possible one whose removal needs no folding
        why[spared] = "a layer needs a unit"
    return why


def _note(reasons: list[str], channels: Tensor, reason: str) -> None:
    for channel in channels.tolist():
        reasons[channel] = reasons[channel] or reason


def _border(model: nn.Module, reader: Member) -> str:
    name = carried.own_name(model, reader.layer)
    return f"they are constants that zero padding cuts off at the border of {name!r}"


def _reaching(inflow: dict[str, Tensor], reader: Member) -> Tensor:
    """Return the constants that reach the positions of ``reader``, NaN where there are none."""
    if reader.layer not in inflow:
        return torch.full(reader.index.shape, torch.nan)
    return inflow[reader.layer].cpu()[reader.index]


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several layers have in common."""
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {i for i, times in count.items() if times > 1}


def _used(weight: Tensor, axis: int | None) -> Tensor:
    """Return along ``axis`` where anything is not zero, on the CPU."""
    nonzero = (weight != 0).movedim(cast(int, axis), 0)
    return nonzero.reshape(len(nonzero), -1).any(1).cpu()


def _without(x: Tensor, axis: int, positions: list[int]) -> Tensor:
    if not positions:
        return x
    keep = torch.ones(x.shape[axis], dtype=torch.bool)
    keep[positions] = False
    return x.index_select(axis, keep.nonzero().flatten().to(x.device))


# --- surgery -------------------------------------------------------------------------------------


@torch.no_grad()
def _silence(model: nn.Module, example: Example) -> None:
    """Set rows to zero whose outputs only a norm with factor 0 reads."""
    zero = {name for name, _, zero in _zeros(model) if zero.any()}
    norms = {n for n in zero if isinstance(model.get_submodule(n), constants.NORMS)}
    for chain in linear_chains(model, example) if norms else ():
        for layer, norm in itertools.pairwise(chain):
            maker: Any = model.get_submodule(layer)
            if norm in norms and type(maker) in constants.LAYERS:
                axis = int(isinstance(maker, constants.TRANSPOSED))
                kept = _used(cast(Any, model.get_submodule(norm)).weight, 0).to(maker.weight)
                shape = [-1 if i == axis else 1 for i in range(maker.weight.dim())]
                silenced = maker.weight * kept.view(shape)
                maker.weight = nn.Parameter(silenced, maker.weight.requires_grad)


@torch.no_grad()
def _fold(
    model: nn.Module,
    name: str,
    columns: Tensor,
    inflow: Tensor,
    ignored: list[int],
    kernels: dict[str, Tensor],
) -> None:
    """Add what constants in ``columns`` do to the bias, or at a border to ``kernels``."""
    layer: Any = model.get_submodule(name)
    values = inflow.cpu()[columns].double().nan_to_num(0)  # what is no constant is not read
    if not values.any():
        return
    read = layer.weight.index_select(1, columns.to(layer.weight.device)).cpu().double()
    kernel = torch.tensordot(read.movedim(1, -1), values, 1).unsqueeze(1)  # [out, 1, ...]
    kernel[ignored] = 0
    if not kernel.any():
        return
    if constants.cut_off(layer):
        kernels[name] = kernel + kernels.get(name, torch.zeros(()))
        return
    bias = 0 if layer.bias is None else layer.bias.cpu().double()
    shifted = (bias + kernel.flatten(1).sum(1)).to(layer.weight)
    layer.bias = nn.Parameter(shifted, layer.weight.requires_grad)


@torch.no_grad()
def _scatter(
    model: nn.Module, example: Example, kept: dict[_Place, str], removed: Counter[str]
) -> None:
    """Let layers with rows of zeros compute the others only."""
    called = constants.inflow(model, example)
    for name, layer in list(model.named_modules()):
        plain = type(layer) in (nn.Linear, *constants.CONVOLUTIONS)
        own = carried.own_name(model, name)
        if plain and name in called and (own, "rows") in kept and getattr(layer, "groups", 1) == 1:
            computed = _used(cast(Tensor, layer.weight), 0)
            del kept[own, "rows"]
            if not computed.any():
                computed[0] = True
                kept[own, "rows"] = "1 without inputs: a layer needs a unit"
            carried.scatter(model, name, computed)
            removed[own] += int((~computed).sum())


# --- what is left --------------------------------------------------------------------------------


def _zeros(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield where each layer has "rows" (outputs, norm factors) or "columns" of nothing but 0."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if carried.is_border(model, name) or weight is None:
            continue
        if isinstance(module, constants.NORMS):
            yield name, "rows", ~_used(weight, 0)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            transposed = isinstance(module, constants.TRANSPOSED)
            yield name, "rows", ~_used(weight, int(transposed))
            if getattr(module, "groups", 1) == 1:
                yield name, "columns", ~_used(weight, 1 - int(transposed))


def _explained(
    model: nn.Module, reasons: dict[_Place, dict[int, str]], fixed: dict[str, str]
) -> dict[_Place, str]:
    texts: dict[_Place, str] = {}
    for name, side, zero in _zeros(model):
        other = "they are not made by channels that could go"
        if side == "rows":
            other = fixed.get(name, "their way through the network cannot be followed")
        known = reasons.get((name, side), {})
        count = Counter(known.get(i, other) for i in zero.nonzero().flatten().tolist())
        if count:
            what = "without inputs" if side == "rows" else "unread inputs"
            texts[carried.own_name(model, name), side] = "; ".join(
                f"{n} {what}: {r}" for r, n in count.items()
            )
    return texts


# --- the same function ---------------------------------------------------------------------------


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Return what the model gives for the example and a little noise."""
    generator = torch.Generator().manual_seed(0)

    def disturbed(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.flip(-1) if x.dim() else x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        return x + noise.to(x)

    with undisturbed(model), torch.no_grad():
        return tensors_in(model(*tree_map_only(Tensor, disturbed, model_inputs(model, example))))


def _compare(model: nn.Module, expected: list[Tensor], actual: list[Tensor]) -> None:
    for before, after in zip(expected, actual, strict=True):
        if not before.is_floating_point():
            continue
        before, after = before.nan_to_num(), after.nan_to_num()
        scale, change = float(before.abs().max()), float((before - after).abs().max())
        if not change <= torch.finfo(before.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"{type(model).__name__} would compute something else without its zeros (outputs "
                f"of up to {scale:.1g} change by {change:.1g}): something in it reads channels in "
                "a way that cannot be seen; nothing was changed."
            )
