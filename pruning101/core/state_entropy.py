"""The states of a layer's units: their entropy, counted or in closed form.

A unit (a channel, or a feature of a token) is ON where its pre-activation z is above 0 and OFF
where it is below. All is one number a unit, over the batch and all positions.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

Zero = Literal["ignore", "on", "off"]
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
PIECE = 2**20  # numbers looked at together: what is read stays in the cache

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
    check_choice("zero", zero, ("ignore", "on", "off"))
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
    rows = max(1, len(z) * PIECE // z.numel()) if 0 in dims else len(z)
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
    if not isinstance(norm, NORMS):
        raise TypeError(
            f"a {type(norm).__name__} is no norm of this kind: give a BatchNorm, LayerNorm, "
            "GroupNorm or InstanceNorm, or use the mean and standard deviation of what it gives."
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


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {choices}, not {value!r}.")
