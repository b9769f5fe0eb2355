"""Half the channels of ResNet-50, against Torch-Pruning's own pruner.

Both find the groups of coupled channels in torchvision's ResNet-50, score them by the L1 norm of
convolutions and linear layers and take the lower half of each group out, on a 224 x 224 image, in
turns, one thread. Before anything is timed the results are compared: the same channels have to stay
in both. Prints and keeps the ratio ours / Torch-Pruning; the goal is 1.2 or less.

    python benchmarks/prune_resnet50.py [--repeats 7]
"""

import argparse
import copy

import torch
import torch_pruning
import torchvision
from common import interleaved, write
from torch import nn

from pruning101 import structured

GOAL = 1.2


def ours(model: nn.Module, image: torch.Tensor) -> nn.Module:
    return structured.prune_channels(model, image, 0.5).model


def theirs(model: nn.Module, image: torch.Tensor) -> nn.Module:
    importance = torch_pruning.importance.GroupMagnitudeImportance(
        p=1, target_types=[nn.modules.conv._ConvNd, nn.Linear]
    )
    pruner = torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=importance,
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        # its defaults are shared by all pruners of a process
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0] | states[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    image = torch.randn(1, 3, 224, 224)
    pruned = {run.__name__: run(copy.deepcopy(model), image) for run in (ours, theirs)}
    if not same(pruned["ours"], pruned["theirs"]):
        raise SystemExit("The two did not keep the same channels: nothing to compare.")

    # Copies are made beforehand, so that only the pruning is timed.
    copies = {
        run.__name__: [copy.deepcopy(model) for _ in range(options.repeats + 1)]
        for run in (ours, theirs)
    }
    times = interleaved(
        {
            "ours": lambda: ours(copies["ours"].pop(), image),
            "torch_pruning": lambda: theirs(copies["theirs"].pop(), image),
        },
        repeats=options.repeats,
    )
    ratios = [
        a / b for a, b in zip(times["ours"]["times"], times["torch_pruning"]["times"], strict=True)
    ]
    write(
        "prune_resnet50",
        {
            "model": "torchvision resnet50, random weights, one 224 x 224 image",
            "torch_pruning": torch_pruning.__version__,
            "parameters": [sum(p.numel() for p in m.parameters()) for m in (model, pruned["ours"])],
            "same_channels": True,
            "seconds": times,
            "ratio": times["ours"]["median"] / times["torch_pruning"]["median"],
            "ratio_cpu": times["ours"]["cpu_median"] / times["torch_pruning"]["cpu_median"],
            "ratios": sorted(ratios),
            "goal": GOAL,
        },
    )


if __name__ == "__main__":
    main()
