"""`pruning101 lab`: the right place, nothing that asks, and no learner's file overwritten."""

import json
import re
import socket
import subprocess
import sys
import urllib.request

import pytest

from pruning101.course import build, contents, lab


def test_copy_adds_what_lacks_and_overwrites_nothing(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("index.ipynb", "exercises/07_tiny.ipynb", ".ipynb_checkpoints/index.ipynb"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("original")
    lab.copy_notebooks(source, target)
    (target / "exercises" / "07_tiny.ipynb").write_text("my work")
    (target / "index.ipynb").unlink()
    lab.copy_notebooks(source, target)
    assert {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*.ipynb")} == {
        "index.ipynb": "original",
        "exercises/07_tiny.ipynb": "my work",
    }


def test_a_taken_port_is_refused_and_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Port {port} cannot be used"):
            lab._free_port(port)
    assert 8888 <= lab._free_port(None) < 8988


def test_without_a_display_no_browser_is_opened(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not lab._has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert lab._has_display()


def test_a_notebook_is_opened_as_its_kernel_describes_it():
    metadata = {**build.KERNEL, "kept": 1}
    contents.describe(metadata)
    assert metadata["kernelspec"]["name"] == "python3"
    assert metadata["kernelspec"]["display_name"]
    assert metadata["language_info"]["version"] == sys.version.split()[0]
    assert metadata["kept"] == 1
    other = {"kernelspec": {"name": "ir"}}
    contents.describe(other)
    assert other == {"kernelspec": {"name": "ir"}}
    contents.describe(other := {})
    assert other == {}


@pytest.mark.slow
def test_lab_prints_an_address_that_opens_the_index(built, tmp_path, serve):
    address = serve()
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+/lab/tree/notebooks/index\.ipynb\?token=\w+", address
    )
    with urllib.request.urlopen(address, timeout=30) as page:
        text = page.read().decode()
    assert page.status == 200
    assert re.search(r'"news": \{\s*"disabled": true', text)
    assert '"buildCheck": false' in text
    query = address.split("/lab/tree")[0] + "/api/contents/notebooks?token=" + address.split("=")[1]
    with urllib.request.urlopen(query, timeout=30) as listing:
        assert b"07_tiny.ipynb" in listing.read()
    before = (built / "notebooks" / "07_tiny.ipynb").read_bytes()
    lesson = query.replace("?", "/07_tiny.ipynb?")
    with urllib.request.urlopen(lesson, timeout=30) as opened:
        metadata = json.load(opened)["content"]["metadata"]
    assert metadata["language_info"]["version"] == sys.version.split()[0]
    assert (built / "notebooks" / "07_tiny.ipynb").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_stops_lab_without_a_question(built, tmp_path):
    command = [sys.executable, "-m", "pruning101.course", "lab", "--no-browser"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if "Stop it with Ctrl-C" in line:
            break
    process.send_signal(2)
    assert process.wait(timeout=60) == 0
