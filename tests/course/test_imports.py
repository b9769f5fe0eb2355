"""Imports go one way, importing the library stays light, and the code is linted and typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPICS = sorted(p.stem for p in (ROOT / "pruning101").glob("*.py") if p.stem != "__init__")
HEAVY = [
    "IPython",
    "accelerate",
    "ipywidgets",
    "jupyter_client",
    "jupyter_core",
    "matplotlib",
    "nbclient",
    "nbformat",
    "pandas",
    "scipy",
    "sklearn",
    "timm",
    "torch_pruning",
    "torchvision",
]


def tool(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("topic", ["core", *TOPICS])
def test_importing_a_topic_loads_no_heavy_library(topic):
    # torch itself may bring some along; what counts is what pruning101 adds to it.
    script = (
        "import json, sys, torch; before = set(sys.modules);"
        f"import pruning101, pruning101.{topic};"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = tool(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    added = set(json.loads(done.stdout))
    assert "pruning101" in added
    assert added & set(HEAVY) == set()


def test_imports_go_one_way():
    done = tool(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        ["mypy", "--cache-dir=/dev/null"],
    ],
    ids=["lint", "format", "types"],
)
def test_the_code_keeps_its_rules(command):
    done = tool(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr
