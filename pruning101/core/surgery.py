"""Surgery on single layers: some positions stay, the rest goes, the layer's counts follow."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core.attention import NarrowAttention, heads_of, set_heads

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put ``model`` back as it was if the block ends with an error, an interruption included.

    Modules, parameters, their tensors, buffers, hooks and all plain attributes are put back; what
    is written into a tensor in place is not.
    """
    before = [(m, dict(vars(m))) for m in model.modules()]
    held = [
        (value, copy.copy(value))  # parameters, buffers, children, hooks: handles know the object
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, dict | set)
    ]
    tensors = [(p, p.data) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in held:
            container.clear()
            container.update(content)
        for parameter, data in tensors:
            parameter.data = data
        raise


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place ``name`` of ``model``, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each output channel of this convolution reads one input channel, its own."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups == module.out_channels == module.in_channels > 1
    )


def part(module: nn.Module, out: bool) -> tuple[str, int | None]:
    """Return the role of ``module`` in a group and the axis of its weight that is concerned."""
    if is_depthwise(module):
        return "depthwise", 0
    if isinstance(module, nn.Linear | NarrowAttention):
        return ("out", 0) if out else ("in", 1)
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("out", int(module.transposed)) if out else ("in", 1 - int(module.transposed))
    if isinstance(module, nn.Embedding):
        return "out", 1
    return ("norm" if isinstance(module, _NORMS) else "other"), 0


def why_not(module: nn.Module, name: str) -> str:
    """Say why the channels of this layer cannot go one by one, or nothing."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        if not is_depthwise(module):
            return f"of the grouped convolution {name!r}, whose channels cannot go one by one"
    elif isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        return f"of {name!r}, a norm over groups of channels, which would be other groups then"
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return f"of {name!r}, a norm over more than the channels"
    elif isinstance(module, nn.RNNBase | nn.MultiheadAttention) and heads_of(module) is None:
        return f"of {name!r}, a {type(module).__name__} of a kind that is not taken apart here"
    for leaf in ("weight", "bias"):
        stored = leaf in module._parameters or getattr(module, leaf, None) is None
        if not stored and not isinstance(module, nn.MultiheadAttention):
            return f"of {name!r}, whose {leaf} is computed from something else"
    return ""


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a layer: of attention, the joint projection [3 * inner, D]."""
    attention = isinstance(module, nn.MultiheadAttention | NarrowAttention)
    weight = module.in_proj_weight if attention else module.weight
    assert isinstance(weight, Tensor)
    return weight


def extent(module: Any, role: str, axis: int | None) -> int:
    """Return how many positions the layer has along the axis of its ``role``."""
    if role == "heads":
        heads = heads_of(module)
        assert heads is not None
        return heads.number
    if role == "norm":
        counts = [vars(module).get(name) for name in ("num_features", "num_channels")]
        return next((n for n in counts if n is not None), None) or module.normalized_shape[0]
    assert axis is not None
    return weight_of(module).shape[axis]


def keep_only(module: Any, role: str, keep: Tensor) -> None:
    """Leave the layer only the positions ``keep`` (int64, ascending) of its ``role``, in place.

    New parameters hold copies of what is kept, gradients and ``requires_grad`` included.
    """
    n = len(keep)
    if role == "heads":
        heads = heads_of(module)
        assert heads is not None
        set_heads(module, n, heads.inner // heads.number * n)
    elif isinstance(module, NarrowAttention):
        select(module, "in_proj_weight", 0 if role == "out" else 1, keep)
        if role == "out":
            select(module, "in_proj_bias", 0, keep)
        else:
            module.embed_dim = n
    elif isinstance(module, nn.Linear):
        select(module, "weight", 0 if role == "out" else 1, keep)
        if role == "out":
            select(module, "bias", 0, keep)
            module.out_features = n
        else:
            module.in_features = n
    elif isinstance(module, nn.modules.conv._ConvNd):
        select(module, "weight", part(module, role != "in")[1], keep)
        if role != "in":
            select(module, "bias", 0, keep)
            module.out_channels = n
        if role != "out":
            module.in_channels = n
        if role == "depthwise":
            module.groups = n
    elif isinstance(module, nn.Embedding):
        select(module, "weight", 1, keep)
        module.embedding_dim = n
    elif isinstance(module, nn.PReLU):
        select(module, "weight", 0, keep)
        module.num_parameters = n
    else:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            select(module, leaf, 0, keep)
        _set_norm_width(module, n)


def _set_norm_width(module: Any, n: int) -> None:
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (n,)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = n
    else:
        module.num_features = n


def select(module: nn.Module, leaf: str, axis: int | None, keep: Tensor) -> None:
    """Leave a parameter or buffer of ``module``, if it is there, ``keep`` along ``axis``."""
    old: Tensor | None = {**module._buffers, **module._parameters}.get(leaf)
    if old is None:
        return
    assert axis is not None
    keep = keep.to(old.device)
    with torch.no_grad():
        new = old.index_select(axis, keep)
        if leaf in module._buffers:
            module._buffers[leaf] = new
            return
        parameter = nn.Parameter(new, old.requires_grad)
        if old.grad is not None:
            parameter.grad = old.grad.index_select(axis, keep)
    module._parameters[leaf] = parameter
