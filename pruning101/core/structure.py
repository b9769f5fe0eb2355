"""What a network is made of: its layers, its chains, its residual blocks, its coupled channels."""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pruning101.core.blocks import (
    PassThrough,
    removable_blocks,
    remove_block,
    why_not_removable,
)
from pruning101.core.channels import ChannelGroup, Member, channel_groups, remove_channels
from pruning101.core.tracing import Example, Tracer, hooked, model_inputs, tensors_in, undisturbed

__all__ = [
    "ChannelGroup",
    "Member",
    "PassThrough",
    "activations",
    "channel_groups",
    "linear_chains",
    "prunable",
    "removable_blocks",
    "remove_block",
    "remove_channels",
    "why_not_removable",
]

_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.RReLU,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose ``weight`` may be pruned: convolutions and linear layers, by name.

    In order of definition; transposed convolutions, masked layers and those inside attention are
    among them (the joint input projection of ``nn.MultiheadAttention`` is a bare parameter, no
    layer). A model that is itself such a layer has the name ``""``.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the elementwise non-linearities that are modules (ReLU, GELU, PReLU...), by name.

    In order of definition. Functions called in ``forward`` are no modules and cannot be found so;
    softmax and gates, which mix several units, are not elementwise.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, _ACTIVATIONS)}


# --- chains -----------------------------------------------------------------------------------


def linear_chains(model: nn.Module, example: Example, *, shared: bool = False) -> list[list[str]]:
    """Return the maximal runs of leaf modules that simply follow one another, found by running.

    In a run each module is the only consumer of the output of the one before it, takes nothing
    else, and is called once: what may be merged, folded or dropped without touching anything
    outside. Every leaf module (layer, activation, norm, pooling, dropout, flatten...) that is
    called exactly once is in exactly one run; runs are in execution order.

    A function called between two modules (``torch.relu``, ``+``, a pooling) ends the run, but for a
    view that leaves the features as they are or flattens those of each input (``torch.flatten``).
    The network's output counts as a consumer. With ``shared``, a module without parameters and
    buffers that is called several times (torchvision's residual blocks use one ReLU twice) is in
    the run of each of its calls: such a run may be read, but not changed. The model stays as it
    was.
    """
    trace = calls(model, example)
    leaves = trace.leaves
    taking_part = [
        call
        for name, calls in trace.calls.items()
        for call in calls
        if len(calls) == 1 or (shared and not leaves[name].state_dict())
    ]
    taking_part.sort(key=lambda call: call.order)
    chains: list[list[str]] = []
    at_end: dict[Call, list[str]] = {}  # the chain that a call is the last of
    for call in taking_part:
        before = trace.origin.get(call.input[0]) if call.input is not None else None
        joined = (
            before is not None
            and before in at_end
            and trace.consumers[before] == {call}
            and trace.sources[call] == {before}
            and before.output is not None
            and call.input is not None
            and same_features(before.output, call.input)
        )
        chain = at_end.pop(before) if joined and before is not None else []
        if not joined:
            chains.append(chain)
        chain.append(call.name)
        at_end[call] = chain
    return chains


def calls(model: nn.Module, example: Example) -> "CallTrace":
    """Run ``model`` once and return who was called, and who reads whose output."""
    inputs = model_inputs(model, example)
    leaves = {
        name: module
        for name, module in model.named_modules()
        if all(child == "parametrizations" for child in dict(module.named_children()))
    }
    with undisturbed(model), torch.no_grad():
        trace = CallTrace(model, inputs, leaves)
        with trace, trace.watching():
            trace.read(model(*inputs), "output")
    return trace


@dataclass(eq=False)
class Call:
    """One run of a leaf module, or of a function outside every leaf."""

    name: str
    order: int
    input: tuple[Any, ...] | None = None  # key and shape of the only tensor in, if there is one
    output: tuple[Any, ...] | None = None


def same_features(given: tuple[Any, ...], taken: tuple[Any, ...]) -> bool:
    """Tell whether what was given is taken as it is, or with the features of each input flat."""
    (key, shape), (taken_key, taken_shape) = given, taken
    flat = (shape[0], math.prod(shape[1:])) if len(shape) else ()
    return bool(key == taken_key and taken_shape in (shape, flat))


class CallTrace(Tracer):
    """Note who made each value (``origin``) and who reads it (``consumers``, ``sources``).

    ``calls`` holds the runs of each leaf module, by name; keys of values are those of ``Tracer``.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Any, ...], leaves: dict[str, nn.Module]
    ) -> None:
        super().__init__(model, inputs)
        self.leaves = leaves
        self.calls: dict[str, list[Call]] = {}
        self.origin: dict[Any, Call] = {}  # by key
        self.consumers: dict[Call, set[Call]] = defaultdict(set)
        self.sources: dict[Call, set[Call]] = defaultdict(set)
        self._makers: dict[int, Call] = {}  # by version
        self._running: list[Call] = []
        self._count = 0

    def read(self, tree: Any, reader: Call | str) -> None:
        """Note that ``reader`` takes the tensors in ``tree``."""
        reader = self._new(reader) if isinstance(reader, str) else reader
        for tensor in self.features(tree):
            maker = self._maker(tensor)
            if maker is not None and maker is not reader:
                self.consumers[maker].add(reader)
                self.sources[reader].add(maker)

    def _maker(self, tensor: Tensor) -> Call | None:
        value = self.value(tensor)
        return None if value is None else self._makers.get(value.version)

    def _new(self, name: str) -> Call:
        self._count += 1
        return Call(name, self._count)

    def operation(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], made: list[Tensor]
    ) -> None:
        call = self._running[-1] if self._running else self._new(f"function {name}")
        self.read(inputs, call)
        super().operation(name, args, inputs, made)
        self._write(made, call)

    def _write(self, made: list[Tensor], call: Call) -> None:
        for tensor in self.features(made):
            value = self.value(tensor)
            assert value is not None
            self._makers[value.version] = call
            self.origin[self.key(tensor)] = call

    def _only(self, tree: Any) -> tuple[Any, ...] | None:
        tensors = tensors_in(tree)
        if len(tensors) != 1 or not self.features(tensors):
            return None
        return self.key(tensors[0]), tuple(tensors[0].shape)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take note of every call of a leaf module inside the block."""

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                call = self._new(name)
                self.calls.setdefault(name, []).append(call)
                call.input = self._only((args, kwargs))
                self.read((args, kwargs), call)
                self._running.append(call)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            call = self._running.pop()

            def own(tensor: Tensor) -> Tensor:
                # A module that hands on what it got (dropout, identity, flatten) gives a copy
                # here, so that its output can be told from its input.
                if not self.features(tensor) or self._maker(tensor) is call:
                    return tensor
                value = self.value(tensor)
                assert value is not None
                self.paused = True
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                self.paused = False
                self.put(tensor, value.depth, value.pooled)
                self._write([tensor], call)
                return tensor

            output = tree_map_only(Tensor, own, output)
            call.output = self._only(output)
            for tensor in self.features(output):
                self.origin[self.key(tensor)] = call
            return output

        with hooked(self.leaves, enter, leave):
            yield
