"""Runs jobs of notebook cells in this process: reads JSON from stdin, writes JSON to stdout.

`setup` cells run once; each job's `cells` run on a copy of what they left. A job's result is, for
each cell, the error that it raised, or null.
"""

import contextlib
import io
import json
import os
import sys

os.environ["MPLBACKEND"] = "Agg"


def main() -> None:
    work = json.load(sys.stdin)
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()

    def run(source: str, names: dict) -> str | None:
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                exec(compile(shell.transform_cell(source), "<cell>", "exec"), names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    base = {"__name__": "__main__", "get_ipython": lambda: shell}
    for source in work["setup"]:
        error = run(source, base)
        if error is not None:
            sys.exit(f"the set-up cell failed: {error}")
    results = []
    for job in work["jobs"]:
        names = dict(base)
        results.append([run(source, names) for source in job])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
