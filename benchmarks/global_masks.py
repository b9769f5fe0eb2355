"""Masks for a 138M-parameter VGG-16 from global magnitudes, against `torch.nn.utils.prune`.

Both prune the same share of all convolution and linear weights of torchvision's VGG-16 by global
magnitude and leave the model masked, each in a fresh process, in turns. Memory is the growth of the
process's resident set, from just before to its peak (Linux only). Prints and keeps the ratios
ours / torch; the goal is 0.5 or less for both.

    python benchmarks/global_masks.py [--repeats 3] [--sparsity 0.9]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(method: str, sparsity: float) -> None:
    import torch
    import torchvision
    from torch import nn
    from torch.nn.utils import prune

    from pruning101.core import masks

    with torch.device("meta"):
        model = torchvision.models.vgg16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    start = time.perf_counter()
    if method == "pruning101":
        weights = {f"{name}.weight": m for name, m in model.named_modules() if m in layers}
        scores = {name: m.weight.detach().abs() for name, m in weights.items()}
        masks.apply(model, masks.from_scores(scores, sparsity))
    else:
        prune.global_unstructured(
            [(m, "weight") for m in layers], prune.L1Unstructured, amount=sparsity
        )
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    # Of equal scores torch prunes any, so the cut is compared by its values.
    cut = {
        "pruned": sum(int((m.weight_mask == 0).sum()) for m in layers),
        "highest_pruned": max(float(m.weight_orig.abs()[m.weight_mask == 0].max()) for m in layers),
        "lowest_kept": min(float(m.weight_orig.abs()[m.weight_mask != 0].min()) for m in layers),
    }
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "cut": cut}))


def main() -> None:
    from common import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--only", choices=["pruning101", "torch"], help="measure once, in here")
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.sparsity)
        return
    runs: dict[str, list[dict]] = {"pruning101": [], "torch": []}
    for _ in range(options.repeats):
        for method in runs:
            command = [sys.executable, __file__, "--only", method]
            command += ["--sparsity", str(options.sparsity)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[method].append(json.loads(done.stdout))
    medians = {
        method: {k: statistics.median(r[k] for r in found) for k in ("seconds", "peak_bytes")}
        for method, found in runs.items()
    }
    write(
        "global_masks",
        {
            "model": "torchvision vgg16, 138.4M parameters, random weights, seed 0",
            "sparsity": options.sparsity,
            "median": medians,
            "ratio": {
                k: medians["pruning101"][k] / medians["torch"][k] for k in ("seconds", "peak_bytes")
            },
            "goal": 0.5,
            "cuts": {m: found[0]["cut"] for m, found in runs.items()},
            "runs": {
                m: [{k: r[k] for k in ("seconds", "peak_bytes")} for r in found]
                for m, found in runs.items()
            },
        },
    )


if __name__ == "__main__":
    main()
