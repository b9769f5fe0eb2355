"""Student versions: a lesson's notebook with its solutions, hidden tests and outputs taken out and
its checks locked; and a manifest of what they are worth.

The rules are those of nbgrader's `generate_assignment`, so that either tool makes the same cells
from the same notebook.
"""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from .execute import first_line, write
from .material import Lesson

CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"
FOLDED = "hide-input"  # the tag of a cell whose source is folded away
MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
# What a student version may carry beside sources: all else might tell something of the solution.
_OF_NOTEBOOK = {"kernelspec", "language_info"}
_OF_CELL = {"tags", "nbgrader", "mystnb", "jupyter", "deletable", "editable"}
_OF_GRADED = {"schema_version", "grade_id", "grade", "solution", "locked", "task", "points"}


def student(notebook: Any, *, code_stub: str = CODE_STUB) -> Any:
    """The student version of a lesson's notebook; `code_stub` stands where solutions stood.

    Raises ValueError where a marker is unmatched or stands in a cell whose metadata does not say
    what it is: a solution would otherwise be handed out.
    """
    notebook = copy.deepcopy(notebook)
    _keep(notebook.metadata, _OF_NOTEBOOK)
    for cell in notebook.cells:
        _keep(cell.metadata, _OF_CELL)
        graded = cell.metadata.get("nbgrader", {})
        _keep(graded, _OF_GRADED)
        solution, check = graded.get("solution", False), graded.get("grade", False)
        stub = code_stub if cell.cell_type == "code" else TEXT_STUB
        replaced = _replace(cell, "SOLUTION", stub, allowed=solution)
        if solution:
            cell.metadata.pop("jupyter", None)
            cell.metadata.pop("mystnb", None)  # the words for the solution's figure
            cell.pop("attachments", None)
            if FOLDED in cell.metadata.get("tags", []):
                cell.metadata["tags"] = [tag for tag in cell.metadata["tags"] if tag != FOLDED]
            if not replaced:
                cell.source = stub
        _replace(cell, "HIDDEN TESTS", None, allowed=check)
        if solution or check or graded.get("locked", False):
            cell.metadata["deletable"] = False
            if not solution:
                cell.metadata["editable"] = False
            graded["cell_type"] = cell.cell_type
            graded["checksum"] = _checksum(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def assign(lessons: Sequence[Lesson], folder: Path) -> list[Path]:
    """Write the student versions of `lessons`, and the manifest, into `folder`; return the paths of
    the student versions.

    A manifest of earlier calls keeps its other lessons. Raises FileExistsError where another file
    of such a name is there, for it may hold a student's work, and FileNotFoundError where a lesson
    is not built; nothing is written then.
    """
    import nbformat

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder with --to.")
    texts: dict[Path, str] = {}
    entries: dict[str, Any] = {}
    for lesson in lessons:
        entry = _entry(lesson)  # says so where the lesson is not built
        text = nbformat.writes(student(nbformat.read(lesson.notebook, as_version=4))) + "\n"
        path = folder / lesson.exercises.name
        if path.is_dir() or (path.exists() and path.read_bytes() != text.encode()):
            raise FileExistsError(
                f"{path} is there already and differs: move it away, or name another folder with "
                "--to."
            )
        texts[path] = text
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries[lesson.name] = {"file": path.name, "sha256": digest, **entry}
    kept = _manifest(folder / MANIFEST)
    merged = {"format": FORMAT, "pruning101": __version__}
    merged["lessons"] = dict(sorted({**kept, **entries}.items()))
    for path, text in texts.items():
        write(path, text)
    write(folder / MANIFEST, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    return list(texts)


def _entry(lesson: Lesson) -> dict[str, Any]:
    """What the manifest says of a lesson: its title, and what each of its exercises is worth."""
    from .grading.plan import plan  # a plan is made with `student`

    made = plan(lesson)
    text = next((cell.source for cell in made.given if cell.cell_type == "markdown"), "")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    exercises = []
    for exercise in made.exercises:
        checks = [{"grade_id": check.grade_id, "points": check.points} for check in exercise.checks]
        points = sum(check.points for check in exercise.checks)
        head = {"grade_id": exercise.grade_id, "title": exercise.title, "points": points}
        exercises.append({**head, "checks": checks})
    total = sum(check.points for exercise in made.exercises for check in exercise.checks)
    return {
        "title": title.group(1).strip() if title else lesson.name,
        "points": total + sum(answer.points for answer in made.written),
        "exercises": exercises,
        "written": [asdict(answer) for answer in made.written],
    }


def _manifest(path: Path) -> dict[str, Any]:
    """The lessons of the manifest at `path`; none where there is no manifest.

    Raises FileExistsError where the file is no manifest that this version can add to.
    """
    try:
        found = json.loads(path.read_bytes())
        if found["format"] == FORMAT:
            return dict(found["lessons"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FileExistsError(
        f"{path} is there already and no manifest of format {FORMAT}: move it away, or name "
        "another folder with --to."
    )


def _keep(metadata: Any, keys: set[str]) -> None:
    """Take all but `keys` out of some metadata, in place."""
    for key in set(metadata) - keys:
        del metadata[key]


def _replace(cell: Any, what: str, stub: str | None, *, allowed: bool) -> bool:
    """Put `stub`, indented as the marker is, in place of each region `BEGIN what` ... `END what` of
    the cell.
    """
    lines: list[str] = []
    inside = found = False
    for line in cell.source.split("\n"):
        if f"BEGIN {what}" in line:
            if inside or not allowed:
                wrong = (
                    "is begun twice"
                    if inside
                    else "stands in a cell whose nbgrader metadata does not allow it"
                )
                raise ValueError(
                    f"A region `{what}` {wrong}: the cell that begins `{first_line(cell.source)}`."
                )
            inside = found = True
            if stub is not None:
                indent = re.match(r"\s*", line)
                lines += [(indent.group() if indent else "") + part for part in stub.split("\n")]
        elif f"END {what}" in line:
            inside = False
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(
            f"A region `{what}` has no end: the cell that begins `{first_line(cell.source)}`."
        )
    cell.source = "\n".join(lines)
    return found


def _checksum(cell: Any) -> str:
    """The checksum by which nbgrader tells whether a student changed a cell."""
    graded = cell.metadata["nbgrader"]
    flags = [str(bool(graded.get(flag, False))) for flag in ("grade", "solution")]
    # nbgrader counts a solution as unlocked, and a check as locked, whatever the flag says.
    locked = not graded.get("solution", False) and (
        graded.get("grade", False) or graded.get("locked", False)
    )
    parts = [cell.source, cell.cell_type, *flags, str(locked), graded["grade_id"]]
    if graded.get("grade", False):
        parts.append(str(float(graded["points"])))
    return hashlib.md5("".join(parts).encode("utf-8"), usedforsecurity=False).hexdigest()
