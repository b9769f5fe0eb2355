"""Says what is installed, what will be used, where data is, and how to mend what is wrong."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .grading import sandbox

PACKAGES = {  # distribution -> module that must import
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "jupyterlab": "jupyterlab",
    "ipywidgets": "ipywidgets",
    "ipykernel": "ipykernel",
    "nbclient": "nbclient",
    "accelerate": "accelerate",
    "torch-pruning": "torch_pruning",
    "pot": "ot",
    "safetensors": "safetensors",
}
DATA_SETS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "tiny_imagenet")
LITTLE_MEMORY = 2.0  # GiB; a quick lesson takes less than one

# Imports run in a process of their own: a torchvision that was built for another torch may do
# worse than raise.
_PROBE = """
import importlib, json, sys
found = {"errors": {}}
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except BaseException as error:
        found["errors"][module] = f"{type(error).__name__}: {error}"
if "torch" not in found["errors"]:
    import torch
    from pruning101.core.data import default_root
    from pruning101.core.training import default_device
    device = default_device()
    found["device"] = str(device)
    if device.type == "cuda":
        found["device"] += f" ({torch.cuda.get_device_name(device)})"
    found["bfloat16"] = device.type == "cuda" and torch.cuda.is_bf16_supported()
    found["data"] = str(default_root())
    found["threads"] = torch.get_num_threads()
print(json.dumps(found))
"""


@dataclass
class Report:
    """Lines to show, and what is wrong: `broken` keeps the course from running, `notes` do not."""

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        marks = [f"  broken: {text}" for text in self.broken] + [f"  note: {x}" for x in self.notes]
        verdict = marks or ["  nothing: everything is in place"]
        return "\n".join([*self.lines, "what is wrong", *verdict])


def examine() -> tuple[Report, bool]:
    """Look at this environment; returns the report and whether anything is broken."""
    report = Report()
    found = _probe()
    report.lines.append(f"pruning101 {__version__}, Python {platform.python_version()}")
    report.lines.append(f"  at {sys.executable}")
    report.lines.append("packages")
    _packages(report, found)
    report.lines.append("will be used")
    if "device" in found:
        precision = "bfloat16" if found["bfloat16"] else "float32"
        report.lines.append(f"  device    {found['device']}, training in {precision}")
        report.lines.append(f"  threads   {found['threads']} of {os.cpu_count()} processors")
    _memory(report, available_memory())
    if "matplotlib" not in found["errors"]:
        _grading(report, sandbox.missing())
    if "data" in found:
        _data(report, Path(found["data"]))
    return report, bool(report.broken)


def mend(module: str, error: str) -> str:
    """One sentence on how to mend the import of `module`, which failed with `error`."""
    name = next(package for package, its_module in PACKAGES.items() if its_module == module)
    if "torchvision::nms" in error or (module == "torchvision" and "undefined symbol" in error):
        return (
            "torch and torchvision do not fit each other (operator torchvision::nms does not "
            "exist): install both again, together, with `pip install --force-reinstall torch "
            "torchvision` from one index."
        )
    if error.startswith("ModuleNotFoundError") and f"'{module}'" in error:
        return f"{name} is not installed: `pip install {name}`."
    return f"{name} cannot be imported ({error.splitlines()[0]}): `pip install --upgrade {name}`."


def available_memory() -> float | None:
    """Memory that is free to use, in GiB; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return None


def _probe() -> dict[str, Any]:
    command = [sys.executable, "-c", _PROBE, *PACKAGES.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"errors": {"torch": f"the process that imported it died: {last}"}}


def _packages(report: Report, found: dict[str, Any]) -> None:
    shown = []
    for package, module in PACKAGES.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "missing"
        shown.append(f"{package} {version}")
        if module in found["errors"]:
            sentence = mend(module, found["errors"][module])
            if sentence not in report.broken:
                report.broken.append(sentence)
    for start in range(0, len(shown), 4):
        report.lines.append(
            "  " + "".join(f"{text:24}" for text in shown[start : start + 4]).rstrip()
        )


def _memory(report: Report, gib: float | None) -> None:
    if gib is None:
        return
    report.lines.append(f"  memory    {gib:.1f} GiB free")
    if gib < LITTLE_MEMORY:
        report.notes.append(
            f"only {gib:.1f} GiB of memory are free: close other programs before a lesson."
        )


def _grading(report: Report, missing: str | None) -> None:
    """Instructors need it only, so that what is missing is told but counts as nothing wrong."""
    sentence = missing or "submissions can be confined"
    report.lines += textwrap.wrap(
        sentence, 100, initial_indent="  grading   ", subsequent_indent=" " * 12
    )


def _data(report: Report, root: Path) -> None:
    there = [name for name in DATA_SETS if (root / f"{name}.safetensors").is_file()]
    report.lines.append("data")
    report.lines.append(f"  folder    {root}")
    report.lines.append(f"  there     digits (embedded){''.join(f', {name}' for name in there)}")
    missing = [name for name in DATA_SETS if name not in there]
    if missing:
        report.lines.append(f"  to fetch  {', '.join(missing)}: `pruning101 data NAME`")
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        report.broken.append(
            f"the data folder {root} cannot be written: set PRUNING101_DATA to one of your own."
        )
