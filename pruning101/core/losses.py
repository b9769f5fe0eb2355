"""What training minimises: losses of outputs and labels, distillation, or an objective."""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pruning101.core import runs

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and labels
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of model, images and labels


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum over classes of (output - one-hot target)^2, averaged over the batch."""
    targets = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)  # [B, K]
    return (outputs - targets).square().sum(1).mean()


def distillation(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """Cross-entropy to the teacher's softened answer, less its entropy, times temperature^2.

    Both are logits [B, K]; the result is T^2 KL(softmax(teacher / T) || softmax(student / T)),
    averaged over the batch. The factor T^2 keeps the size of the gradients independent of T.
    Source: Hinton, Vinyals and Dean 2015, section 2.
    """
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


LOSSES: dict[str, Loss] = {"cross_entropy": F.cross_entropy, "squared_error": squared_error}


def loss_named(loss: str | Loss) -> Loss:
    """Return the loss of that name; a function is its own name."""
    return loss if callable(loss) else LOSSES[runs.known("loss", loss, LOSSES)]


def check_objective(objective: Any, *, loss: str | Loss, teacher: Any = None) -> None:
    """Refuse an objective that cannot be called, or one beside what it takes the place of."""
    if objective is None:
        return
    if not callable(objective):
        raise TypeError(f"objective must be None or something to call, not {objective!r}.")
    if loss != "cross_entropy" or teacher is not None:
        raise ValueError("An objective takes the place of loss and teacher; leave both out.")


def answer_of(
    model: nn.Module, objective: Objective | None, images: Tensor, labels: Tensor
) -> Tensor:
    """Return the model's outputs, or the objective where there is one."""
    if objective is None:
        return model(images)
    return scalar(objective(model, images, labels), "objective(model, images, labels)")


def scalar(value: Any, what: str) -> Tensor:
    """Return ``value`` without dimensions, or raise a ``ValueError`` if it is not one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{what} must give a tensor of one number, not {given}.")
    return value.reshape(())


def hits_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """How many of the batch are right; NaN where outputs are not one number a class."""
    if outputs.ndim != 2:
        return outputs.new_tensor(math.nan)
    return (outputs.argmax(1) == labels).sum().float()
