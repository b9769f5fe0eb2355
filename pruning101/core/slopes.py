"""Activations that can become linear: one trainable slope each, and a module for every call."""

import copy
import dis
import inspect
from collections import Counter
from collections.abc import Iterator
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from pruning101.core import masks, structure


class Slope(nn.Module):
    """``max(z, 0) + slope * min(z, 0)``, with one trainable scalar ``slope``.

    At slope 0 it is ReLU, at slope 1 it does nothing and what stands on its two sides is one
    linear layer. Input and output have any shape. Source: Ben Dror et al., Layer folding, BMVC
    2022, section 3.1; Zibakhsh Shabgahi et al., LayerCollapse, 2023.
    """

    def __init__(self, start: float = 0.01) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(float(start)))

    def forward(self, z: Tensor) -> Tensor:
        """Return the activation of ``z``, elementwise."""
        return F.prelu(z, self.slope.to(z.dtype).reshape(1))

    def extra_repr(self) -> str:
        """Show the slope."""
        return f"slope={float(self.slope.detach()):.4g}"


def slope_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameter of every :class:`Slope` of ``model``, by the name of the module."""
    return {name: m.slope for name, m in model.named_modules() if isinstance(m, Slope)}


def slopes(model: nn.Module) -> dict[str, float]:
    """Return the slope of each :class:`Slope` of ``model``, by the name of the module."""
    return {name: float(slope.detach()) for name, slope in slope_parameters(model).items()}


def is_activation(module: nn.Module) -> bool:
    """Tell whether ``module`` is an elementwise activation, one with a slope included."""
    return isinstance(module, Slope) or "" in structure.activations(module)


def slope_of(module: nn.Module) -> list[float] | None:
    """Return the slopes below zero of an activation that is linear on each side, else None."""
    if isinstance(module, Slope):
        return [float(module.slope.detach())]
    if isinstance(module, nn.PReLU):
        return cast(list[float], module.weight.detach().tolist())
    if isinstance(module, nn.LeakyReLU):
        return [module.negative_slope]
    return None


# Activations of which the linear part is most: what squashes (sigmoid, tanh) is a gate as a rule.
RECTIFIERS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6,
    nn.RReLU, nn.SELU, nn.SiLU, nn.Softplus,
)  # fmt: skip


def separate_activations(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Give every call of an activation a module of its own, and return the model.

    Torchvision's ResNet blocks call one ReLU twice, other networks call ``F.relu``, ``torch.relu``
    or ``x.relu_()``: neither can be replaced or watched one call at a time. The smallest module
    whose ``forward`` makes such calls gets a ``forward`` rewritten with ``torch.fx``; it stays the
    same object with the same children, attributes and hooks, the keys of the state dict are the
    same, and the new activations stand beside its children (``relu``, ``relu_1``). One activation
    that stands in several places becomes several, ``F.dropout`` beside them an ``nn.Dropout``.
    Activations that write in place no longer do so, because they overwrite what hooks and skips
    read. Only modules that need it are touched; what the network computes stays the same.

    Works in place; with ``inplace=False`` a copy is changed.

    Raises:
        ValueError: a module that needs it cannot be rewritten, for instance because its ``forward``
            hangs on the values of its input; the model is left as it was.
    """
    model = model if inplace else masks.clone(model)
    plans: list[tuple[nn.Module, fx.Graph, dict[str, nn.Module]]] = []
    in_place = {m for m in structure.activations(model).values() if getattr(m, "inplace", False)}
    for name, parent in model.named_modules():
        if calls_in_order(parent):
            continue
        required = _needs_rewriting(parent)
        if not required and not any(map(_overwriting, parent.children())):
            continue
        try:
            graph, added, changed = forward_graph(parent)
        except Exception as error:  # what tracing raises on arbitrary code has no bounds
            if required:
                raise ValueError(
                    f"The activations that {name or 'the model'!r} ({type(parent).__name__}) calls "
                    f"in its forward cannot become modules of their own, since it cannot be "
                    f"traced ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                    "; write them as modules, one for each call."
                ) from error
            # Nobody knows who reads what they overwrite: they stay as they are.
            in_place -= {_overwriting(child) for child in parent.children()}
            continue
        if changed:
            plans.append((parent, graph, added))

    # Nothing fails from here on.
    seen: set[nn.Module] = set()
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and _is_activation(module):
                if module in seen:
                    parent._modules[child] = copy.deepcopy(module)
                seen.add(module)
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            kind, _ = _FUNCTIONS.get(_function_name(layer.activation), (None, ()))
            if kind is not None:
                layer.activation = kind()
            layer.activation_relu_or_gelu = 0  # its fused kernel has an activation of its own
    for parent, graph, added in plans:
        for child, module in added.items():
            parent.add_module(child, module.train(parent.training))
        Rewritten.become(parent, graph)
    for module in in_place.union(*(added.values() for _, _, added in plans)):
        if getattr(module, "inplace", False):
            cast(Any, module).inplace = False
    return model


class Rewritten(fx.GraphModule):
    """A module whose ``forward`` is a graph, all else as it was, in copies and pickles, too."""

    @staticmethod
    def become(module: nn.Module, graph: fx.Graph) -> None:
        """Give ``module`` the forward of ``graph``, in place."""
        new = Rewritten(module, graph, type(module).__name__)
        vars(module).update({k: v for k, v in vars(new).items() if k not in vars(module)})
        module.__class__ = type(new)

    def __deepcopy__(self, memo: Any) -> "Rewritten":
        new = cast(Rewritten, super().__deepcopy__(memo))
        kept = {k: v for k, v in vars(self).items() if k != "_graph"}
        vars(new).update(copy.deepcopy(kept, memo))
        type(new).__name__ = type(self).__name__  # a class of its own
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, imports) = super().__reduce__()
        return _restored, (body, imports, type(self).__name__)


def _restored(body: dict[str, Any], imports: str, name: str) -> Rewritten:
    graph = cast(fx.GraphModule, reduce_graph_module(dict(body), imports)).graph
    holder = nn.Module()
    vars(holder).update(body)
    new = Rewritten(holder, graph, name)
    vars(new).update(body)
    return new


# --- which modules, and how -------------------------------------------------------------------

# Functions and methods that are activations, as the modules that do the same, with the names of
# what they are given after the input.
_FUNCTIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "celu": (nn.CELU, ("alpha", "inplace")),
    "dropout": (nn.Dropout, ("p", "training", "inplace")),
    "elu": (nn.ELU, ("alpha", "inplace")),
    "gelu": (nn.GELU, ("approximate",)),
    "hardsigmoid": (nn.Hardsigmoid, ("inplace",)),
    "hardswish": (nn.Hardswish, ("inplace",)),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "logsigmoid": (nn.LogSigmoid, ()),
    "mish": (nn.Mish, ("inplace",)),
    "relu": (nn.ReLU, ("inplace",)),
    "relu6": (nn.ReLU6, ("inplace",)),
    "selu": (nn.SELU, ("inplace",)),
    "sigmoid": (nn.Sigmoid, ()),
    "silu": (nn.SiLU, ("inplace",)),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softsign": (nn.Softsign, ()),
    "tanh": (nn.Tanh, ()),
}


def calls_in_order(parent: nn.Module) -> bool:
    """Tell whether this module does no more than call its children, or is one of PyTorch's own."""
    forward = getattr(type(parent), "forward", None)
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.")


def _is_activation(module: nn.Module | None) -> bool:
    return module is not None and "" in structure.activations(module)


def _overwriting(module: nn.Module) -> nn.Module | None:
    """Return the activation that changes what ``module`` is given, if one does."""
    if isinstance(module, nn.Sequential) and len(module):
        return _overwriting(module[0])
    return module if _is_activation(module) and getattr(module, "inplace", False) else None


def _needs_rewriting(parent: nn.Module) -> bool:
    """Tell whether ``forward``, as written, may call an activation function, or a module twice."""
    children = {n for n, m in parent.named_children() if _is_activation(m)}
    if any(_function_name(value) in _FUNCTIONS for value in vars(parent).values()):
        return True
    calls: Counter[str] = Counter()
    for function in _reached(parent):
        instructions = list(dis.get_instructions(function))
        loop = any(i.opname.startswith(("FOR_ITER", "JUMP_BACKWARD")) for i in instructions)
        for i in instructions:
            if isinstance(i.argval, str):
                calls[i.argval] += 2 if loop else 1
    named = {name for name in calls if name.removesuffix("_") in _FUNCTIONS}
    named -= {n for n, _ in parent.named_children()} | set(vars(parent)) | {"dropout"}
    return bool(named) or any(calls[child] > 1 for child in children)


def _reached(parent: nn.Module) -> Iterator[Any]:
    """Give ``forward`` and every function of the model's authors that it may call."""
    found: set[Any] = set()
    todo = [inspect.unwrap(type(parent).forward)]
    while todo:
        function = todo.pop()
        if function in found or not isinstance(function, FunctionType):
            continue
        found.add(function)
        yield function
        for name in function.__code__.co_names:
            called = getattr(type(parent), name, None) or function.__globals__.get(name)
            module = getattr(called, "__module__", None) or ""
            if isinstance(called, FunctionType) and not f"{module}.".startswith("torch."):
                todo.append(inspect.unwrap(called))


def _function_name(value: Any) -> str:
    if isinstance(value, nn.Module | type) or not callable(value):
        return ""
    return getattr(value, "__name__", "").removesuffix("_")


class _Children(fx.Tracer):
    """Follow one ``forward``; what it calls are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def forward_graph(parent: nn.Module) -> tuple[fx.Graph, dict[str, nn.Module], bool]:
    """Trace ``forward``, its children as leaves, a module for each call of an activation.

    Returns the graph, the modules that it calls beside the children of ``parent``, and whether the
    graph does need another ``forward`` than there is.

    Raises whatever tracing raises; ValueError if training and inference differ.
    """
    training = parent.training
    try:
        traced = []
        for mode in (False, True):
            parent.training = mode
            traced.append(_with_modules(parent, mode))
    finally:
        parent.training = training
    (graph, added, changed), (other, _, _) = traced
    if str(graph) != str(other):
        raise ValueError("it does something else in training")
    return graph, added, changed


def _with_modules(parent: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, nn.Module], bool]:
    # What has a default keeps it: an argument that is None is asked for, as a rule.
    signature = inspect.signature(parent.forward)
    fixed = {
        name: p.default for name, p in signature.parameters.items() if p.default is not p.empty
    }
    graph = _Children().trace(parent, concrete_args=fixed or None)
    added: dict[str, nn.Module] = {}
    called: set[str] = set()
    changed = False
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        overwritten = None
        if node.op == "call_module":
            module = parent.get_submodule(node.target)
            if _overwriting(module) is not None:
                overwritten = node.args[0]
            if _is_activation(module):
                if node.target in called:
                    name = _free(parent, added, node.target.replace(".", "_"))
                    added[name], node.target, changed = copy.deepcopy(module), name, True
                called.add(node.target)
        elif node.op in ("call_function", "call_method"):
            function = node.target if node.op == "call_method" else _function_name(node.target)
            if function.removesuffix("_") not in _FUNCTIONS:
                continue
            raw = node.target if node.op == "call_method" else node.target.__name__
            module = _as_module(function.removesuffix("_"), node, training)
            if raw.endswith("_") or getattr(module, "inplace", False):
                overwritten = node.args[0]
            name = _free(parent, added, function.removesuffix("_"))
            node.op, node.target = "call_module", name
            node.args, node.kwargs = (_input_of(node),), {}
            added[name], changed = module, True
        if overwritten is not None:
            # Who reads it later reads the activation's result, also when that is a new tensor.
            for reader in list(overwritten.users):
                if position[reader] > position[node]:
                    reader.replace_input_with(overwritten, node)
                    changed = True
    return graph, added, changed


def _input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _as_module(name: str, node: fx.Node, training: bool) -> nn.Module:
    kind, names = _FUNCTIONS[name]
    options = dict(zip(names, node.args[1:], strict=False))
    options |= {k: v for k, v in node.kwargs.items() if k != "input"}
    options.pop("out", None)
    if any(isinstance(value, fx.Node) for value in options.values()):
        raise ValueError(f"its {name} is given a number that hangs on the input")
    if name == "dropout":
        always = options.pop("training", True) is not training
        if always:
            raise ValueError("it drops out at inference, too, or never")
    return kind(**options)


def _free(parent: nn.Module, added: dict[str, nn.Module], name: str) -> str:
    """Return ``name``, or name_1, name_2... where that is taken."""
    taken = {*dir(parent), *added}
    names = [name, *(f"{name}_{i}" for i in range(1, len(added) + 2))]
    return next((n for n in names if n not in taken), f"{name}_{len(taken)}")
