"""Stands in for the judge process in the tests of the grading command: it runs nothing, and does
what comments in the student's code tell it to.

    python standin_judge.py FOLDER < job

A check passes where the code says `right`. `crash` ends the judge, `crash once` the first one only,
`falls at ID` is a check at which the system kills it, `meet` waits for another judge that does so,
too, and `wait` waits for ever while FOLDER holds a pipe named `waiting`, to which it writes its
process id. Who began is noted in FOLDER/began.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

folder = Path(sys.argv[1])
job = json.load(sys.stdin)
code = "\n".join(item["part"]["source"] for item in job["items"] if "part" in item)
name = re.search(r"# name: (\S+)", code).group(1)
before = (folder / "began").read_text().split() if (folder / "began").exists() else []
with (folder / "began").open("a") as log:
    log.write(f"{name}\n")
if "crash once" in code and name in before:
    code = "right"
if "crash" in code:
    sys.exit("Something went wrong in here.")
if "wait" in code and (folder / "waiting").exists():
    (folder / "waiting").write_text(str(os.getpid()))
    signal.pause()
if "meet" in code:
    signal.alarm(60)  # the test fails rather than waits for ever
    try:
        (folder / "met").mkdir()
        (folder / "meeting").read_text()
    except FileExistsError:
        (folder / "meeting").write_text("here")
for item in job["items"]:
    if "check" in item:
        if f"falls at {item['check']['grade_id']}" in code:
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = {
            "grade_id": item["check"]["grade_id"],
            "label": "a check",
            "passed": "right" in code,
            "points": item["check"]["points"],
            "message": "" if "right" in code else "not right",
            "seconds": 0.0,
        }
        print(json.dumps(outcome), flush=True)
