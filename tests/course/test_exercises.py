"""The meta-test: each check fails on the untouched exercise, passes on the solution and sees a
wrong one.
"""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from exercises import faults, read

from pruning101.course import material
from pruning101.course.assign import student

ROOT = Path(__file__).resolve().parents[2]
LESSONS = [lesson for lesson in material.lessons(ROOT) if lesson.source.is_file()]
every_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)

TINY = {
    "ex-07-1": [
        ("[::-1]", ""),
        ("[:k]", "[: k - 1]"),
        ("np.sort(values)", "np.sort(np.unique(values))"),
    ]
}


def mutations(lesson):
    path = ROOT / "tests" / "course" / "mutations" / f"{lesson.name}.py"
    assert path.is_file(), f"{lesson.name} has no mutated solutions: write {path}"
    spec = importlib.util.spec_from_file_location(f"mutations_{lesson.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MUTATIONS


def test_the_meta_test_is_content_with_the_tiny_lesson(tree):
    assert faults(material.find("tiny"), TINY) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("assert kept.tolist() ==", "assert kept.tolist() or", "no check sees the mutation"),
        ("assert len(kept) == 2", "assert len(kept) == 3", "ex-07-1-check-a fails on the solution"),
        ("assert len(hidden) == 3", "assert True", "'np.sort(np.unique(values))'"),
        ("kept = keep_largest(np.array([1, 3, 2]), 2)\nassert kept.", "#", "check-b passes unt"),
    ],
)
def test_the_meta_test_sees_a_lame_check(tree, old, new, told):
    source = tree / "lessons" / "07_tiny.py"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    assert any(told in fault for fault in faults(material.find("tiny"), TINY))


@every_lesson
def test_every_exercise_is_checked(lesson):
    assert faults(lesson, mutations(lesson)) == []


@every_lesson
def test_every_lesson_has_three_coded_exercises(lesson):
    setup, exercises = read(lesson)
    assert len(setup) >= 1
    assert list(exercises) == [f"ex-{lesson.number}-{n}" for n in range(1, len(exercises) + 1)]
    assert len(exercises) >= 3


@pytest.mark.slow
@every_lesson
def test_untouched_student_version_fails_in_its_checks_only(lesson, tmp_path):
    from nbclient import NotebookClient

    notebook = student(nbformat.read(lesson.notebook, as_version=4))
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    failed = {cell.id for cell in notebook.cells if errors(cell)}
    checks = {
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("grade")
    }
    assert failed == checks


def errors(cell):
    return [out for out in cell.get("outputs", []) if out.output_type == "error"]
