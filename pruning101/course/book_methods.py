"""The book's page of all methods side by side: from the tables in the lessons' recaps, what
`book/methods.toml` adds to them, and the figures in `results/`.
"""

import json
import re
import statistics
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RECAP = re.compile(r"^\| *method *\| *removes *\|.*\n\|[ |:-]+\|\n((?:\|.*\n?)+)", re.MULTILINE)
_NOT_YET = "not told yet"


@dataclass(frozen=True)
class Method:
    """A row of the recaps' table, and the lesson in which it came in."""

    name: str
    removes: str
    score: str
    looks_at_data: str
    really_smaller: str
    lesson: str


def methods(texts: Mapping[str, str]) -> list[Method]:
    """The methods of the course, as its lessons' recaps list them.

    `texts` holds each lesson's Markdown by its name, in the order of the course. A method belongs
    to the first lesson that lists it, and reads as the last one has it. Raises ValueError where a
    row has other columns than the five.
    """
    found: dict[str, Method] = {}
    for lesson, text in texts.items():
        for table in _RECAP.finditer(text):
            for line in table[1].strip().splitlines():
                cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
                if len(cells) != 5:
                    raise ValueError(
                        f"{lesson}: the recap's row of {cells[0]!r} has {len(cells)} columns in "
                        "place of method, removes, score, looks at data and makes it really "
                        "smaller."
                    )
                name, removes, score, data, smaller = cells
                first = found[name].lesson if name in found else lesson
                found[name] = Method(name, removes, score, data, smaller, first)
    return list(found.values())


def page_parts(texts: Mapping[str, str], added: Path, results: Path) -> dict[str, str]:
    """The page's three tables, in MyST Markdown: what the methods do, what they gave, and where
    they stand.

    `added` is `methods.toml` and `results` the folder with the JSON files. Raises ValueError where
    `added` names a method that no lesson lists, or a place that is not in the results.
    """
    rows = methods(texts)
    more = tomllib.loads(added.read_text(encoding="utf-8"))
    unknown = sorted(set(more) - {row.name for row in rows})
    if unknown:
        raise ValueError(f"{added.name}: no lesson's recap lists the method {unknown[0]!r}.")
    what = ["method", "removes", "score", "looks at data", "trains again", "really smaller"]
    says, gave, where = [what], [["method", "in our runs"]], [["method", "lesson"]]
    where[0] += ["function", "papers"]
    for row in rows:
        extra = more.get(row.name, {})
        again = extra.get("trains_again", _NOT_YET)
        says.append(
            [row.name, row.removes, row.score, row.looks_at_data, again, row.really_smaller]
        )
        if "measured" in extra:
            file = results / f"{extra['results']}.json"
            given = json.loads(file.read_text(encoding="utf-8"))
            text = filled(extra["measured"], given, f"{added.name}, {row.name}")
            text = re.sub(r"(\d) ?%", "\\1\N{NO-BREAK SPACE}%", text)
            gave.append([row.name, f"{text} (`results/{file.name}`)"])
        calls = "<br>".join(f"{{py:obj}}`~{name}`" for name in extra.get("calls", []))
        papers = ", ".join(f"{{cite:t}}`{key}`" for key in extra.get("papers", []))
        lesson = f"{{doc}}`/notebooks/{row.lesson}`"
        where.append([row.name, lesson, calls or _NOT_YET, papers or _NOT_YET])
    return {"methods": _table(says), "measured": _table(gave), "where": _table(where)}


def filled(template: str, given: Any, name: str) -> str:
    """`template` with each `{place:format}` replaced by what is at that place of `given`.

    Raises ValueError, with `name` in its message, where there is no such place.
    """
    parts = []
    for literal, place, form, _ in string.Formatter().parse(template):
        parts.append(literal)
        if place is None:
            continue
        try:
            parts.append(format(_at(given, place.split("/")), form or ""))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: the results have no figure at {place!r} ({error})."
            ) from None
    return "".join(parts)


def _at(value: Any, place: Sequence[str]) -> Any:
    """What is at `place` of `value`; the signs are explained at the top of `methods.toml`."""
    if not place:
        if isinstance(value, dict | list):
            raise ValueError("it is no single figure")
        return value
    step, rest = place[0], place[1:]
    if not isinstance(value, list):
        return _at(value[step], rest)
    if step == "#":
        return len(value)
    if step == "*":
        return statistics.fmean(_at(item, rest) for item in value)
    if "=" in step:
        key, wanted = step.split("=")
        return _at([item for item in value if str(item[key]) == wanted], rest)
    return _at(value[int(step)], rest)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| " + " | ".join("---" for _ in rows[0]) + " |", *body]) + "\n"
