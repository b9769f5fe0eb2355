"""Reads the source of one cell without running it: what it defines, and the plain Python in it."""

import ast
import re
import warnings
from collections.abc import Iterator

LONGEST = 1_000_000  # characters of one cell that are looked at; a parser's memory grows with them
_PYTHON_INSIDE = {"time", "timeit", "capture", "prun"}  # cell magics whose body is Python


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of `source`; None where it is no Python."""
    if len(source) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, say: a student's, not ours
            return ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def defined(source: str) -> tuple[str, ...]:
    """The names that `source` binds at its top level, in order; none where it is no Python."""
    tree = parsed(source)
    return tuple(dict.fromkeys(_bound(tree.body))) if tree else ()


def defines(source: str, name: str) -> bool:
    """Whether `source` defines `name` anew, and not from what it was (`merged = merged(a, b)`).

    A cell that is no Python defines what a line of it begins to define.
    """
    tree = parsed(source)
    if tree is None:
        start = rf"^(?:async +def +|def +|class +){re.escape(name)}\b|^{re.escape(name)} *=[^=]"
        return re.search(start, source[:LONGEST], re.MULTILINE) is not None
    return name in _bound(tree.body, anew=True)


def plain(source: str) -> tuple[str, bool]:
    """`source` as plain Python, and whether anything was left out of it for that.

    IPython's magics, shell commands and help (`%%time`, `!pip`, `help?`) do nothing here. What is no
    Python even so comes back as it is.
    """
    text = source
    if parsed(text) is None and len(source) <= LONGEST:
        from IPython.core.inputtransformer2 import TransformerManager

        try:
            text = TransformerManager().transform_cell(source)
        except Exception:  # whatever it stumbles over: the cell then fails as any wrong cell does
            return source, False
    if "get_ipython()" not in text:
        return source, False
    calls = _ipython_calls(text)
    lines = text.encode().split(b"\n")
    for call in reversed(calls):
        first, last = call.lineno - 1, (call.end_lineno or call.lineno) - 1
        rest = lines[last][call.end_col_offset :]
        inside = _body(call).encode()
        lines[first : last + 1] = [lines[first][: call.col_offset] + inside + rest]
    return (b"\n".join(lines).decode(), True) if calls else (source, False)


def _bound(body: list[ast.stmt], *, anew: bool = False) -> Iterator[str]:
    """The names that statements bind, also inside `if`, `for`, `with` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            read = _names(node.value, ast.Load) if anew else set()
            for target in targets:
                yield from sorted(_names(target, ast.Store) - read)
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _bound(getattr(node, inner, []), anew=anew)
        for handler in getattr(node, "handlers", []):
            yield from _bound(handler.body, anew=anew)


def _names(node: ast.AST, use: type[ast.expr_context]) -> set[str]:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, use))
    return {name.id for name in names}


def _ipython_calls(text: str) -> list[ast.Call]:
    """The calls `get_ipython().something(...)` in a cell, in order, none inside another."""
    tree = parsed(text)
    found = []
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if (
                isinstance(owner, ast.Call)
                and isinstance(owner.func, ast.Name)
                and owner.func.id == "get_ipython"
            ):
                found.append(node)
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _body(call: ast.Call) -> str:
    """What stands in place of such a call: the Python that a cell magic was to run, else None."""
    assert isinstance(call.func, ast.Attribute)
    given = [arg.value if isinstance(arg, ast.Constant) else None for arg in call.args]
    if call.func.attr == "run_cell_magic" and len(given) == 3 and given[0] in _PYTHON_INSIDE:
        return plain(str(given[2]))[0]
    return "None"
