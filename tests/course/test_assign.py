"""Student versions: nothing of a solution in them, and the same cells that nbgrader makes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pruning101.course.assign import FOLDED, assign, student
from pruning101.course.material import find


@pytest.fixture
def instructor(built):
    return nbformat.read(built / "notebooks" / "07_tiny.ipynb", as_version=4)


def by_id(notebook):
    graded = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    return {cell.metadata.nbgrader.grade_id: cell for cell in graded}


def test_student_version_has_no_solution_no_hidden_test_and_no_output(built):
    text = (built / "notebooks" / "exercises" / "07_tiny.ipynb").read_text()
    for secret in ("SOLUTION", "secret", "HIDDEN", "hidden", "smallest tell", "image/png"):
        assert secret not in text.replace('"source_hidden"', ""), secret
    assert "source_hidden" not in text
    cells = by_id(nbformat.reads(text, as_version=4))
    assert cells["ex-07-1"].source == (
        "def keep_largest(values, k):\n"
        '    """The `k` largest of `values`, in falling order."""\n'
        "    # YOUR CODE HERE\n"
        "    raise NotImplementedError()"
    )
    assert cells["ex-07-open"].source == "YOUR ANSWER HERE"
    assert cells["ex-07-1"].metadata.get("editable", True)
    for check in ("ex-07-1-check-a", "ex-07-1-check-b"):
        assert cells[check].metadata.editable is False
        assert cells[check].metadata.deletable is False
        assert "assert" in cells[check].source


def test_two_solutions_give_one_student_version(instructor):
    other = copy.deepcopy(instructor)
    cell = by_id(other)["ex-07-1"]
    cell.source = cell.source.replace("np.sort(values)[::-1]", "sorted(values, reverse=True)")
    assert cell.source != by_id(instructor)["ex-07-1"].source
    assert student(other) == student(instructor)


def test_the_stub_can_be_chosen(instructor):
    cell = by_id(student(instructor, code_stub="...  # yours"))["ex-07-1"]
    assert cell.source.endswith("\n    ...  # yours")


@pytest.mark.parametrize(
    ("grade_id", "old", "new", "told"),
    [
        ("ex-07-1", "    ### END SOLUTION", "", "has no end"),
        ("ex-07-1-check-a", "### END HIDDEN TESTS", "", "has no end"),
        ("ex-07-1-check-b", "kept =", "### BEGIN SOLUTION\nkept =", "does not allow"),
        ("ex-07-1", "    secret", "    ### BEGIN SOLUTION\n    secret", "begun twice"),
        ("ex-07-1", "def keep", "### BEGIN HIDDEN TESTS\ndef keep", "does not allow"),
    ],
)
def test_a_marker_that_would_leak_is_refused(instructor, grade_id, old, new, told):
    cell = by_id(instructor)[grade_id]
    assert old in cell.source
    cell.source = cell.source.replace(old, new, 1)
    with pytest.raises(ValueError, match=told):
        student(instructor)


def test_assign_writes_once_and_never_over_work(built, tmp_path):
    folder = tmp_path / "hand out"
    path = assign(find("tiny"), folder)
    assert path.read_bytes() == (built / "notebooks" / "exercises" / "07_tiny.ipynb").read_bytes()
    assert assign(find("tiny"), folder) == path
    path.write_text("my work")
    with pytest.raises(FileExistsError, match="another folder"):
        assign(find("tiny"), folder)
    assert path.read_text() == "my work"


@pytest.mark.slow
def test_nbgrader_makes_the_same_student_version(instructor, built, tmp_path):
    course = tmp_path / "nbgrader"
    source = course / "source" / "week" / "07_tiny.ipynb"
    source.parent.mkdir(parents=True)
    source.write_bytes((built / "notebooks" / "07_tiny.ipynb").read_bytes())
    (course / "nbgrader_config.py").write_text(
        f"c = get_config()\nc.CourseDirectory.root = {str(course)!r}\n"
    )
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "week", "--create"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for alembic
    env = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=course, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = nbformat.read(course / "release" / "week" / "07_tiny.ipynb", as_version=4)
    ours = student(instructor)
    for cell in theirs.cells:  # nbgrader leaves solution cells folded; a student gets them open
        if cell.metadata.get("nbgrader", {}).get("solution") and cell.cell_type == "code":
            assert cell.metadata.pop("jupyter") == {"source_hidden": True}
            cell.metadata.tags.remove(FOLDED)
    assert [dict(cell) for cell in ours.cells] == [dict(cell) for cell in theirs.cells]
