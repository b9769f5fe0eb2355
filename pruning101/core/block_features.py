"""What goes into blocks and what comes out: of the last training step, or over many batches."""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pruning101.core import runs
from pruning101.core.blocks import removable_blocks, why_not_removable
from pruning101.core.data import Dataset
from pruning101.core.tracing import Example, tensors_in, undisturbed

InputBatches = Iterable[tuple[Example, Any]]


def chosen_blocks(
    model: nn.Module, blocks: Sequence[str] | None, example: Example | None
) -> list[str]:
    """Return ``blocks`` if the model has them all, or else all that may be removed.

    Raises:
        ValueError: an unknown or missing name, no removable block, or neither blocks nor example.
    """
    if blocks is None:
        if example is None:
            raise ValueError("Give blocks by name, or an example to find those that can go.")
        found = removable_blocks(model, example)
        if not found:
            reasons = why_not_removable(model, example)
            listed = " ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
            raise ValueError(
                "The model has no block that could be removed. "
                + (listed or "It has no modules that are made of others.")
            )
        return found
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    known = [name for name, _ in model.named_modules() if name]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"blocks must name one or more blocks, each once; got {names}.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:3]
            raise ValueError(f"The model has no block {name!r}; near it are {near}.")
    return names


class _Hook:
    """A hook that does nothing any more in a copy or pickle of its model."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *given: Any) -> None:
        if self.function is not None:
            self.function(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


@contextmanager
def watched(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input, output)`` after every run of the named blocks.

    The input is the first tensor that a block is given; ``see`` must not change either.

    Raises:
        ValueError: from the forward pass, where a block does not give a tensor of its input's
            shape, or writes over its input.
    """
    before: dict[str, int] = {}

    def given_to(args: Any, kwargs: Any) -> Tensor | None:
        return next(iter(tensors_in((args, kwargs))), None)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = given_to(args, kwargs)
            before[name] = -1 if given is None else given._version

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = given_to(args, kwargs)
            if given is None or not isinstance(output, Tensor):
                raise ValueError(f"Block {name!r} does not map a tensor to a tensor; leave it out.")
            if output.shape != given.shape:
                raise ValueError(
                    f"Block {name!r} changes the shape from {list(given.shape)} to "
                    f"{list(output.shape)}; only blocks that keep it can be compared or removed."
                )
            if given._version != before[name]:
                raise ValueError(_written_over(name))
            see(name, given, output)

        return hook

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(_Hook(enter(name)), with_kwargs=True),
                module.register_forward_hook(_Hook(leave(name)), with_kwargs=True),
            ):
                stack.callback(handle.remove)
        yield


def _written_over(name: str) -> str:
    return (
        f"The features of block {name!r} are written over in place; set inplace=False in the layer "
        "that does so."
    )


class StepFeatures:
    """Hold, after each training step's forward pass, each block's input and output, graph and all.

    Inside a ``with`` statement. Only what runs in the model's own forward pass counts, in training
    mode and with gradients: neither evaluation, nor what checkpointing computes again in the
    backward pass. The next forward pass lets go of what the last one left.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = list(names)
        self._found: dict[str, tuple[Tensor, Tensor, int, int]] | None = None  # no step yet
        self._running = False
        self._hooks: ExitStack | None = None

    def __enter__(self) -> "StepFeatures":
        if self._hooks is not None:
            raise RuntimeError("These blocks are watched already; leave the with statement first.")
        with ExitStack() as stack:
            begin, end = _Hook(self._begin), _Hook(self._end)
            model = self.model
            stack.callback(model.register_forward_pre_hook(begin, prepend=True).remove)
            stack.callback(model.register_forward_hook(end, always_call=True).remove)
            stack.enter_context(watched(model, self.names, self._see))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        hooks, self._hooks = self._hooks, None
        self._found, self._running = None, False
        if hooks is not None:
            hooks.close()

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return input and output of each block in the last training step, and let go of them.

        Raises:
            ValueError: there was no such step, or some block's features are not to be had.
        """
        found, self._found = self._found, None
        if self._hooks is None:
            raise ValueError("The blocks are not watched; use BlockDistances in a with statement.")
        if found is None:
            mode = "train" if self.model.training else "eval"
            raise ValueError(
                "There are no features of a training step: before each penalty the model must run "
                f"once, in train mode and with gradients (it is in {mode} mode now)."
            )
        for name in self.names:
            if name not in found:
                raise ValueError(f"Block {name!r} was not called in the last forward pass.")
            x, y, *versions = found[name]
            if [x._version, y._version] != versions:
                raise ValueError(_written_over(name))
        return {name: found[name][:2] for name in self.names}

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._running = module.training and torch.is_grad_enabled()
        self._found = {} if self._running else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _see(self, name: str, x: Tensor, y: Tensor) -> None:
        if not self._running or self._found is None:
            return
        if not torch.is_grad_enabled():
            raise ValueError(
                f"Block {name!r} ran without gradients inside a training step; let checkpointing "
                "use use_reentrant=False."
            )
        if name in self._found:
            raise ValueError(f"Block {name!r} is called twice in one forward pass; leave it out.")
        self._found[name] = x, y, x._version, y._version


def valid_batches(
    data: Dataset, batch_size: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the batches of ``valid``, but no last one of a single image: it is no distribution."""
    batches = data.batches("valid", batch_size, device=device)
    return (batch for batch in batches if len(batch[0]) > 1)


def mean_over_batches(
    model: nn.Module,
    batches: InputBatches,
    blocks: Sequence[str] | None,
    measure: Callable[[str, Tensor, Tensor], Tensor],
) -> dict[str, float]:
    """Return the mean of ``measure(name, input, output)`` over batches, each weighted by its size.

    In ascending order. A batch is a pair of inputs, a tensor or a tuple of them for
    ``model(*inputs)``, and labels, which are not used. In ``eval`` mode and without gradients,
    in constant memory; the model stays as it was. Without ``blocks`` all that may be removed.

    Raises:
        ValueError: as :func:`chosen_blocks`; no batches; or a value that is NaN or infinite.
    """
    device, dtype = runs.device_of(model), runs.dtype_of(model)
    values: dict[str, list[Tensor]] = {}
    sizes: list[int] = []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        values[name].append(measure(name, x, y).detach())

    def ready(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    with undisturbed(model), torch.no_grad(), ExitStack() as stack:
        for given, _ in batches:
            inputs = given if isinstance(given, tuple) else (given,)
            inputs = tree_map_only(Tensor, ready, inputs)
            if not len(inputs[0]):
                raise ValueError("A batch holds no inputs; give batches of two or more.")
            if not sizes:
                example = tree_map_only(Tensor, lambda t: t[:2], inputs)
                values |= {name: [] for name in chosen_blocks(model, blocks, example)}
                stack.enter_context(watched(model, list(values), see))
            model(*inputs)
            sizes.append(len(inputs[0]))
    if not sizes:
        raise ValueError("There are no batches to look at; give at least one.")
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    means: dict[str, float] = {}
    for name, each in values.items():
        if len(each) != len(sizes):
            raise ValueError(
                f"Block {name!r} was called {len(each)} times in {len(sizes)} forward passes; "
                "leave it out."
            )
        means[name] = float(torch.stack(each).cpu().double() @ weights)
        if not math.isfinite(means[name]):
            raise ValueError(
                f"The features of block {name!r} hold NaN or infinity; look for them in the "
                "model's weights and inputs."
            )
    return dict(sorted(means.items(), key=lambda item: item[1]))
