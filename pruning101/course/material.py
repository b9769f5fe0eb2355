"""Where the lessons, their notebooks and the kept results lie, and how a lesson is found by its
name.
"""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\d\d)_([a-z0-9_]+)")


@dataclass(frozen=True)
class Lesson:
    """One lesson of the course: its name ("03_magnitude") and the folder that holds the course's
    material.
    """

    name: str
    root: Path

    @property
    def number(self) -> str:
        """The lesson's two digits; empty for the index."""
        return self.name.split("_")[0] if _NAME.fullmatch(self.name) else ""

    @property
    def source(self) -> Path:
        """The text that people edit, in jupytext's percent format."""
        return self.root / "lessons" / f"{self.name}.py"

    @property
    def notebook(self) -> Path:
        """The executed pair of the source."""
        return self.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def exercises(self) -> Path:
        """The student version: no solutions, no hidden tests, no outputs."""
        return self.root / "notebooks" / "exercises" / f"{self.name}.ipynb"


def material() -> Path:
    """The folder that holds `lessons/`, `notebooks/` and `results/`.

    That is `$PRUNING101_MATERIAL` where it is set, else the checkout that the package is imported
    from, else the copy that the installed package carries. Raises FileNotFoundError where there is
    none.
    """
    chosen = os.environ.get("PRUNING101_MATERIAL")
    here = Path(__file__).resolve()
    folders = [Path(chosen).resolve()] if chosen else [here.parents[2], here.parent / "material"]
    for folder in folders:
        if (folder / "lessons").is_dir() and (folder / "notebooks").is_dir():
            return folder
    where = " or ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"No folders `lessons` and `notebooks` in {where}: install pruning101 again, or set "
        "PRUNING101_MATERIAL."
    )


def lessons(root: Path | None = None) -> list[Lesson]:
    """Every lesson under `root` (default: `material()`), by number; one needs its source or its
    notebook to count.
    """
    root = material() if root is None else root
    files = [*root.glob("lessons/*.py"), *root.glob("notebooks/*.ipynb")]
    names = {path.stem for path in files if _NAME.fullmatch(path.stem)}
    return [Lesson(name, root) for name in sorted(names)]


def find(name: str, root: Path | None = None) -> Lesson:
    """The lesson called `name`: "03_magnitude", "magnitude", "03" or "3".

    Raises ValueError, with the nearest names, where there is none.
    """
    known = lessons(root)
    for lesson in known:
        if name.lower().removesuffix(".py").removesuffix(".ipynb") in _spellings(lesson):
            return lesson
    spelled = {spelling: lesson.name for lesson in known for spelling in _spellings(lesson)}
    near = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    names = list(dict.fromkeys(spelled[match] for match in near))
    hint = (
        f"did you mean {' or '.join(names)}?"
        if names
        else f"there are {', '.join(x.name for x in known)}."
    )
    raise ValueError(f"No lesson is called {name!r}: {hint}")


def _spellings(lesson: Lesson) -> Iterator[str]:
    topic = lesson.name.removeprefix(lesson.number + "_")
    yield from (lesson.name, topic, topic.replace("_", "-"), lesson.number, str(int(lesson.number)))
