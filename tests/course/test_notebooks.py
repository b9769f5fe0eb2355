"""Every lesson's notebooks: in step with their source, fresh, readable, and running from top to
bottom.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pruning101.course import build, material
from pruning101.course.run import run

ROOT = Path(__file__).resolve().parents[2]
LESSONS = material.lessons(ROOT)
INDEX = material.Lesson("index", ROOT)
every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)


def test_lessons_are_numbered_without_gaps():
    assert [lesson.number for lesson in LESSONS] == [f"{n:02d}" for n in range(1, len(LESSONS) + 1)]
    assert len(LESSONS) >= 3


@every_lesson
def test_one_name_finds_everything_of_a_lesson(lesson):
    topic = lesson.name.removeprefix(lesson.number + "_")
    parts = [
        f"lessons/{lesson.name}.py",
        f"notebooks/{lesson.name}.ipynb",
        f"notebooks/exercises/{lesson.name}.ipynb",
        f"pruning101/{topic}.py",
        f"pruning101/widgets/{topic}.py",
        f"tests/test_{topic}.py",
        f"tests/course/mutations/{lesson.name}.py",
    ]
    assert [part for part in parts if not (ROOT / part).is_file()] == []


@pytest.mark.parametrize("lesson", [*LESSONS, INDEX], ids=lambda lesson: lesson.name)
def test_notebooks_are_what_build_makes_of_the_source(lesson):
    assert build.check(lesson) == []


@every_lesson
def test_nothing_stored_changes_from_run_to_run(lesson):
    notebook = nbformat.read(lesson.notebook, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown = output.get("text", "") + "".join(
                text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
            )
            assert not re.search(r"\b0x[0-9a-f]{6,}", shown), f"an address is stored: {shown[:200]}"


@every_lesson
def test_lines_fit_beside_a_side_panel(lesson):
    long = []
    for cell in nbformat.read(lesson.notebook, as_version=4).cells:
        for line in cell.source.splitlines():
            # A table's row, a link or a formula cannot be broken; Markdown wraps them anyway.
            free = cell.cell_type == "markdown" and re.search(r"\||\]\(|https?://|<|\$", line)
            if len(line) > 79 and not free:
                long.append(line)
    assert long == []


@every_lesson
def test_a_lesson_has_the_cells_that_the_tools_rely_on(lesson):
    cells = nbformat.read(lesson.notebook, as_version=4).cells
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    assert tags.count("table") == 1
    assert tags.count("setup") >= 1
    assert "nbval-check-output" in tags, "a result worked by hand is the place to compare output"
    assert any(re.match(r'PROFILE = "quick"', cell.source) for cell in cells)


def nbval(*notebooks, cwd):
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env"]
    command += ["--nbval-cell-timeout=600", "-p", "no:cacheprovider", *map(str, notebooks)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
@every_lesson
def test_nbval_agrees_with_the_stored_outputs(lesson):
    done = nbval(lesson.notebook, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_nbval_sees_a_result_that_changed(built):
    notebook = built / "notebooks" / "07_tiny.ipynb"
    assert nbval(notebook, cwd=built).returncode == 0
    notebook.write_text(notebook.read_text().replace("np.int64(8)", "np.int64(9)"))
    assert nbval(notebook, cwd=built).returncode == 1


@pytest.mark.slow
@every_lesson
def test_a_lesson_runs_top_to_bottom_and_ends_with_its_table(lesson, tmp_path):
    table, path = run(lesson, out=tmp_path / "run.ipynb")
    assert len(table.splitlines()) >= 3
    faults = build.unfit(nbformat.read(path, as_version=4))
    assert faults == []
