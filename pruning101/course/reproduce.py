"""Makes a paper's table again: goes on where a run was cut off, prints the table, and keeps it."""

import difflib
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import write_json
from ..core.runs import check_numbers, difference
from . import lacoot_rows, lacoot_table
from .machine import environment, spread

if TYPE_CHECKING:
    import pandas

TABLES = ("lacoot",)
_FIGURES = ("test_accuracy", "valid_accuracy", "macs", "depth", "epochs", "seconds")


def reproduce(
    name: str,
    *,
    profile: str = "quick",
    seeds: Sequence[int] = (0,),
    rows: Sequence[str] | None = None,
    out: Path | None = None,
    folder: Path | None = None,
    done: bool = False,
) -> tuple[str, Path]:
    """Make the table ``name``; return it as text, and the JSON file that it was saved in.

    ``folder`` (by default ``runs/reproduce/NAME-PROFILE``) keeps every epoch, round and row that is
    done: the same call goes on from there to the same figures, and one with more seeds or rows does
    only what is missing. ``out`` is by default ``table.json`` in it. By default all rows. With
    ``done`` nothing is trained: the table is that of the rows and seeds that are there.

    Raises:
        ValueError: an unknown name, profile or row, a seed that is none, or a folder that was begun
            with other settings; with ``done``, one where no row is; all before any work.
    """
    _known("table", name, TABLES)
    _known("profile", profile, tuple(lacoot_table.PROFILES))
    chosen = list(dict.fromkeys(lacoot_table.ROWS if rows is None else rows))
    for row in chosen:
        _known("row", row, lacoot_table.ROWS)
    seeds = list(dict.fromkeys(seeds))
    for seed in seeds:
        check_numbers(seed=seed)
    folder = Path("runs") / "reproduce" / f"{name}-{profile}" if folder is None else folder
    out = folder / "table.json" if out is None else out
    if out.is_dir():
        raise ValueError(f"{str(out)!r} is a folder; name the JSON file to write.")
    _bind(folder, {"profile": profile, **lacoot_table.settings(profile)})

    say = functools.partial(print, file=sys.stderr, flush=True)
    wanted = [
        (row, run)
        for run in (lacoot_rows.Run(seed, profile, folder, say) for seed in seeds)
        for row in chosen
        if not done or lacoot_rows.is_done(row, run)
    ]
    if not wanted:
        raise ValueError(f"No row is done in {str(folder)!r}; make some without --done.")
    found = [lacoot_rows.row(*one) for one in wanted]
    chosen = [row for row in chosen if row in dict(wanted)]
    timed = _latencies({row: run for row, run in reversed(wanted)})
    summary = [_summary(row, [f for f in found if f["row"] == row], timed) for row in chosen]
    command = ["pruning101 reproduce", name, "--profile", profile, "--seeds", *map(str, seeds)]
    command += [] if rows is None and not done else ["--rows", *chosen]
    command += ["--done"] if done else []
    payload = {
        "environment": environment() | {"command": " ".join(command)},
        "profile": profile,
        **lacoot_table.settings(profile),
        "rows": summary,
        "seeds": found,
    }
    write_json(out, payload, indent=2)
    return table(summary).to_string(index=False), out


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}."
        raise ValueError(f"There is no {what} {name!r}: {hint}")


def _bind(folder: Path, settings: dict[str, Any]) -> None:
    """Tie the folder to the settings of the run that fills it."""
    settings = json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    try:
        before = dict(json.loads(path.read_text()))
    except ValueError:
        raise ValueError(
            f"{str(path)!r} is damaged; delete {str(folder)!r} to start anew."
        ) from None
    if other := difference(before, settings):
        raise ValueError(
            f"The run in {str(folder)!r} was begun with {other}; name another folder, or delete "
            "that one."
        )


def _latencies(networks: dict[str, lacoot_rows.Run]) -> dict[str, dict[str, float]]:
    """The rows' latencies, side by side: measured again where other networks than last time are.

    ``networks`` says of each row which seed's network is timed.
    """
    run = next(iter(networks.values()))
    path = run.folder / "latency.json"
    seeds = {row: one.seed for row, one in networks.items()}
    if path.exists():
        before = json.loads(path.read_text())
        if before["seeds"] == seeds:
            return dict(before["rows"])
    run.say(f"latency of {len(networks)} networks")
    timed = lacoot_rows.latencies(networks)
    write_json(path, {"seeds": seeds, "rows": timed})
    return timed


def _summary(
    row: str, found: list[dict[str, Any]], timed: dict[str, dict[str, float]]
) -> dict[str, Any]:
    return {
        "row": row,
        "seeds": [figures["seed"] for figures in found],
        **{name: spread([figures[name] for figures in found]) for name in _FIGURES},
        "latency": timed[row],
        "paper": lacoot_table.PAPER.get(row),
    }


def table(summary: list[dict[str, Any]]) -> "pandas.DataFrame":
    """Return one row a row of the table: what was measured, and beside it what the paper says."""
    import pandas

    rows = []
    for one in summary:
        accuracy, paper = one["test_accuracy"], one["paper"] or {}
        shown = f"{100 * accuracy['mean']:.2f}"
        if len(one["seeds"]) > 1:
            shown += f" [{100 * accuracy['least']:.2f}, {100 * accuracy['greatest']:.2f}]"
        rows.append(
            {
                "row": one["row"],
                "test %": shown,
                "valid %": f"{100 * one['valid_accuracy']['mean']:.2f}",
                "M MACs": f"{one['macs']['mean'] / 1e6:.2f}",
                "depth": f"{one['depth']['mean']:.0f}",
                "ms": f"{one['latency']['ms']:.2f}",
                "minutes": f"{one['seconds']['mean'] / 60:.1f}",
                "epochs": f"{one['epochs']['mean']:.0f}",
                "paper: %": paper.get("accuracy", ""),
                "paper: M MACs": paper["macs"] / 1e6 if paper else "",
                "paper: ms": paper.get("latency_ms", ""),
                "paper: minutes": paper.get("minutes", ""),
            }
        )
    return pandas.DataFrame(rows)
