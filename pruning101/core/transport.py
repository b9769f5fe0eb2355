"""How far apart two sets of features are: the max-sliced Wasserstein distance.

Deshpande et al., Max-sliced Wasserstein distance and its use for GANs, CVPR 2019 (1904.05877).
"""

import math
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["random", "ascent"]
_STARTS = 5  # directions that ascend side by side
_ITERATIONS = 30


def max_sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    projections: Tensor | None = None,
    n_projections: int = 50,
    p: float = 2,
    direction: Direction = "random",
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
    - ``"ascent"``: the maximum over all directions, climbed to by projected gradient ascent from
      the difference of the means and the best of the random (or given) ones. Where that ends in a
      local maximum, the result is below the true one.

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
    check_options(n_projections, p, direction)
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
            candidates = _unit(projections.to(x))
            values = _along(x, y, candidates, p)
            if direction == "ascent":
                best = candidates[:, values.topk(min(_STARTS - 1, len(values))).indices]
                candidates = torch.cat([best, _climb(x, y, best, p)], dim=1)
                values = _along(x, y, candidates, p)
            theta = candidates[:, values.argmax()]  # argmax finds NaN, if there is one
        distance = _along(x, y, theta[:, None], p)[0]
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
    """W_p of ``x`` [N, d] and ``y`` [M, d] along each of ``directions`` [d, n]: [n]."""
    return _between(x @ directions, y @ directions, p)


def _between(a: Tensor, b: Tensor, p: float) -> Tensor:
    """W_p of each column of numbers ``a`` [N, n] and the same column of ``b`` [M, n]: [n]."""
    a, b = a.sort(0).values, b.sort(0).values
    n, m = len(a), len(b)
    if n == m:
        return torch.linalg.vector_norm(a - b, ord=p, dim=0) / n ** (1 / p)
    # Both quantile functions are steps: in units of 1 / (n m) one changes at every multiple of m,
    # the other of n.
    device = a.device
    ends = [torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n]
    cuts = torch.cat(ends).unique()
    widths = cuts.diff(prepend=cuts.new_zeros(1)).to(a) / (n * m)
    gaps = a[(cuts - 1) // m] - b[(cuts - 1) // n]
    return torch.linalg.vector_norm(gaps * widths[:, None] ** (1 / p), ord=p, dim=0)


def _climb(x: Tensor, y: Tensor, directions: Tensor, p: float) -> Tensor:
    """Climb on the unit sphere from the mean difference and ``directions`` [d, n]: [d, n + 1].

    A step that leads down is taken back and halved, one that leads up is followed by a longer one,
    for each start by itself. The slope is a sum of the samples' rows, so a direction is kept as its
    weights on these rows, and all steps need their products alone. Rows are those of ``x`` about
    its mean, and ``y - x``: where both are close, small numbers are not differences of large ones.
    """
    n, d = x.shape
    centre = x.mean(0)
    rows = torch.cat([x - centre, y - x if len(y) == n else y - centre])  # [R, d]
    gram = rows @ rows.T if len(rows) < d else None

    def seen(weights: Tensor) -> Tensor:
        """What the directions with these weights see of each row: [R, n]."""
        return rows @ (rows.T @ weights) if gram is None else gram @ weights

    def scaled(weights: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (weights * view).sum(0).clamp_min(0).sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        return weights / lengths, view / lengths

    def look(view: Tensor) -> tuple[Tensor, Tensor]:
        view = view.detach().requires_grad_()
        with torch.enable_grad():
            a, b = view[:n], view[n:]
            value = _between(a, a + b if len(b) == n else b, p)
            [slope] = torch.autograd.grad(value.sum(), view)
        return value.detach(), slope

    def on_sphere(slope: Tensor, at: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        view_of_slope = seen(slope)
        squared, outward = (slope * view_of_slope).sum(0), (slope * view).sum(0)
        # What leads off the sphere is no way up; at the top nothing else is left but rounding.
        rest = squared - outward**2 > 1e3 * torch.finfo(view.dtype).eps * squared
        return scaled(
            torch.where(rest, slope - outward * at, 0),
            torch.where(rest, view_of_slope - outward * view, 0),
        )

    means = torch.zeros(len(rows), 1, dtype=x.dtype, device=x.device)
    means[n:] = 1 / len(y)
    start = torch.cat([means, look(rows @ directions)[1]], dim=1)
    at, view = scaled(start, seen(start))
    values, slope = look(view)
    way, view_of_way = on_sphere(slope, at, view)
    steps = torch.ones_like(values)
    for _ in range(_ITERATIONS):
        there, view_there = scaled(at + steps * way, view + steps * view_of_way)
        found, slope = look(view_there)
        new = found, there, view_there, *on_sphere(slope, there, view_there)
        up = found > values
        values, at, view, way, view_of_way = (
            torch.where(up, after, before)
            for after, before in zip(new, (values, at, view, way, view_of_way), strict=True)
        )
        steps = torch.where(up, 1.5 * steps, steps / 2)
    return _unit(rows.T @ at)


def _unit(columns: Tensor) -> Tensor:
    """Columns scaled to length 1; those of length 0 stay."""
    lengths = torch.linalg.vector_norm(columns, dim=0)
    return columns / torch.where(lengths > 0, lengths, 1)


def _rows(name: str, samples: Tensor) -> Tensor:
    if samples.ndim < 2 or len(samples) < 2 or samples[0].numel() == 0:
        raise ValueError(
            f"{name} has shape {list(samples.shape)}; a distribution needs at least two samples, "
            "of at least one number each, along the first dimension."
        )
    return samples.flatten(1)


def check_options(n_projections: int, p: float, direction: str) -> None:
    """Raise ``ValueError`` for an option of :func:`max_sliced_wasserstein` that is out of range."""
    if type(n_projections) is not int or n_projections < 1:
        raise ValueError(f"n_projections must be a whole number, 1 or more, not {n_projections!r}.")
    if isinstance(p, bool) or not isinstance(p, int | float) or not p >= 1:
        raise ValueError(f"p must be a number, 1 or more, not {p!r}.")
    if direction not in ("random", "ascent"):
        raise ValueError(f'direction must be "random" or "ascent", not {direction!r}.')
