"""The instructor's side of grading, read from a lesson's stored notebook: its set-up, its exercises
with their checks, its answers in words, and every cell as it was handed out.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

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
    """A cell of the student version, as it was handed out.

    `role` is setup, exercise, check, written or lesson.
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


def _add(exercises: dict[str, Exercise], check: Check, lesson: Lesson) -> None:
    name = check.grade_id.split("-check")[0]
    if name not in exercises:
        raise ValueError(
            f"{lesson.name}: there is no exercise {name!r} before the check {check.grade_id!r}."
        )
    old = exercises[name]
    exercises[name] = Exercise(name, old.title, old.names, (*old.checks, check), old.hints)


def _title(told: list[str], otherwise: str) -> str:
    """The last heading in some Markdown cells, as words."""
    headings = [heading for text in told for heading in _HEADING.findall(text)]
    return headings[-1] if headings else otherwise
