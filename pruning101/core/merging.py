"""Two linear layers with nothing between them are one: how to write that one down.

What two convolutions make of each other is in :mod:`composition`, the layer that is right at the
border, too, in :mod:`bordered`.
"""

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pruning101.core.bordered import BorderedConv2d
from pruning101.core.composition import SIDES, Composition, Convolution

__all__ = ["Border", "BorderedConv2d", "border_width", "merge", "merge_norm", "merge_skip"]

Border = Literal["exact", "interior", "refuse"]

_Layer = TypeVar("_Layer", bound=nn.Module)
_Norm = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What the outputs of a layer need, counted in dimensions; SyncBatchNorm takes all.
_NORM_OF = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    BorderedConv2d: nn.BatchNorm2d,
}


def merge(first: nn.Module, second: nn.Module, *, border: Border = "exact") -> nn.Module:
    """Return one layer that does what ``second(first(x))`` does.

    Two linear layers give a linear layer, two convolutions (any kernel, stride, padding, dilation,
    groups and bias) a convolution, with the groups that both share: gcd(groups1, groups2). Either
    may be a BatchNorm in ``eval`` mode instead: a layer that scales and shifts each channel.

    One convolution is exact if the second has no padding, and wherever the first gives zeros around
    its output (a 1x1 kernel without padding and bias). Elsewhere :func:`border_width` pixels a side
    come out wrong, and ``border`` says what to do:

    - ``"exact"``: a :class:`BorderedConv2d`, equal to the pair everywhere;
    - ``"interior"``: the plain convolution, wrong at the border;
    - ``"refuse"``: a ``ValueError`` that names the width of the border.

    The layers given stay as they are; the new one has their device and dtype, and trains if one of
    them does. It may cost more multiply-adds than the two: compare with ``measure.footprint``.

    Raises:
        ValueError: layers that do not compose or are no fixed linear maps, an unknown border.
        TypeError: other modules than linear layers, 2d convolutions and BatchNorm.
    """
    if border not in ("exact", "interior", "refuse"):
        raise ValueError(f'border must be "exact", "interior" or "refuse", not {border!r}.')
    if isinstance(second, _Norm) and not isinstance(first, _Norm):
        return merge_norm(first, second)
    with torch.no_grad():
        if isinstance(second, nn.Linear):
            return _merge_linear(first, second)
        pair = _composition(first, second)
        width = pair.border_width()
        if width and border == "refuse":
            raise ValueError(
                f"No single convolution equals this pair on the outer {width} output pixels of "
                "each side, where the padding of the second layer hangs over; choose "
                'border="exact" or border="interior".'
            )
        if width and border == "exact":
            merged: nn.Module = BorderedConv2d(pair, requires_grad=_trains(first, second))
            return merged.train(second.training)
        plain = nn.Conv2d(**pair.geometry(), bias=False, device="meta")
        weight = pair.kernels(["weight"])["weight"]
        return _with_parameters(plain, weight, pair.bias(), first, second)


def border_width(first: nn.Module, second: nn.Module) -> int:
    """Return how many output pixels a side no single convolution gets right; 0 if it is exact.

    The largest over the four sides and all input sizes, for layers that :func:`merge` takes. Linear
    layers have no border, nor has a layer with a BatchNorm behind it.

    Raises as :func:`merge` does.
    """
    if isinstance(second, _Norm) and not isinstance(first, _Norm):
        _check_norm(first, second)
        return 0
    if isinstance(second, nn.Linear):
        _check_linear(first, second)
        return 0
    return _composition(first, second).border_width()


def merge_norm(layer: _Layer, norm: nn.Module) -> _Layer:
    """Return ``layer``, then ``norm``, as one layer of the kind of ``layer``, with a bias.

    ``layer``: linear, a convolution in 1 to 3 dimensions, or a :class:`BorderedConv2d`. ``norm``: a
    BatchNorm in ``eval`` mode, y = s (x - mean) + shift with s = scale / sqrt(var + eps) for each
    output channel: the kernel becomes s W, the bias s (b - mean) + shift. After a linear layer the
    features must be what the norm counts, so inputs are [B, C]. Both modules stay as they are.

    Raises:
        ValueError: a norm in training mode or without running statistics, another number of
            channels, a layer that is masked or not yet initialised.
        TypeError: other modules, transposed convolutions among them.
    """
    scale, shift = _check_norm(layer, norm)
    merged: Any = copy.deepcopy(layer)
    trains = _trains(layer, norm)
    for name, parameter in list(merged.named_parameters(recurse=False)):
        if name != "bias":
            value = _wide(parameter) * scale.view(-1, *[1] * (parameter.ndim - 1))
            setattr(merged, name, nn.Parameter(value.to(parameter.dtype), trains))
    bias = shift if merged.bias is None else torch.addcmul(shift, scale, _wide(merged.bias))
    merged.bias = nn.Parameter(bias.to(merged.weight.dtype), trains)
    return merged


def merge_skip(layer: _Layer) -> _Layer:
    """Return ``x + layer(x)`` as one layer: an identity is added to the kernel.

    ``layer`` is linear with as many outputs as inputs, or a convolution (grouped, too) or
    :class:`BorderedConv2d` of stride 1 that keeps channels and size. It stays as it is.

    Raises:
        ValueError: a layer that changes the shape, or is masked or not yet initialised.
        TypeError: other modules.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d | BorderedConv2d):
        raise TypeError(
            "merge_skip takes a linear layer, a 2d convolution or a BorderedConv2d, "
            f"not {type(layer).__name__}."
        )
    _check_own(layer)
    if not _keeps_shape(layer):
        raise ValueError(
            f"x + layer(x) needs a layer that keeps the shape, which {layer} does not."
        )
    merged: Any = copy.deepcopy(layer)
    with torch.no_grad():
        if isinstance(merged, nn.Linear):
            merged.weight.diagonal().add_(1)
        else:
            _add_identity(merged)
    return merged


def _keeps_shape(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    spans = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    keeps_size = [2 * p for p in _padding(layer)] == spans and tuple(layer.stride) == (1, 1)
    return keeps_size and layer.in_channels == layer.out_channels


def _add_identity(layer: Any) -> None:
    for axis in (0, 1):
        if layer.kernel_size[axis] % 2 == 0:
            _give_centre(layer, axis)
    channels = torch.arange(layer.out_channels, device=layer.weight.device)
    inputs = channels % layer.weight.shape[1]
    rows, columns = layer.kernel_size
    layer.weight[channels, inputs, rows // 2, columns // 2] += 1


def _give_centre(layer: Any, axis: int) -> None:
    """Write an even number of dilated taps with zeros between, at half the dilation, in place."""
    names = ["weight"]
    if isinstance(layer, BorderedConv2d):
        whole = [name for name, sides in SIDES.items() if sides[axis] == "all"]
        names += [name for name in whole if getattr(layer, name) is not None]
    for name in names:
        kernel = getattr(layer, name)
        at = kernel.ndim - 2 + axis
        shape = list(kernel.shape)
        shape[at] = 2 * shape[at] - 1
        wider = kernel.new_zeros(shape)
        wider.transpose(0, at)[::2] = kernel.transpose(0, at)
        setattr(layer, name, nn.Parameter(wider, kernel.requires_grad))
    size, dilation = list(layer.kernel_size), list(layer.dilation)
    size[axis], dilation[axis] = 2 * size[axis] - 1, dilation[axis] // 2
    layer.kernel_size, layer.dilation = tuple(size), tuple(dilation)


def _merge_linear(first: Any, second: nn.Linear) -> nn.Linear:
    weight, bias = _check_linear(first, second)
    after = _wide(second.weight)
    # A norm has one factor for each feature: a diagonal.
    product = (after * weight if weight.ndim == 1 else after @ weight).to(second.weight.dtype)
    if bias is not None:
        bias = after @ bias if second.bias is None else after @ bias + _wide(second.bias)
        bias = bias.to(second.weight.dtype)
    elif second.bias is not None:
        bias = second.bias.clone()
    merged = nn.Linear(product.shape[1], product.shape[0], bias=False, device="meta")
    return _with_parameters(merged, product, bias, first, second)


def _with_parameters(
    merged: Any, weight: Tensor, bias: Tensor | None, first: nn.Module, second: nn.Module
) -> Any:
    trains = _trains(first, second)
    merged.weight = nn.Parameter(weight, trains)
    merged.bias = None if bias is None else nn.Parameter(bias, trains)
    return merged.train(second.training)


def _trains(*layers: nn.Module) -> bool:
    return any(p.requires_grad for layer in layers for p in layer.parameters())


# --- what may be merged -----------------------------------------------------------------------


def _composition(first: nn.Module, second: nn.Module) -> Composition:
    one, two = _convolution(first), _convolution(second)
    _check_fit(first, second, one.weight.shape[0], two.weight.shape[1] * two.groups)
    return Composition(one, two, _dtype(second))


def _dtype(layer: nn.Module) -> torch.dtype:
    return next(t for t in (*layer.parameters(), *layer.buffers())).dtype


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least: sums of half precision would lose what there is of it."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if half else tensor.detach()


def _convolution(layer: Any) -> Convolution:
    if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
        scale, shift = _scale_and_shift(layer)
        return Convolution(scale.view(-1, 1, 1, 1), _unless_zero(shift), groups=len(scale))
    if isinstance(layer, BorderedConv2d):
        raise TypeError(
            "A BorderedConv2d is two convolutions merged already and merges with no third; keep "
            'the layers apart, or merge the first two with border="interior".'
        )
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        raise TypeError("A transposed convolution does not merge; only ordinary ones do.")
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(
            "merge takes two linear layers or two 2d convolutions, or a BatchNorm beside one of "
            f"them; {type(layer).__name__} does not fit there."
        )
    _check_own(layer)
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"A convolution with padding_mode={layer.padding_mode!r} does not merge; only one that "
            "pads with zeros does."
        )
    bias = None if layer.bias is None else _unless_zero(_wide(layer.bias))
    return Convolution(
        _wide(layer.weight), bias, layer.stride, _padding(layer), layer.dilation, layer.groups
    )


def _unless_zero(bias: Tensor) -> Tensor | None:
    return bias if bias.is_meta or bool(bias.any()) else None


def _padding(layer: Any) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding != "same":
        return tuple(layer.padding)
    spans = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    if any(span % 2 for span in spans):
        raise ValueError(
            'With padding="same" this convolution pads one side more than the other, which does '
            "not merge; take an odd kernel, or a padding in numbers."
        )
    return tuple(span // 2 for span in spans)


def _check_linear(first: Any, second: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of ``first``, of a norm the scale and the shift."""
    if not isinstance(first, nn.Linear | nn.BatchNorm1d | nn.SyncBatchNorm):
        raise TypeError(
            "Before a linear layer, merge takes a linear layer or a BatchNorm1d, "
            f"not {type(first).__name__}."
        )
    _check_own(second)
    weight: Tensor
    bias: Tensor | None
    if isinstance(first, nn.Linear):
        _check_own(first)
        weight, bias = _wide(first.weight), None if first.bias is None else _wide(first.bias)
    else:
        weight, bias = _scale_and_shift(first)
    _check_fit(first, second, weight.shape[0], second.in_features)
    return weight, bias


def _check_norm(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return what the norm does to each channel: x -> scale * x + shift."""
    kind = next((kind for kind in _NORM_OF if isinstance(layer, kind)), None)
    if kind is None:
        raise TypeError(
            "A norm is merged into a linear layer, a convolution that is not transposed or a "
            f"BorderedConv2d, not into {type(layer).__name__}."
        )
    _check_there(norm)
    if not isinstance(norm, _NORM_OF[kind] | nn.SyncBatchNorm):
        raise TypeError(
            f"The norm after {type(layer).__name__} must be {_NORM_OF[kind].__name__}, not "
            f"{type(norm).__name__}."
        )
    _check_own(layer)
    scale, shift = _scale_and_shift(norm)
    _check_fit(layer, norm, layer.weight.shape[0], len(scale))
    return scale, shift


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    _check_own(norm)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "This BatchNorm keeps no running statistics, so it is no fixed linear map; use one "
            "with track_running_stats=True."
        )
    if norm.training:
        raise ValueError(
            "This BatchNorm is in training mode, where it follows each batch; call eval() first."
        )
    scale = torch.rsqrt(_wide(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = _wide(norm.weight) * scale
    shift = -_wide(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _wide(norm.bias)


def _check_there(layer: nn.Module) -> None:
    if any(nn.parameter.is_lazy(t) for t in (*layer.parameters(), *layer.buffers())):
        raise ValueError(
            f"This {type(layer).__name__} has no weight yet; run it once before merging."
        )


def _check_own(layer: Any) -> None:
    """Refuse a layer whose weight is not there yet, or not all that it does."""
    _check_there(layer)
    kind = type(layer).__name__
    for leaf in ("weight", "bias"):
        if leaf not in layer._parameters:
            raise ValueError(
                f"The {leaf} of this {kind} is computed from something else (a mask, a "
                "parametrisation); make it an ordinary parameter first, a masked one with "
                "masks.make_permanent."
            )
    plain = next((c for c in (nn.Linear, *_CONVOLUTIONS) if isinstance(layer, c)), None)
    for method in ("forward", "_conv_forward"):
        if plain and getattr(type(layer), method, None) is not getattr(plain, method, None):
            raise TypeError(
                f"{kind} does something else than {plain.__name__} with its weight, so it cannot "
                f"be merged as one; replace it by an ordinary {plain.__name__} that does the same."
            )


def _check_fit(first: nn.Module, second: nn.Module, given: int, taken: int) -> None:
    if given != taken:
        raise ValueError(
            f"These layers do not compose: {type(first).__name__} gives {given} channels, "
            f"{type(second).__name__} takes {taken}."
        )
    one, two = (next(t for t in (*m.parameters(), *m.buffers())) for m in (first, second))
    if (one.dtype, one.device) != (two.dtype, two.device):
        raise ValueError(
            f"The layers are {one.dtype} on {one.device} and {two.dtype} on {two.device}; bring "
            "them to the same dtype and device first."
        )
