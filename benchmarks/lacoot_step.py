"""What LaCoOT's penalty costs in time and memory, and what the removal of a block costs.

A training step of ResNet-18 (3x32x32, batch 128, float32, one thread) without penalty, with the
penalty on random directions, on the maximised one, each also normalised, on the relative change,
and with POT's own function in the place of ours, in turns in one process, on features that are
caught the same way.
Goals, as ratios to the plain step: at most 1.10, and random directions no dearer than POT's.
Peak memory: each kind in a process of its own; goal 1.15 times the plain one's. Removal: one block
deleted from a copy and the rest evaluated, beside an evaluation pass; goal 50 ms more. Counting the
operations of what is left is timed apart. Where other work runs, as the load average that is kept
tells, only the figures of processor time (cpu_) mean anything.

    python benchmarks/lacoot_step.py [--repeats 15] [--out results/lacoot_step] [--smoke]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, write
from torch import Tensor, nn

from pruning101.core import masks, models, structure
from pruning101.core.block_features import StepFeatures
from pruning101.core.data import from_tensors
from pruning101.core.measure import footprint
from pruning101.core.training import evaluate
from pruning101.lacoot import BlockDistances

OURS: dict[str, dict[str, Any]] = {
    "random": {"direction": "random"},
    "ascent": {"direction": "ascent"},
    "random, normalised": {"direction": "random", "normalise": True},
    "ascent, normalised": {"direction": "ascent", "normalise": True},
    "relative": {"measure": "relative"},
}
GOALS = {"step_ratio": 1.10, "random_to_pot": 1.0, "memory_ratio": 1.15, "removal_ms": 50}
KINDS = ("plain", *OURS, "pot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "lacoot_step")
    parser.add_argument("--smoke", action="store_true", help="batches of 8, one turn; prints only")
    parser.add_argument("--memory", choices=KINDS, help="print one kind's peak memory, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch, repeats = (8, 1) if options.smoke else (128, options.repeats)
    if options.memory:
        print(json.dumps(peak(options.memory, batch)))
        return
    payload = {
        "network": "resnet18, 3x32x32, blocks layer1.1 to layer4.1",
        "batch": batch,
        "repeats": repeats,
        "goals": GOALS,
        "load_average_before": os.getloadavg(),
        "memory": memory(batch, options.smoke),  # first: children are born with the parent's peak
        "step": steps(batch, repeats),
        "removal": removal(64 if options.smoke else 1000, repeats),
        "load_average_after": os.getloadavg(),
    }
    if options.smoke:
        print(json.dumps(payload, indent=1))
    else:
        write(options.out.resolve(), payload)


# --- a training step ------------------------------------------------------------------------------


def step_of(kind: str, batch: int) -> Callable[[], None]:
    """A training step of a network of its own."""
    model = models.build("resnet18").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    blocks = structure.removable_blocks(model, images[:2])

    def step(penalty: Callable[[nn.Module], Tensor] | None) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()

    if kind == "plain":
        return partial(step, None)
    if kind == "pot":
        from ot.sliced import max_sliced_wasserstein_distance

        features = StepFeatures(model, blocks)

        def pots(_: nn.Module) -> Tensor:
            pairs = features.take().values()
            found = [max_sliced_wasserstein_distance(x.flatten(1), y.flatten(1)) for x, y in pairs]
            return torch.stack(found).mean()

        def pot_step() -> None:
            with features:
                step(pots)

        return pot_step
    distances = BlockDistances(model, blocks, **OURS[kind])

    def our_step() -> None:
        with distances:
            step(distances.penalty(1.0))

    return our_step


def steps(batch: int, repeats: int) -> dict[str, Any]:
    found = interleaved({k: step_of(k, batch) for k in KINDS}, repeats=repeats, warmup=2)
    plain, pot = found["plain"], found["pot"]
    return {
        kind: {
            "ratio": one["median"] / plain["median"],
            "cpu_ratio": one["cpu_median"] / plain["cpu_median"],
            "cpu_ratio_to_pot": one["cpu_median"] / pot["cpu_median"],
            **one,
        }
        for kind, one in found.items()
    }


# --- memory ---------------------------------------------------------------------------------------


def peak(kind: str, batch: int) -> dict[str, float]:
    """Peak resident memory after five steps, and before the first, in MiB."""
    step = step_of(kind, batch)
    unit = 1024 if sys.platform != "darwin" else 1024**2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    for _ in range(5):
        step()
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def memory(batch: int, smoke: bool) -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--memory", kind, *(["--smoke"] if smoke else [])]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(answer.stdout)
    for one in found.values():
        one["ratio"] = one["peak"] / found["plain"]["peak"]
    return found


# --- removal --------------------------------------------------------------------------------------


def removal(count: int, repeats: int) -> dict[str, Any]:
    """One block deleted from a copy and the rest evaluated, against an evaluation alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = images, torch.arange(count) % 10
    data = from_tensors("noise", split, split, split, classes="abcdefghij")
    model = models.build("resnet18")
    example = torch.zeros(1, 3, 32, 32)
    smaller = masks.clone(model)
    structure.remove_block(smaller, "layer3.1")

    def remove() -> nn.Module:
        copy = masks.clone(model)
        structure.remove_block(copy, "layer3.1")
        return copy

    def remove_and_count() -> nn.Module:
        copy = remove()
        footprint(copy, example)
        return copy

    found = interleaved(
        {
            "evaluation before": lambda: evaluate(model, data, "valid"),
            "evaluation after": lambda: evaluate(smaller, data, "valid"),
            "removal and evaluation": lambda: evaluate(remove(), data, "valid"),
            "removal": remove,
            "removal and footprint": remove_and_count,
        },
        repeats=repeats,
    )
    return {
        "images": count,
        "removal_ms": 1e3 * found["removal"]["cpu_median"],
        "removal_and_footprint_ms": 1e3 * found["removal and footprint"]["cpu_median"],
        "more_than_an_evaluation_ms": 1e3
        * (found["removal and evaluation"]["cpu_median"] - found["evaluation after"]["cpu_median"]),
        "seconds": found,
    }


if __name__ == "__main__":
    main()
