"""One convolution fitted to what two gave, by least squares."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core.tracing import undisturbed

Features = tuple[Tensor, Tensor]  # what goes in, and what should come out


def cropped(layer: nn.Conv2d, kernel_size: int) -> nn.Conv2d:
    """Return ``layer`` with the middle ``kernel_size`` taps of its kernel; outputs keep their size.

    Raises:
        ValueError: the kernel has no such middle, or the padding is smaller than what goes.
    """
    off = [size - kernel_size for size in layer.kernel_size]
    padding = [p - n // 2 * d for p, n, d in zip(_numbers(layer), off, layer.dilation, strict=True)]
    if kernel_size < 1 or min(off) < 0 or any(n % 2 for n in off) or min(padding) < 0:
        raise ValueError(
            f"a kernel of {kernel_size} cannot stand for the merged one of {layer.kernel_size} with"
            f" padding {_numbers(layer)}: as much must go on each side, padding with it"
        )
    smaller = copy.deepcopy(layer)
    rows, columns = (slice(n // 2, n // 2 + kernel_size) for n in off)
    smaller.weight = nn.Parameter(
        layer.weight.detach()[..., rows, columns].clone(), layer.weight.requires_grad
    )
    if smaller.bias is None:
        zeros = layer.weight.new_zeros(layer.out_channels)
        smaller.bias = nn.Parameter(zeros, layer.weight.requires_grad)
    smaller.kernel_size = (kernel_size, kernel_size)
    smaller.padding = tuple(padding)
    # What a convolution keeps for other paddings than with zeros.
    smaller._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
    return smaller


def _numbers(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)  # merging has made numbers of it
    return tuple(layer.padding)


def features(
    model: nn.Module, first: str, second: str, batches: Iterable[Tensor]
) -> Iterator[Features]:
    """Run ``model``, in ``eval`` mode; give what goes into ``first`` and comes out of ``second``.

    One pair [B, C, H, W], [B, C', H', W'] for each batch of images.
    """
    seen: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        seen[:] = [args[0].clone()]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output.clone())

    handles = [
        model.get_submodule(first).register_forward_pre_hook(before),
        model.get_submodule(second).register_forward_hook(after),
    ]
    try:
        for images in batches:
            with undisturbed(model), torch.no_grad():
                model(images)
            yield seen[0], seen[1]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def least_squares(layer: nn.Conv2d, pairs: Iterable[Features], ridge: float) -> None:
    """Give ``layer`` the weight and bias of least squared error over all ``pairs``, in place.

    ``ridge`` times the mean square of the inputs is added to the diagonal (not to the bias): taps
    that the data say nothing of become 0. Solved from the normal equations, in float64.

    Raises:
        ValueError: features that are not finite.
    """
    groups, taps = layer.groups, layer.weight[0].numel()
    gram = torch.zeros(groups, taps + 1, taps + 1, dtype=torch.float64)
    moments = torch.zeros(groups, taps + 1, layer.out_channels // groups, dtype=torch.float64)
    for x, y in pairs:
        patches = F.unfold(x, layer.kernel_size, layer.dilation, _numbers(layer), layer.stride)
        patches = patches.movedim(1, 0).flatten(1).double().cpu()  # [C * taps, B * positions]
        patches = patches.view(groups, taps, -1)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)  # the bias
        targets = y.movedim(1, 0).flatten(1).double().cpu().view(groups, -1, patches.shape[2])
        gram += patches @ patches.mT
        moments += patches @ targets.mT
    if not (gram.isfinite().all() and moments.isfinite().all()):
        raise ValueError("the features to fit hold NaN or infinity; look at the model's weights")
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal[:, :-1] += ridge * diagonal[:, :-1].mean(1, keepdim=True)
    solution = torch.linalg.lstsq(gram, moments, driver="gelsd").solution  # also if it is singular
    layer.weight.copy_(solution[:, :-1].mT.reshape(layer.weight.shape))
    assert layer.bias is not None
    layer.bias.copy_(solution[:, -1].reshape(-1))


@torch.no_grad()
def relative_error(layer: nn.Module, pairs: Iterable[Features]) -> float:
    """Return the mean squared error of ``layer``, relative to the variance of its targets."""
    error = total = squares = count = 0.0
    for x, y in pairs:
        error += float((layer(x) - y).double().square().sum())
        total += float(y.double().sum())
        squares += float(y.double().square().sum())
        count += y.numel()
    return error / (squares - total**2 / count)
