"""Class-conditional denoising diffusion: the training objective, and a sampler.

Ho, Jain and Abbeel, Denoising diffusion probabilistic models, NeurIPS 2020 (arXiv 2006.11239);
Song, Meng and Ermon, Denoising diffusion implicit models, ICLR 2021 (arXiv 2010.02502); Ho and
Salimans, Classifier-free diffusion guidance, 2022 (arXiv 2207.12598).

A denoiser is called as ``model(images, timesteps, labels)`` and predicts the noise in the images;
``model.label_embed`` is an ``nn.Embedding`` with one row a class and one more for "no class". The
``dit_tiny`` of :func:`core.models.build` is one.
"""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pruning101.core import masks, runs
from pruning101.core.data import Dataset

TIMESTEPS = 1000
_DROPPED = 0.1  # the share of labels that training replaces by "no class"
_TOGETHER = 256  # images that are sampled side by side

# abar_t, the share of the image's variance that is left at each timestep: the product of
# 1 - beta_s up to t, with beta rising linearly (Ho et al. 2020, section 4).
_KEPT = (1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)).cumprod(0)


def noised(images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Return sqrt(abar_t) images + sqrt(1 - abar_t) noise, at each image's own timestep.

    ``images`` and ``noise`` are [B, C, H, W], ``timesteps`` int64 [B] from 0, nearly the image, to
    ``TIMESTEPS - 1``, nearly the noise. Images of variance 1 keep variance 1. abar is the product
    of 1 - beta, with beta rising from 1e-4 to 0.02 in equal steps.

    Source: Ho et al. 2020, eq. 4 and section 4.

    Raises:
        ValueError: shapes that do not fit each other, or timesteps out of range.
    """
    if noise.shape != images.shape or timesteps.shape != images.shape[:1]:
        raise ValueError(
            f"Images of shape {list(images.shape)} need noise of that shape and one timestep each; "
            f"got {list(noise.shape)} and {list(timesteps.shape)}."
        )
    # on an accelerator looking would make it wait, and gathering fails there by itself
    if timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps < TIMESTEPS)).all():
        raise ValueError(
            f"timesteps must be in [0, {TIMESTEPS - 1}], not {timesteps.min().item()} to "
            f"{timesteps.max().item()}."
        )
    kept = _KEPT.to(timesteps.device)[timesteps].view(-1, *[1] * (images.ndim - 1))  # [B, 1, 1, 1]
    return kept.sqrt().to(images.dtype) * images + (1 - kept).sqrt().to(images.dtype) * noise


def denoising_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error of the noise that ``model`` sees in noised ``images``.

    An ``objective`` for ``training.fit`` and ``evaluate``. ``images`` [B, C, H, W] are normalised,
    ``labels`` int64 [B]. Timesteps (uniform), noise, and which labels are replaced by "no class"
    (each with probability 0.1, as guidance asks for) come from torch's global generator, which
    ``fit`` seeds.

    Source: Ho et al. 2020, eq. 14; Ho and Salimans 2022, algorithm 1.

    Raises:
        ValueError: a model without ``label_embed``.
    """
    none = _no_class(model)
    timesteps = torch.randint(TIMESTEPS, (len(images),), device=images.device)
    noise = torch.randn_like(images)
    dropped = torch.rand(len(images), device=images.device) < _DROPPED
    labels = torch.where(dropped, none, labels)
    return F.mse_loss(model(noised(images, timesteps, noise), timesteps, labels).float(), noise)


def limits(data: Dataset) -> tuple[Tensor, Tensor]:
    """Return what black and white are in the normalised images of ``data``: two tensors [C, 1, 1].

    For :func:`sample`.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return -mean / std, (1 - mean) / std


def sample(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    image_shape: Sequence[int],
    steps: int = 50,
    guidance: float = 1.0,
    limits: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return one image a label, drawn by walking back from noise to timestep 0: [B, C, H, W].

    ``image_shape`` is [C, H, W]. The images are in the units that the model was trained on
    (normalised ones), on its device. ``steps`` timesteps, evenly spaced, are visited; each takes
    one pass of the model, or two where ``guidance`` w is not 1::

        eps = eps(no class) + w (eps(label) - eps(no class))

    so that 0 ignores the label, 1 is the model's own prediction, and more exaggerates the class.
    With ``limits``, the least and greatest values of a pixel (:func:`limits`), the clean image that
    a step foresees is clamped to them: early steps multiply a prediction's error by up to 150, and
    a model that is not very good walks off without them. The walk itself is deterministic; the
    noise that it begins with depends on ``seed`` alone.
    In ``eval`` mode; the model stays as it was. A progress bar shows on a terminal, and vanishes.

    Source: Song et al. 2021, eq. 12 with sigma = 0; Ho and Salimans 2022, eq. 6 (their w is one
    less).

    Raises:
        ValueError: labels that are no classes of the model, a shape that it does not take, or a
            setting out of range; FloatingPointError: a prediction that is not finite.
    """
    runs.check_numbers(seed=seed, guidance=guidance)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps must be a whole number in [1, {TIMESTEPS}], not {steps!r}.")
    if len(image_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in image_shape):
        raise ValueError(
            f"image_shape must be channels, height and width, not {tuple(image_shape)!r}."
        )
    none = _no_class(model)
    device, dtype = runs.device_of(model), runs.dtype_of(model)
    wanted = torch.as_tensor(labels, device=device)
    if wanted.ndim != 1 or not len(wanted) or wanted.is_floating_point():
        raise ValueError(
            f"labels must be a list of one or more whole numbers, not of shape "
            f"{list(wanted.shape)} and type {wanted.dtype}."
        )
    wanted = wanted.long()
    if wanted.min() < 0 or wanted.max() >= none:
        raise ValueError(
            f"labels must be in [0, {none - 1}], the classes of the model, not "
            f"{wanted.min().item()} to {wanted.max().item()}."
        )
    bounds = [limit.to(device, dtype) for limit in limits or ()]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(wanted), *image_shape, generator=generator).to(device, dtype)

    def predicted(x: Tensor, t: int, y: Tensor) -> Tensor:
        if guidance != 1:  # both predictions in one call
            x, y = x.repeat(2, 1, 1, 1), torch.cat([y, torch.full_like(y, none)])
        noise = model(x, torch.full((len(x),), t, device=device), y)
        if guidance == 1:
            return noise
        labelled, free = noise.chunk(2)
        return free + guidance * (labelled - free)

    visited = torch.linspace(TIMESTEPS - 1, 0, steps).round().long().tolist()
    parts = list(zip(images.split(_TOGETHER), wanted.split(_TOGETHER), strict=True))
    shown = progress and sys.stderr and sys.stderr.isatty()
    bar = tqdm(
        total=len(parts) * steps, desc="sampling", unit="step", leave=False, disable=not shown
    )
    done: list[Tensor] = []
    with bar, torch.no_grad(), runs.mode(model, training=False):
        runs.trial("model", model, images[:1], lambda x: predicted(x, visited[0], wanted[:1]))
        for x, y in parts:
            for t, following in zip(visited, [*visited[1:], None], strict=True):
                kept = _KEPT[t].item()
                kept_next = 1.0 if following is None else _KEPT[following].item()
                noise = predicted(x, t, y)
                clean = (x - (1 - kept) ** 0.5 * noise) / kept**0.5
                if limits is not None:
                    clean = clean.clamp(*bounds)
                    noise = (x - kept**0.5 * clean) / (1 - kept) ** 0.5
                x = kept_next**0.5 * clean + (1 - kept_next) ** 0.5 * noise
                bar.update()
            done.append(x)
    masks.refresh(model)  # the effective weights carry a gradient again
    found = torch.cat(done)
    if not found.isfinite().all():
        raise FloatingPointError(
            "The samples hold NaN or infinity; look for them in the model's weights."
        )
    return found


def _no_class(model: nn.Module) -> int:
    """The label that means no class: one past the last."""
    embedding = getattr(model, "label_embed", None)
    if not isinstance(embedding, nn.Embedding) or embedding.num_embeddings < 2:
        raise ValueError(
            "The model must have a label_embed, an nn.Embedding with a row for each class and one "
            'for "no class", as models.build("dit_tiny") has.'
        )
    return embedding.num_embeddings - 1
