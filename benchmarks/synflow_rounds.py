"""SynFlow with 100 rounds on ResNet-18, against 100 times one forward and backward pass.

The pass is that of the same network on the same input, one example of ones, batch norms in
evaluation mode, gradients of all parameters: once in float64, as SynFlow computes, and once in
float32. 100 rounds and both passes take turns in one process. The goal is 1.2 or less for the
former. `resnet18` is the zoo's, for 32 x 32 pixels, where 11 million weights meet few pixels and
ranking them weighs most; `torchvision:resnet18` is the usual one at 224 x 224.

    python benchmarks/synflow_rounds.py [--repeats 3] [--nets resnet18:32] [--sparsity 0.9 0.99]
"""

import argparse
from collections.abc import Callable

import torch
from common import interleaved, write

from pruning101.core import models
from pruning101.pruning_at_initialisation import prune_at_initialisation

ROUNDS, PASSES, GOAL = 100, 10, 1.2


def passes(name: str, side: int, dtype: torch.dtype) -> Callable[[], None]:
    model = models.build(name, image_size=side).eval().to(dtype)
    ones = torch.ones(1, 3, side, side, dtype=dtype)

    def run() -> None:
        for _ in range(PASSES):
            model.zero_grad()
            model(ones).sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nets", nargs="+", default=["resnet18:32", "torchvision:resnet18:224"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9, 0.99])
    parser.add_argument("--out", default="synflow_rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for net in options.nets:
        name, side = net.rsplit(":", 1)
        model, example = (
            models.build(name, image_size=int(side)),
            torch.ones(1, 3, *[int(side)] * 2),
        )
        times = interleaved(
            {
                **{
                    f"100 rounds to {sparsity}": lambda m=model, x=example, s=sparsity: (
                        prune_at_initialisation(m, x, s, rounds=ROUNDS, progress=False)
                    )
                    for sparsity in options.sparsity
                },
                "10 passes, float64": passes(name, int(side), torch.float64),
                "10 passes, float32": passes(name, int(side), torch.float32),
            },
            repeats=options.repeats,
            warmup=0,
        )
        found[net] = {
            f"{kind}ratio to {precision} passes": {
                str(s): times[f"100 rounds to {s}"][f"{kind}median"]
                / (ROUNDS / PASSES * times[f"10 passes, {precision}"][f"{kind}median"])
                for s in options.sparsity
            }
            for kind in ("", "cpu_")
            for precision in ("float64", "float32")
        } | {"seconds": times}
    write(options.out, {"goal": GOAL, "nets": found})


if __name__ == "__main__":
    main()
