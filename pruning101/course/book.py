"""Builds the book: gathers the lessons, the library's reference and what stands in `book/` into one
folder of pages, and runs Sphinx on it.

Nothing in `book/` names a lesson or a module: pages and links are made from what is there.
"""

import ast
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import book_methods, links
from .execute import first_line
from .material import Lesson, lessons, material

PACKAGE = Path(__file__).resolve().parents[1]
_CORE = "pruning101.core."
_ELSEWHERE = re.compile(r"(?:[a-z]+:|#|/)", re.IGNORECASE)  # a target that is no file of ours
_LINK = re.compile(r"\[([^][]*)\]\(([^()\s]+)\)")
_REMOTE_IMAGE = re.compile(r"!\[([^][]*)\]\(https?://[^()\s]+\)")
_HIDDEN = re.compile(
    r"^### BEGIN HIDDEN TESTS$.*?^### END HIDDEN TESTS$\n?", re.DOTALL | re.MULTILINE
)
_DETAILS = re.compile(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", re.DOTALL)


def book(out: Path, root: Path | None = None) -> Path:
    """Build the book into the folder `out`, which it replaces, and return its first page.

    Raises ModuleNotFoundError where Sphinx is not installed, FileNotFoundError outside a checkout,
    FileExistsError where `out` holds something else than a book, and RuntimeError where a page has
    a fault; `out` is then left as it was.
    """
    root = material() if root is None else root
    lacking = [name for name in ("sphinx", "myst_nb") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModuleNotFoundError(
            "Building the book needs Sphinx: install it with `pip install 'pruning101[book]'`."
        )
    if not (root / "book" / "conf.py").is_file():
        raise FileNotFoundError(
            f"{root} has no folder `book`: the book is built in a checkout of the repository."
        )
    if out.exists() and not ((out / ".buildinfo").is_file() or _empty(out)):
        raise FileExistsError(
            f"{out} holds something else than a book: name a new folder, or remove it."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as folder:
        source, html = Path(folder, "source"), Path(folder, "html")
        gather(root, source)
        sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html"]
        sphinx += ["-d", str(Path(folder, "doctrees")), str(source), str(html)]
        if subprocess.run(sphinx).returncode != 0:
            raise RuntimeError(f"Sphinx found the faults that stand above; {out} is as it was.")
        if out.exists():
            out.rename(Path(folder, "before"))
        html.rename(out)
    return out / "index.html"


def gather(root: Path, source: Path) -> None:
    """Write into the new folder `source` all that Sphinx makes the book of."""
    shutil.copytree(root / "book", source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for path in (root / "lessons" / "references.bib", root / "pyproject.toml"):
        shutil.copy(path, source)
    here = [lesson for lesson in lessons(root) if lesson.notebook.is_file()]
    taught = {lesson: _used(_read(lesson.notebook)) for lesson in here}
    for lesson in here:
        _write(source / "notebooks" / lesson.notebook.name, _lesson_page(lesson, taught[lesson]))
        if lesson.exercises.is_file():
            exercises = source / "notebooks" / "exercises"
            exercises.mkdir(exist_ok=True)
            shutil.copy(lesson.exercises, exercises)
    for module in modules():
        _write(source / module.page, _module_page(module, taught))
    parts = source / "parts"
    texts = {lesson.name: _markdown(_read(lesson.notebook)) for lesson in here}
    tables = book_methods.page_parts(texts, root / "book" / "methods.toml", root / "results")
    for name, text in (_index_parts(root) | tables).items():
        _write(parts / f"{name}.md", text)
    for kind in ("topics", "core"):
        _write(parts / f"{kind}.md", _contents([m for m in modules() if m.kind == kind]))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (root / name).read_text(encoding="utf-8")
        _write(source / name.lower(), _relinked(text, root))


# --- lessons -----------------------------------------------------------------------------------


def _lesson_page(lesson: Lesson, used: list[str]) -> str:
    """The lesson's notebook with a line on the modules it uses below its header, and without its
    hidden tests.
    """
    notebook = _read(lesson.notebook)
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = _unfolded(_without_remote_images(text))
        else:
            cell["source"] = _HIDDEN.sub("", text).rstrip("\n")
    topics = [f"{{py:mod}}`{name}`" for name in used if not name.startswith(_CORE)]
    core = [f"{{py:mod}}`~{name}`" for name in used if name.startswith(_CORE)]
    says = [f"In the library: {', '.join(topics)}"] if topics else []
    says += [f"from `pruning101.core`: {', '.join(core)}"] if core else []
    if says:
        head = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        opening, heading, rest = head["source"].partition("\n## ")
        head["source"] = f"{opening}\n\n{'; '.join(says)}.\n{heading}{rest}"
    return json.dumps(notebook)


def _used(notebook: dict[str, Any]) -> list[str]:
    """The library's modules that a notebook's cells import, and those whose names these hand on;
    topics before `core`.
    """
    names = set()
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for module in modules():
        if module.name in names:
            names |= {name.rpartition(".")[0] for name in module.handed_on}
    return [module.name for module in modules() if module.name in names]


def _without_remote_images(text: str) -> str:
    """Images from elsewhere, such as badges, become their own alternative text."""
    return _REMOTE_IMAGE.sub(r"\1", text)


def _unfolded(text: str) -> str:
    """Folded answers so written that what is inside them is read as Markdown, formulas too."""

    def fold(match: re.Match[str]) -> str:
        summary = re.sub(r"\$([^$]+)\$", r"\\(\1\\)", match[1])
        return (
            f'\n<details><summary class="tex2jax_process">{summary}</summary>\n\n'
            f"{match[2].strip()}\n\n</details>\n"
        )

    return _DETAILS.sub(fold, text)


# --- reference ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A public module of the library: its full name, its page in the book, its first sentence."""

    name: str
    page: str
    kind: str
    says: str
    handed_on: tuple[str, ...]  # names of other modules, in full, that are this one's, too


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every public module: the topics, then what stands in `core`."""
    return tuple(_modules())


def _modules() -> Iterator[Module]:
    for kind, folder in (("topics", PACKAGE), ("core", PACKAGE / "core")):
        for path in sorted(folder.glob("[a-z]*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            says = first_line(ast.get_docstring(tree) or "")
            prefix = "pruning101" if kind == "topics" else "pruning101.core"
            handed_on = [
                f"{node.module}.{alias.name}"
                for node in tree.body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if alias.asname == alias.name
            ]
            page = f"api/{kind}/{path.stem}.md"
            yield Module(f"{prefix}.{path.stem}", page, kind, says, tuple(handed_on))


def _module_page(module: Module, taught: dict[Lesson, list[str]]) -> str:
    """The reference of one module, with links to the lessons that use it."""
    users = [lesson for lesson, used in taught.items() if module.name in used]
    topic = module.name.split(".")[-1]
    own = [lesson for lesson in users if module.kind == "topics" and topic in lesson.name]
    lines = [f"# {module.name}", ""]
    for says, which in (("Lesson", own), ("Used in", [x for x in users if x not in own])):
        named = ", ".join(f"{{doc}}`/notebooks/{lesson.name}`" for lesson in which)
        lines += [f"{says}: {named}.", ""] if named else []
    lines += ["```{eval-rst}", f".. automodule:: {module.name}", "```", ""]
    if module.handed_on:
        named = ", ".join(f"{{py:obj}}`~{name}`" for name in module.handed_on)
        lines += [f"Also under this module's name: {named}.", ""]
    return "\n".join(lines)


def _contents(some: list[Module]) -> str:
    """A list of modules with their first sentences, and the table of contents that holds them."""
    rows = [f"- {{py:mod}}`{module.name}`: {module.says}" for module in some]
    tree = [f"{module.name.split('.')[-1]} </{module.page[:-3]}>" for module in some]
    return "\n".join([*rows, "", "```{toctree}", ":hidden:", "", *tree, "```", ""])


# --- the course's index and the pages of the root ----------------------------------------------


def _index_parts(root: Path) -> dict[str, str]:
    """The index's Markdown in three parts: its symbols, its glossary, and the rest."""
    cells = _read(root / "notebooks" / "index.ipynb")["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    parts = {"course": ""}
    for text in texts:
        heading = first_line(text).removeprefix("## ").lower()
        name = heading if heading in ("symbols", "glossary") else "course"
        body = text if name == "course" else text.split("\n", 1)[1]
        body = _without_remote_images(body)
        body = _LINK.sub(_to_notebook, body)
        parts[name] = parts.get(name, "") + body.strip() + "\n\n"
    lacking = [name for name in ("symbols", "glossary") if name not in parts]
    if lacking:
        raise ValueError(f"The index of the lessons has no section {' and no '.join(lacking)}.")
    return parts


def _to_notebook(link: re.Match[str]) -> str:
    """A link of the index, as the book's first page has it; exercises are downloads."""
    if _ELSEWHERE.match(link[2]):
        return link[0]
    if link[2].startswith("exercises/"):
        return f"{{download}}`{link[1]} </notebooks/{link[2]}>`"
    return f"[{link[1]}](/notebooks/{link[2]})"


def _relinked(text: str, root: Path) -> str:
    """Links to files of the checkout, which are no pages of the book, lead to the repository."""
    home = links.home(root)

    def link(match: re.Match[str]) -> str:
        there = f"{home.url}/blob/{home.branch}/{match[2]}"
        return match[0] if _ELSEWHERE.match(match[2]) else f"[{match[1]}]({there})"

    return _LINK.sub(link, text)


def _markdown(notebook: Any) -> str:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def _read(notebook: Path) -> Any:
    return json.loads(notebook.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
