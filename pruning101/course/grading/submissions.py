"""Finds in a folder what students handed in: one submission a student and lesson, and nothing lost.

What is known of folders that others make:

- nbgrader: `submitted/STUDENT/ASSIGNMENT/NOTEBOOK.ipynb` ("Directory structure" in the guide at
  nbgrader.readthedocs.io), with or without the first of these folders.
- Moodle, "Download all submissions" (`download_submissions` in its mod/assign): a folder
  `Full Name_1234567_assignsubmission_file_` a student, beside it `..._onlinetext_` for a text typed
  in; or no folders, and the same in front of each file's name. With blind marking the name is
  `Participant`.
- Canvas, "Download Submissions" (`get_filename` in its lib/content_zipper.rb): files called
  `lastfirst_12345_678901_name.ipynb`: the name in one word, the student's number and the file's;
  `_LATE` after the name of one who was late; `anon_AbC12` for the student where marking is
  anonymous; a file that is handed in again gets `-1` and so on at its end.
- Anything else: the first folder is the student, or the file's own name.

Each may be in the folder as it is or as a zip archive, and each student's files as one more. An
archive is taken for a class's only if nothing but such archives lies in the folder, and a name is
read only where a platform wrote it: else a student could hand in work under another's name.
"""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..material import Lesson
from . import archives
from .notebook import content_of, is_called, kind_of, lesson_of, opened, slim
from .plan import Plan, plan

MOST_FILES = 50_000
DEEPEST = 20  # folders in folders
_MOODLE = re.compile(
    r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_(?:file|onlinetext)(?:_(?P<rest>.*))?", re.DOTALL
)
_CANVAS = re.compile(
    r"(?:(?P<name>.+?)(?P<late>_LATE)?_(?P<id>\d+)|(?P<late_too>LATE_)?(?P<anonymous>anon_[^_]+))"
    r"_\d{3,}_(?P<file>.+)",
    re.DOTALL,
)
_NOISE = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "timestamp.txt", "manifest.json"}


@dataclass(frozen=True)
class Submission:
    """What one student handed in for one lesson, or something that cannot be graded, and why.

    `key` is a safe file name, no other's, and the same on each run; `source` is the path in the
    folder ("upload.zip!03_magnitude.ipynb"); `content` is the notebook as `read` reads it.
    """

    key: str
    student: str
    source: str
    lesson: str | None
    content: bytes | None
    digest: str
    problem: str | None
    remarks: tuple[str, ...]
    late: bool = False  # only Canvas says so


@dataclass(frozen=True)
class _Owner:
    """Whose a file is: `who` tells apart two students of one name."""

    who: str
    student: str
    late: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A file: where it lies, whose it is, and its content or what is wrong with it."""

    path: tuple[str, ...]
    owner: _Owner
    content: bytes | None = None
    problem: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def is_notebook(self) -> bool:
        return _is(self.path[-1], ".ipynb", ".zip")


def find(folder: Path, lessons: Sequence[Lesson]) -> list[Submission]:
    """What lies in `folder`: one submission a student and lesson, and one with a `problem` for what
    cannot be graded.

    Raises ValueError where there is no such folder, or it holds more files than a class hands in.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: name the one with the submissions.")
    plans = [plan(lesson) for lesson in lessons]
    made: list[tuple[str, Submission]] = []
    others: dict[str, list[_Found]] = {}
    files = list(islice(_walk(folder, ()), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise ValueError(
            f"{str(folder)!r} holds more than {MOST_FILES:,} files: name the folder with the "
            "submissions only."
        )
    for found in _everything(files, [lesson.name for lesson in lessons]):
        if found.is_notebook:
            made.append((found.owner.who, _graded(found, plans)))
        else:
            others.setdefault(found.owner.who, []).append(found)
    for who, besides in others.items():
        names = [shown(found.path[-1]) for found in besides if found.path[-1]]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        own = next((i for i, (owner, _) in enumerate(made) if owner == who), None)
        if own is None:
            made.append((who, _without_notebook(besides, listed)))
        elif names:
            submission = made[own][1]
            remarks = (*submission.remarks, f"Handed in as well, and not graded: {listed}.")
            made[own] = (who, replace(submission, remarks=remarks))
    return _told_apart([submission for _, submission in made])


def read(submission: Submission) -> Any:
    """The submission's notebook; raises ValueError where there is none."""
    import nbformat

    if submission.content is None:
        raise ValueError(f"{submission.source!r} holds no notebook: {submission.problem}")
    return nbformat.from_dict(json.loads(submission.content))


def shown(text: str) -> str:
    """`text` in one line: what would not show is spelled out, bytes that are no text included."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    joiners = "\u200c\u200d"  # some scripts need these
    return "".join(
        c if c.isprintable() or c in joiners else c.encode("unicode_escape").decode() for c in text
    )


def _graded(found: _Found, plans: Sequence[Plan]) -> Submission:
    """The submission that a notebook makes, or the reason why it makes none."""
    names = [PurePosixPath(part).stem for part in reversed(found.path)]
    guess = next((p.lesson for name in names for p in plans if is_called(name, p.lesson)), None)
    base = replace(_empty(found), lesson=guess)
    if found.content is None:
        return base
    try:
        notebook = slim(found.content)
    except ValueError as error:
        return replace(base, problem=str(error))
    lesson = lesson_of(notebook, names, plans)
    if lesson is None:
        known = ", ".join(each.lesson for each in plans) or "none"
        what = f"It holds nothing of the lessons that are graded ({known})."
        return replace(base, lesson=None, problem=what)
    content = json.dumps(notebook, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    return replace(base, lesson=lesson, content=content, digest=digest, problem=None)


def _without_notebook(files: list[_Found], listed: str) -> Submission:
    """The submission of a student none of whose files is a notebook."""
    only = f", only {listed}" if listed else ""
    problem = f"There is no notebook{only}: hand in the .ipynb."
    if len(files) == 1 and files[0].problem:
        problem = files[0].problem
    return replace(_empty(files[0]), problem=problem)


def _empty(found: _Found) -> Submission:
    owner, source = found.owner, "/".join(found.path).rstrip("/").replace(".zip/", ".zip!")
    remarks = (*owner.remarks, *found.remarks)
    return Submission(
        "", owner.student, source, None, None, "", found.problem or None, remarks, owner.late
    )


def _told_apart(made: list[Submission]) -> list[Submission]:
    """The submissions with their keys, fit to show, and a remark on those that have the student's
    name and the lesson in common.
    """
    sources: dict[str, int] = {}
    numbered = []
    for each in made:  # an archive may hold several files of one name
        sources[each.source] = sources.get(each.source, 0) + 1
        count = sources[each.source]
        numbered.append(replace(each, source=each.source + f" (number {count})" * (count > 1)))
    same: dict[tuple[str, str | None], list[str]] = {}
    for each in numbered:
        same.setdefault((shown(each.student), each.lesson), []).append(shown(each.source))
    finished = []
    for each in sorted(numbered, key=lambda one: _bytes(one.source)):
        rivals = [x for x in same[shown(each.student), each.lesson] if x != shown(each.source)]
        remark = f"Handed in under the same name for the same lesson: {', '.join(rivals)}."
        ascii_only = unicodedata.normalize("NFKD", each.student).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_only.lower()).strip("-")[:40].strip("-")
        # The path tells them apart: names may differ in case, accents or what does not show.
        mark = hashlib.sha256(_bytes(each.source)).hexdigest()[:12]
        finished.append(
            replace(
                each,
                key=f"{slug or 'student'}-{mark}",
                student=shown(each.student),
                source=shown(each.source),
                remarks=tuple(map(shown, each.remarks)) + ((remark,) if rivals else ()),
            )
        )
    return finished


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _everything(
    files: Sequence[tuple[tuple[str, ...], Path]], lessons: Sequence[str]
) -> Iterator[_Found]:
    """The files, and those in archives, with whose they are."""
    is_class = all(len(path) == 1 and _is_class(file, lessons) for path, file in files)
    for path, file in files:
        found = _Found(path, _owner(path, lessons))
        try:
            if _is(path[-1], ".ipynb"):
                yield replace(found, content=content_of(file))
            elif _is(path[-1], ".zip"):
                with opened(file) as archive:
                    yield from _unpacked(archive, found, lessons, is_class=is_class)
            else:
                yield replace(found, problem=kind_of(file) if path[-1] else "")
        except ValueError as error:
            yield replace(found, problem=str(error))


def _walk(folder: Path, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The files below a folder, no link followed; a folder with nothing in it as a path that ends
    in "".
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError:
        entries = []
    kept = [entry for entry in entries if not _is_noise(entry.name)]
    for entry in kept:
        if entry.is_dir(follow_symlinks=False) and len(path) < DEEPEST:
            yield from _walk(Path(entry.path), (*path, entry.name))
        else:
            yield (*path, entry.name), Path(entry.path)
    if path and not kept:
        yield (*path, ""), folder


def _unpacked(
    file: IO[bytes], archive: _Found, lessons: Sequence[str], *, is_class: bool
) -> Iterator[_Found]:
    """The files in an archive of a class, or of a student.

    Raises ValueError where nothing in it can be graded.
    """
    members = _members(file, is_class=is_class)
    if not any(_is(parts[-1], ".ipynb", ".zip") for _, parts in members):
        names = ", ".join([shown(parts[-1]) for _, parts in members][:5]) or "nothing at all"
        raise ValueError(f"The archive holds no notebook, but {names}: pack the .ipynb.")
    for member, parts in members:
        owner = _owner(parts, lessons) if is_class else archive.owner
        odd = member.name != "/".join(parts)
        remarks = (f"Its archive calls it `{member.name}`.",) if odd else ()
        found = _Found((*archive.path, *parts), owner, remarks=remarks)
        try:
            if _is(parts[-1], ".ipynb"):
                yield replace(found, content=archives.content(file, member))
            elif _is(parts[-1], ".zip") and is_class:
                packed = archives.content(file, member, largest=archives.LARGEST_ARCHIVE)
                yield from _unpacked(io.BytesIO(packed), found, lessons, is_class=False)
            elif _is(parts[-1], ".zip"):
                yield replace(found, problem="It is an archive in an archive: hand in the .ipynb.")
            else:
                yield found
        except ValueError as error:
            yield replace(found, problem=str(error))


def _members(file: IO[bytes], *, is_class: bool) -> list[tuple[archives.Member, tuple[str, ...]]]:
    """The files in an archive, each with the parts of its name."""
    largest = archives.LARGEST_DOWNLOAD if is_class else archives.LARGEST_ARCHIVE
    members = [(member, _parts(member.name)) for member in archives.members(file, largest=largest)]
    return [(member, parts) for member, parts in members if not any(map(_is_noise, parts))]


def _is_class(file: Path, lessons: Sequence[str]) -> bool:
    """Whether a file is an archive of a class: what is in it is named as learning platforms name
    it, lies in several folders, or is several notebooks that bear other names than the lessons'.
    """
    try:
        with opened(file) as archive:
            members = _members(archive, is_class=True)
    except ValueError:
        return False
    if any(re.search(r"^[/\\]|(^|[/\\])\.\.[/\\]", member.name) for member, _ in members):
        return False
    paths = [parts for _, parts in members if _is(parts[-1], ".ipynb", ".zip")]
    if any(_MOODLE.fullmatch(parts[0]) or _CANVAS.fullmatch(parts[0]) for parts in paths):
        return True
    if any(parts[0].lower() == "submitted" for parts in paths):
        return True
    folders = {parts[0] for parts in paths if len(parts) > 1}
    students = {_owner(parts, lessons).student for parts in paths if len(parts) == 1}
    of_lessons = any(is_called(student, lesson) for student in students for lesson in lessons)
    return len(folders) > 1 or (len(students) > 1 and not of_lessons)


def _owner(path: tuple[str, ...], lessons: Sequence[str]) -> _Owner:
    """Whose the file at `path` is."""
    if match := _MOODLE.fullmatch(path[0]):
        return _Owner(f"{match['name']}_{match['id']}", match["name"])
    if len(path) > 2 and path[0].lower() == "submitted":
        path = path[1:]
    if len(path) > 1:
        return _Owner(path[0], path[0])
    if match := _CANVAS.fullmatch(path[0]):
        again = re.search(r"-(\d+)$", PurePosixPath(match["file"]).stem)
        remarks = (f"Handed in again: Canvas numbers it {again[1]}.",) if again else ()
        student = match["name"] or match["anonymous"]
        late = bool(match["late"] or match["late_too"])
        return _Owner(f"{student}_{match['id']}", student, late, remarks)
    stem = PurePosixPath(path[0]).stem
    for lesson in lessons:
        named = rf"{re.escape(lesson)}(?: ?\(\d+\))?"
        stem = re.sub(named, "", stem, flags=re.IGNORECASE).strip(" _-.") or stem
    return _Owner(stem, stem)


def _parts(name: str) -> tuple[str, ...]:
    """The parts of the name of a file in an archive, without what would lead out of it, and no part
    longer than a file's name can be.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    return tuple(p if len(p) < 256 else f"{p[:100]}...{p[-100:]}" for p in parts) or ("?",)


def _is(name: str, *endings: str) -> bool:
    return name.lower().endswith(endings)


def _is_noise(name: str) -> bool:
    return name.startswith(".") or name.lower() in _NOISE
