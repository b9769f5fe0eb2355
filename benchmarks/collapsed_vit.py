"""ViT-B/16 with all twelve MLPs collapsed: is it as much faster as its multiply-adds promise?

    python benchmarks/collapsed_vit.py [--repeats 7] [--batch 1 8]

torchvision's vit_b_16 at 224 x 224 with random weights, its GELUs made slopes and the slopes set to
1, before and after `collapse`: what is timed computes the same, and no accuracy is claimed. One
thread, in turns with the network as torchvision makes it; `cpu` is processor time, the steadier one
on a busy machine, and the one that counts. The goal: a speed-up of at least 0.8 of what the
multiply-adds promise.
"""

import argparse
import os
from typing import Any

import torch
import torchvision
from common import interleaved, write
from torch import nn

from pruning101.core.measure import footprint
from pruning101.layer_collapse import collapse, make_collapsible

GOAL = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.vit_b_16().eval()
    nn.init.normal_(model.heads.head.weight, std=0.02)  # all zeros in torchvision
    linear = make_collapsible(model)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if name.endswith(".slope"):
                parameter.fill_(1)
    image = torch.randn(1, 3, 224, 224)
    report = collapse(linear, example=image)
    assert all(pair.collapsed for pair in report.pairs)
    before, after = footprint(model, image), footprint(report.model, image)
    with torch.inference_mode():
        expected = linear(image)
        difference = float((report.model(image) - expected).abs().max() / expected.abs().max())

    promised = before.macs / after.macs
    batches: dict[str, Any] = {}
    for size in options.batch:
        images = torch.randn(size, 3, 224, 224)
        times = interleaved(
            {
                "original": lambda x=images: run(model, x),
                "collapsed": lambda x=images: run(report.model, x),
            },
            repeats=options.repeats,
        )
        speedup = {
            key: times["original"][key] / times["collapsed"][key]
            for key in ("cpu_median", "median")
        }
        batches[str(size)] = {
            "original": times["original"],
            "collapsed": times["collapsed"],
            "speedup_cpu": speedup["cpu_median"],
            "speedup_clock": speedup["median"],
            "of_promised": speedup["cpu_median"] / promised,
        }
    write(
        "collapsed_vit",
        {
            "network": "torchvision vit_b_16, 224 x 224, random weights, 12 of 12 MLPs collapsed",
            "parameters": [before.parameters, after.parameters],
            "macs": [before.macs, after.macs],
            "depth": [before.depth, after.depth],
            "difference": difference,
            "promised_speedup": promised,
            "batches": batches,
            "goal_of_promised": GOAL,
            "goal_met": all(b["of_promised"] >= GOAL for b in batches.values()),
            "load_average": os.getloadavg(),
        },
    )


def run(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model(images)


if __name__ == "__main__":
    main()
