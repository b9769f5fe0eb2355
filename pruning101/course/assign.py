"""Student versions: a lesson's notebook with its solutions, hidden tests and outputs taken out and
its checks locked.

The rules are those of nbgrader's `generate_assignment`, so that either tool makes the same cells
from the same notebook.
"""

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

from .execute import first_line, write
from .material import Lesson

CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"
FOLDED = "hide-input"  # the tag of a cell whose source is folded away


def student(notebook: Any, *, code_stub: str = CODE_STUB) -> Any:
    """The student version of a lesson's notebook; `code_stub` stands where solutions stood.

    Raises ValueError where a marker is unmatched or stands in a cell whose metadata does not say
    what it is: a solution would otherwise be handed out.
    """
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        graded = cell.metadata.get("nbgrader", {})
        solution, check = graded.get("solution", False), graded.get("grade", False)
        stub = code_stub if cell.cell_type == "code" else TEXT_STUB
        replaced = _replace(cell, "SOLUTION", stub, allowed=solution)
        if solution:
            cell.metadata.pop("jupyter", None)
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


def assign(lesson: Lesson, folder: Path) -> Path:
    """Write the student version of `lesson` into `folder` and return its path.

    Raises FileExistsError where another file of that name is there: it may hold a student's work.
    """
    import nbformat

    if not lesson.notebook.is_file():
        raise FileNotFoundError(
            f"{lesson.notebook} is not there: make it with `pruning101 build {lesson.name}`."
        )
    text = nbformat.writes(student(nbformat.read(lesson.notebook, as_version=4))) + "\n"
    path = folder / lesson.exercises.name
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{path} is there already and differs: move it away, or name another folder with --to."
        )
    write(path, text)
    return path


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
