"""What a network costs: parameters, non-zeros, MACs, depth, bytes, and milliseconds.

Everything is measured by running the network on an example, so it holds for any module, and
leaves the network exactly as it was found.
"""

import json
import statistics
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning101.core.tracing import (
    Example,
    Tracer,
    is_mask,
    model_inputs,
    plain_attention,
    undisturbed,
)


@dataclass(frozen=True)
class Footprint:
    """What a network costs to keep and to run, as counted by :func:`footprint`.

    ``parameters`` and ``nonzero`` are counts of numbers, ``macs`` multiply-adds for one input,
    ``depth`` weighted layers one after the other, ``dense_bytes`` and ``coded_bytes`` bytes.
    """

    parameters: int
    nonzero: int
    macs: int
    depth: int
    dense_bytes: int
    coded_bytes: int


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass: median and interquartile range over ``repeats`` passes, in ms."""

    median_ms: float
    iqr_ms: float
    repeats: int


def footprint(model: nn.Module, example: Example) -> Footprint:
    """Count what ``model`` costs, running it once on ``example``; the model stays as it was.

    ``example`` is one input batch, or a tuple of tensors for ``model(*example)``; its first
    dimension is the batch.

    - ``parameters``: all parameters, shared ones once. A masked layer has as many as before.
    - ``nonzero``: parameters that are not zero once masks are applied, biases and norms included.
    - ``macs``: multiply-adds per input of convolutions, linear layers and attention products (half
      the FLOPs of ``torch.utils.flop_counter``); zeros cost as much as any other weight.
    - ``depth``: the longest chain, from input to output, of products with weights: a convolution
      or a linear layer counts one, an attention layer two (into and out of it), so ResNet-18
      has 18 and LeNet-300-100 has 3.
    - ``dense_bytes``: the tensors needed at inference as they lie in memory, masks not counted.
    - ``coded_bytes``: the length of :func:`coded_state`.

    Recurrent layers and products with fixed tensors that are no parameters add nothing to
    ``depth``; fused recurrent kernels add nothing to ``macs``.

    Raises ``ValueError`` if the example is empty.
    """
    inputs = model_inputs(model, example)
    trace = Tracer(model, inputs)
    with undisturbed(model):
        count, outputs = _counted(model, inputs, trace)
    state = _distinct(inference_state(model))
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        nonzero=_count_nonzero(model),
        macs=count,
        depth=trace.depth_of(outputs),
        dense_bytes=sum(t.numel() * t.element_size() for _, t in state),
        coded_bytes=len(coded_state(model)),
    )


def macs(model: nn.Module, example: Example) -> int:
    """Count multiply-adds per input alone, as :func:`footprint` does; on the meta device, too.

    The model runs in the mode that it is in. Raises ``ValueError`` if the example is empty.
    """
    return _counted(model, model_inputs(model, example))[0]


def _counted(
    model: nn.Module, inputs: tuple[Any, ...], watching: AbstractContextManager[Any] | None = None
) -> tuple[int, Any]:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, a third of torch itself

    batch_size = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim), 1)
    if batch_size == 0:
        raise ValueError("The example is an empty batch; give at least one input.")
    watching = watching or nullcontext()
    with torch.no_grad(), plain_attention(), FlopCounterMode(display=False) as flops, watching:
        outputs = model(*inputs)
    return round(flops.get_total_flops() / 2 / batch_size), outputs


def latency(model: nn.Module, example: Example, *, threads: int | None = None) -> Latency:
    """Time the forward pass of ``model`` on ``example``, in ms for the whole batch.

    In ``eval`` and inference mode, after a warm-up, at least 5 passes and about one second; the
    accelerator, where there is one, is waited for. ``threads`` fixes the number of CPU threads
    for the measurement; it is put back afterwards. The model stays as it was.

    Raises ``ValueError`` if ``threads`` is not positive.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    inputs = model_inputs(model, example)
    wait = _synchroniser(inputs, model)
    before = torch.get_num_threads()
    times: list[float] = []
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with undisturbed(model), torch.inference_mode():
            # The first passes choose kernels and fill caches: they are not counted.
            _repeat(lambda: model(*inputs), wait, least=3, most=50, seconds=0.2)
            times = _repeat(lambda: model(*inputs), wait, least=5, most=1000, seconds=1.0)
    finally:
        torch.set_num_threads(before)
    quartiles = statistics.quantiles(times, n=4)
    return Latency(quartiles[1] * 1e3, (quartiles[2] - quartiles[0]) * 1e3, len(times))


def _repeat(
    run: Callable[[], Any], wait: Callable[[], None], *, least: int, most: int, seconds: float
) -> list[float]:
    times: list[float] = []
    wait()
    while len(times) < least or (len(times) < most and sum(times) < seconds):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return times


def _synchroniser(inputs: tuple[Any, ...], model: nn.Module) -> Callable[[], None]:
    tensors = [*model.parameters(), *(x for x in inputs if isinstance(x, Tensor))]
    kind = tensors[0].device.type if tensors else "cpu"
    if kind == "cuda":
        return torch.cuda.synchronize
    if kind == "mps":
        return torch.mps.synchronize
    return lambda: None


# --- bytes ------------------------------------------------------------------------------------


def inference_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that inference needs, by name: masks applied, and no mask kept.

    Parameters and saved buffers, but for BatchNorm's batch counter, which only training reads;
    the result loads into a dense twin with ``load_state_dict``. A tensor under two names appears
    under both.
    """
    state: dict[str, Tensor] = {}
    masked: dict[int, Tensor] = {}  # what layers share is one tensor when masked, too
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                plain, value = _effective(module, name, parameter)
                if plain != name:
                    before = masked.setdefault(id(parameter), value)
                    value = before if torch.equal(before, value) else value
                state[dot + plain] = value
        for name, buffer in module._buffers.items():
            skipped = name in module._non_persistent_buffers_set or name == "num_batches_tracked"
            if buffer is not None and not skipped and not is_mask(module, name):
                state[dot + name] = buffer
    return state


def _effective(module: nn.Module, name: str, parameter: Tensor) -> tuple[str, Tensor]:
    mask = module._buffers.get(f"{name[:-5]}_mask") if name.endswith("_orig") else None
    if mask is None:
        return name, parameter.detach()
    return name[:-5], parameter.detach() * mask


def _count_nonzero(model: nn.Module) -> int:
    seen: set[int] = set()
    count = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                count += int(torch.count_nonzero(_effective(module, name, parameter)[1]))
    return count


def _distinct(state: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Group names that stand for the same memory."""
    found: dict[Any, tuple[list[str], Tensor]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # An empty tensor has no address of its own.
        found.setdefault(key if tensor.numel() else name, ([], tensor))[0].append(name)
    return list(found.values())


def coded_state(model: nn.Module) -> bytes:
    """Return the network's inference state as a lossless, entropy-coded string of bytes.

    What is coded is :func:`inference_state`: masks are applied, not stored. Each tensor becomes a
    bit per entry that says whether it is zero, deflated, and then its non-zero values, split into
    byte planes (signs and exponents together, then the bytes of the mantissa), each Huffman-coded
    by zlib or stored as it is where that is no longer. Zeros thus cost well below a bit each, and
    a whole row of them next to nothing, as in Han et al. (2016), Deep Compression, section 4,
    but with no quantisation: :func:`decode_state` gives the same values back (a negative zero
    comes back as zero).
    """
    header: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for names, tensor in _distinct(inference_state(model)):
        flat = tensor.detach().cpu().reshape(-1)
        keep = flat != 0
        values = flat if bool(keep.all()) else flat[keep]
        planes = values.contiguous().view(torch.uint8).reshape(-1, flat.element_size()).numpy()
        parts = [zlib.compress(np.packbits(keep.numpy()).tobytes(), 6)]
        parts += [_pack(np.ascontiguousarray(planes[:, i])) for i in range(planes.shape[1])]
        header.append(
            {
                "names": names,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": [len(part) for part in parts],
            }
        )
        blobs += parts
    text = zlib.compress(json.dumps(header).encode(), 9)
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])


def decode_state(coded: bytes) -> dict[str, Tensor]:
    """Return the state dictionary that :func:`coded_state` coded, on the CPU.

    Raises ``ValueError`` if ``coded`` is no such string or is cut short.
    """
    try:
        start = 8 + int.from_bytes(coded[:8], "little")
        header = json.loads(zlib.decompress(coded[8:start]))
        state: dict[str, Tensor] = {}
        for entry in header:
            parts = []
            for size in entry["bytes"]:
                parts.append(coded[start : start + size])
                start += size
            tensor = _decode_tensor(parts, getattr(torch, entry["dtype"]), entry["shape"])
            state |= dict.fromkeys(entry["names"], tensor)
    except (zlib.error, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"These bytes are not a whole coded state ({error}); give what coded_state returned."
        ) from error
    return state


def _decode_tensor(parts: list[bytes], dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    bits = np.frombuffer(zlib.decompress(parts[0]), dtype=np.uint8)
    keep = torch.from_numpy(np.unpackbits(bits, count=count).astype(bool))
    flat = torch.zeros(count, dtype=dtype)
    if bool(keep.any()):
        planes = np.stack([np.frombuffer(_unpack(part), np.uint8) for part in parts[1:]], axis=1)
        flat[keep] = torch.from_numpy(np.ascontiguousarray(planes)).reshape(-1).view(dtype)
    return flat.reshape(shape)


def _pack(plane: np.ndarray) -> bytes:
    # Neighbouring weights hardly ever repeat, so looking for matches (the slow part) gains nothing.
    # The last bytes of a mantissa are as good as noise: a sample tells, and spares the time.
    raw = plane.tobytes()
    sample = raw[: 1 << 16]
    if len(_huffman(sample)) < len(sample):
        coded = _huffman(raw)
        if len(coded) < len(raw):
            return b"\x01" + coded
    return b"\x00" + raw


def _huffman(raw: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def _unpack(part: bytes) -> bytes:
    return zlib.decompress(part[1:]) if part[:1] == b"\x01" else part[1:]
