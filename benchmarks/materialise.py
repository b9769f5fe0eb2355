"""Structured zeros made good: what eight torchvision networks are before and after `materialise`.

Each network (random weights, 1000 classes) gets norms with random biases and statistics, and half
of the rows of every convolution set to zero: chosen for each layer by itself, as pruning a layer's
filters does, or for each group of coupled channels. ConvNeXt and ViT also lose half of the hidden
units of their MLPs, since no channel of their streams can go. Reported for both ways of treating
zeros in a residual stream: parameters, MACs, the largest relative difference of the outputs at two
sizes of the input, and the time of a forward pass relative to the network with its zeros, one
thread, in turns (`cpu` is processor time, the steadier one on a busy machine). With `--only` the
others' figures stay as they are.

    python benchmarks/materialise.py [--repeats 5] [--only resnet18 ...]
"""

import argparse
import json
import time

from common import RESULTS, interleaved, write

NETWORKS = [
    "vgg11_bn",
    "densenet121",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "convnext_tiny",
    "vit_b_16",
    "efficientnet_b0",
]
# What EIDOSLAB/simplify gives on torchvision's networks with half of the rows of each layer at zero
# and biases in the norms: millions of parameters, and the relative change of the outputs.
PUBLISHED = {
    "vgg11_bn": {"parameters": 76.67e6, "difference": 1.5e-6},
    "densenet121": {"parameters": 2.81e6, "difference": 4.9e-7},
    "resnet18": {"parameters": 6.26e6, "difference": 0.26},
    "resnet50": {"difference": 0.46},
    "mobilenet_v2": {"parameters": 5.77e6, "difference": 9.5e-3},
    "convnext_tiny": {"fails": "TypeError"},
    "vit_b_16": {"fails": "TypeError"},
}


def build(name: str, zeros: str):
    """Return the network with its zeros, in eval mode."""
    import torch
    import torchvision
    from torch import nn

    from pruning101.core import structure

    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(0.3 + 0.6 * torch.rand(m.weight.shape, generator=g))
                m.bias.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                m.running_mean.copy_(0.3 * torch.randn(m.bias.shape, generator=g))
                m.running_var.copy_(0.5 + torch.rand(m.bias.shape, generator=g))
        if name.startswith("vit"):  # all zeros in torchvision
            model.heads.head.weight.normal_(0, 0.02, generator=g)
        layers = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, nn.Conv2d)
            or (isinstance(m, nn.Linear) and n.endswith((".block.3", ".mlp.0")))
        }
        halves = {}
        if zeros == "by group":
            for group in structure.channel_groups(model, torch.zeros(1, 3, 224, 224)):
                half = torch.randperm(group.channels, generator=g)[: group.channels // 2]
                for member in group.producers:
                    halves[member.layer] = member.index[torch.isin(member.channel, half)]
        for n, m in layers.items():
            count = len(m.weight)
            m.weight[halves.get(n, torch.randperm(count, generator=g)[: count // 2])] = 0
    return model


def measure(name: str, zeros: str, repeats: int) -> dict:
    import torch

    from pruning101.core.measure import footprint
    from pruning101.core.zeroed_channels import materialise

    model = build(name, zeros)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 224, 224, generator=g)
    sizes = [x] if name.startswith("vit") else [x, torch.randn(2, 3, 160, 96, generator=g)]
    with torch.no_grad():
        expected = [model(images) for images in sizes]
    before = footprint(model, x)
    candidates = {"zeros": model}
    row: dict = {"parameters": before.parameters, "macs": before.macs}
    for partial in ("keep", "scatter"):
        start = time.perf_counter()
        report = materialise(model, x, partial=partial)
        seconds = time.perf_counter() - start
        small = report.model
        with torch.no_grad():
            differences = [
                float((small(images) - y).abs().max() / y.abs().max())
                for images, y in zip(sizes, expected, strict=True)
            ]
        after = footprint(small, x)
        assert after.parameters <= before.parameters
        assert max(differences) < 1e-5, (name, partial, differences)
        row[partial] = {
            "parameters": after.parameters,
            "macs": after.macs,
            "difference": max(differences),
            "removed": sum(report.removed.values()),
            "seconds": seconds,
        }
        candidates[partial] = small

    def run(network):
        with torch.inference_mode():
            network(x)

    times = interleaved({k: lambda m=m: run(m) for k, m in candidates.items()}, repeats=repeats)
    row["ms"] = 1e3 * times["zeros"]["median"]
    for partial in ("keep", "scatter"):
        row[partial]["time"] = times[partial]["median"] / times["zeros"]["median"]
        row[partial]["cpu"] = times[partial]["cpu_median"] / times["zeros"]["cpu_median"]
    return row


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "materialise.json"
    networks = json.loads(kept.read_text())["networks"] if kept.exists() else {}
    for name in options.only:
        networks[name] = {
            zeros: measure(name, zeros, options.repeats) for zeros in ("by layer", "by group")
        }
    networks = {name: networks[name] for name in NETWORKS if name in networks}
    write(
        "materialise",
        {
            "zeros": "half of the rows of each convolution, and of hidden units of MLPs; seed 1",
            "input": "1 x 3 x 224 x 224; differences also at 2 x 3 x 160 x 96, but for ViT",
            "repeats": options.repeats,
            "networks": networks,
            "published": PUBLISHED,
        },
    )


if __name__ == "__main__":
    main()
