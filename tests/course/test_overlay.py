"""What of a student's notebook is graded: whatever became of its cells, with a remark in words."""

import random

import nbformat
import pytest
from handed_in import SOLVED, at, cell, code, copied, course, handed_out, solved, text

from pruning101.course import build
from pruning101.course.assign import student
from pruning101.course.grading import source
from pruning101.course.grading.overlay import Check, items, overlay, plan
from pruning101.course.material import find
from pruning101.course.new import new


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return course(tmp_path_factory.mktemp("overlay") / "course")[0]


@pytest.fixture(scope="module")
def later(tiny):
    return find("later", tiny.root)


@pytest.fixture
def work(tiny):
    """A notebook of 07_tiny with its exercise solved and its answer written."""
    notebook = handed_out(tiny)
    cell(notebook, "ex-07-1").source = SOLVED
    cell(notebook, "ex-07-open").source = "It tells least."
    return notebook


def order(plan_, work_):
    """The grade_ids of checks, and the first words of cells, in the order in which they run."""
    return [
        item.grade_id if isinstance(item, Check) else item.source.split("(")[0]
        for item in items(plan_, work_)
    ]


SOLVED_ORDER = ["def keep_largest", "ex-07-1-check-a", "ex-07-1-check-b"]


def test_plan_of_a_lesson(tiny):
    whole = plan(tiny)
    assert whole.lesson == "07_tiny"
    assert len(whole.setup) == 1
    assert "import numpy as np" in whole.setup[0]
    (exercise,) = whole.exercises
    assert (exercise.grade_id, exercise.title) == ("ex-07-1", "Exercise 1")
    assert exercise.names == ("keep_largest",)
    assert [(x.grade_id, x.points) for x in exercise.checks] == [
        ("ex-07-1-check-a", 1.0),
        ("ex-07-1-check-b", 2.0),
    ]
    assert "hidden = keep_largest" in exercise.checks[0].source
    assert [(x.grade_id, x.points) for x in whole.written] == [("ex-07-open", 1.0)]


def test_plan_without_hidden_tests_is_another_plan(tiny):
    seen = plan(tiny, hidden=False)
    assert "hidden" not in seen.exercises[0].checks[0].source.lower()
    assert seen.exercises[0].checks[1] == plan(tiny).exercises[0].checks[1]
    assert seen.digest != plan(tiny).digest
    assert plan(tiny).digest == plan(tiny).digest


def test_plan_of_a_lesson_added_later(later):
    first, second = plan(later).exercises
    assert first.title == "Exercise 1: what is left"
    assert second.title == "Exercise 2: two names"
    assert second.names == ("half", "halved")
    assert second.hints == ("Both are short.", "`half` is a number.")
    assert [check.grade_id for check in second.checks] == ["count-11-2-check"]


def test_a_check_without_its_exercise_is_the_author_s_mistake(later, tmp_path):
    root = tmp_path / "course"
    lesson = course(root)[1]
    notebook = nbformat.read(lesson.notebook, as_version=4)
    notebook.cells.remove(cell(notebook, "count-11-2"))
    nbformat.write(notebook, lesson.notebook)
    with pytest.raises(ValueError, match="no exercise 'count-11-2' before the check"):
        plan(lesson)
    lesson.notebook.unlink()
    with pytest.raises(FileNotFoundError, match="pruning101 build 11_later"):
        plan(lesson)


def test_a_solved_notebook_needs_no_remark(tiny, later, work):
    done = overlay(plan(tiny), work)
    assert done.remarks == ()
    assert [part.source for part in done.parts] == [SOLVED]
    assert done.parts[0].exercise == "ex-07-1"
    assert done.parts[0].label == "the cell of exercise 1"
    assert done.answers == {"ex-07-open": "It tells least."}
    assert order(plan(tiny), done) == SOLVED_ORDER
    assert overlay(plan(later), solved(later)).remarks == ()


def test_an_untouched_notebook_is_nothing_to_remark_on(tiny):
    done = overlay(plan(tiny), handed_out(tiny))
    assert done.answers == {"ex-07-open": ""}
    assert done.remarks == ()  # its checks say so, and the answer that is missing does


def test_a_deleted_exercise_still_has_its_checks(tiny, work):
    work.cells.remove(cell(work, "ex-07-1"))
    done = overlay(plan(tiny), work)
    assert done.remarks == ("The cell of exercise 1: deleted, so its checks fail.",)
    assert order(plan(tiny), done) == SOLVED_ORDER[1:]


def test_deleted_checks_and_answer_are_the_instructor_s(tiny, work):
    for grade_id in ("ex-07-1-check-a", "ex-07-1-check-b", "ex-07-open"):
        work.cells.remove(cell(work, grade_id))
    work.cells.append(code("extra = 1"))
    done = overlay(plan(tiny), work)
    assert order(plan(tiny), done) == ["def keep_largest", "extra = 1", *SOLVED_ORDER[1:]]
    assert set(done.remarks) == {
        "Check 1 of exercise 1; check 2 of exercise 1: deleted; the original was used.",
        "The answer to `ex-07-open`: deleted.",
    }


def test_changed_checks_count_for_nothing(tiny, work):
    cell(work, "ex-07-1-check-a").source = "pass"
    check = cell(work, "ex-07-1-check-b")
    check.cell_type = "markdown"
    done = overlay(plan(tiny), work)
    assert [item.source for item in items(plan(tiny), done)[1:]] == [
        check.source for check in plan(tiny).exercises[0].checks
    ]
    assert done.remarks == (
        "Check 1 of exercise 1; check 2 of exercise 1: changed; the original was used.",
    )


def test_checks_with_their_hidden_tests_are_from_the_published_lesson(tiny):
    done = overlay(plan(tiny), nbformat.read(tiny.notebook, as_version=4))
    assert done.remarks == (
        "Check 1 of exercise 1: with its hidden tests, as in the published lesson.",
    )


def test_copies_run_in_their_order_so_the_last_definition_counts(tiny, work):
    again = copied(cell(work, "ex-07-1"))
    again.source = "def keep_largest(values, k):\n    return 2"
    work.cells.append(again)
    work.cells.append(copied(cell(work, "ex-07-1-check-a")))
    done = overlay(plan(tiny), work)
    assert [part.source for part in done.parts] == [SOLVED, again.source]
    assert order(plan(tiny), done) == ["def keep_largest", *SOLVED_ORDER]
    assert done.remarks == (
        "Check 1 of exercise 1: there more than once; it counts once.",
        "The cell of exercise 1: there 2 times; they ran in their order, so that the last "
        "definition counts.",
    )


def test_a_split_cell_runs_in_both_halves_before_its_checks(tiny, work):
    exercise = cell(work, "ex-07-1")
    exercise.source = "def helper(values):\n    return np.sort(values)[::-1]"
    rest = copied(exercise)
    rest.source = "def keep_largest(values, k):\n    return helper(values)[:k]"
    for metadata in (rest.metadata, {}):  # as JupyterLab splits, and as some editors do
        rest.metadata = nbformat.from_dict(metadata)
        notebook = nbformat.from_dict(work)
        notebook.cells.insert(at(notebook, "ex-07-1") + 1, rest)
        done = overlay(plan(tiny), notebook)
        assert [part.source for part in done.parts] == [exercise.source, rest.source]
        assert order(plan(tiny), done) == ["def helper", *SOLVED_ORDER]
        assert "The cell of exercise 1: there 2 times; they ran in their order." in done.remarks
        notebook.cells.remove(rest)


def test_a_helper_below_the_exercise_runs_before_the_checks(tiny, work):
    work.cells.insert(at(work, "ex-07-1-check-a"), code("def helper():\n    pass"))
    work.cells.insert(at(work, "ex-07-1-check-b"), code("between = 1"))
    done = overlay(plan(tiny), work)
    assert order(plan(tiny), done) == [
        "def keep_largest",
        "def helper",
        "ex-07-1-check-a",
        "between = 1",
        "ex-07-1-check-b",
    ]
    assert done.parts[1].exercise is None
    assert done.parts[1].label == "the extra cell that begins `def helper():`"
    assert done.remarks == ()


def test_moved_cells_still_have_their_checks_after_them(later):
    work = solved(later)
    first = cell(work, "count-11-1")
    work.cells.remove(first)
    work.cells.append(first)
    check = cell(work, "count-11-2-check")
    work.cells.remove(check)
    work.cells.insert(0, check)
    done = overlay(plan(later), work)
    assert order(plan(later), done)[0].startswith("### BEGIN SOLUTION")
    assert order(plan(later), done)[1] == "count-11-2-check"
    assert order(plan(later), done)[3:] == ["count-11-1-check-a", "count-11-1-check-b"]
    (remark,) = done.remarks
    assert "xercise 1" in remark
    assert "heck 1 of exercise 2" in remark
    assert remark.endswith("moved; a check runs after its exercise all the same.")


def test_checks_of_an_exercise_keep_their_order(tiny, work):
    check = cell(work, "ex-07-1-check-b")
    work.cells.remove(check)
    work.cells.insert(at(work, "ex-07-1-check-a"), check)
    work.cells.insert(at(work, "ex-07-1-check-a"), code("between = 1"))
    done = order(plan(tiny), overlay(plan(tiny), work))
    assert done == ["def keep_largest", "between = 1", *SOLVED_ORDER[1:]]


@pytest.mark.parametrize(("kind", "word"), [("markdown", "Markdown"), ("raw", "raw text")])
def test_code_turned_into_text_still_counts(tiny, work, kind, word):
    cell(work, "ex-07-1").cell_type = kind
    done = overlay(plan(tiny), work)
    assert [part.source for part in done.parts] == [SOLVED]
    assert done.remarks == (f"Exercise 1: turned into {word}; its text ran as code.",)
    cell(work, "ex-07-1").source = "I do not know how."
    done = overlay(plan(tiny), work)
    assert done.parts == ()
    assert done.remarks[0].startswith(f"Exercise 1: turned into {word} and no Python")


def test_an_answer_turned_into_code_is_still_an_answer(tiny, work):
    cell(work, "ex-07-open").cell_type = "code"
    done = overlay(plan(tiny), work)
    assert done.answers == {"ex-07-open": "It tells least."}
    assert [part.exercise for part in done.parts] == ["ex-07-1"]


def test_cells_without_any_metadata_are_recognised(tiny, work):
    for each in work.cells:
        each.metadata = nbformat.NotebookNode()
        each.pop("id")
    done = overlay(plan(tiny), work)
    assert [(part.source, part.exercise) for part in done.parts] == [(SOLVED, "ex-07-1")]
    assert order(plan(tiny), done) == SOLVED_ORDER
    assert done.answers == {"ex-07-open": "It tells least."}
    assert "lost the grade_ids" in done.remarks[0]


def test_a_retyped_cell_is_recognised_by_what_it_defines(tiny, work):
    for typed in (SOLVED, "keep_largest = lambda v, k: v[:k]", "def keep_largest(v k):\n  pass"):
        notebook = nbformat.from_dict(work)
        where = at(notebook, "ex-07-1")
        notebook.cells[where] = code(typed)
        done = overlay(plan(tiny), notebook)
        assert [(part.source, part.exercise) for part in done.parts] == [(typed, "ex-07-1")]
        assert done.remarks == (
            "Exercise 1: without grade_id; recognised by what it defines (`keep_largest`).",
        )


def test_a_cell_with_nothing_but_its_id_is_recognised(tiny, work):
    exercise = cell(work, "ex-07-1")
    exercise.metadata = nbformat.NotebookNode()
    exercise.source = "def keep_the_largest(values, k):\n    pass"
    done = overlay(plan(tiny), work)
    assert done.parts[0].exercise == "ex-07-1"
    assert done.remarks == ("Exercise 1: without grade_id; recognised by its cell id.",)


def test_using_a_function_does_not_make_it_the_exercise(tiny, work):
    work.cells.append(code("keep_largest = keep_largest(np.arange(3), 2)"))
    done = overlay(plan(tiny), work)
    assert order(plan(tiny), done) == [*SOLVED_ORDER, "keep_largest = keep_largest"]
    assert done.parts[-1].exercise is None


def test_cells_of_the_lesson_are_no_extra_cells(tiny, work):
    for each in work.cells:
        if each.cell_type == "code" and "nbgrader" not in each.metadata:
            each.pop("id")
            each.source = each.source.replace("\n", "\n\n") + "\n"
    assert len(overlay(plan(tiny), work).parts) == 1
    work.cells.append(code("   \n# only a remark\n"))
    assert len(overlay(plan(tiny), work).parts) == 1


def test_changed_cells_of_the_lesson_do_not_run(tiny, work):
    lesson = next(each for each in work.cells if each.source.startswith("plt.plot"))
    lesson.source = "while True: pass"
    done = overlay(plan(tiny), work)
    assert len(done.parts) == 1
    assert done.remarks == (
        "The cell of the lesson that begins `plt.plot([0, 1, 2])`: changed; cells of the lesson "
        "do not run in grading.",
    )


def test_a_changed_set_up_is_not_used_but_its_new_imports_are(tiny, work):
    setup = next(each for each in work.cells if "setup" in each.metadata.get("tags", []))
    setup.source = "import sys\nimport numpy as np\nfrom math import inf\nnp.sort = None"
    done = overlay(plan(tiny), work)
    assert [part.source for part in done.parts] == ["from math import inf", SOLVED]
    assert done.parts[0].label == "the imports added to the set-up"
    assert set(done.remarks) == {
        "The set-up: changed; the original was used.",
        "The imports that were added to the set-up: run all the same.",
    }


def test_an_answer_in_a_new_cell_is_found(tiny, work):
    cell(work, "ex-07-open").source = "YOUR ANSWER HERE"
    work.cells.append(text("Because."))
    work.cells.append(text("And so on."))
    done = overlay(plan(tiny), work)
    assert done.answers == {"ex-07-open": "Because.\n\nAnd so on."}
    assert done.remarks == ("The answer to `ex-07-open`: taken from a new cell.",)


def test_an_exercise_that_needs_the_lesson_s_cells_is_told_so(tiny, work):
    cell(work, "ex-07-1").source = "def keep_largest(values, step):\n    return draw(PROFILE, step)"
    (remark,) = overlay(plan(tiny), work).remarks
    assert "The cell of exercise 1 uses `PROFILE`, `draw` from the lesson's own cells" in remark
    work.cells.insert(0, code("from somewhere import draw\nPROFILE = 1"))
    assert overlay(plan(tiny), work).remarks == ()


def test_magics_and_shell_lines_break_nothing(tiny, work):
    timed = f"%%time\n!ls\n{SOLVED}"
    cell(work, "ex-07-1").source = timed
    work.cells.append(code("%%bash\nrm -r ."))
    done = overlay(plan(tiny), work)
    assert [(part.source, part.exercise) for part in done.parts] == [
        (timed, "ex-07-1"),
        ("%%bash\nrm -r .", None),
    ]
    assert done.remarks == (
        "The cell of exercise 1; the extra cell that begins `%%bash`: lines for IPython only "
        "(magics, shell commands) do nothing in grading.",
    )
    work.cells[at(work, "ex-07-1")] = code(timed)
    assert overlay(plan(tiny), work).parts[0].exercise == "ex-07-1"


def test_a_cell_that_is_no_python_is_still_a_part(tiny, work):
    cell(work, "ex-07-1").source = "def keep_largest(values, k)\n    return"
    done = overlay(plan(tiny), work)
    assert done.parts[0].source == "def keep_largest(values, k)\n    return"
    assert order(plan(tiny), done)[1:] == SOLVED_ORDER[1:]


def test_odd_metadata_harms_nothing(tiny, work):
    for odd in (None, 3, [], {"grade_id": ["ex-07-1"]}, {"grade_id": "ex-99"}):
        work.cells.append(code("odd = 1"))
        work.cells[-1].metadata.update(nbgrader=odd, tags=odd)
    done = overlay(plan(tiny), work)
    assert [part.exercise for part in done.parts] == ["ex-07-1", *[None] * 5]


def test_every_check_runs_once_whatever_became_of_the_cells(later):
    """Any shuffle, loss and doubling of cells: each check once, after its exercise's cells."""
    wanted = plan(later)
    checks = sorted(check.grade_id for x in wanted.exercises for check in x.checks)
    chance = random.Random(0)
    for _ in range(60):
        notebook = solved(later)
        cells = [c for c in notebook.cells for _ in range(chance.choice([0, 1, 1, 2]))]
        chance.shuffle(cells)
        notebook.cells = cells
        done = items(wanted, overlay(wanted, notebook))
        assert sorted(x.grade_id for x in done if isinstance(x, Check)) == checks
        for exercise in wanted.exercises:
            own = [i for i, x in enumerate(done) if getattr(x, "exercise", "") == exercise.grade_id]
            ran = [i for i, x in enumerate(done) if x in exercise.checks]
            assert ran == sorted(ran)
            assert max(own, default=-1) < min(ran)


def test_names_that_a_cell_defines():
    told = "import a.b as c\nif 1:\n  def f(): y = 1\nelse:\n  class G: pass\nh, (i, *j) = k = 1\n"
    assert source.defined(told) == ("f", "G", "h", "i", "j", "k")
    assert source.look(told).imports == ("import a.b as c",)
    assert source.look("import os.path, sys as s\nfrom a import b").imported == ("os", "s", "b")
    assert source.defined("def f(:") == ()
    assert source.defines("f = jit(f)\ng = 1\nh = 2", {"f", "g"}) == {"g"}
    assert source.defines("x = (\ndef f(a):\n  return", {"x", "f", "a"}) == {"x", "f"}


def test_names_that_a_cell_uses():
    told = (
        "def f(x):\n    y = x + z\n    def g():\n        return y + w\n    return g\nv = u\nv + f"
    )
    assert source.used(told) == {"z", "w", "u"}
    assert source.used("def f(:") == set()


def test_a_parser_is_not_given_more_than_it_can_hold():
    assert source.look("1," * 50_000).is_python
    assert not source.look("1," * 50_001).is_python


def test_an_empty_cell_holds_remarks_at_most():
    for told in ("", " \n", "# a remark\n"):
        assert source.look(told).is_empty
    for told in ("x", "x =", "%%time"):
        assert not source.look(told).is_empty


@pytest.mark.parametrize(
    "bomb",
    [
        "-" * 90_000,
        "(" * 300,
        "[" * 90_000,
        "if 1:\n x=1\n" + "elif 1: 1\n" * 9_000,
        "a" + ".b" * 40_000,
        "x = 1\n" * 200_000,
        "x = 'a\0b'",
    ],
)
def test_source_that_no_parser_survives_harms_none(tiny, work, bomb):
    assert source.defined(bomb) in ((), ("x",))
    assert source.used(bomb) == set()
    work.cells.insert(0, code(bomb))
    assert [part.source for part in overlay(plan(tiny), work).parts] == [bomb, SOLVED]


def test_a_lesson_that_was_just_begun_can_be_planned_and_solved(tmp_path):
    for folder in ("lessons", "notebooks", "pruning101/widgets", "tests/course/mutations"):
        (tmp_path / folder).mkdir(parents=True)
    new("token_folding", tmp_path)
    lesson = find("token_folding", tmp_path)
    whole = build.pair(lesson.source.read_text(), lesson)
    nbformat.write(whole, lesson.notebook)
    wanted = plan(lesson)
    assert wanted.setup
    assert all(exercise.names and exercise.checks for exercise in wanted.exercises)
    notebook = student(whole)
    for ours, theirs in zip(whole.cells, notebook.cells, strict=True):
        if ours.metadata.get("nbgrader", {}).get("solution"):
            theirs.source = ours.source
    done = overlay(wanted, notebook)
    assert done.remarks == ()
    assert {part.exercise for part in done.parts} == {x.grade_id for x in wanted.exercises}
    assert all(done.answers.values())
