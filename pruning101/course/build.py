"""Makes the notebooks from the lessons: the executed pair, the student version and the index, the
same bytes each time.

A lesson's header, the Markdown before its first code cell, says in any order and layout `reading:
30 minutes`, `compute: about ? minutes`, `before: ...` and `paper: ...` (each up to the next `·` or
blank line). The compute minutes are measured here and written into the source, but only when they
moved by more than one step of half a minute. The links to Colab and Binder are put below the title.
"""

import copy
import itertools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import links
from .assign import FOLDED, student
from .execute import clean, execute, first_line, write
from .material import Lesson, lessons

FILTER = "tags,nbgrader,mystnb,-all"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_COMPUTE = re.compile(
    r"(\bcompute\**:\**\s+about\s+)(half a minute|[\d.?]+ minutes?)", re.IGNORECASE
)
_READING = re.compile(r"\breading\**:\**\s+(?:about\s+)?(\d+)\s+min", re.IGNORECASE)
_TO_THE_DOT = r"\**:\**\s+(.+?)\s*(?=·|\n\s*\n|\Z)"
_BEFORE = re.compile(r"\bbefore" + _TO_THE_DOT, re.IGNORECASE | re.DOTALL)
_PAPER = re.compile(r"\bpapers?" + _TO_THE_DOT, re.IGNORECASE | re.DOTALL)
_NBGRADER = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}


@dataclass(frozen=True)
class Header:
    """What a lesson says of itself before its first code cell."""

    title: str
    reading: str
    compute: str
    before: str
    paper: str


def build(lesson: Lesson) -> list[str]:
    """Execute `lesson` on its quick profile and write its notebook, its student version and its row
    in the index.

    Nothing is written unless every cell ran. Returns remarks for the author (cells that wrote to
    stderr). Raises ValueError where the source is not made as a lesson must be, and CellFailed
    where a cell raises.
    """
    if not lesson.number:
        refresh_index(lesson.root)
        return []
    text = lesson.source.read_text(encoding="utf-8")
    notebook = pair(text, lesson)
    with tempfile.TemporaryDirectory(prefix="pruning101-") as folder:
        seconds = execute(notebook, folder=Path(folder), label=lesson.name)
    remarks = clean(notebook)
    faults = unfit(notebook)
    if faults:
        raise ValueError(f"{lesson.name}: {'; '.join(faults)}.")
    timed = with_minutes(text, seconds)
    if timed != text:
        for cell, fresh in zip(notebook.cells, pair(timed, lesson).cells, strict=True):
            cell.source = fresh.source
    exercises = _dump(student(notebook))
    if lesson.source.read_text(encoding="utf-8") != text:
        raise ValueError(f"{lesson.source} was edited while it was executed: build it again.")
    if timed != text:
        write(lesson.source, timed)
    write(lesson.exercises, exercises)
    write(lesson.notebook, _dump(notebook))
    refresh_index(lesson.root)
    return remarks


def reword(lesson: Lesson) -> None:
    """Make the notebooks of `lesson` again without executing anything: texts, metadata and links
    from the source, outputs from the stored notebook.

    Raises ValueError where a code cell is not the one that the outputs come from; nothing is
    written then.
    """
    import nbformat

    if lesson.number:
        notebook = pair(lesson.source.read_text(encoding="utf-8"), lesson)
        stored = nbformat.read(lesson.notebook, as_version=4)
        executed = [cell for cell in stored.cells if cell.cell_type == "code"]
        fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for cell, old in itertools.zip_longest(fresh, executed):
            if cell is None or old is None or cell.source != old.source:
                where = f"the cell that begins `{first_line((cell or old).source)}`"
                raise ValueError(
                    f"{lesson.name}: {where} is not as it was executed: make the lesson with "
                    f"`pruning101 build {lesson.name}`."
                )
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
        faults = unfit(notebook)
        if faults:
            raise ValueError(f"{lesson.name}: {'; '.join(faults)}.")
        exercises = _dump(student(notebook))
        write(lesson.exercises, exercises)
        write(lesson.notebook, _dump(notebook))
    refresh_index(lesson.root)


def check(lesson: Lesson) -> list[str]:
    """Say, without executing anything, in what the written notebooks of `lesson` differ from its
    source; empty if in nothing.
    """
    import nbformat

    name = lesson.name
    try:
        text = lesson.source.read_text(encoding="utf-8")
        wanted = pair(text, lesson)
        stored = nbformat.read(lesson.notebook, as_version=4)
        kept = lesson.exercises.read_text(encoding="utf-8") if lesson.number else ""
    except (ValueError, OSError) as error:
        return [str(error)]
    faults = []
    if stored.metadata != wanted.metadata:
        faults.append("the notebook's own metadata is not what `build` writes")
    if len(stored.cells) != len(wanted.cells):
        faults.append(
            f"{len(stored.cells)} cells in the notebook, {len(wanted.cells)} in the source"
        )
    for index, (ours, theirs) in enumerate(zip(wanted.cells, stored.cells, strict=False)):
        for part in ("cell_type", "source", "metadata", "id"):
            if ours.get(part) != theirs.get(part):
                faults.append(f"cell {index} (`{first_line(ours.source)}`) differs in its {part}")
    faults += unfit(stored)
    if lesson.number and kept != _dump(student(stored)):
        faults.append("the student version is not the one made from the notebook")
    if not lesson.number and with_rows(text, lesson.root) != text:
        faults.append("its rows are not those of the lessons' headers")
    return [f"{name}: {fault}" for fault in faults]


def pair(text: str, lesson: Lesson) -> Any:
    """The notebook of a lesson's source `text`, not executed: ids by position, minimal metadata,
    solutions folded away.
    """
    try:
        import jupytext
    except ImportError:
        raise ModuleNotFoundError(
            "Building lessons needs jupytext: install it with `pip install 'pruning101[build]'`."
        ) from None
    told = re.search(r"^# +cell_metadata_filter: *(\S+)$", text, re.MULTILINE)
    if told is None or told.group(1).strip("'\"") != FILTER:
        raise ValueError(
            f"{lesson.name}: the jupytext header must set cell_metadata_filter to {FILTER!r}."
        )
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = copy.deepcopy(KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    prefix = lesson.number or lesson.name
    seen: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{prefix}-{index:03d}"
        _check_metadata(cell, lesson, seen)
        solution = (
            cell.metadata.get("nbgrader", {}).get("solution", False) and cell.cell_type == "code"
        )
        tags = cell.metadata.get("tags", [])
        if solution and FOLDED not in tags:
            cell.metadata["tags"] = tags = [*tags, FOLDED]
        if FOLDED in tags:
            cell.metadata["jupyter"] = {"source_hidden": True}
    if lesson.number:
        header(notebook, lesson)
    title = re.compile(r"^# .+$", re.MULTILINE)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and title.search(cell.source):
            cell.source = title.sub(rf"\g<0>\n\n{links.line(lesson)}", cell.source, count=1)
            break
    return notebook


def header(notebook: Any, lesson: Lesson) -> Header:
    """Read the header of a lesson's notebook; raises ValueError, naming what it lacks."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            break
        cells.append(cell.source)
    text = "\n\n".join(cells)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    patterns = [_READING, _COMPUTE, _BEFORE, _PAPER]
    found = [title, *(pattern.search(text) for pattern in patterns)]
    wanted = ["# Title", "reading: 30 minutes", "compute: about ? minutes"]
    wanted += ["before: ...", "paper: ..."]
    lacking = [f"`{want}`" for want, match in zip(wanted, found, strict=True) if match is None]
    if lacking:
        raise ValueError(
            f"{lesson.name}: before its first code cell the source lacks {' and '.join(lacking)}."
        )
    groups = [1, 1, 2, 1, 1]
    return Header(
        *(" ".join(match.group(g).split()) for match, g in zip(found, groups, strict=True) if match)
    )


def with_minutes(text: str, seconds: float) -> str:
    """The source `text` with the measured `seconds` in its header, if they are more than one
    half-minute step off.
    """
    match = _COMPUTE.search(text)
    if match is None:
        return text
    steps, written = max(1, round(seconds / 30)), match.group(2)
    if "half" in written.lower():
        told = 1.0
    else:
        told = float("inf") if "?" in written else 2 * float(written.split()[0])
    if abs(told - steps) <= 1:
        return text
    minutes = {1: "half a minute", 2: "1 minute"}.get(steps, f"{steps / 2:g} minutes")
    return text[: match.start(2)] + minutes + text[match.end(2) :]


def unfit(notebook: Any) -> list[str]:
    """What keeps an executed notebook from being stored: cells not executed, errors, widgets,
    figures without words.
    """
    faults, count = [], 0
    if "widgets" in notebook.metadata:
        faults.append("widget models are stored")
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        count += 1
        name = f"the cell that begins `{first_line(cell.source)}`"
        if cell.execution_count != count:
            faults.append(f"{name} has execution count {cell.execution_count} instead of {count}")
        if cell.metadata.get("nbgrader", {}).get("grade") and cell.outputs:
            faults.append(f"{name} is a check and must not show anything")
        for output in cell.outputs:
            kinds = set(output.get("data", {}))
            if output.output_type == "error":
                faults.append(f"{name} shows an error")
            if output.output_type == "stream" and output.name == "stderr":
                faults.append(f"{name} shows stderr")
            other = sorted(
                k for k in kinds if "widget" in k or (k.startswith("image/") and k != "image/png")
            )
            if other:
                faults.append(f"{name} stores {' and '.join(other)}; a figure is stored as PNG")
            if (
                "image/png" in kinds
                and not cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip()
            ):
                faults.append(f"{name} shows a figure without alt text (metadata mystnb.image.alt)")
    return faults


def refresh_index(root: Path) -> None:
    """Bring the rows of `lessons/index.py`, and its notebook, in step with the lessons' headers."""
    index = Lesson("index", root)
    if not index.source.is_file():
        return
    text = index.source.read_text(encoding="utf-8")
    fresh = with_rows(text, root)
    if fresh != text:
        write(index.source, fresh)
    write(index.notebook, _dump(pair(fresh, index)))


def with_rows(text: str, root: Path) -> str:
    """The index's source with a row made from the header of each lesson that is there.

    Rows begin with `| 04 |`; those of lessons that are not there stay as they are.
    """
    lines = text.split("\n")
    for lesson in lessons(root):
        if not (lesson.source.is_file() and lesson.notebook.is_file()):
            continue
        try:
            head = header(pair(lesson.source.read_text(encoding="utf-8"), lesson), lesson)
        except ValueError:
            continue  # still being written: its own build and check say what is wrong with it
        row = (
            f"# | {lesson.number} | [{head.title}]({lesson.name}.ipynb)"
            f" ([exercises](exercises/{lesson.name}.ipynb)) | {head.paper}"
            f" | {head.reading} min | {head.compute} | {head.before} |"
        )
        numbers = [re.match(r"# \| (\d\d) \|", line) for line in lines]
        rows = {match.group(1): at for at, match in enumerate(numbers) if match}
        if lesson.number in rows:
            lines[rows[lesson.number]] = row
        elif rows:
            before = [at for number, at in rows.items() if number < lesson.number]
            lines.insert(max(before) + 1 if before else min(rows.values()), row)
    return "\n".join(lines)


def _check_metadata(cell: Any, lesson: Lesson, seen: set[str]) -> None:
    name = f"{lesson.name}: the cell that begins `{first_line(cell.source)}`"
    cell.metadata.pop("lines_to_next_cell", None)  # jupytext's note on blank lines in the source
    other = sorted(set(cell.metadata) - {"tags", "nbgrader", "mystnb"})
    if other:
        raise ValueError(
            f"{name} has metadata {', '.join(other)}; only tags, nbgrader and mystnb are kept."
        )
    graded = cell.metadata.get("nbgrader")
    if graded is None:
        return
    lacking = sorted(_NBGRADER - set(graded)) + (
        ["points"] if graded.get("grade") and "points" not in graded else []
    )
    if lacking or graded["schema_version"] != 3:
        raise ValueError(
            f"{name} has nbgrader metadata that lacks {', '.join(lacking) or 'schema_version 3'}."
        )
    if graded["grade_id"] in seen:
        raise ValueError(f"{name} has the grade_id {graded['grade_id']!r} of another cell.")
    seen.add(graded["grade_id"])


def _dump(notebook: Any) -> str:
    import nbformat

    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"
