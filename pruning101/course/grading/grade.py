"""Grades a folder of submissions: a judge process for each, several at a time, each result kept as
soon as it is there.

What is kept (`results/KEY.json`) is bound to what it was made from: the submission, the lesson's
plan, the limits and the package's version. So the same command goes on where it was cut off, and
grades again only what changed.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ... import __version__
from ...core.files import write_json
from .. import material
from . import overlay, report, sandbox, submissions
from .plan import Check, Plan, plan
from .submissions import Submission

JUDGE = [sys.executable, "-m", "pruning101.course.grading.judge"]
MARK = "grading.json"  # tells a folder that this command made from any other
ATTEMPTS = 2


class JudgeFailed(RuntimeError):
    """A judge ended before it had done all that it was asked; `said` is its last word, if any."""

    def __init__(self, status: int, said: str, outcomes: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(f"the judge ended with status {status}")
        self.status, self.said, self.outcomes = status, said, outcomes


def grade(
    folder: Path,
    out: Path,
    *,
    jobs: int | None = None,
    lessons: Sequence[material.Lesson] | None = None,
    limits: sandbox.Limits | None = None,
    trusted: bool = False,
    progress: bool = True,
) -> Path:
    """Grade the submissions in `folder`, write the reports into `out`, and return the summary page.

    Args:
        folder: notebooks, one a student, or what nbgrader, Moodle or Canvas hand out.
        out: gets `gradebook.csv`, `summary.html`, `results.json`, `feedback/KEY.html` and
            `results/KEY.json`. The same call goes on where an earlier one was stopped.
        jobs: how many submissions are graded at a time; by default one a core.
        lessons: the lessons to grade; by default all that are there.
        limits: what the code of a submission may take.
        trusted: run the students' code unconfined.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: there is nothing to grade, `out` cannot be used, or code cannot be confined
            here; before any work.
    """
    limits = sandbox.Limits() if limits is None else limits
    jobs = os.cpu_count() or 1 if jobs is None else jobs
    _refuse(folder, out, jobs=jobs, trusted=trusted)
    built = [lesson for lesson in material.lessons() if lesson.notebook.is_file()]
    chosen = built if lessons is None else lessons
    found = sorted(
        submissions.find(folder, chosen), key=lambda one: (one.lesson or "", one.student, one.key)
    )
    if not found:
        raise ValueError(f"There is no submission in {str(folder)!r}: name the folder they lie in.")
    plans = {x.name: plan(x) for x in chosen if x.name in {one.lesson for one in found}}
    bounds = {
        one.key: {
            "submission": one.digest,
            "plan": plans[str(one.lesson)].digest,
            "limits": asdict(limits),
            "confined": not trusted,
            "pruning101": __version__,
        }
        for one in found
        if one.problem is None
    }
    todo = [one for one in found if one.problem is None and not _kept(out, one, bounds)]
    if not (out / MARK).exists():
        write_json(out / MARK, {"gradebook": None})

    def work_on(submission: Submission, judges: "_Judges") -> None:
        one = plans[str(submission.lesson)]
        work = overlay.overlay(one, submissions.read(submission))
        job = _job(one, work, limits=limits, trusted=trusted)
        content = {
            "bound": bounds[submission.key],
            "remarks": work.remarks,
            "answers": work.answers,
            # The judge itself ends what takes too long in all: this is for one that hangs.
            "outcomes": judges.outcomes(job, seconds=300 + 12 * limits.seconds),
        }
        write_json(_path(out, submission), content)

    with tqdm(
        total=len(bounds),
        initial=len(bounds) - len(todo),
        desc="graded",
        unit="submission",
        disable=not progress,
    ) as bar:
        failures = _each(todo, work_on, jobs=jobs, bar=bar)

    _move_edited(out)
    report.write(out, plans, _results(found, out, bounds, failures))
    write_json(out / MARK, {"gradebook": _digest(out / "gradebook.csv")})
    return out / "summary.html"


def _refuse(folder: Path, out: Path, *, jobs: int, trusted: bool) -> None:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: name the one with the submissions.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{str(out)!r} lies in the folder of the submissions; name one outside it with --out."
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; name a folder with --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise ValueError(
            f"{str(out)!r} holds files that are not of this command; name a new folder with --out."
        )
    if jobs < 1:
        raise ValueError(f"{jobs} jobs grade nothing; name 1 or more with --jobs.")
    if not trusted and (why := sandbox.missing()):
        raise ValueError(why)


def _each(
    todo: Sequence[Submission],
    work_on: Callable[[Submission, "_Judges"], None],
    *,
    jobs: int,
    bar: "tqdm[Any]",
) -> dict[str, str]:
    """Do the work on each submission, `jobs` at a time; return a sentence for each that failed."""
    failures = {}
    # Left in this order: first the judges end, then the threads that wait for them.
    with ThreadPoolExecutor(jobs) as pool, _Judges() as judges:
        running = {pool.submit(work_on, submission, judges): submission for submission in todo}
        try:
            for future in as_completed(running):
                submission, error = running[future], future.exception()
                if error is not None:
                    # Whatever a notebook brings about, the others go on, and the report says so.
                    failures[submission.key] = (
                        f"It could not be graded ({str(error)[:200]}): run the same command "
                        "again, or grade it by hand."
                    )
                    said = error.said if isinstance(error, JudgeFailed) else type(error).__name__
                    bar.write(f"{submission.source!r}: {error}. {said}", file=sys.stderr)
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # where Ctrl-C cut the loop off
    return failures


def _job(
    plan: Plan, work: overlay.Work, *, limits: sandbox.Limits, trusted: bool
) -> dict[str, Any]:
    """What the judge of a submission is asked to do."""
    return {
        "setup": plan.setup,
        "items": [
            {"check" if isinstance(item, Check) else "part": asdict(item)}
            for item in overlay.items(plan, work)
        ],
        "names": [name for exercise in plan.exercises for name in exercise.names],
        "limits": asdict(limits),
        "confined": not trusted,
    }


class _Judges:
    """Starts judges, and ends those that are at work when it is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def __enter__(self) -> "_Judges":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                _end(process)

    def outcomes(self, job: Mapping[str, Any], *, seconds: float) -> list[dict[str, Any]]:
        """The outcomes of a job; checks that a judge did not come to in `seconds` count as failed.

        A check at which a judge is killed by the system, and a second one, too, is failed by what
        the code gave back; the rest goes on without it. Raises JudgeFailed where a judge fails of
        itself, twice in the same place.
        """
        found: list[dict[str, Any]] = []
        crashes = 0
        while True:
            left = _without(job, found)
            try:
                more, in_time = self._run(left, seconds)
                found += more
                break
            except JudgeFailed as error:
                done = [outcome for outcome in error.outcomes if outcome["grade_id"] is not None]
                found += done
                crashes = 1 if done else crashes + 1
                if crashes < ATTEMPTS:
                    continue
                if error.status >= 0:
                    raise
                check = next(_checks(_without(job, found)))
                said = "What your code gave back brought the check itself down, twice."
                found.append({"grade_id": check["grade_id"], "passed": False, "message": said})
                crashes = 0
        if not in_time:
            done_ids = {outcome["grade_id"] for outcome in found}
            said = (
                f"The notebook had taken {seconds:g} seconds in all when this check's turn came: "
                "grading was stopped."
            )
            found += [
                {"grade_id": check["grade_id"], "passed": False, "message": said}
                for check in _checks(job)
                if check["grade_id"] not in done_ids
            ]
        return found

    def _run(self, job: Mapping[str, Any], seconds: float) -> tuple[list[dict[str, Any]], bool]:
        # Files without a name rather than pipes: nothing that a judge leaves behind can hold them
        # open, and nothing of a job can be read from the disk.
        with (
            tempfile.TemporaryDirectory(prefix="pruning101-") as folder,
            tempfile.TemporaryFile() as asked,
            tempfile.TemporaryFile() as said,
            tempfile.TemporaryFile() as complained,
        ):
            asked.write(json.dumps(job).encode())
            asked.seek(0)
            with self._lock:
                if self._closed:
                    raise JudgeFailed(0, "Grading was stopped.")
                process = subprocess.Popen(
                    JUDGE,
                    stdin=asked,
                    stdout=said,
                    stderr=complained,
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
                self._running.add(process)
            in_time = True
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                _end(process)
                process.wait()
                with self._lock:
                    self._running.remove(process)
            said.seek(0)
            # A line that is cut off is of an item that was not finished.
            found = [json.loads(line) for line in said if line.endswith(b"\n")]
            if in_time and process.returncode != 0:
                complained.seek(0)
                lines = complained.read().decode(errors="replace").strip().splitlines()
                raise JudgeFailed(process.returncode, lines[-1] if lines else "", found)
            done = {outcome["grade_id"] for outcome in found}
            if in_time and not done.issuperset(check["grade_id"] for check in _checks(job)):
                raise JudgeFailed(0, "It left checks out.")
            return found, in_time


def _without(job: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The job without the checks that have an outcome."""
    done = {outcome["grade_id"] for outcome in found}
    left = [x for x in job["items"] if "check" not in x or x["check"]["grade_id"] not in done]
    return {**job, "items": left}


def _checks(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    return (item["check"] for item in job["items"] if "check" in item)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a judge and all of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _path(out: Path, submission: Submission) -> Path:
    return out / "results" / f"{submission.key}.json"


def _kept(out: Path, submission: Submission, bounds: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run kept of a submission; None where that was made from something else."""
    try:
        content = json.loads(_path(out, submission).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return dict(content) if content["bound"] == bounds[submission.key] else None


def _results(
    found: Sequence[Submission],
    out: Path,
    bounds: Mapping[str, Any],
    failures: Mapping[str, str],
) -> Iterator[report.Result]:
    """What became of each submission, read one by one."""
    for one in found:
        kept = _kept(out, one, bounds) if one.problem is None and one.key not in failures else None
        content = kept or {"remarks": [], "answers": {}, "outcomes": []}
        yield report.Result(
            key=one.key,
            student=one.student,
            source=one.source,
            lesson=one.lesson,
            late=one.late,
            remarks=(*one.remarks, *content["remarks"]),
            problem=one.problem,
            failure=failures.get(one.key),
            outcomes=content["outcomes"],
            answers=content["answers"],
        )


def _move_edited(out: Path) -> None:
    """Move a gradebook in which someone has written since to where it is not written over."""
    gradebook = out / "gradebook.csv"
    written = json.loads((out / MARK).read_text())["gradebook"]
    if gradebook.exists() and _digest(gradebook) != written:
        numbers = iter(range(1, 10_000))
        while (kept := out / f"gradebook.edited-{next(numbers)}.csv").exists():
            pass
        gradebook.rename(kept)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
