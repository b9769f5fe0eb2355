"""Where a model has two linear layers with an activation between them, and nothing that reads it.

Found in the order of execution, not by names: by running the model on an example, or without one by
following its ``forward`` symbolically. Nothing here knows the name of any network.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pruning101.core import slopes, structure
from pruning101.core.tracing import Example

# Activations of other libraries are told by their class names (GELUActivation, QuickGELU...).
_ACTIVATION_NAMES = re.compile(r"(elu|silu|swish|mish|tanh|sigmoid|activation)$", re.IGNORECASE)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class LinearPair:
    """Names of two linear layers that follow one another, and of what stands between them.

    ``between`` lists everything there, in order, the ``activation`` among it. ``elsewhere`` lists
    those of all of them that are called somewhere else, too.
    """

    first: str
    between: tuple[str, ...]
    activation: str
    second: str
    elsewhere: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order of execution."""
        return (self.first, *self.between, self.second)


def is_linear(module: nn.Module) -> bool:
    """Tell whether this is ``nn.Linear``, or the ``Conv1D`` that stands for one in GPT-2."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight [out, in] of a linear layer; a ``Conv1D`` stores it transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T


def as_linear(layer: nn.Module) -> nn.Module:
    """Return a ``Conv1D`` as an ``nn.Linear`` that does the same; what is one already, as it is."""
    if isinstance(layer, nn.Linear) or not is_linear(layer):
        return layer
    weight, bias = weight_of(layer), layer.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    assert isinstance(bias, Tensor)
    linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def is_activation(module: nn.Module) -> bool:
    """Tell whether this is an elementwise non-linearity, a ``Slope`` or one by its class name."""
    if slopes.is_activation(module):
        return True
    if module._parameters or module._modules:
        return False
    return _ACTIVATION_NAMES.search(type(module).__name__) is not None


def is_norm(module: nn.Module) -> bool:
    """Tell whether this normalises its input, linearly (batch norm) or not (layer norm)."""
    return isinstance(module, _NORMS)


def is_dropout(module: nn.Module) -> bool:
    """Tell whether this does nothing at inference: dropout, or nothing at all."""
    return isinstance(module, nn.modules.dropout._DropoutNd | nn.Identity)


def linear_pairs(model: nn.Module, example: Example | None = None) -> list[LinearPair]:
    """Return all pairs of linear layers with one activation between them, in order of execution.

    Between the two may stand norms and dropout as well. Each of them takes nothing but the output
    of the one before, and nothing else reads that. With an ``example``, ``model(example)`` is run;
    without one, the input that the networks of Hugging Face's transformers bring along is run, or
    else ``forward`` is followed by ``torch.fx``, module by module where the whole cannot be
    followed. The layers of PyTorch's own ``nn.TransformerEncoderLayer``, which calls its activation
    as a function, are not found. The model stays as it was.
    """
    modules = dict(model.named_modules())
    if example is None:
        own = getattr(model, "dummy_inputs", None)
        example = own.get(getattr(model, "main_input_name", "")) if isinstance(own, dict) else None
    runs = _runs_of(model, example) if example is not None else _symbolic_runs(model)
    found: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    calls = Counter(name for run in runs for name in run)
    for run in runs:
        for start, name in enumerate(run):
            if is_linear(modules[name]):
                pair = _pair_from(run[start:], modules)
                if pair is not None:
                    found[pair] += 1
    # A layer under two names, or called outside these runs, is used elsewhere too.
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return [
        LinearPair(
            first,
            between,
            next(n for n in between if is_activation(modules[n])),
            second,
            tuple(
                n
                for n in (first, *between, second)
                if calls[n] != times or names[id(modules[n])] > 1
            ),
        )
        for (first, second, between), times in found.items()
    ]


def _pair_from(
    run: list[str], modules: dict[str, nn.Module]
) -> tuple[str, str, tuple[str, ...]] | None:
    between: list[str] = []
    for name in run[1:]:
        if is_linear(modules[name]):
            active = [n for n in between if is_activation(modules[n])]
            return (run[0], name, tuple(between)) if len(active) == 1 else None
        if not any(kind(modules[name]) for kind in (is_activation, is_norm, is_dropout)):
            return None
        between.append(name)
    return None


def _runs_of(model: nn.Module, example: Example) -> list[list[str]]:
    return structure.linear_chains(model, example, shared=True)


# --- without an example -----------------------------------------------------------------------


class _Follower(fx.Tracer):
    """Follow one ``forward`` into everything but leaves, and modules that cannot be followed."""

    def __init__(self, closed: set[nn.Module]) -> None:
        super().__init__()
        self.closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.closed or next(m.children(), None) is None:
            return True
        return bool(super().is_leaf_module(m, module_qualified_name))


def _symbolic_runs(model: nn.Module) -> list[list[str]]:
    graphs: list[tuple[str, fx.Graph]] = []

    def follow(name: str, module: nn.Module) -> bool:
        """Note the graphs that cover this module; tell whether one of its own is among them."""
        if next(module.children(), None) is None:
            return True
        graph = _graph_of(module, set())
        if graph is None:
            before = len(graphs)
            dot = f"{name}." if name else ""
            closed = {c for n, c in module.named_children() if not follow(dot + n, c)}
            graph = _graph_of(module, closed) if closed else None
            if graph is None:
                return False
            # What can be followed from here is in this graph, and need not stand there twice.
            inside = tuple(f"{dot}{n}." for n, c in module.named_children() if c not in closed)
            graphs[before:] = [g for g in graphs[before:] if not f"{g[0]}.".startswith(inside)]
        graphs.append((name, graph))
        return True

    with _as_it_was(model):
        follow("", model)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    runs = [run for name, graph in graphs for run in _runs_in(graph, f"{name}." if name else "")]
    return runs if len(graphs) == 1 else sorted(runs, key=lambda run: order[run[-1]])


def _graph_of(module: nn.Module, closed: set[nn.Module]) -> fx.Graph | None:
    # What has a default keeps it: an argument that is None is asked for, as a rule.
    signature = inspect.signature(module.forward).parameters
    fixed = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    try:
        return _Follower(closed).trace(module, concrete_args=fixed or None)
    except Exception:  # what tracing raises on arbitrary code has no bounds
        return None


def _runs_in(graph: fx.Graph, prefix: str) -> Iterator[list[str]]:
    """Give the runs of modules of a graph, as ``structure.linear_chains`` does."""

    def follows(node: fx.Node) -> bool:
        before = node.args[0] if node.args else None
        return (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(node.args) == 1
            and not node.kwargs
            and list(before.users) == [node]
        )

    run: dict[fx.Node, list[str]] = {}  # by its last node
    for node in graph.nodes:
        if node.op == "call_module":
            begun = run.pop(node.args[0]) if follows(node) else []
            run[node] = [*begun, prefix + str(node.target)]
    yield from run.values()


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Forget what a forward that is followed symbolically writes onto its modules."""
    before = [(m, dict(vars(m))) for m in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
