"""What merging costs, and what a border that is right costs: ratios within one run.

Merging: all pairs of convolutions of VGG-16-BN that follow one another with nothing but a norm
(merged before) and an activation (taken for linear) between them. `exact` and `interior` merge
those that one fold can merge at once, no layer twice; `overlapping` are all neighbours. The unit
is a forward pass of the network with one 224x224 image. The three linear layers at its end are left
out: merging the first two alone takes 4096 x 4096 x 25088 multiply-adds, 27 times those of the
forward pass.

Running: two 3x3 convolutions of 64 channels on 32x32 images, batch 32, as they are, merged for the
interior, and merged exactly.

    python benchmarks/merging.py [--repeats 7]
"""

import argparse
import itertools

import torch
from common import interleaved, write
from torch import nn
from torchvision.models import vgg16_bn

from pruning101.core.measure import footprint
from pruning101.core.merging import merge, merge_norm


def neighbours(features):
    """Yield pairs of convolutions with their norms merged and no pooling between them."""
    layers, run = list(features), []
    for layer, norm in itertools.pairwise([*layers, nn.Identity()]):
        if isinstance(layer, nn.Conv2d):
            run.append(merge_norm(layer, norm))
            if len(run) > 1:
                yield run[-2], run[-1]
        elif isinstance(layer, nn.MaxPool2d):
            run = []


def disjoint(pairs):
    taken = set()
    for first, second in pairs:
        if first not in taken:
            taken.add(second)
            yield first, second


def merging(repeats):
    net = vgg16_bn().eval()
    image = torch.randn(1, 3, 224, 224)
    overlapping = list(neighbours(net.features))
    pairs = list(disjoint(overlapping))

    def forward():
        with torch.inference_mode():
            net(image)

    def all_of(pairs, border):
        return lambda: [merge(first, second, border=border) for first, second in pairs]

    times = interleaved(
        {
            "forward": forward,
            "interior": all_of(pairs, "interior"),
            "exact": all_of(pairs, "exact"),
            "exact, overlapping": all_of(overlapping, "exact"),
        },
        repeats=repeats,
    )
    return {
        "pairs": [[a.in_channels, a.out_channels, b.out_channels] for a, b in pairs],
        "overlapping": [[a.in_channels, a.out_channels, b.out_channels] for a, b in overlapping],
        "forward_macs": footprint(net, image).macs,
        "linear_pair_macs": 4096 * 4096 * 25088,
        **summary(times, "forward"),
    }


def running(repeats, backward):
    first, second = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    candidates = {
        "pair": nn.Sequential(first, second),
        "interior": merge(first, second, border="interior"),
        "exact": merge(first, second),
    }
    images = torch.randn(32, 64, 32, 32)

    def step(module):
        def run():
            with torch.set_grad_enabled(backward):
                out = module(images.requires_grad_(backward))
            if backward:
                out.sum().backward()

        return run

    times = interleaved({name: step(m) for name, m in candidates.items()}, repeats=repeats)
    macs = {name: footprint(module, images).macs for name, module in candidates.items()}
    return {"macs": macs, **summary(times, "interior")}


def summary(times, unit):
    return {
        "seconds": {name: time["median"] for name, time in times.items()},
        "cpu_seconds": {name: time["cpu_median"] for name, time in times.items()},
        f"ratio_to_{unit}": {n: t["median"] / times[unit]["median"] for n, t in times.items()},
        f"cpu_ratio_to_{unit}": {
            n: t["cpu_median"] / times[unit]["cpu_median"] for n, t in times.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    write(
        "merging",
        {
            "note": "Goals: `exact` below 2 forward passes to merge, at most 1.35 times `interior` "
            "to run. cpu_: processor time, the steadier one on a busy machine. Merging the linear "
            "layers is left out, it takes linear_pair_macs.",
            "merging": merging(repeats),
            "forward": running(4 * repeats, backward=False),
            "forward_and_backward": running(2 * repeats, backward=True),
        },
    )
