"""`pruning101 check`: what a learner is told about a notebook, and what each wrong file brings."""

import nbformat
import pytest
from handed_in import SOLVED, cell, code, course, handed_out, solved

from pruning101.course import cli
from pruning101.course.check import check
from pruning101.course.grading import judge
from pruning101.course.grading.judge import Outcome
from pruning101.course.grading.plan import Check


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    found = course(tmp_path / "course")
    monkeypatch.setenv("PRUNING101_MATERIAL", str(tmp_path / "course"))
    monkeypatch.setenv("COLUMNS", "80")
    return found


@pytest.fixture
def save(tmp_path):
    def save(notebook, name="mine.ipynb"):
        path = tmp_path / name
        nbformat.write(notebook, path)
        return path

    return save


@pytest.fixture
def judged(monkeypatch):
    """Stands in for the judge: every check passes but those with a message here; what was asked is
    kept.
    """
    messages, asked = {}, []

    def stand_in(setup, items, names, *, limits, confined):
        asked.append((setup, items, names, confined))
        for item in items:
            if isinstance(item, Check):
                message = messages.get(item.grade_id, "")
                points = 0.0 if message else item.points
                yield Outcome(item.grade_id, item.grade_id, not message, points, message, 0.1)
            elif item.label in messages:
                yield Outcome(None, item.label, False, 0.0, messages[item.label], 0.1)

    monkeypatch.setattr(judge, "judge", stand_in)
    stand_in.messages, stand_in.asked = messages, asked
    return stand_in


def said(capsys, *arguments):
    code = cli.main(["check", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_all_passed(lessons, save, judged, capsys):
    path = save(solved(lessons[1]))
    status, out, err = said(capsys, path)
    assert status == 0
    assert out == (
        f"11_later: {path}\n"
        "\n"
        "Exercise 1: what is left\n"
        "  passed  check 1: 1 of 1 point.\n"
        "  passed  check 2: 2 of 2 points.\n"
        "\n"
        "Exercise 2: two names\n"
        "  passed  check 1: 3 of 3 points.\n"
        "\n"
        "  written: count-11-open (1 point, marked by hand)\n"
        "\n"
        "All 3 checks passed: 6 of 6 points. Grading runs more tests than these.\n"
    )
    assert "11_later: 100%" in err, "a progress bar counts the checks"


def test_what_failed_is_said_with_its_message_and_hints(lessons, save, judged, capsys):
    notebook = handed_out(lessons[1])
    notebook.cells.append(code("1 / 0"))
    judged.messages.update(
        {
            "count-11-2-check": "half of 4 is not " + "very " * 30 + "much",
            "the cell of exercise 2": "SyntaxError: invalid syntax (line 3)",
            "the extra cell that begins `1 / 0`": "ZeroDivisionError: division by zero",
        }
    )
    status, out, _ = said(capsys, save(notebook))
    assert status == 1
    assert "  failed  the cell of exercise 2: SyntaxError: invalid syntax (line 3)\n" in out
    assert "  failed  check 1: 0 of 3 points. half of 4 is not very very" in out
    assert "  hint: Both are short.\n  hint: `half` is a number.\n" in out
    assert "  failed  the extra cell that begins `1 / 0`: ZeroDivisionError: division" in out
    assert "  not written yet: count-11-open (1 point, marked by hand)\n" in out
    assert out.endswith(
        "2 of 3 checks passed: 3 of 6 points. Grading runs more tests than these.\n"
    )
    assert max(map(len, out.splitlines()[1:])) <= 79, "but for the path"


def test_hidden_tests_are_not_run_and_nothing_is_confined(lessons, save, judged, capsys):
    said(capsys, save(solved(lessons[0])))
    ((setup, items, names, confined),) = judged.asked
    assert not any("hidden" in item.source.lower() for item in items if isinstance(item, Check))
    assert "import numpy" in setup[0]
    assert list(names) == ["keep_largest"]
    assert confined is False


def test_several_notebooks_one_of_which_fails(lessons, save, judged, capsys):
    judged.messages["ex-07-1-check-b"] = "no"
    paths = [save(solved(lesson), f"{lesson.name}.ipynb") for lesson in lessons]
    status, out, _ = said(capsys, *paths)
    assert status == 1
    assert out.index("07_tiny:") < out.index("1 of 2 checks") < out.index("11_later:")
    assert out.index("11_later:") < out.index("All 3 checks")


def test_wrong_files_each_get_a_sentence_before_anything_runs(
    lessons, save, judged, tmp_path, capsys
):
    (tmp_path / "empty.ipynb").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    stranger = save(nbformat.v4.new_notebook(cells=[code("1")]), "stranger.ipynb")
    wrong = [tmp_path / name for name in ("gone.ipynb", "empty.ipynb", "folder")]
    status, out, err = said(capsys, save(solved(lessons[0])), *wrong, stranger)
    assert (status, out) == (2, "")
    assert judged.asked == []
    told = err.splitlines()
    assert [line.split(": ", 2 if i == 0 else 1)[-1] for i, line in enumerate(told)] == [
        "There is no such file.",
        "It is empty: hand in the saved notebook.",
        "It is a folder: name the notebooks in it.",
        "It holds no exercise of this course's lessons (07_tiny, 11_later).",
    ]


def test_a_notebook_is_needed(lessons, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check"])
    assert stop.value.code == 2
    assert "The following arguments are required: NOTEBOOK" in capsys.readouterr().err


def test_one_s_own_link_is_followed(lessons, save, judged, tmp_path):
    link = tmp_path / "link.ipynb"
    link.symlink_to(save(solved(lessons[0])))
    assert [each.passed for each in check([link], progress=False)] == [True]


def test_lessons_that_are_not_built_are_no_hindrance(lessons, save, judged):
    path = save(solved(lessons[0]))
    lessons[1].notebook.unlink()
    assert [each.passed for each in check([path], progress=False)] == [True]


@pytest.mark.slow
def test_a_notebook_of_any_lesson_is_really_checked(lessons, save, capsys):
    half = solved(lessons[1])
    cell(half, "count-11-1").source = SOLVED.replace("keep_largest", "left_over") + "[::-1]"
    cell(half, "count-11-2").source = "%%time\nhalf = 0.5\ndef halved(value): return value * half"
    cell(half, "count-11-2-check").source = "pass"
    del half.cells[0]
    status, out, _ = said(capsys, save(half))
    assert status == 1
    assert "  passed  check 1: 1 of 1 point.\n" in out
    assert "  failed  check 2: 0 of 2 points. kept [2, 3] instead of [3, 2]\n" in out
    assert "  passed  check 1: 3 of 3 points.\n" in out
    assert "Check 1 of exercise 2: changed; the original was used." in out
    assert "2 of 3 checks passed: 4 of 6 points." in out
