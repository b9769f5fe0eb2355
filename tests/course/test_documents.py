"""The documents beside the code: what they name is there, and no lesson is missing in them."""

import contextlib
import io
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

import pruning101
from pruning101.course import build, cli, links, material
from pruning101.course.grading.sandbox import Limits

ROOT = Path(__file__).resolve().parents[2]
LESSONS = material.lessons(ROOT)
GUIDE = ROOT / "book" / "instructor.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("book/*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def title(lesson):
    return re.search(r"^# # (.+)$", lesson.source.read_text(), re.MULTILINE)[1]


def topic(lesson):
    return lesson.name.removeprefix(lesson.number + "_")


# --- every lesson is in every document ----------------------------------------------------------


@every_lesson
def test_nothing_of_a_lesson_is_still_to_be_written(lesson):
    files = [
        lesson.source,
        ROOT / "pruning101" / f"{topic(lesson)}.py",
        ROOT / "pruning101" / "widgets" / f"{topic(lesson)}.py",
        ROOT / "tests" / f"test_{topic(lesson)}.py",
        ROOT / "tests" / "course" / "mutations" / f"{lesson.name}.py",
    ]
    for path in files:
        lines = enumerate(path.read_text().splitlines(), start=1)
        assert [f"{path.name}:{n}: {line}" for n, line in lines if "To write:" in line] == []


@every_lesson
def test_a_lesson_has_its_row_in_the_readme(lesson):
    rows = re.findall(rf"^\| {int(lesson.number)} \| \[.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 1, "one row a lesson, by its number"
    assert f"(notebooks/{lesson.name}.ipynb)" in rows[0]
    assert f"`pruning101.{topic(lesson)}`" in rows[0]


@every_lesson
def test_a_lesson_has_its_row_in_the_index(lesson):
    index = (ROOT / "lessons" / "index.py").read_text()
    assert re.search(rf"^# \| {lesson.number} \| \[.+\]\({lesson.name}\.ipynb\)", index, re.M)


@every_lesson
def test_a_lesson_is_in_the_changelog(lesson):
    assert title(lesson) in " ".join((ROOT / "CHANGELOG.md").read_text().split())


@every_lesson
def test_the_references_of_a_lesson_are_in_the_bibliography(lesson):
    def plain(text):
        return re.sub(r"[^a-z0-9]", "", text.lower())

    bibliography = (ROOT / "lessons" / "references.bib").read_text()
    known = [plain(found) for found in re.findall(r"\btitle\s*=\s*\{(.+)\}", bibliography)]
    text = re.sub(r"\n# ?", " ", lesson.source.read_text().split("## References")[1])
    entries = re.split(r"(?:^| )- (?=[A-Z]\. )", text)[1:]
    assert entries, "each reference is a line `- A. Author, *Title*, where. What to read in it.`"
    for entry in entries:
        name = re.search(r"\*(.+?)\*", entry)[1]
        assert any(found.startswith(plain(name)) for found in known), name


# --- the guide ----------------------------------------------------------------------------------


@cache
def overview():
    """What the guide's first table must say, by lesson: minutes, exercises and points as the
    lessons state them.
    """
    return {lesson.name: _row(lesson) for lesson in LESSONS}


def _row(lesson):
    notebook = build.pair(lesson.source.read_text(), lesson)
    head, told, coded, written = build.header(notebook, lesson), {}, {}, 0
    for cell in notebook.cells:
        for text in re.split(r"^### ", cell.source, flags=re.MULTILINE)[1:]:
            form = r"Exercise (\d)\b.*?\b(easy|medium|hard)\b[ ,·]+(\d+) minutes([ ,·]+core)?"
            if cell.cell_type == "markdown" and (m := re.match(form, text, re.I | re.S)):
                told[m[1]] = m[2].lower(), m[3], bool(m[4])
        graded = cell.metadata.get("nbgrader", {})
        if graded.get("grade") and graded["solution"]:
            written += graded["points"]
        elif graded.get("grade"):
            number = re.match(r"ex-\d\d-(\d)-check", graded["grade_id"])[1]
            coded[number] = coded.get(number, 0) + graded["points"]
    assert coded.keys() == told.keys(), f"{lesson.name}: each exercise says difficulty and minutes"
    cells = []
    for number in "1234":
        if number not in coded:
            cells.append("")
            continue
        hard, minutes, core = told[number]
        mark = "**" if core else ""
        cells.append(f"{mark}{hard}{mark}, {minutes} min, {coded[number]} p")
    total = sum(coded.values()) + written
    anchor = slug(f"Lesson {int(lesson.number)}: {head.title}")
    return (
        f"| [{int(lesson.number)}](#{anchor}) | {head.reading} min"
        f" | {head.compute} | {' | '.join(cells)} | {total}, {written} in words |"
    )


def section(lesson):
    """The guide's section on a lesson."""
    parts = re.split(r"^(?=## )", GUIDE.read_text(), flags=re.MULTILINE)
    wanted = f"## Lesson {int(lesson.number)}: {title(lesson)}\n"
    found = [part for part in parts if part.startswith(wanted)]
    assert len(found) == 1, f"book/instructor.md has no section {wanted!r}"
    return found[0]


def rows(table):
    """The cells of each row of the Markdown tables in a text, their heads left out."""
    cells = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    heads = {i for i, row in enumerate(cells) if not "".join(row).strip("- ")}
    return [
        [cell.strip() for cell in row]
        for i, row in enumerate(cells)
        if i not in heads and i + 1 not in heads
    ]


@every_lesson
def test_a_lesson_has_its_section_in_the_guide(lesson):
    text = section(lesson)
    minutes = [int(row[0]) for row in rows(text) if row[0].isdigit() and len(row) == 2]
    assert sum(minutes) == 90, f"the plan takes {sum(minutes)} minutes"
    for part in ("**Collect first.**", "**Discuss.**", "**In 60 minutes.**"):
        assert part in text
    exercises = build.pair(lesson.source.read_text(), lesson)
    ids = [cell.metadata.get("nbgrader", {}).get("grade_id", "") for cell in exercises.cells]
    coded = {m[1] for name in ids if (m := re.fullmatch(r"ex-\d\d-(\d)", name))}
    wrong = [row for row in rows(text) if len(row) == 4]
    assert {row[0] for row in wrong} == coded, "wrong answers for each exercise"


@every_lesson
def test_the_guide_quotes_the_checks_of_the_lesson(lesson):
    # A message is put together from several strings, in lines of their own.
    source = re.sub(r'"\s*\n\s*\+? ?\(?f?"', "", lesson.source.read_text())
    quotes = [
        quote
        for row in rows(section(lesson))
        if len(row) == 4
        for quote in re.findall(r'"([^"]+)"', row[3].replace("\\*", "*"))
    ]
    assert len(quotes) >= 5
    # Values that are put in are left out of a quotation: "got ... instead of 3".
    parts = [part for quote in quotes for part in quote.split("...")]
    assert [part for part in parts if part not in source] == []


@every_lesson
def test_the_guide_says_of_exercises_what_the_lesson_says(lesson):
    row = overview()[lesson.name]
    assert row in GUIDE.read_text().splitlines(), f"write into book/instructor.md:\n{row}"


def test_the_guide_names_the_limits_as_they_are():
    text = " ".join(GUIDE.read_text().split())
    limits = Limits()
    for words in (
        f"A cell or a call has {limits.seconds:g} seconds",
        f"{limits.cpu_seconds} seconds of the processor and {limits.memory // 2**30} GiB",
        f"{limits.file_bytes // 2**20} MiB of memory that are gone",
        f"{limits.open_files} open files and {limits.threads} threads",
    ):
        assert words in text, words


def test_the_guide_says_what_grading_took():
    text = " ".join(GUIDE.read_text().split())
    told = re.search(r"took (\d+) minutes of processor time.*? (\d\.\d) GB of memory", text)
    kept = json.loads((ROOT / "results" / "grading.json").read_text())
    assert (kept["submissions"], kept["lesson"], kept["jobs"]) == (60, "03_magnitude", 2)
    assert 60 * int(told[1]) == pytest.approx(kept["cpu_seconds"], rel=0.3)
    assert 1e9 * float(told[2]) == pytest.approx(kept["peak_bytes"], rel=0.3)


# --- what is named is there ---------------------------------------------------------------------


def commands(text):
    """The calls of `pruning101` in a Markdown text, fenced or inline, as lists of words."""
    code = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for part in code:
        for line in re.split(r"\n|&&|;|\|", part.replace("\\\n", " ")):
            words = re.match(r"(?:\S*=\S* )*(?:\S*/)?pruning101(?: +(.*))?$", line.strip())
            if words and words[1]:
                yield words[1].split("#")[0].split()


@cache
def usage(command=""):
    """What `pruning101 COMMAND --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    return out.getvalue()


@every_document
def test_commands_that_are_named_are_there(document):
    known = set(re.findall(r"^ {4}(\w+)(?: |$)", usage(), re.MULTILINE))
    for command, *rest in commands(document.read_text()):
        if command.startswith("--"):
            assert command in usage()
            continue
        assert command in known, f"pruning101 {command}"
        options = {word.split("=")[0] for word in rest if word.startswith("-")}
        missing = {option for option in options if not re.search(rf"{option}\b", usage(command))}
        assert missing == set(), f"pruning101 {command}"


def test_the_commands_of_a_text_are_found():
    text = (
        "A `pruning101 run magnitude --profile standard`, and `pruning101.magnitude`.\n"
        "```sh\ncd x && .venv/bin/pruning101 lab  # opens\n"
        "A=b pruning101 data mnist \\\n  --root y\n```\n"
        "```python\nimport pruning101\n```\n"
    )
    assert sorted(commands(text)) == [
        ["data", "mnist", "--root", "y"],
        ["lab"],
        ["run", "magnitude", "--profile", "standard"],
    ]


def test_every_command_is_in_the_readme():
    known = set(re.findall(r"^ {4}(\w+)(?: |$)", usage(), re.MULTILINE))
    assert known - {command for command, *_ in commands((ROOT / "README.md").read_text())} == set()


@every_document
def test_relative_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", document.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    targets += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), target


def anchors(text):
    return {slug(head) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def slug(head):
    """The anchor of a heading, as GitHub and the book make it."""
    return re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-")


# --- citation, changelog, licence ---------------------------------------------------------------


def test_the_citation_is_that_of_this_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for key in ("cff-version", "message", "title", "authors", "type", "abstract", "date-released"):
        assert citation[key], key
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(
        {"name"} <= set(a) or {"family-names", "given-names"} <= set(a) for a in citation["authors"]
    )
    assert citation["version"] == pruning101.__version__
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert citation["repository-code"] == links.home(ROOT).url
    assert citation["title"].startswith("pruning101")


def test_the_changelog_has_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    for head in heads[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head)
    released = [head.split("] - ") for head in heads[1:]]
    assert released[0][0] == f"[{pruning101.__version__}"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0][1] == str(citation["date-released"])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_licences_of_code_and_data_are_named():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License")
    assert "WITHOUT WARRANTY OF ANY KIND" in licence
    readme = " ".join((ROOT / "README.md").read_text().split())
    for part in ("MIT licence", "UCI", "CC BY 4.0", "MNIST", "CIFAR-10", "their own licences"):
        assert part in readme, part
