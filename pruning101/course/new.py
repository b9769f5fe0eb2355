"""Begins a lesson: the five files that one name must find, made from `skeleton/`.

What they hold runs as it is, so that the author replaces one piece at a time. Whatever is still to
be done is marked with `To write:`, and a test fails while that stands anywhere.
"""

import keyword
import re
from pathlib import Path

from ..core.files import written_whole
from .material import lessons

SKELETON = Path(__file__).with_name("skeleton")


def new(topic: str, root: Path) -> list[Path]:
    """Write the five files of a lesson on `topic` into the checkout `root` and return their paths.

    The lesson gets the next number. Raises ValueError where `topic` cannot be the name of a module,
    and FileExistsError where one of the files, or anything else of that name, is there already.
    FileNotFoundError: `root` is no checkout. Nothing is written then.
    """
    if not (re.fullmatch(r"[a-z][a-z0-9_]*", topic) and not keyword.iskeyword(topic)):
        near = re.sub(r"\W+", "_", topic, flags=re.ASCII).strip("_").lower()
        usable = re.fullmatch(r"[a-z][a-z0-9_]*", near) and not keyword.iskeyword(near)
        raise ValueError(
            f"A topic is the name of a Python module, in small letters, digits and underscores: "
            f"{near if usable else 'token_folding'!r}, not {topic!r}."
        )
    number = max((int(lesson.number) for lesson in lessons(root)), default=0) + 1
    name = f"{number:02d}_{topic}"
    files = {
        f"lessons/{name}.py": "lesson",
        f"pruning101/{topic}.py": "module",
        f"pruning101/widgets/{topic}.py": "widget",
        f"tests/test_{topic}.py": "test",
        f"tests/course/mutations/{name}.py": "mutations",
    }
    if not all((root / path).parent.is_dir() for path in files):
        raise FileNotFoundError(
            f"{root} is no checkout of the course: a lesson is added in a clone of the repository."
        )
    taken = [root / path for path in files if (root / path).exists()]
    others = [root / "pruning101" / topic, root / "lessons" / f"{topic}.py"]
    taken += [path for path in others if path.exists()]
    taken += sorted(root.glob(f"lessons/*_{topic}.py"))
    taken += sorted(root.glob(f"tests/course/mutations/*_{topic}.py"))
    if taken:
        raise FileExistsError(f"{taken[0]} is there already: choose another topic, or edit that.")

    words = {
        "@topic@": topic,
        "@title@": topic.replace("_", " ").capitalize(),
        "@number@": f"{number:02d}",
        "@lesson@": str(number),
    }
    made: list[Path] = []
    try:
        for path, kind in files.items():
            text = (SKELETON / f"{kind}.txt").read_text(encoding="utf-8")
            for mark, word in words.items():
                text = text.replace(mark, word)
            with written_whole(root / path) as part:
                part.write_text(text, encoding="utf-8", newline="\n")
            made.append(root / path)
    except BaseException:
        for written in made:
            written.unlink()
        raise
    return made


def next_steps(topic: str) -> str:
    """What else a new lesson needs, by hand, in the order in which it is best done."""
    return f"""\
Next:
1. Give `{topic}` its place among the layers in pyproject.toml.
2. Write lesson, module, widget, tests and mutations, until no `To write:` is left.
3. Run `pruning101 build {topic}`: it makes the notebooks and the row in the index.
4. Add the row in README.md, the line in CHANGELOG.md, the section in book/instructor.md and the
   references in lessons/references.bib.
`python -m pytest tests -k "{topic} or one_way"` says what is missing."""
