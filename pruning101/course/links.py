"""The links by which the course is opened elsewhere, in Colab and on Binder, all made from one
setting.

The setting is in pyproject.toml: the URL `Repository` of `[project.urls]`, and the `branch` of
`[tool.pruning101]`. Notebooks get their links when they are made (`build.pair`); the rows of the
README's table, and links in the other documents, are rewritten in place.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .execute import write
from .material import Lesson, lessons

_CHECKOUT = Path(__file__).resolve().parents[2]
_REPOSITORY = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
_BRANCH = re.compile(r"[\w.-]+")
_COLAB = re.compile(
    r"https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([\w.-]+)/([\w./-]+)"
)
_BINDER = re.compile(
    r"https://mybinder\.org/v2/gh/([\w.-]+/[\w.-]+)/([\w.-]+)\?urlpath=lab/tree/([\w./-]+)"
)
# A link of JupyterHub's nbgitpuller, which fetches the repository for each student into a folder of
# its name.
_PULL = re.compile(
    r"repo=https%3A%2F%2Fgithub\.com%2F([\w.-]+)%2F([\w.-]+)&branch=([\w.-]+)"
    r"(?:(&urlpath=lab%2Ftree%2F)[\w.-]+(?=%2F))?",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"https://github\.com/([\w.-]+/[\w-]+(?:\.(?!git\b)[\w-]+)*)")
# The README's badges are written `[![lesson 3 in Colab][colab]][03-colab]`, with their addresses at
# its end, so that its table can be read as text.
_BADGES = {
    "colab": "https://colab.research.google.com/assets/colab-badge.svg",
    "binder": "https://mybinder.org/badge_logo.svg",
}
_DEFINITION = re.compile(r"\n*^\[(?:colab|binder|\d\d-[a-z-]+)\]: .*$", re.MULTILINE)


@dataclass(frozen=True)
class Home:
    """Where the course is published: the repository ("owner/name") at GitHub, and the branch."""

    repository: str
    branch: str

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"https://github.com/{self.repository}"

    def colab(self, path: str) -> str:
        """The address that opens the repository's notebook `path` in Colab."""
        start = "https://colab.research.google.com/github"
        return f"{start}/{self.repository}/blob/{self.branch}/{path}"

    def binder(self, path: str) -> str:
        """The address that opens the repository's notebook `path` on Binder."""
        start = "https://mybinder.org/v2/gh"
        return f"{start}/{self.repository}/{self.branch}?urlpath=lab/tree/{path}"


def home(root: Path) -> Home:
    """The one setting, from the pyproject.toml beside the lessons, else from that of the checkout
    that the package is imported from.

    Raises FileNotFoundError where there is neither, and ValueError where it is not well written.
    """
    files = [folder / "pyproject.toml" for folder in (root, _CHECKOUT)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"No pyproject.toml in {root} names the course's repository: notebooks are made in a "
            "checkout of the course, not from the installed package."
        )
    told = tomllib.loads(file.read_text(encoding="utf-8"))
    url = told.get("project", {}).get("urls", {}).get("Repository", "")
    branch = told.get("tool", {}).get("pruning101", {}).get("branch", "")
    match = _REPOSITORY.fullmatch(url)
    if match is None:
        raise ValueError(
            f"{file}: Repository in [project.urls] is {url!r}; write the address of a repository "
            "at GitHub, as https://github.com/OWNER/NAME."
        )
    if not _BRANCH.fullmatch(branch):
        raise ValueError(
            f"{file}: branch in [tool.pruning101] is {branch!r}; write the name of a branch or tag "
            "of letters, digits, dots and dashes."
        )
    return Home(match.group(1), branch)


def line(lesson: Lesson) -> str:
    """The line of links at the top of a lesson's notebook, the same in its student version; at the
    top of the index, the link that opens the whole course.
    """
    place = home(lesson.root)
    notebook, exercises = _paths(lesson)
    if not lesson.number:
        return f"[The course on Binder]({place.binder(notebook)})"
    return (
        f"[Open in Colab]({place.colab(notebook)}) ·\n"
        f"[exercises in Colab]({place.colab(exercises)}) ·\n"
        f"[open on Binder]({place.binder(notebook)}) ·\n"
        f"[exercises on Binder]({place.binder(exercises)})"
    )


def documents(root: Path) -> list[Path]:
    """The texts beside the lessons that may link to the repository; the README comes last."""
    found = [*root.glob("*.md"), *root.glob("*.cff"), *root.glob("book/**/*.md")]
    built = root / "book" / "_build"
    return sorted((p for p in found if built not in p.parents), key=lambda p: p.name == "README.md")


def rewrite(root: Path) -> list[Path]:
    """Write the setting into every link of `documents`; return those that changed.

    The README comes last: the repository that its links name is how other links to the same
    repository are told from links to somebody else's.
    """
    ours, changed = _ours(root), []
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        fresh = _rewritten(path, text, root, ours)
        if fresh != text:
            write(path, fresh)
            changed.append(path)
    return changed


def faults(root: Path) -> Iterator[str]:
    """Say of each link in the documents and the stored notebooks what is not as the setting has
    it.
    """
    place, ours = home(root), _ours(root)
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        yield from _strangers(path.relative_to(root), text, place, ours)
        if _rewritten(path, text, root, ours) != text:
            yield f"{path.relative_to(root)}: its links are not those that `links` writes"
    for lesson in [*lessons(root), Lesson("index", root)]:
        # What JSON makes of a line break is all that differs in the file.
        wanted = line(lesson).split("\n")
        for path in [lesson.notebook, *([lesson.exercises] if lesson.number else [])]:
            name = path.relative_to(root)
            if not path.is_file():
                yield f"{name}: it is not there"
                continue
            text = path.read_text(encoding="utf-8")
            yield from _strangers(name, text, place, ours)
            if any(part not in text for part in wanted):
                yield f"{name}: it lacks its own links"
    readme = root / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        for lesson in lessons(root):
            if not _row(lesson).search(text):
                yield f"README.md: its table has no row that links {_paths(lesson)[0]}"


def _paths(lesson: Lesson) -> tuple[str, str]:
    return (
        lesson.notebook.relative_to(lesson.root).as_posix(),
        lesson.exercises.relative_to(lesson.root).as_posix(),
    )


def _ours(root: Path) -> set[str]:
    """The repositories by which the course has gone: that of the setting, and that of the README's
    links until they are rewritten.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return {home(root).repository, *(found[1] for found in _COLAB.finditer(text))}


def _is_ours(repository: str, place: Home, ours: set[str]) -> bool:
    """Whether that is the course, or a copy of it that somebody keeps under its name."""
    return repository in ours or repository.split("/")[1] == place.repository.split("/")[1]


def _rewritten(path: Path, text: str, root: Path, ours: set[str]) -> str:
    place = home(root)

    def plain(found: re.Match[str]) -> str:
        return place.url if _is_ours(found[1], place, ours) else found[0]

    text = _COLAB.sub(lambda found: place.colab(found[3]), text)
    text = _BINDER.sub(lambda found: place.binder(found[3]), text)
    text = _PULL.sub(lambda found: _pull(place, found[4]), text)
    text = _PLAIN.sub(plain, text)
    return _with_badges(text, root, place) if path.name == "README.md" else text


def _row(lesson: Lesson) -> re.Pattern[str]:
    """A lesson's row in the README's table; what stands before its badges is the first group."""
    link = re.escape(f"]({_paths(lesson)[0]})")
    return re.compile(
        rf"^(\| {int(lesson.number)} \|[^\n]*?{link}[^\n]*?)(?: \|[^|\n]*\]\[colab\][^|\n]*)? \|$",
        re.MULTILINE,
    )


def _pull(place: Home, opens: str | None) -> str:
    start = f"repo={quote(place.url, safe='')}&branch={place.branch}"
    return start + (opens + place.repository.split("/")[1] if opens else "")


def _with_badges(text: str, root: Path, place: Home) -> str:
    """The README's `text` with the badges of every lesson in its row, and their addresses below."""
    addresses = dict(_BADGES)
    for lesson in lessons(root):
        number, cell = int(lesson.number), []
        for what, path in zip(("", "exercises"), _paths(lesson), strict=True):
            name = f"exercises of lesson {number}" if what else f"lesson {number}"
            key = "-".join(filter(None, (lesson.number, what)))
            addresses |= {f"{key}-colab": place.colab(path), f"{key}-binder": place.binder(path)}
            cell.append(
                f"{what or 'lesson'} [![{name} in Colab][colab]][{key}-colab]"
                f" [![{name} on Binder][binder]][{key}-binder]"
            )
        row = rf"\g<1> | {'<br>'.join(cell)} |"
        text = _row(lesson).sub(row, text)
    text = _DEFINITION.sub("", text).rstrip("\n")
    return f"{text}\n\n" + "".join(f"[{key}]: {url}\n" for key, url in addresses.items())


def _strangers(name: Path, text: str, place: Home, ours: set[str]) -> Iterator[str]:
    """Complaints about links in `text` to another repository or branch, or to no file."""
    for kind in (_COLAB, _BINDER):
        for found in kind.finditer(text):
            if found[1] != place.repository or found[2] != place.branch:
                yield f"{name}: {found[0]} is not in {place.repository}, branch {place.branch}"
    for found in _PULL.finditer(text):
        if f"{found[1]}/{found[2]}" != place.repository or found[3] != place.branch:
            yield f"{name}: {found[0]} is not in {place.repository}, branch {place.branch}"
    for found in _PLAIN.finditer(text):
        if found[1] != place.repository and _is_ours(found[1], place, ours):
            yield f"{name}: {found[0]} is not {place.url}"
