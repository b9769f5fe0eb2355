"""An epoch of `fit` for LeNet-300-100 on MNIST, against the bare loop one would write by hand.

Both train on the same uint8 tensors with the same settings, in turns, in one process. The bare
loop shuffles, slices, normalises, steps, and measures nothing; `fit` also keeps the running loss
and accuracy, looks for NaN and evaluates on the 6,000 validation images. A second bare loop reads
tensors normalised beforehand. Prints and keeps the ratios, on the clock and of processor time; the
goal is 1.2 or less.

    PRUNING101_DATA=FOLDER python benchmarks/fit_overhead.py [--repeats 7] [--dataset mnist]
"""

import argparse

import torch
import torch.nn.functional as F
from common import interleaved, write

from pruning101.core import data, models, training

BATCH, LR, MOMENTUM = 128, 0.05, 0.9


def bare_epoch(model, images, labels, mean: float, std: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    order = torch.randperm(len(labels))
    for start in range(0, len(labels), BATCH):
        chosen = order[start : start + BATCH]
        x = images[chosen]
        if x.dtype == torch.uint8:
            x = (x.float() / 255 - mean) / std
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dataset", default="mnist")
    options = parser.parse_args()
    dataset = data.load(options.dataset)
    images, labels = dataset.train.images.clone(), dataset.train.labels.clone()
    (mean,), (std,) = dataset.mean, dataset.std
    prepared = (images.float() / 255 - mean) / std

    def model():
        return models.build("lenet_300_100", in_channels=1, image_size=images.shape[-1])

    found = interleaved(
        {
            "fit": lambda: training.fit(
                model(), dataset, epochs=1, lr=LR, batch_size=BATCH, device="cpu"
            ),
            "bare": lambda: bare_epoch(model(), images, labels, mean, std),
            "bare_prepared": lambda: bare_epoch(model(), prepared, labels, mean, std),
        },
        repeats=options.repeats,
    )

    def ratio(kind: str, other: str) -> float:
        return found["fit"][kind] / found[other][kind]

    write(
        "fit_overhead",
        {
            "task": f"lenet_300_100, {len(labels)} images of {options.dataset}, batch {BATCH}",
            "ratio": ratio("median", "bare"),
            "cpu_ratio": ratio("cpu_median", "bare"),
            "ratio_prepared": ratio("median", "bare_prepared"),
            "cpu_ratio_prepared": ratio("cpu_median", "bare_prepared"),
            "goal": 1.2,
            "seconds": found,
        },
    )


if __name__ == "__main__":
    main()
