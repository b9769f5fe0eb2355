"""A course of one tiny lesson, so that the tools are tested apart from the real lessons."""

import shutil
from pathlib import Path

import pytest

TINY = Path(__file__).parent / "tiny" / "lessons"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The folder of a course with the lesson 07_tiny, an index, and no notebooks yet."""
    root = tmp_path / "course"
    shutil.copytree(TINY, root / "lessons")
    (root / "notebooks").mkdir()
    monkeypatch.setenv("PRUNING101_MATERIAL", str(root))
    return root
