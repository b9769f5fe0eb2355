"""Runs a student's code, confined, and does with it what the judge asks for over a socket.

`python -m pruning101.course.grading.worker NUMBER`: the number of the socket's file descriptor. No
check is ever sent here; what is sent are the arguments of the checks' calls.
"""

import builtins
import operator
import os
import select
import socket
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any

from . import sandbox
from .cells import Cells
from .channel import Channel
from .standins import Disconnected, Peer, Told, one_line


class Worker:
    """What the judge, at the other end of `end`, may ask of the student's code."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.cells = Cells(sys.modules["__main__"])

    def start(self, setup: Sequence[str], confined: bool, limits: Mapping[str, Any]) -> None:
        """Run the set-up, then give up all that the student's code must not do."""
        for source in setup:
            self.cells.run(source, "the set-up")
        sys.stdout.flush()
        sys.stderr.flush()
        with open(os.devnull, "r+b", buffering=0) as nowhere:
            for number in (0, 1, 2):
                os.dup2(nowhere.fileno(), number)
        if confined:
            sandbox.lock_down(sandbox.Limits(**limits))
        else:
            threading.Thread(target=_end_with, args=(self._socket,), daemon=True).start()

    def name(self, wanted: str) -> tuple[Any, ...]:
        """What a name is defined as, or nothing."""
        return (self.cells.names[wanted],) if wanted in self.cells.names else ()

    def tell(self, error: BaseException) -> Told:
        """The error's nearest class of Python's, its text, and the line of the student's code."""
        kinds = [kind.__name__ for kind in type(error).__mro__ if _is_pythons(kind)]
        name = kinds[0] if kinds else type(error).__name__
        try:
            text = str(error.msg if isinstance(error, SyntaxError) else error)
            if type(error).__name__ != name and isinstance(error, Exception):
                text = f"{type(error).__name__}: {text}"
        except BaseException:
            text = ""
        if isinstance(error, SystemExit):
            text = "sys.exit was called"
        return Told(name, one_line(str.__str__(text)), self.cells.where(error))


def _is_pythons(kind: type) -> bool:
    return getattr(builtins, kind.__name__, None) is kind and kind not in (
        *(Exception, BaseException, object),
    )


def _end_with(judge: socket.socket) -> None:
    """End this process with the judge's, even in the midst of a student's endless loop."""
    hung_up = select.poll()
    hung_up.register(judge, 0)
    hung_up.poll()
    os._exit(0)


def main(number: int) -> None:
    """Serve the judge at the other end of the socket until it hangs up."""
    sandbox.end_with_parent()
    sys.modules["__main__"] = types.ModuleType("__main__")
    end = socket.socket(fileno=number)
    worker = Worker(end)
    peer = Peer(
        Channel(end),
        actions={
            "start": worker.start,
            "run": worker.cells.run,
            "name": worker.name,
            "item": operator.getitem,
            "len": len,
            "attribute": getattr,
        },
        tell=worker.tell,
        told=BaseException,
        follows=True,
    )
    try:
        while True:
            peer.serve()
    except Disconnected:
        os._exit(0)  # without what the student's code left to be done at the end


if __name__ == "__main__":
    main(int(sys.argv[1]))
