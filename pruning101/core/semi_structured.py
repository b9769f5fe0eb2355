"""Two of four: zeros in a pattern that a GPU can skip."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor, nn

from pruning101.core import masks
from pruning101.core.runs import device_of, has_bfloat16


def semi_structured(
    scores: dict[str, Tensor], *, keep: int = 2, group: int = 4
) -> dict[str, BoolTensor]:
    """Return masks that keep the ``keep`` highest of every ``group`` weights in a row, exactly.

    2:4 is what the sparse tensor cores of NVIDIA GPUs multiply at up to twice the speed (Mishra et
    al. 2021, arXiv 2104.08378). ``scores`` maps parameter names to tensors [out, in, ...]; in a row
    are weights that are neighbours along the input (dimension 1): columns of a linear layer, input
    channels of a convolution, at each place of its kernel. Where the inputs are no multiple of
    ``group``, the last ones count as if zeros followed them: of a rest of r, min(r, keep) stay.
    Among equals the lower position is pruned first.

    Raises:
        ValueError: ``keep`` not in 1 .. group, NaN, or scores without an input dimension.
    """
    if not (type(keep) is type(group) is int and 1 <= keep <= group):
        raise ValueError(
            f"keep must be between 1 and group, both whole numbers, not {keep!r} of {group!r}."
        )
    result: dict[str, BoolTensor] = {}
    for name, score in scores.items():
        if score.dim() < 2 or bool(score.isnan().any()):
            what = "NaN among its scores" if score.dim() > 1 else "no input dimension"
            raise ValueError(f"{name!r} has {what}; leave it out, or look at how it is scored.")
        inputs = score.shape[1]
        # What is padded goes last of all where there is a choice, and first where there is none.
        rows = score.movedim(1, -1).double().clamp_min(torch.finfo(torch.float64).min)
        rows = F.pad(rows, (0, -inputs % group), value=-math.inf)
        rows = rows.unflatten(-1, (-1, group))  # [out, ..., groups, group]
        lowest = rows.argsort(dim=-1, stable=True)[..., : group - keep]
        mask = torch.ones_like(rows, dtype=torch.bool).scatter(-1, lowest, False)
        mask = mask.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()
        result[name] = cast(BoolTensor, mask)
    return result


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers with 2:4 zeros multiply on a GPU's sparse tensor cores.

    Masks are made permanent; a layer of which every four inputs in a row have at most two weights
    gets torch's compressed weight, which computes the same and cannot be trained. Convolutions
    have no such kernel in torch. The weights must be in half precision and of sizes that the kernel
    takes (multiples of 32 and 64).

    Raises:
        ValueError: not on an NVIDIA GPU of compute capability 8.0 or more, or no layer is 2:4.
    """
    device = device_of(model)
    if not has_bfloat16(device):
        raise ValueError(
            "2:4 weights need an NVIDIA GPU of compute capability 8.0 or more, and the model is on "
            f"{str(device)!r}; elsewhere keep the zeros as masks."
        )
    model = masks.clone(model)
    masks.make_permanent(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_two_of_four(m.weight)]
    if not layers:
        raise ValueError("No linear layer is 2:4; apply masks of semi_structured first.")
    for layer in layers:
        compressed = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(compressed, requires_grad=False)
    return model


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all())
