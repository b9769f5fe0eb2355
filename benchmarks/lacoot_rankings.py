"""What ranks blocks well, what makes them removable, and at what price: ResNet-18 and Swin-T.

    python benchmarks/lacoot_rankings.py --settings resnet18 --kinds plain relative --seeds 0 1
    python benchmarks/lacoot_rankings.py --settings swin_t --kinds plain random relative --seeds 0
    python benchmarks/lacoot_rankings.py --smoke    # seconds: digits, prints only

Networks of several kinds, trained plainly or with a penalty on the distances of their blocks, begin
alike; then every ranking says in which order the blocks go. Nothing is trained after a removal,
except where that is said. Rankings and choices see `valid` alone, `test` is reported.

ResNet-18 has four removable blocks, so all 16 subsets are measured, and with them the best and
worst subset of each size and all 24 orders; its networks are those of `pruning101 reproduce
lacoot`. Swin-T has twelve: random orders and a greedy search on `valid` stand in for that. It sees
8 x 8 patches of 4 x 4 pixels, as the published one does with 32 x 32 images, but in windows of
2 x 2 patches in place of 7 x 7, and is not pretrained: small enough for one core, and no match for
a well-trained Swin-T. A run that was cut off goes on where it was.

Structure of `results/lacoot_rankings.json`::

    settings      {name: one dict a setting: resnet18, swin_t}
      .dataset .network .images .recipe .command
      .blocks[]             names of those that may go, in the order of execution
      .kinds                {kind: options of the penalty, or null}
      .rankings             {ranking: one line about it}; beside these, curves have "chance" (the
                            mean of all orders, or of 12 random ones), "best" and "worst" (of all
                            subsets of that size, chosen on valid) or "greedy" (the block that costs
                            least on valid goes next, for the first few)
      .curves[]             one dict a kind, ranking and number of blocks gone; F = {mean, least,
                            greatest} over seeds: kind, ranking, removed, seeds, test_accuracy F,
                            gain F (what test_accuracy is above that of "chance" of the same
                            network), valid_accuracy F (null for "chance")
      .quality[]            one dict a kind and ranking: kind, ranking, seeds, gain F (mean over all
                            numbers gone but none and all), beats F (the share of all orders whose
                            mean accuracy is lower, ties half: 0.5 is no better than chance, 1 the
                            best there is; noise where "best" and "worst" are within a point),
                            valid_accuracy F (mean over the same numbers gone)
      .distances[]          kind, measure, block, seeds, value F: on valid, batches of 128
      .prices[]             one dict a kind: kind, seeds, whole F (test accuracy with all blocks),
                            lost F (what plain of the same seed has more), half_gone F (half of the
                            blocks gone, in the order of half_ranking, the ranking of the greatest
                            mean valid_accuracy in `quality`), all_gone F, healed F (all gone, then
                            trained on as in recipe.heal; null for swin_t), seconds F (of training,
                            on the clock of a machine that other work kept busy), seconds_ratio F
                            (against plain of the same seed), step_ratio (processor time of one
                            training step against a plain one's, in turns in one process; null if
                            not measured). The kind "shallow" of resnet18 never had those blocks,
                            and has nulls where nothing can be removed
      .seeds[]              one dict a network: seed, kind, seconds, whole, scores {measure: {block:
                            value}}, orders {ranking: names}, accuracy {ranking: [test accuracy
                            with 0, 1, ... gone]}, orders_beaten {ranking: share}, chosen {best,
                            worst or greedy: names for each number gone}, subsets {names joined by
                            "+", "" for none: {split: accuracy}; resnet18 only}, all_gone, healed
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, spread, write
from torch import nn

from pruning101 import lacoot
from pruning101.core import masks, models, structure
from pruning101.core.block_features import valid_batches
from pruning101.core.data import Dataset, load
from pruning101.core.files import write_json
from pruning101.core.training import evaluate, fit
from pruning101.course import lacoot_table
from pruning101.course.lacoot_rows import seconds_of


def warm_up_and_cosine(progress: float) -> float:
    """The factor of the learning rate: up during the first tenth of the steps, then a cosine."""
    return max(min(progress / 0.1, 1.0), 0.01) * (1 + math.cos(math.pi * progress)) / 2


STANDARD = lacoot_table.PROFILES["standard"]
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet18": {
        "dataset": STANDARD["dataset"],
        "network": "resnet18 (3x3 stem, max-pool)",
        "images": STANDARD["images"],
        "training": STANDARD["training"] | STANDARD["from_scratch"],
        "penalties": lacoot_table.PENALTIES,
        "heal": {"epochs": 2, "lr": 0.01},
        "all_orders": True,
    },
    "swin_t": {
        "dataset": {"name": "cifar10"},
        "network": "swin_t, patches of 4x4 pixels, windows of 2x2 patches, not pretrained",
        "images": {"train": 10_000, "valid": 1_000, "test": 1_000},
        "training": {
            "epochs": 5,
            "lr": 1e-3,
            "optimizer": "adamw",
            "weight_decay": 0.05,
            "batch_size": 128,
            "schedule": warm_up_and_cosine,
            "augment": True,
            "precision": "bfloat16",
        },
        "penalties": {
            "plain": None,
            "random": {"strength": 0.1, "direction": "random"},
            "relative": {"strength": 1.0, "measure": "relative"},
            "ascent": {"strength": 0.1, "direction": "ascent"},
        },
        "heal": None,
        "all_orders": False,
        "orders": 12,
        "greedy": 3,
    },
}
SMOKE: dict[str, dict[str, Any]] = {
    name: setting
    | {
        "dataset": {"name": "digits", "image_size": 16, "channels": 3},
        "images": {"train": 128, "valid": 32, "test": 32},
        "training": setting["training"] | {"epochs": 1, "batch_size": 32},
        "penalties": {"plain": None, "random": {"strength": 0.1, "direction": "random"}},
    }
    for name, setting in SETTINGS.items()
}
SMOKE["resnet18"]["heal"] = {"epochs": 1, "lr": 0.01}
SMOKE["swin_t"] |= {"orders": 2, "greedy": 1, "penalties": {"plain": None}}

MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "random": partial(lacoot.block_distances, direction="random"),
    "ascent": partial(lacoot.block_distances, direction="ascent"),
    "random_normalised": partial(lacoot.block_distances, direction="random", normalise=True),
    "ascent_normalised": partial(lacoot.block_distances, direction="ascent", normalise=True),
    "relative_change": lacoot.relative_change,
    "block_influence": lacoot.block_influence,
    "angular_distance": lacoot.angular_distance,
}
RANKINGS = {
    "random": "max-sliced distance, the maximum over 50 random directions, ascending",
    "ascent": "max-sliced distance, the direction really maximised, ascending",
    "random_normalised": "as random, divided by the size of the features",
    "ascent_normalised": "as ascent, divided by the size of the features",
    "relative_change": "|output - input| / |input|, ascending",
    "block_influence": "1 - cosine of input and output, ascending",
    "angular_distance": "angle between input and output, ascending",
    "last": "from the last block back: what the published code does with ResNet-18",
    "reference": "|z| + percentile / 100 of `random`: what the published code does with Swin-T",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--kinds", nargs="+", default=["plain", "random"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/lacoot_rankings"))
    parser.add_argument("--networks", type=Path, default=Path("runs/reproduce/lacoot-standard"))
    parser.add_argument("--out", type=Path, default=RESULTS / "lacoot_rankings")
    parser.add_argument("--steps", action="store_true", help="time a training step of each kind")
    parser.add_argument("--smoke", action="store_true", help="digits, for seconds; prints only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        for name, small in SMOKE.items():
            found = [examined(name, small, kind, 0, None, None) for kind in small["penalties"]]
            print(json.dumps(tables(found, small), indent=1))
        return
    for name in options.settings:
        setting = SETTINGS[name]
        for seed in options.seeds:
            for kind in options.kinds:
                place = options.folder / name / f"{kind}-{seed}.json"
                if not place.exists():
                    write_json(
                        place,
                        examined(name, setting, kind, seed, options.networks, place.parent),
                    )
                write(options.out.resolve(), collect(options.folder))
        if options.steps:
            write_json(
                options.folder / name / "steps.json", step_ratios(name, setting, options.kinds)
            )
            write(options.out.resolve(), collect(options.folder))


# --- networks -------------------------------------------------------------------------------------


def data_of(setting: dict[str, Any]) -> Dataset:
    return load(**setting["dataset"]).subset(**setting["images"])


def build(name: str, setting: dict[str, Any], seed: int) -> nn.Module:
    """The network of a setting, untrained."""
    if name == "resnet18":
        return models.build("resnet18", seed=seed).to(memory_format=torch.channels_last)
    from torchvision.models import SwinTransformer

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SwinTransformer(
            patch_size=[4, 4],
            embed_dim=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=[2, 2],
            stochastic_depth_prob=0.0,
            num_classes=10,
        )


def blocks_of(model: nn.Module, data: Dataset) -> list[str]:
    return structure.removable_blocks(model, next(iter(data.batches("valid", 2)))[0])


def trained(
    name: str,
    setting: dict[str, Any],
    kind: str,
    seed: int,
    networks: Path | None,
    folder: Path | None,
) -> tuple[nn.Module, float]:
    """The trained network of a kind, and the seconds that its epochs took."""
    if name == "resnet18" and networks is not None:
        model, history = lacoot_table.trained(kind, seed, "standard", networks)
        return model, seconds_of(history)
    data = data_of(setting)
    model = build(name, setting, seed)
    with lacoot_table.penalised(
        model, blocks_of(model, data), setting["penalties"][kind], seed
    ) as penalty:
        history = fit(
            model,
            data,
            seed=seed,
            penalty=penalty,
            checkpoint=folder and folder / f"{kind}-{seed}.pt",
            progress=False,
            **setting["training"],
        )
    return model, seconds_of(history)


def step_ratios(name: str, setting: dict[str, Any], kinds: Sequence[str]) -> dict[str, float]:
    """Processor time of a training step of each kind against that of a plain one."""
    data = data_of(setting)
    options = setting["training"]
    images, labels = next(iter(data.batches("train", options["batch_size"])))

    def stepper(kind: str) -> Iterator[None]:
        model = build(name, setting, 0).train()
        blocks = blocks_of(model, data)
        if kind == "shallow":
            for block in blocks:
                structure.remove_block(model, block)
        optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        with lacoot_table.penalised(model, blocks, setting["penalties"].get(kind), 0) as penalty:
            while True:
                optimiser.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, options["precision"] == "bfloat16"):
                    objective = F.cross_entropy(model(images), labels)
                    if penalty is not None:
                        objective = objective + penalty(model)
                objective.backward()
                optimiser.step()
                yield

    steppers = {kind: stepper(kind) for kind in dict.fromkeys(["plain", *kinds])}
    calls: dict[str, Callable[[], Any]] = {kind: partial(next, s) for kind, s in steppers.items()}
    timed = interleaved(calls, repeats=15, warmup=2)
    plain = timed["plain"]["cpu_median"]
    return {kind: one["cpu_median"] / plain for kind, one in timed.items()}


# --- one network ----------------------------------------------------------------------------------


class Removals:
    """Accuracy of a network without some of its blocks; each is measured once, and kept."""

    def __init__(
        self, model: nn.Module, data: Dataset, blocks: list[str], place: Path | None
    ) -> None:
        self.model, self.data, self.blocks, self.place = model.eval(), data, blocks, place
        self.known: dict[str, dict[str, float]] = {}
        if place is not None and place.exists():
            self.known = json.loads(place.read_text())

    def without(self, gone: Iterable[str]) -> nn.Module:
        smaller = masks.clone(self.model)
        for name in gone:
            structure.remove_block(smaller, name)
        return smaller

    def accuracy(self, gone: Iterable[str], split: str = "test") -> float:
        gone = set(gone)
        key = "+".join(name for name in self.blocks if name in gone)
        if split not in self.known.setdefault(key, {}):
            # bfloat16, as in training: twice as fast
            with torch.autocast("cpu", torch.bfloat16):
                score = evaluate(self.without(gone), self.data, split, batch_size=250)
            self.known[key][split] = score.accuracy
            if self.place is not None:
                write_json(self.place, self.known)
        return self.known[key][split]

    def along(self, order: Sequence[str], split: str = "test") -> list[float]:
        """Accuracy with the first 0, 1, ... of these blocks gone."""
        return [self.accuracy(order[:n], split) for n in range(len(order) + 1)]


def reference_order(model: nn.Module, data: Dataset, scores: dict[str, float]) -> list[str]:
    """The published order; what `remove_blocks` measures on the way is not looked at."""
    few = data.subset(valid=2, test=2)
    steps = lacoot.remove_blocks(model, few, tolerance=None, distances=scores, order="reference")
    return [step.removed for step in steps]


def examined(
    name: str,
    setting: dict[str, Any],
    kind: str,
    seed: int,
    networks: Path | None,
    folder: Path | None,
) -> dict[str, Any]:
    """Train one network, or whatever of it is not done yet, and remove its blocks in all ways."""
    data = data_of(setting)
    model, seconds = trained(name, setting, kind, seed, networks, folder)
    row: dict[str, Any] = {"seed": seed, "kind": kind, "seconds": seconds}
    if kind == "shallow":
        return row | {"whole": Removals(model, data, [], None).accuracy([])}
    blocks = blocks_of(model, data)
    batches = list(valid_batches(data, 128))
    scores = {measure: score(model, batches, blocks=blocks) for measure, score in MEASURES.items()}
    orders = {measure: sorted(blocks, key=found.__getitem__) for measure, found in scores.items()}
    orders["last"] = blocks[::-1]
    orders["reference"] = reference_order(model, data, scores["random"])
    place = folder and folder / f"{kind}-{seed}-subsets.json"
    removals = Removals(model, data, blocks, place)
    accuracy = {ranking: removals.along(order) for ranking, order in orders.items()}
    for order in orders.values():
        removals.along(order, "valid")
    chosen: dict[str, list[list[str]]] = {}
    if setting["all_orders"]:
        others = [list(order) for order in itertools.permutations(blocks)]
        for sort, best in (("best", max), ("worst", min)):
            chosen[sort] = [
                list(best(sets, key=partial(removals.accuracy, split="valid")))
                for n in range(len(blocks) + 1)
                for sets in [list(itertools.combinations(blocks, n))]
            ]
    else:
        others = [
            lacoot.random_order(blocks, 1000 * seed + index) for index in range(setting["orders"])
        ]
        chosen["greedy"] = greedy(removals, blocks, setting["greedy"])
    accuracy |= {sort: [removals.accuracy(s) for s in sets] for sort, sets in chosen.items()}
    paths = [removals.along(order) for order in others]
    accuracy["chance"] = [statistics.fmean(at) for at in zip(*paths, strict=True)]
    means = [inside(path) for path in paths]
    beaten = {
        ranking: statistics.fmean((own > m) + (own == m) / 2 for m in means)
        for ranking in orders
        for own in [inside(accuracy[ranking])]
    }
    row |= {
        "whole": accuracy["chance"][0],
        "all_gone": accuracy["chance"][-1],
        "scores": scores,
        "orders": orders,
        "accuracy": accuracy,
        "orders_beaten": beaten,
        "chosen": chosen,
        "subsets": removals.known,
    }
    if setting["heal"]:
        row["healed"] = healed(removals, setting, seed)
    return row


def inside(path: Sequence[float]) -> float:
    """Mean accuracy where the order matters: some blocks gone, not all."""
    return round(statistics.fmean(path[1:-1]), 9)


def greedy(removals: Removals, blocks: list[str], count: int) -> list[list[str]]:
    """What is gone after 0, 1, ... removals, each of the block that costs least on `valid`."""
    sets: list[list[str]] = [[]]
    for _ in range(count):
        rest = [[*sets[-1], name] for name in blocks if name not in sets[-1]]
        sets.append(max(rest, key=partial(removals.accuracy, split="valid")))
    return sets


def healed(removals: Removals, setting: dict[str, Any], seed: int) -> float:
    """Test accuracy without any of the blocks after some more training, without a penalty."""
    model = removals.without(removals.blocks)
    options = setting["training"] | setting["heal"]
    fit(model, removals.data, seed=1000 + seed, progress=False, **options)
    return Removals(model, removals.data, [], None).accuracy([])


# --- all networks ---------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """All networks that are done, by setting."""
    settings = {}
    for name, setting in SETTINGS.items():
        places = [p for p in (folder / name).glob("*-*.json") if "-subsets" not in p.name]
        rows = [json.loads(place.read_text()) for place in places]
        kinds = [*setting["penalties"]]
        rows.sort(key=lambda row: (row["seed"], kinds.index(row["kind"])))
        if not rows:
            continue
        done = [kind for kind in kinds if any(row["kind"] == kind for row in rows)]
        seeds = sorted({str(row["seed"]) for row in rows})
        steps = folder / name / "steps.json"
        settings[name] = {
            "dataset": setting["dataset"]["name"],
            "network": setting["network"],
            "images": setting["images"],
            "recipe": json.loads(
                json.dumps(
                    {"training": setting["training"], "heal": setting["heal"]},
                    default=lambda function: function.__name__,
                )
            ),
            "command": f"python benchmarks/lacoot_rankings.py --settings {name} "
            f"--kinds {' '.join(done)} --seeds {' '.join(seeds)}",
            "blocks": known_blocks(name),
            "kinds": {kind: setting["penalties"][kind] for kind in done},
            "rankings": RANKINGS,
            **tables(rows, setting, json.loads(steps.read_text()) if steps.exists() else {}),
            # Of hundreds of subsets of many blocks only what was asked of them is kept.
            "seeds": [
                {key: row[key] for key in row if key != "subsets" or setting["all_orders"]}
                for row in rows
            ],
        }
    return {"settings": settings}


@cache
def known_blocks(name: str) -> list[str]:
    return blocks_of(build(name, SETTINGS[name], 0), data_of(SETTINGS[name]))


def tables(
    rows: list[dict[str, Any]],
    setting: dict[str, Any],
    steps: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What all seeds say: curves, quality, distances and prices."""
    kinds: dict[str, list[Any]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    plain = {row["seed"]: row for row in kinds.get("plain", [])}
    curves: list[dict[str, Any]] = []
    quality: list[dict[str, Any]] = []
    distances: list[dict[str, Any]] = []
    prices: list[dict[str, Any]] = []
    for kind, found in kinds.items():
        if kind == "shallow":
            continue
        for ranking in found[0]["accuracy"]:
            for removed in range(len(found[0]["accuracy"][ranking])):
                at = [row["accuracy"][ranking][removed] for row in found]
                chance = [row["accuracy"]["chance"][removed] for row in found]
                valid: list[Any] = [on_valid(row, ranking, removed) for row in found]
                curves.append(
                    {
                        "kind": kind,
                        "ranking": ranking,
                        "removed": removed,
                        "seeds": len(found),
                        "test_accuracy": spread(at),
                        "gain": spread([a - c for a, c in zip(at, chance, strict=True)]),
                        "valid_accuracy": None if None in valid else spread(valid),
                    }
                )
        for ranking in RANKINGS:
            gains = [
                inside(row["accuracy"][ranking]) - inside(row["accuracy"]["chance"])
                for row in found
            ]
            beats = [row["orders_beaten"][ranking] for row in found]
            valid = [
                inside(
                    [
                        cast(float, on_valid(row, ranking, n))
                        for n in range(len(row["scores"]["random"]) + 1)
                    ]
                )
                for row in found
            ]
            quality.append(
                {
                    "kind": kind,
                    "ranking": ranking,
                    "seeds": len(found),
                    "gain": spread(gains),
                    "beats": spread(beats),
                    "valid_accuracy": spread(valid),
                }
            )
        for measure, scores in found[0]["scores"].items():
            for block in scores:
                values = [row["scores"][measure][block] for row in found]
                one = {"kind": kind, "measure": measure, "block": block, "seeds": len(found)}
                distances.append(one | {"value": spread(values)})
    best = max(
        RANKINGS,
        key=lambda r: statistics.fmean(
            q["valid_accuracy"]["mean"] for q in quality if q["ranking"] == r
        ),
    )
    for kind, found in kinds.items():
        paired = [row for row in found if row["seed"] in plain]
        removable = kind != "shallow"
        half = (len(found[0]["accuracy"][best]) - 1) // 2 if removable else 0
        prices.append(
            {
                "kind": kind,
                "seeds": len(found),
                "whole": spread([row["whole"] for row in found]),
                "lost": spread([plain[r["seed"]]["whole"] - r["whole"] for r in paired])
                if paired
                else None,
                "half_ranking": best if removable else None,
                "half_gone": spread([row["accuracy"][best][half] for row in found])
                if removable
                else None,
                "all_gone": spread([row["all_gone"] for row in found]) if removable else None,
                "healed": spread([row["healed"] for row in found])
                if removable and setting["heal"]
                else None,
                "seconds": spread([row["seconds"] for row in found]),
                "seconds_ratio": spread(
                    [row["seconds"] / plain[row["seed"]]["seconds"] for row in paired]
                )
                if paired
                else None,
                "step_ratio": (steps or {}).get(kind),
            }
        )
    return {"curves": curves, "quality": quality, "distances": distances, "prices": prices}


def on_valid(row: dict[str, Any], ranking: str, removed: int) -> float | None:
    """Accuracy on `valid` after so many removals, where it was measured."""
    if ranking in row["orders"]:
        gone = row["orders"][ranking][:removed]
    elif ranking in row["chosen"]:
        gone = row["chosen"][ranking][removed]
    else:
        return None
    measured = {frozenset(k.split("+")) - {""}: v for k, v in row["subsets"].items()}
    return measured[frozenset(gone)].get("valid")


if __name__ == "__main__":
    main()
