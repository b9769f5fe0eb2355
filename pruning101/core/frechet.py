"""How far apart two sets of images are: the Frechet distance of their features.

Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium,
NeurIPS 2017 (arXiv 1706.08500), there with the features of an Inception network; here of any
classifier.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning101.core import masks, runs

_TOGETHER = 512  # images that go through the classifier side by side


@dataclass(frozen=True)
class Interval:
    """An estimate, `value`, and the bounds `low` and `high` of its confidence interval."""

    value: float
    low: float
    high: float


def features(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return what goes into the classifier's last linear layer for each image: [N, d].

    ``images`` [N, C, H, W] are normalised as the classifier's training images were. The last layer
    is the last ``nn.Linear`` that is called. In ``eval`` mode; the classifier stays as it was. The
    features are on its device, in its floating-point type.

    Raises:
        ValueError: no images, images that the classifier does not take, or no linear layer in it.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [N, C, H, W], one or more, not {list(images.shape)}.")
    device, dtype = runs.device_of(classifier), runs.dtype_of(classifier)
    seen: list[Tensor] = []

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0]]

    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    found: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), runs.mode(classifier, training=False):
            for part in images.split(_TOGETHER):
                part = part.to(device, dtype)
                if found:
                    classifier(part)
                else:
                    runs.trial("classifier", classifier, part)
                if not seen:
                    raise ValueError("The classifier calls no nn.Linear; its features are unknown.")
                found.append(seen.pop().flatten(1))
    finally:
        for hook in hooks:
            hook.remove()
        masks.refresh(classifier)  # the effective weights carry a gradient again
    return torch.cat(found)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64.

    ``a`` [N, d] and ``b`` [M, d] are features, a row an image; mu are their means and C their
    covariances (unbiased, over N - 1). It is the squared Wasserstein distance of the two Gaussians
    with these moments, in squared units of the features. Covariances may be singular, as those of
    fewer rows than columns are.

    The distance of few samples is biased upwards: even two sets from one source are some way
    apart, roughly in proportion to 1/N + 1/M. Compare distances only at equal numbers of images,
    and with that of two real sets.

    Source: Heusel et al. 2017, eq. 6.

    Raises:
        ValueError: fewer than two rows, different widths, NaN or infinity.
    """
    return _distance(*_checked(a, b))


def frechet_interval(
    a: Tensor,
    b: Tensor,
    *,
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Return :func:`frechet_distance` of ``a`` and ``b`` with its bootstrap confidence interval.

    Rows of both are drawn with replacement ``resamples`` times. Sets that hold rows twice are
    further apart than the given ones, by about as much as few samples are to begin with (the
    distance is biased upwards), so that the resampled distances are shifted to have ``value`` as
    their mean, and the middle ``level`` of them is the interval. It tells how much the distance
    would vary with other images, at these numbers of them; not what it would be with infinitely
    many. No bound is below 0.

    Raises:
        ValueError: as :func:`frechet_distance`, or an option out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level!r}.")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 2:
        raise ValueError(f"resamples must be a whole number, 2 or more, not {resamples!r}.")
    runs.check_numbers(seed=seed)
    a, b = _checked(a, b)
    value = _distance(a, b)
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator)]

    again = torch.tensor([_distance(drawn(a), drawn(b)) for _ in range(resamples)]).double()
    again += value - again.mean()
    low, high = again.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return Interval(value, max(0.0, low.item()), high.item())


def _distance(a: Tensor, b: Tensor) -> float:
    # With centred rows A and B over the roots of N - 1 and M - 1, C_a = A^T A and C_b = B^T B, the
    # eigenvalues of C_a C_b are the squared singular values of A B^T, and the trace of its root is
    # their sum. R of a QR decomposition has the same R^T R as A, and at most d rows. No square root
    # of a matrix is taken, so nothing is lost where one is singular.
    roots = [_root(rows) for rows in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    traces = roots[0].square().sum() + roots[1].square().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, (means + traces - 2 * cross).item())


def _root(rows: Tensor) -> Tensor:
    """A matrix R [min(N, d), d] with R^T R the covariance of the rows [N, d]."""
    centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU in float64, which some accelerators do not have."""
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2 or not rows.shape[1]:
            raise ValueError(
                f"{name} must be features [N, d] of two or more images, not {list(rows.shape)}."
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; look for them in the images.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a has {a.shape[1]} features an image and b {b.shape[1]}; take both from one "
            "classifier."
        )
    return a.detach().cpu().double(), b.detach().cpu().double()
