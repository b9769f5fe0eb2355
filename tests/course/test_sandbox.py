"""The sandbox: what is seen from inside, what is refused there, and what becomes of its process."""

import json
import os
import select
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pruning101.course.grading import sandbox
from pruning101.course.grading.sandbox import Limits

LOCKED = """
import ctypes, errno, json, os, sys, threading
from pruning101.course.grading import sandbox
sandbox.lock_down(sandbox.Limits(**json.loads(sys.argv[1])))
libc = ctypes.CDLL(None, use_errno=True)
def tried(function):
    try:
        return repr(function())
    except BaseException as error:
        return type(error).__name__
"""


@pytest.fixture(scope="module", autouse=True)
def _possible():
    if (why := sandbox.missing()) is not None:
        assert "CI" not in os.environ, why
        pytest.skip(why)


def start(code, *, limits=None, **options):
    """A confined Python that runs `code`."""
    *wrapped, option, module = sandbox.command("module", limits=limits or Limits())
    assert (option, module) == ("-m", "module")
    command = [*wrapped, "-c", code, json.dumps(vars(limits or Limits()))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **options)


def ask(code, *, limits=None, **options):
    """What confined `code` prints, as JSON."""
    process = start(code, limits=limits, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def test_from_inside_only_python_and_the_package_are_seen(tmp_path):
    (tmp_path / "submission.ipynb").write_text("{}")
    seen = ask(
        "import json, os, sys\n"
        "print(json.dumps({folder: sorted(os.listdir(folder)) if os.path.isdir(folder) else None"
        " for folder in ['/', '/etc', '/tmp', '/home', '/root', '/usr', '/usr/share', '/dev/shm',"
        f" '/sys', '/run', {str(sandbox.PACKAGE.parent)!r}, {str(tmp_path)!r}]}}))"
    )
    prefixes = {Path(sys.prefix).parts[1], Path(sys.base_prefix).parts[1]}
    system = {"bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "tmp", "usr"}
    assert set(seen["/"]) <= system | prefixes | {sandbox.PACKAGE.parts[1]}
    assert set(seen["/etc"]) <= {"alternatives", "ld.so.cache"}
    assert set(seen["/usr"]) <= {"bin", "lib", "lib64", "local", "sbin", "share"}
    assert set(seen["/usr/share"] or []) <= {"fonts", "zoneinfo"}
    assert "matplotlib" in seen["/tmp"]
    assert not seen["/dev/shm"]
    assert seen["/sys"] is seen["/run"] is seen[str(tmp_path)] is None
    around = set(seen[str(sandbox.PACKAGE.parent)])
    assert sandbox.PACKAGE.name in around
    assert around.isdisjoint({"lessons", "notebooks", "tests", "results", ".git"})


def test_nothing_of_the_environment_or_of_another_process_gets_in(monkeypatch):
    monkeypatch.setenv("PRUNING101_SECRET", "hidden")
    seen = ask(
        "import json, os\n"
        "pids = [name for name in os.listdir('/proc') if name.isdigit()]\n"
        "env = b''.join(open(f'/proc/{pid}/environ', 'rb').read() for pid in pids)\n"
        "print(json.dumps([pids, env.decode(), dict(os.environ), os.getuid()]))"
    )
    pids, text, environment, user = seen
    assert pids == ["1"]
    assert "hidden" not in text
    assert set(environment) - {"PWD", "LC_CTYPE"} == set(sandbox._environment())
    assert environment["HOME"] == "/tmp"
    assert user != 0


def test_no_network_card_is_there():
    assert ask("import json, socket; print(json.dumps(socket.if_nameindex()))") == [[1, "lo"]]


def test_nothing_can_be_written_but_the_scratch_folder():
    """Not even the kernel's settings, which belong to this very user where root grades."""
    mounts, written = ask(
        "import json, os\n"
        "mounts = [line.split() for line in open('/proc/self/mountinfo')]\n"
        "mounts = [parts[4] for parts in mounts if 'ro' not in parts[5].split(',')]\n"
        "written = []\n"
        "for start in ('/dev', '/proc'):\n"
        "    for folder, _, files in os.walk(start):\n"
        "        for path in [os.path.join(folder, name) for name in files]:\n"
        "            if os.path.islink(path): continue\n"
        "            try: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))\n"
        "            except OSError: continue\n"
        "            written.append(path)\n"
        "print(json.dumps([mounts, written]))"
    )
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
    assert set(mounts) <= {"/tmp", "/dev/pts", "/dev/console"} | devices
    assert set(written) <= {"/dev/pts/ptmx"} | devices


def test_once_locked_only_threads_can_be_started():
    seen = ask(
        LOCKED + "import multiprocessing, socket, subprocess\n"
        "ran = []\n"
        "thread = threading.Thread(target=ran.append, args=(1,)); thread.start(); thread.join()\n"
        "print(json.dumps([ran, [tried(function) for function in (\n"
        "    os.fork,\n"
        "    lambda: os.posix_spawn('/bin/true', ['true'], {}),\n"
        "    lambda: subprocess.run(['/bin/true']),\n"
        "    lambda: os.execv('/bin/true', ['true']),\n"
        "    lambda: multiprocessing.Process(target=print).start(),\n"
        "    socket.socket, socket.socketpair,\n"
        "    lambda: os.memfd_create('memory'),\n"
        ")], os.system('true') != 0, tried(lambda: socket.create_connection(('127.0.0.1', 9)))]))"
    )
    assert seen == [[1], ["PermissionError"] * 8, True, "PermissionError"]


def test_what_c_code_asks_of_the_kernel_is_refused_too():
    """`errno` after each call: the filter's answer, and for clone3 the one that makes libraries
    fall back.
    """
    calls = ("shmget(0, 4096, 0o1600)", "prctl(1, 0)", "ptrace(0, 0, 0, 0)", "unshare(0x10000000)")
    seen = ask(
        LOCKED
        + "said = []\n"
        + "".join(f"libc.{call}; said.append(ctypes.get_errno())\n" for call in calls)
        + "libc.syscall(435, 0, 0); said.append(ctypes.get_errno())\n"
        "print(json.dumps([errno.errorcode[number] for number in said]))"
    )
    assert seen == ["EPERM"] * 4 + ["ENOSYS"]


def test_threads_that_were_there_before_are_locked_in_too():
    seen = ask(
        "import threading\n"
        "locked, said = threading.Event(), []\n"
        "before = threading.Thread(target=lambda: (locked.wait(), said.append(tried(os.fork))))\n"
        "before.start()\n" + LOCKED + "locked.set(); before.join()\n"
        "print(json.dumps(said))"
    )
    assert seen == ["PermissionError"]


def test_memory_files_and_descriptors_are_limited():
    limits = Limits(memory=2**28, file_bytes=2**20, open_files=20)
    seen = ask(
        LOCKED + "import resource\n"
        "def fill(path, size): open(path, 'wb').write(bytes(size))\n"
        "print(json.dumps([\n"
        "    tried(lambda: len(bytearray(2**27))),\n"
        "    tried(lambda: len(bytearray(2**28))),\n"
        "    tried(lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))),\n"
        "    tried(lambda: fill('/tmp/small', 2**19)),\n"
        "    tried(lambda: fill('/tmp/another', 2**20)),\n"
        "    tried(lambda: [os.open('/dev/null', os.O_RDONLY) for _ in range(20)]),\n"
        "    resource.getrlimit(resource.RLIMIT_CORE)]))",
        limits=limits,
    )
    fits, bomb, raised, small, large, many, core = seen
    assert (fits, bomb, raised) == (str(2**27), "MemoryError", "ValueError")
    assert (small, large, many, core) == ("None", "OSError", "OSError", [0, 0])


def test_the_processors_time_is_limited():
    process = start(LOCKED + "while True: pass", limits=Limits(cpu_seconds=1))
    try:
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    finally:
        process.kill()


def test_it_ends_with_the_process_that_started_it():
    """The pipe is closed only when nobody holds it any longer."""
    reading, writing = os.pipe()
    code = (
        LOCKED + "libc.prctl(1, 0)\n"
        f"os.write({writing}, b'started')\n"
        "import signal\n"
        "for number in signal.valid_signals() - {9, 19, 32, 33}:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "threading.Event().wait()"
    )
    process = start(code, pass_fds=[writing])
    os.close(writing)
    assert os.read(reading, 7) == b"started"
    process.kill()  # what it was started by; it goes with that
    assert select.select([reading], [], [], 60)[0], "it goes on"
    assert os.read(reading, 1) == b""
    process.wait()
    os.close(reading)


def test_what_it_ended_with_is_told():
    assert start("import os; os._exit(7)").wait() == 7
    assert start("import os; os.abort()", stderr=subprocess.DEVNULL).wait() >= 128


def test_the_lessons_that_a_wheel_carries_are_covered(tmp_path, monkeypatch):
    package = tmp_path / "site" / "pruning101"
    (package / "course" / "material" / "lessons").mkdir(parents=True)
    (package / "course" / "material" / "lessons" / "03_secret.py").touch()
    (package / "course" / "material.py").write_text("FOUND = 'the module'\n")
    for folder in (package, package / "course"):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(sandbox, "PACKAGE", package)
    seen = ask(
        "import json, os, pruning101\n"
        "from pruning101.course import material\n"
        "folder = os.path.dirname(pruning101.__file__) + '/course/material'\n"
        "print(json.dumps([folder, list(os.walk(folder)), material.FOUND]))"
    )
    folder = str(package / "course" / "material")
    assert seen == [folder, [[folder, [], []]], "the module"]


def test_an_environment_anywhere_shows_no_more_than_what_runs_python(tmp_path, monkeypatch):
    """It lies in /tmp here, where the scratch folder is, too, behind a link, and its Python is the
    last of several links.
    """
    folder, real, hop = tmp_path / "deep" / "environment", tmp_path / "real", tmp_path / "hop"
    venv.create(real, symlinks=True)
    (real / "share" / "nbgrader").mkdir(parents=True)
    (real / "etc" / "jupyter").mkdir(parents=True)
    folder.parent.mkdir()
    folder.symlink_to(real)
    hop.symlink_to(os.path.realpath(sys.executable))
    (real / "bin" / "python").unlink()
    (real / "bin" / "python").symlink_to(hop)
    monkeypatch.setattr(sys, "prefix", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    prefix, *seen = ask(
        "import json, os, sys\n"
        f"print(json.dumps([sys.prefix, os.listdir({str(folder)!r}), os.listdir({str(real)!r})]))"
    )
    assert prefix == str(folder)
    for names in seen:  # libraries are looked up at the place that was known when they were built
        assert {"bin", "lib", "pyvenv.cfg"} <= set(names) <= {"bin", "lib", "lib64", "pyvenv.cfg"}


def test_matplotlib_does_not_look_for_fonts_again():
    process = start(
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "import matplotlib.font_manager, matplotlib.pyplot as plt\n"
        "plt.plot([1]); plt.title('a'); plt.savefig('/tmp/figure.png')\n",
        stderr=subprocess.PIPE,
    )
    _, log = process.communicate()
    assert process.returncode == 0, log
    assert "Using fontManager instance from /tmp/matplotlib" in log
    assert "WARNING" not in log


def test_where_nothing_can_be_confined_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    assert sandbox.missing() is None

    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1")
    bwrap.chmod(0o755)
    (tmp_path / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        assert "(bwrap: No permissions to create new namespace)" in sandbox.missing()
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "pyseccomp", raising=False)
        patched.syspath_prepend(tmp_path)
        assert "apt install libseccomp2" in sandbox.missing()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyseccomp", None)
        assert 'pip install "pruning101[grade]"' in sandbox.missing()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path / "empty"))
        assert "apt install bubblewrap" in sandbox.missing()
        with pytest.raises(FileNotFoundError, match="apt install bubblewrap"):
            sandbox.command("module", limits=Limits())
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        assert "Linux only" in sandbox.missing()
