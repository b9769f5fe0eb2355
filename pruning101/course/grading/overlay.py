"""What of a student's notebook is graded, and in which order.

A student's notebook is laid over the plan of its lesson: only the student's own cells are taken
from it, and set-up and checks are always the instructor's. Cells are known by their grade_id; where
an editor dropped that, by their text, what they define, or their cell id. Nothing is run here.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from ..execute import first_line
from .plan import Check, Exercise, Given, Plan, Written, plan
from .source import defined, defines, look, used

__all__ = [
    "Check",
    "Exercise",
    "Given",
    "Part",
    "Plan",
    "Work",
    "Written",
    "items",
    "overlay",
    "plan",
]


@dataclass(frozen=True)
class Part:
    """One cell of the student's code: of an exercise (its grade_id), or an extra cell (None).

    `label` names it in messages: "the cell of exercise 1".
    """

    source: str
    exercise: str | None
    label: str


@dataclass(frozen=True)
class Work:
    """What a student handed in for a plan: code in order, answers by grade_id, remarks in words.

    `places` says, for each check, after how many of the parts it runs.
    """

    parts: tuple[Part, ...]
    answers: dict[str, str]
    remarks: tuple[str, ...]
    places: dict[str, int]


def overlay(plan: Plan, notebook: Any) -> Work:
    """Lay a student's notebook over `plan`.

    The student's code and answers come back, with a remark in words on all that was not as it was
    handed out.
    """
    cells = list(notebook.cells)
    roles, remarks = _recognised(plan, cells)
    whole = {check.grade_id: check.source for x in plan.exercises for check in x.checks}
    parts: list[Part] = []
    stands: dict[str, int] = {}  # after how many parts the student has a check
    notes: dict[str, list[str]] = {}
    for cell, role in zip(cells, roles, strict=True):
        source, is_code = cell.source, cell.cell_type == "code"
        name = _name(plan, role) if role else ""
        same = role is not None and _squeezed(source) == _squeezed(role.source)
        if role is None:
            if is_code and not look(source).is_empty:
                label = f"the extra cell that begins `{first_line(source)[:40]}`"
                _add(parts, source, None, label, notes)
        elif role.role == "exercise":
            if not is_code:
                kind = "Markdown" if cell.cell_type == "markdown" else "raw text"
                if not look(source).is_python and not look(source).anew:
                    _note(notes, f"turned into {kind} and no Python, so it did not run", name)
                    continue
                _note(notes, f"turned into {kind}; its text ran as code", name)
            _add(parts, source, role.grade_id, f"the cell of {name}", notes)
        elif role.role == "check":
            if role.grade_id in stands:
                _note(notes, "there more than once; it counts once", name)
            elif not same and _squeezed(source) == _squeezed(whole[role.grade_id]):
                _note(notes, "with its hidden tests, as in the published lesson", name)
            elif not same or not is_code:
                _note(notes, "changed; the original was used", name)
            stands[role.grade_id] = len(parts)
        elif role.role == "setup" and not same:
            _note(notes, "changed; the original was used", "the set-up")
            old = look(role.source).imports
            added = [line for line in look(source).imports if line not in old]
            if added:
                _note(notes, "run all the same", "the imports that were added to the set-up")
                _add(parts, "\n".join(added), None, "the imports added to the set-up", notes)
        elif role.role == "lesson" and is_code and not same:
            name = f"the cell of the lesson that begins `{first_line(role.source)[:40]}`"
            _note(notes, "changed; cells of the lesson do not run in grading", name)
    places = _places(plan, parts, stands)
    answers = _answers(plan, cells, roles, notes)
    _compare(plan, parts, stands, notes)
    remarks += _moved(plan, roles)
    remarks += _of_the_lesson(plan, parts)
    remarks += [_sentence(names, what) for what, names in notes.items()]
    return Work(tuple(parts), answers, tuple(remarks), places)


def items(plan: Plan, work: Work) -> list[Part | Check]:
    """The student's cells and the instructor's checks in the order in which they run."""
    after: dict[int, list[Check]] = {}
    for exercise in plan.exercises:
        for check in exercise.checks:
            after.setdefault(work.places[check.grade_id], []).append(check)
    order: list[Part | Check] = [*after.get(0, [])]
    for count, part in enumerate(work.parts, start=1):
        order += [part, *after.get(count, [])]
    return order


def _recognised(plan: Plan, cells: list[Any]) -> tuple[list[Given | None], list[str]]:
    """For each of the student's cells the one of the lesson's that it is or was; remarks on how."""
    by_id = {given.grade_id: given for given in plan.given if given.grade_id}
    by_text = {_squeezed(given.source): given for given in reversed(plan.given)}
    by_cell = {given.id: given for given in plan.given if given.id}
    exercise_of = {name: x.grade_id for x in plan.exercises for name in x.names}
    setup = next((given for given in plan.given if given.role == "setup"), None)
    roles: list[Given | None] = []
    lost: dict[str, list[str]] = {}
    known = 0
    for cell in cells:
        graded = _mapping(cell.metadata.get("nbgrader"))
        grade_id = graded.get("grade_id")
        if isinstance(grade_id, str) and grade_id in by_id:
            roles.append(by_id[grade_id])
            known += 1
            continue
        text, role, how = _squeezed(cell.source), None, ""
        ids = [cell.get("id"), cell.metadata.get("id")]
        cell_id = next((i for i in ids if isinstance(i, str) and i in by_cell), "")
        looks_like_code = cell.cell_type == "code" or look(cell.source).is_python
        names = defines(cell.source, exercise_of) if looks_like_code else set()
        if text and text in by_text:
            role, how = by_text[text], "by its text"
        elif names:
            role = by_id[exercise_of[min(names, key=list(exercise_of).index)]]
            how = f"by what it defines (`{'`, `'.join(sorted(names))}`)"
        elif cell_id and (cell.cell_type == "code") == (by_cell[cell_id].cell_type == "code"):
            role, how = by_cell[cell_id], "by its cell id"
        elif setup and "setup" in _list(cell.metadata.get("tags")):
            role = setup
        roles.append(role)
        if role and role.grade_id:
            lost.setdefault(how, []).append(_name(plan, role))
    if known or not lost:
        how_each = (
            _sentence(names, f"without grade_id; recognised {how}") for how, names in lost.items()
        )
        return roles, list(how_each)
    return roles, [
        "The notebook has lost the grade_ids of its cells, as some editors do: its cells were "
        "recognised by their text and by what they define."
    ]


def _places(plan: Plan, parts: list[Part], stands: dict[str, int]) -> dict[str, int]:
    """After how many parts each check runs: not before any cell of its exercise, nor before the
    check above it, and else where the student has it.

    One that the student deleted runs before the next exercise's first cell.
    """
    places: dict[str, int] = {}
    for exercise in plan.exercises:
        own = [i for i, part in enumerate(parts, start=1) if _belongs(part, exercise)]
        earliest = own[-1] if own else 0
        following = [i for i in range(earliest, len(parts)) if parts[i].exercise is not None]
        for check in exercise.checks:
            place = stands.get(check.grade_id)
            if place is None:
                place = following[0] if own and following else len(parts)
            earliest = places[check.grade_id] = max(earliest, place)
    return places


def _belongs(part: Part, exercise: Exercise) -> bool:
    return part.exercise == exercise.grade_id or bool(defines(part.source, exercise.names))


def _compare(
    plan: Plan, parts: list[Part], stands: Collection[str], notes: dict[str, list[str]]
) -> None:
    """Note which exercises are deleted or there several times, and which checks are gone."""
    given = {role.grade_id: role for role in plan.given}
    for exercise in plan.exercises:
        name = _name(plan, given[exercise.grade_id])
        own = [part for part in parts if part.exercise == exercise.grade_id]
        if not any(_belongs(part, exercise) for part in parts):
            _note(notes, "deleted, so its checks fail", f"the cell of {name}")
        if len(own) > 1:
            twice = sum(bool(defines(part.source, exercise.names)) for part in own) > 1
            how = "they ran in their order" + (", so that the last definition counts" * twice)
            _note(notes, f"there {len(own)} times; {how}", f"the cell of {name}")
        for check in exercise.checks:
            if check.grade_id not in stands:
                _note(notes, "deleted; the original was used", _name(plan, given[check.grade_id]))


def _answers(
    plan: Plan, cells: list[Any], roles: list[Given | None], notes: dict[str, list[str]]
) -> dict[str, str]:
    """The student's answers in words; an empty one where nothing was written.

    Text in a new cell below the answer's cell, or below the question where the answer's cell is
    gone, counts as well.
    """
    questions = {
        below.grade_id: above
        for above, below in zip(plan.given, plan.given[1:], strict=False)
        if below.role == "written"
    }
    given = {role.grade_id: role for role in plan.given if role.role == "written"}
    there = {role.grade_id for role in roles if role}
    texts: dict[str, list[str]] = {grade_id: [] for grade_id in given}
    current = None  # the answer that a text without a role would belong to
    for cell, role in zip(cells, roles, strict=True):
        if role is not None:
            current = role.grade_id if role.role == "written" else None
            for grade_id, question in questions.items():
                if role == question and grade_id not in there:
                    current = grade_id
            if role.role == "written" and _squeezed(cell.source) != _squeezed(role.source):
                texts[role.grade_id].append(cell.source.strip())
        elif current and cell.cell_type != "code" and cell.source.strip():
            texts[current].append(cell.source.strip())
            _note(notes, "taken from a new cell", f"the answer to `{_title(plan, current)}`")
    for grade_id in given:
        if not texts[grade_id] and grade_id not in there:
            _note(notes, "deleted", f"the answer to `{_title(plan, grade_id)}`")
    return {grade_id: "\n\n".join(text) for grade_id, text in texts.items()}


def _add(
    parts: list[Part], source: str, exercise: str | None, label: str, notes: dict[str, list[str]]
) -> None:
    if look(source).for_ipython:
        _note(notes, "lines for IPython only (magics, shell commands) do nothing in grading", label)
    parts.append(Part(source, exercise, label))


def _moved(plan: Plan, roles: list[Given | None]) -> list[str]:
    """A remark on the graded cells that do not stand where they stood."""
    there = list(dict.fromkeys(role for role in roles if role and role.grade_id))
    original = [given for given in plan.given if given in there]
    blocks = SequenceMatcher(None, original, there, autojunk=False).get_matching_blocks()
    stayed = {role for block in blocks for role in there[block.b : block.b + block.size]}
    moved = [_name(plan, role) for role in there if role not in stayed]
    what = "moved; a check runs after its exercise all the same"
    return [_sentence(moved, what)] if moved else []


def _of_the_lesson(plan: Plan, parts: list[Part]) -> list[str]:
    """A remark on names that exercises use and that only the lesson's own cells define."""
    lesson = {name for x in plan.given if x.role == "lesson" for name in defined(x.source)}
    others = [*plan.setup, *(part.source for part in parts)]
    bound = {name for x in others for name in (*look(x).names, *look(x).imported)}
    missing = lesson - bound
    remarks = []
    for part in parts:
        names = sorted(used(part.source) & missing) if part.exercise else []
        if names:
            remarks.append(
                f"{part.label[:1].upper()}{part.label[1:]} uses `{'`, `'.join(names)}` from the "
                "lesson's own cells; of those only the set-up runs in grading."
            )
    return remarks


def _name(plan: Plan, role: Given) -> str:
    """What a cell of the lesson is called in a sentence."""
    for number, exercise in enumerate(plan.exercises, start=1):
        if role.grade_id == exercise.grade_id:
            return f"exercise {number}"
        for index, check in enumerate(exercise.checks, start=1):
            if role.grade_id == check.grade_id:
                return f"check {index} of exercise {number}"
    return f"the answer to `{_title(plan, role.grade_id)}`" if role.grade_id else "a cell"


def _title(plan: Plan, grade_id: str) -> str:
    return next((x.title for x in plan.written if x.grade_id == grade_id), grade_id)


def _note(notes: dict[str, list[str]], what: str, name: str) -> None:
    if name not in notes.setdefault(what, []):
        notes[what].append(name)


def _sentence(names: Iterable[str], what: str) -> str:
    text = "; ".join(dict.fromkeys(names))
    return f"{text[:1].upper()}{text[1:]}: {what}."


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []
