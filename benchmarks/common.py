"""What every benchmark shares: who measured, how repeats are interleaved, where results go."""

import json
from pathlib import Path
from typing import Any

from pruning101.course.machine import environment as environment
from pruning101.course.machine import interleaved as interleaved
from pruning101.course.machine import spread as spread

RESULTS = Path(__file__).resolve().parent.parent / "results"


def write(path: str | Path, payload: dict[str, Any]) -> Path:
    """Keep `payload` with the environment as `results/PATH.json` (or an absolute path); print it.

    The parent folders are made; the text printed to stdout is the file's text.
    """
    target = RESULTS / Path(path).with_suffix(".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **payload}, indent=2)
    target.write_text(text + "\n")
    print(text)
    return target
