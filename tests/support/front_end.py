"""A front end of a kernel, without a browser: it holds the states of widgets as a page would."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self
from uuid import uuid4

from jupyter_client.manager import start_new_kernel
from support.kernel import Kernel
from support.patience import PATIENCE

VIEW = "application/vnd.jupyter.widget-view+json"


class FrontEnd(Kernel):
    """A kernel, and what it says of its widgets.

    Attributes:
        states: of each widget, as a notebook would save them.
        bytes: of all states that each widget has sent, as JSON.
    """

    def __init__(self, path: str = "") -> None:
        before = os.environ.get("PYTHONPATH", "")
        self.environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{before}"}
        self.states: dict[str, dict[str, Any]] = {}
        self.bytes: Counter[str] = Counter()
        self.running = ""  # the cell that does

    def __enter__(self) -> Self:
        self.manager, self.client = start_new_kernel(
            PATIENCE, kernel_name="python3", env=self.environment
        )
        return self

    def show(self, code: str) -> str:
        """Run a cell that displays a widget; returns its id."""
        message, shown = self.start(code), ""
        while True:
            found = self.receive()
            content = found["content"]
            assert found["msg_type"] != "error", content
            shown = content.get("data", {}).get(VIEW, {}).get("model_id", shown)
            if self.is_idle(found, message):
                return shown

    def receive(self) -> dict[str, Any]:
        """The next message of the kernel; takes note of states."""
        found = self.client.get_iopub_msg(timeout=PATIENCE)
        content = found["content"]
        if found["msg_type"] == "execute_input":
            self.running = found["parent_header"]["msg_id"]
        if self.is_idle(found, self.running):
            self.running = ""
        if found["msg_type"] in {"comm_open", "comm_msg"}:
            state = content["data"].get("state", {})
            self.states.setdefault(content["comm_id"], {}).update(state)
            self.bytes[content["comm_id"]] += len(json.dumps(state))
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            self.receive()

    def await_idle(self, message: str) -> None:
        while not self.is_idle(self.receive(), message):
            pass

    def reload(self) -> dict[str, dict[str, Any]]:
        """The states of all widgets, as a page asks for them that is opened later."""
        comm = uuid4().hex
        opened = {"comm_id": comm, "target_name": "jupyter.widget.control", "data": {}}
        message = self.client.session.msg("comm_open", opened, metadata={"version": "1.0.0"})
        self.client.shell_channel.send(message)
        self.tell(comm, {"method": "request_states"})
        while True:
            content = self.receive()["content"]
            if content.get("comm_id") == comm:
                return {key: one["state"] for key, one in content["data"]["states"].items()}

    @staticmethod
    def is_idle(found: dict[str, Any], message: str) -> bool:
        idle = found["content"].get("execution_state") == "idle"
        return idle and found["parent_header"].get("msg_id") == message

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
