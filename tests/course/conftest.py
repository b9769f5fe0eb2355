"""A course of one tiny lesson, so that the tools are tested apart from the real lessons."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from pruning101.course import build, material

TINY = Path(__file__).parent / "tiny" / "lessons"
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("PRUNING101_CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The folder of a course with the lesson 07_tiny, an index, and no notebooks yet."""
    root = tmp_path / "course"
    shutil.copytree(TINY, root / "lessons")
    (root / "notebooks").mkdir()
    monkeypatch.setenv("PRUNING101_MATERIAL", str(root))
    return root


@pytest.fixture(scope="session")
def built_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("built") / "course"
    shutil.copytree(TINY, root / "lessons")
    (root / "notebooks").mkdir()
    build.build(material.find("tiny", root))
    return root


@pytest.fixture
def built(built_once, tmp_path, monkeypatch):
    """A copy of that course with its notebooks built."""
    root = shutil.copytree(built_once, tmp_path / "course")
    monkeypatch.setenv("PRUNING101_MATERIAL", str(root))
    return root


@pytest.fixture
def serve(tmp_path):
    """A function that starts `pruning101 lab --no-browser` and returns the address it prints."""
    running = []

    def start(**environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "pruning101.course", "lab", "--no-browser", "--port", str(port)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "lab.log").open("w"),
            text=True,
        )
        running.append(process)
        for line in process.stdout:
            if line.strip().startswith("http://"):
                return line.strip()
        raise AssertionError((tmp_path / "lab.log").read_text())

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel built from the tree."""
    # Built from a copy: what the build leaves behind must not land in the tree.
    copy = tmp_path_factory.mktemp("source") / "pruning101"
    skip = shutil.ignore_patterns(
        ".git", ".venv", "venv", "dist", "build", "runs", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def empty_environment(home, packages):
    """Make an environment at `home` that sees the packages of the folders `packages`."""
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A .pth line adds a folder, but reads none of the .pth files in it: this tree stays out.
    (Path(site) / "shared.pth").write_text("".join(f"{folder}\n" for folder in packages))
    return python


@pytest.fixture(scope="session")
def clean(wheel, tmp_path_factory):
    """The bin folder of an environment of the wheel and this one's packages, but not this tree."""
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    python = empty_environment(tmp_path_factory.mktemp("clean") / "venv", shared)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    # Or it would find the package installed already, editable, among those it shares.
    install += ["--ignore-installed"]
    done = subprocess.run([*install, "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


@pytest.fixture(scope="session")
def colab(wheel, tmp_path_factory):
    """The python of an environment like Colab's: all packages that a lesson uses, the course itself
    excepted. Pip there installs from the folder of the wheel.
    """
    folder = tmp_path_factory.mktemp("colab")
    (folder / "dist-packages").mkdir()
    for shared in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(shared).iterdir():
            ours = entry.name.lower().startswith(("pruning101", "_editable", "__editable"))
            if not ours and entry.suffix != ".pth":
                (folder / "dist-packages" / entry.name).symlink_to(entry)
    return empty_environment(folder / "venv", [folder / "dist-packages"])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        message = "no Chromium: install the distribution's, or set PRUNING101_CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
