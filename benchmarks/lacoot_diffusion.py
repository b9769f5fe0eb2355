"""LaCoOT on a diffusion transformer: two of six blocks removed, after fine-tuning with and without.

    python benchmarks/lacoot_diffusion.py --settings mnist --seeds 0 1 2
    python benchmarks/lacoot_diffusion.py --smoke    # digits, few steps; prints only

A `dit_tiny` is trained to denoise, once, as the paper has one network that others trained. For each
seed, copies are fine-tuned for the same number of epochs: one plainly, the others with LaCoOT's
penalty. Two blocks are taken out, and images are sampled from what is left, in all networks of a
seed with the same noise. Their Frechet distance to the test images is taken in the features of a
classifier that was trained on the same data. The denoising loss on `valid` is taken for all 15
pairs of blocks, so that the pairs which rankings choose stand among the best, the worst and the
mean. Rankings look at noised `valid` images; `test` is only what distances are measured to.
Distances of few images are biased upwards: `floor` is that of as many train images. Strengths were
chosen on the digits. A run that was cut off goes on.

Structure of `results/lacoot_diffusion.json`::

    settings      {name: one dict a setting}
      .dataset .recipe .command .seconds  (of all seeds, on a machine that other work kept busy)
      .paper                DiT-XL/2 on ImageNet, 5,000 steps of tuning, two blocks removed: FID
      .floor F              F = {mean, least, greatest} over seeds
      .summary[]            one dict a network ("base": not fine-tuned; "plain": without penalty):
                            model, seeds, whole F (nothing removed) and removed {choice: F}, Frechet
                            distances; whole_loss F, pairs_loss F (the mean of all 15) and
                            removed_loss {choice: F}, denoising losses. A choice is a ranking's name
                            ("chance": a random pair); best_loss F and worst_loss F, of all pairs;
                            "base" has none, and pairs_loss null. half F:
                            Frechet with three blocks removed in order of the distance; curve: the
                            mean loss with 0, 1, ... 6 removed
      .seeds[]              .seed .seconds .classifier_accuracy (on test) .floor {value, low, high:
                            the bootstrap's 95 % interval} and .models[]:
        .model .frechet {value, low, high} .loss    with nothing removed
        .rankings           {ranking: {block: score}}, ascending
        .choices            {choice: the pair's two blocks}
        .pairs[]            blocks, loss, frechet {value, low, high} (null: not sampled)
        .curve              loss with 0, 1, ... 6 blocks removed, in order of the distance
        .half               {value, low, high} with three removed
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, spread, write
from torch import Tensor, nn
from torchvision.utils import save_image

from pruning101 import lacoot
from pruning101.core import frechet, masks, models, structure
from pruning101.core.data import Dataset, load
from pruning101.core.diffusion import TIMESTEPS, denoising_loss, limits, noised, sample
from pruning101.core.training import evaluate, fit

TRAINING = {"optimizer": "adamw", "schedule": "cosine", "objective": denoising_loss}
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "dataset": "mnist",
        "image_size": 12,
        "images": {"train": 8_000, "valid": 500, "test": 1_000},
        "classifier": {"epochs": 5, "lr": 0.05, "batch_size": 64},
        "base": {"epochs": 5, "lr": 3e-3, "batch_size": 64},
        "tuning": {"epochs": 1, "lr": 2e-3, "batch_size": 64},
        "penalties": {"random": {"strength": 0.1, "direction": "random"}},
        "samples": {"steps": 20, "guidance": 2.0},
        "sampled": 200,
    },
}
SETTINGS["digits"] = SETTINGS["mnist"] | {
    "dataset": "digits",
    "image_size": 8,
    "images": {},
    "classifier": {"epochs": 20, "lr": 0.05, "batch_size": 64},
    "base": {"epochs": 15, "lr": 4e-3, "batch_size": 64},
    "tuning": {"epochs": 5, "lr": 2e-3, "batch_size": 64},
}
SMOKE = SETTINGS["digits"] | {
    "images": {"train": 256, "valid": 64, "test": 64},
    "classifier": {"epochs": 2, "lr": 0.05},
    "base": {"epochs": 1, "lr": 2e-3},
    "tuning": {"epochs": 1, "lr": 1e-3},
    "samples": {"steps": 2},
    "sampled": 64,
}
PAPER = {"regularised": 56.2, "plain": 118.6, "metric": "FID-50k", "strength": 5e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=["mnist"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder of the data (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/lacoot_diffusion"))
    parser.add_argument("--out", type=Path, default=RESULTS / "lacoot_diffusion")
    parser.add_argument("--smoke", action="store_true", help="digits, for seconds; prints only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        data = load("digits").subset(**SMOKE["images"])
        print(json.dumps(one_seed(0, data, SMOKE, None), indent=1))
        return
    for name in options.settings:
        setting = SETTINGS[name]
        data = load(setting["dataset"], options.root, image_size=setting["image_size"])
        data = data.subset(**setting["images"])
        for seed in options.seeds:
            folder = options.folder / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            done = folder / "done.json"
            if not done.exists():
                done.write_text(json.dumps(one_seed(seed, data, setting, folder)))
            write(options.out.resolve(), collect(options.folder))


# --- networks -------------------------------------------------------------------------------------


def classifier_of(data: Dataset, setting: dict[str, Any], folder: Path | None) -> nn.Module:
    """The network whose features the distance is taken in; the same for all seeds."""
    size = data.train.images.shape[-1]
    model = models.build("lenet_300_100", in_channels=1, image_size=size)
    checkpoint = folder and folder.parent / f"{data.name}-classifier.pt"
    fit(model, data, schedule="cosine", checkpoint=checkpoint, **setting["classifier"])
    return model


def trained(
    seed: int, data: Dataset, setting: dict[str, Any], folder: Path | None
) -> dict[str, nn.Module]:
    """The transformer that all seeds begin with, and the fine-tuned copies, by name."""

    def path(name: str) -> Path | None:
        return folder and folder / f"{name}.pt"

    size = data.train.images.shape[-1]
    base = models.build("dit_tiny", in_channels=1, image_size=size)
    once = folder and folder.parent / f"{data.name}-base.pt"
    fit(base, data, checkpoint=once, **TRAINING | setting["base"])
    found = {"base": base, "plain": masks.clone(base)}
    tuning = TRAINING | setting["tuning"] | {"seed": 1000 + seed}
    fit(found["plain"], data, checkpoint=path("plain"), **tuning)
    for name, given in setting["penalties"].items():
        options = dict(given)
        strength = options.pop("strength")
        model = found[name] = masks.clone(base)
        blocks = [f"blocks.{i}" for i in range(len(base.blocks))]
        with lacoot.BlockDistances(model, blocks, seed=seed, **options) as distances:
            penalty = distances.penalty(strength)
            fit(model, data, checkpoint=path(name), penalty=penalty, **tuning)
    return found


# --- figures --------------------------------------------------------------------------------------


def rankings(model: nn.Module, data: Dataset, seed: int) -> dict[str, dict[str, float]]:
    """Every score of blocks, on noised valid images at timesteps from first to last."""
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    batches = []
    generator = torch.Generator().manual_seed(0)
    for images, labels in data.batches("valid", 128):
        if len(images) > 1:
            timesteps = torch.randint(TIMESTEPS, (len(images),), generator=generator)
            noise = torch.randn(images.shape, generator=generator)
            batches.append(((noised(images, timesteps, noise), timesteps, labels), labels))
    return {
        "random": lacoot.block_distances(model, batches, direction="random"),
        "random_normalised": lacoot.block_distances(
            model, batches, direction="random", normalise=True
        ),
        "ascent": lacoot.block_distances(model, batches, direction="ascent"),
        "relative_change": lacoot.relative_change(model, batches),
        "block_influence": lacoot.block_influence(model, batches),
        "chance": {name: place for place, name in enumerate(lacoot.random_order(blocks, seed))},
    }


def one_seed(
    seed: int, data: Dataset, setting: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    start = time.perf_counter()
    classifier = classifier_of(data, setting, folder)
    count = setting["sampled"]
    (images, labels), *_ = data.batches("test", count)
    real = frechet.features(classifier, images)
    others = next(iter(data.batches("train", count, shuffle=True, seed=seed)))[0]

    def distance(images: Tensor) -> dict[str, float]:
        return vars(frechet.frechet_interval(frechet.features(classifier, images), real))

    def drawn(model: nn.Module) -> Tensor:
        return sample(
            model,
            labels,
            image_shape=images.shape[1:],
            limits=limits(data),
            seed=seed,
            **setting["samples"],
        )

    def loss(model: nn.Module) -> float:
        return evaluate(model, data, "valid", objective=denoising_loss).loss

    rows = []
    for name, model in trained(seed, data, setting, folder).items():
        samples = drawn(model)
        row: dict[str, Any] = {
            "model": name,
            "frechet": distance(samples),
            "loss": loss(model),
            "rankings": rankings(model, data, seed),
        }
        if name == "base":  # only as what the others began with
            rows.append(row | {"choices": {}, "pairs": [], "curve": [], "half": None})
            continue
        ranked = list(row["rankings"]["random"])
        smaller = {
            tuple(sorted(pair)): without(model, pair) for pair in itertools.combinations(ranked, 2)
        }
        losses = {pair: loss(each) for pair, each in smaller.items()}
        choices = {name: tuple(sorted([*r][:2])) for name, r in row["rankings"].items()}
        by_pair = {pair: drawn(smaller[pair]) for pair in set(choices.values())}
        row["choices"] = choices
        row["pairs"] = [
            {
                "blocks": pair,
                "loss": losses[pair],
                "frechet": distance(by_pair[pair]) if pair in by_pair else None,
            }
            for pair in smaller
        ]
        row["curve"] = [row["loss"]]
        for number in range(1, len(ranked) + 1):
            row["curve"].append(loss(without(model, ranked[:number])))
        row["half"] = distance(drawn(without(model, ranked[: len(ranked) // 2])))
        rows.append(row)
        if folder:
            both = torch.cat([samples[:20], by_pair[choices["random"]][:20]])
            picture(folder / f"{name}.png", both, data)
    return {
        "seed": seed,
        "classifier_accuracy": evaluate(classifier, data, "test").accuracy,
        "floor": distance(others),
        "models": rows,
        "seconds": time.perf_counter() - start,
    }


def without(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    smaller = masks.clone(model)
    for block in blocks:
        structure.remove_block(smaller, block)
    return smaller


def picture(path: Path, images: Tensor, data: Dataset) -> None:
    """Whole network above, two blocks fewer below."""
    pixels = images * data.std[0] + data.mean[0]
    save_image(nn.functional.interpolate(pixels.clamp(0, 1), scale_factor=4), path, nrow=20)


# --- all seeds ------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """All seeds that are done, by setting."""
    settings = {}
    for name, setting in SETTINGS.items():
        paths = folder.glob(f"{name}-[0-9]*/done.json")
        seeds = sorted((json.loads(path.read_text()) for path in paths), key=lambda s: s["seed"])
        seeds = [seed for seed in seeds if seed["seed"] < 100]
        if not seeds:
            continue
        numbers = " ".join(str(s["seed"]) for s in seeds)
        settings[name] = {
            "dataset": setting["dataset"],
            "recipe": setting | {"training": {**TRAINING, "objective": "denoising_loss"}},
            "command": f"python benchmarks/lacoot_diffusion.py --settings {name} --seeds {numbers}",
            "seconds": sum(s["seconds"] for s in seeds),
            "paper": PAPER,
            "floor": spread([s["floor"]["value"] for s in seeds]),
            "summary": summary(seeds),
            "seeds": seeds,
        }
    return {"settings": settings}


def summary(seeds: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for index, first in enumerate(seeds[0]["models"]):
        found = [seed["models"][index] for seed in seeds]
        pairs = {name: [chosen(row, name) for row in found] for name in first["choices"]}
        rows.append(
            {
                "model": first["model"],
                "seeds": len(found),
                "whole": spread([row["frechet"]["value"] for row in found]),
                "removed": {
                    name: spread([pair["frechet"]["value"] for pair in each])
                    for name, each in pairs.items()
                },
                "half": spread([row["half"]["value"] for row in found]) if first["half"] else None,
                "curve": [
                    statistics.fmean(each)
                    for each in zip(*(row["curve"] for row in found), strict=True)
                ],
                "whole_loss": spread([row["loss"] for row in found]),
                "best_loss": of_pairs(found, min),
                "worst_loss": of_pairs(found, max),
                "pairs_loss": of_pairs(found, statistics.fmean),
                "removed_loss": {
                    name: spread([pair["loss"] for pair in each]) for name, each in pairs.items()
                },
            }
        )
    return rows


def of_pairs(rows: list[Any], figure: Callable[[list[float]], float]) -> Any:
    """The best, worst or mean loss of each seed's pairs, over the seeds."""
    if not rows[0]["pairs"]:
        return None
    return spread([figure([pair["loss"] for pair in row["pairs"]]) for row in rows])


def chosen(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The pair of blocks that a choice removes."""
    return next(pair for pair in row["pairs"] if pair["blocks"] == row["choices"][name])


if __name__ == "__main__":
    main()
