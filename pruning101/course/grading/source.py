"""Reads the source of one cell without running it: what it defines and uses, and the plain Python
in it.
"""

import ast
import re
import symtable
import warnings
from collections.abc import Collection, Iterator

LONGEST = 300_000  # characters of one cell that are looked at; parsing takes a hundred times that
LONGEST_MAGIC = 20_000  # IPython reads a cell again for each line that it changes
_PYTHON_INSIDE = {"time", "timeit", "capture", "prun"}  # cell magics whose body is Python
_NO_PYTHON = (SyntaxError, ValueError, MemoryError, RecursionError)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of `source`; None where it is no Python."""
    if len(source) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, say
            return ast.parse(source)
    except _NO_PYTHON:
        return None


def defined(source: str) -> tuple[str, ...]:
    """The names that `source` binds at its top level, in order; none where it is no Python."""
    tree = parsed(source)
    return tuple(dict.fromkeys(_bound(tree))) if tree else ()


def defines(source: str, names: Collection[str]) -> set[str]:
    """Those of `names` that `source` defines anew, and not from what they were (`f = jit(f)`).

    In a cell that is no Python these are the names that a line of it begins to define.
    """
    tree = parsed(source)
    if tree:
        return set(names) & set(_bound(tree, anew=True))
    start = re.compile(r"^(?:(?:async +)?def +|class +)(\w+)|^(\w+) *=(?!=)", re.MULTILINE)
    return set(names) & {name for pair in start.findall(source[:LONGEST]) for name in pair}


def used(source: str) -> set[str]:
    """The names that `source` expects others to have defined, builtins among them."""
    if parsed(source) is None:
        return set()
    try:
        tables = [symtable.symtable(source, "cell", "exec")]
    except _NO_PYTHON:
        return set()
    found: set[str] = set()
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned()}
    for table in tables:  # grows while it is read
        tables += table.get_children()
        symbols = (symbol for symbol in table.get_symbols() if symbol.is_referenced())
        found |= {symbol.get_name() for symbol in symbols if symbol.is_global()}
    return found - own


def imports(source: str) -> list[str]:
    """The import statements at the top level of `source`, each spelled in one way."""
    tree = parsed(source)
    body = tree.body if tree else []
    return [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


def plain(source: str) -> tuple[str, bool]:
    """`source` as plain Python, and whether something was left out of it for that.

    What only IPython knows (`%%time`, `!pip`, `help?`) does nothing here. What is no Python even
    then comes back as it is.
    """
    text = source
    for _ in range(3):  # `%%time` above `%%capture`: once for each, and once more
        if parsed(text) is None and len(text) <= LONGEST_MAGIC:
            text = _transformed(text)
        calls = _ipython_calls(text)
        if not calls:
            break
        lines = text.encode().split(b"\n")
        for call in reversed(calls):
            first, last = call.lineno - 1, (call.end_lineno or call.lineno) - 1
            rest = lines[last][call.end_col_offset :]
            lines[first : last + 1] = [
                lines[first][: call.col_offset] + _inside(call).encode() + rest
            ]
        text = b"\n".join(lines).decode()
    return (source, False) if parsed(text) is None or text == source else (text, True)


def _bound(tree: ast.Module, *, anew: bool = False) -> Iterator[str]:
    """The names that statements bind, also inside `if`, `for`, `with` and `try`, in order."""
    left: list[ast.AST] = [*reversed(tree.body)]
    while left:
        node = left.pop()
        if isinstance(node, _SCOPES):
            yield node.name
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            read = set(_names(node.value, ast.Load)) if anew else set()
            for target in targets:
                yield from (name for name in _names(target, ast.Store) if name not in read)
        inner = (n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr))
        left += reversed(list(inner))


def _names(node: ast.AST, use: type[ast.expr_context]) -> Iterator[str]:
    for found in ast.walk(node):
        if isinstance(found, ast.Name) and isinstance(found.ctx, use):
            yield found.id


def _transformed(source: str) -> str:
    """`source` with IPython's own syntax turned into calls of `get_ipython()`, where it has any."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return str(TransformerManager().transform_cell(source))
    except Exception:  # it may stumble over anything: the cell then fails as a wrong cell does
        return source


def _ipython_calls(text: str) -> list[ast.Call]:
    """The calls `get_ipython().something(...)` in a cell, in order."""
    tree = parsed(text) if "get_ipython" in text else None
    calls = [
        node
        for node in (ast.walk(tree) if tree else ())
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "get_ipython"
    ]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    outer, end = [], (0, 0)
    for call in calls:
        if (call.lineno, call.col_offset) >= end:  # one in another's arguments goes with it
            outer.append(call)
            end = (call.end_lineno or 0, call.end_col_offset or 0)
    return outer


def _inside(call: ast.Call) -> str:
    """What stands in place of such a call: the Python that a cell magic was to run, else None."""
    given = [arg.value if isinstance(arg, ast.Constant) else None for arg in call.args]
    named = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if named == "run_cell_magic" and len(given) == 3 and given[0] in _PYTHON_INSIDE:
        return str(given[2])
    if named == "run_line_magic" and len(given) == 2 and given[0] in ("time", "prun"):
        return str(given[1]) or "None"
    return "None"
