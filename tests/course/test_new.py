"""`pruning101 new`: five files that run as they are, and tests that say what is still missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exercises import faults, read

from pruning101.course import build, cli, material
from pruning101.course import new as begin

ROOT = Path(__file__).resolve().parents[2]
FIVE = [
    "lessons/08_token_folding.py",
    "pruning101/token_folding.py",
    "pruning101/widgets/token_folding.py",
    "tests/test_token_folding.py",
    "tests/course/mutations/08_token_folding.py",
]


@pytest.fixture
def checkout(tree):
    """The tiny course with the folders that a checkout has."""
    for folder in ("pruning101/widgets", "tests/course/mutations"):
        (tree / folder).mkdir(parents=True)
    shutil.copyfile(ROOT / "pyproject.toml", tree / "pyproject.toml")
    return tree


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))


def test_one_command_makes_the_five_files_and_says_what_else_to_do(checkout, capsys):
    before = files(checkout)
    assert cli.main(["new", "token_folding"]) == 0
    out = capsys.readouterr().out
    assert sorted({*files(checkout)} - {*before}) == sorted(FIVE)
    assert out.splitlines()[:5] == [str(checkout / path) for path in FIVE]
    for place in ("pyproject.toml", "README.md", "CHANGELOG.md", "instructor.md", "references.bib"):
        assert place in out
    for path in FIVE:
        text = (checkout / path).read_text()
        assert not re.search(r"@\w+@", text), path
        assert "To write:" in text, "each file says what its author has to do"


def test_the_lesson_builds_and_its_exercise_passes_the_meta_test(checkout, monkeypatch):
    begin.new("token_folding", checkout)
    lesson = material.find("token_folding", checkout)
    notebook = build.pair(lesson.source.read_text(), lesson)
    assert build.header(notebook, lesson).title == "Token folding"
    # Its module is in the copy only, and no exercise needs it.
    source = lesson.source.read_text()
    lines = [line for line in source.splitlines() if "token_folding" not in line]
    lesson.source.write_text("\n".join(lines))
    script = (checkout / "tests/course/mutations/08_token_folding.py").read_text()
    names: dict = {}
    exec(script, names)
    assert list(read(lesson)[1]) == ["ex-08-1"]
    assert faults(lesson, names["MUTATIONS"]) == []


@pytest.mark.parametrize("topic", ["vit", "pruning_before_training"])
def test_the_five_files_keep_the_rules_of_style(checkout, topic):
    for path in begin.new(topic, checkout):
        name = path.relative_to(checkout).as_posix()
        for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", name, "-"]
            done = subprocess.run(
                ruff, cwd=ROOT, input=path.read_text(), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("topic", "told"),
    [
        ("Token-Folding", "'token_folding', not 'Token-Folding'"),
        ("2_4", "not '2_4'"),
        ("lambda", "not 'lambda'"),
        ("../escape", "not '../escape'"),
        ("", "not ''"),
        ("tiny", "07_tiny.py is there already"),
        ("index", "index.py is there already"),
        ("widgets", "widgets is there already"),
    ],
)
def test_a_name_that_cannot_be_taken_is_refused_before_anything_is_written(
    checkout, capsys, topic, told
):
    before = files(checkout)
    assert cli.main(["new", topic]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1
    assert files(checkout) == before


@pytest.mark.parametrize("path", FIVE)
def test_no_file_is_written_over(checkout, path):
    there = checkout / path.replace("08_", "05_")
    there.write_text("mine = 1\n")
    before = files(checkout)
    with pytest.raises(FileExistsError, match=there.name):
        begin.new("token_folding", checkout)
    assert files(checkout) == before
    assert there.read_text() == "mine = 1\n"


def test_without_a_checkout_it_says_so(tree, capsys):
    assert cli.main(["new", "token_folding"]) == 2
    assert "is no checkout" in capsys.readouterr().err
    assert files(tree) == ["lessons/07_tiny.py", "lessons/index.py"]


def test_where_one_file_cannot_be_written_none_is_left(checkout, monkeypatch, tmp_path):
    skeleton = shutil.copytree(begin.SKELETON, tmp_path / "skeleton")
    (skeleton / "mutations.txt").unlink()  # the last of the five
    monkeypatch.setattr(begin, "SKELETON", skeleton)
    before = files(checkout)
    with pytest.raises(OSError, match="mutations"):
        begin.new("token_folding", checkout)
    assert files(checkout) == before


@pytest.mark.slow
def test_the_tests_say_what_a_new_lesson_lacks(tmp_path):
    copy = tmp_path / "checkout"
    skip = shutil.ignore_patterns(
        ".*", "venv", "dist", "build", "runs", "results", "benchmarks", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    (lesson,) = {
        path.stem for path in begin.new("token_folding", copy) if path.parent.name == "lessons"
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(copy), "PRUNING101_MATERIAL": str(copy)}
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", "token_folding or one_way"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    failed = set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE))
    assert {
        "test_imports_go_one_way",  # its layer in pyproject.toml
        "test_one_name_finds_everything_of_a_lesson",  # its notebooks
        "test_every_lesson_has_three_coded_exercises",
        "test_nothing_of_a_lesson_is_still_to_be_written",
        "test_a_lesson_has_its_row_in_the_readme",
        "test_a_lesson_has_its_row_in_the_index",
        "test_a_lesson_is_in_the_changelog",
        "test_a_lesson_has_its_section_in_the_guide",
        "test_the_references_of_a_lesson_are_in_the_bibliography",
    } <= failed, done.stdout
    assert "test_every_exercise_is_checked" not in failed, done.stdout
    assert "test_token_folding.py" not in "".join(
        re.findall("^FAILED.*", done.stdout, re.MULTILINE)
    )
    assert lesson.endswith("_token_folding")
