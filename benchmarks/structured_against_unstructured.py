"""The seminar's table, remade: zeros against fewer channels at equal accuracy, and what each buys.

    python benchmarks/structured_against_unstructured.py --seeds 0 1 2

LeNet-5 on 12,800 images of MNIST. Every method begins with the same trained network and gets the
same number of rounds and epochs; the dense reference trains on for just as many (was it pruning, or
only training longer?). A method's row is its sparsest network whose accuracy on `valid` is within
`tolerance` of the dense reference's; `test` is only reported. Nothing was tuned: final sparsities
were set beforehand, as was the regularisers' strength (ten times the papers' 1e-4, the training
being far shorter). Latencies of a seed's networks are measured in turns, in one run. Whatever is
done is kept in `--folder`, and a run that was cut off goes on where it was.

Structure of `results/structured_against_unstructured.json`::

    dataset, network, recipe, tolerance, source_of_slides, machine (in words: how busy it was)
    slides                        the three networks of the slide: {name: {dataset, dense,
                                  unstructured, structured}} with ratio, simplified_mb, coded_mb, ms
    methods                       {method: {kind, source}}: dense, magnitude, lobster, channels,
                                  serene; `kind` is dense | unstructured | structured
    summary[]                     one dict a method that all seeds have; F = {mean, least, greatest}
      .method .kind .seeds
      .zero_share F .removed_share F .channels_removed_share F
      .valid_accuracy F .test_accuracy F .parameters F .nonzero F .macs F
      .simplified_bytes F .coded_bytes F .sparse_layout_bytes F or None
      .latency                    {"threads1_batch1": {median_ms F, cpu_ms F, speedup F}, ...}
      .latency_sparse_layout      the same, or None
    seeds[]                       .seed, .rows[] (one dict a method, keys as the rows of
                                  sparse_latency.json, and valid_accuracy, test_accuracy,
                                  zero_share_before_simplification, units (of each hidden layer),
                                  step: which round was chosen (0: the dense network), seconds,
                                  rounds[]: every round's zero_share, removed_share, valid_accuracy,
                                  test_accuracy), .load_average, .cores
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, spread, write
from sparse_latency import SLIDES, SOURCE, costs, count, latencies, machine
from torch import nn
from tqdm import tqdm

from pruning101 import magnitude, sensitivity, structured
from pruning101.core import masks, models, structure
from pruning101.core.data import Dataset, load
from pruning101.core.steps import History, Step
from pruning101.core.training import evaluate, fit

# Of 54,000 images to train on, for time's sake; in batches of 64 an epoch has 200 steps.
IMAGES = {"train": 12_800, "valid": 6_000, "test": 10_000}
ROUNDS, EPOCHS, LR = 8, 2, 0.05
TOLERANCE = 0.002
DENSE = {"epochs": 6, "lr": LR}
TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "schedule": "cosine",
    "precision": "float32",
    "progress": False,
}
FINAL = {"magnitude": 0.99, "channels": 0.9}  # sparsity after the last round
STRENGTH = {"lobster": 1e-3, "serene": 1e-3}
LOSS_TOLERANCE = 0.05  # of one threshold search of LOBSTER and SeReNe, as in their papers
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "source": "trained on for as many epochs as the others"},
    "magnitude": {
        "kind": "unstructured",
        "source": "Han et al. 2015; `magnitude.prune_iteratively`, all layers competing",
    },
    "lobster": {
        "kind": "unstructured",
        "source": "Tartaglione et al. 2020; `sensitivity.regularise_and_prune`",
    },
    "channels": {
        "kind": "structured",
        "source": "L1 norms over groups of channels; `structured.prune_iteratively`, by group",
    },
    "serene": {
        "kind": "structured",
        "source": "Tartaglione et al. 2021, lower-bound sensitivity; "
        "`sensitivity.regularise_and_prune`",
    },
}


def magnitude_steps(dense: nn.Module, data: Dataset, seed: int, history: History) -> Iterator[Step]:
    return magnitude.prune_iteratively(
        dense,
        data,
        sparsity=FINAL["magnitude"],
        rounds=ROUNDS,
        scope="global",
        epochs=EPOCHS,
        lr=LR,
        penalty=None,
        retrain=TRAINING,
        seed=seed,
        history=history,
    )


def channel_steps(dense: nn.Module, data: Dataset, seed: int, history: History) -> Iterator[Step]:
    return structured.prune_iteratively(
        dense,
        data,
        sparsity=FINAL["channels"],
        rounds=ROUNDS,
        epochs=EPOCHS,
        lr=LR,
        retrain=TRAINING,
        seed=seed,
        history=history,
    )


def regularised_steps(
    method: str, dense: nn.Module, data: Dataset, seed: int, history: History
) -> Iterator[Step]:
    return sensitivity.regularise_and_prune(
        dense,
        data,
        method=method,  # type: ignore[arg-type]
        strength=STRENGTH[method],
        sensitivity="lower_bound",
        tolerance=LOSS_TOLERANCE,
        rounds=ROUNDS,
        patience=EPOCHS,
        epochs=EPOCHS,
        lr=LR,
        train=TRAINING,
        seed=seed,
        history=history,
    )


STEPS: dict[str, Callable[[nn.Module, Dataset, int, History], Iterator[Step]]] = {
    "magnitude": magnitude_steps,
    "lobster": partial(regularised_steps, "lobster"),
    "channels": channel_steps,
    "serene": partial(regularised_steps, "serene"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--threads", type=int, choices=(1, 2), nargs="*", default=[1, 2])
    parser.add_argument("--again", action="store_true", help="time anew what is done")
    parser.add_argument("--root", help="folder of mnist.safetensors (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/structured_against_unstructured"))
    parser.add_argument("--out", type=Path, default=RESULTS / "structured_against_unstructured")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    data = load("mnist", options.root).subset(**IMAGES)
    for seed in options.seeds:
        for method in options.methods:
            train(method, seed, data, options.folder)
        if not (options.folder / f"{seed}-dense-rounds.json").exists():
            continue  # nothing to compare with yet
        choose(seed, data, options.folder)
        for threads in options.threads:
            time_chosen(seed, threads, options.folder, again=options.again)
        write(options.out.resolve(), collect(options.folder))


# --- training ----------------------------------------------------------------------------------


def train(method: str, seed: int, data: Dataset, folder: Path) -> None:
    """Run all rounds of one method, or whatever of them is not done yet."""
    done = folder / f"{seed}-{method}-rounds.json"
    if done.exists():
        return
    base = trained(seed, data, folder)
    start = time.perf_counter()
    bar = tqdm(total=ROUNDS, desc=f"seed {seed}, {method}", file=sys.stderr)
    rounds = []
    if method == "dense":
        model = masks.clone(base)
        for index in range(1, ROUNDS + 1):
            fit(model, data, epochs=EPOCHS, lr=LR, seed=1000 * seed + index, **TRAINING)
            bar.update()
        torch.save(model, folder / f"{seed}-dense.pt")
        scores = (evaluate(model, data, split).accuracy for split in ("valid", "test"))
        rounds.append(one_round(model, base, *scores))
    else:
        history = History.resume(folder / f"{seed}-{method}")
        bar.update(len(history))
        for step in STEPS[method](base, data, seed, history):
            bar.update()
            bar.set_postfix(valid=f"{step.accuracy:.2%}")
        rounds = [one_round(s.model, base, s.accuracy, s.test_accuracy) for s in history]
    bar.close()
    seconds = time.perf_counter() - start
    done.write_text(json.dumps({"rounds": rounds, "seconds": seconds}))


def trained(seed: int, data: Dataset, folder: Path) -> nn.Module:
    """The network that every method begins with."""
    model = models.build("lenet5", in_channels=1, image_size=28, seed=seed)
    # the layout of the weights in memory, no other numbers: convolutions run faster so
    model.to(memory_format=torch.channels_last)
    fit(model, data, seed=seed, checkpoint=folder / f"{seed}-base.pt", **DENSE, **TRAINING)
    return model


def one_round(model: nn.Module, base: nn.Module, valid: float, test: float) -> dict[str, float]:
    plain = masks.clone(model)
    masks.make_permanent(plain)
    nonzero = sum(int(p.count_nonzero()) for p in plain.parameters())
    return {
        "zero_share": masks.sparsity(plain),
        "removed_share": 1 - nonzero / count(base),
        "valid_accuracy": valid,
        "test_accuracy": test,
    }


# --- what the chosen networks cost -------------------------------------------------------------


def choose(seed: int, data: Dataset, folder: Path) -> None:
    """Choose one network a method, simplify it and count what is left."""
    runs = {
        method: json.loads(path.read_text())
        for method in METHODS
        if (path := folder / f"{seed}-{method}-rounds.json").exists()
    }
    dense = torch.load(folder / f"{seed}-dense.pt", weights_only=False)
    bound = runs["dense"]["rounds"][0]["valid_accuracy"] - TOLERANCE
    example = data.valid.images[:1].float()
    rows, networks = [], {}
    for method, run in runs.items():
        index, model = 0, dense
        within = [i for i, r in enumerate(run["rounds"]) if r["valid_accuracy"] >= bound]
        if method != "dense" and within:
            index = max(within, key=lambda i: run["rounds"][i]["removed_share"]) + 1
            model = History.resume(folder / f"{seed}-{method}")[index - 1].model
        before = masks.sparsity(model)
        simple = magnitude.remove_dead_units(model, example, inplace=False).model
        networks[method] = simple.to(memory_format=torch.contiguous_format)
        rows.append(
            {
                "method": method,
                "kind": METHODS[method]["kind"],
                "step": index,
                "valid_accuracy": evaluate(simple, data, "valid").accuracy,
                "test_accuracy": evaluate(simple, data, "test").accuracy,
                "zero_share_before_simplification": before,
                "units": {n: m.weight.shape[0] for n, m in structure.prunable(simple).items()},
                **costs(simple, dense, example),
                "rounds": run["rounds"],
                "seconds": run["seconds"],
            }
        )
    torch.save(networks, folder / f"{seed}-chosen.pt")
    found = {"seed": seed, "rows": rows, "cores": os.cpu_count()}
    (folder / f"{seed}-chosen.json").write_text(json.dumps(found))


def time_chosen(seed: int, threads: int, folder: Path, *, again: bool) -> None:
    """Time one seed's networks in turns."""
    done = folder / f"{seed}-threads{threads}.json"
    networks = torch.load(folder / f"{seed}-chosen.pt", weights_only=False)
    if done.exists() and not again and set(json.loads(done.read_text())["timed"]) == set(networks):
        return
    load_before = os.getloadavg()[0]
    timed = latencies(networks, (1, 28, 28), threads)
    load_average = [load_before, os.getloadavg()[0]]
    done.write_text(json.dumps({"timed": timed, "load_average": load_average}))


def one_seed(path: Path) -> dict[str, Any]:
    """What is known of the seed whose chosen networks are described in the file ``path``."""
    found = json.loads(path.read_text())
    found["load_average"] = {}
    for row in found["rows"]:
        row.update(latency={}, latency_sparse_layout=None)
    for threads in (1, 2):
        measured = path.with_name(f"{found['seed']}-threads{threads}.json")
        if not measured.exists():
            continue
        times = json.loads(measured.read_text())
        found["load_average"][f"threads{threads}"] = times["load_average"]
        for row in found["rows"]:
            for kind, one in times["timed"].get(row["method"], {}).items():
                if one is not None:
                    row[kind] = (row[kind] or {}) | one
    return found


def collect(folder: Path) -> dict[str, Any]:
    """All seeds that are measured, and their summary."""
    seeds = [one_seed(path) for path in folder.glob("*-chosen.json")]
    seeds = sorted((s for s in seeds if s["seed"] < 100), key=lambda s: s["seed"])
    numbers = " ".join(str(s["seed"]) for s in seeds)
    command = f"python benchmarks/structured_against_unstructured.py --seeds {numbers}"
    return {
        "environment": environment() | {"command": command},
        "dataset": "mnist",
        "network": "lenet5",
        "recipe": {
            "dense": DENSE,
            "rounds": ROUNDS,
            "epochs_a_round": EPOCHS,
            "lr": LR,
            "training": TRAINING,
            "images": IMAGES,
            "final_sparsity": FINAL,
            "strength": STRENGTH,
            "loss_tolerance": LOSS_TOLERANCE,
        },
        "tolerance": TOLERANCE,
        "machine": machine([seed for seed in seeds if seed["load_average"]]),
        "source_of_slides": SOURCE,
        "slides": SLIDES,
        "methods": METHODS,
        "summary": [
            summary(method, seeds)
            for method in METHODS
            if seeds and len(rows_of(method, seeds)) == len(seeds)
        ],
        "seeds": seeds,
    }


def rows_of(method: str, seeds: list[Any]) -> list[Any]:
    return [row for seed in seeds for row in seed["rows"] if row["method"] == method]


FIGURES = (
    "zero_share",
    "removed_share",
    "channels_removed_share",
    "valid_accuracy",
    "test_accuracy",
    "parameters",
    "nonzero",
    "macs",
    "simplified_bytes",
    "coded_bytes",
    "sparse_layout_bytes",
)


def summary(method: str, seeds: list[Any]) -> dict[str, Any]:
    rows = rows_of(method, seeds)

    def times(kind: str) -> Any:
        if any(row[kind] is None for row in rows):
            return None
        return {
            setting: {
                figure: spread_if_there([row[kind][setting][figure] for row in rows])
                for figure in ("median_ms", "cpu_ms", "speedup")
            }
            for setting in rows[0][kind]
            if all(setting in row[kind] for row in rows)
        }

    return {
        "method": method,
        "kind": METHODS[method]["kind"],
        "seeds": len(rows),
        **{figure: spread_if_there([row[figure] for row in rows]) for figure in FIGURES},
        "latency": times("latency"),
        "latency_sparse_layout": times("latency_sparse_layout"),
    }


def spread_if_there(values: list[Any]) -> dict[str, float] | None:
    return None if None in values else spread(values)


if __name__ == "__main__":
    main()
