"""``x + layer(x)`` as one layer: the identity goes into the kernel, the sum out of the forward."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pruning101.core import slopes
from pruning101.core.merging import merge_skip
from pruning101.core.stretches import hands_on
from pruning101.core.surgery import put


def absorb_skip(model: nn.Module, name: str) -> str:
    """Make ``x + layer(x)`` one layer, in place; return why that cannot be, or "".

    The ``forward`` that adds is traced, its children as leaves: all that stands on the two ways to
    the sum must be the layer ``name`` and modules that do nothing.
    """
    layer = model.get_submodule(name)
    why = "the sum that follows adds something else than its own input"
    for parent_name, parent in _ancestors(model, name):
        if slopes.calls_in_order(parent):
            continue
        try:
            graph, added, _ = slopes.forward_graph(parent)
        except Exception:  # what tracing raises on arbitrary code has no bounds
            return f"the forward of {parent_name or 'the model'!r}, which adds, cannot be traced"

        def find(node: Any, parent: nn.Module = parent, added: Any = added) -> list[nn.Module]:
            """Return the modules that a call runs, those that do nothing left out."""
            called = added.get(node.target) or parent.get_submodule(node.target)
            return [m for m in _parts(called) if not _does_nothing(m)]

        for node in graph.nodes:
            function = getattr(node.target, "__name__", node.target)  # a method is a name
            if function not in ("add", "iadd", "add_") or len(node.args) != 2 or node.kwargs:
                continue
            for branch, other in (node.args, node.args[::-1]):
                if _is_skip(find, branch, other, layer):
                    try:
                        merged = merge_skip(layer)
                    except (ValueError, TypeError) as error:
                        return str(error)
                    for child, module in added.items():
                        parent.add_module(child, module.train(parent.training))
                    node.replace_all_uses_with(branch)
                    graph.erase_node(node)
                    while not other.users and other.op == "call_module":
                        unused, other = other, other.args[0]
                        graph.erase_node(unused)
                    slopes.Rewritten.become(parent, graph)
                    put(model, name, merged)
                    return ""
        return why  # only the smallest forward that calls it can be the one
    return why


def _ancestors(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    while name:
        name = name.rpartition(".")[0]
        yield name, model.get_submodule(name)


_Find = Callable[[Any], list[nn.Module]]


def _is_skip(find: _Find, branch: Any, other: Any, layer: nn.Module) -> bool:
    branch, start = _behind(find, branch), _behind(find, other)
    if getattr(branch, "op", "") != "call_module" or find(branch) != [layer]:
        return False
    return _behind(find, branch.args[0]) is start


def _behind(find: _Find, node: Any) -> Any:
    """Go back from ``node`` through modules that do nothing."""
    while getattr(node, "op", "") == "call_module" and len(node.args) == 1 and not find(node):
        node = node.args[0]
    return node


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for part in module:
            yield from _parts(part)
    else:
        yield module


def _does_nothing(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and hands_on(module, (1, 2, 2, 2))
