"""Sixty submissions of lesson 3, graded by the command: seconds, memory, and whether the points are
right.

    python benchmarks/grading.py [--jobs 2]

Goal: ten minutes on two cores. The class is made up: all right, blank, one of the mistakes that
the lesson's checks must see, code that is no Python, exceptions, and a few endless loops. The
points are right where an exercise that was solved has all of its points, one with a mistake lacks
some, and one that does nothing has none.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
from common import write

from pruning101.course import material
from pruning101.course.assign import student

SIZE = 60
MISTAKES = Path(__file__).resolve().parents[1] / "tests" / "course" / "mutations"
NOTHING = ("def broken(:\n", "raise RuntimeError('not today')\n")
ENDLESS = "while True:\n    pass\n"


def graded(notebook: Any) -> dict[str, Any]:
    """The cells that count, by grade_id."""
    cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    return {cell.metadata.nbgrader.grade_id: cell for cell in cells}


def submissions(lesson: material.Lesson) -> Iterator[tuple[Any, dict[str, str]]]:
    """Notebooks, without end, each with what its exercises are: right, mistaken or nothing."""
    whole = nbformat.read(lesson.notebook, as_version=4)
    blank = student(whole)
    solved = {
        name: cell.source
        for name, cell in graded(whole).items()
        if cell.metadata.nbgrader.solution and not cell.metadata.nbgrader.grade
    }
    mistakes = runpy.run_path(str(MISTAKES / f"{lesson.name}.py"))["MUTATIONS"]
    kinds: list[tuple[dict[str, str], dict[str, str]]] = [(solved, {}), (solved, {}), ({}, {})]
    for name, pairs in mistakes.items():
        for old, new in pairs:
            code = solved | {name: solved[name].replace(old, new, 1)}
            kinds.append((code, {name: "mistaken"}))
        for source in NOTHING:
            kinds.append((solved | {name: source}, {name: "nothing"}))
    first = next(iter(solved))
    head = solved[first].split("\n", 1)[0]
    for source in (ENDLESS, f"{head}\n    {ENDLESS.replace('    ', '        ')}"):
        kinds.append((solved | {first: source}, {first: "nothing"}))
    for code, fate in itertools.cycle(kinds):
        notebook = copy.deepcopy(blank)
        for name, source in code.items():
            graded(notebook)[name].source = source
        yield notebook, {name: fate.get(name, "right" if code else "nothing") for name in solved}


def watched(command: list[str]) -> dict[str, float]:
    """Run `command`; return its seconds and the memory that it and all it started took at most.

    Memory is the sum of the processes' resident pages: what they share counts several times.
    Processor time is that of each process when it was last looked at, five times a second. The load
    before tells how many other processes wanted the cores.
    """
    load = os.getloadavg()[0]
    start, peak, most, spent = time.perf_counter(), 0, 0, {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        family, taken = [psutil.Process(process.pid)], 0
        try:
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                taken += one.memory_info().rss
                spent[one.pid] = sum(one.cpu_times()[:2])  # its own, user and system
        peak, most = max(peak, taken), max(most, len(family))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the command ended with status {process.returncode}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": sum(spent.values()),
        "peak_bytes": peak,
        "processes": most,
        "load_before": load,
    }


def wrong(results: Path, fates: dict[str, dict[str, str]]) -> list[str]:
    """Which points are not as they must be."""
    content = json.loads(results.read_text())
    exercises = content["lessons"][0]["exercises"]
    found = []
    for row in content["submissions"]:
        for exercise in exercises:
            checks = [row["checks"][check["grade_id"]] for check in exercise["checks"]]
            points = sum(check["points"] for check in checks)
            whole = sum(check["maximum"] for check in checks)
            fate = fates[row["student"]][exercise["grade_id"]]
            if not {"right": points == whole, "mistaken": points < whole, "nothing": points == 0}[
                fate
            ]:
                found.append(f"{row['student']}, {exercise['grade_id']} ({fate}): {points}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    lesson = material.find("magnitude")
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "submissions", Path(scratch) / "out"
        folder.mkdir()
        fates = {}
        for number, (notebook, fate) in enumerate(itertools.islice(submissions(lesson), SIZE)):
            fates[f"student{number:02d}"] = fate
            nbformat.write(notebook, folder / f"student{number:02d}.ipynb")
        command = [sys.executable, "-m", "pruning101.course", "grade", str(folder)]
        used = watched([*command, "--out", str(out), "--jobs", str(arguments.jobs)])
        faults = wrong(out / "results.json", fates)
    kinds = [kind for fate in fates.values() for kind in fate.values()]
    write(
        "grading",
        {
            "lesson": lesson.name,
            "submissions": SIZE,
            "exercises": {kind: kinds.count(kind) for kind in ("right", "mistaken", "nothing")},
            "jobs": arguments.jobs,
            **used,
            "wrong_points": faults,
        },
    )


if __name__ == "__main__":
    main()
