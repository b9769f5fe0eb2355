"""Runs a lesson top to bottom without a browser."""

from pathlib import Path
from typing import Any

from .execute import clean, execute, write
from .material import Lesson

PROFILES = ("quick", "standard", "paper")


def run(lesson: Lesson, *, profile: str = "quick", out: Path | None = None) -> tuple[str, Path]:
    """Execute the notebook of `lesson` on `profile`; return the lesson's table as text, and where
    the notebook was saved.

    `out` defaults to `runs/<lesson>.<profile>.ipynb` in the current folder. What was executed is
    saved also when a cell fails (CellFailed) or Ctrl-C stops it. Raises ValueError where the lesson
    has no cell tagged `parameters` to set.
    """
    import nbformat

    path = Path("runs") / f"{lesson.name}.{profile}.ipynb" if out is None else out
    if path.is_dir():
        path = path / f"{lesson.name}.{profile}.ipynb"
    path = path.resolve()
    if not lesson.notebook.is_file():
        raise FileNotFoundError(
            f"{lesson.notebook} is not there: make it with `pruning101 build {lesson.name}`."
        )
    notebook = nbformat.read(lesson.notebook, as_version=4)
    set_profile(notebook, profile, lesson)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        execute(notebook, folder=path.parent, label=f"{lesson.name} ({profile})")
    finally:
        clean(notebook)
        write(path, nbformat.writes(notebook) + "\n")
    return table(notebook), path


def set_profile(notebook: Any, profile: str, lesson: Lesson) -> None:
    """Change `notebook`: after its cell tagged `parameters` a cell sets PROFILE, as papermill
    would.
    """
    from nbformat.v4 import new_code_cell

    tagged = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    if not tagged:
        raise ValueError(
            f"{lesson.name} has no cell tagged `parameters`, so its profile cannot be set."
        )
    cell = new_code_cell(
        f'PROFILE = "{profile}"',
        id="injected-parameters",
        metadata={"tags": ["injected-parameters"]},
    )
    notebook.cells.insert(tagged[0] + 1, cell)


def table(notebook: Any) -> str:
    """What the cell tagged `table` shows, as plain text; empty where there is none."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and "table" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                data = output.get("data", {})
                if output.output_type == "stream":
                    texts.append(output.text)
                elif "image/png" not in data:
                    texts.append(data.get("text/plain", ""))
    return "\n".join(text.rstrip("\n") for text in texts)
