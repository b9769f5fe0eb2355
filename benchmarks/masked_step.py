"""A training step with masks against the same step without: LeNet-300-100, LeNet-5, ResNet-18.

`bare` is the loop one would write by hand (zero_grad, forward, loss, backward, SGD with momentum);
`fit` is one epoch of `training.fit`. Dense and masked (90 % of all weights) take turns in one
process. Prints and keeps the ratios of time on the clock and of processor time; the goal is 1.1 or
less.

    python benchmarks/masked_step.py [--repeats 9] [--nets lenet_300_100 lenet5 resnet18]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, write
from torch import nn

from pruning101 import magnitude
from pruning101.core import masks, models
from pruning101.core.data import Dataset, from_tensors
from pruning101.core.training import fit

GOAL, SPARSITY = 1.1, 0.9
# name: channels, side and number of images, batch size
NETS = {
    "lenet_300_100": (1, 28, 12_800, 128),
    "lenet5": (1, 28, 2_560, 128),
    "resnet18": (3, 32, 256, 64),
}


def dataset(channels: int, side: int, n: int) -> Dataset:
    """Noise: what is in the images does not matter here."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 10, (n,), generator=g)
    few = images[:2], labels[:2]
    return from_tensors("noise", (images, labels), few, few, classes=[str(k) for k in range(10)])


def loop(model: nn.Module, batches: list[Any]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--out", default="masked_step")
    options = parser.parse_args()
    found = {}
    for net in options.nets:
        channels, side, n, batch = NETS[net]
        data = dataset(channels, side, n)
        batches = list(data.batches("train", batch))
        candidates: dict[str, Callable[[], Any]] = {}
        for kind in ("dense", "masked"):
            for way in ("bare", "fit"):
                model = models.build(net, in_channels=channels, image_size=side)
                if kind == "masked":
                    masks.apply(model, masks.from_scores(magnitude.scores(model), SPARSITY))
                if way == "bare":
                    candidates[f"{kind} {way}"] = loop(model, batches)
                else:
                    candidates[f"{kind} {way}"] = lambda model=model, data=data, batch=batch: fit(
                        model, data, epochs=1, lr=0.01, batch_size=batch, progress=False
                    )
        times = interleaved(candidates, repeats=options.repeats)
        found[net] = {
            "batch_size": batch,
            "steps": len(batches),
            **{
                f"{what}ratio_{way}": times[f"masked {way}"][f"{what}median"]
                / times[f"dense {way}"][f"{what}median"]
                for way in ("bare", "fit")
                for what in ("", "cpu_")
            },
            "seconds": times,
        }
    write(options.out, {"goal": GOAL, "sparsity": SPARSITY, "nets": found})


if __name__ == "__main__":
    main()
