"""Runs notebook cells without a kernel: what they display goes nowhere."""

import types
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager


class Cells:
    """Runs cells in the namespace of `module`, one after the other."""

    def __init__(self, module: types.ModuleType) -> None:
        self.names: dict[str, Any] = vars(module)
        self.names["get_ipython"] = lambda: _Magics(self)
        self.names["display"] = lambda *things, **options: None
        self._labels: set[str] = set()

    def run(self, source: str, label: str) -> None:
        """Run a cell; `label` names it in messages. Raises what the cell raises."""
        self._labels.add(label)
        code = compile(TransformerManager().transform_cell(source), label, "exec", optimize=0)
        exec(code, self.names)

    def where(self, error: BaseException) -> str:
        """The line of a cell in which an error arose; "" where it was in none."""
        if isinstance(error, SyntaxError) and error.filename in self._labels:
            return f"line {error.lineno} of {error.filename}"
        found, trace = "", error.__traceback__
        while trace is not None:
            name = trace.tb_frame.f_code.co_filename
            if name in self._labels:
                found = f"line {trace.tb_lineno} of {name}"
            trace = trace.tb_next
        return found


class _Magics:
    """What a cell finds where a kernel would be: magics that time or capture run what they are
    given, and all others do nothing.
    """

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def run_line_magic(self, name: str, line: str, *_: Any) -> None:
        if name in ("time", "prun"):
            exec(line, self._cells.names)

    def run_cell_magic(self, name: str, line: str, cell: str) -> None:
        if name in ("time", "timeit", "capture", "prun"):
            self._cells.run(cell, f"the part of a cell below %%{name}")

    def system(self, command: str) -> None:
        """Do nothing with a line that begins with `!`."""

    def getoutput(self, command: str, *_: Any, **options: Any) -> list[str]:
        """Do nothing with a line such as `x = !command`."""
        return []
