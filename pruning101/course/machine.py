"""The machine that a figure was measured on, and timing that other work on it disturbs little."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a measurement was made with."""
    import numpy
    import torch

    from pruning101 import __version__

    cuda = torch.cuda.is_available()
    return {
        "pruning101": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "command": " ".join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def interleaved(
    candidates: dict[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Time each candidate `repeats` times, taking turns, so that a busy moment hits all alike.

    Returns for each name, in seconds, the `median` and all `times` on the clock, and
    `cpu_median`, that of the processor time of this process: on a machine busy with other work it
    is the steadier of the two.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    cpu_times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu_start)
    return {
        name: {
            "median": statistics.median(times[name]),
            "times": times[name],
            "cpu_median": statistics.median(cpu_times[name]),
        }
        for name in candidates
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": sum(values) / len(values), "least": min(values), "greatest": max(values)}
