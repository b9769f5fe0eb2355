"""Runs a notebook's visible checks for the learner alone: what passes, what to look at, which hints
there are. Nothing leaves the machine, and nothing is written.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .grading.notebook import content_of, lesson_of, slim
from .grading.overlay import Work, items, overlay
from .grading.plan import Check, Exercise, Plan, plan
from .material import lessons

if TYPE_CHECKING:
    from .grading.judge import Outcome

WIDTH = 79


@dataclass(frozen=True)
class Checked:
    """What came of a notebook's checks: a text to read, and whether all of them passed."""

    text: str
    passed: bool


def check(paths: Sequence[Path], *, progress: bool = True) -> list[Checked]:
    """Run the checks of the notebooks at `paths`, each on the code that its learner wrote.

    Progress is shown on stderr. Raises ValueError, before anything runs, with a sentence for each
    file that is no notebook of this course.
    """
    plans = [plan(each, hidden=False) for each in lessons() if each.notebook.is_file()]
    chosen: list[tuple[Path, Plan, Work]] = []
    wrong = []
    for path in paths:
        try:
            chosen.append((path, *_read(path, plans)))
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return [_checked(path, made, work, progress=progress) for path, made, work in chosen]


def _read(path: Path, plans: Sequence[Plan]) -> tuple[Plan, Work]:
    """The lesson that the notebook at `path` belongs to, and what its learner did."""
    import nbformat

    if not path.exists():
        raise ValueError("There is no such file.")
    if path.is_dir():
        raise ValueError("It is a folder: name the notebooks in it.")
    notebook = slim(content_of(path.resolve()))  # one's own links may be followed
    name = lesson_of(notebook, [path.stem, path.parent.name], plans)
    if name is None:
        known = ", ".join(each.lesson for each in plans) or "none is built"
        raise ValueError(f"It holds no exercise of this course's lessons ({known}).")
    made = next(each for each in plans if each.lesson == name)
    return made, overlay(made, nbformat.from_dict(notebook))


def _checked(path: Path, made: Plan, work: Work, *, progress: bool) -> Checked:
    """Run one notebook's checks and say what came of them."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # a figure in a cell must not open a window
    try:
        from .grading.judge import judge
    except ImportError:
        raise OSError(
            "Checks run on Linux and macOS only: here, run the check cells in JupyterLab."
        ) from None
    from .grading.sandbox import Limits

    order = items(made, work)
    names = [name for exercise in made.exercises for name in exercise.names]
    outcomes: list[Outcome] = []
    total = sum(isinstance(item, Check) for item in order)
    with tqdm(total=total, desc=made.lesson, unit="check", disable=not progress) as bar:
        for outcome in judge(made.setup, order, names, limits=Limits(), confined=False):
            outcomes.append(outcome)
            bar.update(outcome.grade_id is not None)
    lines = [f"{made.lesson}: {path}", ""]
    for number, exercise in enumerate(made.exercises, start=1):
        lines += [*_exercise(number, exercise, work, outcomes), ""]
    for part in (part for part in work.parts if part.exercise is None):
        failed = [x for x in outcomes if x.grade_id is None and x.label == part.label]
        lines += [_wrapped(f"failed  {part.label}: {x.message}", 2, 10) for x in failed]
    for answer in made.written:
        state = "written" if work.answers[answer.grade_id] else "not written yet"
        points = _points(answer.points)
        lines.append(_wrapped(f"{state}: {answer.title} ({points}, marked by hand)", 2, 4))
    lines += [_wrapped(f"note: {remark}", 2, 8) for remark in work.remarks]
    checks = [x for x in outcomes if x.grade_id is not None]
    reached = sum(x.points for x in checks)
    possible = sum(check.points for exercise in made.exercises for check in exercise.checks)
    passed = all(x.passed for x in checks)
    count = sum(x.passed for x in checks)
    verdict = (
        f"{'All' if passed else f'{count} of'} {len(checks)} checks passed: {reached:g} of "
        f"{_points(possible)}. Grading runs more tests than these."
    )
    return Checked("\n".join([*lines, "", _wrapped(verdict, 0, 0)]), passed)


def _exercise(
    number: int, exercise: Exercise, work: Work, outcomes: Sequence["Outcome"]
) -> list[str]:
    """What came of one exercise, line by line; its hints where a check failed."""
    by_id = {outcome.grade_id: outcome for outcome in outcomes}
    labels = {part.label for part in work.parts if part.exercise == exercise.grade_id}
    numbered = exercise.title.lower().startswith("exercise")
    lines = [exercise.title if numbered else f"Exercise {number}: {exercise.title}"]
    for outcome in outcomes:
        if outcome.grade_id is None and outcome.label in labels:
            lines.append(_wrapped(f"failed  {outcome.label}: {outcome.message}", 2, 10))
    failed = False
    for index, check in enumerate(exercise.checks, start=1):
        outcome = by_id[check.grade_id]
        word = "passed" if outcome.passed else "failed"
        failed = failed or not outcome.passed
        line = f"{word}  check {index}: {outcome.points:g} of {_points(check.points)}"
        lines.append(_wrapped(f"{line}. {outcome.message}".removesuffix(" "), 2, 10))
    if failed:
        lines += [_wrapped(f"hint: {hint}", 2, 8) for hint in exercise.hints]
    return lines


def _points(points: float) -> str:
    return f"{points:g} point{'s' * (points != 1)}"


def _wrapped(text: str, first: int, others: int) -> str:
    """`text` in lines that fit a terminal, indented."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=" " * first,
        subsequent_indent=" " * others,
        break_long_words=False,
        break_on_hyphens=False,
    )
