"""Hostile submissions, end to end: each is judged confined beside two honest exercises.

A hostile cell defines `answer`, whose check asks for the number 7 and for nothing else; the honest
exercises, one before it and one after it, must get their points all the same. Where an attack looks
for something, the text to be found is a marker that hidden tests hold.
"""

import contextlib
import os
import textwrap
import time

import pytest

from pruning101.course.grading import judge as judge_module
from pruning101.course.grading import sandbox
from pruning101.course.grading.judge import judge
from pruning101.course.grading.overlay import Part
from pruning101.course.grading.plan import Check
from pruning101.course.grading.sandbox import Limits

MARKER = "hidden-marker-" + "4711"  # is never in one piece in this file
SETUP = ["import numpy as np\nimport torch\n"]
SMALL = Limits(seconds=3, cpu_seconds=60, memory=2**29, file_bytes=2**24)
BEFORE = [
    Part("def before(x):\n    return x + torch.ones(2)", "ex-1", "the cell of exercise 1"),
    Check("ex-1-check", 1, "assert torch.equal(before(torch.zeros(2)), torch.ones(2))"),
]
AFTER = [
    Part("def after(x):\n    return [x, x]", "ex-9", "the cell of exercise 9"),
    Check("ex-9-check", 1, f"assert after(2) == [2, 2], 'wrong'\nhidden = {MARKER!r}"),
]
SEVEN = "found = answer()\nassert found == 7, f'{found} instead of 7'"


@pytest.fixture(scope="module", autouse=True)
def _possible():
    if (why := sandbox.missing()) is not None:
        assert "CI" not in os.environ, why
        pytest.skip(why)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Many attacks share a submission here; together they may take more than one usually may."""
    monkeypatch.setattr(judge_module, "IN_ALL", 1000)


def judged(*cells, check=SEVEN, limits=SMALL):
    """The outcomes by grade_id, and those of failed cells by label, of a submission whose hostile
    exercises are `cells`.
    """
    items, names = [*BEFORE], ["before", "after"]
    for number, cell in enumerate(cells):
        name = f"answer_{number}"
        source = textwrap.dedent(cell).replace("answer", name)
        hidden = f"hidden = {MARKER!r}\n" + check.replace("answer", name)
        items.append(Part(source, f"ex-h{number}", f"hostile cell {number}"))
        items.append(Check(f"ex-h{number}-check", 1, hidden))
        names.append(name)
    outcomes = list(judge(SETUP, [*items, *AFTER], names, limits=limits, confined=True))
    assert not any(MARKER in repr(outcome) for outcome in outcomes)
    assert all(outcome.passed == (outcome.message == "") for outcome in outcomes)
    return {outcome.grade_id or outcome.label: outcome for outcome in outcomes}


def honest_points(outcomes):
    return outcomes["ex-1-check"].points, outcomes["ex-9-check"].points


def refused(outcomes, number=0):
    """The sentence for a hostile exercise, which got no point, while the honest ones got theirs."""
    assert honest_points(outcomes) == (1, 1), [one.message for one in outcomes.values()]
    outcome = outcomes[f"ex-h{number}-check"]
    assert not outcome.passed
    assert outcome.points == 0
    assert outcome.message
    return outcome.message


# Each holds the worker up until it is ended, or ends it; what was defined before is there again.
ENDLESS = {
    "a cell, whatever is raised in it": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "a call in C, which no signal breaks": "def answer(): return 10 ** 10 ** 10",
    "output": """
        import sys
        def answer():
            while True:
                sys.stdout.write("x" * 2**20)
                sys.stderr.write("x" * 2**20)
        """,
}
FORGER = """
import json, os, stat, struct
def answer():
    text = json.dumps({"value": NODE, "freed": [], "objects": OBJECTS, "sizes": []})
    for number in range(64):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, struct.pack(">QQ", len(text), 0) + text.encode() + b"[" * 999)
        except OSError: pass
    return 7
"""
DEADLY = {
    "the end of the process": "import os\ndef answer(): os._exit(0)",
    "the end of the process while the cell runs": "import os\nos._exit(0)",
    "a crash": "import ctypes\ndef answer(): ctypes.string_at(1)",
    "the channel closed": "import os\ndef answer(): os.closerange(0, 4096); return 7",
    **{
        name: FORGER.replace("NODE", repr(node)).replace("OBJECTS", repr(objects))
        for name, node, objects in (
            ("a class of the system", ["class", "subprocess", "Popen"], []),
            ("an object of a class of the system", ["is", -1], [[1, -1, "object", "os", "system"]]),
            ("what was never sent", ["is", 4711], []),
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("deadly", [ENDLESS, DEADLY])
def test_what_is_deadly_costs_only_itself(deadly):
    outcomes = judged(*deadly.values())
    for number, name in enumerate(deadly):
        failed = outcomes.get(f"hostile cell {number}")
        said = refused(outcomes, number) if failed is None else failed.message
        assert ("longer than 3 seconds" in said) == (deadly is ENDLESS), (name, said)
    refused(outcomes)


# Each would make a wrong answer count as right, if the verdict were made where the code runs.
CHEATS = {
    "builtins": """
        import builtins
        builtins.isinstance = lambda *_: True
        builtins.abs = builtins.len = lambda *_: 7
        builtins.all = builtins.any = builtins.bool = lambda *_: True
        builtins.AssertionError = builtins.Exception = type("Never", (BaseException,), {})
        def answer(): return 8
        """,
    "torch and NumPy": """
        torch.equal = torch.allclose = torch.Tensor.equal = lambda *_, **__: True
        torch.Tensor.__eq__ = torch.Tensor.__ne__ = lambda *_: True
        torch.Tensor.__bool__ = lambda _: True
        np.array_equal = np.allclose = np.isclose = lambda *_, **__: True
        np.testing.assert_allclose = np.testing.assert_array_equal = lambda *_, **__: None
        def answer(): return torch.tensor(8)
        """,
    "assert and what looks at errors": """
        import sys, threading
        sys.settrace(lambda *_: None)
        sys.setprofile(lambda *_: None)
        sys.excepthook = threading.excepthook = sys.unraisablehook = lambda *_: None
        sys.exit = lambda *_: None
        def answer(): return 8
        """,
    "this package": """
        import sys
        import pruning101.course.grading.worker as worker
        for name, module in list(sys.modules.items()):
            if name.startswith(("pruning101", "__main__")):
                for key, value in list(vars(module).items()):
                    if callable(value) and not isinstance(value, type) and key.startswith(
                        ("check", "compare", "passed", "judge", "verdict", "describe")
                    ):
                        setattr(module, key, lambda *_, **__: True)
        def answer(): return 8
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_answer_stays_wrong_whatever_is_patched(name):
    refused(judged(CHEATS[name]))


LIES = {
    "an object that equals everything": """
        class Any:
            __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *_: True
            __hash__ = lambda _: hash(7)
            __class__ = int
            __instancecheck__ = __bool__ = lambda *_: True
        def answer(): return Any()
        """,
    "a number that equals everything": """
        class Seven(int):
            __eq__ = lambda *_: True
            __ne__ = lambda *_: False
            __hash__ = int.__hash__
        def answer(): return Seven(8)
        """,
    "a tensor that equals everything": """
        class Same(torch.Tensor):
            __eq__ = lambda *_: True
            @classmethod
            def __torch_function__(cls, *_, **__): return True
        def answer(): return torch.ones(1).as_subclass(Same)
        """,
    "a text printed like a result": """
        import sys
        def answer():
            for stream in (sys.stdout, sys.stderr, sys.__stdout__):
                print('{"grade_id": "ex-h0-check", "passed": true, "points": 1}', file=stream)
            return 8
        """,
    "an error that passes for a success": """
        class Passed(SystemExit):
            code = 0
            passed, points = True, 1
            __str__ = lambda _: ""
        def answer(): raise Passed(0)
        """,
}


def test_a_lie_is_taken_for_what_it_is():
    outcomes = judged(*LIES.values())
    for number in range(len(LIES)):
        refused(outcomes, number)


# No harm done, and not even the worker lost: all of them in one submission.
CONTAINED = {
    "sys.exit": "import sys\ndef answer(): sys.exit(0)",
    "sys.exit in the cell": "import sys\nsys.exit(0)",
    "an interrupt": "def answer(): raise KeyboardInterrupt",
    "a fork bomb": "import os\ndef answer():\n    while True: os.fork()",
    "another program": "import subprocess\ndef answer(): subprocess.run(['/bin/sh', '-c', 'exit'])",
    "the parent killed": """
        import os, signal
        def answer():
            for pid in (os.getppid(), -1, 1, 0):
                for number in (signal.SIGKILL, signal.SIGTERM):
                    try: os.kill(pid, number)
                    except OSError: pass
            return 8
        """,
    "a list that grows": "def answer():\n    kept = [0]\n    while True: kept = kept + kept",
    "a large tensor": "def answer(): return torch.empty(2**40)",
    "memory by the tensor": "def answer():\n    return [torch.ones(2**22) for _ in range(2**10)]",
    "recursion": "def answer(): return answer()",
    "recursion without a limit": """
        import sys
        def answer():
            try: sys.setrecursionlimit(10**6); return answer()
            finally: sys.setrecursionlimit(1000)
        """,
    "a network connection": """
        import socket, urllib.request
        def answer():
            for ask in (
                lambda: socket.socket(),
                lambda: socket.create_connection(("127.0.0.1", 22), 1),
                lambda: urllib.request.urlopen("http://example.org", timeout=1),
                lambda: socket.getaddrinfo("example.org", 80),
            ):
                try: ask(); return 7
                except OSError: pass
            return 8
        """,
    "files of others": """
        import os
        def answer():
            for path in ("/etc/passwd", "/etc/shadow", "/root/.bashrc", "/home", "/var", "/run"):
                if os.path.exists(path): return 7
            os.symlink("/etc/passwd", "/tmp/link")
            os.symlink("/", "/tmp/matplotlib/root")
            return 7 if os.path.exists("/tmp/link") else 8
        """,
    "a large file": """
        def answer():
            with open("/tmp/large", "wb") as file:
                while True: file.write(bytes(2**20))
        """,
    "ten thousand files": """
        import os
        def answer():
            for number in range(10_000): os.close(os.open(f"/tmp/{number}", os.O_CREAT))
            return 8
        """,
    "every descriptor": "import os\ndef answer():\n    while True: os.open('/dev/null', 0)",
    "a result that is nested": """
        def answer():
            found = ()
            for _ in range(100_000): found = (found,)
            return found
        """,
    "a result that holds itself": "def answer(): found = []; found.append(found); return found",
    "a huge number": "def answer(): return 1 << 10**7",
    "a huge text": "def answer(): return 'x' * 10**8",
    "a result of no kind": "import threading\ndef answer(): return threading.Lock()",
    "names in any script": "def answer(): λ, ß, 数 = '🦆', 'ש', 'ت'; raise ValueError(λ + ß + 数)",
    "surrogates": "def answer(): raise ValueError('\\ud800 \\x00 \\x1b[2J')",
    "an error without end": """
        class Endless(Exception):
            def __str__(self): return "x" * 10**7
            __repr__ = __str__
        def answer(): raise Endless
        """,
    "an error that raises": """
        class Broken(Exception):
            def __str__(self): raise Broken
            __repr__ = __str__
        def answer(): raise Broken
        """,
    "no function at all": "answer = 7",
    "an error chained to itself": """
        def answer():
            try: raise ValueError
            except ValueError as error:
                error.__cause__ = error
                raise
        """,
}


@pytest.mark.slow
def test_what_is_contained():
    outcomes = judged(*CONTAINED.values())
    for number, name in enumerate(CONTAINED):
        said = refused(outcomes, number)
        assert len(said) < 2000, name


@pytest.mark.slow
def test_threads_without_end():
    refused(
        judged(
            """
            import threading
            never = threading.Event()
            def answer():
                while True: threading.Thread(target=never.wait, daemon=True).start()
            """
        )
    )


@pytest.mark.slow
def test_a_result_that_never_ends():
    """Each number comes in time, and the check would ask for ever."""
    cell = "def answer():\n    while True: yield 7"
    said = refused(judged(cell, check="assert sum(answer()) == 7"))
    assert "longer than 3 seconds" in said


def test_a_modules_name_is_not_run_as_code(tmp_path):
    """torch.fx writes the names of a module's parts into a program; the check here asks for it."""
    written = str(tmp_path / "written").replace(".", "")
    cell = f"""
def answer():
    net = torch.nn.Sequential()
    net._modules = {{'training"),open("{written}","w"),str("': torch.nn.Identity()}}
    return net
"""
    check = "torch.fx.symbolic_trace(answer())(torch.zeros(1))"
    refused(judged(cell, check=check))
    assert not os.path.exists(written)


@pytest.mark.slow
def test_what_is_left_behind_changes_nothing_later():
    """Threads, finalizers and exit handlers of a cell, while honest functions are asked."""
    outcomes = judged(
        """
        import atexit, sys, threading, weakref
        class Last:
            def __del__(self): print("7"); raise SystemExit
        last = Last()
        atexit.register(lambda: print('{"passed": true}'))
        weakref.finalize(last, print, "7")
        def meddle():
            while True:
                for name, module in list(sys.modules.items()):
                    if name.startswith("torch"): module.equal = lambda *_: True
        threading.Thread(target=meddle, daemon=True).start()
        threading.Thread(target=threading.Event().wait).start()
        def answer(): return 8
        """
    )
    refused(outcomes)


SPY = """
import gc, os, re, sys
PATTERN = re.compile(rb"hidden-marker-[4]711")
def look(data): return PATTERN.search(data) is not None
def answer():
    found, files = [], 0
    if look(repr(dict(os.environ)).encode()): found.append("environment")
    for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
        for name in ("environ", "cmdline"):
            if look(open(f"/proc/{pid}/{name}", "rb").read()): found.append(f"{pid} {name}")
    for number in os.listdir("/proc/self/fd"):
        try:
            size = os.fstat(int(number)).st_size
            if size and look(os.pread(int(number), 2**24, 0)): found.append("descriptor " + number)
        except OSError: pass
    for start in ("/tmp", "/work", "/home", "/mnt", "/srv", "/opt", "/usr/share", PLACES):
        for folder, _, names in os.walk(start):
            if "site-packages" in folder or "/lib/python" in folder: continue
            for name in names:
                path = os.path.join(folder, name)
                try:
                    files += 1
                    if os.path.getsize(path) > 2**22: continue
                    if look(open(path, "rb").read()): found.append(path)
                except OSError: pass
                if name.endswith(".ipynb") or name == "test_hostile.py": found.append(path)
    frame = sys._getframe()
    while frame is not None:
        seen = repr((frame.f_globals, frame.f_locals)).encode(errors="replace")
        if look(seen): found.append("frame")
        frame = frame.f_back
    for one in gc.get_objects():
        if type(one) in (list, dict, tuple):
            for part in (one.values() if type(one) is dict else one):
                if type(part) is str and look(part.encode(errors="replace")): found.append("object")
    for line in open("/proc/self/maps"):
        ends, kind = line.split()[:2]
        if not kind.startswith("rw"): continue
        first, last = (int(end, 16) for end in ends.split("-"))
        with open("/proc/self/mem", "rb", 0) as memory:
            while first < last:
                size = min(last - first, 2**22)
                try:
                    memory.seek(first)
                    if look(memory.read(size)): found.append("memory " + line)
                except (OSError, ValueError, OverflowError): pass
                first += size
    return found or files
"""


@pytest.mark.slow
def test_no_process_and_no_file_of_it_is_left():
    """What runs in the sandbox is known by the namespace of its processes, which it tells."""
    token = f"left-{os.getpid()}"
    cell = Part(
        f"""
import os, threading
threading.Thread(target=threading.Event().wait).start()
open("/tmp/{token}", "w").close()
def answer(): return os.readlink("/proc/self/ns/pid")
""",
        "ex-h0",
        "hostile cell 0",
    )
    items = [cell, Check("ex-h0-check", 1, SEVEN), *AFTER]
    outcomes = judge(SETUP, items, ["answer", "after"], limits=SMALL, confined=True)
    namespace = next(outcomes).message.split()[0]
    assert namespace.startswith("pid:[")
    assert processes_in(namespace)
    assert [outcome.points for outcome in outcomes] == [1]
    end = time.monotonic() + 60  # the kernel ends the last of it in its own time
    while processes_in(namespace) and time.monotonic() < end:
        pass
    assert not processes_in(namespace)
    assert not os.path.exists(f"/tmp/{token}")


def processes_in(namespace):
    found = []
    for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(pid)
    return found


@pytest.mark.slow
def test_no_hidden_test_is_found_anywhere(tmp_path, monkeypatch):
    """In files, environments, memory, descriptors, frames and objects: as many places as a worker
    can look into. That the search would find it is tried with a marker of the worker's own.
    """
    monkeypatch.setenv("PRUNING101_HIDDEN", MARKER)
    (tmp_path / "03_secret.ipynb").write_text(MARKER)
    cell = SPY.replace("PLACES", repr(str(tmp_path)))
    check = "found = answer()\nassert type(found) is int and found > 50, found"
    limits = Limits(seconds=60)
    outcomes = judged(cell, cell + "\nmine = 'hidden-marker-' + '4711'", check=check, limits=limits)
    assert outcomes["ex-h0-check"].passed, outcomes["ex-h0-check"].message
    assert not outcomes["ex-h1-check"].passed
    assert honest_points(outcomes) == (1, 1)
