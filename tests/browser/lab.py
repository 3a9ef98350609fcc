"""A JupyterLab server of its own: no configuration of the user, nothing fetched, its own folder.

Its kernels, and their servers, are forked as `support.forkserver` says: it is a script of tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.forkserver import WARM
from support.patience import PATIENCE

LAB = "from jupyterlab.labapp import main; main()"
STOP_SECONDS = 20.0
TOKEN = "browser-tests"
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    "@jupyterlab/apputils-extension/themes": {"theme": "JupyterLab Light"},
    # A test asks for a cell that has scrolled out of view.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    "@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": True},
}


@dataclass(frozen=True)
class Lab:
    """Where the server listens, and the folder whose notebooks it shows."""

    url: str
    folder: Path
    log: Path

    def address(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/{notebook}?token={TOKEN}&reset"


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[Lab]:
    """Starts the server and waits until it answers; its kernels end with it."""
    notebooks, own = folder / "notebooks", folder / "jupyter"
    notebooks.mkdir(parents=True)
    for name, values in SETTINGS.items():
        path = own / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "IPYTHONDIR": str(own / "ipython"),
    }
    log = folder / "lab.log"
    command = [
        *WARM,
        *(LAB, "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", "--port=0"),
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={notebooks}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield Lab(_await_address(server, own / "runtime", log), notebooks, log)
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _await_address(server: subprocess.Popen[bytes], runtime: Path, log: Path) -> str:
    """The server writes its address into a file when it listens."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            with suppress(ValueError):  # half written
                port = json.loads(path.read_text(encoding="utf-8"))["port"]
                return f"http://127.0.0.1:{port}"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-3000:]}")
