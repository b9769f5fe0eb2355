"""Masks: from scores to zeros that stay zero, kept in the form of ``torch.nn.utils.prune``.

A masked parameter ``weight`` becomes a trainable ``weight_orig`` and a buffer ``weight_mask``; the
effective ``weight = weight_orig * weight_mask`` is computed again before every forward pass. No
optimiser, momentum or weight decay can therefore bring a masked weight back: whatever happens to
``weight_orig``, the mask is applied last.
"""

import copy
import difflib
import math
from collections.abc import Iterator
from functools import reduce
from numbers import Real
from typing import Literal, cast

import torch
from torch import BoolTensor, Tensor, nn
from torch.nn.utils import prune

_SAMPLE = 2**17  # scores looked at to bracket the threshold


def from_scores(
    scores: dict[str, Tensor],
    sparsity: float,
    *,
    scope: Literal["global", "layer"] = "global",
) -> dict[str, BoolTensor]:
    """Return masks that prune the lowest scores: exactly ``round(sparsity * n)`` of n.

    ``scores`` maps parameter names ("fc1.weight") to real tensors of any shape; each mask has its
    score's shape and device, True where the weight is kept. With ``scope="global"`` all scores
    compete and n counts them all; with ``"layer"`` each tensor is cut by itself. ``round`` is
    Python's, as in ``torch.nn.utils.prune``: halves go to the even count. Among equal scores the
    lower position is pruned first (tensors in the order of the dictionary, row-major inside), on
    every device.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown scope, empty or NaN scores.
        TypeError: scores that are not tensors of real numbers.
    """
    sparsity = _checked_sparsity(sparsity)
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", not {scope!r}.')
    _check_scores(scores)
    if scope == "global":
        return _cut(scores, sparsity)
    masks: dict[str, BoolTensor] = {}
    for name, score in scores.items():
        masks |= _cut({name: score}, sparsity)
    return masks


def apply(model: nn.Module, masks: dict[str, BoolTensor]) -> None:
    """Mask the named parameters of ``model`` in place, with exactly the masks given.

    ``masks`` maps parameter names to bool tensors of the parameter's shape, True = kept. A
    parameter that already has a mask gets the new one instead; those not named stay as they are.
    The masked values survive in ``weight_orig`` and return if a later mask keeps them. A parameter
    that several layers share is masked in all of them, whichever of its names is given.

    Raises:
        ValueError: an unknown name or a mask of the wrong shape; the model is unchanged.
        TypeError: a mask that is not a bool tensor; the model is unchanged.
    """
    _check_by_name("masks", masks)
    targets = _targets(model)
    for name, mask in masks.items():
        if name not in targets:
            near = difflib.get_close_matches(name, targets, n=3) or list(targets)[:3]
            raise ValueError(f"The model has no parameter {name!r}; near it are {near}.")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"The mask of {name!r} must be a bool tensor (True = kept), not {kind}."
            )
        shape = original(*targets[name]).shape
        if mask.shape != shape:
            raise ValueError(
                f"The mask of {name!r} has shape {tuple(mask.shape)}, its parameter {tuple(shape)}."
            )
    shared: dict[int, BoolTensor] = {id(original(*targets[n])): m for n, m in masks.items()}
    every = {n: shared[i] for n, at in targets.items() if (i := id(original(*at))) in shared}
    for name, mask in (every | masks).items():
        module, leaf = targets[name]
        if leaf in module._parameters:
            # An all-ones mask first, then the values: one hook, whose only state is the buffer.
            _Hook.apply(module, leaf)
        with torch.no_grad():
            getattr(module, leaf + "_mask").copy_(mask)
        _recompute(module, leaf)
    for module in model.modules():
        # An attention layer reads its out_proj's weight without calling it, so the hook that
        # computes the effective weight there would never run.
        if isinstance(module, nn.MultiheadAttention) and any(_masked(module.out_proj)):
            hooks = module._forward_pre_hooks
            if _refresh_before not in hooks.values():
                module.register_forward_pre_hook(_refresh_before)


def masks_of(model: nn.Module) -> dict[str, BoolTensor]:
    """Return a copy of every mask in ``model`` by parameter name ("fc1.weight"), True = kept."""
    return {
        name: cast(BoolTensor, getattr(module, leaf + "_mask") != 0)
        for name, module, leaf in _masked(model)
    }


def sparsity(model: nn.Module) -> float:
    """Return the share of zeros, in [0, 1], among the weights of convolutions and linear layers.

    Masked weights count as the zeros they act as; biases and norms do not count. A model without
    such layers has sparsity 0.
    """
    total = zeros = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            stored = {"weight", "weight_orig"} & module._parameters.keys()
            weight = (_effective(module, "weight") if stored else module.weight).detach()
            total += weight.numel()
            zeros += weight.numel() - int(torch.count_nonzero(weight))
    return zeros / total if total else 0.0


def make_permanent(model: nn.Module) -> None:
    """Write the zeros into the weights of ``model`` in place and take the masks away.

    Afterwards the parameters are ordinary ones again, and nothing keeps the zeros at zero.
    """
    for _, module, leaf in list(_masked(model)):
        prune.remove(module, leaf)


def refresh(model: nn.Module) -> None:
    """Compute the effective weights of ``model`` anew, in place.

    ``module.weight`` of a masked layer is only recomputed by a forward pass; call this to read it
    right after the optimiser, ``load_state_dict`` or ``.to(device)`` changed what it is made of.
    """
    for _, module, leaf in _masked(model):
        _recompute(module, leaf)


def original(module: nn.Module, leaf: str) -> Tensor:
    """Return the stored tensor of a parameter: ``weight_orig`` where ``weight`` is masked.

    That is what an optimiser trains. None where the module has no such parameter of its own.
    """
    stored = module._parameters.get(f"{leaf}_orig", module._parameters.get(leaf))
    return cast(Tensor, stored)


def clone(model: nn.Module) -> nn.Module:
    """Return an independent deep copy of ``model``, masks included.

    ``copy.deepcopy`` alone refuses a masked model, because its effective weights are results of a
    computation; the copy gets detached ones, which are then computed anew from its own parameters.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo)
    refresh(copied)
    return copied


def _checked_sparsity(value: float) -> float:
    number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"sparsity must be a share in [0, 1], not {value!r}.")
    return float(value)


def _check_by_name(what: str, given: object) -> None:
    if not isinstance(given, dict):
        raise TypeError(
            f'{what} must be a dictionary by parameter name, as {{"fc1.weight": tensor}}, not '
            f"{type(given).__name__}."
        )


def _check_scores(scores: dict[str, Tensor]) -> None:
    _check_by_name("scores", scores)
    if not scores:
        raise ValueError("There are no scores to make masks from: the dictionary is empty.")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or score.is_complex() or score.dtype == torch.bool:
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"The scores of {name!r} must be a tensor of real numbers, not {kind}.")
        if score.numel() == 0:
            raise ValueError(f"The scores of {name!r} are empty (shape {tuple(score.shape)}).")
        # A sum is quickly made, and NaN where a score is (and where inf meets -inf).
        if score.is_floating_point() and bool(score.sum().isnan() and score.isnan().any()):
            raise ValueError(
                f"The scores of {name!r} contain NaN, which has no rank; look for NaN in what they "
                "are computed from."
            )


def _cut(scores: dict[str, Tensor], sparsity: float) -> dict[str, BoolTensor]:
    """Masks that prune the ``round(sparsity * n)`` lowest of all ``scores`` together."""
    # One dtype for all, so that values of different layers compare exactly.
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    flat = [score.detach().to(dtype).reshape(-1) for score in scores.values()]
    pruned = round(sparsity * sum(part.numel() for part in flat))
    if pruned == 0:
        masks = [torch.ones_like(part, dtype=torch.bool) for part in flat]
    else:
        threshold = _kth_smallest(flat, pruned)
        masks = [part > threshold for part in flat]
        ties_kept = sum(part.numel() - _count(m) for part, m in zip(flat, masks, strict=True))
        ties_kept -= pruned  # of those at the threshold, the last by position
        for part, mask in zip(reversed(flat), reversed(masks), strict=True):
            if ties_kept:
                ties = (part == threshold).nonzero().squeeze(1)[-ties_kept:]
                mask[ties] = True
                ties_kept -= len(ties)
    return {
        name: cast(BoolTensor, mask.view(score.shape))
        for (name, score), mask in zip(scores.items(), masks, strict=True)
    }


def _kth_smallest(parts: list[Tensor], k: int) -> float | int:
    """The k-th smallest value (k from 1) of all ``parts``, without joining or sorting them.

    A small sample brackets the value between ``low`` and ``high``; one counting pass says whether
    it is above ``low``, and the few values between them hold it. Any sample gives the exact result:
    a bad one only leaves more values to look at.
    """
    total = sum(part.numel() for part in parts)
    stride = max(1, total // _SAMPLE)
    sample = torch.cat([_sortable(part[::stride]) for part in parts])
    rank = k / total * len(sample)
    margin = 5 * math.sqrt(len(sample)) / 2  # five standard deviations of the sample's rank
    low = _kth(sample, max(1, int(rank - margin)))
    high = _kth(sample, min(len(sample), math.ceil(rank + margin)))

    skipped = sum(_count(part <= low) for part in parts)
    if k <= skipped:
        if k > sum(_count(part < low) for part in parts):
            return low
        skipped, rest = 0, [part[part < low] for part in parts]
    else:
        rest = [part[(part > low) & (part < high)] for part in parts]
        if k > skipped + sum(map(len, rest)):
            skipped = sum(_count(part <= high) for part in parts)
            if k <= skipped:
                return high
            rest = [part[part > high] for part in parts]
    return _kth(torch.cat([_sortable(part) for part in rest]), k - skipped)


def _kth(values: Tensor, k: int) -> float | int:
    return values.kthvalue(k).values.item()


def _sortable(values: Tensor) -> Tensor:
    """On the CPU, and half precision widened (exactly) to what every sort knows."""
    values = values.cpu()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _count(where: Tensor) -> int:
    return int(torch.count_nonzero(where))


class _Hook(prune.Identity):
    """What torch's own hook does before a forward pass, with less memory.

    The old effective weight is let go before the new one is made, so that the new one takes its
    place. With both there at once the heap grows and shrinks in every training step, and page
    faults cost more than the product itself.
    """

    def __call__(self, module: nn.Module, inputs: object) -> None:
        vars(module).pop(self._tensor_name, None)
        _recompute(module, self._tensor_name)


def _refresh_before(module: nn.Module, _inputs: object) -> None:
    refresh(module)


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (parameter name, its module, its name there) of every masked parameter."""
    for prefix, module in model.named_modules():
        for stored in list(module._parameters):
            leaf = stored.removesuffix("_orig")
            if leaf != stored and leaf + "_mask" in module._buffers:
                yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf


def _targets(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter that can carry a mask, under its plain name."""
    targets = {name: (module, leaf) for name, module, leaf in _masked(model)}
    hidden = {f"{name}_orig" for name in targets}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is not None and name not in hidden:
                targets[name] = (module, leaf)
    return targets


def _effective(module: nn.Module, leaf: str) -> Tensor:
    stored = original(module, leaf)
    mask = module._buffers.get(leaf + "_mask")
    return stored if mask is None else stored * mask.to(stored.dtype)


def _recompute(module: nn.Module, leaf: str) -> None:
    vars(module)[leaf] = _effective(module, leaf)  # a plain attribute: no need to search further
