"""The reports of a grading: gradebook, feedback, summary and JSON."""

import csv
import json
from html.parser import HTMLParser

import pandas
import pytest

from pruning101.course.grading import report
from pruning101.course.grading.plan import Check, Exercise, Plan, Written

PLAN = Plan(
    "07_tiny",
    ("import numpy",),
    (
        Exercise(
            "ex-1",
            "Exercise 1: keep <few>",
            ("keep",),
            (Check("ex-1-check-a", 1.0, "HIDDEN SOURCE"), Check("ex-1-check-b", 2.0, "HIDDEN")),
            ("Sort & cut.",),
        ),
        Exercise("ex-2", "Exercise 2", ("cut",), (Check("ex-2-check", 0.5, "HIDDEN"),), ()),
    ),
    (Written("ex-open", "Open question", 2.0),),
    "digest",
    (),
)
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


def outcomes(*messages):
    """The outcomes of the three checks: passed where the message is empty."""
    checks = [check for exercise in PLAN.exercises for check in exercise.checks]
    return [
        {"grade_id": check.grade_id, "label": "", "passed": not message, "message": message}
        for check, message in zip(checks, messages, strict=True)
    ]


def failed_cell(label, message):
    return {"grade_id": None, "label": label, "passed": False, "message": message}


def result(key="anna", student=None, *, messages=("", "", ""), answer="Because.", **more):
    return report.Result(
        **{
            "key": key,
            "student": student or key,
            "source": f"{key}.ipynb",
            "lesson": "07_tiny",
            "late": False,
            "remarks": (),
            "outcomes": outcomes(*messages),
            "answers": {"ex-open": answer},
            **more,
        }
    )


def broken(key="zoe", **more):
    return result(key, outcomes=(), answers={}, **more)


def write(out, *results):
    report.write(out, {"07_tiny": PLAN}, results)
    return out


def rows(out):
    with (out / "gradebook.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The elements of a page, and what a reader sees of it."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.parts, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    def words(self):
        return " ".join(" ".join(self.parts).split())


def test_the_gradebook_has_a_line_a_submission_and_a_column_a_check(tmp_path):
    write(
        tmp_path,
        result("anna", late=True, remarks=("A cell was moved.",)),
        result("ben", messages=("", "two", "three"), answer=" "),
    )
    anna, ben = rows(tmp_path)
    assert anna == {
        "student": "anna",
        "lesson": "07_tiny",
        "points": "3.5",
        "maximum": "3.5",
        "ex-1-check-a": "1",
        "ex-1-check-b": "2",
        "ex-2-check": "0.5",
        "ex-open (by hand, of 2)": "",
        "late": "late",
        "file": "anna.ipynb",
        "remarks": "A cell was moved.",
    }
    assert [ben[name] for name in list(ben)[2:9]] == ["1", "3.5", "1", "0", "0", "0", ""], (
        "no answer, no points"
    )


def test_pandas_and_a_spreadsheet_read_the_gradebook(tmp_path):
    write(tmp_path, result("a", "Ana; =1+1"), result("b", "Muñoz\nsecond line"))
    assert (tmp_path / "gradebook.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "Excel's mark"
    table = pandas.read_csv(tmp_path / "gradebook.csv")
    assert table["student"].tolist() == ["Ana; =1+1", "Muñoz\nsecond line"]
    assert table["points"].tolist() == [3.5, 3.5]
    first = (tmp_path / "gradebook.csv").read_text(encoding="utf-8-sig").split("\n", 1)[1]
    assert first.startswith('"Ana;'), "a semicolon must not begin a new cell"


@pytest.mark.parametrize(
    "name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", " =1", "＝1"]
)
def test_no_name_file_or_remark_becomes_a_formula(tmp_path, name):
    write(tmp_path, result("a", name, source=name, remarks=(name,)))
    with (tmp_path / "gradebook.csv").open(encoding="utf-8-sig", newline="") as file:
        row = list(csv.reader(file))[1]
    for field in (row[0], row[-2], row[-1]):
        assert field == "'" + name


def test_what_cannot_be_graded_is_told_from_what_was_not(tmp_path):
    write(
        tmp_path,
        broken("xaver", problem="It is no notebook."),
        broken("yves", problem="It is of no lesson.", lesson=None),
        broken("zoe", failure="The judge crashed."),
    )
    xaver, yves, zoe = rows(tmp_path)
    assert (xaver["points"], xaver["maximum"], xaver["remarks"]) == (
        "0",
        "3.5",
        "It is no notebook.",
    )
    assert (yves["points"], yves["maximum"], yves["lesson"]) == ("0", "", "")
    assert (zoe["points"], zoe["maximum"], zoe["remarks"]) == ("", "3.5", "The judge crashed.")
    told = [Page(tmp_path / "feedback" / f"{key}.html").words() for key in ("xaver", "yves", "zoe")]
    assert "It is no notebook." in told[0]
    assert "It is of no lesson." in told[1]
    assert "could not be graded yet" in told[2]
    assert "judge" not in told[2], "nothing that a student can do anything about"
    summary = Page(tmp_path / "summary.html").words()
    assert "3 submissions, 0 graded." in summary
    for sentence in ("It is no notebook.", "It is of no lesson.", "The judge crashed."):
        assert sentence in summary
    figures = json.loads((tmp_path / "results.json").read_text())["submissions"]
    assert [row["points"] for row in figures] == [0, 0, None]


def test_feedback_says_what_failed_and_gives_hints_there_only(tmp_path):
    cell = failed_cell("extra cell 3", "NameError: x")
    write(
        tmp_path,
        result("anna"),
        result("ben", outcomes=[cell, *outcomes("", "kept 3 & not 2", "")], answer="1 < 2\n\nso"),
    )
    anna = Page(tmp_path / "feedback" / "anna.html").words()
    ben = Page(tmp_path / "feedback" / "ben.html").words()
    assert "3.5 of 3.5 points" in anna
    assert "Up to 2 points more are given by hand" in anna
    assert "Hint" not in anna
    assert "failed" not in anna
    assert "1.5 of 3.5 points" in ben
    assert "✓ Check 1 passed · 1 of 1 point ✗ Check 2 failed · 0 of 2 points kept 3 & not 2" in ben
    assert "Hint Sort & cut." in ben
    assert "Extra cell 3 NameError: x" in ben
    assert "1 < 2 so" in ben
    assert "HIDDEN" not in (tmp_path / "feedback" / "ben.html").read_text()


def test_nothing_that_a_student_wrote_is_taken_for_markup(tmp_path):
    cell = failed_cell(EVIL, EVIL)
    write(
        tmp_path,
        result(
            "anna",
            EVIL,
            source=EVIL,
            remarks=(EVIL,),
            outcomes=[cell, *outcomes(EVIL, EVIL, "")],
            answer=EVIL,
        ),
        broken("ben", problem=EVIL),
        broken("chris", failure=EVIL),
    )
    for path in [*(tmp_path / "feedback").iterdir(), tmp_path / "summary.html"]:
        page = Page(path)
        assert not {"script", "img"} & {tag for tag, _ in page.elements}
        for tag, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")], tag
    shown = Page(tmp_path / "feedback" / "anna.html").parts
    assert sum(EVIL in part for part in shown) == 9, "all of it is there, as text"
    assert EVIL in Page(tmp_path / "summary.html").parts


def test_what_has_no_utf8_does_not_stop_the_reports(tmp_path):
    write(tmp_path, result("a", "caf\udce9", messages=("\ud800 surrogate", "", "")))
    assert rows(tmp_path)[0]["student"] == "caf?"
    assert "? surrogate" in Page(tmp_path / "feedback" / "a.html").parts
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["submissions"][0]["student"] == "caf\udce9"


def test_the_summary_has_a_histogram_an_exercise_and_the_commonest_messages(tmp_path):
    write(
        tmp_path,
        result("anna"),
        result("ben", messages=("one", "two", "")),
        result("chris", messages=("two", "two", "")),
        broken("dora", problem="It is no notebook."),
    )
    page = Page(tmp_path / "summary.html")
    alts = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert alts == [
        "Histogram of the points in Exercise 1: keep <few>: 0 points, 3 submissions; "
        "1 point, 0 submissions; 2 points, 0 submissions; 3 points, 1 submission.",
        "Histogram of the points in Exercise 2: 0 points, 1 submission; 0.5 points, 3 submissions.",
    ]
    heights = [float(a["height"]) for tag, a in page.elements if tag == "rect"]
    assert heights == [110, 0, 0, pytest.approx(36.7), pytest.approx(36.7), 110]
    words = page.words()
    assert "Points Submissions 0 3 1 0 2 0 3 1" in words, "the same as a table"
    assert "Of 3.5 points: 1.12 on average, median 0.5, from 0 to 3.5." in words
    assert "3 written answers left to mark by hand" in words
    assert "Message 2 Exercise 1: keep <few> two 1 Exercise 1: keep <few> one" in words


def test_pages_need_nothing_from_elsewhere_and_name_what_they_show(tmp_path):
    write(tmp_path, result("anna & <co>", messages=("one", "", "")))
    page = tmp_path / "feedback" / "anna & <co>.html"
    for path in (page, tmp_path / "summary.html"):
        elements = Page(path).elements
        names = [tag for tag, _ in elements]
        assert not {"link", "script", "img", "iframe"} & set(names)
        assert "url(" not in path.read_text()
        assert ("html", {"lang": "en"}) in elements
        assert names.count("h1") == names.count("main") == names.count("title") == 1
    links = [a["href"] for tag, a in Page(tmp_path / "summary.html").elements if tag == "a"]
    assert "feedback/anna%20%26%20%3Cco%3E.html" in links


def test_json_says_of_lessons_and_submissions_what_its_description_promises(tmp_path):
    write(tmp_path, result("anna", messages=("one", "", "")))
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["lessons"][0]["maximum"] == 3.5
    assert content["lessons"][0]["exercises"][0]["checks"] == [
        {"grade_id": "ex-1-check-a", "points": 1},
        {"grade_id": "ex-1-check-b", "points": 2},
    ]
    (anna,) = content["submissions"]
    assert anna["points"] == 2.5
    assert anna["checks"]["ex-1-check-a"] == {
        "passed": False,
        "points": 0,
        "maximum": 1,
        "message": "one",
    }
    assert anna["written"] == {"ex-open": {"maximum": 2, "answered": True}}
    for name in (*content, *content["lessons"][0], *anna):
        assert f"`{name}`" in report.__doc__
    assert "HIDDEN" not in (tmp_path / "results.json").read_text()


def test_the_same_results_give_the_same_bytes_and_old_pages_go(tmp_path):
    both = [result("anna"), result("ben", messages=("one", "", ""))]
    first, second = write(tmp_path / "1", *both), write(tmp_path / "2", *both)
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*.*")}
    assert len(files) == 5
    assert files == {path.relative_to(second): path.read_bytes() for path in second.rglob("*.*")}
    write(second, both[0])
    assert [path.name for path in (second / "feedback").iterdir()] == ["anna.html"]
