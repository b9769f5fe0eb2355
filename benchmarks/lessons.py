"""Seconds that each quick notebook takes, and that its widget takes to answer.

    python benchmarks/lessons.py

Goals: 90 seconds a notebook on two cores, 0.2 seconds an answer. Every value of every control is
set once, as a learner's hand would; an answer is the new figure and the new sentence.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import torch
from common import write
from matplotlib import pyplot as plt
from torch import nn

from pruning101.core import data, models, plots
from pruning101.course import build, execute, material
from pruning101.lottery_tickets import find_ticket
from pruning101.widgets import (
    activation_entropy,
    lacoot,
    layer_collapse,
    layer_folding,
    lottery_tickets,
    magnitude,
    optimal_brain_damage,
    skeletonization,
    structured,
)


def skeletonization_widget() -> ipywidgets.VBox:
    return skeletonization.show(skeletonization.precompute(*skeletonization.toy()))


def optimal_brain_damage_widget() -> ipywidgets.VBox:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 34), nn.Tanh(), nn.Linear(34, 10))
    state = optimal_brain_damage.precompute(model, data.load("digits"))
    return optimal_brain_damage.show(state)


def magnitude_widget() -> ipywidgets.VBox:
    model = models.build("lenet_300_100", in_channels=1, image_size=8)
    return magnitude.show(magnitude.precompute(model, data.load("digits")))


def lottery_tickets_widget() -> ipywidgets.VBox:
    digits = data.load("digits").subset(train=240, valid=60, test=60)
    training = {"iterations": 31, "optimizer": "sgd", "lr": 0.05, "evaluate_every": 1}
    searches = [
        list(
            find_ticket(
                models.build("lenet_300_100", in_channels=1, image_size=8, seed=seed),
                digits,
                rounds=10,
                seed=seed,
                **training,
            )
        )
        for seed in range(3)
    ]
    return lottery_tickets.show(lottery_tickets.precompute(searches, digits, **training))


def structured_widget() -> ipywidgets.VBox:
    model = models.build("lenet5", in_channels=1, image_size=16)
    digits = data.load("digits", image_size=16)
    return structured.show(structured.precompute(model, digits, epochs=0))


def activation_entropy_widget() -> ipywidgets.VBox:
    model = models.build("resnet20", in_channels=1, image_size=8)
    digits = data.load("digits").subset(train=240, valid=60)
    return activation_entropy.show(activation_entropy.precompute(model, digits, epochs=3))


def layer_collapse_widget() -> ipywidgets.VBox:
    return layer_collapse.show(layer_collapse.precompute())


def layer_folding_widget() -> ipywidgets.VBox:
    names = ["act1", "act2", "block1.relu1", "block1.relu2", "block2.relu1", "block2.relu2", "act3"]
    slopes = [{name: min(1, i / (100 + j)) for j, name in enumerate(names)} for i in range(216)]
    images, _ = next(iter(data.load("digits", image_size=12).batches("valid", 64)))
    return layer_folding.show(layer_folding.precompute(slopes, images))


def lacoot_widget() -> ipywidgets.VBox:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [models.BasicBlock(16, 16, 1) for _ in range(8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    digits = data.load("digits").subset(train=240, valid=60)
    options = {"strength": 0.5, "epochs": 3, "lr": 0.05, "batch_size": 40}
    model = nn.Sequential(*stem, *blocks, *head)
    return lacoot.show(lacoot.precompute(model, digits, **options))


WIDGETS: dict[str, Callable[[], ipywidgets.VBox]] = {
    "skeletonization": skeletonization_widget,
    "optimal_brain_damage": optimal_brain_damage_widget,
    "magnitude": magnitude_widget,
    "lottery_tickets": lottery_tickets_widget,
    "structured": structured_widget,
    "layer_folding": layer_folding_widget,
    "activation_entropy": activation_entropy_widget,
    "layer_collapse": layer_collapse_widget,
    "lacoot": lacoot_widget,
}


def answers(box: ipywidgets.VBox) -> list[float]:
    """Seconds of each answer, over all values of all controls."""
    seconds = []
    for row in box.children[:-2]:  # the last two are the sentence and the picture
        control = row.children[-1] if isinstance(row, ipywidgets.HBox) else row
        if isinstance(control, ipywidgets.Dropdown):
            pairs = [o if isinstance(o, tuple) else (o, o) for o in control.options]
            values = [value for _, value in pairs]
        else:
            steps = round((control.max - control.min) / control.step)
            values = [control.min + i * control.step for i in range(steps + 1)]
        for value in values:
            start = time.perf_counter()
            control.value = value
            seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    torch.set_num_threads(1)  # as the lessons do
    plots.use_style()
    plt.switch_backend("agg")
    found = {}
    for lesson in material.lessons():
        notebook = build.pair(lesson.source.read_text(), lesson)
        with tempfile.TemporaryDirectory() as folder:
            seconds = execute.execute(notebook, folder=Path(folder), label=lesson.name)
        times = answers(WIDGETS[lesson.name.removeprefix(f"{lesson.number}_")]())
        found[lesson.name] = {
            "notebook_seconds": seconds,
            "answers": len(times),
            "answer_seconds": {"median": statistics.median(times), "max": max(times)},
        }
    goals = {"notebook_seconds": 90, "answer_seconds": 0.2}
    write("lessons", {"goals": goals, "lessons": found})


if __name__ == "__main__":
    main()
