"""Folders of submissions: every layout, and every file that is broken or means harm."""

import io
import json
import os
import re
import socket
import stat
import zipfile

import nbformat
import pytest
from handed_in import cell, code, course, handed_out, solved

from pruning101.course.grading import archives, notebook, submissions
from pruning101.course.grading.submissions import find, read


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    return course(tmp_path_factory.mktemp("submissions") / "course")


@pytest.fixture(scope="module")
def tiny(lessons):
    return nbformat.writes(solved(lessons[0])).encode()


@pytest.fixture(scope="module")
def later(lessons):
    return nbformat.writes(solved(lessons[1])).encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "class").mkdir()
    return tmp_path / "class"


@pytest.fixture
def put(folder):
    def put(path, content):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    return put


def packed(files, **options):
    """A zip archive of files by name."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return memory.getvalue()


def told(found):
    """Student, lesson and source of each submission that can be graded."""
    return sorted((x.student, x.lesson, x.source) for x in found if x.problem is None)


def problems(found):
    return {x.source: x.problem for x in found if x.problem is not None}


TINY, LATER = "07_tiny", "11_later"


@pytest.mark.parametrize(
    ("paths", "students"),
    [
        (["anna.ipynb", "Bjørn Ødegård.ipynb"], ["Bjørn Ødegård", "anna"]),
        (["anna_07_tiny.ipynb", "07_tiny-ben (1).ipynb"], ["anna", "ben (1)"]),
        (["anna/07_tiny.ipynb", "ben/x.ipynb"], ["anna", "ben"]),
        (["submitted/anna/week/07_tiny.ipynb", "submitted/ben/week/x.ipynb"], ["anna", "ben"]),
        (["anna/week/07_tiny.ipynb", "ben/week/x.ipynb"], ["anna", "ben"]),
        (
            [
                "Anna-Lena von Ü_1234567_assignsubmission_file_/07_tiny.ipynb",
                "李 小龍_1234568_assignsubmission_file_/deep/er/x.ipynb",
                "Zoe_1234569_assignsubmission_file/x.ipynb",
                "Group A-Sam_1234570_assignsubmission_file_my_notebook.ipynb",
            ],
            ["Anna-Lena von Ü", "Group A-Sam", "Zoe", "李 小龍"],
        ),
        (
            [
                "smithanna_12345_678901_07_tiny.ipynb",
                "doe_smith_12346_678902_x.ipynb",
                "anon_AbC12_678903_07_tiny.ipynb",
            ],
            ["anon_AbC12", "doe_smith", "smithanna"],
        ),
    ],
)
@pytest.mark.parametrize("as_archive", [False, True])
def test_layouts(lessons, folder, put, tiny, paths, students, as_archive):
    if as_archive:
        put("download.zip", packed((path, tiny) for path in paths))
    else:
        for path in paths:
            put(path, tiny)
    found = find(folder, lessons)
    assert problems(found) == {}
    assert sorted(x.student for x in found) == students
    before = "download.zip!" if as_archive else ""
    assert sorted(x.source for x in found) == sorted(before + path for path in paths)
    assert {x.lesson for x in found} == {TINY}
    assert not any(x.remarks or x.late for x in found)


def test_canvas_says_who_was_late_and_who_handed_in_again(lessons, folder, put, tiny):
    put("smithanna_LATE_12345_678901_07_tiny-2.ipynb", tiny)
    put("LATE_anon_x9Y8z_678902_07_tiny.ipynb", tiny)
    anonymous, late = find(folder, lessons)
    assert (anonymous.student, anonymous.late, anonymous.remarks) == ("anon_x9Y8z", True, ())
    assert (late.student, late.late) == ("smithanna", True)
    assert late.remarks == ("Handed in again: Canvas numbers it 2.",)


def test_moodle_s_online_texts_go_with_the_files(lessons, folder, put, tiny):
    put("Anna S_123_assignsubmission_file_/07_tiny.ipynb", tiny)
    put("Anna S_123_assignsubmission_onlinetext_/onlinetext.html", b"<p>Here it is")
    put("Ben_124_assignsubmission_onlinetext_/onlinetext.html", b"<p>Sorry")
    anna, ben = find(folder, lessons)
    assert anna.remarks == ("Handed in as well, and not graded: onlinetext.html.",)
    assert ben.student == "Ben"
    assert ben.problem == "There is no notebook, only onlinetext.html: hand in the .ipynb."


def test_a_student_s_archive(lessons, folder, put, tiny):
    mine = packed([("work/07_tiny.ipynb", tiny), ("work/notes.txt", b"")])
    put("anna.zip", mine)
    put("ben/mine.ZIP", mine)
    put("Cem_125_assignsubmission_file_/mine.zip", mine)
    put("dora_126_678901_mine.zip", mine)
    found = find(folder, lessons)
    assert problems(found) == {}
    assert [(x.student, x.source) for x in found] == [
        ("Cem", "Cem_125_assignsubmission_file_/mine.zip!work/07_tiny.ipynb"),
        ("anna", "anna.zip!work/07_tiny.ipynb"),
        ("ben", "ben/mine.ZIP/work/07_tiny.ipynb"),
        ("dora", "dora_126_678901_mine.zip!work/07_tiny.ipynb"),
    ]
    assert {x.remarks for x in found} == {("Handed in as well, and not graded: notes.txt.",)}


def test_students_archives_in_those_of_classes(lessons, folder, put, tiny, later):
    put("one.zip", packed([("dora_126_678901_mine.zip", packed([("work/x.ipynb", tiny)]))]))
    put("two.zip", packed([("anna.ipynb", later), ("ben.ipynb", later)]))
    put("three.zip", packed([("anna/a.ipynb", tiny), ("eve/a.ipynb", tiny)]))
    assert told(find(folder, lessons)) == [
        ("anna", TINY, "three.zip!anna/a.ipynb"),
        ("anna", LATER, "two.zip!anna.ipynb"),
        ("ben", LATER, "two.zip!ben.ipynb"),
        ("dora", TINY, "one.zip!dora_126_678901_mine.zip!work/x.ipynb"),
        ("eve", TINY, "three.zip!eve/a.ipynb"),
    ]


def test_an_archive_of_one_student_s_lessons_is_one_student_s(lessons, folder, put, tiny, later):
    put("anna.zip", packed([("07_tiny.ipynb", tiny), ("lesson 11.ipynb", later)]))
    assert {(x.student, x.lesson) for x in find(folder, lessons)} == {
        ("anna", TINY),
        ("anna", LATER),
    }


def test_nobody_hands_in_under_another_s_name(lessons, folder, put, tiny):
    forged = ["Ben_124_assignsubmission_file_/x.ipynb", "cem_125_678902_x.ipynb", "dora/x.ipynb"]
    put("mallory.zip", packed((name, tiny) for name in forged))
    put("anna/week/Ben_124_assignsubmission_file_x.ipynb", tiny)
    put("Eve_9_assignsubmission_file_/Ben_124_assignsubmission_file_/x.ipynb", tiny)
    assert {x.student for x in find(folder, lessons)} == {"mallory", "anna", "Eve"}


def test_the_lesson_is_known_by_grade_ids_then_by_name_then_by_what_is_defined(
    lessons, folder, put, tiny, later
):
    def bare(content):
        stripped = nbformat.reads(content.decode(), as_version=4)
        for each in stripped.cells:
            each.metadata = nbformat.NotebookNode()
        return nbformat.writes(stripped).encode()

    put("a/07_tiny.ipynb", later)
    put("b/11_later.ipynb", bare(tiny))
    put("c/week 7/x.ipynb", bare(later))
    put("d/Tiny-1.ipynb", bare(later))
    put("e/x.ipynb", bare(later))
    put("f/x.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=[code("1")])).encode())
    found = find(folder, lessons)
    assert [x.lesson for x in found] == [LATER, LATER, TINY, TINY, LATER, None]
    assert found[-1].problem == (
        "It holds nothing of the lessons that are graded (07_tiny, 11_later)."
    )


def test_only_the_lessons_asked_for_are_graded(lessons, folder, put, tiny, later):
    put("anna/07_tiny.ipynb", tiny)
    put("anna/11_later.ipynb", later)
    found = find(folder, lessons[1:])
    assert told(found) == [("anna", LATER, "anna/11_later.ipynb")]
    assert list(problems(found)) == ["anna/07_tiny.ipynb"]


def test_a_notebook_is_kept_without_what_grading_does_not_need(lessons, folder, put):
    whole = solved(lessons[0])
    first = whole.cells[2]
    first.outputs = [nbformat.v4.new_output("stream", text="x" * 10_000)]
    first.metadata["collapsed"] = True
    whole.metadata["widgets"] = {"state": {}}
    image = nbformat.v4.new_markdown_cell("![](data:image/png;base64," + "A" * 500_000 + ") told")
    image.attachments = {"a.png": {"image/png": "AAAA"}}
    whole.cells.append(image)
    put("anna.ipynb", nbformat.writes(whole).encode())
    (submission,) = find(folder, lessons)
    assert len(submission.content) < 20_000
    kept = read(submission)
    nbformat.validate(kept)
    assert [x.source for x in kept.cells[:-1]] == [x.source for x in whole.cells[:-1]]
    assert kept.cells[-1].source == "![]((image)) told"
    assert cell(kept, "ex-07-1").metadata == {
        "nbgrader": {"grade_id": "ex-07-1"},
        "tags": ["exercise"],
    }
    first.outputs = []
    put("anna.ipynb", nbformat.writes(whole).encode())
    assert find(folder, lessons)[0].digest == submission.digest
    cell(whole, "ex-07-1").source += "\n"
    put("anna.ipynb", nbformat.writes(whole).encode())
    assert find(folder, lessons)[0].digest != submission.digest


def test_keys_are_file_names_that_differ_and_stay(lessons, folder, put, tiny):
    names = [
        "Anna",
        "anna",
        "änna",
        "аnna",
        "x/y",
        "a\nb",
        "CON",
        "x" * 200,
        "李",
        "=1+1",
        "a'\"<b>",
    ]
    for name in names:
        put(f"{name.replace('/', '∕')}.ipynb", tiny)
    found = find(folder, lessons)
    keys = [x.key for x in found]
    assert len({key.lower() for key in keys}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]{1,60}", key) for key in keys)
    put("another.ipynb", tiny)
    assert set(keys) < {x.key for x in find(folder, lessons)}
    assert "a\\nb" in {x.student for x in found}
    assert "李" in {x.student for x in found}
    assert all(x.source.isprintable() and x.student.isprintable() for x in found)


def test_names_that_are_no_text_and_names_that_would_mislead(lessons, folder, tiny):
    (folder / os.fsdecode(b"\xff\xfe.ipynb")).write_bytes(tiny)
    (folder / "gnp\u202eevil.ipynb").write_bytes(tiny)
    first, second = sorted(x.student for x in find(folder, lessons))
    assert first == "\\xff\\xfe"
    assert second == "gnp\\u202eevil"


def test_two_of_one_name_are_both_graded_and_reported(lessons, folder, put, tiny):
    put("Anna S_123_assignsubmission_file_/07_tiny.ipynb", tiny)
    put("Anna S_124_assignsubmission_file_/07_tiny.ipynb", tiny)
    one, other = find(folder, lessons)
    assert one.student == other.student == "Anna S"
    assert one.key != other.key
    assert one.remarks == (f"Handed in under the same name for the same lesson: {other.source}.",)


def test_files_of_one_name_in_an_archive_are_both_graded(lessons, folder, put, tiny):
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = packed([("07_tiny.ipynb", tiny), ("07_tiny.ipynb", tiny)])
    put("anna.zip", content)
    one, other = find(folder, lessons)
    assert other.source == "anna.zip!07_tiny.ipynb (number 2)"
    assert one.key != other.key


def test_noise_is_left_out(lessons, folder, put, tiny):
    put("anna/07_tiny.ipynb", tiny)
    put("anna/.ipynb_checkpoints/07_tiny-checkpoint.ipynb", tiny)
    put(".hidden.ipynb", tiny)
    put("manifest.json", b"{}")
    put("ben.zip", packed([("x.ipynb", tiny), ("__MACOSX/._x.ipynb", b""), ("._x.ipynb", b"")]))
    found = find(folder, lessons)
    assert [x.source for x in found] == ["anna/07_tiny.ipynb", "ben.zip!x.ipynb"]
    assert not any(x.remarks for x in found)


def test_no_notebook_at_all(lessons, folder, put, tiny):
    (folder / "anna").mkdir()
    (folder / "submitted" / "ben" / "week").mkdir(parents=True)
    put("cem/solution.py", b"def keep_largest(): pass")
    put("dora.py", b"")
    put("eve.zip", packed([("solution.py", b"")]))
    put("fay.zip", packed([]))
    put("gus/.ipynb_checkpoints/07_tiny.ipynb", tiny)
    put("hal.ipynb/notes.txt", b"")
    found = find(folder, lessons)
    assert {x.student: x.problem for x in found} == {
        "anna": "There is no notebook: hand in the .ipynb.",
        "ben": "There is no notebook: hand in the .ipynb.",
        "cem": "There is no notebook, only solution.py: hand in the .ipynb.",
        "dora": "There is no notebook, only dora.py: hand in the .ipynb.",
        "eve": "The archive holds no notebook, but solution.py: pack the .ipynb.",
        "fay": "The archive holds no notebook, but nothing at all: pack the .ipynb.",
        "gus": "There is no notebook: hand in the .ipynb.",
        "hal.ipynb": "There is no notebook, only notes.txt: hand in the .ipynb.",
    }
    assert all(x.content is None for x in found)
    with pytest.raises(ValueError, match="holds no notebook"):
        read(found[0])


DEEP = b'{"nbformat": 4, "cells": [{"cell_type": "code", "metadata": {}, "source": '
BROKEN = {
    "empty": (b"", "It is empty"),
    "blank": (b" \n\0\0", "It is empty"),
    "binary": (bytes(range(256)) * 9, "hand"),
    "cut": (b'{"nbformat": 4, "cells": [\n\n', "not valid JSON (line 3)"),
    "text": (b"my notebook", "not valid JSON"),
    "list": (b"[1, 2]", "no notebook, though its name says so"),
    "number": (b"1" * 5000, "not valid JSON"),
    "no_format": (b'{"cells": []}', "no notebook, though its name says so"),
    "word": (b'{"nbformat": "4", "cells": []}', "no notebook, though its name says so"),
    "five": (b'{"nbformat": 5, "cells": []}', "format 5; formats up to 4 are read"),
    "old": (b'{"nbformat": 3, "worksheets": 7}', "format 3 that could not be converted"),
    "zip": (packed([("x", b"x")]), "It is a zip archive"),
    "no_cells": (b'{"nbformat": 4}', "without a list of cells"),
    "odd_cell": (b'{"nbformat": 4, "cells": [7]}', "cell 1 is no notebook cell"),
    "odd_kind": (b'{"nbformat": 4, "cells": [{"source": ""}]}', "cell 1 is no notebook cell"),
    "odd_source": (
        b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": [1]}]}',
        "cell 1 is no notebook cell",
    ),
    "deep": (b"[" * 100_000, "It is damaged"),
    "deeper": (DEEP + b'{"a":' * 90_000 + b"1" + b"}" * 90_000, "It is damaged"),
    "brackets": (b"[" + b"{}," * 600_000 + b"1]", "too many parts"),
    "large": (b" " * (notebook.LARGEST + 1), "It has 20 MB, and no more than 20 are read"),
    "many": (
        json.dumps({"nbformat": 4, "cells": [{"cell_type": "raw", "source": ""}] * 2_001}).encode(),
        "It has 2,001 cells",
    ),
    "long": (
        json.dumps(
            {"nbformat": 4, "cells": [{"cell_type": "code", "source": "1," * 200_000}]}
        ).encode(),
        "Its cells hold 400,000 characters",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_notebooks_get_a_sentence_and_harm_none(lessons, folder, put, tiny, name):
    content, sentence = BROKEN[name]
    put("anna/07_tiny.ipynb", content)
    put("ben/07_tiny.ipynb", tiny)
    anna, ben = find(folder, lessons)
    assert sentence in anna.problem
    assert anna.problem.endswith(".")
    assert anna.lesson == TINY, "by the file's name, so that the gradebook has a line for it"
    assert anna.content is None
    assert ben.problem is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_read(lessons, folder, put, tiny, encoding):
    put("anna.ipynb", tiny.decode().encode(encoding))
    (submission,) = find(folder, lessons)
    assert submission.problem is None
    assert cell(read(submission), "ex-07-1").source


def test_odd_but_whole_notebooks_are_read(lessons, folder, put, tiny):
    whole = json.loads(tiny)
    whole["nbformat_minor"] = 99
    for each in whole["cells"]:
        each["source"] = "".join(each["source"]).splitlines(keepends=True)
        each["metadata"] |= {"id": each.pop("id"), "tags": each["metadata"].get("tags", 7)}
    whole["cells"][0]["metadata"] = None
    whole["cells"][1]["metadata"]["nbgrader"] = {"grade_id": ["x"]}
    whole["cells"][-1]["source"] = "half \ud800 of it"
    put("anna.ipynb", json.dumps(whole).encode())
    (submission,) = find(folder, lessons)
    kept = read(submission)
    assert kept.cells[-1].source == "half ? of it"
    assert kept.cells[2].id == "07-002"
    assert "keep_largest" in cell(kept, "ex-07-1").source


def test_a_notebook_of_format_3_is_upgraded(lessons, folder, put):
    old = nbformat.convert(solved(lessons[0]), 3)
    put("anna.ipynb", json.dumps(old).encode())
    (submission,) = find(folder, lessons)
    assert (submission.problem, submission.lesson) == (None, TINY)
    assert "keep_largest" in cell(read(submission), "ex-07-1").source


def test_links_are_not_followed(lessons, folder, tmp_path, put, tiny):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "07_tiny.ipynb").write_bytes(tiny)
    (secret / "x.zip").write_bytes(packed([("07_tiny.ipynb", tiny)]))
    (folder / "anna.ipynb").symlink_to(secret / "07_tiny.ipynb")
    (folder / "ben").symlink_to(secret, target_is_directory=True)
    (folder / "cem.zip").symlink_to(secret / "x.zip")
    (folder / "dora.ipynb").symlink_to(tmp_path / "nothing")
    (folder / "eve").mkdir()
    (folder / "eve" / "loop").symlink_to(folder, target_is_directory=True)
    put("eve/07_tiny.ipynb", tiny)
    found = find(folder, lessons)
    assert {x.student for x in found if x.problem == notebook.LINK} == {
        "anna",
        "ben",
        "cem",
        "dora",
    }
    assert told(found) == [("eve", TINY, "eve/07_tiny.ipynb")]
    assert found[-1].remarks == ("Handed in as well, and not graded: loop.",)


def test_pipes_sockets_and_devices_are_never_opened(lessons, folder, monkeypatch):
    monkeypatch.chdir(folder)  # a socket's path must be short
    os.mkfifo("anna.ipynb")
    os.mkfifo("ben.zip")
    server = socket.socket(socket.AF_UNIX)
    server.bind("cem.ipynb")
    server.close()
    os.mkfifo("dora")
    expected = ["anna", "ben", "cem", "dora"]
    if os.geteuid() == 0:
        os.mknod("eve.ipynb", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # endless zeros
        expected.append("eve")
    found = find(folder, lessons)
    assert [x.student for x in found] == expected
    assert {x.problem for x in found} == {"It is no ordinary file, so it was not opened."}


def test_a_file_that_cannot_be_read_is_named(lessons, folder, put, tiny, monkeypatch):
    put("anna.ipynb", tiny)
    put("ben.ipynb", tiny)

    def refused(path, flags):
        if path.name == "anna.ipynb":
            raise PermissionError(13, "Permission denied")
        return opening(path, flags)

    opening = os.open
    monkeypatch.setattr(os, "open", refused)
    anna, ben = find(folder, lessons)
    assert anna.problem == "It could not be read (Permission denied): hand it in again."
    assert ben.problem is None


def test_archives_that_lead_out_of_themselves_are_read_where_they_are(
    lessons, folder, tmp_path, put, tiny
):
    names = ["../../07_tiny.ipynb", "/etc/07_tiny.ipynb", "C:\\x\\07_tiny.ipynb", "a/../b.ipynb"]
    put("anna.zip", packed((name, tiny) for name in names))
    found = find(folder, lessons)
    assert len(told(found)) == len(names)
    assert {x.student for x in found} == {"anna"}
    assert "Its archive calls it `../../07_tiny.ipynb`." in {y for x in found for y in x.remarks}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["anna.zip", "class"]


def test_archives_that_are_bombs_are_not_unpacked(lessons, folder, put, tiny, monkeypatch):
    zeros = b"\0" * 60_000_000
    put("anna.zip", packed([("07_tiny.ipynb", zeros)]))
    put("ben.zip", packed([("07_tiny.ipynb", tiny), ("deeper.zip", packed([("x.ipynb", tiny)]))]))
    put("cem.zip", packed([(f"{i}.ipynb", b"") for i in range(30)]))
    put("dora.zip", packed([("07_tiny.ipynb", b"\0" * 20_500_000), ("x", os.urandom(200_000))]))
    lying = packed([("07_tiny.ipynb", b"x" * 5_000_000)])
    at = lying.rindex(b"PK\x01\x02") + 24
    put("eve.zip", lying[:at] + (100).to_bytes(4, "little") + lying[at + 4 :])
    monkeypatch.setattr(archives, "MOST_FILES", 29)
    found = find(folder, lessons)
    said = problems(found)
    assert "It would unpack 0.1 MB to 60 MB, so it was not unpacked" in said["anna.zip"]
    assert said["ben.zip!deeper.zip"] == "It is an archive in an archive: hand in the .ipynb."
    assert said["cem.zip"] == "It holds more than 29 files, so it was not unpacked."
    assert "It has 20 MB" in said["dora.zip!07_tiny.ipynb"]
    assert said["eve.zip!07_tiny.ipynb"] == "It is damaged inside its archive: pack it again."
    assert told(found) == [("ben", TINY, "ben.zip!07_tiny.ipynb")]


def test_names_in_archives_may_be_long_or_nothing(lessons, folder, put, tiny):
    put("anna.zip", packed([("a_1_1" * 12_000 + ".ipynb", tiny), ("/", b""), ("..", b"x")]))
    (submission,) = find(folder, lessons)
    assert submission.problem is None
    assert len(submission.source) < 250
    assert submission.source.endswith("a_1_1.ipynb")


def test_a_class_s_archive_may_be_large_but_not_each_student_s(
    lessons, folder, put, tiny, monkeypatch
):
    monkeypatch.setattr(archives, "LARGEST_ARCHIVE", 2 * len(tiny))
    inner = packed([(f"{i}.ipynb", tiny) for i in range(3)])
    outer = [("Ann_1_assignsubmission_file_/x.zip", inner)]
    outer += [(f"B_{i}_assignsubmission_file_/07_tiny.ipynb", tiny) for i in range(3)]
    put("all.zip", packed(outer))
    found = find(folder, lessons)
    assert len(told(found)) == 3
    assert "so it was not unpacked" in problems(found)["all.zip!Ann_1_assignsubmission_file_/x.zip"]


def test_damaged_locked_and_strangely_packed_archives(lessons, folder, put, tiny):
    put("anna.zip", b"PK\x03\x04 not really")
    whole = packed([("07_tiny.ipynb", tiny)])
    put("ben.zip", whole[:200] + bytes(reversed(whole[200:300])) + whole[300:])
    locked = bytearray(whole)
    locked[whole.rindex(b"PK\x01\x02") + 8] |= 1
    put("cem.zip", bytes(locked))
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("07_tiny.ipynb", tiny)
    put("dora.zip", memory.getvalue())
    link = zipfile.ZipInfo("07_tiny.ipynb")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    put("eve.zip", packed([(link, b"/etc/passwd")]))
    assert list(problems(find(folder, lessons)).values()) == [
        "It is no zip archive, or a damaged one: pack it again.",
        "It is damaged inside its archive: pack it again.",
        "It is locked with a password: hand it in without one.",
        "It is packed in a way that is not read: pack it as an ordinary zip.",
        notebook.LINK,
    ]


def test_the_wrong_folder_is_named(lessons, folder, put, tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no folder .*nothing"):
        find(folder / "nothing", lessons)
    assert find(folder, lessons) == []
    monkeypatch.setattr(submissions, "MOST_FILES", 2)
    for name in "abc":
        put(f"{name}.ipynb", tiny)
    with pytest.raises(ValueError, match="holds more than 2 files"):
        find(folder, lessons)


def test_an_untouched_student_version_can_be_graded(lessons, folder, put):
    for lesson in lessons:
        put(f"anna/{lesson.name}.ipynb", nbformat.writes(handed_out(lesson)).encode())
    assert [x.lesson for x in find(folder, lessons)] == [TINY, LATER]
