"""Looks at the source of one cell without running it: what it defines, uses and imports."""

import ast
import re
import symtable
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 300_000  # characters that all cells of a notebook may have
LONGEST_PARSED = 100_000  # of one cell; what a parser makes of it takes a thousand times the room
_NO_PYTHON = (SyntaxError, ValueError, MemoryError, RecursionError)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BEGINS = re.compile(r"^(?:(?:async +)?def +|class +)(\w+)|^(\w+) *=(?!=)", re.MULTILINE)
_FOR_IPYTHON = re.compile(r"^\s*[%!]", re.MULTILINE)


@dataclass(frozen=True)
class Look:
    """What a cell's source says.

    `names` are those of functions, classes and variables that it binds at its top level, in order;
    `anew` those of them that it does not make from what they were (`f = jit(f)`). In a cell that is
    no Python, `anew` are the names that a line of it begins to define.
    """

    is_python: bool
    is_empty: bool
    for_ipython: bool  # it has lines that only IPython knows: magics, shell commands
    names: tuple[str, ...] = ()
    anew: frozenset[str] = frozenset()
    imports: tuple[str, ...] = ()  # its import statements, each spelled in one way
    imported: tuple[str, ...] = ()  # the names that they bind


@lru_cache(maxsize=2_000)
def look(source: str) -> Look:
    """What `source` says."""
    tree = _parsed(source)
    if tree is None:
        begun = [name for pair in _BEGINS.findall(source) for name in pair if name]
        magic = _FOR_IPYTHON.search(source) is not None
        return Look(False, not source.strip(), magic, anew=frozenset(begun))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    return Look(
        True,
        not tree.body,
        False,
        names=tuple(dict.fromkeys(_bound(tree))),
        anew=frozenset(_bound(tree, anew=True)),
        imports=tuple(ast.unparse(node) for node in imports),
        imported=tuple(alias.asname or alias.name.split(".")[0] for alias in aliases),
    )


def defined(source: str) -> tuple[str, ...]:
    """The names of functions, classes and variables that `source` binds at its top level."""
    return look(source).names


def defines(source: str, names: Collection[str]) -> set[str]:
    """Those of `names` that `source` defines anew."""
    return set(names) & look(source).anew


@lru_cache(maxsize=200)
def used(source: str) -> frozenset[str]:
    """The names that `source` expects others to have defined, builtins among them; none where it is
    no Python.
    """
    try:
        tables = [symtable.symtable(source[: LONGEST_PARSED + 1], "cell", "exec")]
    except _NO_PYTHON:
        return frozenset()
    own = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned()}
    found: set[str] = set()
    for table in tables:  # grows while it is read
        tables += table.get_children()
        symbols = (symbol for symbol in table.get_symbols() if symbol.is_referenced())
        found |= {symbol.get_name() for symbol in symbols if symbol.is_global()}
    return frozenset(found - own)


def _parsed(source: str) -> ast.Module | None:
    """The syntax tree of `source`; None where it is no Python."""
    if len(source) > LONGEST_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, say
            return ast.parse(source)
    except _NO_PYTHON:
        return None


def _bound(tree: ast.Module, *, anew: bool = False) -> Iterator[str]:
    """The names that statements bind, also inside `if`, `for`, `with` and `try`, in order."""
    left: list[ast.AST] = [*reversed(tree.body)]
    while left:
        node = left.pop()
        if isinstance(node, _SCOPES):
            yield node.name
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            read = set(_names(node.value, ast.Load)) if anew else set()
            for target in targets:
                yield from (name for name in _names(target, ast.Store) if name not in read)
        inner = [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr)]
        left += reversed(inner)


def _names(node: ast.AST, use: type[ast.expr_context]) -> Iterator[str]:
    for found in ast.walk(node):
        if isinstance(found, ast.Name) and isinstance(found.ctx, use):
            yield found.id
