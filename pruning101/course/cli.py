"""The command `pruning101`: the course from the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from . import material


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:]
        self.exit(2, f"{self.prog}: {sentence} (see {self.prog} --help).\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where something failed or is broken, 2 where it
    was called wrongly.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("\npruning101: stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        print(f"pruning101: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError | FloatingPointError) else 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pruning101",
        description="A course on making neural networks smaller by pruning, and its tools.",
    )
    parser.add_argument("--version", action="version", version=f"pruning101 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    lesson = "a lesson: 03_magnitude, magnitude, 03 or 3"

    add = commands.add_parser
    sub = add("lab", help="open the course in JupyterLab", description=_lab.__doc__)
    sub.add_argument("--no-browser", action="store_true", help="only print the address")
    sub.add_argument(
        "--port",
        type=int,
        default=None,
        help="the port to serve on (default: 8888, or the next free one)",
    )
    sub.set_defaults(run=_lab)

    sub = add("run", help="run a lesson without a browser", description=_run.__doc__)
    sub.add_argument("lesson", metavar="LESSON", help=lesson)
    sub.add_argument(
        "--profile", choices=("quick", "standard", "paper"), default="quick", help="default: quick"
    )
    sub.add_argument(
        "--out", type=Path, metavar="PATH", help="default: runs/NN_topic.PROFILE.ipynb"
    )
    sub.set_defaults(run=_run)

    sub = add("build", help="make the notebooks from the lessons", description=_build.__doc__)
    sub.add_argument(
        "lessons", metavar="LESSON", nargs="*", help=f"{lesson}, or index (default: all)"
    )
    either = sub.add_mutually_exclusive_group()
    either.add_argument(
        "--check", action="store_true", help="execute and write nothing; list what is out of step"
    )
    either.add_argument(
        "--text",
        action="store_true",
        help="execute nothing and keep the outputs; for changes of texts, metadata and links",
    )
    sub.set_defaults(run=_build)

    sub = add("links", help="write the links to Colab and Binder", description=_links.__doc__)
    sub.add_argument("--check", action="store_true", help="write nothing; list wrong links")
    sub.set_defaults(run=_links)

    sub = add("new", help="begin a lesson", description=_new.__doc__)
    sub.add_argument("topic", metavar="TOPIC", help="the name of its module: token_folding")
    sub.set_defaults(run=_new)

    sub = add("assign", help="write lessons' student versions", description=_assign.__doc__)
    sub.add_argument("lessons", metavar="LESSON", nargs="*", help=f"{lesson} (default: all)")
    sub.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder"
    )
    sub.set_defaults(run=_assign)

    sub = add("check", help="say which exercises of a notebook pass", description=_check.__doc__)
    sub.add_argument(
        "notebooks", type=Path, nargs="+", metavar="NOTEBOOK", help="a notebook that you worked in"
    )
    sub.set_defaults(run=_check)

    sub = add("grade", help="grade a folder of submissions", description=_grade.__doc__)
    sub.add_argument("submissions", type=Path, metavar="SUBMISSIONS", help="the folder of them")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the reports are written"
    )
    sub.add_argument(
        "--jobs", type=int, metavar="N", help="submissions at a time (default: one a core)"
    )
    sub.add_argument("--lesson", nargs="+", metavar="LESSON", help=f"{lesson} (default: all)")
    sub.add_argument(
        "--timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="what one cell, or one call of a function, may take (default: 60)",
    )
    sub.add_argument(
        "--memory",
        type=float,
        default=2,
        metavar="GIB",
        help="what a submission may take beyond Python and torch (default: 2)",
    )
    sub.add_argument(
        "--trusted", action="store_true", help="run the students' code without confining it"
    )
    sub.set_defaults(run=_grade)

    sub = add("book", help="make the book of the course", description=_book.__doc__)
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/book"),
        metavar="FOLDER",
        help="default: runs/book",
    )
    sub.set_defaults(run=_book)

    sub = add("reproduce", help="make a paper's table again", description=_reproduce.__doc__)
    sub.add_argument("table", metavar="TABLE", help="a table: lacoot")
    sub.add_argument(
        "--profile",
        metavar="NAME",
        default="quick",
        help="quick, standard or paper (default: quick)",
    )
    sub.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    sub.add_argument("--rows", nargs="+", metavar="ROW", help="default: all")
    sub.add_argument("--out", type=Path, metavar="PATH", help="default: table.json in the folder")
    sub.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="what is done is kept here (default: runs/reproduce/TABLE-PROFILE)",
    )
    sub.add_argument(
        "--done", action="store_true", help="train nothing; show the rows and seeds that are there"
    )
    sub.set_defaults(run=_reproduce)

    sub = add("data", help="make a data set's one file", description=_data.__doc__)
    sub.add_argument("name", metavar="NAME", help="a data set: mnist, fashion_mnist, cifar10, ...")
    sub.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="default: $PRUNING101_DATA, else the user's cache folder",
    )
    sub.set_defaults(run=_data)

    sub = add("doctor", help="say what is installed and what is wrong", description=_doctor.__doc__)
    sub.set_defaults(run=_doctor)
    return parser


def _lab(arguments: argparse.Namespace) -> int:
    """Open JupyterLab on the course's index; without a display, print the address to open."""
    from .lab import lab

    return lab(browser=not arguments.no_browser, port=arguments.port)


def _run(arguments: argparse.Namespace) -> int:
    """Run a lesson top to bottom without a browser, save the executed notebook, and print its table
    and its path.
    """
    from .run import run

    table, path = run(material.find(arguments.lesson), profile=arguments.profile, out=arguments.out)
    print(table)
    print(path)
    return 0


def _build(arguments: argparse.Namespace) -> int:
    """Execute lessons on the quick profile and write their notebooks and student versions, the same
    bytes each time.
    """
    from . import build

    root = material.material()
    index = material.Lesson("index", root)
    chosen = [index if name == "index" else material.find(name, root) for name in arguments.lessons]
    if not arguments.lessons:
        chosen = [*material.lessons(root), *([index] if index.source.is_file() else [])]
    if arguments.check:
        faults = [fault for lesson in chosen for fault in build.check(lesson)]
        for fault in faults:
            print(fault)
        return 1 if faults else 0
    for lesson in chosen:
        if arguments.text:
            build.reword(lesson)
        else:
            for remark in build.build(lesson):
                print(f"{lesson.name}: {remark}", file=sys.stderr)
        print(lesson.notebook)
    return 0


def _links(arguments: argparse.Namespace) -> int:
    """Write the repository and branch of pyproject.toml into every link to Colab and Binder, of
    the notebooks and the texts, and execute nothing.
    """
    from . import build, links

    root, faults = material.material(), []
    if not arguments.check:
        for lesson in material.lessons(root):
            try:
                build.reword(lesson)
            except (ValueError, FileNotFoundError) as error:  # the others get their links
                faults.append(str(error))
        for path in links.rewrite(root):
            print(path)
    faults += links.faults(root)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def _new(arguments: argparse.Namespace) -> int:
    """Begin a lesson in a checkout: write its five files, and say what else it needs."""
    from .new import new, next_steps

    for path in new(arguments.topic, material.material()):
        print(path)
    print(next_steps(arguments.topic))
    return 0


def _assign(arguments: argparse.Namespace) -> int:
    """Write student versions of lessons (solutions and hidden tests out, outputs cleared, checks
    locked), and a manifest.json with their points.
    """
    from .assign import assign

    chosen = [material.find(name) for name in arguments.lessons] or material.lessons()
    for path in assign(chosen, arguments.to):
        print(path)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Run the checks of your notebooks, offline, and say what passes, what does not and why, and
    which hints there are.
    """
    from .check import check

    checked = check(arguments.notebooks)
    print("\n\n".join(each.text for each in checked))
    return 0 if all(each.passed for each in checked) else 1


def _grade(arguments: argparse.Namespace) -> int:
    """Grade what students handed in: a gradebook, a page of feedback for each, and a summary; stop
    it with Ctrl-C, and the same command goes on from there.
    """
    from .grading.grade import grade
    from .grading.sandbox import Limits

    for name in ("timeout", "memory"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise ValueError(f"--{name} takes a number above 0, not {getattr(arguments, name)}.")
    summary = grade(
        arguments.submissions,
        arguments.out,
        jobs=arguments.jobs,
        lessons=arguments.lesson and [material.find(name) for name in arguments.lesson],
        limits=Limits(
            seconds=arguments.timeout,
            cpu_seconds=max(Limits.cpu_seconds, int(5 * arguments.timeout)),
            memory=int(arguments.memory * 2**30),
        ),
        trusted=arguments.trusted,
    )
    print(summary.with_name("gradebook.csv"))
    print(summary)
    return 0


def _book(arguments: argparse.Namespace) -> int:
    """Make the book: the lessons as they are stored, the library's reference, all methods side by
    side, and the instructor's guide, as pages that need no network.
    """
    from .book import book

    print(book(arguments.out))
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    """Make a paper's table again and print it; stop with Ctrl-C, and the same command goes on from
    there to the same figures.
    """
    from .reproduce import reproduce

    text, path = reproduce(
        arguments.table,
        profile=arguments.profile,
        seeds=arguments.seeds,
        rows=arguments.rows,
        out=arguments.out,
        folder=arguments.folder,
        done=arguments.done,
    )
    print(text)
    print(path)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    """Download a data set once and convert it into the one file that lessons read, which can be
    handed on.
    """
    from ..core import data

    print(data.convert(arguments.name, arguments.root))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Say in one screen what is installed, what will be used, where data is, and how to mend what
    is wrong.
    """
    from .doctor import examine

    report, broken = examine()
    print(report)
    return 1 if broken else 0
