"""What collapsing the perceptrons of an architecture would save, counted without weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pruning101.core.collapsing import (
    grows,
    merge_in_turn,
    merge_pair,
    nonlinear_norm,
    widths,
)
from pruning101.core.linear_pairs import LinearPair, linear_pairs
from pruning101.core.measure import macs
from pruning101.core.tracing import Example, model_inputs


@dataclass(frozen=True)
class CollapsedCounts:
    """Size and work of a network before and after a collapse; ``macs`` are for one input."""

    pairs: list[str]  # names of the activations
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    @property
    def parameters_saved(self) -> float:
        """The share of parameters saved."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def macs_saved(self) -> float:
        """The share of multiply-adds saved."""
        return 1 - self.macs_after / self.macs_before


def collapsed_counts(
    model: nn.Module,
    example: Example,
    *,
    last: int | None = None,
    count: Callable[[nn.Module, Example], int] | None = None,
) -> CollapsedCounts:
    """Count what collapsing the ``last`` pairs of linear layers (by default all) would save.

    Every activation between two linear layers is taken for linear. The model and ``example`` may
    be on the meta device, where there are no weights at all; elsewhere the model is left as it is
    and none of its weights are copied. MACs are those of :func:`pruning101.core.measure.footprint`,
    unless ``count(model, example)`` says otherwise (it gets models on the meta device). Pairs that
    would grow stay.

    Raises:
        ValueError: no such pair, fewer than ``last`` of them, or an empty example.
    """
    small = _without_weights(model)
    arguments = model_inputs(small, example)
    found = linear_pairs(small) or linear_pairs(small, arguments)
    found = [p for p in found if not p.elsewhere and nonlinear_norm(small, p) is None]
    number = len(found) if last is None else last
    if not 1 <= number <= len(found):
        raise ValueError(
            f"last must be between 1 and {len(found)}, the number of pairs found, got {last!r}"
        )
    chosen = found[-number:]
    count = count or macs
    before = _parameters(small), count(small, arguments)
    merged: list[str] = []

    def attempt(pair: LinearPair) -> bool:
        if grows(*widths(small, pair)):
            return False
        merge_pair(small, pair)
        merged.append(pair.activation)
        return True

    merge_in_turn(chosen, attempt)
    after = _parameters(small), count(small, arguments)
    return CollapsedCounts(merged, before[0], after[0], before[1], after[1])


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode."""
    held = [value for module in model.modules() for value in vars(module).values()]
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    for tensor in [*model.buffers(), *(value for value in held if isinstance(value, Tensor))]:
        memo[id(tensor)] = tensor.detach().to("meta")
    return copy.deepcopy(model, memo).eval()


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
