"""The grading command: each submission once, whatever comes in between; nbgrader gives the same
points.
"""

import csv
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pruning101.course import build, cli, material
from pruning101.course.assign import student
from pruning101.course.grading import grade, sandbox
from pruning101.course.grading.sandbox import Limits

HERE = Path(__file__).parent
STANDIN = HERE / "standin_judge.py"
REAL = "pruning101.course.grading.judge"
posix = pytest.mark.skipif(os.name != "posix", reason="sends signals and makes named pipes")
MINUTE = 60


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of the tiny lesson, its notebook not executed."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(HERE / "tiny" / "lessons", root / "lessons")
    (root / "notebooks").mkdir()
    lesson = material.find("tiny", root)
    nbformat.write(build.pair(lesson.source.read_text(), lesson), lesson.notebook)
    return root


@pytest.fixture
def folder(course, tmp_path, monkeypatch):
    """A folder for submissions; the stand-in judges them and keeps its log beside it."""
    monkeypatch.setenv("PRUNING101_MATERIAL", str(course))
    monkeypatch.setattr(grade, "JUDGE", [sys.executable, str(STANDIN), str(tmp_path)])
    (tmp_path / "submissions").mkdir()
    return tmp_path / "submissions"


def blank():
    lesson = material.find("tiny")
    return student(nbformat.read(lesson.notebook, as_version=4))


def by_id(notebook):
    graded = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    return {cell.metadata.nbgrader.grade_id: cell for cell in graded}


def hand_in(folder, name, code="right", file=None):
    """A notebook whose exercise is a comment to the stand-in."""
    notebook = blank()
    by_id(notebook)["ex-07-1"].source = f"keep_largest = None  # {code}\n# name: {name}"
    nbformat.write(notebook, folder / (file or f"{name}.ipynb"))


def run(folder, out=None, **options):
    out = out or folder.parent / "out"
    grade.grade(folder, out, **{"jobs": 1, "trusted": True, "progress": False, **options})
    return out


def rows(out):
    with (out / "gradebook.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def points(out):
    return {Path(row["file"]).stem: row["points"] for row in rows(out)}


def began(folder):
    log = folder.parent / "began"
    return log.read_text().split() if log.exists() else []


def files(out):
    """The bytes of the reports."""
    paths = [*out.glob("*.*"), *out.glob("feedback/*")]
    return {path.relative_to(out): path.read_bytes() for path in paths}


def begin(folder, out, judge=None):
    """The command in a process group of its own, and the open pipe `waiting`, to which the judge
    that waits for ever, or what it started, has written.
    """
    os.mkfifo(folder.parent / "waiting")
    script = (
        "import sys; from pathlib import Path; from pruning101.course.grading import grade\n"
        "folder, out = map(Path, sys.argv[1:3])\n"
        "grade.JUDGE = sys.argv[3:]\n"
        "grade.grade(folder, out, jobs=1, trusted=True, progress=False)"
    )
    arguments = [str(folder), str(out), *(judge or grade.JUDGE)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pipe = os.open(folder.parent / "waiting", os.O_RDONLY | os.O_NONBLOCK)
    ready, _, _ = select.select([pipe, process.stderr], [], [], 2 * MINUTE)
    assert ready == [pipe], "no judge came to the submission that waits"
    (folder.parent / "waiting").unlink()
    return process, pipe


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_command_cut_off_goes_on_and_grades_no_one_twice(folder, tmp_path, how):
    for name, code in [("anna", "right"), ("ben", ""), ("chris", "right, wait"), ("dora", "right")]:
        hand_in(folder, name, code)
    out = tmp_path / "out"
    process, pipe = begin(folder, out)
    judge = int(os.read(pipe, 100))
    os.close(pipe)
    os.killpg(process.pid, how)
    _, said = process.communicate(timeout=MINUTE)
    if how == signal.SIGKILL:
        os.kill(judge, signal.SIGKILL)  # the real judge ends by itself, which has a test of its own
    else:
        assert "KeyboardInterrupt" in said
        with pytest.raises(ProcessLookupError):
            os.kill(judge, 0)
    assert began(folder) == ["anna", "ben", "chris"]
    assert not (out / "gradebook.csv").exists()
    run(folder, out)
    assert began(folder) == ["anna", "ben", "chris", "chris", "dora"]
    assert points(out) == {"anna": "3", "ben": "0", "chris": "3", "dora": "3"}
    assert (
        files(run(folder, tmp_path / "at once"))[Path("gradebook.csv")]
        == (files(out)[Path("gradebook.csv")])
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_command_that_is_killed_leaves_nothing_behind(folder, tmp_path):
    """The real judge, and an endless loop that nothing confines."""
    notebook = blank()
    by_id(notebook)["ex-07-1"].source = (
        f"pipe = open({str(tmp_path / 'waiting')!r}, 'w')\n"
        "print('here', file=pipe, flush=True)\n"
        "while True:\n    pass"
    )
    nbformat.write(notebook, folder / "anna.ipynb")
    process, pipe = begin(folder, tmp_path / "out", [sys.executable, "-m", REAL])
    assert os.read(pipe, 100) == b"here\n"
    process.kill()
    process.communicate(timeout=MINUTE)
    assert select.select([pipe], [], [], MINUTE / 2)[0] == [pipe], "it still runs"
    assert os.read(pipe, 100) == b"", "the pipe is closed: its process has ended"
    os.close(pipe)


@posix
def test_jobs_work_at_a_time_and_come_to_the_same(folder, tmp_path):
    for name, code in [("a", "right"), ("b", ""), ("c", "right, crash"), ("d", "right"), ("e", "")]:
        hand_in(folder, name, code)
    one, three = run(folder, tmp_path / "one"), run(folder, tmp_path / "three", jobs=3)
    assert files(one) == files(three)
    assert len(files(one)) == 4 + 5
    assert list(points(one)) == ["a", "b", "c", "d", "e"], "in the order of their names"
    hand_in(folder, "x", "right, meet")
    hand_in(folder, "y", "right, meet")
    os.mkfifo(tmp_path / "meeting")
    run(folder, one, jobs=2)
    assert (points(one)["x"], points(one)["y"]) == ("3", "3")


def test_a_crash_is_tried_once_more_and_stops_no_one_else(folder, capsys):
    hand_in(folder, "anna", "right, crash")
    hand_in(folder, "ben", "crash once")
    hand_in(folder, "chris")
    out = run(folder)
    assert began(folder) == ["anna", "anna", "ben", "ben", "chris"]
    assert points(out) == {"anna": "", "ben": "3", "chris": "3"}
    assert "could not be graded (the judge ended with status 1)" in rows(out)[0]["remarks"]
    assert "Something went wrong in here." in capsys.readouterr().err
    hand_in(folder, "anna", "right")
    run(folder)
    assert points(out)["anna"] == "3"
    assert began(folder)[5:] == ["anna"]


@posix
def test_a_check_that_brings_the_judge_down_costs_itself(folder):
    hand_in(folder, "anna", "right, falls at ex-07-1-check-a")
    hand_in(folder, "ben")
    out = run(folder)
    assert began(folder) == ["anna", "anna", "anna", "ben"]
    assert points(out) == {"anna": "2", "ben": "3"}
    kept = json.loads(next((out / "results").glob("anna-*.json")).read_text())
    (failed,) = [one for one in kept["outcomes"] if not one["passed"]]
    assert failed["grade_id"] == "ex-07-1-check-a"
    assert "brought the check itself down" in failed["message"]


def test_a_judge_that_leaves_a_check_out_has_crashed(folder, tmp_path, monkeypatch):
    hand_in(folder, "anna")
    monkeypatch.setattr(grade, "JUDGE", [sys.executable, "-c", "pass"])
    assert points(run(folder)) == {"anna": ""}


@posix
def test_what_takes_too_long_in_all_keeps_what_it_has(tmp_path, monkeypatch):
    """And what the judge started ends with it."""
    first = {"grade_id": "a", "label": "", "passed": True, "points": 1, "message": "", "seconds": 0}
    line = json.dumps(first)
    os.mkfifo(tmp_path / "alive")
    left = f"exec 3<>{tmp_path}/alive; echo '{line}'; printf '{{\"half'; sleep 1000 & wait"
    monkeypatch.setattr(grade, "JUDGE", ["sh", "-c", left])
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    job = {"items": [{"check": {"grade_id": name, "points": 1}} for name in "ab"]}
    with grade._Judges() as judges:
        one, two = judges.outcomes(job, seconds=3)
    assert one == first
    assert (two["grade_id"], two["passed"]) == ("b", False)
    assert "3 seconds in all" in two["message"]
    assert select.select([reader], [], [], MINUTE)[0] == [reader]
    assert os.read(reader, 1) == b"", "no one holds the other end any more"
    os.close(reader)


def test_only_what_changed_is_graded_again(folder, course, tmp_path, monkeypatch):
    hand_in(folder, "anna")
    hand_in(folder, "ben")
    out = run(folder)
    assert began(folder) == ["anna", "ben"]
    before = files(out)
    assert files(run(folder)) == before
    assert began(folder) == ["anna", "ben"], "nothing to do"
    hand_in(folder, "ben", "better")
    run(folder)
    assert points(out) == {"anna": "3", "ben": "0"}
    assert began(folder)[2:] == ["ben"]
    (out / "results" / "damaged").write_text("")
    path = next((out / "results").glob("*anna*"))
    path.write_text(path.read_text()[:-9])
    run(folder)
    assert began(folder)[3:] == ["anna"], "a damaged result"
    run(folder, limits=Limits(seconds=59))
    assert began(folder)[4:] == ["anna", "ben"], "other limits"
    other = shutil.copytree(course, tmp_path / "other course")
    text = (other / "notebooks" / "07_tiny.ipynb").read_text()
    assert "kept {len(kept)} values" in text
    (other / "notebooks" / "07_tiny.ipynb").write_text(text.replace("kept {len", "found {len"))
    monkeypatch.setenv("PRUNING101_MATERIAL", str(other))
    run(folder, limits=Limits(seconds=59))
    assert began(folder)[6:] == ["anna", "ben"], "another plan"


def test_a_gradebook_that_someone_marked_in_is_kept(folder):
    hand_in(folder, "anna")
    out = run(folder)
    run(folder)
    assert not list(out.glob("*edited*")), "it is as it was written"
    for number in (1, 2):
        (out / "gradebook.csv").write_text(f"marked by hand {number}")
        run(folder)
        assert (out / f"gradebook.edited-{number}.csv").read_text() == f"marked by hand {number}"
        assert points(out) == {"anna": "3"}


@pytest.mark.parametrize(
    "name", ["Ζωή", "曉明", "محمد", "=1+1", "a\nb", "<script>x", "-rf", "ñ" * 60]
)
def test_names_in_any_script_are_graded(folder, name):
    hand_in(folder, "anna", file=f"{name}.ipynb")
    out = run(folder)
    (row,) = rows(out)
    assert row["points"] == "3"
    (page,) = (out / "feedback").iterdir()
    assert page.read_text(encoding="utf-8").count("<script") == 0


def test_two_of_one_name_are_two_and_keep_their_points(folder):
    for section, code in [("a", "right"), ("b", "wrong"[1:])]:
        (folder / section).mkdir()
        hand_in(folder / section, f"{section}-anna", code, file="anna.ipynb")
    out = run(folder)
    assert sorted((row["file"], row["points"]) for row in rows(out)) == [
        ("a/anna.ipynb", "3"),
        ("b/anna.ipynb", "0"),
    ]
    assert len(list((out / "feedback").iterdir())) == 2


def test_what_is_no_notebook_is_listed_and_the_others_are_graded(folder):
    hand_in(folder, "anna")
    (folder / "ben.ipynb").write_text("{not JSON")
    out = run(folder)
    assert points(out) == {"anna": "3", "ben": "0"}
    assert rows(out)[1]["remarks"] or rows(out)[0]["remarks"]


def test_a_wrong_call_is_refused_before_any_work(folder, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        code = cli.main(["grade", *map(str, arguments)])
        err = capsys.readouterr().err
        assert code == 2
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return err

    out = tmp_path / "out"
    assert "There is no folder" in refused(tmp_path / "none", "--out", out, "--trusted")
    assert "There is no submission" in refused(folder, "--out", out, "--trusted")
    hand_in(folder, "anna")
    assert "in the folder of the submissions" in refused(
        folder, "--out", folder / "out", "--trusted"
    )
    assert "in the folder of the submissions" in refused(folder, "--out", folder, "--trusted")
    (tmp_path / "link").symlink_to(folder)
    assert "in the folder of the" in refused(folder, "--out", tmp_path / "link" / "x", "--trusted")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    assert "not of this command" in refused(folder, "--out", tmp_path / "thesis", "--trusted")
    assert "is a file" in refused(folder, "--out", tmp_path / "thesis" / "chapter.tex", "--trusted")
    assert "0 jobs" in refused(folder, "--out", out, "--jobs", 0, "--trusted")
    assert "--timeout takes" in refused(folder, "--out", out, "--timeout", "nan", "--trusted")
    assert "--memory takes" in refused(folder, "--out", out, "--memory", "0", "--trusted")
    assert "No lesson is called" in refused(folder, "--out", out, "--lesson", "99", "--trusted")
    monkeypatch.setattr(sandbox, "missing", lambda: "No bubblewrap: use --trusted.")
    assert "No bubblewrap" in refused(folder, "--out", out)
    assert began(folder) == []


def test_the_command_hands_on_its_options_and_prints_where_it_wrote(monkeypatch, tmp_path, capsys):
    asked = {}

    def made(folder, out, **options):
        asked.update(options, folder=folder, out=out)
        return out / "summary.html"

    monkeypatch.setattr(grade, "grade", made)
    options = ["--jobs", "3", "--timeout", "90", "--memory", "0.5", "--trusted"]
    assert cli.main(["grade", "in", "--out", str(tmp_path), *options, "--lesson", "3", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'gradebook.csv'}\n{tmp_path / 'summary.html'}\n"
    assert [lesson.name for lesson in asked.pop("lessons")] == [
        "03_magnitude",
        "04_lottery_tickets",
    ]
    assert asked == {
        "folder": Path("in"),
        "out": tmp_path,
        "jobs": 3,
        "limits": Limits(seconds=90, cpu_seconds=450, memory=2**29),
        "trusted": True,
    }


SOLUTION = "    secret = np.sort(values)[::-1]\n    return secret[:k]\n"
HEAD = "def keep_largest(values, k):\n"


def handed_in_to_nbgrader():
    """Notebooks by what was done to them."""

    def exercise(source):
        notebook = blank()
        by_id(notebook)["ex-07-1"].source = source
        return notebook

    def without(notebook, grade_id):
        notebook.cells.remove(by_id(notebook)[grade_id])
        return notebook

    def with_cell(notebook, source, before):
        at = notebook.cells.index(by_id(notebook)[before])
        notebook.cells.insert(at, nbformat.v4.new_code_cell(source, id="an-extra-one"))
        return notebook

    right = HEAD + SOLUTION
    helper = "def in_falling_order(values):\n    return np.sort(values)[::-1]\n"
    uses = HEAD + "    return in_falling_order(values)[:k]\n"
    forged = (
        "class Same:\n    def __eq__(self, other):\n        return True\n\n"
        "    def tolist(self):\n        return self\n\n\n"
        "def len(values):\n    return Same()\n\n\n" + HEAD + "    return Same()\n"
    )
    tampered = exercise(HEAD + "    return []\n")
    for check in ("ex-07-1-check-a", "ex-07-1-check-b"):
        by_id(tampered)[check].source = "pass"
    answered = exercise(right)
    by_id(answered)["ex-07-open"].source = "Since they matter least."
    return {
        "right": answered,
        "wrong": exercise(HEAD + "    return np.sort(values)[: k + 1]\n"),
        "blank": blank(),
        "partly": exercise(HEAD + "    return np.sort(values)[:k]\n"),
        "syntax": exercise(HEAD + "    return (values\n"),
        "raises": exercise("raise OSError('at once')\n" + right),
        "deleted": without(exercise(right), "ex-07-1"),
        "extra": with_cell(exercise(uses), helper, before="ex-07-1"),
        "split": with_cell(exercise(helper), uses, before="ex-07-1-check-a"),
        "tampered": tampered,
        "forged": exercise(forged),
    }


@pytest.mark.slow
def test_points_are_those_of_nbgrader(course, tmp_path, monkeypatch):
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    # nbgrader runs whole notebooks: without the cells that no exercise needs it is done sooner.
    root = shutil.copytree(course, tmp_path / "course")
    monkeypatch.setenv("PRUNING101_MATERIAL", str(root))
    lesson = material.find("tiny", root)
    whole = nbformat.read(lesson.notebook, as_version=4)
    whole.cells = [
        cell
        for cell in whole.cells
        if cell.cell_type == "markdown"
        or "nbgrader" in cell.metadata
        or "setup" in cell.metadata.get("tags", [])
    ]
    nbformat.write(whole, lesson.notebook)
    notebooks = handed_in_to_nbgrader()
    theirs_root = tmp_path / "nbgrader"
    places = {name: theirs_root / "submitted" / name / "week" for name in notebooks}
    for place in (theirs_root / "source" / "week", *places.values()):
        place.mkdir(parents=True)
    nbformat.write(whole, theirs_root / "source" / "week" / "07_tiny.ipynb")
    for name, notebook in notebooks.items():
        nbformat.write(notebook, places[name] / "07_tiny.ipynb")
    # Our command reads nbgrader's own folder of submissions.
    out = tmp_path / "out"
    unconfined = sandbox.missing() is not None
    grade.grade(theirs_root / "submitted", out, trusted=unconfined, progress=False)
    ours = {row["student"]: row for row in rows(out)}

    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    config = Config()
    config.CourseDirectory.root = str(theirs_root)
    api = NbGraderAPI(config=config)
    assert api.generate_assignment("week")["success"]
    for name in notebooks:
        assert api.autograde("week", name)["success"], name
    with api.gradebook as book:
        theirs = {
            name: {g.name: g for g in book.find_submission_notebook("07_tiny", "week", name).grades}
            for name in notebooks
        }
    checks = ["ex-07-1-check-a", "ex-07-1-check-b"]
    scores = {
        name: [grades[check].auto_score for check in checks] for name, grades in theirs.items()
    }
    found = {name: [float(ours[name][check]) for check in checks] for name in notebooks}
    assert scores.pop("forged") == [1, 2], "nbgrader's checks run beside the student's code"
    assert found.pop("forged") == [0, 0], "ours do not"
    assert found == scores
    by_hand = {name: book["ex-07-open"].needs_manual_grade for name, book in theirs.items()}
    column = "ex-07-open (by hand, of 1)"
    assert {name: ours[name][column] == "" for name in notebooks} == by_hand
    assert sum(by_hand.values()) == 1
