"""Lottery tickets of LeNet-300-100 on MNIST: tickets, re-initialised, random, signs, one-shot.

    python benchmarks/lottery_tickets_mnist.py --seeds 0 1 2 3

The setting is the paper's (Frankle and Carbin 2019, figure 2) but for three things: 6,000
iterations in place of 50,000 (on tuning seed 100, which is not reported, the dense network has its
least validation loss before 4,000), 6,000 validation images in place of 5,000, and pixels shifted
and scaled to mean 0 and deviation 1. A run that was cut off goes on from what is in --folder.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch import nn

from pruning101 import lottery_tickets
from pruning101.core import masks, models, runs
from pruning101.core.data import Dataset, load
from pruning101.core.steps import History
from pruning101.lottery_tickets import Run, Ticket

SETTING: dict[str, Any] = {
    "iterations": 6_000,
    "optimizer": "adam",
    "lr": 1.2e-3,
    "batch_size": 60,
    "evaluate_every": 100,
}
RATE, OUTPUT_RATE = 0.2, 0.1
REINITIALISED_AT = 3  # 51.3 %
CONTROLS_AT = 7  # 21.1 %: all the controls
INSTABILITY = {"rewind_to": (0, 500), "iterations": 2000, "seeds": (0, 1)}
PARTS = ("search", "controls", "instability")
PAPER = {
    "source": "Frankle and Carbin 2019, LeNet-300-100: section 2 and appendix",
    "ticket at 21.1 %": "early stop 38 % earlier than dense (ratio 0.62)",
    "ticket at 13.5 %": "test accuracy 0.3 percentage points above dense",
    "ticket at 3.6 %": "as dense again",
    "reinitialised at 21.1 %": "stops 2.51 times as late as the ticket, 0.5 points worse",
    "one-shot": "earlier stop than dense at 67.5 to 17.6 %, more accurate at 95 to 5.17 %",
    "signs (Zhou et al. 2019)": "signs of the initial weights at one size do nearly as well",
}
UNLIKE_THE_PAPER = [
    "few seeds, and a dense early stop that varies much: so do the ratios to it",
    "at 80 % tickets stop later than the dense network in more than half of the seeds",
    "re-initialised tickets stop later than tickets in every seed, than dense networks not in all",
    "at 21.1 % they are less accurate than tickets, but no less than dense networks",
    "one-shot tickets at 21.1 % stop earlier than dense networks on average, not in all seeds",
    "6,000 iterations: cut from 10,000, for time, when the first rounds of seed 0 had been seen",
    "densities below 21.1 % were not trained",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=CONTROLS_AT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--root", help="folder of mnist.safetensors (default: the library's)")
    parser.add_argument("--folder", type=Path, default=Path("runs/lottery_tickets_mnist"))
    parser.add_argument("--out", type=Path, default=RESULTS / "lottery_tickets_mnist.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are no faster on two
    options.folder.mkdir(parents=True, exist_ok=True)
    data = load("mnist", options.root)
    out = options.out.resolve()
    steps = {"search": search, "controls": controls, "instability": barriers}
    for part in options.parts:
        for seed in options.seeds:
            steps[part](seed, options.rounds, data, options.folder)
            write(out, collect(options.folder))


def search(seed: int, rounds: int, data: Dataset, folder: Path) -> None:
    """Search up to ``rounds``, then the last ticket with new weights; what is done stays done."""
    history = History.resume(folder / f"{seed}-search")
    for _ in lottery_tickets.find_ticket(
        untrained(seed),
        data,
        rounds=rounds,
        rate=RATE,
        output_rate=OUTPUT_RATE,
        seed=seed,
        history=history,
        **SETTING,
    ):
        pass
    if rounds >= CONTROLS_AT:
        reinitialised(seed, history[CONTROLS_AT], data, folder)


def controls(seed: int, rounds: int, data: Dataset, folder: Path) -> None:
    """The ticket in random places, of signs alone, made at once; an earlier one reinitialised."""
    history = History.load(folder / f"{seed}-search")
    ticket = history[CONTROLS_AT]
    for name, network in (
        ("random", lottery_tickets.random_ticket(ticket, seed=seed)),
        ("signs", lottery_tickets.sign_ticket(ticket)),
        ("one-shot", one_shot(history[0])),
    ):
        control(name, CONTROLS_AT, network, runs.derive(seed, CONTROLS_AT, 100), data, folder, seed)
    reinitialised(seed, history[REINITIALISED_AT], data, folder)


def reinitialised(seed: int, ticket: Ticket, data: Dataset, folder: Path) -> None:
    number = runs.derive(seed, ticket.index, 0)
    network = lottery_tickets.random_reinitialisation(
        ticket, seed=number, initialise=lottery_tickets.gaussian_glorot
    )
    control("reinitialised", ticket.index, network, number, data, folder, seed)


def control(
    name: str,
    round_: int,
    network: nn.Module,
    train_seed: int,
    data: Dataset,
    folder: Path,
    seed: int,
) -> None:
    def compute() -> dict[str, Any]:
        run = lottery_tickets.train(network, data, seed=train_seed, **SETTING)
        return {"round": round_, **watched(run)}

    once(folder / f"{seed}-controls.json", f"{name} {round_}", compute)


def untrained(seed: int) -> nn.Module:
    """The paper's Gaussian Glorot weights; the zoo's own are torch's uniform ones."""
    network = models.build("lenet_300_100", in_channels=1, image_size=28, seed=seed)
    lottery_tickets.gaussian_glorot(network, seed=seed)
    return network


def one_shot(dense: Ticket) -> nn.Module:
    """What one round at the rate of seven leaves: ``find_ticket`` would train the dense anew."""
    rates = {
        name: 1 - (1 - (OUTPUT_RATE if name == "fc3" else RATE)) ** CONTROLS_AT
        for name in ("fc1", "fc2", "fc3")
    }
    ticket = masks.clone(dense.ticket)
    masks.apply(ticket, lottery_tickets.masks_after_round(dense.model, rates))
    return ticket


def barriers(seed: int, rounds: int, data: Dataset, folder: Path) -> None:
    """Instability of the dense network, the ticket and a random ticket, from several iterations."""
    if seed not in INSTABILITY["seeds"]:
        return
    history = History.load(folder / f"{seed}-search")
    ticket = history[CONTROLS_AT]
    path = folder / f"{seed}-instability.json"
    other = folder / f"{seed + 1}-search"
    if other.exists():  # for scale: two trainings from different weights
        alphas = tuple(i / 10 for i in range(11))

        def apart() -> dict[str, Any]:
            ends = history[0].model, History.load(other)[0].model
            return line(alphas, lottery_tickets.interpolate(*ends, alphas, data))

        once(path, "two_initialisations 0", apart)
    networks = {
        "dense": history[0].ticket,
        "ticket": ticket.ticket,
        "random": lottery_tickets.random_ticket(ticket, seed=seed),
    }
    for name, network in networks.items():
        for rewind_to in INSTABILITY["rewind_to"]:

            def compute(network: nn.Module = network, rewind_to: int = rewind_to) -> Any:
                found = lottery_tickets.instability(
                    network,
                    data,
                    rewind_to=rewind_to,
                    iterations=INSTABILITY["iterations"],
                    seed=seed,
                )
                return line(found.alphas, found.errors)

            once(path, f"{name} {rewind_to}", compute)


def line(alphas: Sequence[float], errors: Sequence[float]) -> dict[str, Any]:
    found = lottery_tickets.Instability(tuple(alphas), tuple(errors))
    return {"value": found.value, "errors": [round(e, 5) for e in errors]}


def once(path: Path, name: str, compute: Callable[[], Any]) -> None:
    """Add ``compute()`` to a file of results, unless it is there already."""
    if name not in (json.loads(path.read_text()) if path.exists() else {}):
        entry = compute()  # which takes long enough for another process to add its own
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | {name: entry}))


def watched(run: Run | Ticket) -> dict[str, Any]:
    """What is kept of a training: the early stop, the accuracies, the curves."""
    test = run.test_curve if isinstance(run, Ticket) else run.test_accuracy
    return {
        "early_stop": run.early_stop,
        "least_valid_loss": round(min(run.valid_loss), 5),
        "accuracy_at_early_stop": run.accuracy_at_early_stop,
        "accuracy_at_end": test[-1],
        "valid_loss": [round(v, 4) for v in run.valid_loss],
        "test_curve": test,
    }


# --- the tables --------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """All that is done, by kind and density, beside the paper's figures."""
    rows: list[dict[str, Any]] = []
    densities: dict[int, float] = {}
    for path in sorted(folder.glob("*-search"), key=lambda p: int(p.name.split("-")[0])):
        seed = int(path.name.split("-")[0])
        for ticket in History.load(path):
            densities[ticket.index] = ticket.density
            kind = "ticket" if ticket.index else "dense"
            rows.append({"seed": seed, "kind": kind, "round": ticket.index, **watched(ticket)})
        controls = folder / f"{seed}-controls.json"
        if controls.exists():
            for name, found in json.loads(controls.read_text()).items():
                rows.append({"seed": seed, "kind": name.split()[0], **found})
    table = []
    for kind, round_ in sorted({(r["kind"], r["round"]) for r in rows}, key=lambda k: (k[1], k[0])):
        here = [r for r in rows if (r["kind"], r["round"]) == (kind, round_)]
        table.append(
            {
                "kind": kind,
                "density": densities[round_],
                "seeds": len({r["seed"] for r in here}),
                "trainings": len(here),
                **{
                    key: spread([r[key] for r in here])
                    for key in (
                        "early_stop",
                        "least_valid_loss",
                        "accuracy_at_early_stop",
                        "accuracy_at_end",
                    )
                },
                "early_stop_over_dense": compared(here, rows, "dense"),
                **(
                    {}
                    if kind in ("dense", "ticket")
                    else {"early_stop_over_ticket": compared(here, rows, "ticket")}
                ),
            }
        )
    return {
        "dataset": "mnist",
        "network": "lenet_300_100, Gaussian Glorot, biases zero",
        "images": {"train": 54_000, "valid": 6_000, "test": 10_000},
        "setting": SETTING | {"rate": RATE, "output_rate": OUTPUT_RATE, "rewind_to": 0},
        "paper": PAPER,
        "unlike_the_paper": UNLIKE_THE_PAPER,
        "table": table,
        "instability": unstable(folder),
        "curves": mean_curves(rows, densities),
        "trainings": [
            {k: v for k, v in row.items() if k not in ("valid_loss", "test_curve")} for row in rows
        ],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (of the sample; of one value, 0)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation}


def compared(here: list[dict[str, Any]], rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Early stops over those of the same seed's dense network or ticket at the same density."""
    ratios, differences = [], []
    for row in here:
        for other in rows:
            same = kind == "dense" or other["round"] == row["round"]
            if other["kind"] == kind and other["seed"] == row["seed"] and same:
                ratios.append(row["early_stop"] / other["early_stop"])
                differences.append(
                    100 * (row["accuracy_at_early_stop"] - other["accuracy_at_early_stop"])
                )
    return {
        "ratio": math.exp(statistics.mean(map(math.log, ratios))),  # the geometric mean
        "ratios": [round(r, 3) for r in ratios],
        "accuracy_points": spread(differences),
    }


def unstable(folder: Path) -> list[dict[str, Any]]:
    """Barriers by network and rewinding point, over the seeds done."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-instability.json")):
        for name, entry in json.loads(path.read_text()).items():
            found.setdefault(name, []).append(entry)
    return [
        {
            "network": name.split()[0],
            "rewind_to": int(name.split()[1]),
            "iterations": SETTING["iterations"] if "two" in name else INSTABILITY["iterations"],
            "seeds": len(entries),
            "instability": spread([e["value"] for e in entries]),
            "errors": [
                round(statistics.mean(at), 5)
                for at in zip(*(e["errors"] for e in entries), strict=True)
            ],
        }
        for name, entries in found.items()
    ]


def mean_curves(rows: list[dict[str, Any]], densities: dict[int, float]) -> list[dict[str, Any]]:
    """Mean curves over the seeds, for the dense network and all that was trained at 21.1 %."""
    curves = []
    for kind in ("dense", "ticket", "reinitialised", "random", "signs", "one-shot"):
        round_ = 0 if kind == "dense" else CONTROLS_AT
        here = [r for r in rows if (r["kind"], r["round"]) == (kind, round_)]
        if here:
            curves.append(
                {
                    "kind": kind,
                    "density": densities[round_],
                    "every": SETTING["evaluate_every"],
                    **{
                        key: [
                            round(statistics.mean(at), 4)
                            for at in zip(*(r[key] for r in here), strict=True)
                        ]
                        for key in ("valid_loss", "test_curve")
                    },
                }
            )
    return curves


if __name__ == "__main__":
    main()
