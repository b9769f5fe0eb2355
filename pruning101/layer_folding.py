"""Layer folding: activations that have become linear go, and the layers on their sides merge.

Dror, Zehngut, Raviv, Artyomov, Vitek and Jevnisek, Layer folding: neural network depth reduction
using activation linearization, BMVC 2022 (arXiv 2106.09309). Every activation gets a slope of its
own, a penalty pulls the slopes to 1, what came near enough is taken for linear, and two layers
with nothing between them are written as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pruning101.core import folding, masks, structure
from pruning101.core.folding import Stretch
from pruning101.core.merging import Border, BorderedConv2d
from pruning101.core.merging import border_width as border_width  # these are this topic's, too
from pruning101.core.merging import merge as merge
from pruning101.core.merging import merge_norm as merge_norm
from pruning101.core.merging import merge_skip as merge_skip
from pruning101.core.slopes import Slope as Slope
from pruning101.core.slopes import separate_activations as separate_activations
from pruning101.core.surgery import all_or_nothing
from pruning101.core.tracing import Example, model_inputs, tensors_in, undisturbed

if TYPE_CHECKING:
    import pandas

# --- slopes and their penalty ------------------------------------------------------------------

# Activations of which the linear part is most: what squashes (sigmoid, tanh) is a gate as a rule.
_RECTIFIERS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6,
    nn.RReLU, nn.SELU, nn.SiLU, nn.Softplus,
)  # fmt: skip


def make_foldable(
    model: nn.Module,
    *,
    start: float = 0.05,
    layers: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replace activations by :class:`Slope`, max(z, 0) + slope * min(z, 0), and return the model.

    Each call of an activation gets a slope of its own (:func:`separate_activations`). ``layers``
    names the activations, as ``structure.activations`` does after that; by default all rectifiers:
    ReLU changes by ``start * min(z, 0)`` only, but GELU, SiLU, Hardswish or ReLU6 become something
    else, and such a network needs training. Sigmoid, tanh and the like, most of them gates, stay
    unless they are named.

    ``start`` is not 0 as in the paper, because the gradient of its penalty |1 - slope^2|,
    -2 slope, is 0 there: the penalty alone would never move a slope, and the loss must do so first.
    From s > 0, with a rate r and a strength of 0.25, the penalty alone multiplies a slope by
    1 + r / 2 a step, so the way to 1 takes about 2 log(1 / s) / r steps without momentum.

    Raises:
        ValueError: a start outside [0, 1], an unknown name, no activation found, or a module whose
            activations cannot be told apart; the model is left as it was.
    """
    if not 0 <= start <= 1:
        raise ValueError(f"start must be a slope in [0, 1], got {start!r}")
    separate = separate_activations(model, inplace=False)
    found = structure.activations(separate)
    chosen = [n for n, m in found.items() if isinstance(m, _RECTIFIERS)]
    if layers is not None:
        for name in layers:
            if name not in found:
                raise ValueError(f"there is no activation {name!r}; there are {', '.join(found)}")
        chosen = list(layers)
    if not chosen:
        raise ValueError("this model has no activation that could get a slope")
    if inplace:
        separate = separate_activations(model)
    like = next(separate.parameters(), torch.empty(0))
    for name in chosen:
        slope = Slope(start).to(like.device, like.dtype)
        folding.replace(separate, name, slope.train(separate.get_submodule(name).training))
    return separate


def slopes(model: nn.Module) -> dict[str, float]:
    """Return the slope of each :class:`Slope` by the name of the module."""
    return {n: float(m.slope.detach()) for n, m in model.named_modules() if isinstance(m, Slope)}


def slope_penalty(model: nn.Module, strength: float = 0.25) -> Tensor:
    """Return ``strength * sum |1 - slope^2|`` over all slopes, a scalar (equation 3 of the paper).

    For ``fit(penalty=lambda m: slope_penalty(m), after_step=clamp_slopes)``.

    Raises:
        ValueError: the model has no slopes.
    """
    found = [m.slope for m in model.modules() if isinstance(m, Slope)]
    if not found:
        raise ValueError("this model has no slopes; give it some with make_foldable first")
    return strength * (1 - torch.stack(found).square()).abs().sum()


@torch.no_grad()
def clamp_slopes(model: nn.Module) -> None:
    """Put every slope back into [0, 1], in place, as after a step of the optimiser.

    The paper clamps at 0 only; above 1 nothing is gained, and the penalty has its kink there.
    """
    for module in model.modules():
        if isinstance(module, Slope):
            module.slope.clamp_(0, 1)


# --- folding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What became of two layers that follow one another, or of one and what follows it.

    ``first`` or ``second`` is "" where no layer with weights stands there without a sum or another
    function before it; ``between`` names what stands between. ``macs_before`` and ``macs_after``
    are multiply-adds for one input: of both layers, and of the one that they are or would be (None
    where there is none). ``exact`` says that the merged layer equals the pair up to rounding;
    ``border_width`` counts the outer pixels of each side where it does not, for "interior".
    ``difference`` is the largest one between the output of the merged layer and that of the
    original layers, with the original activation, on the features that reach them from the example.
    """

    first: str
    second: str
    action: str
    reason: str
    between: tuple[str, ...] = ()
    macs_before: int | None = None
    macs_after: int | None = None
    exact: bool = True
    border_width: int = 0
    difference: float = 0.0


@dataclass(frozen=True)
class FoldReport:
    """The folded ``model`` and a row for every pair of layers and every activation.

    ``linear`` holds the slopes of the activations that were taken away; ``norms`` says of each norm
    beside a layer what it was merged into, or why not. ``difference`` is the largest one between
    the outputs of the network before and after, on the example.
    """

    model: nn.Module
    pairs: list[Pair]
    linear: dict[str, float]
    norms: dict[str, str]
    difference: float

    @property
    def merged(self) -> list[Pair]:
        """The pairs that are one layer now."""
        return [pair for pair in self.pairs if pair.action == "merged"]

    def table(self) -> "pandas.DataFrame":
        """Return one row a pair."""
        import pandas

        return pandas.DataFrame([vars(pair) for pair in self.pairs])


def fold(
    model: nn.Module,
    example: Example,
    *,
    threshold: float = 0.1,
    border: Border = "exact",
    force: bool = False,
    inplace: bool = False,
) -> FoldReport:
    """Merge every pair of layers with nothing non-linear between them, and say what was done.

    Linear are ``nn.Identity``, dropout in ``eval`` mode, and an activation whose slope is within
    ``threshold`` of 1 (the paper folds from 0.9 up): a slope of 0.95 is taken for 1, which changes
    the function, and the report says by how much. BatchNorm is merged into the layer before it, or
    behind it where that is exact. Then layers that follow one another merge pair by pair, in
    execution order, if that does not cost more multiply-adds than the two (``force=True``: if it
    does, too), and ``x + layer(x)`` becomes one layer. ``border`` is that of :func:`merge`. What is
    gone is an ``nn.Identity`` in its place; the merged layer stands where the first one was.

    ``model`` must be in ``eval`` mode, whose function is what is kept. ``example`` is one input
    batch. A copy is changed, with ``inplace=True`` the model itself.

    Raises:
        ValueError: a norm or dropout in training mode, masks, a threshold outside [0, 1], an
            unknown border, an example that is empty; the model is left as it was.
    """
    _check_foldable(model, threshold, border)
    original = masks.clone(model) if inplace else model
    work = model if inplace else masks.clone(model)
    with all_or_nothing(work):
        fold = _Fold(work, threshold, border, force)
        joined = folding.split_norms(work)
        fold.drop_linear()
        while fold.merge_all(example):
            pass  # where a skip was merged, what follows the sum has a new neighbour
        folding.rejoin_norms(work, joined)
        pairs, difference = _compare(original, work, fold.rows(), example)
    return FoldReport(work, pairs, fold.linear, fold.norms, difference)


def _check_foldable(model: nn.Module, threshold: float, border: str) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a distance from 1 in [0, 1], got {threshold!r}")
    if border not in ("exact", "interior", "refuse"):
        raise ValueError(f'border must be "exact", "interior" or "refuse", not {border!r}')
    masked = next(iter(masks.masks_of(model)), None)
    if masked is not None:
        raise ValueError(
            f"{masked!r} is masked, and a merged layer could not keep the mask; write the zeros "
            "into the weights with masks.make_permanent first"
        )
    for name, module in model.named_modules():
        if module.training and isinstance(module, folding.NORMS | nn.modules.dropout._DropoutNd):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) is in training mode, where it is no fixed "
                "linear map; call model.eval() first"
            )


@dataclass
class _Row:
    """A row in the making, and between which of the original modules its layer has to stand."""

    order: int
    pair: Pair
    layer: nn.Module | None = None
    start: str = ""
    end: str = ""
    skip: bool = False


class _Fold:
    """The work of one :func:`fold`: what is merged into what so far, and the rows."""

    def __init__(self, model: nn.Module, threshold: float, border: Border, force: bool) -> None:
        self.model, self.threshold, self.border, self.force = model, threshold, border, force
        self.merged: list[_Row] = []
        self.kept: list[_Row] = []  # of the last round
        self.norms: dict[str, str] = {}
        self.linear: dict[str, float] = {}
        self.host: dict[str, str] = {}  # the layer that a layer was merged into
        self.start: dict[str, str] = {}  # the norm that was merged into the layer behind it
        self.shape: dict[str, tuple[int, ...]] = {}
        self.order: dict[str, int] = {}
        self.gone: set[str] = set()  # what stood within an earlier merge
        self.inexact: set[str] = set()  # layers that hold an inexact merge

    def drop_linear(self) -> None:
        """Put Identity in the place of all activations within the threshold."""
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            slope = _slope_of(module)
            if slope is not None and all(abs(1 - s) <= self.threshold for s in slope):
                folding.replace(self.model, name, nn.Identity().train(module.training))
                self.linear[name] = max(slope, key=lambda s: abs(1 - s))

    def merge_all(self, example: Example) -> bool:
        """Merge what can be; tell whether a skip was merged, so that more may follow."""
        self.kept, skips = [], 0
        self.fixed = folding.shared(self.model)
        found = folding.stretches(self.model, example, self.linear)
        for stretch in found:
            self.order.setdefault(_name_of(stretch), stretch.order)
            if stretch.first:
                self.shape.setdefault(stretch.first, stretch.shape)
            skips += self.merge_one(stretch)
        for stretch in found:
            self.norm_before(stretch)
        return skips > 0

    def merge_one(self, stretch: Stretch) -> bool:
        first = stretch.first
        while first in self.host:
            first = self.host[first]
        obstacle = next(filter(None, (self.obstacle(first, b) for b in stretch.between)), "")
        if not obstacle and first and stretch.second:
            self.merge_pair(first, stretch)
            return False
        if not obstacle and first and stretch.skip:
            obstacle = self.fixed.get(first) or folding.absorb_skip(self.model, first)
            if not obstacle:
                self.note_skip(first, stretch)
                return True
        gone = [b.name for b in stretch.between if b.name in self.linear]
        if not first and not obstacle and gone:
            obstacle = f"{gone[0]!r} is linear and gone; {stretch.end or 'no layer stands before'}"
        if first or obstacle:
            self.keep(stretch, obstacle or stretch.end)
        return False

    def keep(self, stretch: Stretch, reason: str, **fields: Any) -> None:
        self.kept.append(_Row(0, self.pair(stretch, "kept", reason, **fields)))

    def pair(self, stretch: Stretch, action: str, reason: str, **fields: Any) -> Pair:
        names = [b.name for b in stretch.between if b.name and b.name not in self.gone]
        between = tuple(name.removeprefix("function ") for name in names)
        return Pair(stretch.first, stretch.second, action, reason, between, **fields)

    def obstacle(self, first: str, between: folding.Between) -> str:
        """Take away what stands between, or say why it stays."""
        name = between.name
        if between.obstacle:
            return between.obstacle
        module = self.model.get_submodule(name)
        if folding.hands_on(module, between.shape):
            return ""
        kind = type(module).__name__
        if isinstance(module, folding.NORMS):
            return self.norm_after(first, between) if first else ""
        slope = _slope_of(module)
        if slope is not None:
            far = max(slope, key=lambda s: abs(1 - s))
            return f"the slope of {name!r} is {far:.2f}, further than {self.threshold:g} from 1"
        if folding.is_activation(module):
            return f"{name!r} ({kind}) stays between them"
        if "Avg" in kind:
            return f"{name!r} ({kind}) stands between, linear but not merged here"
        return f"{name!r} ({kind}) stands between"

    def norm_after(self, first: str, between: folding.Between) -> str:
        name = between.name
        layer, norm = self.model.get_submodule(first), self.model.get_submodule(name)
        why = self.fixed.get(first) or self.fixed.get(name, "")
        if not why and isinstance(layer, nn.Linear) and len(between.shape) != 2:
            why = f"{name!r} ({type(norm).__name__}) normalises positions, not units"
        if not why:
            try:
                merged = merge_norm(layer, norm)
            except (ValueError, TypeError) as error:
                why = _sentence(error)
        if not why:
            folding.replace(self.model, first, merged.train(layer.training))
            folding.replace(self.model, name, nn.Identity().train(norm.training))
        self.norms[name] = why or f"merged into {first!r}"
        return why

    def norm_before(self, stretch: Stretch) -> None:
        """Merge a norm into the layer behind it, where one layer is exact."""
        for between in reversed(stretch.between):
            if between.obstacle or not stretch.second or stretch.second in self.host:
                return
            norm = self.model.get_submodule(between.name)
            if folding.hands_on(norm, between.shape):
                continue
            name, layer = between.name, self.model.get_submodule(stretch.second)
            if not isinstance(norm, folding.NORMS):
                return
            why = self.fixed.get(stretch.second) or self.fixed.get(name, "")
            if not why and isinstance(layer, nn.Linear) and len(between.shape) != 2:
                why = f"{name!r} ({type(norm).__name__}) normalises positions, not units"
            if not why:
                try:
                    merged = merge(norm, layer, border="refuse")
                except (ValueError, TypeError) as error:
                    why = _sentence(error)
            if not why:
                folding.replace(self.model, stretch.second, merged.train(layer.training))
                folding.replace(self.model, name, nn.Identity().train(norm.training))
                self.start[stretch.second] = name
            self.norms[name] = why or f"merged into {stretch.second!r}"
            return

    def merge_pair(self, first: str, stretch: Stretch) -> None:
        second = stretch.second
        one, two = self.model.get_submodule(first), self.model.get_submodule(second)
        why = self.fixed.get(first) or self.fixed.get(second)
        if why:
            return self.keep(stretch, why)
        try:
            before = folding.macs(one, self.shape[first]) + folding.macs(two, stretch.second_shape)
            trial = merge(folding.shadow(one), folding.shadow(two), border=self.border)
            after = folding.macs(trial, self.shape[first])
            width = border_width(one, two) if self.border == "interior" else 0
            counts = {"macs_before": before, "macs_after": after, "border_width": width}
            if after > before and not self.force:
                why = f"would cost {after / before - 1:.0%} more multiply-adds"
                why += f" ({_short(before)} to {_short(after)})"
                return self.keep(stretch, why, **counts)
            merged = merge(one, two, border=self.border)
        except (ValueError, TypeError) as error:
            return self.keep(stretch, _sentence(error))
        rounded = [b.name for b in stretch.between if self.linear.get(b.name, 1) != 1]
        if width or rounded or second in self.inexact:
            self.inexact.add(first)
        why = "one layer equals the two"
        if isinstance(merged, BorderedConv2d):
            why = "one layer equals the two, with the border computed apart"
        if rounded:
            why = f"one layer, with the slope {self.linear[rounded[0]]:.3g} of {rounded[0]!r} as 1"
        if width:
            why += f"; {width} pixels at each border differ"
        pair = self.pair(stretch, "merged", why, exact=first not in self.inexact, **counts)
        folding.replace(self.model, first, merged.train(one.training))
        self.take_away([*(b.name for b in stretch.between), second], two.training)
        self.host[second] = first
        start = self.start.get(first, first)
        self.merged.append(_Row(0, pair, merged, start, second))

    def note_skip(self, first: str, stretch: Stretch) -> None:
        layer = self.model.get_submodule(first)
        cost = folding.macs(layer, self.shape[first])
        why = "x + layer(x) is one layer, with the identity in its kernel"
        fields = {"exact": first not in self.inexact, "macs_before": cost, "macs_after": cost}
        pair = self.pair(stretch, "merged", why, **fields)
        self.take_away([b.name for b in stretch.between], layer.training)
        end = stretch.between[-1].name if stretch.between else stretch.first
        self.merged.append(_Row(0, pair, layer, self.start.get(first, first), end, skip=True))

    def take_away(self, names: list[str], training: bool) -> None:
        for name in names:
            folding.replace(self.model, name, nn.Identity().train(training))
        self.gone.update(names)

    def rows(self) -> list[_Row]:
        """All rows in execution order."""

        def place(row: _Row) -> int:
            return self.order[row.pair.first or row.pair.between[0]]

        return sorted([*self.merged, *self.kept], key=place)


def _compare(
    original: nn.Module, folded: nn.Module, rows: list[_Row], example: Example
) -> tuple[list[Pair], float]:
    """Fill in the differences, by one run of each network."""
    waiting: dict[int, Tensor] = {}
    found: dict[int, float] = {}
    modules = dict(original.named_modules())
    handles = []

    def before(i: int, row: _Row) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            waiting[i] = cast(nn.Module, row.layer)(args[0])
            if row.skip:
                waiting[i] = waiting[i] - args[0]

        return hook

    def after(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[i] = _largest(waiting.pop(i) - output)

        return hook

    for i, row in enumerate(rows):
        if row.layer is not None:
            start = modules.get(row.start) or modules[row.start.removesuffix(".norm")]
            end = modules.get(row.end) or modules[row.end.removesuffix(".norm")]
            handles.append(start.register_forward_pre_hook(before(i, row)))
            handles.append(end.register_forward_hook(after(i)))
    try:
        with undisturbed(original), torch.no_grad():
            expected = tensors_in(original(*model_inputs(original, example)))
    finally:
        for handle in handles:
            handle.remove()
    with undisturbed(folded), torch.no_grad():
        given = tensors_in(folded(*model_inputs(folded, example)))
    difference = max(_largest(a - b) for a, b in zip(given, expected, strict=True))
    pairs = [replace(row.pair, difference=found.get(i, 0.0)) for i, row in enumerate(rows)]
    return pairs, difference


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _slope_of(module: nn.Module) -> list[float] | None:
    """Return the slopes below zero of an activation that is linear on each side, else None."""
    if isinstance(module, Slope):
        return [float(module.slope.detach())]
    if isinstance(module, nn.PReLU):
        return cast(list[float], module.weight.detach().tolist())
    if isinstance(module, nn.LeakyReLU):
        return [module.negative_slope]
    return None


def _name_of(stretch: Stretch) -> str:
    return stretch.first or stretch.between[0].name


def _sentence(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _short(count: int) -> str:
    """Write a number of multiply-adds as people say it."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
