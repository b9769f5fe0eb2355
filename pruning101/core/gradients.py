"""Gradients of a loss over several batches, without touching the model."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core import runs


def gradients(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over all the images of ``batches``, by parameter name.

    ``loss(outputs, labels)`` is the mean over its batch. In ``eval`` mode; frozen parameters have
    gradients here, too, and the model stays as it was. Raises ``ValueError`` without batches.
    """
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    seen = 0
    try:
        with runs.mode(model, training=False), torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for images, labels in batches:
                value = loss(model(images), labels) * len(images)
                found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient
                seen += len(images)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
    if not seen:
        raise ValueError("There are no batches to take gradients of; give at least one.")
    return {name: gradient / seen for name, gradient in total.items()}
