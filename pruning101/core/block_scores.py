"""Which blocks matter least, by scores that need no training; and LaCo's merge of blocks.

ShortGPT: Men et al. 2024 (arXiv 2403.03853). Angular distance: Gromov et al., The unreasonable
ineffectiveness of the deeper layers, ICLR 2025 (arXiv 2403.17887). LaCo: Yang, Cao and Zhao 2024
(arXiv 2402.11187).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core import masks, runs
from pruning101.core.block_features import InputBatches, chosen_blocks, mean_over_batches
from pruning101.core.blocks import remove_block


def block_influence(
    model: nn.Module, batches: InputBatches, *, blocks: Sequence[str] | None = None
) -> dict[str, float]:
    """Return 1 - mean cos(input, output) of each block's feature vectors, the smallest first.

    A vector holds the features of one token, or of one position of an image: along the second axis
    ([B, C, H, W]) where the block holds a convolution, along the last ([B, T, D], [B, H, W, C], [B,
    D]) elsewhere. The mean is over all of them. Two zero vectors count as equal, a zero and another
    as orthogonal. In ``eval`` mode; the model stays as it was. Batches, blocks and errors are those
    of :func:`core.block_features.mean_over_batches`.

    Source: Men et al. 2024.
    """
    return _by_cosine(model, batches, blocks, lambda cosine: 1 - cosine)


def angular_distance(
    model: nn.Module, batches: InputBatches, *, blocks: Sequence[str] | None = None
) -> dict[str, float]:
    """Return mean arccos(cos(input, output)) / pi of each block's feature vectors, in [0, 1].

    The smallest first. Vectors and the rest are as in :func:`block_influence` (the paper takes a
    text's last token alone). Source: Gromov et al. 2025.
    """
    return _by_cosine(model, batches, blocks, lambda cosine: cosine.arccos() / math.pi)


def relative_change(
    model: nn.Module, batches: InputBatches, *, blocks: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the mean over inputs of |output - input| / |input| of each block, the smallest first.

    As :func:`mean_relative_change` counts it. The rest is as in :func:`block_influence`.
    """
    return mean_over_batches(model, batches, blocks, lambda _, x, y: mean_relative_change(x, y))


def mean_relative_change(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean over samples of |y - x| / |x|, a scalar with gradients to both.

    ``x`` and ``y`` [N, ...] are pairs of samples; a length is that of all numbers of one sample, in
    float32 or wider. Where a sample of ``x`` is 0 there is no relative change: it counts 0 if that
    of ``y`` is 0 as well, else 1, without a gradient. Where both coincide the gradient is 0.
    """
    x, y = (z.flatten(1).to(torch.promote_types(z.dtype, torch.float32)) for z in (x, y))
    change, length = (torch.linalg.vector_norm(v, dim=1) for v in (y - x, x))  # [N]
    some = length > 0
    ratio = change / torch.where(some, length, 1)
    return torch.where(some, ratio, (change > 0).to(change)).mean()


def _by_cosine(
    model: nn.Module,
    batches: InputBatches,
    blocks: Sequence[str] | None,
    score: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    def measure(name: str, x: Tensor, y: Tensor) -> Tensor:
        inside = model.get_submodule(name).modules()
        axis = 1 if any(isinstance(m, nn.modules.conv._ConvNd) for m in inside) else -1
        x, y = x.float(), y.float()
        cosine = F.cosine_similarity(x, y, dim=axis).clamp(-1, 1)
        both_zero = ~(x.any(axis) | y.any(axis))
        return score(torch.where(both_zero, 1, cosine)).mean()

    return mean_over_batches(model, batches, blocks, measure)


def random_order(blocks: Sequence[str], seed: int) -> list[str]:
    """Return ``blocks`` in a random order that depends on ``seed`` alone."""
    runs.check_numbers(seed=seed)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [blocks[i] for i in order.tolist()]


def laco_merge(model: nn.Module, blocks: Sequence[str]) -> None:
    """Merge ``blocks`` into the first of them and delete the others, in place.

    The first one's parameters become theta_l + sum_k (theta_(l+k) - theta_l); its buffers stay. The
    blocks follow one another and are built alike. (The published notebook's sum, by an
    error, comes out as the last block's parameters.)

    Source: Yang, Cao and Zhao 2024.

    Raises:
        ValueError: fewer than two blocks, an unknown one, blocks that are not built alike or share
            parameters, or masked ones; the model is unchanged.
    """
    names = chosen_blocks(model, blocks, None)
    if len(names) < 2:
        raise ValueError(f"Merging takes two or more blocks, not {names}.")
    parts = [model.get_submodule(name) for name in names]

    def build(block: nn.Module) -> list[Any]:
        kinds = [(name, type(m), m.extra_repr()) for name, m in block.named_modules()]
        return [kinds, [(name, t.shape) for name, t in block.state_dict().items()]]

    for name, part in zip(names, parts, strict=True):
        if build(part) != build(parts[0]):
            raise ValueError(
                f"Blocks {names[0]!r} and {name!r} are not built alike; merge only those that are."
            )
        if masks.masks_of(part):
            raise ValueError(f"Block {name!r} is masked; call masks.make_permanent first.")
    ours = [dict(part.named_parameters()) for part in parts]
    if len({id(p) for each in ours for p in each.values()}) < sum(map(len, ours)):
        raise ValueError(f"The blocks {names} share parameters; merge only blocks of their own.")
    with torch.no_grad():
        for name, first in ours[0].items():
            first.add_(sum(cast(Tensor, other[name] - first) for other in ours[1:]))
    for name in names[1:]:
        remove_block(model, name)
