"""What the tests of grading share: a course of two small lessons, made without executing them, and
notebooks as students might hand them in.
"""

import copy
import shutil
from pathlib import Path

import nbformat

from pruning101.course import build
from pruning101.course.assign import student
from pruning101.course.material import lessons

TINY = Path(__file__).parent / "tiny" / "lessons"

# A lesson "added later": names, ids and structure of its own, known to no tool.
LATER = {
    "Cutting a tiny vector": "Counting what is left",
    "ex-07": "count-11",
    "keep_largest": "left_over",
    "## Exercise 1": "## Exercises\n#\n# ### Exercise 1: what is left",
}
SECOND = """
# %% [markdown]
# ### Exercise 2: two names
#
# <details><summary>Hint 1</summary>Both are
# short.</details>
# <details><summary>Hint 2</summary>`half` is a number.</details>

# %% tags=["exercise"] nbgrader={"schema_version": 3, "grade_id": "count-11-2", "grade": false, "solution": true, "locked": false, "task": false}
### BEGIN SOLUTION
half = 0.5


def halved(value):
    return value * half
### END SOLUTION

# %% tags=["check"] nbgrader={"schema_version": 3, "grade_id": "count-11-2-check", "grade": true, "points": 3, "solution": false, "locked": true, "task": false}
assert halved(4) == 2, f"half of 4 is not {halved(4)}"
### BEGIN HIDDEN TESTS
assert halved(5) == 2.5, "unseen"
### END HIDDEN TESTS
"""  # noqa: E501
SOLVED = "def keep_largest(values, k):\n    return np.sort(values)[::-1][:k]"


def course(root):
    """The lessons 07_tiny and 11_later under `root`, with their notebooks, which were never run."""
    shutil.copytree(TINY, root / "lessons")
    text = (TINY / "07_tiny.py").read_text()
    for old, new in LATER.items():
        assert old in text
        text = text.replace(old, new)
    (root / "lessons" / "11_later.py").write_text(text + SECOND)
    found = lessons(root)
    for lesson in found:
        whole = build.pair(lesson.source.read_text(), lesson)
        lesson.exercises.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(whole, lesson.notebook)
        nbformat.write(student(whole), lesson.exercises)
    return found


def handed_out(lesson):
    return nbformat.read(lesson.exercises, as_version=4)


def solved(lesson):
    """The student version with the instructor's solutions in it."""
    whole, blank = nbformat.read(lesson.notebook, as_version=4), handed_out(lesson)
    for ours, theirs in zip(whole.cells, blank.cells, strict=True):
        if ours.metadata.get("nbgrader", {}).get("solution"):
            theirs.source = ours.source
    return blank


def cell(notebook, grade_id):
    graded = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id")]
    return next(c for c in graded if c.metadata.nbgrader.grade_id == grade_id)


def at(notebook, grade_id):
    return notebook.cells.index(cell(notebook, grade_id))


def code(source, **metadata):
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def text(source, **metadata):
    return nbformat.v4.new_markdown_cell(source, metadata=metadata)


def copied(cell):
    """A copy of a cell as JupyterLab pastes it: the metadata kept, the cell id new."""
    fresh = copy.deepcopy(cell)
    fresh.id = nbformat.v4.new_code_cell().id
    return fresh
