"""What a training run stands on: its device, seeds, processes and checkpoints."""

import atexit
import contextlib
import difflib
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning101.core import masks
from pruning101.core.files import written_whole
from pruning101.core.steps import Epoch


def derive(*numbers: int) -> int:
    """Return a seed that depends on all the numbers, so that no two runs or epochs share one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let layers that draw from the global generators (dropout) draw from `seed` instead.

    Only the CPU's and this device's generator are touched, and both are put back.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            before = torch.mps.get_rng_state()
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if device.type == "mps":
                torch.mps.set_rng_state(before)


def usable(device: str | torch.device) -> torch.device:
    """The device with its number, or an error if this machine has none of the kind."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'There is no device {device!r}; use "cpu", "cuda" or "mps".') from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f'device="{device}" needs a CUDA GPU and there is none; use "cpu".')
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError('device="mps" needs an Apple GPU and there is none; use "cpu".')
    return torch.empty(0, device=device).device


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without any."""
    return next((t.device for t in model.state_dict().values()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating-point type of the model's first parameter."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself (NVIDIA since Ampere)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@contextlib.contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode, and each module back in its own after."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_numbers(**values: float) -> None:
    """Refuse what is out of range; the rules say what is in it."""
    rules: dict[str, tuple[str, Callable[[float], bool]]] = {
        "epochs": ("a whole number, 0 or more", lambda v: isinstance(v, Integral) and v >= 0),
        "lr": ("a finite number above 0", lambda v: 0 < v < math.inf),
        "momentum": ("in [0, 1)", lambda v: 0 <= v < 1),
        "weight_decay": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
        "batch_size": ("a whole number, 1 or more", lambda v: isinstance(v, Integral) and v >= 1),
        "teacher_weight": ("in [0, 1]", lambda v: 0 <= v <= 1),
        "temperature": ("a finite number above 0", lambda v: 0 < v < math.inf),
        "images": ("a whole number, 1 or more", lambda v: isinstance(v, Integral) and v >= 1),
        "ridge": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
        "guidance": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
        "strength": ("a finite number, 0 or more", lambda v: 0 <= v < math.inf),
        "seed": ("a whole number, 0 or more", lambda v: isinstance(v, Integral) and v >= 0),
        "tolerance": ("a drop of accuracy in [0, 1]", lambda v: 0 <= v <= 1),
    }
    for name, value in values.items():
        words, holds = rules[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
            raise ValueError(f"{name} must be {words}, not {value!r}.")


def known(what: str, name: str, names: Iterable[str]) -> str:
    """Return `name` if it is one of `names`, or raise a `ValueError` that says what is."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {names}."
        raise ValueError(f"Unknown {what} {name!r}{hint}")
    return name


def trial(
    role: str,
    model: nn.Module,
    images: Tensor,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run the model once, in evaluation mode, so that images it cannot take are told at once.

    `call(images)` runs it, where that takes more than `model(images)`.
    """
    try:
        with mode(model, training=False), torch.no_grad():
            return (call or model)(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        channels, side = images.shape[1], images.shape[-1]
        raise ValueError(
            f"The {role} does not take images of {' x '.join(map(str, images.shape[1:]))} "
            f"({str(error).splitlines()[0].rstrip('.')}); build it with in_channels={channels} and "
            f"image_size={side}, or load the data otherwise."
        ) from error


class Group:
    """The processes that `accelerate launch` started together; alone, a group of one does nothing.

    Every process holds the whole model and the whole data, and takes its own part of each batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            joined = torch.distributed.is_initialized()
            self._state = PartialState(cpu=device.type == "cpu")
            if not joined:  # a process that ends with its group still open may abort
                atexit.register(self._state.destroy_process_group)
            self.rank, self.size = self._state.process_index, self._state.num_processes
            self.device = self._state.device

    def part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        """This process's images and labels of a batch, and their share of it in [0, 1]."""
        if self.size == 1:
            return images, labels, 1.0
        n = len(labels)
        mine = slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)
        return images[mine], labels[mine], len(labels[mine]) / n

    def sum(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its sum over all processes, in place; None is passed over."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        present = [tensor for tensor in tensors if tensor is not None]
        total = reduce(torch.cat([tensor.reshape(-1) for tensor in present]), reduction="sum")
        parts = total.split([tensor.numel() for tensor in present])
        for tensor, part in zip(present, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size > 1:
            from accelerate.utils import broadcast

            for tensor in model.state_dict().values():
                tensor.copy_(broadcast(tensor.clone()))

    def average_norms(self, model: nn.Module) -> None:
        """Average the running statistics of batch norms, which each process saw its part of."""
        if self.size > 1:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            running = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
            if running:
                self.sum(running)
                for tensor in running:
                    tensor.div_(self.size)

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.size > 1:
            self._state.wait_for_everyone()


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of the values of some tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def difference(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the first setting that is not what it was, in words, or an empty string."""
    for name in {**settings, **before}:
        if before.get(name) != settings.get(name):
            return f"{name}={before.get(name)!r}, not {settings.get(name)!r}"
    return ""


def save(
    path: Path,
    settings: dict[str, Any],
    records: Iterable[Epoch],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; `path` is the old file until the new one is whole."""
    with written_whole(path) as part:
        torch.save(
            {
                "settings": settings,
                "epochs": [asdict(record) for record in records],
                "model": model.state_dict(),
                "optimizer": optimiser.state_dict(),
            },
            part,
        )


def check_place(path: Path) -> None:
    """Make the folder of a checkpoint, or refuse now what would fail after the first epoch."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The checkpoint {str(path)!r} cannot be made ({error.strerror}); choose another path."
        ) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        kind = "is a folder" if path.is_dir() else "lies in a folder that may not be written to"
        raise OSError(f"The checkpoint {str(path)!r} {kind}; choose another path.")


def resume(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    device: torch.device,
) -> list[Epoch]:
    """Load a checkpoint into `model` and `optimiser` and return the epochs already done.

    Raises:
        ValueError: the file is damaged or no checkpoint of `fit`, or its settings are others.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        where = "cpu" if device.type == "cpu" else device  # torch.load knows no "cpu:0"
        found = torch.load(content, map_location=where, weights_only=True)
        before = found["settings"]
        records = [Epoch(**record) for record in found["epochs"]]
        states = found["model"], found["optimizer"]
    except Exception as e:  # what a reader of pickles and archives raises on garbage has no bounds
        raise ValueError(
            f"{str(path)!r} is damaged or was not written by fit; delete it to start afresh."
        ) from e
    if other := difference(before, settings):
        raise ValueError(
            f"The checkpoint {str(path)!r} was made with {other}; use the same settings, or "
            "another file."
        )
    model.load_state_dict(states[0])
    optimiser.load_state_dict(states[1])
    masks.refresh(model)
    return records
