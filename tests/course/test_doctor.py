"""`pruning101 doctor`: it finds what is wrong and says how to mend it."""

import os
import re
import subprocess
import sys

import pytest

from pruning101.course import doctor


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "mnist.safetensors").touch()
    return ask(PRUNING101_DATA=str(root)), root


def ask(*path, **environment):
    """Run the command with fake packages on `path`; its exit code and what it printed."""
    env = {**os.environ, **environment}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pruning101.course", "doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_healthy_environment_fits_on_one_screen(healthy):
    (code, out), root = healthy
    assert code == 0, out
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 110
    for wanted in ("torch ", "torchvision ", "ipywidgets ", "jupyterlab ", "Python 3."):
        assert re.search(rf"{re.escape(wanted)}\S*\d", out) or "Python" in wanted
    assert re.search(r"device +\w+.*, training in (float32|bfloat16)", out)
    assert re.search(r"threads +\d+ of \d+", out)
    assert str(root) in out
    assert re.search(r"grading +\S", out)
    assert re.search(r"there +digits \(embedded\), mnist\n", out)
    assert "broken" not in out


def fake(folder, module, text):
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(text)
    return folder


@pytest.mark.slow
def test_torchvision_of_another_torch(tmp_path):
    text = 'raise RuntimeError("operator torchvision::nms does not exist")'
    code, out = ask(fake(tmp_path, "torchvision", text))
    assert code == 1
    assert "broken: torch and torchvision do not fit each other" in out
    assert "pip install --force-reinstall torch torchvision" in out


@pytest.mark.slow
def test_missing_ipywidgets(tmp_path):
    text = "raise ModuleNotFoundError(\"No module named 'ipywidgets'\", name='ipywidgets')"
    code, out = ask(fake(tmp_path, "ipywidgets", text))
    assert code == 1
    assert "broken: ipywidgets is not installed: `pip install ipywidgets`." in out


@pytest.mark.slow
def test_a_library_that_kills_the_process_is_survived(tmp_path):
    code, out = ask(fake(tmp_path, "torchvision", "import os; os.abort()"))
    assert code == 1
    assert "broken" in out


@pytest.mark.slow
def test_a_data_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    code, out = ask(PRUNING101_DATA=str(tmp_path / "file" / "data"))
    assert code == 1
    assert "cannot be written: set PRUNING101_DATA" in out


def test_little_memory_is_a_note_and_breaks_nothing():
    report = doctor.Report()
    doctor._memory(report, 0.5)
    assert "0.5 GiB" in report.notes[0]
    assert report.broken == []
    doctor._memory(calm := doctor.Report(), 8.0)
    assert calm.notes == []


def test_what_keeps_submissions_from_being_confined_is_told_and_breaks_nothing():
    report = doctor.Report()
    doctor._grading(report, "Student code cannot be confined: " + "a reason, " * 12)
    first, second = report.lines
    assert first.startswith("  grading   Student code cannot be confined: a reason, ")
    assert second.startswith(" " * 12)
    assert (report.broken, report.notes) == ([], [])
    doctor._grading(fine := doctor.Report(), None)
    assert fine.lines == ["  grading   submissions can be confined"]
