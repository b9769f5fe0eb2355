"""Constants in a network: which numbers reach a layer that do not depend on the input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pruning101.core.tracing import (
    Example,
    model_inputs,
    plain_attention,
    tensors_in,
    undisturbed,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Exactly these: a subclass or a parametrisation may compute something else from its weight.
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
NORMS = nn.modules.batchnorm._NormBase  # over batch and positions, each channel by itself


def inflow(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Return what reaches each layer: a number for each input channel, NaN where it is none.

    The network runs on NaN, which spreads to everything that depends on the input; a layer gives
    NaN for those outputs only that read it, whatever zero times NaN is. What is no NaN in the end
    is made of parameters alone.
    """
    found: dict[str, Tensor] = {}

    def follow(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                return torch.full_like(output, torch.nan)
            values = _uniform(tensors_in((args, kwargs))[0], module)
            seen = found.get(name, values)
            found[name] = torch.where(seen == values, values, torch.nan)
            dims = [1] * output.dim()
            dims[_axis(module, output)] = -1
            return _after_layer(module, values).view(dims).expand_as(output).clone()

        return hook

    def before_norm(norm: Any, args: Any) -> Any:
        if norm.weight is None:
            return None
        factors = norm.weight.view(1, -1, *[1] * (args[0].dim() - 2))
        return args[0].masked_fill(factors == 0, 0), *args[1:]  # whatever it is, it does not count

    def unknown(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan) if x.is_floating_point() else x

    handles = [
        module.register_forward_hook(follow(name), with_kwargs=True)
        for name, module in model.named_modules()
        if type(module) in LAYERS or isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    handles += [
        module.register_forward_pre_hook(before_norm)
        for module in model.modules()
        if isinstance(module, NORMS)
    ]
    inputs = tree_map_only(Tensor, unknown, model_inputs(model, example))
    try:
        with undisturbed(model), torch.no_grad(), plain_attention(), _ConstantsOnly():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _axis(module: Any, x: Tensor) -> int:
    """Return the dimension of the channels in what a layer takes or gives."""
    return -1 if isinstance(module, nn.Linear) else x.dim() - module.weight.dim() + 1


def _uniform(x: Tensor, module: nn.Module) -> Tensor:
    """Return the one number that each channel of ``x`` holds, NaN where there are several."""
    low, high = x.movedim(_axis(module, x), 0).flatten(1).aminmax(dim=1)
    rounding = 8 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(high - low <= rounding, low, torch.nan)


def _after_layer(layer: Any, values: Tensor) -> Tensor:
    """Return what each output of the layer is if its inputs are ``values``, NaN if it varies."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight  # [out, in / groups, ...]
    if isinstance(layer, TRANSPOSED):
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    unknown = values != 0 if cut_off(layer) else values.isnan()
    sums = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    inputs = torch.stack([unknown.to(values), values.masked_fill(unknown, 0)], -1)
    inputs = inputs.view(groups, -1, 2)  # [groups, in / groups, 2]
    reads = (sums.abs().sum(-1) @ inputs[..., :1]).flatten() > 0
    total = (sums.sum(-1) @ inputs[..., 1:]).flatten()
    if layer.bias is not None:
        total = total + layer.bias
    return total.masked_fill(reads, torch.nan)


def cut_off(layer: Any) -> bool:
    """Tell whether a constant into this layer is more than a constant out of it."""
    if isinstance(layer, nn.Linear):
        return False
    if isinstance(layer, TRANSPOSED):
        return True  # its outputs get different numbers of terms
    padding = layer.padding
    if padding == "same":
        padding = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return layer.padding_mode == "zeros" and padding != "valid" and any(padding)


class _ConstantsOnly(TorchDispatchMode):
    """Correct the operations through which NaN and constants do not go by themselves."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        factors = args[:2] if name in ("mul", "mul_") else ()
        zeros = [factor == 0 for factor in factors if isinstance(factor, Tensor)]
        result = func(*args, **(kwargs or {}))
        for zero in zeros:  # nothing, times an unknown number
            result.masked_fill_(zero, 0)
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        outside: Any = 0  # what is added around the channels
        dims: list[int] = []  # along which it is added
        if name == "constant_pad_nd":
            outside = given.get("value", 0)
            dims = [-1 - i // 2 for i, width in enumerate(given["pad"]) if width]
            dims = [d for d in set(dims) if d % result.dim() != 1]  # channels beside others
        elif name in ("avg_pool2d", "avg_pool3d"):
            padded = any(given.get("padding", [0])) and given.get("count_include_pad", True)
            if padded or given.get("divisor_override") is not None:
                dims = [-1 - i for i in range(len(given["kernel_size"]))]
        if dims:
            result.masked_fill_((result != outside).any(dims, keepdim=True), torch.nan)
        return result
