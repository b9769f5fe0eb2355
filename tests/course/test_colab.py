"""The set-up cell as Colab runs it, the widgets with the ipywidgets that Colab has, and what Binder
installs.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from pruning101.course import material

ROOT = Path(__file__).resolve().parents[2]
LESSONS = material.lessons(ROOT)

# Runs the set-up cells given on stdin one after the other, each in a namespace of its own, the
# first as in Colab: torch is there before the course is, and Colab's package is loaded. The others
# find the course installed; their line that installs it is the same.
AS_IN_COLAB = """
import json, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
import importlib.util, torch
assert importlib.util.find_spec("pruning101") is None, "the course must not be there yet"
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for name, sources in json.load(sys.stdin).items():
    shell.reset(new_session=False)
    for source in sources:
        shell.run_cell(source, store_history=False).raise_error()
    sys.modules.pop("google.colab", None)
    where = shell.ev("__import__('pruning101').__file__")
    print("ran", json.dumps([name, where, torch.__version__, torch.__file__]))
"""


def setup(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if "setup" in cell.metadata.get("tags", [])]


def held(folder):
    """Name, size and time of every file below `folder`."""
    stats = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {
        str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats if path.suffix != ".pyc"
    }


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_set_up_cell_installs_only_in_colab_and_before_it_imports(lesson):
    (source, *_) = setup(lesson.notebook)
    assert setup(lesson.exercises) == setup(lesson.notebook)
    tree = ast.parse(source)
    (where,) = [
        index
        for index, node in enumerate(tree.body)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "'google.colab' in sys.modules"
    ]
    assert "run_line_magic('pip', 'install -q pruning101')" in ast.unparse(tree.body[where])
    assert "pip" not in ast.unparse(tree.body[:where] + tree.body[where + 1 :])
    early = {
        (getattr(node, "module", None) or node.names[0].name).split(".")[0]
        for node in tree.body[:where]
    }
    assert early <= set(sys.stdlib_module_names)


@pytest.mark.slow
def test_the_set_up_cells_run_in_colab_and_leave_its_torch_alone(wheel, colab, tmp_path):
    import torch

    package = Path(torch.__file__).parent
    before = held(package)
    cells = {lesson.name: setup(lesson.notebook) for lesson in LESSONS}
    names = ("PYTHONPATH", "PRUNING101_MATERIAL")
    env = {key: value for key, value in os.environ.items() if key not in names}
    # Nothing but the wheel can be installed: what Colab lacks otherwise would end in an error.
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [colab, "-c", AS_IN_COLAB],
        cwd=tmp_path,
        env={**env, "IPYTHONDIR": str(tmp_path)},
        input=json.dumps(cells),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert [name for name, *_ in ran] == list(cells)
    for _, where, version, torch_file in ran:
        assert colab.parents[1] in Path(where).parents, "it is the wheel's"
        assert version == torch.__version__
        assert Path(torch_file).resolve() == Path(torch.__file__).resolve()
    assert held(package) == before
    site = next((colab.parents[1] / "lib").glob("python*/site-packages"))
    installed = {path.name.split("-")[0] for path in site.glob("*.dist-info")}
    assert installed == {"pruning101"}


@pytest.fixture(scope="module")
def old_widgets(tmp_path_factory):
    """A folder with ipywidgets 7.7, to stand before the newer one of this environment."""
    folder = tmp_path_factory.mktemp("ipywidgets-7.7")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    command += ["ipywidgets==7.7.*", "widgetsnbextension==3.6.*", "ipython-genutils"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        message = f"ipywidgets 7.7 could not be installed: {done.stderr.strip()[-300:]}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.mark.slow
def test_the_widgets_work_with_the_ipywidgets_of_colab(old_widgets):
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["PYTHONPATH"] = str(old_widgets)
    asked = [sys.executable, "-c", "import ipywidgets; print(ipywidgets.__version__)"]
    version = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout
    assert version.startswith("7.7.")
    files = [*ROOT.glob("tests/test_widgets_*.py"), ROOT / "tests/test_magnitude.py"]
    files += [ROOT / "tests/test_optimal_brain_damage.py"]
    # The others of these tests draw and never come near ipywidgets.
    chosen = "test_widgets_base or controls_reach or has_one_slider or binds_its_sliders"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, "-W", "error::DeprecationWarning:ipywidgets", *map(str, files)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 8 + len(LESSONS), "the base's tests, and at least one a lesson"


def test_binder_installs_the_tree_and_what_it_needs():
    """`environment.yml` is what Binder reads; conda's names differ for a few packages."""
    called = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ *- +([^#\n]+?) *$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for need in project["dependencies"]:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", need).groups()
        assert called.get(name, name) + bounds in listed
    assert "-e ." in listed, "the tree itself"
    assert f"python{project['requires-python']}" in listed
    assert "pip" in listed
    assert "ipykernel" in listed
