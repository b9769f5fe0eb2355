"""Merging whatever can be merged on the stretches between layers, and the account of it.

The work behind ``layer_folding.fold``.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning101.core import masks, slopes, stretches
from pruning101.core.merging import (
    Border,
    BorderedConv2d,
    border_width,
    merge,
    merge_norm,
)
from pruning101.core.skips import absorb_skip
from pruning101.core.stretches import NORMS, Between, Stretch, macs, shadow
from pruning101.core.surgery import put
from pruning101.core.tracing import Example, model_inputs, tensors_in, undisturbed


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


def check_foldable(model: nn.Module, threshold: float, border: str) -> None:
    """Refuse what cannot be folded, in one sentence."""
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
        if module.training and isinstance(module, NORMS | nn.modules.dropout._DropoutNd):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) is in training mode, where it is no fixed "
                "linear map; call model.eval() first"
            )


def check_example(model: nn.Module, example: Example) -> None:
    """Refuse an example, or a model, that has nothing in it."""
    if any(x.numel() == 0 for x in model_inputs(model, example) if isinstance(x, Tensor)):
        raise ValueError("the example is an empty batch; give at least one input")
    if next(model.children(), None) is None:
        raise ValueError("the model is a single layer, with nothing beside it to merge")


@dataclass
class Row:
    """A row in the making, and between which of the original modules its layer has to stand."""

    order: int
    pair: Pair
    layer: nn.Module | None = None
    start: str = ""
    end: str = ""
    plus: tuple[str, ...] = ()  # their inputs are added to what ``end`` gives


class Folding:
    """The work of one :func:`~layer_folding.fold`: what is merged so far, and the rows."""

    def __init__(
        self, model: nn.Module, threshold: float, border: Border, force: bool, norms: bool
    ) -> None:
        self.model, self.threshold, self.border, self.force = model, threshold, border, force
        self.all_norms = norms
        self.merged: list[Row] = []
        self.kept: list[Row] = []  # of the last round
        self.norms: dict[str, str] = {}
        self.linear: dict[str, float] = {}
        self.host: dict[str, str] = {}  # the layer that a layer was merged into
        self.start: dict[str, str] = {}  # the norm that was merged into the layer behind it
        # The original module that gives what a layer gives now, and whose inputs are added to that.
        self.end: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.order: dict[str, int] = {}
        self.gone: set[str] = set()  # what stood within an earlier merge
        self.inexact: set[str] = set()  # layers that hold an inexact merge

    def drop_linear(self) -> None:
        """Put Identity in the place of all activations within the threshold."""
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            slope = slopes.slope_of(module)
            # 0.9 in single precision is a little less than that: it still is within 0.1.
            if slope is not None and all(abs(1 - s) <= self.threshold + 1e-6 for s in slope):
                put(self.model, name, nn.Identity().train(module.training))
                self.linear[name] = max(slope, key=lambda s: abs(1 - s))

    def merge_all(self, example: Example) -> bool:
        """Merge what can be; tell whether a skip was merged, so that more may follow."""
        self.kept, skips = [], 0
        self.fixed = stretches.shared(self.model)
        found = stretches.stretches(self.model, example, self.linear)
        for stretch in found:
            self.place(stretch)
            self.spare_inputs(stretch)
            if stretch.first:
                self.shape.setdefault(stretch.first, stretch.shape)
            skips += self.merge_one(stretch)
        if self.all_norms:
            for stretch in found:
                self.norm_before(stretch)
        return skips > 0

    def spare_inputs(self, stretch: Stretch) -> None:
        """Let nothing write over what a linear activation, now gone, had handed on as new."""
        between = [b.name for b in stretch.between if b.name]
        names = [name for name in between if not name.startswith("function ")]
        linear = [i for i, name in enumerate(names) if name in self.linear]
        for name in names[linear[0] :] if linear else []:
            module: Any = self.model.get_submodule(name)
            if getattr(module, "inplace", False):
                module.inplace = False

    def merge_one(self, stretch: Stretch) -> bool:
        """Do what can be done on one stretch; tell whether a skip was merged."""
        first = stretch.first
        while first in self.host:
            first = self.host[first]
        layer = self.model.get_submodule(first) if first else None
        norms: list[str] = []
        obstacle = ""
        for between in stretch.between:
            module = None if between.obstacle else self.model.get_submodule(between.name)
            if layer is not None and isinstance(module, NORMS):
                layer, obstacle = self.with_norm(first, layer, between)
                norms += [] if obstacle else [between.name]
            else:
                obstacle = self.obstacle(module, between) if not isinstance(module, NORMS) else ""
            if obstacle:
                break
        if first and self.all_norms:
            self.take_norms(first, layer, norms)
        if not obstacle and layer is not None and stretch.second:
            self.merge_pair(first, layer, norms, stretch)
            return False
        if not obstacle and layer is not None and stretch.skip:
            before = {name: self.model.get_submodule(name) for name in (first, *norms)}
            self.take_norms(first, layer, norms)
            obstacle = self.fixed.get(first) or absorb_skip(self.model, first)
            if not obstacle:
                self.note_skip(first, stretch)
                return True
            if not self.all_norms:
                for name, module in before.items():
                    put(self.model, name, module)
                    self.norms.pop(name, None)
        gone = [b.name for b in stretch.between if b.name in self.linear]
        if not first and not obstacle and gone:
            obstacle = f"{gone[0]!r} is linear and gone; {stretch.end or 'no layer stands before'}"
        if first or obstacle:
            self.keep(stretch, obstacle or stretch.end)
        return False

    def keep(self, stretch: Stretch, reason: str, **fields: Any) -> None:
        """Note that a stretch stays as it is."""
        self.kept.append(Row(self.place(stretch), self.pair(stretch, "kept", reason, **fields)))

    def pair(self, stretch: Stretch, action: str, reason: str, **fields: Any) -> Pair:
        """Return the row of a stretch."""
        names = [b.name for b in stretch.between if b.name and b.name not in self.gone]
        between = tuple(name.removeprefix("function ") for name in names)
        return Pair(stretch.first, stretch.second, action, reason, between, **fields)

    def obstacle(self, module: nn.Module | None, between: Between) -> str:
        """Say why what stands between stays, or "" if it does nothing."""
        if module is None:
            return between.obstacle
        if stretches.hands_on(module, between.shape):
            return ""
        name, kind = between.name, type(module).__name__
        slope = slopes.slope_of(module)
        if slope is not None:
            far = max(slope, key=lambda s: abs(1 - s))
            return f"the slope of {name!r} is {far:.2f}, further than {self.threshold:g} from 1"
        if stretches.is_activation(module):
            return f"{name!r} ({kind}) stays"
        if "Avg" in kind:
            return f"{name!r} ({kind}) stands between, linear but not merged here"
        return f"{name!r} ({kind}) stands between"

    def with_norm(self, first: str, layer: nn.Module, between: Between) -> tuple[nn.Module, str]:
        """Return the layer in the place ``first`` with the norm behind it, or why that is not."""
        norm = self.model.get_submodule(between.name)
        why = self.fixed.get(first) or self.fixed.get(between.name, "")
        if not why and isinstance(layer, nn.Linear) and len(between.shape) != 2:
            why = f"{between.name!r} ({type(norm).__name__}) normalises positions, not units"
        if not why:
            try:
                return merge_norm(layer, norm).train(layer.training), ""
            except (ValueError, TypeError) as error:
                why = _sentence(error)
        self.norms[between.name] = why
        return layer, why

    def take_norms(self, first: str, layer: nn.Module | None, norms: list[str]) -> None:
        """Put ``layer``, which holds these norms, in the place ``first``."""
        assert layer is not None
        if norms:
            put(self.model, first, layer)
            self.take_away(norms, layer.training, inside=False)
            self.end[first] = (norms[-1], ())
        self.norms |= dict.fromkeys(norms, f"merged into {first!r}")

    def norm_before(self, stretch: Stretch) -> None:
        """Merge a norm into the layer behind it, where one layer is exact."""
        for between in reversed(stretch.between):
            if between.obstacle or not stretch.second or stretch.second in self.host:
                return
            norm = self.model.get_submodule(between.name)
            if stretches.hands_on(norm, between.shape):
                continue
            name, layer = between.name, self.model.get_submodule(stretch.second)
            if not isinstance(norm, NORMS):
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
                put(self.model, stretch.second, merged.train(layer.training))
                put(self.model, name, nn.Identity().train(norm.training))
                self.start[stretch.second] = name
            self.norms[name] = why or f"merged into {stretch.second!r}"
            return

    def merge_pair(self, first: str, one: nn.Module, norms: list[str], stretch: Stretch) -> None:
        """Merge ``one``, in the place ``first``, with the layer at the end, if that is worth it."""
        second, two = stretch.second, self.model.get_submodule(stretch.second)
        why = self.fixed.get(first) or self.fixed.get(second)
        if why:
            return self.keep(stretch, why)
        try:
            before = macs(one, self.shape[first]) + macs(two, stretch.second_shape)
            trial = merge(shadow(one), shadow(two), border=self.border)
            after = macs(trial, self.shape[first])
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
        self.take_norms(first, one, norms)
        put(self.model, first, merged.train(one.training))
        self.take_away([*(b.name for b in stretch.between), second], two.training)
        self.host[second] = first
        self.end[first] = self.end.get(second, (second, ()))
        self.note(first, stretch, pair, merged)

    def note_skip(self, first: str, stretch: Stretch) -> None:
        """Note that the sum behind the layer ``first`` is gone."""
        layer = self.model.get_submodule(first)
        cost = macs(layer, self.shape[first])
        why = "x + layer(x) is one layer, with the identity in its kernel"
        fields = {"exact": first not in self.inexact, "macs_before": cost, "macs_after": cost}
        pair = self.pair(stretch, "merged", why, **fields)
        self.take_away([b.name for b in stretch.between], layer.training)
        end, plus = self.end.get(first, (first, ()))
        if stretch.between:
            end, plus = stretch.between[-1].name, ()
        self.end[first] = end, (*plus, self.start.get(first, first))
        self.note(first, stretch, pair, layer)

    def note(self, first: str, stretch: Stretch, pair: Pair, layer: nn.Module) -> None:
        """Note a merge, with the layer as it is now and what it has to equal."""
        start = self.start.get(first, first)
        self.merged.append(Row(self.place(stretch), pair, layer, start, *self.end[first]))

    def take_away(self, names: list[str], training: bool, *, inside: bool = True) -> None:
        """Put Identity in the place of modules that a merge has taken in."""
        for name in names:
            put(self.model, name, nn.Identity().train(training))
        self.gone.update(names if inside else ())

    def place(self, stretch: Stretch) -> int:
        """Return when the stretch was run, in the first round that knew it."""
        return self.order.setdefault(stretch.first or stretch.between[0].name, stretch.order)

    def rows(self) -> list[Row]:
        """All rows in execution order."""
        return sorted([*self.merged, *self.kept], key=lambda row: row.order)


def compare(
    original: nn.Module, folded: nn.Module, rows: list[Row], example: Example
) -> tuple[list[Pair], float]:
    """Fill in the differences, by one run of each network."""
    waiting: dict[int, Tensor] = {}
    found: dict[int, float] = {}
    modules = dict(original.named_modules())
    handles = []

    def before(i: int, row: Row) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            waiting[i] = cast(nn.Module, row.layer)(args[0]) + waiting.get(i, 0)

        return hook

    def minus(i: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            waiting[i] = waiting.get(i, 0) - args[0]

        return hook

    def after(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[i] = _largest(waiting.pop(i) - output)

        return hook

    def at(name: str) -> nn.Module:
        return modules[name if name in modules else name.removesuffix(".norm")]

    for i, row in enumerate(rows):
        if row.layer is not None:
            handles.append(at(row.start).register_forward_pre_hook(before(i, row)))
            handles.extend(at(name).register_forward_pre_hook(minus(i)) for name in row.plus)
            handles.append(at(row.end).register_forward_hook(after(i)))
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


def _sentence(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _short(count: int) -> str:
    """Write a number of multiply-adds as people say it."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
