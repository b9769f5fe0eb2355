"""Student versions: nothing of a solution in them, and the same cells that nbgrader makes."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from handed_in import course

import pruning101
from pruning101.course import cli, material
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
    (path,) = assign([find("tiny")], folder)
    assert path.read_bytes() == (built / "notebooks" / "exercises" / "07_tiny.ipynb").read_bytes()
    before = (folder / "manifest.json").read_bytes()
    assert assign([find("tiny"), find("tiny")], folder) == [path]
    assert (folder / "manifest.json").read_bytes() == before
    path.write_bytes(b"my work, \xff")
    with pytest.raises(FileExistsError, match="another folder"):
        assign([find("tiny")], folder)
    assert path.read_bytes() == b"my work, \xff"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A course of two lessons, of which no tool knows the second."""
    root = tmp_path / "course"
    lessons = course(root)
    monkeypatch.setenv("PRUNING101_MATERIAL", str(root))
    return lessons


def test_the_manifest_says_what_each_part_is_worth(two, tmp_path):
    paths = assign(two, tmp_path / "class")
    assert [path.name for path in paths] == ["07_tiny.ipynb", "11_later.ipynb"]
    manifest = json.loads((tmp_path / "class" / "manifest.json").read_text())
    assert (manifest["format"], manifest["pruning101"]) == (1, pruning101.__version__)
    assert list(manifest["lessons"]) == ["07_tiny", "11_later"]
    assert manifest["lessons"]["11_later"] == {
        "file": "11_later.ipynb",
        "sha256": hashlib.sha256(paths[1].read_bytes()).hexdigest(),
        "title": "Counting what is left",
        "points": 7,
        "exercises": [
            {
                "grade_id": "count-11-1",
                "title": "Exercise 1: what is left",
                "points": 3,
                "checks": [
                    {"grade_id": "count-11-1-check-a", "points": 1},
                    {"grade_id": "count-11-1-check-b", "points": 2},
                ],
            },
            {
                "grade_id": "count-11-2",
                "title": "Exercise 2: two names",
                "points": 3,
                "checks": [{"grade_id": "count-11-2-check", "points": 3}],
            },
        ],
        "written": [{"grade_id": "count-11-open", "title": "count-11-open", "points": 1}],
    }


def test_a_manifest_keeps_the_lessons_that_were_assigned_before(two, tmp_path):
    folder = tmp_path / "class"
    assign(two[1:], folder)
    assign(two[:1], folder)
    one_by_one = (folder / "manifest.json").read_bytes()
    assert list(json.loads(one_by_one)["lessons"]) == ["07_tiny", "11_later"]
    assign(two, tmp_path / "at once")
    assert (tmp_path / "at once" / "manifest.json").read_bytes() == one_by_one


@pytest.mark.parametrize("content", ["my list", '{"format": 2, "lessons": {}}', "[]", "{}"])
def test_a_manifest_of_someone_else_is_left_alone(two, tmp_path, content):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"manifest.json is there already and no manifest"):
        assign(two, folder)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert (folder / "manifest.json").read_text() == content


def test_nothing_is_written_where_one_of_the_files_cannot_be(two, tmp_path):
    folder = tmp_path / "class"
    (folder / "11_later.ipynb").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"11_later.ipynb is there already"):
        assign(two, folder)
    assert [path.name for path in folder.iterdir()] == ["11_later.ipynb"]
    two[1].notebook.unlink()
    with pytest.raises(FileNotFoundError, match="pruning101 build 11_later"):
        assign(two, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(NotADirectoryError, match=r"is a file: name a folder"):
        assign(two[:1], two[0].notebook)


def test_the_command_assigns_some_lessons_or_all(two, tmp_path, capsys):
    assert cli.main(["assign", "later", "7", "--to", str(tmp_path / "some")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "some" / "11_later.ipynb"),
        str(tmp_path / "some" / "07_tiny.ipynb"),
    ]
    assert cli.main(["assign", "--to", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").iterdir())) == 3


def texts(part):
    """Every string in a notebook's JSON, the keys as well."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for key, value in part.items():
            yield key
            yield from texts(value)
    elif isinstance(part, list):
        for value in part:
            yield from texts(value)


def secrets(notebook):
    """The lines of solutions and hidden tests that a student sees nowhere else in the lesson, and
    all that a solution cell shows.
    """
    secret, open_ = [], []
    for each in notebook.cells:
        graded = each.metadata.get("nbgrader", {})
        hidden = bool(graded.get("solution")) and "BEGIN SOLUTION" not in each.source
        for line in each.source.split("\n"):
            hidden = hidden or bool(re.search("BEGIN (SOLUTION|HIDDEN TESTS)", line))
            (secret if hidden else open_).append(line.strip())
            hidden = hidden and not re.search("END (SOLUTION|HIDDEN TESTS)", line)
        if graded.get("solution"):
            secret += [text for output in each.get("outputs", []) for text in texts(output)]
            secret.append(each.metadata.get("mystnb", {}).get("image", {}).get("alt", ""))
    told = "\n".join(open_)
    return [line for line in secret if len(line) > 3 and line not in told]


ROOT = Path(__file__).resolve().parents[2]
BUILT = [lesson for lesson in material.lessons(ROOT) if lesson.notebook.is_file()]
every_lesson = pytest.mark.parametrize("lesson", BUILT, ids=lambda lesson: lesson.name)


def leaks(lesson, folder):
    """What of a lesson's solutions stands in its written student version or the manifest."""
    instructor = nbformat.read(lesson.notebook, as_version=4)
    lines = secrets(instructor)
    assert len(lines) > 5, "a lesson has solutions"
    (path,) = assign([lesson], folder)
    handed_out = [
        "\n".join(texts(json.loads(each.read_text()))) for each in (path, folder / "manifest.json")
    ]
    return [line for line in lines if any(line in text for text in handed_out)]


@every_lesson
def test_no_line_of_a_solution_or_hidden_test_is_handed_out(lesson, tmp_path):
    assert leaks(lesson, tmp_path) == []


@every_lesson
def test_student_versions_carry_nothing_but_what_they_need(lesson, tmp_path):
    (path,) = assign([lesson], tmp_path)
    notebook = json.loads(path.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for index, each in enumerate(notebook["cells"]):
        assert each["id"] == f"{lesson.number}-{index:03d}", "ids by position tell nothing"
        graded = each["metadata"].get("nbgrader", {})
        allowed = {"tags", "nbgrader", "mystnb", "jupyter", "deletable", "editable"}
        assert set(each["metadata"]) <= (
            {"tags", "nbgrader", "deletable"} if graded.get("solution") else allowed
        )
        assert set(each) <= {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        assert not each.get("outputs")
        assert each.get("execution_count") is None
        assert set(graded) <= {
            *("schema_version", "grade_id", "grade", "solution", "locked", "task"),
            *("points", "cell_type", "checksum"),
        }


def test_metadata_outputs_and_attachments_leak_nothing(two, tmp_path):
    lesson = two[1]
    planted = nbformat.read(lesson.notebook, as_version=4)
    planted.metadata["note"] = "planted by the notebook"
    for number, grade_id in enumerate(("count-11-2", "count-11-2-check", "count-11-open")):
        each = by_id(planted)[grade_id]
        each.metadata["note"] = f"planted by cell {number}"
        each.metadata.nbgrader["note"] = f"planted by mark {number}"
    solution, answer = by_id(planted)["count-11-2"], by_id(planted)["count-11-open"]
    solution.metadata["mystnb"] = {"image": {"alt": "planted by alt"}}
    solution.outputs = [nbformat.v4.new_output("stream", text="planted by output")]
    answer.attachments = {"a.png": {"image/png": "planted by attachment"}}
    nbformat.write(planted, lesson.notebook)
    assert leaks(lesson, tmp_path / "class") == []
    assert "planted" not in (tmp_path / "class" / "11_later.ipynb").read_text()


def by_nbgrader(notebook):
    """The student version that nbgrader makes, in this process and without its gradebook."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.preprocessors import SaveCells

    notebook = copy.deepcopy(notebook)
    steps = GenerateAssignment.preprocessors.default()
    for step in [step for step in steps if step is not SaveCells]:
        notebook, _ = step().preprocess(notebook, {})
    for each in notebook.cells:  # it leaves solution cells folded; a student gets them open
        if each.metadata.get("nbgrader", {}).get("solution") and each.cell_type == "code":
            assert each.metadata.pop("jupyter") == {"source_hidden": True}
            each.metadata.tags.remove(FOLDED)
    return notebook


@every_lesson
def test_nbgrader_makes_the_same_of_every_lesson(lesson):
    instructor = nbformat.read(lesson.notebook, as_version=4)
    theirs, ours = by_nbgrader(instructor), student(instructor)
    assert [dict(each) for each in ours.cells] == [dict(each) for each in theirs.cells]
    assert dict(ours.metadata) == dict(theirs.metadata)


def test_nbgrader_makes_the_same_of_a_lesson_added_later(two):
    instructor = nbformat.read(two[1].notebook, as_version=4)
    assert student(instructor).cells == by_nbgrader(instructor).cells


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
