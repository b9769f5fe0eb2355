"""Han et al. 2015 on MNIST: LeNet-300-100 and LeNet-5 at 12x fewer weights, beside dense ones.

    python benchmarks/han2015_mnist.py --net lenet_300_100 --seeds 0 1 2 3 4
    python benchmarks/han2015_mnist.py --net lenet5 --seeds 0 1 2 3

Each seed trains a dense reference, prunes it in rounds with retraining, and trains the dense
reference on for just as many epochs (the control: did pruning help, or only training longer?).
Rate, schedule and L2 strength are the same for all three, the strength that of Caffe's LeNet
solver. Rounds, densities and the batch size of retraining were chosen on `valid` of seed 100, which
is not among the seeds reported. For LeNet-5 this took three tries (`also_tried`), and the test
errors of seeds 0 and 1 under the first two were known when the recipe was changed: seeds 2 and 3
are free of that. A run that was cut off goes on where it was.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch import nn
from tqdm import tqdm

from pruning101 import magnitude
from pruning101.core import masks, models, structure
from pruning101.core.data import Dataset, load
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.core.training import evaluate, fit

# Densities of LeNet-300-100 are the paper's (its Table 3). LeNet-5 keeps more of its convolutions
# and less of fc1, its widest layer, than in Table 4. All biases stay, and count.
RECIPES: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "strength": 5e-4,
        "lr": 0.1,
        "precision": "float32",
        "dense": {"epochs": 20, "batch_size": 128},
        "rounds": 5,
        "retrain": {"epochs": 12, "batch_size": 64},
        "density": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    },
    "lenet5": {
        "strength": 5e-4,
        "lr": 0.05,
        "precision": "bfloat16",
        "dense": {"epochs": 10, "batch_size": 128},
        "rounds": 2,
        "retrain": {"epochs": 8, "batch_size": 64},
        "density": {"conv1": 0.8, "conv2": 0.2, "fc1": 0.07, "fc2": 0.25},
    },
}
# What was tried before and given up: errors in %, by seed.
ALSO_TRIED = {
    "lenet5": [
        {
            "rounds": 4,
            "retrain": {"epochs": 4, "batch_size": 128},
            "density": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.077, "fc2": 0.19},
            "pruned_valid_error": {"0": 1.00},
            "pruned_test_error": {"0": 0.70},
            "dense_test_error": {"0": 0.66},
        },
        {
            "rounds": 2,
            "retrain": {"epochs": 8, "batch_size": 128},
            "density": {"conv1": 0.8, "conv2": 0.2, "fc1": 0.07, "fc2": 0.25},
            "pruned_valid_error": {"0": 0.87, "1": 0.93},
            "pruned_test_error": {"0": 0.70, "1": 0.68},
            "dense_test_error": {"0": 0.66, "1": 0.65},
        },
    ]
}
PAPER = {
    "lenet_300_100": {
        "dense_error": 1.64,
        "pruned_error": 1.59,
        "compression": 12,
        "density": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    },
    "lenet5": {
        "dense_error": 0.80,
        "pruned_error": 0.77,
        "compression": 12,
        "density": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder of mnist.safetensors (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/han2015_mnist"))
    parser.add_argument("--out", type=Path, default=RESULTS / "han2015_mnist.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    data = load("mnist", options.root)
    for net in options.net:
        for seed in options.seeds:
            done = options.folder / f"{net}-{seed}.json"
            if not done.exists():
                text = json.dumps(one_seed(net, seed, data, options.folder))
                done.write_text(text)
            write(options.out.resolve(), collect(options.folder))


def one_seed(net: str, seed: int, data: Dataset, folder: Path) -> dict[str, Any]:
    """Dense reference, pruning in rounds, dense control; everything resumable from ``folder``."""
    recipe, start = RECIPES[net], time.perf_counter()
    retrain, rounds = recipe["retrain"], recipe["rounds"]
    common = {"schedule": "cosine", "precision": recipe["precision"]}
    penalty = magnitude.weight_penalty("l2", recipe["strength"])
    epochs = recipe["dense"]["epochs"] + 2 * rounds * retrain["epochs"]
    bar = tqdm(total=epochs, desc=f"{net}, seed {seed}", unit="epoch", file=sys.stderr)

    def train(model: nn.Module, run_seed: int, name: str, settings: dict[str, Any]) -> None:
        fit(
            model,
            data,
            lr=recipe["lr"],
            penalty=penalty,
            seed=run_seed,
            checkpoint=folder / f"{net}-{seed}-{name}.pt",
            **settings,
            **common,
        )
        bar.update(settings["epochs"])

    dense = models.build(net, in_channels=1, image_size=28, seed=seed)
    # the layout of the weights in memory, no other numbers: convolutions run faster so
    dense.to(memory_format=torch.channels_last)
    train(dense, seed, "dense", recipe["dense"])
    example = data.valid.images[:1].float()

    sparsity = {layer: 1 - density for layer, density in recipe["density"].items()}
    history = History.resume(folder / f"{net}-{seed}-pruned")
    bar.update(len(history) * retrain["epochs"])
    for step in magnitude.prune_iteratively(
        dense,
        data,
        sparsity=sparsity,
        rounds=rounds,
        epochs=retrain["epochs"],
        lr=recipe["lr"],
        penalty="l2",
        strength=recipe["strength"],
        retrain={"batch_size": retrain["batch_size"], **common},
        seed=seed,
        history=history,
    ):
        bar.update(retrain["epochs"])
        bar.set_postfix(valid=f"{step.accuracy:.2%}")
    pruned = history.last.model

    control = masks.clone(dense)
    for index in range(1, rounds + 1):  # the same rates, batches and epochs, nothing removed
        train(control, 1000 * seed + index, f"control-{index}", retrain)
    bar.close()

    compact = magnitude.remove_dead_units(pruned, example, inplace=False)
    counts = footprint(pruned, example)
    small = footprint(compact.model, example)
    return {
        "net": net,
        "seed": seed,
        "dense": errors(dense, data),
        "pruned": errors(pruned, data),
        "control": errors(control, data),
        "rounds": [
            {
                "valid_error": 100 * (1 - step.accuracy),
                "test_error": 100 * (1 - step.test_accuracy),
                "nonzero": step.footprint.nonzero,
            }
            for step in history
        ],
        "parameters": counts.parameters,
        "nonzero": counts.nonzero,
        "compression": counts.parameters / counts.nonzero,
        "density": {
            layer: module.weight.count_nonzero().item() / module.weight.numel()
            for layer, module in structure.prunable(pruned).items()
        },
        "bytes": {"dense": counts.dense_bytes, "coded": counts.coded_bytes},
        "without_dead_units": {
            "removed": compact.removed,
            "kept": compact.kept,
            "parameters": small.parameters,
            "macs": small.macs,
            "macs_before": counts.macs,
            "test_error": errors(compact.model, data)["test_error"],
        },
        "seconds": time.perf_counter() - start,
    }


def errors(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Errors in percent."""
    return {
        f"{split}_error": 100 * (1 - evaluate(model, data, split).accuracy)
        for split in ("valid", "test")
    }


def collect(folder: Path) -> dict[str, Any]:
    """All seeds that are done, by network, beside the paper's figures."""
    nets: dict[str, Any] = {}
    for net, recipe in RECIPES.items():
        seeds = [json.loads(path.read_text()) for path in folder.glob(f"{net}-*.json")]
        seeds.sort(key=lambda s: s["seed"])
        if not seeds:
            continue
        numbers = " ".join(str(s["seed"]) for s in seeds)
        nets[net] = {
            "command": f"python benchmarks/han2015_mnist.py --net {net} --seeds {numbers}",
            "recipe": recipe,
            "also_tried": ALSO_TRIED.get(net, []),
            "paper": PAPER[net],
            "no_worse_than_dense": sum(
                s["pruned"]["test_error"] <= s["dense"]["test_error"] for s in seeds
            ),
            "mean_test_error": {
                kind: sum(s[kind]["test_error"] for s in seeds) / len(seeds)
                for kind in ("dense", "pruned", "control")
            },
            "seeds": seeds,
        }
    return {"dataset": "mnist", "nets": nets}


if __name__ == "__main__":
    main()
