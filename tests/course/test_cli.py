"""The command line: what it prints, its exit codes, and errors of one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from pruning101.core import data
from pruning101.course import cli, reproduce


def said(capsys, *arguments):
    """Exit code, stdout and stderr of the command."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_help_names_every_command(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    for command in ("lab", "run", "build", "assign", "grade", "reproduce", "data", "doctor"):
        assert re.search(rf"^    {command}\s", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "tinny"], "No lesson is called 'tinny': did you mean 07_tiny?"),
        (["assign", "9"], "No lesson is called '9'"),
        (["build", "nothing"], "No lesson is called 'nothing'"),
        (["run", "tiny", "--profile", "fast"], "invalid choice: 'fast'"),
        (["lab", "--port", "99999"], "Port 99999 cannot be used"),
        (["data", "mnits"], "mnist"),
        (["reproduce", "lacot"], "There is no table 'lacot': did you mean lacoot?"),
        (["reproduce", "lacoot", "--profile", "papr"], "did you mean paper?"),
        (["reproduce", "lacoot", "--rows", "eazier"], "There is no row 'eazier'"),
        (["reproduce", "lacoot", "--seeds", "one"], "invalid int value: 'one'"),
        ([], "required"),
        (["grade"], "required: SUBMISSIONS, --out"),
        (["mark"], "invalid choice: 'mark'"),
    ],
)
def test_a_wrong_call_gets_one_sentence(built, capsys, arguments, told):
    code, out, err = said(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert told in err
    assert err.startswith("pruning101")
    assert len(err.splitlines()) == 1


def test_a_notebook_that_is_not_built_yet_says_how(tree, capsys):
    code, _, err = said(capsys, "run", "tiny")
    assert code == 2
    assert "pruning101 build 07_tiny" in err


def test_no_material_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRUNING101_MATERIAL", str(tmp_path))
    code, _, err = said(capsys, "run", "tiny")
    assert code == 2
    assert "PRUNING101_MATERIAL" in err


def test_run_ends_with_the_table_and_the_path(built, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, "run", "tiny", "--profile", "standard")
    assert code == 0
    path = tmp_path / "runs" / "07_tiny.standard.ipynb"
    assert out == f"profile  weights\nstandard 3\n{path}\n"
    assert "07_tiny (standard)" in err
    assert "11/11" in err, "a progress bar counts the cells"
    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(path, as_version=4).cells]
    assert tags.index(["injected-parameters"]) == tags.index(["parameters"]) + 1


@pytest.mark.slow
def test_run_keeps_what_a_failing_lesson_had_executed(built, tmp_path, capsys):
    notebook = built / "notebooks" / "07_tiny.ipynb"
    notebook.write_text(notebook.read_text().replace("plt.show()", "plt.shew()"))
    path = tmp_path / "kept.ipynb"
    code, out, err = said(capsys, "run", "tiny", "--out", str(path))
    assert code == 1
    assert out == ""
    assert "07_tiny" in err
    assert "`plt.plot([0, 1, 2])` failed: AttributeError" in err.splitlines()[-1]
    counts = [cell.get("execution_count") for cell in nbformat.read(path, as_version=4).cells]
    assert counts[1:7] == [1, 2, 3, 4, 5, 6]
    assert counts[7] is None


@pytest.mark.slow
def test_a_kernel_that_dies_is_said_so(built, tmp_path, capsys):
    notebook = built / "notebooks" / "07_tiny.ipynb"
    notebook.write_text(notebook.read_text().replace("plt.show()", "import os; os._exit(1)"))
    code, _, err = said(capsys, "run", "tiny", "--out", str(tmp_path / "kept.ipynb"))
    assert code == 1
    assert "the kernel died" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends the signal of Ctrl-C")
def test_ctrl_c_stops_a_run_and_keeps_what_was_executed(built, tmp_path):
    notebook = built / "notebooks" / "07_tiny.ipynb"
    waiting = "open('there', 'w').close(); import time; time.sleep(600)"
    notebook.write_text(notebook.read_text().replace("plt.show()", waiting))
    command = [sys.executable, "-m", "pruning101.course", "run", "tiny", "--out", "kept.ipynb"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and what it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "there").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "pruning101: stopped."
    assert "Traceback" not in err
    cells = nbformat.read(tmp_path / "kept.ipynb", as_version=4).cells
    assert cells[4].outputs[0].text.startswith("step 0"), "the notebook as far as it came"
    assert [cell.get("execution_count") for cell in cells][1:6] == [1, 2, 3, 4, 5]
    assert not cells[8].outputs


def test_build_check_lists_drift_and_fails(built, capsys):
    assert said(capsys, "build", "index")[0] == 0
    assert said(capsys, "build", "--check")[:2] == (0, "")
    source = built / "lessons" / "07_tiny.py"
    source.write_text(source.read_text().replace("Exercise 1", "Exercise One"))
    before = (built / "notebooks" / "07_tiny.ipynb").read_bytes()
    code, out, _ = said(capsys, "build", "tiny", "--check")
    assert code == 1
    assert "07_tiny: cell 9" in out or "07_tiny: cell 8" in out
    assert (built / "notebooks" / "07_tiny.ipynb").read_bytes() == before


def test_assign_prints_where_it_wrote(built, tmp_path, capsys):
    code, out, _ = said(capsys, "assign", "7", "--to", str(tmp_path / "class"))
    assert code == 0
    assert Path(out.strip()).is_file()
    assert Path(out.strip()) == tmp_path / "class" / "07_tiny.ipynb"


def test_reproduce_hands_on_its_options_and_prints_table_and_path(monkeypatch, tmp_path, capsys):
    asked = {}

    def made(name, **options):
        asked.update(options, name=name)
        return "row  test %", tmp_path / "t.json"

    monkeypatch.setattr(reproduce, "reproduce", made)
    arguments = ["--profile", "standard", "--seeds", "0", "1", "--rows", "original", "lacoot"]
    code, out, _ = said(capsys, "reproduce", "lacoot", *arguments, "--folder", str(tmp_path))
    assert (code, out) == (0, f"row  test %\n{tmp_path / 't.json'}\n")
    assert asked == {
        "name": "lacoot",
        "profile": "standard",
        "seeds": [0, 1],
        "rows": ["original", "lacoot"],
        "out": None,
        "folder": tmp_path,
        "done": False,
    }


def test_training_that_diverges_gets_one_sentence(monkeypatch, capsys):
    def diverged(name, **options):
        raise FloatingPointError("The loss became nan at step 1 of epoch 1; try a lower lr.")

    monkeypatch.setattr(reproduce, "reproduce", diverged)
    code, out, err = said(capsys, "reproduce", "lacoot")
    assert (code, out) == (1, "")
    assert err == "pruning101: The loss became nan at step 1 of epoch 1; try a lower lr.\n"


def test_data_prints_the_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "convert", lambda name, root: root / f"{name}.safetensors")
    code, out, _ = said(capsys, "data", "mnist", "--root", str(tmp_path))
    assert code == 0
    assert out == f"{tmp_path / 'mnist.safetensors'}\n"
