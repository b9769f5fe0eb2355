"""Confines a student's code: to a few folders that it can only read, to a scratch folder of limited
size, to one process, and to limits on time, memory, files and threads.

Two halves work together. bubblewrap (`command`) starts Python in namespaces of its own, where there
is no network, no other process, and no file but those named here. Once the worker has imported what
it needs, `lock_down` gives up for good what Python had to have until then: starting programs and
opening sockets among others.
"""

import ctypes
import errno
import os
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]  # the folder pruning101, wherever it is imported from
SCRATCH = "/tmp"
NOBODY = "65534"

# What a student's code may not ask of the kernel. Most of it is out of reach in the namespaces
# anyhow; the rest takes memory that no limit of a process counts, or reaches other processes.
_FORBIDDEN = (
    *("fork", "vfork", "execve", "execveat"),  # other processes
    *("kcmp", "pidfd_getfd", "pidfd_open", "process_madvise", "ptrace"),
    *("process_vm_readv", "process_vm_writev"),
    *("socket", "socketpair"),  # the network
    *("chroot", "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr"),  # the files
    *("move_mount", "open_by_handle_at", "open_tree", "pivot_root", "setns", "umount2", "unshare"),
    *("memfd_create", "memfd_secret", "mq_open", "msgget", "semget", "shmget"),  # memory
    *("add_key", "bpf", "io_setup", "io_uring_enter", "io_uring_register", "io_uring_setup"),
    *("keyctl", "perf_event_open", "personality", "request_key", "userfaultfd", "vmsplice"),
)
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What a student's code may take before it is ended."""

    seconds: float = 60  # of the clock, for one cell or one call
    cpu_seconds: int = 300  # of the processor, for one worker
    memory: int = 2 * 2**30  # bytes, beyond what Python and torch take
    file_bytes: int = 64 * 2**20  # all files of the scratch folder together
    open_files: int = 128
    threads: int = 64


def missing() -> str | None:
    """None where code can be confined on this machine, else one sentence: what is missing, and what
    to do. It is tried out, not guessed.
    """
    if not sys.platform.startswith("linux"):
        return (
            "Student code can be confined on Linux only: grade there, or, where every submission "
            "is by someone you trust, with --trusted."
        )
    if shutil.which("bwrap") is None:
        return (
            "Student code cannot be confined: bubblewrap is not installed (Debian and Ubuntu: "
            "`apt install bubblewrap`); install it, or grade with --trusted."
        )
    try:
        import pyseccomp  # noqa: F401
    except ImportError:
        return (
            "Student code cannot be confined: pyseccomp is not installed "
            '(`pip install "pruning101[grade]"`); install it, or grade with --trusted.'
        )
    except RuntimeError:  # its way of saying that the C library is not there
        return (
            "Student code cannot be confined: the library libseccomp is not installed (Debian and "
            "Ubuntu: `apt install libseccomp2`); install it, or grade with --trusted."
        )
    done = subprocess.run(
        command(__name__, limits=Limits()), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.stdout.strip() == "confined":
        return None
    said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
    return (
        f"Student code cannot be confined: a trial of bubblewrap failed ({said}); it takes version "
        "0.7 or newer, and user namespaces, to be allowed on this machine or in this container; or "
        "grade with --trusted."
    )


def command(module: str, *, limits: Limits) -> list[str]:
    """The command line that runs `python -m module` confined; arguments may be appended.

    File descriptors that the process inherits stay open in there, so that the caller can talk to
    it. The process ends with the thread that started it.
    """
    options = ["--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
    options += ["--cap-drop", "ALL", "--new-session", "--die-with-parent", "--hostname", "grading"]
    # No other process inside: bubblewrap's own would be under no filter, and could be written to.
    options += ["--as-pid-1"]
    for root in map(Path, ("/bin", "/sbin", "/lib", "/lib64")):
        if root.is_symlink():
            options += ["--symlink", os.readlink(root), str(root)]
        elif root.is_dir():
            options += ["--ro-bind", str(root), str(root)]
    # Before the rest, parts of which may lie in a folder of that name.
    options += ["--size", str(limits.file_bytes), "--tmpfs", SCRATCH]
    bound: list[Path] = []
    for path in _readable():
        if path.exists() and not any(path.is_relative_to(folder) for folder in bound):
            bound.append(path)
            options += ["--ro-bind", str(path), str(path)]
    if (PACKAGE / "course" / "material").is_dir():  # the lessons that a wheel carries
        options += ["--tmpfs", str(PACKAGE / "course" / "material")]
        options += ["--remount-ro", str(PACKAGE / "course" / "material")]
    # Read-only: where root grades, this user owns the kernel's settings and could write them.
    options += ["--proc", "/proc", "--remount-ro", "/proc"]
    options += ["--dev", "/dev", "--remount-ro", "/dev"]
    fonts = _font_cache()
    options += ["--ro-bind-try", str(fonts), f"{SCRATCH}/matplotlib/{fonts.name}"]
    options += ["--remount-ro", "/", "--chdir", SCRATCH]
    for name, value in _environment().items():
        options += ["--setenv", name, value]
    # An empty environment for bubblewrap, too: its own process can be looked at from inside.
    return ["/usr/bin/env", "-i", _bubblewrap(), *options, "--", sys.executable, "-m", module]


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; Linux only.

    So nothing is left of a grading that was itself killed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def lock_down(limits: Limits) -> None:
    """Limit this process, its present and its future threads for good.

    To be called after all imports and before any of a student's code. Raises OSError where the
    kernel refuses.
    """
    import resource  # not there on Windows

    import pyseccomp

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    spent = int(sum(os.times()[:2]))
    threads = len(os.listdir("/proc/self/task"))
    for kind, limit in (
        (resource.RLIMIT_AS, mapped + limits.memory),
        (resource.RLIMIT_CPU, spent + limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, threads + limits.threads),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)  # threads that are there already, too
    refuse = pyseccomp.ERRNO(errno.EPERM)
    no_thread = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0)
    rules.add_rule(refuse, "clone", no_thread)
    # Its flags lie in memory, where no filter sees them; the C library then falls back to `clone`.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    stays = pyseccomp.Arg(0, pyseccomp.EQ, _PR_SET_PDEATHSIG)
    rules.add_rule(refuse, "prctl", stays)  # it is to end with the process that started it
    for name in _FORBIDDEN:
        rules.add_rule(refuse, name)
    rules.load()


def _readable() -> Iterator[Path]:
    """The files and folders that can be read inside, at the same paths: Python, its packages, the
    system's libraries, and this package.
    """
    for name in ("bin", "sbin", "lib", "lib64", "share/fonts", "share/zoneinfo"):
        yield Path("/usr") / name
    yield from map(Path, ("/etc/ld.so.cache", "/etc/alternatives", "/usr/local/lib"))
    prefixes = [Path(sys.prefix), Path(sys.base_prefix)]
    # Of a prefix only what runs Python: beside it may lie notebooks, settings, or an exchange
    # folder with everyone's submissions.
    for prefix in dict.fromkeys([*prefixes, *(prefix.resolve() for prefix in prefixes)]):
        yield from (prefix / name for name in ("bin", "lib", "lib64", "pyvenv.cfg"))
    program = Path(sys.executable)
    while program.is_symlink():  # each of the links between the environment's Python and the file
        program = program.parent / os.readlink(program)
        yield program
    if site.ENABLE_USER_SITE:
        yield Path(site.getusersitepackages())
    yield PACKAGE


def _environment() -> dict[str, str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "USER": "student",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": f"{SCRATCH}/matplotlib",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",  # else each thread takes 64 MiB of the addresses allowed
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if str(PACKAGE.parent) not in site.getsitepackages():
        environment["PYTHONPATH"] = str(PACKAGE.parent)
    if site.ENABLE_USER_SITE:
        environment["PYTHONUSERBASE"] = site.getuserbase()
    return environment


def _font_cache() -> Path:
    """matplotlib's list of fonts, which takes it seconds to make where it finds none."""
    import matplotlib
    from matplotlib.font_manager import FontManager

    return Path(matplotlib.get_cachedir()) / f"fontlist-v{FontManager.__version__}.json"


def _bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise FileNotFoundError(missing())
    return found


if __name__ == "__main__":
    lock_down(Limits())
    print("confined")
