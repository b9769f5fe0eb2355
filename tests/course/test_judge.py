"""The judge: what becomes of checks, errors and lost workers; and that it decides as one process
would.
"""

import exercises
import pytest
from test_exercises import LESSONS, mutations

from pruning101.course.grading import sandbox
from pruning101.course.grading.judge import judge
from pruning101.course.grading.overlay import Part
from pruning101.course.grading.plan import Check
from pruning101.course.grading.sandbox import Limits
from pruning101.course.grading.source import defined

CONFINED = sandbox.missing() is None
KEEP = Check("keep", 0, "kept = {*globals(), 'kept'}")
FORGET = Check("forget", 0, "for name in {*globals()} - kept: del globals()[name]\ndel name")


def outcomes(*items, names=("f",), setup=("import torch\nfrom torch import nn",), seconds=20):
    """Of cells (text) and checks (text that begins with `assert`, or a list of lines)."""
    made = [
        Part(item, None, f"cell {i}")
        if isinstance(item, str)
        else Check(f"c{i}", 2, "\n".join(item))
        for i, item in enumerate(items)
    ]
    return list(judge(setup, made, names, limits=Limits(seconds=seconds), confined=False))


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_it_decides_as_one_process_would(lesson):
    setup, found = exercises.read(lesson)
    jobs = []
    for name, exercise in found.items():
        jobs += [[exercise.blank, *exercise.visible], [exercise.solution, *exercise.checks]]
        for old, new in mutations(lesson).get(name, []):
            jobs.append([exercise.solution.replace(old, new, 1), *exercise.checks])
    items = [KEEP]
    for cell, *checks in jobs:
        items += [FORGET, Part(cell, None, "the cell")]
        items += [Check(f"check {i}", 1, source) for i, source in enumerate(checks)]
    names = [n for exercise in found.values() for n in defined(exercise.solution)]
    given = iter(list(judge(setup, items, names, limits=Limits(seconds=60), confined=CONFINED))[1:])
    wrong = []
    for (cell, *checks), (itself, *errors) in zip(jobs, exercises.run(setup, jobs), strict=True):
        assert next(given).label == "forget"
        if itself is not None:
            assert next(given).grade_id is None
        for check, error in zip(checks, errors, strict=True):
            outcome = next(given)
            if outcome.passed != (error is None):
                wrong.append((cell, check, error, outcome.message))
    assert wrong == []
    assert next(given, None) is None
