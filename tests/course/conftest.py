"""A course of one tiny lesson, so that the tools are tested apart from the real lessons."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pruning101.course import build, material

TINY = Path(__file__).parent / "tiny" / "lessons"


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
