"""Which state the inputs of an activation are in: signs counted, entropies and Gaussian shares.

Everything about one layer's pre-activations z is a number a unit (a channel, or a feature of a
token), over the batch and all positions.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning101.core import runs, structure
from pruning101.core.tracing import Example, Tracer, hooked, model_inputs, tensors_in, undisturbed

Zero = Literal["ignore", "on", "off"]
Average = Literal["counts", "batches"]
Batches = Iterable[tuple[Tensor, Tensor]]
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_PIECE = 2**20  # numbers looked at together: what is read stays in the cache

# --- entropies ---------------------------------------------------------------------------------


def binary_entropy(probability: Tensor) -> Tensor:
    """Return ``-p log2 p - (1 - p) log2 (1 - p)`` in bits, elementwise, with ``0 log2 0 = 0``."""
    total = torch.special.entr(probability) + torch.special.entr(1 - probability)
    return total / math.log(2)


def state_entropy(
    pre_activation: Tensor,
    *,
    zero: Zero = "ignore",
    exclude_saturated: bool = False,
    unit_axis: int = 1,
) -> Tensor:
    """Return the mean entropy, in bits, of the units' states ON (z > 0) and OFF (z < 0): a scalar.

    ``pre_activation`` is z, [B, C, ...] with the units on ``unit_axis`` (-1 for tokens [B, T, C]).
    A unit's probability p of being ON is its share over the batch and all positions; the entropy is
    that of this one p, then averaged over units. The papers differ in what z = 0 is:

    - ``"ignore"``: a third state that is left out, p = P(z > 0) / P(z != 0). A unit that is always
      0 has entropy 0. EASIER's and NEPENTHE's papers.
    - ``"on"``: p = P(z >= 0), EASIER's published code.
    - ``"off"``: p = P(z > 0), EGP's, with ``exclude_saturated``: units with p = 0 or 1 do not take
      part in the mean, which is 0 where none is left.

    Source: Quétu, Liao and Tartaglione, The simpler the better (EASIER), ECML PKDD 2024
    (arXiv 2404.18949); Liao, Quétu, Nguyen and Tartaglione, Can unstructured pruning reduce the
    depth in deep neural networks? (EGP), ICCV workshops 2023 (arXiv 2308.06619).

    Raises:
        ValueError: no numbers, NaN among them, an axis that is not there, or an unknown ``zero``.
        TypeError: numbers that are no floating-point tensor.
    """
    _check_choice("zero", zero, ("ignore", "on", "off"))
    if not isinstance(pre_activation, Tensor) or not pre_activation.is_floating_point():
        kind = getattr(pre_activation, "dtype", type(pre_activation).__name__)
        raise TypeError(f"pre_activation must be a floating-point tensor [B, C, ...], not {kind}.")
    shape = list(pre_activation.shape)
    if not pre_activation.numel() or not -len(shape) <= unit_axis < len(shape):
        raise ValueError(
            f"pre_activation must hold numbers and have the axis unit_axis={unit_axis} (1 for "
            f"[B, C, ...], -1 for tokens [B, T, C]); its shape is {shape}."
        )
    z = pre_activation.detach()
    if bool(z.isnan().any()):
        raise ValueError("pre_activation holds NaN, which has no sign; look at what made it.")
    entropy = entropy_of_counts(count_states(z, zero, unit_axis), exclude_saturated)
    return entropy.to(z.device, torch.promote_types(z.dtype, torch.float32))


def count_states(z: Tensor, zero: Zero, unit_axis: int = 1) -> Tensor:
    """Return how often each unit is ON, and how often it is in any state that counts: [2, C].

    Integers, so that counts of batches add up exactly.
    """
    axis = unit_axis % z.ndim
    others = [d for d in range(z.ndim) if d != axis]
    on = _count(z, torch.ge if zero == "on" else torch.gt, others)
    total = torch.full_like(on, z.numel() // z.shape[axis])
    # Looking at all numbers once is cheap, and hardly any layer has an exact zero.
    if zero == "ignore" and int(torch.count_nonzero(z)) < z.numel():
        total = _count(z, torch.ne, others)
    return torch.stack([on, total])


def _count(z: Tensor, compare: Callable[[Tensor, float], Tensor], dims: list[int]) -> Tensor:
    """How often ``compare(z, 0)`` holds along ``dims``, in pieces whose sums fit in 32 bits."""
    rows = max(1, len(z) * _PIECE // z.numel()) if 0 in dims else len(z)
    parts = [compare(part, 0).sum(dims, dtype=torch.int32).long() for part in z.split(rows)]
    return torch.stack(parts).sum(0)


def entropy_of_counts(counts: Tensor, exclude_saturated: bool = False) -> Tensor:
    """Return the mean entropy in bits of units counted by :func:`count_states`: float64, scalar."""
    on, total = counts.cpu().double()
    probability = on / total.clamp(min=1)  # never in a state: 0
    entropy = binary_entropy(probability)
    if exclude_saturated:
        entropy = entropy[(on > 0) & (on < total)]
    return entropy.mean() if len(entropy) else torch.zeros((), dtype=torch.float64)


# --- closed forms ------------------------------------------------------------------------------


def state_probability(mean: Tensor, std: Tensor) -> Tensor:
    """Return P(z > 0) = Phi(mean / std) of Gaussian units; where std is 0, 1 for a mean above 0."""
    return _normal_cdf(mean, std)


def state_error_likelihood(mean: Tensor, std: Tensor) -> Tensor:
    """Return Phi(-|mean| / std), the smaller of P(z > 0) and P(z < 0); 0 where std is 0."""
    return _normal_cdf(-mean.abs(), std)


def norm_state_probability(norm: nn.Module) -> Tensor:
    """Return P(z > 0) = Phi(beta / |gamma|) of each channel after a norm: [C].

    What the norm gives is taken as Gaussian with mean beta (its bias) and standard deviation
    |gamma| (its weight); a norm without them has 0 and 1. gamma = 0: 1 where beta > 0, else 0.

    Source: Liao et al., Till the layers collapse (TLC), AAAI 2025 (arXiv 2412.15077).

    Raises:
        TypeError: a module that is no BatchNorm, LayerNorm, GroupNorm or InstanceNorm.
    """
    return state_probability(*norm_moments(norm))


def error_likelihood(norm: nn.Module) -> Tensor:
    """Return Phi(-|beta| / |gamma|) of each channel after a norm: [C].

    How likely a unit is in the less likely of its two states, and so how often it is wrong to take
    the other for granted. gamma = 0: 0. (Printed with gamma instead of |gamma|, which is the same
    as long as gamma is positive.)

    Source: TLC, as :func:`norm_state_probability`.

    Raises:
        TypeError: a module that is no BatchNorm, LayerNorm, GroupNorm or InstanceNorm.
    """
    return state_error_likelihood(*norm_moments(norm))


def norm_moments(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return beta and |gamma| of a norm, mean and standard deviation of what it gives: 2 x [C]."""
    if not isinstance(norm, _NORMS):
        raise TypeError(
            f"a {type(norm).__name__} is no norm: give a BatchNorm, LayerNorm, GroupNorm or "
            "InstanceNorm, or use the mean and standard deviation of what it gives."
        )
    sizes = [getattr(norm, n, None) for n in ("num_features", "num_channels", "normalized_shape")]
    size = cast(Any, next(size for size in sizes if size is not None))
    gamma, beta = cast(Tensor | None, norm.weight), cast(Tensor | None, norm.bias)
    like = beta if gamma is None else gamma
    like = torch.zeros(()) if like is None else like.detach()
    mean = like.new_zeros(size) if beta is None else beta.detach()
    return mean, like.new_ones(size) if gamma is None else gamma.detach().abs()


def _normal_cdf(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Phi(numerator / denominator), the limit where the denominator is 0 (Phi(0 / 0) is 0)."""
    exact = numerator.double() / denominator.double()
    exact = torch.where(denominator == 0, torch.where(numerator > 0, math.inf, -math.inf), exact)
    return (torch.erfc(-exact / math.sqrt(2)) / 2).to(numerator.dtype)


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
    kinds = {n: "layer" for n, m in modules.items() if isinstance(m, _WEIGHTED)}
    kinds |= {n: "norm" for n, m in modules.items() if isinstance(m, _NORMS)}
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
    _check_choice("zero", zero, ("ignore", "on", "off"))
    _check_choice("average", average, ("counts", "batches"))
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
    :func:`state_probability` where no norm says them.

    Raises:
        ValueError: no activation, an unknown layer, no batches, or NaN in the outputs.
    """
    found: dict[str, tuple[int, Tensor, Tensor]] = {}  # numbers seen, mean, squared deviations

    def see(name: str, z: Tensor, axis: int) -> None:
        dims = [d for d in range(z.ndim) if d != axis % z.ndim]
        for part in z.split(max(1, len(z) * _PIECE // z.numel())):
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


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {choices}, not {value!r}.")
