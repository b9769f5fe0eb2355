"""Training and evaluation: `fit` and `evaluate`, the same for every lesson, device and recipe."""

import itertools
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning101.core import masks, runs
from pruning101.core.data import Dataset
from pruning101.core.losses import (
    Loss,
    Objective,
    answer_of,
    check_objective,
    hits_of,
    loss_named,
    scalar,
)
from pruning101.core.losses import distillation as distillation
from pruning101.core.losses import squared_error as squared_error
from pruning101.core.steps import Epoch, History


@dataclass(frozen=True)
class Score:
    """How well a model does on a split: `accuracy` in [0, 1] and mean `loss` per image."""

    accuracy: float
    loss: float


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
_OPTIMIZERS = ("sgd", "adam", "adamw")
_PRECISIONS = ("auto", "float32", "bfloat16")


def default_device() -> torch.device:
    """Return the fastest device here: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def evaluate(
    model: nn.Module,
    data: Dataset,
    split: str = "test",
    *,
    batch_size: int = 1024,
    loss: str | Loss = "cross_entropy",
    objective: Objective | None = None,
    device: str | torch.device | None = None,
) -> Score:
    """Measure accuracy and mean loss of `model` on a split; the model is left as it was.

    Runs in evaluation mode and float32 where the model is, or on a copy on `device`. With
    `objective(model, images, labels)`, a scalar, that is the loss, and accuracy is NaN; what it
    draws at random is the same in every call, and the global random state stays as it was.

    Raises:
        ValueError: unknown split or loss, a loss beside an objective, an empty split, or a model
            that does not take these images or has not one output a class.
        TypeError: an objective that cannot be called.
    """
    loss_function = loss_named(loss)
    check_objective(objective, loss=loss)
    runs.known("split", split, ("train", "valid", "test"))
    n = len(getattr(data, split))
    if n == 0:
        raise ValueError(f"The {split} split of {data.name!r} is empty: nothing to measure on.")
    where = runs.device_of(model)
    if device is not None and runs.usable(device) != where:
        where = runs.usable(device)
        model = masks.clone(model).to(where)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    dtype = runs.dtype_of(model)
    draws = nullcontext() if objective is None else runs.seeded(0, where)
    with runs.mode(model, training=False), torch.no_grad(), draws:
        for images, labels in data.batches(split, batch_size, device=where):
            images = images.to(dtype)
            answer = partial(answer_of, model, objective, labels=labels)
            if losses:
                outputs = answer(images)
            else:
                outputs = runs.trial("model", model, images, answer)
                if objective is None and isinstance(loss, str):
                    _check_outputs(outputs, data)
            value = loss_function(outputs, labels) if objective is None else outputs
            losses.append(value * (len(labels) / n))
            hits.append(hits_of(outputs, labels))
    masks.refresh(model)  # the effective weights carry a gradient again
    # Numbers are read only now, so that an accelerator never waits.
    return Score(accuracy=torch.stack(hits).sum().item() / n, loss=torch.stack(losses).sum().item())


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    lr: float,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    batch_size: int = 128,
    schedule: str | Callable[[float], float] = "constant",
    loss: str | Loss = "cross_entropy",
    objective: Objective | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.5,
    temperature: float = 4.0,
    after_step: Callable[[nn.Module], Any] | None = None,
    augment: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place on the train split and return one `Epoch` record an epoch.

    What is minimised is the `loss` ("cross_entropy", "squared_error" or a function of outputs and
    labels), plus `penalty(model)` where given. With a `teacher`, it is (1 - w) loss +
    w `distillation` at w = `teacher_weight`. `objective(model, images, labels)`, a scalar, takes
    the place of forward pass and loss, as `diffusion.denoising_loss` does; accuracies are then
    NaN. Only parameters with `requires_grad` are trained, and masked weights stay zero. `momentum`
    is that of "sgd"; `weight_decay` is the optimiser's own (decoupled for "adamw"). The rate of a
    step is `lr` times `schedule` of the progress in [0, 1). `after_step(model)` runs after each
    step of the optimiser.

    Order, augmentation and dropout of an epoch, and what an objective draws, depend on `seed` and
    its number alone; the global random state is neither used nor changed. A last batch of fewer
    than two images a process is left out of its epoch, since batch norm cannot normalise one.

    The model is moved to `device`: by default where it is, if that is an accelerator, else
    `default_device()`. "auto" precision is bfloat16 on CUDA devices that have it, else float32.
    Under `accelerate launch` each process takes its share of every batch and gradients are summed,
    as if one process took the whole batch (batch norm uses each share's own statistics).

    With `checkpoint` the file of that name is written after each epoch, and the same call
    continues from it (from its weights, whatever `model` holds) to the numbers of an uninterrupted
    run. Functions are compared by name only. A progress bar shows on a terminal, and vanishes.

    Raises:
        ValueError: a setting out of range, a loss or teacher beside an objective, data and model
            that do not fit, or a checkpoint that is damaged or was made with other settings; all
            before any training.
        OSError: the checkpoint cannot be written where it is to be.
        TypeError: an objective, penalty, teacher or after_step that cannot be called.
        FloatingPointError: what is minimised is no longer finite; names epoch and step.
    """
    runs.check_numbers(
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        teacher_weight=teacher_weight,
        temperature=temperature,
        seed=seed,
    )
    runs.known("optimizer", optimizer, _OPTIMIZERS)
    runs.known("precision", precision, _PRECISIONS)
    loss_function = loss_named(loss)
    check_objective(objective, loss=loss, teacher=teacher)
    if callable(schedule):
        factor = schedule
    else:
        factor = _SCHEDULES[runs.known("schedule", schedule, _SCHEDULES)]
    for name, given in (("penalty", penalty), ("teacher", teacher), ("after_step", after_step)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be None or something to call, not {given!r}.")
    for split in ("train", "valid"):
        if len(getattr(data, split)) == 0:
            raise ValueError(
                f"The {split} split of {data.name!r} is empty: fit needs images there."
            )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("Nothing to train: no parameter of the model has requires_grad=True.")
    where = runs.usable(device) if device is not None else runs.device_of(model)
    if device is None and where.type == "cpu":
        where = runs.usable(default_device())
    group = runs.Group(where)
    where = group.device
    steps = _steps(len(data.train), batch_size, group.size)
    bfloat16 = precision == "bfloat16" or (precision == "auto" and runs.has_bfloat16(where))
    model.to(where)
    masks.refresh(model)
    dtype = runs.dtype_of(model)
    images, labels = next(iter(data.batches("train", 2, device=where)))
    with runs.seeded(seed, where):
        answer = partial(answer_of, model, objective, labels=labels)
        outputs = runs.trial("model", model, images.to(dtype), answer)
    if objective is None and isinstance(loss, str):
        _check_outputs(outputs, data)
    if teacher is not None:
        teacher = masks.clone(teacher).to(where).eval()
        answers = runs.trial("teacher", teacher, images.to(dtype))
        if answers.shape != outputs.shape:
            raise ValueError(
                f"The teacher gives outputs of shape {list(answers.shape)}, the model "
                f"{list(outputs.shape)}; build both with classes={len(data.classes)}."
            )

    optimiser = _optimizer(optimizer, parameters, lr, momentum, weight_decay)
    history = History()
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        runs.check_place(checkpoint)
        settings = {
            "epochs": epochs,
            "lr": lr,
            "optimizer": optimizer,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "schedule": _name(schedule),
            "loss": _name(loss),
            "objective": _name(objective),
            "penalty": _name(penalty),
            "teacher": None if teacher is None else runs.digest(teacher.state_dict().values()),
            "teacher_weight": teacher_weight,
            "temperature": temperature,
            "after_step": _name(after_step),
            "augment": augment,
            "seed": seed,
            "precision": "bfloat16" if bfloat16 else "float32",
            "data": f"{data.name} {list(data.train.images.shape)}",
            "labels": runs.digest([data.train.labels, data.valid.labels]),
            "model": str({name: list(t.shape) for name, t in model.state_dict().items()}),
            "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
            "masks": runs.digest(masks.masks_of(model).values()),
        }
        if checkpoint.exists():
            history = History(runs.resume(checkpoint, settings, model, optimiser, where))
        group.wait()
    group.share(model)

    def minimised(images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(where.type, torch.bfloat16, enabled=bfloat16):
            outputs = answer_of(model, objective, images, labels)
            value = loss_function(outputs, labels) if objective is None else outputs
            if teacher is not None:
                with torch.no_grad():
                    answers = teacher(images)
                lesson = distillation(outputs, answers, temperature)
                value = (1 - teacher_weight) * value + teacher_weight * lesson
            value = share * value
            if penalty is not None:
                value = value + scalar(penalty(model), "penalty(model)") / group.size
        return value, hits_of(outputs.detach(), labels)

    check_every = 1 if where.type == "cpu" else 50  # reading a number makes an accelerator wait
    done = len(history)
    bar = tqdm(
        total=epochs * steps,
        initial=done * steps,
        desc="training",
        unit="step",
        leave=False,
        disable=not (progress and group.rank == 0 and sys.stderr and sys.stderr.isatty()),
    )
    with bar, runs.mode(model, training=True):
        for epoch in range(done + 1, epochs + 1):
            start = time.perf_counter()
            bar.set_description(f"training, epoch {epoch} of {epochs}", refresh=False)
            batches = data.batches(
                "train",
                batch_size,
                shuffle=True,
                augment=augment,
                seed=runs.derive(seed, epoch),
                device=where,
            )
            losses, hits = torch.zeros(2, steps, device=where)
            sizes: list[int] = []
            with runs.seeded(runs.derive(seed, epoch, group.rank), where):
                for step, (images, labels) in enumerate(itertools.islice(batches, steps)):
                    sizes.append(len(labels))
                    rate = lr * factor(((epoch - 1) * steps + step) / (epochs * steps))
                    for settings_of in optimiser.param_groups:
                        settings_of["lr"] = rate
                    images, labels, share = group.part(images, labels)
                    optimiser.zero_grad()
                    value, hits[step] = minimised(images.to(dtype), labels, share)
                    value.backward()
                    losses[step] = value.detach()
                    group.sum([losses[step], hits[step], *(p.grad for p in parameters)])
                    if (step + 1) % check_every == 0 or step + 1 == steps:
                        _check_finite(losses[: step + 1], epoch, rate)
                    optimiser.step()
                    if after_step is not None:
                        masks.refresh(model)  # so that it reads the new weights
                        after_step(model)
                    bar.update()
                group.average_norms(model)
                valid = evaluate(model, data, "valid", loss=loss, objective=objective)
            weights = torch.tensor(sizes) / sum(sizes)
            history.append(
                Epoch(
                    index=epoch,
                    loss=(losses.cpu() @ weights).item(),
                    accuracy=hits.sum().item() / sum(sizes),
                    valid_loss=valid.loss,
                    valid_accuracy=valid.accuracy,
                    lr=rate,
                    seconds=time.perf_counter() - start,
                )
            )
            shown = f"{valid.accuracy:.1%}" if objective is None else f"{valid.loss:.4f}"
            bar.set_postfix(valid=shown)
            if checkpoint is not None and group.rank == 0:
                runs.save(checkpoint, settings, history, model, optimiser)
    optimiser.zero_grad()
    group.wait()
    return history


def _name(setting: Any) -> str | None:
    """How a checkpoint remembers a setting that may be a function."""
    if setting is None or isinstance(setting, str):
        return setting
    return getattr(setting, "__qualname__", type(setting).__qualname__)


def _steps(images: int, batch_size: int, processes: int) -> int:
    """Batches an epoch, less a last one too small for batch norm in some process."""
    if min(images, batch_size) < processes:
        raise ValueError(
            f"{processes} processes cannot share batches of {min(images, batch_size)} images; "
            "raise batch_size or launch fewer."
        )
    steps, rest = divmod(images, batch_size)
    return steps + (rest >= 2 * processes or steps == 0)


def _optimizer(
    name: str, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=weight_decay)


def _check_outputs(outputs: Tensor, data: Dataset) -> None:
    """Refuse a model without one output a class, before a loss fails on it (or a GPU asserts)."""
    if outputs.ndim != 2 or outputs.shape[1] != len(data.classes):
        raise ValueError(
            f"The model gives outputs of shape {list(outputs.shape)}, but {data.name!r} has "
            f"{len(data.classes)} classes; build it with classes={len(data.classes)}."
        )


def _check_finite(losses: Tensor, epoch: int, rate: float) -> None:
    bad = ~losses.isfinite()
    if bad.any():
        step = int(bad.nonzero()[0])
        raise FloatingPointError(
            f"The loss became {losses[step].item()} at step {step + 1} of epoch {epoch}; try a "
            f"lower lr (it was {rate:g}), a weaker penalty, or look for NaN in the model's weights."
        )
