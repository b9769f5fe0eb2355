"""What comes out of grading: the gradebook, a page of feedback a submission, a summary page, and
all of it for other programs. The same results give the same bytes.

`results.json` holds `pruning101` (the version), `lessons` and `submissions`. A lesson has `name`,
`maximum` (the points of its checks), `exercises` (each `grade_id`, `title`, and its `checks`, each
`grade_id` and `points`) and `written` (what is marked by hand: `grade_id`, `title`, `points`).
A submission has

- `key` (the name of its feedback page), `student`, `source` (its file), `lesson` (or null), `late`;
- `problem`: why nothing in it can be graded, or null; `failure`: why grading it did not work, or
  null;
- `points` and `maximum` of its checks: 0 points where there is a problem, null where there is a
  failure; `maximum` is null where the lesson is not known;
- `checks`: by grade_id, `passed`, `points`, `maximum`, `message`;
- `failed_cells`: what did not run of the student's own cells, each `label` and `message`;
- `written`: by grade_id, `maximum` and `answered` (whether there is anything to mark);
- `remarks`: sentences on what was noticed in the notebook.
"""

import csv
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...core.files import write_json, written_whole
from .plan import Check, Exercise, Plan

COMMONEST = 10  # how many messages the summary shows of a lesson
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet may take for the beginning of a formula


@dataclass(frozen=True)
class Result:
    """A submission and what became of it.

    `problem` says why nothing in it can be graded, `failure` why grading it did not work; with
    either there are no outcomes. An outcome is what the judge printed (`judge.Outcome`).
    """

    key: str
    student: str
    source: str
    lesson: str | None
    late: bool
    remarks: tuple[str, ...]
    problem: str | None = None
    failure: str | None = None
    outcomes: Sequence[Mapping[str, Any]] = ()
    answers: Mapping[str, str] | None = None


def write(out: Path, plans: Mapping[str, Plan], results: Iterable[Result]) -> None:
    """Write the reports of `results`, in their order, into the folder `out`.

    They are gone through one by one, so that they need not all be in memory. Pages of feedback that
    belong to none of them are removed.
    """
    feedback = _pages().get_template("feedback.html")
    rows, pages = [], set()
    for result in results:
        plan = plans.get(result.lesson or "")
        row = _row(result, plan)
        page = out / "feedback" / f"{result.key}.html"
        text = feedback.render(
            row=row,
            exercises=_exercises(plan, row) if plan else [],
            written=plan.written if plan else [],
            answers=result.answers or {},
        )
        _write(page, text)
        rows.append(row)
        pages.add(page)
    for page in (out / "feedback").glob("*.html"):
        if page not in pages:
            page.unlink()
    _write_gradebook(out / "gradebook.csv", list(plans.values()), rows)
    lessons = [_lesson(plan) for plan in plans.values()]
    content = {"pruning101": __version__, "lessons": lessons, "submissions": rows}
    write_json(out / "results.json", content)
    figures = [_figures(plan, rows) for plan in plans.values()]
    text = (
        _pages()
        .get_template("summary.html")
        .render(
            rows=rows,
            graded=sum(not _problems(row) for row in rows),
            to_mark=sum(answer["answered"] for row in rows for answer in row["written"].values()),
            problems=[(row, _problems(row)) for row in rows if _problems(row)],
            remarks=[(row, row["remarks"]) for row in rows if row["remarks"]],
            lessons=[lesson for lesson in figures if lesson["submissions"]],
        )
    )
    _write(out / "summary.html", text)


def _row(result: Result, plan: Plan | None) -> dict[str, Any]:
    """What `results.json` says of a submission."""
    by_id = {outcome["grade_id"]: outcome for outcome in result.outcomes}
    graded = result.problem is None and result.failure is None
    checks, written = {}, {}
    for check in _checks(plan) if plan and graded else []:
        outcome = by_id[check.grade_id]
        checks[check.grade_id] = {
            "passed": outcome["passed"],
            "points": check.points if outcome["passed"] else 0.0,
            "maximum": check.points,
            "message": outcome["message"],
        }
    for answer in plan.written if plan and graded else []:
        answered = bool((result.answers or {}).get(answer.grade_id, "").strip())
        written[answer.grade_id] = {"maximum": answer.points, "answered": answered}
    return {
        "key": result.key,
        "student": result.student,
        "source": result.source,
        "lesson": result.lesson,
        "late": result.late,
        "problem": result.problem,
        "failure": result.failure,
        "points": None if result.failure else sum(check["points"] for check in checks.values()),
        "maximum": sum(check.points for check in _checks(plan)) if plan else None,
        "checks": checks,
        "failed_cells": [
            {"label": outcome["label"], "message": outcome["message"]}
            for outcome in result.outcomes
            if outcome["grade_id"] is None
        ],
        "written": written,
        "remarks": list(result.remarks),
    }


def _checks(plan: Plan) -> Iterator[Check]:
    return (check for exercise in plan.exercises for check in exercise.checks)


def _exercises(plan: Plan, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The exercises of `plan` with what a submission's `row` says of their checks."""
    found = []
    for exercise in plan.exercises if row["checks"] else ():
        checks = [row["checks"][check.grade_id] for check in exercise.checks]
        found.append(
            {
                "title": exercise.title,
                "hints": exercise.hints,
                "checks": checks,
                "points": sum(check["points"] for check in checks),
                "maximum": sum(check["maximum"] for check in checks),
                "passed": all(check["passed"] for check in checks),
            }
        )
    return found


def _lesson(plan: Plan) -> dict[str, Any]:
    """What `results.json` says of a lesson."""
    return {
        "name": plan.lesson,
        "maximum": sum(check.points for check in _checks(plan)),
        "exercises": [
            {
                "grade_id": exercise.grade_id,
                "title": exercise.title,
                "checks": [
                    {"grade_id": check.grade_id, "points": check.points}
                    for check in exercise.checks
                ],
            }
            for exercise in plan.exercises
        ],
        "written": [
            {"grade_id": answer.grade_id, "title": answer.title, "points": answer.points}
            for answer in plan.written
        ],
    }


def _figures(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary says of a lesson: its points, each exercise's, and what failed most."""
    rows = [row for row in rows if row["lesson"] == plan.lesson and row["points"] is not None]
    points = [row["points"] for row in rows]
    failed = Counter(
        (at, message)
        for row in rows
        for at, exercise in enumerate(_exercises(plan, row))
        for message in {check["message"] for check in exercise["checks"] if not check["passed"]}
    )
    commonest = sorted(failed.items(), key=lambda item: (-item[1], item[0]))[:COMMONEST]
    return {
        "name": plan.lesson,
        "submissions": len(rows),
        "maximum": sum(check.points for check in _checks(plan)),
        "mean": statistics.mean(points) if points else None,
        "median": statistics.median(points) if points else None,
        "least": min(points, default=None),
        "greatest": max(points, default=None),
        "exercises": [_histogram(exercise, rows) for exercise in plan.exercises] if rows else [],
        "messages": [
            {
                "submissions": count,
                "exercise": plan.exercises[at].title,
                "message": message,
            }
            for (at, message), count in commonest
        ],
    }


def _histogram(exercise: Exercise, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many submissions have how many points in an exercise, for all that its checks can add up
    to.
    """
    possible = {0.0}
    for check in exercise.checks:
        possible |= {points + check.points for points in possible}
    count = Counter(
        sum(row["checks"][check.grade_id]["points"] for check in exercise.checks)
        if row["checks"]
        else 0.0
        for row in rows
    )
    return {
        "title": exercise.title,
        "maximum": max(possible),
        "mean": sum(points * n for points, n in count.items()) / len(rows),
        "counts": [{"points": points, "submissions": count[points]} for points in sorted(possible)],
    }


def _write_gradebook(path: Path, plans: Sequence[Plan], rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each student and lesson.

    A column of what is marked by hand is left free where there is an answer, and is 0 where there
    is none.
    """
    checks = list(dict.fromkeys(check.grade_id for plan in plans for check in _checks(plan)))
    written = {answer.grade_id: answer for plan in plans for answer in plan.written}
    by_hand = [f"{name} (by hand, of {_number(x.points)})" for name, x in written.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The mark at the beginning tells Excel that this is UTF-8; what is text stands in quotes, so
    # that a semicolon in a name begins no new cell where Excel separates by semicolons.
    with (
        written_whole(path) as part,
        part.open("w", encoding="utf-8-sig", errors="replace", newline="") as file,
    ):
        table = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        head = ["student", "lesson", "points", "maximum", *checks, *by_hand]
        table.writerow([*head, "late", "file", "remarks"])
        for row in rows:
            points = [row["checks"].get(name, {}).get("points") for name in checks]
            hand = [_to_mark(row["written"].get(name)) for name in written]
            total = [row["points"], row["maximum"]]
            figures = [_number(number) for number in (*total, *points, *hand)]
            names = [_defused(row["student"]), row["lesson"] or ""]
            late = "late" if row["late"] else ""
            remarks = _defused(" ".join([*_problems(row), *row["remarks"]]))
            table.writerow([*names, *figures, late, _defused(row["source"]), remarks])


def _to_mark(answer: Mapping[str, Any] | None) -> float | None:
    return None if answer is None or answer["answered"] else 0.0


def _defused(text: str) -> str:
    """`text` so that no spreadsheet takes it for a formula."""
    return "'" + text if text.lstrip(" ").startswith(FORMULA) else text


def _number(number: float | None) -> float | str:
    """A number without needless zeros; empty text where there is none."""
    if number is None:
        return ""
    return int(number) if float(number).is_integer() else round(number, 2)


def _counted(number: float, noun: str) -> str:
    return f"{_number(number)} {noun}{'' if number == 1 else 's'}"


def _problems(row: Mapping[str, Any]) -> list[str]:
    return [sentence for sentence in (row["failure"], row["problem"]) if sentence]


def _pages() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters |= {"number": _number, "counted": _counted}
    return pages


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name or a message may hold what has no UTF-8.
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
