"""LOBSTER and SeReNe on MNIST against magnitude pruning, at equal training and equal bound.

    python benchmarks/sensitivity_mnist.py --tune --net lenet_300_100 --seeds 0 1 2

Every method begins at the same dense network and goes through the same rounds: so many epochs,
back to the best of them, then the largest threshold that keeps the loss on `valid` within the
tolerance. They differ in the penalty alone: none (magnitude pruning), plain decay of all weights,
LOBSTER, SeReNe. Plain decay is LOBSTER with every gradient taken as 0 (and biases decay too): it
tells what the gradients add. LOBSTER and SeReNe (lower bound) each have the strength, of three,
that removes most weights on seed 100, which is not among the seeds reported; plain decay has
LOBSTER's, SeReNe always that of its lower bound. For neurons, channels are also pruned by their
norms, as many as SeReNe (lower bound) removed. A run that was cut off goes on where it was.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, write
from torch import nn
from tqdm import tqdm

from pruning101 import sensitivity, structured
from pruning101.core import masks, models, structure
from pruning101.core.data import Dataset, load
from pruning101.core.files import written_whole
from pruning101.core.measure import footprint
from pruning101.core.steps import Step
from pruning101.core.training import evaluate, fit

LR = 0.1
COMMON: dict[str, Any] = {"momentum": 0.0, "batch_size": 100, "precision": "bfloat16"}
RECIPES: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "dense_epochs": 10,
        "rounds": 6,
        "epochs": 4,
        "sensitivities": ["full", "lower_bound", "local"],
    },
    "lenet5": {
        "dense_epochs": 6,
        "rounds": 4,
        "epochs": 2,
        "sensitivities": ["lower_bound", "local"],  # full costs three times the training itself
    },
}
for recipe in RECIPES.values():
    kinds = recipe.pop("sensitivities")
    recipe["methods"] = ["magnitude", "decay", "lobster", *(f"serene_{kind}" for kind in kinds)]
IMAGES = {"train": 54000, "valid": 6000}
TOLERANCE = 0.05
# Rounds are compared where the loss on valid is at most this much above the dense network's.
BOUND = 1.1
LOWER = "serene_lower_bound"
STRENGTHS = (3e-5, 1e-4, 3e-4)
TUNED = {"decay": "lobster", "serene_full": LOWER, "serene_local": LOWER}  # whose strength is taken
TUNING_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="try the strengths first, on seed 100")
    parser.add_argument("--root", help="folder of mnist.safetensors (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/sensitivity_mnist"))
    parser.add_argument("--out", type=Path, default=RESULTS / "sensitivity_mnist.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    data = load("mnist", options.root).subset(**IMAGES)
    jobs: list[tuple[str, int, str, float | None]] = []
    for net in options.net:
        if options.tune:
            tried = [m for m in ("lobster", LOWER) for _ in STRENGTHS]
            jobs += [(net, TUNING_SEED, m, s) for m, s in zip(tried, STRENGTHS * 2, strict=True)]
        for seed in options.seeds:
            jobs += [(net, seed, method, None) for method in RECIPES[net]["methods"]]
            jobs.append((net, seed, "channel_norms", None))
    for net, seed, method, strength in tqdm(jobs, unit="run", file=sys.stderr):
        if strength is None:
            strength = chosen_strength(options.folder, net, method)
        one_run(net, seed, method, strength, data, options.folder)
        write(options.out.resolve(), collect(options.folder))


def one_run(
    net: str, seed: int, method: str, strength: float, data: Dataset, folder: Path
) -> dict[str, Any]:
    """Dense network, then one method's rounds; read back if it was done before."""
    done = folder / f"{net}-{seed}-{method}-{strength:g}.json"
    if done.exists():
        return json.loads(done.read_text())
    recipe, start = RECIPES[net], time.perf_counter()
    dense = models.build(net, in_channels=1, image_size=28, seed=seed)
    dense.to(memory_format=torch.channels_last)
    fit(
        dense,
        data,
        epochs=recipe["dense_epochs"],
        lr=LR,
        seed=seed,
        checkpoint=folder / f"{net}-{seed}-dense.pt",
        **COMMON,
    )
    rounds, epochs = recipe["rounds"], recipe["epochs"]
    if method == "channel_norms":
        steps = structured.prune_iteratively(
            dense,
            data,
            sparsity=share_of_neurons(folder, net, seed),
            scope="global",
            rounds=rounds,
            epochs=epochs,
            lr=LR,
            retrain=COMMON,
            seed=seed,
        )
    else:
        name, _, kind = method.partition("_")
        decay = strength / LR if method == "decay" else 0.0
        steps = sensitivity.regularise_and_prune(
            dense,
            data,
            method=name if name in ("lobster", "serene") else None,
            strength=strength,
            sensitivity=kind or "full",
            tolerance=TOLERANCE,
            rounds=rounds,
            patience=epochs,
            epochs=epochs,
            lr=LR,
            train={**COMMON, "weight_decay": decay},
            seed=seed,
        )
    result = {
        "net": net,
        "seed": seed,
        "method": method,
        "strength": strength,
        "dense": {
            "valid_loss": evaluate(dense, data, "valid").loss,
            "test_error": 100 * (1 - evaluate(dense, data, "test").accuracy),
            "neurons": hidden(sizes(dense)),
            "coded_bytes": footprint(dense, data.valid.images[:1].float()).coded_bytes,
            "insensitivity": insensitivity(dense, data),
        },
        "rounds": [described(step, dense) for step in steps],
        "seconds": time.perf_counter() - start,
    }
    with written_whole(done) as part:
        part.write_text(json.dumps(result))
    return result


def insensitivity(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Mean of relu(1 - sensitivity): over the weights for LOBSTER, the hidden neurons for SeReNe.

    On the first batch of training; 1 everywhere would be plain decay.
    """
    images, labels = next(iter(data.batches("train", COMMON["batch_size"])))
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    layers = structure.prunable(model).values()
    slopes = torch.cat([layer.weight.grad.abs().flatten() for layer in layers])
    model.zero_grad()
    found = {"lobster": (1 - slopes).relu().mean().item()}
    for kind in ("full", "lower_bound", "local"):
        felt = sensitivity.neuron_sensitivity(model, [(images, labels)], kind=kind)
        inner = torch.cat(list(felt.values())[:-1])
        found[f"serene_{kind}"] = (1 - inner).relu().mean().item()
    return found


def sizes(model: nn.Module) -> dict[str, int]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {name: len(module.weight) for name, module in layers}


def hidden(count: dict[str, int]) -> int:
    return sum(list(count.values())[:-1])  # the output layer's neurons are the classes


def described(step: Step, dense: nn.Module) -> dict[str, Any]:
    before, now = sizes(dense), sizes(step.model)
    empty = sensitivity.removed_neurons(step.model)
    gone = {layer: before[layer] - now[layer] + empty[layer] for layer in before}
    weights = sum(m.weight.numel() for m in dense.modules() if hasattr(m, "weight"))
    masks.refresh(step.model)
    left = [m.weight for m in step.model.modules() if hasattr(m, "weight")]
    return {
        "valid_loss": step.loss,
        "valid_error": 100 * (1 - step.accuracy),
        "test_error": 100 * (1 - step.test_accuracy),
        "weights_removed": 1 - sum(int(w.count_nonzero()) for w in left) / weights,
        "neurons_removed": gone,
        "hidden_neurons_removed": hidden(gone) / hidden(before),
        "coded_bytes": step.footprint.coded_bytes,
        "seconds": step.seconds,
    }


def within(run: dict[str, Any]) -> dict[str, Any] | None:
    """The sparsest round of a run whose loss on valid is within the bound."""
    limit = BOUND * run["dense"]["valid_loss"]
    rounds = [r for r in run["rounds"] if r["valid_loss"] <= limit]
    return max(rounds, key=lambda r: r["weights_removed"], default=None)


def chosen_strength(folder: Path, net: str, method: str) -> float:
    """The strength that removed most weights within the bound on the tuning seed."""
    if method in ("magnitude", "channel_norms"):
        return 0.0
    runs = read(folder, f"{net}-{TUNING_SEED}-{TUNED.get(method, method)}-*.json")
    if not runs:
        raise SystemExit(f"no strength was tried for {method} on {net}: run with --tune first")

    def removed(run: dict[str, Any]) -> float:
        best = within(run)
        return best["weights_removed"] if best else 0.0

    return max(runs, key=removed)["strength"]


def share_of_neurons(folder: Path, net: str, seed: int) -> float:
    """The share of hidden neurons that SeReNe had removed in its last round."""
    (run,) = read(folder, f"{net}-{seed}-{LOWER}-*.json")
    return run["rounds"][-1]["hidden_neurons_removed"]


def read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def spread(values: list[float]) -> dict[str, Any]:
    n = len(values)
    return {"mean": mean(values) if n else None, "std": stdev(values) if n > 1 else None, "n": n}


def collect(folder: Path) -> dict[str, Any]:
    """All runs that are done, by network and method: means over seeds, and every round."""
    keys = ("weights_removed", "hidden_neurons_removed", "test_error", "coded_bytes")
    nets: dict[str, Any] = {}
    for net, recipe in RECIPES.items():
        runs = read(folder, f"{net}-*.json")
        if not runs:
            continue
        reported = [run for run in runs if run["seed"] != TUNING_SEED]
        dense = [run for run in reported if run["method"] == "magnitude"]
        summary = {}
        for method in [*recipe["methods"], "channel_norms"]:
            mine = [run for run in reported if run["method"] == method]
            if not mine:
                continue
            inside = [best for run in mine if (best := within(run))]
            last = [run["rounds"][-1] for run in mine]
            summary[method] = {
                "strength": mine[0]["strength"],
                "seconds": spread([run["seconds"] for run in mine]),
                "last_round": {k: spread([r[k] for r in last]) for k in (*keys, "valid_loss")},
                "within_bound": {k: spread([r[k] for r in inside]) for k in keys},
            }
        nets[net] = {
            "recipe": recipe,
            "dense_test_error": spread([r["dense"]["test_error"] for r in dense]),
            "summary": summary,
            "runs": reported,
            "tuning": [run for run in runs if run["seed"] == TUNING_SEED],
        }
    settings = {
        "lr": LR,
        **COMMON,
        "tolerance": TOLERANCE,
        "bound": BOUND,
        "images": IMAGES,
        "strengths": STRENGTHS,
    }
    return {"dataset": "mnist", "settings": settings, "nets": nets}


if __name__ == "__main__":
    main()
