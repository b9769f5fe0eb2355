"""The rows of LaCoOT's table: what each method does, from the network that all begin with."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pruning101.activation_entropy import easier, egp, nepenthe
from pruning101.core import masks, runs
from pruning101.core.data import Dataset
from pruning101.core.files import write_json, written_whole
from pruning101.core.measure import footprint
from pruning101.core.steps import History
from pruning101.core.training import default_device, evaluate, fit
from pruning101.lacoot import block_distances, relative_change, remove_blocks
from pruning101.layer_folding import fold, fold_iteratively

from .lacoot_table import PENALTIES, PROFILES, blocks_of, load_data, trained
from .machine import interleaved

# --- one seed, one profile, one folder ----------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where a row is made: its seed, profile and folder; ``say`` tells a person how it goes."""

    seed: int
    profile: str
    folder: Path
    say: Callable[[str], None] = print

    @property
    def settings(self) -> dict[str, Any]:
        """The profile's settings."""
        return PROFILES[self.profile]

    @property
    def data(self) -> Dataset:
        """The profile's images."""
        return load_data(self.profile)

    def trained(self, kind: str) -> tuple[nn.Module, History]:
        """Return a network from scratch and its epochs."""
        return trained(kind, self.seed, self.profile, self.folder)


@dataclass(frozen=True)
class Outcome:
    """A row's network, the epochs and seconds of all training, and figures after each removal."""

    model: nn.Module
    epochs: int
    seconds: float
    after: list[dict[str, Any]] = field(default_factory=list)


# --- methods ------------------------------------------------------------------------------------


def from_scratch(kind: str, run: Run) -> Outcome:
    """Train, and leave it at that."""
    model, history = run.trained(kind)
    return Outcome(model, len(history), seconds_of(history))


def without_blocks(kind: str, run: Run) -> Outcome:
    """Train, then remove the profile's blocks, in ascending order of the penalty's distance."""
    start = from_scratch(kind, run)
    batches = run.data.batches("valid", 125, device=runs.device_of(start.model))
    blocks = blocks_of(start.model, run.profile)
    distances = distances_of(kind, start.model, batches, blocks)
    scores = (evaluate(start.model, run.data, split).accuracy for split in ("valid", "test"))
    after = [dict(zip(("valid_accuracy", "test_accuracy"), scores, strict=True))]
    model = start.model
    for step in remove_blocks(start.model, run.data, tolerance=None, distances=distances):
        model = cast(nn.Module, step.model)
        after.append(
            {
                "removed": step.removed,
                "distance": distances[step.removed],
                "valid_accuracy": step.accuracy,
                "test_accuracy": step.test_accuracy,
                "macs": step.footprint.macs,
                "depth": step.footprint.depth,
            }
        )
    return Outcome(model, start.epochs, start.seconds, after)


def distances_of(
    kind: str, model: nn.Module, batches: Any, blocks: Sequence[str]
) -> dict[str, float]:
    """Return what the penalty of a kind measures of each block, the smallest first.

    Without a penalty, what the published code measures.
    """
    options = dict(PENALTIES[kind] or {"direction": "random"})
    options.pop("strength", None)
    if options.get("measure") == "relative":
        return relative_change(model, batches, blocks=blocks)
    return block_distances(model, batches, blocks=blocks, **options)


def healed(before: str, run: Run) -> Outcome:
    """Train the network of another row on."""
    figures = row(before, run)
    model = network(before, run)
    history = fit(
        model,
        run.data,
        seed=runs.derive(run.seed, 1),
        checkpoint=run.folder / f"{before}_healed-{run.seed}.pt",
        **run.settings["healing"],
        **run.settings["training"],
    )
    epochs = figures["epochs"] + len(history)
    return Outcome(model, epochs, figures["seconds"] + seconds_of(history))


RECIPES: dict[str, Callable[..., Iterable[Any]]] = {
    "layer_folding": fold_iteratively,
    "egp": egp,
    "nepenthe": nepenthe,
    "easier": easier,
}


def in_rounds(method: str, run: Run) -> Outcome:
    """Go on from the plain network with one of ``RECIPES``; what may merge is merged."""
    start = from_scratch("plain", run)
    options = dict(run.settings[method])
    options["retrain"] = {**run.settings["training"], **options.get("retrain", {})}
    history = History.resume(run.folder / f"{method}-{run.seed}")
    retrain = {**options.pop("retrain"), "progress": True}
    each = options["epochs"] + options.get("finetune_epochs", 0)
    recipe = RECIPES[method]
    for step in recipe(
        start.model, run.data, retrain=retrain, seed=run.seed, history=history, **options
    ):
        run.say(f"  round {step.index}: {step.accuracy:.1%} on valid")
    after = [
        {
            "removed": step.removed,
            "valid_accuracy": step.accuracy,
            "test_accuracy": step.test_accuracy,
            "macs": step.footprint.macs,
            "depth": step.footprint.depth,
        }
        for step in history
    ]
    model = start.model
    if len(history):
        model = getattr(history.last, "folded", None) or history.last.model
    seconds = start.seconds + sum(step.seconds for step in history)
    return Outcome(model, start.epochs + each * len(history), seconds, after)


RUNS: dict[str, Callable[[Run], Outcome]] = {
    "original": partial(from_scratch, "plain"),
    **{method: partial(in_rounds, method) for method in RECIPES},
    "lacoot_published": partial(without_blocks, "random"),
    "lacoot_weak": partial(without_blocks, "random_weak"),
    "lacoot_ascent": partial(without_blocks, "ascent"),
    "relative": partial(without_blocks, "relative"),
    "relative_healed": partial(healed, "relative"),
    "shallow": partial(from_scratch, "shallow"),
    "plain_removed": partial(without_blocks, "plain"),
    "plain_healed": partial(healed, "plain_removed"),
}

# --- figures ------------------------------------------------------------------------------------


def is_done(name: str, run: Run) -> bool:
    """Return whether a row's figures are in the folder."""
    return _file(name, run).exists()


def _file(name: str, run: Run) -> Path:
    return run.folder / "rows" / f"{name}-{run.seed}.json"


def row(name: str, run: Run) -> dict[str, Any]:
    """Return the figures of one row and seed, from the folder if they are there.

    Accuracies are shares, ``seconds`` those of all training, removal and folding on the clock
    (compare epochs where other work kept the machine busy); multiply-adds and depth are of the
    network as it would be used (:func:`deployed`).
    """
    done = _file(name, run)
    if done.exists():
        return dict(json.loads(done.read_text()))
    run.say(f"seed {run.seed}, {name}")
    outcome = RUNS[name](run)
    example = next(iter(run.data.batches("valid", 2)))[0].to(runs.device_of(outcome.model))
    counts = footprint(deployed(outcome.model, example), example)
    figures = {
        "row": name,
        "seed": run.seed,
        "valid_accuracy": evaluate(outcome.model, run.data, "valid").accuracy,
        "test_accuracy": evaluate(outcome.model, run.data, "test").accuracy,
        "macs": counts.macs,
        "depth": counts.depth,
        "epochs": outcome.epochs,
        "seconds": outcome.seconds,
        "after": outcome.after,
    }
    kept = run.folder / "networks" / f"{name}-{run.seed}.pt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as part:
        torch.save(outcome.model, part)
    write_json(done, figures)  # last: where it is, the network is, too
    return figures


def network(name: str, run: Run) -> nn.Module:
    """Return the network of a row that is done."""
    where = None if torch.accelerator.is_available() else "cpu"
    path = run.folder / "networks" / f"{name}-{run.seed}.pt"
    model: nn.Module = torch.load(path, where, weights_only=False)  # surgery made its shape
    return model


def seconds_of(history: History) -> float:
    """Return the seconds of all epochs."""
    return sum(epoch.seconds for epoch in history)


def deployed(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the network as it would be used: the same function, all norms merged into layers."""
    copy = masks.clone(model).to(memory_format=torch.contiguous_format).eval()
    return fold(copy, example, threshold=0, inplace=True).model


def latencies(networks: Mapping[str, Run], *, repeats: int = 50) -> dict[str, dict[str, float]]:
    """Time one image through each row's network, deployed, in turns.

    ``networks`` says of each row which run's network is meant. By row medians of ``ms``, of the
    processor's time on one thread, and ``clock_ms``, which a busy scheduler can double for some
    rows and not for others; on an accelerator, where there is one, both are by the clock.
    """
    device = default_device()
    run = next(iter(networks.values()))
    image = next(iter(run.data.batches("valid", 1)))[0].to(device)

    def call(model: nn.Module) -> None:
        model(image)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    calls: dict[str, Callable[[], None]] = {
        name: partial(call, deployed(network(name, one).to(device), image))
        for name, one in networks.items()
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            timed = interleaved(calls, repeats=repeats, warmup=5)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            "ms": 1e3 * one["cpu_median" if device.type == "cpu" else "median"],
            "clock_ms": 1e3 * one["median"],
        }
        for name, one in timed.items()
    }
