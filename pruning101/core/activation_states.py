"""What comes into each activation of a network: who made it, and its states over a data set."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning101.core import runs, structure
from pruning101.core.state_entropy import (
    NORMS,
    PIECE,
    Zero,
    check_choice,
    count_states,
    entropy_of_counts,
)
from pruning101.core.tracing import Example, Tracer, hooked, model_inputs, tensors_in, undisturbed

Average = Literal["counts", "batches"]
Batches = Iterable[tuple[Tensor, Tensor]]

# --- where an activation's input comes from ----------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What made the input of one call of an activation: names of its last weighted layer and norm.

    Each is None where there is none since the activation before, or, of the layer, where its norm
    reads several branches. ``joined`` says that branches meet between them and the activation (the
    sum of a residual block); ``unit_axis`` is 1 or -1.
    """

    layer: str | None
    norm: str | None
    joined: bool
    unit_axis: int


def origins(model: nn.Module, example: Example) -> dict[str, Origin]:
    """Return where the input of each call of an activation comes from, in order of the calls.

    Found by running the model once; it stays as it was. The k-th call of a module, from the second
    on, has the name ``"name#k"``. Where branches meet, the deepest one counts: of a residual sum,
    not the skip. Units are on the last axis after a linear layer or LayerNorm, else on axis 1,
    unless that axis has another size than the layer has units and the other has this one.
    """
    inputs = model_inputs(model, example)
    modules = dict(model.named_modules())
    acting = structure.activations(model)
    kinds = dict.fromkeys(structure.prunable(model), "layer")
    kinds |= {n: "norm" for n, m in modules.items() if isinstance(m, NORMS)}
    kinds |= dict.fromkeys(acting, "activation")
    found: dict[str, Origin] = {}
    calls: dict[str, int] = {}
    trace = _OriginTrace(model, inputs)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = trace.features((args, kwargs))
            if kinds[name] == "activation" and given:
                layer, norm, joined = trace.origin(given)
                maker = modules[norm or layer] if norm or layer else None
                axis = _unit_axis(given[0], maker)
                found[_call_name(name, calls)] = Origin(layer, norm, joined, axis)
            trace.running.append((kinds[name], name))

        return hook

    def leave(*_: Any) -> None:
        trace.running.pop()

    watched = {name: modules[name] for name in kinds}
    with undisturbed(model), torch.no_grad(), trace, hooked(watched, enter, leave):
        model(*inputs)
    return found


_Made = tuple[str | None, str | None, bool]  # layer, norm, joined


class _OriginTrace(Tracer):
    """Note for each value the last weighted layer and norm on the deepest way to it."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__(model, inputs)
        self.running: list[tuple[str, str]] = []
        self._made: dict[int, _Made] = {}  # by version

    def origin(self, tensors: list[Tensor]) -> _Made:
        values = [value for t in tensors if (value := self.value(t)) is not None]
        if not values:
            return None, None, False
        deepest = max(values, key=lambda value: value.depth)
        layer, norm, joined = self._made.get(deepest.version, (None, None, False))
        return layer, norm, joined or len({value.version for value in values}) > 1

    def operation(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], made: list[Tensor]
    ) -> None:
        origin = self.origin(self.features(inputs))
        kind, module = self.running[-1] if self.running else ("", "")
        if kind == "layer":
            origin = module, None, False
        elif kind == "norm":
            origin = None if origin[2] else origin[0], module, False
        elif kind == "activation":
            origin = None, None, False
        super().operation(name, args, inputs, made)
        for tensor in self.features(made):
            value = self.value(tensor)
            assert value is not None
            self._made[value.version] = origin


def _unit_axis(z: Tensor, maker: Any) -> int:
    last = isinstance(maker, nn.Linear | nn.LayerNorm) or (maker is None and z.ndim == 3)
    preferred, other = (-1, 1) if last else (1, -1)
    units = None
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        units = units or getattr(maker, name, None)
    if isinstance(maker, nn.LayerNorm):
        units = maker.normalized_shape[-1]
    moved = z.ndim > 1 and z.shape[preferred] != units and z.shape[other] == units
    return other if moved else preferred


def _call_name(name: str, calls: dict[str, int]) -> str:
    calls[name] = calls.get(name, 0) + 1
    return name if calls[name] == 1 else f"{name}#{calls[name]}"


# --- one pass over the data --------------------------------------------------------------------


def layer_entropies(
    model: nn.Module,
    batches: Batches,
    *,
    zero: Zero = "ignore",
    exclude_saturated: bool = False,
    average: Average = "counts",
    layers: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the mean state entropy, in bits, of each activation's input, by the activation's name.

    One pass in ``eval`` mode over ``batches`` of ``(images, labels)``; the model is left as it was.
    States are counted as integers, so the result is that of :func:`state_entropy` on all images at
    once, whatever the batches, in memory that does not grow with their number. The published codes
    take the mean of the batches' entropies instead, which is lower: ``average="batches"``.

    Activations are those of ``structure.activations``, or ``layers`` among them, in the order in
    which they run; one that does not run is left out. The second call of a module that is called
    twice (torchvision's residual blocks) is another layer, ``"layer1.0.relu#2"``. What is read is
    what comes in, before an activation in place overwrites it; the axis of the units is found by
    :func:`origins`. Functions (``torch.relu``) are not seen: ``core.slopes.separate_activations``
    makes modules of them.

    Raises:
        ValueError: no activation, an unknown layer or option, no batches, or NaN in the outputs.
    """
    check_choice("zero", zero, ("ignore", "on", "off"))
    check_choice("average", average, ("counts", "batches"))
    counts: dict[str, Tensor] = {}
    sums: dict[str, float] = {}

    def see(name: str, z: Tensor, axis: int) -> None:
        new = count_states(z, zero, axis)
        counts[name] = counts[name] + new if name in counts else new

    def after_batch() -> None:
        if average == "batches":
            for name, of_batch in counts.items():
                entropy = float(entropy_of_counts(of_batch, exclude_saturated))
                sums[name] = sums.get(name, 0.0) + entropy
            counts.clear()

    n = observe(model, batches, layers, see, after_batch)
    if average == "batches":
        return {name: total / n for name, total in sums.items()}
    return {name: float(entropy_of_counts(c, exclude_saturated)) for name, c in counts.items()}


@dataclass(frozen=True)
class Moments:
    """Mean and unbiased standard deviation of each unit, [C] each, in float64."""

    mean: Tensor
    std: Tensor


def activation_moments(
    model: nn.Module, batches: Batches, *, layers: Sequence[str] | None = None
) -> dict[str, Moments]:
    """Return mean and standard deviation of each unit of the activations' inputs, in one pass.

    Over all images and positions, as :func:`layer_entropies` goes about it; for
    :func:`~core.state_entropy.state_probability` where no norm says them.

    Raises:
        ValueError: no activation, an unknown layer, no batches, or NaN in the outputs.
    """
    found: dict[str, tuple[int, Tensor, Tensor]] = {}  # numbers seen, mean, squared deviations

    def see(name: str, z: Tensor, axis: int) -> None:
        dims = [d for d in range(z.ndim) if d != axis % z.ndim]
        for part in z.split(max(1, len(z) * PIECE // z.numel())):
            part = part.cpu().double()
            n = part.numel() // part.shape[axis]
            variance, mean = torch.var_mean(part, dims, correction=0)
            squares = variance * n
            if name in found:  # Chan, Golub and LeVeque 1979: joining two groups
                m, mean_before, squares_before = found[name]
                gap = mean - mean_before
                squares = squares_before + squares + gap.square() * (m * n / (m + n))
                mean, n = mean_before + gap * (n / (m + n)), m + n
            found[name] = n, mean, squares

    observe(model, batches, layers, see)
    return {
        name: Moments(mean, (squares / max(n - 1, 1)).sqrt())
        for name, (n, mean, squares) in found.items()
    }


def observe(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[str] | None,
    see: Callable[[str, Tensor, int], None],
    after_batch: Callable[[], None] = lambda: None,
) -> int:
    """Run the model over ``batches`` with ``see(name, z, unit_axis)`` before each activation's run.

    In ``eval`` mode, without gradients; returns the number of batches. Names are those of
    :func:`origins`.
    """
    modules = structure.activations(model)
    if not modules:
        raise ValueError(
            "the model has no activation that is a module; core.slopes.separate_activations makes "
            "modules of functions such as torch.relu."
        )
    chosen = modules if layers is None else {name: modules.get(name) for name in layers}
    for name, module in chosen.items():
        if module is None:
            near = difflib.get_close_matches(name, modules, n=3) or list(modules)[:3]
            raise ValueError(f"the model has no activation {name!r}; near it are {near}.")
    device, dtype = runs.device_of(model), runs.dtype_of(model)
    calls: dict[str, int] = {}
    known: dict[str, Origin] = {}
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            z, call = tensors_in((args, kwargs))[0], _call_name(name, calls)
            see(call, z, known[call].unit_axis)

        return hook

    n = 0
    with undisturbed(model), torch.no_grad():
        try:
            for images, _ in batches:
                if not len(images):
                    raise ValueError("a batch holds no images; give batches of at least one.")
                images = images.to(device, dtype)
                if not n:
                    runs.trial("model", model, images[:2])
                    known |= origins(model, images[:2])
                    for name in chosen:
                        hook = watch(name)
                        handle = modules[name].register_forward_pre_hook(hook, with_kwargs=True)
                        handles.append(handle)
                calls.clear()
                outputs = model(images)
                if any(bool(t.isnan().any()) for t in tensors_in(outputs)):
                    raise ValueError(
                        "the model's outputs hold NaN, which no state can be told from; look for "
                        "NaN in its weights and inputs."
                    )
                after_batch()
                n += 1
        finally:
            for handle in handles:
                handle.remove()
    if not n:
        raise ValueError("there are no batches to look at; give at least one.")
    return n
