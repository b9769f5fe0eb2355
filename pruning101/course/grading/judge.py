"""Judges one submission: runs the checks here, and the student's code elsewhere.

The process of the judge never runs any of the student's code. Where a check uses a function that
the student wrote, a stand-in hands the arguments to the worker and brings back what it returns, as
plain data. So the only thing that a student's code can bring about is what its functions return.

`python -m pruning101.course.grading.judge` reads a job as JSON from stdin and prints each outcome
as a line of JSON as soon as it is known.
"""

import contextlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import sandbox
from .cells import Cells
from .channel import Channel, ExchangeError
from .overlay import Part
from .plan import Check
from .sandbox import Limits
from .standins import Disconnected, Peer, Told, one_line

WORKER = "pruning101.course.grading.worker"
START_SECONDS = 120  # for a worker's imports and the set-up
RESTARTS = 12
IN_ALL = 10  # times the limit of one cell: for all of a submission's code together
MEMORY = 6 * 2**30  # bytes that what comes back, and the checks, may take here


@dataclass(frozen=True)
class Outcome:
    """What became of a check, or of a cell of the student's that failed (`grade_id` None).

    `points` are those earned. `message` is for the student: a sentence or two, "" if passed; never
    a line of a hidden test.
    """

    grade_id: str | None
    label: str
    passed: bool
    points: float
    message: str
    seconds: float


class Late(BaseException):
    """A check, with all that it called, took longer than it may. No Exception, so that no check
    that expects errors takes it for one.
    """


def judge(
    setup: Sequence[str],
    items: Sequence[Part | Check],
    names: Sequence[str],
    *,
    limits: Limits,
    confined: bool,
) -> Iterator[Outcome]:
    """Run `items` in order, and yield the outcome of each check and of each part that failed.

    Args:
        setup: the cells that checks and parts build on.
        items: cells of the student's code, and checks.
        names: what the checks use of that code.
        limits: of each item, and of the process that runs the student's code.
        confined: whether that process is confined; else it may do all that this one may.

    Raises:
        RuntimeError: the set-up fails, or no process can be started.
    """
    bench = _Bench(setup, names, limits, confined)
    try:
        for item in items:
            start = time.perf_counter()
            is_check = isinstance(item, Check)
            message = bench.check(item) if isinstance(item, Check) else bench.run(item)
            if is_check or message is not None:
                yield Outcome(
                    grade_id=item.grade_id if isinstance(item, Check) else None,
                    label=item.grade_id if isinstance(item, Check) else item.label,
                    passed=message is None,
                    points=item.points if isinstance(item, Check) and message is None else 0.0,
                    message=message or "",
                    seconds=time.perf_counter() - start,
                )
    finally:
        bench.close()


class _Bench:
    """The judge's namespace, and the worker that it asks; a new one where that ended."""

    def __init__(
        self, setup: Sequence[str], names: Sequence[str], limits: Limits, confined: bool
    ) -> None:
        self._setup, self._names = list(setup), list(names)
        self._limits, self._confined = limits, confined
        self._cells = Cells(types.ModuleType("__main__"))
        self._parts: list[Part] = []  # what a new worker has to run again
        self._worker: _Worker | None = None
        self._starts = 0
        with _silently():
            for source in self._setup:
                try:
                    self._cells.run(source, "the set-up")
                except Exception as error:
                    raise RuntimeError(f"The set-up fails: {_sentence(error)}") from error
        self._end = time.monotonic() + IN_ALL * limits.seconds
        self._begin()

    def run(self, part: Part) -> str | None:
        """Run a part; what was wrong, in words, or None."""
        message, ran = self._guarded(lambda peer: peer.request("run", part.source, part.label))
        if ran:
            self._parts.append(part)
            self._refresh()
        return message

    def check(self, check: Check) -> str | None:
        """Run a check; why it failed, in words, or None."""
        return self._guarded(lambda peer: self._cells.run(check.source, "the check"))[0]

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _guarded(self, action: Callable[[Peer], None]) -> tuple[str | None, bool]:
        """Do something with the worker. What was wrong comes back in words, and whether the worker
        has outlived it.
        """
        while self._worker is None and self._starts <= RESTARTS and time.monotonic() < self._end:
            self._begin()
        if self._worker is None or time.monotonic() > self._end:
            return (
                "This did not run: all of the code together took too long, or ended too often."
            ), False
        worker = self._worker
        try:
            with worker.for_seconds(self._limits.seconds), _silently():
                action(worker.peer)
            message = None
        except Disconnected as error:  # of an earlier worker, say, whose generator is still used
            message = self._loss(error.reason)
        except Late as error:
            message = self._loss(error)
        except (Exception, SystemExit) as error:
            message = _sentence(error, self._names)
        if worker.lost is not None:  # whatever the check made of that
            message = self._loss(worker.lost)
            self.close()
        return message, self._worker is not None

    def _loss(self, reason: BaseException) -> str:
        if isinstance(reason, TimeoutError | Late):
            seconds = f"{self._limits.seconds:g} seconds"
            return f"It ran longer than {seconds} and was stopped: is there a loop without end?"
        if isinstance(reason, ExchangeError):
            return f"What your code gave back cannot be read: {one_line(str(reason))}"
        return (
            "Your code ended its own process: a crash, a call such as os._exit, or more time of "
            "the processor or memory than it may take."
        )

    def _begin(self) -> None:
        """Start a worker, and have it run again what the last one did. If it is lost on the way,
        the part that brought that about is left out from then on.
        """
        self._starts += 1
        start = time.monotonic()
        self._worker = _Worker(self._setup, self._limits, self._confined)
        self._end += time.monotonic() - start  # the student's code takes no part in that
        for part in list(self._parts):
            self._asked("run", part.source, part.label)
            if self._worker is None:
                self._parts.remove(part)
                return
        self._refresh()

    def _refresh(self) -> None:
        """Put what the student's code defines now into the judge's namespace."""
        for name in self._names:
            found = self._asked("name", name)
            if type(found) is tuple and found:
                self._cells.names[name] = found[0]
            else:
                self._cells.names.pop(name, None)

    def _asked(self, *request: Any) -> Any:
        """What the worker answers; None where it raises an error, or is lost."""
        found = None
        if self._worker is not None:
            with (
                contextlib.suppress(Exception, Disconnected, Late),
                self._worker.for_seconds(self._limits.seconds),
            ):
                found = self._worker.peer.request(*request)
            if self._worker.lost is not None:
                self.close()
        return found


class _Worker:
    """A process that runs the student's code, and the conversation with it."""

    def __init__(self, setup: list[str], limits: Limits, confined: bool) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", WORKER]
        if confined:
            command = sandbox.command(WORKER, limits=limits)
        with theirs, tempfile.TemporaryFile() as complaints:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                env={**os.environ, "MPLBACKEND": "Agg"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self.peer = Peer(Channel(ours), actions={}, tell=_name_only)
            self._late = False
            try:
                with self.for_seconds(START_SECONDS):
                    self.peer.request("start", setup, confined, asdict(limits))
            except (Exception, Disconnected, Late) as error:
                self.end()
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip()
                last = said.splitlines()[-1] if said else _sentence(error)
                raise RuntimeError(f"The process for student code did not start: {last}") from None

    @property
    def lost(self) -> BaseException | None:
        """Why the worker can be asked nothing more, if so."""
        return Late() if self._late else self.peer.lost

    @contextlib.contextmanager
    def for_seconds(self, seconds: float) -> Iterator[None]:
        """Let what happens inside take so long, here and in the worker."""
        self.peer.channel.deadline = time.monotonic() + seconds
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only; the worker's answers have their deadline
            return
        # A little later, so that a wait for the worker ends by itself; and again, for an error that
        # is raised while an object is deleted gets lost.
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, seconds + 0.5, 1.0)
        try:
            yield
        finally:
            try:
                self.peer.channel.deadline = math.inf
            finally:  # even if it rings just now
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    def end(self) -> None:
        """Kill the process and all of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.peer.close()

    def _on_alarm(self, number: int, frame: Any) -> None:
        self._late = True
        raise Late


def _name_only(error: BaseException) -> Told:
    """What the worker learns of an error in a check's callback: not its text, which may tell of a
    hidden test.
    """
    return Told(type(error).__name__, "", "")


def _sentence(error: BaseException, names: Sequence[str] = ()) -> str:
    """An error in words for the student."""
    told = getattr(error, "told", None)
    if isinstance(told, Told):
        if told.name == "NotImplementedError" and not told.text:
            return "This exercise is not done yet."
        where = f" ({told.where})" if told.where else ""
        return f"{told.name}: {told.text}{where}" if told.text else f"{told.name}{where}"
    try:
        text = one_line(str(error))
    except Exception:  # of what the check made of a result
        text = ""
    if "Remote" in text:
        text += (
            " (a Remote stands for what your code gave back, if that is no plain data: a function, "
            "a generator, an object of a class of your own)"
        )
    if isinstance(error, AssertionError):
        return text or "A test of this check failed."
    if isinstance(error, NameError) and error.name in names:
        return f"`{error.name}` is not defined: has its cell run without an error?"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def main() -> None:
    """Judge the job on stdin."""
    sandbox.end_with_parent()
    job = json.load(sys.stdin)
    if sys.platform == "linux":  # elsewhere nothing is confined
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    os.environ["MPLBACKEND"] = "Agg"
    items = [
        Check(**item["check"]) if "check" in item else Part(**item["part"]) for item in job["items"]
    ]
    with os.fdopen(os.dup(1), "w") as lines, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # whatever a check prints, by whichever way
        for outcome in judge(
            job["setup"],
            items,
            job["names"],
            limits=Limits(**job["limits"]),
            confined=job["confined"],
        ):
            print(json.dumps(asdict(outcome)), file=lines, flush=True)


if __name__ == "__main__":
    main()
