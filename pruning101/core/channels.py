"""Coupled channels: what has to go together when an output channel of a layer goes.

Torch-Pruning's dependency graph finds the coupling (Fang et al. 2023, DepGraph, section 3); what
is done with it is ours.
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core.tracing import Example, is_mask, model_inputs, tensors_in, undisturbed


@dataclass(frozen=True, eq=False)
class Member:
    """One layer's part in a group of coupled channels.

    ``layer`` is the name of a module (of a parameter where ``role`` is ``"parameter"``), ``role``
    how it takes part: ``"out"`` (its output rows), ``"in"`` (its input columns), ``"norm"``,
    ``"depthwise"``, ``"attention"`` (an ``nn.MultiheadAttention``, both ends), ``"parameter"`` or
    ``"other"``.

    Position ``index[k]`` along the layer's axis belongs to the group's channel ``channel[k]``
    (int64 [k] both). They differ after a flatten, where each channel owns a run of columns, and
    after a concatenation. ``axis`` is that axis of the layer's weight (None for attention).
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
    root's output channels. ``producers`` make them (a residual stream has several), ``consumers``
    read them, ``others`` work on each of them alone (norms, depthwise convolutions...).
    """

    name: str
    channels: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    others: tuple[Member, ...]


def channel_groups(
    model: nn.Module, example: Example, *, layers: Iterable[str] | None = None
) -> list[ChannelGroup]:
    """Return the groups of coupled channels that may lose some, in order of definition.

    Each convolution or linear layer's outputs are in at most one group; groups that reach the
    output of the network are left out, and so are those that run through weights used outside their
    layer (Swin's attention in torchvision), where the coupling cannot be seen. ``layers``
    restricts the search to the groups of these layers. The model stays as it was.

    Raises ``ValueError`` for a masked model, an unknown layer, or a model that cannot be traced.
    """
    graph = _Graph(model, example)
    groups: list[ChannelGroup] = []
    seen: set[str] = set()
    for name in graph.roots if layers is None else [graph.root(layer) for layer in layers]:
        if name in seen or graph.obstacle(name):
            continue
        group = graph.group(name)
        seen |= {m.layer for m in (*group.producers, *group.others)}
        groups.append(group)
    return groups


def remove_channels(
    model: nn.Module, layer: str, units: Iterable[int] | Tensor, example: Example
) -> None:
    """Take output channels ``units`` of ``layer`` out, with all that depends on them, in place.

    Rows, biases, norms and the columns of every consumer go, through flattening, concatenation and
    residual additions (a channel of a residual stream goes in all the layers that make it). The
    network computes what it did with those channels set to zero, unless a norm over channels
    (``LayerNorm``) reads them. Parameters are new tensors afterwards: an optimiser made before
    still holds the old ones and must be made anew.

    Raises ``TypeError`` for units that are no whole numbers (a mask, say). Raises ``ValueError``,
    and changes nothing, for an unknown layer, units out of range or all of them, a layer that makes
    the output, a masked model (``masks.make_permanent`` first), or a model that cannot be traced or
    does not run with fewer channels.
    """
    graph = _Graph(model, example)
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
    obstacle = graph.obstacle(name)
    if obstacle:
        raise ValueError(obstacle)
    group = graph.raw_group(name, chosen)
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels:
            raise ValueError(
                f"{layer!r} feeds or is a grouped convolution ({graph.names[module]!r}), whose "
                "channels cannot go one by one; choose another layer."
            )
    _prune(model, layer, group, graph)


def _prune(model: nn.Module, layer: str, group: Any, graph: "_Graph") -> None:
    """Run the surgery; put everything back if the network does not run afterwards."""
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        group.prune(record_history=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        with undisturbed(model), torch.no_grad():
            shapes = [t.shape for t in tensors_in(model(*graph.inputs()))]
        if shapes != graph.output_shapes:
            raise RuntimeError(f"the output changes from {graph.output_shapes} to {shapes}")
    except Exception as error:
        for m, attributes, parameters, buffers in before:
            vars(m).clear()
            vars(m).update(attributes)
            m._parameters = parameters
            m._buffers = buffers
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Units of {layer!r} cannot be removed, the network would not run without them "
            f"({reason}); nothing was changed."
        ) from error


class _Graph:
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

        self.model, self._example = model, example
        self.names: dict[Any, str] = {m: n for n, m in model.named_modules()}
        self.graph = torch_pruning.DependencyGraph()
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        inputs = model_inputs(model, example)
        with undisturbed(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The graph is read off autograd: what is frozen would be invisible.
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            try:
                outputs: list[Any] = []

                def run(network: nn.Module, arguments: tuple[Any, ...]) -> Any:
                    outputs.append(network(*arguments))
                    return outputs[0]

                # Everything is passed anew: its default lists are kept from call to call.
                self.graph.build_dependency(
                    model,
                    inputs,
                    forward_fn=run,
                    unwrapped_parameters=[],
                    customized_pruners={},
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
        self.output_shapes = [t.shape for t in tensors_in(outputs[0])]
        self._nodes = self.graph.module2node
        self._blind = self._find_blind()
        # A depthwise convolution's channels are those of the layer before it.
        reached = {n: m for n, m in self._layers.items() if m in self._nodes}
        self.roots = [n for n, m in reached.items() if not _is_depthwise(m)]

    def inputs(self) -> tuple[Any, ...]:
        return model_inputs(self.model, self._example)

    def root(self, layer: str, *, swap_depthwise: bool = True) -> str:
        if layer not in self._layers:
            near = difflib.get_close_matches(layer, self._layers, n=3, cutoff=0.3)
            raise ValueError(
                f"There is no convolution or linear layer {layer!r}; the nearest are "
                f"{', '.join(map(repr, near or list(self._layers)[:3]))}."
            )
        if self._layers[layer] not in self._nodes:
            raise ValueError(
                f"{layer!r} is not on the way from input to output, or its weights are used "
                "outside of it; its channels cannot be followed."
            )
        if swap_depthwise and _is_depthwise(self._layers[layer]):
            out = self.graph.is_out_channel_pruning_fn
            reached = self._reach(layer).items()
            makers = [self.names.get(node.module, "") for node, handler in reached if out(handler)]
            return next((name for name in makers if name in self.roots), layer)
        return layer

    def channels(self, name: str) -> int:
        return int(self.graph.get_out_channels(self._layers[name]))

    def obstacle(self, name: str) -> str:
        """Say why the channels of ``name`` cannot go, or nothing."""
        for node, handler in self._reach(name).items():
            if node in self._blind:
                return (
                    f"The channels of {name!r} run through weights that are used outside their "
                    "layer, where the coupling cannot be followed; choose a layer inside a block."
                )
            if not node.outputs and self.graph.is_out_channel_pruning_fn(handler):
                return f"The units of {name!r} are the network's output, and must stay."
        return ""

    def raw_group(self, name: str, units: list[int]) -> Any:
        layer = self._layers[name]
        handler = self.graph.get_pruner_of_module(layer).prune_out_channels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.graph.get_pruning_group(layer, handler, units)

    def group(self, name: str) -> ChannelGroup:
        channels = self.channels(name)
        members = list(self._members(self.raw_group(name, list(range(channels)))))
        return ChannelGroup(
            name,
            channels,
            producers=tuple(m for m in members if m.role == "out"),
            consumers=tuple(m for m in members if m.role == "in"),
            others=tuple(m for m in members if m.role not in {"out", "in"}),
        )

    def _members(self, group: Any) -> Iterator[Member]:
        parameters = {id(p): n for n, p in self.model.named_parameters()}
        for item in group:
            node, module = item.dep.target, item.dep.target.module
            axis: int | None
            if isinstance(module, nn.Parameter):
                name, role, axis = parameters[id(module)], "parameter", int(node.pruning_dim)
            elif module in self.names:
                name = self.names[module]
                out = self.graph.is_out_channel_pruning_fn(item.dep.handler)
                role, axis = _part(module, out)
            else:
                continue  # an addition, a concatenation: nothing to cut there
            yield Member(
                name, role, torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs)), axis
            )

    def _reach(self, name: str) -> dict[Any, Any]:
        """Return the nodes that the channels of ``name`` reach, with the way they are reached."""
        layer = self._layers[name]
        start = self._nodes[layer]
        found = {start: self.graph.get_pruner_of_module(layer).prune_out_channels}
        waiting = [(start, found[start])]
        seen = set(waiting)
        while waiting:
            node, handler = waiting.pop()
            for dependency in node.dependencies:
                step = (dependency.target, dependency.handler)
                if dependency.is_triggered_by(handler) and step not in seen:
                    seen.add(step)
                    waiting.append(step)
                    found[dependency.target] = dependency.handler
        return found

    def _find_blind(self) -> set[Any]:
        """Return the nodes where weights of layers that never ran as modules are used."""
        inside = {
            m
            for attention in self.model.modules()
            if isinstance(attention, nn.MultiheadAttention)
            for m in attention.modules()
        }
        unseen = {
            id(p)
            for m in self._layers.values()
            if m not in self._nodes and m not in inside
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


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups == module.out_channels == module.in_channels > 1
    )


def _part(module: nn.Module, out: bool) -> tuple[str, int | None]:
    """Return the role of ``module`` in a group and the axis of its weight that is concerned."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention", None
    if _is_depthwise(module):
        return "depthwise", 0
    if isinstance(module, nn.Linear):
        return ("out", 0) if out else ("in", 1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("out", int(module.transposed)) if out else ("in", 1 - int(module.transposed))
    if isinstance(module, nn.Embedding):
        return "out", 1
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return ("norm" if isinstance(module, norms) else "other"), 0
