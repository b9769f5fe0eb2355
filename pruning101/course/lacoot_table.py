"""The seminar's table: ResNet-18 made shallower by LaCoOT and by those before it.

The rows are those of Quétu et al., Layer collapse through optimal transport, ICCV 2025 (arXiv
2406.08933), and what that table leaves open: LaCoOT with a weaker penalty and with the direction
really maximised, the relative change as the penalty, training after the removal, a network that
never had the blocks, and one that loses them without a penalty. Here are the settings, and the
networks that are trained from scratch; what becomes of them is in :mod:`course.lacoot_rows`.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning101.core import models, runs, structure
from pruning101.core.data import Dataset, load
from pruning101.core.steps import History
from pruning101.core.training import fit
from pruning101.lacoot import BlockDistances

# --- the settings ------------------------------------------------------------------------------


def drops_at_half_and_three_quarters(progress: float) -> float:
    """The factor of the learning rate: 1, from half of the steps 0.1, from three quarters 0.01."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "dataset": {"name": "digits", "image_size": 16, "channels": 3},
        "network": "resnet20",
        "blocks": ["layer1.1", "layer1.2", "layer2.2", "layer3.2"],
        "images": {},
        "training": {"batch_size": 64, "schedule": "cosine", "precision": "float32"},
        "from_scratch": {"epochs": 8, "lr": 0.1},
        "layer_folding": {"epochs": 4, "finetune_epochs": 2, "lr": 0.01, "force": True},
        "egp": {"rounds": 2, "epochs": 2, "lr": 0.05},
        "nepenthe": {"rounds": 2, "epochs": 2, "lr": 0.05},
        "easier": {"removals": 3, "epochs": 2, "lr": 0.05},
        "healing": {"epochs": 3, "lr": 0.05},
    },
    "standard": {
        "dataset": {"name": "cifar10"},
        "network": "resnet18",
        "blocks": None,
        "images": {"train": 10_000, "valid": 1_000, "test": 5_000},
        "training": {
            "batch_size": 128,
            "schedule": "cosine",
            "weight_decay": 5e-4,
            "augment": True,
            "precision": "bfloat16",
        },
        "from_scratch": {"epochs": 10, "lr": 0.05},
        "layer_folding": {"epochs": 7, "finetune_epochs": 3, "lr": 0.02, "force": True},
        "egp": {"rounds": 3, "epochs": 3, "lr": 0.02},
        "nepenthe": {"rounds": 3, "epochs": 3, "lr": 0.02},
        "easier": {"removals": 4, "epochs": 3, "lr": 0.02},
        "healing": {"epochs": 3, "lr": 0.02},
    },
    "paper": {
        "dataset": {"name": "cifar10"},
        "network": "resnet18",
        "blocks": None,
        "images": {},
        "training": {
            "batch_size": 128,
            "schedule": drops_at_half_and_three_quarters,
            "weight_decay": 1e-4,
            "augment": True,
            "precision": "auto",
        },
        "from_scratch": {"epochs": 160, "lr": 0.1},
        "layer_folding": {
            "epochs": 100,
            "finetune_epochs": 100,
            "lr": 0.001,
            "force": True,
            "retrain": {"schedule": "constant", "weight_decay": 0.0},
        },
        "egp": {"rounds": 9, "epochs": 160, "lr": 0.1},
        "nepenthe": {"rounds": 9, "epochs": 160, "lr": 0.1},
        "easier": {"removals": 9, "epochs": 160, "lr": 0.1},
        "healing": {"epochs": 40, "lr": 0.01},
    },
}

# How a network may be trained from scratch: the strength of the penalty on its blocks, and options
# of BlockDistances. The first two have none.
PENALTIES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "shallow": None,
    "random": {"strength": 5.0, "direction": "random"},
    "random_weak": {"strength": 1.0, "direction": "random"},
    "ascent": {"strength": 0.1, "direction": "ascent"},
    "random_normalised": {"strength": 1.0, "direction": "random", "normalise": True},
    "ascent_normalised": {"strength": 1.0, "direction": "ascent", "normalise": True},
    "relative": {"strength": 1.0, "measure": "relative"},
}

ROWS = (
    "original",
    "layer_folding",
    "egp",
    "nepenthe",
    "easier",
    "lacoot_published",
    "lacoot_weak",
    "lacoot_ascent",
    "relative",
    "relative_healed",
    "shallow",
    "plain_removed",
    "plain_healed",
)

PAPER: dict[str, dict[str, float]] = {  # test accuracy in %, multiply-adds, milliseconds, minutes
    row: dict(zip(("accuracy", "macs", "latency_ms", "minutes"), figures, strict=True))
    for row, figures in {
        "original": (91.77, 140.19e6, 7.90, 30),
        "layer_folding": (88.76, 147.53e6, 9.89, 160),
        "egp": (90.64, 140.19e6, 7.62, 376),
        "nepenthe": (89.26, 140.19e6, 7.71, 288),
        "easier": (90.35, 140.19e6, 7.07, 533),
        "lacoot_published": (90.99, 64.69e6, 4.78, 40),
    }.items()
}


def settings(profile: str) -> dict[str, Any]:
    """Return what a run's figures depend on, as JSON takes it; functions are named."""
    kinds = {kind: PENALTIES[kind] for kind in ("random", "random_weak", "ascent", "relative")}
    chosen = {"recipe": PROFILES[profile], "penalties": kinds}
    return dict(json.loads(json.dumps(chosen, default=lambda f: f.__qualname__)))


# --- networks from scratch ---------------------------------------------------------------------


@functools.cache
def load_data(profile: str) -> Dataset:
    """Return the images of a profile; the whole data set where it names no numbers."""
    settings = PROFILES[profile]
    return load(**settings["dataset"]).subset(**settings["images"])


def build(profile: str, seed: int) -> nn.Module:
    """Return the untrained network of a profile."""
    data = load_data(profile)
    model = models.build(
        PROFILES[profile]["network"],
        classes=len(data.classes),
        image_size=data.train.images.shape[-1],
        seed=seed,
    )
    # how weights lie in memory: the same numbers, and convolutions run faster so
    return model.to(memory_format=torch.channels_last)


def blocks_of(model: nn.Module, profile: str) -> list[str]:
    """Return the names of the blocks that go: the profile's, or all that may be removed."""
    data = load_data(profile)
    images, _ = next(iter(data.batches("valid", 2, device=runs.device_of(model))))
    removable = structure.removable_blocks(model, images)
    chosen = PROFILES[profile]["blocks"]
    return removable if chosen is None else [name for name in removable if name in chosen]


@contextmanager
def penalised(
    model: nn.Module, blocks: list[str], options: dict[str, Any] | None, seed: int
) -> Iterator[Callable[[nn.Module], Tensor] | None]:
    """Watch the blocks, and give the penalty with these options for ``fit``; None without them."""
    if options is None:
        yield None
        return
    others = {name: value for name, value in options.items() if name != "strength"}
    with BlockDistances(model, blocks, seed=seed, **others) as distances:
        yield distances.penalty(options["strength"])


def trained(kind: str, seed: int, profile: str, folder: Path) -> tuple[nn.Module, History]:
    """Return the network of a kind, trained from scratch, and its epochs.

    ``kind`` is one of ``PENALTIES``; ``"shallow"`` has none of the removable blocks from the start.
    Every epoch is kept in ``folder/kind-seed.pt``, from where the same call goes on.

    Raises:
        ValueError: an unknown kind, or a file that was begun with other settings.
    """
    if kind not in PENALTIES:
        raise ValueError(f"There is no kind of training {kind!r}; choose one of {[*PENALTIES]}.")
    settings, data = PROFILES[profile], load_data(profile)
    model = build(profile, seed)
    if kind == "shallow":
        for name in blocks_of(model, profile):
            structure.remove_block(model, name)
    with penalised(model, blocks_of(model, profile), PENALTIES[kind], seed) as penalty:
        history = fit(
            model,
            data,
            seed=seed,
            checkpoint=Path(folder) / f"{kind}-{seed}.pt",
            penalty=penalty,
            **settings["from_scratch"],
            **settings["training"],
        )
    return model, history
