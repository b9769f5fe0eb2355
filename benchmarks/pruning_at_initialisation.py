"""The race to prune at initialisation: who keeps most accuracy, who loses whole layers, and why.

    PRUNING101_DATA=FOLDER python benchmarks/pruning_at_initialisation.py

Three parts, each cut off and gone on with at will:

- `train`: LeNet-300-100 on MNIST and ResNet-20 on digits of 16 x 16. Every method prunes the same
  untrained networks, which are then trained alike. Random masks are the baseline; the lottery
  ticket (global, 40 % a round) is the late comer's reference, which has seen as many trainings as
  rounds. `+ shuffled` is the control of Frankle et al. 2021: the same number of weights in each
  layer, at random places there.
- `collapse`: VGG-11-BN, masks only: how dense a network each method needs to leave no layer empty.

Rate, batch size and epochs were chosen on `valid` of seed 100, which is not reported.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch import Tensor, nn

from pruning101 import lottery_tickets
from pruning101.core import masks, models, runs
from pruning101.core.data import Dataset, load
from pruning101.core.training import evaluate, fit
from pruning101.pruning_at_initialisation import collapsed_layers, prune_at_initialisation

RATE = 0.4  # of the lottery ticket's rounds; the densities are where its rounds arrive
TASKS: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "data": {"name": "mnist"},
        "image_size": 28,
        "epochs": 3,
        "lr": 0.1,
        "batch_size": 128,
        "rounds": [3, 6, 9, 11],
        "ticket": True,
    },
    "resnet20": {
        "data": {"name": "digits", "image_size": 16},
        "image_size": 16,
        "epochs": 5,
        "lr": 0.1,
        "batch_size": 64,
        "rounds": [4, 8, 11],
        "ticket": False,
    },
}
METHODS = ("random", "magnitude", "snip", "grasp", "synflow")
SHUFFLED = ("magnitude", "snip", "grasp", "synflow", "ticket")
SCORED = 10  # batches of 128 that SNIP and GraSP look at
COLLAPSE: dict[str, dict[str, Any]] = {
    "random": {"score": "random"},
    "magnitude": {"score": "magnitude"},
    "snip": {"score": "snip"},
    "grasp": {"score": "grasp"},
    "synflow, 1 round": {"score": "synflow", "rounds": 1},
    "synflow, 100 rounds": {"score": "synflow"},
}
COLLAPSE_DENSITIES = [0.1, 0.01, 0.001, 0.0001]


class Rows:
    """Results of one network and seed, kept in a file after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, method: str, density: float, row: dict[str, Any]) -> None:
        self.rows[f"{method} {density:.6f}"] = {"method": method, "density": density, **row}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.rows))
        part.replace(self.path)
        print(self.path.stem, method, f"{density:.6f}", row.get("valid_error"), flush=True)

    def have(self, method: str, density: float) -> bool:
        return f"{method} {density:.6f}" in self.rows


def race(net: str, seed: int, folder: Path) -> None:
    """Train everything that has a mask, for one network and seed."""
    task, rows = TASKS[net], Rows(folder / f"train-{net}-{seed}.json")
    data = load(**task["data"])
    start = models.build(net, in_channels=1, image_size=task["image_size"], seed=seed)
    batches = list(itertools.islice(data.batches("train", 128, shuffle=True, seed=seed), SCORED))
    if not rows.have("dense", 1.0):
        rows.add("dense", 1.0, trained(start, {}, data, task, seed))
    tickets: dict[int, dict[str, Tensor]] = {}
    for index in task["rounds"]:
        density = (1 - RATE) ** index
        for method in (*METHODS, *(["ticket"] if task["ticket"] else [])):
            shuffle = method in SHUFFLED
            names = [method, *([f"{method} + shuffled"] if shuffle else [])]
            if all(rows.have(name, density) for name in names):
                continue
            began = time.perf_counter()
            if method == "ticket":
                tickets = tickets or find_tickets(start, data, task, seed)
                found = tickets[index]
            else:
                found = prune_at_initialisation(
                    start, batches, 1 - density, score=method, seed=seed, progress=False
                )
            scoring = {"scoring_seconds": time.perf_counter() - began}
            if not rows.have(names[0], density):
                rows.add(names[0], density, trained(start, found, data, task, seed) | scoring)
            if shuffle and not rows.have(names[1], density):
                elsewhere = shuffled(found, seed)
                rows.add(names[1], density, trained(start, elsewhere, data, task, seed))


def trained(
    start: nn.Module, found: dict[str, Tensor], data: Dataset, task: dict[str, Any], seed: int
) -> dict[str, Any]:
    model = masks.clone(start)
    masks.apply(model, found)
    settings = {name: task[name] for name in ("epochs", "lr", "batch_size")}
    fit(
        model,
        data,
        **settings,
        schedule="cosine",
        seed=seed,
        device="cpu",
        progress=False,
    )
    return {
        "valid_error": 100 * (1 - evaluate(model, data, "valid").accuracy),
        "test_error": 100 * (1 - evaluate(model, data, "test").accuracy),
        **described(found),
    }


def described(found: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "kept": sum(int(mask.sum()) for mask in found.values()),
        "weights": sum(mask.numel() for mask in found.values()),
        "collapsed": collapsed_layers(found),
        "layer_density": {name: int(m.sum()) / m.numel() for name, m in found.items()},
    }


def shuffled(found: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As many in each layer, elsewhere."""
    generator = torch.Generator().manual_seed(runs.derive(seed, 1))
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in found.items()
    }


def find_tickets(
    start: nn.Module, data: Dataset, task: dict[str, Any], seed: int
) -> dict[int, dict[str, Tensor]]:
    iterations = task["epochs"] * (len(data.train) // task["batch_size"])
    search = lottery_tickets.find_ticket(
        start,
        data,
        rounds=max(task["rounds"]),
        rate=RATE,
        scope="global",
        iterations=iterations,
        optimizer="sgd",
        lr=task["lr"],
        batch_size=task["batch_size"],
        evaluate_every=iterations,
        options={"schedule": "cosine"},
        seed=seed,
        progress=False,
    )
    return {step.index: masks.masks_of(step.ticket) for step in search}


def collapse(seed: int, folder: Path) -> None:
    """Masks of VGG-11-BN on digits of 32 x 32, untrained."""
    rows = Rows(folder / f"collapse-{seed}.json")
    model = models.build("vgg11_bn", in_channels=1, image_size=32, seed=seed)
    batches = list(load("digits", image_size=32).batches("train", 128, shuffle=True, seed=seed))[:1]
    for method, settings in COLLAPSE.items():
        for density in COLLAPSE_DENSITIES:
            if rows.have(method, density):
                continue
            found = prune_at_initialisation(
                model, batches, 1 - density, seed=seed, progress=False, **settings
            )
            rows.add(method, density, described(found))


def collect(folder: Path) -> dict[str, Any]:
    """All that is done, with means and standard deviations over seeds."""
    result: dict[str, Any] = {"train": {}, "collapse": {}}
    for net, task in TASKS.items():
        found, layers = defaultdict(list), {}
        files = sorted(folder.glob(f"train-{net}-[0-9].json"))
        for path in files:
            for row in json.loads(path.read_text()).values():
                key = row["method"], row["density"]
                found[key].append(row)
                layers[key] = row["layer_density"]
        result["train"][net] = {
            "task": task | {"rate": RATE, "scored_images": 128 * SCORED},
            "seeds": [int(path.stem.rsplit("-", 1)[1]) for path in files],
            "rows": [
                {
                    "method": method,
                    "density": density,
                    **{
                        f"{split}_error": spread([row[f"{split}_error"] for row in rows])
                        for split in ("valid", "test")
                    },
                    "collapsed": [row["collapsed"] for row in rows],
                    "layer_density_of_last_seed": layers[method, density],
                    "scoring_seconds": [
                        round(row["scoring_seconds"], 2) for row in rows if "scoring_seconds" in row
                    ],
                }
                for (method, density), rows in found.items()
            ],
        }
    empty = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("collapse-[0-9].json")):
        for row in json.loads(path.read_text()).values():
            empty[row["method"]][str(row["density"])].append(len(row["collapsed"]))
    result["collapse"] = {
        "net": "vgg11_bn, 32 x 32, 9 layers with weights",
        "empty_layers_by_density_and_seed": empty,
    }
    return result


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["train", "collapse"])
    parser.add_argument("--nets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/pruning_at_initialisation"))
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning_at_initialisation.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in options.seeds:
        if "train" in options.parts:
            for net in options.nets:
                race(net, seed, options.folder)
        if "collapse" in options.parts:
            collapse(seed, options.folder)
        write(options.out.resolve(), collect(options.folder))


if __name__ == "__main__":
    main()
