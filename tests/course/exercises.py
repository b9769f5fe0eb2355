"""What the exercises' tests share: a lesson's exercises, run apart from the rest of the lesson."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from pruning101.course import build
from pruning101.course.assign import student
from pruning101.course.material import Lesson

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Exercise:
    """One coded exercise: its solved cell, its blank cell, and its checks, whole and as a student
    sees them.
    """

    grade_id: str
    solution: str
    blank: str
    checks: list[str] = field(default_factory=list)
    visible: list[str] = field(default_factory=list)
    check_ids: list[str] = field(default_factory=list)


def read(lesson: Lesson) -> tuple[list[str], dict[str, Exercise]]:
    """The set-up cells of a lesson's source, and its exercises by grade_id."""
    whole = build.pair(lesson.source.read_text(encoding="utf-8"), lesson)
    setup = [cell.source for cell in whole.cells if "setup" in cell.metadata.get("tags", [])]
    exercises: dict[str, Exercise] = {}
    for ours, theirs in zip(whole.cells, student(whole).cells, strict=True):
        graded = ours.metadata.get("nbgrader", {})
        if ours.cell_type != "code" or not graded:
            continue
        name = graded["grade_id"]
        if graded["solution"]:
            exercises[name] = Exercise(name, ours.source, theirs.source)
        elif graded["grade"]:
            exercise = exercises[name.split("-check")[0]]
            exercise.checks.append(ours.source)
            exercise.visible.append(theirs.source)
            exercise.check_ids.append(name)
    return setup, exercises


def run(setup: list[str], jobs: list[list[str]], timeout: int = 300) -> list[list[str | None]]:
    """For each job, a list of cells run in order on what `setup` left, the error of each cell or
    None.
    """
    work = json.dumps({"setup": setup, "jobs": jobs})
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=work,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults(lesson: Lesson, mutations: dict[str, list[tuple[str, str]]]) -> list[str]:
    """What is wrong with a lesson's exercises: see the tests' names for the rules."""
    setup, exercises = read(lesson)
    jobs, meaning = [], []
    for name, exercise in exercises.items():
        jobs += [[exercise.blank, *exercise.visible], [exercise.solution, *exercise.checks]]
        meaning += [(name, "blank", ""), (name, "solved", "")]
        for old, new in mutations.get(name, []):
            if exercise.solution.count(old) < 1:
                return [f"{name}: the mutation of {old!r} fits nothing in the solution"]
            jobs.append([exercise.solution.replace(old, new, 1), *exercise.checks])
            meaning.append((name, "mutated", f"{old!r} -> {new!r}"))
    found = [f"{name}: no mutations" for name in exercises if len(mutations.get(name, [])) < 3]
    found += [
        f"{name}: mutated, but there is no such exercise"
        for name in set(mutations) - set(exercises)
    ]
    found += [
        f"{name}: no check cell" for name, exercise in exercises.items() if not exercise.checks
    ]
    for (name, kind, what), (itself, *checks) in zip(meaning, run(setup, jobs), strict=True):
        ids = exercises[name].check_ids
        if kind == "blank":
            if itself is not None:
                found.append(f"{name}: the untouched exercise cell itself fails with {itself}")
            found += [
                f"{i} passes untouched" for i, error in zip(ids, checks, strict=True) if not error
            ]
        elif kind == "solved":
            errors = zip([name, *ids], [itself, *checks], strict=True)
            found += [f"{i} fails on the solution: {error}" for i, error in errors if error]
        elif itself is None and not any(checks):
            found.append(f"{name}: no check sees the mutation {what}")
    return found
