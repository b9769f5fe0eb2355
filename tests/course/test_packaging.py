"""The wheel built from the tree installs in a clean environment, imports whole and carries the
course.
"""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

EVERYTHING = """
import importlib, json, pkgutil, pruning101
from pruning101.course import material
names = [m.name for m in pkgutil.walk_packages(pruning101.__path__, "pruning101.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps([pruning101.__file__, str(material.material()), names]))
"""


def environment(**more):
    names = ("PYTHONPATH", "PRUNING101_MATERIAL")
    return {**{k: v for k, v in os.environ.items() if k not in names}, **more}


def test_wheel_carries_lessons_notebooks_and_results(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("lessons", "notebooks", "results"):
        for path in (ROOT / folder).rglob("*"):
            hidden = any(
                part.startswith(".") or part == "__pycache__"
                for part in path.parts[len(ROOT.parts) :]
            )
            if path.is_file() and not hidden:
                assert f"pruning101/course/material/{path.relative_to(ROOT).as_posix()}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pruning101"}
    assert any(name.endswith("digits.safetensors") for name in names)


def test_every_module_imports_from_the_wheel_and_finds_its_material(clean, tmp_path):
    done = subprocess.run(
        [clean / "python", "-c", EVERYTHING],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, material, names = json.loads(done.stdout.splitlines()[-1])
    assert clean.parent in Path(where).parents
    assert clean.parent in Path(material).parents
    modules = [p.stem for p in (ROOT / "pruning101").glob("*.py") if p.stem != "__init__"]
    assert {f"pruning101.{module}" for module in modules} <= set(names)


def test_the_command_of_the_wheel(clean, tmp_path):
    command = [clean / "pruning101", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
    command = [clean / "pruning101", "assign", "magnitude", "--to", "class"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "class" / "03_magnitude.ipynb").is_file()


def test_lab_from_the_wheel_copies_the_notebooks_here(clean, tmp_path):
    command = [clean / "pruning101", "lab", "--no-browser"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = next(line.strip() for line in process.stdout if "http://" in line)
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
    assert "/lab/tree/index.ipynb?" in address
    copied = {p.relative_to(tmp_path / "pruning101-notebooks") for p in tmp_path.rglob("*.ipynb")}
    assert copied == {
        p.relative_to(ROOT / "notebooks")
        for p in (ROOT / "notebooks").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    }


def test_the_example_of_the_readme_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # one a round
    assert all(float(line.split()[1]) > 0.9 for line in lines)
