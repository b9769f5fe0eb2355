"""Residual blocks: which modules of a network may be taken out whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core.surgery import put
from pruning101.core.tracing import (
    Example,
    Tracer,
    hooked,
    model_inputs,
    plain_attention,
    undisturbed,
)

# Elementwise functions that may follow the addition, as the ReLU of a ResNet block does.
_POINTWISE = {
    "relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "gelu",
    "gelu_", "silu", "silu_", "hardswish", "hardswish_", "elu", "elu_", "mish", "mish_",
}  # fmt: skip


def removable_blocks(model: nn.Module, example: Example) -> list[str]:
    """Return the residual blocks that may be taken out whole, by name, in execution order.

    Found by running ``model`` on ``example``, not by the names of classes. A block is a module that
    is called once, has submodules, gives one tensor of the shape and type of its (first) input,
    and whose output is that very input plus something that passed a layer with weights, perhaps
    added in several steps, perhaps through an elementwise activation after the addition. Of
    nested ones the smallest on the residual stream is the block: neither a stage made of blocks,
    nor a part inside a block's branch.

    One rule more: features of every shape must keep a layer with weights that makes them. Where
    the blocks' input is only pooled from larger features, the first block at that shape stays, for
    without it nothing would be computed at that resolution. So ResNet-18 loses one block a stage
    at most, the ones that the literature removes (its first stage works on max-pooled
    features, and ``layer1.0`` stays), while every block of a ViT or Swin may go.

    Each block can be replaced by ``nn.Identity``, or, if it is given more than its input (as a
    diffusion transformer's is), by :class:`PassThrough`; :func:`remove_block` does so. The model
    stays as it was.
    """
    return [name for name, reason in _residual_modules(model, example).items() if not reason]


def why_not_removable(model: nn.Module, example: Example) -> dict[str, str]:
    """Return, for each module with submodules that :func:`removable_blocks` left out, the reason.

    One sentence each, by name.
    """
    return {n: reason for n, reason in _residual_modules(model, example).items() if reason}


class PassThrough(nn.Identity):
    """Give back the first argument and ignore the others: what stands where a block was."""

    def forward(self, input: Tensor, *others: Any, **options: Any) -> Tensor:
        """Return ``input`` itself."""
        return input


def remove_block(model: nn.Module, name: str) -> None:
    """Put a :class:`PassThrough` in the place of the block ``name``, in place.

    Raises ``ValueError`` if ``model`` has no such module.
    """
    if not name or name not in dict(model.named_modules()):
        raise ValueError(f"There is no module {name!r} in this model; see removable_blocks.")
    put(model, name, PassThrough())


@dataclass(eq=False)
class _Visit:
    """One call of a module with submodules."""

    name: str
    order: int
    start: Any = None  # keys of what it was given and what it gave
    end: Any = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    depth: int = 0
    pooled: bool = False
    reason: str = ""


def _residual_modules(model: nn.Module, example: Example) -> dict[str, str]:
    """Return why each module with submodules is no removable block ('' where it is one)."""
    inputs = model_inputs(model, example)
    parents = {n: m for n, m in model.named_modules() if n and any(True for _ in m.children())}
    with undisturbed(model), torch.no_grad(), plain_attention():
        trace = _BlockTrace(model, inputs)
        with trace, trace.watching(parents):
            model(*inputs)

    found: dict[str, _Visit] = {}
    reasons: dict[str, str] = dict.fromkeys(parents, "It is never called.")
    for name, visits in trace.visits.items():
        reasons[name] = visits[0].reason
        if len(visits) > 1:
            reasons[name] = f"It is called {len(visits)} times."
        if not reasons[name]:
            found[name] = visits[0]

    def on_stream(inner: _Visit, outer: _Visit) -> bool:
        starts, ends = trace.behind(inner.start), trace.behind(outer.end)
        return outer.start in starts and inner.end in ends

    for name, visit in found.items():
        inside = [v for n, v in found.items() if n.startswith(f"{name}.")]
        if any(on_stream(inner, visit) for inner in inside):
            reasons[name] = "It is made of residual blocks, which may be removed one by one."
    found = {n: v for n, v in found.items() if not reasons[n]}
    for name in found:
        if any(name.startswith(f"{outer}.") for outer in found):
            reasons[name] = "It lies in the branch of a residual block, and goes with that block."
    made: set[tuple[int, ...]] = set()
    for name, visit in sorted(found.items(), key=lambda item: item[1].order):
        shape = visit.shape[1:]
        if not reasons[name] and visit.pooled and shape not in made:
            made.add(shape)
            reasons[name] = (
                f"Its input of shape {shape} is only pooled from larger features, and without it "
                "no layer with weights would work at that shape."
            )
    order = {name: visits[0].order for name, visits in trace.visits.items()}
    return {n: reasons[n] for n in sorted(reasons, key=lambda n: order.get(n, len(order)))}


class _BlockTrace(Tracer):
    """Note, for each value, the values that it is a sum of (``_terms``), and who was called."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__(model, inputs)
        self.visits: dict[str, list[_Visit]] = {}
        self._terms: dict[Any, frozenset[Any]] = {}
        self._count = 0

    def behind(self, key: Any) -> frozenset[Any]:
        """Return ``key`` and all that reached it by additions and activations alone."""
        return self._terms.get(key, frozenset()) | {key}

    def operation(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], made: list[Tensor]
    ) -> None:
        terms: frozenset[Any] = frozenset()
        if len(made) == 1:
            whole = [t for t in inputs if t.shape == made[0].shape]
            if name in {"add", "add_"}:
                terms = frozenset().union(*(self.behind(self.key(t)) for t in whole))
            elif name in {"addcmul", "addcmul_"} and any(t is args[0] for t in whole):
                terms = self.behind(self.key(args[0]))
            elif name in _POINTWISE and any(t is args[0] for t in whole):
                terms = self._terms.get(self.key(args[0]), frozenset())
        super().operation(name, args, inputs, made)
        if terms:
            self._terms[self.key(made[0])] = terms

    @contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Take note of every call of these modules inside the block."""
        running: list[_Visit] = []

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                visit = _Visit(name, self._count)
                self._count += 1
                self.visits.setdefault(name, []).append(visit)
                running.append(visit)
                first = next(iter((*args, *kwargs.values())), None)
                if isinstance(first, Tensor) and self.features(first):
                    value = self.value(first)
                    assert value is not None
                    visit.start, visit.shape, visit.dtype = (
                        self.key(first),
                        tuple(first.shape),
                        first.dtype,
                    )
                    visit.depth, visit.pooled = value.depth, value.pooled

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            visit = running.pop()
            if visit.start is None:
                visit.reason = "Its first argument is no tensor of features."
            elif not isinstance(output, Tensor):
                visit.reason = "It does not give a single tensor."
            elif tuple(output.shape) != visit.shape:
                visit.reason = f"It changes the shape from {visit.shape} to {tuple(output.shape)}."
            elif output.dtype != visit.dtype:
                visit.reason = f"It changes the type from {visit.dtype} to {output.dtype}."
            else:
                visit.end = self.key(output)
                if visit.start == visit.end or visit.start not in self.behind(visit.end):
                    visit.reason = "Its input is not added to its output."
                elif self.depth_of(output) <= visit.depth:
                    visit.reason = "What it adds to its input passes no layer with weights."
                else:
                    # Taken out, the block gives what it got: pooled features stay pooled.
                    self.mark_pooled(output, visit.pooled)

        with hooked(modules, enter, leave):
            yield
