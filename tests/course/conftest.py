"""A course of one tiny lesson, so that the tools are tested apart from the real lessons."""

import shutil
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
