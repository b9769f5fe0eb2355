"""What of a student's notebook is graded, and in which order.

A *plan* is the instructor's side, read from a lesson's stored notebook: its set-up, its exercises
with their checks, its answers in words. A student's notebook is laid over it: only the student's own
cells are taken from it, and set-up and checks are always the instructor's. Nothing is run here.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..assign import student
from ..material import Lesson
from .source import defined

_HINT = re.compile(r"<details>\s*<summary>\s*Hint[^<]*</summary>(.*?)</details>", re.S | re.I)
_HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.M)


@dataclass(frozen=True)
class Check:
    """One check of an exercise, its source as the judge runs it."""

    grade_id: str
    points: float
    source: str


@dataclass(frozen=True)
class Exercise:
    """A coded exercise: the names that its cell is to define, its checks in order, its hints."""

    grade_id: str
    title: str
    names: tuple[str, ...]
    checks: tuple[Check, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """An answer that a person marks."""

    grade_id: str
    title: str
    points: float


@dataclass(frozen=True)
class Given:
    """A cell of the student version, as it was handed out; `role` is setup, exercise, check, written
    or lesson.
    """

    id: str
    cell_type: str
    source: str
    role: str
    grade_id: str


@dataclass(frozen=True)
class Plan:
    """The instructor's side of a lesson; `digest` changes with anything in it."""

    lesson: str
    setup: tuple[str, ...]
    exercises: tuple[Exercise, ...]
    written: tuple[Written, ...]
    digest: str
    given: tuple[Given, ...]


@dataclass(frozen=True)
class Part:
    """One cell of the student's code: of an exercise (its grade_id), or an extra cell (None).

    `label` names it in messages: "the cell of exercise 1", "extra cell 7".
    """

    source: str
    exercise: str | None
    label: str


@dataclass(frozen=True)
class Work:
    """What a student handed in for a plan: code in order, answers by grade_id, and remarks in words.

    `places` says, for each check, after how many of the parts it runs.
    """

    parts: tuple[Part, ...]
    answers: dict[str, str]
    remarks: tuple[str, ...]
    places: dict[str, int]


def plan(lesson: Lesson, *, hidden: bool = True) -> Plan:
    """The plan of `lesson`, from its stored notebook; with `hidden` false its checks are those that
    a student sees.

    Raises FileNotFoundError where the notebook is not built, ValueError where a check belongs to no
    exercise before it.
    """
    import nbformat

    if not lesson.notebook.is_file():
        raise FileNotFoundError(
            f"{lesson.notebook} is not there: make it with `pruning101 build {lesson.name}`."
        )
    whole = nbformat.read(lesson.notebook, as_version=4)
    handed_out = student(whole).cells
    given: list[Given] = []
    setup: list[str] = []
    written: list[Written] = []
    exercises: dict[str, Exercise] = {}
    told: list[str] = []  # the Markdown cells since the last cell of code
    for ours, theirs in zip(whole.cells, handed_out, strict=True):
        graded = ours.metadata.get("nbgrader", {})
        grade_id, points = graded.get("grade_id", ""), float(graded.get("points", 0))
        source = ours.source if hidden else theirs.source
        role = "lesson"
        if "setup" in ours.metadata.get("tags", []):
            role = "setup"
            setup.append(ours.source)
        elif graded.get("grade") and graded.get("solution"):
            role = "written"
            written.append(Written(grade_id, _title([*told, theirs.source], grade_id), points))
        elif graded.get("solution"):
            role = "exercise"
            hints = tuple(" ".join(hint.split()) for text in told for hint in _HINT.findall(text))
            names = defined(ours.source)
            exercises[grade_id] = Exercise(grade_id, _title(told, grade_id), names, (), hints)
        elif graded.get("grade"):
            role = "check"
            _add(exercises, Check(grade_id, points, source), lesson)
        given.append(Given(ours.get("id", ""), theirs.cell_type, theirs.source, role, grade_id))
        told = [*told, theirs.source] if theirs.cell_type == "markdown" else []
    made = Plan(
        lesson.name, tuple(setup), tuple(exercises.values()), tuple(written), "", tuple(given)
    )
    text = json.dumps(asdict(made), sort_keys=True)
    return replace(made, digest=hashlib.sha256(text.encode()).hexdigest())


def overlay(plan: Plan, notebook: Any) -> Work:
    """Lay a student's notebook over `plan`: the student's code and answers, with remarks on what was
    not as it was handed out.
    """
    raise NotImplementedError


def items(plan: Plan, work: Work) -> list[Part | Check]:
    """The student's cells and the instructor's checks in the order in which they run."""
    after: dict[int, list[Check]] = {}
    for exercise in plan.exercises:
        for check in exercise.checks:
            after.setdefault(work.places[check.grade_id], []).append(check)
    order: list[Part | Check] = [*after.get(0, [])]
    for count, part in enumerate(work.parts, start=1):
        order += [part, *after.get(count, [])]
    return order


def _add(exercises: dict[str, Exercise], check: Check, lesson: Lesson) -> None:
    name = check.grade_id.split("-check")[0]
    if name not in exercises:
        raise ValueError(
            f"{lesson.name}: the check {check.grade_id!r} stands before its exercise, or there is no "
            f"exercise {name!r}."
        )
    old = exercises[name]
    exercises[name] = Exercise(name, old.title, old.names, (*old.checks, check), old.hints)


def _title(told: list[str], otherwise: str) -> str:
    """The last heading in some Markdown cells, as words."""
    headings = [heading for text in told for heading in _HEADING.findall(text)]
    return headings[-1] if headings else otherwise
