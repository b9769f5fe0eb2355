"""How far apart two sets of features are: the max-sliced Wasserstein distance.

Deshpande et al., Max-sliced Wasserstein distance and its use for GANs, CVPR 2019 (1904.05877).
"""

import math
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["random", "ascent"]
_RANDOM_STARTS = 6  # of those given or drawn, the best ascend, too


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    projections: Tensor | None = None,
    n_projections: int = 50,
    p: float = 2,
    direction: Direction = "random",
    iterations: int = 16,
    generator: torch.Generator | None = None,
    normalise: bool = False,
) -> Tensor:
    """Return the largest Wasserstein distance W_p of ``x`` and ``y`` seen along a unit direction.

    ``x`` [N, ...] and ``y`` [M, ...] are samples, flattened to rows of d numbers. Along a direction
    t both are sets of numbers, whose distance is that of their sorted values::

        W_p(t) = (1/N * sum_i |sort(x t)_i - sort(y t)_i| ** p) ** (1/p)

    and for N != M the integral over [0, 1] of the two quantile functions' difference, exactly. The
    result is max_t W_p(t), for 1 <= p <= infinity, in the unit of the features; a scalar.

    - ``direction="random"``: the maximum over the columns of ``projections`` [d, n], scaled to
      length 1, or over ``n_projections`` random ones: what published code calls by this name. In
      many dimensions no random direction is near the best one, and a shift of length s is seen as
      about s / sqrt(d).
    - ``"ascent"``: the maximum over all directions, climbed to from the one in which the means
      differ, the one in which the spreads differ most, and the best of the random (or given) ones;
      with ``n_projections=0`` from the first two alone. Each of ``iterations`` follows the great
      circle that the gradient points along, and never goes down. Where that ends in a local
      maximum, or too soon, the result is below the true one.

    Random directions come from ``generator``; without one, from the same seed in every call.
    The direction found is a constant to autograd: gradients reach ``x`` and ``y`` through their
    projections on it, which is the gradient of the maximum, too. Where both coincide it is 0.

    With ``normalise`` the distance is divided by the root mean square, over the rows of ``x`` and
    ``y`` (each set counts half), of what a direction sees of a row: |row| / sqrt(d) with "random"
    (its root mean square over all directions), |row| with "ascent" (the most there is). The result
    is the same for ``c * x`` and ``c * y``; features that are all 0 have distance 0. Gradients pass
    through the divisor as well. For p <= 2 and "ascent" it is at most 2.

    Computed in float32 or wider, whatever autocast says.

    Raises:
        ValueError: fewer than two samples, samples of different sizes, NaN or infinity in them
            (on an accelerator the result is NaN instead), or an option out of range.
    """
    rows = [_rows("x", x), _rows("y", y)]
    d = rows[0].shape[1]
    if rows[1].shape[1] != d:
        raise ValueError(
            f"x has samples of shape {list(x.shape[1:])}, y of {list(y.shape[1:])}; only features "
            "of the same size can be compared."
        )
    check_options(n_projections, p, direction, iterations)
    if projections is not None and (
        projections.ndim != 2 or projections.shape[0] != d or not projections.shape[1]
    ):
        raise ValueError(
            f"projections must be [{d}, n], a direction a column; got {list(projections.shape)}."
        )
    with torch.autocast(x.device.type, enabled=False):
        x, y = (r.to(torch.promote_types(r.dtype, torch.float32)) for r in rows)
        with torch.no_grad():
            if projections is None:
                generator = generator or torch.Generator(x.device).manual_seed(0)
                projections = torch.randn(
                    d, n_projections, generator=generator, device=generator.device, dtype=x.dtype
                )
            candidates = _unit(projections.to(x).T)  # [n, d], as all directions from here on
            values = _along(x, y, candidates, p)
            if direction == "ascent":
                best = candidates[values.topk(min(_RANDOM_STARTS, len(values))).indices]
                starts = torch.stack([*_means_and_spreads(x, y), *best])
                candidates = _climb(x, y, starts, p, iterations)
                values = _along(x, y, candidates, p)
            theta = candidates[values.argmax()]  # argmax finds NaN, if there is one
        distance = _along(x, y, theta[None], p)[0]
        if normalise:
            lengths = [torch.linalg.vector_norm(r) / math.sqrt(len(r)) for r in (x, y)]
            scale = torch.linalg.vector_norm(torch.stack(lengths)) / math.sqrt(2)
            if direction == "random":
                scale = scale / math.sqrt(d)
            distance = distance / torch.where(scale > 0, scale, 1)
    if distance.device.type == "cpu" and not distance.isfinite():
        raise ValueError("The features hold NaN or infinity; look for them in weights and inputs.")
    return distance


def _along(x: Tensor, y: Tensor, directions: Tensor, p: float) -> Tensor:
    """W_p of ``x`` [N, d] and ``y`` [M, d] along each of ``directions`` [n, d]: [n]."""
    return _between(directions @ x.T, directions @ y.T, p)


def _between(a: Tensor, b: Tensor, p: float) -> Tensor:
    """W_p of each row of numbers ``a`` [..., N] and the same row of ``b`` [..., M]: [...]."""
    a, b = a.sort().values, b.sort().values
    n, m = a.shape[-1], b.shape[-1]
    if n == m:
        return torch.linalg.vector_norm(a - b, ord=p, dim=-1) / n ** (1 / p)
    # Both quantile functions are steps: in units of 1 / (n m) one changes at every multiple of m,
    # the other of n.
    device = a.device
    ends = [torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n]
    cuts = torch.cat(ends).unique()
    widths = cuts.diff(prepend=cuts.new_zeros(1)).to(a) / (n * m)
    gaps = a[..., (cuts - 1) // m] - b[..., (cuts - 1) // n]
    return torch.linalg.vector_norm(gaps * widths ** (1 / p), ord=p, dim=-1)


def _means_and_spreads(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The directions [d] in which the means of ``x`` and ``y`` differ, and most their variances.

    The second is near the eigenvector of cov(y) - cov(x) whose eigenvalue is the largest in size:
    a few steps of the power method, of which none needs a matrix of d times d numbers.
    """
    mean = _unit(y.mean(0) - x.mean(0))
    spread = torch.where(mean.any(), mean, 1)
    for _ in range(4):
        a, b = x @ spread, y @ spread
        spread = _unit((b - b.mean()) @ y / len(y) - (a - a.mean()) @ x / len(x))
    return mean, spread


def _climb(x: Tensor, y: Tensor, theta: Tensor, p: float, iterations: int) -> Tensor:
    """Climb on the unit sphere from each of ``theta`` [n, d] to where W_p is larger: [n, d].

    From theta the gradient points along a great circle, cos(angle) theta + sin(angle) way. What a
    direction sees of the samples is linear in it, so W_p at many angles costs two products with
    the samples, not two for each. The best angle is taken, and 0 is one of them.
    """
    angles = math.pi / 4 * 0.5 ** torch.arange(8, dtype=x.dtype, device=x.device)
    angles = torch.cat([angles.new_zeros(1), angles])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [K, 1]
    a, b = theta @ x.T, theta @ y.T  # [n, N] and [n, M]
    for _ in range(iterations):
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            slopes = torch.autograd.grad(_between(a, b, p).sum(), (a, b))
        gradient = slopes[0] @ x + slopes[1] @ y  # [n, d]
        # Twice, because at the top the first leaves nothing but rounding errors.
        way = _off(_unit(_off(gradient, theta)), theta)
        a_ahead, b_ahead = way @ x.T, way @ y.T
        a_there = cos * a[:, None] + sin * a_ahead[:, None]  # [n, K, N]
        b_there = cos * b[:, None] + sin * b_ahead[:, None]
        best = _between(a_there, b_there, p).argmax(1)
        c, s = cos[best], sin[best]  # [n, 1]
        theta, a, b = c * theta + s * way, c * a + s * a_ahead, c * b + s * b_ahead
    return _unit(theta)


def _off(vectors: Tensor, theta: Tensor) -> Tensor:
    """What of each of ``vectors`` [n, d] is orthogonal to the same of ``theta``, of length 1."""
    return vectors - (vectors * theta).sum(1, keepdim=True) * theta


def _unit(rows: Tensor) -> Tensor:
    """Rows [..., d] scaled to length 1; those of length 0 stay."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1)


def _rows(name: str, samples: Tensor) -> Tensor:
    if samples.ndim < 2 or len(samples) < 2 or samples[0].numel() == 0:
        raise ValueError(
            f"{name} has shape {list(samples.shape)}; a distribution needs at least two samples, "
            "of at least one number each, along the first dimension."
        )
    return samples.flatten(1)


def check_options(n_projections: int, p: float, direction: str, iterations: int) -> None:
    """Raise ``ValueError`` for an option of :func:`max_sliced_wasserstein` that is out of range."""
    if direction not in ("random", "ascent"):
        raise ValueError(f'direction must be "random" or "ascent", not {direction!r}.')
    least = 1 if direction == "random" else 0
    if type(n_projections) is not int or n_projections < least:
        raise ValueError(
            f"n_projections must be a whole number, {least} or more, not {n_projections!r}."
        )
    if isinstance(p, bool) or not isinstance(p, int | float) or not p >= 1:
        raise ValueError(f"p must be a number, 1 or more, not {p!r}.")
    if type(iterations) is not int or iterations < 0:
        raise ValueError(f"iterations must be a whole number, 0 or more, not {iterations!r}.")
