"""The judge: what becomes of checks, errors and lost workers; and that it decides as one process
would.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict

import exercises
import pytest
from test_exercises import LESSONS, mutations

from pruning101.course.grading import sandbox
from pruning101.course.grading.cells import Cells
from pruning101.course.grading.judge import judge
from pruning101.course.grading.overlay import Part
from pruning101.course.grading.plan import Check, plan
from pruning101.course.grading.sandbox import Limits

CONFINED = sandbox.missing() is None
KEEP = Check("keep", 0, "kept = {*globals(), 'kept'}")
FORGET = Check("forget", 0, "for name in {*globals()} - kept: del globals()[name]\ndel name")


def outcomes(*items, names=("f", "g"), setup=("import torch\nfrom torch import nn",), seconds=20):
    """The outcomes of cells of a student's code (texts) and checks (in a tuple)."""
    made = [
        Check(f"c{i}", 2, item[0]) if isinstance(item, tuple) else Part(item, None, f"cell {i}")
        for i, item in enumerate(items)
    ]
    return list(judge(setup, made, names, limits=Limits(seconds=seconds), confined=False))


def messages(found):
    return {outcome.label: outcome.message for outcome in found}


FUNCTIONS = """
class Own(ValueError):
    pass

def f(what):
    if what == "stub":
        raise NotImplementedError()
    if what == "exit":
        import sys
        sys.exit(0)
    if what == "own":
        raise Own("a text of mine\\nin two lines")
    if what == "assert":
        assert what == 3
    if what == "deep":
        return f(what)
    if what == "lambda":
        return lambda: 3
    if callable(what):
        try:
            what()
        except ValueError as error:
            return str(error)
    return 7
"""


def test_what_is_said_of_a_check_that_fails():
    found = outcomes(
        "%matplotlib inline\n!ls\nf?\n" + FUNCTIONS,
        ("assert f(1) == 7, 'never seen'",),
        ("assert f(1) == 8, f'8 is right, not {f(1)}'",),
        ("hidden = 4711\nassert f(1) == hidden",),
        ("f('stub')",),
        ("f('exit')",),
        ("f('own')",),
        ("f('assert')",),
        ("f('deep')",),
        ("f(1, 2)",),
        ("f(1) + f('lambda')",),
        ("g(1)",),
        ("assert f('lambda')() == 3",),
        ("assert False, 'x' * 10**6",),
        ("try:\n    f('own')\nexcept ValueError:\n    pass\nelse:\n    assert False",),
        "def g(:\n    pass",
        "1 / 0",
        "import sys; sys.exit()",
        ("print(f(1)); import sys; sys.stderr.write('noise')",),
        ("import sys; sys.exit(0)",),
        ("def fail():\n    raise ValueError('secret')\nassert f(fail) == ''",),
    )
    told = messages(found)
    assert told["c2"] == "8 is right, not 7"
    assert told["c3"] == "A test of this check failed."
    assert told["c4"] == "This exercise is not done yet."
    assert told["c5"] == "SystemExit: sys.exit was called (line 13 of cell 0)"
    assert told["c6"] == "ValueError: Own: a text of mine in two lines (line 15 of cell 0)"
    assert told["c7"] == "AssertionError (line 17 of cell 0)"
    assert told["c8"].startswith("RecursionError: maximum recursion depth exceeded")
    assert told["c9"].startswith("TypeError: f() takes 1 positional argument but 2 were given")
    assert "unsupported operand" in told["c10"]
    assert "a function" in told["c10"]
    assert told["c11"] == "`g` is not defined: has its cell run without an error?"
    assert len(told["c13"]) == 500
    assert told["cell 15"] == "SyntaxError: invalid syntax (line 1 of cell 15)"
    assert told["cell 16"] == "ZeroDivisionError: division by zero (line 1 of cell 16)"
    assert told["cell 17"] == "SystemExit: sys.exit was called (line 1 of cell 17)"
    assert told["c19"] == "SystemExit: 0"
    passed = {outcome.label for outcome in found if outcome.passed}
    assert passed == {"c1", "c12", "c14", "c18", "c20"}
    assert all(outcome.points == 2 * outcome.passed for outcome in found)
    assert {outcome.label for outcome in found if outcome.grade_id is None} == {
        *("cell 15", "cell 16", "cell 17")
    }


@pytest.mark.slow
def test_a_process_that_ends_costs_only_what_ended_it(tmp_path):
    flag = str(tmp_path / "flag")
    found = outcomes(
        "import os, torch\nkept = []\ndef f(x):\n    kept.append(x)\n    return len(kept)",
        "def g():\n    yield 1\n    os._exit(0)",
        ("assert f(0) == 1\nrest = g()\nassert next(rest) == 1",),
        ("try:\n    next(rest)\nexcept Exception:\n    pass",),
        ("assert f(0) == 1, 'a new process starts anew'",),
        ("next(rest)",),
        ("try:\n    list(g())\nexcept BaseException:\n    pass",),
        f"if os.path.exists({flag!r}): os._exit(0)\nopen({flag!r}, 'w').close()\nlater = 1",
        "os.kill(os.getpid(), 9)",
        "f.more = 3",
        ("assert f(1) == 1\nassert f.more == 3",),
    )
    told = messages(found)
    assert {label for label, text in told.items() if not text} == {"c2", "c4", "c10"}
    for label in ("c3", "c5", "c6", "cell 8"):
        assert told[label].startswith("Your code ended its own process")
    assert [outcome.points for outcome in found] == [2, 0, 2, 0, 0, 0, 2]


@pytest.mark.slow
def test_an_endless_loop_is_stopped_wherever_it_runs():
    found = outcomes(
        "def f(x):\n    while x: pass\n    return 1",
        "def g():\n    while True: yield 1",
        ("try:\n    f(1)\nexcept Exception:\n    pass",),
        ("for _ in g(): pass",),
        ("while True: pass",),
        ("assert f(0) == 1",),
        seconds=2,
    )
    told = messages(found)
    for label in ("c2", "c3", "c4"):
        assert told[label].startswith("It ran longer than 2 seconds")
    assert told["c5"] == ""


@pytest.mark.slow
def test_all_of_a_submission_together_has_a_limit(monkeypatch):
    monkeypatch.setattr("pruning101.course.grading.judge.RESTARTS", 1)
    found = outcomes("import os", "os._exit(0)", "os._exit(1)", "f = 3", ("assert f == 3",))
    assert [outcome.message[:12] for outcome in found] == [
        *("Your code en", "Your code en", "This did not", "This did not")
    ]
    monkeypatch.setattr("pruning101.course.grading.judge.IN_ALL", 0)
    (found,) = outcomes(("assert True",))
    assert not found.passed


def test_what_the_students_code_does_to_python_stays_there():
    found = outcomes(
        """
import builtins, torch, sys, gc
torch.equal = torch.allclose = lambda *_: True
builtins.len = builtins.isinstance = builtins.abs = lambda *_: 3
class Same(int):
    __eq__ = lambda *_: True
class Tensor(torch.Tensor):
    __torch_function__ = lambda *_: True
def f():
    return [Same(1), torch.ones(2).as_subclass(Tensor)]
assert False
""",
        ("same, tensor = f()\nassert same == 7",),
        ("assert torch.equal(tensor, torch.ones(2))",),
        ("assert len([]) == 0 and not torch.equal(torch.ones(1), torch.zeros(1))",),
    )
    assert [outcome.passed for outcome in found] == [False, False, False, True]


def test_the_random_numbers_of_a_check_are_its_own():
    forged = """
def f(x):
    state = torch.get_rng_state()
    state[24 : 24 + 8 * 624] = 0  # all that is drawn from it is 0
    torch.set_rng_state(state)
    return torch.rand(3)

def g():
    return torch.rand(3)
"""
    found = outcomes(
        forged,
        ("assert f(1).tolist() == [0, 0, 0]",),  # it is forged, there
        ("f(1)\nx = torch.rand(9)\nassert len(x.unique()) == 9, x",),
        ("torch.manual_seed(3)\nx = g()\ntorch.manual_seed(3)\nassert x.equal(torch.rand(3))",),
        ("torch.manual_seed(3)\nassert not g().equal(g()), 'the second draw is another'",),
        ("torch.manual_seed(3)\nx = g()\ntorch.manual_seed(3)\nassert x.equal(g()), 'reseeded'",),
    )
    assert [outcome.message for outcome in found] == [""] * 5


def test_a_module_that_was_made_to_run_something_is_not_run():
    text = """
import os
from pruning101.course.grading import exchange, kinds
JUDGE = os.getppid()

def f(forged):
    if forged:
        exchange.Exchange.copies = lambda self, one: kinds.is_plain(one)
    model = nn.Sequential()
    vars(model)["_modules"]["0"] = lambda x: x + (os.getppid() == JUDGE)
    return model
"""
    found = outcomes(
        text,
        ("assert f(False)(torch.zeros(1)) == 1, 'it ran in the worker'",),
        ("f(True)(torch.zeros(1))",),
        ("assert f(False)(torch.zeros(1)) == 1, 'and goes on'",),
    )
    assert [outcome.passed for outcome in found] == [True, False, True]
    assert "a module has something in its _modules" in found[1].message


def test_numbers_texts_and_tuples_of_other_classes_are_compared_as_such():
    text = """
import enum
from collections import namedtuple
class Level(enum.IntEnum):
    HIGH = 2
class Text(str):
    __eq__ = lambda *_: True
    __hash__ = str.__hash__
def f():
    return namedtuple("Pair", "one two")(1, [2.5]), Level.HIGH, Text("a"), True
"""
    found = outcomes(
        text,
        ("assert f() == ((1, [2.5]), 2, 'a', True)",),
        ("assert f()[2] != 'b' and f()[3] is True",),
    )
    assert [outcome.passed for outcome in found] == [True, True]


def test_a_set_up_that_fails_is_no_fault_of_the_students():
    with pytest.raises(RuntimeError, match="set-up fails: ZeroDivisionError"):
        outcomes(("assert True",), setup=("1 / 0",))
    where = "import sys\nif 'pytest' not in sys.modules: raise ValueError('in the worker')"
    with pytest.raises(RuntimeError, match="did not start: ValueError: in the worker"):
        outcomes(("assert True",), setup=(where,))


def test_the_command_prints_each_outcome_and_nothing_else():
    job = {
        "setup": [],
        "items": [
            {"part": {"source": "print(1)\nf = [3]", "exercise": "e", "label": "cell"}},
            {"check": {"grade_id": "a", "points": 1.5, "source": "print(f)\nassert f == [3]"}},
            {"check": {"grade_id": "b", "points": 1, "source": "b'a' * 2**36"}},
            {"check": {"grade_id": "c", "points": 1, "source": "import os; os.write(1, b'{}')"}},
            {"check": {"grade_id": "d", "points": 1, "source": "assert False"}},
        ],
        "names": ["f"],
        "limits": asdict(Limits()),
        "confined": False,
    }
    command = [sys.executable, "-m", "pruning101.course.grading.judge"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONOPTIMIZE": "1"},  # drops each `assert` that is not looked after
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["grade_id"] for one in found] == ["a", "b", "c", "d"]
    assert [one["points"] for one in found] == [1.5, 0, 1, 0]
    assert found[1]["message"] == "MemoryError"
    assert done.returncode == 0


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
    names = [name for exercise in plan(lesson).exercises for name in exercise.names]
    given = iter(list(judge(setup, items, names, limits=Limits(seconds=60), confined=CONFINED))[1:])
    wrong = []
    for (cell, *checks), (itself, *errors) in zip(jobs, in_one_process(setup, jobs), strict=True):
        assert next(given).label == "forget"
        if itself is not None:
            assert next(given).grade_id is None
        for check, error in zip(checks, errors, strict=True):
            outcome = next(given)
            if outcome.passed != (error is None):
                wrong.append((cell, check, error, outcome.message))
    assert wrong == []
    assert next(given, None) is None


def in_one_process(setup, jobs):
    """What `exercises.run` gives, here and not in a process of its own: the error of each cell."""
    cells = Cells(types.ModuleType("__main__"))

    def run(source):
        try:
            cells.run(source, "a cell")
        except Exception as error:
            return error
        return None

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert [run(source) for source in setup] == [None] * len(setup)
        base = dict(cells.names)
        for job in jobs:
            cells.names = dict(base)
            yield [run(source) for source in job]
