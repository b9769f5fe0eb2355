"""Executes a notebook without a browser, cell by cell, and keeps of its outputs what is the same on
every run.
"""

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..core.files import written_whole

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class CellFailed(RuntimeError):
    """A cell raised; the message names the lesson, the cell's first line and the error."""


def execute(notebook: Any, *, folder: Path, label: str) -> float:
    """Execute `notebook` in place, with a progress bar a cell on stderr; return the seconds that it
    took.

    `folder` is the kernel's working folder, `label` the name that the bar and errors show. Raises
    CellFailed at the first cell that raises; what was executed until then, or until Ctrl-C, stays
    in the notebook.
    """
    # A kernel called python3 in the user's home must not stand in for this environment's own.
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    code = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for _, cell in code:
        cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    try:
        with (
            tempfile.TemporaryFile("w+") as talk,  # what the kernel's own process has to say
            client.setup_kernel(stdout=talk, stderr=talk),
            tqdm(code, desc=label, unit="cell") as bar,
        ):
            for index, cell in bar:
                bar.set_postfix_str(first_line(cell.source)[:40], refresh=True)
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as error:
                    raise CellFailed(
                        f"{_where(label, cell)} {error.ename}: {error.evalue}"
                    ) from None
                except DeadKernelError:
                    raise CellFailed(
                        f"{_where(label, cell)} the kernel died; is there enough memory?"
                    ) from None
            bar.set_postfix_str("")
    except NoSuchKernel:
        raise FileNotFoundError(
            "No Jupyter kernel called python3 is installed: install ipykernel in this environment."
        ) from None
    return time.perf_counter() - start


def clean(notebook: Any) -> list[str]:
    """Take out of an executed notebook, in place, all that differs between two runs of its cells.

    Widget views and their models, stderr, timings, and the number of messages that a stream came in
    all go. Returns one line for each cell that wrote to stderr, for the author to look into.
    """
    notebook.metadata.pop("widgets", None)
    noise = []
    for cell in notebook.cells:
        written = ""
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        kept: list[Any] = []
        for output in cell.outputs:
            if WIDGET_VIEW in output.get("data", {}):
                continue
            if output.output_type == "stream" and output.name == "stderr":
                written += output.text
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
            kept.append(output)
        cell.outputs = kept
        # A bar that wiped itself out leaves nothing worth a remark.
        written = first_line(re.sub(r"[^\n]*\r", "", written))
        if written:
            noise.append(f"`{first_line(cell.source)}` wrote to stderr: {written}")
    return noise


def first_line(text: str) -> str:
    """The first line of `text` that holds anything."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _where(label: str, cell: Any) -> str:
    return f"{label}: the cell that begins `{first_line(cell.source)}` failed:"


def write(path: Path, text: str) -> None:
    """Write `text` to `path`: wholly, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
