"""A front end of a kernel, without a browser: it holds the states of widgets as a page would."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

from support.forkserver import fresh
from support.kernel import Kernel
from support.patience import PATIENCE

VIEW = "application/vnd.jupyter.widget-view+json"


class FrontEnd(Kernel):
    """A kernel, and what it says of its widgets.

    Args:
        path: a folder that comes first on the kernel's path.

    Attributes:
        states: of each widget, as a notebook would save them.
        answers: what was sent last over each comm.
        bytes: of all states that each widget has sent, as JSON.
        running: the cell that does.
        ended: the cells that have come to their end.
    """

    def __init__(self, path: str = "") -> None:
        before = os.environ.get("PYTHONPATH", "")
        on_path = {**fresh(), "PYTHONPATH": f"{path}{os.pathsep}{before}"}
        super().__init__(on_path if path else None)
        self.states: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, dict[str, Any]] = {}
        self.bytes: Counter[str] = Counter()
        self.running = ""
        self.ended: set[str] = set()

    def show(self, code: str) -> str:
        """Run a cell that displays a widget; returns its id."""
        message, shown = self.start(code), ""
        for found in self._heard_until(lambda: message in self.ended):
            content = found["content"]
            assert found["msg_type"] != "error", content
            shown = content.get("data", {}).get(VIEW, {}).get("model_id", shown)
        return shown

    def receive(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next message of the kernel; takes note of cells and states."""
        found = super().receive(timeout)
        content, cell = found["content"], found["parent_header"].get("msg_id", "")
        if found["msg_type"] == "execute_input":
            self.running = cell
        if content.get("execution_state") == "idle":
            self.ended.add(cell)
            if cell == self.running:
                self.running = ""
        if found["msg_type"] in {"comm_open", "comm_msg"}:
            self.answers[content["comm_id"]] = content["data"]
            state = content["data"].get("state", {})
            self.states.setdefault(content["comm_id"], {}).update(state)
            self.bytes[content["comm_id"]] += len(json.dumps(state))
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in self._heard_until(condition):
            pass

    def await_idle(self, message: str) -> None:
        """Until a cell has ended; it may have before this is asked."""
        self.until(lambda: message in self.ended)

    def _heard_until(self, condition: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Live widgets send something every second: silence does not tell that nothing comes."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s"
            yield self.receive()

    def reload(self) -> dict[str, dict[str, Any]]:
        """The states of all widgets, as a page asks for them that is opened later."""
        comm = uuid4().hex
        opened = {"comm_id": comm, "target_name": "jupyter.widget.control", "data": {}}
        message = self.client.session.msg("comm_open", opened, metadata={"version": "1.0.0"})
        self.client.shell_channel.send(message)
        self.tell(comm, {"method": "request_states"})
        self.until(lambda: comm in self.answers)
        return {key: one["state"] for key, one in self.answers[comm]["states"].items()}

    def tell(self, comm: str, data: dict[str, Any]) -> None:
        """What a browser sends for a widget."""
        content = {"comm_id": comm, "data": data}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def act(self, comm: str, action: str, **arguments: Any) -> None:
        content = {"action": action, "with": arguments}
        self.tell(comm, {"method": "custom", "content": content})


def shown_cells(state: dict[str, Any]) -> list[Any]:
    """The text of a generate widget, as its script puts it together."""
    pages = [state[f"page{number}"] for number in range(state["pages"])]
    return [cell for page in pages for cell in page] + state["tail"]
