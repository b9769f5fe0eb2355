"""Opens the course in JupyterLab, in the right place and with nothing that asks or pops up."""

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path

from ..core.files import written_whole
from .material import material

COPY = "pruning101-notebooks"
NEWS = "@jupyterlab/apputils-extension:announcements"
QUIET = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}
}


def lab(*, browser: bool = True, port: int | None = None) -> int:
    """Serve JupyterLab on the course's index until it is stopped, and open it or print its address.

    A checkout is served as it is, so that the code stands beside the lessons. The notebooks of an
    installed package are first copied to `./pruning101-notebooks`. Raises OSError where `port` is
    taken.
    """
    root = material()
    if Path(__file__).resolve().parent in root.parents:
        served, page = copy_notebooks(root / "notebooks", Path(COPY)), "index.ipynb"
    else:
        served, page = root, "notebooks/index.ipynb"
    port = _free_port(port)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    token = os.environ.setdefault("JUPYTER_TOKEN", secrets.token_hex(24))
    query = f"?token={token}" if token else ""
    address = f"http://127.0.0.1:{port}/lab/tree/{page}{query}"
    show = browser and _has_display()
    threading.Thread(target=_announce, args=(address, port, show), daemon=True).start()

    from jupyterlab.labapp import LabApp

    with tempfile.TemporaryDirectory(prefix="pruning101-lab-") as scratch:
        LabApp.launch_instance(argv=arguments(served, port, Path(scratch)))
    return 0


def arguments(served: Path, port: int, scratch: Path) -> list[str]:
    """The command line of JupyterLab, and in `scratch` the settings that keep it quiet.

    The user's own settings, in the user's home, are read but never written, and win.
    """
    settings = scratch / "settings"
    settings.mkdir()
    (settings / "overrides.json").write_text(json.dumps(QUIET))
    (settings / "page_config.json").write_text(json.dumps({"disabledExtensions": [NEWS]}))
    quiet = "{'page_config_data': {'buildAvailable': False, 'buildCheck': False}}"
    options = [
        f"--ServerApp.root_dir={served.resolve()}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.open_browser=False",
        "--ServerApp.answer_yes=True",  # Ctrl-C stops it without a question
        f"--ServerApp.tornado_settings={quiet}",
        # No question on closing whether to save what nobody changed.
        "--ServerApp.contents_manager_class=pruning101.course.contents.Contents",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        f"--LabApp.app_settings_dir={settings}",
        # No tabs of another day, of files that may be gone.
        f"--LabApp.workspaces_dir={scratch / 'workspaces'}",
        "--log-level=ERROR",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--ServerApp.allow_root=True")
    return options


def copy_notebooks(source: Path, target: Path) -> Path:
    """Copy the notebooks under `source` that `target` lacks; no file that is there is touched."""
    for path in sorted(source.rglob("*.ipynb")):
        copy = target / path.relative_to(source)
        if ".ipynb_checkpoints" in path.parts or copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(copy) as part:
            shutil.copyfile(path, part)
    return target


def _announce(address: str, port: int, show: bool) -> None:
    """Wait until the server answers, then say where the page is, and open it if `show`."""
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            time.sleep(0.2)
    print(f"JupyterLab is at\n\n    {address}\n\nStop it with Ctrl-C.", flush=True)
    if show:
        webbrowser.open(address)


def _free_port(wanted: int | None) -> int:
    for port in range(8888, 8988) if wanted is None else [wanted]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return port
    if wanted is None:
        raise OSError("No port from 8888 to 8987 is free: name one with --port.")
    raise OSError(f"Port {wanted} cannot be used: choose another with --port, or leave it out.")


def _has_display() -> bool:
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True
