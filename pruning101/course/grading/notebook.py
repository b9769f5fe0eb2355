"""Reads what claims to be a notebook and may be anything: only its cells' sources and marks are
kept.

A notebook holds outputs of megabytes; grading needs none of them, and what it does not keep cannot
harm it. Whatever is wrong raises ValueError with a sentence for whoever handed it in.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from .plan import Plan
from .source import LONGEST, defines

LARGEST = 20_000_000  # bytes of a file
LINK = "It is a symbolic link, which is not followed: hand in the file itself."
MOST_CELLS = 2_000
MOST_BRACKETS = 500_000  # opened in the file: each becomes an object in memory
_IMAGE = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,[A-Za-z0-9+/=]*")  # pasted into a text cell


def opened(path: Path) -> IO[bytes]:
    """The file at `path`, open for reading.

    Raises ValueError where it is no ordinary file (links, devices and pipes are not opened) or
    cannot be read.
    """
    unusual = kind_of(path)
    if unusual:
        raise ValueError(unusual)
    # Should another file have taken its place by now, it is neither followed nor waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as error:
        raise ValueError(f"It could not be read ({error.strerror}): hand it in again.") from None


def kind_of(path: Path) -> str:
    """A sentence on what is at `path`, where that is no ordinary file; else empty."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return LINK
    return "" if stat.S_ISREG(mode) else "It is no ordinary file, so it was not opened."


def content_of(path: Path) -> bytes:
    """The bytes of the file at `path`; raises ValueError as `opened` does, or if too large."""
    with opened(path) as file:
        content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(too_large(os.fstat(file.fileno()).st_size))
    return content


def too_large(size: int) -> str:
    """The sentence about a file of `size` bytes."""
    return (
        f"It has {size / 1e6:,.0f} MB, and no more than {LARGEST / 1e6:.0f} are read: clear the "
        "notebook's outputs and hand it in again."
    )


def slim(content: bytes) -> dict[str, Any]:
    """The notebook in `content`, in format 4, with its cells' types, sources, ids and marks only.

    Raises ValueError where it is no notebook that can be graded.
    """
    found = _json(content)
    if not isinstance(found, dict) or not isinstance(found.get("nbformat"), int):
        raise ValueError("It is no notebook, though its name says so: hand in the .ipynb itself.")
    version = found["nbformat"]
    if version > 4:
        raise ValueError(
            f"It is a notebook of format {version}; formats up to 4 are read: save it in format 4."
        )
    if version < 4:
        found = _upgraded(found)
    cells = found.get("cells")
    if not isinstance(cells, list):
        raise ValueError("It is a notebook without a list of cells: save it again in Jupyter.")
    if len(cells) > MOST_CELLS:
        raise ValueError(
            f"It has {len(cells):,} cells, and no more than {MOST_CELLS:,} are read: delete those "
            "that are not yours or the lesson's."
        )
    kept = [_cell(cell, number) for number, cell in enumerate(cells, start=1)]
    characters = sum(len(cell["source"]) for cell in kept)
    if characters > LONGEST:
        raise ValueError(
            f"Its cells hold {characters:,} characters, and no more than {LONGEST:,} are read: "
            "keep data in a file, not in a cell."
        )
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": kept}


def lesson_of(notebook: dict[str, Any], names: Sequence[str], plans: Sequence[Plan]) -> str | None:
    """The lesson that a notebook belongs to: by its cells' grade_ids, else by what the file and its
    folders are called (`names`, the nearest first), else by what its cells define; None if by
    nothing.
    """
    marks = [cell["metadata"].get("nbgrader", {}).get("grade_id") for cell in notebook["cells"]]
    by_mark = {
        each.lesson: len(set(marks) & {given.grade_id for given in each.given if given.grade_id})
        for each in plans
    }
    best = max(by_mark.values(), default=0)
    likely = [name for name, count in by_mark.items() if count == best]
    for name in names:
        called = [lesson for lesson in likely if is_called(name, lesson)]
        if called:
            return called[0]
    if best:
        return likely[0]
    by_code: dict[str, int] = {}
    for each in plans:
        wanted = {name for exercise in each.exercises for name in exercise.names}
        sources = [cell["source"] for cell in notebook["cells"]]
        by_code[each.lesson] = len({n for source in sources for n in defines(source, wanted)})
    best = max(by_code.values(), default=0)
    return next((name for name, count in by_code.items() if count == best), None) if best else None


def is_called(name: str, lesson: str) -> bool:
    """Whether the name of a file or folder names a lesson: "03_magnitude (1)", "anna-magnitude",
    "3".
    """
    name, topic = name.lower().replace("-", "_"), lesson.partition("_")[2]
    number = str(int(lesson[:2]))
    return topic in name or re.fullmatch(rf"(?:lesson|week)?[ _]*0?{number}", name) is not None


def _json(content: bytes) -> Any:
    if not content.strip(b"\0 \t\r\n"):
        raise ValueError("It is empty: hand in the saved notebook.")
    if content.startswith(b"PK\x03\x04"):
        raise ValueError("It is a zip archive, not a notebook: hand in what is in it.")
    if content.count(b"{") + content.count(b"[") > MOST_BRACKETS:
        raise ValueError(
            "It has too many parts to be read: clear its outputs and hand it in again."
        )
    try:
        return json.loads(content)  # in UTF-8, 16 or 32, with a mark at the start or without
    except UnicodeDecodeError:
        raise ValueError("It is no text, so no notebook: hand in the .ipynb itself.") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"It is damaged: not valid JSON{where}; save it again in Jupyter and hand it in."
        ) from None


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """A notebook of an older format in format 4."""
    import nbformat

    try:
        return dict(nbformat.convert(nbformat.from_dict(found), 4))
    except Exception:  # a converter trusts its input, which nobody should
        raise ValueError(
            f"It is a notebook of format {found['nbformat']} that could not be converted: open it "
            "in Jupyter, save it, and hand it in again."
        ) from None


def _cell(cell: Any, number: int) -> dict[str, Any]:
    """A cell with what grading needs of it."""
    wrong = ValueError(f"Its cell {number} is no notebook cell: save it again in Jupyter.")
    if not isinstance(cell, dict):
        raise wrong
    kind, source = cell.get("cell_type"), cell.get("source", "")
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str) or kind not in ("code", "markdown", "raw"):
        raise wrong
    if kind != "code":
        source = _IMAGE.sub("(image)", source)
    kept: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": _text(source)}
    metadata = cell.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    graded = metadata.get("nbgrader")
    grade_id = graded.get("grade_id") if isinstance(graded, dict) else None
    if isinstance(grade_id, str):
        kept["metadata"]["nbgrader"] = {"grade_id": _text(grade_id)}
    if isinstance(metadata.get("tags"), list):
        kept["metadata"]["tags"] = [_text(x) for x in metadata["tags"] if isinstance(x, str)]
    for cell_id in (cell.get("id"), metadata.get("id")):  # Colab has kept it in the metadata
        if isinstance(cell_id, str):
            kept.setdefault("id", _text(cell_id))
    if kind == "code":
        kept |= {"outputs": [], "execution_count": None}
    return kept


def _text(text: str) -> str:
    """`text` as it can be written again: half a surrogate pair, which JSON allows, cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
