"""LayerCollapse beside what else the same training could have bought, on CIFAR-10 and on MNIST.

    python benchmarks/layer_collapse_cifar10.py --settings mnist --seeds 0 1 2
    python benchmarks/layer_collapse_cifar10.py --settings cifar10 --seeds 0
    python benchmarks/layer_collapse_cifar10.py --smoke    # seconds: digits, prints only

A network is trained (`base`), and its last 1, 2... pairs of linear layers are to become one layer
each. Every way gets the same further epochs with the same objective, half cross-entropy and half
the answers of `base`, and ends in the same architecture, but for `plain` and for pairs whose slope
stays outside the tolerance:

- `plain`: trained on with nothing collapsed;
- `cut`: `plain`, its last activations then taken to be linear and the layers collapsed: what
  collapsing costs where nothing was regularised;
- `regularised`: trained on with the penalty on the slopes, then collapsed (LayerCollapse);
  `regularised_all`, where some slope stayed outside the tolerance: all collapsed nevertheless;
- `collapsed_first`: `base` collapsed at once, then trained on: no penalty, no slopes;
- `distilled`: the collapsed architecture from new weights, with `base` as its teacher, for as many
  epochs as `base` and the further ones together;
- `from_scratch`: the same with the labels alone.

`test` is only reported. The strength is the paper's; the rest was set beforehand, but for one rate:
on MNIST 0.05 for the further epochs let three collapsed pairs diverge on seed 0 (`also_tried`). The
rate that replaced it was tried on seed 100. A run that was cut off goes on where it was.

Structure of `results/layer_collapse_cifar10.json`::

    settings      {name: one dict a setting: mnist, cifar10}
      .dataset .network .recipe (images, base, further, strength, tolerance...) .command
      .summary[]  one dict a way and number of pairs (`last`; 0 for base and plain), of all seeds;
                  F = {mean, least, greatest}: way, last, seeds, valid_accuracy F, test_accuracy F,
                  parameters, macs, depth, epochs (in all, those of base included)
      .seeds[]    .seed .seconds (on the clock, pauses included) .rows[]: as in the summary, one
                  number each; of `regularised` and `cut` also before_valid, before_test
                  (accuracies before collapsing); of `regularised` slopes, collapsed (how many
                  pairs, those within the tolerance) and all_collapsed. The other ways collapse
                  whatever the slopes are
      .latency    {batch: {network: {median_ms, cpu_ms, speedup}}}: network is plain, last_1...;
                  one thread, in turns, the first seed's networks; speedup of processor time
"""

import argparse
import json
import os
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, interleaved, spread, write
from torch import Tensor, nn

from pruning101.core import masks, models
from pruning101.core.data import Dataset, load
from pruning101.core.measure import footprint
from pruning101.core.training import evaluate, fit
from pruning101.layer_collapse import collapse, linearity_penalty, make_collapsible, pairs

TRAINING: dict[str, Any] = {"schedule": "cosine", "precision": "float32", "progress": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "dataset": "mnist",
        "network": "784-512-512-512-10, ReLU",
        "images": {"train": 12_800, "valid": 6_000, "test": 10_000},
        "base": {"epochs": 8, "lr": 0.05},
        "further": {"epochs": 4, "lr": 0.02},
        "strength": 0.2,
        "tolerance": 0.05,
        "last": [1, 2, 3],
        "training": TRAINING | {"batch_size": 64},
        "also_tried": [{"further": {"epochs": 4, "lr": 0.05}, "diverged": "last 3, seed 0"}],
    },
    "cifar10": {
        "dataset": "cifar10",
        "network": "vgg11_bn's features, 512-1024-1024-10, ReLU",
        "images": {"train": 5_000, "valid": 2_000, "test": 10_000},
        "base": {"epochs": 8, "lr": 0.02},
        "further": {"epochs": 3, "lr": 0.02},
        "strength": 0.2,
        "tolerance": 0.05,
        "last": [2],
        "training": TRAINING
        | {"batch_size": 64, "precision": "bfloat16", "augment": True, "weight_decay": 5e-4},
    },
}
SMOKE = SETTINGS["mnist"] | {
    "dataset": "digits",
    "images": {"train": 512, "valid": 128, "test": 128},
    "base": {"epochs": 2, "lr": 0.05},
    "further": {"epochs": 2, "lr": 0.05},
    "strength": 5.0,
}
FURTHER_OBJECTIVE = {"teacher_weight": 0.5, "temperature": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder of the data (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/layer_collapse_cifar10"))
    parser.add_argument("--out", type=Path, default=RESULTS / "layer_collapse_cifar10")
    parser.add_argument("--smoke", action="store_true", help="digits, for seconds; prints only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        data = load("digits", image_size=28).subset(**SMOKE["images"])
        print(json.dumps(one_seed(0, data, SMOKE, None), indent=1))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.settings:
        setting = SETTINGS[name]
        data = load(setting["dataset"], options.root).subset(**setting["images"])
        for seed in options.seeds:
            done = options.folder / f"{name}-{seed}.json"
            if not done.exists():
                found = one_seed(seed, data, setting, options.folder / f"{name}-{seed}")
                done.write_text(json.dumps(found))
            write(options.out.resolve(), collect(options.folder))


# --- the networks ---------------------------------------------------------------------------------


def build(setting: dict[str, Any], seed: int) -> nn.Module:
    """The network of a setting, untrained."""
    grey = setting["dataset"] != "cifar10"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if grey:
            return nn.Sequential(nn.Flatten(), *mlp(784, 512, 512, 512, 10))
        model: Any = models.build("vgg11_bn", seed=seed)
        model.classifier = nn.Sequential(*mlp(512, 1024, 1024, 10))
        # the layout of the weights in memory, no other numbers: convolutions run faster so
        return model.to(memory_format=torch.channels_last)


def mlp(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


def collapsed(model: nn.Module, last: int, example: Tensor) -> nn.Module:
    """The network with its last pairs collapsed, whatever their activations are."""
    copy = make_collapsible(model, last=last, example=example)
    with torch.no_grad():
        for name, slope in copy.named_parameters():
            if name.endswith(".slope"):
                slope.fill_(1)
    return collapse(copy, example=example).model


def renewed(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with the linear layers' weights drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return model


# --- one seed -------------------------------------------------------------------------------------


def one_seed(seed: int, data: Dataset, setting: dict[str, Any], folder: Path | None) -> Any:
    """Train in every way and collapse; trainings resume from ``folder``."""
    start = time.perf_counter()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    total = setting["base"]["epochs"] + setting["further"]["epochs"]
    example = next(iter(data.batches("valid", 64)))[0]

    def train(model: nn.Module, name: str, run: int, epochs: dict[str, Any], **more: Any) -> None:
        fit(
            model,
            data,
            seed=1000 * run + seed,
            checkpoint=folder and folder / f"{name}.pt",
            **setting["training"] | epochs,
            **more,
        )

    def row(way: str, last: int, model: nn.Module, epochs: int, **more: Any) -> dict[str, Any]:
        counts = footprint(model, example[:1])
        return {
            "way": way,
            "last": last,
            "valid_accuracy": evaluate(model, data, "valid").accuracy,
            "test_accuracy": evaluate(model, data, "test").accuracy,
            "parameters": counts.parameters,
            "macs": counts.macs,
            "depth": counts.depth,
            "epochs": epochs,
            **more,
        }

    def before(model: nn.Module) -> dict[str, Any]:
        return {
            "before_valid": evaluate(model, data, "valid").accuracy,
            "before_test": evaluate(model, data, "test").accuracy,
        }

    base = build(setting, seed)
    train(base, "base", 0, setting["base"])
    further = {"teacher": base, **FURTHER_OBJECTIVE}
    plain = masks.clone(base)
    train(plain, "plain", 1, setting["further"], **further)
    rows = [row("base", 0, base, setting["base"]["epochs"]), row("plain", 0, plain, total)]
    networks = {"plain": plain}
    for last in setting["last"]:
        cut = collapsed(plain, last, example)
        rows.append(row("cut", last, cut, total, **before(plain)))

        regularised = make_collapsible(base, last=last, example=example)
        penalty = partial(linearity_penalty, strength=setting["strength"])
        train(regularised, f"regularised-{last}", 1, setting["further"], penalty=penalty, **further)
        slopes = [pair.slope for pair in pairs(regularised) if pair.slope is not None]
        scores = before(regularised)
        result = collapse(regularised, tolerance=setting["tolerance"], example=example)
        within = sum(abs(1 - slope) < setting["tolerance"] for slope in slopes)
        more = {"slopes": slopes, "collapsed": within, "all_collapsed": within == last, **scores}
        rows.append(row("regularised", last, result.model, total, **more))
        if within < last:
            regularised = collapsed(regularised, last, example)
            rows.append(row("regularised_all", last, regularised, total))
        networks[f"last_{last}"] = cut

        first = collapsed(base, last, example)
        train(first, f"collapsed_first-{last}", 1, setting["further"], **further)
        rows.append(row("collapsed_first", last, first, total))

        whole = setting["base"] | {"epochs": total}
        for way, teaching in (("distilled", further), ("from_scratch", {})):
            new = renewed(collapsed(build(setting, 50 + seed), last, example), seed)
            train(new, f"{way}-{last}", 2, whole, **teaching)
            rows.append(row(way, last, new, total))
    return {
        "seed": seed,
        "rows": rows,
        "latency": {str(b): latencies(networks, example[:b]) for b in (1, 64)},
        "load_average": os.getloadavg()[0],
        "seconds": time.perf_counter() - start,
    }


@torch.inference_mode()
def latencies(networks: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float]]:
    timed = interleaved(
        {name: partial(model.eval(), images) for name, model in networks.items()},
        repeats=60 if len(images) == 1 else 20,
        warmup=3,
    )
    return {
        name: {
            "median_ms": 1e3 * one["median"],
            "cpu_ms": 1e3 * one["cpu_median"],
            "speedup": timed["plain"]["cpu_median"] / one["cpu_median"],
        }
        for name, one in timed.items()
    }


# --- all seeds ------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """All seeds that are done, by setting."""
    settings = {}
    for name, setting in SETTINGS.items():
        seeds = [json.loads(path.read_text()) for path in folder.glob(f"{name}-*.json")]
        seeds = sorted((s for s in seeds if s["seed"] < 100), key=lambda s: s["seed"])
        if not seeds:
            continue
        numbers = " ".join(str(s["seed"]) for s in seeds)
        settings[name] = {
            "dataset": setting["dataset"],
            "network": setting["network"],
            "command": "python benchmarks/layer_collapse_cifar10.py "
            f"--settings {name} --seeds {numbers}",
            "recipe": setting | {"further_objective": FURTHER_OBJECTIVE},
            "summary": summary(seeds),
            "latency": seeds[0]["latency"],
            "seeds": seeds,
        }
    return {"settings": settings}


def summary(seeds: list[Any]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int], list[Any]] = {}
    for seed in seeds:
        for row in seed["rows"]:
            rows.setdefault((row["way"], row["last"]), []).append(row)
    return [
        {
            "way": way,
            "last": last,
            "seeds": len(found),
            "valid_accuracy": spread([row["valid_accuracy"] for row in found]),
            "test_accuracy": spread([row["test_accuracy"] for row in found]),
            **{key: found[0][key] for key in ("parameters", "macs", "depth", "epochs")},
        }
        for (way, last), found in rows.items()
    ]


if __name__ == "__main__":
    main()
