"""Entropies of all activations of ResNet-18 over CIFAR-10's test images, against `evaluate`.

Both are one pass over the same 10,000 images in batches of 250, taking turns in one process; the
ratio of their processor times is to be 1.15 or less. The most memory that the entropies need above
what was there before is compared for a fifth of the images and for all: the pre-activations of
10,000 images would take 7 GiB, those of a batch take 0.2.

    PRUNING101_DATA=FOLDER python benchmarks/layer_entropies.py [--repeats 3] [--images 10000]
"""

import argparse
import gc
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, write

from pruning101 import activation_entropy
from pruning101.core import data, models, training

BATCH = 250


def resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def most_memory(run: Callable[[], Any]) -> int:
    """The most memory held while `run` runs, above what was held before it: bytes."""
    gc.collect()
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cifar = data.load("cifar10")
    model = models.build("resnet18")
    training.fit(model, cifar.subset(train=1000, valid=100), epochs=1, lr=0.05, progress=False)

    def entropies(images: int) -> Callable[[], Any]:
        part = cifar.subset(test=images)
        return lambda: activation_entropy.layer_entropies(model, part.batches("test", BATCH))

    def evaluation(images: int) -> Callable[[], Any]:
        part = cifar.subset(test=images)
        return lambda: training.evaluate(model, part, "test", batch_size=BATCH)

    found = interleaved(
        {
            "evaluate": evaluation(options.images),
            "layer_entropies": entropies(options.images),
        },
        repeats=options.repeats,
    )
    numbers = (options.images // 5, options.images)
    memory = {images: most_memory(entropies(images)) / 2**20 for images in numbers}
    write(
        "layer_entropies",
        {
            "task": f"resnet18, 17 activations, {options.images} images of cifar10, batch {BATCH}",
            "ratio": found["layer_entropies"]["median"] / found["evaluate"]["median"],
            "cpu_ratio": found["layer_entropies"]["cpu_median"] / found["evaluate"]["cpu_median"],
            "goal": 1.15,
            "most_memory_mib": {f"{images} images": mib for images, mib in memory.items()},
            "seconds": found,
        },
    )


if __name__ == "__main__":
    main()
