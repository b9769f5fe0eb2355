"""Two of four: zeros in a pattern that a GPU can skip."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import BoolTensor, Tensor


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
    if not 1 <= keep <= group:
        raise ValueError(f"keep must be between 1 and group={group}, not {keep!r}.")
    result: dict[str, BoolTensor] = {}
    for name, score in scores.items():
        if score.dim() < 2 or bool(score.isnan().any()):
            what = "NaN among its scores" if score.dim() > 1 else "no input dimension"
            raise ValueError(f"{name!r} has {what}; leave it out, or look at how it is scored.")
        inputs = score.shape[1]
        # What is padded goes last of all where there is a choice, and first where there is none.
        rows = F.pad(score.movedim(1, -1).double(), (0, -inputs % group), value=-math.inf)
        rows = rows.unflatten(-1, (-1, group))  # [out, ..., groups, group]
        lowest = rows.argsort(dim=-1, stable=True)[..., : group - keep]
        mask = torch.ones_like(rows, dtype=torch.bool).scatter(-1, lowest, False)
        mask = mask.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()
        result[name] = cast(BoolTensor, mask)
    return result
