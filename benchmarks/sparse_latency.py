"""What zeros buy and what fewer channels buy: bytes and milliseconds, no accuracy claimed.

    python benchmarks/sparse_latency.py
    python benchmarks/sparse_latency.py --part linear vgg16_bn --threads 2 --again

The networks of Bragagnolo et al. (ICIP 2021), untrained, at the ratios of their table: weights
zeroed by magnitude in every layer alike, or channels taken out of every group alike. Where zeros
lie is another matter in a trained network (see `structured_against_unstructured.py`); what a
multiplication by zero costs is not. `linear` looks for the sparsity from which a single linear
layer is faster with CSR weights. Everything within a part is timed in turns, in one run; a part
that is done is kept in `--folder`, and `--again` measures it anew.

Structure of `results/sparse_latency.json`::

    machine                       in words: how busy it was, and what has been timed
    networks.NAME                 vgg16_bn | resnet32 | alexnet | resnet18_224
      .input, .classes            [3, 32, 32], 10
      .slides                     their rows: dense, unstructured, structured (None where they have
                                  none), each with ratio (share), simplified_mb, coded_mb, ms by
                                  device
      .rows[]                     one dict a row, `name` is one of
                                  dense
                                  unstructured            zeros at the slides' ratio
                                  unstructured_simplified the same, dead units taken out
                                  structured_parameters   the slides' ratio as a share of parameters
                                  structured_channels     the slides' ratio as a share of channels
                                  unstructured_0.5 ... unstructured_0.99
        .kind                     dense | unstructured | structured
        .zero_share               zeros among the weights of convolutions and linear layers
        .removed_share            parameters gone or zero, of the dense network's
        .channels_removed_share   channels (output units of hidden layers) that are gone
        .parameters .nonzero .macs
        .simplified_bytes         dense tensors as they lie in memory
        .coded_bytes              entropy-coded, lossless (`core.measure.coded_state`)
        .sparse_layout_bytes      with linear layers in CSR; None where nothing is converted
        .layouts                  {layer: "csr" | "dense: why"} of the sparse layout, or None
        .latency                  {"threads1_batch1": T, "threads1_batch64": T, "threads2_...": T}
        .latency_sparse_layout    the same with linear layers in CSR, or None
                                  T = {median_ms, iqr_ms, least_ms, cpu_ms, repeats, speedup}:
                                  times on the clock, but for cpu_ms, the median of the
                                  processor's time (all threads); speedup is the dense row's time
                                  over this one's: cpu_ms on one thread, median_ms on two
      .load_average               {"threads1": [before, after], "threads2": ...}: of the machine,
                                  over one minute; .cores
    linear
      .sparsities                 [0.3, ...]
      .rows[]                     .features (n: an n x n layer) .batch .threads
                                  .dense T
                                  .csr   one T a sparsity, in their order
                                  .crossing  the sparsity from which CSR is faster (interpolated;
                                  None: never in this range; 0.0: always)
      .load_average               as above
"""

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write
from torch import Tensor, nn

from pruning101 import magnitude, structured
from pruning101.core import masks, measure, models, structure
from pruning101.core.sparse_layout import layouts, sparse_layout

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
LINEAR_SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SOURCE = (
    "Bragagnolo, Tartaglione, Fiandrotti and Grangetto, On the role of structured pruning for "
    "neural network compression, ICIP 2021, pp. 3527-3531, as on the seminar's slide"
)


def slide_row(method: str, ratio: float, simplified: float, coded: float, *ms: float) -> Any:
    return {
        "method": method,
        "ratio": ratio,
        "simplified_mb": simplified,
        "coded_mb": coded,
        "ms": dict(zip(("RPi 3B", "P20", "MI9", "S6L"), ms, strict=True)),
    }


SLIDES: dict[str, Any] = {
    "vgg16_bn": {
        "dataset": "CIFAR-10",
        "dense": slide_row("no pruning", 0, 60.0, 3.6, 647, 204, 153, 251),
        "unstructured": slide_row("LOBSTER", 0.9244, 58.61, 1.61, 610, 191, 146, 242),
        "structured": slide_row("SeReNe", 0.4716, 31.02, 0.34, 594, 99, 85, 106),
    },
    "resnet32": {
        "dataset": "CIFAR-10",
        "dense": slide_row("no pruning", 0, 2.0, 0.30, 580, 32, 30, 31),
        "unstructured": slide_row("LOBSTER", 0.8119, 1.96, 0.12, 545, 32, 26, 30),
        "structured": slide_row("SeReNe", 0.5280, 1.0, 0.09, 536, 25, 17, 25),
    },
    "alexnet": {
        "dataset": "CIFAR-100",
        "dense": slide_row("no pruning", 0, 94.6, 10.1, 246, 131, 84, 168),
        "unstructured": slide_row("LOBSTER", 0.9890, 48.84, 0.40, 224, 95, 67, 120),
        "structured": slide_row("SeReNe", 0.5987, 37.07, 0.20, 186, 75, 53, 96),
    },
}
READING = (
    "The slides' simplified megabytes fall by very nearly the structured ratio (60.0 to 31.02 is "
    "48 % for 47.16 %), so that ratio reads as a share of parameters; as a share of channels it "
    "would leave about a quarter of them. Both readings are measured."
)


def alexnet_32(classes: int) -> nn.Module:
    """An AlexNet for 32 x 32 images whose 23.64 M parameters make the slides' 94.6 MB."""
    widths, pooled = (64, 192, 384, 256, 256), (0, 1, 4)
    layers: list[nn.Module] = []
    before = 3
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, 2 if i == 0 else 1, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (i in pooled)
        before = width
    layers += [nn.Flatten(), nn.Linear(256 * 2 * 2, 4096), nn.ReLU()]
    layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes)]
    return nn.Sequential(*layers)


def build(name: str) -> nn.Module:
    if name == "alexnet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return alexnet_32(100)
    if name == "resnet18_224":
        return models.build("torchvision:resnet18", classes=1000, image_size=224)
    return models.build(name, seed=0)


# name -> (side of the images, classes, unstructured ratio, structured ratio, sweep too)
NETWORKS: dict[str, tuple[int, int, float, float, bool]] = {
    "vgg16_bn": (32, 10, 0.9244, 0.4716, True),
    "resnet32": (32, 10, 0.8119, 0.5280, True),
    "alexnet": (32, 100, 0.9890, 0.5987, True),
    "resnet18_224": (224, 1000, 0.9, 0.5, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = [*NETWORKS, "linear"]
    parser.add_argument("--part", choices=parts, nargs="+", default=parts)
    parser.add_argument("--threads", type=int, choices=(1, 2), nargs="+", default=[1, 2])
    parser.add_argument("--again", action="store_true", help="time anew what is done")
    parser.add_argument("--folder", type=Path, default=Path("runs/sparse_latency"))
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_latency.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for threads in options.threads:
        for part in options.part:
            done = options.folder / f"{part}-threads{threads}.json"
            if options.again or not done.exists():
                timed = linear(threads) if part == "linear" else network(part, threads)
                done.write_text(json.dumps(timed))
    found = {part: joined(options.folder, part) for part in parts}
    write(
        options.out.resolve(),
        {
            "environment": environment() | {"command": "python benchmarks/sparse_latency.py"},
            "machine": machine([part for part in found.values() if part]),
            "source_of_slides": SOURCE,
            "ratio_of_slides": READING,
            "networks": {name: found[name] for name in NETWORKS if found[name]},
            "linear": found["linear"],
        },
    )


def machine(parts: list[dict[str, Any]]) -> str:
    """Say in words how busy the machine was while these parts were timed."""
    loads = [load for part in parts for pair in part["load_average"].values() for load in pair]
    threads = sorted({name for part in parts for name in part["load_average"]})
    if not loads:
        return "nothing timed yet"
    busy = "busy with other work: " if max(loads) > parts[0]["cores"] else ""
    return (
        f"{busy}load averages of {min(loads):.1f} to {max(loads):.1f}, {parts[0]['cores']} cores; "
        f"timed on {' and '.join(threads)}; on one thread cpu_ms and speedup leave other work out"
    )


def joined(folder: Path, part: str) -> dict[str, Any] | None:
    """One part on whichever numbers of threads it has been measured."""
    files = [folder / f"{part}-threads{threads}.json" for threads in (1, 2)]
    halves = [json.loads(path.read_text()) for path in files if path.exists()]
    if not halves:
        return None
    whole, *others = halves
    for other in others:
        whole["load_average"] |= other["load_average"]
        if part == "linear":
            whole["rows"] += other["rows"]
            continue
        for row, same in zip(whole["rows"], other["rows"], strict=True):
            row["latency"] |= same["latency"]
            if row["latency_sparse_layout"]:
                row["latency_sparse_layout"] |= same["latency_sparse_layout"]
    return whole


# --- whole networks ----------------------------------------------------------------------------


def network(name: str, threads: int) -> dict[str, Any]:
    side, classes, unstructured, structured, sweep = NETWORKS[name]
    dense = build(name).eval()
    example = torch.zeros(1, 3, side, side)
    variants: dict[str, tuple[str, nn.Module]] = {"dense": ("dense", dense)}
    zeroed = with_zeros(dense, unstructured)
    variants["unstructured"] = ("unstructured", zeroed)
    compact = magnitude.remove_dead_units(zeroed, example, inplace=False).model
    variants["unstructured_simplified"] = ("unstructured", compact)
    variants["structured_parameters"] = ("structured", fewer_parameters(dense, example, structured))
    variants["structured_channels"] = ("structured", fewer_channels(dense, example, structured))
    if sweep:
        for sparsity in SPARSITIES:
            variants[f"unstructured_{sparsity}"] = ("unstructured", with_zeros(dense, sparsity))
    rows = [
        {"name": key, "kind": kind, **costs(model, dense, example)}
        for key, (kind, model) in variants.items()
    ]
    load = os.getloadavg()[0]
    networks = {key: model for key, (_, model) in variants.items()}
    timed = latencies(networks, (3, side, side), threads)
    for row in rows:
        row.update(timed[row["name"]])
    return {
        "input": [3, side, side],
        "classes": classes,
        "slides": SLIDES.get(name),
        "rows": rows,
        "load_average": {f"threads{threads}": [load, os.getloadavg()[0]]},
        "cores": os.cpu_count(),
    }


def with_zeros(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy with the smallest weights of every layer at zero, as plain dense tensors."""
    zeroed = masks.clone(model)
    masks.apply(zeroed, masks.from_scores(magnitude.scores(zeroed), sparsity, scope="layer"))
    masks.make_permanent(zeroed)
    return zeroed


def fewer_channels(model: nn.Module, example: Tensor, share: float) -> nn.Module:
    """A copy without the ``share`` of each group's channels that are smallest in L1."""
    return structured.prune_channels(model, example, share, inplace=False).model


def fewer_parameters(model: nn.Module, example: Tensor, share: float) -> nn.Module:
    """As `fewer_channels`, with as many channels gone as take ``share`` of the parameters along."""
    total, low, high = count(model), 0.0, share
    smaller, tried = model, 1 - math.sqrt(1 - share)  # both ends of a layer shrink
    for _ in range(5):
        smaller = fewer_channels(model, example, tried)
        removed = 1 - count(smaller) / total
        if abs(removed - share) < 0.005:
            break
        low, high = (tried, high) if removed < share else (low, tried)
        tried = (low + high) / 2
    return smaller


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def costs(model: nn.Module, dense: nn.Module, example: Tensor) -> dict[str, Any]:
    """Shares, counts and bytes of ``model`` beside those of the network that it came from."""
    found, before = measure.footprint(model, example), count(dense)
    sparse = in_sparse_layout(model)
    return {
        "zero_share": masks.sparsity(model),
        "removed_share": 1 - found.nonzero / before,
        "channels_removed_share": 1 - hidden_units(model) / hidden_units(dense),
        "parameters": found.parameters,
        "nonzero": found.nonzero,
        "macs": found.macs,
        "simplified_bytes": found.dense_bytes,
        "coded_bytes": found.coded_bytes,
        "sparse_layout_bytes": sparse and state_bytes(sparse),
        "layouts": sparse and layouts(sparse),
    }


def hidden_units(model: nn.Module) -> int:
    """Output units of all convolutions and linear layers but the last."""
    weights = [m.weight for m in structure.prunable(model).values()]
    return sum(w.shape[0] for w in weights[:-1])


def state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in measure.inference_state(model).values())


def in_sparse_layout(model: nn.Module) -> nn.Module | None:
    """With linear layers in CSR, or None where hardly a weight is zero (a few are by chance)."""
    if masks.sparsity(model) < 0.01:
        return None
    with warnings.catch_warnings():  # what stays dense is written down as `layouts`
        warnings.simplefilter("ignore")
        return sparse_layout(model)


# --- time --------------------------------------------------------------------------------------


def latencies(
    variants: Mapping[str, nn.Module], shape: tuple[int, ...], threads: int
) -> dict[str, dict[str, Any]]:
    """Forward times of all ``variants`` in turns, as they are and with sparse linear layers.

    ``variants["dense"]`` is what speedups refer to.
    """
    networks = {(name, "latency"): model.eval() for name, model in variants.items()}
    for name, model in variants.items():
        sparse = in_sparse_layout(model)
        if sparse is not None:
            networks[name, "latency_sparse_layout"] = sparse.eval()
    result: dict[str, dict[str, Any]] = {
        name: {"latency": {}, "latency_sparse_layout": None} for name in variants
    }
    for batch in (1, 64):
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        calls = {key: partial(model, images) for key, model in networks.items()}
        for (name, kind), found in in_turns(calls, threads, ("dense", "latency")).items():
            into = result[name]
            into[kind] = into[kind] or {}
            into[kind][f"threads{threads}_batch{batch}"] = found
    return result


def in_turns(
    calls: Mapping[Any, Callable[[], Any]], threads: int, reference: Any, *, seconds: float = 1.0
) -> dict[Any, dict[str, Any]]:
    """Time all calls in turns, so that a busy moment hits all alike: medians in ms.

    Each turn calls once untimed where that is short (the others have emptied the caches), then
    times a block of calls of at least 2 ms.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times: dict[Any, list[tuple[float, float]]] = {key: [] for key in calls}
    try:
        with torch.inference_mode():
            single = {
                key: min(_seconds(call, 1) for _ in range(3))[0] for key, call in calls.items()
            }
            begin, turns = time.perf_counter(), 0
            while turns < 5 or (time.perf_counter() - begin < seconds * len(calls) and turns < 100):
                turns += 1
                for key, call in calls.items():
                    if single[key] < 0.02:
                        call()
                    times[key].append(_seconds(call, max(1, math.ceil(0.002 / single[key]))))
    finally:
        torch.set_num_threads(before)
    found = {key: summary(values) for key, values in times.items()}
    steadier = "cpu_ms" if threads == 1 else "median_ms"
    for one in found.values():
        one["speedup"] = found[reference][steadier] / one[steadier]
    return found


def _seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds a call, on the clock and of the processor."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    clock, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return clock / repeats, cpu / repeats


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    clock = [t for t, _ in times]
    quartiles = statistics.quantiles(clock, n=4)
    return {
        "median_ms": quartiles[1] * 1e3,
        "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
        "least_ms": min(clock) * 1e3,
        "cpu_ms": statistics.median(cpu for _, cpu in times) * 1e3,
        "repeats": len(times),
    }


# --- one linear layer --------------------------------------------------------------------------


def linear(threads: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    rows = []
    for features in (256, 512, 1024, 2048, 4096):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dense = nn.Sequential(nn.Linear(features, features))
        sparse = [sparse_layout(with_zeros(dense, s)) for s in LINEAR_SPARSITIES]
        layers = {"dense": dense, **dict(enumerate(sparse))}
        for batch in (1, 64):
            images = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))
            calls = {key: partial(layer, images) for key, layer in layers.items()}
            found = in_turns(calls, threads, "dense", seconds=0.3)
            csr = [found[i] for i in range(len(sparse))]
            rows.append(
                {
                    "features": features,
                    "batch": batch,
                    "threads": threads,
                    "dense": found["dense"],
                    "csr": csr,
                    "crossing": crossing([t["speedup"] for t in csr]),
                }
            )
    return {
        "sparsities": LINEAR_SPARSITIES,
        "rows": rows,
        "load_average": {f"threads{threads}": [load, os.getloadavg()[0]]},
        "cores": os.cpu_count(),
    }


def crossing(speedups: list[float]) -> float | None:
    """The sparsity at which the speedup comes to 1 for good, straight between logarithms."""
    below = [i for i, speedup in enumerate(speedups) if speedup < 1]
    if not below:
        return 0.0
    i = below[-1]
    if i + 1 == len(speedups):
        return None
    left, right = math.log(speedups[i]), math.log(speedups[i + 1])
    # on densities, whose logarithm the time follows
    a, b = (math.log(1 - LINEAR_SPARSITIES[k]) for k in (i, i + 1))
    return 1 - math.exp(a + (b - a) * -left / (right - left))


if __name__ == "__main__":
    main()
