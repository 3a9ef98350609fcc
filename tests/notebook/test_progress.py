"""Progress in the cells of a real kernel: seen while it lasts, and nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.kernel import Kernel
from support.patience import PATIENCE

SLOW = f"""
PATIENCE = {PATIENCE}
import threading
from swarm_notebook.progress import Waiting
seen, go_on = threading.Event(), threading.Event()
def count():
    seen.set()
    return 3
with Waiting("Reading", total=9, unit="blocks", count=count, after=AFTER):
    if not AFTER:
        assert seen.wait(PATIENCE)
        time.sleep(1)  # some refreshes
2 + 2
"""


def test_in_a_cell_it_is_seen_and_goes_away_again() -> None:
    with Kernel() as kernel:
        kernel.run("import time")
        message = kernel.start(SLOW.replace("AFTER", "0.0"))
        shown, state = [], ""
        while state != "idle":
            found = kernel.client.get_iopub_msg(timeout=PATIENCE)
            content = found["content"]
            if found["parent_header"].get("msg_id") != message:
                continue
            state = content.get("execution_state", state)
            assert found["msg_type"] not in {"stream", "error", "comm_open"}, content
            if found["msg_type"] in {"display_data", "update_display_data"}:
                shown.append((content["transient"]["display_id"], content["data"]))
    places, data = zip(*shown, strict=True)
    assert len(set(places)) == 1
    assert (data[0], data[-1]) == ({}, {})
    assert data[1]["text/plain"] == "Reading: 3 of 9 blocks [00:00]"
    assert '<progress value="3" max="9">' in data[1]["text/html"]


@pytest.mark.parametrize(("stored", "fresh"), [("0.0", "60.0"), ("60.0", "0.0")])
def test_a_notebook_compares_equal_whether_there_was_time_to_show_it(
    tmp_path: Path, stored: str, fresh: str
) -> None:
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("import time"),
        nbformat.v4.new_code_cell(SLOW.replace("AFTER", stored)),
    ]
    NotebookClient(book, kernel_name="python3", timeout=int(PATIENCE)).execute()
    text = nbformat.writes(book).replace(f"after={stored}", f"after={fresh}")
    text = text.replace(f"if not {stored}", f"if not {fresh}")
    assert "Reading:" not in text  # nothing of it is saved
    place = tmp_path / "book.ipynb"
    place.write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "-p", "no:cacheprovider", place]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
