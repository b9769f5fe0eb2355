"""Run a network once, without leaving a trace, and follow its features through every operation.

What :mod:`measure` and :mod:`structure` stand on. Nothing here knows the name of any network.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

Example = Tensor | tuple[Any, ...]


def model_inputs(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Return the arguments for ``model(*...)``: copies of ``example``, on the model's device.

    Copies, because a network may begin with an operation in place.
    """
    parameter = next(iter(model.parameters()), None)
    arguments = example if isinstance(example, tuple) else (example,)

    def copy(x: Tensor) -> Tensor:
        x = x.detach().clone()
        return x if parameter is None else x.to(parameter.device)

    return tuple(tree_map_only(Tensor, copy, arguments))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in ``eval`` mode inside the block, and back exactly as it was after it.

    Training flags, buffers, gradients, ``requires_grad``, the effective weights that pruning
    masks leave on modules, and the random state of the CPU are all as they were.
    """
    modules = list(model.modules())
    training = [m.training for m in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    # Masks of torch.nn.utils.prune are as large as the weights and never written in a forward.
    buffers = [
        (m, name, b, b.clone())
        for m in modules
        for name, b in m._buffers.items()
        if b is not None and not is_mask(m, name)
    ]
    effective = [
        (m, name, value)
        for m in modules
        for name, value in vars(m).items()
        if isinstance(value, Tensor)
    ]
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for m, flag in zip(modules, training, strict=True):
            m.training = flag
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for m, name, buffer, copy in buffers:
                m._buffers[name] = buffer
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        for m, name, value in effective:
            vars(m)[name] = value


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as plain products and softmax, whatever fused kernel would be chosen."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def hooked(
    modules: dict[str, nn.Module], enter: Callable[[str], Any], leave: Callable[..., Any]
) -> Iterator[None]:
    """Run the hook ``enter(name)`` before, and ``leave`` after, every call of the modules."""
    handles: list[Any] = []
    try:
        for name, module in modules.items():
            handles.append(
                module.register_forward_pre_hook(enter(name), prepend=True, with_kwargs=True)
            )
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_mask(module: nn.Module, buffer: str) -> bool:
    """Tell whether this buffer is a mask of ``torch.nn.utils.prune``."""
    return buffer.endswith("_mask") and f"{buffer[:-5]}_orig" in module._parameters


_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"}
# Where the two factors of a matrix product stand among the arguments.
_PRODUCTS = {name: (0, 1) for name in ("mm", "bmm", "mv", "linear", "matmul")}
_PRODUCTS |= {name: (1, 2) for name in ("addmm", "baddbmm", "addmv", "_addmm_activation")}
_FROM_PARAMETERS = -1


@dataclass(frozen=True)
class Value:
    """What is known of the content of a piece of memory.

    ``version`` is new whenever the memory is written. ``depth`` is the largest number of
    products with weights between the input and here, or -1 for what comes from parameters
    alone. ``pooled`` says that fewer numbers are left here than the last such product gave.
    """

    version: int
    depth: int
    pooled: bool = False


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the dense tensors of nested tuples, lists and dictionaries, in order."""
    leaves = tree_iter(tree)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]


class Tracer(TorchDispatchMode):
    """Follow what depends on the input through every operation that runs inside the block.

    Knowledge is kept by storage, so that views and operations in place need no special care.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self._versions = itertools.count()
        self._values: dict[int, Value] = {}
        self._kept: list[Any] = []  # storages stay alive, so that no address is used twice
        self.paused = False
        # Masked layers hold their effective weights as plain attributes.
        held = [vars(m).values() for m in model.modules()]
        for tensor in tensors_in([list(model.parameters()), [list(h) for h in held]]):
            self.put(tensor, _FROM_PARAMETERS)
        for tensor in tensors_in(inputs):
            self.put(tensor, 0)

    def put(self, tensor: Tensor, depth: int, pooled: bool = False) -> None:
        """Note that ``tensor`` was written just now."""
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._values[storage._cdata] = Value(next(self._versions), depth, pooled)

    def mark_pooled(self, tensor: Tensor, pooled: bool) -> None:
        """Correct ``pooled`` for what ``tensor`` holds."""
        storage = tensor.untyped_storage()._cdata
        self._values[storage] = replace(self._values[storage], pooled=pooled)

    def value(self, tensor: Tensor) -> Value | None:
        """Return what is known of ``tensor``; None for what hangs on neither input nor weights."""
        return self._values.get(tensor.untyped_storage()._cdata)

    def features(self, tree: Any) -> list[Tensor]:
        """Return the tensors in ``tree`` that depend on the input."""
        known = ((t, self.value(t)) for t in tensors_in(tree))
        return [t for t, value in known if value is not None and value.depth >= 0]

    def key(self, tensor: Tensor) -> tuple[Any, ...]:
        """Return what is equal for two tensors if and only if they hold, for certain, the same.

        The same numbers in the same row-major order; the shape may differ.
        """
        merged: list[tuple[int, int]] = []
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size == 1:
                continue
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        value = self.value(tensor)
        return (value and value.version, tensor.dtype, tensor.storage_offset(), *merged)

    def depth_of(self, outputs: Any) -> int:
        """Return the depth of the deepest of ``outputs``."""
        values = [self.value(t) for t in tensors_in(outputs)]
        return max([0, *(value.depth for value in values if value is not None)])

    def operation(
        self, name: str, args: tuple[Any, ...], inputs: list[Tensor], made: list[Tensor]
    ) -> None:
        """Note one operation, just run: ``made`` are the tensors it wrote, new or in place.

        Until this is called, ``inputs`` are known as they were before the operation.
        """
        values = [v for v in map(self.value, inputs) if v is not None]
        depth = max(v.depth for v in values)
        features = self.features(inputs)
        largest = max((t.numel() for t in features), default=0)
        pooled = bool(features) and all(self._pooled(t) for t in features if t.numel() == largest)
        if depth >= 0 and self._is_weighted(name, args):
            depth, largest, pooled = depth + 1, 0, False
        for tensor in made:
            self.put(tensor, depth, pooled or tensor.numel() < largest)

    def _pooled(self, tensor: Tensor) -> bool:
        value = self.value(tensor)
        return value is not None and value.pooled

    def _is_weighted(self, name: str, args: tuple[Any, ...]) -> bool:
        first, second = (0, 1) if name in _CONVOLUTIONS else _PRODUCTS.get(name, (0, 0))
        if first == second:
            return False
        values = [self.value(t) for t in tensors_in([args[first], args[second]])]
        return any(value is not None and value.depth == _FROM_PARAMETERS for value in values)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tensors_in((args, kwargs)) if self.value(t) is not None]
        if self.paused or not inputs:
            return result
        outputs = tensors_in(result)
        read = {t.untyped_storage()._cdata for t in inputs}
        made = {
            t.untyped_storage()._cdata: t
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tensors_in(value)
        }
        for t in outputs:
            if t.untyped_storage()._cdata not in read:
                made.setdefault(t.untyped_storage()._cdata, t)
        # An operation that only gives a view has read and written nothing yet.
        if made or not outputs:
            self.operation(func.overloadpacket.__name__, args, inputs, list(made.values()))
        return result
