"""Two linear layers with a linear activation between them become one; a report says how."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning101.core import masks, surgery
from pruning101.core.linear_pairs import (
    LinearPair,
    as_linear,
    is_linear,
    is_norm,
    linear_pairs,
    weight_of,
)
from pruning101.core.merging import merge, merge_norm
from pruning101.core.slopes import Slope, slopes
from pruning101.core.stretches import watched
from pruning101.core.surgery import put
from pruning101.core.tracing import Example, hooked, model_inputs, undisturbed

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class CollapsedPair:
    """What became of one slope: ``reason`` is why it was not collapsed, or nothing.

    ``parameters`` are those of the pair, biases and norms between included; ``macs`` are for one
    input of the example, or without one for one row of features. ``difference`` is the largest
    between outputs of the pair before and after.
    """

    first: str
    activation: str
    second: str
    slope: float
    collapsed: bool
    reason: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    difference: float = math.nan


@dataclass(frozen=True)
class CollapseReport:
    """The collapsed ``model``, and one line for every slope it had."""

    model: nn.Module
    pairs: list[CollapsedPair]

    def table(self) -> "pandas.DataFrame":
        """Return one row a slope."""
        import pandas

        return pandas.DataFrame([vars(pair) for pair in self.pairs])


def collapse(
    model: nn.Module,
    *,
    tolerance: float = 0.05,
    example: Example | None = None,
    force: bool = False,
    inplace: bool = False,
) -> CollapseReport:
    """Merge each pair of linear layers whose slope is within ``tolerance`` of 1; report on all.

    Where |slope - 1| < tolerance the slope is taken for 1, and the pair becomes one linear layer in
    the place of the first, with identities in that of the rest: W = W2 diag(s) W1 and
    b = W2 (s (b1 - mean) + shift) + b2 with s = scale / sqrt(var + eps) of a BatchNorm behind the
    activation, one before it likewise. What follows the second layer stays. (The paper's algorithm
    1 prints ``slope <= tolerance`` and s W2 W1; the authors' code does as is done here.) Pairs that
    share a layer are collapsed from the last backwards.

    A pair that would have more weights than before is only collapsed with ``force``. The difference
    of outputs is measured on what the pair gets when the model runs on ``example``, or without one
    on 64 random rows. By default a changed copy is returned.

    Raises:
        ValueError: a tolerance that is not positive, a model without slopes or an empty example;
            the model is left as it was.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
    if not slopes(model):
        raise ValueError("the model has no slope; call make_collapsible and train with its penalty")
    model = model if inplace else masks.clone(model)
    with surgery.all_or_nothing(model):
        found = [
            pair
            for pair in linear_pairs(model, example)
            if isinstance(model.get_submodule(pair.activation), Slope)
        ]
        inputs = _inputs_of(model, {pair.first for pair in found}, example)
        hint = "" if example is not None else "; if its forward cannot be followed, give an example"
        lines = {name: _alone(name, slope, hint) for name, slope in slopes(model).items()}
        names = {pair.activation: pair.first for pair in found}

        def attempt(pair: LinearPair) -> bool:
            line = _collapse_pair(model, pair, inputs.get(pair.first), tolerance, force)
            lines[pair.activation] = replace(line, first=names[pair.activation])
            return line.collapsed

        merge_in_turn(found, attempt)
    return CollapseReport(model, list(lines.values()))


def _alone(name: str, slope: float, hint: str) -> CollapsedPair:
    reason = (
        f"{name!r} does not stand between two linear layers, each called once, with nothing but "
        f"norms and dropout beside it{hint}"
    )
    return CollapsedPair("", name, "", slope, False, reason)


def _collapse_pair(
    model: nn.Module, pair: LinearPair, inputs: Tensor | None, tolerance: float, force: bool
) -> CollapsedPair:
    """Merge one pair in place, unless something stands against it."""
    slope = slopes(model)[pair.activation]
    n_in, n_hidden, n_out = widths(model, pair)
    reason = obstacle(model, pair, inputs)
    if not reason and not abs(slope - 1) < tolerance:
        reason = f"the slope {slope:.4g} is not within {tolerance:g} of 1"
    if not reason and grows(n_in, n_hidden, n_out) and not force:
        reason = (
            f"one layer would have {n_in * n_out} weights, {n_in}-{n_hidden}-{n_out} has "
            f"{n_hidden * (n_in + n_out)}; force=True merges them all the same"
        )
    old = nn.Sequential(*map(model.get_submodule, pair.names))
    positions = 1 if inputs is None else inputs[..., 0].numel() // len(inputs)
    parameters, macs = _count(old), positions * n_hidden * (n_in + n_out)
    line = CollapsedPair(
        pair.first,
        pair.activation,
        pair.second,
        slope,
        not reason,
        reason,
        parameters_before=parameters,
        parameters_after=parameters,
        macs_before=macs,
        macs_after=macs,
    )
    if reason:
        return line
    if inputs is None:
        rows = torch.randn(64, n_in, generator=torch.Generator().manual_seed(0))
        inputs = rows.to(weight_of(old[0]))
    with undisturbed(old), torch.no_grad():
        before = old(inputs)
    new = merge_pair(model, pair)
    with torch.no_grad():
        difference = (new(inputs) - before).abs().max()
    return replace(
        line,
        parameters_after=_count(new),
        macs_after=positions * n_in * n_out,
        difference=float(difference),
    )


def _inputs_of(model: nn.Module, names: set[str], example: Example | None) -> dict[str, Tensor]:
    """What the named modules get when the model runs on the example."""
    if example is None:
        return {}
    inputs: dict[str, Tensor] = {}

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name] = (*args, *kwargs.values())[0].detach().clone()

        return hook

    chosen = {name: model.get_submodule(name) for name in names}
    with undisturbed(model), torch.no_grad(), hooked(chosen, enter, lambda *_: None):
        model(*model_inputs(model, example))
    if any(x.numel() == 0 for x in inputs.values()):
        raise ValueError("the example is an empty batch; give at least one input")
    return inputs


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- one pair --------------------------------------------------------------------------------


def widths(model: nn.Module, pair: LinearPair) -> tuple[int, int, int]:
    """Return n_in, n_hidden and n_out of a pair."""
    n_hidden, n_in = weight_of(model.get_submodule(pair.first)).shape
    return n_in, n_hidden, weight_of(model.get_submodule(pair.second)).shape[0]


def grows(n_in: int, n_hidden: int, n_out: int) -> bool:
    """Tell whether one layer would have more weights than the two."""
    return n_in * n_out > n_hidden * (n_in + n_out)


def merge_pair(model: nn.Module, pair: LinearPair) -> nn.Module:
    """Merge a pair as if its activation did nothing, in place; return the merged layer.

    It stands in the place of the first layer, identities in that of all others.
    """
    modules = [model.get_submodule(name) for name in pair.names]
    merged = as_linear(modules[0])
    for module in modules[1:-1]:
        if is_norm(module):
            merged = merge_norm(merged, module)
    merged = merge(merged, as_linear(modules[-1]))
    for name in pair.names:
        put(model, name, merged if name == pair.first else nn.Identity())
    return merged


def merge_in_turn(pairs: list[LinearPair], attempt: Callable[[LinearPair], bool]) -> None:
    """Let ``attempt`` merge each pair, from the last backwards, until it merges no more.

    It gets the pair and tells whether it merged it. Where pairs share a layer, a merge changes the
    other one, which is then tried anew with its first layer where it stands by now.
    """
    place: dict[str, str] = {}  # where the layer stands that a second one was merged into
    waiting, changed = list(pairs), True
    while changed:
        changed = False
        for pair in reversed(waiting):
            first = pair.first
            while first in place:
                first = place[first]
            if attempt(replace(pair, first=first)):
                place[pair.second], changed = first, True
                waiting.remove(pair)


def obstacle(model: nn.Module, pair: LinearPair, inputs: Tensor | None = None) -> str:
    """Say what stands against merging this pair, were its activation linear; nothing if nothing.

    ``inputs`` are what the pair gets, where that is known.
    """
    if pair.elsewhere:
        return f"{pair.elsewhere[0]!r} is used elsewhere, too, and would change there"
    if (nonlinear := nonlinear_norm(model, pair)) is not None:
        kind = type(model.get_submodule(nonlinear)).__name__
        return f"{nonlinear!r} ({kind}) divides by what it measures on each input: it is not linear"
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name in pair.names:
        module: Any = model.get_submodule(name)
        if "weight" not in module._parameters and is_linear(module):
            return f"the weight of {name!r} is masked or computed; call masks.make_permanent first"
        if (is_linear(module) or is_norm(module)) and watched(module):
            return f"a hook watches {name!r}, which would no longer be called"
        if any(owners[id(p)] > 1 for p in module.parameters()):
            return f"{name!r} shares its weight with another layer, which would no longer follow"
        if is_norm(module):
            if module.training:
                return f"{name!r} is in training mode, where it follows each batch; call eval()"
            features = widths(model, pair)[1]
            if module.num_features != features or (inputs is not None and inputs.ndim != 2):
                return f"{name!r} normalises positions, not the {features} features of the pair"
    return ""


def nonlinear_norm(model: nn.Module, pair: LinearPair) -> str | None:
    """Name a norm of the pair that is never a fixed linear map, if there is one."""
    for name in pair.between:
        module = model.get_submodule(name)
        fixed = isinstance(module, nn.BatchNorm1d) and module.running_mean is not None
        if is_norm(module) and not fixed:
            return name
    return None
