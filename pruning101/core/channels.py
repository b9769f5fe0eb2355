"""Coupled channels: the groups that a model has, and how channels are taken out of it."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from pruning101.core import surgery
from pruning101.core.attention import NarrowAttention
from pruning101.core.dependencies import ChannelGroup as ChannelGroup
from pruning101.core.dependencies import Fixed, Graph
from pruning101.core.dependencies import Member as Member
from pruning101.core.tracing import Example, model_inputs, tensors_in, undisturbed


@dataclass(frozen=True, eq=False)
class Coupling:
    """What :func:`coupling` found in a model.

    ``groups`` may lose channels; ``fixed`` says for each layer in none of them why its channels
    must stay; ``output_shapes`` are those of the network for the example, and must stay, too.
    ``unreached`` are layers that did not run, be it that they run in training only.
    """

    groups: list[ChannelGroup]
    fixed: dict[str, str]
    output_shapes: list[torch.Size]
    unreached: tuple[str, ...]


def channel_groups(
    model: nn.Module, example: Example, *, layers: Iterable[str] | None = None
) -> list[ChannelGroup]:
    """Return the groups of coupled channels that may lose some, in order of definition.

    Each convolution or linear layer's outputs are in at most one group. The heads of attention
    (``nn.MultiheadAttention`` and the ``qkv``/``proj`` kind of our and timm's ViT) are groups named
    after the attention layer. ``layers`` restricts the search to the groups of these layers. The
    model stays as it was.

    Left out are groups that reach the output of the network, and those whose coupling cannot be
    followed: through weights used outside their layer (Swin's attention in torchvision), products
    of activations (attention of other kinds), grouped convolutions, or reshapes that mix channels.
    :func:`~core.channels.coupling` says which and why.

    Raises ``ValueError`` for a masked model, an unknown layer, or a model that cannot be traced.
    """
    return coupling(model, example, layers=layers).groups


def coupling(
    model: nn.Module, example: Example, *, layers: Iterable[str] | None = None
) -> Coupling:
    """Return the groups as :func:`channel_groups` does, with the reasons of what is left out."""
    graph = Graph(model, example)
    names = graph.roots if layers is None else [graph.root(layer) for layer in layers]
    fixed = dict(graph.unreached) if layers is None else {}
    found = Coupling([], fixed, graph.output_shapes, tuple(graph.unreached))
    seen: set[str] = set()
    for name in names:
        if name in seen:
            continue
        try:
            group = graph.group(name)
        except Fixed as reason:
            found.fixed[name] = str(reason)
            continue
        seen |= {m.layer for m in (*group.producers, *group.others)} | {name}
        found.groups.append(group)
    return found


def remove_channels(
    model: nn.Module, layer: str, units: Iterable[int] | Tensor, example: Example
) -> None:
    """Take output channels ``units`` of ``layer`` out, with all that depends on them, in place.

    Rows, biases, norms and the columns of every consumer go, through flattening, concatenation and
    residual additions (a channel of a residual stream goes in all the layers that make it). Of
    attention, named itself, ``units`` are heads. The network computes what it did with those
    channels set to zero, unless a norm over channels (``LayerNorm``) reads them.

    An ``nn.MultiheadAttention`` that loses heads or embedding becomes an
    ``attention.NarrowAttention``, with the same parameter names. Parameters are new tensors
    afterwards (gradients are cut along): an optimiser made before still holds the old ones and must
    be made anew, hooks on them are gone, and hooks on modules see smaller tensors.

    Raises ``TypeError`` for units that are no whole numbers (a mask, say). Raises ``ValueError``,
    and changes nothing, for an unknown layer, units out of range or all of them, a layer that makes
    the output, a masked model (``masks.make_permanent`` first), or a model that cannot be traced or
    does not run with fewer channels.
    """
    graph = Graph(model, example)
    name = graph.root(layer, swap_depthwise=False)
    given = [u.item() if isinstance(u, Tensor) else u for u in units]
    if not all(isinstance(u, Integral) and not isinstance(u, bool) for u in given):
        raise TypeError(
            f"units must be the positions of units of {layer!r}, as [0, 3], not {units}."
        )
    chosen = sorted({int(u) for u in given})
    channels = graph.channels(name)
    wrong = [u for u in chosen if not 0 <= u < channels]
    if wrong:
        raise ValueError(f"{layer!r} has units 0 to {channels - 1}, got {wrong[0]}.")
    if not chosen:
        return
    if len(chosen) == channels:
        raise ValueError(f"All {channels} units of {layer!r} would go; leave at least one.")
    try:
        group = graph.group(name)
    except Fixed as reason:
        raise ValueError(f"The units of {layer!r} cannot go: {reason}.") from None
    found = Coupling([group], {}, graph.output_shapes, tuple(graph.unreached))
    remove_from_groups(model, found, {name: torch.tensor(chosen)}, example)


@torch.no_grad()
def remove_from_groups(
    model: nn.Module, found: Coupling, channels: dict[str, Tensor], example: Example
) -> None:
    """Take channels (int64) out of several groups, by the groups' names, all at once, in place.

    As :func:`remove_channels`, for what :func:`coupling` found in this model as it is now. Raises
    ``ValueError`` if the network does not run afterwards, and changes nothing then.
    """
    concerned = [g for g in found.groups if len(channels.get(g.name, ()))]
    trains = bool(found.unreached) and _runs_in_training(model, example)
    try:
        with surgery.all_or_nothing(model):
            gone: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
            axes: dict[tuple[str, str], int | None] = {}
            for group in concerned:
                going = torch.zeros(group.channels, dtype=torch.bool)
                going[channels[group.name]] = True
                for member in group.members:
                    gone[member.layer, member.role].append(member.index[going[member.channel]])
                    axes[member.layer, member.role] = member.axis
            # The number of heads first: the layers that hold them are what it is read off.
            for layer, role in sorted(gone, key=lambda part: part[1] != "heads"):
                _cut(model, layer, role, axes[layer, role], torch.cat(gone[layer, role]))
            for group in concerned:
                _follow_width(model, group, group.channels - len(channels[group.name]))
            with undisturbed(model), torch.no_grad():
                shapes = [t.shape for t in tensors_in(model(*model_inputs(model, example)))]
            if shapes != found.output_shapes:
                raise RuntimeError(f"the output changes from {found.output_shapes} to {shapes}")
            if trains and not _runs_in_training(model, example):
                raise RuntimeError(
                    f"in training, where {', '.join(found.unreached)} read them; "
                    "take these out first"
                )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        one = len(concerned) == 1
        which = repr(concerned[0].name) if one else f"{len(concerned)} groups"
        hint = "" if one else "; restrict the layers to find out where"
        raise ValueError(
            f"Units of {which} cannot be removed, the network would not run without them "
            f"({reason}); nothing was changed{hint}."
        ) from error


def _runs_in_training(model: nn.Module, example: Example) -> bool:
    with undisturbed(model), torch.no_grad():
        model.train()
        try:
            model(*model_inputs(model, example))
        except Exception:
            return False
    return True


def member_weight(model: nn.Module, member: Member) -> Tensor:
    """Return the tensor that a member has its part in; ``index`` runs along its ``axis``."""
    if member.role == "parameter":
        return model.get_parameter(member.layer)
    return surgery.weight_of(model.get_submodule(member.layer))


def _cut(model: nn.Module, layer: str, role: str, axis: int | None, positions: Tensor) -> None:
    owner, _, leaf = layer.rpartition(".")
    if role == "parameter":
        module = model.get_submodule(owner)
        size = module._parameters[leaf].shape[axis]  # type: ignore[union-attr,index]
        surgery.select(module, leaf, axis, _others(size, positions))
        return
    module = model.get_submodule(layer)
    if isinstance(module, nn.MultiheadAttention):
        module = NarrowAttention.like(module)
        setattr(model.get_submodule(owner), leaf, module)
    surgery.keep_only(module, role, _others(surgery.extent(module, role, axis), positions))


def _others(size: int, positions: Tensor) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[positions] = False
    return keep.nonzero().squeeze(1)


# Where the modules around a stream note its width (torchvision's and timm's transformers).
_WIDTHS = ("hidden_dim", "embed_dim", "num_features", "head_hidden_size")


def _follow_width(model: nn.Module, group: ChannelGroup, width: int) -> None:
    if any(member.role == "heads" for member in group.others):
        return
    for member in (*group.producers, *group.others):
        module = model.get_submodule(member.layer.rpartition(".")[0])
        for name in _WIDTHS:
            if vars(module).get(name) == group.channels:
                setattr(module, name, width)
