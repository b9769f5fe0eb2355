"""What stands between one layer with weights and the next, found by running the network."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning101.core import measure, structure
from pruning101.core.constants import NORMS
from pruning101.core.merging import BorderedConv2d
from pruning101.core.slopes import is_activation
from pruning101.core.surgery import put
from pruning101.core.tracing import Example

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, BorderedConv2d)


@dataclass(frozen=True)
class Between:
    """Something on the way from one layer to the next: a module by ``name``, or a function.

    ``shape`` is that of its input; ``obstacle`` says why it could not be taken away whatever it is.
    """

    name: str
    shape: tuple[int, ...]
    obstacle: str = ""


@dataclass(frozen=True)
class Stretch:
    """The way from a layer with weights to the next one, or to where ways meet or part.

    ``first`` or ``second`` is "" where the way begins or ends elsewhere; ``end`` then says where.
    ``shape`` and ``second_shape`` are those of their inputs.
    """

    order: int
    first: str
    between: list[Between]
    second: str
    end: str
    shape: tuple[int, ...]
    second_shape: tuple[int, ...] = ()
    skip: bool = False  # it ends in a sum


def stretches(model: nn.Module, example: Example, names: Iterable[str] = ()) -> list[Stretch]:
    """Return the ways through the network, in execution order, found by one run on ``example``.

    One from every layer with weights, and one from every activation or BatchNorm, and every module
    of these ``names``, that comes after no such layer, because a sum or another function stands
    before it.
    """
    trace = structure.calls(model, example)
    weighted = {n for n, m in trace.leaves.items() if isinstance(m, WEIGHTED)}
    called = sorted((c for calls in trace.calls.values() for c in calls), key=lambda c: c.order)
    passed: set[structure.Call] = set()

    def often(name: str, shape: tuple[int, ...]) -> str:
        times, module = len(trace.calls[name]), trace.leaves[name]
        alone = times == 1 or hands_on(module, shape)
        return "" if alone else f"{name!r} is called {times} times"

    def follow(start: structure.Call, between: list[Between]) -> Stretch:
        first = start.name if start.name in weighted else ""
        shape = start.input[1] if start.input is not None else ()
        here, second, end, second_shape, skip = start, "", "", (), False
        if first and often(first, shape):
            between.append(Between("", shape, often(first, shape)))
        while not second and not end:
            readers = trace.consumers[here]
            reader = next(iter(readers), None)
            if reader is None:
                end = "nothing reads its output"
            elif len(readers) > 1:
                end = f"its output is read in {len(readers)} places"
            elif reader.name == "output":
                end = "it gives the network's output"
            elif reader.name in ("function add", "function add_"):
                end, skip = "something else is added to it", True
            elif trace.sources[reader] != {here}:
                name = reader.name.removeprefix("function ")
                end = f"{name!r} joins it with something else"
            else:
                given, taken = here.output, reader.input
                obstacle = ""
                leaf = reader.name in trace.leaves
                if leaf and not (given and taken and structure.same_features(given, taken)):
                    obstacle = "its output is read in another arrangement"
                elif leaf:
                    obstacle = often(reader.name, taken[1] if taken else ())
                else:
                    obstacle = f"the function {reader.name.removeprefix('function ')!r} stands"
                    obstacle += " between"
                if reader.name in weighted:
                    second, second_shape = reader.name, taken[1] if taken else ()
                    if obstacle:
                        between.append(Between("", second_shape, obstacle))
                else:
                    between.append(Between(reader.name, taken[1] if taken else (), obstacle))
                    passed.add(reader)
                here = reader
        return Stretch(start.order, first, between, second, end, shape, second_shape, skip)

    found = [follow(call, []) for call in called if call.name in weighted]
    starts = {*names, *(n for n, m in trace.leaves.items() if is_activation(m))}
    starts |= {n for n, m in trace.leaves.items() if isinstance(m, NORMS)}
    for call in called:
        if call not in passed and call.name in starts:
            passed.add(call)
            shape = call.input[1] if call.input is not None else ()
            start = Between(call.name, shape, often(call.name, shape))
            found.append(follow(call, [start]))
    end = "it is not called by itself, but read by another module or never"
    last = max((call.order for call in called), default=0) + 1
    uncalled = [n for n in trace.leaves if n in weighted and n not in trace.calls]
    found += [Stretch(last, name, [], "", end, ()) for name in uncalled]
    return sorted(found, key=lambda stretch: stretch.order)


def shared(model: nn.Module) -> dict[str, str]:
    """Return why layers, by name, cannot be changed alone: weights held or watched elsewhere."""
    holders: Counter[int] = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (*WEIGHTED, NORMS)):
            continue
        if any(holders[id(p)] > 1 for p in module._parameters.values() if p is not None):
            found[name] = f"the weights of {name!r} belong to another layer, too"
        elif watched(module):
            found[name] = f"a hook watches {name!r}"
    return found


def watched(module: nn.Module) -> bool:
    """Tell whether hooks run with this module, which would no longer do so in another one."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or bool(module._backward_pre_hooks)


def hands_on(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Tell whether a module without weights does nothing in ``eval`` mode, as dropout.

    It is run on random features of that ``shape``: it must give back the very tensor.
    """
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
        return True
    if module.training or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    small = tuple(min(size, 2) for size in shape)
    given = torch.randn(small, generator=torch.Generator().manual_seed(0))
    before = given.clone()
    with torch.no_grad():
        try:
            result = module(given)
        except Exception:  # whatever it wants, it is not this tensor
            return False
    same = isinstance(result, Tensor) and result.data_ptr() == given.data_ptr()
    return same and result.shape == given.shape and torch.equal(result, before)


def macs(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of ``layer`` for one input, on a batch of this ``shape``."""
    dtype = next(layer.parameters()).dtype
    return measure.macs(shadow(layer), torch.empty(shape, dtype=dtype, device="meta"))


def shadow(layer: nn.Module) -> nn.Module:
    """Return a copy of ``layer`` without numbers, on the meta device; a bias of zeros is left out.

    Merging two of them costs nothing and shows what the merged layer would cost.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in layer.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in layer.buffers()}
    copied = copy.deepcopy(layer, memo)
    bias = layer._parameters.get("bias")
    if isinstance(layer, nn.Conv2d) and bias is not None and not bias.is_meta and not bias.any():
        copied.register_parameter("bias", None)
    return copied


# --- norms that carry an activation -----------------------------------------------------------


def split_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Put (norm, drop, act) in the place of norms that carry an activation, in place.

    Timm's ``BatchNormAct2d`` is a BatchNorm with children ``drop`` and ``act``. Returns the modules
    that stood there, by name, for :func:`rejoin_norms`.
    """
    found: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and set(module._modules) == {"drop", "act"}:
            norm = nn.BatchNorm2d(module.num_features, device="meta")
            vars(norm).update({k: v for k, v in vars(module).items() if k in vars(norm)})
            vars(norm)["_modules"] = {}
            parts = OrderedDict(norm=norm, drop=module.drop, act=module.act)
            put(model, name, nn.Sequential(cast(Any, parts)).train(module.training))
            found[name] = module
    return found


def rejoin_norms(model: nn.Module, before: dict[str, nn.Module]) -> None:
    """Put back, in place, the norms of :func:`split_norms` that are still there."""
    for name, module in before.items():
        parts = cast(nn.Sequential, model.get_submodule(name))
        if isinstance(parts.norm, NORMS):
            module._modules |= {
                "drop": cast(nn.Module, parts.drop),
                "act": cast(nn.Module, parts.act),
            }
            put(model, name, module)
