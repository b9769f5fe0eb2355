"""Optimal brain damage in the paper's setting, as near as public data allow.

    PRUNING101_DATA=... python benchmarks/optimal_brain_damage.py

9,300 training and 3,350 test digits as in the paper (but MNIST's), a network of shared weights of
like size, the squared error. Measured over seeds: predicted and actual rise of the training error
as parameters go in order of saliency, by the paper's diagonal (eq. 5 drops the cross terms between
the places of a shared weight) and by the exact Gauss-Newton one (which has them); and the test
error after each cut with retraining, in three orders. Lesson 2 shows what is written to
`results/optimal_brain_damage.json` beside the paper's figures.
"""

import argparse

import common
import torch
from torch import nn

from pruning101 import optimal_brain_damage as obd
from pruning101.core import data, training

SHARES = [2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90]
PAPER = {
    "parameters": 2578,
    "connections": 100_000,
    "train_images": 9300,
    "test_images": 3350,
    "prediction_holds_deleted": "up to about 800 of 2,578 parameters (30 %)",
    "flat_after_retraining_deleted": "up to about 1,500 of 2,578 parameters (60 %)",
}


def network(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(4, 12, 5), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(192, 10)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--retrain", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=0.02)
    options = parser.parse_args()
    digits = data.load("mnist").subset(train=9300, test=3350)
    batches = list(digits.batches("train", 1024))
    training_options = {
        "loss": "squared_error", "lr": options.lr, "schedule": "cosine", "progress": False,
    }  # fmt: skip
    runs = []
    for seed in range(options.seeds):
        model = network(seed)
        training.fit(model, digits, epochs=options.epochs, seed=seed, **training_options)
        n = sum(p.numel() for p in model.parameters())
        dense = training.evaluate(model, digits, "test", loss="squared_error")
        counts = [round(share * n / 100) for share in SHARES]
        scores = {"magnitude": {k: p.detach().abs() for k, p in model.named_parameters()}}
        predicted = {}
        for method, patterns in (("levenberg_marquardt", batches), ("gauss_newton", batches[:2])):
            h = obd.hessian_diagonal(model, patterns, "squared_error", method=method)
            scores[method] = obd.saliency(model, h)
            lowest = torch.cat([s.flatten() for s in scores[method].values()]).sort().values
            predicted[method] = [float(lowest[:count].sum()) for count in counts]
        rises = {
            name: obd.deletion_curve(model, batches, "squared_error", s, counts).tolist()
            for name, s in scores.items()
        }
        retrained = {}
        for criterion in obd.CRITERIA:
            steps = obd.prune_iteratively(
                model, digits, rounds=options.rounds, rate=options.rate, epochs=options.retrain,
                criterion=criterion, seed=seed, **training_options,
            )  # fmt: skip
            retrained[criterion] = [
                training.evaluate(step.model, digits, "test", loss="squared_error").loss
                for step in steps
            ]
        runs.append(
            {
                "seed": seed,
                "test_error": dense.loss,
                "test_accuracy": dense.accuracy,
                "predicted_rise": predicted,
                "actual_rise": rises,
                "test_error_retrained": retrained,
            }
        )
    gone = [100 * (1 - (1 - options.rate) ** k) for k in range(1, options.rounds + 1)]
    common.write(
        "optimal_brain_damage",
        {
            "what": "squared error, sum over outputs, mean over images; deleted in per cent",
            "settings": vars(options),
            "paper": PAPER,
            "parameters": n,
            "train_images": len(digits.train),
            "test_images": len(digits.test),
            "deleted": SHARES,
            "deleted_with_retraining": gone,
            "figures": summary(runs, gone),
            "runs": runs,
        },
    )


def summary(runs, gone):
    """What lesson 2 shows: lowest and highest over the seeds."""
    at = SHARES.index(30)

    def span(values):
        return [min(values), max(values)]

    def rise(run, name):
        return run["actual_rise"][name][at]

    flat, ratios = [], []
    for run in runs:
        errors = run["test_error_retrained"]
        fine = [e <= 1.1 * run["test_error"] for e in errors["saliency"]] + [False]
        flat.append([0, *gone][fine.index(False)])
        ratios += [s / m for s, m in zip(errors["saliency"], errors["magnitude"], strict=True)]
    methods = ("levenberg_marquardt", "gauss_newton")
    return {
        "actual_over_predicted_at_30": {
            m: span([rise(r, m) / r["predicted_rise"][m][at] for r in runs]) for m in methods
        },
        "rise_over_magnitude_at_30": {
            m: span([rise(r, m) / rise(r, "magnitude") for r in runs]) for m in methods
        },
        "flat_after_retraining": span(flat),
        "retrained_saliency_over_magnitude": span(ratios),
        "test_accuracy": span([r["test_accuracy"] for r in runs]),
    }


if __name__ == "__main__":
    main()
