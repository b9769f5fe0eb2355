"""What depends on what: how the channels of one layer run through all the others.

Torch-Pruning's dependency graph finds the edges (Fang et al. 2023, DepGraph, section 3); following
the channels along them is ours.
"""

import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pruning101.core import surgery
from pruning101.core.attention import Heads, attention_layers, handed_on, one_layer
from pruning101.core.tracing import Example, is_mask, model_inputs, tensors_in, undisturbed


@dataclass(frozen=True, eq=False)
class Member:
    """One layer's part in a group of coupled channels.

    ``layer`` is the name of a module (of a parameter where ``role`` is ``"parameter"``), ``role``
    how it takes part: ``"out"`` (its output rows), ``"in"`` (its input columns), ``"norm"``,
    ``"depthwise"``, ``"heads"`` (attention, which counts its heads), ``"parameter"`` or
    ``"other"``. An ``nn.MultiheadAttention`` is read as two layers: its joint input projection
    under its own name, and its ``out_proj``.

    Position ``index[k]`` along the layer's axis belongs to the group's channel ``channel[k]``
    (int64 [k] both). They differ after a flatten, where each channel owns a run of columns, after a
    concatenation, and in attention, where a channel is a head with many rows. ``axis`` is that axis
    of the layer's weight (None for ``"heads"``).
    """

    layer: str
    role: str
    index: Tensor
    channel: Tensor
    axis: int | None


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be removed together, in every layer they run through.

    ``name`` is the layer at its root and ``channels`` how many there are: 0 .. channels - 1 are the
    root's output channels, or the heads of attention. ``producers`` make them (a residual stream
    has several), ``consumers`` read them, ``others`` work on each of them alone (norms, depthwise
    convolutions...).
    """

    name: str
    channels: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    others: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them: producers, consumers, others."""
        return (*self.producers, *self.consumers, *self.others)


class Fixed(Exception):
    """The channels of a layer have to stay, and why."""


class _Position(NamedTuple):
    """How Torch-Pruning's index mappings want a position and the channel it belongs to."""

    idx: int
    root_idx: int


_Part = tuple[Tensor, Tensor]  # positions and the channels they belong to, int64 [k] both


class Graph:
    """Torch-Pruning's graph of one model, with names for what it holds."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        for name, module in model.named_modules():
            for buffer in module._buffers:
                if is_mask(module, buffer):
                    raise ValueError(
                        f"{name!r} is masked, and masked layers cannot lose channels; call "
                        "masks.make_permanent first."
                    )
        import torch_pruning

        self.model = model
        self.names: dict[Any, str] = {m: n for n, m in model.named_modules()}
        self.heads = attention_layers(model)
        inside = {m for name in self.heads for m in model.get_submodule(name).modules()}
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        self._layers = {
            n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in inside
        }
        self.graph = torch_pruning.DependencyGraph()
        types = {type(model.get_submodule(name)) for name in self.heads}
        pruners = {kind: one_layer() for kind in types - {nn.MultiheadAttention}}
        inputs = model_inputs(model, example)
        with undisturbed(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The graph is read off autograd: what is frozen would be invisible.
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            outputs: list[Any] = []
            arrived: list[Tensor] = []

            def mark(tensor: Tensor) -> Tensor:
                """Make the network's input visible in the graph."""
                if not tensor.is_floating_point():
                    return tensor
                arrived.append(tensor.requires_grad_(True) * 1)
                return arrived[-1]

            def run(network: nn.Module, arguments: tuple[Any, ...]) -> Any:
                outputs.append(network(*tree_map_only(Tensor, mark, arguments)))
                return outputs[0]

            try:
                # Everything is passed anew: its default lists are kept from call to call.
                with handed_on(model, self.heads):
                    self.graph.build_dependency(
                        model,
                        inputs,
                        forward_fn=run,
                        unwrapped_parameters=[],
                        customized_pruners=pruners,
                        ignored_layers=[],
                        ignored_params=[],
                        verbose=False,
                    )
            except Exception as error:
                message = str(error).strip().splitlines() or [type(error).__name__]
                raise ValueError(
                    f"{type(model).__name__} cannot be traced for its coupled channels "
                    f"({message[0]}); check the example, or whether its output has a gradient."
                ) from error
        self.output_shapes = [t.shape for t in tensors_in(outputs)]
        self._nodes = self.graph.module2node
        self._arrived = [tensor.grad_fn for tensor in arrived]
        self._blind = self._find_blind()
        # A depthwise convolution's channels are those of the layer before it.
        self.roots = [
            name
            for module, name in self.names.items()
            if module in self._nodes
            and (name in self.heads or name in self._layers)
            and not surgery.is_depthwise(module)
        ]
        self.unreached = {
            n: "it is not on the way from input to output, or its weights are used outside of it"
            for n, m in self._layers.items()
            if m not in self._nodes
        }

    def root(self, layer: str, *, swap_depthwise: bool = True) -> str:
        """Return the layer whose group this layer's channels are in; raises for one unknown."""
        known = {**self._layers, **{n: self.model.get_submodule(n) for n in self.heads}}
        if layer not in known:
            for attention in self.heads:
                if layer.startswith(f"{attention}."):
                    raise ValueError(
                        f"{layer!r} is a part of attention, which loses its channels by heads; "
                        f"name the attention itself, {attention!r}."
                    )
            near = difflib.get_close_matches(layer, known, n=3, cutoff=0.3)
            raise ValueError(
                f"There is no convolution or linear layer {layer!r}; the nearest are "
                f"{', '.join(map(repr, near or list(known)[:3]))}."
            )
        if known[layer] not in self._nodes:
            raise ValueError(
                f"{layer!r} is not on the way from input to output, or its weights are used "
                "outside of it; its channels cannot be followed."
            )
        if swap_depthwise and surgery.is_depthwise(known[layer]):
            try:
                made = [m.layer for m in self.group(layer).producers if m.layer in self.roots]
            except Fixed:
                made = []
            return made[0] if made else layer
        return layer

    def channels(self, name: str) -> int:
        """Return how many output channels, or heads, a layer has."""
        if name in self.heads:
            return self.heads[name].number
        return int(self.graph.get_out_channels(self._layers[name]))

    def group(self, name: str) -> ChannelGroup:
        """Return the group at whose root ``name`` is; raises ``Fixed`` if it has to stay."""
        if name in self.heads:
            return _head_group(name, self.heads[name])
        members = [m for at, found in self._spread(name).items() for m in self._members(*at, found)]
        return ChannelGroup(
            name,
            self.channels(name),
            producers=tuple(m for m in members if m.role == "out"),
            consumers=tuple(m for m in members if m.role == "in"),
            others=tuple(m for m in members if m.role not in {"out", "in"}),
        )

    def _members(self, node: Any, handler: Any, found: _Part) -> Iterator[Member]:
        module = node.module
        if isinstance(module, nn.Parameter):
            name = self.graph._param_to_name[module]
            yield Member(name, "parameter", *found, int(node.pruning_dim))
            return
        name = self.names.get(module, "")
        if name in self.heads:  # reads the channels with one layer and makes them with another
            heads = self.heads[name]
            given = f"{name}.{heads.given}" if heads.given else name
            yield Member(f"{name}.{heads.mixed}", "out", *found, 0)
            yield Member(given, "in", *found, 1)
        elif module in self.names and self.graph.get_out_channels(node) is not None:
            role, axis = surgery.part(module, self.graph.is_out_channel_pruning_fn(handler))
            yield Member(name, role, *found, axis)

    def _spread(self, name: str) -> dict[tuple[Any, Any], _Part]:
        """Follow all the channels of a layer to wherever they are made or read.

        Torch-Pruning's own search keeps every list of positions that reaches a node, which may be
        endlessly many (Swin); here each node takes each position once.
        """
        layer = self._layers[name]
        channels = torch.arange(self.channels(name))
        handler = self.graph.get_pruner_of_module(layer).prune_out_channels
        parts: dict[tuple[Any, Any], _Part] = {}
        # The last entry: how wide the tensor is there, as far as that is known.
        waiting: list[Any] = [(self._nodes[layer], handler, (channels, channels), len(channels))]
        while waiting:
            node, handler, found, width = waiting.pop()
            width = self._check(node, handler, width)
            if width is not None and bool((found[0] >= width).any()):
                raise Fixed("on the way their positions are counted in a way that is not known")
            known = parts.get((node, handler))
            new = found if known is None else _unknown(found, known)
            if not len(new[0]):
                continue
            parts[node, handler] = new if known is None else _joined(known, new)
            for dependency in node.dependencies:
                if dependency.is_triggered_by(handler):
                    onwards = _mapped(dependency.index_mapping, new)
                    if len(onwards[0]):
                        at = width if onwards is new else None
                        waiting.append((dependency.target, dependency.handler, onwards, at))
        return parts

    def _check(self, node: Any, handler: Any, width: int | None) -> int | None:
        """Refuse what cannot be followed or changed; return the width of the tensor here."""
        out = self.graph.is_out_channel_pruning_fn(handler)
        if node in self._blind:
            raise Fixed(
                "they run through weights that are used outside their layer, where the coupling "
                "cannot be followed"
            )
        if not node.outputs and out:
            raise Fixed("they are the network's output")
        if any(node.grad_fn is arrival for arrival in self._arrived):
            raise Fixed("they meet the network's input")
        operation = type(node.grad_fn).__name__
        if isinstance(node.module, nn.Parameter):
            name, extent = self.graph._param_to_name[node.module], self.graph.get_out_channels(node)
        elif node.module in self.names:
            name = self.names[node.module]
            reason = "" if name in self.heads else surgery.why_not(node.module, name)
            if reason:
                raise Fixed(f"they are those {reason}")
            counts = self.graph.get_out_channels if out else self.graph.get_in_channels
            extent = counts(node)
        else:
            if operation.startswith(("Bmm", "ScaledDotProduct")):
                raise Fixed("they run into a product of activations (attention of a kind unknown)")
            return width
        if extent is not None and width is not None and extent != width:
            raise Fixed(
                f"on the way to {name!r} {width} of them become {extent}, in a way that cannot be "
                "followed"
            )
        return width if extent is None else int(extent)

    def _find_blind(self) -> set[Any]:
        """Return the nodes where weights of layers that never ran as modules are used."""
        unseen = {
            id(p)
            for m in self._layers.values()
            if m not in self._nodes
            for p in m.parameters(recurse=False)
        }
        blind = set()
        for node in self._nodes.values():
            for function, _ in getattr(node.grad_fn, "next_functions", ()):
                while function is not None and not hasattr(function, "variable"):
                    behind = function.next_functions
                    function = behind[0][0] if len(behind) == 1 else None  # a transpose, a view
                if function is not None and id(function.variable) in unseen:
                    blind.add(node)
        return blind


def _mapped(mappings: list[Any], found: _Part) -> _Part:
    if all(mapping is None for mapping in mappings):
        return found
    positions = [_Position(*pair) for pair in zip(*(x.tolist() for x in found), strict=True)]
    for mapping in mappings:
        positions = positions if mapping is None else mapping(positions)
    if any(p.root_idx is None for p in positions):
        raise Fixed("they are repeated for groups of heads")
    index = torch.tensor([p.idx for p in positions], dtype=torch.int64)
    channel = torch.tensor([p.root_idx for p in positions], dtype=torch.int64)
    # Nothing is known about the order of what the reverse of a flatten gives, several to one.
    empty = (index[:0], channel[:0])
    return _joined(empty, _unknown((index, channel), empty))


def _unknown(found: _Part, known: _Part) -> _Part:
    """Return those positions that are not known yet, each once."""
    if found is known or found[0] is known[0]:
        return found[0][:0], found[1][:0]
    index, channel = found
    owner = torch.full((max([-1, *(int(x.max()) for x in (index, known[0]) if len(x))]) + 1,), -1)
    owner[known[0]] = known[1]
    fresh = owner[index] < 0
    owner[index[fresh]] = channel[fresh]
    if not torch.equal(owner[index], channel):
        raise Fixed("several of them meet in one place, by a reshape or in attention")
    fresh = fresh.nonzero().squeeze(1)
    places = index[fresh].unique()
    return places, owner[places]


def _joined(known: _Part, new: _Part) -> _Part:
    return torch.cat([known[0], new[0]]), torch.cat([known[1], new[1]])


def _head_group(name: str, heads: Heads) -> ChannelGroup:
    rows = torch.arange(3 * heads.inner)
    columns = torch.arange(heads.inner)
    each = heads.inner // heads.number
    count = torch.arange(heads.number)
    given = f"{name}.{heads.given}" if heads.given else name
    return ChannelGroup(
        name,
        heads.number,
        producers=(Member(given, "out", rows, rows % heads.inner // each, 0),),
        consumers=(Member(f"{name}.{heads.mixed}", "in", columns, columns // each, 1),),
        others=(Member(name, "heads", count, count, None),),
    )
